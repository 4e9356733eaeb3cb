"""Command line: `python -m fusedprompt COMMAND`, or `fusedprompt COMMAND` where it is installed."""

from __future__ import annotations

import importlib
import os
import sys

COMMANDS = {
    "tune": "learn a soft prompt from a file of examples, or of text",
    "generate": "write with a soft prompt: answers, or on from a text",
    "inspect": "what is in an adapter: method, sizes, norms, and the words that its rows are nearest to",
    "run": "run a script that uses PEFT, unchanged, with its prompts on these ops and routes",
    "demo": "P-tune a small language model on real words and show what the prompt learned",
    "doctor": "report versions, devices and backends, and check every op against plain formulas",
}


def usage() -> str:
    """The commands, a line each."""
    listed = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return (
        f"usage: python -m fusedprompt COMMAND [OPTIONS]\n\ncommands:\n{listed}\n\n"
        "python -m fusedprompt COMMAND --help tells a command's options."
    )


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code (2 for an unknown command)."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in COMMANDS:
        try:
            code: int = importlib.import_module(f"fusedprompt.commands.{command}").main(rest)
            sys.stdout.flush()
        except BrokenPipeError:  # somebody reads no further, as `head` does
            if command == "run":  # whose errors are the program's
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still has to write at its end
            return 1
        return code
    wants_help = command in ("-h", "--help")
    if command and not wants_help:
        print(f"fusedprompt: expected one of {', '.join(COMMANDS)}, got {command!r}\n", file=sys.stderr)
    print(usage(), file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


def console() -> None:
    """The command `fusedprompt`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
