"""How recall is asked for: in Python, on the command line, for one request; and where one sees it."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MakeEngine, MakeLlama
from served import Served, serve

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.cli.demo import python_documentation
from lminf_edge.cli.main import main
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request
from lminf_edge.evaluate.prompts import Prompt, Prompts
from lminf_edge.evaluate.reader import LambdaReader
from lminf_edge.server import Settings

N_RECALL = 32
WINDOW = LMInfConfig(n_global=10, n_local=246, n_recall=N_RECALL, n_archive=5000)
different = itertools.count()
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def prompt(nano_path: str) -> Prompt:
    """Tells a key far outside the window. With recall the model gives it, without recall it cannot."""
    vocabulary = Llama(nano_path, vocab_only=True, verbose=False)
    made = Prompts(vocabulary, "prose", python_documentation()).prompt(1500, 0.3, 0)
    vocabulary.close()
    return made


@pytest.fixture(scope="module")
def server(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, lminf=WINDOW) as served:
        yield served


def complete(served: Served, prompt: Prompt, **lminf: Any) -> httpx.Response:
    """Of a prompt that begins differently each time, so that nothing of it is cached."""
    tokens = prompt.tokens.copy()
    tokens[1] += next(different)
    body = {"prompt": tokens.tolist(), "n_predict": 8, "temperature": 0, "lminf": lminf}
    return httpx.post(f"{served.url}/completion", json=body, timeout=60)


# --- in Python --------------------------------------------------------------------------------------------------------


def test_the_stream_tells_what_can_be_recalled(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, n_recall=8, n_archive=2048))
    llm.eval(tokens[:100].tolist())
    info = llm.stream_info()
    assert (info.archived, info.forgotten) == (100, 0)
    assert info.archive_bytes > 0
    for start in range(100, 3000, 500):
        llm.eval(tokens[start : start + 500].tolist())
    full = llm.stream_info()
    assert full.archived + full.forgotten == full.position == 3000
    assert 1024 <= full.archived <= 2048
    assert full.archive_bytes <= 3 * info.archive_bytes  # a segment, and two of them with one being filled
    llm.reset()
    assert (llm.stream_info().archived, llm.stream_info().archive_bytes) == (0, 0)


def test_without_recall_nothing_is_archived(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens[:500].tolist())
    info = llm.stream_info()
    assert (info.archived, info.archive_bytes) == (0, 0)


def answer(engine: Engine, tokens: Tokens, **settings: Any) -> list[int]:
    request = Request(tokens, GREEDY, max_tokens=24, ignore_eog=True, **settings)
    engine.submit(request)
    return [output.token for output in engine.stream(request)]


def test_a_request_without_recall_is_answered_as_if_there_was_none(make_engine: MakeEngine, tokens: Tokens) -> None:
    window = {"n_global": 4, "n_local": 64}
    plain, recalling = make_engine(lminf=LMInfConfig(**window)), make_engine(lminf=LMInfConfig(**window, n_recall=16))
    expected = answer(plain, tokens[:600])
    assert answer(recalling, tokens[:600], n_recall=0) == expected
    # a choice of the request, not of the slot
    assert answer(recalling, tokens[1:601]) != answer(plain, tokens[1:601])
    assert answer(recalling, tokens[2:602], n_recall=0) == answer(plain, tokens[2:602])


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_a_request_can_switch_it_off(server: Served, prompt: Prompt) -> None:
    key = prompt.wanted[0].accepted[0]
    for lminf in ({}, {"recall": True}, {"recall": N_RECALL}):
        found = complete(server, prompt, **lminf).json()
        assert key in found["content"], lminf
        assert found["lminf"]["archived"] > 1400
    for lminf in ({"recall": False}, {"recall": 0}):
        assert key not in complete(server, prompt, **lminf).json()["content"], lminf


@pytest.mark.parametrize("recall", [N_RECALL + 1, -1, 1.5, "all"])
def test_more_than_there_is_room_for_is_refused(server: Served, prompt: Prompt, recall: Any) -> None:
    body = {"prompt": "The sea", "n_predict": 1, "lminf": {"recall": recall}}
    response = httpx.post(f"{server.url}/completion", json=body, timeout=60)
    assert response.status_code == 400
    assert "recall" in json.dumps(response.json()["error"])


def test_a_server_without_recall_takes_no_number(nano_path: str, prompt: Prompt) -> None:
    with serve(nano_path, lminf=LMInfConfig(n_global=4, n_local=64)) as served:
        assert httpx.get(f"{served.url}/props").json()["lminf"]["recall"] is None
        assert complete(served, prompt, recall=False).status_code == 200
        refused = complete(served, prompt, recall=5)
        assert refused.status_code == 400
        assert "recall must be 0 to 0" in refused.json()["error"]["message"]


def test_props_and_metrics_tell_it(server: Served, prompt: Prompt) -> None:
    recall = httpx.get(f"{server.url}/props").json()["lminf"]["recall"]
    assert (recall["n_recall"], recall["distance"], recall["archive_tokens"]) == (N_RECALL, WINDOW.n_local // 2, 5000)
    assert (recall["rule"], recall["index"], recall["archive_type_k"]) == ("layer", "sketch", "q8_0")
    token_bytes = recall["archive_bytes_per_token"]
    assert recall["archive_bytes_at_most"] == (token_bytes and 5000 * token_bytes)
    position = complete(server, prompt).json()["lminf"]["position"]
    values = dict(re.findall(r"^(lminf_\w+) ([\d.e+]+)$", httpx.get(f"{server.url}/metrics").text, re.M))
    assert float(values["lminf_archived_tokens"]) >= position
    assert float(values["lminf_archive_bytes"]) > 0


def test_what_is_read_in_the_background_is_told(nano_path: str, prompt: Prompt) -> None:
    with serve(nano_path, lminf=replace(WINDOW, prefill="tail"), parallel=2) as served:
        told = lambda: httpx.get(f"{served.url}/props").json()["lminf"]["recall"]["reading"]  # noqa: E731
        assert told() is None
        answered = complete(served, prompt).json()
        assert answered["lminf"]["unread"] == answered["lminf"]["skipped"] > 500
        reading = told()
        assert (reading["slot"], reading["n_tokens"]) == (answered["lminf"]["slot"], answered["lminf"]["position"])
        end = time.monotonic() + 60
        while told() is not None:
            assert time.monotonic() < end
            time.sleep(0.05)
        metrics = httpx.get(f"{served.url}/metrics").text
        assert f"lminf_background_tokens_total {answered['lminf']['position']}.0" in metrics
        assert f"lminf_archived_tokens {answered['lminf']['position']}.0" in metrics


def test_a_named_conversation_is_told_where_it_is(nano_path: str, prompt: Prompt) -> None:
    """By its name, to its owner: that is how the page knows how much of it has been read."""
    settings = Settings(model_name="nano", api_keys=("one", "two"))
    with serve(nano_path, settings, lminf=replace(WINDOW, prefill="tail")) as served:

        def headers(key: str, name: str) -> dict[str, str]:
            return {"X-Api-Key": key, **({"X-Conversation-Id": name} if name else {})}

        def told(key: str = "one", name: str = "mine") -> Any:
            return httpx.get(f"{served.url}/props", headers=headers(key, name)).json()["lminf"]["conversation"]

        assert told() is None
        body = {"prompt": prompt.tokens.tolist(), "n_predict": 8, "temperature": 0}
        answered = httpx.post(f"{served.url}/completion", json=body, headers=headers("one", "mine"), timeout=60).json()
        position = answered["lminf"]["position"]
        found = told()
        assert found == {
            "slot": answered["lminf"]["slot"],
            "position": position,
            "skipped": answered["lminf"]["skipped"],
            "archived": answered["lminf"]["archived"],
            "unread": answered["lminf"]["unread"],
            "n_read": 0,
        }
        assert told(name="another") is told(key="two") is None
        props = httpx.get(f"{served.url}/props", headers=headers("one", "")).json()["lminf"]
        assert "conversation" not in props
        end, n_read = time.monotonic() + 60, set()
        while (found := told())["unread"]:
            n_read.add(found["n_read"])
            assert time.monotonic() < end
        assert max(n_read) > 256
        assert found == {**found, "position": position, "skipped": 0, "archived": position, "unread": 0, "n_read": 0}


# --- on the command line ----------------------------------------------------------------------------------------------


def test_info_says_what_it_takes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "-m", "nano", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recall"] is None
    options = ["--recall", "5", "--archive-tokens", "1000", "--archive-type", "f16", "--recall-distance", "300"]
    assert main(["info", "-m", "nano", *options, "--json"]) == 0
    recall = json.loads(capfd.readouterr().out)["recall"]
    assert [recall[name] for name in ("n_recall", "distance", "archive_tokens", "archive_type")] == [
        5,
        300,
        1000,
        "f16",
    ]
    token_bytes = recall["archive_bytes_per_token"]
    assert recall["archive_bytes"] == (token_bytes and 1000 * token_bytes)
    assert main(["info", "-m", "nano", *options]) == 0
    assert "recall          5 tokens in each layer, of the last 1000" in capfd.readouterr().out
    assert recall["files"] is None


def test_info_says_what_is_on_disk(
    make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "archive"
    options = ["info", "-m", "nano", "--recall", "5", "--archive", str(folder)]
    assert main([*options, "--json"]) == 0
    nothing = {"folder": str(folder), "n_segments": 0, "bytes": 0}
    assert json.loads(capfd.readouterr().out)["recall"]["files"] == nothing
    llm = make_llama(lminf=LMInfConfig(n_global=4, n_local=64, n_recall=8, archive=folder))
    for start in range(0, 3000, 500):
        llm.eval(tokens[start : start + 500].tolist())
    sizes = [each.stat().st_size for each in folder.rglob("*.segment")]
    assert len(sizes) >= 1
    assert main([*options, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["recall"]["files"] == {
        **{"folder": str(folder), "n_segments": len(sizes), "bytes": sum(sizes)}
    }
    assert main(options) == 0
    assert f"in {len(sizes)} files in {folder}" in capfd.readouterr().out
    (tmp_path / "file").write_text("")
    assert main([*options[:-1], str(tmp_path / "file")]) == 1
    assert "Not a directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recall", "5000"], "--recall: must be 4096 or less"),
        (["--recall-distance", "0"], "must be 1 or more"),
        (["--recall-rule", "head"], "invalid choice"),
        (["--archive-tokens", "0"], "must be 1 or more"),
        (["--recall", "1", "--recall-rule", "paper", "--attention", "fused"], "--recall-rule 'paper' needs"),
    ],
)
def test_options_that_make_no_sense(capfd: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    try:
        status = main(["info", "-m", "nano", *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status != 0
    assert message in capfd.readouterr().err


def test_options_are_named_wherever_a_model_is_opened(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--recall", "1", "--recall-rule", "paper", "--attention", "fused"]
    for command in (["generate", "-p", "a"], ["chat", "-p", "a"], ["passkey"], ["ppl", "-f", __file__]):
        assert main([*command, "-m", "nano", *options]) == 1
        assert "--recall-rule 'paper' needs" in capfd.readouterr().err


def test_generate_reports_the_archive(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--n-global", "4", "--n-local", "16", "--recall", "3", "--ignore-eos", "--temp", "0"]
    assert main(["generate", "-m", "nano", "-p", "The sea was", "-n", "40", *options, "--json"]) == 0
    stream = json.loads(capfd.readouterr().out)["stream"]
    assert stream["archived"] == stream["position"]


def test_passkey_finds_with_recall_what_has_left_the_window(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--policies", "lminf,recall", "--lengths", "1500", "--depths", "30", "--trials", "3", "--recall", "32"]
    assert main(["passkey", "-m", "nano", "--n-local", "246", *options, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    policies = report["policies"]
    assert (report["recall"]["n_recall"], report["recall"]["recall_index"]) == (32, "sketch")
    assert policies["lminf"]["correct"] == 0
    assert policies["recall"]["correct"] >= 2  # 3 were measured
    assert policies["recall"]["cells"][0]["in_reach"] == 0
    assert report["recall_last"] is None
    assert main(["passkey", "-m", "nano", "--n-local", "246", *options, "--recall-last", "64", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["recall_last"] == 64
    assert report["policies"]["lminf"]["correct"] == 0
    assert report["policies"]["recall"]["correct"] >= 2  # 3 were measured


def test_a_text_can_be_read_without_recall_up_to_its_end(make_llama: MakeLlama, nano_path: str, prompt: Prompt) -> None:
    """Then it is the same as without any up to there, archived as always, and what is asked at the end recalls it."""
    n_last = 200
    n_first = len(prompt.tokens) - n_last

    def read(n_recall: int, n_recalling: int | None, *parts: Tokens) -> tuple[Any, int]:
        # at this distance the sinks' keys are those without recall, to the last bit
        lminf = replace(WINDOW, n_recall=n_recall, recall_distance=WINDOW.n_local)
        reader = LambdaReader(make_llama(nano_path, lminf=lminf, n_batch=100))
        reader.clear()
        for part in parts:
            for piece in reader.pieces(part, n_recalling):
                logits = reader.read(piece, logits_all=False).copy()
        return logits, reader.llm.stream_info().archived

    first, last = prompt.tokens[:n_first], prompt.tokens[n_first:]
    without, _ = read(0, None, first)
    plain, n_archived = read(N_RECALL, 0, first)
    np.testing.assert_allclose(plain, without, atol=1e-3)
    assert n_archived == n_first
    end, n_archived = read(N_RECALL, n_last, prompt.tokens)
    assert n_archived == len(prompt.tokens)
    assert np.abs(end - read(0, None, first, last)[0]).max() > 0.1
    everywhere, _ = read(N_RECALL, None, prompt.tokens)
    np.testing.assert_array_equal(read(N_RECALL, len(prompt.tokens), prompt.tokens)[0], everywhere)
    assert np.abs(end - everywhere).max() > 0.01


# --- the end of a prompt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recall", "n_tokens", "sizes"),
    [
        ({"n_recall": 8}, 250, [100, 100, 18] + 32 * [1]),
        ({"n_recall": 8, "recall_every": 8}, 250, [100, 100, 18] + 4 * [8]),
        ({"n_recall": 8}, 246, [100, 100, 46]),  # nothing has left the window
        ({"n_recall": 0}, 250, [100, 100, 50]),
        ({"n_recall": 8, "recall_rule": "paper", "attention": "stock"}, 250, [100, 100, 50]),
    ],
)
def test_each_of_the_last_tokens_makes_its_own_choice(
    make_llama: MakeLlama,
    nano_path: str,
    monkeypatch: pytest.MonkeyPatch,
    recall: dict[str, Any],
    n_tokens: int,
    sizes: list[int],
) -> None:
    llm = make_llama(nano_path, lminf=replace(WINDOW, **recall), n_batch=100)
    done: list[int] = []
    process = llm.scheduler.eval

    def processing(slot: Any, new: Tokens, n_logits: int) -> int:
        done.append(len(new))
        return process(slot, new, n_logits)

    monkeypatch.setattr(llm.scheduler, "eval", processing)
    llm.eval(list(range(300, 300 + n_tokens)))
    assert done == sizes
