"""A conversation and its checkpoints, in memory or in files."""

from __future__ import annotations

import itertools
import mmap
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from lminf_edge.cache.checkpoint import Checkpoint, State
from lminf_edge.cache.files import Found, Head
from lminf_edge.cache.segments import Kept
from lminf_edge.cache.token_log import TokenLog, Tokens, as_tokens, common_prefix

N_NEWEST = 8  # checkpoints of a conversation that are never thinned out

# of memory, for their objects, as measured with tracemalloc
_CONVERSATION_BYTES, _STORED_BYTES, _KEY_BYTES = 600, 600, 150
_HEAD_BYTES = 500  # of a file, about


@dataclass(eq=False)
class Stored:
    """A checkpoint in memory or in a file, and the positions that it reaches."""

    conversation: Conversation
    number: int  # checkpoints of the conversation that were made before
    position: int  # of the stream
    n_rollback: int
    n_dropped: int  # tokens of the stream that the client no longer sends
    n_skipped: int  # tokens of the stream that were not processed
    n_sinks: int
    keys: dict[bytes, int]  # keys of prefixes of the client's tokens -> their lengths
    n_bytes: int  # of its states
    checkpoint: Checkpoint | None = None  # in memory
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # of its file
    in_file: bool = False
    saving: Future[bool] | None = None  # while it is being written
    kept: Kept | None = None  # files that hold its archive, see Checkpoint.kept

    @classmethod
    def of(cls, found: Found, conversation: Conversation) -> Stored:
        """A checkpoint that a process before has left."""
        head = found.head
        return cls(
            conversation=conversation,
            number=head.number,
            position=head.position,
            n_rollback=head.n_rollback,
            n_dropped=head.n_dropped,
            n_skipped=head.n_skipped,
            n_sinks=head.n_sinks,
            keys={bytes.fromhex(key): n_tokens for key, n_tokens in head.keys.items()},
            n_bytes=head.n_bytes,
            name=found.name,
            in_file=True,
            kept=found.kept,
        )

    @property
    def n_tokens(self) -> int:
        """Length of its stream in the client's tokens."""
        return self.position - self.n_dropped

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory, about."""
        n_state = 0
        if self.checkpoint is not None:
            n_state = -(-self.n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE + self.checkpoint.log.nbytes
        return _STORED_BYTES + _KEY_BYTES * len(self.keys) + n_state

    @property
    def disk_bytes(self) -> int:
        n_log = 4 * self.n_tokens if self.conversation.label else 0
        return _HEAD_BYTES + self.n_bytes + n_log if self.in_file or self.saving is not None else 0

    def reach(self, n_tokens: int) -> int:
        """The longest part of the first n_tokens that a stream restored from it can go back to; 0: none is known."""
        if 0 <= self.n_tokens - n_tokens <= self.n_rollback:
            return n_tokens
        return max((each for each in self.keys.values() if each <= n_tokens), default=0)

    def head(self) -> Head:
        return Head(
            conversation=self.conversation.name,
            owner=self.conversation.owner,
            label=self.conversation.label,
            number=self.number,
            position=self.position,
            n_rollback=self.n_rollback,
            n_dropped=self.n_dropped,
            n_skipped=self.n_skipped,
            n_sinks=self.n_sinks,
            n_bytes=self.n_bytes,
            keys={key.hex(): n_tokens for key, n_tokens in self.keys.items()},
        )


@dataclass(eq=False)
class Conversation:
    """A history that grew request by request."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    owner: str = ""  # digest of its API key
    label: str = ""  # the client's own name for it, "" for none
    used: float = field(default_factory=time.time)  # seconds since 1970
    log: TokenLog | None = None  # while a slot holds it or, with a label, as long as memory allows
    is_hot: bool = False  # a slot holds it
    states: dict[int, State] = field(default_factory=dict)  # of the slot that holds it, see Slot.states
    checkpoints: list[Stored] = field(default_factory=list)
    counted: tuple[int, int] = (0, 0)  # bytes of memory and disk that the store counts for it
    copies: list[Conversation] = field(default_factory=list)  # of the same tokens, others of which it skipped

    @property
    def n_tokens(self) -> int:
        """Its length in the client's tokens; that of its newest checkpoint if its log is not in memory."""
        if self.log is not None:
            return len(self.log)
        return self.tip.n_tokens if self.tip else 0

    @property
    def tip(self) -> Stored | None:
        """The checkpoint made last; longer ones precede an edit."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory, about."""
        n_log = self.log.nbytes if self.log is not None else 0
        n_text = len(self.owner) + len(self.label)
        n_checkpoints = sum(each.memory_bytes for each in self.checkpoints)
        return _CONVERSATION_BYTES + n_text + n_log + n_checkpoints + self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the states that no checkpoint in memory shares."""
        kept = [each.checkpoint.earlier.values() for each in self.checkpoints if each.checkpoint is not None]
        shared = {id(state) for states in kept for state in states}
        return sum(state.nbytes for state in self.states.values() if id(state) not in shared)

    @property
    def disk_bytes(self) -> int:
        return sum(each.disk_bytes for each in self.checkpoints)

    def add_copy(self, other: Conversation) -> None:
        """Another holds the same tokens: what is erased here is erased there."""
        known = dict.fromkeys([*self.copies, *other.copies, other])
        other.copies = []
        self.copies = [each for each in known if each is not self and (each.checkpoints or each.is_hot)]

    def set_tokens(self, tokens: Sequence[int] | Tokens, n_recent: int | None = None) -> None:
        """Replaces its tokens by these (n_tokens,); n_recent as for TokenLog."""
        if self.log is None or self.log.n_base:
            self.log = TokenLog(tokens, n_recent=n_recent)
        else:
            n_same = common_prefix(self.log.recent(), as_tokens(tokens))
            self.log.truncate(n_same)
            self.log.extend(tokens[n_same:])


def restored(found: Iterable[Found], conversations: dict[str, Conversation]) -> Iterator[Stored]:
    """The checkpoints that a process before has left, of conversations that are added."""
    for each in sorted(found, key=lambda each: each.head.number):
        head = each.head
        conversation = conversations.setdefault(
            head.conversation, Conversation(head.conversation, head.owner, head.label, used=0.0)
        )
        if (conversation.owner, conversation.label) == (head.owner, head.label):
            conversation.used = max(conversation.used, each.used)
            yield Stored.of(each, conversation)


def thinned(lengths: Iterable[int], end: int, n_most: int | None = None) -> set[int]:
    """Which positions before `end` to keep: the newest, and older ones ever further apart.

    The gap between two kept positions never exceeds the distance from there to the end, unless there was no position in
    between. So their number grows with the logarithm of the length. More than n_most are never kept, see `spared`.
    """
    ordered = sorted(lengths, reverse=True)
    kept = set(ordered[:N_NEWEST])
    for i in range(N_NEWEST, len(ordered)):
        newer = min(kept)
        older = ordered[i + 1] if i + 1 < len(ordered) else 0
        if newer - older > end - newer:
            kept.add(ordered[i])
    return kept if n_most is None else spared(kept, end, n_most)


def spared(lengths: Iterable[int], end: int, n_most: int) -> set[int]:
    """Which n_most positions, 1 or more, to keep: those go whose loss adds least to what a return costs, by how far
    back it is; never the last one before the end."""
    kept = set(lengths)
    while len(kept) > n_most:
        pairs = itertools.pairwise([0, *sorted(kept)])
        costs = {each: (each - before) / (1 + abs(end - each)) for before, each in pairs}
        costs.pop(max((each for each in kept if each <= end), default=-1), None)
        kept.remove(min(costs, key=lambda each: costs[each]))
    return kept
