"""Text in, text out: an engine with the model's chat template, tokenizer, and defaults."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.config import Prefill
from lminf_edge.engine.drafts import NgramDrafts
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.params import Defaults, SamplingParams
from lminf_edge.engine.request import PromptPart, Request
from lminf_edge.errors import UserError
from lminf_edge.text.chat import ChatOptions, ChatPrompt, ChatTemplate, Messages
from lminf_edge.text.detokenizer import Part
from lminf_edge.text.formats import ChatDefaults, find_format
from lminf_edge.text.generation import TextStream
from lminf_edge.text.logprobs import LogprobReporter
from lminf_edge.text.tokenizer import CachedTokenizer, prompt_to_tokens, use_tokenizer

# for texts whose tokens are remembered, least and most: a history of a million tokens takes 10 MB
LEAST_TEXT_BYTES, TEXT_BYTES = 16 << 20, 64 << 20


class TextService:
    """The engine, chat template, tokenizer and defaults that all clients share."""

    def __init__(
        self,
        engine: Engine,
        defaults: Defaults | None = None,
        pin_system: bool = False,
        text_bytes: int = TEXT_BYTES,
        chat: ChatDefaults | None = None,
    ) -> None:
        """
        defaults    for parameters that requests omit
        chat        the same for conversations
        pin_system  keep each conversation's system block as sinks, up to engine.max_sinks
        text_bytes  memory for remembered tokenizations, of the engine's memory budget

        Raises UserError if the model's chat format cannot be used.
        """
        self.engine = engine
        self.llm = engine.model.llama
        use_tokenizer(self.llm)
        self.defaults = defaults or Defaults()
        self.pin_system = pin_system
        chat_format = find_format(self.llm, chat)
        self.tokenizer = CachedTokenizer(self.llm, chat_format.source, text_bytes)
        self.template = ChatTemplate(self.llm, chat_format, self.tokenizer)
        engine.store.bytes_beside = lambda: self.tokenizer.n_bytes  # one budget: memory is full, and stays as it is


@dataclass
class Usage:
    """What all completions of one exchange took together."""

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    n_prompt: int = 0
    n_cached: int = 0
    n_skipped: int = 0
    n_completion: int = 0
    position: int = 0  # of the stream, after the last token
    n_archived: int = 0  # of the stream, tokens that can be recalled
    n_unread: int = 0  # of the stream, tokens that were skipped and are read in the background
    slot: int = -1
    n_sinks: int = 0

    def openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_completion,
            "total_tokens": self.n_prompt + self.n_completion,
            "prompt_tokens_details": {"cached_tokens": self.n_cached, "skipped_tokens": self.n_skipped},
        }

    def timings(self) -> dict[str, Any]:
        """In llama.cpp's format: tokens and milliseconds."""
        now = time.perf_counter()
        first = self.first_token or now
        n_prefilled = self.n_prompt - self.n_cached - self.n_skipped
        prefill_ms, decode_ms = 1e3 * (first - self.started), 1e3 * (now - first)
        n_steps = max(self.n_completion - 1, 0)  # the first token costs none of its own
        return {
            "cache_n": self.n_cached,
            "prompt_n": n_prefilled,
            "prompt_ms": prefill_ms,
            "prompt_per_token_ms": prefill_ms / n_prefilled if n_prefilled else 0.0,
            "prompt_per_second": _rate(n_prefilled, prefill_ms),
            "predicted_n": self.n_completion,
            "predicted_ms": decode_ms,
            "predicted_per_token_ms": decode_ms / n_steps if n_steps else 0.0,
            "predicted_per_second": _rate(n_steps, decode_ms),
        }


