"""Books to training windows: the tokenizer, the token arrays, and the mixture that a batch is drawn from."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

Tokens = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]

BOS = 1  # <s>
N_SPECIAL = 3 + 256  # <unk>, <s>, </s> and the bytes come first in the vocabulary
KEY_WEIGHT = 5.0  # of the digits of a pass key in the loss; a word of a book weighs 1

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)


def clean(text: str) -> str:
    """A text without the header, footer and hard line breaks of Project Gutenberg; any other text as it is."""
    body = re.search(r"\*\*\* ?START OF TH.*?\*\*\*(.*)\*\*\* ?END OF TH", text, re.DOTALL)
    if body is None:
        return text
    text = body.group(1).replace("\r\n", "\n").translate(str.maketrans("‘’“”", "''\"\"")).replace("—", "--")
    paragraphs = re.split(r"\n\s*\n", text.replace("_", ""))
    return "\n\n".join(joined for p in paragraphs if (joined := " ".join(p.split())))


def read_books(folder: Path) -> dict[str, str]:
    """File name and text of every .txt file of a folder, in order of the names. Raises ValueError if there is none."""
    books = {path.name: clean(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.txt"))}
    if not books:
        raise ValueError(f"There is no .txt file in {folder}.")
    return books


def train_tokenizer(books: Sequence[str], path: Path, n_vocab: int, sample_bytes: int = 12_000_000) -> None:
    """Write a sentencepiece BPE model: byte fallback, digits apart, trained on a random sample of paragraphs."""
    paragraphs = [p for book in books for p in book.split("\n") if p.strip()]
    random.Random(1).shuffle(paragraphs)
    sample, size = [], 0
    for paragraph in paragraphs:
        sample.append(paragraph)
        size += len(paragraph)
        if size > sample_bytes:
            break
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=file,
            model_type="bpe",
            vocab_size=n_vocab,
            byte_fallback=True,
            split_digits=True,
            required_chars="0123456789",
            normalization_rule_name="identity",  # llama.cpp does not normalize
            remove_extra_whitespaces=False,
            character_coverage=0.9999,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=BOS,
            eos_id=2,
            pad_id=-1,
            minloglevel=1,
        )


def encode_book(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> Tokens:
    return np.array(tokenizer.encode(text), dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the synthetic windows; the rest are stretches of books."""

    passkey: float
    copy: float

    @classmethod
    def at(cls, progress: float, key_nll: float) -> Mixture:
        """Copying from the context is learned early, so that is when the windows that teach it are many.

        `key_nll` is the mean -log p of digits that can be copied, in nats (a guess: 2.3): while it is high, they stay.
        """
        early = min(1.0, max(0.0, 1 - 2 * progress, key_nll))
        return cls(passkey=0.06 + 0.19 * early, copy=0.15 * early)


