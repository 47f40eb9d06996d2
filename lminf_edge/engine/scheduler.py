"""Serves requests in steps of one micro-batch: admit, batch, decode, sample. It has no thread of its own.

Requests get slots first come, first served; a slot starts with the longest known prefix of the prompt. A batch carries
the next token of every request that decodes and parts of the prompts of the others, so nothing waits longer than a
micro-batch, cancellations included.

A few tokens are generated before their consumer takes them: the cache can roll them back exactly.

With recall, what prefill "tail" skipped of a stream is read in the background: while there are no requests, one more
sequence processes all of its tokens, and then takes its place.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from llama_cpp import llama_cpp as bindings

from lminf_edge.cache.archive import N_SEGMENT
from lminf_edge.cache.checkpoint import Checkpoint, CheckpointError
from lminf_edge.cache.conversation import Conversation, spared, thinned
from lminf_edge.cache.sequence import DecodeError, Logits, Run
from lminf_edge.cache.store import CheckpointStore
from lminf_edge.cache.token_log import TokenLog, Tokens, as_tokens
from lminf_edge.config import Prefill
from lminf_edge.engine.drafts import NgramDrafts
from lminf_edge.engine.prefix import PrefixMatch, find_prefix, newest_checkpoint
from lminf_edge.engine.request import End, Output, Phase, PromptPart, Request, RequestCancelled
from lminf_edge.engine.sampler import make_sampler
from lminf_edge.engine.slot import Slot
from lminf_edge.errors import ModelError, UserError
from lminf_edge.model import Model
from lminf_edge.scores import check_numbers

log = logging.getLogger("lminf_edge.engine")

PENALIZED = 1 << 16  # tokens of the prompt that penalties look back at, at most
N_TAIL = 2  # windows that prefill "tail" processes, see docs/results.md
GATHER = 0.002  # seconds that a batch waits for the others of the last one, where tokens are generated on demand
SAVE_AFTER = 2.0  # seconds; a stream that is idle for this long is written to its file
READ_AFTER = 1.0  # seconds without a request before something is read in the background: programs ask at once


@dataclass
class Counters:
    """Totals since the scheduler was made."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0  # requests that failed with our bug
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    skipped_tokens: int = 0
    background_tokens: int = 0  # skipped ones that were read later, and what had to be read before and after them
    generated_tokens: int = 0
    wasted_tokens: int = 0  # generated ahead, and rolled back
    batches: int = 0
    batch_parts: int = 0  # requests in them, one batch after the other
    longest: int = 0  # tokens of the longest stream so far
    prefill_seconds: float = 0.0  # in batches that held parts of a prompt
    decode_seconds: float = 0.0  # in the others
    restored: int = 0  # checkpoints restored
    from_files: int = 0  # of them, read from a file
    trimmed: int = 0  # conversations that continued without their oldest messages
    checkpoint_failures: int = 0  # checkpoints that could not be made
    drafts: int = 0  # batches with drafts
    draft_tokens: int = 0
    accepted_tokens: int = 0  # of them


@dataclass(frozen=True)
class Reading:
    """How far the stream in a slot has been read in the background, in tokens."""

    slot: int
    n_read: int
    n_tokens: int


@dataclass(frozen=True)
class Told:
    """Where a conversation in a slot is; numbers of tokens."""

    slot: int
    position: int
    skipped: int
    archived: int  # that can be recalled
    unread: int  # of those skipped, to be read in the background
    n_read: int  # in the background, of all of the conversation's


@dataclass(eq=False)
class _Work:
    """The scheduler's state of a request that has a slot."""

    request: Request
    slot: Slot
    match: PrefixMatch
    pending: Tokens = field(default_factory=lambda: as_tokens([]))  # to be processed before the next token is sampled
    n_base: int = 0  # length of the log that the first generated token follows
    n_seen: int = 0  # length of the log that the token being sampled follows
    skip_from: int = 0
    skip_to: int = 0  # once the log has skip_from tokens, skip to this length; 0: skip nothing
    arrived: Future[Checkpoint] | None = None
    reads_for: Slot | None = None  # whose tokens it reads in the background


@dataclass(eq=False)
class _Part:
    """A request's share of a batch."""

    work: _Work
    tokens: Tokens  # int32 (n_tokens,)
    n_drafts: int  # of these, at the end
    n_logits: int  # number of last tokens whose logits are kept
    is_last: bool  # the next token is sampled after this part


