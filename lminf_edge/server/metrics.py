"""Metrics for Prometheus: ours, and llama-server's by its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lminf_edge.server.errors import ApiError, ErrorResponse
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
            ("background_tokens", "Tokens read while there were no requests.", counters.background_tokens),
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
            ("text_bytes", "Texts of messages with their tokens.", self._service.tokenizer.n_bytes),
            ("memory_budget_bytes", "What these and the conversations may take.", store.memory_budget),
            ("disk_bytes", "Conversations in files.", store.disk_bytes),
            ("disk_budget_bytes", "What these may take.", store.disk_budget),
        ):
            yield GaugeMetricFamily(f"lminf_{name}", text, value=value)


@dataclass
class Figures:
    """What llama-server tells."""

    prefilled: int = 0
    cached: int = 0
    generated: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    batches: int = 0
    batch_parts: int = 0
    longest: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    n_busy: int = 0
    n_waiting: int = 0


def figures(state: ServerState) -> Figures:
    """Of the engine and the embedder together."""
    found = Figures()
    if state.generates:
        engine = state.engine
        counters = engine.counters
        found = Figures(
            prefilled=counters.prefilled_tokens,
            cached=counters.cached_tokens,
            generated=counters.generated_tokens,
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
            batches=counters.batches,
            batch_parts=counters.batch_parts,
            longest=counters.longest,
            drafts=counters.drafts,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            n_busy=engine.n_busy,
            n_waiting=engine.n_waiting,
        )
    if state.embedder is not None:
        embedded = state.embedder.counters
        found.prefilled += embedded.tokens
        found.batches += embedded.batches
        found.batch_parts += embedded.batches
        found.longest = max(found.longest, embedded.longest)
    return found


def llama_server_metrics(f: Figures) -> str:
    """What dashboards made for llama-server read. The client package would rename what does not end in "_total"."""
    found = (
        ("prompt_tokens_total", "counter", "Tokens of prompts that were processed.", f.prefilled),
        ("prompt_tokens_cached_total", "counter", "Tokens of prompts from the cache.", f.cached),
        ("prompt_seconds_total", "counter", "Seconds spent in prefill batches.", f.prefill_seconds),
        ("tokens_predicted_total", "counter", "Tokens generated.", f.generated),
        ("tokens_predicted_seconds_total", "counter", "Seconds spent in decode batches.", f.decode_seconds),
        ("n_decode_total", "counter", "Batches.", f.batches),
        ("n_tokens_max", "counter", "Tokens of the longest stream.", f.longest),
        ("spec_decode_num_draft_tokens_total", "counter", "Tokens of drafts.", f.draft_tokens),
        ("spec_decode_num_accepted_tokens_total", "counter", "Of these, what was right.", f.accepted_tokens),
        ("spec_decode_num_drafts_total", "counter", "Batches with drafts.", f.drafts),
        ("prompt_tokens_seconds", "gauge", "Tokens of prompts per second.", f.prefilled / (f.prefill_seconds or 1.0)),
        ("predicted_tokens_seconds", "gauge", "Tokens generated per second.", f.generated / (f.decode_seconds or 1.0)),
        ("requests_processing", "gauge", "Slots at work.", f.n_busy),
        ("requests_deferred", "gauge", "Requests that have no slot yet.", f.n_waiting),
        ("n_busy_slots_per_decode", "gauge", "Requests per batch.", f.batch_parts / (f.batches or 1)),
    )
    lines = []
    for name, kind, text, value in found:
        lines += [f"# HELP llamacpp:{name} {text}", f"# TYPE llamacpp:{name} {kind}", f"llamacpp:{name} {value}"]
    return "\n".join(lines) + "\n"


@router.get("/metrics", response_class=Response, responses={501: {"model": ErrorResponse}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    state = ServerState.of(request)
    if not state.settings.metrics:
        raise ApiError(501, "This server tells no metrics: it was started with --no-metrics.")
    collector = EngineCollector(state.service) if state.generates else None

    def read() -> bytes:
        ours = b"" if collector is None else bytes(generate_latest(collector))
        return ours + llama_server_metrics(figures(state)).encode()

    def collect() -> Response:
        text = state.engine.call(read) if state.generates else read()  # in its thread: nothing changes meanwhile
        headers = {"Process-Start-Time-Unix": str(int(state.started))}
        return Response(text, media_type=CONTENT_TYPE, headers=headers)

    return await in_thread(request, collect)