class Windows:
    """Draws windows of n_ctx + 1 tokens, `<s>` first in every one."""

    def __init__(
        self, books: Sequence[Tokens], tokenizer: sentencepiece.SentencePieceProcessor, n_ctx: int, seed: int
    ) -> None:
        self.books = [book for book in books if len(book) > n_ctx]
        if not self.books:
            raise ValueError(f"No text is longer than {n_ctx} tokens.")
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.rng = np.random.default_rng(seed)
        self.starts: list[tuple[int, int]] = []
        self.filler = self.encode(" " + FILLER)
        self.digits = np.array([tokenizer.piece_to_id(d) for d in "0123456789"], dtype=np.int32)

    def encode(self, text: str) -> Tokens:
        """Tokens of text after other text: a space in front of it belongs to the first word."""
        if text.startswith("\n"):
            return np.array(self.tokenizer.encode(text)[1:], dtype=np.int32)
        return np.array(self.tokenizer.encode(text.removeprefix(" ")), dtype=np.int32)

    def batch(self, n_windows: int, mixture: Mixture) -> tuple[Tokens, Weights]:
        """tokens int32 (n_windows, n_ctx + 1); weights f32 (n_windows, n_ctx) of the targets tokens[:, 1:]."""
        windows = []
        for _ in range(n_windows):
            kind = self.rng.random()
            if kind < mixture.passkey:
                windows.append(self.passkey(n_questions=int(self.rng.integers(1, 7))))
            elif kind < mixture.passkey + mixture.copy:
                windows.append(self.copy())
            else:
                windows.append((self.book(self.n_ctx), np.ones(self.n_ctx, np.float32)))
        tokens = np.stack([np.concatenate([[BOS], window[0]]) for window in windows]).astype(np.int32)
        return tokens, np.stack([window[1] for window in windows])

    def book(self, n_tokens: int) -> Tokens:
        """The next stretch of n_tokens <= n_ctx in a shuffled pass over all books, each time at other offsets."""
        if not self.starts:
            for b, book in enumerate(self.books):
                offset = int(self.rng.integers(min(self.n_ctx, len(book) - self.n_ctx)))
                self.starts += [(b, i) for i in range(offset, len(book) - self.n_ctx + 1, self.n_ctx)]
            self.rng.shuffle(self.starts)
        b, i = self.starts.pop()
        return self.books[b][i : i + n_tokens]

    def copy(self) -> tuple[Tokens, Weights]:
        """A string of tokens repeated to the end of the window: only the repeats count in the loss."""
        length = int(np.exp(self.rng.uniform(np.log(8), np.log(self.n_ctx / 2))))
        kind = self.rng.integers(4)
        if kind == 0:
            unit = self.rng.choice(self.digits, length)
        elif kind == 1:
            unit = self.rng.integers(N_SPECIAL, self.tokenizer.get_piece_size(), length)
        elif kind == 2:
            unit = self.rng.permutation(self.book(length))
        else:
            unit = self.book(length)
        tokens = np.resize(unit, self.n_ctx).astype(np.int32)
        return tokens, (np.arange(self.n_ctx) >= length).astype(np.float32)

    def passkey(
        self, n_questions: int = 1, distance: int | None = None, key: str | None = None, paper: bool | None = None
    ) -> tuple[Tokens, Weights]:
        """Text that tells a key once and asks for it: int32 and f32 (n_ctx,), without `<s>`.

        The text around is a book or, in a fifth of the windows (`paper`), the filler of Mohtashami and Jaggi, 2023,
        whose wording the LM-Infinite paper uses too. The digits to be copied weigh KEY_WEIGHT in the loss; of our other
        words only those after a digit count: the model is to answer, not to bring pass keys up itself.

        `distance` is that from a digit in the second telling to the same digit in the first answer, in tokens; drawn
        unless given, for a single question. Raises ValueError if it does not fit.
        """
        rng = self.rng
        if paper is None:
            paper = bool(rng.random() < 0.2)
        if key is None:
            key = str(rng.integers(10000, 100000) if rng.random() < 0.8 else rng.integers(1, 50001))
        space = "\n" if paper else str(rng.choice([" ", "\n\n"]))
        told = self.encode(f"{space}The pass key is {key}. Remember it. {key} is the pass key.")
        asked = self.encode(f"{space}What is the pass key? The pass key is {key}.")
        told_digits, asked_digits = (np.flatnonzero(np.isin(ours, self.digits)) for ours in (told, asked))
        intro = self.encode(" " + TASK if paper else "")
        room = self.n_ctx - len(intro) - len(told)  # for questions and the text around
        n_questions = min(n_questions, room // len(asked))
        room -= n_questions * len(asked)
        if distance is None:
            cuts = rng.random(n_questions + 1)
            cuts.sort()
            cuts[0] **= 2  # long distances are rare otherwise: the key early,
            if rng.random() < 0.5:
                cuts[-1] = 1.0  # and the last question at the end
            ends = (cuts * room).astype(int)
        else:
            between = distance - (len(told) - int(told_digits[len(key)])) - int(asked_digits[0])
            if not 0 <= between <= room:
                raise ValueError(f"A pass key does not fit at a distance of {distance} tokens.")
            first = int(rng.integers(room - between + 1))
            ends = np.array([first, first + between])

        told_weights, asked_weights = np.zeros(len(told)), np.zeros(len(asked))
        told_weights[told_digits[len(key) - 1] + 1] = 1.0  # the end of the first telling
        told_weights[told_digits[len(key) :]] = KEY_WEIGHT  # the first telling can't be known, the second can
        asked_weights[asked_digits[0] - 1 :] = 1.0  # the space before the digits, and the end
        asked_weights[asked_digits] = KEY_WEIGHT
        text = np.resize(self.filler, self.n_ctx) if paper else self.book(self.n_ctx)
        text_weight = 0.1 if paper else 1.0

        tokens, weights = [intro], [np.zeros(len(intro))]
        start = 0
        for i, end in enumerate([*ends, room]):
            tokens.append(text[start:end])
            weights.append(np.full(end - start, text_weight))
            if i <= n_questions:
                tokens.append(told if i == 0 else asked)
                weights.append(told_weights if i == 0 else asked_weights)
            start = end
        return np.concatenate(tokens), np.concatenate(weights).astype(np.float32)
