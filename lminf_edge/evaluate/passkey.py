"""Asks for what was told in a long text, and counts right answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lminf_edge.cache.token_log import as_tokens
from lminf_edge.evaluate.prompts import Prompt, Wanted

if TYPE_CHECKING:
    from lminf_edge.evaluate.reader import Reader

MAX_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Cell:
    """Answers to prompts of one length, with the fact at one depth.

    length     tokens of a prompt, at most
    depth      share of the filler that comes before the (first) fact
    trials     answers that were asked for: a prompt may ask for several
    reachable  those that could still be attended to when they were asked for, in the window or among the first tokens
    found      how many of these were right; other right answers were recalled, are luck, or came by way of later tokens
               that had seen the fact
    """

    length: int
    depth: float
    trials: int
    correct: int
    reachable: int
    found: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.trials

    @property
    def in_reach(self) -> float:
        return self.reachable / self.trials


def answer(
    reader: Reader, prompt: Prompt, detokenize: Callable[[list[int]], bytes], n_recalling: int | None = None
) -> tuple[str, list[bool]]:
    """The model's greedy answer, a line, and for each thing asked for, whether it could attend to it to the end.

    Starts a new stream. With recall the last n_recalling tokens of the prompt recall, and the answer; None: all.
    """
    reader.clear()
    return answer_next(reader, prompt, detokenize, n_recalling), [
        all(any(all(map(reader.sees, range(*span))) for span in fact) for fact in wanted.tellings)
        for wanted in prompt.wanted
    ]


def answer_next(
    reader: Reader, prompt: Prompt, detokenize: Callable[[list[int]], bytes], n_recalling: int | None = None
) -> str:
    """The same to a prompt with which the stream goes on, and the answer alone."""
    for piece in reader.pieces(prompt.tokens, n_recalling):
        logits = reader.read(piece, logits_all=False)
    said: list[int] = []
    while True:
        token = int(logits[-1].argmax())
        if reader.is_end(token):
            break
        said.append(token)
        text = detokenize(said).decode("utf-8", errors="ignore")
        if "\n" in text.lstrip() or len(said) == MAX_ANSWER or _is_enough(text, prompt.wanted):
            break
        logits = reader.read(as_tokens(said[-1:]), logits_all=False)
    return detokenize(said).decode("utf-8", errors="ignore").strip()


def _is_enough(text: str, wanted: Sequence[Wanted]) -> bool:
    """Whether nothing that comes after this can change what is right: a number is only whole when something follows."""
    return _asks_for_a_number(wanted) and re.search(r"\d\D", text) is not None


def right_answers(text: str, wanted: Sequence[Wanted]) -> list[bool]:
    """Of what was asked for, what is right: one number has to be the first one of the answer, all else be in it."""
    if _asks_for_a_number(wanted):
        number = re.search(r"\d+", text)
        return [number is not None and number.group() in wanted[0].accepted]
    return [
        any(re.search(rf"(?<!\w){re.escape(each)}(?!\w)", text, re.IGNORECASE) for each in one.accepted)
        for one in wanted
    ]


def _asks_for_a_number(wanted: Sequence[Wanted]) -> bool:
    return len(wanted) == 1 and all(each.isdecimal() for each in wanted[0].accepted)


def measure(
    reader: Reader,
    prompts: Sequence[Prompt],
    detokenize: Callable[[list[int]], bytes],
    length: int,
    depth: float,
    n_recalling: int | None = None,
) -> Cell:
    """Asks each of these prompts, which have this length and depth; of each the last n_recalling tokens recall."""
    trials = correct = reachable = found = 0
    for prompt in prompts:
        text, in_reach = answer(reader, prompt, detokenize, n_recalling)
        right = right_answers(text, prompt.wanted)
        trials += len(right)
        correct += sum(right)
        reachable += sum(in_reach)
        found += sum(a and b for a, b in zip(right, in_reach, strict=True))
    return Cell(length, depth, trials, correct, reachable, found)
