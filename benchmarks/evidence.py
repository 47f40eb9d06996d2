"""Measures what docs/results.md says and writes it to docs/results/*.json, a file for each experiment.

    make results-measure TEXT="book.txt ...", or:
    .venv/bin/python benchmarks/evidence.py --text FILE... [--only NAME]... [--model GGUF]... [--f16 GGUF]

What was finished for the same model, texts and settings is not measured again without --again. Ctrl-C ends it: finished
experiments are kept, and a long stream goes on from where it was saved last (build/streams). benchmarks/results.py puts
what is written here into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import ROOT, describe, resident_bytes
from quantize import FILE_TYPES, quantize, tensor_types

from lminf_edge import LMInfConfig, native
from lminf_edge.cache.checkpoint import Checkpoint
from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.cli.common import KV_TYPE_NUMBERS, CommandError, load, model_header, model_settings, read_text, tokenize
from lminf_edge.cli.demo import python_documentation
from lminf_edge.cli.passkey import policy_report
from lminf_edge.cli.policies import Setup
from lminf_edge.cli.ppl import Text, stretches_of
from lminf_edge.config import StreamInfo, Window, resolve
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.sampler import make_sampler
from lminf_edge.errors import UserError
from lminf_edge.evaluate import Reader, divergence_blocks, nll_blocks, token_nll
from lminf_edge.evaluate.buckets import BucketMeans, even_edges, log_edges
from lminf_edge.evaluate.nll import nll_from_logits
from lminf_edge.evaluate.passkey import MAX_ANSWER, Cell, answer_next, measure, right_answers
from lminf_edge.evaluate.policies import POLICIES, WITHOUT_RECALL
from lminf_edge.evaluate.prompts import Prompt, Prompts
from lminf_edge.evaluate.reader import LambdaReader
from lminf_edge.gguf_header import Header
from lminf_edge.models import embedded_models

FIGURES = ROOT / "docs" / "results"
WEIGHTS_FOLDER = ROOT / "build" / "models" / "weights"
STREAMS_FOLDER = ROOT / "build" / "streams"
EMBEDDED = ("nano", "nano-alibi")
MAIN = "nano"  # what one model is enough for is measured on this one
N_GLOBAL = 10
WEIGHTS = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
WINDOW = ("n_global", "n_local", "max_distance")
N_BATCH = 512
TAIL_WINDOW = 512  # tokens; also half of it
LONG_PROMPT = 1 << 15  # tokens; of longer ones a large model is asked half as many
REAL_WINDOWS = (1024, 4096)
LARGE = 1 << 26  # bytes of a model file: from there on depth has its price
INTERRUPTED = 130

Nll = npt.NDArray[np.float64]
Results = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is read: the real thing, or little enough for a test. In tokens unless said otherwise.

    block       tokens in a mean that counts as one sample
    far         where "far into a stream" begins, for the loss curves and for the sweeps
    save_every  seconds between two saved states of a long stream
    """

    n_loss: int = 1 << 17
    n_sweep: int = 1 << 15
    far_loss: int = 1 << 14
    far_sweep: int = 1 << 12
    block: int = 512
    n_stream: int = 10_000_000
    stream_block: int = 8192
    n_longest: int = 200_000_000
    longest_block: int = 32_768
    full_minutes: float = 5.0  # for each text
    n_stretches: int = 96
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    depths: tuple[float, ...] = tuple(i / 8 for i in range(9))
    n_trials: int = 10
    first_place: int = 6144  # for the tail
    tail_block: int = 256
    places_per_octave: int = 9
    n_octaves: int = 4  # of a large model half as many
    recall_lengths: tuple[int, ...] = (8192, 32768)
    recall_lengths_long: tuple[int, ...] = (131072, 1 << 20)
    recall_lengths_large: tuple[int, ...] = (4096, 8192)
    recall_lengths_large_long: tuple[int, ...] = (32768, 65536)
    recall_depths: tuple[float, ...] = tuple(i / 4 for i in range(5))
    n_recall_trials: int = 4  # for each place
    n_recalling: int = 128  # last tokens of a long text
    n_ceiling_trials: int = 4
    n_recall_loss: int = 8192  # of each text; of a large model half
    recall_loss_start: int = 1024
    n_ring: int = 1 << 20
    ring_ends: tuple[int, ...] = (2, 6, 10)  # times n_ring
    ring_length: int = 1 << 16
    ring_depths: tuple[float, ...] = (0.25, 0.75)
    n_ring_trials: int = 10  # for each place
    n_real: int = 1 << 17  # what Λ reads of each text with a real model
    n_real_others: int = 1 << 15  # and the other policies, and Λ in other windows
    n_real_sweep: int = 1 << 13
    n_real_stream: int = 1_000_000
    real_part: int = 1 << 14  # of each text
    real_block: int = 2048
    place: int = 20_000  # where texts are gone on with
    n_written: int = 2048  # past the window
    n_seeds: int = 4
    n_text: int | None = None  # of each text, at most
    save_every: float = 60.0


TINY = Size(
    n_loss=2048,
    n_sweep=1024,
    far_loss=1024,
    far_sweep=512,
    block=128,
    n_stream=18_000,
    stream_block=1024,
    n_longest=18_000,
    longest_block=1024,
    n_stretches=4,
    lengths=(128, 512),
    depths=(0.0, 1.0),
    n_trials=1,
    first_place=2048,
    places_per_octave=3,
    n_octaves=1,
    recall_lengths=(1024, 2048),
    recall_lengths_long=(4096,),
    recall_depths=(0.0, 0.5),
    n_recall_trials=1,
    n_ceiling_trials=1,
    n_recall_loss=2048,
    n_ring=4096,
    ring_ends=(2, 3),
    ring_length=1024,
    ring_depths=(0.5,),
    n_ring_trials=1,
    n_real=4096,
    n_real_others=2048,
    n_real_sweep=1024,
    n_real_stream=9000,
    real_part=3072,
    real_block=512,
    place=2000,
    n_written=256,
    n_seeds=2,
    n_text=6144,
    save_every=0.5,
)


@dataclass(frozen=True)
class Subject:
    """A model, and the texts as its tokens, each with its BOS."""

    name: str
    path: str
    header: Header
    facts: Results
    texts: dict[str, Tokens]
    prose: str  # the first text
    n_bos: int
    n_threads: int

    @property
    def argument(self) -> str:
        """For -m: the name of an embedded model, or of a file without its folder."""
        return self.name if self.name in embedded_models() else Path(self.path).name

    @property
    def n_train(self) -> int:
        return self.header.n_ctx_train

    def window(self, n_global: int = N_GLOBAL, n_local: int | None = None, max_distance: int | None = None) -> Window:
        """G + L is half of the training length unless told otherwise: so there are positions with a full window inside
        it."""
        n_local = n_local or self.n_train // 2 - n_global
        return resolve(LMInfConfig(n_global=n_global, n_local=n_local, max_distance=max_distance), None, 1 << 30)

    def window_of(self, settings: Results) -> Window:
        """The window of an experiment that names its size, or half of the training length."""
        return self.window(n_local=settings["window"] - N_GLOBAL) if "window" in settings else self.window()

    def texts_of(self, settings: Results) -> dict[str, Tokens]:
        """The first ones, where an experiment does not read all."""
        return dict([*self.texts.items()][: settings.get("n_texts")])

    def setup(self, window: Window, kv_type: str, path: str | None = None) -> Setup:
        options = argparse.Namespace(kv_type=kv_type, batch=N_BATCH, threads=self.n_threads, gpu_layers=0, rpc=None)
        return Setup(path or self.path, self.header, window, KV_TYPE_NUMBERS[kv_type], model_settings(options))


