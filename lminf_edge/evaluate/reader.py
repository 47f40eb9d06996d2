"""Runs a stream of tokens through a model, whatever its cache: the basis of all measurements here."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings

from lminf_edge import Llama
from lminf_edge.cache.checkpoint import Checkpoint
from lminf_edge.cache.sequence import Logits
from lminf_edge.cache.token_log import Tokens
from lminf_edge.errors import UserError
from lminf_edge.scores import check_numbers


class Reader(abc.ABC):
    """One stream through a model, from its first token on.

    position   tokens read
    limit      tokens that can be read at most; None: any number
    """

    limit: int | None = None

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self.llm = llm
        self.n_batch = int(llm.n_batch)
        self.n_vocab = int(llm.n_vocab())
        self.position = 0

    @abc.abstractmethod
    def _clear(self) -> None: ...

    @abc.abstractmethod
    def _read(self, tokens: Tokens, logits_all: bool) -> Logits: ...

    @abc.abstractmethod
    def sees(self, position: int) -> bool:
        """Whether the next token to be read can attend to the one at this position."""

    def pieces(self, tokens: Tokens, n_recalling: int | None = None) -> Iterator[Tokens]:
        """A prompt's tokens (n_tokens,) as they are to be read, each piece before the next one is asked for.

        With recall, what comes before the last n_recalling tokens recalls nothing; None: all tokens recall.
        """
        for start in range(0, len(tokens), self.n_batch):
            yield tokens[start : start + self.n_batch]

    def is_end(self, token: int) -> bool:
        """Whether this token ends a text."""
        return bool(bindings.llama_vocab_is_eog(self.llm._model.vocab, token))

    def clear(self) -> None:
        """Starts a new stream."""
        self._clear()
        self.position = 0

    def read(self, tokens: Tokens, logits_all: bool = True) -> Logits:
        """Reads one batch, int32 (n_tokens,) with n_tokens of 1 to n_batch; returns logits, float32 (n_rows, n_vocab).

        One row for each token, or only for the last; they are good until the next call. Raises ValueError if the limit
        is passed, ModelError if they are no numbers, RuntimeError if the library cannot.
        """
        if self.limit is not None and self.position + len(tokens) > self.limit:
            raise UserError(f"{self.position + len(tokens)} tokens do not fit the n_ctx of {self.limit}.")
        logits = self._read(tokens, logits_all)
        check_numbers(logits)
        self.position += len(tokens)
        return logits


class LambdaReader(Reader):
    """A model with a Λ cache, whatever its sink_mode, or a purely recurrent one."""

    llm: Llama
    _skipped = range(0)  # positions that were not read

    def _clear(self) -> None:
        self.llm.reset()
        self._skipped = range(0)

    def pieces(self, tokens: Tokens, n_recalling: int | None = None) -> Iterator[Tokens]:
        sequence, n_recall = self.llm.slot.sequence, self.llm.scheduler.window.n_recall
        n_plain = 0 if n_recalling is None or not n_recall else max(0, len(tokens) - n_recalling)
        for part, n in ((tokens[:n_plain], 0), (tokens[n_plain:], n_recall)):
            if n_recall:
                sequence.set_recall(n)
            yield from sequence.pieces(part, self.n_batch)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on with a saved stream. Raises CheckpointError if it is of another model or has other parameters."""
        self.llm.restore(checkpoint)
        self.position, self._skipped = checkpoint.position, range(0)

    def skip(self, tokens: Tokens) -> None:
        """The stream goes on after tokens (n_tokens,) that are not read, as with prefill "tail"; once in a stream."""
        assert not self._skipped
        self.llm.slot.skip(tokens)
        self.llm.scheduler.forget_logits(self.llm.slot)
        self._skipped = range(self.position, self.position + len(tokens))
        self.position += len(tokens)

    def _read(self, tokens: Tokens, logits_all: bool) -> Logits:
        n_rows = len(tokens) if logits_all else 1
        scheduler = self.llm.scheduler
        end = scheduler.eval(self.llm.slot, tokens, n_rows)
        return scheduler.logits(end + 1 - n_rows, end + 1)

    def sees(self, position: int) -> bool:
        window = self.llm.scheduler.window
        if position in self._skipped:
            return False
        if self.llm.scheduler.model.is_constant:  # all that was read is in its state
            return position < self.position
        return position < window.n_global or position > self.position - window.n_local


