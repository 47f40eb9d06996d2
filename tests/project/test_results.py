"""The evidence: measured on a few thousand tokens, the page made of it, and the statistics behind its sentences."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_script import BENCHMARKS, run_benchmark
from repository import ROOT

from lminf_edge import LMInfConfig
from lminf_edge.cli import main
from lminf_edge.cli.demo import python_documentation
from lminf_edge.evaluate.policies import POLICIES, WITHOUT_RECALL
from lminf_edge.models import find_model

sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other

import evidence
import measured
import pages
import report
import results
import server_report
from quantize import quantize, tensor_types
from trend import mean_difference, proportion, slope

Record = dict[str, Any]

EXPERIMENTS = {
    "kl-f16",
    "kl-f32",
    "longest-nano",
    "loss-nano-f16",
    "loss-nano-q8_0",
    "passkey",
    "passkey-sinks",
    "recall-loss-nano-256",
    "recall-nano-prose-256",
    "recall-nano-prose-256-long",
    "ring-nano-256",
    "stream",
    "sweep-distance",
    "sweep-global",
    "sweep-kv",
    "sweep-local",
    "sweep-weights",
    "tail-nano-256",
    "tail-nano-512",
}
N_TEXT = 6144  # tokens of it that are read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `results` with the figures of every experiment, and text.txt, which they were measured on."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "text.txt").write_text(python_documentation(), encoding="utf-8")
    f16 = folder / "nano-f16.gguf"
    quantize(Path(find_model("nano")), f16, "F16", 1, again=True)
    options = ["--tiny", "--threads", 1, "--text", folder / "text.txt", "--f16", f16, "--weights", folder / "weights"]
    run_benchmark("evidence.py", *options, "--out", folder / "results")
    return folder


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, Record]:
    return measured.load_records(folder / "results")


@pytest.fixture(scope="module")
def real(folder: Path) -> Path:
    """A folder with the figures of what is measured of real models, here of nano, which passes for one."""
    texts = {"text": python_documentation()}
    subject = evidence.subject_of("nano", texts, N_TEXT, 1)
    facts = {**subject.facts, "name": "real", "n_params": measured.REAL}
    subject = evidence.dataclasses.replace(subject, name="real", facts=facts)
    out = folder / "real"
    out.mkdir()
    for experiment in evidence.real_experiments("nano", "real", evidence.TINY, (128, 256), 1):
        evidence.perform(experiment, subject, texts, out, False)
    return out


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_for_each_experiment(folder: Path, records: dict[str, Record]) -> None:
    # another embedded model has its own losses by position, and may be the smallest
    assert {name for name in records if "alibi" not in name} | {"longest-nano"} == EXPERIMENTS
    assert {path.stem for path in (folder / "results").glob("*.json")} == set(records)
    for name, record in records.items():
        assert record["experiment"] == name
        assert record["complete"] is True
        assert record["seconds"] > 0
        assert set(record["model"]) == {
            "name", "architecture", "n_params", "n_bytes", "weights", "n_ctx_train", "sha256"
        }  # fmt: skip
        assert {"date", "cpu", "commit", "upstream"} <= set(record["machine"])
        assert set(record["texts"]) == {"text"}
        assert record["texts"]["text"]["n_tokens"] == N_TEXT
        assert record["settings"]
        program = ".venv/bin/python benchmarks/evidence.py" if name.startswith("tail") else "lminf-edge"
        asks = "passkey" in name or "prose" in name
        verb = "--text text.txt" if name.startswith("tail") else f"{'passkey' if asks else 'ppl'} -m"
        assert record["command"].startswith(f"{program} {verb} ")
        assert str(folder) not in json.dumps(record)


def test_what_was_measured_is_not_measured_again(folder: Path) -> None:
    out = folder / "results"
    before = {path.name: path.read_bytes() for path in out.glob("*.json")}
    said = run_benchmark(
        "evidence.py", "--tiny", "--threads", 1, "--text", folder / "text.txt", "--only", "sweep-g", "--only", "kl",
        "--out", out,
    )  # fmt: skip
    assert said.count("measured before") == 3
    assert {path.name: path.read_bytes() for path in out.glob("*.json")} == before


def test_the_command_gives_the_same_figures(
    folder: Path, records: dict[str, Record], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    record = records["loss-nano-f16"]
    assert main([*shlex.split(record["command"])[1:], "--threads", "1"]) == 0
    policies = json.loads(capfd.readouterr().out)["policies"]
    assert set(policies) == set(record["policies"]) == set(WITHOUT_RECALL)
    for name, said in policies.items():
        figures = record["policies"][name]["texts"]["text"]
        assert said["tokens"] == figures["tokens"]
        # with several threads, or none to spare, sums come out in another order
        assert said["mean_nll"] == pytest.approx(figures["mean_nll"], abs=1e-3)
        assert [bucket["end"] for bucket in said["buckets"]] == figures["edges"][1:]


def test_loss_by_position(records: dict[str, Record]) -> None:
    for record in measured.loss_records(records):
        size, block = record["settings"]["tokens"], record["settings"]["block"]
        for policy in WITHOUT_RECALL:
            figures = record["policies"][policy]["texts"]["text"]
            assert figures["tokens"] == figures["edges"][-1] == size
            assert len(figures["block_nll"]) == size // block
            assert np.mean(figures["block_nll"]) == pytest.approx(figures["mean_nll"], abs=1e-4)
        far, fresh = (
            measured.blocks(record, "lminf", record["settings"]["start"], size),
            measured.fresh_blocks(record, "lminf", size),
        )
        assert len(far) == len(fresh) == (size - record["settings"]["start"]) // block
        # the same tokens with as much in view: their losses go together, and are the same on average
        assert np.corrcoef(far, fresh)[0, 1] > 0.95
        assert abs(far.mean() / fresh.mean() - 1) < 0.03  # 0.0003 was measured for nano


def test_a_long_stream_reads_the_same_text_again(records: dict[str, Record]) -> None:
    record = records["stream"]
    n = len(record["fresh_nll"])
    assert n * record["block"] == record["text_tokens"]
    assert record["tokens"] == record["settings"]["tokens"] > 2 * record["text_tokens"]
    losses = np.array(record["block_nll"])
    assert len(losses) == record["tokens"] // record["block"]
    # past the first time round what is in view is the same, so are the losses
    np.testing.assert_allclose(losses[n + 1 : 2 * n], losses[2 * n + 1 : 3 * n], atol=1e-3)
    position, difference, place = measured.paired(record)
    assert position[0] >= record["settings"]["start"]
    assert list(place) == [int(at // record["block"]) % n for at in position]
    assert np.abs(difference).mean() < 0.1
    estimate = measured.drift(record)
    assert estimate is not None
    assert estimate.n == n
    assert record["kv_bytes"] > 0
    assert record["max_graph_position"] < 10_000


def test_divergence_is_zero_until_the_window_is_full(records: dict[str, Record]) -> None:
    for policy in records["kl-f32"]["policies"].values():
        assert policy["largest_before_full"] < 1e-8  # 1e-11 was measured
        assert policy["mean_kl"] > 1e-6


def test_sweeps(records: dict[str, Record]) -> None:
    values = {
        "sweep-global": ("n_global", [0, 1, 4, 10, 32, 100]),
        "sweep-kv": ("kv_type", ["f32", "f16", "q8_0", "q4_0"]),
        "sweep-weights": ("weights", ["F16", "Q8_0", "Q4_K_M", "Q4_0"]),
    }
    for name, (key, expected) in values.items():
        assert [variant[key] for variant in records[name]["variants"]] == expected
    lengths = [variant["n_local"] for variant in records["sweep-local"]["variants"]]
    assert (lengths[0], lengths[-1]) == (64, 512)
    for variant in records["sweep-distance"]["variants"]:
        assert variant["max_distance"] / variant["n_local"] in (0.5, 1, 2)
    files = [variant["file_bytes"] for variant in records["sweep-weights"]["variants"]]
    assert files == sorted(files, reverse=True)
    sizes = [variant["kv_bytes"] for variant in records["sweep-kv"]["variants"]]
    assert sizes == sorted(sizes, reverse=True)


def test_what_recall_finds(records: dict[str, Record]) -> None:
    record, long = measured.recall_records(records)
    assert set(record["policies"]) == {"ceiling", "lminf", "recall"}
    assert measured.found_of(record, "ceiling") == (2, 2)
    right, asked = measured.found_of(record, "recall", 1024)
    assert asked == measured.found_of(record, "lminf", 1024)[1] == 2
    assert right > measured.found_of(record, "lminf", 1024)[0]
    assert long["settings"]["n_recalling"] == 128
    assert long["command"].endswith(" --recall-last 128")
    assert measured.found_of(long, "recall", 4096)[1] == 2
    [losses] = measured.recall_losses(records)
    assert list(losses["ways"]) == ["0", "8", "32", "64", "256"]
    plain = measured.recall_blocks(losses, "0")
    assert len(plain) == (2048 - 1024) // losses["settings"]["block"]
    for way in losses["ways"]:
        assert np.corrcoef(measured.recall_blocks(losses, way), plain)[0, 1] > 0.9


def test_a_ring_keeps_its_size(records: dict[str, Record]) -> None:
    first, second = records["ring-nano-256"]["ends"]
    assert (first["tokens"], second["tokens"]) == (2 * 4096, 3 * 4096)
    assert first["n_archived"] == second["n_archived"] == 4096
    assert first["archive_bytes"] == second["archive_bytes"] > 0
    assert first["trials"] == second["trials"] == 1
    for end in (first, second):
        assert end["text_nll"]["32"] != pytest.approx(end["text_nll"]["0"], abs=1e-4)


def test_keys_are_compared_at_each_length_and_facts_at_all() -> None:
    def cell(length: int, depth: float, correct: int) -> Record:
        n_found = min(correct, 4) if depth == 1 else 0
        return {
            "length": length, "depth": depth, "trials": 4, "correct": correct, "in_reach": float(depth == 1),
            "correct_in_reach": n_found,
        }  # fmt: skip

    cells = [cell(n, depth, 4) for n in (100, 200) for depth in (0.0, 1.0)]
    cells[-1] = cell(200, 1.0, 1)
    policies = {"recall": {"cells": cells}, "ceiling": {"cells": [cell(50, 0.0, 4)]}, "full": {"cells": cells[:1]}}
    record: Record = {
        "complete": True, "settings": {"task": "prose"}, "policies": policies, "model": {"name": "nano"},
        "window": {"n_global": 10, "n_local": 246},
    }  # fmt: skip
    measured_there = [row[2] for row in results.recall_claims(record)]
    assert measured_there == [
        "8 of 8 against 4 of 4: 100%",
        "5 of 8 against 4 of 4: 62%",
        "8 of 8 against 4 of 4: 100%",
    ]
    record["settings"]["task"] = "facts"
    assert next(row[2] for row in results.recall_claims(record)) == "13 of 16 against 4 of 4: 81%"
    assert results.in_window(record, 200) == "1 of 4"


def test_the_tail(records: dict[str, Record]) -> None:
    for record in measured.tail_records(records):
        assert record["settings"]["places"] == [2048, 2730, 3413]
        ways = record["ways"]
        size = record["window"]["n_local"]
        assert [way["n_tail"] for way in ways.values()] == [None, 64, size, 2 * size, 3 * size]
        everything = measured.tail_blocks(record, "everything")
        assert len(everything) == 3
        for way in measured.tails(record):
            cost = measured.tail_blocks(record, way) - everything
            assert 0 < np.abs(cost).max() < 0.2, way
            assert np.corrcoef(measured.tail_blocks(record, way), everything)[0, 1] > 0.99
        assert list(measured.tail_blocks(record, "everything", 2730)) == list(everything[1:])
        assert measured.tail_octaves(record) == [(2048, 4096)]


def test_a_tail_is_what_users_get() -> None:
    """The loss after prefill "tail", through Llama's own way: a prompt, then what follows it."""
    from lminf_edge import Llama
    from lminf_edge.evaluate.nll import nll_from_logits

    subject = evidence.subject_of("nano", {"text": python_documentation()}, 4096, 1)
    tokens, window, place, block = subject.texts["text"], subject.window(), 3000, 128
    with subject.setup(window, "f16").reader(POLICIES["lminf"], 0) as reader:
        assert isinstance(reader, evidence.LambdaReader)
        measured_loss = evidence.block_after(reader, tokens, place, block, 2 * window.n_local)
    config = LMInfConfig(n_global=window.n_global, n_local=window.n_local, prefill="tail", n_tail=2)
    llm = Llama("nano", lminf=config, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    answer = llm.generate(tokens[:place].tolist())
    next(answer)
    answer.close()
    assert llm.stream_info().skipped == place - 2 * window.n_local - window.n_global
    llm.eval(tokens[place : place + block].tolist())
    logits = llm.scores[place - 1 : place - 1 + block]
    assert nll_from_logits(logits, tokens[place : place + block]).mean() == pytest.approx(measured_loss, abs=2e-3)
    llm.close()


def test_what_is_measured_of_real_models(real: Path, records: dict[str, Record]) -> None:
    found = measured.load_records(real)
    assert set(found) == {
        "loss-real-128-f16", "loss-real-128-q8_0", "loss-real-256-f16", "far-real-128-f16", "sweep-global-real",
        "sweep-local-real", "sweep-distance-real", "generation-real", "stream-real",
    }  # fmt: skip
    assert all(record["complete"] for record in found.values())
    losses = found["loss-real-128-f16"]
    # the same model, text and block as there, in half of the window
    full, nano = (measured.blocks(record, "full", 0, 1024) for record in (losses, records["loss-nano-f16"]))
    np.testing.assert_allclose(full, nano, atol=2e-3)
    assert measured.read_everywhere(losses, "full") == 1024  # twice the training length
    far = found["far-real-128-f16"]
    ours, fresh = measured.blocks(far, "lminf", 2048, 4096), measured.fresh_blocks(far, "lminf", 4096)
    assert abs(ours.mean() / fresh.mean() - 1) < 0.03
    near = measured.blocks(losses, "lminf", 0, 2048)
    np.testing.assert_allclose(measured.blocks(far, "lminf", 0, 2048), near, atol=2e-3)
    assert [v["n_local"] for v in found["sweep-local-real"]["variants"]] == [22, 54, 118, 246, 502]
    assert found["stream-real"]["text_tokens"] == 3072
    assert found["stream-real"]["tokens"] == 9000


def test_long_texts(real: Path) -> None:
    record = measured.load_records(real)["generation-real"]
    assert set(record["policies"]) == {"text", "shift", "lminf"}
    for figures in record["policies"].values():
        assert np.array(figures["nll"]).shape == np.array(figures["distinct"]).shape == (2, 2)
        assert 0.2 < min(figures["distinct_all"]) <= max(figures["distinct_all"]) <= 1
        assert 1 < np.mean(figures["nll"]) < 8
    assert evidence.distinct(np.array([1, 2, 3, 4, 1, 2, 3, 4, 1])) == 4 / 6
    assert evidence.distinct(np.arange(9)) == 1


def test_writing_on_is_what_users_get() -> None:
    """With the same seed, what Llama.generate writes, here without a draw: the likeliest token, penalized."""
    from lminf_edge import Llama

    subject = evidence.subject_of("nano", {"text": python_documentation()}, 4096, 1)
    window, prompt = subject.window(n_local=118), subject.texts["text"][:64]
    sampling = {"temperature": 0.0, "repeat_penalty": 1.3}
    with subject.setup(window, "f16").reader(POLICIES["lminf"], 0) as reader:
        written = evidence.write_on(reader, prompt, 256, 0, sampling).tolist()
    config = LMInfConfig(n_global=window.n_global, n_local=window.n_local)
    llm = Llama("nano", lminf=config, verbose=False, n_threads=1, n_threads_batch=1)
    answer = llm.create_completion(prompt.tolist(), max_tokens=192, stop=None, **sampling)
    text = llm.detokenize(written[64:]).decode("utf-8", errors="ignore")
    assert answer["choices"][0]["text"].strip()[:40] == text.strip()[:40]
    llm.close()


def test_quantized_models_say_what_they_are(folder: Path) -> None:
    assert set(tensor_types(folder / "nano-f16.gguf")) == {"F16"}
    assert "Q4_K" in tensor_types(folder / "weights" / "Q4_K_M.gguf")
    with pytest.raises(RuntimeError, match="cannot be quantized to Q4_0"):
        quantize(folder / "text.txt", folder / "none.gguf", "Q4_0", 1)
    assert not (folder / "none.gguf").exists()


# --- page -------------------------------------------------------------------------------------------------------------


def made(figures: Path, page: Path) -> str:
    """The page that is made of the figures in a folder."""
    run_benchmark("results.py", "--figures", figures, "--page", page)
    return page.read_text(encoding="utf-8")


def test_page(folder: Path, records: dict[str, Record]) -> None:
    figures, page = folder / "results", folder / "results.md"
    text = made(figures, page)
    for name in records:
        assert f"(results/{name}.json)" in text
        assert f"\n# {name}\n{records[name]['command']}\n" in text
    for picture in ("loss-nano", "drift-toys", "divergence", "passkey", "recall-toys"):
        assert f"(results/{picture}.png)" in text
        assert (figures / f"{picture}.png").stat().st_size > 10_000
    assert not_measured(text) == {*results.SECTIONS, *results.OF_REAL}  # which are of real models
    assert "nan" not in text.replace("nano", "")
    assert "Not up to date" not in text
    lengths = [line.count(" | ") for line in text.splitlines() if line.startswith("|")]
    assert max(lengths) <= 8  # no table is ragged

    pictures = {path.name: path.read_bytes() for path in figures.glob("*.png")}
    assert made(figures, page) == text
    assert {path.name: path.read_bytes() for path in figures.glob("*.png")} == pictures

    # its numbers are those of the files
    record = json.loads((figures / "stream.json").read_text(encoding="utf-8"))
    estimate = measured.drift(record)
    assert estimate is not None
    assert f"| slope | {estimate.value:+.5f} ({estimate.low:+.5f} to {estimate.high:+.5f}) |" in text
    record["model"]["sha256"] = "of another model"
    (figures / "stream.json").write_text(json.dumps(record), encoding="utf-8")
    assert "**Not up to date**: another version of an embedded model was measured by stream." in made(figures, page)


def not_measured(page: str) -> set[str]:
    """The blocks that say so."""
    return set(re.findall(r"^<!-- ([\w-]+) -->\n\nNot measured\.\n\n<!-- end of \1 -->$", page, re.M))


def test_page_of_real_models(folder: Path, real: Path) -> None:
    text = made(real, folder / "real.md")
    # of them no tails and answers were measured here, and nothing of toys
    toys = {f"toy-{name}" for name in {*results.SECTIONS, *results.OF_TOYS}}
    assert not_measured(text) == {"tail", "recall", "recall-loss", *toys}
    for picture in ("loss-real-128", "loss-real-256", "drift"):
        assert f"(results/{picture}.png)" in text
        assert (real / f"{picture}.png").stat().st_size > 10_000
    record = json.loads((real / "far-real-128-f16.json").read_text(encoding="utf-8"))
    assert f"{measured.blocks(record, 'lminf', 2048, 4096).mean():.4f} against" in text
    assert f"{record['machine']['cpu']}, {record['machine']['date'][:10]}: [far-real-128-f16]" in text


@pytest.mark.parametrize(
    ("name", "blocks", "load"),
    [
        ("results", results.BLOCKS, pages.load_records),
        ("performance", report.BLOCKS, report.load),
        ("server-performance", server_report.BLOCKS, pages.load_records),
    ],
)
def test_pages_are_what_their_figures_say(name: str, blocks: Any, load: Any) -> None:
    page = ROOT / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert pages.filled(page, blocks, load(ROOT / "docs" / name)) == text, f"{page.name} is not: make results, for one"


def test_a_page_has_its_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("By hand.\n\n<!-- a -->\nold\n<!-- end of a -->\n\nThe end.\n", encoding="utf-8")
    assert pages.filled(page, {"a": lambda records: f"{records['n']}\n"}, {"n": {}}) == (
        "By hand.\n\n<!-- a -->\n\n{}\n\n<!-- end of a -->\n\nThe end.\n"
    )
    with pytest.raises(ValueError, match="should have the blocks a, b"):
        pages.filled(page, dict.fromkeys(("a", "b"), str), {})


def test_without_figures(tmp_path: Path) -> None:
    said = run_benchmark("results.py", "--figures", tmp_path, "--page", tmp_path / "page.md", expect=1)
    assert said.startswith("error: There are no figures in ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "missing.txt"], "missing.txt does not exist."),
        (["--text", "{short}"], "short is too short: it has "),
        (["--model", "missing.gguf"], "Model path does not exist: missing.gguf"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    filled = [argument.format(short=short) for argument in arguments]
    said = run_benchmark("evidence.py", "--tiny", "--out", tmp_path / "out", *filled, expect=1)
    assert f"error: {sentence}" in said
    assert "Traceback" not in said


# --- a long stream that is stopped ------------------------------------------------------------------------------------


def perform_until(
    stop: int, experiment: Any, subject: Any, texts: dict[str, str], folder: Path
) -> tuple[Record, int, bool]:
    """Stops once so many tokens were read: what was saved, how often, and whether it was stopped."""
    saves = []

    def run(subject: Any, asked: Any, save: Any) -> Record:
        def save_and_stop(reached: Record) -> None:
            save.write(reached)
            saves.append(reached["tokens"])
            if reached["tokens"] >= stop:
                raise KeyboardInterrupt

        kept = evidence.dataclasses.replace(save, write=save_and_stop)
        return dict(experiment.run(subject, asked, kept))

    was_stopped = False
    try:
        evidence.perform(evidence.dataclasses.replace(experiment, run=run), subject, texts, folder, False)
    except KeyboardInterrupt:
        was_stopped = True
    record = json.loads((folder / f"{experiment.name}.json").read_text(encoding="utf-8"))
    return dict(record), len(saves), was_stopped


def test_a_stream_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "STREAMS_FOLDER", tmp_path / "streams")
    texts = {"text": python_documentation()}
    size = evidence.dataclasses.replace(evidence.TINY, n_stream=7000, save_every=0.0)
    subject = evidence.subject_of("nano", texts, 4096, 1)
    (stream,) = [e for e in evidence.experiments(["nano"], size, None, None, tmp_path) if e.name == "stream"]

    def read(stop: int) -> tuple[Record, int]:
        record, n_saves, was_stopped = perform_until(stop, stream, subject, texts, tmp_path)
        assert was_stopped
        return record, n_saves

    first, n_saves = read(4000)
    assert first["complete"] is False
    assert first["tokens"] >= 4000
    assert len(first["block_nll"]) == first["tokens"] // first["block"]
    second, n_more = read(6000)
    assert second["tokens"] >= 6000
    assert n_more < n_saves  # what had been read was not read again
    evidence.perform(stream, subject, texts, tmp_path, False)
    third = json.loads((tmp_path / "stream.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "streams" / "stream").exists()
    (tmp_path / "whole").mkdir()
    evidence.perform(stream, subject, texts, tmp_path / "whole", False)
    whole = json.loads((tmp_path / "whole" / "stream.json").read_text(encoding="utf-8"))
    assert third["complete"] is whole["complete"] is True
    for name in ("tokens", "block_nll", "fresh_nll", "rebases", "max_graph_position", "kv_bytes"):
        assert third[name] == whole[name], name


def test_less_of_a_stream_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "STREAMS_FOLDER", tmp_path / "streams")
    texts = {"text": python_documentation()}
    subject = evidence.subject_of("nano", texts, 4096, 1)
    (stream,) = [e for e in evidence.experiments(["nano"], evidence.TINY, None, None, tmp_path) if e.name == "stream"]
    path = tmp_path / "stream.json"

    def read(*tokens: int) -> Record:
        def run(subject: Any, experiment: Any, save: Any) -> Record:
            for n in tokens:
                save({"tokens": n})
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evidence.perform(evidence.dataclasses.replace(stream, run=run), subject, texts, tmp_path, False)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    first = read(1000, 2000)
    assert first["tokens"] == 2000
    assert read(1000) == first
    assert read(1000, 3000)["tokens"] == 3000


def test_policies_that_were_read_are_not_read_again(tmp_path: Path) -> None:
    texts = {"text": python_documentation()}
    subject = evidence.subject_of("nano", texts, N_TEXT, 1)
    made = evidence.real_experiments("nano", "real", evidence.TINY, (128, 256), 1)
    (loss,) = [e for e in made if e.name == "loss-real-128-f16"]
    path = tmp_path / "loss-real-128-f16.json"

    def stop_after_the_first(subject: Any, experiment: Any, save: Any) -> Record:
        def save_and_stop(reached: Record) -> None:
            save(reached)
            raise KeyboardInterrupt

        return evidence.measure_loss(subject, experiment, evidence.Save(save_and_stop, save.kept))

    with pytest.raises(KeyboardInterrupt):
        evidence.perform(evidence.dataclasses.replace(loss, run=stop_after_the_first), subject, texts, tmp_path, False)
    first = json.loads(path.read_text(encoding="utf-8"))
    assert (first["complete"], list(first["policies"])) == (False, ["lminf"])
    evidence.perform(loss, subject, texts, tmp_path, False)
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert whole["complete"] is True
    assert set(whole["policies"]) == set(WITHOUT_RECALL)
    assert whole["policies"]["lminf"] == first["policies"]["lminf"]  # the same seconds: not read again


def test_policies_are_compared_on_texts_that_both_read() -> None:
    def read(**texts: list[float]) -> Record:
        return {"texts": {name: {"block_nll": losses, "tokens": 4} for name, losses in texts.items()}}

    record = {"settings": {"block": 2}, "policies": {"full": read(b=[5, 6]), "lminf": read(a=[1, 2], b=[3, 4])}}
    assert measured.texts_read(record, "lminf", "full") == ["b"]
    assert [list(values) for values in measured.beside(record, "full", 0, 4)] == [[5, 6], [3, 4]]
    assert list(measured.blocks(record, "lminf", 2, 4)) == [2, 4]


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    """Rows of a cache in q8_0 have 32 elements at least, and the heads of this model have 16."""
    from reference import tiny_models

    model = tiny_models.write("llama", tmp_path)
    texts = {"text": "ab " * 4000}
    size = evidence.dataclasses.replace(evidence.TINY, n_loss=1024)
    made = evidence.experiments(["nano", str(model)], size, None, None, tmp_path)
    (loss,) = [e for e in made if e.model == str(model) and e.name.endswith("q8_0")]
    evidence.perform(loss, evidence.subject_of(str(model), texts, 4096, 1), texts, tmp_path, False)
    record = json.loads((tmp_path / f"{loss.name}.json").read_text(encoding="utf-8"))
    assert record["complete"]
    assert "multiple of 32" in record["refused"]


def test_full_attention_stops_when_it_gets_too_slow() -> None:
    texts = {"text": python_documentation()}
    subject = evidence.subject_of("nano", texts, None, 1)
    tokens = subject.texts["text"]
    setup = subject.setup(subject.window(), "f16")
    with setup.reader(POLICIES["full"], 16384) as reader:
        figures, done = evidence.curve(reader, tokens, 16384, 128, most_seconds=0.0)
    assert done == figures["tokens"] == figures["edges"][-1] == 4096  # the least
    assert len(figures["block_nll"]) == 4096 // 128


def test_fresh_losses_are_those_of_a_new_stream() -> None:
    from lminf_edge import Llama
    from lminf_edge.evaluate import token_nll

    subject = evidence.subject_of("nano", {"text": python_documentation()}, 4096, 1)
    tokens, window = subject.texts["text"], subject.window()
    with subject.setup(window, "f16").reader(POLICIES["lminf"], 0) as reader:
        fresh = evidence.fresh_nll(reader, subject, tokens, window, 1000, 1600)
    config = LMInfConfig(n_global=window.n_global, n_local=window.n_local)
    llm = Llama("nano", lminf=config, verbose=False, n_threads=1, n_threads_batch=1)
    # that of token 1257, the first of the second stretch: BOS and the window before it have been read
    stretch = [*tokens[:1], *tokens[1257 - window.size : 1258]]
    assert token_nll(llm, np.array(stretch))[-1] == pytest.approx(fresh[256], abs=2e-3)
    llm.close()


# --- statistics -------------------------------------------------------------------------------------------------------


def test_shares() -> None:
    # Wilson's interval, by hand
    assert proportion(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert proportion(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert proportion(20, 20)[1] == pytest.approx(1.0)


def test_intervals_hold_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    mean_hits = slope_hits = 0
    n_rounds, n_blocks, n_times = 1000, 20, 6
    place = np.tile(np.arange(n_blocks), n_times)
    x = np.log10(np.arange(n_blocks * n_times) + 10.0)
    for _ in range(n_rounds):
        # paired samples: what both have in common cancels
        common, a, b = rng.normal(size=(3, 12))
        estimate = mean_difference(10 * common + a + 0.5, 10 * common + b)
        mean_hits += estimate.low <= 0.5 <= estimate.high
        # a block of text has its own difference, whenever it is read
        y = 0.3 * x + rng.normal(size=n_blocks)[place] + 0.01 * rng.normal(size=len(x))
        clustered = slope(x, y, place)
        slope_hits += clustered.low <= 0.3 <= clustered.high
        assert slope(x, y, place, within=True).value == pytest.approx(0.3, abs=0.02)
    assert 0.93 < mean_hits / n_rounds < 0.97
    assert 0.93 < slope_hits / n_rounds < 0.97


def test_too_little_for_an_interval() -> None:
    with pytest.raises(ValueError, match="two samples"):
        mean_difference([1.0], [2.0])
    with pytest.raises(ValueError, match="two blocks"):
        slope(np.arange(3.0), np.arange(3.0), np.zeros(3))
    with pytest.raises(ValueError, match="different positions"):
        slope(np.zeros(3), np.arange(3.0), np.arange(3.0))


def test_answers_that_were_given_are_not_asked_for_again(tmp_path: Path) -> None:
    texts = {"text": python_documentation()}
    size = evidence.dataclasses.replace(evidence.TINY, recall_lengths=(300, 1024), recall_depths=(0.0, 1.0))
    subject = evidence.subject_of("nano", texts, 4096, 1)
    made = evidence.experiments(["nano"], size, None, None, tmp_path)
    (answers,) = [e for e in made if e.name == "recall-nano-prose-256"]

    first, n_first, _ = perform_until(1500, answers, subject, texts, tmp_path)
    assert not first["complete"]
    second, n_second, _ = perform_until(1 << 30, answers, subject, texts, tmp_path)
    assert second["complete"]
    for name, policy in first["policies"].items():
        cells = policy["cells"]
        assert second["policies"][name]["cells"][: len(cells)] == cells
    assert n_first + n_second == 2 * (1 + 2 * 2)  # places; the ceiling, and lengths with and without recall
