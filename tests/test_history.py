"""TokenHistory against a plain list."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from lminf_edge.history import TokenHistory, as_tokens, common_prefix


def filled(tokens: list[int]) -> TokenHistory:
    history = TokenHistory()
    history.extend(tokens)
    return history


def test_behaves_like_a_list() -> None:
    rng = random.Random(1)
    history, expected = TokenHistory(), list[int]()
    snapshots = []
    for _ in range(2000):
        if rng.random() < 0.2:
            n_tokens = rng.randint(0, len(expected))
            history.truncate(n_tokens)
            del expected[n_tokens:]
        else:
            new = [rng.randint(0, 99) for _ in range(rng.choice([1, 1, 1, 7, 300]))]
            history.extend(new)
            expected.extend(new)
        assert len(history) == len(expected)
        if rng.random() < 0.1:
            snapshots.append((history.snapshot(), list(expected)))
            assert history.view().tolist() == expected
    assert all(snapshot.tolist() == then for snapshot, then in snapshots)


def test_view_is_neither_copied_nor_writeable() -> None:
    history = filled([1, 2, 3])
    view = history.view()
    assert np.shares_memory(view, history.view())
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 9


def test_truncating_costs_no_copy_without_snapshots() -> None:
    history = filled([1, 2, 3])
    view = history.view()
    history.truncate(2)
    history.extend([4])
    assert np.shares_memory(view, history.view())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([9], [1], 0),
    ],
)
def test_common_prefix(a: list[int], b: list[int], expected: int) -> None:
    assert common_prefix(as_tokens(a), as_tokens(b)) == expected
    assert common_prefix(as_tokens(b), as_tokens(a)) == expected


@pytest.mark.parametrize("at", [0, 1, 65535, 65536, 65537, 131072, 199999])
def test_common_prefix_across_blocks(at: int) -> None:
    a = np.arange(200_000, dtype=np.int32)
    b = a.copy()
    b[at] = -1
    assert common_prefix(a, b) == at


def test_millions_of_tokens_are_compared_at_memory_speed() -> None:
    a = np.arange(4_000_000, dtype=np.int32)
    started = time.perf_counter()
    assert common_prefix(a, a.copy()) == len(a)
    assert time.perf_counter() - started < 0.5


def test_appending_token_by_token_is_linear() -> None:
    def seconds(n_tokens: int) -> float:
        history = TokenHistory()
        started = time.perf_counter()
        for token in range(n_tokens):
            history.extend([token])
        return time.perf_counter() - started

    assert seconds(80_000) < 30 * seconds(8_000)


@pytest.mark.parametrize("bad", [[2**31], [-(2**31) - 1]])
def test_a_token_must_be_int32(bad: list[int]) -> None:
    with pytest.raises(OverflowError):
        as_tokens(bad)
