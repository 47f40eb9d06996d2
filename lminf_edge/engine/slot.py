"""A sequence of the context and the stream in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from lminf_edge.cache.checkpoint import Checkpoint, Identity
from lminf_edge.cache.conversation import Conversation
from lminf_edge.cache.sequence import CacheSequence
from lminf_edge.cache.token_log import TokenLog, Tokens
from lminf_edge.engine.request import Request

NO_LIMIT = 1 << 30


def salt(n_sinks: int, owner: str, trimmed_label: str = "", is_skipped: bool = False) -> bytes:
    """Identifies what streams with equal tokens must have in common to serve each other's prompts.

    A stream that still holds dropped messages serves only the conversation of that name; one that skipped tokens serves
    only prompts that allow it.
    """
    parts = repr((n_sinks, owner, trimmed_label, is_skipped))
    return blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(eq=False)
class Slot:
    """Holds a stream: the client's tokens, some of them skipped, and tokens that the client has dropped.

    The log has the client's tokens; the stream's position is len(log) + n_dropped.
    """

    sequence: CacheSequence
    identity: Identity
    n_recent: int | None = None  # see TokenLog
    conversation: Conversation | None = None
    request: Request | None = None  # at work
    n_sinks: int = 0
    n_dropped: int = 0
    n_skipped: int = 0
    n_least: int = 0  # least length of the log to roll back to
    start: int = 0  # stream position since which all cells are kept, until the window is full
    marks: list[int] = field(default_factory=list)  # lengths of the log that must stay reachable, in order
    used: float = 0.0  # when the last request ended, in seconds of time.monotonic()
    is_saved: bool = False  # the store has a checkpoint of the present state

    @property
    def log(self) -> TokenLog:
        assert self.conversation is not None
        assert self.conversation.log is not None
        return self.conversation.log

    def __len__(self) -> int:
        conversation = self.conversation  # read once: other threads may ask
        log = None if conversation is None else conversation.log
        return 0 if log is None else len(log)

    @property
    def salt(self) -> bytes:
        assert self.conversation is not None
        label = self.conversation.label if self.n_dropped else ""
        return salt(self.n_sinks, self.conversation.owner, label, self.n_skipped > 0)

    # --- what it holds ------------------------------------------------------------------------------------------------

    def assign(
        self, conversation: Conversation | None, n_sinks: int = 0, n_dropped: int = 0, n_skipped: int = 0
    ) -> None:
        """Assigns a conversation whose log is what the sequence holds, or None."""
        if self.conversation is not None:
            self.conversation.is_hot = False
        if conversation is not None:
            conversation.is_hot = True
        self.conversation, self.marks, self.is_saved = conversation, [], False
        self.n_sinks, self.n_dropped, self.n_skipped = n_sinks, n_dropped, n_skipped
        self.n_least = len(self) if n_dropped else 0
        self.start = -NO_LIMIT if n_skipped else 0

    def branch(self, conversation: Conversation) -> None:
        """From here on it holds another conversation, without a log, that has begun like its own."""
        conversation.log = self.log.copy(self.n_recent)
        n_least, start = self.n_least, self.start
        self.assign(conversation, self.n_sinks, self.n_dropped, self.n_skipped)
        self.n_least, self.start = n_least, start

    def clear(self, conversation: Conversation | None = None, n_sinks: int | None = None) -> None:
        """Empties the sequence and assigns a conversation with an empty log."""
        self.sequence.clear(n_sinks)
        self.assign(conversation, self.sequence.info().n_global if n_sinks is None else n_sinks)

    def can_truncate(self, n_tokens: int) -> bool:
        """Whether the cache can roll back to the first n_tokens of the log."""
        if n_tokens >= len(self):
            return n_tokens == len(self)
        return (
            n_tokens >= max(self.n_least, self.log.n_base) and len(self) - n_tokens <= self.sequence.info().n_rollback
        )

    def truncate(self, n_tokens: int) -> bool:
        """Rolls back to the first n_tokens; False, and nothing changed, if the cache cannot."""
        if n_tokens >= len(self):
            return n_tokens == len(self)
        if not self.can_truncate(n_tokens) or not self.sequence.rollback(n_tokens + self.n_dropped):
            return False
        self._cut_log(n_tokens)
        self._restore_sinks()
        return True

    def trim(self, tokens: Tokens) -> None:
        """The client dropped its oldest messages: `tokens` (n_tokens,) is what it kept of this stream."""
        assert self.conversation is not None
        self.n_dropped += len(self) - len(tokens)
        self.conversation.set_tokens(tokens, self.n_recent)
        self.n_least = len(tokens)
        self.marks = [len(tokens)]
        self.is_saved = False

    def skip(self, tokens: Tokens) -> None:
        """Advances the stream by `tokens` (n_tokens,) without processing them. Raises RuntimeError if it cannot."""
        self.sequence.skip(len(tokens))
        self.log.extend(tokens)
        self.n_skipped += len(tokens)
        self.n_least, self.start = len(self), len(self) + self.n_dropped
        self.marks = [mark for mark in self.marks if mark > len(self)]
        self.is_saved = False

    def resync(self) -> None:
        """Makes log and sequence agree again, after a failure or a change from outside."""
        if self.conversation is None:
            return
        n_tokens = self.sequence.position - self.n_dropped
        if n_tokens == len(self):
            return
        if max(self.n_least, self.log.n_base) <= n_tokens < len(self):
            self._cut_log(n_tokens)
            self._restore_sinks()
        elif n_tokens < len(self) or not self.sequence.rollback(len(self) + self.n_dropped):
            self.sequence.clear(self.n_sinks)
            self.assign(None)

    def _restore_sinks(self) -> None:
        """A sequence that became empty has forgotten how many sinks this stream keeps."""
        if len(self) == 0:
            self.sequence.clear(self.n_sinks)

    def _cut_log(self, n_tokens: int) -> None:
        self.log.truncate(n_tokens)
        self.marks = [mark for mark in self.marks if mark <= n_tokens]
        self.is_saved = False

    # --- marks and checkpoints ----------------------------------------------------------------------------------------

    def mark(self, n_tokens: int) -> None:
        """Keeps this length of the log reachable; marks come in order."""
        if not self.marks or self.marks[-1] < n_tokens:
            self.marks.append(n_tokens)

    def n_until_checkpoint(self) -> int:
        """Tokens that can be processed before the first mark gets out of reach; 0: make a checkpoint first."""
        if not self.marks:
            return NO_LIMIT
        whole = self.sequence.n_whole - (len(self) + self.n_dropped - self.start)  # while all cells are kept
        return max(0, whole, self.sequence.n_slack - (len(self) - self.marks[0]))

    def checkpoint(self) -> tuple[Checkpoint, dict[bytes, int]] | None:
        """A checkpoint that reaches the marks passed, and their keys; removes these marks. None if there are none."""
        passed = [mark for mark in self.marks if mark <= len(self)]
        if not passed:
            return None
        self.marks = self.marks[len(passed) :]
        checkpoint = self.snapshot()
        least = max(len(self) - checkpoint.n_rollback, self.n_least, self.log.n_base)
        keys = {self.log.key(mark, self.salt): mark for mark in passed if mark >= least}
        return (checkpoint, keys) if keys else None

    def snapshot(self) -> Checkpoint:
        """A checkpoint of the stream as it is. Raises RuntimeError if the library fails."""
        n_rollback, state = self.sequence.save()
        return Checkpoint(
            identity=self.identity.with_sinks(self.n_sinks),
            position=self.sequence.position,
            n_rollback=n_rollback,
            n_skipped=self.n_skipped,
            log=self.log.copy(),
            state=state,
        )
