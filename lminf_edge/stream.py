"""One endless stream: the tokens that went in, and the native context that holds what is left of them.

All positions here count the tokens of the history from 0. The library's stream positions are the same numbers, unless
a stream was made to begin elsewhere (`begin_at`).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from lminf_edge.checkpoint import Checkpoint, CheckpointError, Identity
from lminf_edge.config import ATTENTIONS, StreamInfo
from lminf_edge.history import N_RECENT, TokenHistory, Tokens
from lminf_edge.native import Info
from lminf_edge.sequence import Batch, CacheSequence, Logits, Run, State

# going back to a checkpoint copies a whole cache: not worth it for less than this many tokens
_WORTH_RESTORING = 32


class Stream:
    """The stream of one sequence.

    The history is written ahead of each decode and `sync` cuts it back to what was really processed: an error or an
    interrupt at any moment leaves the two in agreement.
    """

    def __init__(
        self,
        sequence: CacheSequence,
        batch: Batch,
        identity: Identity,
        n_vocab: int,
        n_checkpoints: int,
    ) -> None:
        # whatever can be taken back, or is asked for by a draft model, can be read again
        window = sequence.window
        self.history = TokenHistory(max(N_RECENT, 2 * (window.size + window.n_slack + batch.n_batch)))
        self.fresh = False  # the context holds the logits of the last token
        self.n_rows = 0  # tokens of the last decoded batch that have logits
        self.window = window
        self._decoded_end = 0  # position after the last decoded batch, to which rows of logits are relative
        self._origin = 0  # stream position of history[0]
        self._mark: int | None = None  # position to stay able to go back to
        self._sequence, self._batch = sequence, batch
        self._identity, self._n_vocab = identity, n_vocab
        self._checkpoints: deque[Checkpoint] = deque(maxlen=n_checkpoints)

    def __len__(self) -> int:
        return len(self.history)

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def ctx(self) -> Any:
        """The llama_context. Raises RuntimeError once it is freed."""
        return self._sequence.ctx

    def native_info(self) -> Info:
        return self._sequence.info()

    def info(self) -> StreamInfo:
        info = self.native_info()
        return StreamInfo(
            position=info.stream_pos,
            evicted=info.n_evicted,
            sink_cells=info.n_sink,
            window_cells=info.n_window,
            kv_bytes=info.kv_bytes,
            rebases=info.n_rebase,
            max_graph_position=info.max_graph_pos,
            checkpoint_bytes=sum(checkpoint.state.nbytes for checkpoint in self._checkpoints),
            attention=ATTENTIONS[self._sequence.attention],
        )

    def sync(self) -> None:
        """Makes history and cache agree again, after an interrupt or after someone else touched the context."""
        n_done = self.native_info().stream_pos - self._origin
        if n_done == 0 or self.history.n_digested <= n_done <= len(self):
            self.history.truncate(n_done)
        elif not self._sequence.rollback(self._origin + len(self)):
            self.clear()

    def clear(self) -> None:
        """Starts a new stream."""
        self._sequence.clear()
        self.history.truncate(0)
        self.fresh, self._mark, self._origin = False, None, 0

    def begin_at(self, position: int) -> None:
        """Starts a new stream at this stream position, for tests of far positions."""
        self.clear()
        self._sequence.begin_at(position)
        self._origin = position

    # --- forward ------------------------------------------------------------------------------------------------------

    def decode(self, tokens: Tokens, logits_all: bool) -> None:
        """Processes one batch, int32 (n_tokens,) with n_tokens of 1 to n_batch.

        Logits are kept for all of its tokens or only for the last. Raises RuntimeError if the library cannot; what
        part of the batch it did process is in the history.
        """
        self._guard_mark(len(tokens))
        self.fresh = False
        n_logits = len(tokens) if logits_all else 1
        try:
            self.history.extend(tokens)
            self._batch.decode([Run(self._sequence, tokens, n_logits)])
        except BaseException:
            self.sync()
            raise
        self.fresh = True
        self._decoded_end, self.n_rows = len(self), n_logits

    def logits(self, position: int) -> Logits:
        """Logits (n_vocab,) of the token at this position of the last decoded batch; good until the next decode."""
        pointer = bindings.llama_get_logits_ith(self.ctx, position - self._decoded_end)
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def logits_block(self) -> Logits:
        """Logits (n_rows, n_vocab) of the last decoded batch; good until the next decode."""
        return np.ctypeslib.as_array(bindings.llama_get_logits(self.ctx), shape=(self.n_rows, self._n_vocab))

    # --- back ---------------------------------------------------------------------------------------------------------

    def truncate(self, n_tokens: int) -> bool:
        """Forgets all but the first n_tokens; False, and nothing changed, if the cache cannot."""
        if n_tokens < len(self):
            if not self._sequence.rollback(self._origin + n_tokens):
                return False
            self.history.truncate(n_tokens)
            self.fresh = False
            if self._mark is not None and self._mark > n_tokens:
                self._mark = None
        return True

    def resume(self, prompt: Tokens) -> int:
        """Makes the stream hold as much of `prompt` (n_tokens,) as can be had without processing any of it.

        Returns that number of tokens; the caller processes the rest. It is all of them only if the stream ends right
        there and its logits are at hand.
        """
        self.sync()
        if self.fresh and len(self) == len(prompt) == self.history.common_prefix(prompt):
            return len(prompt)
        n_tokens, checkpoint = self._plan(prompt)
        if checkpoint is not None:
            self._take_up(checkpoint)
        if n_tokens == 0 or not self.truncate(n_tokens):
            self.clear()
        return len(self)

    def reach(self, prompt: Tokens) -> int:
        """How many tokens of `prompt` (n_tokens,) `resume` would not leave to be processed."""
        self.sync()
        return self._plan(prompt)[0]

    def _plan(self, prompt: Tokens) -> tuple[int, Checkpoint | None]:
        n_tokens = max(0, min(self.history.common_prefix(prompt), len(prompt) - 1))
        if len(self) - n_tokens > self.native_info().n_rollback:
            n_tokens = 0
        best = None
        for checkpoint in self._checkpoints:
            reach = checkpoint.reach(prompt)
            if reach >= n_tokens + (_WORTH_RESTORING if best is None else 1):
                n_tokens, best = reach, checkpoint
        return n_tokens, best

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Asks that a later prompt that begins like this stream can come back here.

        Taking the tokens back costs nothing while they are few, so the checkpoint is only made once it becomes
        necessary: right before the batch after which this position would be out of reach.
        """
        self._mark = max(len(self) - 1, 0)  # the last token is processed again, for its logits

    def _guard_mark(self, n_tokens: int) -> None:
        if self._mark is None or self._checkpoints.maxlen == 0:
            return
        end = len(self) + n_tokens
        if end <= self.window.n_local + self.window.n_slack or end - self._mark <= self.window.n_slack:
            return
        if not any(self._leads_back(checkpoint, self._mark) for checkpoint in self._checkpoints):
            self._checkpoints.append(self.checkpoint())
        self._mark = None

    def _leads_back(self, checkpoint: Checkpoint, n_tokens: int) -> bool:
        """Whether a checkpoint allows going back to the first n_tokens of this stream."""
        n_back = len(checkpoint.past) - n_tokens
        return 0 <= n_back <= checkpoint.n_rollback and checkpoint.past.begins_like(self.history.view(), n_tokens)

    def checkpoint(self) -> Checkpoint:
        """The stream at this moment."""
        self.sync()
        state = self._sequence.save()
        return Checkpoint(self._identity, state.position, state.n_rollback, self.history.snapshot(), state.data)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; the next thing to do is to process a token.

        Raises CheckpointError, and leaves the stream as it was, if it does not fit.
        """
        self._identity.check(checkpoint.identity)
        before, was_fresh = self.checkpoint(), self.fresh
        reason = self._take_up(checkpoint)
        if reason is not None:
            self._take_up(before)
            self.fresh = was_fresh  # logits are no part of a cache's state
            raise CheckpointError(f"The checkpoint cannot be taken up: {reason}")

    def _take_up(self, checkpoint: Checkpoint) -> str | None:
        """None, or why the library refuses the state; then the stream is empty."""
        self.clear()
        reason = self._sequence.load(State(checkpoint.position, checkpoint.n_rollback, checkpoint.state))
        if reason is None:
            self.history.restore(checkpoint.past)
            self._origin = checkpoint.position - len(checkpoint.past)
        return reason
