"""Benchmarks: models of the right shape, states with as many cells as they say, whole tables; no time is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from benchmark_script import run_benchmark
from native_context import NativeContext
from reference import models, tiny_models
from remote import Relay, rpc_servers

from lminf_edge.bench import random_model
from lminf_edge.bench.alternate import Bench, Result, Worker, fastest, ratio
from lminf_edge.bench.contender import Contender
from lminf_edge.bench.random_model import SHAPES, Shape
from lminf_edge.bench.state import stretch, stretch_lambda
from lminf_edge.cli import main
from lminf_edge.errors import UserError
from lminf_edge.native import library_folder

N_THREADS = 1
GROK = tiny_models.MODELS["grok"]


def small(name: str, **sizes: Any) -> Shape:
    """A real shape with the sizes of a toy."""
    toy = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "head_size": 64, "n_ff": 128, "n_vocab": 300}
    return dataclasses.replace(SHAPES[name], **{**toy, **sizes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.random_model("toy", small("llama-3.2-1b"), tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def bench(model: Path) -> Any:
    folder = library_folder()
    assert folder is not None
    with Bench({"ours": folder, "stock": folder}, model, N_THREADS) as bench:
        yield bench


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", random_model.WEIGHT_TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_model_has_its_shape_and_computes_numbers(name: str, weight_type: str, tmp_path: Path) -> None:
    shape = small(name)
    path = random_model.random_model(name, shape, tmp_path, weight_type)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {key: tuple(reversed(tensor.shape.tolist())) for key, tensor in tensors.items()} == dict(shape.tensors())
    assert tensors["blk.1.attn_k.weight"].tensor_type.name.lower() == weight_type
    output = "token_embd.weight" if shape.tied else "output.weight"
    assert tensors[output].tensor_type.name == ("Q6_K" if weight_type == "q4_0" else weight_type.upper())
    values = gguf.quants.dequantize(tensors[output].data, tensors[output].tensor_type)
    assert np.std(values) == pytest.approx(0.02, rel=0.2)

    with NativeContext(path, n_local=None) as context:
        assert context.n_vocab == shape.n_vocab
        logits = context.feed(np.arange(64, dtype=np.int32))
        assert np.isfinite(logits).all()
        assert np.std(logits) > 1e-3


def test_sizes_are_the_real_ones() -> None:
    def n_weights(name: str) -> int:
        return sum(int(np.prod(shape)) for _, shape in SHAPES[name].tensors())

    assert n_weights("llama-3.2-1b") == 1_235_814_400
    assert n_weights("qwen3-0.6b") == 596_049_920
    assert n_weights("llama-2-7b") == 6_738_415_616


def test_model_is_made_once(tmp_path: Path) -> None:
    shape = small("llama-2-7b")
    path = random_model.random_model("toy", shape, tmp_path)
    written = path.stat().st_mtime_ns
    assert random_model.random_model("toy", shape, tmp_path).stat().st_mtime_ns == written
    assert random_model.random_model("toy", small("llama-2-7b", n_ff=64), tmp_path) != path
    assert len(list(tmp_path.iterdir())) == 2


# --- states -----------------------------------------------------------------------------------------------------------


def logits_after(context: NativeContext, state: bytes | bytearray) -> np.ndarray:
    assert context.load(bytes(state))
    return context.decode((0, [5, 6, 7]))


@pytest.mark.parametrize("kv_type", [1, 8])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_stretch(model: Path, flash_attn: bool, kv_type: int) -> None:
    settings = {"flash_attn": flash_attn, "type_k": kv_type, "type_v": kv_type if flash_attn else 1, "n_ctx": 512}
    with NativeContext(model, n_local=None, **settings) as context:
        context.feed(np.arange(40, dtype=np.int32))
        state = context.save()
        assert stretch(state, 40) == state
        np.testing.assert_array_equal(logits_after(context, stretch(state, 40)), logits_after(context, state))
        assert context.load(bytes(stretch(state, 300)))
        assert context.next_pos(0, 1) == 300
        assert len(context.save()) == len(stretch(state, 300))
        assert np.isfinite(context.decode((0, [5, 6, 7]))).all()


@pytest.mark.parametrize("flash_attn", [False, True])
def test_stretch_lambda(model: Path, flash_attn: bool) -> None:
    with NativeContext(model, n_local=100, n_global=4, flash_attn=flash_attn) as context:
        context.feed(np.arange(40, dtype=np.int32))
        state = context.save()
        assert stretch_lambda(state, 40) == state
        n_cells = context.info().n_cells
        # three million: far enough for graph positions to have been moved back, and a stream goes on from there
        for stream_pos in (90, n_cells, 3_000_001):
            assert context.load(bytes(stretch_lambda(state, stream_pos)))
            info = context.info()
            assert info.stream_pos == stream_pos
            assert info.n_sink == 4
            assert info.n_window == min(stream_pos, n_cells)
            assert np.isfinite(context.feed(np.arange(200, dtype=np.int32) % 300)).all()
            assert context.info().stream_pos == stream_pos + 200


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "lfm2", "jamba", "deepseek2"])
def test_stretch_lambda_with_other_parts(tmp_path: Path, name: str) -> None:
    """Sliding layers, recurrent states, keys without values."""
    with NativeContext(models.write(name, tmp_path), n_local=100, n_global=4) as context:
        context.feed(np.arange(40, dtype=np.int32))
        state = context.save()
        assert stretch_lambda(state, 40) == state
        for stream_pos in (90, 3_000_001):
            assert context.load(bytes(stretch_lambda(state, stream_pos)))
            assert context.info().stream_pos == stream_pos
            assert np.isfinite(context.feed(np.arange(200, dtype=np.int32) % 280)).all()
            assert context.info().stream_pos == stream_pos + 200


def test_sinks_of_a_stretched_state_are_seen(model: Path) -> None:
    """Other first tokens, other logits: they are what a far query still attends to of its beginning."""
    window = np.arange(100, 140, dtype=np.int32)
    logits = []
    for first in (3, 200):
        with NativeContext(model, n_local=20, n_global=4) as context:
            context.feed(np.arange(first, first + 4, dtype=np.int32))
            beginning = context.save()
            assert context.load(bytes(stretch_lambda(beginning, 1_000_000)))
            logits.append(context.feed(window)[-1])  # nothing made up is left in the window
    assert np.abs(logits[0] - logits[1]).max() > 1e-4


def test_state_without_its_sinks_is_refused(model: Path) -> None:
    with NativeContext(model, n_local=100, n_global=8) as context:
        context.feed(np.arange(4, dtype=np.int32))
        with pytest.raises(ValueError, match="has all its sinks"):
            stretch_lambda(context.save(), 1000)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_contenders_in_turn(bench: Any) -> None:
    contenders = [
        Contender("ours", "lambda", "tg", 4, 5000, window=512),
        Contender("ours", "lambda", "tg", 4, 5000, window=512, prefilled=True),
        Contender("stock", "full", "pp", 40, 600, window=512, flash_attn=True, kv_type="q8_0"),
        Contender("stock", "window", "tg", 4, 508, window=512),
    ]
    lines: list[str] = []
    results = bench.measure(contenders, 3, lines.append)
    assert [result.contender for result in results] == contenders
    assert [len(result.tokens_per_second) for result in results] == [3] * 4
    order = [line.split(", ", 1)[1].rsplit(":", 1)[0] for line in lines]
    assert order[:4] == order[7:8] + order[4:7] == order[10:12] + order[8:10]  # each round begins with the next one
    kv_bytes = [result.kv_bytes for result in results]
    row = 2 * 2 * 2 * 64  # layers, K and V, heads, head size
    assert kv_bytes[0] == kv_bytes[1] > 512 * row * 2
    assert kv_bytes[2] == 768 * row * 34 // 32
    assert kv_bytes[3] == 512 * row * 2
    assert Result.from_json(json.loads(json.dumps(results[0].as_json()))) == results[0]


def test_ratio_is_taken_within_each_round() -> None:
    contender = Contender("ours", "lambda", "tg", 4, 0)
    fast, slow = Result(contender, 0, (10.0, 2.0, 8.0)), Result(contender, 0, (5.0, 1.0, 2.0))
    assert dataclasses.astuple(ratio(fast, slow)) == (2.0, 2.0, 4.0)
    assert fastest([slow, fast]) is fast


def test_labels() -> None:
    assert Contender("ours", "lambda", "tg", 32, 8192).label == "tg32 @ d8192"
    assert Contender("stock", "full", "pp", 512, 0).label == "pp512"
    assert Contender("stock", "window", "tg", 32, 4064).cache_label == "n_ctx 4096"
    with pytest.raises(ValueError, match="must be larger than a test"):
        Contender("stock", "window", "tg", 32, 4096)


def test_worker_says_what_is_wrong(bench: Any) -> None:
    broken = Contender("ours", "lambda", "tg", 4, 0, window=512, kv_type="q4_1")  # quantized values without fa
    with pytest.raises(UserError, match=r"[Ff]lash"):
        bench.measure([broken], 1)
    assert bench.measure([dataclasses.replace(broken, kv_type="f16")], 1)


def test_latency(bench: Any) -> None:
    latency = bench.latency(Contender("ours", "lambda", "tg", 4, 0, window=100), 33)
    assert latency["n_tokens"] == latency["control"]["n_tokens"] == 30
    for seconds in (latency, latency["control"]):
        assert 0 < seconds["median"] <= seconds["p99"] <= seconds["max"] <= seconds["seconds"]


# --- command line -----------------------------------------------------------------------------------------------------


def test_bench_json(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--window", "64", "--n-gen", "2", "--n-prompt", "8", "--rounds", "2", "--depth", "0,300"]
    assert main(["bench", "-m", "nano", "--threads", "1", *options, "--json"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert set(report) == {
        "model", "n_params", "n_bytes", "n_threads", "n_gpu_layers", "rpc_servers", "system", "results", "ratios"
    }  # fmt: skip
    assert set(report["system"]) == {"ours", "stock"}
    labels = {(result["cache"], result["flash_attn"], result["label"]) for result in report["results"]}
    assert labels == {
        (cache, fa, label)
        for fa, caches in ((False, ("lambda", "full")), (True, ("full",)))
        for cache, label in (
            *((cache, label) for cache in caches for label in ("pp8", "tg2", "pp8 @ d300", "tg2 @ d300")),
            ("window", "pp8 @ d56"),
            ("window", "tg2 @ d62"),
        )
    }
    for result in report["results"]:
        assert len(result["tokens_per_second"]) == 2
        assert result["min"] <= result["median"] <= result["max"]
    assert [(r["label"], r["to"]) for r in report["ratios"]] == [
        ("pp8", "full"), ("tg2", "full"), ("pp8 @ d300", "full"), ("pp8 @ d300", "window"),
        ("tg2 @ d300", "full"), ("tg2 @ d300", "window"),
    ]  # fmt: skip


def test_bench_with_recall(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--window", "64", "--n-gen", "2", "--n-prompt", "0", "--rounds", "1", "--depth", "300", "--recall", "8"]
    assert main(["bench", "-m", "nano", "--threads", "1", *options, "--archive-type", "f16", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    ours = [(r["cache"], r["prefilled"], r["recall"]["n_recall"]) for r in report["results"] if r["library"] == "ours"]
    assert ours == [("lambda", False, 0), ("recall", False, 8)]
    assert [r["recall"]["archive_type_k"] for r in report["results"]][:2] == ["q8_0", "f16"]
    assert [r["to"] for r in report["ratios"]] == ["full", "window", "recall"]
    assert main(["bench", "-m", "nano", "--threads", "1", *options]) == 0
    output = capfd.readouterr().out
    assert "| Λ 10 + 54, 8 recalled | ours |" in output
    assert "times as fast as with 8 recalled" in output


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_bench_with_recall_of_other_kinds(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """No layer that recalls; a recurrent state, which goes back by being restored, and its archive with it."""
    sizes = ["--window", "64", "--n-gen", "2", "--n-prompt", "0", "--depth", "6000"]
    options = [*sizes, "--recall", "8", "--threads", "1"]
    assert main(["bench", "-m", str(models.write(name, tmp_path)), *options, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [len(r["tokens_per_second"]) for r in report["results"] if r["cache"] == "recall"] == [3]


def test_what_was_measured_before_there_was_recall_can_be_read() -> None:
    result = Result(Contender("ours", "lambda", "tg", 4, 0), 0, (10.0,))
    old = result.as_json()
    del old["recall"]
    assert Result.from_json(old) == result


def test_bench_table(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--window", "64", "--n-gen", "2", "--n-prompt", "0", "--rounds", "1", "--threads", "1", "--depth", "64"]
    assert main(["bench", "-m", "nano", *options, "--kv-type", "q8_0"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].startswith("| cache | library |")
    assert [line.split(" | ")[5] for line in lines[4:7]] == ["tg2 @ d64", "tg2 @ d64", "tg2 @ d62"]
    assert sum("times as fast as" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "llama-4"], "There is no shape 'llama-4': use one of llama-3.2-1b, "),
        (["--shape", "qwen3-0.6b", "--weights", "q1"], "There is no weight type 'q1': use one of q4_0, "),
        (["-m", "missing.gguf"], "Model path does not exist: missing.gguf"),
        (["-m", "nano", "--stock-lib", "/nowhere"], "There is no llama.cpp library in /nowhere."),
        (["-m", "nano", "--n-gen", "0", "--n-prompt", "0"], "There is nothing to measure"),
        (["-m", "nano", "--window", "5"], "A window of 5 tokens must be larger than n_global=10."),
    ],
)
def test_bench_bad_input(arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1


def test_shape_needs_gguf(tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["bench", "--shape", "llama-2-7b", "--models", str(tmp_path)]) == 1
    assert capfd.readouterr().err == "error: Making a model needs the package gguf: pip install 'lminf-edge[bench]'.\n"


@pytest.mark.parametrize(
    "arguments", [["generate", "-p", "a"], ["ppl", "-f", __file__], ["passkey"], ["serve", "--port", "0"], ["chat"]]
)
def test_a_model_without_vocabulary_takes_no_text(
    model: Path, arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--disk", "0"] if arguments[0] == "serve" else []
    assert main([arguments[0], "-m", str(model), *arguments[1:], *options]) == 1
    error = capfd.readouterr().err
    assert "has no vocabulary" in error
    assert error.count("\n") == 1


def test_heads_too_small_for_a_quantized_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = small("llama-3.2-1b", head_size=16, n_head=16, n_head_kv=4)
    path = str(random_model.random_model("small-heads", shape, tmp_path))
    sentence = "a q8_0 cache needs heads whose size is a multiple of 32, and these have 16."
    assert main(["generate", "-m", path, "-p", "a", "--kv-type", "q8_0"]) == 1
    assert capfd.readouterr().err == f"error: {path} cannot be used so: {sentence}\n"
    assert main(["info", "-m", path, "--kv-type", "q8_0"]) == 1
    assert f"no: {sentence}" in capfd.readouterr().out
    assert main(["info", "-m", path, "--json"]) == 0
    per_token = json.loads(capfd.readouterr().out)["kv_bytes_per_token"]
    assert [name for name, n_bytes in per_token.items() if n_bytes is not None] == ["f32", "f16", "bf16"]


def test_a_model_without_flash_attention_has_no_quantized_cache(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.MODELS, "grok", dataclasses.replace(GROK, n_embd=128, head_size=32))
    path = str(models.write("grok", tmp_path))
    for command in (["generate", "-p", "a"], ["chat", "-p", "a"], ["bench"]):
        assert main([*command, "-m", path, "--kv-type", "q8_0"]) == 1
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.endswith("not in llama.cpp for it: choose f16.\n")
        assert error.count("\n") == 1
    assert main(["generate", "-m", path, "-p", "a", "-n", "2"]) == 0


@pytest.mark.parametrize("name", ["gemma4", "qwen35", "jamba", "minicpm3", "deepseek2", "qwen2vl"])
def test_models_of_every_kind_are_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """With made-up cells where their states are known, else after a prompt of that length."""
    path = str(models.write(name, tmp_path))
    options = ["--window", "100", "--depth", "0,300", "--n-prompt", "16", "--n-gen", "4", "--rounds", "1"]
    assert main(["bench", "-m", path, *options, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)["results"]
    assert {result["label"] for result in results} >= {"pp16", "tg4", "pp16 @ d300", "tg4 @ d300"}
    assert {result["cache"] for result in results} == {"lambda", "full", "window"}
    assert all(result["median"] > 0 and result["kv_bytes"] > 0 for result in results)


# --- benchmarks/ ------------------------------------------------------------------------------------------------------


def test_speed_and_report(tmp_path: Path) -> None:
    folder = library_folder()
    figures, page = tmp_path / "performance", tmp_path / "performance.md"

    options = ["--threads", 1, "--stock-lib", folder, "--models", tmp_path / "m", "--out", figures]
    run_benchmark("speed.py", "--tiny", *options)
    run_benchmark("report.py", "--figures", figures, "--page", page)
    records = {path.stem: json.loads(path.read_text()) for path in figures.glob("*.json")}
    assert len(records) == 17
    for name, record in records.items():
        assert record["experiment"] == name
        assert record["machine"]["cpu"]
        assert record["machine"]["upstream"].startswith("llama-cpp-python==")
    text = page.read_text()
    assert all(f"performance/{name}.json" in text for name in records if name not in ("latency", "bandwidth", "busy"))
    assert len(records["busy"]["results"]) == 2 * 3 * 3  # models, other processes, settings
    assert all(result["tokens_per_second"] for result in records["busy"]["results"])
    assert "| `nano` | 1 | sleep |" in text
    assert "against full attention" in text
    assert "with 5,000 tokens in the archive and 32 recalled, against no recall" in text
    assert (figures / "decode-speed.png").stat().st_size > 10_000

    plot = (figures / "decode-speed.png").read_bytes()
    run_benchmark("report.py", "--figures", figures, "--page", page)
    assert page.read_text() == text
    assert (figures / "decode-speed.png").read_bytes() == plot


def test_a_library_that_aborts_is_told_in_a_sentence(model: Path) -> None:
    folder = library_folder()
    assert folder is not None
    worker = Worker(folder)
    worker.ask("load", model=str(model), n_threads=N_THREADS, n_gpu_layers=0, rpc_servers=[])
    os.kill(worker._process.pid, signal.SIGABRT)
    with pytest.raises(UserError, match="ended by SIGABRT in 'run'"):
        worker.ask("run", id=0)
    worker.close()


def test_other_machines_are_measured(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["bench", "-m", str(model), "--window", "32", "--depth", "40", "--n-prompt", "0", "--n-gen", "4"]
    options += ["--rounds", "1", "--threads", "1", "--json"]
    with rpc_servers(2) as servers, contextlib.ExitStack() as stack:
        relays = [Relay(server.port) for server in servers]
        for relay in relays:
            stack.callback(relay.close)
        names = [relay.name for relay in relays]
        assert main([*options, "--rpc", ",".join(names)]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["rpc_servers"] == names
        assert {result["cache"] for result in report["results"]} == {"lambda", "full", "window"}
        assert all(relay.to_server > 10_000 for relay in relays)  # weights
        servers[1].kill()
        assert main([*options, "--rpc", ",".join(server.name for server in servers)]) == 1
        assert f"{servers[1].name} cannot be reached" in capfd.readouterr().err
    assert main([*options, "--rpc", "127.0.0.1", "--stock-lib", str(library_folder())]) == 1
    assert "leave --stock-lib out" in capfd.readouterr().err
