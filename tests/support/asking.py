"""Asks an engine as its clients do, and keeps what can be compared with a single stream of the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request, RequestStats

GREEDY = SamplingParams(temperature=0.0)


def submitted(engine: Engine, prompt: Sequence[int] | Tokens, **kwargs: Any) -> Request:
    request = Request(as_tokens(prompt), GREEDY, ignore_eog=True, **kwargs)
    engine.submit(request)
    return request


def run(
    engine: Engine, prompt: Sequence[int] | Tokens, n: int = 0, **kwargs: Any
) -> tuple[RequestStats, list[int], Any]:
    """Processes a prompt and goes on for n tokens; the figures, the tokens, and the logits after the prompt."""
    request = submitted(engine, prompt, wants_logits=True, **kwargs)
    answer: list[int] = []
    first = None
    with contextlib.closing(engine.stream(request)) as outputs:
        for output in outputs:
            if first is None:
                first = output.logits
            if len(answer) == n:
                break
            answer.append(output.token)
    return request.stats, answer, first


def joined(messages: Sequence[Sequence[int]]) -> list[int]:
    return [token for message in messages for token in message]


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=0)
