"""Train one of the embedded models on a CPU, within a time budget.

    python training/train.py --model nano --data FOLDER --minutes 75 --out RUN

FOLDER holds books as .txt files. RUN receives tokenizer.model, checkpoint.pt (every three minutes), log.jsonl and, in
the end, the model as GGUF. The same command run again goes on from the checkpoint; --minutes is the budget of all runs
together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from data import KEY_WEIGHT, Mixture, Tokens, Windows, encode_book, read_books, train_tokenizer
from export import write_gguf
from model import CONFIGS, Model, ModelConfig
from torch import Tensor

WARMUP_STEPS = 100
HOLD = 0.2  # share of the budget at the full rate; from there it falls linearly to zero
LOG_STEPS = 50
CHECKPOINT_SECONDS = 180


@dataclasses.dataclass
class TrainingProgress:
    """What a run has done so far, and of what it may do: seconds of training, compilation not counted."""

    budget: float
    seconds: float = 0.0
    step: int = 0
    n_tokens: int = 0
    key_nll: float = math.inf  # mean -log p of digits that can be copied, over the last LOG_STEPS steps

    @property
    def share(self) -> float:
        return self.seconds / self.budget

    def learning_rate(self, peak: float) -> float:
        return peak * min(1.0, (self.step + 1) / WARMUP_STEPS, max(0.0, (1 - self.share) / (1 - HOLD)))


def make_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms; the rate is set at every step."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [model.token_embd.weight], "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]


def load_data(folder: Path, run: Path, n_vocab: int) -> tuple[sentencepiece.SentencePieceProcessor, list[Tokens]]:
    """The tokenizer of a run, trained if it has none yet, and the books as tokens."""
    texts = list(read_books(folder).values())
    path = run / "tokenizer.model"
    if not path.exists():
        train_tokenizer(texts, path, n_vocab)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    books = [encode_book(tokenizer, text) for text in texts]
    n_tokens = sum(len(book) for book in books)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"{len(books)} books, {n_tokens / 1e6:.2f} M tokens of {n_bytes / n_tokens:.2f} bytes")
    return tokenizer, books


class Run:
    """A training run in a folder."""

    def __init__(self, name: str, config: ModelConfig, folder: Path, budget: float, peak_rate: float) -> None:
        """Raises ValueError if the folder holds a checkpoint of another model."""
        self.name = name
        self.folder = folder
        self.peak_rate = peak_rate
        self.model = Model(config)
        self.optimizers = make_optimizers(self.model)
        self.progress = TrainingProgress(budget)
        if (folder / "checkpoint.pt").exists():
            self.load(folder / "checkpoint.pt")
        self.loss = torch.compile(self._loss)

    def load(self, path: Path) -> None:
        checkpoint = torch.load(path)
        if checkpoint["config"] != dataclasses.asdict(self.model.config):
            raise ValueError(f"{path} is of a model of another shape: choose another --out.")
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = TrainingProgress(self.progress.budget, **checkpoint["progress"])

    def save(self) -> None:
        checkpoint = {
            "name": self.name,
            "config": dataclasses.asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {k: v for k, v in dataclasses.asdict(self.progress).items() if k != "budget"},
        }
        torch.save(checkpoint, self.folder / "checkpoint.part")
        os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.pt")  # never half a checkpoint

    def _loss(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of -log p, and every -log p: scalar and (batch, n_ctx), in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(tokens[:, :-1])
        nll = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nll = nll.view_as(weights)
        return (nll * weights).mean(), nll.detach()

    def compile(self, n_windows: int) -> None:
        """Takes most of a minute, so it is done before the clock starts."""
        n_ctx = self.model.config.n_ctx
        tokens = torch.zeros(n_windows, n_ctx + 1, dtype=torch.long)
        self.loss(tokens, torch.zeros(n_windows, n_ctx))[0].backward()
        self.model.zero_grad()

    def mixture(self) -> Mixture:
        return Mixture.at(self.progress.share, self.progress.key_nll)

    def step(self, windows: Windows, n_windows: int) -> tuple[Tensor, Tensor]:
        """One step; returns weights and -log p of the targets, (n_windows, n_ctx) each."""
        tokens, weights = (torch.from_numpy(a) for a in windows.batch(n_windows, self.mixture()))
        loss, nll = self.loss(tokens.long(), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.progress.learning_rate(self.peak_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.n_tokens += weights.numel()
        return weights, nll

    def train(self, windows: Windows, n_windows: int) -> None:
        """Train until the budget is spent, with a line of the log every LOG_STEPS steps."""
        progress = self.progress
        books: list[float] = []  # mean -log p of the windows without anything synthetic
        keys: list[float] = []  # and of the digits to be copied
        self.compile(n_windows)
        clock = saved = shown = time.monotonic()
        with (self.folder / "log.jsonl").open("a") as log:
            while progress.share < 1:
                weights, nll = self.step(windows, n_windows)
                now = time.monotonic()
                progress.seconds += now - clock
                clock = now
                plain = (weights == 1).all(1)
                books += nll[plain].mean(1).tolist()
                keys += nll[weights == KEY_WEIGHT].tolist()
                if progress.step % LOG_STEPS == 0:
                    progress.key_nll = float(np.mean(keys or [np.nan]))
                    line = {
                        "step": progress.step,
                        "tokens": progress.n_tokens,
                        "share": round(progress.share, 4),
                        "book_nll": round(float(np.mean(books or [np.nan])), 4),
                        "key_nll": round(progress.key_nll, 4),
                        "tokens_per_s": round(LOG_STEPS * weights.numel() / (now - shown)),
                    }
                    print(json.dumps(line), flush=True)
                    print(json.dumps(line), file=log, flush=True)
                    books, keys, shown = [], [], now
                if now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = now
        self.save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--minutes", type=float, default=75, help="of training, all runs together (default: 75)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (default: 8)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    config = CONFIGS[args.model]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        run = Run(args.model, config, args.out, 60 * args.minutes, args.rate)
        tokenizer, books = load_data(args.data, args.out, config.n_vocab)
        windows = Windows(books, tokenizer, config.n_ctx, seed=args.seed + run.progress.step)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    run.train(windows, args.batch)
    for file_type in ("f16", "q8_0"):
        write_gguf(run.model, tokenizer, args.out / f"{args.model}-{file_type}.gguf", file_type, args.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
