"""GGUF files as plain Python: a metadata dictionary and float64 tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import dequantize

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GGUFFile:
    """A model file in memory.

    metadata: every key of the file, arrays as lists.
    tensors: by name, dequantized, slowest dimension first: a matrix is [n_out, n_in].
    """

    metadata: dict[str, Any]
    tensors: dict[str, Array]


def read(path: str | PathLike[str]) -> GGUFFile:
    """Read the file at `path`, whatever its tensor types (all become float64)."""
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    return GGUFFile(metadata, tensors)


def copy_as_f32(source: str | PathLike[str], target: str | PathLike[str]) -> None:
    """Write `source` to `target` with every tensor as f32.

    ggml rounds activations to the type it multiplies a quantized or f16 weight in. A copy in f32 has no such noise, so
    it can be compared with the reference to the last digits.
    """
    reader = GGUFReader(source)
    writer = with_metadata(reader, target, ("general.file_type",))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    finish(writer)


def copy_without_numbers(source: str | PathLike[str], target: str | PathLike[str], broken: int) -> None:
    """Write `source`, whose output matrix is the token embedding, to `target`, with NaN as the embedding of a token.

    Everything is f32. Only texts with this token are processed to NaN.
    """
    reader = GGUFReader(source)
    writer = with_metadata(reader, target, ("general.file_type",))
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", weights.copy())
            weights[broken] = np.nan
        writer.add_tensor(tensor.name, weights)
    finish(writer)


def copy_with(source: str | PathLike[str], target: str | PathLike[str], keys: Mapping[str, int]) -> None:
    """Write `source` to `target` with more metadata."""
    reader = GGUFReader(source)
    writer = with_metadata(reader, target, keys)
    for name, value in keys.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def copy_with_tokens(source: str | PathLike[str], target: str | PathLike[str], texts: Mapping[int, str]) -> None:
    """Write `source` to `target` with other texts of some tokens, which are found in any text as a whole."""
    reader = GGUFReader(source)
    names = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    writer = with_metadata(reader, target, names)
    tokens, types = (list(reader.fields[name].contents()) for name in names)
    for token, text in texts.items():
        tokens[token], types[token] = text, int(TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


def with_metadata(reader: GGUFReader, target: str | PathLike[str], without: Container[str]) -> GGUFWriter:
    """A writer that has the metadata of another file but some."""
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in without:
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
