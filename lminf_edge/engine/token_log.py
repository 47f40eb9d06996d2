"""The tokens of a conversation, as its client sends them, and keys that name any beginning of them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from lminf_edge.history import Tokens, as_tokens, common_prefix

Hashes = npt.NDArray[np.uint64]

BLOCK = 256  # tokens per link of the chain
ANCHOR = 32  # tokens at the end by which a conversation is found in a longer text
KEY_BYTES = 16

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash, odd


class TokenLog:
    """An append-only array of tokens that can be cut back.

    A key is a hash of the first n tokens. It comes from a chain of hashes, one link per block, so that a key costs one
    block of hashing wherever in a conversation it is.
    """

    def __init__(self, tokens: Sequence[int] | Tokens = (), like: TokenLog | None = None, n_same: int = 0) -> None:
        """A copy of `tokens`, of which the first n_same are those of `like`: saves hashing them again."""
        self._tokens = np.array(as_tokens(tokens))
        self._n_tokens = len(self._tokens)
        # of 0, 1, 2, ... blocks, as far as it was asked for
        self._chain: list[bytes] = [b""] if like is None else like._chain[: n_same // BLOCK + 1]

    def __len__(self) -> int:
        return self._n_tokens

    @property
    def nbytes(self) -> int:
        return self._tokens.nbytes + KEY_BYTES * len(self._chain)

    def view(self) -> Tokens:
        """int32 (n_tokens,), read-only and not copied; only good until the log changes."""
        view = self._tokens[: self._n_tokens]
        view.flags.writeable = False
        return view

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        new = as_tokens(tokens)
        end = self._n_tokens + len(new)
        if end > len(self._tokens):
            larger = np.empty(max(end, len(self._tokens) * 5 // 4, 256), dtype=np.int32)
            larger[: self._n_tokens] = self._tokens[: self._n_tokens]
            self._tokens = larger
        self._tokens[self._n_tokens : end] = new
        self._n_tokens = end

    def truncate(self, n_tokens: int) -> None:
        """Forgets all but the first n_tokens."""
        assert 0 <= n_tokens <= self._n_tokens
        self._n_tokens = n_tokens
        del self._chain[n_tokens // BLOCK + 1 :]

    def become(self, tokens: Tokens) -> int:
        """Holds `tokens` (n_tokens,) from now on; returns how many at the start it held before."""
        n_same = common_prefix(self.view(), tokens)
        self.truncate(n_same)
        self.extend(tokens[n_same:])
        return n_same

    def key(self, n_tokens: int, salt: int) -> bytes:
        """Names the first n_tokens, for a stream that is told apart by `salt` from others with the same tokens."""
        assert 0 <= n_tokens <= self._n_tokens
        n_blocks = n_tokens // BLOCK
        while len(self._chain) <= n_blocks:
            start = (len(self._chain) - 1) * BLOCK
            self._chain.append(_digest(self._chain[-1], self._tokens[start : start + BLOCK]))
        rest = self._tokens[n_blocks * BLOCK : n_tokens]
        return _digest(self._chain[n_blocks] + salt.to_bytes(8, "little"), rest)

    def anchor(self) -> int | None:
        """The rolling hash of the last ANCHOR tokens; None for a shorter log."""
        if self._n_tokens < ANCHOR:
            return None
        return int(rolling_hashes(self._tokens[self._n_tokens - ANCHOR : self._n_tokens])[0])


def _digest(before: bytes, tokens: Tokens) -> bytes:
    return blake2b(before + np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=KEY_BYTES).digest()


def rolling_hashes(tokens: Tokens) -> Hashes:
    """A hash of every ANCHOR consecutive tokens: uint64 (n_tokens - ANCHOR + 1,), the first that of tokens[:ANCHOR].

    A polynomial in _BASE modulo 2^64, doubled in length in each of log2(ANCHOR) steps.
    """
    assert len(tokens) >= ANCHOR
    hashes: Hashes = tokens.astype(np.uint64) + np.uint64(1)
    factor, length = _BASE, 1
    while length < ANCHOR:
        with np.errstate(over="ignore"):
            hashes = hashes[:-length] * factor + hashes[length:]
            factor = factor * factor
        length *= 2
    return hashes


def find_shifted_tail(prompt: Tokens, log: Tokens, end: int) -> int:
    """How many tokens were dropped from the middle of `log` (n_log,) to make prompt[:end] of it.

    A client that dropped its oldest messages: prompt[:end] is log[:s] + log[s + n_dropped:] for some s. 0 if it is not;
    a beginning of the log is not, even if its end repeats itself.
    """
    n_dropped = len(log) - end
    n_prefix = common_prefix(log, prompt[:end])
    if n_dropped <= 0 or n_prefix == end:
        return 0
    # the tail must reach back to where the two stop being the same
    return n_dropped if np.array_equal(log[n_prefix + n_dropped :], prompt[n_prefix:end]) else 0
