"""The command line: what each command prints, and one sentence and the right exit status for all that is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT
from reference import models, tiny_models
from reference.gguf_file import copy_with

from lminf_edge import Llama, LMInfConfig, backends, native
from lminf_edge.cli import curves, main
from lminf_edge.cli import doctor as cli_doctor
from lminf_edge.cli import info as cli_info
from lminf_edge.cli.common import KV_TYPE_NUMBERS, human_bytes, options_named, sampling_params
from lminf_edge.cli.demo import Row, Tally, bucket_edges, python_documentation, summarize
from lminf_edge.cli.main import build_parser
from lminf_edge.cli.screen import sparkline
from lminf_edge.engine.params import SamplingParams
from lminf_edge.errors import UserError
from lminf_edge.evaluate import nll, token_nll
from lminf_edge.weightless import Weightless

ENTRY = Path(sys.executable).with_name("lminf-edge")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return str(path)


def run_json(capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """What a command prints with --json; nothing else may be on stdout or stderr."""
    assert main([*arguments, "--json"]) == status
    output = capfd.readouterr()
    assert output.err == ""
    return json.loads(output.out)


# one is known by its parameters, the other is only found out when its graph is built
UNSUPPORTED = [("llada", "not causal"), ("maincoder", "between RoPE and attention")]


def test_gpu_layers_without_a_gpu(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generate = ("generate", "-m", "nano", "-p", "The night", "-n", "1", "--gpu-layers", "1")
    for has_gpu in (False, True):
        monkeypatch.setattr(backends, "has_gpu", lambda library, folder, answer=has_gpu: answer)
        assert main([*generate]) == 0
        note = "note: --gpu-layers has no effect, as the library can use no GPU here"
        assert capfd.readouterr().err.startswith(note) is not has_gpu


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has a GPU")
def test_a_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    library, folder = llama_cpp.llama_cpp._lib, native.library_folder()
    assert folder is not None
    devices = {device.split(" (")[0] for device in cli_doctor.backends().found.split("), ")}
    assert backends.has_gpu(library, folder) is bool(devices - {"CPU"})


# --- sampling ---------------------------------------------------------------------------------------------------------


SAMPLING = {
    "--temp": 0.3, "--top-k": 7, "--top-p": 0.6, "--min-p": 0.02, "--typical-p": 0.9, "--repeat-penalty": 1.1,
    "--repeat-last-n": 256, "--frequency-penalty": 0.2, "--presence-penalty": -0.2, "--dry-multiplier": 0.8,
    "--dry-base": 1.5, "--dry-allowed-length": 3, "--dry-penalty-last-n": 99, "--xtc-probability": 0.4,
    "--xtc-threshold": 0.2, "--top-n-sigma": 1.5, "--dynatemp-range": 0.3, "--dynatemp-exponent": 1.2,
    "--mirostat": 2, "--mirostat-tau": 4.0, "--mirostat-eta": 0.2, "--min-keep": 3, "--seed": 42,
}  # fmt: skip


@pytest.mark.parametrize("command", [["generate", "-p", ""], ["chat"], ["serve"]])
def test_every_sampling_parameter_has_an_option(command: list[str]) -> None:
    options = [part for flag, value in SAMPLING.items() for part in (flag, str(value))]
    breakers = ["--dry-sequence-breaker", "\\n", "--dry-sequence-breaker", "###"]
    args = build_parser().parse_args([*command, "-m", "nano", *options, *breakers, "--no-loop-detection"])
    params = sampling_params(args)
    names = {flag: flag.removeprefix("--").replace("-", "_") for flag in SAMPLING} | {"--temp": "temperature"}
    assert {names[flag]: value for flag, value in SAMPLING.items()} == {
        name: getattr(params, name) for name in names.values()
    }
    assert params.dry_sequence_breakers == ("\n", "###")
    assert not args.detect_loops
    missing = {each.name for each in dataclasses.fields(SamplingParams)} - set(names.values())
    assert missing == {"dry_sequence_breakers", "samplers", "logit_bias", "grammar", "logits_processor"}
    args = build_parser().parse_args([*command, "-m", "nano"])
    assert sampling_params(args) == SamplingParams()
    args = build_parser().parse_args([*command, "-m", "nano", "--dry-sequence-breaker", "none"])
    assert sampling_params(args).dry_sequence_breakers == ()


@pytest.mark.parametrize("stock", [[], ["--stock"]])
def test_sampling_options_have_an_effect(capfd: pytest.CaptureFixture[str], stock: list[str]) -> None:
    command = ["generate", "-m", "nano", "-p", "Anna", "-n", "60", "--temp", "0", "--threads", "1", *stock]
    plain, *others = (
        run_json(capfd, *command, *options)["text"]
        for options in (
            [],
            ["--repeat-penalty", "2"],
            ["--repeat-penalty", "2", "--repeat-last-n", "5"],
            ["--dry-multiplier", "2", "--dry-sequence-breaker", "none"],
            ["--xtc-probability", "1", "--xtc-threshold", "0.05"],
        )
    )
    assert len({plain, *others}) == 5
    assert run_json(capfd, *command, "--repeat-penalty", "2", "--repeat-last-n", "0")["text"] == plain


# --- ppl --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True])
def test_ppl_is_token_nll_by_bucket(capfd: pytest.CaptureFixture[str], text_file: str, stock: bool) -> None:
    options = ["--n-global", "4", "--n-local", "32", "--kv-type", "f32", "--bucket", "100", "--batch", "48"]
    report = run_json(capfd, "ppl", "-m", "nano", "-f", text_file, *options, *(["--stock"] if stock else []))

    f32 = {"type_k": 0, "type_v": 0, "n_batch": 48, "verbose": False}
    llm = Llama(
        "nano", lminf=None if stock else LMInfConfig(n_global=4, n_local=32), n_ctx=1024 if stock else None, **f32
    )
    tokens = llm.tokenize((TEXT * 4).encode("utf-8"))
    expected = token_nll(llm, tokens)
    llm.close()

    assert report["tokens"] == len(tokens) - 1 == len(expected)
    assert report["mean_nll"] == pytest.approx(expected.mean(), abs=1e-5)
    assert [(bucket["start"], bucket["end"]) for bucket in report["buckets"]] == [
        (start, min(start + 100, len(expected))) for start in range(0, len(expected), 100)
    ]
    for bucket in report["buckets"]:
        assert bucket["mean_nll"] == pytest.approx(expected[bucket["start"] : bucket["end"]].mean(), abs=1e-5)


def test_ppl_of_a_text_within_the_window_is_that_of_full_attention(
    capfd: pytest.CaptureFixture[str], text_file: str, nano_f32_path: str
) -> None:
    common = ["ppl", "-m", nano_f32_path, "-f", text_file, "--tokens", "200", "--kv-type", "f32"]
    stock = run_json(capfd, *common, "--stock")
    for attention in ("stock", "fused"):
        ours = run_json(capfd, *common, "--attention", attention)
        assert ours["mean_nll"] == pytest.approx(stock["mean_nll"], abs=1e-5)
    # where weights are quantized activations are, too, and make the other order of additions visible
    common[2] = "nano"
    stock, ours = run_json(capfd, *common, "--stock"), run_json(capfd, *common)
    assert ours["mean_nll"] == pytest.approx(stock["mean_nll"], abs=5e-3)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_ppl_with_every_kv_type(capfd: pytest.CaptureFixture[str], text_file: str, kv_type: str) -> None:
    common = ["ppl", "-m", "nano", "-f", text_file, "--n-global", "4", "--n-local", "64"]
    exact = run_json(capfd, *common, "--kv-type", "f32")
    report = run_json(capfd, *common, "--kv-type", kv_type)
    assert report["mean_nll"] == pytest.approx(exact["mean_nll"], abs=0.05)


def test_ppl_prints_a_table(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    assert main(["ppl", "-m", "nano", "-f", text_file]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ tokens, \d+\.\d{4} nats per token, perplexity \d+\.\d\d", lines[-1])


# --- ppl --policies ---------------------------------------------------------------------------------------------------

POLICY_NAMES = ["full", "shift", "window", "sinks", "sinks-uncapped", "lminf", "recall"]
SMALL = ["--n-global", "4", "--n-local", "60"]


def test_ppl_of_all_policies(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    report = run_json(capfd, "ppl", "-m", "nano", "-f", text_file, "--policies", "all", *SMALL)
    assert list(report) == ["policies"]
    assert list(report["policies"]) == POLICY_NAMES
    n_tokens = report["policies"]["full"]["tokens"]
    for policy in report["policies"].values():
        assert list(policy) == ["tokens", "mean_nll", "buckets", "stages"]
        assert list(policy["stages"]) == ["window_not_full", "window_full"]  # the training length is not reached
        assert policy["stages"]["window_not_full"] == pytest.approx(policy["buckets"][0]["mean_nll"])
        assert policy["tokens"] == n_tokens > 300
        edges = [(bucket["start"], bucket["end"]) for bucket in policy["buckets"]]
        assert edges[:5] == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 320)]
        assert edges[-1][1] == n_tokens
        total = sum(bucket["mean_nll"] * (bucket["end"] - bucket["start"]) for bucket in policy["buckets"])
        assert total / n_tokens == pytest.approx(policy["mean_nll"])
    # the same as the command without --policies
    for name, options in (("lminf", SMALL), ("full", ["--stock"])):
        alone = run_json(capfd, "ppl", "-m", "nano", "-f", text_file, "--bucket", "log", *options)
        for ours, theirs in zip(alone["buckets"], report["policies"][name]["buckets"], strict=True):
            assert ours == pytest.approx(theirs, abs=5e-3)  # micro-batches differ, and activations have 8 bits


def test_ppl_compares_a_part_with_full_attention(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    options = ["--policies", "full,lminf", "--full-tokens", "101", "--bucket", "50", "--tokens", "201"]
    report = run_json(capfd, "ppl", "-m", "nano", "-f", text_file, *options, *SMALL)["policies"]
    assert [bucket["end"] for bucket in report["full"]["buckets"]] == [50, 100]
    assert [bucket["end"] for bucket in report["lminf"]["buckets"]] == [50, 100, 150, 200]


def test_ppl_sums_up_the_stages_of_a_stream(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    options = ["--policies", "full,window,lminf", "--full-tokens", "400", "--bucket", "1", "--tokens", "1000"]
    arguments = ["ppl", "-m", "nano", "-f", text_file, "--repeat", *options, "--n-global", "4", "--n-local", "66"]
    report = run_json(capfd, *arguments)["policies"]
    for name, n_tokens in (("full", 399), ("window", 999), ("lminf", 999)):
        losses = [bucket["mean_nll"] for bucket in report[name]["buckets"]]
        assert len(losses) == n_tokens
        ranges = {"window_not_full": (0, 70), "window_full": (70, n_tokens), "past_training": (512, n_tokens)}
        expected = {stage: np.mean(losses[start:end]) for stage, (start, end) in ranges.items() if start < n_tokens}
        assert report[name]["stages"] == pytest.approx(expected)
    assert main(arguments) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines[-5:]] == [
        "window not full", "window full", "past training", "all", "perplexity",
    ]  # fmt: skip
    assert lines[-3].split()[2:] == ["-", *(f"{report[name]['stages']['past_training']:.4f}" for name in
                                            ("window", "lminf"))]  # fmt: skip


def test_ppl_repeats_a_text(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    once, thrice = tmp_path / "once.txt", tmp_path / "thrice.txt"
    once.write_text(TEXT.strip(), encoding="utf-8")
    thrice.write_text(" ".join([TEXT.strip()] * 3), encoding="utf-8")
    common = ["ppl", "-m", "nano", "--kv-type", "f32", "--bucket", "20", *SMALL]
    whole = run_json(capfd, *common, "-f", str(thrice))
    n_tokens = whole["tokens"] + 1
    repeated = run_json(capfd, *common, "-f", str(once), "--repeat", "--tokens", str(n_tokens))
    assert repeated == whole  # BOS, which is put in front, does not come again
    assert run_json(capfd, *common, "-f", str(once), "--repeat", "--tokens", "50")["tokens"] == 49


def test_ppl_measures_the_divergence_from_full_attention(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, text_file: str
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(Path(text_file).read_text(encoding="utf-8") * 5, encoding="utf-8")
    options = ["--policies", "full,window,lminf", "--kl", "2", "--bucket", "50", "--tokens", "1200", "--csv"]
    csv = tmp_path / "out.csv"
    report = run_json(capfd, "ppl", "-m", "nano", "-f", str(long), *options, str(csv), *SMALL)["policies"]
    assert "kl" not in report["full"]
    for name in ("window", "lminf"):
        divergence = report[name]["kl"]
        assert list(divergence) == ["stretches", "tokens", "mean_kl", "buckets"]
        assert (divergence["stretches"], divergence["tokens"]) == (2, 2 * 512)
        buckets = divergence["buckets"]
        assert [(bucket["start"], bucket["end"]) for bucket in buckets[:2]] == [(0, 50), (50, 100)]
        assert buckets[-1]["end"] == 512
        assert abs(buckets[0]["mean_kl"]) < 1e-3  # rounding: q8_0 weights, 8-bit activations
        assert buckets[-1]["mean_kl"] > 10 * abs(buckets[0]["mean_kl"])
    lines = csv.read_text().splitlines()
    assert lines[0] == "policy,measure,start,end,mean"
    expected = [
        f"{name},{measure},{bucket['start']},{bucket['end']},{bucket[f'mean_{measure}']}"
        for name, policy in report.items()
        for measure, buckets in (("nll", policy["buckets"]), ("kl", policy.get("kl", {}).get("buckets", [])))
        for bucket in buckets
    ]
    assert lines[1:] == expected


def test_ppl_prints_and_draws_a_comparison(capfd: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["ppl", "-m", "nano", "-f", text_file, "--policies", "full,sinks-uncapped,lminf", *SMALL]
    for name, mark in (("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml"), ("loss.pdf", b"%PDF")):
        assert main([*arguments, "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(mark)
        lines = capfd.readouterr().out.splitlines()
        assert lines[0].split() == ["nats", "per", "token", "full", "sinks-uncapped", "lminf"]
        assert re.fullmatch(r" +0 \.\. 64( +\d+\.\d{4}){3}", lines[1])
        assert re.fullmatch(r"all( +\d+\.\d{4}){3}", lines[-2])
        assert re.fullmatch(r"perplexity( +\d+\.\d{4}){3}", lines[-1])


def test_ppl_that_is_interrupted_prints_what_it_has(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_file: str
) -> None:
    whole = nll.nll_blocks

    def interrupted(*args: Any) -> Any:
        for i, block in enumerate(whole(*args)):
            if i == 2:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(nll, "nll_blocks", interrupted)
    arguments = ["ppl", "-m", "nano", "-f", text_file, "--batch", "50", "--json", "--policies", "window,lminf", *SMALL]
    assert main(arguments) == 130
    report = json.loads(capfd.readouterr().out)["policies"]
    assert list(report) == ["window"]
    assert (report["window"]["tokens"], report["window"]["buckets"][-1]["end"]) == (100, 100)


# --- passkey ----------------------------------------------------------------------------------------------------------


def test_passkey_reports_every_cell(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--n-global", "40", "--n-local", "80", "--lengths", "300,100", "--depths", "0,100", "--trials", "2"]
    report = run_json(capfd, "passkey", "-m", "nano", *options, "--policies", "all")
    names = ["task", "blind", "lengths", "depths", "trials", "window", "recall", "recall_last", "policies"]
    assert list(report) == names
    assert (report["task"], report["lengths"], report["depths"]) == ("prose", [100, 300], [0.0, 1.0])
    assert report["window"] == {"n_global": 40, "n_local": 80, "max_distance": 80}
    assert (report["recall"]["n_recall"], report["recall"]["recall_distance"]) == (32, 40)
    assert list(report["policies"]) == POLICY_NAMES
    for policy in report["policies"].values():
        assert list(policy) == ["trials", "correct", "accuracy", "cells"]
        places = [(cell["length"], cell["depth"]) for cell in policy["cells"]]
        assert places == [(100, 0.0), (100, 1.0), (300, 0.0), (300, 1.0)]
        for cell in policy["cells"]:
            assert list(cell) == [
                "length",
                "depth",
                "trials",
                "correct",
                "accuracy",
                "in_reach",
                "correct_in_reach",
            ]
            assert cell["accuracy"] == cell["correct"] / cell["trials"]
            assert cell["correct_in_reach"] <= cell["correct"]
        assert policy["trials"] == 8
        assert policy["accuracy"] == sum(cell["correct"] for cell in policy["cells"]) / 8
    assert report["policies"]["window"]["cells"][2]["in_reach"] == 0
    assert report["policies"]["lminf"]["cells"][2]["in_reach"] == 1


def test_passkey_prints_and_draws(capfd: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "keys.png"
    options = ["--n-global", "4", "--n-local", "60", "--lengths", "200", "--depths", "0,100", "--trials", "1"]
    assert main(["passkey", "-m", "nano", "-f", text_file, *options, "--plot", str(plot)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("right answers; in brackets")
    assert [line.split()[0] for line in lines if "fact told at" in line] == ["full", "lminf"]
    assert re.fullmatch(r" +200 +\(\d+%\) +\d+% ", lines[-3])  # the first key is out of reach
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_passkey_with_the_published_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "200", "--depths", "50", "--trials", "1", "--policies", "lminf"]
    for name in ("--task", "--template"):  # the old name
        assert run_json(capfd, "passkey", "-m", "nano", name, "paper", *options)["task"] == "paper"


def test_passkey_spares_full_attention_long_prompts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--n-local", "60", "--lengths", "100,200", "--depths", "100", "--trials", "1", "--full-tokens", "150"]
    plot = ["--plot", str(tmp_path / "keys.png")]
    policies = run_json(capfd, "passkey", "-m", "nano", *options, *plot)["policies"]
    lengths = {name: [cell["length"] for cell in policy["cells"]] for name, policy in policies.items()}
    assert lengths == {"full": [100], "lminf": [100, 200]}
    assert main(["passkey", "-m", "nano", *options]) == 0
    assert capfd.readouterr().out.count(" 200 ") == 1
    options[-1] = "50"
    assert list(run_json(capfd, "passkey", "-m", "nano", *options)["policies"]) == ["lminf"]


def test_passkey_in_the_dark(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--lengths", "300", "--depths", "50", "--trials", "3", "--policies", "full", "--task", "prose"]
    seen, blind = (run_json(capfd, "passkey", "-m", "nano", *options, *more) for more in ([], ["--blind"]))
    assert (seen["blind"], seen["policies"]["full"]["correct"]) == (False, 3)
    assert (blind["blind"], blind["policies"]["full"]["correct"]) == (True, 0)


def test_a_perplexity_beyond_numbers_is_infinite() -> None:
    one = {"buckets": [], "tokens": 3, "mean_nll": 1e37}  # of a token that Chameleon masks
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        curves.print_one(one)
    assert printed.getvalue().endswith("perplexity inf\n")


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_prints_what_it_reports(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "-m", "nano", "-p", "The sea was", "-n", "40", "--seed", "7", "--ignore-eos"]
    report = run_json(capfd, *arguments, "--n-global", "4", "--n-local", "16")
    assert report["finish_reason"] == "length"
    assert report["tokens"] == 40
    assert report["stream"]["position"] == report["prompt_tokens"] + 39  # the last one is not processed any more
    assert report["stream"]["sink_cells"] == 4
    assert report["stream"]["evicted"] > 0

    assert main([*arguments, "--n-global", "4", "--n-local", "16"]) == 0
    output = capfd.readouterr()
    assert output.out == report["text"] + "\n"
    assert "generated 40 tokens" in output.err


@pytest.mark.parametrize("attention", [[], ["--stock"]])
def test_generate_ignores_every_token_that_ends_a_text(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, nano_path: str, attention: list[str]
) -> None:
    """Files name several: the end of a turn, of a text, of a message."""
    with contextlib.closing(Llama(nano_path, lminf=True, verbose=False)) as llm:
        stream = llm.generate(llm.tokenize(b"The sea was"), temp=0.0)
        drawn = [next(stream) for _ in range(10)][-1]
        stream.close()
    path = str(tmp_path / "ends.gguf")
    copy_with(nano_path, path, {"tokenizer.ggml.eot_token_id": drawn})
    arguments = ["-m", path, "-p", "The sea was", "-n", "40", "--temp", "0", *attention]
    assert run_json(capfd, "generate", *arguments)["tokens"] < 10
    report = run_json(capfd, "generate", *arguments, "--ignore-eos")
    assert (report["finish_reason"], report["tokens"]) == ("length", 40)


def test_a_prompt_too_long_for_full_attention(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The sea was calm. " * 400)
    arguments = ["generate", "-m", "nano", "-f", str(prompt), "-n", "2"]
    assert main([*arguments, "--stock"]) == 1
    _assert_one_sentence(capfd, "leave --stock out.")
    assert main(arguments) == 0


def test_generate_with_full_attention_is_llama_cpp(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", "nano", "-p", "The sea was", "-n", "30", "--temp", "0"]
    report = run_json(capfd, "generate", *arguments, "--stock")
    assert report["stream"] is None
    # within the window the Λ cache changes nothing
    assert run_json(capfd, "generate", *arguments)["text"] == report["text"]


def test_generate_reads_a_prompt_of_any_length(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    report = run_json(capfd, "generate", "-m", "nano", "-f", text_file, "-n", "1", "--n-global", "4", "--n-local", "60")
    assert report["prompt_tokens"] > 300
    assert report["stream"]["position"] == report["prompt_tokens"]


# --- info and doctor --------------------------------------------------------------------------------------------------


def test_info_knows_what_the_cache_will_take(capfd: pytest.CaptureFixture[str]) -> None:
    report = run_json(capfd, "info", "-m", "nano", "--n-global", "4", "--n-local", "100", "--kv-type", "q8_0")
    assert report["supported"] is True
    assert report["refusal"] is None
    assert report["architecture"] == "llama"
    assert report["n_ctx_train"] == 512
    assert report["kv_bytes_per_token"]["f16"] == 2 * 6 * 2 * 64 * 2  # K and V, layers, heads, head size, bytes
    generated = run_json(
        capfd,
        "generate",
        "-m",
        "nano",
        "-p",
        "x",
        "-n",
        "1",
        "--n-global",
        "4",
        "--n-local",
        "100",
        "--kv-type",
        "q8_0",
    )
    assert report["window"]["kv_bytes"] == generated["stream"]["kv_bytes"]
    # the recommendation can be pasted
    assert run_json(capfd, "info", "-m", "nano", *report["recommended"].split())["supported"]


@pytest.mark.parametrize(("arch", "reason"), UNSUPPORTED)
def test_info_says_why_a_model_is_not_supported(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arch: str, reason: str
) -> None:
    report = run_json(capfd, "info", "-m", str(models.write(arch, tmp_path)), status=1)
    assert report["supported"] is False
    assert f"'{arch}'" in report["refusal"]
    assert reason in report["refusal"]
    figures = ("attention", "recommended", "window", "kv_bytes_per_token", "stock_kv_bytes")
    assert [report[name] for name in figures] == [None] * 5
    assert main(["info", "-m", report["model"], "--n-local", "5000"]) == 1  # nor a warning of a window it cannot have
    output = capfd.readouterr()
    assert output.err == ""
    assert [line.split()[0] for line in output.out.splitlines()] == ["model", "architecture", "supported"]


def test_info_and_doctor_say_what_computes_the_attention(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_json(capfd, "info", "-m", "nano")["attention"] == "fused"
    assert run_json(capfd, "info", "-m", "nano", "--attention", "stock")["attention"] == "stock"
    assert run_json(capfd, "info", "-m", "nano", "--kv-type", "q5_0")["attention"] == "stock"  # not a type it takes
    assert "fused attention" in run_json(capfd, "doctor")["checks"][-1]["found"]


def test_info_of_an_architecture_nobody_knows(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    tiny_models.write_gguf(path, "nosuch", {"context_length": 64}, {"x": np.zeros((32, 32), dtype=np.float32)})
    report = run_json(capfd, "info", "-m", str(path), status=1)
    assert "unknown model architecture: 'nosuch'" in report["refusal"]


def test_doctor_finds_nothing_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    report = run_json(capfd, "doctor")
    assert report["ok"] is True
    names = [check["name"] for check in report["checks"]]
    assert names == [
        *("machine", "lminf-edge", "llama-cpp-python", "library", "chat library", "CPU variant", "backends"),
        "first run",
    ]


def test_doctor_works_without_a_library(tmp_path: Path) -> None:
    environment = os.environ | {"LMINF_LIB_PATH": str(tmp_path)}
    result = subprocess.run([ENTRY, "doctor", "--json"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["ok"] is False
    assert report["checks"][-1]["name"] == "library"
    assert "reinstall" in report["checks"][-1]["advice"]
    assert result.stderr == ""


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_reports_both_readers(capfd: pytest.CaptureFixture[str]) -> None:
    report = run_json(capfd, "demo", "--stock-tokens", "1024", "--tokens", "2048")
    edges = [(bucket["start"], bucket["end"]) for bucket in report["buckets"]]
    assert edges == [(0, 512), (512, 1024), (1024, 2048)]
    within, beyond, alone = report["buckets"]
    assert within["stock"]["mean_nll"] == pytest.approx(within["lminf"]["mean_nll"], abs=0.01)
    assert beyond["stock"]["kv_bytes"] == 1024 * 3072
    assert alone["stock"] is None
    assert beyond["lminf"]["kv_bytes"] == alone["lminf"]["kv_bytes"]
    assert report["summary"]


def test_demo_stops_full_attention_within_a_block(capfd: pytest.CaptureFixture[str]) -> None:
    """A bucket counts its own tokens, wherever it begins and ends."""
    report = run_json(capfd, "demo", "--stock-tokens", "800", "--tokens", "2048")
    whole = run_json(capfd, "demo", "--stock-tokens", "1024", "--tokens", "2048")
    sums = [
        sum(bucket["lminf"]["mean_nll"] * (bucket["end"] - bucket["start"]) for bucket in each["buckets"])
        for each in (report, whole)
    ]
    assert [bucket["end"] for bucket in report["buckets"]] == [512, 800, 1024, 2048]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    past, _, alone = report["buckets"][1:]
    assert past["lminf"]["mean_nll"] == pytest.approx(alone["lminf"]["mean_nll"], abs=1)


def test_demo_needs_a_training_length(nano_path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "untold.gguf"
    copy_with(nano_path, path, {"llama.context_length": 0})
    assert main(["demo", "-m", str(path)]) == 1
    assert capfd.readouterr().err == (
        f"error: {path} does not say what length the model was trained on, which demo goes past: try ppl.\n"
    )


def test_demo_with_recall(capfd: pytest.CaptureFixture[str]) -> None:
    report = run_json(capfd, "demo", "--stock-tokens", "1024", "--tokens", "3000", "--recall", "4")
    kv_bytes = [bucket["lminf"]["kv_bytes"] for bucket in report["buckets"]]
    assert kv_bytes[0] < kv_bytes[-1]  # an archive grows
    assert "Of what has left the window, each layer recalls the 4 tokens it looks for most." in report["summary"]
    assert "grows until its archive is full" in " ".join(report["summary"])


def test_demo_on_a_terminal_and_elsewhere(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(python_documentation()[:6000], encoding="utf-8")
    command = [ENTRY, "demo", "--file", str(text)]
    plain = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", plain)  # nothing but line ends
    assert "positions" in plain

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end was closed
                break
            if not block:
                break
            shown += block
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[2F" in shown  # two lines, redrawn
    assert b"positions" in shown


def figures(mean_nll: float, kv_bytes: int = 1024) -> Tally:
    return Tally(mean_nll, 100.0, kv_bytes)


@pytest.mark.parametrize(
    ("stock", "ours", "expected"),
    [
        (6.0, 5.0, "full attention's perplexity is 2.7 times that of the Λ cache"),
        (5.0, 5.1, "the Λ cache's perplexity is 1.11 times that of full attention"),
        (5.0, 5.01, "the two predict equally well"),
    ],
)
def test_demo_says_what_the_numbers_say(stock: float, ours: float, expected: str) -> None:
    buckets = [
        Row(0, 512, figures(5.0), figures(5.0)),
        Row(512, 1024, figures(stock, 4096), figures(ours, 2048)),
    ]
    sentences = " ".join(summarize(buckets, 512))
    assert expected in sentences
    assert "4.0 KiB" in sentences
    assert "went on" not in sentences
    assert "went on to token 2048" in " ".join(summarize([*buckets, Row(1024, 2048, None, figures(5.0))], 512))


def test_demo_claims_nothing_within_the_training_length() -> None:
    (sentence,) = summarize([Row(0, 300, figures(5.0), figures(5.0))], 512)
    assert "give a longer one" in sentence


def test_demo_says_where_full_attention_stopped_too_early() -> None:
    buckets = [Row(0, 300, figures(5.0), figures(5.0)), Row(300, 1024, None, figures(5.0))]
    first, *_ = summarize(buckets, 512)
    assert first.startswith("Full attention stopped within the 512 tokens")
    assert "--stock-tokens" in first


def test_buckets_meet_and_double() -> None:
    assert list(bucket_edges(512, 1000, 3000)) == [(0, 512), (512, 1000), (1000, 1024), (1024, 2048), (2048, 3000)]
    assert list(bucket_edges(128, 256, 256)) == [(0, 256)]


def test_sparkline_goes_from_lowest_to_highest() -> None:
    losses = [256.0 * value for value in range(1, 9)]
    assert sparkline(losses, [float(value) for value in range(1, 9)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(losses, [1.0, 8.0], 7) == ""


def test_documentation_is_prose() -> None:
    text = python_documentation()
    assert len(text) > 100_000
    assert "::=" not in text


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 150 * 1024, 5 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "150 KiB",
        "5.0 GiB",
        "5120 GiB",
    ]


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path: Path, nano_path: str) -> Path:
    """A folder of files that are not what they should be."""
    nano = Path(nano_path).read_bytes()
    (tmp_path / "half.gguf").write_bytes(nano[: len(nano) // 2])
    (tmp_path / "head.gguf").write_bytes(nano[:500])
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_bytes(b"This is no model.")
    tiny_models.write_gguf(tmp_path / "vocabulary.gguf", "llama", {"context_length": 64}, {})
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    (tmp_path / "binary.txt").write_bytes(nano[:1000])
    (tmp_path / "blank.txt").write_bytes(b" \n ")
    (tmp_path / "utf16.txt").write_text(TEXT, encoding="utf-16")
    (tmp_path / "latin1.txt").write_text("caf\xe9", encoding="latin-1")
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    shape = tiny_models.MODELS["llama"]
    no_bos = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    weights = tiny_models.weights(shape, np.random.default_rng(0))
    tiny_models.write_gguf(tmp_path / "nobos.gguf", "llama", tiny_models.metadata(shape) | no_bos, weights)
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")
    return tmp_path


PPL = ["ppl", "-m", "nano", "-f", "good.txt"]

USAGE = {
    "no command": ([], "COMMAND"),
    "unknown command": (["chat-with-me"], "invalid choice"),
    "no model": (["ppl", "-f", "good.txt"], "-m/--model"),
    "no text": (["ppl", "-m", "nano"], "-f/--file"),
    "unknown option": ([*PPL, "--frobnicate"], "--frobnicate"),
    "negative global": ([*PPL, "--n-global", "-1"], "must be 0 or more, not -1"),
    "no window": ([*PPL, "--n-local", "0"], "must be 1 or more, not 0"),
    "window in words": ([*PPL, "--n-local", "many"], "must be a whole number, not 'many'"),
    "no distance": ([*PPL, "--max-distance", "0"], "must be 1 or more"),
    "unknown type": ([*PPL, "--kv-type", "q3"], "q4_0"),
    "no batch": ([*PPL, "--batch", "0"], "must be 1 or more"),
    "huge batch": ([*PPL, "--batch", "100000000"], "or less"),
    "one token": ([*PPL, "--tokens", "1"], "must be 2 or more"),
    "no prompt": (["generate", "-m", "nano"], "-p/--prompt"),
    "two prompts": (["generate", "-m", "nano", "-p", "a", "-f", "good.txt"], "not allowed with"),
    "negative tokens": (["generate", "-m", "nano", "-p", "a", "-n", "-2"], "must be -1 or more"),
    "negative temperature": (["generate", "-m", "nano", "-p", "a", "--temp", "-0.5"], "must be 0 or more"),
    "no temperature": (["generate", "-m", "nano", "-p", "a", "--temp", "nan"], "must be 0 or more"),
    "large probability": (["generate", "-m", "nano", "-p", "a", "--top-p", "2"], "must be 1 or less"),
    "no such policy": ([*PPL, "--policies", "full,streaming"], "there is no policy 'streaming'"),
    "no policy": ([*PPL, "--policies", ""], "there is no policy ''"),
    "buckets in words": ([*PPL, "--bucket", "some"], "must be a whole number, not 'some'"),
    "no such task": (["passkey", "-m", "nano", "--task", "mine"], "invalid choice: 'mine'"),
    "too deep": (["passkey", "-m", "nano", "--depths", "0,101"], "must be 100 or less"),
    "no trial": (["passkey", "-m", "nano", "--trials", "0"], "must be 1 or more"),
    "doctor takes no model": (["doctor", "-m", "nano"], "unrecognized arguments"),
}

FAILURES = {
    "no such model": (["ppl", "-m", "nosuch", "-f", "good.txt"], "does not exist: nosuch"),
    "no such model, info": (["info", "-m", "nosuch"], "does not exist: nosuch"),
    "a folder": (["info", "-m", "."], "is not a file"),
    "half a model": (["ppl", "-m", "half.gguf", "-f", "good.txt"], "half.gguf is cut short or damaged"),
    "half a model, stock": (
        ["ppl", "-m", "half.gguf", "-f", "good.txt", "--stock"],
        "half.gguf is cut short or damaged",
    ),
    "half a model, info": (["info", "-m", "half.gguf"], "half.gguf is cut short or damaged"),
    "half a head": (["info", "-m", "head.gguf"], "cut short"),
    "an empty model": (["generate", "-m", "empty.gguf", "-p", "a"], "is not a GGUF model"),
    "a text as model": (["generate", "-m", "text.gguf", "-p", "a"], "is not a GGUF model"),
    "a vocabulary": (["generate", "-m", "vocabulary.gguf", "-p", "a"], "without weights"),
    "a vocabulary, stock": (["generate", "-m", "vocabulary.gguf", "-p", "a", "--stock"], "without weights"),
    "a vocabulary, info": (["info", "-m", "vocabulary.gguf"], "without weights"),
    "no such text": (["ppl", "-m", "nano", "-f", "nosuch.txt"], "does not exist"),
    "a folder as text": (["ppl", "-m", "nano", "-f", "."], "is not a file"),
    "an empty text": (["ppl", "-m", "nano", "-f", "empty.txt"], "is empty"),
    "an empty prompt file": (["generate", "-m", "nano", "-f", "empty.txt"], "is empty"),
    "zero bytes": (["ppl", "-m", "nano", "-f", "zero.txt"], "zero bytes"),
    "a binary file": (["demo", "-f", "binary.txt"], "not a UTF-8 text but binary data"),
    "a text in UTF-16": (["ppl", "-m", "nano", "-f", "utf16.txt"], "UTF-16: convert it"),
    "a text in Latin 1": (["ppl", "-m", "nano", "-f", "latin1.txt"], "byte 3 is 0xe9"),
    "binary prose": (["passkey", "-m", "nano", "-f", "binary.txt"], "not a UTF-8 text but binary data"),
    "a text within the window": ([*PPL, "--policies", "all"], "policies differ only once the window of 512 is full"),
    "too many stretches": ([*PPL, *SMALL, "--policies", "lminf", "--kl", "9"], "--kl 9 needs 4600 tokens"),
    "over and over": ([*PPL, "--repeat"], "--repeat needs --tokens"),
    "prose without words": (["passkey", "-m", "nano", "-f", "blank.txt"], "has no words in it"),
    "stock is a policy": ([*PPL, "--stock", "--policies", "all"], "give only one of --stock and --policies"),
    "divergence of nothing": ([*PPL, "--kl", "2"], "--kl needs --policies"),
    "a part of nothing": ([*PPL, "--full-tokens", "20"], "--full-tokens needs --policies"),
    "a picture of another kind": ([*PPL, "--plot", "loss.gif"], "ends in .png, .svg, .pdf"),
    "a folder as picture": (["passkey", "-m", "nano", "--plot", "."], "is a folder"),
    "no folder for a table": ([*PPL, "--csv", "nosuch/loss.csv"], "there is no folder nosuch"),
    "too short a prompt": (["passkey", "-m", "nano", "--lengths", "9"], "without filler it has"),
    "too small a window to shift": (
        [*PPL, "--policies", "shift", "--n-global", "2", "--n-local", "4"],
        "too small for context shift",
    ),
    "sinks fill the window": ([*PPL, "--n-global", "600"], "no room"),
    "too long a window": ([*PPL, "--n-local", "10000000000"], "or less"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bad: Path, name: str
) -> None:
    arguments, expected = USAGE[name]
    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    _assert_one_sentence(capfd, expected)


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_one_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bad: Path, name: str
) -> None:
    arguments, expected = FAILURES[name]
    monkeypatch.chdir(bad)
    assert main(arguments) == 1
    _assert_one_sentence(capfd, expected)


@pytest.mark.parametrize("fault", [ValueError("v"), TypeError("t"), KeyError("k"), RuntimeError("r"), OSError("o")])
def test_a_fault_of_ours_is_called_one(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(_: Any) -> int:
        raise fault

    monkeypatch.setattr(cli_info, "run", fail)
    monkeypatch.setenv("LMINF_DEBUG", "0")
    assert main(["info", "-m", "nano"]) == 1
    _assert_one_sentence(capfd, f"This is a bug in lminf-edge ({type(fault).__name__}: {fault})")
    for arguments in (["--debug", "info", "-m", "nano"], ["info", "-m", "nano", "--debug"]):
        monkeypatch.setenv("LMINF_DEBUG", "0")
        assert main(arguments) == 1
        assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (UserError("Do it otherwise."), "Do it otherwise."),
        (MemoryError("Too much."), "Too much."),
        (MemoryError(), "There is not enough memory."),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError("A plot needs matplotlib."), "A plot needs matplotlib."),
    ],
)
def test_what_the_user_can_mend_is_no_bug(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: Exception, sentence: str
) -> None:
    def fail(_: Any) -> int:
        raise fault

    monkeypatch.setattr(cli_info, "run", fail)
    assert main(["info", "-m", "nano"]) == 1
    assert capfd.readouterr().err == f"error: {sentence}\n"


def _assert_one_sentence(capfd: pytest.CaptureFixture[str], expected: str) -> None:
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_text_of_one_token_is_too_short(capfd: pytest.CaptureFixture[str], bad: Path) -> None:
    model = str(bad / "nobos.gguf")
    assert main(["ppl", "-m", model, "-f", str(bad / "one.txt")]) == 1
    _assert_one_sentence(capfd, "it has 1 token")


@pytest.mark.parametrize(("arch", "reason"), UNSUPPORTED)
def test_an_unsupported_model_is_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arch: str, reason: str
) -> None:
    model = str(models.write(arch, tmp_path))
    assert main(["generate", "-m", model, "-p", "a"]) == 1
    _assert_one_sentence(capfd, reason)
    # before anything is asked of a text
    for options in ([], ["--policies", "lminf"], ["--policies", "full,window"]):
        assert main(["ppl", "-m", model, "-f", "missing.txt", *options]) == 1
        _assert_one_sentence(capfd, reason)
    assert main(["passkey", "-m", model, "-f", "missing.txt", "--task", "prose"]) == 1
    _assert_one_sentence(capfd, reason)


# what llama.cpp would abort on, or pass over in silence
@pytest.mark.parametrize(
    ("arch", "policy", "reason"),
    [
        ("qwen2vl", "shift", "llama.cpp cannot shift the cache"),
        ("jamba", "shift", "llama.cpp cannot shift the cache"),
        ("gpt2", "full", "learned absolute positions, and there are 128 of them"),
        ("bert", "full", "attention is not causal"),
        ("gpt2", "lminf", "'gpt2'"),
        ("maincoder", "sinks", "between RoPE and attention"),
    ],
)
def test_a_policy_that_a_model_cannot_run_is_refused_before_anything_is_measured(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, arch: str, policy: str, reason: str
) -> None:
    model = str(models.write(arch, tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh ijkl mnop. " * 20, encoding="utf-8")
    capfd.readouterr()
    assert main(["ppl", "-m", model, "-f", str(text), "--policies", policy, *SMALL]) == 1
    _assert_one_sentence(capfd, f"The policy {policy} cannot run: ")
    assert main(["passkey", "-m", model, "--policies", policy, "--lengths", "400", *SMALL]) == 1
    _assert_one_sentence(capfd, reason)
    if policy == "full":
        assert main(["ppl", "-m", model, "-f", str(text), "--stock"]) == 1
        _assert_one_sentence(capfd, reason)


def test_full_attention_beyond_memory_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nano_path: str, text_file: str
) -> None:
    with Weightless(nano_path) as model:
        enough = model.stock_bytes(250, KV_TYPE_NUMBERS["f16"])
    monkeypatch.setattr("lminf_edge.cli.policies.physical_memory", lambda: enough)
    arguments = ["ppl", "-m", "nano", "-f", text_file, "--policies", "all", "--tokens", "400", *SMALL]
    assert main(arguments) == 1
    _assert_one_sentence(capfd, "The policy full cannot run: its cache for 398 tokens would take")
    assert list(run_json(capfd, *arguments, "--full-tokens", "250")["policies"]) == POLICY_NAMES


def test_a_plot_without_matplotlib(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_file: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["ppl", "-m", "nano", "-f", text_file, "--plot", "loss.png"]) == 1
    _assert_one_sentence(capfd, "pip install 'lminf-edge[plot]'")


def test_divergence_needs_a_window_below_the_training_length(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 10, encoding="utf-8")
    assert main(["ppl", "-m", "nano", "-f", str(text), "--policies", "lminf", "--kl", "1"]) == 1
    _assert_one_sentence(capfd, "smaller than the training length of 512")


def test_a_window_beyond_training_is_warned_of(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    assert main(["ppl", "-m", "nano", "-f", text_file, "--n-local", "1000"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "512" in line
    assert "smaller --n-local" in line
    for command in (["info"], ["generate", "-p", "a", "-n", "1"], ["chat", "-p", "a", "-n", "1"]):
        assert main([*command, "-m", "nano", "--n-local", "1000"]) == 0
        (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning"))
        assert "smaller --n-local" in line
        assert "n_ctx" not in line


def test_errors_name_options(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    for command in (["info"], ["generate", "-p", "a"], ["ppl", "-f", text_file], ["passkey"], ["serve", "--port", "0"]):
        assert main([*command, "-m", "nano", "--n-global", "600"]) == 1
        _assert_one_sentence(capfd, "--n-global=600: give a larger --n-local or a smaller --n-global")


def test_only_parameters_become_options() -> None:
    with pytest.raises(UserError) as raised, options_named():
        raise UserError("/tmp/n_ctx/n_local.gguf: my_n_ctx, n_ctx=5, a smaller n_ctx or n_local (n_batch).")
    assert str(raised.value) == "/tmp/n_ctx/n_local.gguf: my_n_ctx, --n-local=5, a smaller --n-local (--batch)."


def test_a_window_beyond_memory_is_refused(capfd: pytest.CaptureFixture[str], text_file: str) -> None:
    assert main(["ppl", "-m", "nano", "-f", text_file, "--n-local", "1000000000"]) == 1
    assert "bytes of memory: give a smaller --n-local." in capfd.readouterr().err


def test_a_model_that_is_no_path(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("llama3.2", "Qwen/Qwen3-0.6B-GGUF", "nan"):
        assert main(["generate", "-m", name, "-p", "a"]) == 1
        _assert_one_sentence(capfd, "give the path of a GGUF file, many of which are on Hugging Face, or the name of")


def test_file_options_know_the_home_folder(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nano_path: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "m.gguf").symlink_to(nano_path)
    model = ["-m", "~/m.gguf"]
    run_json(capfd, "ppl", *model, "--file=~/text.txt", "--policies", "lminf", "--csv=~/out.csv", *SMALL)
    assert (tmp_path / "out.csv").exists()
    assert run_json(capfd, "generate", *model, "--file=~/text.txt", "-n", "1")["prompt_tokens"] > 20
    assert run_json(capfd, "chat", *model, "--file=~/text.txt", "-p", "a", "-n", "1")["prompt_tokens"] > 20
    options = ["--folder=~/kept", "--api-key-file=~/key", "--port", "0"]
    args = build_parser().parse_args(["serve", *model, *options])
    assert (args.folder, args.api_key_file) == (tmp_path / "kept", tmp_path / "key")
    args = build_parser().parse_args(["passkey", *model, "--plot=~/x.png", "-f", "~/text.txt"])
    assert (args.plot, args.file) == (tmp_path / "x.png", str(tmp_path / "text.txt"))
    args = build_parser().parse_args(["bench", *model, "--models=~/models", "--stock-lib=~/lib"])
    assert (args.models, args.stock_lib) == (tmp_path / "models", tmp_path / "lib")


def test_progress_is_of_all_that_is_left(text_file: str) -> None:
    command = [str(ENTRY), "ppl", "-m", "nano", "-f", text_file, "--policies", "window,lminf", *SMALL]
    options = ["--repeat", "--tokens", "3001", "--batch", "64", "--threads", "1", "--json"]
    ours, theirs = pty.openpty()
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
    shown = b""
    with contextlib.suppress(OSError):
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    assert report["policies"]["lminf"]["tokens"] == 3000
    updates = re.findall(r"\x1b\[K(\w+) +\[#* *\] (\d+) of (\d+) tokens, \d+/s, \d+:\d\d left", shown.decode())
    done = [int(n) for _, n, _ in updates]
    assert {total for _, _, total in updates} == {"6000"}
    assert done == sorted(done)
    assert done[-1] == 6000
    assert [name for name, _, _ in updates][-1] == "lminf"


# --- the installed command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "ppl", "passkey", "info", "doctor", "demo"])
def test_every_command_has_help(capfd: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--json" in capfd.readouterr().out


def test_the_installed_command_knows_its_version() -> None:
    result = subprocess.run([ENTRY, "--version"], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"lminf-edge \d+\.\d+\.\d+\n", result.stdout)


def endless() -> subprocess.Popen[bytes]:
    command = [ENTRY, "generate", "-m", "nano", "-p", "The", "-n", "-1", "--ignore-eos", "--n-local", "64"]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests started in the background inherit deaf ears

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)


def test_control_c_ends_an_endless_generation_cleanly() -> None:
    with endless() as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(2000)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.startswith(b"[prompt ")
    assert len(errors.splitlines()) == 1


def test_a_closed_pipe_ends_it_quietly() -> None:
    with endless() as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(2000)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode == 1
    assert errors == b""
