"""What a model will take is known before it is loaded: to the byte, for every kind of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import llama_cpp as bindings
from reference import recurrent_models, tiny_models, unsupported_models

from lminf_edge import Llama, LMInfConfig, native
from lminf_edge.cli import main
from lminf_edge.cli.common import KV_TYPE_NUMBERS
from lminf_edge.config import Window, resolve
from lminf_edge.weightless import MAX_STOCK, PADDING, Weightless

F16, Q8_0 = KV_TYPE_NUMBERS["f16"], KV_TYPE_NUMBERS["q8_0"]

# name -> layers by kind: full attention, sliding window, recurrent
KINDS = {
    "llama": (2, 0, 0),
    "qwen3": (2, 0, 0),
    "smollm3": (4, 0, 0),
    "gemma2": (1, 1, 0),
    "jamba": (1, 0, 1),
    "minicpm3": (2, 0, 0),
    "mamba": (0, 0, 2),
    "rwkv7": (0, 0, 2),
}


def write(name: str, folder: Path) -> str:
    for models in (recurrent_models, tiny_models, unsupported_models):
        if name in models.MODELS:
            return str(models.write(name, folder))  # type: ignore[attr-defined]
    raise KeyError(name)


@pytest.mark.parametrize("name", list(KINDS))
def test_it_is_what_a_loaded_model_takes(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path)
    types = (F16, Q8_0) if name == "qwen3" else (F16,)  # the heads of the others are too small
    with Weightless(path) as model:
        for kv_type in types:
            for n_global, n_local, n_ubatch in ((4, 50, 64), (9, 300, 128)):
                config = LMInfConfig(n_global=n_global, n_local=n_local)
                layout = model.layout(resolve(config, None, 128), kv_type, n_ubatch)
                llm = Llama(path, lminf=config, n_ubatch=n_ubatch, type_k=kv_type, type_v=kv_type, verbose=False)
                info = llm.stream_info()
                assert layout.parts == info.parts
                assert layout.attention == info.attention
                assert info.kv_bytes == info.parts.kv_bytes
                parts = info.parts
                assert (parts.n_layer_full, parts.n_layer_sliding, parts.n_layer_recurrent) == KINDS[name]
                assert model.is_constant == (parts.n_layer_full == 0)
                llm.eval([1, 2, 3])
                assert llm.stream_info().kv_bytes == info.kv_bytes
                llm.close()


@pytest.mark.parametrize("name", ["llama", "gemma2", "jamba", "mamba"])
def test_so_is_what_llama_cpp_s_own_cache_takes(tmp_path: Path, name: str) -> None:
    path, library = write(name, tmp_path), native.load()
    with Weightless(path) as model:
        for n_ctx in (100, 1000):
            llm = Llama(path, n_ctx=n_ctx, swa_full=False, verbose=False)
            assert bindings.llama_n_ctx(llm._ctx.ctx) in (n_ctx, -(-n_ctx // PADDING) * PADDING)
            assert model.stock_bytes(n_ctx, F16) == library.memory_bytes(llm._ctx.ctx) > 0
            llm.close()


def test_a_token_of_the_window_takes_what_one_more_takes(nano_path: str) -> None:
    with Weightless(nano_path) as model:
        small, large = (model.layout(window(n), F16) for n in (256, 2560))
        assert small.bytes_per_token == large.bytes_per_token == 2 * 6 * 2 * 64 * 2  # K, V, layers, heads, size, bytes
        assert large.parts.window_bytes - small.parts.window_bytes == 2304 * small.bytes_per_token
        assert large.parts.constant_bytes == small.parts.constant_bytes


def test_sizes_far_beyond_memory_cost_nothing_to_know(nano_path: str) -> None:
    with Weightless(nano_path) as model:
        per_token = 2 * 6 * 2 * 64 * 2
        assert model.stock_bytes(1, F16) == PADDING * per_token
        assert model.stock_bytes(MAX_STOCK, F16) == MAX_STOCK * per_token
        assert model.stock_bytes(1 << 30, F16) == (1 << 30) * per_token


def window(n_local: int) -> Window:
    return resolve(LMInfConfig(n_local=n_local), None, 1 << 20)


# --- info -------------------------------------------------------------------------------------------------------------


def run_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_info_tells_layers_by_kind(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write("gemma2", tmp_path)
    report = run_json(capfd, "info", "-m", path, "--n-local", "100")
    assert report["layers"] == {"full": 1, "sliding": 1, "recurrent": 0}
    per_token = 2 * 2 * 16 * 2  # of one layer: K and V, heads, head size, bytes
    assert report["kv_bytes_per_token"]["f16"] == per_token
    assert report["kv_bytes_per_token"]["q8_0"] is None  # heads of 16
    # full attention over 128 tokens, and a sliding window of 32 with a micro-batch, both in blocks of 256 cells
    assert report["stock_kv_bytes"] == 256 * per_token + 256 * per_token
    assert main(["info", "-m", path, "--n-local", "100"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert "1 with full attention: " in output.out
    assert "; 1 with a sliding window: " in output.out


def test_a_window_shorter_than_the_sliding_one_is_warned_of(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write("gemma2", tmp_path)
    with pytest.warns(UserWarning, match="14 tokens is shorter than the sliding window of 32"):
        Llama(path, lminf=LMInfConfig(n_global=4, n_local=10), verbose=False).close()
    assert main(["info", "-m", path, "--n-global", "4", "--n-local", "10"]) == 0
    warning = capfd.readouterr().err
    assert warning.startswith("warning: ")
    assert "larger --n-local" in warning
