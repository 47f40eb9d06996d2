"""Saved states of a sequence, stretched to any number of cells.

Filling 32,768 cells by prefill takes many minutes on a small machine. The time of a decode step depends on how many
cells there are, not on what they hold: so a few are computed and saved, and a state with many more is assembled by
repeating their contents. Layouts: llama_kv_cache::state_write and lminf_memory::state_write. Archives likewise: a scan
reads all sketches, and a few tokens' keys from anywhere, so each segment gets memory of its own.
"""

from __future__ import annotations

import struct

import numpy as np

from lminf_edge.cache.archive import N_SEGMENT, Archive
from lminf_edge.errors import UserError
from lminf_edge.structures import Segment

_POSITION_BLOCK = 256  # graph positions are moved back by multiples of this
_LAMBDA_MAGIC, _LAMBDA_VERSION = 0x464E4D4C, 5
_WINDOW, _SLIDING, _RECURRENT = 1, 2, 4  # kinds of parts


class _State:
    """A saved state that is read from its start, and what is written in its place."""

    def __init__(self, data: bytes) -> None:
        self.data, self.offset = data, 0
        self.out = bytearray()

    def read(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def write(self, layout: str, *values: int) -> None:
        self.out += struct.pack("<" + layout, *values)

    def copy(self, layout: str) -> tuple[int, ...]:
        """Reads values and writes them as they are."""
        values = self.read(layout)
        self.write(layout, *values)
        return values

    def copy_bytes(self, n_bytes: int) -> None:
        self.out += self.data[self.offset : self.offset + n_bytes]
        self.offset += n_bytes

    def stretch_rows(self, n_rows: int, n_bytes: int, n_rows_new: int, n_blocks: int = 1) -> None:
        """Reads n_blocks blocks of n_rows rows of n_bytes, and writes each with n_rows_new rows, repeated in turn."""
        count = n_blocks * n_rows * n_bytes
        blocks = np.frombuffer(self.data, np.uint8, count, self.offset).reshape(n_blocks, n_rows * n_bytes)
        self.offset += count
        self.out += np.tile(blocks, (1, -(-n_rows_new // n_rows)))[:, : n_rows_new * n_bytes].tobytes()


def stretch(state: bytes, n_cells: int) -> bytearray:
    """The state of a sequence in llama.cpp's own cache with n_cells cells, at positions 0 to n_cells - 1.

    Raises ValueError if the cache is of a kind whose states are laid out otherwise.
    """
    with_cells = _State(state)
    with_cells.copy("Ii")  # magic, sequence
    _stretch_cache(with_cells, n_cells, 0, len(state))
    return with_cells.out


def stretch_lambda(state: bytes, stream_pos: int) -> bytearray:
    """The state of a sequence in a Λ cache whose next token has this stream position.

    Its sinks are those of `state`, which must have all of them, and so are recurrent states. As in a stream that came
    that far by itself, all cells are in use once there were as many tokens, and graph positions are those right after
    they were moved back.
    """
    far = _State(state)
    far.copy("Ii")
    magic, version, *_, n_seq, is_partial = far.copy("II13i")
    if magic != _LAMBDA_MAGIC or version != _LAMBDA_VERSION or n_seq != 1 or is_partial:
        raise UserError("This is not the state of a sequence in a Λ cache.")
    _, start, resume, n_global, n_sink, begun, _, _, n_parts = far.read("3q6i")
    if start != 0 or resume != 0 or not begun or n_sink != n_global:
        raise UserError("Only a stream that has all its sinks can be stretched.")
    parts = []  # kind, and where it is
    for _ in range(n_parts):
        kind, _, n_bytes = far.read("IIQ")
        parts.append((kind, far.offset, far.offset + n_bytes))
        far.offset += n_bytes
    if far.offset != len(state):
        raise UserError("This is not the state of a sequence in a Λ cache.")
    n_most = [struct.unpack_from("<i", state, start)[0] for kind, start, _ in parts if kind in (_WINDOW, _SLIDING)]
    first = max(0, stream_pos - max(n_most))  # position of the oldest cell
    origin = first - first % _POSITION_BLOCK
    next_pos = stream_pos - origin
    far.write("3q6i", origin, 0, 0, n_global, n_sink, 1, next_pos - 1, next_pos, n_parts)
    for kind, start, end in parts:
        far.offset, head = start, len(far.out)
        far.write("IIQ", kind, 0, 0)
        if kind in (_WINDOW, _SLIDING):
            n_cells_max, n_used = far.read("2i")
            far.offset += 4 * n_used  # the cells' places
            n_cells = min(stream_pos, n_cells_max)
            far.write("2i", n_cells_max, n_cells)
            far.out += np.arange(n_cells, dtype="<u4").tobytes()
            _stretch_cache(far, n_cells, next_pos - n_cells, end)
        elif kind == _RECURRENT:
            far.copy("I")  # a cell, whose position follows
            far.read("i")
            far.write("i", next_pos - 1)
        far.copy_bytes(end - far.offset)
        struct.pack_into("<Q", far.out, head + 8, len(far.out) - head - 16)
    return far.out


def stretch_archive(archive: Archive, made: Archive, first: int, last: int, n_vocab: int) -> None:
    """Makes `made`, an empty one, hold tokens [first, last): the full segments of `archive` in turn, as other text.

    Raises UserError if there is no memory for it.
    """
    parts = [(part, archive.read(part)) for part in archive.segments()]
    full = [data for part, data in parts if part.n_tokens == N_SEGMENT]
    rng = np.random.default_rng(0)

    def add(i: int) -> bool:
        data = full[i % len(full)]
        if data.nbytes:  # else no layer recalls. A segment ends with its tokens; what reads the same would be left out
            data[-4 * N_SEGMENT :] = rng.integers(0, n_vocab, N_SEGMENT, dtype=np.int32).view(np.uint8)
        return made.add(Segment(0, i * N_SEGMENT, N_SEGMENT, data.nbytes), data)

    is_made = all(made.add(part, data) for part, data in parts if part.first < 0)
    is_made = is_made and all(add(i) for i in range(first // N_SEGMENT, -(-last // N_SEGMENT)))
    if not is_made:
        raise UserError(
            f"An archive of {last - first} tokens does not fit into memory: choose a smaller depth, n_archive or "
            "archive type."
        )
    made.ranges = ((first, last),)


def _stretch_cache(state: _State, n_cells: int, first_pos: int, end: int) -> None:
    """What llama_kv_cache::state_write writes for a cache that keeps one sequence, up to `end`.

    Raises UserError if that is laid out otherwise.
    """
    try:
        _stretch_tensors(state, n_cells, first_pos, end)
    except (struct.error, ValueError):  # what is taken for sizes are none
        state.offset = -1
    if state.offset != end:
        raise UserError("The states of this model's cache cannot be stretched.")


def _stretch_tensors(state: _State, n_cells: int, first_pos: int, end: int) -> None:
    n_stream, n_saved = state.read("II")
    state.write("II", n_stream, n_cells)
    state.offset += 12 * n_saved
    cells = np.empty((n_cells, 3), dtype="<i4")  # position, number of sequences, sequence
    cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(first_pos, first_pos + n_cells), 1, 0
    state.out += cells.tobytes()

    is_transposed, n_layer = state.copy("II")
    if n_stream != 1 or n_saved < 1 or is_transposed > 1 or not 0 < n_layer < 4096:
        raise ValueError
    for _ in range(n_layer):
        _, row_bytes = state.copy("iQ")
        state.stretch_rows(n_saved, row_bytes, n_cells)
    for _ in range(n_layer if state.offset < end else 0):  # with MLA, values are a part of the keys
        if is_transposed:
            _, element_bytes, n_embd = state.copy("iII")
            state.stretch_rows(n_saved, element_bytes, n_cells, n_blocks=n_embd)
        else:
            _, row_bytes = state.copy("iQ")
            state.stretch_rows(n_saved, row_bytes, n_cells)
