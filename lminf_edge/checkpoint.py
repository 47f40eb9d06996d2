"""A stream at one moment, in memory or in a file.

Its size is that of the used part of the cache, however long the stream. With it go the recent tokens and a digest for
each block of older ones (8 bytes for 256 tokens), so that a later prompt can be compared with what was processed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lminf_edge.config import KV_TYPES, SINK_MODES
from lminf_edge.errors import UserError
from lminf_edge.history import Digests, Past, Tokens

MAGIC = b"LMINFCKP"
VERSION = 2

# magic, version, n_rollback, model, n_global, n_local, max_distance, sink_mode, type_k, type_v, v_transposed,
# position, number of digests, of recent tokens, of bytes of state; all little endian. Then the SHA-256 of this head and
# of all that follows it: the digests (uint64), the tokens (int32) and the state.
_HEAD = struct.Struct("<8sII32s7iqQQQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _HEAD.size + _DIGEST_BYTES

_HEAD_SAMPLE = 1 << 20  # bytes from the start of a model file
_SAMPLES, _SAMPLE_BYTES = 256, 4096


class CheckpointError(UserError):
    """A checkpoint that cannot be used here, and why, in one sentence. The running stream is as it was."""


@dataclass(frozen=True)
class Identity:
    """What a cache state depends on besides the tokens: only a stream with the same identity can take it over."""

    model: bytes  # SHA-256, see model_digest()
    n_global: int
    n_local: int
    max_distance: int
    sink_mode: int
    type_k: int
    type_v: int
    v_transposed: int  # how values lie in memory: stock operations without flash_attn want them transposed

    def check(self, other: Identity) -> None:
        """Raises CheckpointError, naming the first difference, if `other` is the identity of another kind of stream."""
        if self.model != other.model:
            raise CheckpointError("The checkpoint was made with another model, adapter or RoPE setting.")
        for name in ("n_global", "n_local", "max_distance", "sink_mode", "type_k", "type_v", "v_transposed"):
            here, there = getattr(self, name), getattr(other, name)
            if here != there:
                raise CheckpointError(
                    f"The checkpoint was made with {name}={_readable(name, there)}, this stream has "
                    f"{name}={_readable(name, here)}."
                )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A stream at one moment; made by Llama.checkpoint(), taken up by Llama.restore()."""

    identity: Identity
    position: int  # tokens processed since the start of the stream
    n_rollback: int  # tokens that could be taken back
    past: Past  # the tokens processed
    state: npt.NDArray[np.uint8]  # (n_bytes,) the used part of the cache, as llama.cpp writes it

    @property
    def nbytes(self) -> int:
        """Bytes this takes in memory or in a file."""
        return HEADER_BYTES + self.past.nbytes + self.state.nbytes

    def reach(self, prompt: Tokens) -> int:
        """How many tokens of `prompt` (n_tokens,) a stream restored from this need not process.

        The last one is always processed, as it gives the logits to go on from.
        """
        n_tokens = min(self.past.common_prefix(prompt), len(prompt) - 1)
        return max(n_tokens, 0) if len(self.past) - n_tokens <= self.n_rollback else 0

    def to_bytes(self) -> bytes:
        """The contents of a checkpoint file."""
        head, body = self._head(), self._body()
        return b"".join((head, _digest(head, body), *(part.tobytes() for part in body)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """The checkpoint `to_bytes` wrote. Raises CheckpointError if a single byte of it has changed."""
        if data[: len(MAGIC)] != MAGIC:
            raise CheckpointError("This is not a checkpoint of lminf_edge.")
        if len(data) < HEADER_BYTES:
            raise CheckpointError("The checkpoint is cut short.")
        _, version, n_rollback, model, *parameters, position, n_digests, n_recent, n_bytes = _HEAD.unpack_from(data)
        if version != VERSION:
            raise CheckpointError(f"The checkpoint has format {version}, this version of lminf_edge reads {VERSION}.")
        recent_at = HEADER_BYTES + 8 * n_digests
        state_at = recent_at + 4 * n_recent
        n_expected = state_at + n_bytes
        if len(data) != n_expected:
            raise CheckpointError(f"The checkpoint is cut short or damaged: {len(data)} bytes instead of {n_expected}.")
        if _digest(data[: _HEAD.size], [memoryview(data)[HEADER_BYTES:]]) != data[_HEAD.size : HEADER_BYTES]:
            raise CheckpointError("The checkpoint is damaged: its checksum does not match.")
        return cls(
            identity=Identity(model, *parameters),
            position=position,
            n_rollback=n_rollback,
            past=Past(
                digests=np.frombuffer(data, dtype="<u8", count=n_digests, offset=HEADER_BYTES).astype(np.uint64),
                recent=np.frombuffer(data, dtype="<i4", count=n_recent, offset=recent_at).astype(np.int32),
            ),
            state=np.frombuffer(data, dtype=np.uint8, offset=state_at),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the checkpoint to a file. Whatever happens meanwhile, the file is the old one or the new one."""
        target = Path(path)
        head, body = self._head(), self._body()
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb") as file:
                file.write(head)
                file.write(_digest(head, body))
                for part in body:
                    file.write(part.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the new name itself lasts only once its folder is written
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads a checkpoint file.

        Raises CheckpointError, in one sentence, if it is missing, cut short, damaged or something else altogether.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"The checkpoint {os.fspath(path)} cannot be read: {error.strerror}.") from error
        return cls.from_bytes(data)

    def _head(self) -> bytes:
        i = self.identity
        parameters = (i.n_global, i.n_local, i.max_distance, i.sink_mode, i.type_k, i.type_v, i.v_transposed)
        sizes = (self.position, len(self.past.digests), len(self.past.recent), self.state.nbytes)
        return _HEAD.pack(MAGIC, VERSION, self.n_rollback, i.model, *parameters, *sizes)

    def _body(self) -> list[npt.NDArray[Any]]:
        """What follows the head, little endian: digests, recent tokens, state."""
        digests: Digests = np.ascontiguousarray(self.past.digests, dtype="<u8")
        return [digests, np.ascontiguousarray(self.past.recent, dtype="<i4"), np.ascontiguousarray(self.state)]


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
    if name in ("type_k", "type_v") and value in KV_TYPES:
        return KV_TYPES[value][0]
    return str(value)
