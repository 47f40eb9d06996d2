"""The tokens of a stream: four bytes each, kept for as long as the stream lasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

_COMPARE_BLOCK = 1 << 16  # tokens


def as_tokens(tokens: Sequence[int] | Tokens) -> Tokens:
    """`tokens` as an int32 array (n_tokens,), not copied if it is one already."""
    return np.asarray(tokens, dtype=np.int32).reshape(-1)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Number of tokens at the start that are the same in both, found block by block at memory speed."""
    n_tokens = min(len(a), len(b))
    for start in range(0, n_tokens, _COMPARE_BLOCK):
        end = min(start + _COMPARE_BLOCK, n_tokens)
        different = a[start:end] != b[start:end]
        if different.any():
            return start + int(different.argmax())
    return n_tokens


class TokenHistory:
    """Every token that went into a stream, in one int32 array that grows by half when it is full."""

    def __init__(self) -> None:
        self._buffer: Tokens = np.empty(1024, dtype=np.int32)
        self._length = 0
        self._frozen = 0  # tokens at the start that a snapshot shows

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Appends tokens (n_tokens,), at a cost that does not depend on the length of the history."""
        new = as_tokens(tokens)
        end = self._length + len(new)
        if end > len(self._buffer) or self._length < self._frozen:
            buffer = np.empty(max(end, len(self._buffer), self._length * 3 // 2), dtype=np.int32)
            buffer[: self._length] = self._buffer[: self._length]
            self._buffer, self._frozen = buffer, 0
        self._buffer[self._length : end] = new
        self._length = end

    def truncate(self, n_tokens: int) -> None:
        """Forgets all but the first n_tokens, which is at most len(self)."""
        assert 0 <= n_tokens <= self._length
        self._length = n_tokens

    def view(self) -> Tokens:
        """All tokens (n_tokens,), read-only and not copied; only good until the history changes."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view

    def snapshot(self) -> Tokens:
        """All tokens (n_tokens,), read-only and never to change; copied only once the history turns off before."""
        self._frozen = max(self._frozen, self._length)
        return self.view()
