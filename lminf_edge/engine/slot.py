"""A sequence of the context with what the engine knows of the stream in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lminf_edge.engine.snapshots import Conversation, Snapshot
from lminf_edge.engine.token_log import TokenLog
from lminf_edge.history import Tokens
from lminf_edge.sequence import CacheSequence

if TYPE_CHECKING:
    from lminf_edge.engine.turn import Turn


NO_LIMIT = 1 << 30


@dataclass(eq=False)
class Slot:
    """Holds a conversation whose stream is the client's tokens, and before a point in them some that were dropped.

    The log holds the tokens processed, as the client counts them: len(log) + n_dropped is the stream's position.
    """

    sequence: CacheSequence
    conversation: Conversation | None = None
    turn: Turn | None = None  # at work
    n_sinks: int = 0
    n_dropped: int = 0
    n_seam: int = 0  # length of the log at which tokens were dropped: nothing before can be gone back to
    marks: list[int] = field(default_factory=list)  # lengths of the log to stay able to go back to, in order
    used: float = 0.0  # when the last turn ended, in seconds of the monotonic clock
    is_saved: bool = False  # what it holds is among the snapshots

    @property
    def log(self) -> TokenLog:
        assert self.conversation is not None
        assert self.conversation.log is not None
        return self.conversation.log

    def __len__(self) -> int:
        return 0 if self.conversation is None else len(self.log)

    # --- what it holds ------------------------------------------------------------------------------------------------

    def hold(self, conversation: Conversation | None, n_sinks: int = 0, n_dropped: int = 0) -> None:
        """Another conversation, whose log the sequence agrees with, or none."""
        if self.conversation is not None:
            self.conversation.is_hot = False
        if conversation is not None:
            conversation.is_hot = True
        self.conversation, self.n_sinks, self.n_dropped, self.marks = conversation, n_sinks, n_dropped, []
        self.n_seam = len(self) if n_dropped else 0
        self.is_saved = False

    def can_go_back_to(self, n_tokens: int) -> bool:
        return n_tokens >= self.n_seam and len(self) - n_tokens <= self.sequence.info().n_rollback

    def go_back_to(self, n_tokens: int) -> None:
        """Forgets all but the first n_tokens. Raises RuntimeError if the cache cannot."""
        if n_tokens == len(self):
            return
        self.sequence.go_back_to(n_tokens + self.n_dropped)
        self._cut_log(n_tokens)
        self.is_saved = False

    def drop_middle(self, tokens: Tokens) -> None:
        """The client sends its oldest messages no longer: `tokens` (n_tokens,) is what it has of this stream."""
        assert self.conversation is not None
        self.n_dropped += len(self) - len(tokens)
        self.conversation.become(tokens)
        self.n_seam = len(tokens)
        self.marks = [len(tokens)]

    def agree(self) -> None:
        """After a failure: the log is cut back to what was processed."""
        if self.conversation is None:
            return
        n_tokens = self.sequence.position - self.n_dropped
        if 0 <= n_tokens <= len(self):
            self._cut_log(n_tokens)
        else:
            self.sequence.clear()
            self.hold(None)

    def _cut_log(self, n_tokens: int) -> None:
        assert self.conversation is not None
        self.conversation.become(self.log.view()[:n_tokens])
        self._drop_marks_after(n_tokens)

    # --- marks --------------------------------------------------------------------------------------------------------

    def mark(self, n_tokens: int) -> None:
        """Asks to stay able to go back to this length of the log; marks come in order."""
        if not self.marks or self.marks[-1] < n_tokens:
            self.marks.append(n_tokens)

    def end_turn(self) -> None:
        """Marks the present moment; what was not read has no marks any more."""
        self._drop_marks_after(len(self))
        self.mark(len(self))

    def _drop_marks_after(self, n_tokens: int) -> None:
        self.marks = [mark for mark in self.marks if mark <= n_tokens]

    def n_until_snapshot(self) -> int:
        """Tokens that can be processed before the first mark gets out of reach, 0 if a snapshot is to be made first."""
        if not self.marks:
            return NO_LIMIT
        window = self.sequence.window
        whole = window.n_local + window.n_slack - (len(self) + self.n_dropped)  # while all cells are kept
        return max(0, whole, window.n_slack - (len(self) - self.marks[0]))

    def snapshot(self) -> Snapshot | None:
        """What leads back to the marks passed, which are then marks no more; None if there were none."""
        assert self.conversation is not None
        passed = [mark for mark in self.marks if mark <= len(self)]
        if not passed:
            return None
        self.marks = self.marks[len(passed) :]
        state = self.sequence.save()
        assert state.position == len(self) + self.n_dropped
        keys = {self.log.key(mark, self.n_sinks): mark for mark in passed if mark >= len(self) - state.n_rollback}
        if not keys:
            return None
        return Snapshot(
            conversation=self.conversation,
            position=state.position,
            n_rollback=state.n_rollback,
            n_dropped=self.n_dropped,
            n_sinks=self.n_sinks,
            keys=keys,
            n_bytes=state.data.nbytes,
            data=state.data,
        )
