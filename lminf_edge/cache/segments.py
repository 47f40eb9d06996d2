"""Archives in the files of one folder, whose contents are untrusted input.

A segment is a file of its own, written once, and named by the SHA-256 of what it holds: streams that have begun alike
share it, and what has another content cannot be taken for it. Which segments an archive has is kept in a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lminf_edge.cache.archive import N_SEGMENT, Archive, Bytes, Range
from lminf_edge.files import open_regular, sync_folder
from lminf_edge.structures import Segment

MAGIC = b"LMINFSEG"
VERSION = 3
SUFFIX = ".segment"
DATA_AT = 4096  # in a file, so that it can be mapped

_HEAD = struct.Struct("<8sIIQ")  # magic, version, 0, bytes of data
_NAME = re.compile(r"[0-9a-f]{64}")
_MAX_INDEX = 1 << 62

_KEPT = struct.Struct("<iiII")  # types of keys and values, numbers of ranges and parts; then these
_RANGE = struct.Struct("<qq")
_PART = struct.Struct("<qqQ32s")

# SHA-256 of segments of this process by id and number of tokens, so that each is read once
_names: dict[tuple[int, int], str] = {}
_names_lock = threading.Lock()
_MAX_NAMES = 1 << 16


class _BadSegmentError(OSError):
    """A file does not hold what it should; `strerror` says what it is instead."""


class Part(NamedTuple):
    """A segment in a file."""

    first: int  # index of its first token in the stream; -1: what all sketches need
    n_tokens: int
    n_bytes: int
    name: str


@dataclass(frozen=True)
class Kept:
    """Which files hold an archive."""

    types: tuple[int, int]
    ranges: tuple[Range, ...]
    parts: tuple[Part, ...]

    @property
    def n_tokens(self) -> int:
        return sum(last - first for first, last in self.ranges)

    def to_bytes(self) -> bytes:
        head = _KEPT.pack(*self.types, len(self.ranges), len(self.parts))
        ranges = (_RANGE.pack(*each) for each in self.ranges)
        return b"".join([head, *ranges, *(_PART.pack(*each[:3], bytes.fromhex(each.name)) for each in self.parts)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Kept | None:
        """What `to_bytes` wrote; None for nothing. Raises ValueError if it makes no sense."""
        if not data:
            return None
        wrong = ValueError("what it says of its archive makes no sense")
        if len(data) < _KEPT.size:
            raise wrong
        type_k, type_v, n_ranges, n_parts = _KEPT.unpack_from(data)
        at = _KEPT.size + n_ranges * _RANGE.size
        if len(data) != at + n_parts * _PART.size:
            raise wrong
        ranges = tuple(_RANGE.iter_unpack(data[_KEPT.size : at]))
        found = _PART.iter_unpack(data[at:])
        parts = tuple(Part(first, n_tokens, n_bytes, name.hex()) for first, n_tokens, n_bytes, name in found)
        flat = [0, *(token for each in ranges for token in each), _MAX_INDEX]
        firsts = [-2, *(part.first for part in parts), _MAX_INDEX]
        if (
            any(a > b for a, b in itertools.pairwise(flat))
            or any(a >= b for a, b in itertools.pairwise(firsts))
            or any(not 0 <= part.n_tokens <= N_SEGMENT or part.n_bytes > _MAX_INDEX for part in parts)
        ):
            raise wrong
        return cls((type_k, type_v), ranges, parts)


def segment_sizes(folder: Path) -> list[int]:
    """Bytes of the segments in a folder and in those below it; none if it is not there. Raises OSError."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    sizes = []
    for place, _, names in os.walk(folder, onerror=fail):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a server may be running
                sizes += [os.stat(os.path.join(place, name)).st_size] if name.endswith(SUFFIX) else []
    return sizes


