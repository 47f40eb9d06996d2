"""An OpenAI-compatible server for conversations of any length; `create_app` makes it from a TextService."""

from lminf_edge.server.app import create_app
from lminf_edge.server.settings import Settings

__all__ = ["Settings", "create_app"]
