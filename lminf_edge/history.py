"""The tokens of a stream: the recent ones as they are, the older ones as a digest per block.

A stream has no end, so neither may its history: 256 old tokens leave 8 bytes, 32 KiB for each million. That is
enough to tell whether a prompt goes on from what was processed. Where in the distant past it does not is only known to
the block, and of no use: those cells are long gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from lminf_edge.errors import UserError

Tokens = npt.NDArray[np.int32]
Digests = npt.NDArray[np.uint64]

BLOCK = 256  # tokens per digest
N_RECENT = 16384  # tokens kept as they are, at least

_COMPARE_BLOCK = 1 << 16  # tokens


def as_tokens(tokens: Sequence[int] | Tokens) -> Tokens:
    """`tokens` as an int32 array (n_tokens,), not copied if it is one already.

    Raises ValueError, in one sentence, for what are no whole numbers of 32 bits.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:  # of unequal lengths
        array = np.array(None)
    if array.dtype != np.int32 and array.size:
        limits = np.iinfo(np.int32)
        if array.dtype.kind not in "iu" or array.min() < limits.min or array.max() > limits.max:
            raise UserError("Tokens must be a sequence of whole numbers, the ids of this model's vocabulary.")
    return array.astype(np.int32, copy=False).reshape(-1)


def check_ids(tokens: Tokens, n_vocab: int) -> Tokens:
    """The same tokens (n_tokens,). Raises ValueError if one is not in the vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(wrong):
        raise UserError(f"Token {wrong[0]} is not in the vocabulary: this model's tokens are 0 to {n_vocab - 1}.")
    return tokens


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Number of tokens at the start that are the same in both, found block by block at memory speed."""
    n_tokens = min(len(a), len(b))
    for start in range(0, n_tokens, _COMPARE_BLOCK):
        end = min(start + _COMPARE_BLOCK, n_tokens)
        different = a[start:end] != b[start:end]
        if different.any():
            return start + int(different.argmax())
    return n_tokens


