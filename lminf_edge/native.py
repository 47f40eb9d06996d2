"""Finds the patched llama.cpp, makes llama_cpp load it, and declares the functions of lminf.h."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lminf_edge import startup
from lminf_edge.config import Parts
from lminf_edge.errors import UserError
from lminf_edge.startup import LIBRARY_NAMES as LIBRARY_NAMES
from lminf_edge.structures import Info as Info
from lminf_edge.structures import NativeParts, Segment
from lminf_edge.structures import Params as Params

MARK = "lminf_set_next"  # a function only the patched library has

_Cancelled = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)  # lminf_is_cancelled


class Support(enum.IntEnum):
    """enum lminf_support: what a model can have"""

    REFUSED = 0  # no Λ cache
    RUNS = 1  # a Λ cache
    CONSTANT = 2  # a recurrent state and nothing that grows: a context of its own is made instead of a Λ cache


def library_folder() -> Path | None:
    """The folder of the patched library, None if there is none: see lminf_edge.startup."""
    folder = startup.library_folder()
    return Path(folder) if folder else None


def prepare() -> None:
    """Makes a later import of llama_cpp load the patched library.

    Raises ImportError if llama_cpp has loaded another one already.
    """
    bindings = sys.modules.get("llama_cpp.llama_cpp")
    if bindings is None:
        startup.install().ours_in_any_case = True
    elif not hasattr(getattr(bindings, "_lib", None), MARK):
        raise ImportError(
            "llama_cpp was imported before lminf_edge and runs a stock llama.cpp: import lminf_edge first."
        )


class Native:
    """The functions of lminf.h, for llama_cpp's contexts and models."""

    def __init__(self, lib: Any) -> None:
        def declare(name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            return function

        pointer, int32, int64, boolean = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_bool
        self._default_params = declare("lminf_default_params", Params)
        self._refusal = declare("lminf_refusal", ctypes.c_char_p, pointer)
        self._support = declare("lminf_support", int32, pointer)
        self._set_next = declare("lminf_set_next", boolean, ctypes.POINTER(Params))
        self._last_error = declare("lminf_last_error", ctypes.c_char_p)
        self._enabled = declare("lminf_enabled", boolean, pointer)
        self._get_params = declare("lminf_get_params", boolean, pointer, ctypes.POINTER(Params))
        self._get_info = declare("lminf_get_info", boolean, pointer, int32, ctypes.POINTER(Info))
        self._get_parts = declare("lminf_get_parts", boolean, pointer, ctypes.POINTER(NativeParts))
        self._memory_bytes = declare("lminf_memory_bytes", ctypes.c_uint64, pointer)
        self._next_pos = declare("lminf_next_pos", int32, pointer, int32, int32)
        self._rollback = declare("lminf_rollback", boolean, pointer, int32, int64)
        self._skip_tokens = declare("lminf_skip_tokens", boolean, pointer, int32, pointer, int64)
        self._seq_set_sinks = declare("lminf_seq_set_sinks", boolean, pointer, int32, int32)
        self._seq_set_recall = declare("lminf_seq_set_recall", boolean, pointer, int32, int32)
        self._grammar_overran = declare("lminf_grammar_overran", boolean)
        text = ctypes.c_char_p
        self._tokenize = declare(
            "lminf_tokenize", int32, pointer, text, int32, pointer, int32, boolean, boolean, _Cancelled, pointer
        )
        self._seq_start = declare("lminf_seq_start", boolean, pointer, int32, int64)
        # what cache/archive.py calls
        segment = ctypes.POINTER(Segment)
        self.archive_get = declare("lminf_archive_get", pointer, pointer, int32)
        self.archive_new = declare("lminf_archive_new", pointer, pointer)
        self.archive_set = declare("lminf_archive_set", boolean, pointer, int32, pointer)
        self.archive_free = declare("lminf_archive_free", None, pointer)
        self.archive_bytes = declare("lminf_archive_bytes", ctypes.c_uint64)
        self.archive_segments = declare("lminf_archive_segments", int32, pointer, segment, int32)
        self.archive_read = declare("lminf_archive_read", None, pointer, segment, pointer)
        self.archive_ranges = declare("lminf_archive_ranges", int32, pointer, ctypes.POINTER(int64), int32)
        self.archive_add = declare("lminf_archive_add", boolean, pointer, segment, pointer)
        self.archive_map = declare("lminf_archive_map", boolean, pointer, int64, ctypes.c_char_p, ctypes.c_uint64)
        self.archive_set_ranges = declare("lminf_archive_set_ranges", None, pointer, ctypes.POINTER(int64), int32)

    def default_params(self) -> Params:
        params: Params = self._default_params()
        return params

    def refusal(self, model: Any) -> str | None:
        """Why this model cannot run with a Λ cache, in one sentence; None if it can."""
        text: bytes | None = self._refusal(model)
        return text.decode("utf-8", errors="replace") if text else None

    def support(self, model: Any) -> Support:
        """What this model can have; some are only refused when their graph is built."""
        return Support(self._support(model))

    def last_error(self) -> str:
        """The error of this thread's last call, "" if there was none."""
        text: bytes | None = self._last_error()
        return (text or b"").decode("utf-8", errors="replace")

    @contextlib.contextmanager
    def next_context(self, params: Params) -> Iterator[None]:
        """The context that this thread makes inside the `with` block gets a Λ cache, unless its model is CONSTANT.

        Raises ValueError if the parameters are invalid.
        """
        if not self._set_next(ctypes.byref(params)):
            raise UserError(self.last_error())
        try:
            yield
        finally:
            self._set_next(None)

    def enabled(self, ctx: Any) -> bool:
        return bool(self._enabled(ctx))

    def params(self, ctx: Any) -> Params:
        params = Params()
        if not self._get_params(ctx, ctypes.byref(params)):
            raise RuntimeError("This context has no Λ cache.")
        return params

    def info(self, ctx: Any, seq_id: int = 0) -> Info:
        info = Info()
        if not self._get_info(ctx, seq_id, ctypes.byref(info)):
            raise RuntimeError(f"This context has no Λ cache with a sequence {seq_id}.")
        return info

    def parts(self, ctx: Any) -> Parts:
        """What a context with a Λ cache remembers by, or one of a CONSTANT model."""
        from llama_cpp import llama_cpp as bindings

        found = NativeParts()
        if not self._get_parts(ctx, ctypes.byref(found)):
            model = bindings.llama_get_model(ctx)
            assert self.support(model) is Support.CONSTANT
            found.n_layer_recurrent = bindings.llama_model_n_layer(model)
            found.recurrent_bytes = self.memory_bytes(ctx)
        return Parts(**{name: getattr(found, name) for name, _ in NativeParts._fields_})

    def memory_bytes(self, ctx: Any) -> int:
        """Bytes that any context remembers by; without weights, what they would be."""
        return int(self._memory_bytes(ctx))

    def next_pos(self, ctx: Any, n_tokens: int, seq_id: int = 0) -> int:
        """Makes room for n_tokens more; returns the graph position of the first, or a negative number."""
        return int(self._next_pos(ctx, seq_id, n_tokens))

    def rollback(self, ctx: Any, stream_pos: int, seq_id: int = 0) -> bool:
        """Rolls back to this stream position; False, and nothing changed, if that is not possible."""
        return bool(self._rollback(ctx, seq_id, stream_pos))

    def skip(self, ctx: Any, tokens: Any, seq_id: int = 0) -> bool:
        """Advances the stream by tokens[n_tokens] that are not processed, contiguous and int32.

        False, and nothing changed, if that is not possible.
        """
        return bool(self._skip_tokens(ctx, seq_id, tokens.ctypes.data, len(tokens)))

    def set_sinks(self, ctx: Any, n_global: int, seq_id: int = 0) -> bool:
        """Lets an empty sequence keep this many sinks; False if that is more than the context has room for."""
        return bool(self._seq_set_sinks(ctx, seq_id, n_global))

    def set_recall(self, ctx: Any, n_recall: int, seq_id: int = 0) -> bool:
        """Recalls this many tokens for a sequence from now on; False if that is more than the context's n_recall."""
        return bool(self._seq_set_recall(ctx, seq_id, n_recall))

    def grammar_overran(self) -> bool:
        """Whether this thread's last call into a grammar was aborted because it took too much work. Forgets it."""
        return bool(self._grammar_overran())

    def tokenize(
        self, vocab: Any, text: bytes, tokens: Any, add_bos: bool, special: bool, is_cancelled: Callable[[], bool]
    ) -> int:
        """llama_tokenize into an int32 array; negative also if it was cancelled."""
        ask = _Cancelled(lambda _: is_cancelled())
        return int(self._tokenize(vocab, text, len(text), tokens.ctypes.data, len(tokens), add_bos, special, ask, None))

    def seq_start(self, ctx: Any, stream_pos: int, seq_id: int = 0) -> bool:
        """Lets an empty sequence begin at this position."""
        return bool(self._seq_start(ctx, seq_id, stream_pos))


def _exit(message: bytes) -> None:
    """What ggml calls before it aborts, in any thread."""
    reason = " ".join(message.decode("utf-8", errors="replace").split())
    os.write(2, f"error: llama.cpp cannot go on, as with a file that contradicts itself: {reason}.\n".encode())
    os._exit(1)


_exit_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_exit)  # never freed

