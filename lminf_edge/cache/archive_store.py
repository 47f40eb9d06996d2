"""What the checkpoints of a store can recall: in memory under one budget, in files under another."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lminf_edge.cache.archive import N_SEGMENT, Archive
from lminf_edge.cache.checkpoint import Checkpoint
from lminf_edge.cache.files import Worker
from lminf_edge.cache.saved_state import SavedState
from lminf_edge.cache.segments import DATA_AT, Kept, SegmentFolder
from lminf_edge.errors import UserError
from lminf_edge.files import locked
from lminf_edge.structures import Segment

if TYPE_CHECKING:
    from lminf_edge.cache.conversation import Stored
    from lminf_edge.cache.sequence import CacheSequence

log = logging.getLogger("lminf_edge.engine")

_N_WRITING = 4  # segments; a stream that is faster than the disk waits
_LOCK = "lock"


class ArchiveStore:
    """Archives are written by the thread that writes files, read by the one that reads them, and else belong to the
    thread that decodes. Nothing here raises: what is lost is told in the log, and by what a stream says it can recall.
    """

    def __init__(
        self,
        new_archive: Callable[[], Archive | None] = lambda: None,
        folder: Path | None = None,
        disk_budget: int = 1 << 62,
        memory_budget: int = 1 << 62,
        maps: bool = False,
    ) -> None:
        """
        new_archive    makes an empty one
        folder         of the segments; None: archives are kept in memory only
        disk_budget    bytes of all segments
        memory_budget  bytes of all archives of the process, beyond which checkpoints lose theirs, the oldest first, and
                       then saved states
        maps           full segments stay in their files

        Raises UserError if the folder is to hold the running archives and another process uses it.
        """
        self.memory_budget = memory_budget
        self.n_failed = 0  # times that something could not be written
        self._new_archive, self._maps = new_archive, maps
        self._folder = SegmentFolder(folder, disk_budget) if folder is not None and disk_budget > 0 else None
        self._lock: BinaryIO | None = None
        self._errors: set[str] = set()  # that the log has
        self._spilled: set[int] = set()  # ids of segments that are in files, or on their way
        self._spilling: deque[tuple[Archive, Segment, Future[Path | None]]] = deque()
        self._n_segments: dict[int, int] = {}  # of each sequence, when it was last looked at
        self._states: deque[weakref.ref[SavedState]] = deque()  # that may have an archive, the oldest first
        if maps and self._folder is not None:
            self._lock = _lock(self._folder.folder)

    @property
    def has_files(self) -> bool:
        return self._folder is not None

    def scan(self, users: Iterable[Kept | None]) -> None:
        """Takes in the segments that checkpoints in files name, and deletes all others."""
        if self._folder is not None:
            try:
                self._folder.scan(kept for kept in users if kept is not None)
            except OSError as error:
                self._note(error)

    def close(self) -> None:
        """To be called when nothing is written any more: deletes what no checkpoint names."""
        if self._folder is not None:
            self._folder.sweep()
        if self._lock is not None:
            self._lock.close()

    # --- files --------------------------------------------------------------------------------------------------------

    def write(self, checkpoint: Checkpoint) -> Kept | None:
        """Writes what is new of a checkpoint's archive; returns what is in files, also if that is not all."""
        if self._folder is None or checkpoint.archive is None:
            return checkpoint.kept
        kept, error = self._folder.write(checkpoint.archive)
        if error is not None:
            self._note(error)
        self._folder.hold(kept)
        return kept

    def release(self, stored: Stored) -> None:
        """A checkpoint's file is no more."""
        kept, stored.kept = stored.kept, None
        if self._folder is not None and kept is not None:
            self._folder.release(kept)

    def attach(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with what its files have of its archive."""
        archive = None if self._folder is None or checkpoint.kept is None else self._new_archive()
        if self._folder is None or checkpoint.kept is None or archive is None:
            return checkpoint
        lost = self._folder.load(checkpoint.kept, archive, self._maps)
        if lost:
            log.warning("%s", lost)
        return replace(checkpoint, archive=archive)

    def reattach(self, stored: Stored, checkpoint: Checkpoint, saving: Future[bool] | None) -> Checkpoint:
        """The same of a checkpoint in memory, once it is in its file."""
        if saving is not None:
            saving.result()
        return self.attach(replace(checkpoint, kept=stored.kept))

    def _note(self, error: OSError | MemoryError) -> None:
        self.n_failed += 1
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
        if reason not in self._errors:
            self._errors.add(reason)
            log.warning(
                "What conversations can recall cannot be kept in files as it should: %s. Answers go on; after a "
                "restart less is recalled. (Reported once.)",
                reason,
            )

    # --- memory -------------------------------------------------------------------------------------------------------

    def watch(self, state: SavedState) -> None:
        """A state that a user keeps for as long as they like gives its archive up where memory is short.

        Else its stream would forget nearly all: what both share takes memory until neither has it.
        """
        self._states = deque(each for each in self._states if each() is not None)
        self._states.append(weakref.ref(state))

    def trim(self, stored: Collection[Stored], save: Callable[[Stored], object], room: int = 0) -> None:
        """Drops archives of checkpoints, the first first, until all of the process leave `room` within the budget.

        What streams that are running can recall stays. Those go first that are in files, the others once `save` has
        begun to write them, and then those of saved states.
        """
        for is_kept in (True, False):
            for each in stored:
                archive = each.checkpoint.archive if each.checkpoint is not None else None
                if each.checkpoint is None or archive is None or (each.kept is not None) != is_kept:
                    continue
                if archive.n_bytes_all() + room <= self.memory_budget:
                    return
                save(each)
                each.checkpoint = replace(each.checkpoint, archive=None)
        while self._states:
            state = self._states[0]()
            if state is not None and state.archive is not None:
                if state.archive.n_bytes_all() + room <= self.memory_budget:
                    return
                state.archive = None
            self._states.popleft()

    def has_room(self, sequence: CacheSequence, room: int) -> bool:
        """Whether all archives of the process, which the sequence has one of, leave so many bytes within the budget."""
        archive = sequence.archive()
        return archive is None or archive.n_bytes_all() + room <= self.memory_budget

    def spill(self, sequence: CacheSequence, worker: Worker) -> None:
        """Moves full segments of a running stream from memory to files, where they stay.

        They are written by a worker; a later call finds that done.
        """
        if not self._maps or self._folder is None:
            return
        while self._spilling and (self._spilling[0][2].done() or len(self._spilling) > _N_WRITING):
            archive, segment, writing = self._spilling.popleft()
            path = writing.result()
            if path is not None:
                archive.map(segment.first, path, DATA_AT)
        n_segments = sequence.position // N_SEGMENT
        if self._n_segments.get(sequence.seq_id) == n_segments:
            return
        self._n_segments[sequence.seq_id] = n_segments
        archive_now = sequence.archive()
        assert archive_now is not None
        # the last may still get its sketches
        for segment in archive_now.segments()[:-1]:
            if segment.n_tokens == N_SEGMENT and segment.id // 2 not in self._spilled:
                self._spilled.add(segment.id // 2)
                self._spilling.append((archive_now, segment, worker.submit(self._spill, archive_now, segment)))

    def _spill(self, archive: Archive, segment: Segment) -> Path | None:
        assert self._folder is not None
        try:
            return self._folder.write_segment(archive, segment)
        except (OSError, MemoryError) as error:
            self._note(error)
            return None


def _lock(folder: Path) -> BinaryIO:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return locked(folder / _LOCK)
    except BlockingIOError:
        raise UserError(f"The archive in {folder} is in use, perhaps by another process: choose another one.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The archive in {folder} cannot be used: {reason}. Choose another folder.") from error
