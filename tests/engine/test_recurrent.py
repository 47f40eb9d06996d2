"""Purely recurrent models need no Λ cache: lminf=True, the command line and the server run them as they are.

What they share with hybrid models, streams that cannot go back, is tested with both.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from asking import assert_close, joined, run, submitted
from conftest import F32, TEXT
from reference import models, more_models
from reference.random_model import N_EMBD
from reference.tiny_models import tokens as tiny_tokens
from served import serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.sequence import ConstantSequence
from lminf_edge.cli import main
from lminf_edge.config import Parts
from lminf_edge.engine import scheduler
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.evaluate import token_nll

# of two layers, in f32: the last inputs of a convolution and a state; the last two tokens and a state of each head
STATE_BYTES = {
    "mamba": 2 * 4 * more_models.N_INNER * (3 + more_models.N_STATE),
    "rwkv7": 2 * 4 * (2 * N_EMBD + N_EMBD * N_EMBD),
}
NOTE = "needs no Λ cache and runs as it is"
ONE_THREAD: dict[str, Any] = {**F32, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}

Make = Callable[..., Llama]


@pytest.fixture(params=list(more_models.CONSTANT))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(name: str, tmp_path: Path) -> str:
    return str(models.write(name, tmp_path))


@pytest.fixture
def make(path: str) -> Iterator[Make]:
    made: list[Llama] = []

    def make(**kwargs: Any) -> Llama:
        made.append(Llama(path, **{"lminf": True, "verbose": False, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def test_it_computes_what_llama_cpp_computes(make: Make, path: str, name: str) -> None:
    ids = tiny_tokens(1000).tolist()
    stock = Llama(path, n_ctx=1024, verbose=False)
    expected = token_nll(stock, ids)
    stock.close()
    llm = make()
    np.testing.assert_array_equal(token_nll(llm, ids), expected)
    info = llm.stream_info()
    assert (info.position, info.evicted, info.rebases, info.attention) == (999, 0, 0, None)
    assert info.kv_bytes == STATE_BYTES[name]
    assert info.parts == Parts(0, 0, 2, 0, 0, 0, 0, STATE_BYTES[name])


def test_the_stream_has_no_end(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny_tokens(600)
    expected = token_nll(make(), ids.tolist())
    monkeypatch.setattr(ConstantSequence, "POS_BOUND", 150)  # llama.cpp's positions are moved back at 2^30 otherwise
    llm = make(n_batch=64)
    np.testing.assert_allclose(token_nll(llm, ids.tolist()), expected, atol=1e-4)  # other batches
    info = llm.stream_info()
    assert (info.position, info.max_graph_position) == (599, 149)
    assert info.rebases >= 599 // 150
    # and a state carries it on
    checkpoint = llm.checkpoint()
    llm.eval([5, 6, 7])
    expected_logits = llm.scores[-1].copy()
    other = make(n_batch=64)
    other.restore(checkpoint)
    assert other.stream_info().position == 599
    other.eval([5, 6, 7])
    np.testing.assert_array_equal(other.scores[-1], expected_logits)
    assert other.stream_info().position == 602


def test_positions_far_beyond_32_bits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConstantSequence, "POS_BOUND", 100)
    llm = make()
    llm.slot.sequence.begin_at(1 << 40)
    llm.slot.n_dropped = 1 << 40  # as if as many tokens had come and gone
    llm.eval(tiny_tokens(500))
    assert llm.stream_info().position == (1 << 40) + 500
    assert llm.stream_info().max_graph_position < 100


def test_what_cannot_go_back_is_read_again(make: Make) -> None:
    ids = tiny_tokens(80)
    llm = make()
    llm.eval(ids)
    llm.n_tokens = 70  # no 10 tokens can be taken back
    llm.eval([9])
    other = make()
    other.eval(ids[:70])
    other.eval([9])
    np.testing.assert_allclose(llm.scores[-1], other.scores[-1], atol=1e-4)
    assert llm.stream_info().position == 71


def test_a_prompt_that_diverges_starts_at_a_checkpoint(make: Make) -> None:
    ids, llm = tiny_tokens(200).tolist(), make()
    first = llm.create_completion(ids, max_tokens=8, **GREEDY)
    assert llm.reach(np.array([*ids, 7, 8], dtype=np.int32)) == 199  # the end of the prompt, not of the answer
    again = llm.create_completion(ids, max_tokens=8, **GREEDY)
    assert again["choices"] == first["choices"]  # type: ignore[index]
    longer = [*ids, 7, 8, 9]
    got = llm.create_completion(longer, max_tokens=8, **GREEDY)
    expected = make().create_completion(longer, max_tokens=8, **GREEDY)
    assert got["choices"] == expected["choices"]  # type: ignore[index]


def test_a_stream_goes_on_in_another_process_s_folder(make: Make, tmp_path: Path) -> None:
    ids, folder = tiny_tokens(100).tolist(), tmp_path / "kept"
    llm = make(checkpoint_folder=folder)
    llm.eval(ids)
    llm.close()
    other = make(checkpoint_folder=folder)
    assert other.reach(np.array([*ids, 3, 4], dtype=np.int32)) == 100
    # whatever window is asked for: it has none
    another = make(lminf=LMInfConfig(n_global=2, n_local=50), checkpoint_folder=tmp_path / "else")
    assert another._lminf is not None
    assert other._lminf is not None
    assert another._lminf.identity == other._lminf.identity


# --- the engine -------------------------------------------------------------------------------------------------------


# streams that cannot go back, with attention between recurrent layers and without
with_hybrids = pytest.mark.parametrize("name", [*more_models.CONSTANT, "jamba", "qwen35", "lfm2"], indirect=True)


@pytest.fixture
def engine(path: str, name: str, tmp_path: Path) -> Iterator[Engine]:
    config = LMInfConfig(prefill="tail" if name in more_models.CONSTANT else "full")  # there, tail skips nothing
    engine = load_engine(path, parallel=2, lminf=config, folder=tmp_path, **ONE_THREAD)
    yield engine
    engine.close()
    engine.model.close()


def expected(make: Make, tokens: Sequence[int]) -> Any:
    llm = make(**ONE_THREAD)
    llm.eval(tokens)
    return llm.scores[-1]


@with_hybrids
def test_a_conversation_goes_on_where_it_ended(engine: Engine, make: Make) -> None:
    history = tiny_tokens(1000).tolist()  # many windows
    for i in range(4):
        stats, answer, first = run(engine, history, 10)
        assert stats.n_skipped == 0
        assert stats.n_cached == (0 if i == 0 else len(history) - 3)
        assert_close(first, expected(make, history))
        history += [*answer, 5, 6, 7 + i]
    # a client that stops, for a stop string or because it leaves, leaves nothing that would have to be taken back
    assert engine.counters.wasted_tokens == 0
    assert engine.counters.failed == 0


@with_hybrids
def test_regenerate_and_edit_start_at_checkpoints(engine: Engine, make: Make) -> None:
    messages = [tiny_tokens(90, seed).tolist() for seed in range(6)]
    starts = list(range(90, 540, 90))
    prompt = joined(messages)
    run(engine, prompt, 20, boundaries=starts)
    stats, _, first = run(engine, prompt, 5, boundaries=starts)
    assert (stats.n_cached, stats.n_prefilled) == (539, 1)
    assert_close(first, expected(make, prompt))
    for k in (5, 3):
        edited = [*joined(messages[:k]), 9, 8, 7]
        stats, _, first = run(engine, edited, 0, boundaries=starts[:k])
        assert stats.n_cached == 90 * k
        assert_close(first, expected(make, edited))


@pytest.mark.parametrize("name", ["gemma3", "gemma4"], indirect=True)
def test_so_do_they_where_the_sliding_windows_are_full_and_the_window_is_not(
    path: str, make: Make, tmp_path: Path
) -> None:
    """Windows of 24 tokens beside one of 1000: what can be rolled back is what the smaller ones have kept."""
    config = LMInfConfig(n_global=4, n_local=1000, n_slack=8)
    with pytest.warns(UserWarning, match="longer"):
        engine = load_engine(path, parallel=1, lminf=config, folder=tmp_path, n_ubatch=16, **ONE_THREAD)
    prompt, starts = tiny_tokens(700).tolist(), [300, 500]
    run(engine, prompt, 150, boundaries=starts)
    stats, _, first = run(engine, prompt, 5, boundaries=starts)
    assert (stats.n_cached, stats.n_prefilled) == (699, 1)
    edited = [*prompt[:500], 9, 8, 7]
    stats, _, edited_first = run(engine, edited, 0, boundaries=starts)
    assert stats.n_cached == 500
    for tokens, got in ((prompt, first), (edited, edited_first)):
        with pytest.warns(UserWarning, match="longer"):
            assert_close(got, expected(lambda **kwargs: make(**kwargs, lminf=config), tokens))
    engine.close()
    engine.model.close()


@with_hybrids
def test_conversations_take_turns(engine: Engine, make: Make) -> None:
    prompts = [tiny_tokens(60 + 10 * i, seed=i).tolist() for i in range(4)]  # in two slots
    requests = [submitted(engine, prompt, wants_logits=True) for prompt in prompts]
    for prompt, request in zip(prompts, requests, strict=True):
        with contextlib.closing(engine.stream(request)) as outputs:
            first = next(outputs)
            assert_close(first.logits, expected(make, prompt))
            assert [next(outputs).token for _ in range(5)]
    for prompt in prompts:
        stats, _, first = run(engine, [*prompt, 3], 3)
        assert stats.n_cached >= len(prompt) - 1
        assert_close(first, expected(make, [*prompt, 3]))


@with_hybrids
def test_what_was_skipped_is_read_in_the_background(
    path: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing is skipped there is nothing to read, and a context has a sequence too many."""
    monkeypatch.setattr(scheduler, "READ_AFTER", 0.02)
    config = LMInfConfig(n_global=4, n_local=40, n_recall=8, prefill="tail")
    ids = tiny_tokens(900).tolist()
    more = [*ids, *tiny_tokens(60, 1).tolist()]
    logits = []
    for folder, how in (("a", config), ("b", replace(config, prefill="full"))):
        engine = load_engine(path, parallel=2, lminf=how, folder=tmp_path / folder, **ONE_THREAD)
        stats, _, _ = run(engine, ids, boundaries=[300, 600])
        assert len(engine.slots) == 2
        assert (stats.n_unread > 0) == (how is config and name not in more_models.CONSTANT)
        end = time.monotonic() + 60
        while engine.scheduler.reading is not None:
            assert time.monotonic() < end
            time.sleep(0.01)
        stats, _, first = run(engine, more)
        assert (stats.n_cached, stats.n_skipped) == (900, 0)
        logits.append(first)
        stats, _, first = run(engine, [*ids[:600], 9, 8])  # there is a checkpoint
        assert stats.n_cached == 600
        logits.append(first)
        engine.close()
        engine.model.close()
    assert_close(logits[0], logits[2])
    assert_close(logits[1], logits[3])


