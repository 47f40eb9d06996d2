"""An OpenAI-compatible server for endless conversations; `create_app` makes it from an engine."""

from lminf_edge.server.app import create_app
from lminf_edge.server.settings import Settings

__all__ = ["Settings", "create_app"]
