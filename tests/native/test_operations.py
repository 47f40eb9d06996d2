"""Random operations on several sequences, for every kind of model: each goes on as a fresh run of its tokens would."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from native_context import NativeContext
from reference import models, tiny_models

L, G, N_SEQ = 32, 4, 3
SETTINGS: dict[str, Any] = {"n_ubatch": 16, "n_slack": 24}
# GELU is read from a table of f16
GELU = {"gemma2", "gemma3", "gemma4"}
KINDS = ["llama", "gemma2", "gemma3", "gemma4", "gpt-oss", "qwen3vl", "qwen35", "lfm2", "lfm2-sliding", "jamba"]
KINDS += ["deepseek2", "minicpm3", "mistral3"]


@dataclass(frozen=True)
class Stream:
    """What a sequence has read, and how many sinks it keeps."""

    tokens: tuple[int, ...] = ()
    n_global: int = G


@dataclass
class Player:
    """A context, and what should be in it."""

    path: Path
    context: NativeContext
    rng: np.random.Generator
    tolerance: float
    streams: list[Stream] = field(default_factory=lambda: [Stream()] * N_SEQ)
    saved: list[tuple[Stream, bytes]] = field(default_factory=list)
    marks: dict[int, tuple[Stream, bytes]] = field(default_factory=dict)
    n_refused: int = 0

    def some_tokens(self, n_max: int) -> npt.NDArray[np.int32]:
        return self.rng.integers(3, tiny_models.N_VOCAB, self.rng.integers(1, n_max + 1)).astype(np.int32)

    def any_sequence(self) -> int:
        return int(self.rng.integers(N_SEQ))

    def play(self) -> None:
        names = ["decode", "mark", "return_to_mark", "roll_back"] * 3
        names += ["save", "load", "save_all", "copy", "keep", "clear", "set_sinks"]
        getattr(self, str(self.rng.choice(names)))()
        for seq_id, stream in enumerate(self.streams):
            assert self.context.info(seq_id).stream_pos == len(stream.tokens)

    def decode(self) -> None:
        """Runs of different lengths in the same batches, of some of the sequences."""
        chosen = [s for s in range(N_SEQ) if self.rng.random() < 0.7]
        runs = {s: self.some_tokens(200) for s in chosen}
        for begin in range(0, 200, 16):
            batch = [(s, tokens[begin : begin + 16]) for s, tokens in runs.items() if len(tokens) > begin]
            if batch:
                self.context.decode(*batch)
        for s, tokens in runs.items():
            self.streams[s] = Stream((*self.streams[s].tokens, *tokens.tolist()), self.streams[s].n_global)

    def roll_back(self) -> None:
        """Within what is promised, or refused."""
        s = self.any_sequence()
        tokens, before = self.streams[s].tokens, self.context.info(s)
        kept = max(0, len(tokens) - int(self.rng.choice([3, 30, 400]) * self.rng.random()))
        promised = len(tokens) - kept <= before.n_rollback or kept == 0
        assert self.context.rollback(kept, s) == promised
        if promised:
            # a sequence that begins anew keeps as many sinks as there is room for
            self.streams[s] = Stream(tokens[:kept], self.streams[s].n_global) if kept else Stream()
        else:
            self.n_refused += 1
            assert bytes(self.context.info(s)) == bytes(before)

    def copy(self) -> None:
        source, target = self.any_sequence(), self.any_sequence()
        self.marks.pop(target, None)
        llama_cpp.llama_memory_seq_cp(self.context.memory, source, target, -1, -1)
        self.streams[target] = self.streams[source]

    def keep(self) -> None:
        if self.rng.random() < 0.3:
            s = self.any_sequence()
            llama_cpp.llama_memory_seq_keep(self.context.memory, s)
            self.streams = [stream if i == s else Stream() for i, stream in enumerate(self.streams)]
            self.marks.clear()

    def clear(self) -> None:
        self.marks.clear()
        if self.rng.random() < 0.3:
            llama_cpp.llama_memory_clear(self.context.memory, False)
            self.streams = [Stream()] * N_SEQ
            return
        s = self.any_sequence()
        assert llama_cpp.llama_memory_seq_rm(self.context.memory, s, -1, -1)
        self.streams[s] = Stream()

    def save(self) -> None:
        s = self.any_sequence()
        self.saved.append((self.streams[s], self.context.save(s)))

    def load(self) -> None:
        if self.saved:
            s = self.any_sequence()
            self.marks.pop(s, None)
            self.streams[s], state = self.saved[self.rng.integers(len(self.saved))]
            assert self.context.load(state, s)

    def set_sinks(self) -> None:
        """Only before the first token."""
        s, n_global = self.any_sequence(), int(self.rng.integers(0, G + 1))
        stream = self.streams[s]
        assert self.context.set_sinks(n_global, s) == (not stream.tokens)
        if not stream.tokens:
            self.streams[s] = Stream((), n_global)
            self.marks.pop(s, None)

    def mark(self) -> None:
        """What cannot be taken back is kept apart."""
        s = self.any_sequence()
        self.marks[s] = self.streams[s], self.context.save(s, partial=True)

    def return_to_mark(self) -> None:
        """Within the slack, whatever lies between; further back it may be refused."""
        if not self.marks:
            return
        s = int(self.rng.choice(list(self.marks)))
        marked, state = self.marks[s]
        n_marked = len(marked.tokens)
        if self.streams[s].tokens[:n_marked] != marked.tokens:
            return  # taken back beyond the mark: it is no longer of this stream
        before = self.context.info(s)
        if self.context.load(state, s, partial=True):
            self.streams[s] = marked if marked.tokens else Stream()
        else:
            self.n_refused += 1
            assert len(self.streams[s].tokens) - n_marked > SETTINGS["n_slack"]
            assert bytes(self.context.info(s)) == bytes(before)

    def save_all(self) -> None:
        """The whole context, which loses something and gets it back."""
        size = llama_cpp.llama_state_get_size(self.context.context)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_get_data(self.context.context, state, size) == size > 0
        self.context.decode((self.any_sequence(), self.some_tokens(16)))
        assert llama_cpp.llama_state_set_data(self.context.context, state, size) == size
        self.marks.clear()

    def check(self) -> None:
        """What every sequence makes of the same tokens, against what a fresh run makes of them."""
        probe = self.some_tokens(12)
        actual = [self.context.decode((s, probe)) for s in range(N_SEQ)]
        for s, stream in enumerate(self.streams):
            with NativeContext(self.path, L, G, **SETTINGS) as fresh:
                assert fresh.set_sinks(stream.n_global)
                expected = fresh.feed(np.array([*stream.tokens, *probe], dtype=np.int32))[-len(probe) :]
            assert np.abs(actual[s] - expected).max() < self.tolerance
            self.streams[s] = Stream((*stream.tokens, *probe.tolist()), stream.n_global)


@pytest.mark.parametrize(("name", "n_rs_seq"), [*((name, 0) for name in KINDS), ("qwen35", 8), ("lfm2", 8)])
def test_any_order_of_operations(tmp_path: Path, name: str, n_rs_seq: int) -> None:
    """Ten rounds; n_rs_seq: snapshots of recurrent states, which make a few tokens of them undone."""
    path = models.write(name, tmp_path)
    n_refused = 0
    for seed in range(10):
        settings = SETTINGS | {"n_seq_max": N_SEQ, "n_rs_seq": n_rs_seq, "attention": ("auto", "stock")[seed % 2]}
        with NativeContext(path, L, G, **settings) as context:
            player = Player(path, context, np.random.default_rng(seed), 1e-2 if name in GELU else 5e-4)
            player.decode()  # before the first tokens, a copy cannot be saved
            for _ in range(4):
                for _ in range(12):
                    player.play()
                player.check()
            n_refused += player.n_refused
    assert n_refused > 0
