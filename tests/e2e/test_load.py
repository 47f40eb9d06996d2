"""Many connections, half of which hang up: nobody else notices."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx
from served import serve

from lminf_edge import LMInfConfig
from lminf_edge.server import Settings

N_CLIENTS, N_QUESTIONS = 40, 4


async def talk(client: httpx.AsyncClient, i: int, rng: random.Random, leaves: bool) -> list[int]:
    """One client's conversation; the status of each answer."""
    messages: list[dict[str, str]] = [{"role": "system", "content": f"You are number {i}. " * 5}]
    statuses = []
    for k in range(N_QUESTIONS):
        messages.append({"role": "user", "content": f"{i}.{k}: " + "the sea was calm. " * rng.randint(1, 200)})
        body: dict[str, Any] = {"messages": messages, "max_tokens": 20, "stream": leaves or rng.random() < 0.5}
        if leaves and k % 2:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                statuses.append(response.status_code)
                await asyncio.sleep(rng.uniform(0, 0.3))  # and hangs up
            messages.pop()
            continue
        response = await client.post("/v1/chat/completions", json=body)
        statuses.append(response.status_code)
        messages.append({"role": "assistant", "content": f"the answer {k}"})
    return statuses


def test_many_clients_half_of_which_hang_up(nano_path: str) -> None:
    settings = Settings(model_name="nano", max_requests=100)
    with serve(
        nano_path, settings, parallel=4, lminf=LMInfConfig(n_global=4, n_local=128), memory_budget=64 << 20
    ) as served:

        async def everyone() -> list[list[int]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=served.url, timeout=600, limits=limits) as client:
                return await asyncio.gather(
                    *(talk(client, i, random.Random(i), leaves=i % 2 == 0) for i in range(N_CLIENTS))
                )

        statuses = asyncio.run(everyone())
        assert {status for each in statuses for status in each} == {200}
        assert sum(map(len, statuses)) == N_CLIENTS * N_QUESTIONS
        deadline = time.monotonic() + 10
        while served.engine.n_busy or served.engine.n_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert served.engine.counters.cancelled > 0
        assert served.engine.call(lambda: served.engine.store.memory_bytes) <= 64 << 20
        # and it still answers
        body = {"messages": [{"role": "user", "content": "Is anybody there?"}], "max_tokens": 3}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