@dataclass(frozen=True)
class Save:
    """Takes what a long experiment has reached.

    kept    what an earlier run of the same has reached; {}: nothing
    folder  with a checkpoint of a stream and what it had reached there, to go on from
    inputs  of the experiment
    """

    write: Callable[[Results], None]
    kept: Results
    folder: Path | None = None
    inputs: Results = dataclasses.field(default_factory=dict)

    def __call__(self, reached: Results, checkpoint: Checkpoint | None = None) -> None:
        if checkpoint is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            state = self.folder / f"{reached['tokens']}.state"
            checkpoint.save(state)
            write(self.folder / "reached.json", {**self.inputs, **reached})
            for other in set(self.folder.glob("*.state")) - {state}:
                other.unlink()
        self.write(reached)

    def going(self) -> tuple[Results, Checkpoint] | None:
        """What a stream of the same had reached when it was saved last, and the stream."""
        path = self.folder / "reached.json" if self.folder is not None else None
        if path is None or not path.exists():
            return None
        reached: Results = json.loads(path.read_text(encoding="utf-8"))
        if any(reached.get(name) != value for name, value in self.inputs.items()):
            return None
        return reached, Checkpoint.load(path.with_name(f"{reached['tokens']}.state"))

    def finished(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Experiment:
    """What is measured on one model, with these settings.

    run     does it. Beside figures it returns `command`, which does the same from a shell, for one text
    folder  for models in other number formats
    """

    name: str
    model: str
    run: Callable[[Subject, Experiment, Save], Results]
    settings: Results
    size: Size
    folder: Path


# --- reading ----------------------------------------------------------------------------------------------------------


def subject_of(name_or_path: str, texts: dict[str, str], n_text: int | None, n_threads: int) -> Subject:
    """Opens a model to find out what it is, and tokenizes the texts. Raises ValueError or CommandError."""
    path, header = model_header(name_or_path)
    if header.n_ctx_train < 64:
        raise CommandError(f"{path} does not say its training length, or it is too short to measure anything.")
    with contextlib.closing(load(path, vocab_only=True)) as vocabulary:
        n_bos = int(vocabulary._model.add_bos_token())
        tokens = {name: as_tokens(tokenize(vocabulary, text))[:n_text] for name, text in texts.items()}
    for name, text in tokens.items():
        if len(text) <= 4 * header.n_ctx_train:
            raise CommandError(
                f"{name} is too short: it has {len(text)} tokens, and {4 * header.n_ctx_train + 1} are needed."
            )
    prose = next(iter(texts.values()))
    return Subject(Path(path).stem, path, header, model_facts(path, header), tokens, prose, n_bos, n_threads)


def model_facts(path: str, header: Header) -> Results:
    """What a model is, as it is written to the figures."""
    from llama_cpp import llama_cpp as bindings

    with contextlib.closing(load(path, n_ctx=64)) as llm:
        n_params, n_bytes = (f(llm._model.model) for f in (bindings.llama_model_n_params, bindings.llama_model_size))
        file_type = int(llm.metadata.get("general.file_type", -1))
    return {
        "name": Path(path).stem,
        "architecture": header.architecture,
        "n_params": n_params,
        "n_bytes": n_bytes,
        "weights": next((name for name, number in FILE_TYPES.items() if number == file_type), "other"),
        "n_ctx_train": header.n_ctx_train,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    }


def text_facts(text: str, tokens: Tokens) -> Results:
    """Of one text: bytes, tokens of this model, and a hash that says whether it is the same."""
    data = text.encode()
    return {"n_bytes": len(data), "n_tokens": len(tokens), "sha256": hashlib.sha256(data).hexdigest()}


def curve(
    reader: Reader, tokens: Tokens, n_tokens: int, block: int, most_seconds: float | None = None
) -> tuple[Results, int]:
    """Losses of a stream of n_tokens + 1 by position: in buckets for a picture, and in blocks as samples.

    With `most_seconds` the stream ends at a power of two, when going on to the next one would take longer than that in
    all: the time of full attention is quadratic, so twice the tokens are four times the seconds. Returns the figures
    and the number of tokens scored.
    """
    buckets, blocks = BucketMeans(log_edges(n_tokens)), BucketMeans(even_edges(n_tokens, block))
    begun, done = time.perf_counter(), 0
    for start, nll in nll_blocks(reader, tokens, n_tokens + 1):
        buckets.add(start, nll)
        blocks.add(start, nll)
        done = start + len(nll)
        is_octave = done >= 4096 and done & (done - 1) == 0
        if most_seconds is not None and is_octave and 4 * (time.perf_counter() - begun) > most_seconds:
            break
    seconds = time.perf_counter() - begun
    return {
        "tokens": done,
        "mean_nll": round(buckets.mean, 6),
        "seconds": round(seconds, 2),
        "edges": [0, *(bucket.end for bucket in buckets.buckets())],
        "bucket_nll": [round(bucket.mean, 5) for bucket in buckets.buckets()],
        "block_nll": [round(bucket.mean, 5) for bucket in blocks.buckets()],
    }, done


def fresh_nll(reader: Reader, subject: Subject, tokens: Tokens, window: Window, start: int, end: int) -> Nll:
    """Losses at positions start .. end - 1 of a text when the stream has just begun: float64 (end - start,).

    Each is scored once, at a position of a new stream where the window is full and which is inside the training length:
    stretches that overlap by a window, from their window's end on. The text comes round where it ends.
    """
    n_bos, n_text = subject.n_bos, len(tokens) - subject.n_bos
    stride = subject.n_train - window.size
    result = np.empty(end - start)
    for begin in range(start, end, stride):
        n = min(stride, end - begin)
        at = np.arange(begin - window.size + n_bos, begin + n + 1)  # token `begin + 1` is the first to be scored
        stretch = np.concatenate([tokens[:n_bos], tokens[n_bos + (at - n_bos) % n_text]])
        result[begin - start : begin - start + n] = token_nll(reader, stretch)[window.size :]
    return result


def block_means(values: Nll, block: int) -> list[float]:
    """Means of whole blocks, as many as there are."""
    n = len(values) // block
    return [round(float(mean), 5) for mean in values[: n * block].reshape(n, block).mean(axis=1)]


def ppl(subject: Subject, text: str, window: Window, kv_type: str, options: str) -> str:
    """The command that measures such a thing."""
    window_options = f"--n-local {window.n_local} --kv-type {kv_type}"
    return f"lminf-edge ppl -m {subject.argument} -f {text}.txt {options} {window_options} --json"


def stream_info(reader: Reader) -> StreamInfo:
    assert isinstance(reader, LambdaReader)
    return reader.llm.stream_info()


def rate(figures: Results) -> str:
    return f"{figures['tokens'] / figures['seconds']:.0f} tokens/s"


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def window_facts(window: Window) -> Results:
    return {name: getattr(window, name) for name in WINDOW}


# --- experiments ------------------------------------------------------------------------------------------------------


def measure_loss(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """Every policy on every text, and what the same text costs when it is read by streams that have just begun.

    settings["read"] has how many tokens each policy reads of a text; without it all read as many, full attention less.
    Those in settings["once"] read the first text alone.
    What an earlier run has read of the same is not read again.
    """
    settings, block = experiment.settings, experiment.settings["block"]
    window = subject.window_of(settings)
    setup = subject.setup(window, settings["kv_type"])
    read: dict[str, int] = settings.get("read", dict.fromkeys(WITHOUT_RECALL, settings["tokens"]))
    n_full: int | None = read.get("full", 0) if "read" in settings else settings["full_tokens"]
    setup.check([POLICIES[name] for name in read], min(settings["tokens"], n_full or settings["tokens"]))
    policies: dict[str, Results] = {name: {"texts": {}} for name in read}
    fresh: dict[str, Results] = {name: {} for name in settings.get("fresh", ("lminf", "full"))}
    options = f"--tokens {settings['tokens'] + 1} --policies {','.join(read)}"
    n_done = 0

    def results() -> Results:
        full = f" --full-tokens {(n_full or 0) + 1}" if "full" in read else ""
        return {
            "command": ppl(subject, "text", window, settings["kv_type"], options + full),
            "tokens": n_done,
            "window": window_facts(window),
            "full_tokens": n_full,
            "policies": {name: figures for name, figures in policies.items() if figures["texts"]},
            "fresh": fresh,
        }

    for name, tokens in subject.texts_of(settings).items():
        for policy_name, most in read.items():
            if policies[policy_name]["texts"] and policy_name in settings.get("once", ()):
                continue
            known = save.kept.get("policies", {}).get(policy_name, {"texts": {}})["texts"]
            if name in known:
                policies[policy_name]["texts"][name] = known[name]
                n_done += known[name]["tokens"]
                continue
            n = min(most, len(tokens) - 1)
            is_full = policy_name == "full"
            n_read = min(n, n_full or n) if is_full else n
            with setup.reader(POLICIES[policy_name], n_read) as reader:
                limit = 60 * settings["full_minutes"] if is_full and n_full is None else None
                figures, done = curve(reader, tokens, n_read, block, limit)
            if is_full:
                n_full = n_full or done  # decided on the first text
            policies[policy_name]["texts"][name] = figures
            n_done += done
            save(results())
            say(f"{name}, {policy_name}: {done} tokens, {figures['mean_nll']:.4f} nats, {rate(figures)}")
        for policy_name, by_text in fresh.items():
            start = settings["start"] // block * block
            n = min(read[policy_name] if policy_name != "full" else settings["tokens"], len(tokens) - 1)
            with setup.reader(POLICIES[policy_name], subject.n_train) as reader:
                begun = time.perf_counter()
                nll = fresh_nll(reader, subject, tokens, window, start, n)
            by_text[name] = {"start": start, "block_nll": block_means(nll, block)}
            by_text[name]["seconds"] = round(time.perf_counter() - begun, 2)
            say(f"{name}, {policy_name}, started fresh: {nll.mean():.4f} nats")
    return results()


def measure_stream(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """One Λ stream over all texts, over and over; the same blocks of text read by streams that have just begun.

    settings["part"]: so many tokens of each text.
    """
    settings, block = experiment.settings, experiment.settings["block"]
    window = subject.window_of(settings)
    setup = subject.setup(window, settings["kv_type"])
    parts = [tokens[subject.n_bos :][: settings.get("part")] for tokens in subject.texts.values()]
    bos = next(iter(subject.texts.values()))[: subject.n_bos]
    text = np.concatenate(parts)
    n_blocks = len(text) // block
    tokens = np.concatenate([bos, text[: n_blocks * block]])
    if n_blocks < 2:
        raise CommandError(f"The texts have {len(text)} tokens, and a long stream needs {2 * block} at least.")
    shift = 1 - subject.n_bos  # of the position of a loss to the place of its token in the text
    before, checkpoint = save.going() or ({}, None)

    fresh_nlls = before.get("fresh_nll")
    if fresh_nlls is None:
        with setup.reader(POLICIES["lminf"], 0) as reader:
            begun = time.perf_counter()
            fresh = fresh_nll(reader, subject, tokens, window, -shift, n_blocks * block - shift)
        say(f"started fresh: {fresh.mean():.4f} nats, {len(fresh) / (time.perf_counter() - begun):.0f} tokens/s")
        fresh_nlls = block_means(fresh, block)

    n_tokens = settings["tokens"]
    sums = BucketMeans(even_edges(n_tokens, block))
    options = f"--tokens {n_tokens + 1} --repeat --bucket {block}"
    command = ppl(subject, "texts", window, settings["kv_type"], options)
    with setup.reader(POLICIES["lminf"], 0) as reader:
        assert isinstance(reader, LambdaReader)
        begun = saved = time.perf_counter()
        resident = before.get("resident_bytes", [resident_bytes()])[0]
        done = n_before = before.get("tokens", 0)
        if checkpoint is not None:
            reader.restore(checkpoint)
            sums.add(0, np.repeat(before["block_nll"], block))
            n_whole = len(before["block_nll"]) * block
            sums.add(n_whole, np.full(n_before + shift - n_whole, before["rest_nll"]))
            say(f"goes on after {n_before} tokens")

        def results() -> Results:
            info = stream_info(reader)
            *whole, rest = sums.buckets()
            if rest.end - rest.start == block:
                whole.append(rest)
            return {
                "command": command,
                "window": window_facts(window),
                "tokens": done,
                "seconds_stream": round(before.get("seconds_stream", 0.0) + time.perf_counter() - begun, 1),
                "text_tokens": n_blocks * block,
                "block": block,
                "fresh_nll": fresh_nlls,
                "block_nll": [round(bucket.mean, 6) for bucket in whole],
                "rest_nll": rest.mean,
                "kv_bytes": info.kv_bytes,
                "rebases": before.get("rebases", 0) + info.rebases,
                "max_graph_position": max(before.get("max_graph_position", 0), info.max_graph_position),
                "resident_bytes": [resident, resident_bytes()],
            }

        try:
            for start, nll in nll_blocks(reader, tokens, n_tokens + 1, subject.n_bos, n_before):
                inside = max(n_tokens - start - shift, 0)
                sums.add(start + shift, nll[:inside])
                done = start + len(nll)
                if resident is None or done == 100 * N_BATCH:
                    resident = resident_bytes()
                if time.perf_counter() - saved > experiment.size.save_every:
                    saved = time.perf_counter()
                    save(results(), reader.llm.checkpoint())
                    rate_ = (done - n_before) / (saved - begun)
                    say(f"{done} of {n_tokens} tokens, {nll.mean():.3f} nats, {rate_:.0f} tokens/s")
        except KeyboardInterrupt:
            say(f"stopped after {done} tokens")
            raise
        return results()


def measure_sweep(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """The Λ cache with one setting after the other, on the first tokens of each text."""
    settings, block = experiment.settings, experiment.settings.get("block", experiment.size.block)
    variants = []
    for variant in settings["variants"]:
        window = subject.window(**{name: variant[name] for name in WINDOW if name in variant})
        kv_type = variant.get("kv_type", "f16")
        path = None
        figures = {"name": variant["name"], "kv_type": kv_type, **window_facts(window), "texts": {}}
        if "weights" in variant:
            path = str(experiment.folder / f"{variant['weights']}.gguf")
            figures["weights"] = variant["weights"]
            figures["file_bytes"] = Path(path).stat().st_size
            figures["tensors"] = tensor_types(path)
        setup = subject.setup(window, kv_type, path)
        with setup.reader(POLICIES["lminf"], 0) as reader:
            for name, tokens in subject.texts_of(settings).items():
                n = min(settings["tokens"], len(tokens) - 1)
                by_text, _ = curve(reader, tokens, n, block)
                by_text["first_block"] = settings["start"] // block
                by_text["start"] = by_text["first_block"] * block
                if settings["fresh"]:
                    nll = fresh_nll(reader, subject, tokens, window, by_text["start"], n)
                    by_text["fresh_nll"] = block_means(nll, block)
                figures["texts"][name] = by_text
            figures["kv_bytes"] = stream_info(reader).kv_bytes
        variants.append(figures)
        mean = np.mean([by_text["mean_nll"] for by_text in figures["texts"].values()])
        say(f"{variant['name']}: {mean:.4f} nats, {rate(by_text)}")
    command = ppl(subject, "text", subject.window_of(settings), "f16", f"--tokens {settings['tokens'] + 1}")
    option, value = settings["swept"]
    if option in command:
        command = re.sub(f"{option} \\S+", f"{option} {value}", command)
    else:
        command += f" {option} {value}"
    return {"command": command, "variants": variants}


def measure_weights(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """measure_sweep over number formats of the weights, which llama.cpp makes from the f16 model."""
    for file_type in WEIGHTS:
        quantize(Path(subject.path), experiment.folder / f"{file_type}.gguf", file_type, subject.n_threads)
    return measure_sweep(subject, experiment, save)


def measure_divergence(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """KL divergence of every policy from full attention, by position inside the training length.

    With a cache in f32 the weights are in f32 as well, the same numbers: where weights are quantized llama.cpp rounds
    activations to 8 bits, and the last digits of a sum show.
    """
    window, kv_type, path = subject.window(), experiment.settings["kv_type"], subject.path
    if kv_type == "f32":
        path = str(experiment.folder / f"{subject.name}-F32.gguf")
        quantize(Path(subject.path), Path(path), "F32", subject.n_threads, again=True)
    setup = subject.setup(window, kv_type, path)
    n = -(-experiment.settings["stretches"] // len(subject.texts))
    stretches: list[list[int]] = []
    for tokens in subject.texts.values():
        stretches += stretches_of(n, setup, Text(tokens.tolist(), subject.n_bos, len(tokens)))
    length = len(stretches[0])
    policies: dict[str, Results] = {}
    with setup.reader(POLICIES["full"], length) as reference:
        for name, policy in WITHOUT_RECALL.items():
            if name == "full":
                continue
            means = BucketMeans(even_edges(length, 8))
            largest = np.zeros(length)
            with setup.reader(policy, length) as reader:
                for stretch in stretches:
                    for start, kl in divergence_blocks(reference, reader, as_tokens(stretch)):
                        means.add(start, kl)
                        at = slice(start, start + len(kl))
                        largest[at] = np.maximum(largest[at], kl)
            before = window.n_local - 1  # the last position that all policies must agree on
            policies[name] = {
                "mean_kl": means.mean,
                "largest_before_full": float(largest[:before].max()),
                "edges": [0, *(bucket.end for bucket in means.buckets())],
                "bucket_kl": [float(f"{bucket.mean:.4e}") for bucket in means.buckets()],
            }
            say(f"{name}: {means.mean:.5f} nats, at most {policies[name]['largest_before_full']:.1e} before")
    command = ppl(subject, "text", window, kv_type, f"--policies {','.join(WITHOUT_RECALL)} --kl {n} --bucket 8")
    if path != subject.path:
        command = command.replace(f"-m {subject.argument} ", f"-m {Path(path).name} ")
    return {
        "command": command,
        "window": window_facts(window),
        "stretches": len(stretches),
        "length": length,
        "policies": policies,
    }


def measure_answers(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """Right answers by length and place of what was told once.

    With recall: with it, without, with full attention, and the ceiling, which is the fact in the window.
    """
    settings, depths = experiment.settings, experiment.settings["depths"]
    lengths, n_trials = settings["lengths"], settings["trials"]
    n_global, size = settings.get("n_global", N_GLOBAL), settings.get("window", subject.n_train // 2)
    recall: dict[str, Any] = {}
    asked = {name: (name, lengths, n_trials) for name in settings["policies"]}
    if "n_recall" in settings:
        # what is asked at the end must not push out the oldest
        recall = {"n_recall": settings["n_recall"], "n_archive": max(lengths) + 2 * MAX_ANSWER}
        ways = {
            "ceiling": ("lminf", [settings["ceiling"]], settings["n_ceiling"]),
            "recall": ("recall", lengths, n_trials),
            "lminf": ("lminf", lengths, settings.get("n_without", 0)),
            "full": ("full", [n for n in lengths if n <= subject.n_train], n_trials),
        }
        asked = {name: way for name, way in ways.items() if name in asked and way[1]}
    window = resolve(LMInfConfig(n_global=n_global, n_local=size - n_global, **recall), None, subject.n_train)
    setup = subject.setup(window, settings.get("kv_type", "f16"))
    task_name = settings.get("task", "prose")
    is_large = subject.facts["n_bytes"] > LARGE
    policies = ["lminf", "recall"] if recall else settings["policies"]
    lists = {"policies": policies, "lengths": lengths, "depths": [f"{100 * depth:g}" for depth in depths]}
    command = (
        f"lminf-edge passkey -m {subject.argument} -f {next(iter(subject.texts))}.txt --task {task_name} "
        + " ".join(f"--{name} {','.join(map(str, values))}" for name, values in lists.items())
        + f" --trials {n_trials} --n-global {window.n_global} --n-local {window.n_local}"
    )
    facts = window_facts(window)
    if recall:
        command += f" --recall {window.n_recall} --archive-tokens {recall['n_archive']}"
        facts["recall_distance"] = window.recall_distance
    if n_recalling := settings.get("n_recalling"):
        command += f" --recall-last {n_recalling}"
    reached = answered(save.kept, facts)
    figures: Results = {}
    done = 0
    with contextlib.closing(load(subject.path, vocab_only=True)) as vocabulary:
        task = Prompts(vocabulary, task_name, subject.prose)
        for name, (policy, its_lengths, most) in asked.items():
            cells = []
            with setup.reader(POLICIES[policy], max(its_lengths) + MAX_ANSWER) as reader:
                for length, depth in itertools.product(its_lengths, depths):
                    n = max(1, most // 2) if is_large and length > LONG_PROMPT else most
                    done += length * n
                    cell = reached.get((name, length, depth))
                    if is_new := cell is None:
                        prompts = [task.prompt(length, depth, trial) for trial in range(n)]
                        cell = measure(reader, prompts, vocabulary.detokenize, length, depth, n_recalling)
                    cells.append(cell)
                    figures[name] = policy_report(cells)
                    if is_new:
                        save({"command": command, "tokens": done, "window": facts, "policies": figures})
            say(f"{name}: {figures[name]['correct']} of {figures[name]['trials']} right")
    return {"command": command, "tokens": done, "window": facts, "policies": figures}


def answered(kept: Results, window: Results) -> dict[tuple[str, int, float], Cell]:
    """What an earlier run of the same has asked: by policy, length and depth. In another window nothing counts."""
    policies = kept.get("policies", {}) if kept.get("window") == window else {}
    found = [(name, cell) for name, policy in policies.items() for cell in policy["cells"]]
    return {
        (name, cell["length"], cell["depth"]): Cell(
            cell["length"],
            cell["depth"],
            cell["trials"],
            cell["correct"],
            round(cell["in_reach"] * cell["trials"]),
            cell["correct_in_reach"],
        )
        for name, cell in found
    }


def measure_recall_loss(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """The loss of a text as one stream, block by block, with more and more tokens recalled."""
    settings = experiment.settings
    ways: Results = {}
    for n_recall in settings["n_recall"]:
        config = LMInfConfig(n_global=N_GLOBAL, n_local=settings["window"] - N_GLOBAL, n_recall=n_recall)
        window = resolve(config, None, subject.n_train)
        begun = time.perf_counter()
        way: Results = {"texts": {}, "recall_distance": window.recall_distance if n_recall else None}
        policy = POLICIES["recall" if n_recall else "lminf"]
        with subject.setup(window, settings["kv_type"]).reader(policy, 0) as reader:
            for name, tokens in subject.texts_of(settings).items():
                figures, _ = curve(reader, tokens, min(settings["tokens"], len(tokens) - 1), settings["block"])
                way["texts"][name] = figures["block_nll"]
                reader.clear()
        ways[str(n_recall)] = way | {"seconds": round(time.perf_counter() - begun, 2)}
        say(f"{n_recall} recalled: {np.mean([np.mean(each) for each in way['texts'].values()]):.4f}")
    options = f"--tokens {settings['tokens'] + 1} --policies lminf,recall --recall R --bucket {settings['block']}"
    return {
        "command": ppl(subject, "text", window, settings["kv_type"], options),
        "window": window_facts(window),
        "ways": ways,
    }


def measure_ring(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """A stream much longer than its archive: what that takes, and what is recalled of it, further and further on.

    Each time the stream goes on with a text that it has not read, with and without recall, and with prompts that tell
    something once and ask for it at their end: candidates are all tokens that the archive has.
    """
    settings, n_text = experiment.settings, experiment.settings["text"]
    recall = {"n_recall": settings["n_recall"], "n_archive": settings["n_archive"]}
    config = LMInfConfig(n_global=N_GLOBAL, n_local=settings["window"] - N_GLOBAL, **recall)
    window = resolve(config, None, subject.n_train)
    stream = np.concatenate([*subject.texts.values()])
    stream, text = stream[:-n_text], stream[-n_text:]
    batches = [text[i : i + N_BATCH + 1] for i in range(0, n_text - 1, N_BATCH)]
    asked = list(itertools.product(settings["depths"], range(settings["trials"])))
    with contextlib.closing(load(subject.path, vocab_only=True)) as vocabulary:
        task = Prompts(vocabulary, settings["task"], subject.prose)
        prompts = [task.prompt(settings["length"], depth, trial) for depth, trial in asked]
        ends: list[Results] = []
        done, begun = 0, time.perf_counter()
        with subject.setup(window, settings["kv_type"]).reader(POLICIES["recall"], 0) as reader:
            assert isinstance(reader, LambdaReader)
            sequence = reader.llm.slot.sequence
            for end in settings["ends"]:
                sequence.set_recall(0)
                sums, n_read = 0.0, done
                for start, nll in nll_blocks(reader, stream, end + 1, subject.n_bos, n_read):
                    sums += float(nll.sum())
                    done = start + len(nll)
                info, checkpoint = stream_info(reader), reader.llm.checkpoint()
                mean = round(sums / (done - n_read), 5)
                losses = {}
                for n in (0, settings["n_recall"]):
                    sequence.set_recall(n)
                    read = [nll_from_logits(reader.read(batch[:-1]), batch[1:]) for batch in batches]
                    losses[str(n)] = round(float(np.concatenate(read).mean()), 5)
                    reader.restore(checkpoint)
                correct = 0
                for prompt in prompts:
                    following = Prompt(prompt.tokens[subject.n_bos :], prompt.wanted)
                    said = answer_next(reader, following, vocabulary.detokenize, settings["n_recalling"])
                    correct += sum(right_answers(said, prompt.wanted))
                    reader.restore(checkpoint)
                ends.append({
                    "tokens": done, "mean_nll": mean, "text_nll": losses, "correct": correct, "trials": len(prompts),
                    "n_archived": info.archived, "archive_bytes": info.archive_bytes, "kv_bytes": info.kv_bytes,
                    "resident_bytes": resident_bytes(), "seconds": round(time.perf_counter() - begun, 1),
                })  # fmt: skip
                say(f"{done} tokens: {correct} of {len(prompts)} right, {losses}, {info.archive_bytes >> 20} MiB")
                results = {"window": window_facts(window), "tokens": done, "ends": ends}
                save(results)
    options = f"--tokens {done + 1} --repeat --policies recall --recall {window.n_recall}"
    archive = f"--archive-tokens {settings['n_archive']}"
    return results | {"command": ppl(subject, "texts", window, settings["kv_type"], f"{options} {archive}")}


def measure_generation(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """Text that the model writes far beyond its window, with penalties: whether it repeats itself, and its loss.

    Each seed goes on from another place of the texts. The judge is the same for all policies: the model with full
    attention over prompt and text together, which fit the training length. The novels themselves are judged as well.
    """
    settings = experiment.settings
    window, n_prompt, n_all = subject.window_of(settings), settings["prompt"], settings["prompt"] + settings["tokens"]
    setup = subject.setup(window, settings["kv_type"])
    texts = [*subject.texts_of(settings).values()]
    prompts = [texts[seed % len(texts)][at : at + n_all] for seed in range(settings["seeds"])
               for at in [settings["place"] * (1 + seed // len(texts))]]  # fmt: skip
    written: dict[str, list[Tokens]] = {"text": prompts}
    begun = time.perf_counter()
    for name in settings["policies"]:
        with setup.reader(POLICIES[name], n_all) as reader:
            written[name] = []
            for seed, prompt in enumerate(prompts):
                written[name].append(write_on(reader, prompt[:n_prompt], n_all, seed, settings["sampling"]))
                say(f"{name}, seed {seed}: {time.perf_counter() - begun:.0f} s")
    policies: Results = {name: {"nll": [], "distinct": []} for name in written}
    with setup.reader(POLICIES["full"], n_all) as reader:
        for name, streams in written.items():
            for stream in streams:
                nll = token_nll(reader, stream)[window.size - 1 :]
                far = stream[window.size :]
                policies[name]["nll"].append(block_means(nll, settings["block"]))
                policies[name]["distinct"].append(
                    [round(distinct(far[at : at + settings["block"]]), 4)
                     for at in range(0, len(far) - settings["block"] + 1, settings["block"])]
                )  # fmt: skip
                policies[name].setdefault("distinct_all", []).append(round(distinct(far), 4))
            say(f"{name}: {np.mean(policies[name]['nll']):.3f} nats, {np.mean(policies[name]['distinct_all']):.3f} new")
    options = f"--only {experiment.name} --model {subject.argument}"
    return {
        "command": f".venv/bin/python benchmarks/evidence.py --text texts.txt {options}",
        "window": window_facts(window),
        "policies": policies,
    }


def write_on(reader: Reader, prompt: Tokens, n_tokens: int, seed: int, sampling: Results) -> Tokens:
    """A stream of n_tokens that begins with the prompt; the text never ends."""
    from llama_cpp import llama_cpp as bindings

    reader.clear()
    for start in range(0, len(prompt), reader.n_batch):
        logits = reader.read(prompt[start : start + reader.n_batch], logits_all=False)
    vocabulary = reader.llm._model.vocab
    never = {token: -np.inf for token in range(reader.n_vocab) if bindings.llama_vocab_is_control(vocabulary, token)}
    params = SamplingParams(seed=seed, logit_bias=never, **sampling)
    with contextlib.closing(make_sampler(params, reader.llm._model, reader.n_batch, previous=prompt)) as sampler:
        stream = [*prompt.tolist(), sampler.draw(logits[-1])]
        while len(stream) < n_tokens:
            stream.append(sampler.draw(reader.read(as_tokens(stream[-1:]), logits_all=False)[-1]))
    return as_tokens(stream)


def distinct(tokens: Tokens, n: int = 4) -> float:
    """The share of n-grams that are different ones."""
    grams = {tuple(tokens[at : at + n].tolist()) for at in range(len(tokens) - n + 1)}
    return len(grams) / (len(tokens) - n + 1)


def measure_tail(subject: Subject, experiment: Experiment, save: Save) -> Results:
    """The loss of blocks of text after all that stands before them was processed, and after its tail alone.

    The sinks are always processed. What lies between them and the tail is skipped as the engine skips it.
    """
    settings = experiment.settings
    window = subject.window_of(settings)
    tails: Results = {f"{settings['n_contrast']} tokens": settings["n_contrast"]}
    tails.update({f"{n} window{'s' * (n > 1)}": n * window.n_local for n in settings["n_tail"]})
    figures: dict[str, Results] = {
        name: {"n_tail": n, "texts": {}, "seconds": 0.0} for name, n in {"everything": None, **tails}.items()
    }
    with subject.setup(window, settings["kv_type"]).reader(POLICIES["lminf"], 0) as reader:
        assert isinstance(reader, LambdaReader)
        for name, tokens in subject.texts.items():
            fit = [at for at in settings["places"] if at + settings["block"] <= len(tokens)]
            if not fit:
                raise CommandError(f"{name} has {len(tokens)} tokens, and the first place is {settings['places'][0]}.")
            for way in figures.values():
                begun = time.perf_counter()
                reader.clear()
                losses = [block_after(reader, tokens, at, settings["block"], way["n_tail"]) for at in fit]
                way["seconds"] = round(way["seconds"] + time.perf_counter() - begun, 2)
                way["texts"][name] = losses
            say(f"{name}: " + ", ".join(f"{key} {np.mean(way['texts'][name]):.4f}" for key, way in figures.items()))
    options = f"--only {experiment.name}" + (f" --model {subject.argument}" if subject.name not in EMBEDDED else "")
    return {
        "command": f".venv/bin/python benchmarks/evidence.py --text text.txt {options}",
        "window": window_facts(window),
        "ways": figures,
    }


def block_after(reader: LambdaReader, tokens: Tokens, place: int, block: int, n_tail: int | None) -> float:
    """Mean loss of the tokens place .. place + block - 1 of a text.

    Before them the n_tail tokens and the sinks were processed in a stream of their own; with None everything was, in
    the stream that the reader is in.
    """
    if n_tail is not None:
        n_sinks = reader.llm.scheduler.window.n_global
        reader.clear()
        read_until(reader, tokens, n_sinks)
        reader.skip(tokens[n_sinks : place - n_tail])
    read_until(reader, tokens, place - 1)  # that token's logits are the first that count
    logits = reader.read(tokens[place - 1 : place - 1 + block])
    return round(float(nll_from_logits(logits, tokens[place : place + block]).mean()), 6)


def read_until(reader: Reader, tokens: Tokens, end: int) -> None:
    """Reads the tokens before `end` that the stream has not had."""
    while reader.position < end:
        reader.read(tokens[reader.position : min(reader.position + reader.n_batch, end)], logits_all=False)


def experiments(
    models: Sequence[str], size: Size, f16: str | None, full_tokens: int | None, folder: Path
) -> list[Experiment]:
    """All of them, the longest last. The first model is the one that most of them are measured on."""
    main, names = models[0], [Path(model).stem for model in models]
    n_bytes = {model: Path(model_header(model)[0]).stat().st_size for model in models}
    smallest = min(models, key=n_bytes.__getitem__)
    made: list[Experiment] = []

    def add(name: str, model: str, run: Callable[[Subject, Experiment, Save], Results], **settings: Any) -> None:
        made.append(Experiment(name, model, run, settings, size, folder))

    n_train = model_header(main)[1].n_ctx_train
    default = n_train // 2 - N_GLOBAL
    sweep: Results = {"tokens": size.n_sweep, "start": size.far_sweep}
    add("sweep-global", main, measure_sweep, swept=["--n-global", "G"], **sweep, fresh=False, variants=[
        {"name": f"G = {n}", "n_global": n, "n_local": default} for n in (0, 1, 4, 10, 32, 100)
    ])  # fmt: skip
    locals_ = sorted({*(n_train * eighths // 8 for eighths in (1, 2, 4, 6, 8)), default, n_train - N_GLOBAL})
    add("sweep-local", main, measure_sweep, swept=["--n-local", "L"], **sweep, fresh=False, variants=[
        {"name": f"L = {n}", "n_local": n} for n in locals_
    ])  # fmt: skip
    add("sweep-distance", main, measure_sweep, swept=["--max-distance", "D"], **sweep, fresh=False, variants=[
        {"name": f"L = {n}, D = {distance}", "n_local": n, "max_distance": distance}
        for n in (default, n_train - N_GLOBAL) for distance in (n // 2, n, 2 * n)
    ])  # fmt: skip
    add("sweep-kv", main, measure_sweep, swept=["--kv-type", "TYPE"], **sweep, fresh=True, variants=[
        {"name": kv_type, "kv_type": kv_type} for kv_type in ("f32", "f16", "q8_0", "q4_0")
    ])  # fmt: skip
    if f16:
        add("sweep-weights", f16, measure_weights, swept=["-m", "FILE"], **sweep, fresh=True, variants=[
            {"name": file_type, "weights": file_type} for file_type in WEIGHTS
        ])  # fmt: skip
    for kv_type in ("f32", "f16"):
        add(f"kl-{kv_type}", main, measure_divergence, kv_type=kv_type, stretches=size.n_stretches)
    asked = {"lengths": list(size.lengths), "depths": list(size.depths), "trials": size.n_trials}
    add("passkey", main, measure_answers, **asked, policies=list(WITHOUT_RECALL), n_global=N_GLOBAL)
    # as many as hold a key that is told at once
    add("passkey-sinks", main, measure_answers, **asked, policies=["lminf"], n_global=n_train // 8)
    for model, name in zip(models, names, strict=True):
        if n_bytes[model] > LARGE:
            made += real_experiments(model, name, size, REAL_WINDOWS, 1 if n_bytes[model] < 2 * LARGE else 4)
            continue
        for kv_type in ("f16", "q8_0"):
            add(
                f"loss-{name}-{kv_type}", model, measure_loss, kv_type=kv_type, tokens=size.n_loss,
                start=size.far_loss, block=size.block, full_tokens=full_tokens, full_minutes=size.full_minutes,
            )  # fmt: skip
    for model, name in zip(models, names, strict=True):
        n_octaves = size.n_octaves // 2 if n_bytes[model] > LARGE else size.n_octaves
        for window in (TAIL_WINDOW // 2, TAIL_WINDOW):
            if window <= model_header(model)[1].n_ctx_train:
                add(
                    f"tail-{name}-{window}", model, measure_tail, kv_type="f16", window=window, block=size.tail_block,
                    places=places(size, n_octaves), n_tail=[1, 2, 3], n_contrast=64,
                )  # fmt: skip
    for model, name in zip(models, names, strict=True):
        is_large, half = n_bytes[model] > LARGE, model_header(model)[1].n_ctx_train // 2
        if model in EMBEDDED[1:] or not (is_large or model == main):
            continue  # what the smallest ones were not trained to answer
        windows = (TAIL_WINDOW, 2 * TAIL_WINDOW) if is_large else (half,)
        depths = list(size.recall_depths[: -1 if is_large else None])
        for task in ("facts", "chat") if is_large else ("prose",):
            for window in windows:
                recalled: Results = {
                    "kv_type": "f16", "task": task, "window": window, "n_recall": 32, "depths": depths,
                    "ceiling": window - MAX_ANSWER, "n_ceiling": size.n_ceiling_trials,
                }  # fmt: skip
                add(
                    f"recall-{name}-{task}-{window}", model, measure_answers, **recalled,
                    lengths=list(size.recall_lengths_large if is_large else size.recall_lengths),
                    trials=size.n_recall_trials, n_without=1,
                    # full attention does not depend on the window
                    policies=["ceiling", "lminf", "recall", *(["full"] if is_large and window == TAIL_WINDOW else [])],
                )  # fmt: skip
                # long texts are only read: what each micro-batch of them would recall takes several times as long
                add(
                    f"recall-{name}-{task}-{window}-long", model, measure_answers, **recalled,
                    lengths=list(size.recall_lengths_large_long if is_large else size.recall_lengths_long),
                    trials=max(1, size.n_recall_trials >> is_large), n_recalling=size.n_recalling,
                    policies=["ceiling", "recall"],
                )  # fmt: skip
        window = windows[0]
        add(
            f"recall-loss-{name}-{window}", model, measure_recall_loss, kv_type="f16", window=window,
            tokens=size.n_recall_loss >> is_large, start=size.recall_loss_start, block=size.tail_block,
            n_recall=[0, 8, 32, 64, 256], **({"n_texts": 1} if is_large else {}),
        )  # fmt: skip
    add(
        f"ring-{Path(main).stem}-{n_train // 2}", main, measure_ring, kv_type="f16", task="prose", window=n_train // 2,
        n_recall=32, n_archive=size.n_ring, ends=[size.n_ring * n for n in size.ring_ends], text=size.n_recall_loss,
        length=size.ring_length, depths=list(size.ring_depths), trials=size.n_ring_trials,
        n_recalling=size.n_recalling,
    )  # fmt: skip
    stream = {"kv_type": "f16", "start": 10_000}
    add("stream", main, measure_stream, **stream, tokens=size.n_stream, block=size.stream_block)
    longest = {"tokens": size.n_longest, "block": size.longest_block}
    add(f"longest-{Path(smallest).stem}", smallest, measure_stream, **stream, **longest)
    return made


def real_experiments(model: str, name: str, size: Size, windows: tuple[int, int], share: int) -> list[Experiment]:
    """What is measured of a real model: a window that is far from its training length, and one that is near to it.

    share   a model that is slow reads so much less
    """
    made: list[Experiment] = []

    def add(experiment: str, run: Callable[[Subject, Experiment, Save], Results], **settings: Any) -> None:
        made.append(Experiment(experiment, model, run, settings, size, WEIGHTS_FOLDER))

    small, large = windows
    n_train = model_header(model)[1].n_ctx_train
    n_far, n_near, n_sweep = (n // share for n in (size.n_real, size.n_real_others, size.n_real_sweep))
    n_full = min(2 * n_train, n_near)
    once = ["full", "sinks-uncapped"]  # what breaks is seen to break on one text
    others = ["window", "sinks", "shift"] if share == 1 else ["window", "sinks"]
    block = size.block if share == 1 else size.tail_block
    one: Results = {"block": block, "n_texts": 1}
    broken = {"full": n_full} if share > 1 else {"sinks-uncapped": n_near, "full": n_full}
    add(f"loss-{name}-{small}-f16", measure_loss, kv_type="f16", window=small, tokens=n_near, start=n_near // 2,
        read={"lminf": n_near, **dict.fromkeys(others, n_near), **broken}, once=once, fresh=[], block=block,
        n_texts=2 if share == 1 else 1)  # fmt: skip
    add(f"far-{name}-{small}-f16", measure_loss, kv_type="f16", window=small, tokens=n_far, start=n_far // 2,
        read={"lminf": n_far}, fresh=["lminf"], **one)  # fmt: skip
    add(f"loss-{name}-{small}-q8_0", measure_loss, kv_type="q8_0", window=small, tokens=n_near // 2, start=n_near // 4,
        read={"lminf": n_near // 2}, fresh=[], **one)  # fmt: skip
    add(f"loss-{name}-{large}-f16", measure_loss, kv_type="f16", window=large, tokens=n_near // 2, start=n_near // 4,
        read=dict.fromkeys(["lminf", *others], n_near // 2), fresh=[], **one)  # fmt: skip
    sweep: Results = {"window": small, "tokens": n_sweep, "start": n_sweep // 2, "n_texts": 1,
                      "block": size.tail_block, "fresh": False}  # fmt: skip
    n_local = small - N_GLOBAL
    add(f"sweep-global-{name}", measure_sweep, swept=["--n-global", "G"], **sweep, variants=[
        {"name": f"G = {n}", "n_global": n, "n_local": n_local} for n in (0, 1, 4, 10, 32)
    ])  # fmt: skip
    add(f"sweep-local-{name}", measure_sweep, swept=["--n-local", "L"], **sweep, variants=[
        {"name": f"L = {n - N_GLOBAL}", "n_local": n - N_GLOBAL}
        for n in (small // 4, small // 2, small, 2 * small, 4 * small)
    ])  # fmt: skip
    add(f"sweep-distance-{name}", measure_sweep, swept=["--max-distance", "D"], **sweep, variants=[
        {"name": f"D = {n}", "n_local": n_local, "max_distance": n}
        for n in (n_local // 2, n_local, 2 * n_local, n_train // 2, 2 * n_train)
    ])  # fmt: skip
    add(f"generation-{name}", measure_generation, kv_type="f16", window=small, policies=["shift", "lminf"],
        prompt=small // 2, tokens=size.n_written + small // 2, block=size.block, seeds=size.n_seeds // share,
        place=size.place, sampling={"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.1})  # fmt: skip
    add(f"stream-{name}", measure_stream, kv_type="f16", window=small, part=size.real_part,
        block=size.real_block, tokens=size.n_real_stream // share, start=size.far_loss)  # fmt: skip
    return made


def places(size: Size, n_octaves: int) -> list[int]:
    """Positions of blocks: as many in each octave from size.first_place on."""
    n = size.places_per_octave
    return [(size.first_place << octave) * (n + i) // n for octave in range(n_octaves) for i in range(n)]


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, record: Results) -> None:
    """Atomically, with lists of numbers on one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def perform(experiment: Experiment, subject: Subject, texts: dict[str, str], out: Path, again: bool) -> None:
    """Measures one experiment and writes its file; of a long stream that is interrupted, what was reached.

    What cannot be measured with this model has a file that says why.
    """
    path = out / f"{experiment.name}.json"
    inputs = {
        "model": subject.facts,
        "texts": {name: text_facts(text, subject.texts[name]) for name, text in texts.items()},
        "settings": experiment.settings,
    }
    inputs = json.loads(json.dumps(inputs))  # as it is read again: lists for tuples
    print(f"{experiment.name}, {subject.name}", flush=True)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not again else {}
    same = all(kept.get(name) == inputs[name] for name in inputs)
    if same and kept["complete"]:
        say("measured before")
        return
    folder = native.library_folder()
    assert folder is not None
    machine = describe(folder, folder)
    begun = time.monotonic()

    def record(results: Results, complete: bool) -> None:
        # what an earlier run has reached of a long stream is only replaced by more of it
        if same and not complete and results["tokens"] <= kept["tokens"]:
            return
        # a stream may have gone on from an earlier run
        seconds = max(round(time.monotonic() - begun, 1), results.get("seconds_stream", 0.0))
        head = {"experiment": experiment.name, "complete": complete, "seconds": seconds, "n_threads": subject.n_threads}
        write(path, {**head, **inputs, **results, "machine": machine})

    try:
        going = STREAMS_FOLDER / experiment.name
        save = Save(lambda reached: record(reached, complete=False), kept if same else {}, going, inputs)
        if again:
            save.finished()
        results = experiment.run(subject, experiment, save)
    except (CommandError, UserError) as error:  # such a thing as a cache of this type cannot be had for this model
        results = {"refused": str(error)}
        say(f"not measured: {error}")
    record(results, complete=True)
    save.finished()
    say(f"took {time.monotonic() - begun:.0f} s")


def read_texts(files: Sequence[str], tiny: bool) -> dict[str, str]:
    """By name. Raises CommandError."""
    if not files and tiny:
        return {"python-documentation": python_documentation()}
    texts = {Path(file).stem: read_text(file) for file in files}
    if len(texts) < len(files):
        raise CommandError("Two texts have the same name: their figures could not be told apart.")
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", metavar="FILE", nargs="+", action="extend", default=[], help="held-out books, UTF-8")
    parser.add_argument("--only", metavar="NAME", action="append", help="an experiment, or how the names of some begin")
    parser.add_argument(
        "--model", metavar="GGUF", action="append", default=[], help="one more, for loss, tail and longest"
    )
    parser.add_argument("--f16", metavar="GGUF", help=f"{MAIN} with f16 weights, for sweep-weights")
    parser.add_argument(
        "--full-tokens", metavar="N", type=int, help="full attention stops there; default: by its speed"
    )
    parser.add_argument("--full-minutes", metavar="T", type=float, help="and takes no longer than this for each text")
    parser.add_argument("--longest", metavar="N", type=int, help="tokens of the longest stream; default 200 million")
    parser.add_argument("--threads", metavar="N", type=int, default=2, help="default 2")
    parser.add_argument("--weights", metavar="DIR", type=Path, default=WEIGHTS_FOLDER, help="for quantized models")
    parser.add_argument("--out", metavar="DIR", type=Path, default=FIGURES, help="default docs/results")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--tiny", action="store_true", help="a few thousand tokens, to see that it works")
    parser.add_argument("--list", action="store_true", help="print the names of the experiments, and do nothing")
    args = parser.parse_args()
    if args.tiny and args.out == FIGURES:
        parser.error("--tiny needs --out: its figures say nothing")
    if not args.text and not args.tiny and not args.list:
        parser.error("give the books to be read: --text FILE...")
    size = TINY if args.tiny else Size()
    size = dataclasses.replace(
        size, full_minutes=args.full_minutes or size.full_minutes, n_longest=args.longest or size.n_longest
    )
    try:
        native.load()
        missing = [name for name in EMBEDDED if name not in embedded_models()]
        if missing:
            print(f"not measured, as there is no such model: {', '.join(missing)}")
        models = [name for name in EMBEDDED if name not in missing] + args.model
        made = experiments(models, size, args.f16, args.full_tokens, args.weights)
        names = [experiment.name for experiment in made]
        if not args.f16:
            print("not measured without --f16: sweep-weights")
        for prefix in args.only or ():
            if not any(name.startswith(prefix) for name in names):
                parser.error(f"there is no experiment {prefix}: {', '.join(names)}")
        chosen = [e for e in made if not args.only or e.name.startswith(tuple(args.only))]
        if args.list:
            print("\n".join(experiment.name for experiment in chosen))
            return 0
        texts = read_texts(args.text, args.tiny)
        args.out.mkdir(parents=True, exist_ok=True)
        subjects: dict[str, Subject] = {}
        for experiment in chosen:
            if experiment.model not in subjects:
                subjects[experiment.model] = subject_of(experiment.model, texts, size.n_text, args.threads)
            perform(experiment, subjects[experiment.model], texts, args.out, args.again)
    except KeyboardInterrupt:
        print("stopped: what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except (CommandError, ValueError, RuntimeError, MemoryError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