class FullReader(Reader):
    """A stock context: full attention over at most n_ctx tokens."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        super().__init__(llm)
        self.limit = int(llm.n_ctx())

    def _clear(self) -> None:
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()

    def _read(self, tokens: Tokens, logits_all: bool) -> Logits:
        return self._decode(tokens, self.position, logits_all)

    def _decode(self, tokens: Tokens, n_past: int, logits_all: bool) -> Logits:
        self.llm._batch.set_batch(tokens.tolist(), n_past=n_past, logits_all=logits_all)
        self.llm._ctx.decode(self.llm._batch)
        n_rows = len(tokens) if logits_all else 1
        return np.ctypeslib.as_array(self.llm._ctx.get_logits(), shape=(n_rows, self.n_vocab))

    def sees(self, position: int) -> bool:
        return position < self.position


class ShiftReader(FullReader):
    """llama.cpp's context shift, as llama-server and llama-completion do it while they generate.

    A token that would fill the context makes room first: after the first n_keep tokens half of the others are
    discarded, and the rest, renumbered, moves up (llama_memory_seq_rm, llama_memory_seq_add). Batches are cut so
    that this happens before the same tokens as it does one token at a time. The tools do no such thing for a prompt,
    which may not be longer than the context.

    Raises ValueError if llama.cpp cannot shift the cache of this model, or the window has no room for it.
    """

    LEAST = 8  # tokens: below, the tools' own arithmetic leaves nothing to shift

    def __init__(self, llm: llama_cpp.Llama, window: int, n_keep: int) -> None:
        super().__init__(llm)
        self.limit = None
        if window < self.LEAST:
            raise UserError(f"A window of {window} tokens is too small for context shift: {self.LEAST} are needed.")
        if not can_shift(llm._ctx.ctx):
            raise UserError("llama.cpp cannot shift the cache of this model.")
        # llama.cpp rounds n_ctx up to a multiple of 256: the tools would shift at that, we at the window
        self.window = window
        self.n_keep = min(n_keep, window - 4)
        self.n_past = 0  # tokens in the cache

    def _clear(self) -> None:
        super()._clear()
        self.n_past = 0

    def _read(self, tokens: Tokens, logits_all: bool) -> Logits:
        parts = []
        while len(tokens):
            if self.n_past + 1 >= self.window:
                self._shift()
            room = self.window - 1 - self.n_past
            logits = self._decode(tokens[:room], self.n_past, logits_all)
            self.n_past += min(room, len(tokens))
            tokens = tokens[room:]
            parts.append(logits.copy() if len(tokens) else logits)
        return parts[-1] if len(parts) == 1 or not logits_all else np.concatenate(parts)

    def _shift(self) -> None:
        n_discard = (self.n_past - self.n_keep) // 2
        memory = bindings.llama_get_memory(self.llm._ctx.ctx)
        if not bindings.llama_memory_seq_rm(memory, 0, self.n_keep, self.n_keep + n_discard):
            raise UserError("llama.cpp cannot take tokens out of the cache of this model.")
        bindings.llama_memory_seq_add(memory, 0, self.n_keep + n_discard, self.n_past, -n_discard)
        self.n_past -= n_discard

    def sees(self, position: int) -> bool:
        # the next token may have to make room
        n_past = self.n_past
        if n_past + 1 >= self.window:
            n_past -= (n_past - self.n_keep) // 2
        return position < self.n_keep or position >= self.position - (n_past - self.n_keep)


def can_shift(ctx: Any) -> bool:
    """Whether llama.cpp can take tokens out of the cache of this llama_context and renumber those after them."""
    model = bindings.llama_get_model(ctx)
    if bindings.llama_model_is_recurrent(model) or bindings.llama_model_is_hybrid(model):
        return False  # llama.cpp says it can, and takes nothing out
    return bool(bindings.llama_memory_can_shift(bindings.llama_get_memory(ctx)))


def reader_of(llm: llama_cpp.Llama) -> Reader:
    """The reader of a model with a Λ cache, or of a stock one."""
    return LambdaReader(llm) if isinstance(llm, Llama) and llm.has_stream else FullReader(llm)
