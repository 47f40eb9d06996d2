"""llama_cpp.Llama with one more argument."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler
from llama_cpp.llama_tokenizer import LlamaTokenizer

from lminf_edge import native, startup
from lminf_edge.checkpoint import Checkpoint, Identity, model_digest
from lminf_edge.completion import CarefulProcessors, complete
from lminf_edge.config import (
    ATTENTIONS,
    DEFAULT_WINDOW,
    SINK_MODES,
    LMInfConfig,
    StreamInfo,
    Window,
    check_kv_type,
    check_memory,
    is_quantized,
    resolve,
    whole_number,
)
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.guard import Freed, Guard, StreamTakenError, guarded
from lminf_edge.history import Tokens, as_tokens, check_ids
from lminf_edge.models import find_model, path_text
from lminf_edge.scores import ScoreWindow
from lminf_edge.sequence import Batch, CacheSequence, Logits
from lminf_edge.stream import Stream

STOCK = llama_cpp.Llama  # that name may become ours later, see lminf_edge.patching
_GENERATE = inspect.signature(STOCK.generate)

# whole numbers among the parameters, and the least they may be
_WHOLE_NUMBERS = {
    "n_ctx": 0,
    "n_batch": 1,
    "n_ubatch": 0,
    "n_threads": 0,
    "n_threads_batch": 0,
    "n_gpu_layers": -1,
    "main_gpu": 0,
    "last_n_tokens_size": -1,
    "yarn_orig_ctx": 0,
}

# what the keys in a cache depend on besides model and window
_ROPE_SETTINGS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)


F = TypeVar("F", bound=Callable[..., Any])


def with_signature(signature: inspect.Signature) -> Callable[[F], F]:
    """Lets a function that passes its arguments on be asked for those of the other one."""

    def decorate(function: F) -> F:
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


def _init_signature() -> inspect.Signature:
    """llama_cpp.Llama's with what ours has more."""
    stock = inspect.signature(STOCK.__init__)
    parameters = [
        parameter.replace(default=None) if name == "n_ctx" else parameter
        for name, parameter in stock.parameters.items()
    ]
    *before, rest = parameters  # **kwargs is the last
    ours = (("lminf", None), ("n_seq_max", 1))
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in ours]
    return stock.replace(parameters=[*before, *more, rest])


def _raising_what_processors_raise(sample: Any) -> Any:
    @functools.wraps(sample)
    def call(self: Llama, *args: Any, **kwargs: Any) -> int:
        try:
            return int(sample(self, *args, **kwargs))
        finally:
            if self._processors is not None:
                self._processors.check()

    return call


