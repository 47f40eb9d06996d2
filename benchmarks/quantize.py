"""Other number formats of a model's weights, made by llama.cpp itself (llama_model_quantize)."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from pathlib import Path

from lminf_edge import native

# as llama-quantize calls them
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15, "Q4_1": 3, "Q4_0": 2, "IQ4_XS": 30}


def quantize(source: Path, target: Path, file_type: str, n_threads: int, again: bool = False) -> None:
    """Writes the model `source` as `target`, with weights of one of FILE_TYPES.

    The source should have f16 or f32 weights; quantized ones are only taken with `again`. Raises RuntimeError, in one
    sentence, if llama.cpp cannot.
    """
    native.load()
    from llama_cpp import llama_cpp as bindings
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    params = bindings.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.nthread = n_threads
    params.allow_requantize = again
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    with native.captured_errors() as errors:
        status = bindings.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(params))
    if status:
        unfinished.unlink(missing_ok=True)
        reason = errors[-1] if errors else "llama.cpp does not say why"
        raise RuntimeError(f"{source} cannot be quantized to {file_type}: {reason}")
    os.replace(unfinished, target)


def tensor_types(path: str | Path) -> dict[str, int]:
    """How many matrices of a GGUF model have which number format: llama.cpp takes another one where rows do not fit.

    Raises ImportError, in one sentence, without the package gguf.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("Reading tensors needs the package gguf: pip install 'lminf-edge[bench]'.") from None
    matrices = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return dict(Counter(tensor.tensor_type.name for tensor in matrices))
