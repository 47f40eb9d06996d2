"""Whatever two clients do to their histories, neither is served anything but its own.

Each answer is that of a fresh stream of the request's tokens. The exception has a name: a conversation that its client
labels and trims may go on as the longer stream it was.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import joined, run
from conftest import F32
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from reference import kinds, random_model

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import as_tokens, common_prefix
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine

MARK = 5  # the control token that messages begin with
SYSTEM = [1, *range(30, 37)]
CANNED = [[MARK, *range(40 + 20 * i, 50 + 20 * i)] for i in range(3)]  # everybody asks these
SEEDS = itertools.count()
WINDOW = LMInfConfig(n_global=4, n_local=64)
SETTINGS: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1, **F32}
N_ANSWER = 6


@dataclass
class Chat:
    """A client's history: messages of tokens, the first of them the system's, and what its label stands for."""

    owner: str
    label: str
    messages: list[list[int]] = field(default_factory=lambda: [SYSTEM])


class Clients(RuleBasedStateMachine):
    """Some chats of two owners, and several of each, with one engine whose memory has room for few of them."""

    alone: Llama
    path: str
    n_vocab: int
    parallel: int
    folder: Path | None

    def __init__(self) -> None:
        super().__init__()
        self.place = None
        if self.folder is not None:
            self.place = Path(tempfile.mkdtemp(dir=self.folder))
        self.engine: Engine = self.load()
        self.chats = [Chat("a", "x"), Chat("a", ""), Chat("b", "x"), Chat("b", "")]
        self.now = 0
        self.sent: dict[str, list[list[int]]] = {"a": [], "b": []}  # streams of each owner, trimmed ones whole
        self.shown: dict[str, list[list[int]]] = {"a": [], "b": []}  # and what it has shown of them

    def load(self) -> Engine:
        # never more than a few checkpoints: each has about half a MB
        return load_engine(
            self.path, parallel=self.parallel, lminf=WINDOW, folder=self.place, memory_budget=4 << 20, **SETTINGS
        )

    def teardown(self) -> None:
        self.engine.close()
        self.engine.model.close()

    @property
    def chat(self) -> Chat:
        return self.chats[self.now]

    def say(self, length: int) -> list[int]:
        # never the same twice, in any example
        return [MARK, *np.random.default_rng(next(SEEDS)).integers(100, self.n_vocab, length).tolist()]

    def ask(self) -> None:
        """Sends the history, and adds the answer to it."""
        chat = self.chat
        prompt = joined(chat.messages)
        # as a chat template says it: only if the first message begins with a control token
        n_system = len(SYSTEM) if chat.messages[1][0] == MARK else None
        boundaries = np.cumsum([len(message) for message in chat.messages]).tolist()[:-1]
        stats, answer, first = run(
            self.engine,
            prompt,
            N_ANSWER,
            owner=chat.owner,
            label=chat.label,
            n_system=n_system,
            boundaries=boundaries,
        )
        mine = self.shown[chat.owner]
        n_known = max((common_prefix(as_tokens(each), as_tokens(prompt)) for each in mine), default=0)
        streams = [prompt]
        n_dropped = stats.position - N_ANSWER - len(prompt)
        if n_dropped:
            assert chat.label
            streams = self.trimmed(chat, prompt, n_dropped)
            assert stats.n_cached > len(SYSTEM)
        else:
            assert stats.n_cached <= n_known
        differences = []
        for stream in streams:
            self.alone.reset()
            self.alone.eval(stream)
            differences.append(np.abs(first - self.alone.scores[-1]).max())
        assert min(differences) < 1e-3
        stream = streams[int(np.argmin(differences))]
        self.sent[chat.owner].append([*stream, *answer])
        mine.append([*prompt, *answer])
        chat.messages.append(answer)

    def trimmed(self, chat: Chat, prompt: list[int], n_dropped: int) -> list[list[int]]:
        """Streams that this owner's prompt may be the end of: with n_dropped tokens after the system block."""
        found = []
        for stream in self.sent[chat.owner]:
            rest = stream[len(SYSTEM) + n_dropped :]
            n_same = common_prefix(as_tokens(rest), as_tokens(prompt[len(SYSTEM) :]))
            if n_same > 0 and rest[0] == MARK:
                found.append([*stream[: len(SYSTEM) + n_dropped], *prompt[len(SYSTEM) :]])
        assert found
        return [list(each) for each in {tuple(each) for each in found}]

    @rule(length=st.integers(1, 120))
    def append(self, length: int) -> None:
        self.chat.messages.append(self.say(length))
        self.ask()

    @rule(i=st.integers(0, len(CANNED) - 1))
    def append_what_everybody_asks(self, i: int) -> None:
        self.chat.messages.append(CANNED[i])
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 2)
    @rule()
    def regenerate(self) -> None:
        self.chat.messages.pop()
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 2)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        messages = self.chat.messages
        k = data.draw(st.sampled_from(range(1, len(messages), 2)))
        messages[k:] = [self.say(data.draw(st.integers(1, 60)))]
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 4)
    @rule(data=st.data())
    def delete_in_the_middle(self, data: st.DataObject) -> None:
        messages = self.chat.messages
        k = data.draw(st.sampled_from(range(1, len(messages) - 2)))
        del messages[k : k + data.draw(st.integers(1, 2))]
        messages.append(self.say(10))
        self.ask()

    @precondition(lambda self: len(self.chat.messages) > 4)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        messages = self.chat.messages
        k = data.draw(st.sampled_from(range(3, len(messages), 2)))
        messages[1:] = [*messages[k:], self.say(20)]
        self.ask()

    @rule(data=st.data())
    def attack(self, data: st.DataObject) -> None:
        """The end of another chat, with what everybody asks before it."""
        chat = self.chat
        other = data.draw(st.sampled_from(self.chats))
        n_last = data.draw(st.integers(1, 3))
        chat.messages = [SYSTEM, *[list(each) for each in other.messages[1:][-n_last:]], self.say(12)]
        self.ask()

    @rule(i=st.integers(0, 3))
    def switch(self, i: int) -> None:
        self.now = i

    @precondition(lambda self: self.place is not None)
    @rule()
    def restart(self) -> None:
        self.teardown()
        self.engine = self.load()
        assert self.engine.store.failures.n_damaged == self.engine.store.failures.n_failed == 0

    @invariant()
    def budget(self) -> None:
        store = self.engine.store
        # what answers were added to the logs since is only counted at the end of the next turn
        assert self.engine.call(lambda: store.memory_bytes) <= 1.05 * store.memory_budget
        assert self.engine.counters.failed == 0


@pytest.mark.parametrize(("parallel", "on_disk"), [(1, True), (2, False)])
@pytest.mark.parametrize("model", ["plain", "qwen35", "lfm2-sliding", "gpt-oss"])
def test_any_history(nano_f32_path: str, tmp_path: Path, model: str, parallel: int, on_disk: bool) -> None:
    """Also of models whose streams cannot take back every token, some of whose layers are recurrent or slide."""
    path = nano_f32_path
    if model != "plain":
        path = str(random_model.write(model, kinds.KINDS[model].model, tmp_path, seed=1))
    alone = Llama(path, lminf=WINDOW, **SETTINGS)
    names: dict[str, Any] = {"alone": alone, "path": path, "n_vocab": alone.n_vocab(), "parallel": parallel}
    names["folder"] = tmp_path if on_disk else None
    try:
        run_state_machine_as_test(
            type("TheseClients", (Clients,), names),
            settings=settings(
                max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        alone.close()
