"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import in_thread
from lminf_edge.text.service import TextService

router = APIRouter(tags=["llama.cpp"])

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EngineCollector(Collector):
    """Reads the engine's counters at collection."""

    def __init__(self, service: TextService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine = self._service.engine
        counters, store = engine.counters, engine.store
        n_failed = store.failures.n_failed + store.archives.n_failed
        for name, text, value in (
            ("requests", "Requests that got a slot.", counters.requests),
            ("cancelled", "Requests whose client went away.", counters.cancelled),
            ("failed", "Requests that ended with a fault of ours.", counters.failed),
            ("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens),
            ("cached_tokens", "Of them, those that were in the cache.", counters.cached_tokens),
            ("prefilled_tokens", "Tokens of prompts that were processed.", counters.prefilled_tokens),
            ("skipped_tokens", "Tokens of prompts that were skipped.", counters.skipped_tokens),
            ("generated_tokens", "Tokens generated.", counters.generated_tokens),
            ("wasted_tokens", "Tokens generated ahead and taken back.", counters.wasted_tokens),
            ("prefill_seconds", "Seconds spent in prefill batches.", counters.prefill_seconds),
            ("decode_seconds", "Seconds spent in decode batches.", counters.decode_seconds),
            ("batches", "Batches.", counters.batches),
            ("restored", "Conversations restored from a checkpoint.", counters.restored),
            ("restored_from_files", "Of them, those read from a file.", counters.from_files),
            ("trimmed", "Conversations that went on without their oldest messages.", counters.trimmed),
            ("checkpoint_failures", "Checkpoints that could not be made.", counters.checkpoint_failures),
            ("store_failures", "Times that something could not be written or read.", n_failed),
            ("store_damaged", "Conversations and checkpoints that were damaged or missing.", store.failures.n_damaged),
        ):
            yield CounterMetricFamily(f"lminf_{name}", text, value=value)
        infos = [slot.sequence.info() for slot in engine.slots]
        archived, archive_bytes = (
            sum(getattr(info, name) for info in infos) for name in ("n_archived", "archive_bytes")
        )
        for name, text, value in (
            ("slots", "Conversations that fit the context.", len(engine.slots)),
            ("slots_busy", "Slots at work.", engine.n_busy),
            ("waiting", "Requests that have no slot yet.", engine.n_waiting),
            ("conversations", "Conversations known, in the context or not.", len(store.conversations)),
            ("kv_bytes", "KV cache; never changes.", engine.parts.kv_bytes),
            ("archived_tokens", "Tokens that can be recalled, of conversations in the context.", archived),
            ("archive_bytes", "What these take of memory.", archive_bytes),
            ("memory_bytes", "Conversations in memory.", store.memory_bytes),
            ("memory_budget_bytes", "What these may take.", store.memory_budget),
            ("text_bytes", "Texts of messages with their tokens.", self._service.tokenizer.n_bytes),
            ("disk_bytes", "Conversations in files.", store.disk_bytes),
            ("disk_budget_bytes", "What these may take.", store.disk_budget),
        ):
            yield GaugeMetricFamily(f"lminf_{name}", text, value=value)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    service = ServerState.of(request).service
    collector = EngineCollector(service)

    def collect() -> Response:
        text = service.engine.call(lambda: generate_latest(collector))  # in its thread: nothing changes meanwhile
        return Response(text, media_type=CONTENT_TYPE)

    return await in_thread(request, collect)
