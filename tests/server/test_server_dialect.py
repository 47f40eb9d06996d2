"""llama-server's dialect: the shapes of its answers, its slots and its metrics."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from reference.gguf_file import copy_with
from served import Served, kept_alive, serve

from lminf_edge import LMInfConfig
from lminf_edge.cache.checkpoint import Checkpoint
from lminf_edge.errors import UserError
from lminf_edge.server import Settings
from lminf_edge.server.infill import infill_tokens
from lminf_edge.server.requests import InfillRequest
from lminf_edge.server.settings import origin_pattern
from lminf_edge.server.slot_files import MAX_FILES, save_slot_file, slot_file
from lminf_edge.text.service import Exchange

WINDOW = LMInfConfig(n_global=4, n_local=128)
TEXT = "The ferry left at six, an hour before the sun came over the hills"
BODY = {"prompt": TEXT, "n_predict": 8, "temperature": 0}
SNIPPET = "\n\n--- snippet ---\n\n"
NAMES = ("prefix", "suffix", "middle")
KEYS = {"one": {"Authorization": "Bearer one"}, "two": {"Authorization": "Bearer two"}}


@pytest.fixture(scope="module")
def server(nano_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("slots")
    settings = Settings(model_name="nano", api_keys=("one", "two"), slot_folder=folder)
    with serve(nano_path, settings, lminf=WINDOW) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers=KEYS["one"]) as made:
        yield made


def ask(client: httpx.Client, **fields: Any) -> Any:
    response = client.post("/completion", json={**BODY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refusal(client: httpx.Client, **fields: Any) -> str:
    response = client.post("/completion", json={**BODY, **fields})
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


# --- completions ------------------------------------------------------------------------------------------------------


def test_what_an_answer_says(client: httpx.Client) -> None:
    answer = ask(client, return_tokens=True, stop=["zebra"], seed=7, logit_bias=[[5, False]])
    assert answer["prompt"].endswith(TEXT)
    assert len(answer["tokens"]) == answer["tokens_predicted"] == 8
    assert answer["has_new_line"] == ("\n" in answer["content"])
    settings = answer["generation_settings"]
    assert (settings["n_predict"], settings["stop"], settings["seed"]) == (8, ["zebra"], 7)
    assert settings["logit_bias"] == [{"token": 5, "bias": None}]
    assert ask(client)["tokens"] == []
    only = ask(client, response_fields=["content", "generation_settings/top_k", "nothing"])
    assert only == {"content": answer["content"], "generation_settings/top_k": 40}


def test_the_stop_string_is_named(client: httpx.Client) -> None:
    word = ask(client)["content"].split()[2]
    answer = ask(client, stop=["zebra", word])
    assert (answer["stop_type"], answer["stopping_word"]) == ("word", word)


def test_several_prompts_and_choices(client: httpx.Client) -> None:
    one, other = ask(client)["content"], ask(client, prompt=[1, 300, 301])["content"]
    answers = ask(client, prompt=[TEXT, {"prompt_string": TEXT}, [1, 300, 301]], n=2)
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4, 5]
    assert [answer["content"] for answer in answers] == [one] * 4 + [other] * 2
    assert all(answer["tokens_predicted"] == 8 for answer in answers)
    assert "1 to 128" in refusal(client, prompt=["a"] * 129)
    assert "only text" in refusal(client, prompt=[{"prompt_string": "a", "multimodal_data": ["AAAA"]}])


def test_probabilities_before_and_after_sampling(client: httpx.Client) -> None:
    before = ask(client, n_probs=5, temperature=1, seed=3)["completion_probabilities"]
    after = ask(client, n_probs=5, temperature=1, seed=3, top_k=3, post_sampling_probs=True)["completion_probabilities"]
    assert len(before) == len(after) == 8
    for entry in before:
        assert [each["id"] for each in entry["top_logprobs"]].count(entry["id"]) <= 1
        assert len(entry["top_logprobs"]) == 5
        assert bytes(entry["bytes"]).decode("utf-8", errors="ignore") == entry["token"]
    for entry in after:
        assert len(entry["top_probs"]) <= 3
        assert entry["prob"] in [each["prob"] for each in entry["top_probs"]]
        assert math.isclose(sum(each["prob"] for each in entry["top_probs"]), 1, abs_tol=1e-3)
    [greedy] = ask(client, n_probs=5, n_predict=1, post_sampling_probs=True)["completion_probabilities"]
    assert [each["prob"] for each in greedy["top_probs"]] == [1.0]


def test_biases_of_texts(client: httpx.Client) -> None:
    first = ask(client, n_predict=1, return_tokens=True)
    without = ask(client, n_predict=1, return_tokens=True, logit_bias={first["content"]: False, "300": 1})
    biased = {each["token"] for each in without["generation_settings"]["logit_bias"]}
    assert 300 in biased
    assert not biased & set(without["tokens"])


def test_progress_comes_before_and_after_each_batch(client: httpx.Client) -> None:
    body = {**BODY, "prompt": TEXT * 60, "stream": True, "return_progress": True, "timings_per_token": True}
    lines = client.post("/completion", json={**body, "cache_prompt": False, "lminf": {"prefill": "full"}}).text
    chunks = [httpx.Response(200, text=line[6:]).json() for line in lines.splitlines() if line.startswith("data: ")]
    reports = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    processed = [report["processed"] for report in reports]
    assert processed[0] == reports[0]["cache"] == 0
    assert processed == sorted(set(processed))
    assert processed[-1] == reports[-1]["total"]
    assert all("timings" in chunk for chunk in chunks)


def test_keep_alives_may_be_seldom(nano_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model_name="nano", ping_seconds=0.001)
    body = {**BODY, "n_predict": 60, "ignore_eos": True, "stream": True, "lminf": {"prefill": "full"}}
    with serve(nano_path, settings, lminf=WINDOW) as served:
        seldom = {**body, "sse_ping_interval": 3600, "prompt": TEXT * 50}
        assert ": keep-alive" not in httpx.post(f"{served.url}/completion", json=seldom, timeout=60).text
        often = {**body, "sse_ping_interval": -1, "prompt": "Often: " + TEXT * 50}
        assert ": keep-alive" in kept_alive(served, monkeypatch, "/completion", often)


def test_a_prompt_may_be_processed_anew(client: httpx.Client) -> None:
    assert ask(client)["timings"]["prompt_n"] + ask(client)["timings"]["prompt_n"] <= 40
    again = ask(client, cache_prompt=False)
    assert again["timings"]["prompt_n"] == again["tokens_evaluated"]
    assert again["content"] == ask(client)["content"]


def test_the_limit_has_two_names(client: httpx.Client) -> None:
    for path in ("/v1/completions", "/completion"):
        for name in ("max_tokens", "n_predict"):
            answer = client.post(
                path, json={"prompt": TEXT, name: 3, "ignore_eos": True, "logit_bias": {"2": -100}}
            ).json()
            assert (answer["timings"]["predicted_n"]) == 3


def test_what_openai_does_not_have_is_heeded_in_its_apis(client: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": TEXT}], "n_predict": 3}
    assert client.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 3
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    held = client.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 60, "json_schema": schema}).json()
    assert json.loads(held["choices"][0]["text"])["a"] in ("x", "y")
    both = {"prompt": TEXT, "json_schema": schema, "grammar": 'root ::= "a"'}
    assert "not both" in client.post("/v1/completions", json=both).json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_any_content_type_is_json(client: httpx.Client, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = client.post("/completion", content=b'{"prompt": "a", "n_predict": 2.0}', headers=headers)
    assert response.json()["tokens_predicted"] == 2


@pytest.mark.parametrize(
    ("given", "taken"),
    [({"temperature": -1}, ("temperature", 0)), ({"top_p": 7}, ("top_p", 1)), ({"top_k": -3.5}, ("top_k", 0))],
)
def test_numbers_are_brought_into_range(
    client: httpx.Client, given: dict[str, float], taken: tuple[str, float]
) -> None:
    assert ask(client, **given, n_predict=1.9)["generation_settings"].items() >= {taken, ("n_predict", 1)}


# --- other routes -----------------------------------------------------------------------------------------------------


def test_the_prompt_of_messages(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": TEXT}]}
    prompt = client.post("/apply-template", json=body).json()["prompt"]
    assert TEXT in prompt
    for path in ("/v1/chat/completions", "/chat/completions"):
        n_tokens = client.post(f"{path}/input_tokens", json=body).json()["input_tokens"]
        answer = client.post(path, json={**body, "max_tokens": 1}).json()
        assert n_tokens == answer["usage"]["prompt_tokens"]


def test_infill(client: httpx.Client, nano_path: str, tmp_path: Path) -> None:
    body = {"input_prefix": "The ferry ", "input_suffix": " at six.", "prompt": "le", "n_predict": 4}
    assert client.post("/infill", json=body).status_code == 501
    model = tmp_path / "infill.gguf"
    copy_with(nano_path, model, {f"tokenizer.ggml.{name}_token_id": 300 + i for i, name in enumerate(NAMES)})
    with serve(str(model), lminf=WINDOW) as served:
        tokenizer = served.service.tokenizer

        def tokens(text: str, special: bool = False) -> list[int]:
            return list(tokenizer.tokenize(text, False, special).tolist())

        made = infill_tokens(Exchange(served.service), InfillRequest(**body))
        assert made == [1, 300, *tokens("The ferry "), *tokens("le", True), 301, *tokens(" at six."), 302]
        long = {"input_prefix": "a b " * 500, "input_suffix": "c d " * 500}
        files = [{"text": "the beginning " + "e f " * 500}, {"filename": "x", "text": "the end"}]
        made = infill_tokens(Exchange(served.service), InfillRequest(**long, input_extra=files))
        begin, end = made.index(300), made.index(301)
        half = served.engine.window.size // 2
        assert made[begin + 1 : end] == tokens("a b " * 500)[-(3 * half // 4) :]
        assert made[end + 1 : -1] == tokens("c d " * 500)[: half // 4 - 2]
        extra = [*tokens(SNIPPET), *tokens(files[0]["text"]), *tokens(SNIPPET), *tokens("the end")]
        assert made[:begin] == [*extra[-half:], 1]
        assert httpx.post(f"{served.url}/infill", json=body).json()["tokens_predicted"] == 4
        wrong = httpx.post(f"{served.url}/infill", json={**body, "input_extra": [{"filename": "x"}]})
        assert (wrong.status_code, "input_extra" in wrong.text) == (400, True)


@pytest.mark.parametrize(
    ("name", "origin", "allowed"),
    [
        ("localhost", "http://localhost:3000", True),
        ("localhost", "https://[::1]", True),
        ("localhost", "http://localhost.evil.example", False),
        ("localhost", "http://evil.example#localhost", False),
        ("apps", "app://obsidian.md", True),
        ("apps", "vscode-webview://1a2b3c", True),
        ("apps", "file://", True),
        ("apps", "http://tauri.localhost", True),
        ("apps", "null", False),
        ("apps", "https://app", False),
        ("https://a.example", "https://a.example", True),
        ("https://a.example", "https://a-example", False),
    ],
)
def test_origins_by_name(name: str, origin: str, allowed: bool) -> None:
    assert bool(re.fullmatch(origin_pattern((name,)), origin)) == allowed
    assert not re.fullmatch(origin_pattern(()), origin)


# --- slots ------------------------------------------------------------------------------------------------------------


def act(client: httpx.Client, slot: int, action: str, name: str | None = None, key: str = "one") -> httpx.Response:
    body = {} if name is None else {"filename": name}
    return client.post(f"/slots/{slot}", params={"action": action}, json=body, headers=KEYS[key])


def test_a_slot_is_saved_restored_and_erased(server: Served, client: httpx.Client) -> None:
    text = TEXT[::-1]  # that no other conversation has
    first = ask(client, id_slot=1, prompt=text)
    assert first["id_slot"] == 1
    n_tokens = first["tokens_evaluated"] + 7
    saved = act(client, 1, "save", "a.bin").json()
    assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (1, "a.bin", n_tokens)
    assert act(client, 1, "erase").json()["n_erased"] == n_tokens
    assert ask(client, id_slot=1, prompt=text)["timings"]["cache_n"] <= 1  # all prompts begin with the same token
    assert act(client, 0, "restore", "a.bin").json()["n_restored"] == n_tokens
    again = ask(client, id_slot=0, prompt=text)
    assert (again["timings"]["prompt_n"], again["content"]) == (1, first["content"])
    edited = ask(client, id_slot=0, prompt=text[:30] + " a storm came")
    assert 0 < edited["timings"]["cache_n"] < first["tokens_evaluated"]
    plain = ask(client, id_slot=1, prompt=text[:30] + " a storm came", cache_prompt=False)
    assert edited["content"] == plain["content"]


def test_another_key_reaches_nothing(client: httpx.Client) -> None:
    ask(client, id_slot=1)
    assert act(client, 1, "save", "mine.bin").status_code == 200
    for action in ("save", "erase"):
        response = act(client, 1, action, "mine.bin", key="two")
        assert (response.status_code, "another API key" in response.text) == (400, True)
    assert "no saved slot" in act(client, 0, "restore", "mine.bin", key="two").text
    body = {**BODY, "id_slot": 1}
    assert client.post("/completion", json=body, headers=KEYS["two"]).json()["timings"]["cache_n"] == 0


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "../a", "a/b", "a\\b", "C:a", "a\0", "NUL.bin", "a.", "ä"])
def test_names_stay_in_the_folder(client: httpx.Client, name: str) -> None:
    ask(client, id_slot=0)
    for action in ("save", "restore"):
        response = act(client, 0, action, name)
        assert (response.status_code, "plain name" in response.text) == (400, True)


def test_what_slots_cannot_do(server: Served, client: httpx.Client, tmp_path: Path) -> None:
    assert "no slot 9" in act(client, 9, "erase").text
    assert "no slot 9" in refusal(client, id_slot=9)
    assert act(client, 0, "burn").status_code == 400
    assert act(client, 0, "save").status_code == 400
    ask(client, id_slot=0)
    assert act(client, 0, "save", "whole.bin").status_code == 200
    path = slot_file(
        server.settings.slot_folder or tmp_path, server.service.engine.slots[0].conversation.owner, "whole.bin"
    )
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "checksum" in act(client, 0, "restore", "whole.bin").text
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert "no saved slot" in act(client, 0, "restore", "whole.bin").text
    assert "something else" in act(client, 0, "save", "whole.bin").text
    path.unlink()


def test_files_are_bounded(server: Served, tmp_path: Path) -> None:
    checkpoint: Checkpoint = server.engine.call(server.engine.slots[0].snapshot)
    for i in range(MAX_FILES):
        (tmp_path / str(i)).touch()
    with pytest.raises(UserError, match="as many as there may be"):
        save_slot_file(slot_file(tmp_path, "", "one more"), checkpoint)
    assert save_slot_file(slot_file(tmp_path, "", "7"), checkpoint) == (tmp_path / "7").stat().st_size


def test_a_wanted_slot_is_waited_for(server: Served, client: httpx.Client) -> None:
    """Others do not wait behind a request for a slot that is at work."""
    body = {**BODY, "n_predict": 100_000, "ignore_eos": True, "stream": True, "id_slot": 0}
    with client.stream("POST", "/completion", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/completion", json={**BODY, "id_slot": 0}, timeout=0.5)
        assert ask(client)["id_slot"] == 1
    assert ask(client, id_slot=0)["id_slot"] == 0


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_llama_servers_metrics(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["process-start-time-unix"].isdigit()
    found = dict(re.findall(r"^llamacpp:(\w+) (\S+)$", response.text, re.MULTILINE))
    ours = dict(re.findall(r"^lminf_(\w+) (\S+)$", response.text, re.MULTILINE))
    assert float(found["prompt_tokens_total"]) == float(ours["prefilled_tokens_total"]) > 0
    assert float(found["tokens_predicted_total"]) == float(ours["generated_tokens_total"]) > 0
    assert 1 <= float(found["n_busy_slots_per_decode"]) <= 2
    assert float(found["n_tokens_max"]) > 500
    for name in found:
        assert f"# TYPE llamacpp:{name} " in response.text


def test_what_is_switched_off(nano_path: str) -> None:
    settings = Settings(model_name="nano", aliases=("a", "nano"), tags=("t",), page=False, slots=False, metrics=False)
    with serve(nano_path, settings, lminf=WINDOW) as served:
        for path, status in (("/", 404), ("/slots", 501), ("/metrics", 501), ("/props", 200)):
            assert httpx.get(f"{served.url}{path}").status_code == status
        assert httpx.post(f"{served.url}/slots/0?action=erase").status_code == 501
        [card] = httpx.get(f"{served.url}/models").json()["data"]
        assert (card["id"], card["aliases"], card["tags"]) == ("nano", ["a", "nano"], ["t"])
