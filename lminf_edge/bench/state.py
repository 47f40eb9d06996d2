"""Saved states of a sequence, stretched to any number of cells.

Filling 32,768 cells by prefill takes many minutes on a small machine. The time of a decode step depends on how many
cells there are, not on what they hold: so a few are computed and saved, and a state with many more is assembled by
repeating their contents. Layouts: llama_kv_cache::state_write and lminf_memory::state_write.
"""

from __future__ import annotations

import struct

import numpy as np

from lminf_edge.errors import UserError

_POSITION_BLOCK = 256  # graph positions are moved back by multiples of this
_LAMBDA_MAGIC = 0x464E4D4C


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
    _stretch_cache(with_cells, n_cells, 0)
    if with_cells.offset != len(state):
        raise UserError("The states of this model's cache cannot be stretched.")
    return with_cells.out


def stretch_lambda(state: bytes, stream_pos: int) -> bytearray:
    """The state of a sequence in a Λ cache whose next token has this stream position.

    Its sinks are those of `state`, which must have all of them. As in a stream that came that far by itself, all cells
    are in use once there were as many tokens, and graph positions are those right after they were moved back.
    """
    far = _State(state)
    far.copy("Ii")
    magic, _, *_, n_layer, n_seq = far.copy("II8i")
    if magic != _LAMBDA_MAGIC or n_seq != 1:
        raise UserError("This is not the state of a sequence in a Λ cache.")
    _, start, resume, n_global, n_sink, begun, _, n_cells_max, n_used = far.read("3q6i")
    far.offset += 4 * n_used  # the cells' places
    if start != 0 or resume != 0 or not begun or n_sink != n_global or n_layer < 1:
        raise UserError("Only a stream that has all its sinks can be stretched.")
    n_cells = min(stream_pos, n_cells_max)
    first = stream_pos - n_cells
    origin = first - first % _POSITION_BLOCK
    far.write("3q6i", origin, 0, 0, n_global, n_sink, 1, stream_pos - 1 - origin, n_cells_max, n_cells)
    far.out += np.arange(n_cells, dtype="<u4").tobytes()
    _stretch_cache(far, n_cells, first - origin)
    far.copy_bytes(len(state) - far.offset)  # the sinks
    return far.out


def _stretch_cache(state: _State, n_cells: int, first_pos: int) -> None:
    """What llama_kv_cache::state_write writes for a cache that keeps one sequence."""
    (n_stream,) = state.copy("I")
    (n_saved,) = state.read("I")
    if n_stream != 1 or n_saved < 1:
        raise UserError("The states of this model's cache cannot be stretched.")
    state.write("I", n_cells)
    state.offset += 12 * n_saved
    cells = np.empty((n_cells, 3), dtype="<i4")  # position, number of sequences, sequence
    cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(first_pos, first_pos + n_cells), 1, 0
    state.out += cells.tobytes()

    is_transposed, n_layer = state.copy("II")
    if is_transposed > 1 or not 0 < n_layer < 4096:
        raise UserError("The states of this model's cache cannot be stretched.")
    for _ in range(n_layer):
        _, row_bytes = state.copy("iQ")
        state.stretch_rows(n_saved, row_bytes, n_cells)
    for _ in range(n_layer):
        if is_transposed:
            _, element_bytes, n_embd = state.copy("iII")
            state.stretch_rows(n_saved, element_bytes, n_cells, n_blocks=n_embd)
        else:
            _, row_bytes = state.copy("iQ")
            state.stretch_rows(n_saved, row_bytes, n_cells)
