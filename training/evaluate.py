"""Judge a checkpoint of train.py, or the last one of a run that is still going on.

    python training/evaluate.py --run RUN --data FOLDER_OF_HELD_OUT_BOOKS

Prints, as JSON, for every book: bits per byte as the second half of windows of `<s>` and 511 tokens has them, and how
much is lost, in nats per token, when that half cannot see `<s>` (or the first four tokens); then the share of pass keys
answered with every digit right, by the distance from the second telling to the answer.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import torch
import torch.nn.functional as F
from data import BOS, KEY_WEIGHT, Tokens, Windows, encode_book, read_books
from model import Model, load_checkpoint


@torch.no_grad()
def window_nll(model: Model, windows: Tokens, batch: int = 8) -> npt.NDArray[np.float32]:
    """-log p of tokens[:, 1:] in nats, f32 (n_windows, n_tokens - 1)."""
    parts = []
    for i in range(0, len(windows), batch):
        tokens = torch.from_numpy(windows[i : i + batch]).long()
        parts.append(F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").numpy())
    return np.concatenate(parts)


def book_windows(tokens: Tokens, n_ctx: int, n_windows: int) -> Tokens:
    """`<s>` and n_ctx - 1 tokens each, spread evenly over a book: int32 (n_windows, n_ctx)."""
    if len(tokens) < n_ctx:
        raise ValueError(f"A text of {len(tokens)} tokens is shorter than the window of {n_ctx}.")
    starts = np.linspace(0, len(tokens) - n_ctx + 1, n_windows).astype(int)
    return np.stack([np.concatenate([[BOS], tokens[i : i + n_ctx - 1]]) for i in starts]).astype(np.int32)


def hidden_first(model: Model, n_hidden: int) -> torch.Tensor:
    """The attention bias with the first n_hidden tokens invisible to the second half of the window."""
    bias: torch.Tensor = model.bias.clone()
    bias[:, model.config.n_ctx // 2 :, :n_hidden] = -torch.inf
    return bias


def judge_book(
    model: Model, tokenizer: sentencepiece.SentencePieceProcessor, tokens: Tokens, n_windows: int
) -> dict[str, float]:
    n_ctx = model.config.n_ctx
    windows = book_windows(tokens, n_ctx, n_windows)
    half = n_ctx // 2
    n_bytes = sum(len(tokenizer.decode(window[half:].tolist()).encode()) for window in windows)
    nll = window_nll(model, windows)[:, half - 1 :]
    result = {
        "bits_per_byte": float(nll.sum() / n_bytes / math.log(2)),
        "nats_per_token": float(nll.mean()),
    }
    seen = model.bias
    for n_hidden in (1, 4):
        model.bias = hidden_first(model, n_hidden)
        # the first query of the second half predicts token half + 1
        lost = window_nll(model, windows)[:, half:].mean() - nll[:, 1:].mean()
        result[f"lost_without_first_{n_hidden}"] = float(lost)
    model.bias = seen
    return result


@torch.no_grad()
def passkey_accuracy(model: Model, windows: Windows, distance: int, n_trials: int, paper: bool) -> float:
    """Share of five-digit keys whose every digit has the largest logit, each after the right ones before it."""
    rows, weights = [], []
    for _ in range(n_trials):
        key = str(windows.rng.integers(10000, 100000))
        row, weight = windows.passkey(distance=distance, key=key, paper=paper)
        rows.append(np.concatenate([[BOS], row]))
        weights.append(weight)
    n_right = 0
    for i in range(0, n_trials, 8):
        tokens = torch.from_numpy(np.stack(rows[i : i + 8])).long()
        right = (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).numpy()
        for ok, weight in zip(right, weights[i : i + 8], strict=True):
            answer = np.flatnonzero(weight == KEY_WEIGHT)[-5:]
            n_right += bool(ok[answer].all())
    return n_right / n_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with checkpoint.pt and tokenizer.model")
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files the model has not seen")
    parser.add_argument("--windows", type=int, default=100, help="windows per book (default: 100)")
    parser.add_argument("--trials", type=int, default=40, help="pass keys per distance (default: 40)")
    args = parser.parse_args()
    model, _ = load_checkpoint(args.run / "checkpoint.pt")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.run / "tokenizer.model"))
    books = {name: encode_book(tokenizer, text) for name, text in read_books(args.data).items()}
    for name, tokens in books.items():
        print(json.dumps({"book": name, **judge_book(model, tokenizer, tokens, args.windows)}), flush=True)
    windows = Windows(list(books.values()), tokenizer, model.config.n_ctx, seed=0)
    for distance in range(40, 440, 50):
        right = {
            wording: passkey_accuracy(model, windows, distance, args.trials, paper)
            for wording, paper in (("books", False), ("paper", True))
        }
        print(json.dumps({"distance": distance, **right}), flush=True)


if __name__ == "__main__":
    main()
