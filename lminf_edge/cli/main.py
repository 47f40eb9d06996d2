"""Parses the command line, runs the subcommand, and turns every foreseeable failure into one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import lminf_edge
from lminf_edge.cli import bench, chat, demo, doctor, generate, info, passkey, ppl, serve
from lminf_edge.cli.common import CommandError

COMMANDS = (chat, serve, generate, ppl, passkey, bench, info, doctor, demo)

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USAGE)


def build_parser() -> Parser:
    parser = Parser(prog="lminf-edge", description="Endless streams in constant memory for llama.cpp models.")
    parser.add_argument("--version", action="version", version=f"lminf-edge {lminf_edge.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[1]
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=(command.__doc__ or "").strip(),
            epilog=getattr(command, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object and nothing else to stdout")
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (CommandError, ValueError, RuntimeError, MemoryError, ImportError) as error:
        return _fail(str(error) or "There is not enough memory.")
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(sentence: str) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return FAILED


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
