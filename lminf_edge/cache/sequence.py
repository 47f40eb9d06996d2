"""A sequence of a context: a stream of tokens of which a Λ cache keeps sinks and window, or a purely recurrent model
a state."""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from lminf_edge.cache.archive import Archive
from lminf_edge.cache.checkpoint import Checkpoint, State
from lminf_edge.cache.segments import SegmentFolder
from lminf_edge.cache.token_log import Tokens
from lminf_edge.config import ARCHIVE_TYPES, ATTENTIONS, Attention, Window
from lminf_edge.errors import UserError
from lminf_edge.native import Info, Native, captured_errors

log = logging.getLogger("lminf_edge.engine")

Logits = npt.NDArray[np.float32]

# Last tokens of a prompt: with recall each makes a choice of its own, as one of a micro-batch finds less of what is
# asked for there (docs/design.md has figures)
N_ASKING = 32


class CacheSequence:
    """A sequence of the context, used only by the thread that decodes."""

    def __init__(self, native: Native, context: Any, window: Window, seq_id: int = 0) -> None:
        """`context` is llama_cpp's wrapper of the llama_context."""
        self.seq_id = seq_id
        self.window = window
        self._native, self._context = native, context
        parts = native.parts(self.ctx)
        n_swa = int(bindings.llama_model_n_swa(bindings.llama_get_model(self.ctx))) if parts.n_layer_sliding else 0
        self.n_seen = max(window.n_local, n_swa)  # the last tokens that some layer attends to
        # Cells can always be truncated by n_slack tokens and, while a stream is no longer than n_whole, anywhere. With
        # recurrent layers this alone is no rollback: their states cannot be undone, but be restored.
        self.n_slack = window.n_slack
        self.n_whole = min(window.n_local, n_swa or window.n_local) + window.n_slack
        self.has_states = parts.n_layer_recurrent > 0
        self.state_bytes = parts.recurrent_bytes // int(bindings.llama_n_seq_max(self.ctx))  # of the recurrent layers
        self.n_undo = 0 if self.has_states else self.n_slack  # tokens that can be rolled back without a state
        self._n_recall = window.n_recall

    @property
    def ctx(self) -> Any:
        """The llama_context. Raises RuntimeError once it is freed."""
        if self._context.ctx is None:
            raise RuntimeError("This model has been closed.")
        return self._context.ctx

    @property
    def attention(self) -> Attention | None:
        """What computes the attention of this context; None: there is none."""
        return ATTENTIONS[self._native.params(self.ctx).attention]

    @property
    def position(self) -> int:
        """The stream position of the next token."""
        return self.info().stream_pos

    def info(self) -> Info:
        return self._native.info(self.ctx, self.seq_id)

    def error(self) -> str:
        """The error of this thread's last library call, "" if there is none."""
        return self._native.last_error()

    def next_pos(self, n_tokens: int) -> int:
        """Makes room for n_tokens more; returns the graph position of the first. Raises RuntimeError if it cannot."""
        position = self._native.next_pos(self.ctx, n_tokens, self.seq_id)
        if position < 0:
            raise RuntimeError(f"There is no room for {n_tokens} more tokens. {self.error()}".strip())
        return position

    def rollback(self, position: int) -> bool:
        """Rolls back to this stream position; False, and nothing changed, if that is not possible."""
        return self._native.rollback(self.ctx, position, self.seq_id)

    def clear(self, n_sinks: int | None = None) -> None:
        """Empties the sequence; the next stream keeps n_sinks sinks, by default as many as the context has room for.

        Raises ValueError if that is more.
        """
        memory = bindings.llama_get_memory(self.ctx)
        if bindings.llama_n_seq_max(self.ctx) == 1:
            bindings.llama_memory_clear(memory, False)  # as if new: the next stream begins in the first cell
        else:
            bindings.llama_memory_seq_rm(memory, self.seq_id, -1, -1)
        if n_sinks is not None and not self._native.set_sinks(self.ctx, n_sinks, self.seq_id):
            raise UserError(f"A stream keeps 0 to {self.window.n_global} sinks here, not {n_sinks}.")

    def set_recall(self, n_recall: int) -> None:
        """Each layer recalls n_recall tokens from the next batch on. Raises UserError if that is too many."""
        if not self._native.set_recall(self.ctx, n_recall, self.seq_id):
            raise UserError(f"0 to {self.window.n_recall} tokens can be recalled here, not {n_recall}.")
        self._n_recall = n_recall

    def piece(self, n_left: int, n_most: int) -> int:
        """How many of a prompt's n_left tokens to process next, n_most at most: one choice's where it ends."""
        n_most = min(n_left, n_most)
        if self._n_recall == 0 or self.window.recall_rule == "paper":
            return n_most
        if self.position + n_left <= self.window.n_local:
            return n_most  # nothing has left the window yet
        return min(n_most, max(n_left - N_ASKING, self.window.recall_every))

    def pieces(self, tokens: Tokens, n_most: int) -> Iterator[Tokens]:
        """A prompt's tokens (n_tokens,), piece after piece, each to be processed before the next one is asked for."""
        while len(tokens):
            n_tokens = self.piece(len(tokens), n_most)
            yield tokens[:n_tokens]
            tokens = tokens[n_tokens:]

    def begin_at(self, position: int) -> None:
        """Lets an empty sequence begin at this stream position, for tests of far positions."""
        if not self._native.seq_start(self.ctx, position, self.seq_id):
            raise RuntimeError(f"The stream cannot begin at {position}: {self.error()}")

    def skip(self, tokens: Tokens) -> None:
        """Advances the stream by `tokens` (n_tokens,), at least a window; only its sinks and what they turn on remain.

        Raises RuntimeError if it cannot.
        """
        if not self._native.skip(self.ctx, np.ascontiguousarray(tokens, np.int32), self.seq_id):
            raise RuntimeError(f"The stream cannot skip {len(tokens)} tokens: {self.error()}.")

    def save(self) -> tuple[int, State]:
        """(tokens that can be rolled back once it is restored, a copy of the state as llama.cpp writes it).

        Raises RuntimeError if the library fails.
        """
        info = self.info()
        state = self._save(0)
        # a state carries every cell while none has been recycled, later those of the window and the slack
        whole = info.n_window <= self.n_whole and info.n_rollback >= info.n_window
        n_rollback = info.n_rollback if whole else min(info.n_rollback, self.n_undo)
        return n_rollback, state

    def archive(self) -> Archive | None:
        """What the stream can recall now. A rollback of the stream does not change it."""
        return self._archive(self._native.archive_get(self.ctx, self.seq_id)) if self.window.n_recall else None

    def new_archive(self) -> Archive | None:
        """An empty one that can be given to any sequence of the context. May be called from any thread."""
        return self._archive(self._native.archive_new(self.ctx)) if self.window.n_recall else None

    def _archive(self, handle: Any) -> Archive:
        return Archive(self._native, handle, self.archive_types)

    @property
    def archive_types(self) -> tuple[int, int]:
        """GGML type numbers of its keys and values."""
        return ARCHIVE_TYPES[self.window.archive_type_k], ARCHIVE_TYPES[self.window.archive_type_v]

    def save_recurrent(self) -> State:
        """A copy of the recurrent layers' states alone, for `rewind`. Raises RuntimeError if the library fails."""
        return self._save(bindings.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)

    def _save(self, flags: int) -> State:
        n_bytes = bindings.llama_state_seq_get_size_ext(self.ctx, self.seq_id, flags)
        state = _own_pages(n_bytes)
        n_written = bindings.llama_state_seq_get_data_ext(self.ctx, _pointer(state), n_bytes, self.seq_id, flags)
        if n_written == 0:
            raise RuntimeError(f"The state of the stream cannot be read. {self.error()}".strip())
        return state[:n_written]

    def rewind(self, position: int, state: State) -> bool:
        """Goes back to a stream position with the recurrent layers' states of there.

        False if the cells cannot be truncated that far or the state is another's; the sequence may then be empty.
        """
        state, flags = np.ascontiguousarray(state), bindings.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        with captured_errors():
            n_read = bindings.llama_state_seq_set_data_ext(self.ctx, _pointer(state), state.nbytes, self.seq_id, flags)
        return n_read != 0 and self.position == position

    def _has_loaded(self, checkpoint: Checkpoint) -> bool:
        """Whether the state that was read is the one that the checkpoint claims to be."""
        return self.position == checkpoint.position

    def load(self, checkpoint: Checkpoint, position: int | None = None) -> str | None:
        """Restores a checkpoint and goes back to an earlier stream position, if one is given.

        Returns None, or why it cannot, in a few words; then the sequence is empty.
        """
        reason = self._load(checkpoint)
        if reason is None and position is not None and position < checkpoint.position:
            earlier = checkpoint.earlier.get(position)
            # perhaps made with more slack than there is here
            if not (self.rollback(position) if earlier is None else self.rewind(position, earlier)):
                reason = self.error() or "it cannot go back as far as it must"
                self.clear()
        return reason

    def _load(self, checkpoint: Checkpoint) -> str | None:
        self.clear()
        state = np.ascontiguousarray(checkpoint.state)
        with captured_errors() as errors:
            n_read = bindings.llama_state_seq_set_data(self.ctx, _pointer(state), state.nbytes, self.seq_id)
            if n_read != 0 and self._has_loaded(checkpoint):
                archive = checkpoint.archive
                if archive is None and checkpoint.folder is not None:
                    archive = self._read_archive(checkpoint, checkpoint.folder)
                if archive is not None:
                    archive.give(self.ctx, self.seq_id)
                return None
            self.clear()
        reasons = (error.partition("error loading state: ")[2] for error in errors)
        return next(filter(None, reasons), "its contents do not fit this cache")

    def _read_archive(self, checkpoint: Checkpoint, folder: Path) -> Archive | None:
        archive = self.new_archive()
        if archive is None or checkpoint.kept is None:
            return None
        lost = SegmentFolder(folder).load(checkpoint.kept, archive, bool(self.window.archive_disk))
        if lost:
            log.warning("%s", lost)
        return archive