exits_on_abort = False  # of libraries loaded from now on: end the process with a sentence instead of a stack trace


@functools.cache
def load() -> Native:
    """The patched library, loaded through llama_cpp.

    Raises ImportError, in one sentence, if it is missing, cannot be loaded or is not the patched one.
    """
    prepare()
    folder = library_folder()
    if folder is None:
        raise ImportError(
            "The native library of lminf_edge is missing: reinstall the package or set LMINF_LIB_PATH to its folder."
        )
    if not any((folder / name).exists() for name in LIBRARY_NAMES):
        raise ImportError(f"There is no llama.cpp library in {folder}: reinstall lminf_edge or correct LMINF_LIB_PATH.")
    try:
        from llama_cpp import llama_cpp as bindings
    except (OSError, RuntimeError, AttributeError) as error:
        raise ImportError(f"The llama.cpp library in {folder} does not fit this llama_cpp: {error}.") from error
    lib = bindings._lib
    if not hasattr(lib, MARK):
        raise ImportError(
            f"The llama.cpp library in {folder} is a stock one, without the Λ cache: set LMINF_LIB_PATH to ours."
        )
    if exits_on_abort:
        lib.ggml_set_abort_callback(_exit_callback)
    try:
        return Native(lib)
    except AttributeError as error:
        raise ImportError(
            f"The library in {folder} is of another version of lminf_edge: build or install it again."
        ) from error