# --- commands and the server ------------------------------------------------------------------------------------------


def test_commands_run_it_and_say_so_in_one_sentence(
    path: str, name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2)

    def run_json(*arguments: str) -> Any:
        assert main([*arguments, "-m", path, "--json"]) == 0
        output = capfd.readouterr()
        notes = output.err.splitlines()
        assert [line for line in notes if line.startswith("note: ")] == notes[:1]
        if arguments[0] != "info":
            assert f"'{name}'" in notes[0]
            assert NOTE in notes[0]
        return json.loads(output.out)

    info = run_json("info")
    assert (info["supported"], info["needs_lambda"], info["attention"]) == (True, False, None)
    assert info["layers"] == {"full": 0, "sliding": 0, "recurrent": 2}
    assert info["constant_kv_bytes"] == info["stock_kv_bytes"] == STATE_BYTES[name]
    assert info["window"] is info["recommended"] is info["kv_bytes_per_token"] is None
    generated = run_json("generate", "-p", "the ferry", "-n", "300", "--ignore-eos")  # more than it was trained on
    assert generated["stream"]["kv_bytes"] == STATE_BYTES[name]
    assert generated["stream"]["position"] > 300
    alone = run_json("ppl", "-f", str(text))
    policies = run_json("ppl", "-f", str(text), "--policies", "full,lminf", "--n-local", "90")["policies"]
    for policy in policies.values():
        assert policy["mean_nll"] == pytest.approx(alone["mean_nll"], abs=1e-5)
    found = run_json("passkey", "--trials", "1", "--lengths", "400", "--depths", "50", "--n-local", "100")
    assert found["policies"]["lminf"]["cells"][0]["in_reach"] == 1
    measured = run_json("bench", "--rounds", "1", "--n-prompt", "16", "--n-gen", "4")
    assert [result["label"] for result in measured["results"]] == ["pp16", "tg4"]
    assert {result["kv_bytes"] for result in measured["results"]} == {STATE_BYTES[name]}
    assert run_json("chat", "-p", "who is there", "-n", "5")["window"] is None


