"""What a stream can recall, kept beside its checkpoints: shared with the stream, not copied. In files: segments.py."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lminf_edge.native import Native
from lminf_edge.structures import Segment

N_SEGMENT = 1024  # tokens of a segment that is full

Range = tuple[int, int]  # tokens [first, last) of a stream
Bytes = npt.NDArray[np.uint8]  # (n_bytes,)


class Archive:
    """What a sequence can recall at one moment; freed with this object."""

    def __init__(self, native: Native, handle: Any, types: tuple[int, int]) -> None:
        """`types`: GGML type numbers of its keys and values."""
        if not handle:
            raise RuntimeError("This context recalls nothing.")
        self.types = types
        self._native, self._handle = native, handle
        weakref.finalize(self, native.archive_free, handle)

    def give(self, ctx: Any, seq_id: int) -> bool:
        """Lets a sequence with the same tokens recall it; False if that has keys of other sizes or types."""
        return bool(self._native.archive_set(ctx, seq_id, self._handle))

    def n_bytes_all(self) -> int:
        """Bytes of memory of all archives of the process, what several share counted once."""
        return int(self._native.archive_bytes())

    def segments(self) -> list[Segment]:
        """Its segments; one with `first` -1, which comes first, has what all their sketches need."""
        n_segments = self._native.archive_segments(self._handle, None, 0)
        found = (Segment * n_segments)()
        self._native.archive_segments(self._handle, found, n_segments)
        return list(found)

    def read(self, segment: Segment) -> Bytes:
        """The contents of one of these. May be called from any thread."""
        data = np.empty(segment.n_bytes, dtype=np.uint8)
        self._native.archive_read(self._handle, ctypes.byref(segment), data.ctypes.data)
        return data

    def add(self, segment: Segment, data: Bytes) -> bool:
        """Adds what `read` gave, what has `first` -1 before all others; sets the segment's id.

        False if it does not fit or there is no memory for it.
        """
        assert data.nbytes == segment.n_bytes
        return bool(self._native.archive_add(self._handle, ctypes.byref(segment), data.ctypes.data))

    def map(self, first: int, path: Path, at: int) -> bool:
        """Takes a full segment from a place in a file that does not change any more; False if that cannot be done.

        Only the thread that decodes may do this with an archive that a sequence shares.
        """
        return bool(self._native.archive_map(self._handle, first, os.fsencode(path), at))

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Tokens that can be recalled, by their index in the stream, ascending."""
        n_ranges = self._native.archive_ranges(self._handle, None, 0)
        found = (ctypes.c_int64 * (2 * n_ranges))()
        self._native.archive_ranges(self._handle, found, n_ranges)
        return tuple(zip(found[::2], found[1::2], strict=True))

    @ranges.setter
    def ranges(self, ranges: Sequence[Range]) -> None:
        """Of these, what is in its segments can be recalled."""
        flat = [token for each in ranges for token in each]
        self._native.archive_set_ranges(self._handle, (ctypes.c_int64 * len(flat))(*flat), len(ranges))