class Scheduler:
    """Used by one thread at a time; only `prepare` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        store: CheckpointStore,
        *,
        n_sinks: int | None = None,
        n_recent: int | None = None,
        prefill: Prefill = "full",
        n_tail: int = N_TAIL,
        n_ahead: int = 0,
        keeps_displaced: bool = True,
        reads_skipped: bool = False,
        on_logits: Callable[[int, Logits], None] | None = None,
    ) -> None:
        """
        n_sinks          sinks of streams whose requests do not say; None: as many as fit
        n_recent         tokens that logs keep as they are, at least; None: all
        prefill          for requests that do not say, see Request
        n_tail           windows that prefill "tail" processes
        n_ahead          tokens generated before they are taken, at most half of the slack; where nothing can be rolled
                         back, a token is generated once it has been asked for
        keeps_displaced  make a checkpoint of a stream before another takes its slot, and when it is idle
        reads_skipped    the model's last sequence is no slot: it reads what other streams skipped, if they recall
        on_logits        called after each batch with the log's length and the logits of all tokens (n_tokens, n_vocab),
                         which are then computed; for schedulers of one slot
        """
        self.model, self.store = model, store
        n_states = 0
        if model.sequences[0].has_states:
            n_states = store.room_for_states(len(model.sequences), model.sequences[0].state_bytes)
        self.slots = [Slot(sequence, model.identity, n_recent, n_states) for sequence in model.sequences]
        reader = self.slots.pop() if reads_skipped else None
        self._reader = reader if model.window.n_recall else None
        self._reading: _Work | None = None
        self._progress: tuple[Slot, int] | None = None  # whose tokens were read last, and how many were
        self.counters = Counters()
        self.window = model.window
        self.n_sinks = model.window.n_global if n_sinks is None else min(n_sinks, model.window.n_global)
        self.prefill, self.n_tail = prefill, n_tail
        self.n_ahead = min(n_ahead, model.n_undo // 2)
        self.notify: Callable[[], None] = lambda: None  # called from other threads when there is work
        self._context = model.llama._ctx
        self._keeps_displaced, self._on_logits = keeps_displaced, on_logits
        self._waiting: deque[Request] = deque()
        self._work: dict[Request, _Work] = {}
        self._logits_at: dict[Slot, int] = {}  # batch index of a slot's last token, while its logits are available
        self._decoded = 0.0  # when the last batch ended, in seconds of time.monotonic()
        self._share = 1  # tokens of each prompt in the next batch

    # --- requests -----------------------------------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        """Checks a request and makes its sampler; can take a while. Raises UserError if the request is invalid."""
        prompt = request.prompt
        if len(prompt) == 0:
            raise UserError("The prompt is empty: give at least one token.")
        if prompt.min() < 0 or prompt.max() >= self.model.n_vocab:
            raise UserError(f"The prompt contains token ids outside 0..{self.model.n_vocab - 1}.")
        if request.slot is not None and not 0 <= request.slot < len(self.slots):
            raise UserError(f"There is no slot {request.slot}: the slots are 0 to {len(self.slots) - 1}.")
        if not request.wants_prompt_logits:
            request.sampler = make_sampler(
                request.sampling,
                self.model.llama._model,
                self.window.size,
                seen=lambda: self._seen(request),
                previous=prompt[-PENALIZED:] if request.penalizes_prompt else (),
            )

    def submit(self, request: Request) -> None:
        """Queues a prepared request."""
        self._waiting.append(request)

    def finish(self, request: Request, n_taken: int | None = None, error: BaseException | None = None) -> None:
        """A request is over, wherever it stands; what was generated after the first n_taken tokens is taken back.

        The last token taken has not been processed.
        """
        if request in self._waiting:
            self._waiting.remove(request)
        if request.sampler is not None:
            request.sampler.close()
            request.sampler = None
        if error is not None:
            request.outputs.put(error)
        request.phase = Phase.FINISHED
        work = self._work.pop(request, None)
        if work is None:
            return
        slot, work.slot.request = work.slot, None
        slot.used = time.monotonic()
        if work.reads_for is not None:
            self._reading = None
            if error is not None:
                work.reads_for.n_recall = 0  # it is not tried again
        if n_taken is not None and request.stats.n_generated and slot.conversation is not None:
            n_tokens = work.n_base + max(n_taken - 1, 0)
            if n_tokens < len(slot):
                self.counters.wasted_tokens += len(slot) - n_tokens
                self._truncate(slot, n_tokens)
        if len(slot) == 0:
            self._leave(slot)
            return
        request.stats.position = len(slot) + slot.n_dropped
        request.stats.n_archived = slot.sequence.info().n_archived
        request.stats.n_unread = self._n_unread(slot)
        slot.marks = [mark for mark in slot.marks if mark <= len(slot)]
        if (self._keeps_displaced or slot.sequence.has_states) and work.reads_for is None:
            slot.mark(len(slot))

    def cancel(self, request: Request) -> None:
        """Ends a request whose client is gone; whoever waits for its next token gets RequestCancelled."""
        if request in self._work or request in self._waiting:
            self.counters.cancelled += 1
            self.finish(request, error=RequestCancelled())

    def insert(self, request: Request, n_taken: int, token: int, tokens: Sequence[int]) -> None:
        """Continues a request as if `tokens` had followed `token`, the last of the first n_taken that it generated."""
        work = self._work[request]
        self._truncate(work.slot, min(len(work.slot), work.n_base + n_taken - 1))
        _drain(request)
        request.stats.n_generated = n_taken
        work.pending = as_tokens([token, *tokens])
        work.n_base += len(tokens)
        request.phase, request.finish_reason = Phase.DECODE, None

    def abandon(self) -> None:
        """Ends all requests, because a caller moves the streams; the tokens taken so far stay."""
        for request in list(self._work):
            self.finish(request, request.stats.n_generated - _drain(request))
        self._waiting.clear()

    def length_before(self, request: Request, n_taken: int) -> int:
        """Length of the log that the last of the first n_taken generated tokens follows."""
        return self._work[request].n_base + n_taken - 1

    @property
    def n_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def n_busy(self) -> int:
        """Slots at work."""
        return sum(slot.request is not None for slot in self.slots)

    # --- stepping -----------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` has something to do now."""
        return (
            (self.n_busy < len(self.slots) and any(map(self._free_slots, self._waiting)))
            or any(work.arrived is not None and work.arrived.done() for work in self._work.values())
            or (any(self._is_ready(work) for work in self._work.values()) and self._seconds_to_gather() <= 0)
            or self._seconds_to_reading() == 0
        )

    def step(self) -> None:
        """Admits waiting requests, then decodes one batch: next tokens, and parts of prompts.

        An exception from here is fatal to the scheduler: an error of one request or slot ends that request alone.
        """
        for work in list(self._work.values()):
            if work.arrived is not None and work.arrived.done():
                with self._boundary(work.request):
                    self._restore(work, work.arrived)
        self._admit()
        if self._seconds_to_reading() == 0:
            self._read_skipped()
        parts = [part for part in map(self._next_part, self._ready()) if part is not None]
        if parts:
            self._process(parts)
        self._save_idle()

    def wait(self) -> None:
        """Blocks until a checkpoint that a request waits for has been read, if there is nothing else to do."""
        arriving = [work.arrived for work in self._work.values() if work.arrived is not None]
        if arriving and not self.has_work():
            concurrent.futures.wait(arriving, return_when=concurrent.futures.FIRST_COMPLETED)

    def seconds_until_due(self) -> float | None:
        """Seconds until there is something to do, even if nothing happens; None if there is not."""
        now = time.monotonic()
        due = [slot.used + SAVE_AFTER - now for slot in self.slots if self._is_unsaved(slot)]
        if any(self._is_ready(work) for work in self._work.values()):
            due.append(self._seconds_to_gather())
        if (seconds := self._seconds_to_reading()) is not None:
            due.append(seconds)
        return max(0.0, min(due)) if due else None

    def close(self) -> None:
        """Cancels all requests and saves all streams."""
        for request in [*self._waiting, *self._work]:
            self.finish(request, error=RequestCancelled())
        try:
            for slot in [*self.slots, *([self._reader] if self._reader is not None else [])]:
                self.displace(slot)
        finally:
            self.store.close()

    def eval(self, slot: Slot, tokens: Tokens, n_logits: int) -> int:
        """Processes tokens (n_tokens,) after those in a slot without a request, keeping logits of the last n_logits.

        Returns the batch index of the last. Raises RuntimeError if the library fails; the log then has the tokens that
        were processed.
        """
        if slot.conversation is None:
            slot.clear(Conversation(log=TokenLog(n_recent=slot.n_recent)))
        if slot.n_until_checkpoint() < len(tokens):
            self._keep(slot)
        self._hold(slot)
        [end] = self._decode([(slot, tokens, n_logits)])
        return end

    @contextlib.contextmanager
    def _boundary(self, request: Request) -> Iterator[None]:
        """An exception inside ends only this request."""
        try:
            yield
        except Exception as error:
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        is_callers = request.sampler is not None and error is request.sampler.raised
        if not isinstance(error, UserError) and not is_callers:
            self.counters.failed += 1
            log.error("a request failed", exc_info=error)
        work = self._work.get(request)
        if work is not None:
            with contextlib.suppress(Exception):
                if isinstance(error, ModelError):  # what the stream holds may be no numbers, either
                    work.slot.sequence.clear(work.slot.n_sinks)
                    self._leave(work.slot)
                work.slot.resync()
        self.finish(request, error=error)

    # --- admitting ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free slots to waiting requests, in order."""
        while self.n_busy < len(self.slots):
            found = next(filter(self._free_slots, self._waiting), None)
            if found is None:
                return
            self._waiting.remove(found)
            self._stop_reading()
            with self._boundary(found):
                self._start(found, self._free_slots(found))

    def _free_slots(self, request: Request) -> list[Slot]:
        """The slots that a waiting request may have now."""
        wanted = self.slots if request.slot is None else [self.slots[request.slot]]
        return [slot for slot in wanted if slot.request is None]

    def _start(self, request: Request, free: list[Slot], reads_for: Slot | None = None) -> None:
        n_sinks = self.n_sinks if request.n_sinks is None else request.n_sinks
        if request.continues:
            match = PrefixMatch(len(free[0]), slot=free[0])
        else:
            match = find_prefix(request, n_sinks, self._may_skip(request), free, self.store, self._logits_at)
        slot = match.slot or self._choose(match, free)
        work = self._work[request] = _Work(request, slot, match, reads_for=reads_for)
        slot.request = request
        if reads_for is None:
            request.stats.slot = self.slots.index(slot)
        else:
            self._reading = work
        if match.stored is not None:
            match.stored.conversation.used = time.time()  # so that it is not evicted to make room for itself
            work.arrived = self.store.fetch(match.stored)
            self.displace(slot)
            request.phase = Phase.LOADING
            if work.arrived.done():
                self._restore(work, work.arrived)
            else:
                work.arrived.add_done_callback(lambda _: self.notify())
        elif match.slot is not None and slot.conversation is not None:
            self._reuse(work)
        else:
            self.displace(slot)
            slot.clear(self._new_conversation(request, TokenLog(n_recent=slot.n_recent)), n_sinks)
            self._begin(work)

    def _may_skip(self, request: Request) -> bool:
        wanted = (request.prefill or self.prefill) == "tail" and not request.wants_prompt_logits
        return wanted and not self.model.is_constant

    @staticmethod
    def _new_conversation(request: Request, log: TokenLog | None = None) -> Conversation:
        return Conversation(owner=request.owner, label=request.label, log=log)

    @staticmethod
    def _choose(match: PrefixMatch, free: list[Slot]) -> Slot:
        """A slot to use: the conversation's own, an empty one, or the least recently used."""
        if match.stored is not None:
            for slot in free:
                if slot.conversation is match.stored.conversation:
                    return slot
        return min(free, key=lambda slot: (slot.conversation is not None, slot.used))

    def _reuse(self, work: _Work) -> None:
        """Continues in a slot that holds a prefix of the prompt."""
        request, slot, match = work.request, work.slot, work.match
        conversation = slot.conversation
        assert conversation is not None
        n_tokens = match.n_trimmed or match.n_cached
        if match.n_trimmed:
            pass
        elif request.continues or _is_same(conversation, request, match.n_cached):
            if len(slot) - match.n_cached > self.window.n_slack and self._keeps_displaced:
                self._keep(slot, tip=True)  # more than a correction: the client may come back to this branch
        else:  # another conversation that begins alike: what is here is kept
            if self._keeps_displaced:
                self._keep(slot, tip=True)
            slot.branch(self._new_conversation(request))
            self.store.release(conversation)
        if not self._truncate(slot, n_tokens):
            self._requeue(work)
            return
        if match.n_trimmed:
            slot.trim(request.prompt[: match.n_cached])
            self.counters.trimmed += 1
        self._begin(work)

    def _restore(self, work: _Work, arrived: Future[Checkpoint]) -> None:
        """Continues from a checkpoint that was read."""
        request, slot, match = work.request, work.slot, work.match
        stored = match.stored
        assert stored is not None
        work.arrived = None
        conversation = stored.conversation
        if match.n_trimmed and newest_checkpoint(conversation, self.store, stored.n_sinks, True) is not stored:
            self._requeue(work)  # another request took it in the meantime
            return
        n_tokens = match.n_trimmed or match.n_cached
        try:
            reason = slot.sequence.load(arrived.result(), n_tokens + stored.n_dropped)
            if reason is not None:
                raise CheckpointError(f"The checkpoint cannot be restored: {reason}")
        except (CheckpointError, OSError) as error:  # damaged or missing: the prompt is processed instead
            log.warning("a checkpoint is not used: %s", error)
            self.store.forget(stored)
            self._requeue(work)
            return
        self.counters.restored += 1
        self.counters.from_files += stored.checkpoint is None
        if match.n_trimmed:
            self.store.log(conversation).truncate(n_tokens)
            slot.assign(conversation, stored.n_sinks, stored.n_dropped, stored.n_skipped)
            slot.trim(request.prompt[: match.n_cached])
            self.counters.trimmed += 1
        else:
            if conversation.is_hot or not _is_same(conversation, request, match.n_cached):
                conversation = self._new_conversation(request)
            conversation.set_tokens(request.prompt[: match.n_cached], slot.n_recent)
            slot.assign(conversation, stored.n_sinks, stored.n_dropped, stored.n_skipped)
        self._begin(work)

    def _requeue(self, work: _Work) -> None:
        """The match is no longer usable: the request is admitted again, ahead of the others."""
        request = work.request
        del self._work[request]
        work.slot.request = None
        work.slot.sequence.clear(work.slot.n_sinks)
        work.slot.assign(None)
        request.phase = Phase.WAITING
        if work.reads_for is None:
            self._waiting.appendleft(request)
        else:
            self._reading = None

    def _begin(self, work: _Work) -> None:
        """The slot holds the cached prefix; plans how the rest is processed."""
        request, slot = work.request, work.slot
        conversation = slot.conversation
        assert conversation is not None
        conversation.used = time.time()
        slot.n_recall = self.window.n_recall if request.n_recall is None else request.n_recall
        if self.window.n_recall:
            slot.sequence.set_recall(slot.n_recall)
        if conversation.label or conversation.states:
            self.store.track(conversation)
        n_known = 0 if request.continues else len(slot)
        work.pending = request.prompt[n_known:]
        work.n_base = n_end = len(slot) + len(work.pending)
        skip_from, skip_to = max(len(slot), slot.n_sinks), n_end - self.n_tail * self.model.n_seen
        if self._may_skip(request) and not request.continues and skip_to - skip_from >= self.model.n_seen:
            work.skip_from, work.skip_to = skip_from, skip_to
        ahead = {each for each in request.boundaries if max(len(slot), work.skip_to) < each < n_end}
        marks = thinned(ahead, n_end) | {n_end - 1}
        if slot.sequence.has_states:
            marks = spared(marks, n_end, max(slot.n_states, 1))
        for mark in sorted(marks):
            slot.mark(mark)
        slot.boundaries = [*request.boundaries, n_end - 1]
        request.stats.n_cached = n_known
        request.phase = Phase.PREFILL
        if work.reads_for is not None:
            return
        self.counters.requests += 1
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.cached_tokens += n_known
        self._report(request)

    @staticmethod
    def _report(request: Request) -> None:
        if request.on_progress is not None:
            with contextlib.suppress(Exception):  # a callback's error must not end the request
                request.on_progress(request)

    def _seconds_to_gather(self) -> float:
        """How long the next batch waits for consumers that have just got a token and may soon ask for another: without
        them it takes as long, and they get one of their own."""
        decoding = [work for work in self._work.values() if work.request.phase is Phase.DECODE]
        if self.model.n_undo > 0 or all(map(self._is_ready, decoding)):
            return 0.0
        return self._decoded + GATHER - time.monotonic()

    # --- batches ------------------------------------------------------------------------------------------------------

    def _is_ready(self, work: _Work) -> bool:
        phase = work.request.phase
        if phase is Phase.PREFILL and work.request.wants_prompt_logits:
            return work.request.outputs.qsize() <= 1
        if phase is Phase.DECODE and self.model.n_undo == 0:  # what nobody takes could not be taken back
            return work.request.n_asked > work.request.stats.n_generated
        return phase is Phase.PREFILL or (phase is Phase.DECODE and work.request.outputs.qsize() <= self.n_ahead)

    def _ready(self) -> list[_Work]:
        """Requests with tokens to process; those whose logits are available are sampled at once."""
        ready = []
        for work in sorted(self._work.values(), key=lambda work: work.slot.sequence.seq_id):
            if not self._is_ready(work):
                continue
            if len(work.pending):
                ready.append(work)
            else:
                work.request.phase = Phase.DECODE
                with self._boundary(work.request):
                    self._sample(work, self._logits_at[work.slot], ())
        n_prefill = sum(work.request.phase is Phase.PREFILL for work in ready)
        self._share = max(1, (self.model.n_ubatch - (len(ready) - n_prefill)) // max(1, n_prefill))
        return ready

    def _next_part(self, work: _Work) -> _Part | None:
        """A request's share of the next batch."""
        request, slot = work.request, work.slot
        with self._boundary(request):
            if work.skip_to and len(slot) >= work.skip_from:
                self._skip(work)
            if slot.n_until_checkpoint() == 0:
                self._keep(slot)
            self._hold(slot)
            if request.phase is Phase.DECODE and len(work.pending) <= self._share:
                drafts = self._drafts(work)
                tokens = np.concatenate([work.pending, drafts]) if len(drafts) else work.pending
                return _Part(work, tokens, len(drafts), 1 + len(drafts), is_last=True)
            n_tokens = slot.sequence.piece(len(work.pending), min(self._share, slot.n_until_checkpoint()))
            if work.skip_to:
                n_tokens = min(n_tokens, work.skip_from - len(slot))
            tokens = work.pending[:n_tokens]
            is_last = len(tokens) == len(work.pending)
            n_logits = len(tokens) if request.wants_prompt_logits else int(is_last)
            return _Part(work, tokens, 0, n_logits, is_last)
        return None

    def _skip(self, work: _Work) -> None:
        """The sinks are processed: skips to the last windows."""
        slot, n_skipped = work.slot, work.skip_to - len(work.slot)
        work.skip_to = 0
        if any(mark <= len(slot) for mark in slot.marks):
            self._keep(slot)
        slot.skip(work.pending[:n_skipped])
        work.pending = work.pending[n_skipped:]
        work.request.stats.n_skipped += n_skipped
        self.counters.skipped_tokens += n_skipped

    def _drafts(self, work: _Work) -> Tokens:
        """The draft model's tokens: no more than can be rolled back, fit the batch, and are still wanted."""
        request = work.request
        room = min(self.model.n_undo, self._share - len(work.pending))
        if request.max_tokens is not None:
            room = min(room, request.max_tokens - request.stats.n_generated - 1)
        if request.draft_model is None or room <= 0:
            return as_tokens([])
        if len(self._work) > 1 and isinstance(request.draft_model, NgramDrafts):
            return as_tokens([])  # the others would wait for them, and nobody could tell whether they pay
        recent = np.concatenate([work.slot.log.recent()[-self.window.size :], work.pending])
        return as_tokens(request.draft_model(recent)[:room])

    def _process(self, parts: list[_Part]) -> None:
        """Decodes a batch and samples. If the library refuses it, each part is tried alone, so that only one fails."""
        started = time.perf_counter()
        n_before = [len(part.work.slot) for part in parts]
        try:
            ends = self._decode([(part.work.slot, part.tokens, part.n_logits) for part in parts])
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0].work.request, error)
                return
            for part, n in zip(parts, n_before, strict=True):
                if self._truncate(part.work.slot, n):
                    self._process([part])
                else:
                    self._fail(part.work.request, error)
            return
        seconds = time.perf_counter() - started
        self._decoded = time.monotonic()
        if self._reading is None:  # the figures are those of requests
            self.counters.batches += 1
            self.counters.batch_parts += len(parts)
            if all(part.work.request.phase is Phase.DECODE for part in parts):
                self.counters.decode_seconds += seconds
            else:
                self.counters.prefill_seconds += seconds
        for part, end in zip(parts, ends, strict=True):
            with self._boundary(part.work.request):
                decodes = part.work.request.phase is Phase.DECODE
                n_accepted = self._finish_part(part, end)
                learner = part.work.request.draft_model
                if decodes and len(parts) == 1 and isinstance(learner, NgramDrafts):
                    learner.learn(part.n_drafts, n_accepted, seconds)

    def _decode(self, runs: list[tuple[Slot, Tokens, int]]) -> list[int]:
        """Processes runs of tokens (n_tokens,) with logits of their last ones; returns the batch index of each last.

        Logs are extended first and cut back after an error or an interrupt, so they always agree with the sequences.
        A stream that cannot be rolled back and has got into a batch that failed is emptied.
        """
        self._logits_at.clear()
        before = [slot.sequence.position for slot, _, _ in runs] if self.model.n_undo == 0 else []
        try:
            for slot, tokens, _ in runs:
                slot.log.extend(tokens)
                slot.is_saved = False
            n_logits = [len(tokens) if self._on_logits else n for _, tokens, n in runs]
            ends = self.model.batch.decode(
                [Run(slot.sequence, tokens, n) for (slot, tokens, _), n in zip(runs, n_logits, strict=True)]
            )
        except BaseException as error:
            if isinstance(error, DecodeError):
                for (slot, _, _), position in zip(runs, before, strict=False):
                    if slot.sequence.position != position:
                        slot.sequence.clear(slot.n_sinks)
            for slot, _, _ in runs:
                conversation = slot.conversation
                slot.resync()
                if slot.conversation is None and conversation is not None:
                    self.store.release(conversation)
            raise
        if self.window.n_recall:  # each may soon need a segment more
            room = len(runs) * N_SEGMENT * self.model.parts.archive_token_bytes
            self.store.tend_archives([slot.sequence for slot, _, _ in runs], room)
        for (slot, tokens, _), n, end in zip(runs, n_logits, ends, strict=True):
            if n:
                self._logits_at[slot] = end
            if self._on_logits:
                self._on_logits(len(slot), self.logits(end - len(tokens) + 1, end + 1))
        return ends

    def _finish_part(self, part: _Part, end: int) -> int:
        """Takes a part's tokens as processed, and samples after its last one; returns how many drafts were right."""
        work, request = part.work, part.work.request
        n_new = len(part.tokens) - part.n_drafts
        work.pending = work.pending[n_new:]
        if work.reads_for is not None:
            self.counters.background_tokens += n_new
            self._progress = work.reads_for, len(work.slot)
            if part.is_last:
                self._replace_slot(work)
            return 0
        stats = request.stats
        stats.position = len(work.slot) + work.slot.n_dropped
        self.counters.longest = max(self.counters.longest, stats.position)
        if request.phase is Phase.PREFILL:
            stats.n_prefilled += n_new
            self.counters.prefilled_tokens += n_new
            self._report(request)
            if request.wants_prompt_logits:
                logits = self.logits(end - n_new + 1, end + 1)
                check_numbers(logits)
                request.outputs.put(PromptPart(part.tokens, logits.copy()))
                if part.is_last:
                    self._end(request)
                return 0
        if not part.is_last:
            return 0
        request.phase = Phase.DECODE
        n_accepted = self._sample(work, end - part.n_drafts, part.tokens[n_new:].tolist())
        self.counters.drafts += part.n_drafts > 0
        self.counters.draft_tokens += part.n_drafts
        self.counters.accepted_tokens += n_accepted
        return n_accepted

    # --- reading in the background ------------------------------------------------------------------------------------

    @property
    def reading(self) -> Reading | None:
        """What is read in the background, now or as soon as there is time. May be asked for from any thread."""
        slot = self._unread()
        if slot is None:
            return None
        of, n_read = self._progress or (None, 0)
        return Reading(self.slots.index(slot), n_read if of is slot else 0, len(slot))

    def told_of(self, owner: str, label: str) -> Told | None:
        """Where the conversation of this name is, if it is in a slot."""

        def is_named(slot: Slot) -> bool:
            held = slot.conversation
            return held is not None and (held.owner, held.label) == (owner, label)

        slot = max(filter(is_named, self.slots), key=lambda each: each.used, default=None)
        if slot is None:
            return None
        n_archived, n_unread, reading = slot.sequence.info().n_archived, self._n_unread(slot), self.reading
        number, position = self.slots.index(slot), len(slot) + slot.n_dropped
        n_read = reading.n_read if reading is not None and reading.slot == number else 0
        return Told(number, position, slot.n_skipped, n_archived, n_unread, n_read)

    def _n_unread(self, slot: Slot) -> int:
        """Tokens that a stream skipped and that are to be read in the background."""
        return slot.n_skipped if self._reader is not None and slot.is_unread else 0

    def _unread(self) -> Slot | None:
        """The most recently used stream that has skipped tokens which it could recall."""
        if self._reader is None:
            return None
        return max((slot for slot in self.slots if slot.is_unread), key=lambda slot: slot.used, default=None)

    def _seconds_to_reading(self) -> float | None:
        """Seconds until something can be read in the background, if nothing else happens; None if there is nothing."""
        if self._work or self._waiting or self._unread() is None:
            return None
        return max(0.0, max(slot.used for slot in self.slots) + READ_AFTER - time.monotonic())

    def _read_skipped(self) -> None:
        """Begins to process all of a stream's tokens, or goes on where that was interrupted.

        It is a request as others are, which starts with the longest known prefix; this one has skipped nothing.
        """
        slot, reader = self._unread(), self._reader
        assert slot is not None
        assert slot.conversation is not None
        assert reader is not None
        request = Request(
            slot.log.recent().copy(),
            boundaries=slot.boundaries,
            n_sinks=slot.n_sinks,
            owner=slot.conversation.owner,
            label=slot.conversation.label,
            prefill="full",
            n_recall=slot.n_recall,
        )
        with self._boundary(request):
            self._start(request, [reader], slot)
        if request.phase is Phase.FINISHED:  # it failed
            slot.n_recall = 0
        elif reader.conversation is not None:
            slot.conversation.add_copy(reader.conversation)

    def _stop_reading(self) -> None:
        """A request comes first. What was read so far stays, unless streams that are used need its memory."""
        work, reader = self._reading, self._reader
        if work is None or reader is None:
            return
        self.finish(work.request)
        room = len(self.model.sequences) * N_SEGMENT * self.model.parts.archive_token_bytes
        if reader.conversation is not None and not self.store.archives.has_room(reader.sequence, room):
            self.displace(reader)
            reader.clear()

    def _replace_slot(self, work: _Work) -> None:
        """All has been read: the stream that skipped nothing takes the place of the other."""
        slot, reader = work.reads_for, work.slot
        assert slot is not None
        self.finish(work.request)
        old, new = slot.conversation, reader.conversation
        assert old is not None
        assert new is not None
        reader.used = slot.used
        reader.mark(len(reader))
        self.slots[self.slots.index(slot)], self._reader = reader, slot
        slot.clear()
        for stored in [each for each in old.checkpoints if each.n_skipped]:
            self.store.forget(stored)
        self.store.release(old)
        new.add_copy(old)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _sample(self, work: _Work, at: int, drafts: Sequence[int]) -> int:
        """Samples after the batch's token `at`, and after each draft that was accepted; returns how many were."""
        request, slot = work.request, work.slot
        assert request.sampler is not None
        n_known = len(slot) - len(drafts)
        for i in range(len(drafts) + 1):
            work.n_seen = n_known + i
            logits: Logits | None = None
            if request.wants_sampled:
                token, logits = request.sampler.draw_of(self.logits(at + i, at + i + 1)[0])
            else:
                token = request.sampler.sample(self._context, at + i)
                logits = self.logits(at + i, at + i + 1)[0].copy() if request.wants_logits else None
            stats = request.stats
            stats.first_token = stats.first_token or time.perf_counter()
            stats.n_generated += 1
            self.counters.generated_tokens += 1
            request.outputs.put(Output(token, logits))
            if not request.ignore_eog and self.model.is_eog(token):
                request.finish_reason = "stop"
            elif request.max_tokens is not None and stats.n_generated >= request.max_tokens:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                self._end(request)
            elif i < len(drafts) and token == drafts[i]:
                continue
            if i < len(drafts):
                self._truncate(slot, n_known + i)
            work.pending = as_tokens([token])
            stats.position = len(slot) + slot.n_dropped
            return i
        raise AssertionError("the last sample is after the last draft")

    @staticmethod
    def _end(request: Request) -> None:
        """No more outputs; the slot stays the request's until its consumer calls `finish`."""
        request.phase = Phase.FINISHED
        request.outputs.put(End.END)

    def _seen(self, request: Request) -> Tokens:
        """The recent tokens so far (n_tokens,), for logits processors."""
        work = self._work[request]
        return work.slot.log.recent()[: work.n_seen - work.slot.log.n_base]

    def last_logits(self, slot: Slot) -> Logits | None:
        """Logits (n_vocab,) of a slot's last token, if available; valid until the next batch."""
        at = self._logits_at.get(slot)
        return None if at is None else self.logits(at, at + 1)[0]

    def forget_logits(self, slot: Slot) -> None:
        """To be called when a caller moves a slot's stream."""
        self._logits_at.pop(slot, None)

    def logits(self, start: int, end: int) -> Logits:
        """Logits (end - start, n_vocab) of the tokens start to end of the last batch; valid until the next one."""
        pointer = bindings.llama_get_logits_ith(self._context.ctx, start)
        return np.ctypeslib.as_array(pointer, shape=(end - start, self.model.n_vocab))

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _truncate(self, slot: Slot, n_tokens: int) -> bool:
        """Rolls a slot back to n_tokens. If it cannot, empties the slot and returns False."""
        if n_tokens == len(slot):
            return True
        self._logits_at.pop(slot, None)
        if slot.truncate(n_tokens):
            return True
        log.warning("a stream of %d tokens could not go back to %d and starts again", len(slot), n_tokens)
        slot.sequence.clear(slot.n_sinks)
        self._leave(slot)
        return False

    def _leave(self, slot: Slot) -> None:
        """The slot holds nothing any more, and nothing of it is kept."""
        conversation = slot.conversation
        slot.assign(None)
        if conversation is not None:
            self.store.release(conversation)

    def save_slot(self, number: int, owner: str) -> Checkpoint:
        """A checkpoint of an owner's stream in a slot. Raises UserError."""
        slot = self._idle_slot(number, owner)
        if slot.conversation is None:
            raise UserError(f"Slot {number} is empty.")
        if slot.n_dropped or slot.log.n_base:
            raise UserError(f"Slot {number} has more than its client's last prompt: that cannot be saved.")
        return slot.snapshot()

    def restore_slot(self, number: int, owner: str, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint made by `save_slot` into a slot; what it held is kept. Raises UserError."""
        slot = self._idle_slot(number, None)
        if checkpoint.position != len(checkpoint.log) or checkpoint.log.n_base:
            raise UserError("The file was not saved from a slot.")
        n_sinks = checkpoint.identity.n_global
        if n_sinks > self.window.n_global:
            raise UserError(f"The file has {n_sinks} sinks, there is room for {self.window.n_global}.")
        slot.identity.with_sinks(n_sinks).check(checkpoint.identity)
        self.displace(slot)
        reason = slot.sequence.load(checkpoint)
        if reason is not None:
            raise UserError(f"The file cannot be restored: {reason}.")
        conversation = Conversation(owner=owner, log=checkpoint.log.copy(slot.n_recent))
        slot.assign(conversation, n_sinks, 0, checkpoint.n_skipped)
        conversation.states = {at: state.copy() for at, state in checkpoint.earlier.items()}
        slot.used = time.monotonic()

    def erase_slot(self, number: int, owner: str) -> int:
        """Empties a slot and forgets the conversation that it holds; returns the number of its tokens."""
        slot = self._idle_slot(number, owner)
        n_tokens, conversation = len(slot), slot.conversation
        if conversation is not None:
            self._logits_at.pop(slot, None)
            slot.sequence.clear(slot.n_sinks)
            self._leave(slot)
            forgotten = [conversation, *conversation.copies]
            reader = self._reader
            if reader is not None and reader.conversation in forgotten:
                reader.sequence.clear()
                self._leave(reader)
            for each in forgotten:
                for stored in list(each.checkpoints):
                    self.store.forget(stored)
        return n_tokens

    def _idle_slot(self, number: int, owner: str | None) -> Slot:
        """A slot that is not at work, and holds nothing of another owner if one is given. Raises UserError."""
        if not 0 <= number < len(self.slots):
            raise UserError(f"There is no slot {number}: the slots are 0 to {len(self.slots) - 1}.")
        slot = self.slots[number]
        if slot.request is not None:
            raise UserError(f"Slot {number} is at work: try again later.")
        if owner is not None and slot.conversation is not None and slot.conversation.owner != owner:
            raise UserError(f"Slot {number} holds a conversation of another API key.")
        self._stop_reading()
        return slot

    def displace(self, slot: Slot) -> None:
        """Empties a slot, whatever is to come into it; what it held is kept as a checkpoint."""
        conversation = slot.conversation
        self._logits_at.pop(slot, None)
        if conversation is None:
            return
        if self._keeps_displaced:
            self._keep(slot, tip=True)
            self.store.save(conversation)
        self._leave(slot)
        self.store.trim()

    def _keep(self, slot: Slot, tip: bool = False) -> None:
        """Makes a checkpoint for the marks passed and, with `tip`, for the stream's end.

        Checkpoints are optional: a failure is logged and counted.
        """
        if slot.conversation is None or len(slot) == 0:
            return
        if not slot.is_saved:
            if tip:
                slot.mark(len(slot))
            try:
                made = slot.checkpoint()
                if made is not None:
                    self.store.add(slot.conversation, *made)
            except Exception:
                log.exception("a checkpoint could not be made")
                self.counters.checkpoint_failures += 1
            slot.is_saved = tip
        slot.marks = [mark for mark in slot.marks if mark > len(slot)]

    def _hold(self, slot: Slot) -> None:
        """Keeps the recurrent state where a mark asks for it; optional, as checkpoints are."""
        try:
            if slot.hold_state() and slot.conversation is not None:
                self.store.hold(slot.conversation)
        except Exception:
            log.exception("a recurrent state could not be kept")
            self.counters.checkpoint_failures += 1

    def _is_unsaved(self, slot: Slot) -> bool:
        return self._keeps_displaced and slot.request is None and slot.conversation is not None and not slot.is_saved

    def _save_idle(self) -> None:
        for slot in self.slots:
            if self._is_unsaved(slot) and time.monotonic() - slot.used >= SAVE_AFTER:
                assert slot.conversation is not None
                self._keep(slot, tip=True)
                self.store.save(slot.conversation)
                self.store.trim()


def _drain(request: Request) -> int:
    """Takes what the consumer has not; returns how many tokens that were."""
    n_tokens = 0
    with contextlib.suppress(queue.Empty):
        while True:
            n_tokens += isinstance(request.outputs.get_nowait(), Output)
    return n_tokens


def _is_same(conversation: Conversation, request: Request, n_tokens: int) -> bool:
    """Whether a prompt that shares its first n_tokens is the conversation itself, or another that begins alike.

    A conversation with a name is continued by that name alone: what others add must not get into it.
    """
    return request.label == conversation.label and 2 * n_tokens >= conversation.n_tokens
