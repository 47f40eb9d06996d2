"""Drafts without a draft model: what they propose, and when they stop."""

from __future__ import annotations

import numpy as np
import pytest

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.drafts import N_FIRST, N_MATCH, N_MOST, N_PAUSE, N_PLAIN, NgramDrafts


def measured(plain: float = 1.0) -> NgramDrafts:
    drafts = NgramDrafts()
    for _ in range(N_PLAIN):
        assert not len(drafts(as_tokens([1, 2, 3] * 10)))  # what a step takes is not known yet
        drafts.learn(0, 0, plain)
    return drafts


def test_what_followed_is_proposed() -> None:
    drafts = measured()
    assert drafts(as_tokens([7, 1, 2, 3, 40, 41, 42, 43, 44, 45, 9, 1, 2, 3])).tolist() == [40, 41, 42, 43]
    # the newest place, not the first
    assert drafts(as_tokens([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3])).tolist() == [5, 8, 1, 2]
    assert drafts(as_tokens([5, 5, 5, 5])).tolist() == [5]
    for nothing in ([], [1], [1, 2, 3], [4, 1, 2, 3, 4, 5, 2, 3]):
        assert drafts(as_tokens(nothing)).tolist() == []


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_search(seed: int) -> None:
    drafts, rng = measured(), np.random.default_rng(seed)
    for _ in range(300):
        recent: Tokens = rng.integers(0, 4, rng.integers(0, 40)).astype(np.int32)
        n = len(recent)
        places = [i for i in range(N_MATCH, n) if n > N_MATCH and (recent[i - N_MATCH : i] == recent[-N_MATCH:]).all()]
        expected = recent[places[-1] : places[-1] + N_FIRST].tolist() if places else []
        assert drafts(recent).tolist() == expected


def test_they_grow_while_they_are_right() -> None:
    drafts, text = measured(), as_tokens([1, 2, 3, *range(10, 60), 1, 2, 3])
    lengths = []
    for _ in range(4):
        lengths.append(len(drafts(text)))
        drafts.learn(lengths[-1], lengths[-1], 1.5)
    assert lengths == [N_FIRST, 2 * N_FIRST, N_MOST, N_MOST]
    drafts.learn(N_MOST, 3, 1.5)
    assert len(drafts(text)) == N_MOST // 2


def test_they_pause_when_they_do_not_pay() -> None:
    drafts, text = measured(), as_tokens([1, 2, 3, 4, 5, 6, 1, 2, 3])
    for pause in (N_PAUSE, 2 * N_PAUSE, 4 * N_PAUSE):
        assert len(drafts(text))
        drafts.learn(4, 1, 5.0)  # two tokens in the time of five
        for _ in range(pause):
            assert not len(drafts(text))
            drafts.learn(0, 0, 1.0)
    drafts.learn(4, 4, 2.0)  # five tokens in the time of two
    assert len(drafts(text))
    for _ in range(10):
        drafts.learn(1, 0, 1.4)
    assert not len(drafts(text))
