"""What is needed of a model before it is loaded, read from the head of its GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

from lminf_edge.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """Facts about a model; counts are per token unless said otherwise."""

    architecture: str
    n_tensors: int  # in this file
    n_ctx_train: int  # tokens, 0 if the file does not say
    n_embd_k: int  # elements of all layers' keys, 0 if the file does not say
    n_embd_v: int  # elements of all layers' values, 0 if the file does not say


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads the head of a GGUF file, at a cost that does not grow with the file.

    Raises ValueError, in one sentence, if this is no file, not GGUF, or a GGUF file that ends in the middle.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise UserError(f"Model path does not exist: {name}")
    if not os.path.isfile(name):
        raise UserError(f"{name} is not a file: give the path of a GGUF model.")
    with open(name, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{name} is not a GGUF model.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(_Reader(data))
            except (struct.error, IndexError, KeyError, OverflowError, TypeError, ValueError):
                raise UserError(f"{name} is cut short or damaged: download or convert it again.") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 4

    def scalar(self, kind: int) -> Any:
        layout = "<" + _SCALARS[kind]
        (value,) = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return value

    def u32(self) -> int:
        return int(self.scalar(4))

    def u64(self) -> int:
        return int(self.scalar(10))

    def skip(self, n_bytes: int) -> None:
        self.offset += n_bytes
        if self.offset > len(self.data):
            raise IndexError

    def string(self) -> str:
        n_bytes = self.u64()
        start = self.offset
        self.skip(n_bytes)
        return self.data[start : self.offset].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar, a string, or a list of numbers; arrays of anything else are stepped over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        item, count = self.u32(), self.u64()
        if item == _STRING:
            for _ in range(count):
                self.skip(self.u64())
            return None
        if item == _ARRAY:
            raise KeyError("nested array")
        layout = f"<{count}{_SCALARS[item]}"
        start = self.offset
        self.skip(struct.calcsize(layout))
        return list(struct.unpack_from(layout, self.data, start))


def _parse(reader: _Reader) -> Header:
    reader.u32()  # version
    n_tensors, n_values = reader.u64(), reader.u64()
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.string()
        # converters write the vocabulary last, and stepping over it is what takes time
        if key.startswith("tokenizer.") and any(known.endswith(".context_length") for known in values):
            break
        values[key] = reader.value(reader.u32())

    architecture = str(values.get("general.architecture", ""))

    def number(key: str) -> int:
        value = values.get(f"{architecture}.{key}", 0)
        return int(value) if isinstance(value, (int, float)) else 0

    n_layer, n_head, n_embd = number("block_count"), number("attention.head_count"), number("embedding_length")
    head_size = n_embd // n_head if n_head else 0
    # a number, or a list with one for each layer
    n_head_kv = values.get(f"{architecture}.attention.head_count_kv", n_head)
    n_heads_of_all_layers = sum(n_head_kv) if isinstance(n_head_kv, list) else int(n_head_kv) * n_layer
    return Header(
        architecture=architecture,
        n_tensors=n_tensors,
        n_ctx_train=number("context_length"),
        n_embd_k=n_heads_of_all_layers * (number("attention.key_length") or head_size),
        n_embd_v=n_heads_of_all_layers * (number("attention.value_length") or head_size),
    )
