"""Chat messages and texts to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import tiny_models

from lminf_edge import LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.text.chat import ChatOptions
from lminf_edge.text.service import Exchange, TextService


@pytest.fixture(scope="module")
def engine(nano_path: str) -> Iterator[Engine]:
    engine = load_engine(nano_path, verbose=False, n_threads=1, n_threads_batch=1)
    yield engine
    engine.close()
    engine.model.close()


def test_what_one_owner_sent_changes_nothing_for_another(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = TextService(engine)
    tokenizer = service.tokenizer
    calls: list[bytes] = []
    token_array = tokenizer._tokenizer.token_array

    def counting(text: bytes, *args: Any) -> Tokens:
        calls.append(text)
        return token_array(text, *args)

    monkeypatch.setattr(tokenizer._tokenizer, "token_array", counting)
    plain = tokenizer.tokens_of("Who is there? Nobody.", owner="b")
    # a completion may come in other tokens than its text is cut into
    strange = np.array([*tokenizer.tokens_of("No", owner="a"), *tokenizer.tokens_of("body.", owner="a")])
    tokenizer.remember_answer("Who is there? ", "Nobody.", strange, "a")
    assert not np.array_equal(tokenizer.tokens_of("Who is there? Nobody.", owner="a"), plain)
    assert np.array_equal(tokenizer.tokens_of("Who is there? Nobody.", owner="b"), plain)

    # by every way in, a text is tokenized once for each owner
    for owner in ("a", "b", "a", "b"):
        exchange = Exchange(service, owner=owner)
        exchange.chat_prompt([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I will."}])
        exchange.text_prompt("Once upon a time")
    counts = {text: calls.count(text) for text in calls if b"I will." in text or b"Once" in text}
    assert len(counts) == 2
    assert set(counts.values()) == {2}


def test_texts_and_checkpoints_share_a_budget(nano_path: str) -> None:
    budget = 6 << 20
    engine = load_engine(nano_path, parallel=1, memory_budget=budget, verbose=False, n_threads=1, n_threads_batch=1)
    try:
        service = TextService(engine)
        store, taken = engine.store, []

        def talk(i: int) -> None:
            exchange = Exchange(service, label=f"{i}")
            prompt = exchange.chat_prompt([{"role": "user", "content": f"{i} " + "once upon a time " * 100}])
            for _ in exchange.answer(prompt, SamplingParams(temperature=0), max_tokens=1):
                pass
            engine.call(store.trim)
            taken.append(store.memory_bytes)
            assert store.memory_bytes + service.tokenizer.n_bytes <= 1.02 * budget

        for i in range(12):
            talk(i)
        assert taken[-1] > 0.6 * budget  # what texts may take one day is not kept free for them
        service.tokenizer.tokens_of("It was a dark night. " * 100_000)
        n_texts = service.tokenizer.n_bytes
        assert n_texts > 2 << 20
        talk(12)
        assert taken[-1] < budget - n_texts
    finally:
        engine.close()
        engine.model.close()


def test_the_same_messages_are_rendered_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = TextService(engine)
    rendered: list[Any] = []
    render = service.template.render

    def counting(*args: Any) -> Any:
        rendered.append(args[0])
        return render(*args)

    monkeypatch.setattr(service.template, "render", counting)
    exchange, options = Exchange(service), ChatOptions()
    one: Any = [{"role": "user", "content": "I will."}]
    other: Any = [{"role": "user", "content": "I will not."}]
    prompts = [exchange.chat_prompt(messages, options) for messages in (one, one, other, other, one)]
    assert prompts[0] is prompts[1]
    assert prompts[3].text != prompts[4].text == prompts[0].text
    assert rendered == [one, other, one]
    exchange.chat_prompt(one, ChatOptions())
    assert rendered == [one, other, one, one]


@pytest.mark.parametrize("name", ["suffix", "owner", "is_cancelled", "kwargs"])
def test_arguments_of_a_template_have_any_name(engine: Engine, name: str) -> None:
    exchange = Exchange(TextService(engine))
    messages = [{"role": "user", "content": "Hello"}]
    assert (
        exchange.chat_prompt(messages, ChatOptions(template_kwargs={name: "x"})).text
        == exchange.chat_prompt(messages).text
    )


def test_a_token_of_any_length_has_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, scores, types = tiny_models.vocabulary()
    long = "-" * 40
    monkeypatch.setattr(tiny_models, "vocabulary", lambda: ([*pieces[:-1], long], scores, types))
    path = tiny_models.write("llama", tmp_path)
    engine = load_engine(path, lminf=LMInfConfig(n_global=4, n_local=32), verbose=False, n_threads=1, n_threads_batch=1)
    try:
        exchange = Exchange(TextService(engine))
        sampling = SamplingParams(temperature=0, logit_bias={len(pieces) - 1: 1e6})
        answer = exchange.answer(exchange.text_prompt("a b"), sampling, max_tokens=3)
        assert "".join(part.text for part in answer) == 3 * long
    finally:
        engine.close()
        engine.model.close()
