"""Checkpoints of conversations that are not in a slot: in memory under one budget, in files under another.

A checkpoint is found by the tokens that lead to it, so a resent history, a regenerated answer, an edited message and a
branch are one case: the deepest checkpoint whose tokens the prompt begins with. Of each conversation many recent and
few old ones are kept. The least recently used go first: from memory to a file, from its file to nothing.

All of it is a cache. What is damaged, missing or cannot be written costs the time to process tokens again and a line
in the log, never an answer: no method raises for it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from lminf_edge.cache.archive_store import ArchiveStore
from lminf_edge.cache.checkpoint import Checkpoint, CheckpointError, Identity
from lminf_edge.cache.conversation import Conversation, Stored, restored, thinned
from lminf_edge.cache.files import CheckpointFiles, Failures, Found, Head, Worker
from lminf_edge.cache.sequence import CacheSequence
from lminf_edge.cache.token_log import TokenLog

_N_LEAST = 2  # checkpoints of a conversation, however large
# of memory, for the objects of conversations on disk, whatever the budget: they are found through these
_LEAST_MEMORY = 16 << 20

_NO_LOG = TokenLog()  # a checkpoint is found by its keys


class CheckpointStore:
    """All checkpoints. Used only by the thread that decodes; files are handled in threads of its own."""

    def __init__(
        self,
        identity: Identity,
        folder: Path | None = None,
        memory_budget: int = 1 << 62,
        disk_budget: int = 8 << 30,
        conversation_budget: int = 1 << 62,
        n_checkpoints: int | None = None,
        archives: ArchiveStore | None = None,
    ) -> None:
        """
        identity             of the streams, but for their number of sinks
        folder               of the files; None: nothing is kept on disk
        memory_budget        bytes, as disk_budget
        conversation_budget  bytes of one conversation's checkpoints, in memory or in files; the newest are kept anyway
        n_checkpoints        in memory; None: as many as the budget allows
        archives             what they can recall, which is closed with the store; None: nothing

        Raises UserError if the folder cannot be used, perhaps because another process uses it.
        """
        self.memory_budget, self.disk_budget = memory_budget, disk_budget
        self.bytes_beside: Callable[[], int] = lambda: 0  # of what else is within memory_budget
        self._conversation_budget, self.archives = conversation_budget, archives or ArchiveStore()
        self.conversations: dict[str, Conversation] = {}
        self.failures = Failures(folder)
        self._identity, self.folder, self._n_checkpoints = identity, folder, n_checkpoints
        self._in_memory: dict[Stored, None] = {}  # the least recently used first
        self._by_key: dict[bytes, Stored] = {}
        self._lengths: Counter[int] = Counter()  # of the prefixes that have a key
        self.memory_bytes = 0  # of checkpoints in memory, of tokens, and of the objects that hold them
        self.disk_bytes = 0  # of files
        self._unsettled: deque[Stored] = deque()  # being written
        self._files: CheckpointFiles | None = None
        self._is_closed = False
        self._writes = Worker(1, thread_name_prefix="lminf-files")  # in their order
        self._reads = Worker(1, thread_name_prefix="lminf-reads")
        found: list[Found] = []
        if folder is not None:
            self._files = CheckpointFiles(folder)
            try:
                found, n_damaged = self._files.scan()
            except OSError as error:
                self.failures.note(error)
                n_damaged = 0
            if n_damaged:
                self.failures.damaged(f"{n_damaged} checkpoints are damaged", n_damaged)
        self.archives.scan(each.kept for each in found)
        self._take_in(found)
        self._trim_disk()

    def close(self) -> None:
        """Writes everything that is not on disk yet. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        # what is left to write is written by this thread: others may not be started while Python ends
        self._writes.shutdown()
        self._reads.shutdown()
        for conversation in list(self.conversations.values()):
            self.save(conversation)
        self._settle()
        self._trim_disk()
        if self._files is not None:
            for conversation in self.conversations.values():
                if (tip := conversation.tip) is not None and tip.in_file:
                    self._files.touch(tip.name, conversation.used)
            self._files.close()
        self.archives.close()

    # --- sizes --------------------------------------------------------------------------------------------------------

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of checkpoints in memory."""
        return sum(each.n_bytes for each in self._in_memory)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those in memory, the least recently used first."""
        return [each.checkpoint for each in self._in_memory if each.checkpoint is not None]

    def _count(self, conversation: Conversation) -> None:
        """To be called when its size has changed."""
        memory = disk = 0
        if self.conversations.get(conversation.name) is conversation:
            memory, disk = conversation.memory_bytes, conversation.disk_bytes
        self.memory_bytes += memory - conversation.counted[0]
        self.disk_bytes += disk - conversation.counted[1]
        conversation.counted = memory, disk

    # --- finding ------------------------------------------------------------------------------------------------------

    def find(self, prompt: TokenLog, n_least: int, n_most: int, salts: Sequence[bytes]) -> tuple[Stored, int] | None:
        """The checkpoint that leads furthest into a prompt, n_least to n_most tokens, and how far.

        With any of the salts; of several that lead as far, the one whose salt comes first.
        """
        for n_tokens in sorted((n for n in self._lengths if n_least <= n <= n_most), reverse=True):
            for salt in salts:
                stored = self._by_key.get(prompt.key(n_tokens, salt))
                if stored is not None:
                    return stored, n_tokens
        return None

    def named(self, owner: str, label: str) -> list[Conversation]:
        """The conversations of this owner that have this label, the most recently used first; none is labelled ""."""
        if not label:
            return []
        mine = (each for each in self.conversations.values() if each.label == label and each.owner == owner)
        return sorted(mine, key=lambda each: each.used, reverse=True)

    def log(self, conversation: Conversation) -> TokenLog:
        """The tokens of a labelled conversation, from its newest file if need be; none if that is lost."""
        tip = conversation.tip
        if conversation.log is None and tip is not None and tip.checkpoint is not None:
            conversation.log = tip.checkpoint.log.copy()
        elif conversation.log is None and tip is not None:
            assert self._files is not None
            try:
                conversation.log = self._reads.submit(self._files.read_log, tip.name, tip.head()).result()
            except CheckpointError as error:
                self.failures.damaged(f"A checkpoint is lost ({error})", 1)
                self.forget(tip)
            self._count(conversation)
        return _NO_LOG if conversation.log is None else conversation.log

    def fetch(self, stored: Stored) -> Future[Checkpoint]:
        """The checkpoint, from memory at once or from its file later.

        The future raises CheckpointError, and nothing else, if the file is damaged, missing or replaced.
        """
        if stored.checkpoint is None:
            return self._reads.submit(self._read, stored.name, stored.head())
        if stored.checkpoint.archive is None and self.archives.has_files:  # it gave that up
            return self._reads.submit(self.archives.reattach, stored, stored.checkpoint, stored.saving)
        self._in_memory[stored] = self._in_memory.pop(stored)
        done: Future[Checkpoint] = Future()
        done.set_result(stored.checkpoint)
        return done

    # --- keeping ------------------------------------------------------------------------------------------------------

    def track(self, conversation: Conversation) -> None:
        """Counts what it takes from now on; with a label, it is found by that."""
        self.conversations[conversation.name] = conversation
        self._count(conversation)

    def room_for_states(self, n_slots: int, n_bytes: int) -> int:
        """How many recurrent states of n_bytes each of the slots may hold: at most half of the memory is for them."""
        n_states = max(_N_LEAST, self.memory_budget // 2 // n_slots // n_bytes)
        return n_states if self._n_checkpoints is None else min(n_states, self._n_checkpoints)

    def hold(self, conversation: Conversation) -> None:
        """The states that its slot holds have changed."""
        self.track(conversation)
        self.trim()

    def add(self, conversation: Conversation, checkpoint: Checkpoint, keys: dict[bytes, int]) -> None:
        """Adds a checkpoint of a conversation; `keys` are those of the positions that it reaches."""
        if self._n_checkpoints == 0 and self._files is None:
            return
        tip = conversation.tip
        stored = Stored(
            conversation=conversation,
            number=tip.number + 1 if tip else 0,
            position=checkpoint.position,
            n_rollback=checkpoint.n_rollback,
            n_dropped=checkpoint.position - len(checkpoint.log),
            n_skipped=checkpoint.n_skipped,
            n_sinks=checkpoint.identity.n_global,
            keys=keys,
            n_bytes=checkpoint.state_bytes,
            checkpoint=checkpoint if conversation.label else replace(checkpoint, log=_NO_LOG),
        )
        conversation.used = time.time()
        self.conversations[conversation.name] = conversation
        self._in_memory[stored] = None
        self._link(stored)
        n_most = max(_N_LEAST, self._conversation_budget // max(stored.n_bytes, 1))
        kept = thinned({each.n_tokens for each in conversation.checkpoints}, conversation.n_tokens, n_most)
        for each in [each for each in conversation.checkpoints if each.n_tokens not in kept]:
            self.forget(each)
        self._count(conversation)
        self.trim()

    def save(self, conversation: Conversation) -> None:
        """Starts writing a conversation's checkpoints that are only in memory to files."""
        self._settle()
        for stored in conversation.checkpoints:
            self._save(stored)
        self._count(conversation)

    def release(self, conversation: Conversation) -> None:
        """No slot holds it any more."""
        if not conversation.label:
            conversation.log = None
        self._drop_if_empty(conversation)
        self._count(conversation)

    def forget(self, stored: Stored) -> None:
        """Drops a checkpoint, and its file."""
        conversation = stored.conversation
        if stored not in conversation.checkpoints:
            return
        for key in list(stored.keys):
            self._forget_key(stored, key, last=False)
        conversation.checkpoints.remove(stored)
        stored.checkpoint = None
        self._in_memory.pop(stored, None)
        if stored.in_file or stored.saving is not None:
            assert self._files is not None
            self._writes.submit(self._delete, stored)
        self._drop_if_empty(conversation)
        self._count(conversation)

    def trim(self) -> None:
        """Brings memory and disk under their budgets."""
        self._settle()
        while self._n_checkpoints is not None and len(self._in_memory) > self._n_checkpoints:
            self._move_out(next(iter(self._in_memory)))
        if self.memory_bytes > (limit := self.memory_budget - self.bytes_beside()):
            self._trim_memory(limit)
        self._trim_disk()
        self.archives.trim(self._in_memory, self._save)

    def tend_archives(self, sequences: Sequence[CacheSequence], room: int) -> None:
        """To be called between batches: checkpoints give way where streams need `room` bytes for their archives."""
        self.archives.trim(self._in_memory, self._save, room)
        for sequence in sequences:
            self.archives.spill(sequence, self._writes)

    def _drop_if_empty(self, conversation: Conversation) -> None:
        """Without a checkpoint and a slot, a conversation is of no use."""
        if not conversation.checkpoints and not conversation.is_hot:
            self.conversations.pop(conversation.name, None)

    def _trim_memory(self, limit: int) -> None:
        """Moves the least recently used conversations out of memory until the others fit."""
        for conversation in self._by_use():
            in_memory = [each for each in conversation.checkpoints if each.checkpoint is not None]
            for stored in sorted(in_memory, key=lambda each: each.n_tokens):
                if self.memory_bytes <= limit:
                    return
                self._move_out(stored)
            if not conversation.is_hot and conversation.log is not None:
                conversation.log = None  # its newest file has it
                self._count(conversation)
        for conversation in self._by_use():
            if self.memory_bytes <= max(limit, _LEAST_MEMORY):
                return
            if not conversation.is_hot:
                self._forget_conversation(conversation)

    def _move_out(self, stored: Stored) -> None:
        """Moves a checkpoint from memory to its file; drops it if it cannot be written."""
        saving = self._save(stored)
        if stored.in_file or (saving is not None and saving.result()):
            self._settle()
            stored.checkpoint = None
            self._in_memory.pop(stored, None)
            self._count(stored.conversation)
        else:
            self.forget(stored)

    def _trim_disk(self) -> None:
        """Forgets the least recently used until the rest fits; of each conversation the newest checkpoint goes last."""
        for conversation in self._by_use() if self.disk_bytes > self.disk_budget else []:
            in_file = [each for each in conversation.checkpoints if each.in_file]
            in_file.sort(key=lambda each: each.n_tokens)
            for stored in in_file[:-1] if conversation.is_hot else in_file:
                if self.disk_bytes <= self.disk_budget:
                    return
                self.forget(stored)

    def _forget_conversation(self, conversation: Conversation) -> None:
        for stored in list(conversation.checkpoints):
            self.forget(stored)
        self._drop_if_empty(conversation)
        self._count(conversation)

    def _by_use(self) -> list[Conversation]:
        return sorted(self.conversations.values(), key=lambda each: each.used)

    def _link(self, stored: Stored) -> None:
        """Makes a checkpoint known by its keys."""
        stored.conversation.checkpoints.append(stored)  # first, so that its conversation is not dropped as empty
        for key, n_tokens in stored.keys.items():
            old = self._by_key.get(key)
            if old is not None:  # both have the same prefix
                self._forget_key(old, key)
            self._by_key[key] = stored
            self._lengths[n_tokens] += 1

    def _forget_key(self, stored: Stored, key: bytes, last: bool = True) -> None:
        """A key is needed no more; with `last`, nor is a checkpoint that has no other."""
        n_tokens = stored.keys.pop(key)
        if self._by_key.get(key) is stored:
            del self._by_key[key]
        self._lengths[n_tokens] -= 1
        if self._lengths[n_tokens] == 0:
            del self._lengths[n_tokens]
        if last and not stored.keys:
            self.forget(stored)

    # --- files --------------------------------------------------------------------------------------------------------

    def _take_in(self, found: list[Found]) -> None:
        """What a process before has left."""
        for stored in restored(found, self.conversations):
            self._link(stored)
        for conversation in self.conversations.values():
            self._count(conversation)

    def _save(self, stored: Stored) -> Future[bool] | None:
        """Begins to write a checkpoint, if that was not done before; None if it is there or cannot be."""
        if stored.in_file or stored.saving is not None:
            return stored.saving
        if self._files is None or stored.n_bytes > self.disk_budget:
            return None
        assert stored.checkpoint is not None
        stored.saving = self._writes.submit(self._write, stored, stored.head(), stored.checkpoint)
        self._unsettled.append(stored)
        self._count(stored.conversation)
        return stored.saving

    def _settle(self) -> None:
        """Updates the state of finished writes; failed ones are tried again later."""
        for _ in range(len(self._unsettled)):
            stored = self._unsettled.popleft()
            assert stored.saving is not None
            if not stored.saving.done():
                self._unsettled.append(stored)
                continue
            stored.in_file, stored.saving = stored.saving.result(), None
            if stored.in_file and stored not in stored.conversation.checkpoints:  # forgotten meanwhile
                assert self._files is not None
                self._writes.submit(self._delete, stored)
            self._count(stored.conversation)

    def _write(self, stored: Stored, head: Head, checkpoint: Checkpoint) -> bool:
        assert self._files is not None
        try:
            stored.kept = self.archives.write(checkpoint)
            self._files.write(stored.name, head, replace(checkpoint, kept=stored.kept))
            return True
        except (OSError, MemoryError) as error:
            self.failures.note(error)
            self.archives.release(stored)
            return False

    def _delete(self, stored: Stored) -> None:
        assert self._files is not None
        self._files.delete(stored.name)
        self.archives.release(stored)

    def _read(self, name: str, head: Head) -> Checkpoint:
        assert self._files is not None
        try:
            checkpoint = self._files.read(name, head)
            self._identity.with_sinks(head.n_sinks).check(checkpoint.identity)
        except CheckpointError as error:
            self.failures.damaged(f"A checkpoint is lost ({error})", 1)
            raise
        return self.archives.attach(checkpoint)
