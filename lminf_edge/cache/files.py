"""Checkpoints in the files of one folder, whose contents are untrusted input.

A file is a head, which describes the checkpoint, and the checkpoint. Only regular files with names that we generate are
read or deleted, whatever else is in the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from lminf_edge.cache.checkpoint import HEADER_BYTES, Checkpoint, CheckpointError, kept_bytes, parse_kept, state_bytes
from lminf_edge.cache.segments import Kept
from lminf_edge.cache.token_log import TokenLog
from lminf_edge.errors import UserError
from lminf_edge.files import locked, open_regular

log = logging.getLogger("lminf_edge.engine")

T = TypeVar("T")

MAGIC = b"LMINFSTO"
VERSION = 2
SUFFIX = ".checkpoint"

# magic, version, bytes of the head, hash of the tokens, hash of that, of the head and of the checkpoint's own head
_FRONT = struct.Struct("<8sII16s16s")
_NAME = re.compile(r"[0-9a-f]{32}")
_MAX_HEAD = 1 << 20  # bytes
_MAX_COUNT = 1 << 62
_LOCK = "lock"


@dataclass(frozen=True)
class Head:
    """Describes a checkpoint; `keys` are hexadecimal, with the lengths of their prefixes."""

    conversation: str
    owner: str
    label: str
    number: int  # checkpoints of the conversation that were made before
    position: int
    n_rollback: int
    n_dropped: int
    n_skipped: int
    n_sinks: int
    n_bytes: int
    keys: dict[str, int]

    def is_sound(self) -> bool:
        counts = (self.number, self.position, self.n_rollback, self.n_dropped, self.n_skipped)
        texts = (self.conversation, self.owner, self.label)
        return (
            all(isinstance(text, str) for text in texts)
            and all(map(_is_count, (*counts, self.n_sinks, self.n_bytes)))
            and self.n_dropped <= self.position
            and isinstance(self.keys, dict)
            and len(self.keys) > 0
            and all(_NAME.fullmatch(key) and _is_count(n) for key, n in self.keys.items())
        )


@dataclass(frozen=True)
class Found:
    name: str
    head: Head
    used: float  # seconds since 1970
    kept: Kept | None = None  # the files that hold its archive


class Worker(ThreadPoolExecutor):
    """Works as long as it was not shut down.

    Python ends such threads before it runs what is registered with atexit: what comes then is done at once. It ends
    them also when their executor becomes garbage, before the finalizer that has something to write: so it is kept.
    """

    _working: ClassVar[set[Worker]] = set()

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        super().shutdown(*args, **kwargs)
        self._working.discard(self)

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self._working.add(self)
        try:
            return super().submit(function, *args, **kwargs)
        except RuntimeError:  # the threads have ended
            self._working.discard(self)
            done: Future[T] = Future()
            try:
                done.set_result(function(*args, **kwargs))
            except Exception as error:
                done.set_exception(error)
            return done


class CheckpointFiles:
    """The checkpoint files of one folder, which this process locks while it is open."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder cannot be used, perhaps because another process uses it."""
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = locked(folder / _LOCK)
        except BlockingIOError:
            raise UserError(
                f"The conversations in {folder} are in use, perhaps by another server: end that one, or give this one "
                "another folder (--folder)."
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"The conversations in {folder} cannot be used: {reason}. Choose another folder, or keep no "
                "conversations on disk (--folder, --disk 0)."
            ) from error

    def close(self) -> None:
        self._lock.close()

    def scan(self) -> tuple[list[Found], int]:
        """All valid checkpoints, and the number of damaged ones, which are deleted. Raises OSError."""
        found, n_damaged = [], 0
        for name, is_part in list(self._names()):
            if is_part:  # of a process that was killed
                self._unlink(self._folder / f"{name}{SUFFIX}.part")
                continue
            try:
                with self._open(name) as (file, size):
                    head, _ = _read_head(file, size)
                    used = os.fstat(file.fileno()).st_mtime
                    found.append(Found(name, head, used, _read_kept(file, size)))
            except CheckpointError:
                n_damaged += 1
                self.delete(name)
            except _NotOursError:
                pass
        return found, n_damaged

    def write(self, name: str, head: Head, checkpoint: Checkpoint) -> None:
        """Writes a new file, atomically. Raises OSError."""
        data = json.dumps(asdict(head)).encode()
        if len(data) > _MAX_HEAD:
            raise OSError(errno.EFBIG, "its keys and names are too long")
        if shutil.disk_usage(self._folder).free < checkpoint.nbytes + len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before half of it is written
        path = self._path(name)
        part = path.with_name(f"{path.name}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
                first, tokens, *states = checkpoint.chunks()  # the first has a checksum of all
                digest = _hash(tokens)
                file.write(_FRONT.pack(MAGIC, VERSION, len(data), digest, _hash(digest + data + first)) + data)
                for chunk in (first, tokens, *states):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            self._unlink(part)
            raise

    def read(self, name: str, head: Head) -> Checkpoint:
        """The checkpoint in the file with this head, which may lack keys. Raises CheckpointError."""
        with self._open_again(name, head) as (file, size, _):
            checkpoint = Checkpoint.read(file, size)
        if (checkpoint.position, checkpoint.n_rollback, checkpoint.n_skipped) != (
            head.position,
            head.n_rollback,
            head.n_skipped,
        ):
            raise CheckpointError("The head of the checkpoint is another's.")
        return checkpoint

    def read_log(self, name: str, head: Head) -> TokenLog:
        """Only the tokens in the file with this head, which may lack keys. Raises CheckpointError."""
        with self._open_again(name, head) as (file, size, digest):
            data, log = Checkpoint.read_tokens(file, size)
        if _hash(data) != digest:
            raise CheckpointError("The tokens of the checkpoint are damaged.")
        return log

    def touch(self, name: str, used: float) -> None:
        """Records the time of use, in seconds since 1970."""
        with contextlib.suppress(OSError):
            os.utime(self._path(name), (used, used), follow_symlinks=False)

    def delete(self, name: str) -> None:
        """Deletes a file if it begins like ours."""
        with contextlib.suppress(CheckpointError):
            with self._open(name) as (file, _):
                is_ours = MAGIC.startswith(file.read(len(MAGIC)))
            if is_ours:
                self._unlink(self._path(name))

    def _names(self) -> Iterator[tuple[str, bool]]:
        """Names as we give them, and whether the file was not finished."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name, _, rest = entry.name.partition(".")
                if _NAME.fullmatch(name) and f".{rest}" in (SUFFIX, f"{SUFFIX}.part"):
                    yield name, rest.endswith(".part")

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        try:
            file, size = open_regular(self._path(name), follow=False)
            with file:
                yield file, size
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"The checkpoint cannot be read: {reason}.") from error

    @contextlib.contextmanager
    def _open_again(self, name: str, head: Head) -> Iterator[tuple[BinaryIO, int, bytes]]:
        """A file at its checkpoint, the bytes of that, and the hash of its tokens."""
        with self._open(name) as (file, size):
            try:
                found, digest = _read_head(file, size)
            except _NotOursError:
                raise CheckpointError("The file is something else by now.") from None
            if replace(found, keys=head.keys) != head or not head.keys.items() <= found.keys.items():
                raise CheckpointError("The file is another checkpoint.")
            yield file, size - file.tell(), digest

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name)
        return self._folder / f"{name}{SUFFIX}"

    @staticmethod
    def _unlink(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


class Failures:
    """Counts and logs failures of files. Thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        self.n_failed = 0  # times that something could not be written
        self.last = ""  # reason of the last failure
        self.n_damaged = 0  # checkpoints given up because their files were damaged or missing
        self._folder = folder
        self._causes: set[str] = set()  # that the log has
        self._lock = threading.Lock()

    def note(self, error: BaseException) -> None:
        """Counts a failure; each cause is logged once."""
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
        with self._lock:
            self.n_failed += 1
            self.last = reason
            is_new = reason not in self._causes and len(self._causes) < 100
            if is_new:
                self._causes.add(reason)
        if is_new:
            log.warning(
                "The conversations in %s cannot be kept as they should: %s. Answers do not depend on it; what is lost "
                "is processed again. (Reported once.)",
                self._folder,
                reason,
            )

    def damaged(self, what: str, n: int) -> None:
        with self._lock:
            self.n_damaged += n
        log.warning("%s in %s: what they held is processed again when it is needed.", what, self._folder)


class _NotOursError(Exception):
    """The file is of another program or another version."""


def _read_head(file: BinaryIO, size: int) -> tuple[Head, bytes]:
    """Reads the head and the hash of the tokens; leaves the file at the checkpoint. Raises CheckpointError."""
    front = file.read(_FRONT.size)
    if len(front) < _FRONT.size:
        raise CheckpointError("The checkpoint is cut short.")
    magic, version, n_head, tokens_digest, digest = _FRONT.unpack(front)
    if magic != MAGIC or version != VERSION:
        raise _NotOursError
    if n_head > _MAX_HEAD:
        raise CheckpointError("The head of the checkpoint is damaged.")
    data = file.read(n_head)
    begin = file.tell()
    first = file.read(HEADER_BYTES)
    if _hash(tokens_digest + data + first) != digest:
        raise CheckpointError("The head of the checkpoint is damaged.")
    n_state = state_bytes(first, size - begin)
    file.seek(begin)
    try:
        head = Head(**json.loads(data))
        is_sound = head.is_sound() and head.n_bytes == n_state
    except (TypeError, ValueError, RecursionError):
        is_sound = False
    if not is_sound:
        raise CheckpointError("The head of the checkpoint makes no sense.")
    return head, tokens_digest


def _read_kept(file: BinaryIO, size: int) -> Kept | None:
    """Reads which files hold the archive of the checkpoint that the file stands at. Raises CheckpointError."""
    begin = file.tell()
    n_bytes = kept_bytes(file.read(HEADER_BYTES), size - begin)
    file.seek(size - n_bytes)
    return parse_kept(file.read(n_bytes))


def _hash(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT
