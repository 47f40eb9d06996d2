"""One request to the engine: a prompt to be read, then tokens, one at a time, as they are asked for."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lminf_edge.history import Tokens
from lminf_edge.sequence import Logits

if TYPE_CHECKING:
    from lminf_edge.engine.engine import Engine
    from lminf_edge.engine.slot import Slot


Given = int | tuple[Tokens, Logits] | BaseException


class Phase(Enum):
    WAITING = "waiting for a sequence of the context"
    LOADING = "waiting for a state to be read from its file"
    READING = "the prompt is being processed"
    GIVEN = "a token was given, and no other asked for yet"
    ASKED = "a token was given, and is to be processed for the next one"
    DONE = "over"


@dataclass(frozen=True)
class Progress:
    """How far a prompt has been read, in tokens as the client counts them."""

    n_prompt: int
    n_cached: int  # that did not have to be read
    n_read: int  # that were read, so far


class TurnCancelled(Exception):
    """The turn was cancelled, or the engine closed, while someone waited for its next token."""


@dataclass(eq=False)
class Turn:
    """What a request asks for, and where it stands. Made by Engine.begin()."""

    engine: Engine
    prompt: Tokens  # int32 (n_prompt,), never empty
    boundaries: Sequence[int]  # beginnings of messages, in tokens
    n_sinks: int  # first tokens of the stream that are kept
    sampler: Any  # a Sampler; the engine closes it
    wants_logits: bool = False  # a copy of the logits that each token was sampled from
    wants_prompt_logits: bool = False  # those of the prompt, all of which is read then
    on_progress: Callable[[Progress], None] | None = None  # called by the engine's thread, while the prompt is read

    phase: Phase = Phase.WAITING
    slot: Slot | None = None
    n_cached: int = 0
    n_read: int = 0
    token: int = -1  # the last one given
    logits: npt.NDArray[np.float32] | None = None  # (n_vocab,) it was sampled from
    first_given: float | None = None  # when the first token was, in seconds of time.perf_counter()
    position: int = 0  # of the stream: tokens processed
    cancelled: bool = False
    replay: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int32))  # of the conversation, to be read first
    drop_middle_at: int = -1  # length of the log that ends the replay, -1 without one
    _inbox: queue.SimpleQueue[Given] = field(default_factory=queue.SimpleQueue)

    @property
    def progress(self) -> Progress:
        return Progress(len(self.prompt), self.n_cached, self.n_read)

    def prompt_parts(self) -> Generator[tuple[Tokens, Logits], None, None]:
        """For wants_prompt_logits: parts of the prompt (n_part,), each with its logits (n_part, n_vocab).

        Raises as tokens() does. Closing the iterator, or its end, ends the turn.
        """
        n_left = len(self.prompt)
        try:
            while n_left > 0:
                given = self._inbox.get()
                if isinstance(given, BaseException):
                    raise given
                assert isinstance(given, tuple)
                yield given
                n_left -= len(given[0])
                if n_left > 0:
                    self.engine.ask(self)
        finally:
            self.engine.end(self)

    def tokens(self) -> Generator[int, None, None]:
        """The tokens that follow the prompt, without an end of its own.

        Raises TurnCancelled, or what went wrong in the engine. Closing the iterator ends the turn; a token that was
        given but after which no other was asked for has not been processed.
        """
        try:
            while True:
                given = self._inbox.get()
                if isinstance(given, BaseException):
                    raise given
                assert isinstance(given, int)
                yield given
                self.engine.ask(self)
        finally:
            self.engine.end(self)

    def cancel(self) -> None:
        """Ends the turn, from any thread, whatever it is doing; whoever waits for its next token is told."""
        self.engine.cancel(self)

    def next_part(self, n_tokens_max: int) -> tuple[Tokens, bool]:
        """For the engine: what to read next, int32 (n_tokens,), and whether the prompt ends with it."""
        assert self.slot is not None
        n_done = len(self.slot)
        if self.drop_middle_at >= 0:
            start = n_done - self.drop_middle_at + len(self.replay)
            return self.replay[start : start + n_tokens_max], False
        end = min(n_done + n_tokens_max, len(self.prompt))
        return self.prompt[n_done:end], end == len(self.prompt)

    def give(self, what: Given) -> None:
        """For the engine: a token, a part of the prompt, or what went wrong."""
        self._inbox.put(what)
