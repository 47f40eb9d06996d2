"""Whose fault an error is."""

from __future__ import annotations


class UserError(ValueError):
    """What the user or the client did wrong, in one sentence that says what to do instead.

    Raised on purpose, for nothing else: the command line prints its text, the server answers it with status 400. Every
    other exception is a fault of ours and leaves a traceback.
    """
