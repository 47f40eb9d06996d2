"""One endless stream: the tokens that went in, and the native context that holds what is left of them.

All positions here count the tokens of the history from 0. The library's stream positions are the same numbers, unless
a stream was made to begin elsewhere (`begin_at`).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from lminf_edge.checkpoint import Checkpoint, CheckpointError, Identity
from lminf_edge.config import ATTENTIONS, StreamInfo, Window
from lminf_edge.history import N_RECENT, TokenHistory, Tokens
from lminf_edge.native import Info, Native, captured_errors

Logits = npt.NDArray[np.float32]

# going back to a checkpoint copies a whole cache: not worth it for less than this many tokens
_WORTH_RESTORING = 32


class Stream:
    """The stream of a context with a Λ cache.

    The history is written ahead of each decode and `sync` cuts it back to what was really processed: an error or an
    interrupt at any moment leaves the two in agreement.
    """

    def __init__(
        self,
        native: Native,
        context: Any,
        batch: Any,
        identity: Identity,
        window: Window,
        n_vocab: int,
        n_checkpoints: int,
    ) -> None:
        # whatever can be taken back, or is asked for by a draft model, can be read again
        self.history = TokenHistory(max(N_RECENT, 2 * (window.size + window.n_slack + batch._n_tokens)))
        self.fresh = False  # the context holds the logits of the last token
        self.n_rows = 0  # tokens of the last decoded batch that have logits
        self.window = window
        self._decoded_end = 0  # position after the last decoded batch, to which rows of logits are relative
        self._origin = 0  # stream position of history[0]
        self._mark: int | None = None  # position to stay able to go back to
        self._native, self._context = native, context
        self._identity, self._n_vocab = identity, n_vocab
        self._checkpoints: deque[Checkpoint] = deque(maxlen=n_checkpoints)
        self._batch = _Batch(batch)

    def __len__(self) -> int:
        return len(self.history)

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def ctx(self) -> Any:
        """The llama_context. Raises RuntimeError once it is freed."""
        if self._context.ctx is None:
            raise RuntimeError("This model has been closed.")
        return self._context.ctx

    def native_info(self) -> Info:
        return self._native.info(self.ctx)

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
            attention=ATTENTIONS[self._native.params(self.ctx).attention],
        )

    def sync(self) -> None:
        """Makes history and cache agree again, after an interrupt or after someone else touched the context."""
        n_done = self.native_info().stream_pos - self._origin
        if n_done == 0 or self.history.n_digested <= n_done <= len(self):
            self.history.truncate(n_done)
        elif not self._native.rollback(self.ctx, self._origin + len(self)):
            self.clear()

    def clear(self) -> None:
        """Starts a new stream."""
        bindings.llama_memory_clear(bindings.llama_get_memory(self.ctx), False)
        self.history.truncate(0)
        self.fresh, self._mark, self._origin = False, None, 0

    def begin_at(self, position: int) -> None:
        """Starts a new stream at this stream position, for tests of far positions."""
        self.clear()
        if not self._native.seq_start(self.ctx, position):
            raise RuntimeError(f"The stream cannot begin at {position}: {self._native.last_error()}")
        self._origin = position

    # --- forward ------------------------------------------------------------------------------------------------------

    def decode(self, tokens: Tokens, logits_all: bool) -> None:
        """Processes one batch, int32 (n_tokens,) with n_tokens of 1 to n_batch.

        Logits are kept for all of its tokens or only for the last. Raises RuntimeError if the library cannot; what
        part of the batch it did process is in the history.
        """
        self._guard_mark(len(tokens))
        self.fresh = False
        try:
            position = self._native.next_pos(self.ctx, len(tokens))
            if position < 0:
                raise RuntimeError(
                    f"There is no room for {len(tokens)} more tokens. {self._native.last_error()}".strip()
                )
            self._batch.fill(tokens, position, logits_all)
            self.history.extend(tokens)
            result = bindings.llama_decode(self.ctx, self._batch.batch)
            if result != 0:
                raise RuntimeError(f"llama_decode returned {result}: the batch was not processed, or only in part.")
        except BaseException:
            self.sync()
            raise
        self.fresh = True
        self._decoded_end, self.n_rows = len(self), len(tokens) if logits_all else 1

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
            if not self._native.rollback(self.ctx, self._origin + n_tokens):
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
        info = self.native_info()
        n_bytes = bindings.llama_state_seq_get_size(self.ctx, 0)
        state = np.empty(n_bytes, dtype=np.uint8)
        n_written = bindings.llama_state_seq_get_data(self.ctx, _pointer(state), n_bytes, 0)
        if n_written == 0:
            raise RuntimeError(f"The state of the stream cannot be read. {self._native.last_error()}".strip())
        # a state carries every cell while none has been recycled, later those of the window and the slack
        whole = len(self) <= self.window.n_local + self.window.n_slack
        n_rollback = info.n_rollback if whole else min(info.n_rollback, self.window.n_slack)
        return Checkpoint(self._identity, info.stream_pos, n_rollback, self.history.snapshot(), state[:n_written])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint; the next thing to do is to process a token.

        Raises CheckpointError, and leaves the stream as it was, if it does not fit.
        """
        self._identity.check(checkpoint.identity)
        before, was_fresh = self.checkpoint(), self.fresh
        with captured_errors() as errors:
            if self._take_up(checkpoint):
                return
            self._take_up(before)
        self.fresh = was_fresh  # logits are no part of a cache's state
        reason = self._native.last_error() or (errors[0] if errors else "its contents do not fit this cache")
        raise CheckpointError(f"The checkpoint cannot be taken up: {reason}")

    def _take_up(self, checkpoint: Checkpoint) -> bool:
        """False, with the stream empty, if the library refuses the state."""
        self.clear()
        state = np.ascontiguousarray(checkpoint.state)
        n_read = bindings.llama_state_seq_set_data(self.ctx, _pointer(state), state.nbytes, 0)
        if n_read == 0 or self.native_info().stream_pos != checkpoint.position:
            self.clear()
            return False
        self.history.restore(checkpoint.past)
        self._origin = checkpoint.position - len(checkpoint.past)
        return True


class _Batch:
    """A llama_batch for sequence 0, filled through arrays that look into its memory."""

    def __init__(self, batch: Any) -> None:
        self._owner = batch
        n_batch = batch._n_tokens
        view = np.ctypeslib.as_array
        self._token = view(batch.batch.token, shape=(n_batch,))
        self._pos = view(batch.batch.pos, shape=(n_batch,))
        self._logits = view(batch.batch.logits, shape=(n_batch,))
        view(batch.batch.n_seq_id, shape=(n_batch,))[:] = 1
        for i in range(n_batch):
            batch.batch.seq_id[i][0] = 0

    @property
    def batch(self) -> Any:
        return self._owner.batch

    def fill(self, tokens: Tokens, position: int, logits_all: bool) -> None:
        n_tokens = len(tokens)
        self._owner.batch.n_tokens = n_tokens
        self._token[:n_tokens] = tokens
        self._pos[:n_tokens] = np.arange(position, position + n_tokens, dtype=np.int32)
        self._logits[:n_tokens] = logits_all
        self._logits[n_tokens - 1] = True


def _pointer(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(bindings.llama_state_seq_get_data.argtypes[1])
