"""States of conversations that are not in the context: in memory under one budget, in files under another.

A snapshot is found by the tokens that lead to it, so a resent history, a regenerated answer, an edited message and a
branch are one case: the deepest snapshot whose tokens the prompt begins with. Of each conversation many recent and few
old ones are kept. What was not used for longest goes first: from memory to a file, from its file to nothing.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lminf_edge.checkpoint import Checkpoint, CheckpointError, Identity
from lminf_edge.engine.index import Index, SnapshotRow
from lminf_edge.engine.token_log import ANCHOR, TokenLog, find_shifted_tail, rolling_hashes
from lminf_edge.history import Past, Tokens
from lminf_edge.sequence import State

N_NEWEST = 8  # snapshots of a conversation that are never thinned out

_NO_PAST = Past(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int32))


@dataclass(eq=False)
class Snapshot:
    """A stream at one moment, or at several that lie within reach of a rollback."""

    conversation: Conversation
    position: int  # of the stream: tokens processed
    n_rollback: int
    n_dropped: int  # tokens of the stream that the client no longer sends
    n_sinks: int
    keys: dict[bytes, int]  # names of beginnings of the client's tokens -> how many tokens they are
    n_bytes: int
    data: npt.NDArray[np.uint8] | None = None  # in memory
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # of its file
    in_file: bool = False
    saving: Future[bool] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens it stands for, as the client counts them."""
        return self.position - self.n_dropped

    def row(self) -> SnapshotRow:
        return SnapshotRow(
            self.name,
            self.conversation.name,
            self.position,
            self.n_rollback,
            self.n_dropped,
            self.n_sinks,
            self.n_bytes,
        )


