"""llama_cpp.Llama with one more argument."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler

from lminf_edge import native
from lminf_edge.checkpoint import Checkpoint, Identity, model_digest
from lminf_edge.completion import complete
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
)
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.sampler import Sampler, make_sampler
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.history import Tokens, as_tokens
from lminf_edge.models import find_model
from lminf_edge.sequence import Batch, CacheSequence, Logits
from lminf_edge.stream import Stream

_GENERATE = inspect.signature(llama_cpp.Llama.generate)

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
      not be written to or kept. `scores` has the logits of the last batch alone: a row per token with logits_all, else
      one. `eval_tokens` has the last n_ctx tokens; a draft model sees the same.
    - n_seq_max is the number of sequences in the context; this object is the stream of the first of them, the others
      are for several streams that decode together (lminf_edge.engine).
    - `sampling` has what llama_cpp has no argument for: DRY, XTC, top-n-sigma, dynamic temperature, repeat_last_n. Set
      it before generating; what llama_cpp's arguments say goes before what it says.
    - `detect_loops` ends a completion without max_tokens, with "length", once it repeats the same tokens over and over.
    - With embedding=True or vocab_only=True there is no stream to keep and the context is a stock one.

    Without `lminf`, this is llama_cpp.Llama, unchanged, except that model_path may name an embedded model ("nano").

    Raises ValueError, in one sentence, if the file cannot be used or the parameters contradict each other or the
    model, and MemoryError if the cache cannot fit in memory.
    """

    sampling = SamplingParams()
    detect_loops = True

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        lminf: bool | LMInfConfig | None = None,
        n_ctx: int | None = None,
        n_seq_max: int = 1,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # so that close() works however early this fails
        self._stream: Stream | None = None
        self._window: Window | None = None
        path = find_model(model_path)
        if not isinstance(lminf, (bool, LMInfConfig, type(None))):
            raise TypeError(f"lminf must be True, False or an LMInfConfig, not {lminf!r}.")
        config = LMInfConfig() if lminf is True else lminf or None
        if config is None or kwargs.get("embedding") or kwargs.get("vocab_only"):
            super().__init__(path, **(kwargs if n_ctx is None else {**kwargs, "n_ctx": n_ctx}))
        else:
            self._init_lambda(path, config, n_ctx, n_seq_max, kwargs)

    def _init_lambda(
        self, path: str, config: LMInfConfig, n_ctx: int | None, n_seq_max: int, kwargs: dict[str, Any]
    ) -> None:
        if isinstance(kwargs.get("chat_handler"), (Llava15ChatHandler, MTMDChatHandler)):
            raise UserError("Chat handlers for images and sound do not work with lminf: load this model without it.")
        library = native.load()
        header = read_header(path)
        if header.n_tensors == 0:
            raise UserError(f"{path} holds a vocabulary without weights: give the path of a whole model.")
        window = resolve(config, n_ctx, training_length(header, kwargs.get("kv_overrides") or {}))
        type_k, type_v = check_kv_type("type_k", kwargs.get("type_k")), check_kv_type("type_v", kwargs.get("type_v"))
        if is_quantized(type_v) and not kwargs.setdefault("flash_attn", True):
            raise UserError(f"type_v={type_v}, a quantized type, needs flash_attn: leave flash_attn out or set it.")
        n_batch = int(kwargs.pop("n_batch", 512))
        if not 1 <= n_seq_max <= n_batch:
            raise UserError(f"n_seq_max={n_seq_max} must be 1 or more, and no more than n_batch={n_batch}.")
        on_gpu = bool(kwargs.get("n_gpu_layers"))
        n_ubatch = min(n_batch, int(kwargs.pop("n_ubatch", None) or window.default_ubatch(on_gpu)))
        if not on_gpu:
            check_memory(n_seq_max * window.kv_bytes(header, type_k, type_v, n_ubatch))

        logits_all = bool(kwargs.pop("logits_all", False)) or kwargs.get("draft_model") is not None
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
        elif not self._stream.truncate(value):
            past = self._stream.history.snapshot()
            if len(past.digests):
                raise UserError(f"The stream cannot go back to {value} tokens: give the whole prompt again.")
            self._process(past.recent[:value])

    @property
    def input_ids(self) -> Tokens:
        """The last tokens processed, at least 16384 of them, read-only; good until more are."""
        return self._stock_input_ids if self._stream is None else self._stream.history.recent()

    @input_ids.setter
    def input_ids(self, value: Tokens) -> None:
        self._stock_input_ids = value

    @property
    def scores(self) -> Logits:
        """Logits of the last batch, a copy (n_rows, n_vocab): all of its tokens with logits_all, else the last."""
        if self._stream is None:
            return self._stock_scores
        return self._last_logits()

    @scores.setter
    def scores(self, value: Logits) -> None:
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
        if not stream.fresh:
            return np.empty((0, self._n_vocab), dtype=np.float32)
        logits: Logits = stream.logits_block().copy()
        return logits

    # --- forward ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Starts a new stream."""
        if self._stream is None:
            super().reset()  # type: ignore[no-untyped-call]
        else:
            self._stream.clear()

    def eval(self, tokens: Sequence[int] | Tokens) -> None:
        """Processes tokens (n_tokens,), any number of them, after those that were processed before.

        Raises RuntimeError if the library cannot; what was processed until then stays.
        """
        if self._stream is None:
            super().eval(tokens)  # type: ignore[arg-type]
            return
        self._stream.sync()
        new = as_tokens(tokens)
        for start in range(0, len(new), self.n_batch):
            self._stream.decode(new[start : start + self.n_batch], self._logits_all)

    def _process(self, prompt: Tokens) -> None:
        """Makes `prompt` (n_tokens,) the stream, reusing what it shares with the present one."""
        n_reused = self.stream.resume(prompt)
        if self.verbose and n_reused:
            print(f"Llama.generate: {n_reused} tokens reused, {len(prompt) - n_reused} to process", file=sys.stderr)
        self.eval(prompt[n_reused:])

    def _init_sampler(self, **kwargs: Any) -> Sampler:  # type: ignore[override]
        params = replace(self.sampling.updated(kwargs), seed=self._seed)
        return make_sampler(params, self._model, self.n_ctx(), lambda: self._input_ids)

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """Samples a token. Raises RuntimeError if nothing was processed that it could follow."""
        if self._stream is not None and not self._stream.fresh:
            raise RuntimeError("There are no logits to sample from: process at least one token first.")
        return int(super().sample(*args, **kwargs))

    def generate(
        self, tokens: Sequence[int] | Tokens, *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """A generator of tokens that follow `tokens`; the arguments are those of llama_cpp.Llama.generate.

        It has no end of its own. Tokens sent to it are processed after the one it yielded.
        """
        if self._stream is None:
            return super().generate(tokens, *args, **kwargs)  # type: ignore[arg-type]
        call = _GENERATE.bind(self, tokens, *args, **kwargs)
        call.apply_defaults()
        sampling = call.arguments
        for name in ("self", "tokens"):
            del sampling[name]
        return self._generate(as_tokens(tokens), sampling.pop("reset"), sampling.pop("stopping_criteria"), sampling)

    def _generate(
        self, prompt: Tokens, reset: bool, stopping_criteria: Any, sampling: dict[str, Any]
    ) -> Generator[int, Sequence[int] | None, None]:
        stream = self.stream
        self._sampler = self._init_sampler(**sampling)  # type: ignore[assignment]
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
                token = self.sample(idx=position - 1)
                self._sampled_at = position
                if stopping_criteria is not None and stopping_criteria(
                    self._input_ids[: position - stream.history.n_digested], stream.logits(position - 1)
                ):
                    return
                if position < len(stream) and stream.history.token(position) != token:
                    self.n_tokens = position
                sent = yield token
                pending = [] if position < len(stream) else [token]
                position += 1
                if sent:
                    self.n_tokens = min(position, len(stream))
                    pending.extend(sent)
                    position += len(sent)
                if pending:
                    self.eval(pending + self._drafts(pending))
        finally:
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
        self.stream.clear()
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            self.stream.decode(part, logits_all=True)
            yield part, self.stream.logits_block()

    def logits_of_sample(self) -> Logits:
        """Logits (n_vocab,) the token that `generate` yielded last was sampled from; good until the next one."""
        return self.stream.logits(self._sampled_at - 1)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self._stream is None:
            return super()._create_completion(*args, **kwargs)
        return complete(self, *args, **kwargs)

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
            self._seed = state.seed

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self._window is not None:
            state.update(lminf=self._config, n_ctx=self._window.size)
        return state


def training_length(header: Header, overrides: dict[str, Any]) -> int:
    """Tokens the model was trained on, at most; a default if the file does not say."""
    value = overrides.get(f"{header.architecture}.context_length", header.n_ctx_train)
    return int(value) or DEFAULT_WINDOW
