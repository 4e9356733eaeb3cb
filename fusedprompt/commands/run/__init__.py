"""`python -m fusedprompt run script.py`: somebody's PEFT script, unchanged, with its prompts on our ops and routes."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import program
from .models import Models


def main(arguments: list[str]) -> int:
    """Run a program as Python would; errors, SystemExit and signals of the program leave as they came.

    Returns:
        0, if the program came to its end, or as far as a dry run goes.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.program or options.m):
        parser.error("expected a script, or -m MODULE")
    script = None if options.m else options.program[0]
    if script is not None and not Path(script).is_file():
        parser.error(f"script: expected a file, got {script!r}")
    models = Models(options.backend, options.route, options.fix, options.dry_run)
    models.watch()
    try:
        if script is None:
            program.run_module(options.m[0], options.m[1:])
        else:
            program.run_script(script, options.program[1:])
    except program.Enough:
        pass
    finally:
        models.print_report()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedprompt run",
        usage="python -m fusedprompt run [OPTIONS] script.py [ARGUMENTS]\n"
        "       python -m fusedprompt run [OPTIONS] -m MODULE [ARGUMENTS]",
        description="Run a script that uses PEFT, as Python would run it. Each model that learns prompts is patched as "
        "by fusedprompt.apply when it is made; at the end a report says what was done (to stderr, by rank 0). Under a "
        "launcher: accelerate launch -m fusedprompt run script.py.",
    )
    add = parser.add_argument
    add("--fix", action="store_true", help="correct PEFT's defects that can be corrected (docs/peft.md)")
    backends = ("auto", "reference", "triton", "native")
    add("--backend", choices=backends, default="auto", help="of the ops that have it (%(default)s)")
    add("--route", choices=("auto", "shared", "splice"), default="auto", help="docs/routes.md (%(default)s)")
    meaning = "patch nothing; stop at the first call of such a model, and say what would be patched"
    add("--dry-run", action="store_true", help=meaning)
    add("-m", nargs=argparse.REMAINDER, metavar="MODULE ...", help="run a module, as python -m does")
    add("program", nargs=argparse.REMAINDER, metavar="script.py ...", help="the script, and its own arguments")
    return parser
