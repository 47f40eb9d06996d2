"""The command lminf-edge, a file per subcommand."""

from lminf_edge.cli.main import main

__all__ = ["main"]
