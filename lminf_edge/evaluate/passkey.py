"""Passkey retrieval: a number stated once in a long text, and asked for at its end.

Task and wording: Mohtashami & Jaggi 2023 (arXiv:2305.16300), as in the code that LM-Infinite was published with
(https://github.com/Glaciohound/LM-Infinite, data/passkey_retrieval). Two things differ. Keys always have five digits:
all are equally hard. And the prompt ends without a space, which in many vocabularies is a token that no digit follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.errors import UserError

if TYPE_CHECKING:
    from lminf_edge.evaluate.reader import Reader

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TELL = "The pass key is {key}. Remember it. {key} is the pass key."
ASK = "What is the pass key? The pass key is"

TEMPLATES = {
    "paper": "the task explained, and five sentences over and over: the published prompt",
    "prose": "no explanation, and prose around the key: what the embedded models were trained on",
}

MAX_ANSWER = 12  # tokens: a space, five digits, what ends them, and some to spare


@dataclass(frozen=True)
class Prompt:
    """What is asked, and where the answer is.

    tellings   [(begin, end), ...]: positions of the tokens of the key, each time it is told
    """

    tokens: Tokens
    key: str
    tellings: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cell:
    """Answers to prompts of one length, with the key at one depth.

    length     tokens of a prompt, at most
    depth      share of the filler that comes before the key
    reachable  prompts where the key could still be attended to when it was asked for
    found      how many of those were answered right; other right answers are luck, or came by way of later tokens that
               had seen the key
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


class Passkey:
    """Makes prompts: the same ones for the same arguments, whatever the policy.

    tokenize   text to tokens, BOS in front if the model wants one
    prose      filler of the template "prose"; not used by "paper"
    """

    def __init__(self, tokenize: Callable[[str], Sequence[int]], template: str, prose: str = "", seed: int = 0) -> None:
        self._tokenize = tokenize
        self._task = [TASK] if template == "paper" else []
        self._filler = [FILLER] if template == "paper" else prose.split()
        self._seed = seed

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """A prompt of as much filler as fits into `length` tokens.

        Raises ValueError if not even the task without filler does.
        """
        rng = np.random.default_rng([self._seed, length, round(depth * 1000), trial])
        key = str(rng.integers(10_000, 100_000))
        first = int(rng.integers(len(self._filler)))
        tell = TELL.format(key=key)

        def text(n: int) -> str:
            """With n words (or, in "paper", n times all sentences) of filler."""
            filler = [self._filler[(first + i) % len(self._filler)] for i in range(n)]
            n_before = round(depth * n)
            return " ".join([*self._task, *filler[:n_before], tell, *filler[n_before:], ASK])

        n_least = len(self._tokenize(text(0)))
        if n_least > length:
            raise UserError(f"A prompt of {length} tokens is too short: without filler it has {n_least}.")
        fits, too_many = 0, length  # a unit of filler is a token at least
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if len(self._tokenize(text(middle))) <= length:
                fits = middle
            else:
                too_many = middle
        whole = text(fits)
        begin = whole.index(tell)
        tellings = tuple(
            (len(self._tokenize(whole[: begin + at.start()].rstrip())), len(self._tokenize(whole[: begin + at.end()])))
            for at in re.finditer(key, tell)
        )
        return Prompt(as_tokens(self._tokenize(whole)), key, tellings)


def answer(reader: Reader, prompt: Prompt, detokenize: Callable[[list[int]], bytes]) -> tuple[str, bool]:
    """The model's greedy answer, and whether it could attend to the key until the end of its answer.

    Starts a new stream.
    """
    reader.clear()
    for start in range(0, len(prompt.tokens), reader.n_batch):
        logits = reader.read(prompt.tokens[start : start + reader.n_batch], logits_all=False)
    said: list[int] = []
    while True:
        said.append(int(logits[-1].argmax()))
        text = detokenize(said).decode("utf-8", errors="ignore")
        if re.search(r"\d\D", text) or len(said) == MAX_ANSWER:
            return text, any(all(map(reader.sees, range(*telling))) for telling in prompt.tellings)
        logits = reader.read(as_tokens(said[-1:]), logits_all=False)


def is_right(text: str, key: str) -> bool:
    """Whether the first number in an answer is the key."""
    number = re.search(r"\d+", text)
    return number is not None and number.group() == key


def measure(
    reader: Reader,
    prompts: Sequence[Prompt],
    detokenize: Callable[[list[int]], bytes],
    length: int,
    depth: float,
) -> Cell:
    """Asks each of these prompts, which have this length and depth."""
    correct = reachable = found = 0
    for prompt in prompts:
        text, in_reach = answer(reader, prompt, detokenize)
        right = is_right(text, prompt.key)
        correct += right
        reachable += in_reach
        found += right and in_reach
    return Cell(length, depth, len(prompts), correct, reachable, found)
