"""User errors, as opposed to our bugs."""

from __future__ import annotations

import os

DEBUG_VARIABLE = "LMINF_DEBUG"


class UserError(ValueError):
    """An error of the user or client, in one sentence that says what to do instead.

    Raised on purpose and for nothing else: the command line prints its text, the server responds with status 400. Every
    other exception is our bug and leaves a traceback.
    """


class ModelError(UserError):
    """The model's file is to blame, not what it was asked: the server responds with status 500."""


def wants_debug() -> bool:
    """Whether bugs are shown in full: LMINF_DEBUG is set, or --debug was given."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