_capturing = threading.local()  # .errors: the innermost list of this thread
_capture_lock = threading.Lock()
_n_capturing = 0  # active captures, in all threads

_LOG_LEVEL_ERROR = 4
# llama_cpp's logger uses an older enum ggml_log_level, in which warnings would be errors
_BINDINGS_LEVEL = {0: 0, 1: 4, 2: 1, 3: 2, 4: 3, 5: 5}


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as an error inside the `with` block, in this thread, instead of printing it.

    The rest still goes to llama_cpp's logger.
    """
    global _n_capturing
    from llama_cpp import _logger
    from llama_cpp import llama_cpp as bindings

    errors: list[str] = []
    outer = getattr(_capturing, "errors", None)
    _capturing.errors = errors
    with _capture_lock:
        _n_capturing += 1
        bindings.llama_log_set(_capturing_callback(), None)
    try:
        yield errors
    finally:
        _capturing.errors = outer
        with _capture_lock:
            _n_capturing -= 1
            if _n_capturing == 0:
                bindings.llama_log_set(_logger.llama_log_callback, None)


@functools.cache
def _capturing_callback() -> Any:
    """A log callback, made once and never freed: another thread may be in it when the last capture ends."""
    from llama_cpp import _logger
    from llama_cpp import llama_cpp as bindings

    @bindings.llama_log_callback  # type: ignore[untyped-decorator]
    def callback(level: int, text: bytes, user_data: Any) -> None:
        errors = getattr(_capturing, "errors", None)
        if level == _LOG_LEVEL_ERROR and errors is not None:
            errors.append(text.decode("utf-8", errors="replace").strip())
        else:
            _logger.llama_log_callback(_BINDINGS_LEVEL[level], text, user_data)

    return callback


# what llama.cpp says of a file whose head or whose weights end too soon
_OF_DAMAGE = ("failed to load model from", "is not within the file bounds")


def load_failure(path: str, errors: list[str]) -> str | None:
    """Why a model could not be loaded, in one sentence, from what llama.cpp logged."""
    for error in errors:
        _, found, reason = error.partition("error loading model: ")
        if found and any(each in reason for each in _OF_DAMAGE):
            return f"{path} is cut short or damaged: download or convert it again."
        if found:
            return f"{path} cannot be loaded: {reason}."
    unfit = context_failure(errors)
    return f"{path} cannot be used so: {unfit}" if unfit else None


def context_failure(errors: list[str]) -> str | None:
    """Why a context could not be made, in one sentence, from what llama.cpp logged."""
    for error in errors:
        found = re.search(r"cache type (\S+) with block size (\d+) does not divide n_embd_head_\w+=(\d+)", error)
        if found:
            kv_type, block, size = found.groups()
            return f"a {kv_type} cache needs heads whose size is a multiple of {block}, and these have {size}."
        if "quantized V cache" in error:
            return "quantized values need flash attention, which is off or not in llama.cpp for it: choose f16."
        _, failed, reason = error.partition("failed to initialize the context: ")
        if failed:
            return f"llama.cpp cannot make a context for it: {reason}."
    return None
