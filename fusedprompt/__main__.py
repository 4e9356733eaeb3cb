"""Command line: `python -m fusedprompt doctor` and `python -m fusedprompt demo`."""

from __future__ import annotations

import importlib
import sys

USAGE = """usage: python -m fusedprompt COMMAND [OPTIONS]

commands:
  demo     P-tune a small language model on real words and show what the prompt learned
  doctor   report versions, devices and backends, and check every op against plain formulas

python -m fusedprompt COMMAND --help tells a command's options."""


def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code (2 for an unknown command)."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("demo", "doctor"):
        code: int = importlib.import_module(f"fusedprompt.commands.{command}").main(rest)
        return code
    wants_help = command in ("-h", "--help")
    print(USAGE, file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
