"""GGUF models of real shapes with random weights: as fast as the real ones, and made in seconds.

Number formats are those that llama-quantize would choose. Values have a deviation of 0.02, so that activations stay
finite; they predict nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lminf_edge.errors import UserError

Bytes = npt.NDArray[np.uint8]

WEIGHT_TYPES = ("q4_0", "q8_0", "f16")
_DEVIATION = 0.02
_RECIPE = 1  # to be raised when what is written changes


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer; `tied` ones use the token embedding as output matrix."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_base: float
    tied: bool
    norm_eps: float = 1e-5

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor, slowest dimension first."""
        n_q, n_kv = self.n_head * self.head_size, self.n_head_kv * self.head_size
        yield "token_embd.weight", (self.n_vocab, self.n_embd)
        yield "output_norm.weight", (self.n_embd,)
        if not self.tied:
            yield "output.weight", (self.n_vocab, self.n_embd)
        for layer in range(self.n_layer):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (self.n_embd,)
            yield block + "attn_q.weight", (n_q, self.n_embd)
            yield block + "attn_k.weight", (n_kv, self.n_embd)
            yield block + "attn_v.weight", (n_kv, self.n_embd)
            if self.arch == "qwen3":
                yield block + "attn_q_norm.weight", (self.head_size,)
                yield block + "attn_k_norm.weight", (self.head_size,)
            yield block + "attn_output.weight", (self.n_embd, n_q)
            yield block + "ffn_norm.weight", (self.n_embd,)
            yield block + "ffn_gate.weight", (self.n_ff, self.n_embd)
            yield block + "ffn_up.weight", (self.n_ff, self.n_embd)
            yield block + "ffn_down.weight", (self.n_embd, self.n_ff)

    def keys(self) -> dict[str, int | float]:
        """Metadata, without the architecture's prefix."""
        return {
            "vocab_size": self.n_vocab,
            "context_length": self.n_ctx_train,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_size,
            "attention.value_length": self.head_size,
            "attention.layer_norm_rms_epsilon": self.norm_eps,
            "rope.dimension_count": self.head_size,
            "rope.freq_base": self.rope_base,
        }


SHAPES = {
    "llama-3.2-1b": Shape(
        arch="llama",
        n_layer=16,
        n_embd=2048,
        n_head=32,
        n_head_kv=8,
        head_size=64,
        n_ff=8192,
        n_vocab=128256,
        n_ctx_train=131072,
        rope_base=500000.0,
        tied=True,
    ),
    "qwen3-0.6b": Shape(
        arch="qwen3",
        n_layer=28,
        n_embd=1024,
        n_head=16,
        n_head_kv=8,
        head_size=128,
        n_ff=3072,
        n_vocab=151936,
        n_ctx_train=40960,
        rope_base=1000000.0,
        tied=True,
        norm_eps=1e-6,
    ),
    "llama-2-7b": Shape(
        arch="llama",
        n_layer=32,
        n_embd=4096,
        n_head=32,
        n_head_kv=32,
        head_size=128,
        n_ff=11008,
        n_vocab=32000,
        n_ctx_train=4096,
        rope_base=10000.0,
        tied=False,
    ),
}


def find_shape(name: str) -> Shape:
    """Raises ValueError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise UserError(f"There is no shape {name!r}: use one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def random_model(name: str, shape: Shape, folder: str | os.PathLike[str], weight_type: str = "q4_0") -> Path:
    """The path of a model of this shape in `folder`, written unless it is there already.

    Raises ImportError, in one sentence, without the package gguf, and ValueError for an unknown weight type.
    """
    if weight_type not in WEIGHT_TYPES:
        raise UserError(f"There is no weight type {weight_type!r}: use one of {', '.join(WEIGHT_TYPES)}.")
    recipe = hashlib.sha256(repr((_RECIPE, shape, weight_type)).encode()).hexdigest()[:8]
    path = Path(folder) / f"{name}-{weight_type}-{recipe}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            _write(shape, unfinished, weight_type)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _write(shape: Shape, path: Path, weight_type: str) -> None:
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError:
        raise ImportError("Making a model needs the package gguf: pip install 'lminf-edge[bench]'.") from None
    writer = GGUFWriter(path, shape.arch)
    writer.add_name("random")
    writer.add_tokenizer_model("none")  # no vocabulary: token ids go in, logits come out
    for key, value in shape.keys().items():
        if isinstance(value, int):
            writer.add_uint32(f"{shape.arch}.{key}", value)
        else:
            writer.add_float32(f"{shape.arch}.{key}", value)

    pools: dict[str, _Pool] = {}
    shapes = dict(shape.tensors())
    # llama-quantize gives the last matrix six bits
    output = "token_embd.weight" if shape.tied else "output.weight"
    for tensor_name, size in shapes.items():
        if len(size) == 1:
            writer.add_tensor(tensor_name, np.ones(size, dtype=np.float32))
            continue
        kind = "q6_k" if weight_type == "q4_0" and tensor_name == output and size[1] % 256 == 0 else weight_type
        pool = pools.setdefault(kind, _Pool(kind, max(rows * columns for rows, columns in _matrices(shapes))))
        writer.add_tensor(tensor_name, pool.matrix(*size), raw_dtype=GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    return ((size[0], size[1]) for size in shapes.values() if len(size) == 2)


class _Pool:
    """Random blocks of one number format, enough for the largest matrix; every matrix is a view of them.

    Fresh numbers for each would take minutes for 7 B weights, and time does not depend on them.
    """

    def __init__(self, kind: str, n_elements: int) -> None:
        rng = np.random.default_rng(0)
        self._block_elements, dtype = _BLOCKS[kind]
        # whole blocks more, so that matrices can begin at different ones
        n_blocks = n_elements // self._block_elements + 4096
        noise = rng.integers(0, 256, n_blocks * dtype.itemsize, dtype=np.uint8)
        self._blocks = noise.view(dtype)
        # deviations of the random integers: nibbles 4.6, bytes 74, six bits 18.5
        if kind == "f16":
            self._blocks["d"] = rng.normal(0, _DEVIATION, n_blocks).astype(np.float16)
        elif kind == "q6_k":
            self._blocks["scales"] = 8
            self._blocks["d"] = _DEVIATION / 18.5 / 8
        else:
            self._blocks["d"] = _DEVIATION / (4.6 if kind == "q4_0" else 74)
        self._next = 0

    def matrix(self, n_rows: int, n_columns: int) -> Any:
        """Of dtype uint8, (n_rows, bytes per row), or float16, (n_rows, n_columns)."""
        n_blocks = n_rows * n_columns // self._block_elements
        self._next = (self._next + 61) % 4096
        blocks = self._blocks[self._next : self._next + n_blocks]
        if self._block_elements == 1:
            return blocks["d"].reshape(n_rows, n_columns)
        return blocks.view(np.uint8).reshape(n_rows, -1)


# elements per block and its layout, as in ggml-common.h
_BLOCKS: dict[str, tuple[int, np.dtype[Any]]] = {
    "f16": (1, np.dtype([("d", "<f2")])),
    "q4_0": (32, np.dtype([("d", "<f2"), ("qs", "u1", 16)])),
    "q8_0": (32, np.dtype([("d", "<f2"), ("qs", "i1", 32)])),
    "q6_k": (256, np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])),
}
