"""What is hidden in a long text, and asked for at its end.

paper      Mohtashami & Jaggi 2023 (arXiv:2305.16300), in the wording of the code that LM-Infinite was published with
           (https://github.com/Glaciohound/LM-Infinite, data/passkey_retrieval). Keys always have five digits here: all
           are equally hard. And no space ends the prompt: in many vocabularies that is a token that no digit follows.
multi-key, multi-value, variables
           after RULER (Hsieh et al. 2024, arXiv:2404.06654), with fewer keys and shorter chains, in words of our own:
           the models that this is measured on are small. SmolLM2-135M-Instruct finds the
           number of `variables`, not the way to it: with a second number in the text it was right 2 times in 9.
qa         stands where the paper has Qasper, whose articles and questions are too hard for such models: see stories.py.

All values are drawn for each prompt, so that nobody can know them who was not told.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lminf_edge.evaluate.stories import STORIES

Unit = Literal["word", "sentence", "published", "turn"]


@dataclass(frozen=True)
class Fact:
    """Something that is told.

    value   the part of the text that has to be seen; told again each time it occurs in it
    place   share of the filler that comes before it
    """

    text: str
    value: str
    place: float


@dataclass(frozen=True)
class Answer:
    """One thing that is asked for.

    accepted   any of these is right
    facts      which facts one has to have seen
    """

    accepted: tuple[str, ...]
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Exercise:
    """One question, and what has to be told before.

    cue   how the answer begins; the model goes on
    """

    facts: tuple[Fact, ...]
    ask: str
    cue: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Task:
    """
    unit        what the filler is cut into, and facts stand between
    make        an exercise, from a random generator and the place of the first fact
    intro       what the text begins with
    chat_intro  what it begins with for a model with a chat template, if it has no intro
    n_first     units before the first fact, wherever it is placed
    """

    summary: str
    unit: Unit
    make: Callable[[Any, float], Exercise]
    intro: str = ""
    chat_intro: str = ""
    n_first: int = 0


def _pick(rng: Any, pool: Sequence[Any], n: int) -> list[Any]:
    """n different ones."""
    return [pool[i] for i in rng.choice(len(pool), n, replace=False)]


def _key(rng: Any) -> str:
    return str(rng.integers(10_000, 100_000))


# --- one key ----------------------------------------------------------------------------------------------------------

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TELL = "The pass key is {key}. Remember it. {key} is the pass key."
ASK = "What is the pass key?"
CUE = "The pass key is"


def _pass_key(rng: Any, place: float) -> Exercise:
    key = _key(rng)
    return Exercise((Fact(TELL.format(key=key), key, place),), ASK, CUE, (Answer((key,), (0,)),))


READ = "Here is a text. Remember what it says: I will ask you about it."


# --- facts of several kinds -------------------------------------------------------------------------------------------

NAMES = (
    "Agnes", "Bruno", "Clara", "Dorian", "Edith", "Felix", "Greta", "Hector", "Ingrid", "Jasper", "Klara", "Lionel",
    "Martha", "Nestor", "Olga", "Percy", "Rosalind", "Silas", "Thelma", "Victor",
)  # fmt: skip
TOWNS = (
    "Bristol", "Cardiff", "Dublin", "Vienna", "Lisbon", "Madrid", "Naples", "Geneva", "Boston", "Chicago", "Denver",
    "Oslo", "Prague", "Warsaw", "Athens", "Cairo", "Sydney", "Toronto",
)  # fmt: skip
ANIMALS = (
    "parrot", "monkey", "goat", "hedgehog", "turtle", "rabbit", "raven", "fox", "donkey", "snake", "lizard", "otter",
    "squirrel", "pigeon", "swan", "bear",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A fact whose value is drawn, and the question after it, in other words."""

    tell: str
    ask: str
    cue: str
    values: Sequence[str]


NUMBERS = tuple(str(number) for number in range(112, 1000, 7) if number % 10)

KINDS = (
    Kind(
        "Mr. Garrow had paid {} pounds for his brown horse.",
        "How many pounds did the brown horse of Mr. Garrow cost?",
        "The brown horse of Mr. Garrow cost",
        NUMBERS,
    ),
    Kind(
        "Doctor Lindqvist was born in {}, and had never gone back there.",
        "Where was Doctor Lindqvist born?",
        "Doctor Lindqvist was born in",
        TOWNS,
    ),
    Kind(
        "The miller had a daughter, and her name was {}.",
        "What was the name of the miller's daughter?",
        "The name of the miller's daughter was",
        NAMES,
    ),
    Kind(
        "Captain Orme had a tame {}, which lived in his cabin.",
        "Which animal did Captain Orme have?",
        "Captain Orme had a tame",
        ANIMALS,
    ),
    Kind(
        "There were {} steps from the garden of Hartley Hall down to the sea.",
        "How many steps are there from the garden of Hartley Hall to the sea?",
        "From the garden of Hartley Hall to the sea there are",
        NUMBERS,
    ),
)


