"""llama_cpp.Llama with one more argument: its surface over a scheduler of one slot, stepped in the caller's thread."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import random
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_tokenizer import LlamaTokenizer

from lminf_edge import native
from lminf_edge.cache.checkpoint import Checkpoint, CheckpointError
from lminf_edge.cache.conversation import Conversation
from lminf_edge.cache.saved_state import SavedState, why_nothing_is_recalled
from lminf_edge.cache.sequence import Logits
from lminf_edge.cache.store import CheckpointStore
from lminf_edge.cache.token_log import N_RECENT, TokenLog, Tokens, as_tokens
from lminf_edge.chat_completion import CHAT_ARGUMENTS, chat_options, complete_chat
from lminf_edge.completion import complete
from lminf_edge.config import LMInfConfig, StreamInfo, whole_number
from lminf_edge.engine.params import LogitsProcessor, SamplingParams, as_processors
from lminf_edge.engine.prefix import find_prefix
from lminf_edge.engine.request import End, Output, PromptPart, Request
from lminf_edge.engine.sampler import Sampler, make_sampler
from lminf_edge.engine.scheduler import Scheduler
from lminf_edge.engine.slot import Slot
from lminf_edge.errors import UserError
from lminf_edge.guard import Freed, Guard, StreamTakenError, guarded
from lminf_edge.model import ALL_LAYERS, Model, RemoteLlama
from lminf_edge.models import find_model, path_text
from lminf_edge.scores import ScoreWindow
from lminf_edge.text.chat import ChatOptions, ChatTemplate
from lminf_edge.text.formats import asks_for_format, find_format
from lminf_edge.text.tokenizer import CachedTokenizer, Tokenizer, check_ids, use_tokenizer

STOCK = llama_cpp.Llama  # that name may become ours later, see lminf_edge.patching
_SAMPLE = inspect.signature(STOCK.sample)
_GENERATE = inspect.signature(STOCK.generate)

_CHAT_STOCK = inspect.signature(STOCK.create_chat_completion)
_TEXT_BYTES = 16 << 20  # for texts of conversations whose tokens are remembered

F = TypeVar("F", bound=Callable[..., Any])

# they have something to write, or would wait for ever for a machine that is gone: while Python ends, nothing can tell
_TO_CLOSE: weakref.WeakSet[Llama] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    for llm in list(_TO_CLOSE):
        llm._close_if_idle()


def with_signature(signature: inspect.Signature) -> Callable[[F], F]:
    """Gives a function that forwards its arguments the signature of the function it forwards to."""

    def decorate(function: F) -> F:
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


def _init_signature() -> inspect.Signature:
    """llama_cpp.Llama's signature plus our parameters."""
    stock = inspect.signature(STOCK.__init__)
    parameters = [
        parameter.replace(default=None) if name == "n_ctx" else parameter
        for name, parameter in stock.parameters.items()
    ]
    *before, rest = parameters  # **kwargs is the last
    ours = (("lminf", None), ("checkpoint_folder", None), ("rpc_servers", None))
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in ours]
    return stock.replace(parameters=[*before, *more, rest])


def _chat_signature() -> inspect.Signature:
    """llama_cpp.Llama.create_chat_completion's signature plus CHAT_ARGUMENTS."""
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(ChatOptions(), ours))
        for name, ours in CHAT_ARGUMENTS.items()
    ]
    return _CHAT_STOCK.replace(parameters=[*_CHAT_STOCK.parameters.values(), *more])


_CHAT = _chat_signature()


def _seed(seed: Any) -> int:
    """The seed a user gave; for -1 a new one each time, which llama_cpp promises and does not do."""
    seed = whole_number("seed", seed, -1, 1 << 63)
    return random.SystemRandom().getrandbits(32) if seed == -1 else seed


