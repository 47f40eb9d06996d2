"""Prompts of any length: facts in a text, and a question at its end, as tokens of a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.errors import UserError
from lminf_edge.evaluate.tasks import FILLER, REPLY, SMALL_TALK, TASKS, Unit

if TYPE_CHECKING:
    from lminf_edge import Llama

Span = tuple[int, int]  # positions of tokens: first, and one past the last


@dataclass(frozen=True)
class Wanted:
    """One answer to a prompt.

    accepted   any of these is right
    tellings   for each fact that it follows from, where that is told: [(begin, end), ...], in tokens; any will do
    """

    accepted: tuple[str, ...]
    tellings: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what is right."""

    tokens: Tokens
    wanted: tuple[Wanted, ...]


class Format:
    """How a model is asked: the text of its chat template around messages, or a plain text if it has none.

    opening      what comes before the first message
    to_answer    what stands between what the user says and an answer
    to_user      what stands between an answer and what the user says next
    closing      what stands before the last answer
    is_template  whether this is the model's template
    """

    def __init__(self, vocabulary: Llama, is_chat: bool) -> None:
        """is_chat: of several turns."""
        self.adds_bos = vocabulary._model.add_bos_token()
        found = _turns(vocabulary)
        self.is_template = found is not None
        if found is not None:
            self.opening, self.to_answer, self.to_user, self.closing, self.adds_bos = found
        elif is_chat:
            self.opening, self.to_answer, self.to_user, self.closing = (
                "User: ",
                "\nAssistant: ",
                "\nUser: ",
                "\nAssistant: ",
            )
        else:
            self.opening, self.to_answer, self.to_user, self.closing = "", "", "", " "


def _turns(vocabulary: Llama) -> tuple[str, str, str, str, bool] | None:
    """The same, and whether BOS comes first, by the template; None if that only puts texts one after another."""
    from lminf_edge.text.chat import ChatOptions
    from lminf_edge.text.formats import find_format

    if not vocabulary.metadata.get("tokenizer.chat_template"):
        return None
    marks = ("(asked)", "(answered)", "(again)")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    made = find_format(vocabulary).render(messages, ChatOptions(), lambda: False)
    parts = re.split("|".join(map(re.escape, marks)), made.text)
    assert len(parts) == 4, made.text
    opening, to_answer, to_user, closing = parts
    return (opening, to_answer, to_user, closing, not made.has_bos) if closing.strip() else None


class Filler:
    """A text that never ends, in units: words, sentences, or turns of a chat."""

    def __init__(self, units: Sequence[Tokens]) -> None:
        self.n = len(units)
        self._tokens = np.concatenate(units)
        self._starts = np.cumsum([0, *map(len, units)])

    def size(self, first: int, n: int) -> int:
        """Tokens of n units from unit `first` on."""
        return self._start(first + n) - self._start(first)

    def most(self, first: int, n_tokens: int) -> int:
        """The most units from unit `first` on that n_tokens have room for."""
        rounds, rest = divmod(self._start(first) + n_tokens, len(self._tokens))
        return rounds * self.n + int(np.searchsorted(self._starts, rest, side="right")) - 1 - first

    def take(self, first: int, n: int) -> Tokens:
        return self._tokens[np.arange(self._start(first), self._start(first + n)) % len(self._tokens)]

    def _start(self, unit: int) -> int:
        rounds, rest = divmod(unit, self.n)
        return rounds * len(self._tokens) + int(self._starts[rest])


