"""Sampling parameters of requests, in every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.engine.params import SamplingParams
from lminf_edge.server.arguments import sampling_of
from lminf_edge.server.requests import ChatRequest, CompletionRequest, LlamaCompletionRequest

PROMPT = "The sea was calm, and the sea"
GIVEN: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.25,
    "typical_p": 0.75,
    "repeat_penalty": 1.5,
    "repeat_last_n": 256,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.25,
    "dry_multiplier": 0.5,
    "dry_base": 2.0,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": 128,
    "dry_sequence_breakers": ["x", "\n"],
    "xtc_probability": 0.5,
    "xtc_threshold": 0.25,
    "top_n_sigma": 2.0,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 2.0,
    "mirostat": 2,
    "mirostat_tau": 3.0,
    "mirostat_eta": 0.5,
    "samplers": ["temperature", "top_k"],
    "min_keep": 2,
    "seed": 7,
}
# each with what it is compared to: it must make a difference
EFFECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repeat_penalty": 3, "repeat_last_n": 256}, {}),
    ({"repeat_penalty": 3, "repeat_last_n": 5}, {"repeat_penalty": 3}),
    ({"dry_multiplier": 5, "dry_sequence_breakers": []}, {}),
    ({"xtc_probability": 1, "xtc_threshold": 0.01}, {}),
    ({"temperature": 1, "top_n_sigma": 0.01}, {"temperature": 1}),
    ({"temperature": 0.1, "dynatemp_range": 5}, {"temperature": 0.1}),
    ({"temperature": 1, "mirostat": 2, "mirostat_tau": 0.1}, {"temperature": 1}),
    ({"temperature": 3, "samplers": ["temp", "top-k"]}, {"temperature": 3}),
    ({"temperature": 1, "top_p": 0, "min_keep": 50}, {"temperature": 1, "top_p": 0}),
]
WRONG: list[dict[str, Any]] = [
    {"repeat_last_n": -2},
    {"samplers": ["best"]},
    {"samplers": ["top_k"] * 33},
    {"min_keep": -1},
    {"lora": [{"id": 0, "scale": 1.0}]},
    {"adaptive_target": 0.5},
    {"t_max_predict_ms": 100},
    {"dry_multiplier": -1},
    {"dry_sequence_breakers": "x"},
    {"dry_sequence_breakers": ["x"] * 65},
    {"repeat_penalty": -1},
    {"dynatemp_range": "wide"},
]


@pytest.fixture(scope="module")
def server(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, lminf=LMInfConfig(n_global=4, n_local=128)) as served:
        yield served


def post(served: Served, path: str, **fields: Any) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    limit = {"n_predict": 40} if path == "/completion" else {"max_tokens": 40}
    body = {**asked, **limit, "temperature": 0, "seed": 5, "logit_bias": {"2": -100}, **fields}
    return httpx.post(f"{served.url}{path}", json=body, timeout=60)


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    answer = response.json()
    if "content" in answer:
        return str(answer["content"])
    [choice] = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def test_every_parameter_is_taken_over(server: Served) -> None:
    assert set(SamplingParams.__dataclass_fields__) - set(GIVEN) == {"logit_bias", "grammar", "logits_processor"}
    assert all(value != getattr(SamplingParams(), name) for name, value in GIVEN.items())
    for request in (
        ChatRequest(messages=[{"role": "user", "content": "x"}], **GIVEN),
        CompletionRequest(prompt="x", **GIVEN),
        LlamaCompletionRequest(prompt="x", **GIVEN),
    ):
        assert sampling_of(server.service, request) == SamplingParams(**GIVEN)
    assert sampling_of(server.service, LlamaCompletionRequest()) == server.service.defaults.sampling


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
@pytest.mark.parametrize(("fields", "others"), EFFECTS)
def test_it_has_an_effect(server: Served, path: str, fields: dict[str, Any], others: dict[str, Any]) -> None:
    assert said(post(server, path, **fields)) != said(post(server, path, **others))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion"])
@pytest.mark.parametrize("fields", WRONG)
def test_what_cannot_be_is_refused(server: Served, path: str, fields: dict[str, Any]) -> None:
    response = post(server, path, **fields)
    assert response.status_code == 400, response.text
    assert next(iter(fields)) in response.json()["error"]["message"]
