"""Retrieval: the prompts are what they should be, and what is remembered is what can be attended to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from conftest import TEXT

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cli.demo import python_documentation
from lminf_edge.config import resolve
from lminf_edge.evaluate.passkey import Cell, measure, right_answers
from lminf_edge.evaluate.policies import POLICIES
from lminf_edge.evaluate.prompts import Filler, Prompt, Prompts, Wanted
from lminf_edge.evaluate.stories import STORIES
from lminf_edge.evaluate.tasks import ASK, CUE, FILLER, READ, TASK, TASKS, TELL

N_GLOBAL, N_LOCAL = 40, 140  # a key told at the start is among the first 40 tokens
LENGTH = 500

# What the embedded model gets right, at least: 5 of 5 were measured for each key in reach, 0 of 5 for each other.
KEPT, LOST = 4, 0

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def vocabulary(nano_path: str) -> Iterator[Llama]:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    yield llm
    llm.close()


@pytest.fixture
def chatting(vocabulary: Llama, monkeypatch: pytest.MonkeyPatch) -> Llama:
    """The same with a chat template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    handler = Jinja2ChatFormatter(CHATML, "</s>", "<s>").to_chat_handler()
    monkeypatch.setitem(vocabulary.metadata, "tokenizer.chat_template", CHATML)
    monkeypatch.setattr(vocabulary, "chat_format", "ours")
    monkeypatch.setitem(vocabulary._chat_handlers, "ours", handler)
    return vocabulary


def prompts(vocabulary: Llama, task: str = "prose", prose: str | None = None, **kwargs: int) -> Prompts:
    return Prompts(vocabulary, task, python_documentation() if prose is None else prose, **kwargs)


def text_of(vocabulary: Llama, tokens: object) -> str:
    return vocabulary.detokenize(np.asarray(tokens).tolist()).decode().strip()


def told(vocabulary: Llama, prompt: Prompt) -> list[str]:
    """All that is told of what is asked for."""
    spans = [span for wanted in prompt.wanted for fact in wanted.tellings for span in fact]
    return [text_of(vocabulary, prompt.tokens[begin:end]) for begin, end in spans]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_published_prompt(vocabulary: Llama) -> None:
    prompt = prompts(vocabulary, "paper").prompt(400, 0.5, 0)
    text = text_of(vocabulary, prompt.tokens)
    n = text.count(FILLER)
    before = round(n * 0.5)
    key = prompt.wanted[0].accepted[0]
    assert n >= 5
    told = TELL.format(key=key)
    assert text == " ".join([TASK, *[FILLER] * before, told, *[FILLER] * (n - before), ASK, CUE])


@pytest.mark.parametrize("task", ["paper", "prose"])
def test_tokens_are_those_of_the_text(vocabulary: Llama, task: str) -> None:
    prompt = prompts(vocabulary, task).prompt(400, 0.3, 0)
    assert prompt.tokens.tolist() == vocabulary.tokenize(text_of(vocabulary, prompt.tokens).encode())