@pytest.mark.parametrize("policy", ["shift", "window", "sinks", "sinks-uncapped"])
def test_policies_that_limit_attention_are_refused(
    path: str, policy: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(["ppl", "-m", path, "-f", str(text), "--policies", policy]) == 1
    assert f"The policy {policy} cannot run: " in capfd.readouterr().err


def test_all_policies_are_those_that_there_are(path: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for command in (["ppl", "-f", str(text), "--n-local", "90"], ["passkey", "--lengths", "400", "--trials", "1"]):
        assert main([*command, "-m", path, "--policies", "all", "--json"]) == 0
        output = capfd.readouterr()
        assert list(json.loads(output.out)["policies"]) == ["full", "lminf"]
        notes = [line for line in output.err.splitlines() if line.startswith("note: Left out of all policies is ")]
        assert len(notes) == 5


def test_info_and_demo_in_words(path: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "-m", path]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert re.search(r"supported +yes, as it is: it needs no Λ cache\n", output.out)
    assert re.search(r"layers +2 recurrent: [0-9.]+ KiB\n", output.out)
    assert "recommended" not in output.out
    assert main(["demo", "-m", path]) == 1
    assert "There is nothing to compare." in capfd.readouterr().err


def test_the_server_serves_it(path: str, name: str) -> None:
    with serve(path, pin_system=True, max_sinks=64) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        props = client.get("/props").json()["lminf"]
        assert (props["window"], props["sink"], props["kv_bytes"]) == (None, 0, 2 * STATE_BYTES[name])
        assert props["parts"]["n_layer_recurrent"] == 2
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who is there"}]
        for i in range(2):
            asked = {"messages": messages, "max_tokens": 8, "temperature": 0, "stop": ["q"]}
            answer = client.post("/v1/chat/completions", json=asked).json()
            assert "warning" not in answer["lminf"]
            if i:  # all but the end of the template, which may be tokens of another kind
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > answer["usage"]["prompt_tokens"] / 2
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "and now"}]
        assert server.engine.counters.wasted_tokens == 0


def test_without_lminf_it_is_llama_cpp_s(path: str) -> None:
    llm = Llama(path, n_ctx=256, verbose=False)
    assert not llm.has_stream
    llm.close()
