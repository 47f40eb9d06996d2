"""Loads a state with every field changed in turn: run as a process of its own, so that an abort is seen as one.

Usage: state_mutations.py MODEL auto|fused|stock. Prints how many changed states were refused and how many were taken. A
state is either refused with a sentence or can be continued; in both cases the sequence is usable.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

import numpy as np
from native_context import NativeContext, last_error
from reference import tiny_models

L, G = 32, 4
TOKENS = tiny_models.tokens(300)
HEADER, SEQUENCE, PART = 8 + 15 * 4, 3 * 8 + 6 * 4, 16  # bytes: llama.cpp's own and ours; of a sequence; of a part
WINDOW, SLIDING, RECURRENT, ROUTER = 1, 2, 4, 5  # kinds of parts; the first two hold cells
VALUES = (0, 1, -1, 576, (1 << 31) - 2, (1 << 31) - 1, -(1 << 31))
LARGE_VALUES = (*VALUES, 1 << 31, 1 << 33, 1 << 62, (1 << 63) - 257, (1 << 63) - 1, -(1 << 63))


def open_context(attention: str, n_seq_max: int) -> NativeContext:
    return NativeContext(
        sys.argv[1], L, G, n_ubatch=32, n_slack=8, pos_bound=576, n_seq_max=n_seq_max, attention=attention
    )


def states(attention: str, n_seq_max: int) -> Iterator[bytes]:
    """Of an empty sequence and of short, long, copied and skipped ones."""
    with open_context(attention, n_seq_max) as context:
        seq_id = n_seq_max - 1
        for n_before, n_skipped, n_after in ((0, 0, 0), (1, 0, 0), (30, 0, 0), (700, 0, 0), (9, 99, 0), (9, 503, 5)):
            context.rollback(0, seq_id)
            for i in range(0, n_before, 100):
                context.feed(TOKENS[: min(100, n_before - i)], seq_id)
            assert not n_skipped or context.skip(n_skipped, seq_id)
            if n_after:
                context.feed(TOKENS[:n_after], seq_id)
            yield context.save(seq_id)
        assert context.rollback(0, seq_id)
        assert context.seq_start((1 << 62) + 77, seq_id)
        yield context.save(seq_id)


def fields(state: bytes, n_streams: int) -> tuple[list[int], int]:
    """Where the numbers lie that are not contents of tensors, four bytes each, and where the first tensor begins."""
    found = list(range(0, HEADER + SEQUENCE, 4))
    n_parts, at = struct.unpack_from("<i", state, HEADER + SEQUENCE - 4)[0], HEADER + SEQUENCE
    first = 0
    for _ in range(n_parts):
        kind, _, size = struct.unpack_from("<IIQ", state, at)
        begin, end = at + PART, at + PART + size
        if kind in (WINDOW, SLIDING):
            (n_used,) = struct.unpack_from("<i", state, begin + 4)
            words = range(at, min(end, begin + 8 + 4 * n_used + 4 + 4 * n_streams + 12 * n_used + 24) - 3, 4)
            # of many cells some will do
            found += [i for i in words if i < begin + 8 or i >= words.stop - 40 or (i - at) % 460 == 0]
        else:
            # sinks are contents alone
            n_bytes = {RECURRENT: 32, ROUTER: 64}.get(kind, 0)
            words = range(at, min(end, begin + n_bytes) - 3, 4)
            found += words
        first = first or words.stop
        at = end
    return found, first


def mutations(state: bytes, n_streams: int) -> Iterator[bytes]:
    """Single fields, in all that lies before the tensors and the first words among them; single bytes; random ones."""
    places, end = fields(state, n_streams)
    for at in places:
        (old,) = struct.unpack_from("<i", state, at)
        for value in (*VALUES, old + 1, old - 1, old + 256, old - 256):
            if -(1 << 31) <= value < 1 << 31 and value != old:
                yield state[:at] + struct.pack("<i", value) + state[at + 4 :]
    for at in (*range(HEADER, HEADER + 24, 8), HEADER + SEQUENCE + 8):
        (old,) = struct.unpack_from("<q", state, at)
        for value in (*LARGE_VALUES, old + 1, old - 1, old + 256, old - 256):
            if -(1 << 63) <= value < 1 << 63 and value != old:
                yield state[:at] + struct.pack("<q", value) + state[at + 8 :]
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(state)
        for at in rng.choice(places, rng.integers(1, 4)):
            changed[max(8, at) + rng.integers(4)] = rng.integers(256)
        yield bytes(changed)
    for length in (*range(0, end, 19), *(at + 2 for at in places if at > end)):
        yield state[:length]


def main() -> None:
    attention = sys.argv[2]
    n_refused = n_taken = 0
    for n_seq_max in (1, 2):
        seq_id = n_seq_max - 1
        with open_context(attention, n_seq_max) as context:
            for state in list(states(attention, n_seq_max))[:: 3 * n_seq_max - 2]:
                assert context.load(state, seq_id)
                for changed in mutations(state, n_seq_max):
                    if context.load(changed, seq_id):
                        n_taken += 1
                        n_tokens = 300
                    else:
                        n_refused += 1
                        n_tokens = 1
                        assert changed[:4] != state[:4] or len(changed) < 8 or "does not fit" in last_error()
                    position = context.info(seq_id).stream_pos
                    context.feed(TOKENS[:n_tokens], seq_id)
                    assert context.info(seq_id).stream_pos == position + n_tokens
                    assert context.info(seq_id).max_graph_pos < context.info(seq_id).pos_bound
                    context.rollback(position, seq_id)
                    assert context.rollback(0, seq_id)
    print(n_refused, n_taken)


main()
