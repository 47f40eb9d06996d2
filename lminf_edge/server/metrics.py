"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lminf_edge.engine.engine import Engine
from lminf_edge.server.errors import engine_stopped
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import gone, in_thread

router = APIRouter(tags=["llama.cpp"])

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EngineCollector(Collector):
    """Reads the engine when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counters, store = self._engine, self._engine.counters, self._engine.store
        for name, text, value in (
            ("turns", "Prompts that were taken up.", counters.turns),
            ("cancelled", "Turns whose client went away.", counters.cancelled),
            ("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens),
            ("cached_tokens", "Of them, those that did not have to be read.", counters.cached_tokens),
            ("read_tokens", "Tokens of prompts that were read.", counters.read_tokens),
            ("answer_tokens", "Tokens of answers.", counters.answer_tokens),
            ("read_seconds", "Time of batches with parts of prompts.", counters.read_seconds),
            ("answer_seconds", "Time of the other batches.", counters.answer_seconds),
            ("batches", "Batches.", counters.batches),
            ("restored", "Conversations taken up from a snapshot.", counters.restored),
            ("restored_from_files", "Of them, those read from a file.", counters.from_files),
            ("shifted", "Prompts recognised without their oldest messages.", counters.shifted),
        ):
            yield CounterMetricFamily(f"lminf_{name}", text, value=value)
        conversations = list(store.conversations.values())
        for name, text, value in (
            ("sequences", "Sequences of the context.", len(engine.slots)),
            ("sequences_busy", "Sequences at work.", engine.n_busy),
            ("waiting", "Turns that have no sequence yet.", engine.n_waiting),
            ("conversations", "Conversations known, in the context or not.", len(conversations)),
            ("kv_bytes", "KV cache; never changes.", engine.kv_bytes),
            ("memory_bytes", "Conversations in memory.", store.memory_bytes),
            ("memory_budget_bytes", "What these may take.", store.memory_budget),
            ("text_bytes", "Texts of messages with their tokens.", engine.segments.n_bytes),
            ("disk_bytes", "Conversations in files.", store.disk_bytes),
            ("disk_budget_bytes", "What these may take.", store.disk_budget),
        ):
            yield GaugeMetricFamily(f"lminf_{name}", text, value=value)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format."""
    engine = ServerState.of(request).engine
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(engine))

    def collect() -> bytes:
        try:
            text: bytes = engine.call(lambda: generate_latest(registry))  # where nothing changes meanwhile
        except RuntimeError:
            if engine.is_alive:
                raise
            raise engine_stopped() from None
        return text

    text = await in_thread(request, collect, lambda: None)
    return gone() if text is None else Response(text, media_type=CONTENT_TYPE)
