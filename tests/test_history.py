"""TokenHistory against a plain list."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lminf_edge.errors import UserError
from lminf_edge.history import BLOCK, TokenHistory, as_tokens, common_prefix


def filled(tokens: list[int], n_recent: int = BLOCK) -> TokenHistory:
    history = TokenHistory(n_recent)
    history.extend(tokens)
    return history


def test_behaves_like_a_list() -> None:
    rng = random.Random(1)
    history, expected = TokenHistory(2 * BLOCK), list[int]()
    snapshots = []
    for _ in range(2000):
        if rng.random() < 0.2:
            n_tokens = rng.randint(max(history.n_digested, len(expected) - BLOCK), len(expected))
            history.truncate(n_tokens)
            del expected[n_tokens:]
        else:
            new = [rng.randint(0, 99) for _ in range(rng.choice([1, 1, 1, 7, 300, 2000]))]
            history.extend(new)
            expected.extend(new)
        assert len(history) == len(expected)
        assert history.recent().tolist() == expected[history.n_digested :]
        if rng.random() < 0.05:
            assert history.common_prefix(as_tokens([*expected, 1])) == len(expected)
            snapshots.append((history.snapshot(), list(expected)))
    assert history.n_digested > 10_000
    for past, then in snapshots:
        assert len(past) == len(then)
        assert past.common_prefix(as_tokens(then)) == len(then)
        again = TokenHistory(2 * BLOCK)
        again.restore(past)
        again.extend([5, 6])
        assert len(again) == len(then) + 2
        assert again.common_prefix(as_tokens([*then, 5, 7])) == len(then) + 1


def test_a_million_tokens_take_little_memory() -> None:
    history = TokenHistory()
    for _ in range(1000):
        history.extend(np.arange(1000, dtype=np.int32))
    assert len(history) == 1_000_000
    assert history.snapshot().nbytes < 200_000


@pytest.mark.parametrize(
    ("at", "expected"), [(0, 0), (255, 0), (256, 256), (700, 512), (5119, 4864), (5900, 5900), (5999, 5999)]
)
def test_where_a_prompt_turns_off(at: int, expected: int) -> None:
    """To the token among the recent ones, to the block before them."""
    tokens = list(range(6000))
    history = filled(tokens)
    assert 5000 < history.n_digested <= 5900
    tokens[at] = -1
    assert history.common_prefix(as_tokens(tokens)) == expected


@pytest.mark.parametrize(
    ("n_tokens", "expected"), [(0, 0), (100, 0), (256, 256), (300, 256), (6000, 6000), (7000, 6000)]
)
def test_a_shorter_and_a_longer_prompt(n_tokens: int, expected: int) -> None:
    assert filled(list(range(6000))).common_prefix(np.arange(n_tokens, dtype=np.int32)) == expected


def test_two_pasts_begin_alike() -> None:
    shorter, longer = filled(list(range(3000))), filled(list(range(3000)))
    longer.extend(range(3000, 3100))
    assert shorter.view().begins_like(longer.view(), 3000)
    longer.truncate(2999)
    longer.extend([7])
    assert not shorter.view().begins_like(longer.view(), 3000)
    assert shorter.view().begins_like(longer.view(), 2999)


def test_the_distant_past_cannot_be_read_or_taken_back() -> None:
    history = filled(list(range(6000)))
    with pytest.raises(ValueError, match="cannot go back to 100"):
        history.truncate(100)
    with pytest.raises(IndexError, match="not among the recent"):
        history.token(100)
    assert history.token(5999) == 5999
    history.truncate(0)
    assert len(history) == 0


def test_a_view_is_neither_copied_nor_writeable() -> None:
    history = filled([1, 2, 3])
    view = history.recent()
    assert np.shares_memory(view, history.recent())
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 9


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


@pytest.mark.parametrize("bad", [[2**31], [-(2**31) - 1], [2**70], [1.5], ["a"], [None], [[1], [2, 3]], [True]])
def test_a_token_must_be_int32(bad: list[int]) -> None:
    with pytest.raises(UserError, match="whole numbers"):
        as_tokens(bad)
