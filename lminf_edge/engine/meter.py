"""What an answer took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lminf_edge.engine.voice import Voice


@dataclass
class Meter:
    """What an answer took, all of its choices together."""

    voice: Voice
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None  # when the first token came
    n_prompt: int = 0
    n_cached: int = 0
    n_completion: int = 0

    def add_turn(self, is_first: bool = True) -> None:
        """A choice is complete; the prompt counts with the first of several."""
        turn = self.voice.turn
        if turn is not None and is_first:
            self.n_prompt += len(turn.prompt)
            self.n_cached += turn.n_cached
        if turn is not None:
            self.first = self.first or turn.first_given
        self.n_completion = self.voice.n_completion

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_completion,
            "total_tokens": self.n_prompt + self.n_completion,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }

    def timings(self) -> dict[str, Any]:
        """In llama.cpp's form: tokens, and milliseconds."""
        now = time.perf_counter()
        first = self.first or now
        n_read, read_ms, answer_ms = self.n_prompt - self.n_cached, 1e3 * (first - self.started), 1e3 * (now - first)
        return {
            "cache_n": self.n_cached,
            "prompt_n": n_read,
            "prompt_ms": round(read_ms, 3),
            "prompt_per_second": _rate(n_read, read_ms),
            "predicted_n": self.n_completion,
            "predicted_ms": round(answer_ms, 3),
            "predicted_per_second": _rate(self.n_completion - 1, answer_ms),
        }

    def stream(self) -> dict[str, Any]:
        """Where the stream is."""
        engine = self.voice.engine
        turn = self.voice.turn
        return {
            "position": 0 if turn is None else turn.position,
            "sink": engine.n_sinks if turn is None else turn.n_sinks,
            "window": engine.window.n_local,
            "kv_bytes": engine.kv_bytes,
            **({"warning": self.voice.warning} if self.voice.warning else {}),
        }


def _rate(n_tokens: int, milliseconds: float) -> float:
    return round(1e3 * n_tokens / milliseconds, 2) if milliseconds > 0 and n_tokens > 0 else 0.0
