"""Opening files that may not be what they should be."""

from __future__ import annotations

import os
import stat
import sys
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str], follow: bool = True) -> tuple[BinaryIO, int]:
    """A regular file, open for reading, and its size in bytes.

    Raises OSError for anything else, at once: opening a FIFO would wait for a writer that may never come. `follow`:
    symbolic links are followed.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        return os.fdopen(descriptor, "rb"), status.st_size
    except BaseException:
        os.close(descriptor)
        raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Writes the names in a folder to disk: what was renamed lasts only then. Raises OSError."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def locked(path: str | os.PathLike[str]) -> BinaryIO:
    """A file that no other process can lock as long as it is open. Raises BlockingIOError if one has."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    file = os.fdopen(os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600), "r+b", buffering=0)
    try:
        if sys.platform == "win32":
            import msvcrt

            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                raise BlockingIOError from None
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
