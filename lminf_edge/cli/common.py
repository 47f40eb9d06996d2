"""What several commands need: what their options say, opening a model, reading a text."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.config import (
    DEFAULT_WINDOW,
    KV_TYPES,
    RECALL_PARAMETERS,
    LMInfConfig,
    Parts,
    Window,
    check_memory,
    is_quantized,
    resolve,
)
from lminf_edge.engine.params import SamplingParams
from lminf_edge.errors import UserError, wants_debug
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.models import download_from_hub, find_model

if TYPE_CHECKING:
    import llama_cpp

    from lminf_edge import Llama
    from lminf_edge.text.formats import ChatDefaults
    from lminf_edge.weightless import Weightless


KV_TYPE_NUMBERS = {name: number for number, (name, _, _) in KV_TYPES.items()}


class CommandError(UserError):
    """One sentence for the user."""


# --- what options say -------------------------------------------------------------------------------------------------


def chat_defaults(args: argparse.Namespace) -> ChatDefaults:
    """What these options say of chats. Raises CommandError for a file that cannot be read."""
    from lminf_edge.text.formats import ChatDefaults

    if sum(bool(each) for each in (args.chat_template, args.chat_template_file, args.chat_format)) > 1:
        raise CommandError("Give one of --chat-template, --chat-template-file and --chat-format.")
    template = args.chat_template or ""
    if args.chat_template_file is not None:
        template = read_text(args.chat_template_file)
    return ChatDefaults(
        template=template,
        reasoning_format=args.reasoning_format,
        enable_thinking=args.reasoning != "off",
        thinking_budget=args.reasoning_budget,
        budget_message=args.reasoning_budget_message,
        template_kwargs=args.chat_template_kwargs,
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """From the options of add_sampling. Raises UserError for values that llama.cpp cannot use."""
    values = {name: value for name, value in vars(args).items() if name in SamplingParams.__dataclass_fields__}
    breakers = values.pop("dry_sequence_breakers")
    if breakers is not None:
        # a shell has no easy way to say a line break
        texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in breakers if text != "none"]
        values["dry_sequence_breakers"] = tuple(texts)
    return SamplingParams(**values)


def use_hub(args: argparse.Namespace) -> None:
    """Downloads the model of --hf. Raises UserError if it cannot be had."""
    if getattr(args, "hf", None) is not None:
        args.model = str(download_from_hub(args.hf))


def window_config(args: argparse.Namespace) -> LMInfConfig:
    """From the options of add_window. Raises UserError."""
    with options_named():
        return LMInfConfig(
            n_global=args.n_global,
            n_local=args.n_local,
            max_distance=args.max_distance,
            attention=args.attention,
            **recall_of(args),
        )


def recall_of(args: argparse.Namespace) -> dict[str, Any]:
    """Parameters of LMInfConfig from the options of add_recall."""
    types = {"archive_type_k": args.archive_type, "archive_type_v": args.archive_type}
    names = [*RECALL_PARAMETERS, "archive", "archive_memory", "archive_disk"]
    return {name: getattr(args, name) for name in names if hasattr(args, name)} | types


# --- models -----------------------------------------------------------------------------------------------------------


def model_header(name_or_path: str) -> tuple[str, Header]:
    """Path and header of a model that has weights. Raises ValueError or CommandError."""
    path = find_model(name_or_path)
    header = read_header(path)
    if header.n_tensors == 0:
        raise CommandError(f"{path} holds a vocabulary without weights: give the path of a whole model.")
    return path, header


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Llama's arguments for the options of add_window and add_compute, except the window itself."""
    kv_type = KV_TYPE_NUMBERS[args.kv_type]
    return {
        "type_k": kv_type,
        "type_v": kv_type,
        "flash_attn": is_quantized(kv_type),  # llama.cpp has quantized values only with flash attention
        "n_batch": args.batch,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "n_gpu_layers": (-1 if args.rpc else 0) if args.gpu_layers is None else args.gpu_layers,
        "rpc_servers": args.rpc,
    }