class SegmentFolder:
    """The segments in one folder. All methods that change it belong to one thread."""

    def __init__(self, folder: Path, budget: int | None = None) -> None:
        """`budget`: bytes of all files, of which those go that were not used for longest; None: any number."""
        self.folder = folder
        self._budget = budget
        self._sizes: dict[str, int] = {}  # of the files that are there, the one used least recently first
        self._users: Counter[str] = Counter()  # checkpoints that name them
        self._lock = threading.Lock()  # of _sizes

    def path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def scan(self, users: Iterable[Kept]) -> None:
        """Finds what a process before has left, and deletes what none of the users names. Raises OSError."""
        for kept in users:
            self.hold(kept)
        found = []
        for name, entry in _entries(self.folder):
            if name not in self._users:
                _unlink(Path(entry.path))
            else:
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, name, status.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
        self._trim()

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, archive: Archive) -> tuple[Kept, OSError | None]:
        """Writes what is not there yet, the newest first; returns what is, and why the rest is not."""
        parts: list[Part] = []
        error: OSError | None = None
        n_left = _MAX_INDEX if self._budget is None else self._budget
        segments = archive.segments()
        axes = [each for each in segments if each.first < 0]
        for segment in (*axes, *reversed(segments[len(axes) :])):
            n_left -= DATA_AT + segment.n_bytes
            if n_left < 0:
                break  # it alone would take more than all may
            try:
                parts.append(self._write(archive, segment))
            except OSError as failure:
                error = failure
                break
        parts.sort()
        with self._lock:  # of one archive the oldest tokens count as used least recently
            for part in parts:
                self._sizes[part.name] = self._sizes.pop(part.name)
        self._trim()
        return Kept(archive.types, archive.ranges, tuple(parts)), error

    def copy(self, kept: Kept, folder: Path) -> Kept:
        """Takes over what is sound of another folder's segments. Raises OSError if it cannot be written."""
        parts = []
        for part in kept.parts:
            with contextlib.suppress(_BadSegmentError):
                data = SegmentFolder(folder)._read(part)
                if self._sizes.get(part.name) != DATA_AT + part.n_bytes:
                    self._write_file(part.name, data)
                parts.append(part)
        return replace(kept, parts=tuple(parts))

    def write_segment(self, archive: Archive, segment: Segment) -> Path:
        """Writes a segment that no checkpoint names yet. Raises OSError."""
        part = self._write(archive, segment)
        try:  # a file that was there already may have been changed since: it takes the memory's place
            self._read(part)
        except _BadSegmentError:
            self._write_file(part.name, archive.read(segment))
        self._trim()
        return self.path(part.name)

    def _write(self, archive: Archive, segment: Segment) -> Part:
        key = segment.id, segment.n_tokens
        name = _names.get(key) if segment.id else None
        n_bytes = DATA_AT + segment.n_bytes  # of a file that is whole
        if name is None or self._sizes.get(name) != n_bytes:
            data = archive.read(segment)
            name = hashlib.sha256(data.data).hexdigest()
            if self._sizes.get(name) != n_bytes:
                self._write_file(name, data)
            _remember(key, name)
        return Part(segment.first, segment.n_tokens, segment.n_bytes, name)

    def _write_file(self, name: str, data: Bytes) -> None:
        """Writes a file, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if shutil.disk_usage(self.folder).free < DATA_AT + data.nbytes:
            # before half of it is written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        path = self.path(name)
        part = path.with_name(f"{path.name}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(part, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_HEAD.pack(MAGIC, VERSION, 0, data.nbytes).ljust(DATA_AT, b"\0"))
                file.write(data.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(self.folder)
        except BaseException:
            _unlink(part)
            raise
        with self._lock:
            self._sizes[name] = DATA_AT + data.nbytes

    # --- keeping ------------------------------------------------------------------------------------------------------

    def hold(self, kept: Kept) -> None:
        """A checkpoint names these."""
        self._users.update(part.name for part in kept.parts)

    def release(self, kept: Kept) -> None:
        """A checkpoint does so no more: what none names goes."""
        self._users.subtract(part.name for part in kept.parts)
        for part in kept.parts:
            if self._users[part.name] <= 0:
                del self._users[part.name]
                self._delete(part.name)

    def sweep(self) -> None:
        """Deletes what no checkpoint names."""
        for name in [name for name in self._sizes if name not in self._users]:
            self._delete(name)

    def _trim(self) -> None:
        """What was not used for longest goes until the rest fits the budget, whoever names it."""
        if self._budget is None:
            return
        with self._lock:
            n_over = sum(self._sizes.values()) - self._budget
            gone = []
            for name, size in self._sizes.items():
                if n_over <= 0:
                    break
                gone.append(name)
                n_over -= size
        for name in gone:
            self._delete(name)

    def _delete(self, name: str, unlinks: bool = True) -> None:
        with self._lock:
            is_there = self._sizes.pop(name, None) is not None
        if is_there and unlinks:
            _unlink(self.path(name))

    # --- reading ------------------------------------------------------------------------------------------------------

    def load(self, kept: Kept, archive: Archive, maps: bool = False) -> str | None:
        """Fills an empty archive, the newest tokens first; returns why something is missing, in a sentence, or None.

        `maps`: full segments stay in their files. May be called from any thread.
        """
        if kept.types != archive.types:
            reason: str | None = "they were archived in other types than this stream archives in"
        else:
            reason = self._load(kept, archive, maps)
        n_lost = kept.n_tokens - sum(last - first for first, last in archive.ranges)
        return f"{n_lost} of {kept.n_tokens} archived tokens cannot be recalled: {reason}." if n_lost else None

    def _load(self, kept: Kept, archive: Archive, maps: bool) -> str:
        reason = "they are not in its files"
        axes = [part for part in kept.parts if part.first < 0]
        for part in (*axes, *reversed(kept.parts[len(axes) :])):
            try:
                data = self._read(part)
            except (OSError, MemoryError) as error:
                what = getattr(error, "strerror", None) or "is too large"
                reason = f"the file {part.name[:8]}... of a segment {what}"
                continue
            segment = Segment(0, part.first, part.n_tokens, part.n_bytes)
            if maps and part.n_tokens == N_SEGMENT and archive.map(part.first, self.path(part.name), DATA_AT):
                continue
            if not archive.add(segment, data):
                reason = "there is no memory for them, or they do not fit this model"
        archive.ranges = kept.ranges
        names = {(part.first, part.n_tokens): part.name for part in kept.parts}
        for segment in archive.segments():
            if (segment.first, segment.n_tokens) in names:
                _remember((segment.id, segment.n_tokens), names[segment.first, segment.n_tokens])
        return reason

    def _read(self, part: Part) -> Bytes:
        """The contents of a file. Raises _BadSegmentError."""
        try:
            data = _contents(self.path(part.name), part)
        except _BadSegmentError as error:
            # else it would be taken for what is to be written there
            self._delete(part.name, unlinks=not error.errno)
            raise
        with self._lock:
            if part.name in self._sizes:
                self._sizes[part.name] = self._sizes.pop(part.name)
                with contextlib.suppress(OSError):
                    os.utime(self.path(part.name))
        return data


def _contents(path: Path, part: Part) -> Bytes:
    """Raises _BadSegmentError, with an errno where the system could not read it."""
    try:
        file, n_bytes = open_regular(path, follow=False)
    except FileNotFoundError:
        raise _BadSegmentError(0, "is missing") from None
    except OSError as error:
        raise _BadSegmentError(error.errno or errno.EIO, f"cannot be read ({error.strerror})") from error
    with file:
        if n_bytes != DATA_AT + part.n_bytes:
            raise _BadSegmentError(0, "is cut short or damaged")
        if _HEAD.unpack(file.read(_HEAD.size)) != (MAGIC, VERSION, 0, part.n_bytes):
            raise _BadSegmentError(0, "is not one of this version of lminf_edge")
        file.seek(DATA_AT)
        data = np.fromfile(file, dtype=np.uint8)
    if data.nbytes != part.n_bytes or hashlib.sha256(data.data).hexdigest() != part.name:
        raise _BadSegmentError(0, "is damaged")
    return data


def _remember(key: tuple[int, int], name: str) -> None:
    if key[0]:
        with _names_lock:
            while len(_names) >= _MAX_NAMES:
                _names.pop(next(iter(_names)))
            _names[key] = name


def _entries(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The segments in a folder, by name; deletes what a process that was killed did not finish. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name, _, rest = entry.name.partition(".")
            if _NAME.fullmatch(name) and f".{rest}" == SUFFIX:
                yield name, entry
            elif _NAME.fullmatch(name) and f".{rest}" == f"{SUFFIX}.part":
                _unlink(Path(entry.path))


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# --- beside a checkpoint's own file -----------------------------------------------------------------------------------


def folder_beside(path: Path) -> Path:
    """Where the archive of a checkpoint is that was saved at a path of the user's choice."""
    return path.with_name(f"{path.name}.archive")


@contextlib.contextmanager
def writing_beside(path: Path, archive: Archive | tuple[Kept, Path]) -> Iterator[Kept]:
    """Writes an archive, or what is in another folder; in the block the checkpoint takes its place, then older segments
    go. If it fails, what was written does. Raises OSError."""
    folder = SegmentFolder(folder_beside(path))
    for name, entry in _entries(folder.folder):
        folder._sizes[name] = entry.stat(follow_symlinks=False).st_size
    used = set(folder._sizes)
    try:
        if isinstance(archive, Archive):
            kept, error = folder.write(archive)
            if error is not None:
                raise error
        else:
            kept = folder.copy(*archive)
        yield kept
        used = {part.name for part in kept.parts}
    finally:
        for name in folder._sizes.keys() - used:
            folder._delete(name)
        with contextlib.suppress(OSError):
            folder.folder.rmdir()  # if it is empty
