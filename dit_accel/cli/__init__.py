"""The `dit-accel` command. Nothing heavy is imported before a subcommand runs."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from dit_accel.cli import bench, calibrate, demo, env, evaluate, generate, inspect

COMMANDS = (demo, calibrate, generate, evaluate, inspect, bench, env)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = _Parser(
        prog="dit-accel",
        description="Calibrate a diffusers video or image transformer once, then generate faster.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.configure(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 with one line on stderr on failure, 2 for a wrong command line.

    A command that has a result to print and failed all the same lists `failures` in it.
    """
    args = build_parser().parse_args(argv)
    try:
        # stdout is for the result alone, whatever libraries print on the way.
        with contextlib.redirect_stdout(sys.stderr):
            data, text = args.run(args)
    except (ValueError, OSError) as error:
        return _fail(args.command, str(error))
    except KeyboardInterrupt:
        print(f"dit-accel {args.command}: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        # torch's, which is not imported for its name alone, and what it says of a CPU's memory
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        return _fail(args.command, f"{error} (fewer frames or pixels take less)")
    with contextlib.suppress(BrokenPipeError):  # a reader such as head may have enough
        print(json.dumps(data, indent=2) if args.json else text, flush=True)
    return _fail(args.command, "; ".join(failures)) if (failures := data.get("failures")) else 0


def _fail(command: str, reason: str) -> int:
    print(f"dit-accel {command}: error: {' '.join(reason.split())}", file=sys.stderr)
    return 1
