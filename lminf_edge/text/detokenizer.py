"""Tokens to text, released when it is final: whole characters, and no part of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

import llama_cpp

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.text.logprobs import TokenLogprobs

# tokens before a piece of text that a tokenizer may look at to place its spaces
_CONTEXT = 16


class Detokenizer:
    """The text of a token stream, token by token."""

    def __init__(
        self,
        llm: llama_cpp.Llama,
        before: Tokens | Sequence[int],
        opening: Sequence[int],
        preserved: Container[int] = frozenset(),
    ) -> None:
        """`before` are the tokens before the text, `opening` tokens without text that it begins with, `preserved`
        special tokens that have one."""
        self._llm = llm
        self._preserved = preserved
        self._before = deque(as_tokens(before[-_CONTEXT:]).tolist(), maxlen=_CONTEXT)
        self._opening = list(opening)

    def piece(self, token: int) -> bytes:
        """The bytes this token adds, which may end inside a character."""
        special = token in self._preserved
        opening = [] if special else self._opening
        piece: bytes = self._llm.detokenize([*opening, token], prev_tokens=list(self._before), special=special)
        self._before.extend([*self._opening, token])
        self._opening = []
        return piece


@dataclass(frozen=True)
class _Piece:
    text: bytes
    logprobs: TokenLogprobs | None
    token: int | None


@dataclass(frozen=True)
class Part:
    """A stretch of text that is final: whole characters, and no part of a stop string."""

    text: str
    logprobs: list[TokenLogprobs]
    tokens: list[int] = field(default_factory=list)


class StopScanner:
    """Lets text through up to the first stop string.

    It holds back as few tokens as possible: those that may begin a stop string or that end inside a character. So it
    holds no more than the longest stop string and one token.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._held: list[_Piece] = []
        self.stopped = False
        self.stop = ""  # the stop string that was met

    def push(self, text: bytes, logprobs: TokenLogprobs | None, token: int | None = None) -> Iterator[Part]:
        """Takes one token's text and yields what this makes final."""
        self._held.append(_Piece(text, logprobs, token))
        held = b"".join(piece.text for piece in self._held)
        # what was released cannot begin a stop string, so one can only be in what is held
        found = min(((held.index(stop), stop) for stop in self._stops if stop in held), default=None)
        if found is not None:
            self.stopped, self.stop = True, found[1].decode("utf-8", errors="replace")
            yield from self._release(found[0], cut=True)
        else:
            yield from self._release(len(held) - max(partial_character(held), partial_stop(held, self._stops)))

    def flush(self) -> Iterator[Part]:
        """Yields all that is held: no more text will come."""
        if not self.stopped:
            yield from self._release(sum(len(piece.text) for piece in self._held), cut=True)

    def _release(self, n_bytes: int, cut: bool = False) -> Iterator[Part]:
        """Yields tokens within the first n_bytes, grouped so that no group ends inside a character.

        With `cut`, the rest is dropped and the group it begins in is cut short.
        """
        text, logprobs, tokens, n_grouped, end = b"", [], [], 0, 0
        for i, piece in enumerate(self._held):
            end += len(piece.text)
            if end > n_bytes and not cut:
                break
            text += piece.text[: len(piece.text) - max(end - n_bytes, 0)]
            logprobs += [piece.logprobs] if piece.logprobs else []
            tokens += [] if piece.token is None else [piece.token]
            if cut and end >= n_bytes:
                if text:
                    yield Part(text.decode("utf-8", errors="ignore"), logprobs, tokens)
                n_grouped = len(self._held)
                break
            if partial_character(text) == 0:
                yield Part(text.decode("utf-8", errors="ignore"), logprobs, tokens)
                text, logprobs, tokens, n_grouped = b"", [], [], i + 1
        del self._held[:n_grouped]


def partial_character(text: bytes) -> int:
    """Bytes at the end of `text` (0 to 3) that begin a UTF-8 character without completing it."""
    for n_bytes in range(1, min(3, len(text)) + 1):
        byte = text[-n_bytes]
        if byte & 0xC0 == 0x80:  # not the first byte of a character
            continue
        n_needed = 4 if byte & 0xF8 == 0xF0 else 3 if byte & 0xF0 == 0xE0 else 2 if byte & 0xE0 == 0xC0 else 1
        return n_bytes if n_bytes < n_needed else 0
    return 0


def partial_stop(text: bytes, stops: Sequence[bytes]) -> int:
    """Bytes at the end of `text` that may be the beginning of a stop string, at most."""
    longest = max(map(len, stops), default=1) - 1
    for n_bytes in range(min(longest, len(text)), 0, -1):
        tail = text[-n_bytes:]
        if any(stop.startswith(tail) for stop in stops):
            return n_bytes
    return 0
