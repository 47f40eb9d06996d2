"""What a stream can recall, kept beside its checkpoints: in memory only, and shared with the stream, not copied."""

from __future__ import annotations

import ctypes
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
    """What a sequence can recall at one moment; freed with this object."""

    def __init__(self, native: Native, ctx: Any, seq_id: int) -> None:
        self._native = native
        get = native.declare("lminf_archive_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        free = native.declare("lminf_archive_free", None, ctypes.c_void_p)
        self._handle = get(ctx, seq_id)
        if not self._handle:
            raise RuntimeError("This context recalls nothing.")
        weakref.finalize(self, free, self._handle)

    def give(self, ctx: Any, seq_id: int) -> bool:
        """Lets a sequence with the same tokens recall it; False if that has keys of other sizes or types."""
        pointer, int32 = ctypes.c_void_p, ctypes.c_int32
        return bool(
            self._native.declare("lminf_archive_set", ctypes.c_bool, pointer, int32, pointer)(ctx, seq_id, self._handle)
        )

    def n_bytes_all(self) -> int:
        """Bytes of all archives of the process, what several share counted once."""
        return int(self._native.declare("lminf_archive_bytes", ctypes.c_uint64)())


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