@contextlib.contextmanager
def options_named() -> Iterator[None]:
    """Replaces the library's parameter names by option names in errors and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (UserError, MemoryError) as error:
            raise type(error)(_with_options(str(error))) from error
    for warning in caught:
        warnings.warn(_with_options(str(warning.message)), stacklevel=3)


_OPTIONS = {
    "n_ctx": "--n-local",
    "n_batch": "--batch",
    "type_k": "--kv-type",
    "type_v": "--kv-type",
    "n_recall": "--recall",
    "n_archive": "--archive-tokens",
    "archive_type_k": "--archive-type",
    "archive_type_v": "--archive-type",
    "archive_memory": "--archive-memory",
    "archive_disk": "--archive-disk",
}
_NAMES = (*_OPTIONS, *RECALL_PARAMETERS, "n_local", "n_global", "max_distance")
_PARAMETER = re.compile(rf"(?<![\w/.-])({'|'.join(_NAMES)})(?![\w/-]|\.\w)")


def _with_options(sentence: str) -> str:
    sentence = sentence.replace("n_ctx or n_local", "n_local")  # of the two, the command line has one
    return _PARAMETER.sub(lambda name: _OPTIONS.get(name[0], "--" + name[0].replace("_", "-")), sentence)


def resolved_window(args: argparse.Namespace, header: Header) -> Window:
    """The window of the options of add_window. Raises UserError."""
    with options_named():
        config = window_config(args)
        n_most = header.most_local(config.n_global, config.n_recall)
        return resolve(config, None, header.n_ctx_train or DEFAULT_WINDOW, n_most)


def open_model(args: argparse.Namespace, n_ctx_stock: int | None = None) -> Llama:
    """The model of the command line, with a Λ cache or, with --stock, full attention over n_ctx_stock tokens.

    Raises ValueError, MemoryError or CommandError, in one sentence, if it cannot be used.
    """
    path, header = model_header(args.model)
    settings = model_settings(args)
    show_note(gpu_note(args))
    if not args.stock:
        llm = load(path, lminf=window_config(args), **settings)
        show_note(llm.scheduler.model.note)
        return llm
    n_ctx = n_ctx_stock or header.n_ctx_train
    if not settings["n_gpu_layers"]:
        with options_named(), weightless(path) as model:
            check_memory(model.stock_bytes(n_ctx, settings["type_k"]))
    return load(path, n_ctx=n_ctx, swa_full=False, **settings)


def weightless(path: str) -> Weightless:
    """The model without its weights. Raises UserError, in one sentence, if llama.cpp cannot load it."""
    from lminf_edge import native

    native.load()
    from lminf_edge.weightless import Weightless

    return Weightless(path)


def gpu_note(args: argparse.Namespace) -> str | None:
    """What llama.cpp would only log: that nothing came of --gpu-layers."""
    from lminf_edge import backends, native

    if not args.gpu_layers or args.rpc:
        return None
    native.load()
    from llama_cpp import llama_cpp as bindings

    folder = native.library_folder()
    assert folder is not None
    if backends.has_gpu(bindings._lib, folder):
        return None
    return "--gpu-layers has no effect, as the library can use no GPU here: lminf-edge doctor says what it has."


def show_note(note: str | None) -> None:
    """Prints what a user might not expect to stderr."""
    if note:
        print(f"note: {note}", file=sys.stderr)


def load(path: str, **settings: Any) -> Llama:
    """A model, quietly. Raises ValueError or MemoryError, in one sentence."""
    from lminf_edge import Llama
    from lminf_edge.native import captured_errors, load_failure

    with options_named(), captured_errors() as errors:
        try:
            llm = Llama(path, verbose=False, **settings)
        except ValueError as error:
            raise UserError(load_failure(path, errors) or str(error)) from error
    # llama_cpp's logger takes llama.cpp's warnings for errors, and some come when a context is freed
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    return llm


# --- text -------------------------------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """The text of a UTF-8 file, "-" for stdin. Raises CommandError if it is empty or no text."""
    if path == "-":
        name, data = "stdin", sys.stdin.buffer.read()
    else:
        name = path
        if not Path(path).is_file():
            raise CommandError(f"{path} {'is not a file' if Path(path).exists() else 'does not exist'}.")
        data = Path(path).read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CommandError(f"{name} is not a UTF-8 text but UTF-16: convert it, e.g. with iconv -f UTF-16 -t UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise CommandError(f"{name} is not a UTF-8 text but binary data.") from None
        raise CommandError(
            f"{name} is not a UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}; if it is a text in another "
            "encoding, convert it, e.g. with iconv -f LATIN1 -t UTF-8."
        ) from None
    if "\0" in text:
        raise CommandError(f"{name} is not a text: it contains zero bytes.")
    if not text:
        raise CommandError(f"{name} is empty.")
    return text


def require_vocabulary(llm: llama_cpp.Llama) -> None:
    """Raises CommandError for a model without one: llama.cpp would abort when it tokenizes for it."""
    from llama_cpp import llama_cpp as bindings

    if bindings.llama_vocab_type(llm._model.vocab) == bindings.LLAMA_VOCAB_TYPE_NONE:
        raise CommandError(f"{llm.model_path} has no vocabulary, so it can neither read nor write text.")


def tokenize(llm: Llama, text: str) -> list[int]:
    """Tokens of a text to measure: BOS if the model wants one; special tokens' markup is plain text.

    Raises CommandError for a model without vocabulary.
    """
    require_vocabulary(llm)
    return list(llm.tokenize(text.encode("utf-8"), add_bos=llm._model.add_bos_token(), special=False))


# --- output -----------------------------------------------------------------------------------------------------------


def check_output(path: Path) -> None:
    """Raises CommandError if a file cannot be written there, before hours of measuring."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder: give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{path} cannot be written: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise CommandError(f"{path} cannot be written: permission denied.")


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_error(error: Exception) -> None:
    """One sentence on stderr, with --debug after the traceback."""
    if wants_debug():
        traceback.print_exception(error)
    print(f"error: {' '.join(_sentence(error).split())}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    """The message for the user: what to do, or to report a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return str(error) or "There is not enough memory."
    if isinstance(error, ImportError) and str(error).endswith("."):  # raised by us, in a sentence; Python's has no stop
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # of the system: a file, a full disk
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    what = f"{type(error).__name__}: {error}"
    return f"This is a bug in lminf-edge ({what}): run it again with --debug and report what it prints."


def describe_layers(parts: Parts) -> str:
    """ "3 with full attention: 14.2 MiB; 15 with a sliding window: 22.5 MiB" and the like."""
    kinds = (
        (parts.n_layer_full, "with full attention", parts.window_bytes + parts.sink_bytes),
        (parts.n_layer_sliding, "with a sliding window", parts.sliding_bytes),
        (parts.n_layer_recurrent, "recurrent", parts.recurrent_bytes),
    )
    return "; ".join(f"{n} {kind}: {human_bytes(n_bytes)}" for n, kind, n_bytes in kinds if n)


def human_bytes(n_bytes: float) -> str:
    """ "3.2 MiB" and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.1f} {unit}"
