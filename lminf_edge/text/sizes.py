"""How much JSON a request may hold, whatever its bytes: each value costs time with the GIL held, and memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from lminf_edge.errors import UserError

MAX_PARTS = 500_000  # objects, lists and texts of a body: Python makes each in a microsecond at most, with the GIL held
MAX_VALUES = 50_000  # of chat_template_kwargs: each becomes half a KB in a template
MAX_ARGUMENTS = 250_000  # values in the arguments of all calls
MAX_KEYS = 1024  # of an object that llama.cpp gets: each is compared with all before it

# of JSON text without escaped quotes: a text, to its end or that of all, or the beginning of an object or list
_PART = re.compile(rb'"[^"]*"?|[\[{]')


def has_more_parts(text: bytes, most: int = MAX_PARTS) -> bool:
    """Whether JSON text consists of more than `most` objects, lists and texts, names among them."""
    if text.count(b"{") + text.count(b"[") + text.count(b'"') // 2 <= most:  # within texts, too
        return False
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return next(islice(_PART.finditer(bare), most, None), None) is not None


def check_values(values: list[Any], what: str, most: int) -> int:
    """How many values these consist of. Raises UserError for more than `most`, or an object of too many keys."""
    n_values = 0
    while values:
        value = values.pop()
        n_values += 1 + (len(value) if isinstance(value, list) else 0)
        if n_values > most:
            raise UserError(f"{what} may hold {most:,} values at most.")
        if isinstance(value, Mapping):
            if len(value) > MAX_KEYS:
                raise UserError(f"An object in a request may have {MAX_KEYS:,} keys at most, not {len(value):,}.")
            values += value.values()
        elif isinstance(value, list):
            values += value
    return n_values


def check_text(text: str, what: str, most: int) -> int:
    """The same for JSON text. Raises ValueError and RecursionError if it is none, too."""
    if has_more_parts(text.encode("utf-8", "replace"), most):
        raise UserError(f"{what} may hold {most:,} values at most.")
    return check_values([json.loads(text)], what, most)