class Exchange:
    """One client request, which may take several completions in turn. Used by one thread, cancelled by any."""

    def __init__(
        self,
        service: TextService,
        *,
        owner: str = "",
        label: str = "",
        pin_system: bool | None = None,
        prefill: Prefill | None = None,
        recall: bool | int | None = None,
        slot: int | None = None,
        reuses: bool = True,
        on_progress: Callable[[Request], None] | None = None,
    ) -> None:
        """
        owner, label, slot, reuses  see Request
        pin_system    None: the service's setting
        prefill       None: the engine's setting
        recall        how many tokens each layer recalls; False: none, True or None: the engine's setting
        on_progress   called by the engine's thread during prefill
        """
        self.service = service
        self.usage = Usage()
        self.warning: str | None = None
        self.owner, self._label, self._prefill, self._on_progress = owner, label, prefill, on_progress
        self._slot, self._reuses = slot, reuses
        self._n_recall = None if recall is None or recall is True else self._checked_recall(int(recall))
        self._pins_system = service.pin_system if pin_system is None else pin_system
        self._rendered: tuple[Messages, ChatOptions | None, ChatPrompt] | None = None
        self._request: Request | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def _checked_recall(self, n_recall: int) -> int:
        most = self.service.engine.n_recall
        if not 0 <= n_recall <= most:
            raise UserError(f"recall must be 0 to {most}, or true or false, not {n_recall}.")
        return n_recall

    def chat_prompt(self, messages: Messages, options: ChatOptions | None = None) -> ChatPrompt:
        """See ChatTemplate.render; the same objects are rendered once, as a compaction is decided by the prompt."""
        if self._rendered is None or self._rendered[0] is not messages or self._rendered[1] is not options:
            prompt = self.service.template.render(messages, options, self.owner, self.is_cancelled)
            self._rendered = messages, options, prompt
        return self._rendered[2]

    def text_prompt(self, prompt: str | Sequence[int], suffix: str | None = None) -> ChatPrompt:
        """A prompt without messages: text, before a gap if there is a suffix, or tokens."""
        service = self.service
        tokens = prompt_to_tokens(service.llm, prompt, suffix, service.tokenizer, self.owner, self.is_cancelled)
        text = prompt if isinstance(prompt, str) and suffix is None else ""
        return ChatPrompt(text, tokens)

    def answer(
        self,
        prompt: ChatPrompt,
        sampling: SamplingParams,
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
        logprobs: LogprobReporter | None = None,
        counts_prompt: bool = True,
    ) -> Answer:
        """A completion, generated as it is iterated, by the prompt's grammar if it has one. `counts_prompt`: add the
        prompt's tokens to the usage.

        Raises UserError for an invalid request, RequestCancelled once it is cancelled.
        """
        defaults, engine = self.service.defaults, self.service.engine
        limit = defaults.max_tokens if max_tokens is None or max_tokens < 0 else max_tokens
        request = Request(
            prompt.tokens,
            sampling if prompt.grammar is None else replace(sampling, grammar=prompt.grammar),
            max_tokens=limit,
            boundaries=prompt.boundaries,
            n_sinks=self._n_sinks(prompt),
            n_system=prompt.n_system,
            owner=self.owner,
            label=self._label,
            prefill=self._prefill,
            n_recall=self._n_recall,
            wants_logits=logprobs is not None,
            wants_sampled=logprobs is not None and logprobs.after_sampling,
            slot=self._slot,
            reuses=self._reuses,
            penalizes_prompt=True,
            draft_model=NgramDrafts() if defaults.drafts else None,
            on_progress=self._on_progress,
        )
        self._submit(request)
        text = TextStream(
            self.service.llm,
            engine.stream(request),
            prompt.tokens,
            [*stops, *prompt.stops],
            max_tokens=limit,
            preserved=prompt.preserved,
            logprobs=logprobs,
            detect_loops=defaults.detect_loops and limit is None,
        )
        return Answer(self, request, prompt, text, counts_prompt)

    def prompt_logits(self, tokens: Tokens) -> Iterator[PromptPart]:
        """The logits after each token of a prompt (n_tokens,); all of it is processed."""
        request = Request(tokens, owner=self.owner, wants_prompt_logits=True)
        self._submit(request)
        return self.service.engine.prompt_logits(request)

    def is_cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Cancels the request, from any thread."""
        with self._lock:
            self._cancelled = True
            request = self._request
        if request is not None:
            self.service.engine.cancel(request)

    def stream_info(self) -> dict[str, Any]:
        """The stream's position and memory, as clients see them."""
        engine = self.service.engine
        return {
            "position": self.usage.position,
            "skipped": self.usage.n_skipped,
            "sink": self.usage.n_sinks or engine.n_sinks,
            "window": engine.n_local,
            "kv_bytes": engine.parts.kv_bytes,
            **({"archived": self.usage.n_archived} if engine.n_recall else {}),
            **({"unread": self.usage.n_unread, "slot": self.usage.slot} if self.usage.n_unread else {}),
            **({"warning": self.warning} if self.warning else {}),
        }

    def _submit(self, request: Request) -> None:
        engine = self.service.engine
        engine.submit(request)
        with self._lock:
            self._request = request
        if self._cancelled:
            engine.cancel(request)

    def _n_sinks(self, prompt: ChatPrompt) -> int:
        engine = self.service.engine
        if not self._pins_system or not prompt.n_pinned or engine.model.is_constant:
            return engine.n_sinks
        limit = engine.max_sinks
        if prompt.n_pinned > limit:
            self.warning = (
                f"The system block has {prompt.n_pinned} tokens, of which the first {limit} are kept as sinks: "
                "give a larger --max-sinks to keep all of it."
            )
        return max(engine.n_sinks, min(prompt.n_pinned, limit))