def _of_a_kind(kinds: Sequence[Kind]) -> Callable[[Any, float], Exercise]:
    def make(rng: Any, place: float) -> Exercise:
        kind = kinds[rng.integers(len(kinds))]
        value = kind.values[rng.integers(len(kind.values))]
        return Exercise((Fact(kind.tell.format(value), value, place),), kind.ask, kind.cue, (Answer((value,), (0,)),))

    return make


# --- chat -------------------------------------------------------------------------------------------------------------

CHAT_KINDS = (
    Kind(
        "By the way, the number of my locker is {}.",
        "What is the number of my locker?",
        "The number of your locker is",
        NUMBERS,
    ),
    Kind(
        "By the way, my sister lives in the town of {}.",
        "In which town does my sister live?",
        "Your sister lives in the town of",
        TOWNS,
    ),
    Kind(
        "By the way, I was born in the town of {}.",
        "In which town was I born?",
        "You were born in the town of",
        TOWNS,
    ),
    Kind(
        "By the way, I have a tame {} at home.",
        "Which animal do I have at home?",
        "You have a tame",
        ANIMALS,
    ),
    Kind(
        "By the way, my hotel room has the number {}.",
        "Which number does my hotel room have?",
        "Your hotel room has the number",
        NUMBERS,
    ),
)
REPLY = "I will remember it."  # to what is told
SMALL_TALK = (  # what is said about a passage, and what is answered
    ("Please read this: {}", "I have read it."),
    ("Here is the next passage: {}", "Thank you. Please go on."),
    ("Tell me what you think of this: {}", "It is well written."),
    ("Listen to this: {}", "That is interesting."),
    ("And then it says: {}", "I see."),
)


# --- several ----------------------------------------------------------------------------------------------------------

N_KEYS = 3
N_VALUES = 2
N_LINKS = 2


def _several_keys(rng: Any, place: float) -> Exercise:
    names = _pick(rng, NAMES, N_KEYS)
    facts = []
    for i, name in enumerate(names):
        key = _key(rng)
        at = place if i == 0 else float(rng.random())
        facts.append(Fact(f"The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.", key, at))
    name = names[0]
    return Exercise(
        tuple(facts),
        f"What is the pass key of {name}?",
        f"The pass key of {name} is",
        (Answer((facts[0].value,), (0,)),),
    )


def _several_values(rng: Any, place: float) -> Exercise:
    name = _pick(rng, NAMES, 1)[0]
    values = [_key(rng) for _ in range(N_VALUES)]
    facts = tuple(
        Fact(f"One of the lucky numbers of {name} is {value}.", value, (place + i / N_VALUES) % 1)
        for i, value in enumerate(values)
    )
    return Exercise(
        facts,
        f"What are all {N_VALUES} lucky numbers of {name}?",
        f"The {N_VALUES} lucky numbers of {name} are",
        tuple(Answer((value,), (i,)) for i, value in enumerate(values)),
    )


def _variables(rng: Any, place: float) -> Exercise:
    names = _pick(rng, NAMES, N_LINKS)
    key = _key(rng)
    texts = [f"{names[0]} has the number {key}."]
    texts += [f"{after} has the same number as {before}." for before, after in itertools.pairwise(names)]
    facts = tuple(Fact(text, text, place + (1 - place) * i / len(texts)) for i, text in enumerate(texts))
    return Exercise(
        facts,
        f"Which number does {names[-1]} have?",
        f"{names[-1]} has the number",
        (Answer((key,), tuple(range(len(facts)))),),
    )


# --- stories ----------------------------------------------------------------------------------------------------------


def _story(rng: Any, place: float) -> Exercise:
    story = STORIES[rng.integers(len(STORIES))]
    question = story.questions[rng.integers(len(story.questions))]
    return Exercise(
        (Fact(story.text, story.text, place),), question.ask, question.cue, (Answer(question.accepted, (0,)),)
    )


TASKS = {
    "paper": Task(
        "the published prompt: a key in five sentences that come over and over", "published", _pass_key, TASK
    ),
    "prose": Task("a key in prose, as the embedded models were trained on", "word", _pass_key, chat_intro=TASK),
    "facts": Task(f"one of {len(KINDS)} kinds of facts in prose", "sentence", _of_a_kind(KINDS), READ),
    "chat": Task("what the user said in the third turn of a chat, or later", "turn", _of_a_kind(CHAT_KINDS), n_first=2),
    "multi-key": Task(f"the key of one of {N_KEYS} people", "sentence", _several_keys, READ),
    "multi-value": Task(f"{N_VALUES} numbers, told in different places", "sentence", _several_values, READ),
    "variables": Task("a number that is told of somebody else, who has the same", "sentence", _variables, READ),
    "qa": Task("a question about a short story in prose", "sentence", _story, READ),
}