class ConstantSequence(CacheSequence):
    """A sequence of a purely recurrent model, in a context of its own kind: everything it has read is in its state.

    llama.cpp counts its positions in 32 bits. They are moved back before they run out, which changes nothing: a
    recurrent model does not see them.
    """

    POS_BOUND = 1 << 30  # llama.cpp's positions stay below this

    def __init__(self, native: Native, context: Any, window: Window, seq_id: int = 0) -> None:
        super().__init__(native, context, window, seq_id)
        self.has_states, self.n_slack, self.n_whole = False, 0, 0  # all there is is its state
        self._n_recall = 0
        self._n_before = 0  # stream position of llama.cpp's position 0
        self._n_rebase = 0
        self._kv_bytes = native.memory_bytes(self.ctx)

    @property
    def attention(self) -> Attention | None:
        return None

    def info(self) -> Info:
        graph_pos = self._next_graph_pos()
        return Info(
            stream_pos=self._n_before + graph_pos,
            n_rebase=self._n_rebase,
            max_graph_pos=self.POS_BOUND - 1 if self._n_rebase else max(graph_pos - 1, 0),
            pos_bound=self.POS_BOUND,
            kv_bytes=self._kv_bytes,
        )

    def error(self) -> str:
        return "a recurrent state cannot go back"

    def next_pos(self, n_tokens: int) -> int:
        graph_pos = self._next_graph_pos()
        if graph_pos + n_tokens <= self.POS_BOUND:
            return graph_pos
        # the last token's position becomes 0
        memory = bindings.llama_get_memory(self.ctx)
        bindings.llama_memory_seq_add(memory, self.seq_id, -1, -1, 1 - graph_pos)
        self._n_before += graph_pos - 1
        self._n_rebase += 1
        return 1

    def rollback(self, position: int) -> bool:
        if position == 0:
            self.clear()
        return position == self.position

    def clear(self, n_sinks: int | None = None) -> None:
        super().clear()
        self._n_before = 0

    def set_recall(self, n_recall: int) -> None:
        pass  # there is no window to leave

    def begin_at(self, position: int) -> None:
        self._n_before = position

    def skip(self, tokens: Tokens) -> None:
        raise RuntimeError(f"The stream cannot skip {len(tokens)} tokens: a recurrent model keeps no first ones.")

    def _has_loaded(self, checkpoint: Checkpoint) -> bool:
        self._n_before = checkpoint.position - self._next_graph_pos()
        return self._n_before >= 0

    def _next_graph_pos(self) -> int:
        return int(bindings.llama_memory_seq_pos_max(bindings.llama_get_memory(self.ctx), self.seq_id)) + 1


