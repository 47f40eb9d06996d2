"""A model and its context with a Λ cache: the only place that makes one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as bindings
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler

from lminf_edge import native, rpc
from lminf_edge.cache.archive_store import ArchiveStore
from lminf_edge.cache.checkpoint import Identity, model_digest
from lminf_edge.cache.sequence import Batch, CacheSequence, ConstantSequence
from lminf_edge.config import (
    DEFAULT_WINDOW,
    IN_MEMORY,
    MAX_BYTES,
    LMInfConfig,
    Window,
    check_kv_type,
    check_memory,
    is_quantized,
    resolve,
    warn_of_window,
    whole_number,
)
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.models import find_model
from lminf_edge.native import Support

# parameters that are whole numbers, and their minima
_WHOLE_NUMBERS = {
    "n_batch": 1,
    "n_ubatch": 0,
    "n_threads": 0,
    "n_threads_batch": 0,
    "n_gpu_layers": -1,
    "main_gpu": 0,
    "last_n_tokens_size": -1,
    "yarn_orig_ctx": 0,
}

ALL_LAYERS = 0x7FFFFFFF  # what llama_cpp makes of n_gpu_layers=-1

# settings that the keys in a cache depend on, besides model and window
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


class RemoteLlama(llama_cpp.Llama):
    """llama_cpp.Llama with one more argument: rpc_servers, other machines for its layers, all by default."""

    _connection: rpc.Connection | None = None
    guessed_format: str | None = None  # the chat_format that llama_cpp made up

    def __init__(
        self, *args: Any, rpc_servers: str | Sequence[str] | None = None, n_gpu_layers: int = 0, **kwargs: Any
    ) -> None:
        if rpc_servers:
            self._connection = rpc.connect(rpc_servers)
            n_gpu_layers = n_gpu_layers or -1
        super().__init__(*args, n_gpu_layers=n_gpu_layers, **kwargs)
        if kwargs.get("chat_format") is None:
            self.guessed_format = self.chat_format

    @property
    def model_params(self) -> Any:
        return self.__dict__["model_params"]

    @model_params.setter
    def model_params(self, params: Any) -> None:
        """The base class makes them and loads the model with them."""
        self.__dict__["model_params"] = params
        if self._connection is not None:
            params.devices = ctypes.addressof(self._connection.devices)
            self._stack.callback(self._connection.close)  # after all that is freed


class Model:
    """A llama_cpp.Llama and what the engine needs of it."""

    def __init__(
        self,
        llama: llama_cpp.Llama,
        init: Callable[..., None],
        path: str,
        config: LMInfConfig,
        n_ctx: int | None,
        n_seq_max: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Makes `llama` with `init`, llama_cpp.Llama's, called with the path and keywords, in a context with a Λ cache.

        n_ctx, if given, is the attention window; n_seq_max the number of sequences. Raises UserError, in one sentence,
        if the file cannot be used, the parameters contradict each other or the model, or the cache cannot fit in
        memory.
        """
        kwargs = dict(settings)
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
        overrides = kwargs.get("kv_overrides") or {}
        n_ctx_train = training_length(header, overrides)
        n_most = header.most_local(config.n_global, config.n_recall, overrides)
        window = resolve(config, n_ctx, n_ctx_train, n_most)
        type_k, type_v = check_kv_type("type_k", kwargs.get("type_k")), check_kv_type("type_v", kwargs.get("type_v"))
        if is_quantized(type_v) and not kwargs.setdefault("flash_attn", True):
            raise UserError(f"type_v={type_v}, a quantized type, needs flash_attn: leave flash_attn out or set it.")
        n_batch = int(kwargs.pop("n_batch", None) or 512)
        if n_seq_max > n_batch:
            raise UserError(f"n_seq_max={n_seq_max} must be no more than n_batch={n_batch}: give a larger n_batch.")
        on_gpu = bool(kwargs.get("n_gpu_layers") or kwargs.get("rpc_servers"))
        n_ubatch = min(n_batch, int(kwargs.pop("n_ubatch", None) or window.default_ubatch(on_gpu)))
        at_fault = "n_batch" if n_batch >= window.size else "n_ctx or n_local"
        check_memory(4 * n_batch * max(window.size, n_batch), "batch", at_fault)  # as llama_cpp allocates it
        params = native.Params.of(window, n_seq_max)
        with native.captured_errors() as errors, library.next_context(params):
            try:
                # n_ctx sizes nothing in this cache, but n_batch is cut to it
                init(path, n_ctx=max(window.size, n_batch), n_batch=n_batch, n_ubatch=n_ubatch, **kwargs)
            except ValueError as error:
                reason = library.last_error() or native.load_failure(path, errors) or str(error)
                raise UserError(reason) from error
        if llama.lora_path and not llama._lora_adapter:  # the base class takes a null pointer for an adapter
            reason = errors[0] if errors else "llama.cpp does not say why"
            raise UserError(f"{llama.lora_path} cannot be loaded as an adapter: {reason}.")
        is_constant = library.support(llama._model.model) is Support.CONSTANT
        assert is_constant != library.enabled(llama._ctx.ctx)
        self.parts = library.parts(llama._ctx.ctx)
        self.note: str | None = None  # what a user might not expect
        if is_constant:  # nothing of a window is in force
            window = replace(window, n_global=0, n_local=window.size, max_distance=window.size, n_slack=0, n_recall=0)
            self.note = constant_note(header.architecture)
        else:
            n_swa = bindings.llama_model_n_swa(llama._model.model) if self.parts.n_layer_sliding else 0
            warn_of_window(window, n_ctx_train, n_swa, "n_local" if n_ctx is None else "n_ctx")

        settings = {name: getattr(llama.context_params, name) for name in _ROPE_SETTINGS}
        settings.update(kv_overrides=llama.kv_overrides, lora_scale=llama.lora_scale if llama.lora_path else None)
        self.path = path
        self.llama = llama
        self.window: Window = window
        self.is_constant = is_constant  # purely recurrent: it remembers in a state of constant size, without a window
        self.config = config if is_constant else replace(config, n_local=window.n_local)
        self.n_seq_max = n_seq_max
        self.n_vocab = int(llama.n_vocab())
        self.n_batch, self.n_ubatch = n_batch, n_ubatch
        sequence = ConstantSequence if is_constant else CacheSequence
        self.sequences = [sequence(library, llama._ctx, window, seq_id) for seq_id in range(n_seq_max)]
        self.n_undo = self.sequences[0].n_undo
        self.n_seen = self.sequences[0].n_seen
        # llama.cpp's graph of Chameleon cannot be built for a micro-batch without logits: it would abort
        self.batch = Batch(llama._batch, keeps_all=header.architecture == "chameleon")
        stock = self.sequences[0].attention == "stock"
        self.identity = Identity(
            model=model_digest(path, settings, *([llama.lora_path] if llama.lora_path else [])),
            n_global=window.n_global,
            n_local=0 if is_constant else window.n_local,
            max_distance=0 if is_constant else window.max_distance,
            sink_mode=params.sink_mode,
            type_k=type_k,
            type_v=type_v,
            v_transposed=int(stock and not llama.context_params.flash_attn_type),
            **(window.recall if window.n_recall and not is_constant else {}),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: LMInfConfig | None = None,
        n_ctx: int | None = None,
        n_seq_max: int = 1,
        **settings: Any,
    ) -> Model:
        """Loads a model file or an embedded model; raises as the constructor does."""
        llama = object.__new__(RemoteLlama)
        llama._stack = contextlib.ExitStack()  # so that close() works however early this fails
        init = functools.partial(RemoteLlama.__init__, llama)
        return cls(llama, init, find_model(path), config or LMInfConfig(), n_ctx, n_seq_max, settings)

    def close(self) -> None:
        self.llama.close()

    def archives(self, folder: Path | None) -> ArchiveStore | None:
        """What checkpoints that are kept in a folder can recall; None: nothing. Raises UserError."""
        config = self.config
        if not self.window.n_recall:
            return None
        if config.archive != IN_MEMORY:
            # what other checkpoints name is not ours to sweep
            store = "" if folder is None else str(folder.absolute())
            name = hashlib.sha256(os.fsencode(store)).hexdigest()[:16]
            place: Path | None = Path(config.archive).expanduser() / self.identity.folder_name / name
        else:
            place = None if folder is None else folder / "archive"
        memory_budget, maps = self.window.archive_bytes or MAX_BYTES, bool(self.window.archive_disk)
        return ArchiveStore(self.sequences[0].new_archive, place, config.archive_disk, memory_budget, maps)

    # --- vocabulary ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def eog_tokens(self) -> frozenset[int]:
        """All tokens that end a generation."""
        return eog_tokens(self.llama)

    def is_eog(self, token: int) -> bool:
        """Whether this token ends a generation."""
        return bool(bindings.llama_vocab_is_eog(self.llama._model.vocab, token))


