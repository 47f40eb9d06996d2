"""Embeddings and rankings, by models that do not generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from reference.random_model import N_EMBD, write
from reference.unsupported_models import MODELS

from lminf_edge import Llama
from lminf_edge.cli.serve import generates
from lminf_edge.gguf_header import read_header
from lminf_edge.server import Settings, create_app
from lminf_edge.server.embedder import POOLINGS, Embedder

TEXTS = ["the sea was calm", "and the lamp was lit"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("bert", MODELS["bert"].model, tmp_path_factory.mktemp("models"))


@pytest.fixture
def client_of(bert: Path) -> Iterator[Any]:
    """Makes clients of servers with a pooling."""
    made: list[Llama] = []

    def client(pooling: str) -> TestClient:
        settings: dict[str, Any] = {"embedding": True, "n_ctx": 128, "n_batch": 128, "n_ubatch": 128, "verbose": False}
        made.append(Llama(str(bert), pooling_type=POOLINGS[pooling], **settings))
        embedder = Embedder(made[-1], keeps_tokens=pooling == "none")
        app = create_app(None, Settings(model_name="bert"), embedder)
        return stack.enter_context(TestClient(app, base_url="http://localhost"))

    with ExitStack() as stack:
        yield client
    for llm in made:
        llm.close()


def vectors(client: TestClient, given: Any, path: str = "/v1/embeddings") -> Any:
    response = client.post(path, json={"input": given})
    assert response.status_code == 200, response.text
    found = response.json()
    return np.array([each["embedding"] for each in (found["data"] if path == "/v1/embeddings" else found)])


def test_poolings_agree_with_the_tokens(client_of: Any) -> None:
    tokens = vectors(client_of("none"), TEXTS[0], "/embeddings")[0]
    assert tokens.shape[1] == N_EMBD
    for pooling, made in (("mean", tokens.mean(axis=0)), ("cls", tokens[0]), ("last", tokens[-1])):
        client = client_of(pooling)
        [vector] = vectors(client, TEXTS[0])
        np.testing.assert_allclose(vector, made / np.linalg.norm(made), atol=1e-5)
        np.testing.assert_allclose(vectors(client, TEXTS[0], "/embeddings")[0, 0], vector, atol=1e-6)


def test_every_form_of_input(client_of: Any) -> None:
    client = client_of("mean")
    one, other = vectors(client, TEXTS)
    parts = {"content": [{"type": "text", "text": "the sea "}, {"type": "text", "text": "was calm"}]}
    for given in (TEXTS[0], {"prompt_string": TEXTS[0]}, parts):
        np.testing.assert_allclose(vectors(client, given), [one], atol=1e-6)
    llm = client.app.state.server.embedder.llm
    tokens = llm.tokenize(TEXTS[1].encode(), special=False)
    np.testing.assert_allclose(vectors(client, tokens), [other], atol=1e-6)
    np.testing.assert_allclose(vectors(client, [TEXTS[0], tokens]), [one, other], atol=1e-6)
    assert vectors(client, [5, "the sea", 6]).shape == (1, N_EMBD)
    usage = client.post("/v1/embeddings", json={"input": TEXTS}).json()["usage"]
    assert usage["prompt_tokens"] == sum(len(llm.tokenize(text.encode())) for text in TEXTS)


@pytest.mark.parametrize(
    "given",
    [[], {"content": "x"}, {"content": [{"type": "image_url"}]}, [99999], "word " * 500, ["x"] * 2049, [[]], 7,
     {"prompt_string": "x", "multimodal_data": ["AAAA"]}],
)  # fmt: skip
def test_what_is_no_input(client_of: Any, given: Any) -> None:
    response = client_of("mean").post("/v1/embeddings", json={"input": given})
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith(".")


def test_rankings(client_of: Any) -> None:
    client = client_of("rank")
    texts = [*TEXTS, "a storm came up", "nobody slept"]
    answer = client.post("/rerank", json={"query": "the sea", "documents": texts}).json()
    scores = [each["relevance_score"] for each in answer["results"]]
    assert len(set(scores)) == 4
    assert scores == sorted(scores, reverse=True)
    assert sorted(each["index"] for each in answer["results"]) == [0, 1, 2, 3]
    tei = client.post("/v1/rerank", json={"query": "the sea", "texts": texts, "return_text": True, "top_n": 2}).json()
    assert [each["score"] for each in tei] == scores[:2]
    assert [each["text"] for each in tei] == [texts[each["index"]] for each in tei]
    for wrong in ({"documents": []}, {"documents": [1]}, {"documents": "a"}, {}, {"documents": ["x" * 5000]}):
        assert client.post("/rerank", json={"query": "the sea", **wrong}).status_code == 400
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 501


def test_such_a_model_does_nothing_else(client_of: Any, bert: Path, nano_path: str) -> None:
    assert not read_header(bert).is_causal
    assert read_header(nano_path).is_causal
    client = client_of("none")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["context_length"] == 128
    assert client.get("/").status_code == 404
    messages = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (("/v1/chat/completions", messages), ("/completion", {"prompt": "a"}), ("/rerank", RERANK)):
        response = client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (501, "not_supported_error")
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 400  # with a vector for each token
    vectors(client, "a", "/embeddings")
    text = client.get("/metrics").text
    assert "llamacpp:n_decode_total 1" in text
    assert "llamacpp:tokens_predicted_total 0" in text


def test_llama_cpp_knows_which_models_generate(bert: Path, nano_path: str, tmp_path: Path) -> None:
    """Files of some architectures, as EmbeddingGemma's, do not say that attention is not causal."""
    model = MODELS["bert"].model
    keys = {name: value for name, value in model.keys.items() if name != "attention.causal"}
    silent = write("silent", replace(model, keys=keys), tmp_path)
    assert read_header(silent).is_causal
    assert not generates(str(silent))
    assert not generates(str(bert))
    assert generates(nano_path)
    # it embeds nothing without its decoder
    assert generates(str(write("t5", MODELS["t5"].model, tmp_path)))


RERANK = {"query": "a", "documents": ["b"]}
