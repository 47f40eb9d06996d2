"""Tokens of a conversation: keys of its beginnings, and finding it again in a history without its oldest messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge.engine.snapshots import N_NEWEST, thinned
from lminf_edge.engine.token_log import ANCHOR, BLOCK, TokenLog, find_shifted_tail, rolling_hashes


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, n, dtype=np.int32)


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_key_names_the_first_tokens_whatever_comes_after(n: int) -> None:
    text = tokens(4 * BLOCK)
    log, other = TokenLog(text), TokenLog(text[:n])
    assert log.key(n, 10) == other.key(n, 10)
    other.extend(tokens(500, seed=1))
    assert log.key(n, 10) == other.key(n, 10)
    assert log.key(n, 10) != log.key(n, 11)
    assert log.key(n, 10) != log.key(n + 1, 10)


def test_a_key_changes_with_every_token() -> None:
    text = tokens(2 * BLOCK + 9)
    keys = {TokenLog(text).key(len(text), 0)}
    for i in range(len(text)):
        changed = text.copy()
        changed[i] ^= 1
        keys.add(TokenLog(changed).key(len(text), 0))
    assert len(keys) == len(text) + 1


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
        log.key(len(log), 1)
    np.testing.assert_array_equal(log.view(), text)
    assert log.key(len(text), 1) == TokenLog(text).key(len(text), 1)


def test_a_copy_takes_over_what_was_hashed() -> None:
    text = tokens(5 * BLOCK)
    log = TokenLog(text)
    log.key(len(text), 0)
    branch = np.concatenate([text[: 3 * BLOCK + 5], tokens(900, seed=2)])
    copy = TokenLog(branch, like=log, n_same=3 * BLOCK + 5)
    assert copy.key(len(branch), 0) == TokenLog(branch).key(len(branch), 0)


def test_become_says_how_much_was_the_same() -> None:
    log = TokenLog(tokens(100))
    other = np.concatenate([tokens(60), tokens(80, seed=1)])
    assert log.become(other) == 60
    np.testing.assert_array_equal(log.view(), other)


def test_rolling_hashes_do_not_depend_on_what_is_around() -> None:
    text = tokens(300)
    hashes = rolling_hashes(text)
    assert len(hashes) == len(text) - ANCHOR + 1
    for i in (0, 1, 17, len(hashes) - 1):
        assert hashes[i] == rolling_hashes(text[i : i + ANCHOR])[0]
    assert TokenLog(text).anchor() == hashes[-1]
    assert TokenLog(text[: ANCHOR - 1]).anchor() is None
    assert len(set(hashes.tolist())) == len(hashes)


@settings(deadline=None, max_examples=200)
@given(
    n_system=st.integers(0, 40),
    n_dropped=st.integers(1, 300),
    n_tail=st.integers(ANCHOR, 200),
    n_new=st.integers(1, 50),
)
def test_a_dropped_middle_is_found(n_system: int, n_dropped: int, n_tail: int, n_new: int) -> None:
    system, middle, tail, new = (tokens(n, seed=i) for i, n in enumerate((n_system, n_dropped, n_tail, n_new)))
    log = np.concatenate([system, middle, tail])
    prompt = np.concatenate([system, tail, new])
    assert find_shifted_tail(prompt, log, n_system + n_tail) == n_dropped  # random: the two never begin alike


def test_a_log_that_repeats_itself_is_no_dropped_middle() -> None:
    log = np.concatenate([tokens(50), np.tile(tokens(4, seed=1), 40)])
    for end in range(ANCHOR, len(log)):
        assert find_shifted_tail(log, log, end) == 0
        assert find_shifted_tail(np.concatenate([log[:end], tokens(9, seed=2)]), log, end) == 0


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_what_is_said_to_be_dropped_really_is(data: st.DataObject) -> None:
    few = st.lists(st.integers(0, 2), max_size=30)
    log, prompt = np.array(data.draw(few), np.int32), np.array(data.draw(few), np.int32)
    end = data.draw(st.integers(0, len(prompt)))
    n_dropped = find_shifted_tail(prompt, log, end)
    if n_dropped:
        assert any(
            np.array_equal(np.concatenate([log[:s], log[s + n_dropped :]]), prompt[:end])
            for s in range(len(log) - n_dropped + 1)
        )


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
