"""Chat messages and texts to tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.text.service import Exchange, TextService


@pytest.fixture(scope="module")
def engine(nano_path: str) -> Iterator[Engine]:
    engine = load_engine(nano_path, verbose=False, n_threads=1, n_threads_batch=1)
    yield engine
    engine.close()
    engine.model.close()


def test_what_one_owner_sent_changes_nothing_for_another(engine: Engine) -> None:
    service = TextService(engine)
    tokenizer = service.tokenizer
    calls: list[bytes] = []
    tokenize = service.llm.tokenize

    def counting(text: bytes, **kwargs: bool) -> list[int]:
        calls.append(text)
        return tokenize(text, **kwargs)

    service.llm.tokenize = counting
    try:
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
    finally:
        del service.llm.tokenize


@pytest.mark.parametrize("name", ["suffix", "owner", "is_cancelled", "kwargs"])
def test_arguments_of_a_template_have_any_name(engine: Engine, name: str) -> None:
    exchange = Exchange(TextService(engine))
    messages = [{"role": "user", "content": "Hello"}]
    assert exchange.chat_prompt(messages, "", {name: "x"}).text == exchange.chat_prompt(messages).text