def eog_tokens(llm: Any) -> frozenset[int]:
    """All tokens that end a generation, of a llama_cpp.Llama."""
    vocabulary = llm._model.vocab
    return frozenset(i for i in range(llm.n_vocab()) if bindings.llama_vocab_is_eog(vocabulary, i))


def constant_note(architecture: str) -> str:
    """What is to be said of a purely recurrent model."""
    return (
        f"Models of architecture '{architecture}' keep a state of constant size, however long the stream: this one "
        "needs no Λ cache and runs as it is."
    )


def native_model(path: str, **settings: Any) -> Any:
    """A llama_model alone, with these llama_model_params; whoever asks for it frees it. Raises UserError, in one
    sentence, if the file cannot be loaded."""
    params = bindings.llama_model_default_params()
    for name, value in settings.items():
        setattr(params, name, value)
    with native.captured_errors() as errors:
        model = bindings.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise UserError(native.load_failure(path, errors) or f"{path} cannot be loaded.")
    return model


def native_context(model: Any, lminf: native.Params | None = None, **settings: Any) -> Any:
    """A llama_context of a llama_model, with these llama_context_params; whoever asks for it frees it.

    `lminf` gives it a Λ cache, without it has llama.cpp's own. Raises UserError, in one sentence, if the library
    refuses.
    """
    params = bindings.llama_context_default_params()
    for name, value in settings.items():
        setattr(params, name, value)
    refusal = ""
    with native.captured_errors() as errors:
        if lminf is None:
            context = bindings.llama_init_from_model(model, params)
        else:
            library = native.load()
            with library.next_context(lminf):
                context = bindings.llama_init_from_model(model, params)
                refusal = library.last_error()
    if not context:
        reason = refusal or native.context_failure(errors) or (errors[0] if errors else "")
        raise UserError(reason or "llama.cpp cannot make a context for this model.")
    return context


def training_length(header: Header, overrides: Mapping[str, Any]) -> int:
    """The model's training length in tokens; a default if the file does not tell."""
    value = overrides.get(f"{header.architecture}.context_length", header.n_ctx_train)
    return int(value) or DEFAULT_WINDOW
