"""A stream at one moment, in memory or in a file.

Its size is that of the used part of the cache, however long the stream, plus four bytes for each token: these let a
later prompt be compared with what was processed.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lminf_edge.config import KV_TYPES, SINK_MODES
from lminf_edge.history import Tokens, common_prefix

MAGIC = b"LMINFCKP"
VERSION = 1

# magic, version, n_rollback, model, n_global, n_local, max_distance, sink_mode, type_k, type_v, flash_attn,
# position, number of tokens, bytes of state; all little endian. Then the SHA-256 of this head and all that follows
# the digest: the tokens (int32) and the state.
_HEAD = struct.Struct("<8sII32s7iqQQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _HEAD.size + _DIGEST_BYTES

_HEAD_SAMPLE = 1 << 20  # bytes from the start of a model file
_SAMPLES, _SAMPLE_BYTES = 256, 4096


class CheckpointError(ValueError):
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
    flash_attn: int

    def check(self, other: Identity) -> None:
        """Raises CheckpointError, naming the first difference, if `other` is the identity of another kind of stream."""
        if self.model != other.model:
            raise CheckpointError("The checkpoint was made with another model, adapter or RoPE setting.")
        for name in ("n_global", "n_local", "max_distance", "sink_mode", "type_k", "type_v", "flash_attn"):
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
    tokens: Tokens  # (n_tokens,) the tokens processed
    state: npt.NDArray[np.uint8]  # (n_bytes,) the used part of the cache, as llama.cpp writes it

    @property
    def nbytes(self) -> int:
        """Bytes this takes in memory or in a file."""
        return HEADER_BYTES + self.tokens.nbytes + self.state.nbytes

    def reach(self, prompt: Tokens) -> int:
        """How many tokens of `prompt` (n_tokens,) a stream restored from this need not process.

        The last one is always processed, as it gives the logits to go on from.
        """
        n_tokens = min(common_prefix(self.tokens, prompt), len(prompt) - 1)
        return max(n_tokens, 0) if len(self.tokens) - n_tokens <= self.n_rollback else 0

    def to_bytes(self) -> bytes:
        """The contents of a checkpoint file."""
        head, tokens = self._head(), self._tokens_le()
        return b"".join((head, self._digest(head, tokens), tokens.tobytes(), self.state.tobytes()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """The checkpoint `to_bytes` wrote. Raises CheckpointError if a single byte of it has changed."""
        if data[: len(MAGIC)] != MAGIC:
            raise CheckpointError("This is not a checkpoint of lminf_edge.")
        if len(data) < HEADER_BYTES:
            raise CheckpointError("The checkpoint is cut short.")
        _, version, n_rollback, model, *parameters, position, n_tokens, n_bytes = _HEAD.unpack_from(data)
        if version != VERSION:
            raise CheckpointError(f"The checkpoint has format {version}, this version of lminf_edge reads {VERSION}.")
        n_expected = HEADER_BYTES + 4 * n_tokens + n_bytes
        if len(data) != n_expected:
            raise CheckpointError(f"The checkpoint is cut short or damaged: {len(data)} bytes instead of {n_expected}.")
        digest = hashlib.sha256(data[: _HEAD.size])
        digest.update(memoryview(data)[HEADER_BYTES:])
        if digest.digest() != data[_HEAD.size : HEADER_BYTES]:
            raise CheckpointError("The checkpoint is damaged: its checksum does not match.")
        return cls(
            identity=Identity(model, *parameters),
            position=position,
            n_rollback=n_rollback,
            tokens=np.frombuffer(data, dtype="<i4", count=n_tokens, offset=HEADER_BYTES).astype(np.int32, copy=False),
            state=np.frombuffer(data, dtype=np.uint8, offset=HEADER_BYTES + 4 * n_tokens),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the checkpoint to a file. Whatever happens meanwhile, the file is the old one or the new one."""
        target = Path(path)
        head, tokens = self._head(), self._tokens_le()
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "wb") as file:
                file.write(head)
                file.write(self._digest(head, tokens))
                file.write(tokens.data)
                file.write(self.state.data)
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
        parameters = (i.n_global, i.n_local, i.max_distance, i.sink_mode, i.type_k, i.type_v, i.flash_attn)
        sizes = (self.position, len(self.tokens), self.state.nbytes)
        return _HEAD.pack(MAGIC, VERSION, self.n_rollback, i.model, *parameters, *sizes)

    def _tokens_le(self) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(self.tokens, dtype="<i4")

    def _digest(self, head: bytes, tokens: npt.NDArray[np.int32]) -> bytes:
        digest = hashlib.sha256(head)
        digest.update(tokens.data)
        digest.update(self.state.data)
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
