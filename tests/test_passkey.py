"""Passkey retrieval: the prompts are what they should be, and what is remembered is what can be attended to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import TEXT

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cli.demo import python_documentation
from lminf_edge.config import resolve
from lminf_edge.evaluate.passkey import ASK, FILLER, TASK, TELL, Cell, Passkey, is_right, measure
from lminf_edge.evaluate.policies import POLICIES

N_GLOBAL, N_LOCAL = 40, 140  # a key told at the start is among the first 40 tokens
LENGTH = 500

# What the embedded model gets right, at least: 5 of 5 were measured for each key in reach, 0 of 5 for each other.
KEPT, LOST = 4, 0


@pytest.fixture(scope="module")
def vocabulary(nano_path: str) -> Iterator[Llama]:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    yield llm
    llm.close()


def task(vocabulary: Llama, template: str = "prose", **kwargs: int) -> Passkey:
    return Passkey(lambda text: vocabulary.tokenize(text.encode()), template, python_documentation(), **kwargs)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_published_prompt(vocabulary: Llama) -> None:
    prompt = task(vocabulary, "paper").prompt(400, 0.5, 0)
    text = vocabulary.detokenize(prompt.tokens.tolist()).decode().strip()
    n = text.count(FILLER)
    before = round(n * 0.5)
    assert n >= 5
    assert text == " ".join([TASK, *[FILLER] * before, TELL.format(key=prompt.key), *[FILLER] * (n - before), ASK])


@pytest.mark.parametrize("template", ["paper", "prose"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_fits_and_tells_the_key_where_it_says(vocabulary: Llama, template: str, depth: float) -> None:
    for trial in range(3):
        prompt = task(vocabulary, template).prompt(300, depth, trial)
        unit = len(vocabulary.tokenize(f" {FILLER}".encode())) if template == "paper" else 12
        assert 300 - unit < len(prompt.tokens) <= 300
        assert prompt.tokens[0] == vocabulary.token_bos()
        assert len(prompt.key) == 5
        assert len(prompt.tellings) == 2
        for begin, end in prompt.tellings:
            assert vocabulary.detokenize(prompt.tokens[begin:end].tolist()).decode().strip() == prompt.key


def test_prompts_depend_on_their_arguments_alone(vocabulary: Llama) -> None:
    maker = task(vocabulary)
    first = maker.prompt(200, 0.5, 0)
    assert task(vocabulary).prompt(200, 0.5, 0).tokens.tolist() == first.tokens.tolist()
    others = [maker.prompt(200, 0.5, 1), maker.prompt(200, 0.25, 0), task(vocabulary, seed=1).prompt(200, 0.5, 0)]
    assert len({first.key, *(other.key for other in others)}) == 4


def test_too_short_a_prompt(vocabulary: Llama) -> None:
    with pytest.raises(ValueError, match="A prompt of 20 tokens is too short: without filler it has"):
        task(vocabulary).prompt(20, 0.5, 0)


def test_a_text_shorter_than_the_prompt_comes_round(vocabulary: Llama) -> None:
    maker = Passkey(lambda text: vocabulary.tokenize(text.encode()), "prose", TEXT)
    assert 480 < len(maker.prompt(500, 0.5, 0).tokens) <= 500


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345.", True), ("12345", True), (" 123456.", False), (" 1234.", False), ("", False), (" no 12345", True)],
)
def test_an_answer_is_its_first_number(answer: str, right: bool) -> None:
    assert is_right(answer, "12345") is right


# --- answers ----------------------------------------------------------------------------------------------------------


def cells(nano_path: str, vocabulary: Llama, policy: str, depths: list[float], length: int = LENGTH) -> list[Cell]:
    window = resolve(LMInfConfig(n_global=N_GLOBAL, n_local=N_LOCAL), None, 512)
    llm = Llama(nano_path, verbose=False, **POLICIES[policy].arguments(window, length + 16, 512, False))
    reader = POLICIES[policy].reader(llm, window)
    maker = task(vocabulary)
    result = []
    for depth in depths:
        prompts = [maker.prompt(length, depth, trial) for trial in range(5)]
        result.append(measure(reader, prompts, vocabulary.detokenize, length, depth))
    llm.close()
    return result


def test_full_attention_finds_every_key_inside_the_training_length(nano_path: str, vocabulary: Llama) -> None:
    for cell in cells(nano_path, vocabulary, "full", [0.0, 0.5, 1.0]):
        assert cell.in_reach == 1
        assert cell.correct >= KEPT


@pytest.mark.parametrize("policy", ["lminf", "sinks"])
def test_a_key_is_kept_among_the_sinks_and_in_the_window_and_lost_between(
    nano_path: str, vocabulary: Llama, policy: str
) -> None:
    first, middle, last = cells(nano_path, vocabulary, policy, [0.0, 0.5, 1.0])
    assert (first.in_reach, middle.in_reach, last.in_reach) == (1, 0, 1)
    assert first.correct >= KEPT
    assert middle.correct == LOST
    assert last.correct >= KEPT


def test_a_window_alone_loses_the_first_key_too(nano_path: str, vocabulary: Llama) -> None:
    first, last = cells(nano_path, vocabulary, "window", [0.0, 1.0])
    assert (first.in_reach, last.in_reach) == (0, 1)
    assert first.correct == LOST
    assert last.correct >= KEPT


def test_context_shift_loses_what_it_throws_away(nano_path: str, vocabulary: Llama) -> None:
    first, middle = cells(nano_path, vocabulary, "shift", [0.0, 0.5])
    assert (first.in_reach, middle.in_reach) == (1, 0)
    assert middle.correct == LOST
