"""Parses the command line, runs the subcommand, and turns every failure into one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import lminf_edge
from lminf_edge import native
from lminf_edge.cli import bench, chat, demo, doctor, generate, get, info, launch, passkey, ppl, rpc_server, serve
from lminf_edge.cli.common import print_error, use_hub
from lminf_edge.errors import DEBUG_VARIABLE, wants_debug

COMMANDS = (chat, serve, launch, generate, ppl, passkey, bench, info, doctor, demo, get, rpc_server)

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USAGE)


def build_parser() -> Parser:
    parser = Parser(prog="lminf-edge", description="Endless streams in constant memory for llama.cpp models.")
    parser.add_argument("--version", action="version", version=f"lminf-edge {lminf_edge.__version__}")
    add_debug(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[1].replace("_", "-")
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=(command.__doc__ or "").strip(),
            epilog=getattr(command, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print one JSON object and nothing else to stdout")
        add_debug(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,  # or a subcommand without it would undo the one before it
        help=f"show where an error comes from; the same as {DEBUG_VARIABLE}=1",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    # argparse takes what follows -- for positional arguments, but where they may stand differs by version
    at = given.index("--") if "launch" in given[:2] and "--" in given else len(given)
    args = build_parser().parse_args(given[:at])
    args.rest = given[at + 1 :]
    if getattr(args, "debug", False):
        os.environ[DEBUG_VARIABLE] = "1"  # for the server, and for processes that we start
    native.exits_on_abort = not wants_debug()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            use_hub(args)
            status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        print_error(error)
        return FAILED


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