class Prompts:
    """Makes the prompts of a task: the same ones for the same arguments, whatever the policy."""

    def __init__(self, vocabulary: Llama, task: str, prose: str = "", seed: int = 0, blind: bool = False) -> None:
        """
        vocabulary   a model, weights or not
        task         a name in TASKS
        prose        the text around the facts; not used by "paper"
        blind        nothing is told: what is right then was guessed
        """
        self._vocabulary = vocabulary
        self._task = TASKS[task]
        self._is_chat = self._task.unit == "turn"
        self._format = Format(vocabulary, self._is_chat)
        self._intro, self._gap = self._task.intro, " "
        if self._format.is_template:
            self._intro = self._intro or self._task.chat_intro
            self._gap = "\n\n" if self._task.unit == "sentence" else " "
        self._seed = seed
        self._blind = blind
        self._known: dict[str, Tokens] = {}
        self._filler = Filler([self._unit(text) for text in _units(self._task.unit, prose)])

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """A prompt of as much filler as fits into `length` tokens.

        Raises UserError if not even the task without filler does.
        """
        rng = np.random.default_rng([self._seed, length, round(depth * 1000), trial])
        exercise = self._task.make(rng, depth)
        first = int(rng.integers(self._filler.n))
        format = self._format
        opening = format.opening + self._intro
        head = as_tokens(self._vocabulary.tokenize(opening.encode(), add_bos=format.adds_bos, special=True))
        ask = exercise.ask + format.closing + exercise.cue
        tail = self._after("\n", ask) if self._is_chat else self._after(".", self._gap + ask)
        facts = [] if self._blind else [self._fact(fact.text) for fact in exercise.facts]

        n_least = len(head) + sum(map(len, facts)) + len(tail)
        if n_least > length:
            raise UserError(f"A prompt of {length} tokens is too short: without filler it has {n_least}.")
        n = self._filler.most(first, length - n_least)
        places = [min(n, max(self._task.n_first, round(fact.place * n))) for fact in exercise.facts]
        parts, n_tokens, done = [head], len(head), 0
        begins = [0] * len(facts)
        for i in sorted(range(len(facts)), key=lambda i: places[i]):
            parts.append(self._filler.take(first + done, places[i] - done))
            done = places[i]
            begins[i] = n_tokens + len(parts[-1])
            parts.append(facts[i])
            n_tokens = begins[i] + len(facts[i])
        parts += [self._filler.take(first + done, n - done), tail]
        tellings = (
            []
            if self._blind
            else [
                tuple((begin + a, begin + b) for a, b in self._spans(fact.text, fact.value))
                for begin, fact in zip(begins, exercise.facts, strict=True)
            ]
        )
        wanted = tuple(
            Wanted(answer.accepted, () if self._blind else tuple(tellings[i] for i in answer.facts))
            for answer in exercise.answers
        )
        return Prompt(np.concatenate(parts), wanted)

    def _unit(self, text: str) -> Tokens:
        if not self._is_chat:
            return self._after(".", " " + text)
        said, answered = text.split("\n")
        return self._turn(said, answered)

    def _fact(self, text: str) -> Tokens:
        return self._turn(text, REPLY) if self._is_chat else self._after(".", " " + text)

    def _turn(self, said: str, answered: str) -> Tokens:
        return self._after("\n", said + self._format.to_answer + answered + self._format.to_user)

    def _after(self, before: str, text: str) -> Tokens:
        """The tokens of a text that follows another one."""
        if text not in self._known:
            start, whole = (
                self._vocabulary.tokenize(t.encode(), add_bos=False, special=True) for t in (before, before + text)
            )
            self._known[text] = as_tokens(whole[len(start) :])
        return self._known[text]

    def _spans(self, text: str, value: str) -> Iterable[Span]:
        """Where the value stands, in the tokens of a fact."""
        before, space = ("\n", "") if self._is_chat else (".", " ")
        for found in re.finditer(re.escape(value), text):
            begin = self._after(before, (space + text[: found.start()]).rstrip())
            yield len(begin), len(self._after(before, space + text[: found.end()]))


def _units(unit: Unit, prose: str) -> Sequence[str]:
    if unit == "published":
        return [FILLER]
    if unit == "word":
        return prose.split()
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'“‘])", " ".join(prose.split()))
    if unit == "sentence":
        return sentences
    talk = itertools.cycle(SMALL_TALK)
    passages = [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]
    return [f"{said.format(passage)}\n{answered}" for passage, (said, answered) in zip(passages, talk, strict=False)]