def digest_blocks(tokens: Tokens) -> Digests:
    """One digest per whole block of tokens (n_blocks * BLOCK,): uint64 (n_blocks,)."""
    assert len(tokens) % BLOCK == 0
    data = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    n_bytes = 4 * BLOCK
    digests = b"".join(blake2b(data[i : i + n_bytes], digest_size=8).digest() for i in range(0, len(data), n_bytes))
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class Past:
    """What is known of a stream's tokens at one moment; neither array may be written to.

    digests  uint64 (n_blocks,), one for each of the first blocks
    recent   int32 (n_recent,), the tokens after those
    """

    digests: Digests
    recent: Tokens

    def __len__(self) -> int:
        return len(self.digests) * BLOCK + len(self.recent)

    @property
    def nbytes(self) -> int:
        return self.digests.nbytes + self.recent.nbytes

    def head(self, n_tokens: int) -> tuple[Digests, Tokens]:
        """The first n_tokens, which end among the recent ones: digests of their whole blocks, and the rest of them."""
        n_rest = n_tokens - len(self.digests) * BLOCK
        assert 0 <= n_rest <= len(self.recent)
        whole = n_rest - n_rest % BLOCK
        return np.concatenate([self.digests, digest_blocks(self.recent[:whole])]), self.recent[whole:n_rest]

    def begins_like(self, other: Past, n_tokens: int) -> bool:
        """Whether the first n_tokens of both are the same; they must end among the recent tokens of both."""
        (digests, rest), (other_digests, other_rest) = self.head(n_tokens), other.head(n_tokens)
        return np.array_equal(digests, other_digests) and np.array_equal(rest, other_rest)

    def common_prefix(self, prompt: Tokens) -> int:
        """Tokens at the start of `prompt` (n_tokens,) that are the same; in the distant past, whole blocks of them."""
        n_blocks = min(len(self.digests), len(prompt) // BLOCK)
        step = _COMPARE_BLOCK // BLOCK
        for start in range(0, n_blocks, step):
            end = min(start + step, n_blocks)
            different = self.digests[start:end] != digest_blocks(prompt[start * BLOCK : end * BLOCK])
            if different.any():
                return (start + int(different.argmax())) * BLOCK
        if n_blocks < len(self.digests):
            return n_blocks * BLOCK
        return n_blocks * BLOCK + common_prefix(self.recent, prompt[n_blocks * BLOCK :])


class TokenHistory:
    """Every token that went into a stream, the last n_recent of them (at least) to be read again."""

    def __init__(self, n_recent: int = N_RECENT) -> None:
        self._n_keep = -(-max(n_recent, 1) // BLOCK) * BLOCK
        self._digests: Digests = np.empty(64, dtype=np.uint64)
        self._n_digests = 0
        self._recent: Tokens = np.empty(min(1024, 2 * self._n_keep), dtype=np.int32)
        self._n_recent = 0

    def __len__(self) -> int:
        return self.n_digested + self._n_recent

    @property
    def n_digested(self) -> int:
        """Tokens at the start that are only known by their digests; the others can be read."""
        return self._n_digests * BLOCK

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Appends tokens (n_tokens,), at a cost that does not depend on the length of the history."""
        new = as_tokens(tokens)
        while len(new):
            room = 2 * self._n_keep - self._n_recent
            if room == 0:
                self._digest_oldest(self._n_keep)
                continue
            self._append(new[:room])
            new = new[room:]

    def _append(self, new: Tokens) -> None:
        end = self._n_recent + len(new)
        if end > len(self._recent):
            larger = np.empty(min(2 * self._n_keep, max(end, 2 * len(self._recent))), dtype=np.int32)
            larger[: self._n_recent] = self._recent[: self._n_recent]
            self._recent = larger
        self._recent[self._n_recent : end] = new
        self._n_recent = end

    def _digest_oldest(self, n_tokens: int) -> None:
        digests = digest_blocks(self._recent[:n_tokens])
        end = self._n_digests + len(digests)
        if end > len(self._digests):
            larger = np.empty(max(end, len(self._digests) * 3 // 2), dtype=np.uint64)
            larger[: self._n_digests] = self._digests[: self._n_digests]
            self._digests = larger
        self._digests[self._n_digests : end] = digests
        self._n_digests = end
        # a new array, so that no view that someone still holds changes under their hands
        rest = np.empty_like(self._recent)
        self._n_recent -= n_tokens
        rest[: self._n_recent] = self._recent[n_tokens : n_tokens + self._n_recent]
        self._recent = rest

    def truncate(self, n_tokens: int) -> None:
        """Forgets all but the first n_tokens. Raises ValueError if that is more than can be taken back."""
        if n_tokens == 0:
            self._n_digests = self._n_recent = 0
            return
        if not self.n_digested <= n_tokens <= len(self):
            raise UserError(f"A history of {len(self)} tokens cannot go back to {n_tokens}.")
        self._n_recent = n_tokens - self.n_digested

    def recent(self) -> Tokens:
        """The tokens from n_digested on (n_recent,), read-only and not copied; only good until the history changes."""
        view = self._recent[: self._n_recent]
        view.flags.writeable = False
        return view

    def token(self, position: int) -> int:
        """The token at this position. Raises IndexError if it is not among the recent ones."""
        if not self.n_digested <= position < len(self):
            raise IndexError(f"Token {position} is not among the recent tokens of this stream.")
        return int(self._recent[position - self.n_digested])

    def common_prefix(self, prompt: Tokens) -> int:
        """Tokens at the start of `prompt` (n_tokens,) that are the same; in the distant past, whole blocks of them."""
        return self.view().common_prefix(prompt)

    def view(self) -> Past:
        """The history at this moment, not copied; only good until it changes."""
        return Past(self._digests[: self._n_digests], self.recent())

    def snapshot(self) -> Past:
        """The history at this moment, a copy."""
        return Past(self._digests[: self._n_digests].copy(), self.recent().copy())

    def restore(self, past: Past) -> None:
        """Becomes what it was when `past` was taken."""
        self._digests, self._n_digests = past.digests.copy(), len(past.digests)
        self._n_recent = 0
        self.extend(past.recent)
