"""Whose fault an error is."""

from __future__ import annotations

import os

DEBUG_VARIABLE = "LMINF_DEBUG"


class UserError(ValueError):
    """What the user or the client did wrong, in one sentence that says what to do instead.

    Raised on purpose, for nothing else: the command line prints its text, the server answers it with status 400. Every
    other exception is a fault of ours and leaves a traceback.
    """


def wants_debug() -> bool:
    """Whether faults of ours are to be shown with all that is known of them: LMINF_DEBUG is set, or --debug given."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
