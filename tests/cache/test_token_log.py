"""Tokens of a stream: keys of its beginnings, and what is kept of a long one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge.cache.conversation import N_NEWEST, thinned
from lminf_edge.cache.token_log import BLOCK, TokenLog, as_tokens, common_prefix
from lminf_edge.errors import UserError


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, n, dtype=np.int32)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_key_names_the_first_tokens_whatever_comes_after(n: int) -> None:
    text = tokens(4 * BLOCK)
    log, other = TokenLog(text), TokenLog(text[:n])
    assert log.key(n, b"a") == other.key(n, b"a")
    other.extend(tokens(500, seed=1))
    assert log.key(n, b"a") == other.key(n, b"a")
    assert len({log.key(n, b"a"), log.key(n, b"b"), log.key(n, b""), log.key(n + 1, b"a")}) == 4


def test_a_key_changes_with_every_token() -> None:
    text = tokens(2 * BLOCK + 9)
    keys = {TokenLog(text).key(len(text), b"")}
    for i in range(len(text)):
        changed = text.copy()
        changed[i] ^= 1
        keys.add(TokenLog(changed).key(len(text), b""))
    assert len(keys) == len(text) + 1


def test_a_key_is_of_tokens_and_salt_apart() -> None:
    """What could be read as the one or the other."""
    a, b = as_tokens([0x41414141]), as_tokens([0x41414141, 0x41414141])
    keys = {TokenLog(log).key(len(log), b"A" * n) for log in (a[:0], a, b) for n in range(13)}
    assert len(keys) == 39


# --- growing and going back -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=12))
def test_extending_and_truncating_is_as_starting_anew(steps: list[tuple[bool, int]]) -> None:
    log, text, fresh = TokenLog(), np.empty(0, np.int32), iter(range(10**6))
    for grow, n in steps:
        if grow:
            new = np.array([next(fresh) % 4096 for _ in range(n)], np.int32)
            log.extend(new)
            text = np.concatenate([text, new])
        else:
            n = min(n, len(text))
            log.truncate(n)
            text = text[:n]
        log.key(len(log), b"x")
    np.testing.assert_array_equal(log.recent(), text)
    assert log.key(len(text), b"x") == TokenLog(text).key(len(text), b"x")


def filled(text: list[int], n_recent: int = BLOCK) -> TokenLog:
    log = TokenLog(n_recent=n_recent)
    log.extend(text)
    return log


def test_a_bounded_log_behaves_like_a_list() -> None:
    rng = random.Random(1)
    log, expected = TokenLog(n_recent=2 * BLOCK), list[int]()
    copies = []
    for _ in range(1000):
        if rng.random() < 0.2:
            n_tokens = rng.randint(max(log.n_base, len(expected) - BLOCK), len(expected))
            log.truncate(n_tokens)
            del expected[n_tokens:]
        else:
            new = [rng.randint(0, 99) for _ in range(rng.choice([1, 1, 1, 7, 300, 2000]))]
            log.extend(new)
            expected.extend(new)
        assert len(log) == len(expected)
        assert log.recent().tolist() == expected[log.n_base :]
        if rng.random() < 0.05:
            assert log.prefix_of(TokenLog([*expected, 1])) == len(expected)
            copies.append((log.copy(), list(expected)))
    assert log.n_base > 10_000
    for copy, then in copies:
        assert len(copy) == len(then)
        whole = TokenLog(then)
        assert copy.prefix_of(whole) == len(then)
        assert copy.key(len(then), b"x") == whole.key(len(then), b"x")
        again = copy.copy(n_recent=2 * BLOCK)
        again.extend([5, 6])
        assert len(copy) == len(then)
        assert len(again) == len(then) + 2
        assert again.prefix_of(TokenLog([*then, 5, 7])) == len(then) + 1


def test_a_million_tokens_take_little_memory() -> None:
    log = TokenLog(n_recent=16384)
    for i in range(1000):
        log.extend(np.arange(1000, dtype=np.int32))
        assert len(log.recent()) >= min(1000 * (i + 1), 16384)
    assert len(log) == 1_000_000
    assert log.nbytes < 200_000
    assert log.copy().nbytes < 200_000


@pytest.mark.parametrize(("at", "expected"), [(0, 0), (255, 0), (700, 0), (5375, 0), (5900, 5900), (5999, 5999)])
def test_where_a_prompt_diverges(at: int, expected: int) -> None:
    """To the token among the recent ones; not at all before them, where nothing can be gone back to."""
    text = list(range(6000))
    log = filled(text)
    assert 5375 < log.n_base <= 5900
    text[at] = -1
    assert log.prefix_of(TokenLog(text)) == expected


@pytest.mark.parametrize(("n_tokens", "expected"), [(0, 0), (100, 0), (5632, 5632), (6000, 6000), (7000, 6000)])
def test_a_shorter_and_a_longer_prompt(n_tokens: int, expected: int) -> None:
    log = filled(list(range(6000)))
    assert log.n_base <= 5632
    assert log.prefix_of(TokenLog(range(n_tokens))) == expected


def test_it_can_be_emptied() -> None:
    log = filled(list(range(6000)))
    assert log.recent().tolist() == list(range(log.n_base, 6000))
    log.truncate(0)
    assert len(log) == 0
    log.extend([1, 2])
    assert log.prefix_of(TokenLog([1, 2, 3])) == 2
    assert log.key(2, b"") == TokenLog([1, 2]).key(2, b"")


def test_recent_is_neither_copied_nor_writeable() -> None:
    log = filled([1, 2, 3])
    view = log.recent()
    assert np.shares_memory(view, log.recent())
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 9


def test_a_view_stays_as_it_is_while_the_log_grows() -> None:
    log = filled(list(range(300)))
    view = log.recent()
    for start in range(300, 5000, 100):
        log.extend(range(start, start + 100))
    assert view.tolist() == list(range(300))


# --- comparing --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("bad", [[2**31], [-(2**31) - 1], [2**64], [0.5], ["a"], [None], [True], [[1], [2, 3]]])
def test_a_token_must_be_int32(bad: list[object]) -> None:
    with pytest.raises(UserError, match="Tokens must be a sequence of whole numbers"):
        as_tokens(bad)  # type: ignore[arg-type]


# --- which checkpoints are kept ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(lengths=st.sets(st.integers(1, 10_000), max_size=300))
def test_thinning_leaves_gaps_no_larger_than_the_way_to_the_end(lengths: set[int]) -> None:
    end = 10_000
    kept = thinned(lengths, end)
    assert kept <= lengths
    assert set(sorted(lengths)[-N_NEWEST:]) <= kept
    for n in lengths - kept:
        newer = min(k for k in kept if k > n)
        older = max((k for k in kept if k < n), default=0)
        assert newer - older <= end - newer
    assert thinned(kept, end) == kept


def test_thinning_keeps_few_of_many() -> None:
    kept = thinned(set(range(0, 1_000_000, 50)), 1_000_000)
    assert len(kept) < 40
