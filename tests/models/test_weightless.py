"""What a model will take is known before it is loaded: to the byte, for every kind of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import llama_cpp as bindings
from reference import models, more_models, tiny_models

from lminf_edge import Llama, LMInfConfig, native
from lminf_edge.cli import main
from lminf_edge.cli.common import KV_TYPE_NUMBERS
from lminf_edge.config import Window, resolve
from lminf_edge.weightless import MAX_STOCK, PADDING, Weightless

F16 = KV_TYPE_NUMBERS["f16"]

# layers with full attention, with a sliding window, and recurrent ones
LAYERS = {
    "llama": (2, 0, 0),
    "gemma2": (2, 2, 0),
    "gemma4": (3, 3, 0),  # two of them use the keys of others
    "jamba": (1, 0, 2),
    "qwen35": (2, 0, 2),
    "minicpm3": (2, 0, 0),
    "mamba": (0, 0, 2),
    "rwkv7": (0, 0, 2),
}
SETTINGS = ((LMInfConfig(n_global=4, n_local=50), 64), (LMInfConfig(n_global=9, n_local=300), 128))


@pytest.mark.parametrize("name", [*tiny_models.MODELS, *models.SERVED, *more_models.CONSTANT])
@pytest.mark.filterwarnings("ignore:The attention window")
def test_it_is_what_a_loaded_model_takes(tmp_path: Path, name: str) -> None:
    path = str(models.write(name, tmp_path))
    with Weightless(path) as model:
        for config, n_ubatch in SETTINGS:
            layout = model.layout(resolve(config, None, 128), F16, n_ubatch)
            llm = Llama(path, lminf=config, n_ubatch=n_ubatch, verbose=False)
            info = llm.stream_info()
            parts = info.parts
            assert layout.parts == parts
            assert layout.attention == info.attention
            assert info.kv_bytes == parts.kv_bytes > 0
            assert model.is_constant == (name in more_models.CONSTANT)
            if name in LAYERS:
                assert (parts.n_layer_full, parts.n_layer_sliding, parts.n_layer_recurrent) == LAYERS[name]
            llm.eval([1, 2, 3])
            assert llm.stream_info().kv_bytes == info.kv_bytes
            llm.close()


@pytest.mark.parametrize("kv_type", ["f32", "q8_0", "q4_0"])
def test_so_it_is_in_other_number_formats(tmp_path: Path, kv_type: str) -> None:
    path, number = str(models.write("qwen3", tmp_path)), KV_TYPE_NUMBERS[kv_type]  # heads of 32
    with Weightless(path) as model:
        for config, n_ubatch in SETTINGS:
            layout = model.layout(resolve(config, None, 1024), number, n_ubatch)
            llm = Llama(path, lminf=config, n_ubatch=n_ubatch, type_k=number, type_v=number, verbose=False)
            assert layout.parts == llm.stream_info().parts
            llm.close()


@pytest.mark.parametrize("name", [*tiny_models.MODELS, *models.SERVED, *more_models.CONSTANT])
def test_so_is_what_llama_cpp_s_own_cache_takes(tmp_path: Path, name: str) -> None:
    path, library = str(models.write(name, tmp_path)), native.load()
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
    path = str(models.write("gemma2", tmp_path))
    report = run_json(capfd, "info", "-m", path, "--n-local", "100")
    assert report["layers"] == {"full": 2, "sliding": 2, "recurrent": 0}
    per_token = 2 * 2 * 16 * 2  # of one layer: K and V, heads, head size, bytes
    assert report["kv_bytes_per_token"]["f16"] == 2 * per_token
    assert report["kv_bytes_per_token"]["q8_0"] is None  # heads of 16
    # two layers over 128 tokens, which llama.cpp makes 256, and two over a window of 24 and a micro-batch of 512
    assert report["stock_kv_bytes"] == 2 * 256 * per_token + 2 * 256 * per_token
    assert main(["info", "-m", path, "--n-local", "100"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert "2 with full attention: " in output.out
    assert "; 2 with a sliding window: " in output.out


def test_a_window_shorter_than_the_sliding_one_is_warned_of(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(models.write("gemma2", tmp_path))
    with pytest.warns(UserWarning, match="14 tokens is shorter than the sliding window of 24"):
        Llama(path, lminf=LMInfConfig(n_global=4, n_local=10), verbose=False).close()
    assert main(["info", "-m", path, "--n-global", "4", "--n-local", "10"]) == 0
    warning = capfd.readouterr().err
    assert warning.startswith("warning: ")
    assert "larger --n-local" in warning
