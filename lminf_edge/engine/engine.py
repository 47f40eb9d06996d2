"""Several endless conversations with one model, decoding together.

One thread owns the context. Requests come from any other as turns: a turn gets a sequence of the context, first come
first served, that holds as much of its prompt as can be had; the rest is read in parts of one micro-batch, shared with
whatever else is read and with the next tokens of those that answer. So nothing waits for longer than a micro-batch,
and whoever goes away is noticed as soon.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as bindings

from lminf_edge.checkpoint import CheckpointError
from lminf_edge.config import Window
from lminf_edge.engine.params import Defaults
from lminf_edge.engine.segments import SegmentTokenizer, chat_template
from lminf_edge.engine.slot import Slot
from lminf_edge.engine.snapshots import Conversation, Snapshot, SnapshotStore, thinned
from lminf_edge.engine.token_log import ANCHOR, TokenLog
from lminf_edge.engine.turn import Phase, Progress, Turn, TurnCancelled
from lminf_edge.errors import UserError
from lminf_edge.history import Tokens, as_tokens, common_prefix
from lminf_edge.llama import Llama
from lminf_edge.sequence import Logits, Run, State

ON_TRIM = ("continue", "reread")

# a conversation that was not used for so many seconds is written to its file
SAVE_AFTER = 2.0
# how long those that have their next token ready wait for those that look at theirs, in seconds
GRACE = 0.002


@dataclass(frozen=True)
class Found:
    """Where a prompt can be taken up."""

    n_cached: int  # tokens of the prompt that need not be read
    slot: Slot | None = None  # a sequence that holds them, or
    snapshot: Snapshot | None = None  # a snapshot that does
    n_at: int = 0  # tokens of its conversation that the snapshot is taken up at
    shifted: Conversation | None = None  # the conversation of which the client dropped the oldest messages


@dataclass
class Counters:
    """Since the engine was made."""

    turns: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_tokens: int = 0
    answer_tokens: int = 0
    batches: int = 0
    read_seconds: float = 0.0  # of batches that held parts of a prompt
    answer_seconds: float = 0.0  # of the others
    restored: int = 0  # snapshots taken up
    from_files: int = 0  # those of them that had to be read from a file
    shifted: int = 0  # prompts recognised although the oldest messages were missing


class Engine:
    """The sequences of a model loaded with n_seq_max, and the thread that works on them."""

    def __init__(
        self,
        llm: Llama,
        store: SnapshotStore,
        *,
        n_sinks: int | None = None,
        pin_system: bool = False,
        on_trim: str = "continue",
        segment_bytes: int = 32 << 20,
    ) -> None:
        """
        n_sinks        kept of every conversation; None: as many as there is room for
        pin_system     a conversation's system block is kept as sinks as well, as far as there is room
        on_trim        "continue" a stream whose client dropped its oldest messages, or "reread" what the client sends
        segment_bytes  memory for texts whose tokens are remembered
        """
        if on_trim not in ON_TRIM:
            raise UserError(f"on_trim must be one of {', '.join(ON_TRIM)}, not {on_trim!r}.")
        self.llm = llm
        self.store = store
        self.max_sinks = llm.stream.window.n_global
        self.n_sinks = self.max_sinks if n_sinks is None else n_sinks
        self.pin_system = pin_system
        self.segments = SegmentTokenizer(llm, chat_template(llm), segment_bytes)
        self.slots = [Slot(sequence) for sequence in llm.sequences]
        self.counters = Counters()
        self.defaults = Defaults()
        self._kv_bytes = int(llm.stream_info().kv_bytes)
        self.n_ubatch = int(llm.context_params.n_ubatch)
        self._on_trim = on_trim
        self._waiting: deque[Turn] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ending: deque[tuple[Turn, Future[None]]] = deque()
        self._loading: dict[Turn, tuple[Found, Future[State]]] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lminf-engine", daemon=True)
        self._thread.start()

    # --- for any thread -----------------------------------------------------------------------------------------------

    def begin(
        self,
        prompt: Sequence[int] | Tokens,
        sampler: Any,
        *,
        boundaries: Sequence[int] = (),
        n_sinks: int | None = None,
        wants_logits: bool = False,
        wants_prompt_logits: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Turn:
        """A turn that reads `prompt` (n_prompt,) and samples with `sampler`, in its place behind those before it.

        The sampler is the engine's from then on.

        n_sinks None: as many as the engine keeps of every conversation. Raises ValueError for a prompt that is empty or
        has tokens that are none, RuntimeError once the engine is closed.
        """
        tokens = as_tokens(prompt)
        if len(tokens) == 0:
            raise UserError("The prompt is empty: give at least one token.")
        if tokens.min() < 0 or tokens.max() >= self.llm.n_vocab():
            raise UserError(f"The prompt has tokens that are none: this model's are 0 to {self.llm.n_vocab() - 1}.")
        turn = Turn(
            engine=self,
            prompt=tokens,
            boundaries=boundaries,
            n_sinks=self.n_sinks if n_sinks is None else min(n_sinks, self.max_sinks),
            sampler=sampler,
            wants_logits=wants_logits,
            wants_prompt_logits=wants_prompt_logits,
            on_progress=on_progress,
        )
        with self._wake:
            if self._closing:
                raise RuntimeError("The engine has been closed.")
            self._waiting.append(turn)
            self._wake.notify()
        return turn

    def ask(self, turn: Turn) -> None:
        """The next token, please."""
        with self._wake:
            if turn.phase is Phase.GIVEN:
                assert turn.slot is not None
                turn.phase = Phase.READING if len(turn.slot) < len(turn.prompt) else Phase.ASKED
                self._wake.notify()

    def cancel(self, turn: Turn) -> None:
        with self._wake:
            if turn.phase is not Phase.DONE:
                turn.cancelled = True
                turn.give(TurnCancelled())
                self._wake.notify()

    def end(self, turn: Turn) -> None:
        """Ends a turn and waits until what it said is on disk."""
        done: Future[None] = Future()
        with self._wake:
            if turn.phase is Phase.DONE:
                return
            closing = self._closing
            if not closing:
                self._ending.append((turn, done))
                self._wake.notify()
        if closing:  # it may still be at work on this turn
            self._thread.join()
        else:
            done.result()

    def call(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, run between two batches by the thread that owns the context."""
        result: Future[Any] = Future()
        with self._wake:
            if self._closing:
                raise RuntimeError("The engine has been closed.")
            self._calls.append((function, result))
            self._wake.notify()
        return result.result()

    def close(self) -> None:
        """Cancels all turns, writes what is to be kept and ends the thread. The model stays open."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether turns are answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def window(self) -> Window:
        """What a conversation attends to."""
        return self.llm.stream.window

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV buffers; the same for ever."""
        return self._kv_bytes

    @property
    def n_waiting(self) -> int:
        """Turns that have no sequence yet."""
        return len(self._waiting)

    @property
    def n_busy(self) -> int:
        """Sequences at work."""
        return sum(slot.turn is not None for slot in self.slots)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wait()
                    if self._closing:
                        break
                    calls, endings = list(self._calls), list(self._ending)
                    self._calls.clear()
                    self._ending.clear()
                    cancelled = [turn for turn in [*self._waiting, *self._turns()] if turn.cancelled]
                for turn in cancelled:
                    self._finish(turn)
                for turn, done in endings:
                    try:
                        self._finish(turn, done)
                    except Exception as error:
                        done.set_exception(error)
                for function, result in calls:
                    self._answer(function, result)
                self._take_up_loaded()
                self._admit()
                self._step()
                self._save_idle()
        finally:
            self._shut_down()

    def _turns(self) -> list[Turn]:
        return [slot.turn for slot in self.slots if slot.turn is not None]

    def _wait(self) -> None:
        """Until there is something to do."""

        def has_work() -> bool:
            turns = self._turns()
            return bool(
                self._closing
                or self._calls
                or self._ending
                or (self._waiting and len(turns) < len(self.slots))
                or any(turn.cancelled for turn in [*self._waiting, *turns])
                or any(turn.phase in (Phase.READING, Phase.ASKED) for turn in turns)
                or any(state.done() for _, state in self._loading.values())
            )

        self._wake.wait_for(has_work, timeout=self._seconds_until_save())
        if any(turn.phase is Phase.ASKED for turn in self._turns()):
            self._wake.wait_for(
                lambda: self._ending or all(turn.phase is not Phase.GIVEN for turn in self._turns()), timeout=GRACE
            )

    @staticmethod
    def _answer(function: Callable[[], Any], result: Future[Any]) -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    def _shut_down(self) -> None:
        with self._wake:
            self._closing = True
            turns = [*self._waiting, *self._turns()]
            endings, self._ending = list(self._ending), deque()
            calls, self._calls = list(self._calls), deque()
        for turn in turns:
            turn.give(TurnCancelled())
            self._finish(turn)
        for _, done in endings:
            done.set_result(None)
        for _, result in calls:
            result.set_exception(RuntimeError("The engine has been closed."))
        try:
            for slot in self.slots:
                self._displace(slot)
        finally:
            self.store.close()

    # --- taking up ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives sequences to waiting turns, in their order."""
        while self._waiting:
            free = [slot for slot in self.slots if slot.turn is None]
            if not free:
                return
            with self._wake:
                turn = self._waiting.popleft()
            try:
                self._start(turn, self._find(turn, free), free)
            except Exception as error:
                turn.give(error)
                self._finish(turn)

    def _find(self, turn: Turn, free: list[Slot]) -> Found:
        if turn.wants_prompt_logits:
            return Found(0)  # all of it is to be read
        prompt = turn.prompt
        n_max = len(prompt) - 1  # the last token is processed again, for its logits
        best = Found(0)
        log = TokenLog(prompt)
        for slot in free:
            if slot.conversation is None or slot.n_sinks != turn.n_sinks:
                continue
            n_same = common_prefix(slot.log.view(), prompt)
            if n_same > best.n_cached:
                log = TokenLog(prompt, like=slot.log, n_same=n_same)
            n_same = min(n_same, n_max)
            if n_same > best.n_cached and slot.can_go_back_to(n_same):
                best = Found(n_same, slot=slot)
        kept = self.store.find(log, best.n_cached + 1, n_max, turn.n_sinks)
        if kept is not None:
            best = Found(kept[1], snapshot=kept[0], n_at=kept[1])
        if self._on_trim == "continue" and n_max - best.n_cached >= ANCHOR:
            best = self._find_shifted(turn, free, best)
        return best

    def _find_shifted(self, turn: Turn, free: list[Slot], best: Found) -> Found:
        """Something better than `best` among conversations whose oldest messages the client dropped."""
        for conversation, n_covered, _ in self.store.find_shifted(turn.prompt):
            if n_covered <= best.n_cached:
                break
            for slot in free:
                if slot.conversation is conversation and slot.n_sinks == turn.n_sinks:
                    return Found(n_covered, slot=slot, shifted=conversation)
            if conversation.is_hot:
                continue  # busy with another turn
            log = self.store.log(conversation)
            kept = self.store.find(log, 1, len(log), turn.n_sinks)
            if kept is None or kept[0].conversation is not conversation:
                continue
            if (
                len(log) - kept[1] <= n_covered - best.n_cached
            ):  # or what has to be read again is more than what is saved
                return Found(n_covered, snapshot=kept[0], n_at=kept[1], shifted=conversation)
        return best

    def _start(self, turn: Turn, found: Found, free: list[Slot]) -> None:
        """Assigns a sequence to a turn and brings it to where the prompt is taken up."""
        slot = found.slot or self._choose(found, free)
        slot.turn, turn.slot = turn, slot
        state = None
        if found.snapshot is not None:
            found.snapshot.conversation.used = time.time()  # so that it is not what makes room for itself
            state = self.store.fetch(found.snapshot)
        if found.slot is not None:
            self._take_over(turn, found)
            return
        self._displace(slot)
        if state is None:
            slot.sequence.clear(turn.n_sinks)
            slot.hold(Conversation(log=TokenLog()), turn.n_sinks)
            self._begin_reading(turn)
            return
        self._loading[turn] = (found, state)
        turn.phase = Phase.LOADING
        if state.done():
            self._take_up(turn)
        else:
            state.add_done_callback(lambda _: self._notify())

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _choose(self, found: Found, free: list[Slot]) -> Slot:
        """A sequence to load into: the conversation's own, an empty one, or the one that was not used for longest."""
        if found.snapshot is not None:
            for slot in free:
                if slot.conversation is found.snapshot.conversation:
                    return slot
        return min(free, key=lambda slot: (slot.conversation is not None, slot.used))

    def _take_over(self, turn: Turn, found: Found) -> None:
        """Goes on in a sequence that holds the beginning of the prompt already."""
        slot = found.slot
        assert slot is not None
        assert slot.conversation is not None
        if found.shifted is not None:
            slot.drop_middle(turn.prompt[: found.n_cached])
            self.counters.shifted += 1
        elif not _is_same(slot.conversation, found.n_cached):
            # another conversation that begins alike: what is here is kept
            n_dropped, n_sinks = slot.n_dropped, slot.n_sinks
            self._keep_snapshot(slot)
            slot.sequence.go_back_to(found.n_cached + n_dropped)
            slot.hold(Conversation(log=TokenLog(turn.prompt[: found.n_cached])), n_sinks, n_dropped)
        else:
            if len(slot) - found.n_cached > slot.sequence.window.n_slack:
                self._keep_snapshot(slot)  # more than a correction: someone may come back to what was here
            slot.go_back_to(found.n_cached)
        self._begin_reading(turn)

    def _take_up_loaded(self) -> None:
        for turn, (_, state) in list(self._loading.items()):
            if state.done():
                try:
                    self._take_up(turn)
                except Exception as error:
                    turn.give(error)
                    self._finish(turn)

    def _take_up(self, turn: Turn) -> None:
        """Goes on from a snapshot whose state has arrived."""
        found, arrived = self._loading.pop(turn)
        slot, snapshot = turn.slot, found.snapshot
        assert slot is not None
        assert snapshot is not None
        conversation, n_tokens = snapshot.conversation, found.n_at
        if found.shifted is not None and (conversation.is_hot or len(self.store.log(conversation)) < n_tokens):
            self._look_again(turn, slot)  # another turn took it meanwhile
            return
        try:
            state = arrived.result()
            reason = slot.sequence.load(state)
            if reason is not None:
                raise CheckpointError(f"The snapshot cannot be taken up: {reason}")
        except (CheckpointError, OSError):  # damaged or gone
            self.store.forget(snapshot)
            self._look_again(turn, slot)
            return
        self.counters.restored += 1
        self.counters.from_files += snapshot.data is None
        if n_tokens < snapshot.n_tokens:
            slot.sequence.go_back_to(n_tokens + snapshot.n_dropped)
        if found.shifted is not None:
            log = self.store.log(conversation)
            turn.replay = log.view()[n_tokens:].copy()
            conversation.become(log.view()[:n_tokens].copy())
            slot.hold(conversation, snapshot.n_sinks, snapshot.n_dropped)
            turn.n_cached = found.n_cached
            self.counters.shifted += 1
            if len(turn.replay):
                turn.drop_middle_at = n_tokens + len(turn.replay)
            else:
                slot.drop_middle(turn.prompt[: found.n_cached])
        else:
            n_cached = found.n_cached
            if conversation.is_hot or not _is_same(conversation, n_cached):
                conversation = Conversation(log=TokenLog())
            else:
                self.store.log(conversation)
            conversation.become(turn.prompt[:n_cached])
            slot.hold(conversation, snapshot.n_sinks, snapshot.n_dropped)
        self._begin_reading(turn)

    def _look_again(self, turn: Turn, slot: Slot) -> None:
        """What was found is not to be had: the turn looks for something else, ahead of the others."""
        slot.turn = turn.slot = None
        turn.phase = Phase.WAITING
        with self._wake:
            self._waiting.appendleft(turn)

    def _begin_reading(self, turn: Turn) -> None:
        slot = turn.slot
        assert slot is not None
        n_cached = turn.n_cached = turn.n_cached or len(slot)
        assert slot.conversation is not None
        slot.conversation.used = time.time()
        self.counters.turns += 1
        self.counters.prompt_tokens += len(turn.prompt)
        self.counters.cached_tokens += n_cached
        if turn.drop_middle_at < 0:
            self._mark(turn, slot)
        turn.phase = Phase.READING

    @staticmethod
    def _mark(turn: Turn, slot: Slot) -> None:
        """Asks to be able to go back to messages of the prompt that are still to be read, and to its end."""
        n_prompt = len(turn.prompt)
        ahead = {each for each in turn.boundaries if len(slot) < each < n_prompt}
        for mark in sorted(thinned(ahead, n_prompt) | {n_prompt - 1}):
            slot.mark(mark)

    # --- working ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One micro-batch: the next token of all that answer, and parts of the prompts that are being read."""
        turns = sorted(self._turns(), key=lambda turn: turn.slot.sequence.seq_id if turn.slot else 0)
        asked = [turn for turn in turns if turn.phase is Phase.ASKED]
        reading = [turn for turn in turns if turn.phase is Phase.READING]
        if not asked and not reading:
            return
        share = max(1, (self.n_ubatch - len(asked)) // max(1, len(reading)))
        runs, parts = [], []
        for turn in turns:
            if turn not in asked and turn not in reading:
                continue
            slot = turn.slot
            assert slot is not None
            if slot.n_until_snapshot() == 0:
                self._keep_snapshot(slot, tip=False)
            if turn in asked:
                tokens, n_logits = as_tokens([turn.token]), 1
            else:
                tokens, is_last = turn.next_part(min(share, slot.n_until_snapshot()))
                n_logits = len(tokens) if turn.wants_prompt_logits else int(is_last)
            runs.append(Run(slot.sequence, tokens, n_logits))
            parts.append((turn, slot))
        started = time.perf_counter()
        try:
            ends = self.llm.decoder.decode(runs)
        except Exception as error:
            for turn, slot in parts:
                slot.agree()
                turn.give(error)
                self._finish(turn)
            return
        self._count(runs, len(asked), time.perf_counter() - started)
        for (turn, slot), run, end in zip(parts, runs, ends, strict=True):
            slot.log.extend(run.tokens)
            slot.is_saved = False
            turn.position = len(slot) + slot.n_dropped
            if turn.phase is Phase.READING:
                self._read(turn, slot, run, end)
                if len(slot) < len(turn.prompt) or turn.drop_middle_at >= 0:
                    continue
            if not turn.wants_prompt_logits:
                self._sample(turn, end)

    def _count(self, runs: list[Run], n_asked: int, seconds: float) -> None:
        self.counters.batches += 1
        self.counters.answer_tokens += n_asked
        self.counters.read_tokens += sum(len(run.tokens) for run in runs) - n_asked
        if len(runs) > n_asked:
            self.counters.read_seconds += seconds
        else:
            self.counters.answer_seconds += seconds

    def _read(self, turn: Turn, slot: Slot, run: Run, end: int) -> None:
        """A part of a prompt has been processed."""
        turn.n_read += len(run.tokens)
        if turn.drop_middle_at == len(slot):
            slot.drop_middle(turn.prompt[: turn.n_cached])
            self._mark(turn, slot)
            turn.drop_middle_at = -1
        if turn.on_progress is not None:
            with contextlib.suppress(Exception):  # the work does not depend on who watches it
                turn.on_progress(turn.progress)
        if turn.wants_prompt_logits:
            turn.phase = Phase.GIVEN
            turn.give((run.tokens, np.stack([self._logits(i) for i in range(end - len(run.tokens) + 1, end + 1)])))

    def _sample(self, turn: Turn, end: int) -> None:
        """The next token, from the logits of the batch's token `end`."""
        if turn.wants_logits:
            turn.logits = self._logits(end)
        try:
            token = turn.sampler.sample(self.llm._ctx, end)
        except Exception as error:  # of a logits processor or a grammar
            turn.give(error)
            self._finish(turn)
            return
        turn.token = token
        turn.first_given = turn.first_given or time.perf_counter()
        turn.phase = Phase.GIVEN
        turn.give(token)

    def _logits(self, i: int) -> Logits:
        """A copy of the logits (n_vocab,) of the batch's token i."""
        pointer = bindings.llama_get_logits_ith(self.llm.ctx, i)
        logits: Logits = np.ctypeslib.as_array(pointer, shape=(self.llm.n_vocab(),)).copy()
        return logits

    # --- ending -------------------------------------------------------------------------------------------------------

    def _finish(self, turn: Turn, done: Future[None] | None = None) -> None:
        """A turn is over, wherever it stood; `done` is told when its conversation is in the index."""
        written = None
        with self._wake:
            if turn in self._waiting:
                self._waiting.remove(turn)
            was_done, turn.phase = turn.phase is Phase.DONE, Phase.DONE
        self._loading.pop(turn, None)
        slot, turn.slot = turn.slot, None
        if not was_done:
            self.counters.cancelled += turn.cancelled
            turn.sampler.close()
        if slot is not None and slot.turn is turn:
            slot.turn = None
            slot.used = time.monotonic()
            if turn.drop_middle_at >= 0 and slot.conversation is not None:
                # half way through a replay: the sequence is neither what it was nor what it was to become
                slot.log.extend(turn.replay[len(slot) - turn.drop_middle_at + len(turn.replay) :])
                slot.conversation.n_tokens = len(slot)
                slot.sequence.clear()
                slot.hold(None)
            if slot.conversation is not None and len(slot):
                slot.end_turn()
                written = self.store.write_turn(slot.conversation)
            elif slot.conversation is not None:
                slot.hold(None)
        if done is None:
            return
        if written is None:
            done.set_result(None)
        else:
            written.add_done_callback(lambda future: _pass_on(future, done))

    def _displace(self, slot: Slot) -> None:
        """Empties a sequence; what it held is kept as a snapshot."""
        if slot.conversation is not None:
            self._keep_snapshot(slot)
            self.store.save(slot.conversation)
            slot.hold(None)
            self.store.trim()

    def _keep_snapshot(self, slot: Slot, tip: bool = True) -> None:
        """Makes a snapshot of the marks that were passed, and with `tip` of the present moment."""
        if slot.conversation is None or slot.is_saved or len(slot) == 0:
            return
        if tip:
            slot.mark(len(slot))
        slot.conversation.n_tokens = len(slot)
        if not tip:
            self.store.write_turn(slot.conversation)  # a snapshot's row needs its conversation's
        snapshot = slot.snapshot()
        if snapshot is not None:
            self.store.add(snapshot)
        slot.is_saved = tip

    def _seconds_until_save(self) -> float | None:
        idle = [slot.used for slot in self.slots if slot.turn is None and slot.conversation and not slot.is_saved]
        return max(0.0, min(idle) + SAVE_AFTER - time.monotonic()) if idle else None

    def _save_idle(self) -> None:
        for slot in self.slots:
            is_idle = slot.turn is None and time.monotonic() - slot.used >= SAVE_AFTER
            if is_idle and slot.conversation is not None and not slot.is_saved:
                self._keep_snapshot(slot)
                self.store.save(slot.conversation)
                self.store.trim()


def _is_same(conversation: Conversation, n_tokens: int) -> bool:
    """Whether a prompt that shares its first n_tokens is the conversation itself, or another that began alike."""
    return 2 * n_tokens >= conversation.n_tokens


def _pass_on(source: Future[None], target: Future[None]) -> None:
    error = source.exception()
    if error is None:
        target.set_result(None)
    else:
        target.set_exception(error)
