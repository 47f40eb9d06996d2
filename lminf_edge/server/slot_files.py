"""What a slot holds, saved in a file of a folder by a name that the client chooses, and restored from there.

Each API key has a folder of its own below that, so that no key reaches what another has saved. A file holds the tokens
as well: whoever restores it is served by the same rule as everybody, prefixes that are equal token by token.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lminf_edge.cache.checkpoint import Checkpoint
from lminf_edge.errors import UserError

MAX_FILES = 256  # of one key
# letters, digits and a few signs: nothing that a system gives a meaning to, and no name that begins with a dot
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]{0,199}", re.ASCII)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # to Windows, whatever the folder


def slot_file(folder: Path, owner: str, name: str) -> Path:
    """The file of an owner. Raises UserError for what is no plain name."""
    if not _NAME.fullmatch(name) or name[-1] in ". " or _RESERVED.fullmatch(name):
        raise UserError("filename must be a plain name of letters, digits, spaces and _ - . without a folder.")
    return (folder / f"key-{owner}" if owner else folder) / name


def save_slot_file(path: Path, checkpoint: Checkpoint) -> int:
    """Writes a checkpoint; returns its bytes. Raises UserError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists() and sum(1 for _ in os.scandir(path.parent)) >= MAX_FILES:
            raise UserError(f"There are {MAX_FILES} saved slots, as many as there may be: use one of their names.")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path.name} is something else than a saved slot.")
        checkpoint.save(path)
    except OSError as error:
        raise UserError(f"{path.name} cannot be written: {error.strerror}.") from error
    return checkpoint.nbytes


def load_slot_file(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises UserError."""
    if path.is_symlink() or not path.is_file():
        raise UserError(f"There is no saved slot {path.name!r}.")
    return Checkpoint.load(path)
