"""A sequence of the context and the stream in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from lminf_edge.cache.checkpoint import Checkpoint, Identity, State
from lminf_edge.cache.conversation import Conversation, spared
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
    n_states: int = 0  # recurrent states that it may hold
    conversation: Conversation | None = None
    request: Request | None = None  # at work
    n_sinks: int = 0
    n_dropped: int = 0
    n_skipped: int = 0
    n_recall: int = 0  # tokens that its last request recalled
    boundaries: Sequence[int] = ()  # where the messages of its last request begin, and where that ended
    n_least: int = 0  # least length of the log to roll back to
    start: int = 0  # stream position since which all cells are kept, until there are more than n_whole
    kept: int = -NO_LIMIT  # least stream position that the cells could be truncated to after the last rollback
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
    def states(self) -> dict[int, State]:
        """Recurrent states at lengths of the log, without which the stream could not go back there."""
        return {} if self.conversation is None else self.conversation.states

    @property
    def salt(self) -> bytes:
        assert self.conversation is not None
        label = self.conversation.label if self.n_dropped else ""
        return salt(self.n_sinks, self.conversation.owner, label, self.n_skipped > 0)

    @property
    def is_unread(self) -> bool:
        """Whether there are tokens that it skipped and could recall, if another stream of the same tokens had not."""
        conversation = self.conversation  # read once: other threads may ask
        log = None if conversation is None else conversation.log
        return log is not None and log.n_base == 0 and self.n_skipped > 0 and self.n_dropped == 0 and self.n_recall > 0

    # --- what it holds ------------------------------------------------------------------------------------------------

    def assign(
        self, conversation: Conversation | None, n_sinks: int = 0, n_dropped: int = 0, n_skipped: int = 0
    ) -> None:
        """Assigns a conversation whose log is what the sequence holds, or None."""
        if self.conversation is not None:
            self.conversation.is_hot = False
            self.conversation.states = {}
        if conversation is not None:
            conversation.is_hot = True
        self.conversation, self.marks, self.is_saved = conversation, [], False
        self.n_sinks, self.n_dropped, self.n_skipped = n_sinks, n_dropped, n_skipped
        self.n_least = len(self) if n_dropped else 0
        self.start, self.kept = -NO_LIMIT if n_skipped else 0, -NO_LIMIT

    def branch(self, conversation: Conversation) -> None:
        """From here on it holds another conversation, without a log, that has begun like its own."""
        conversation.log = self.log.copy(self.n_recent)
        n_least, start, kept, states = self.n_least, self.start, self.kept, self.states
        self.assign(conversation, self.n_sinks, self.n_dropped, self.n_skipped)
        self.n_least, self.start, self.kept, conversation.states = n_least, start, kept, states

    def clear(self, conversation: Conversation | None = None, n_sinks: int | None = None) -> None:
        """Empties the sequence and assigns a conversation with an empty log."""
        self.sequence.clear(n_sinks)
        self.assign(conversation, self.sequence.info().n_global if n_sinks is None else n_sinks)

    def can_truncate(self, n_tokens: int) -> bool:
        """Whether the cache can roll back to the first n_tokens of the log."""
        if n_tokens >= len(self):
            return n_tokens == len(self)
        if n_tokens < max(self.n_least, self.log.n_base):
            return False
        if self.sequence.has_states and n_tokens > 0:
            position = len(self) + self.n_dropped
            return n_tokens in self.states and n_tokens + self.n_dropped >= self._kept_since(position)
        info = self.sequence.info()
        return n_tokens == 0 or len(self) - n_tokens <= max(info.n_rollback, info.n_rebuild)

    def reach(self, n_tokens: int) -> int:
        """The longest part of the log's first n_tokens that the cache can roll back to; 0: nothing but its start."""
        candidates = [n_tokens, *self.states]
        return max((each for each in candidates if each <= n_tokens and self.can_truncate(each)), default=0)

    def truncate(self, n_tokens: int) -> bool:
        """Rolls back to the first n_tokens; False if the cache cannot. The sequence may be empty then, see `resync`."""
        if n_tokens >= len(self):
            return n_tokens == len(self)
        if not self.can_truncate(n_tokens):
            return False
        position, state = n_tokens + self.n_dropped, self.states.get(n_tokens)
        if not (self.sequence.rollback(position) if state is None else self.sequence.rewind(position, state)):
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
        self.states.clear()
        self.is_saved = False

    def skip(self, tokens: Tokens) -> None:
        """Advances the stream by `tokens` (n_tokens,) without processing them. Raises RuntimeError if it cannot."""
        self.sequence.skip(tokens)
        self.log.extend(tokens)
        self.n_skipped += len(tokens)
        self.n_least, self.start = len(self), len(self) + self.n_dropped
        self.marks = [mark for mark in self.marks if mark > len(self)]
        self.states.clear()
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
        # what was out of reach before does not come back into it
        self.kept = min(self._kept_since(len(self) + self.n_dropped), n_tokens + self.n_dropped)
        self.log.truncate(n_tokens)
        self.marks = [mark for mark in self.marks if mark <= n_tokens]
        self._drop_states({each for each in self.states if each > n_tokens})
        self.is_saved = False

    # --- marks and checkpoints ----------------------------------------------------------------------------------------

    def mark(self, n_tokens: int) -> None:
        """Keeps this length of the log reachable; marks come in order."""
        if not self.marks or self.marks[-1] < n_tokens:
            self.marks.append(n_tokens)

    def n_until_checkpoint(self) -> int:
        """Tokens that can be processed before the first mark gets out of reach; 0: make a checkpoint first.

        Nor are more processed than lead to the next mark if the stream can only come back there with its state.
        """
        if not self.marks:
            return NO_LIMIT
        position, first = len(self) + self.n_dropped, self.marks[0] + self.n_dropped
        n_tokens = 0
        if self.kept <= first:
            n_tokens = max(0, self.sequence.n_slack - (position - first))
        if self.kept <= self.start:  # while all cells are kept
            n_tokens = max(n_tokens, self.sequence.n_whole - (position - self.start))
        if self.sequence.has_states:
            n_tokens = n_tokens if self.n_states or self.marks[0] > len(self) else 0
            n_tokens = min(n_tokens, *(mark - len(self) for mark in self.marks if mark > len(self)), NO_LIMIT)
        return n_tokens

    def _kept_since(self, position: int) -> int:
        """The least stream position that the cells can be truncated to when the stream is at `position`."""
        if self.kept <= self.start and position - self.start <= self.sequence.n_whole:
            return self.start
        return max(self.kept, position - self.sequence.n_slack)

    def hold_state(self) -> bool:
        """Where the stream can only come back to a mark with its recurrent state, keeps that; returns whether it has.

        Of more states than it may hold those go that are missed least, with their marks. Raises RuntimeError if the
        library fails.
        """
        n_tokens, states = len(self), self.states
        if not self.sequence.has_states or n_tokens not in self.marks or n_tokens in states or not self.n_states:
            return False
        self._drop_states({each for each in states if not self.can_truncate(each)})
        states[n_tokens] = self.sequence.save_recurrent()
        kept = spared(states, n_tokens, self.n_states)
        dropped = {each for each in states if each not in kept}
        self.marks = [mark for mark in self.marks if mark not in dropped]
        self._drop_states(dropped)
        return True

    def _drop_states(self, lengths: set[int]) -> None:
        for each in lengths:
            del self.states[each]

    def checkpoint(self) -> tuple[Checkpoint, dict[bytes, int]] | None:
        """A checkpoint that reaches the marks passed, and their keys; removes these marks. None if there are none."""
        passed = [mark for mark in self.marks if mark <= len(self)]
        if not passed:
            return None
        self.marks = self.marks[len(passed) :]
        checkpoint = self.snapshot()
        least = max(len(self) - checkpoint.n_rollback, self.n_least, self.log.n_base)
        earlier = {mark: self.states[mark] for mark in passed if mark in self.states and self.can_truncate(mark)}
        earlier.pop(len(self), None)
        keys = {self.log.key(mark, self.salt): mark for mark in passed if mark >= least or mark in earlier}
        states = {mark + self.n_dropped: state for mark, state in earlier.items()}
        return (replace(checkpoint, earlier=states), keys) if keys else None

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
            archive=self.sequence.archive(),
        )