class Answer:
    """The text of one completion, in parts; at the end its cost is added to the exchange's usage."""

    def __init__(
        self, exchange: Exchange, request: Request, prompt: ChatPrompt, text: TextStream, counts_prompt: bool
    ) -> None:
        self.text = text
        self._started = exchange.usage.started if counts_prompt and not exchange.usage.n_prompt else time.perf_counter()
        self._exchange, self._request, self._prompt, self._counts_prompt = exchange, request, prompt, counts_prompt

    @property
    def reports_logprobs(self) -> bool:
        return self._request.wants_logits

    @property
    def slot(self) -> int:
        """The slot it got; -1 before."""
        return self._request.stats.slot

    @property
    def usage(self) -> Usage:
        """What this completion alone has taken so far."""
        stats = self._request.stats
        return Usage(
            started=self._started,
            first_token=stats.first_token,
            n_prompt=len(self._request.prompt),
            n_cached=stats.n_cached,
            n_skipped=stats.n_skipped,
            n_completion=self.text.n_tokens,
        )

    def __iter__(self) -> Generator[Part, None, None]:
        try:
            yield from self.text
        finally:
            self._count()
            self._remember()

    def _count(self) -> None:
        usage, stats = self._exchange.usage, self._request.stats
        if self._counts_prompt:
            usage.n_prompt += len(self._request.prompt)
            usage.n_cached += stats.n_cached
            usage.n_skipped += stats.n_skipped
        usage.first_token = usage.first_token or stats.first_token
        usage.n_completion += self.text.n_tokens
        usage.position, usage.n_archived = stats.position, stats.n_archived
        usage.n_unread, usage.slot = stats.n_unread, stats.slot
        usage.n_sinks = self._request.n_sinks or 0

    def _remember(self) -> None:
        """Remembers the tokens of this completion: the next prompt will contain its text."""
        service = self._exchange.service
        if not self._prompt.text or not self.text.tokens:
            return
        before, special = self._prompt.tokens[-16:].tolist(), bool(self._prompt.preserved)
        text = service.llm.detokenize(self.text.tokens.tolist(), prev_tokens=before, special=special)
        with contextlib.suppress(UnicodeDecodeError):
            answer, owner = text.decode("utf-8"), self._exchange.owner
            service.tokenizer.remember_answer(self._prompt.text, answer, as_tokens(self.text.tokens), owner)


def with_seed(sampling: SamplingParams, i: int) -> SamplingParams:
    """The parameters of choice `i`, with a seed of its own."""
    return sampling if sampling.seed is None or i == 0 else replace(sampling, seed=sampling.seed + i)


def _rate(n_tokens: int, milliseconds: float) -> float:
    return 1e3 * n_tokens / milliseconds if milliseconds > 0 and n_tokens > 0 else 0.0
