"""What a stream can recall, kept beside its checkpoints: in memory only, and shared with the stream, not copied."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lminf_edge.config import physical_memory
from lminf_edge.native import Native

if TYPE_CHECKING:
    from lminf_edge.cache.conversation import Stored

_SHARE = 4  # of the machine's memory that archives may take, as a divisor
_LEAST = 1 << 30  # bytes, where that is not known


class Archive:
    """The archive of a sequence at one moment; freed with this object.

    n_bytes_all()   bytes of all archives of the process, what several share counted once
    """

    def __init__(self, native: Native, handle: Any) -> None:
        self.handle = handle
        self.n_bytes_all = native.archive_bytes
        weakref.finalize(self, native.free_archive, handle)


def default_budget() -> int:
    """Bytes that all archives of a process may take by default: a quarter of its memory."""
    return (physical_memory() or _LEAST * _SHARE) // _SHARE


def trim(stored: Iterable[Stored], budget: int) -> None:
    """Drops archives of checkpoints, the first first, until all of the process fit a budget of bytes.

    What streams that are running can recall stays.
    """
    for each in stored:
        archive = each.checkpoint.archive if each.checkpoint is not None else None
        if each.checkpoint is None or archive is None:
            continue
        if archive.n_bytes_all() <= budget:
            return
        each.checkpoint = replace(each.checkpoint, archive=None)
        del archive
