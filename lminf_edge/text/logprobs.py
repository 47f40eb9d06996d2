"""Log probabilities of generated tokens, in the format of OpenAI's completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from lminf_edge.cache.sequence import Logits
from lminf_edge.cache.token_log import Tokens

LEAST_LOGPROB = -9999.0  # of tokens that cannot be, as OpenAI gives it: JSON has no minus infinity


@dataclass(frozen=True)
class Likely:
    """One of the likeliest tokens."""

    id: int
    piece: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's entry in the four lists of a completion's logprobs, and what llama-server tells of it."""

    text: str
    offset: int  # characters before the token
    logprob: float | None
    top: dict[str, float] | None
    id: int = -1
    piece: bytes = b""
    likeliest: Sequence[Likely] = ()  # best first


class LogprobReporter:
    """Makes the logprobs entries of consecutive tokens."""

    def __init__(self, llm: llama_cpp.Llama, n_top: int, offset: int, after_sampling: bool = False) -> None:
        """
        offset          number of characters before the first token
        after_sampling  the logits it gets are those that the samplers left
        """
        self._llm, self._n_top, self._offset = llm, n_top, offset
        self.after_sampling = after_sampling
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._bos = llm.token_bos()

    def entry(self, token: int, piece: bytes, logits: Logits | None) -> TokenLogprobs | None:
        """The entry of a token sampled from `logits` (n_vocab,); None for a beginning-of-text token, which has none."""
        offset = self._offset
        self._offset += len(self._decoder.decode(piece))
        if token == self._bos:
            return None
        text = piece.decode("utf-8", errors="ignore")
        if logits is None:
            return TokenLogprobs(text, offset, None, None, token, piece)
        logprobs = self._llm.logits_to_logprobs(logits)
        logprob = max(float(logprobs[token]), LEAST_LOGPROB)
        likeliest = [
            Likely(int(other), self._llm.detokenize([int(other)]), max(float(logprobs[other]), LEAST_LOGPROB))
            for other in top_tokens(logprobs, self._n_top)
            if logprobs[other] > -np.inf
        ]
        top = {each.piece.decode("utf-8", errors="ignore"): each.logprob for each in likeliest}
        top[text] = logprob
        return TokenLogprobs(text, offset, logprob, top, token, piece, likeliest)


def top_tokens(logprobs: Logits, n: int) -> Tokens:
    """The n most likely tokens of `logprobs` (n_vocab,), best first, the larger of two equals first."""
    n = min(n, len(logprobs))
    if n <= 0:
        return np.empty(0, dtype=np.int32)
    least = np.partition(logprobs, -n)[-n]
    candidates = np.flatnonzero(logprobs >= least)
    order = np.lexsort((candidates, logprobs[candidates]))[::-1]
    return candidates[order][:n].astype(np.int32)


def as_lists(entries: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
    return {
        "tokens": [entry.text for entry in entries],
        "text_offset": [entry.offset for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
    }