@pytest.mark.parametrize("task", ["paper", "prose"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_fits_and_tells_the_key_where_it_says(vocabulary: Llama, task: str, depth: float) -> None:
    for trial in range(3):
        prompt = prompts(vocabulary, task).prompt(300, depth, trial)
        unit = len(vocabulary.tokenize(f" {FILLER}".encode())) if task == "paper" else 12
        assert 300 - unit < len(prompt.tokens) <= 300
        assert prompt.tokens[0] == vocabulary.token_bos()
        key = prompt.wanted[0].accepted[0]
        assert len(key) == 5
        assert told(vocabulary, prompt) == [key, key]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_tells_what_it_asks_for(vocabulary: Llama, task: str) -> None:
    maker = prompts(vocabulary, task)
    for trial in range(12):
        prompt = maker.prompt(900, 0.4, trial)
        assert 600 < len(prompt.tokens) <= 900
        for wanted in prompt.wanted:
            tellings = [
                text_of(vocabulary, prompt.tokens[begin:end]) for fact in wanted.tellings for begin, end in fact
            ]
            assert any(answer in telling for answer in wanted.accepted for telling in tellings)


@pytest.mark.parametrize("task", TASKS)
def test_a_blind_prompt_tells_nothing(vocabulary: Llama, task: str) -> None:
    for trial in range(3):
        seen, blind = (prompts(vocabulary, task, blind=blind).prompt(900, 0.4, trial) for blind in (False, True))
        assert [wanted.accepted for wanted in blind.wanted] == [wanted.accepted for wanted in seen.wanted]
        for telling in told(vocabulary, seen):
            assert telling not in text_of(vocabulary, blind.tokens) or not telling.isdecimal()
        assert told(vocabulary, blind) == []
        assert blind.tokens[-8:].tolist() == seen.tokens[-8:].tolist()


def test_several_values_are_told_in_different_places(vocabulary: Llama) -> None:
    prompt = prompts(vocabulary, "multi-value").prompt(900, 0.1, 0)
    assert told(vocabulary, prompt) == [wanted.accepted[0] for wanted in prompt.wanted]
    begins = [begin for wanted in prompt.wanted for fact in wanted.tellings for begin, _ in fact]
    assert min(b - a for a, b in pairwise(begins)) > 200


def test_a_variable_follows_from_facts_in_their_order(vocabulary: Llama) -> None:
    prompt = prompts(vocabulary, "variables").prompt(900, 0.1, 0)
    ((first,), (second,)) = prompt.wanted[0].tellings
    assert first[1] < second[0] - 200
    assert prompt.wanted[0].accepted[0] in told(vocabulary, prompt)[0]
    assert prompt.wanted[0].accepted[0] not in told(vocabulary, prompt)[1]


def test_a_chat_template_is_used(chatting: Llama) -> None:
    text = text_of(chatting, prompts(chatting, "paper").prompt(400, 0.5, 0).tokens)
    assert text.startswith(f"<|im_start|>user\n{TASK} {FILLER}")
    assert text.endswith(f"{FILLER} {ASK}<|im_end|>\n<|im_start|>assistant\n{CUE}")
    text = text_of(chatting, prompts(chatting, "prose").prompt(400, 0.5, 0).tokens)
    assert text.startswith(f"<|im_start|>user\n{TASK} ")
    assert text.endswith(f" {ASK}<|im_end|>\n<|im_start|>assistant\n{CUE}")
    text = text_of(chatting, prompts(chatting, "multi-key").prompt(400, 0.5, 0).tokens)
    assert text.startswith(f"<|im_start|>user\n{READ} ")
    assert re.search(
        r"[^\n]\n\nWhat is the pass key of (\w+)\?<\|im_end\|>\n<\|im_start\|>assistant\nThe pass key of \1 is$", text
    )
    text = text_of(chatting, prompts(chatting, "prose").prompt(400, 0.5, 0).tokens)
    assert text.endswith(f" {ASK}<|im_end|>\n<|im_start|>assistant\n{CUE}")
    text = text_of(chatting, prompts(chatting, "chat").prompt(2000, 0.0, 0).tokens)
    turns = text.split("<|im_start|>")[1:]
    assert [turn.split("\n")[0] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert len(turns) > 10
    assert "By the way" in turns[4]  # told in the third turn, however long the chat


def test_a_template_that_only_joins_texts_is_none(vocabulary: Llama) -> None:
    assert text_of(vocabulary, prompts(vocabulary).prompt(100, 0.5, 0).tokens).endswith(f" {ASK} {CUE}")
    turns = text_of(vocabulary, prompts(vocabulary, "chat").prompt(400, 0.5, 0).tokens).splitlines()
    assert [turn.split(" ")[0] for turn in turns] == ["User:", "Assistant:"] * (len(turns) // 2)


def test_prompts_depend_on_their_arguments_alone(vocabulary: Llama) -> None:
    maker = prompts(vocabulary)
    first = maker.prompt(200, 0.5, 0)
    assert prompts(vocabulary).prompt(200, 0.5, 0).tokens.tolist() == first.tokens.tolist()
    others = [maker.prompt(200, 0.5, 1), maker.prompt(200, 0.25, 0), prompts(vocabulary, seed=1).prompt(200, 0.5, 0)]
    assert len({prompt.wanted[0].accepted for prompt in (first, *others)}) == 4


def test_too_short_a_prompt(vocabulary: Llama) -> None:
    with pytest.raises(ValueError, match="A prompt of 20 tokens is too short: without filler it has"):
        prompts(vocabulary).prompt(20, 0.5, 0)


def test_a_text_shorter_than_the_prompt_comes_round(vocabulary: Llama) -> None:
    maker = prompts(vocabulary, prose=TEXT)
    assert 480 < len(maker.prompt(500, 0.5, 0).tokens) <= 500
    assert text_of(vocabulary, maker.prompt(2000, 0.5, 0).tokens).count("before the sun came over the hills") > 5


def test_filler_by_units() -> None:
    units = [np.arange(n, dtype=np.int32) + 10 * n for n in (3, 1, 2)]
    filler = Filler(units)
    endless = np.concatenate(units * 9)
    starts = np.cumsum([0, *[3, 1, 2] * 9])
    for first in range(3):
        for n in range(20):
            taken = filler.take(first, n)
            assert taken.tolist() == endless[starts[first] : starts[first + n]].tolist()
            assert filler.most(first, len(taken)) == n
        assert filler.most(first, 2) == {0: 0, 1: 1, 2: 1}[first]


def test_stories_hold_their_answers() -> None:
    for story in STORIES:
        for question in story.questions:
            assert right_answers(story.text, (Wanted(question.accepted, ()),)) == [True]
            assert right_answers(f"{question.ask} {question.cue}", (Wanted(question.accepted, ()),)) == [False]


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" 12345.", True), ("12345", True), (" 123456.", False), (" 1234.", False), ("", False), (" no 12345", True),
     (" 54321, no, 12345", False)],
)  # fmt: skip
def test_an_answer_is_its_first_number(answer: str, right: bool) -> None:
    assert right_answers(answer, [Wanted(("12345",), ())]) == [right]


def test_of_several_numbers_each_counts() -> None:
    wanted = [Wanted((key,), ()) for key in ("12345", "54321", "11111")]
    assert right_answers("54321, 99999 and 12345", wanted) == [True, True, False]


@pytest.mark.parametrize(("answer", "right"), [("a Goat.", True), ("goats", False), ("four days", True), ("", False)])
def test_a_word_is_a_whole_one(answer: str, right: bool) -> None:
    assert right_answers(answer, [Wanted(("goat", "four days"), ())]) == [right]


# --- answers ----------------------------------------------------------------------------------------------------------


def cells(nano_path: str, vocabulary: Llama, policy: str, depths: list[float], length: int = LENGTH) -> list[Cell]:
    window = resolve(LMInfConfig(n_global=N_GLOBAL, n_local=N_LOCAL), None, 512)
    llm = Llama(nano_path, verbose=False, **POLICIES[policy].arguments(window, length + 16, 512, False))
    reader = POLICIES[policy].reader(llm, window)
    maker = prompts(vocabulary)
    result = []
    for depth in depths:
        asked = [maker.prompt(length, depth, trial) for trial in range(5)]
        result.append(measure(reader, asked, vocabulary.detokenize, length, depth))
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
