"""The tokens of a stream: recent ones as they are, older ones as one hash."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from lminf_edge.errors import UserError

Tokens = npt.NDArray[np.int32]

BLOCK = 256  # tokens per link of the hash chain
N_RECENT = 16384  # least number of tokens that a bounded log keeps as they are
KEY_BYTES = 16

_LINK_BYTES = 60  # of memory, per link of the chain
_OVERHEAD = 350  # of memory, beside tokens and chain

_COMPARE_BLOCK = 1 << 16  # tokens


_INT32 = np.iinfo(np.int32)


def as_tokens(tokens: Sequence[int] | Tokens) -> Tokens:
    """`tokens` as an int32 array (n_tokens,), not copied if it is one already.

    Raises UserError, in one sentence, for anything but 32-bit whole numbers.
    """
    wrong = "Tokens must be a sequence of whole numbers, the ids of this model's vocabulary."
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # a list of lists of several lengths
        raise UserError(wrong) from error
    if array.dtype == np.int32:
        return array.reshape(-1)
    if array.size and (array.dtype.kind not in "iu" or array.min() < _INT32.min or array.max() > _INT32.max):
        raise UserError(wrong)
    return array.astype(np.int32).reshape(-1)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix, found block by block at memory speed."""
    n_tokens = min(len(a), len(b))
    for start in range(0, n_tokens, _COMPARE_BLOCK):
        end = min(start + _COMPARE_BLOCK, n_tokens)
        different = a[start:end] != b[start:end]
        if different.any():
            return start + int(different.argmax())
    return n_tokens


class TokenLog:
    """An append-only array of tokens that can be cut back.

    A chain of hashes, one link per block, identifies any prefix at the cost of hashing one block. With `n_recent`,
    older tokens are dropped except for the link that identifies all of them: whether a prompt begins with them can
    still be told, but not where it diverges; their cells are long gone.
    """

    def __init__(
        self,
        tokens: Sequence[int] | Tokens = (),
        *,
        n_recent: int | None = None,
        n_base: int = 0,
        base: bytes = b"",
    ) -> None:
        """
        tokens    (n_tokens,), copied
        n_recent  least number of tokens to keep as they are; None: all
        n_base    number of tokens before `tokens`, in whole blocks; `base` is their hash
        """
        assert n_base % BLOCK == 0
        self.n_base = n_base
        self._n_keep = None if n_recent is None else -(-max(n_recent, 1) // BLOCK) * BLOCK
        self._chain = [base]  # hashes of the first n_base + 0, 1, 2, ... blocks, as far as computed
        self._tokens = np.array(as_tokens(tokens))
        self._n_tokens = len(self._tokens)  # after n_base
        self._forget_oldest()

    def __len__(self) -> int:
        return self.n_base + self._n_tokens

    @property
    def base(self) -> bytes:
        """The hash of the first n_base tokens."""
        return self._chain[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory, about."""
        return self._tokens.nbytes + _LINK_BYTES * (1 + self._n_tokens // BLOCK) + _OVERHEAD

    def recent(self) -> Tokens:
        """The tokens from n_base on (n_recent,), a read-only view: valid until the log is truncated."""
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
        self._forget_oldest()

    def truncate(self, n_tokens: int) -> None:
        """Keeps the first n_tokens, which is 0 or at least n_base."""
        if n_tokens == 0:
            self.n_base, self._chain, self._n_tokens = 0, [b""], 0
            return
        assert self.n_base <= n_tokens <= len(self)
        self._n_tokens = n_tokens - self.n_base
        del self._chain[self._n_tokens // BLOCK + 1 :]

    def copy(self, n_recent: int | None = None) -> TokenLog:
        """A copy of the log."""
        return TokenLog(self.recent(), n_recent=n_recent, n_base=self.n_base, base=self.base)

    def prefix_of(self, prompt: TokenLog) -> int:
        """Length of the prefix that a prompt (a whole log) shares with this log; 0 if they differ before n_base."""
        assert prompt.n_base == 0
        if len(prompt) < self.n_base or (self.n_base and prompt._link(self.n_base) != self.base):
            return 0
        return self.n_base + common_prefix(self.recent(), prompt.recent()[self.n_base :])

    def key(self, n_tokens: int, salt: bytes) -> bytes:
        """A hash that identifies the first n_tokens, at least n_base, and `salt`."""
        n_blocks = n_tokens // BLOCK * BLOCK
        rest = self.recent()[n_blocks - self.n_base : n_tokens - self.n_base]
        return _digest(self._link(n_blocks) + len(salt).to_bytes(2, "little") + salt, rest)

    def _link(self, n_tokens: int) -> bytes:
        """The hash of the first n_tokens, whole blocks of them and at least n_base."""
        assert n_tokens % BLOCK == 0
        assert self.n_base <= n_tokens <= len(self)
        i = (n_tokens - self.n_base) // BLOCK
        while len(self._chain) <= i:
            start = (len(self._chain) - 1) * BLOCK
            self._chain.append(_digest(self._chain[-1], self._tokens[start : start + BLOCK]))
        return self._chain[i]

    def _forget_oldest(self) -> None:
        if self._n_keep is None or self._n_tokens < 2 * self._n_keep:
            return
        n_old = (self._n_tokens - self._n_keep) // BLOCK * BLOCK
        self._link(self.n_base + n_old)
        del self._chain[: n_old // BLOCK]
        # a new array, so that existing views do not change
        rest = np.empty(2 * self._n_keep, dtype=np.int32)
        self._n_tokens -= n_old
        rest[: self._n_tokens] = self._tokens[n_old : n_old + self._n_tokens]
        self._tokens = rest
        self.n_base += n_old


def _digest(before: bytes, tokens: Tokens) -> bytes:
    return blake2b(before + np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=KEY_BYTES).digest()