class Tokenizer(LlamaTokenizer):
    """llama_cpp's, for pieces of any length and without trust in token ids."""

    def detokenize(
        self, tokens: Sequence[int] | Tokens, prev_tokens: Sequence[int] | Tokens | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens (n_tokens,). Raises ValueError if one is not in the vocabulary."""
        model = self._model
        ids = check_ids(as_tokens(tokens), model.n_vocab()).tolist()
        text = b"".join(_piece(model.vocab, token, special) for token in ids)
        # as llama_cpp does: the beginning of a text takes its leading space with it
        return text[1:] if ids and ids[0] == model.token_bos() and text[:1] == b" " else text


def _piece(vocab: Any, token: int, special: bool) -> bytes:
    n_bytes = 32
    while True:
        buffer = ctypes.create_string_buffer(n_bytes)
        n_written = bindings.llama_token_to_piece(vocab, token, buffer, n_bytes, 0, special)
        if n_written >= 0:
            return buffer.raw[:n_written]
        n_bytes = -n_written


@guarded(
    shared=(
        *("n_tokens", "n_ctx", "n_embd", "n_vocab", "tokenize", "detokenize", "tokenizer"),
        *("token_bos", "token_eos", "token_nl", "set_seed", "set_cache", "stream"),
    ),
    moving=("eval", "reset", "n_tokens=", "load_state", "restore", "embed"),
    free=("close", "has_stream", "ctx", "model"),
)
class Llama(llama_cpp.Llama):
    """llama_cpp.Llama that can stream without end.

    With `lminf=True` or an LMInfConfig the model attends to the first n_global and the last n_local tokens of its
    stream, and memory and time per token stay the same however long it gets:

    - n_ctx, if given, is this attention window n_global + n_local; without it, 4096 tokens or the training length,
      whichever is less. Prompts of any length are streamed through it, and with max_tokens None or <= 0 only a stop
      string or the end-of-text token ends a generation.
    - A prompt that goes on from what was processed costs its new tokens only. One that turns off earlier goes back as
      far as n_slack allows, or to an automatic checkpoint, or starts again.
    - A quantized type_v turns flash_attn on, which llama.cpp requires for it.
    - n_ubatch, if not given, is a quarter of the window (64 to 128, with n_gpu_layers 64 to 512): the cache holds
      that many more cells.
    - logits_processor and stopping_criteria see the recent tokens of the stream, at least 16384, in an array that must
      not be written to or kept. `scores` has the logits of the last token, with logits_all of all tokens as
      llama_cpp's, as far back as 256 MiB reach; `input_ids` is a copy of the recent tokens. `eval_tokens` has the last
      n_ctx tokens; a draft model sees the same.
    - n_seq_max is the number of sequences in the context; this object is the stream of the first of them, the others
      are for several streams that decode together (lminf_edge.engine).
    - With embedding=True or vocab_only=True there is no stream to keep and the context is a stock one.

    Without `lminf`, this is llama_cpp.Llama, except that model_path may name an embedded model ("nano"). In both:

    - A call from another thread waits. A generator (`generate`, `stream=True`) has the stream until another call moves
      it, and its next step then raises StreamTakenError. Once closed, everything raises ClosedError. Both are
      ValueErrors and RuntimeErrors.
    - What a logits processor raises ends the completion. Tokens of any length detokenize. seed=-1 is random.

    Raises ValueError, in one sentence, if the file cannot be used or the parameters contradict each other or the
    model, and MemoryError if the cache cannot fit in memory.
    """

    @with_signature(_init_signature())
    def __init__(
        self,
        model_path: str | bytes | os.PathLike[str],
        *,
        lminf: bool | LMInfConfig | None = None,
        n_ctx: int | None = None,
        n_seq_max: int = 1,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # so that close() works however early this fails
        self._guard = Guard()
        self._stream: Stream | None = None
        self._window: Window | None = None
        self._processors: CarefulProcessors | None = None
        path = find_model(model_path)
        for name in ("lora_path", "lora_base"):
            if kwargs.get(name) is not None:
                kwargs[name] = path_text(name, kwargs[name])
        if kwargs.get("seed") is not None:
            kwargs["seed"] = _seed(kwargs["seed"])
        if not isinstance(lminf, (bool, LMInfConfig, type(None))):
            raise TypeError(f"lminf must be True, False or an LMInfConfig, not {lminf!r}.")
        config = LMInfConfig() if lminf is True else lminf or None
        if config is None or kwargs.get("embedding") or kwargs.get("vocab_only"):
            super().__init__(path, **(kwargs if n_ctx is None else {**kwargs, "n_ctx": n_ctx}))
        else:
            self._init_lambda(path, config, n_ctx, n_seq_max, kwargs)
        if type(self.tokenizer_) is LlamaTokenizer:
            self.tokenizer_ = Tokenizer(self)

    def _init_lambda(
        self, path: str, config: LMInfConfig, n_ctx: int | None, n_seq_max: int, kwargs: dict[str, Any]
    ) -> None:
        if isinstance(kwargs.get("chat_handler"), (Llava15ChatHandler, MTMDChatHandler)):
            raise UserError("Chat handlers for images and sound do not work with lminf: load this model without it.")
        n_seq_max = whole_number("n_seq_max", n_seq_max, 1)
        for name, least in _WHOLE_NUMBERS.items():
            if kwargs.get(name) is not None:
                kwargs[name] = whole_number(name, kwargs[name], least)
        if n_ctx is not None:
            n_ctx = whole_number("n_ctx", n_ctx, 0)
        library = native.load()
        header = read_header(path)
        if header.n_tensors == 0:
            raise UserError(f"{path} holds a vocabulary without weights: give the path of a whole model.")
        window = resolve(config, n_ctx, training_length(header, kwargs.get("kv_overrides") or {}))
        type_k, type_v = check_kv_type("type_k", kwargs.get("type_k")), check_kv_type("type_v", kwargs.get("type_v"))
        if is_quantized(type_v) and not kwargs.setdefault("flash_attn", True):
            raise UserError(f"type_v={type_v}, a quantized type, needs flash_attn: leave flash_attn out or set it.")
        n_batch = int(kwargs.pop("n_batch", None) or 512)
        if n_seq_max > n_batch:
            raise UserError(f"n_seq_max={n_seq_max} must be no more than n_batch={n_batch}: give a larger n_batch.")
        on_gpu = bool(kwargs.get("n_gpu_layers"))
        n_ubatch = min(n_batch, int(kwargs.pop("n_ubatch", None) or window.default_ubatch(on_gpu)))
        if not on_gpu:
            check_memory(n_seq_max * window.kv_bytes(header, type_k, type_v, n_ubatch))
        check_memory(4 * n_batch * max(window.size, n_batch), "batch", "n_batch")  # as llama_cpp allocates it

        keeps_scores = bool(kwargs.pop("logits_all", False))
        logits_all = keeps_scores or kwargs.get("draft_model") is not None
        params = native.Params(
            n_global=window.n_global,
            n_local=window.n_local,
            max_distance=window.max_distance,
            n_slack=window.n_slack,
            sink_mode=SINK_MODES.index(window.sink_mode),
            pos_bound=window.pos_bound,
            attention=ATTENTIONS.index(window.attention),
            n_seq_max=n_seq_max,
        )
        self._window = window
        with native.captured_errors() as errors, library.next_context(params):
            try:
                # n_ctx sizes nothing in this cache, but n_batch is cut to it
                super().__init__(path, n_ctx=max(window.size, n_batch), n_batch=n_batch, n_ubatch=n_ubatch, **kwargs)
            except ValueError as error:
                reason = library.last_error() or native.load_failure(path, errors) or str(error)
                raise UserError(reason) from error
        if self.lora_path and not self._lora_adapter:  # the base class takes a null pointer for an adapter
            reason = errors[0] if errors else "llama.cpp does not say why"
            raise UserError(f"{self.lora_path} cannot be loaded as an adapter: {reason}.")
        assert library.enabled(self._ctx.ctx)

        self._config = replace(config, n_local=window.n_local)
        self._logits_all = logits_all
        self._score_window = ScoreWindow(self._n_vocab) if keeps_scores else None
        self._sampled_at = 0  # position of the token sampled last
        # the base class sizes these by n_ctx and n_batch; the properties below take their place
        del self._stock_input_ids, self._stock_scores
        settings = {name: getattr(self.context_params, name) for name in _ROPE_SETTINGS}
        settings.update(kv_overrides=self.kv_overrides, lora_scale=self.lora_scale if self.lora_path else None)
        stock = ATTENTIONS[library.params(self._ctx.ctx).attention] == "stock"
        identity = Identity(
            model=model_digest(path, settings, *([self.lora_path] if self.lora_path else [])),
            n_global=window.n_global,
            n_local=window.n_local,
            max_distance=window.max_distance,
            sink_mode=params.sink_mode,
            type_k=type_k,
            type_v=type_v,
            v_transposed=int(stock and not self.context_params.flash_attn_type),
        )
        self.sequences = [CacheSequence(library, self._ctx, window, seq_id) for seq_id in range(n_seq_max)]
        self.decoder = Batch(self._batch)
        self.identity = identity
        self._stream = Stream(self.sequences[0], self.decoder, identity, self._n_vocab, config.n_checkpoints)

    # --- the stream ---------------------------------------------------------------------------------------------------

    @property
    def has_stream(self) -> bool:
        """Whether this model was loaded with a Λ cache."""
        return self._stream is not None

    @property
    def stream(self) -> Stream:
        """The stream of a model with a Λ cache. Raises ValueError for a model without one."""
        if self._stream is None:
            raise UserError("This model has no stream: it was loaded without lminf, or with embedding or vocab_only.")
        return self._stream

    def stream_info(self) -> StreamInfo:
        """Where the stream is and what its cache holds. Raises ValueError for a model without a Λ cache."""
        return self.stream.info()

    def checkpoint(self) -> Checkpoint:
        """The stream at this moment, to go back to or to save. Raises ValueError for a model without a Λ cache."""
        return self.stream.checkpoint()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint, of this process or of another one.

        Raises CheckpointError, and leaves the stream as it was, if the checkpoint is of another model or of other
        parameters.
        """
        self.stream.restore(checkpoint)
        self._forget_scores(0)

    def n_ctx(self) -> int:
        """The attention window, in tokens."""
        return int(super().n_ctx()) if self._window is None else self._window.size

    # --- what the base class keeps in arrays of n_ctx -----------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """Tokens processed. Setting it to less forgets those that came after."""
        return self._stock_n_tokens if self._stream is None else len(self._stream)

    @n_tokens.setter
    def n_tokens(self, value: int) -> None:
        if self._stream is None:
            self._stock_n_tokens = value
            return
        value = whole_number("n_tokens", value, 0, len(self._stream))
        if not self._stream.truncate(value):
            past = self._stream.history.snapshot()
            if len(past.digests):
                raise UserError(f"The stream cannot go back to {value} tokens: give the whole prompt again.")
            self._process(past.recent[:value])
        self._forget_scores(value)

    @property
    def input_ids(self) -> Tokens:
        """The last tokens processed (n_recent,), all or at least 16384 of them, a copy."""
        return self._stock_input_ids if self._stream is None else self._stream.history.recent().copy()

    @input_ids.setter
    def input_ids(self, value: Tokens) -> None:
        if self._stream is not None:
            raise UserError("The tokens of a stream are those that were processed: use reset and eval.")
        self._stock_input_ids = value

    @property
    def _input_ids(self) -> Tokens:
        """The same, not copied: read-only, and good until more are processed."""
        return self.input_ids[: self.n_tokens] if self._stream is None else self._stream.history.recent()

    @property
    def scores(self) -> Logits:
        """Logits (n_rows, n_vocab), a copy: with logits_all a row per token of the stream, else that of the last one.

        Rows that do not fit scores.BUDGET are dropped, the oldest first. The others keep their tokens' indices, and
        asking for one that was dropped raises ValueError, which is an IndexError too.
        """
        if self._stream is None:
            return self._stock_scores
        return self._last_logits()

    @scores.setter
    def scores(self, value: Logits) -> None:
        if self._stream is not None:
            raise UserError("The scores of a stream are those that were computed: use eval.")
        self._stock_scores: Logits = value

    @property
    def _scores(self) -> Logits:
        return self._stock_scores[: self.n_tokens] if self._stream is None else self._last_logits()

    @property
    def eval_tokens(self) -> deque[int]:
        tokens = self._input_ids[-self.n_ctx() :]
        return deque(tokens.tolist(), maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        if self._stream is None:
            logits: deque[list[float]] = super().eval_logits
            return logits
        return deque(self._last_logits().tolist(), maxlen=self.n_ctx() if self._logits_all else 1)

    def _last_logits(self) -> Logits:
        stream = self.stream
        if self._score_window is not None:
            return self._score_window.rows(len(stream))
        if not stream.fresh:
            return np.empty((0, self._n_vocab), dtype=np.float32)
        logits: Logits = stream.logits_block().copy()
        return logits

    def _forget_scores(self, n_tokens: int) -> None:
        if self._score_window is not None:
            self._score_window.truncate(n_tokens)

    def _keep_scores(self, n_tokens: int) -> None:
        """Keeps the rows of the batch of n_tokens that was just decoded."""
        if self._score_window is not None:
            stream = self.stream
            self._score_window.push(len(stream) - n_tokens, stream.logits_block()[-n_tokens:])

    # --- text ---------------------------------------------------------------------------------------------------------

    @with_signature(inspect.signature(STOCK.tokenize))
    def tokenize(self, text: bytes, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of a text, as llama_cpp's. Raises ValueError if it is no bytes."""
        if not isinstance(text, bytes):
            raise UserError(f"A text to tokenize must be bytes, not {type(text).__name__}: encode it as UTF-8.")
        tokens: list[int] = super().tokenize(text, *args, **kwargs)
        return tokens

    def detokenize(
        self, tokens: Sequence[int] | Tokens, prev_tokens: Sequence[int] | Tokens | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens (n_tokens,). Raises ValueError if one is not in the vocabulary."""
        tokenizer: Any = self.tokenizer_
        text: bytes = tokenizer.detokenize(tokens, prev_tokens=prev_tokens, special=special)
        return text

    def tokenizer(self) -> LlamaTokenizer:
        """The model's own tokenizer."""
        return Tokenizer(self)

    def set_seed(self, seed: int) -> None:
        """Seeds what is sampled from now on; -1: by chance."""
        self._seed = _seed(seed)

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As llama_cpp.Llama.embed. Raises ValueError if `input` is no text."""
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError("Embeddings are made of text: give a string or a list of strings.")
        return super().embed(input, *args, **kwargs)

    # --- forward ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Starts a new stream."""
        if self._stream is None:
            super().reset()  # type: ignore[no-untyped-call]
        else:
            self._stream.clear()
            self._forget_scores(0)

    def eval(self, tokens: Sequence[int] | Tokens) -> None:
        """Processes tokens (n_tokens,), any number of them, after those that were processed before.

        Raises ValueError if some are not in the vocabulary and RuntimeError if the library cannot; what was processed
        until then stays.
        """
        new = check_ids(as_tokens(tokens), self._n_vocab)
        if self._stream is None:
            super().eval(new.tolist())
            return
        self._stream.sync()
        for start in range(0, len(new), self.n_batch):
            part = new[start : start + self.n_batch]
            self._stream.decode(part, self._logits_all)
            self._keep_scores(len(part))

    def _process(self, prompt: Tokens) -> None:
        """Makes `prompt` (n_tokens,) the stream, reusing what it shares with the present one."""
        n_common = self.stream.history.common_prefix(prompt)
        n_reused = self.stream.resume(prompt)
        self._forget_scores(min(n_common, n_reused))
        if self.verbose and n_reused:
            print(f"Llama.generate: {n_reused} tokens reused, {len(prompt) - n_reused} to process", file=sys.stderr)
        self.eval(prompt[n_reused:])

    def _init_sampler(self, **sampling: Any) -> Any:  # type: ignore[override]
        # what only takes the shape of a Llama calls this as well
        if isinstance(self, Llama) and sampling.get("logits_processor") is not None:
            self._processors = CarefulProcessors(sampling["logits_processor"], self._guard.callback)
            sampling["logits_processor"] = self._processors
        return STOCK._init_sampler(self, **sampling)

    @with_signature(inspect.signature(STOCK.sample))
    @_raising_what_processors_raise
    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Samples a token. Raises RuntimeError if nothing was processed that it could follow."""
        if self._stream is not None and not self._stream.fresh:
            raise RuntimeError("There are no logits to sample from: process at least one token first.")
        return int(super().sample(*args, **kwargs))

    @with_signature(_GENERATE)
    def generate(
        self, tokens: Sequence[int] | Tokens, *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """A generator of tokens that follow `tokens`; the arguments are those of llama_cpp.Llama.generate.

        It has no end of its own. Tokens sent to it are processed after the one it yielded.
        """
        prompt = check_ids(as_tokens(tokens), self._n_vocab)
        if self._stream is None:
            return self._guard.steps(super().generate(prompt.tolist(), *args, **kwargs))
        call = _GENERATE.bind(self, prompt, *args, **kwargs)
        call.apply_defaults()
        sampling = call.arguments
        for name in ("self", "tokens"):
            del sampling[name]
        reset, stopping_criteria = sampling.pop("reset"), sampling.pop("stopping_criteria")
        return self._guard.steps(self._generate(prompt, reset, stopping_criteria, sampling))

    def _generate(
        self, prompt: Tokens, reset: bool, stopping_criteria: Any, sampling: dict[str, Any]
    ) -> Generator[int, Sequence[int] | None, None]:
        stream = self.stream
        self._sampler = self._init_sampler(**sampling)
        if reset:
            if len(prompt) == 0:
                raise UserError("The prompt is empty: give at least one token.")
            self._process(prompt)
        else:
            self.eval(prompt)
        stream.mark()
        position = len(stream)  # of the token to be sampled; the stream may hold draft tokens from there on
        try:
            while True:
                token = self.sample(idx=position - 1, **sampling)
                self._sampled_at = position
                if stopping_criteria is not None:
                    with self._guard.callback():
                        recent = self._input_ids[: position - stream.history.n_digested]
                        stops = stopping_criteria(recent, stream.logits(position - 1))
                    if stops:
                        return
                if position < len(stream) and stream.history.token(position) != token:
                    self.n_tokens = position
                left = len(stream), stream.fresh
                sent = yield token
                if (len(stream), stream.fresh) != left:  # moved by itself, not by a call of this class
                    raise StreamTakenError
                pending = [] if position < len(stream) else [token]
                position += 1
                if sent:
                    self.n_tokens = min(position, len(stream))
                    pending.extend(sent)
                    position += len(sent)
                if pending:
                    self.eval(pending + self._drafts(pending))
        finally:
            if self._guard.owns:
                stream.truncate(min(position, len(stream)))  # drafts that nobody asked for

    def _drafts(self, pending: list[int]) -> list[int]:
        """What the draft model expects after `pending`: no more than can be taken back or fits the batch."""
        room = min(self.stream.window.n_slack, self.n_batch - len(pending))
        if self.draft_model is None or room <= 0:
            return []
        recent = np.concatenate([self._input_ids[-self.n_ctx() :], as_tokens(pending)])
        return [int(token) for token in self.draft_model(recent)[:room]]

    def prompt_logits(self, tokens: Tokens) -> Iterator[tuple[Tokens, Logits]]:
        """Processes tokens (n_tokens,) from an empty stream; yields them in parts, with the logits (n_part, n_vocab).

        The logits are good until the next part.
        """
        return self._guard.steps(self._prompt_logits(check_ids(as_tokens(tokens), self._n_vocab)))

    def _prompt_logits(self, tokens: Tokens) -> Generator[tuple[Tokens, Logits], None, None]:
        self.reset()
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            self.stream.decode(part, logits_all=True)
            self._keep_scores(len(part))
            yield part, self.stream.logits_block()

    def logits_of_sample(self) -> Logits:
        """Logits (n_vocab,) the token that `generate` yielded last was sampled from; good until the next one."""
        return self.stream.logits(self._sampled_at - 1)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        chunks: Any = super()._create_completion if self._stream is None else functools.partial(complete, self)
        return self._guard.steps(chunks(*args, **kwargs), drives=True)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save_state(self) -> llama_cpp.LlamaState:
        """The stream, for `load_state` and llama_cpp's caches: a checkpoint in the form they expect, without logits."""
        if self._stream is None:
            return super().save_state()
        checkpoint = self._stream.checkpoint()
        data = checkpoint.to_bytes()
        return llama_cpp.LlamaState(
            input_ids=checkpoint.past.recent,
            scores=np.empty((0, self._n_vocab), dtype=np.float32),
            n_tokens=len(checkpoint.past),
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continues from a saved state. Raises CheckpointError, a ValueError, if it does not fit."""
        if self._stream is None:
            super().load_state(state)
        else:
            self._stream.restore(Checkpoint.from_bytes(state.llama_state))
            self._forget_scores(0)
            self._seed = state.seed

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self._window is not None:
            state.update(lminf=self._config, n_ctx=self._window.size)
        return state

    def close(self) -> None:
        """Frees the model, after calls of other threads that are under way; what is used later raises ClosedError."""
        guard: Guard | None = self.__dict__.get("_guard")
        if guard is None:  # there is nothing yet
            return
        with guard.closing() as was_open:
            if was_open:
                self._free()

    def _free(self) -> None:
        self._sampler = None  # it looks into the vocabulary
        quiet = not (self.__dict__.get("verbose", True) or sys.is_finalizing())
        with native.captured_errors() if quiet else contextlib.nullcontext():
            self._stack.close()
        for part in (self.__dict__.get("_ctx"), self.__dict__.get("_model")):
            if part is not None:
                part.__class__ = Freed


def _seed(seed: Any) -> int:
    """The seed a user gave; another one each time for -1, which llama_cpp promises and does not keep."""
    seed = whole_number("seed", seed, -1, 1 << 63)
    return random.SystemRandom().getrandbits(32) if seed == -1 else seed


def training_length(header: Header, overrides: dict[str, Any]) -> int:
    """Tokens the model was trained on, at most; a default if the file does not say."""
    value = overrides.get(f"{header.architecture}.context_length", header.n_ctx_train)
    return int(value) or DEFAULT_WINDOW


if startup.wanted():  # llama_cpp was imported by this module, before there was a class to put into it
    from lminf_edge import patching

    patching.patch_at_import()