@guarded(
    shared=(
        *("n_tokens", "n_ctx", "n_embd", "n_vocab", "tokenize", "detokenize", "tokenizer"),
        *("token_bos", "token_eos", "token_nl", "set_seed", "set_cache", "scheduler", "slot"),
    ),
    moving=("eval", "reset", "n_tokens=", "load_state", "restore", "embed"),
    free=("close", "has_stream", "ctx", "model", "model_params"),
)
class Llama(RemoteLlama):
    """llama_cpp.Llama for streams of any length.

    With `lminf=True` or an LMInfConfig the model attends to the first n_global and the last n_local tokens of its
    stream, and memory and time per token stay the same however long it gets:

    - n_ctx, if given, is this attention window n_global + n_local; without it, 4096 tokens, the training length or what
      sparse attention selects, whichever is least. Prompts of any length are streamed through it, and with max_tokens
      None or <= 0 only a stop string or the end-of-text token ends a generation.
    - If a prompt begins with what was processed, only its new tokens are. If it diverges earlier, the cache rolls back
      as far as n_slack allows, or a checkpoint is restored, or the prompt is processed from its start; with
      LMInfConfig(prefill="tail") of that only the first tokens and the last windows.
    - checkpoint_folder keeps streams in files there, a subfolder for each model and window, from one process to the
      next: written when another takes their place, by close() and at the end of the process. One process uses a
      subfolder at a time.
    - rpc_servers, "host:port,host:port" or a list of them, spreads the layers over machines that run `lminf-edge
      rpc-server`: all of them, unless n_gpu_layers says how many. If one of them is gone the process ends.
    - A quantized type_v turns flash_attn on, which llama.cpp requires for it.
    - n_ubatch, if not given, is a quarter of the window (64 to 128, with recall to 256, with n_gpu_layers to 512): the
      cache holds that many more cells.
    - logits_processor and stopping_criteria see the recent tokens of the stream, at least 16384, in an array that must
      not be written to or kept. `scores` has the logits of the last token, with logits_all of all tokens as
      llama_cpp's, as far back as 256 MiB reach; `input_ids` is a copy of the recent tokens. `eval_tokens` has the last
      n_ctx tokens; a draft model sees the same.
    - `sampling` has what llama_cpp has no argument for: DRY, XTC, top-n-sigma, dynamic temperature, repeat_last_n. Set
      it before generating; llama_cpp's own arguments take precedence.
    - `detect_loops` ends a completion without max_tokens, with "length", once it repeats the same tokens over and over.
    - With embedding=True or vocab_only=True there is no stream to keep and the context is a stock one.

    Without `lminf`, this is llama_cpp.Llama, except that model_path may name an embedded model ("nano"). In both:

    - A call from another thread waits. A generator (`generate`, `stream=True`) has the stream until another call moves
      it, and its next step then raises StreamTakenError. Once closed, everything raises ClosedError. Both are
      ValueErrors and RuntimeErrors.
    - What a logits processor raises ends the completion. Tokens of any length detokenize. seed=-1 is random.

    A purely recurrent model (Mamba, RWKV) remembers in a state of constant size and has no attention: with lminf it has
    a stream like any other model and runs as it is, without a Λ cache. A recurrent state cannot go back a few tokens:
    where a prompt diverges, a checkpoint is restored or the prompt is processed from its start.

    Raises ValueError, in one sentence, if the file cannot be used, the parameters contradict each other or the model,
    or the cache cannot fit in memory.
    """

    sampling = SamplingParams()
    detect_loops = True

    @with_signature(_init_signature())
    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str],
        *,
        lminf: bool | LMInfConfig | None = None,
        n_ctx: int | None = None,
        checkpoint_folder: str | bytes | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # so that close() works however early this fails
        self._guard = Guard()
        self._lminf: Model | None = None
        self._scheduler: Scheduler | None = None
        path = find_model(model_path)
        for name in ("lora_path", "lora_base"):
            if kwargs.get(name) is not None:
                kwargs[name] = path_text(name, kwargs[name])
        if kwargs.get("seed") is not None:
            kwargs["seed"] = _seed(kwargs["seed"])
        if checkpoint_folder is not None:
            checkpoint_folder = path_text("checkpoint_folder", checkpoint_folder)
        if not isinstance(lminf, (bool, LMInfConfig, type(None))):
            raise TypeError(f"lminf must be True, False or an LMInfConfig, not {lminf!r}.")
        config = LMInfConfig() if lminf is True else lminf or None
        if config is None or kwargs.get("embedding") or kwargs.get("vocab_only"):
            if checkpoint_folder is not None:
                raise UserError("checkpoint_folder keeps the streams of a Λ cache: give lminf=True as well.")
            super().__init__(path, **(kwargs if n_ctx is None else {**kwargs, "n_ctx": n_ctx}))
        else:
            keeps_scores = bool(kwargs.pop("logits_all", False))
            model = Model(self, super().__init__, path, config, n_ctx, 1, kwargs)
            # the base class sizes these by n_ctx and n_batch; the properties below take their place
            del self._stock_input_ids, self._stock_scores
            self._start(model, keeps_scores, checkpoint_folder)
        if self._connection is not None:
            _TO_CLOSE.add(self)
        self.sampling = replace(self.sampling, repeat_last_n=self.last_n_tokens_size)
        use_tokenizer(self)

    def _start(self, model: Model, keeps_scores: bool, folder: str | None) -> None:
        config, window = model.config, model.window
        place = None if folder is None else Path(folder) / model.identity.folder_name
        archives = model.archives(place)
        store = CheckpointStore(model.identity, place, n_checkpoints=config.n_checkpoints, archives=archives)
        self._scores_kept = ScoreWindow(model.n_vocab) if keeps_scores else None
        self._lminf = model
        self._scheduler = Scheduler(
            model,
            store,
            # whatever can be rolled back, or a draft model sees, must be in the log
            n_recent=max(N_RECENT, 2 * (window.size + window.n_slack + model.n_batch)),
            prefill=config.prefill,
            n_tail=config.n_tail,
            keeps_displaced=place is not None,
            on_logits=self._keep_scores if keeps_scores else None,
        )
        self._checkpoint_folder = folder
        if place is not None:
            _TO_CLOSE.add(self)

    def close(self) -> None:
        """Frees the model after calls in progress in other threads, and writes its streams to checkpoint_folder.

        Later uses raise ClosedError.
        """
        guard: Guard | None = self.__dict__.get("_guard")
        if guard is None:  # there is nothing yet
            return
        with guard.closing() as was_open:
            if was_open:
                self._free()

    def _close_if_idle(self) -> None:
        if self._guard.lock.acquire(blocking=False):  # else a daemon thread is at work, perhaps for ever
            try:
                self.close()
            finally:
                self._guard.lock.release()

    def _free(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        self._sampler = None  # it looks into the vocabulary
        quiet = not (self.__dict__.get("verbose", True) or sys.is_finalizing())
        with native.captured_errors() if quiet else contextlib.nullcontext():
            self._stack.close()
        for part in (self.__dict__.get("_ctx"), self.__dict__.get("_model")):
            if part is not None:
                part.__class__ = Freed

    # --- the stream ---------------------------------------------------------------------------------------------------

    @property
    def has_stream(self) -> bool:
        """Whether this model was loaded with a Λ cache."""
        return self._scheduler is not None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of a model with a Λ cache. Raises ValueError for a model without one."""
        if self._scheduler is None:
            raise UserError("This model has no stream: it was loaded without lminf, or with embedding or vocab_only.")
        return self._scheduler

    @property
    def slot(self) -> Slot:
        """The slot that holds the stream. Raises ValueError for a model without a Λ cache."""
        slot = self.scheduler.slots[0]
        if slot.conversation is None:
            slot.clear(Conversation(log=TokenLog(n_recent=slot.n_recent)))
        return slot

    def _take_stream(self) -> Slot:
        """The slot, for a call that moves the stream: ends all open requests."""
        self.scheduler.abandon()
        self.scheduler.slots[0].resync()
        return self.slot

    def stream_info(self) -> StreamInfo:
        """The position of the stream and the contents of its cache. Raises ValueError for a model without a Λ cache."""
        slot, conversation = self.slot, self.slot.conversation
        assert conversation is not None
        info = slot.sequence.info()
        return StreamInfo(
            position=info.stream_pos,
            evicted=info.n_evicted,
            skipped=slot.n_skipped,
            sink_cells=info.n_sink,
            window_cells=info.n_window,
            kv_bytes=info.kv_bytes,
            rebases=info.n_rebase,
            max_graph_position=info.max_graph_pos,
            checkpoint_bytes=self.scheduler.store.state_bytes + conversation.state_bytes,
            attention=slot.sequence.attention,
            parts=self.scheduler.model.parts,
            archived=info.n_archived,
            forgotten=info.n_forgotten,
            archive_bytes=info.archive_bytes,
        )

    def checkpoint(self) -> Checkpoint:
        """The stream at this moment, to go back to or to save. Raises ValueError for a model without a Λ cache."""
        self.slot.resync()
        return self.slot.snapshot()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint, of this process or of another one.

        Raises CheckpointError, and leaves the stream as it was, if the checkpoint is of another model or of other
        parameters.
        """
        slot = self._take_stream()
        slot.identity.check(checkpoint.identity)
        before = self.checkpoint()
        reason = slot.sequence.load(checkpoint)
        if reason is not None:
            slot.sequence.load(before)
            raise CheckpointError(f"The checkpoint cannot be restored: {reason}")
        self.scheduler.forget_logits(slot)
        n_dropped = checkpoint.position - len(checkpoint.log)
        conversation = Conversation(log=checkpoint.log.copy(slot.n_recent))
        slot.assign(conversation, checkpoint.identity.n_global, n_dropped, checkpoint.n_skipped)
        self._forget_scores(0)

    def n_ctx(self) -> int:
        """The attention window, in tokens."""
        return int(super().n_ctx()) if self._lminf is None else self._lminf.window.size

    # --- what the base class keeps in arrays of n_ctx -----------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Tokens processed. Setting it to less forgets the later ones."""
        return self._stock_n_tokens if self._scheduler is None else len(self._scheduler.slots[0])

    @n_tokens.setter
    def n_tokens(self, value: int) -> None:
        if self._scheduler is None:
            self._stock_n_tokens = value
            return
        slot = self._take_stream()
        n_tokens = whole_number("n_tokens", value, 0, len(slot))
        if n_tokens == 0:
            self.reset()
        elif n_tokens < len(slot):
            n_reached = slot.reach(n_tokens)
            if n_reached == 0 and (slot.log.n_base or slot.n_dropped or slot.n_skipped):
                raise UserError(f"The stream cannot go back to {value} tokens: give the whole prompt again.")
            tokens = slot.log.recent()[n_reached - slot.log.n_base : n_tokens - slot.log.n_base].copy()
            self.scheduler.forget_logits(slot)
            if n_reached == 0:
                self.reset()
            elif not slot.truncate(n_reached):
                raise RuntimeError(f"The stream cannot go back to {n_reached} tokens. {slot.sequence.error()}".strip())
            self.eval(tokens)
        self._forget_scores(n_tokens)

    @property
    def input_ids(self) -> Tokens:
        """The last tokens processed (n_recent,), all or at least 16384 of them, a copy."""
        return self._stock_input_ids if self._scheduler is None else self.slot.log.recent().copy()

    @input_ids.setter
    def input_ids(self, value: Tokens) -> None:
        if self._scheduler is not None:
            raise UserError("The tokens of a stream are those that were processed: use reset and eval.")
        self._stock_input_ids = value

    @property
    def _input_ids(self) -> Tokens:
        """The same, not copied: a read-only view, valid until more tokens are processed."""
        return self.input_ids[: self.n_tokens] if self._scheduler is None else self.slot.log.recent()

    @property
    def scores(self) -> Logits:
        """Logits (n_rows, n_vocab), a copy: with logits_all a row per token of the stream, else that of the last one.

        Rows that do not fit scores.BUDGET are dropped, the oldest first. The others keep their tokens' indices, and
        asking for one that was dropped raises ValueError, which is an IndexError too.
        """
        return self._stock_scores if self._scheduler is None else self._last_logits()

    @scores.setter
    def scores(self, value: Logits) -> None:
        if self._scheduler is not None:
            raise UserError("The scores of a stream are those that were computed: use eval.")
        self._stock_scores: Logits = value

    @property
    def _scores(self) -> Logits:
        return self._stock_scores[: self.n_tokens] if self._scheduler is None else self._last_logits()

    @property
    def eval_tokens(self) -> deque[int]:
        tokens = self._input_ids[-self.n_ctx() :]
        return deque(tokens.tolist(), maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        if self._scheduler is None:
            logits: deque[list[float]] = super().eval_logits
            return logits
        n_rows = 1 if self._scores_kept is None else self.n_ctx()
        return deque(np.asarray(self._last_logits())[-n_rows:].tolist(), maxlen=n_rows)

    def _last_logits(self) -> Logits:
        if self._scores_kept is not None:
            return self._scores_kept.rows(len(self.slot))
        row = self.scheduler.last_logits(self.slot)
        assert self._lminf is not None
        return np.empty((0, self._lminf.n_vocab), dtype=np.float32) if row is None else row[None].copy()

    def _keep_scores(self, n_tokens: int, rows: Logits) -> None:
        assert self._scores_kept is not None
        self._scores_kept.push(n_tokens - len(rows), rows)

    def _forget_scores(self, n_tokens: int) -> None:
        if self._scheduler is not None and self._scores_kept is not None:
            self._scores_kept.truncate(n_tokens)

    # --- text ---------------------------------------------------------------------------------------------------------

    @with_signature(inspect.signature(STOCK.tokenize))
    def tokenize(self, text: bytes, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of a text, as in llama_cpp. Raises ValueError if the text is not bytes."""
        if not isinstance(text, bytes):
            raise UserError(f"A text to tokenize must be bytes, not {type(text).__name__}: encode it as UTF-8.")
        tokens: list[int] = super().tokenize(text, *args, **kwargs)
        return tokens

    def tokenizer(self) -> LlamaTokenizer:
        """The model's own tokenizer."""
        return Tokenizer(self)

    def set_seed(self, seed: int) -> None:
        """Seeds all further sampling; -1: randomly."""
        self._seed = _seed(seed)

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.embed. Raises ValueError if `input` is not text."""
        texts: Any = [input] if isinstance(input, str) else input
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError("Embeddings are made of text: give a string or a list of strings.")
        return super().embed(input if isinstance(input, str) else list(texts), *args, **kwargs)

    # --- forward ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Starts a new stream."""
        if self._scheduler is None:
            super().reset()  # type: ignore[no-untyped-call]
            return
        slot = self._take_stream()
        self._scheduler.displace(slot)
        slot.clear(Conversation(log=TokenLog(n_recent=slot.n_recent)))
        self._forget_scores(0)

    def eval(self, tokens: Sequence[int] | Tokens) -> None:
        """Processes tokens (n_tokens,), any number of them, after those that were processed before.

        Raises ValueError if some are not in the vocabulary and RuntimeError if the library fails; tokens processed so
        far stay.
        """
        new = check_ids(as_tokens(tokens), self._n_vocab)
        if self._scheduler is None:
            super().eval(new.tolist())
            return
        slot = self._take_stream()
        for piece in slot.sequence.pieces(new, self.n_batch):
            self._scheduler.eval(slot, piece, n_logits=1)

    @with_signature(_SAMPLE)
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Samples a token from the last logits; the arguments are those of llama_cpp.Llama.sample. Returns its id.

        Raises RuntimeError if no token was processed before, and ValueError if a grammar cannot be used,
        allows no token, or takes too much work.
        """
        if self._scheduler is not None and self._scheduler.last_logits(self.slot) is None:
            raise RuntimeError("There are no logits to sample from: process at least one token first.")
        call = _SAMPLE.bind(self, *args, **kwargs)
        call.apply_defaults()
        sampling = call.arguments
        idx = sampling.pop("idx")
        del sampling["self"]
        idx = -1 if idx is None else idx - self.n_tokens
        if not bindings.llama_get_logits_ith(self._ctx.ctx, idx):
            raise RuntimeError("There are no logits of this token: only a batch's last ones have some.")
        sampler: Any = self._sampler or self._init_sampler(**sampling)
        try:
            return int(sampler.sample(self._ctx, idx))
        finally:
            if sampler is not self._sampler:
                sampler.close()

    def _init_sampler(self, **sampling: Any) -> Sampler:  # type: ignore[override]
        # the base class asks for it where there is no scheduler
        return make_sampler(self._sampling(sampling), self._model, self.n_ctx(), lambda: self._input_ids)

    @with_signature(_GENERATE)
    def generate(
        self, tokens: Sequence[int] | Tokens, *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """A generator of tokens that follow `tokens`; the arguments are those of llama_cpp.Llama.generate.

        It never ends by itself. Tokens sent to it are processed after the one it yielded.
        """
        prompt = check_ids(as_tokens(tokens), self._n_vocab)
        if self._scheduler is None:
            return self._guard.steps(super().generate(prompt.tolist(), *args, **kwargs))
        call = _GENERATE.bind(self, prompt, *args, **kwargs)
        call.apply_defaults()
        sampling = call.arguments
        for name in ("self", "tokens"):
            del sampling[name]
        reset, criteria = sampling.pop("reset"), sampling.pop("stopping_criteria")
        request = Request(
            prompt,
            self._sampling(sampling),
            ignore_eog=True,
            continues=not reset,
            wants_logits=criteria is not None,
            draft_model=self.draft_model,
        )
        return self._guard.steps(self._tokens(self._outputs(request, criteria)))

    @staticmethod
    def _tokens(
        outputs: Generator[Output, Sequence[int] | None, None],
    ) -> Generator[int, Sequence[int] | None, None]:
        sent = None
        with contextlib.closing(outputs), contextlib.suppress(StopIteration):
            while True:
                sent = yield outputs.send(sent).token

    def _sampling(self, keywords: dict[str, Any]) -> SamplingParams:
        """Sampling parameters from the arguments of `generate` and a logit_bias."""
        try:
            bias = {int(token): float(value) for token, value in (keywords.get("logit_bias") or {}).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"logit_bias must give numbers to tokens: {error}") from error
        processors = as_processors(keywords.get("logits_processor"))
        careful = None if processors is None else [self._careful(each) for each in processors]
        keywords = {**keywords, "logits_processor": careful, "logit_bias": bias}
        return replace(self.sampling.updated(keywords), seed=self._seed)

    def _careful(self, processor: LogitsProcessor) -> LogitsProcessor:
        """Wraps a logits processor so that it cannot move the stream and its result is checked."""

        def process(input_ids: Tokens, scores: Logits) -> Any:
            with self._guard.callback():
                made = processor(input_ids, scores)
            if np.shape(made) != scores.shape:
                what = f"{type(made).__name__} {np.shape(made)}"
                raise UserError(f"A logits processor must return scores ({len(scores)},), not {what}.")
            return made

        return process

    def outputs(self, request: Request, stopping_criteria: Any = None) -> Generator[Output, Sequence[int] | None, None]:
        """The tokens of a request, generated in this thread on demand. Tokens sent are processed next."""
        return self._guard.steps(self._outputs(request, stopping_criteria))

    def _outputs(self, request: Request, stopping_criteria: Any) -> Generator[Any, Sequence[int] | None, None]:
        scheduler = self.scheduler
        self._take_stream()
        scheduler.prepare(request)
        scheduler.submit(request)
        n_taken = 0
        try:
            while True:
                output: Any = self._next_output(request)
                if output is End.END:
                    return
                n_taken += 1
                if stopping_criteria is not None:
                    with self._guard.callback():
                        recent = self.slot.log.recent()[
                            : scheduler.length_before(request, n_taken) - self.slot.log.n_base
                        ]
                        stops = stopping_criteria(recent, output.logits)
                    if stops:
                        return
                left = len(self.slot), self.slot.sequence.position
                sent = yield output
                if (len(self.slot), self.slot.sequence.position) != left:  # moved, but not by a call of this class
                    raise StreamTakenError
                if sent:
                    scheduler.insert(request, n_taken, output.token, sent)
        finally:
            scheduler.finish(request, n_taken)

    def prompt_logits(self, tokens: Tokens) -> Iterator[PromptPart]:
        """Processes tokens (n_tokens,) from an empty stream; yields them in parts, with their logits."""
        request = Request(check_ids(as_tokens(tokens), self._n_vocab), wants_prompt_logits=True)
        return self._guard.steps(self._outputs(request, None))

    def _next_output(self, request: Request) -> Output | PromptPart | End:
        scheduler = self.scheduler
        request.n_asked += 1
        while request.outputs.empty():
            scheduler.step()
            if request.outputs.empty():
                scheduler.wait()
        output = request.outputs.get()
        if isinstance(output, BaseException):
            raise output
        return output

    def reach(self, prompt: Tokens) -> int:
        """How many tokens of `prompt` (n_tokens,) are in the cache or a checkpoint and need no processing."""
        slot = self.slot
        slot.resync()
        scheduler = self.scheduler
        return find_prefix(Request(prompt), slot.n_sinks, False, scheduler.slots, scheduler.store).n_cached

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self._scheduler is None:
            return super()._create_completion(*args, **kwargs)
        return self._guard.steps(complete(self, *args, **kwargs), drives=True)

    @with_signature(_CHAT)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        """llama_cpp.Llama's, by llama.cpp's chat library: the model's own template with its tool calls and thoughts.

        More arguments, as llama-server has them: parallel_tool_calls, add_generation_prompt, continue_final_message,
        reasoning_format, enable_thinking, reasoning_budget_tokens, reasoning_budget_message, chat_template_kwargs. A
        model loaded with chat_format or chat_handler, or without lminf, is talked to by llama_cpp's own handlers.

        Raises ValueError, in one sentence, for what the template refuses and for a schema that cannot be enforced.
        """
        call = _CHAT.bind(self, *args, **kwargs)
        if self._scheduler is None or asks_for_format(self):
            return super().create_chat_completion(*call.args[1:], **call.kwargs)
        call.apply_defaults()
        asked = call.arguments
        del asked["self"]
        messages, stop, stream = asked.pop("messages"), asked.pop("stop"), asked.pop("stream")
        names = ("functions", "function_call", "tools", "tool_choice", "response_format", "grammar")
        more = {ours: asked.pop(name) for name, ours in CHAT_ARGUMENTS.items()}
        options = chat_options(**{name: asked.pop(name) for name in names}, more=more)
        logprobs, n_top = asked.pop("logprobs"), asked.pop("top_logprobs")

        def run(**about: Any) -> Any:
            made = self._create_completion(logprobs=n_top if logprobs else None, **asked, **about)
            return made if stream else next(made)

        return complete_chat(self._chat_template, messages, options, run, stop, bool(stream))

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        chat_format = find_format(self)
        return ChatTemplate(self, chat_format, CachedTokenizer(self, chat_format.source, _TEXT_BYTES))

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save_state(self) -> llama_cpp.LlamaState:
        """The stream, for `load_state` and llama_cpp's caches: a checkpoint in the form they expect, without logits.

        With recall it also holds what the stream can recall, in this process alone: shared, so that it takes no memory
        while the stream has it, too. Pickled, as in a LlamaDiskCache, or copied it is without that, and where
        archive_memory is used up it gives that up before a stream forgets anything. `load_state` then warns.
        """
        if self._scheduler is None:
            return super().save_state()
        checkpoint = self.checkpoint()
        data = checkpoint.to_bytes()
        fields: dict[str, Any] = {
            "input_ids": checkpoint.log.recent(),
            "scores": np.empty((0, self._n_vocab), dtype=np.float32),
            "n_tokens": len(checkpoint.log),
            "llama_state": data,
            "llama_state_size": len(data),
            "seed": self._seed,
        }
        if checkpoint.archive is None:
            return llama_cpp.LlamaState(**fields)
        state = SavedState(checkpoint.archive, **fields)
        self._scheduler.store.archives.watch(state)
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continues from a saved state. Raises CheckpointError, a ValueError, if it does not fit.

        Warns, with recall, if nothing of what the stream had read before can be recalled.
        """
        if self._scheduler is None:
            super().load_state(state)
            return
        archive = state.archive if isinstance(state, SavedState) else None
        self.restore(replace(Checkpoint.from_bytes(state.llama_state), archive=archive))
        self._seed = state.seed
        sequence = self.slot.sequence
        info = sequence.info()
        if sequence.window.n_recall and info.stream_pos and not info.n_archived:
            reason = why_nothing_is_recalled(state, sequence.archive_types)
            if reason is not None:
                message = f"Nothing from before this state can be recalled: {reason}."
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if state["n_gpu_layers"] == ALL_LAYERS:
            state["n_gpu_layers"] = -1
        if self._connection is not None:
            state.update(rpc_servers=list(self._connection.servers))
        if self._lminf is not None:
            state.update(lminf=self._lminf.config, n_ctx=self._lminf.window.size)
            state.update(checkpoint_folder=self._checkpoint_folder)
        return state