def _own_pages(n_bytes: int) -> State:
    """Memory that returns to the system when it is freed: on the heap, states would fragment it."""
    private: dict[str, Any] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, 1), **private), dtype=np.uint8)[:n_bytes]


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive tokens of a sequence, int32 (n_tokens,), processed in one batch."""

    sequence: CacheSequence
    tokens: Tokens
    n_logits: int = 1  # number of last tokens whose logits are kept


class DecodeError(RuntimeError):
    """llama.cpp has not processed a batch, or only in part."""


class Batch:
    """A llama_batch, filled through array views of its memory."""

    def __init__(self, batch: Any, keeps_all: bool = False) -> None:
        """`batch` is llama_cpp's wrapper of the llama_batch. keeps_all: every token has logits."""
        self._owner, self._keeps_all = batch, keeps_all
        self.n_batch = n_batch = int(batch._n_tokens)
        view = np.ctypeslib.as_array
        self._token = view(batch.batch.token, shape=(n_batch,))
        self._pos = view(batch.batch.pos, shape=(n_batch,))
        self._logits = view(batch.batch.logits, shape=(n_batch,))
        view(batch.batch.n_seq_id, shape=(n_batch,))[:] = 1
        self._seq_id = [view(batch.batch.seq_id[i], shape=(1,)) for i in range(n_batch)]
        self._filled_for = np.full(n_batch, -1, dtype=np.int32)  # what _seq_id holds

    def decode(self, runs: Sequence[Run]) -> list[int]:
        """Processes runs of different sequences, n_batch tokens in all at most.

        Returns the index in the batch of each run's last token, to ask for its logits by. Raises DecodeError if the
        library fails; the sequences' positions then tell how much of each run was processed. A recurrent state whose
        position has changed is then worth nothing: it may be that of no prefix of the tokens.
        """
        assert len({run.sequence.seq_id for run in runs}) == len(runs)
        ends, start = [], 0
        for run in runs:
            n_tokens = len(run.tokens)
            end = start + n_tokens
            assert n_tokens > 0
            assert end <= self.n_batch
            position = run.sequence.next_pos(n_tokens)
            self._token[start:end] = run.tokens
            self._pos[start:end] = np.arange(position, position + n_tokens, dtype=np.int32)
            self._logits[start:end] = self._keeps_all
            self._logits[end - run.n_logits : end] = True
            seq_id = run.sequence.seq_id
            for i in np.flatnonzero(self._filled_for[start:end] != seq_id) + start:
                self._seq_id[i][0] = self._filled_for[i] = seq_id
            ends.append(end - 1)
            start = end
        self._owner.batch.n_tokens = start
        result = bindings.llama_decode(runs[0].sequence.ctx, self._owner.batch)
        if result != 0:
            raise DecodeError(f"llama_decode returned {result}: the batch was not processed, or only in part.")
        return ends


def _pointer(array: State) -> Any:
    return array.ctypes.data_as(bindings.llama_state_seq_get_data.argtypes[1])
