"""A stream at one moment, in memory or in a file.

Its size is that of the used part of the cache, however long the stream. It holds the recent tokens and one hash of the
older ones, so that a later prompt can be compared with what was processed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lminf_edge.cache.archive import Archive
from lminf_edge.cache.segments import Kept, folder_beside, writing_beside
from lminf_edge.cache.token_log import BLOCK, KEY_BYTES, TokenLog, Tokens
from lminf_edge.config import KV_TYPES, RECALL_RULES, SINK_MODES, physical_memory
from lminf_edge.errors import UserError
from lminf_edge.files import open_regular, sync_folder

State = npt.NDArray[np.uint8]  # (n_bytes,)

MAGIC = b"LMINFCKP"
VERSION = 6

# magic, version, n_rollback, model, n_global, n_local, max_distance, sink_mode, type_k, type_v, v_transposed, n_recall,
# recall_distance, recall_from, recall_rule, position, n_skipped, tokens before the recent ones and their hash, number
# of recent tokens, of bytes of state, of bytes of earlier states, of bytes of `kept`; all little endian. Then the
# SHA-256 of this head and of all that follows it: the tokens (int32), the state, of each earlier state its position and
# size and itself, and which files hold the archive.
_HEAD = struct.Struct(f"<8sII32s11iqqQ{KEY_BYTES}sQQQQ")
_EARLIER = struct.Struct("<qQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _HEAD.size + _DIGEST_BYTES

_HEAD_SAMPLE = 1 << 20  # bytes from the start of a model file
_SAMPLES, _SAMPLE_BYTES = 256, 4096


class CheckpointError(UserError):
    """Why a checkpoint cannot be used here, in one sentence. The running stream is unchanged."""


@dataclass(frozen=True)
class Identity:
    """What a cache state depends on besides the tokens: only a stream with the same identity can use it."""

    model: bytes  # SHA-256, see model_digest()
    n_global: int
    n_local: int
    max_distance: int
    sink_mode: int
    type_k: int
    type_v: int
    v_transposed: int  # how values lie in memory: stock operations without flash_attn want them transposed
    n_recall: int = 0
    recall_distance: int = 0
    recall_from: int = 0
    recall_rule: int = 0

    def with_sinks(self, n_sinks: int) -> Identity:
        """The identity of a stream in the same context that keeps n_sinks first tokens."""
        return self if n_sinks == self.n_global else replace(self, n_global=n_sinks)

    @property
    def folder_name(self) -> str:
        """Names what streams can exchange their states: all of this but the number of sinks."""
        return hashlib.sha256(repr(replace(self, n_global=0)).encode()).hexdigest()[:16]

    def check(self, other: Identity) -> None:
        """Raises CheckpointError, naming the first difference, if `other` differs."""
        if self.model != other.model:
            raise CheckpointError("The checkpoint was made with another model, adapter or RoPE setting.")
        for name in _PARAMETERS:
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                raise CheckpointError(
                    f"The checkpoint was made with {name}={_readable(name, there)}, this stream has "
                    f"{name}={_readable(name, here)}."
                )


_PARAMETERS = tuple(each.name for each in fields(Identity) if each.name != "model")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A stream at one moment; made by Llama.checkpoint(), restored by Llama.restore()."""

    identity: Identity
    position: int  # tokens of the stream so far
    n_rollback: int  # tokens that can be rolled back
    n_skipped: int  # tokens of the stream that were not processed
    log: TokenLog  # the tokens; must not be changed
    state: State  # the used part of the cache, as llama.cpp writes it
    # recurrent states at earlier positions of the stream, to which it can go back only with them
    earlier: Mapping[int, State] = field(default_factory=dict)
    archive: Archive | None = None  # what it can recall
    kept: Kept | None = None  # the files that hold that
    folder: Path | None = None  # where they are, unless the caller knows

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, in a file."""
        return self.state.nbytes + sum(_EARLIER.size + each.nbytes for each in self.earlier.values())

    @property
    def nbytes(self) -> int:
        """Bytes this takes in a file."""
        n_kept = len(self.kept.to_bytes()) if self.kept is not None else 0
        return HEADER_BYTES + self.log.recent().nbytes + self.state_bytes + n_kept

    def reach(self, prompt: TokenLog) -> int:
        """How many tokens of a prompt (a whole log) a stream restored from this need not process.

        The last token is always processed, for its logits.
        """
        n_tokens = max(min(self.log.prefix_of(prompt), len(prompt) - 1), 0)
        if len(self.log) - n_tokens <= self.n_rollback:
            return n_tokens
        n_dropped = self.position - len(self.log)
        return max((at - n_dropped for at in self.earlier if at - n_dropped <= n_tokens), default=0)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The contents of a checkpoint file, in parts: HEADER_BYTES first, then the arrays, not copied."""
        head = self._head()
        body = [np.ascontiguousarray(self.log.recent(), dtype="<i4").data, np.ascontiguousarray(self.state).data]
        for position, state in self.earlier.items():
            body += [memoryview(_EARLIER.pack(position, state.nbytes)), np.ascontiguousarray(state).data]
        body.append(memoryview(self.kept.to_bytes() if self.kept is not None else b""))
        yield head + _digest(head, body)
        yield from body

    def to_bytes(self) -> bytes:
        """The contents of a checkpoint file, without an archive."""
        return b"".join(replace(self, kept=None).chunks())

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """The checkpoint `to_bytes` wrote. Raises CheckpointError if a single byte of it has changed."""
        head = _parse(data[:HEADER_BYTES], len(data))
        if _digest(data[: _HEAD.size], [memoryview(data)[HEADER_BYTES:]]) != data[_HEAD.size : HEADER_BYTES]:
            raise CheckpointError("The checkpoint is damaged: its checksum does not match.")
        recent = np.frombuffer(data, dtype="<i4", count=head.n_recent, offset=HEADER_BYTES)
        begin = HEADER_BYTES + 4 * head.n_recent
        end = begin + head.n_state
        end_earlier = end + head.n_earlier
        return cls(
            identity=head.identity,
            position=head.position,
            n_rollback=head.n_rollback,
            n_skipped=head.n_skipped,
            log=head.log(recent),
            state=np.frombuffer(data, dtype=np.uint8, count=head.n_state, offset=begin),
            earlier=_parse_earlier(data[:end_earlier], end, head.position),
            kept=parse_kept(data[end_earlier:]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the checkpoint to a file, atomically: at any moment the file is the old one or the new one.

        What the stream can recall is written to a folder beside it, PATH.archive: only what is not there yet.
        """
        target = Path(path).expanduser()
        archive: Archive | tuple[Kept, Path] | None = self.archive
        if archive is None and self.kept is not None and self.folder is not None:
            archive = self.kept, self.folder
        if archive is None:
            replace(self, kept=None)._save(target)
            return
        with writing_beside(target, archive) as kept:
            replace(self, kept=kept)._save(target)

    def _save(self, target: Path) -> None:
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(unfinished, "wb") as file:
                for part in self.chunks():
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads a checkpoint file.

        `~` is the home folder. The head is checked against the file's size before the rest is read. Raises
        CheckpointError, in one sentence, if the file is missing, truncated, damaged or not a checkpoint.
        """
        name = os.path.expanduser(os.fspath(path))
        try:
            file, n_bytes = open_regular(name)
            with file:
                return replace(cls.read(file, n_bytes), folder=folder_beside(Path(name)))
        except CheckpointError:
            raise
        except (OSError, ValueError, MemoryError) as error:  # a ValueError for a name with a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"The checkpoint {name} cannot be read: {reason}.") from error

    @classmethod
    def read(cls, file: BinaryIO, n_bytes: int) -> Checkpoint:
        """The checkpoint in the next n_bytes of a file. Raises CheckpointError, OSError, MemoryError."""
        begin = file.tell()
        _parse(file.read(HEADER_BYTES), n_bytes)
        memory = physical_memory()
        if memory is not None and n_bytes > memory:
            raise CheckpointError(f"The checkpoint has {n_bytes} bytes, this machine {memory} of memory.")
        file.seek(begin)
        return cls.from_bytes(file.read(n_bytes))

    @staticmethod
    def read_tokens(file: BinaryIO, n_bytes: int) -> tuple[bytes, TokenLog]:
        """Only the tokens of the checkpoint in the next n_bytes of a file, as bytes and as a log, unchecked.

        Raises CheckpointError, OSError, MemoryError.
        """
        head = _parse(file.read(HEADER_BYTES), n_bytes)
        data = file.read(4 * head.n_recent)
        return data, head.log(np.frombuffer(data, dtype="<i4"))

    def _head(self) -> bytes:
        model, *parameters = (getattr(self.identity, each.name) for each in fields(Identity))
        tokens = (self.position, self.n_skipped, self.log.n_base, self.log.base, len(self.log.recent()))
        n_earlier = self.state_bytes - self.state.nbytes
        sizes = (self.state.nbytes, n_earlier, self.nbytes - HEADER_BYTES - self.log.recent().nbytes - self.state_bytes)
        return _HEAD.pack(MAGIC, VERSION, self.n_rollback, model, *parameters, *tokens, *sizes)


@dataclass(frozen=True)
class _Head:
    identity: Identity
    position: int
    n_rollback: int
    n_skipped: int
    n_base: int
    base: bytes
    n_recent: int
    n_state: int
    n_earlier: int
    n_kept: int

    def log(self, recent: Tokens) -> TokenLog:
        return TokenLog(recent, n_base=self.n_base, base=self.base if self.n_base else b"")


def state_bytes(head: bytes, n_bytes: int) -> int:
    """Bytes of states in a checkpoint file of n_bytes that begins so. Raises CheckpointError if it cannot be one."""
    parsed = _parse(head, n_bytes)
    return parsed.n_state + parsed.n_earlier


def kept_bytes(head: bytes, n_bytes: int) -> int:
    """Bytes at the end of such a file that say which files hold the archive, see `parse_kept`."""
    return _parse(head, n_bytes).n_kept


def parse_kept(data: bytes) -> Kept | None:
    """Raises CheckpointError if they make no sense."""
    try:
        return Kept.from_bytes(data)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint is damaged: {error}.") from None


def _parse(head: bytes, n_bytes: int) -> _Head:
    """Parses the head of a file of n_bytes. Raises CheckpointError if it is not that of a checkpoint."""
    if head[: len(MAGIC)] != MAGIC:
        raise CheckpointError("This is not a checkpoint of lminf_edge.")
    if len(head) < HEADER_BYTES:
        raise CheckpointError("The checkpoint is cut short.")
    fields = _HEAD.unpack_from(head)
    _, version, n_rollback, model, *parameters = fields[:-8]
    position, n_skipped, n_base, base, n_recent, n_state, n_earlier, n_kept = fields[-8:]
    if version != VERSION:
        raise CheckpointError(f"The checkpoint has format {version}, this version of lminf_edge reads {VERSION}.")
    n_expected = HEADER_BYTES + 4 * n_recent + n_state + n_earlier + n_kept
    if n_bytes != n_expected:
        raise CheckpointError(f"The checkpoint is cut short or damaged: {n_bytes} bytes instead of {n_expected}.")
    if n_base % BLOCK or position < 0 or not 0 <= n_skipped <= position:
        raise CheckpointError("The checkpoint is damaged: its numbers of tokens make no sense.")
    sizes = (n_state, n_earlier, n_kept)
    return _Head(Identity(model, *parameters), position, n_rollback, n_skipped, n_base, base, n_recent, *sizes)


def _parse_earlier(data: bytes, at: int, position: int) -> dict[int, State]:
    """Parses the states before a position of the stream, from here to the end."""
    found: dict[int, State] = {}
    while at < len(data):
        if len(data) - at < _EARLIER.size:
            raise CheckpointError("The checkpoint is damaged: its earlier states make no sense.")
        earlier, n_bytes = _EARLIER.unpack_from(data, at)
        at += _EARLIER.size
        if not 0 < earlier < position or earlier in found or n_bytes > len(data) - at:
            raise CheckpointError("The checkpoint is damaged: its earlier states make no sense.")
        found[earlier] = np.frombuffer(data, dtype=np.uint8, count=n_bytes, offset=at)
        at += n_bytes
    return found


def _digest(head: bytes, body: Iterable[Any]) -> bytes:
    """SHA-256 of the head and of the arrays or buffers that follow it."""
    digest = hashlib.sha256(head)
    for part in body:
        digest.update(part)
    return digest.digest()


def model_digest(path: str | os.PathLike[str], settings: Mapping[str, Any], *other_files: str) -> bytes:
    """SHA-256 that tells models apart without reading gigabytes.

    Of each file it covers the size, the first MiB (all metadata but the end of a large vocabulary) and 256 evenly
    spread samples of 4 KiB; of the settings, names and values.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name in (path, *other_files):
        with open(name, "rb") as file:
            n_bytes = file.seek(0, os.SEEK_END)
            digest.update(n_bytes.to_bytes(8, "little"))
            file.seek(0)
            digest.update(file.read(_HEAD_SAMPLE))
            for i in range(1, _SAMPLES + 1):
                file.seek(max(0, n_bytes * i // _SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _readable(name: str, value: int) -> str:
    if name == "sink_mode" and 0 <= value < len(SINK_MODES):
        return SINK_MODES[value]
    if name == "recall_rule" and 0 <= value < len(RECALL_RULES):
        return RECALL_RULES[value]
    if name in ("type_k", "type_v") and value in KV_TYPES:
        return KV_TYPES[value][0]
    return str(value)
