"""Drafts without a draft model: what followed the last tokens when they last occurred in the window.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding, llama.cpp's "ngram-simple"): in code that is
edited, in answers that quote and in tool calls the same stretches come again. Tokens that the model would not have
chosen are rolled back, so drafts change how fast an answer comes and, but for the rounding of larger batches, nothing.
"""

from __future__ import annotations

import numpy as np

from lminf_edge.cache.token_log import Tokens, as_tokens

N_MATCH = 3  # tokens that must have occurred before
N_FIRST, N_MOST = 4, 16  # tokens of a draft: twice as many after a right one, half as many after a wrong one
N_PLAIN = 8  # steps without drafts whose time is known before there are any
N_PAUSE, N_LONGEST_PAUSE = 32, 1024  # tokens without drafts once they have not paid; twice as many each time
_KEEP = 0.8  # of what was known of speeds, after one more step


class NgramDrafts:
    """The drafts of one request. They pause while they cost more time than they save, by measured times."""

    def __init__(self) -> None:
        self._length = N_FIRST
        self._n_plain = 0
        self._plain_seconds = 0.0  # of a step without drafts
        self._gain = 0.0  # seconds saved by a step with drafts
        self._pause = N_PAUSE
        self._wait = 0  # tokens to go without drafts

    def __call__(self, recent: Tokens) -> Tokens:
        """Drafts (n_drafts,) after the recent tokens (n_tokens,), int32; none if there is nothing to say."""
        if self._n_plain < N_PLAIN or self._wait > 0 or len(recent) <= N_MATCH:
            return as_tokens([])
        key, before = recent[-N_MATCH:], recent[:-1]
        ends = np.flatnonzero(before[N_MATCH - 1 :] == key[-1]) + N_MATCH - 1
        for i in range(1, N_MATCH):
            ends = ends[before[ends - i] == key[-1 - i]]
        if not len(ends):
            return as_tokens([])
        return recent[ends[-1] + 1 :][: self._length]

    def learn(self, n_drafts: int, n_accepted: int, seconds: float) -> None:
        """What a step took, in which n_drafts were tried and n_accepted of them were right."""
        if not n_drafts:
            self._n_plain += 1
            weight = max(1 - _KEEP, 1 / self._n_plain)
            self._plain_seconds += weight * (seconds - self._plain_seconds)
            self._wait = max(0, self._wait - 1)
            return
        self._length = min(2 * self._length, N_MOST) if n_accepted == n_drafts else max(1, self._length // 2)
        self._gain = _KEEP * self._gain + (1 - _KEEP) * ((1 + n_accepted) * self._plain_seconds - seconds)
        if self._gain < 0:
            self._wait, self._pause = self._pause, min(2 * self._pause, N_LONGEST_PAUSE)
            self._length, self._gain = N_FIRST, 0.0
        elif n_accepted == n_drafts:
            self._pause = N_PAUSE
