"""A request to the engine: its parameters, its phase, its outputs, its statistics."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from lminf_edge.cache.sequence import Logits
from lminf_edge.cache.token_log import Tokens
from lminf_edge.config import Prefill
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.sampler import Sampler

DraftModel = Callable[[Tokens], Sequence[int] | Tokens]


class Phase(Enum):
    WAITING = "waiting for a slot"
    LOADING = "waiting for a checkpoint to be read from its file"
    PREFILL = "processing the prompt"
    DECODE = "generating tokens"
    FINISHED = "no more tokens will come"


class RequestCancelled(Exception):
    """The request was cancelled, or the engine closed, before its next token."""


@dataclass(frozen=True)
class Output:
    """A token, and the logits (n_vocab,) that the request wants: see `wants_logits` and `wants_sampled`."""

    token: int
    logits: Logits | None = None


@dataclass(frozen=True)
class PromptPart:
    """For `wants_prompt_logits`: tokens (n_tokens,) of the prompt, and the logits (n_tokens, n_vocab) after each."""

    tokens: Tokens
    logits: Logits


class End(Enum):
    """Follows the last output."""

    END = 0


@dataclass
class RequestStats:
    """What a request cost, in tokens and in seconds of time.perf_counter()."""

    first_token: float | None = None  # when it was generated
    slot: int = -1  # that it got
    n_cached: int = 0  # of the prompt, in the cache
    n_prefilled: int = 0  # of the prompt, processed
    n_skipped: int = 0  # of the prompt, never processed: prefill "tail"
    n_generated: int = 0  # tokens after the prompt; once it is finished, those that were taken
    position: int = 0  # of the stream, skipped and dropped tokens included
    n_archived: int = 0  # of the stream, tokens that can be recalled once they have left the window
    n_unread: int = 0  # of the stream, tokens that were skipped and are read in the background


@dataclass(eq=False)
class Request:
    """What is asked of an engine, and what has become of it.

    prompt               int32 (n_prompt,), never empty
    sampling             how tokens are sampled
    max_tokens           None: no limit
    ignore_eog           continue after an end-of-generation token
    boundaries           where messages begin, in tokens: positions that a later prompt may go back to
    n_sinks              first tokens of the stream to keep; None: the scheduler's default
    n_system             tokens before the first message after the system block, if it begins with a control token
    owner                streams of one owner never serve another
    label                the owner's name for the conversation, which may continue without its oldest messages
    prefill              "tail": of what is not in the cache, process only the first tokens and the last windows
    n_recall             tokens that each layer recalls; None: all that the context has room for
    wants_logits         a copy of the logits comes with each token
    wants_sampled        the same, after all samplers: -inf for tokens that they took away
    wants_prompt_logits  the outputs are PromptParts; all of the prompt is processed, and nothing is generated
    penalizes_prompt     penalties and DRY also count the prompt's tokens, as in llama-server
    slot                 which slot it wants; None: any
    reuses               whether it may start from what is known of its prompt
    continues            `prompt` follows whatever the slot holds; for schedulers of one slot
    draft_model          proposes tokens after recent ones (n_tokens,); accepted ones cost one batch in all
    on_progress          called by the thread that steps the scheduler, before the prompt and after each part of it
    """

    prompt: Tokens
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    ignore_eog: bool = False
    boundaries: Sequence[int] = ()
    n_sinks: int | None = None
    n_system: int | None = None
    owner: str = ""
    label: str = ""
    prefill: Prefill | None = None
    n_recall: int | None = None
    wants_logits: bool = False
    wants_sampled: bool = False
    wants_prompt_logits: bool = False
    penalizes_prompt: bool = False
    slot: int | None = None
    reuses: bool = True
    continues: bool = False
    draft_model: DraftModel | None = None
    on_progress: Callable[[Request], None] | None = None

    phase: Phase = Phase.WAITING
    finish_reason: Literal["stop", "length"] | None = None  # "stop": the end-of-generation token; "length": max_tokens
    sampler: Sampler | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    n_asked: int = 0  # outputs that the consumer has asked for
    outputs: queue.SimpleQueue[Output | PromptPart | End | BaseException] = field(default_factory=queue.SimpleQueue)

    @property
    def n_done(self) -> int:
        """Tokens of the prompt that are cached, skipped or processed."""
        return self.stats.n_cached + self.stats.n_skipped + self.stats.n_prefilled
