"""Whatever a client does to its history, the answer is that of a fresh stream of the same tokens."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lminf_edge import Llama, LMInfConfig
from lminf_edge.engine import Engine, load_engine

SYSTEM = [1, 300, 301, 302, 303, 304, 305, 306]
SEEDS = itertools.count()
# with everything in f32, another order of additions is all that can differ
SETTINGS: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}


@dataclass
class Chat:
    """A client's history: messages of tokens, the first of them the system's, and the stream that stands for it."""

    messages: list[list[int]] = field(default_factory=lambda: [SYSTEM])
    stream: list[int] = field(default_factory=list)  # what was really processed, dropped messages and all

    def tokens(self) -> list[int]:
        return [token for message in self.messages for token in message]

    def boundaries(self) -> list[int]:
        return np.cumsum([len(message) for message in self.messages]).tolist()[:-1]


class Client(RuleBasedStateMachine):
    """Some chats with one engine whose memory has room for few of them."""

    engine: Engine
    alone: Llama

    def __init__(self) -> None:
        super().__init__()
        self.chats = [Chat()]
        self.now = 0

    @property
    def chat(self) -> Chat:
        return self.chats[self.now]

    def say(self, length: int) -> list[int]:
        # never the same twice, in any example: the engine knows them all
        return np.random.default_rng(next(SEEDS)).integers(300, 1900, length).tolist()

    def ask(self) -> None:
        """Sends the history, and adds the answer to it."""
        chat = self.chat
        prompt = chat.tokens()
        sampler = llama_cpp._internals.LlamaSampler()
        sampler.add_greedy()
        turn = self.engine.begin(prompt, sampler, boundaries=chat.boundaries(), wants_logits=True)
        answer: list[int] = []
        first = None
        with contextlib.closing(turn.tokens()) as given:
            for token in given:
                first = turn.logits.copy() if first is None and turn.logits is not None else first
                if len(answer) == 8:
                    break
                answer.append(token)
        # read as it was sent, or gone on with what was known
        as_sent = turn.position - len(answer) == len(prompt)
        stream = prompt if as_sent else chat.stream + chat.messages[-1]
        assert turn.position == len(stream) + len(answer)
        self.alone.reset()
        self.alone.eval(stream)
        np.testing.assert_allclose(first, self.alone.scores[-1], atol=1e-3, rtol=0)
        chat.stream = [*stream, *answer]
        chat.messages.append(answer)

    @rule(length=st.integers(1, 150))
    def append(self, length: int) -> None:
        self.chat.messages.append(self.say(length))
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 2)
    @rule()
    def regenerate(self) -> None:
        chat = self.chat
        chat.stream = chat.stream[: len(chat.stream) - len(chat.messages.pop()) - len(chat.messages[-1])]
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 2)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        chat = self.chat
        k = data.draw(st.sampled_from(range(1, len(chat.messages), 2)))
        if len(chat.stream) != len(chat.tokens()):
            k = len(chat.messages) - 2  # of a stream with dropped messages, only its end is known to be the same
        n_after = sum(map(len, chat.messages[k:]))
        chat.stream = chat.stream[: len(chat.stream) - n_after]
        chat.messages[k:] = [self.say(data.draw(st.integers(1, 60)))]
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 5)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        chat = self.chat
        k = data.draw(st.sampled_from(range(3, len(chat.messages) - 1, 2)))
        chat.messages = [chat.messages[0], *chat.messages[k:], self.say(20)]
        self.ask()

    @rule()
    def new_chat(self) -> None:
        if len(self.chats) < 4:
            self.chats.append(Chat())
            self.now = len(self.chats) - 1
            self.append(length=40)

    @rule(i=st.integers(0, 3))
    def switch(self, i: int) -> None:
        self.now = i % len(self.chats)

    @invariant()
    def budget(self) -> None:
        store = self.engine.store
        # what answers were added to the logs since is only counted at the end of the next turn
        assert self.engine.call(lambda: store.memory_bytes) <= 1.05 * store.memory_budget


@pytest.mark.parametrize("parallel", [1, 2])
def test_any_history(nano_f32_path: str, parallel: int) -> None:
    window = LMInfConfig(n_global=4, n_local=64)
    engine = load_engine(nano_f32_path, parallel=parallel, lminf=window, memory_budget=12 << 20, **SETTINGS)
    alone = Llama(nano_f32_path, lminf=window, **SETTINGS)
    machine = type("ThisClient", (Client,), {"engine": engine, "alone": alone})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        engine.close()
        engine.llm.close()
        alone.close()
