"""What the templates of llama.cpp write as a call of a tool is read as one, whole and as it is generated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from test_chat_library import ANSWERED, ARGUMENTS, ASKED, TOOLS, apply, message, read, read_pieces, templates

from lminf_edge import Llama
from lminf_edge.models.named import NAMED_MODELS
from lminf_edge.text.detokenizer import Detokenizer, StopScanner
from lminf_edge.text.library import ChatError, Parser


def tokens_of(llm: Llama, text: str) -> Iterator[str]:
    """A text as generation hands it over: token by token, of those that end inside a character the whole ones."""
    tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
    special = {token for token in tokens if llm.detokenize([token], special=True) and not llm.detokenize([token])}
    detokenizer, scanner = Detokenizer(llm, [1], [], special), StopScanner([])
    for token in tokens:
        for part in scanner.push(detokenizer.piece(token), None):
            yield part.text
    for part in scanner.flush():
        yield part.text


def rendered_call(name: str) -> tuple[str, dict[str, Any]] | None:
    """What a template makes of an answer that calls a tool, after its generation prompt; and what parses it."""
    asked = apply(name, ASKED, tools=TOOLS, parallel_tool_calls=False)
    answered = apply(name, ANSWERED[:3], tools=TOOLS, add_generation_prompt=False)["prompt"]
    prompt = asked["prompt"]
    if answered.startswith(prompt):
        return answered[len(prompt) :], asked
    return None  # thoughts that the prompt begins, and the template then leaves out


@pytest.fixture(scope="module")
def vocabularies(nano_path: str) -> Iterator[list[Llama]]:
    """Of nano, in which most characters beyond ASCII are bytes; and SmolLM2's, if it is there."""
    smol = ROOT / "build" / "models" / NAMED_MODELS["smollm2"].file
    made = [Llama(path, vocab_only=True, verbose=False) for path in (nano_path, smol) if Path(path).exists()]
    yield made
    for llm in made:
        llm.close()


def test_what_a_template_writes_as_a_call_is_read_as_one(vocabularies: list[Llama]) -> None:
    """Whole, and as it comes: in pieces of a few characters, and of one token."""
    n_read, n_pieces, others = 0, 0, []
    for name in templates():
        try:
            rendered = rendered_call(name)
        except ChatError:
            rendered = None
        if rendered is None:
            others.append(name)
            continue
        text, made = rendered
        whole = Parser(made["parser"])
        try:
            found = whole.parse(text, False)["tool_calls"]
        except ChatError:
            # what ends the message is not part of an answer: a stop, or an end-of-generation token
            found = []
            for end in range(len(text) - 1, 0, -1):
                try:
                    found = whole.parse(text[:end], False)["tool_calls"]
                except ChatError:
                    continue
                text = text[:end]
                break
        if not found:
            others.append(name)
            continue
        assert [call["name"] for call in found] == ["get_weather"], name
        assert json.loads(found[0]["arguments"]) == ARGUMENTS, name
        expected = message(read(made["parser"], text, len(text)))
        assert expected[2] == [("get_weather", ARGUMENTS)], name
        assert message(read(made["parser"], text, 3)) == expected, name
        for llm in vocabularies:
            _, *pieces = tokens_of(llm, text)
            first = text.removesuffix("".join(pieces))  # sentencepiece may begin with another space
            if first == text:
                assert "▁" in text, name  # which is nano's space
                continue
            pieces = [first, *pieces]
            assert message(read_pieces(made["parser"], pieces)) == expected, name
            n_pieces += len(pieces)
        n_read += 1
    assert n_read >= 40, others
    assert n_pieces > 20 * n_read