@dataclass(eq=False)
class Conversation:
    """A history that grew turn by turn."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    used: float = field(default_factory=time.time)  # seconds since 1970
    n_tokens: int = 0
    anchor: int | None = None  # hash of its last tokens
    n_indexed: int = 0  # first tokens that the index has as they are, or will have
    index_failed: bool = False  # it has not got them: the next time all of them are written
    log: TokenLog | None = None  # None: to be read from the index
    is_hot: bool = False  # a sequence of the context holds it
    snapshots: list[Snapshot] = field(default_factory=list)

    def become(self, tokens: Tokens) -> None:
        """Its tokens are these from now on: int32 (n_tokens,)."""
        assert self.log is not None
        self.n_indexed = min(self.n_indexed, self.log.become(tokens))
        self.n_tokens = len(self.log)


def thinned(lengths: Iterable[int], end: int) -> set[int]:
    """Which of several positions before `end` to keep: the newest, and older ones ever further apart.

    What lies between two that are kept is never more than what lies between them and the end, unless there was nothing
    to choose from. So their number grows with the logarithm of the length.
    """
    ordered = sorted(lengths, reverse=True)
    kept = set(ordered[:N_NEWEST])
    for i in range(N_NEWEST, len(ordered)):
        newer = min(kept)
        older = ordered[i + 1] if i + 1 < len(ordered) else 0
        if newer - older > end - newer:
            kept.add(ordered[i])
    return kept


class SnapshotStore:
    """All snapshots. Its methods belong to the thread that decodes; it has threads of its own for files."""

    def __init__(self, identity: Identity, folder: Path | None, memory_budget: int, disk_budget: int) -> None:
        """Budgets in bytes; `folder` None: nothing is kept on disk.

        Raises OSError or sqlite3.Error if the folder cannot be used.
        """
        self.memory_budget, self.disk_budget = memory_budget, disk_budget
        self.conversations: dict[str, Conversation] = {}
        self._identity, self.folder = identity, folder
        self._by_key: dict[bytes, Snapshot] = {}
        self._lengths: Counter[int] = Counter()  # of the beginnings that have a key
        self._files = ThreadPoolExecutor(1, thread_name_prefix="lminf-files")  # all writing and the index, in order
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="lminf-reads")
        self._index: Index | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._index = self._files.submit(Index, folder / "index.sqlite").result()
            self._files.submit(self._read_index, folder, self._index).result()
            self._trim_disk()

    def close(self) -> None:
        """Writes what is not written yet."""
        for conversation in list(self.conversations.values()):
            self.save(conversation)
        if self._index is not None:
            self._files.submit(int).result()  # all of them are written
            self._trim_disk()
            self._files.submit(self._index.close)
        self._files.shutdown()
        self._reads.shutdown()

    # --- figures ------------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Bytes of snapshots in memory and of tokens."""
        return sum(
            (conversation.log.nbytes if conversation.log else 0)
            + sum(each.n_bytes for each in conversation.snapshots if each.data is not None)
            for conversation in self.conversations.values()
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes of snapshots in files and of tokens in the index."""
        if self._index is None:
            return 0
        return sum(
            4 * conversation.n_tokens
            + sum(each.n_bytes for each in conversation.snapshots if each.in_file or each.saving)
            for conversation in self.conversations.values()
        )

    # --- finding ------------------------------------------------------------------------------------------------------

    def find(self, prompt: TokenLog, n_least: int, n_most: int, n_sinks: int) -> tuple[Snapshot, int] | None:
        """The snapshot that leads furthest into a prompt, n_least to n_most tokens, and how far."""
        for n_tokens in sorted((n for n in self._lengths if n_least <= n <= n_most), reverse=True):
            snapshot = self._by_key.get(prompt.key(n_tokens, n_sinks))
            if snapshot is not None:
                return snapshot, n_tokens
        return None

    def find_shifted(self, prompt: Tokens) -> list[tuple[Conversation, int, int]]:
        """Conversations whose client dropped its oldest messages to make this prompt of them.

        Each comes with the number of tokens of the prompt that it covers, and of those dropped; the most covered first,
        of several the one used last.
        """
        anchors: dict[int, list[Conversation]] = {}
        for conversation in self.conversations.values():
            if conversation.anchor is not None:
                anchors.setdefault(conversation.anchor, []).append(conversation)
        if len(prompt) <= ANCHOR or not anchors:
            return []
        found = []
        hashes = rolling_hashes(prompt[:-1])  # one token is to be left
        for i in np.flatnonzero(np.isin(hashes, np.array(list(anchors), dtype=np.uint64)))[::-1].tolist():
            for conversation in anchors[int(hashes[i])]:
                n_covered = i + ANCHOR
                n_dropped = find_shifted_tail(prompt, self.log(conversation).view(), n_covered)
                if n_dropped > 0:
                    found.append((conversation, n_covered, n_dropped))
        return sorted(found, key=lambda each: (each[1], each[0].used), reverse=True)

    def log(self, conversation: Conversation) -> TokenLog:
        """The tokens of a conversation, read from disk if need be."""
        if conversation.log is None:
            assert self._index is not None
            conversation.log = TokenLog(self._files.submit(self._index.tokens, conversation.name).result())
        return conversation.log

    def fetch(self, snapshot: Snapshot) -> Future[State]:
        """Its state, from memory at once or from its file later; CheckpointError in the future if the file is gone."""
        if snapshot.data is None:
            return self._reads.submit(self._read, snapshot)
        done: Future[State] = Future()
        done.set_result(State(snapshot.position, snapshot.n_rollback, snapshot.data))
        return done

    # --- keeping ------------------------------------------------------------------------------------------------------

    def add(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot that has its data in memory."""
        conversation = snapshot.conversation
        self.conversations.setdefault(conversation.name, conversation)
        for key in snapshot.keys:
            old = self._by_key.get(key)
            if old is not None:  # the same tokens lead to both
                self._forget_key(old, key)
            self._by_key[key] = snapshot
            self._lengths[snapshot.keys[key]] += 1
        conversation.snapshots.append(snapshot)
        self._thin(conversation)
        self.trim()

    def write_turn(self, conversation: Conversation) -> Future[None] | None:
        """Puts the tokens of a conversation into the index; the future says when they are there."""
        assert conversation.log is not None
        conversation.used = time.time()
        conversation.n_tokens = len(conversation.log)
        conversation.anchor = conversation.log.anchor()
        self.conversations.setdefault(conversation.name, conversation)
        if self._index is None:
            return None
        n_kept = 0 if conversation.index_failed else conversation.n_indexed
        conversation.index_failed = False
        conversation.n_indexed = conversation.n_tokens
        return self._files.submit(self._write_turn, conversation, n_kept, conversation.log.view()[n_kept:].copy())

    def save(self, conversation: Conversation) -> None:
        """Begins to write a conversation's snapshots that are in memory only to files."""
        for snapshot in conversation.snapshots:
            self._save(snapshot)

    def forget(self, snapshot: Snapshot) -> None:
        """Drops a snapshot, and its file."""
        if snapshot not in snapshot.conversation.snapshots:
            return
        for key in list(snapshot.keys):
            self._forget_key(snapshot, key, last=False)
        snapshot.conversation.snapshots.remove(snapshot)
        snapshot.data = None
        if self._index is not None and (snapshot.in_file or snapshot.saving):
            self._files.submit(self._delete, snapshot.name)

    def forget_conversation(self, conversation: Conversation) -> None:
        """Drops a conversation with all it has, on disk as well."""
        for snapshot in list(conversation.snapshots):
            self.forget(snapshot)
        conversation.n_indexed = 0
        self.conversations.pop(conversation.name, None)
        if self._index is not None:
            self._files.submit(self._index.delete_conversation, conversation.name)

    def trim(self) -> None:
        """Brings memory and disk under their budgets."""
        while self.memory_bytes > self.memory_budget:
            if not self._shrink_memory():
                break
        self._trim_disk()

    def _trim_disk(self) -> None:
        while self.disk_bytes > self.disk_budget:
            candidates = [each for each in self._by_use() if not each.is_hot and self._is_on_disk(each)]
            if not candidates:
                break
            oldest = candidates[0]
            inner = sorted((each for each in oldest.snapshots if each.in_file), key=lambda each: each.n_tokens)
            if len(inner) > 1:
                self.forget(inner[0])
            else:
                self.forget_conversation(oldest)

    def _shrink_memory(self) -> bool:
        """Takes the least valuable thing out of memory; False if there is nothing."""
        for conversation in self._by_use():
            in_memory = sorted((s for s in conversation.snapshots if s.data is not None), key=lambda s: s.n_tokens)
            if in_memory:
                victim = in_memory[0]
                saving = self._save(victim)
                if saving is not None and saving.result():
                    victim.data = None
                else:
                    self.forget(victim)
                return True
            if conversation.log is not None and not conversation.is_hot:
                if self._index is None:
                    self.forget_conversation(conversation)
                else:
                    conversation.log = None
                return True
        return False

    def _by_use(self) -> list[Conversation]:
        return sorted(self.conversations.values(), key=lambda each: each.used)

    @staticmethod
    def _is_on_disk(conversation: Conversation) -> bool:
        return conversation.log is None or any(each.in_file for each in conversation.snapshots)

    def _thin(self, conversation: Conversation) -> None:
        kept = thinned({each.n_tokens for each in conversation.snapshots}, conversation.n_tokens)
        for snapshot in list(conversation.snapshots):
            if snapshot.n_tokens not in kept:
                self.forget(snapshot)

    def _forget_key(self, snapshot: Snapshot, key: bytes, last: bool = True) -> None:
        """A key is needed no more; with `last`, nor is a snapshot that has no other."""
        n_tokens = snapshot.keys.pop(key)
        if self._by_key.get(key) is snapshot:
            del self._by_key[key]
        self._lengths[n_tokens] -= 1
        if self._lengths[n_tokens] == 0:
            del self._lengths[n_tokens]
        if last and not snapshot.keys:
            self.forget(snapshot)

    # --- files --------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.state"

    def _checkpoint_identity(self, snapshot: Snapshot) -> Identity:
        return replace(self._identity, n_global=snapshot.n_sinks)

    def _save(self, snapshot: Snapshot) -> Future[bool] | None:
        """Begins to write a snapshot, if that was not done before; None if nothing is kept on disk."""
        if snapshot.saving is None and self._index is not None and snapshot.n_bytes <= self.disk_budget:
            assert snapshot.data is not None
            checkpoint = Checkpoint(
                self._checkpoint_identity(snapshot), snapshot.position, snapshot.n_rollback, _NO_PAST, snapshot.data
            )
            snapshot.saving = self._files.submit(self._write, snapshot, checkpoint, dict(snapshot.keys))
        return snapshot.saving

    def _write_turn(self, conversation: Conversation, n_kept: int, new: Tokens) -> None:
        assert self._index is not None
        try:
            self._index.write_turn(conversation.name, conversation.used, conversation.anchor, n_kept, new)
        except sqlite3.Error:
            conversation.index_failed = True
            raise

    def _write(self, snapshot: Snapshot, checkpoint: Checkpoint, keys: dict[bytes, int]) -> bool:
        """In the thread of the files: first the file, then its row, so that every row has a whole file."""
        assert self._index is not None
        path = self._path(snapshot.name)
        try:
            checkpoint.save(path)
            snapshot.in_file = self._index.write_snapshot(snapshot.row(), keys)
        except (OSError, sqlite3.Error):  # a full disk: what is in memory stays there
            snapshot.in_file = False
        if not snapshot.in_file:
            path.unlink(missing_ok=True)
        return snapshot.in_file

    def _read(self, snapshot: Snapshot) -> State:
        checkpoint = Checkpoint.load(self._path(snapshot.name))
        self._checkpoint_identity(snapshot).check(checkpoint.identity)
        if checkpoint.position != snapshot.position:
            raise CheckpointError("The snapshot is of another position.")
        return State(snapshot.position, checkpoint.n_rollback, checkpoint.state)

    def _delete(self, name: str) -> None:
        assert self._index is not None
        self._index.delete_snapshot(name)
        self._path(name).unlink(missing_ok=True)

    def _read_index(self, folder: Path, index: Index) -> None:
        for name, used, n_tokens, anchor in index.conversations():
            self.conversations[name] = Conversation(name, used, n_tokens, anchor, n_indexed=n_tokens)
        files = {path.name for path in folder.iterdir()} - {"index.sqlite", "index.sqlite-wal", "index.sqlite-shm"}
        for row, keys in list(index.snapshots()):
            file = self._path(row.name)
            if file.name not in files:
                index.delete_snapshot(row.name)
                continue
            files.remove(file.name)
            conversation = self.conversations[row.conversation]
            done: Future[bool] = Future()
            done.set_result(True)
            snapshot = Snapshot(
                conversation,
                row.position,
                row.n_rollback,
                row.n_dropped,
                row.n_sinks,
                keys,
                row.n_bytes,
                name=row.name,
                in_file=True,
                saving=done,
            )
            conversation.snapshots.append(snapshot)
            for key, n_tokens in keys.items():
                self._by_key[key] = snapshot
                self._lengths[n_tokens] += 1
        for name in files:  # written when the process was killed, before its row was
            (folder / name).unlink(missing_ok=True)
