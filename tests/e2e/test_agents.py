"""Agents far past the window, by each API: nothing is refused, and only what is new is read.

They print how long the first token takes in early and in late turns. What grows with the length is the text itself,
which is sent, parsed and compared as a whole: next to the tiny model's work it shows, next to a real one's it does not.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_client import AGENTS, NAME, Agent, ResponsesAgent
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings

N_OUTPUT = 5000  # tokens of a tool's output
SMOL = Path(__file__).parents[2] / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def outputs(served: Served, n: int) -> list[str]:
    """Texts of N_OUTPUT tokens each, all different."""
    llm, words = served.service.llm, Path(__file__).read_text().split()
    rng = np.random.default_rng(0)
    texts = []
    for i in range(n):
        text = f"Page {i}: " + " ".join(rng.choice(words, N_OUTPUT))
        tokens = llm.tokenize(text.encode(), add_bos=False)[:N_OUTPUT]
        texts.append(llm.detokenize(tokens).decode("utf-8", "ignore"))
    return texts


def run(served: Served, agent: Agent, n_turns: int) -> None:
    for i, text in enumerate(["", *outputs(served, n_turns - 1)]):
        said = "Look the pages up." if i == 0 else None
        turn = agent.ask(said, text if i else None)
        agent.turns.append(turn)
        assert set(turn.arguments) == {"page", "mode"}
        assert turn.arguments["mode"] in ("whole", "part")
        if i:
            grown = turn.n_prompt - agent.turns[-2].n_prompt
            assert grown > 0.9 * N_OUTPUT
            # what is new, and of the last answer what its template renders in another way
            assert turn.n_new < grown + 100, (i, turn)


def report(name: str, agent: Agent) -> None:
    early = statistics.median(turn.first for turn in agent.turns[8:13])
    late = statistics.median(turn.first for turn in agent.turns[-5:])
    last = agent.turns[-1]
    print(f"\n{name}: {len(agent.turns)} turns, {last.n_prompt} tokens, {early:.3f} s, then {late:.3f} s")


@pytest.mark.parametrize("api", sorted(AGENTS))
def test_200_turns(nano_path: str, api: str, tmp_path: Path) -> None:
    window = LMInfConfig(n_global=4, n_local=252, prefill="tail")
    more: Any = {"max_sinks": 256, "pin_system": True, "folder": tmp_path, "n_threads": 2, "n_threads_batch": 2}
    with serve(nano_path, Settings(model_name="nano", max_body=64 << 20), lminf=window, **more) as served:
        agent = AGENTS[api](served.url)
        run(served, agent, 200)
        report(api, agent)
        assert agent.turns[-1].n_sinks > 4  # the system block
        if api != "chat":
            assert 15 < sum(turn.is_compacted for turn in agent.turns) < 25


@pytest.mark.skipif(not SMOL.exists(), reason="make real-models downloads it")
@pytest.mark.parametrize("api", sorted(AGENTS))
def test_40_turns_of_a_real_model(api: str, tmp_path: Path) -> None:
    window = LMInfConfig(n_global=10, n_local=502, prefill="tail")
    more: Any = {"max_sinks": 256, "pin_system": True, "folder": tmp_path, "n_threads": 2, "n_threads_batch": 2}
    with serve(str(SMOL), Settings(model_name="smol", max_body=64 << 20), lminf=window, **more) as served:
        agent = AGENTS[api](served.url)
        run(served, agent, 40)
        report(api, agent)


@pytest.mark.skipif(not SMOL.exists(), reason="make real-models downloads it")
def test_the_200th_turn_takes_as_long_as_the_10th() -> None:
    window = LMInfConfig(n_global=10, n_local=502, prefill="tail")
    more: Any = {"max_sinks": 256, "pin_system": True, "n_threads": 2, "n_threads_batch": 2}
    with serve(str(SMOL), Settings(model_name="smol", max_body=64 << 20), lminf=window, **more) as served:
        texts = outputs(served, 205)
        agents = []
        for n_turns in (10, 200):
            agent = ResponsesAgent(served.url, [{"role": "user", "content": "Look the pages up."}])
            agent.compact_at = 1 << 40
            for i in range(n_turns - 1):
                call = {"call_id": f"call_{i}", "name": NAME, "arguments": '{"page": 1, "mode": "whole"}'}
                agent.history.append({"type": "function_call", **call})
                agent.history.append({"type": "function_call_output", "call_id": f"call_{i}", "output": texts[i]})
            agent.ask(None, None)
            agents.append(agent)
        for text in texts[200:]:  # by turns, so that both have the same machine
            for agent in agents:
                agent.turns.append(agent.ask(None, text))
                assert agent.turns[-1].n_new < 1.1 * N_OUTPUT
        early, late = (statistics.median(turn.first for turn in agent.turns) for agent in agents)
        print(f"\nturn 10: {early:.3f} s, turn 200: {late:.3f} s")
        assert late < 1.2 * early
