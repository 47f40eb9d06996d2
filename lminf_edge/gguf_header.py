"""What is needed of a model before it is loaded, read from the head of its GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lminf_edge.config import MAX_WINDOW
from lminf_edge.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_LAYERS = 512  # llama.cpp's limit


@dataclass(frozen=True)
class Header:
    """Facts about a model. What its caches take, llama.cpp says: see lminf_edge.weightless."""

    architecture: str
    n_tensors: int  # in this file
    n_ctx_train: int  # tokens, 0 if the file does not say
    is_causal: bool = True  # whether it predicts the next token
    n_selected: int = 0  # blocks of tokens that a query selects to attend to; 0: all
    n_block: int = 1  # tokens of such a block

    def most_local(self, n_global: int, n_recall: int, overrides: Mapping[str, Any] | None = None) -> int:
        """The most tokens that the window can have beside so many others, none of which a query may leave out.

        As lminf_memory::check_selection counts them. overrides: llama.cpp's kv_overrides.
        """
        at, values = f"{self.architecture}.attention.indexer.", overrides or {}
        n_selected = int(values.get(at + "top_k", self.n_selected))
        n_block = int(values.get(at + "block_size", self.n_block))
        if n_selected < 1 or n_block < 1:
            return MAX_WINDOW
        # each recalled token may be in a block of its own, and the window begins anywhere within one
        return (n_selected - -(-n_global // n_block) - n_recall - 1) * n_block + 1


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads the head of a GGUF file, at a cost that does not grow with the file.

    Raises ValueError, in one sentence, if this is no file, not GGUF, a GGUF file that ends in the middle, or one
    whose layers make no sense in a way that would end the process.
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
                header, fault = _parse(_Reader(data))
            except (struct.error, IndexError, KeyError, OverflowError, TypeError, ValueError):
                raise UserError(f"{name} is cut short or damaged: download or convert it again.") from None
    if fault:
        raise UserError(f"{name} {fault}: convert it again.")
    return header


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
        """A scalar or a string; arrays are stepped over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(kind)
        item, count = self.u32(), self.u64()
        if item == _ARRAY:
            raise KeyError("nested array")
        if item != _STRING:
            self.skip(count * struct.calcsize("<" + _SCALARS[item]))
            return None
        for _ in range(count):
            self.skip(self.u64())
        return None


def _parse(reader: _Reader) -> tuple[Header, str | None]:
    """What the file says of itself, and what is wrong with its layers, in a few words."""
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

    def number(key: str) -> int | None:
        value = values.get(f"{architecture}.{key}")
        return int(value) if isinstance(value, (int, float)) else None

    fault, n_layer = None, number("block_count")
    if n_layer is not None and not 1 <= n_layer <= _MAX_LAYERS:
        fault = f"claims to have {n_layer} layers, and llama.cpp runs 1 to {_MAX_LAYERS}"
    elif number("full_attention_interval") == 0:
        fault = "claims that one layer in 0 has full attention"
    elif number("attention.indexer.block_size") == 0:
        fault = "claims to select blocks of 0 tokens"
    is_causal = values.get(f"{architecture}.attention.causal") is not False
    n_selected, n_block = (number(f"attention.indexer.{key}") for key in ("top_k", "block_size"))
    n_ctx_train = number("context_length") or 0
    return Header(architecture, n_tensors, n_ctx_train, is_causal, n_selected or 0, n_block or 1), fault
