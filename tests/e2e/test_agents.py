"""Agents far past the window, by each API: nothing is refused, and only what is new is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_client import AGENTS, Agent
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


@pytest.mark.parametrize("api", sorted(AGENTS))
def test_200_turns(nano_path: str, api: str, tmp_path: Path) -> None:
    window = LMInfConfig(n_global=4, n_local=252, prefill="tail")
    more: Any = {"max_sinks": 256, "pin_system": True, "folder": tmp_path, "n_threads": 2, "n_threads_batch": 2}
    with serve(nano_path, Settings(model_name="nano", max_body=64 << 20), lminf=window, **more) as served:
        agent = AGENTS[api](served.url)
        run(served, agent, 200)
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
