"""What several commands need: options, opening a model, reading a text."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.config import (
    ARCHIVE_TYPES,
    ATTENTIONS,
    DEFAULT_ARCHIVE,
    DEFAULT_WINDOW,
    KV_TYPES,
    MAX_RECALL,
    PREFILLS,
    RECALL_INDEXES,
    RECALL_PARAMETERS,
    RECALL_RULES,
    LMInfConfig,
    Parts,
    Window,
    check_memory,
    is_quantized,
    resolve,
)
from lminf_edge.engine.params import SAMPLERS, SamplingParams, sampler_name
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import Header, read_header
from lminf_edge.models import download_from_hub, find_model
from lminf_edge.rpc import DEFAULT_PORT, parse_servers

if TYPE_CHECKING:
    import llama_cpp

    from lminf_edge import Llama
    from lminf_edge.text.formats import ChatDefaults
    from lminf_edge.weightless import Weightless

MAX_BATCH = 65536

KV_TYPE_NUMBERS = {name: number for number, (name, _, _) in KV_TYPES.items()}


class CommandError(UserError):
    """One sentence for the user."""


# --- options ----------------------------------------------------------------------------------------------------------


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number that is `least` or more and `most` or less."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        _check_range(value, least, most)
        return value

    return parse


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(text: str) -> int:
    """An argparse type: a number of bytes, such as 500M or 2G."""
    digits, unit = text.strip(), ""
    if digits and not digits[-1].isdigit():
        digits, unit = digits[:-1], digits[-1].lower()
    if not digits.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 500M or 2G, not {text!r}")
    return int(digits) * _UNITS[unit]


def number(least: float, most: float | None = None) -> Callable[[str], float]:
    """An argparse type: a number that is `least` or more and `most` or less."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        _check_range(value, least, most)
        return value

    return parse


def expand_home(text: str) -> str:
    """An argparse type: a path, with ~ for the home folder: a shell leaves it in --file=~/text."""
    return os.path.expanduser(text)


def file_path(text: str) -> Path:
    """An argparse type: the same as a Path."""
    return Path(expand_home(text))


def _check_range(value: float, least: float, most: float | None) -> None:
    if not value >= least:  # catches nan as well
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be {most} or less, not {value}")


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    text = "path of a GGUF model, or a name: nano, nano-alibi, smollm2 (see lminf-edge get)"
    if default is not None:
        text += f"; default {default}"
    source = parser.add_mutually_exclusive_group(required=default is None)
    source.add_argument("-m", "--model", metavar="M", type=expand_home, default=default, help=text)
    add_hub(source)


def add_hub(parser: argparse._ActionsContainer) -> None:
    """An option of commands with a --model, in its place: `use_hub` sets it."""
    parser.add_argument(
        "--hf",
        metavar="REPO",
        help="USER/REPO[:QUANT] of the Hugging Face hub, downloaded once; without QUANT, Q4_K_M or the first file",
    )


def use_hub(args: argparse.Namespace) -> None:
    """Downloads the model of --hf. Raises UserError if it cannot be had."""
    if getattr(args, "hf", None) is not None:
        args.model = str(download_from_hub(args.hf))


def add_window(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention window")
    group.add_argument(
        "--n-global",
        metavar="G",
        type=whole_number(0),
        default=LMInfConfig.n_global,
        help="first tokens kept; default 10",
    )
    group.add_argument(
        "--n-local",
        metavar="L",
        type=whole_number(1),
        help="last tokens kept; default: min(4096, training length) less G, or what the model selects if that is less",
    )
    group.add_argument(
        "--max-distance",
        metavar="D",
        type=whole_number(1),
        help="distance of the first tokens once they have left the window; default L",
    )
    group.add_argument(
        "--kv-type", choices=KV_TYPE_NUMBERS, default="f16", help="number format of the cache; default f16"
    )
    group.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="auto",
        help="fused: one fast operation; stock: what every ggml backend has; default auto, fused where it can be",
    )
    add_recall(parser)


def add_recall(parser: argparse.ArgumentParser, in_files: bool = True) -> None:
    """A part of add_window; in_files: with options for archives in files."""
    plain = LMInfConfig()
    group = parser.add_argument_group(
        "recall",
        "Tokens that have left the window are attended to again, from an archive in memory"
        + " or in files" * in_files
        + ".",
    )
    group.add_argument(
        "--recall",
        dest="n_recall",
        metavar="R",
        type=whole_number(0, MAX_RECALL),
        default=plain.n_recall,
        help="of these, R in each layer: those that its queries look for most, in spans of 16 tokens; 32 is a good "
        "number; default 0, none",
    )
    group.add_argument(
        "--recall-distance",
        metavar="D",
        type=whole_number(1),
        help="where they stand for a query; default: the middle of the window",
    )
    group.add_argument(
        "--recall-from",
        metavar="N",
        type=whole_number(0),
        default=plain.recall_from,
        help="the first layer that recalls; default 0",
    )
    group.add_argument(
        "--recall-every",
        metavar="N",
        type=whole_number(1),
        default=plain.recall_every,
        help="tokens that one choice serves, where a prompt ends and in what is generated; default 1",
    )
    group.add_argument(
        "--recall-rule",
        choices=RECALL_RULES,
        default=plain.recall_rule,
        help="layer: one choice for all heads and queries; paper: R for each head, for the newest query alone, as in "
        f"LM-Infinite's code; default {plain.recall_rule}",
    )
    group.add_argument(
        "--recall-index",
        choices=RECALL_INDEXES,
        default=plain.recall_index,
        help=f"sketch: search by small sketches of the keys; exact: by all keys; default {plain.recall_index}",
    )
    group.add_argument(
        "--archive-tokens",
        dest="n_archive",
        metavar="N",
        type=whole_number(1),
        help=f"tokens of a stream in the archive, the newest; default {DEFAULT_ARCHIVE}, or what fits",
    )
    group.add_argument(
        "--archive-type",
        choices=ARCHIVE_TYPES,
        default=plain.archive_type_k,
        help=f"number format of the archive; default {plain.archive_type_k}",
    )
    if not in_files:
        return
    group.add_argument(
        "--archive",
        metavar="DIR",
        type=expand_home,
        default=plain.archive,
        help="folder of files that the archive is in, so that it can be larger than memory; default: memory",
    )
    group.add_argument(
        "--archive-memory",
        metavar="SIZE",
        type=size,
        help="memory for all archives; default: half of the machine's",
    )
    group.add_argument(
        "--archive-disk",
        metavar="SIZE",
        type=size,
        default=plain.archive_disk,
        help="disk for the files of archives, with --archive or where conversations are kept; default 16G",
    )


def add_chat_template(parser: argparse.ArgumentParser) -> None:
    """Options of chat templates, with llama-server's names."""
    group = parser.add_argument_group("chat template")
    group.add_argument(
        "--chat-template",
        metavar="JINJA",
        help="the text of a template, instead of the model's own, or the name of one of llama.cpp's, such as llama3",
    )
    group.add_argument("--chat-template-file", metavar="FILE", type=file_path, help="a file with one")
    group.add_argument("--chat-format", metavar="NAME", help="one of llama_cpp's, which call no tools")
    group.add_argument(
        "--chat-template-kwargs", metavar="JSON", type=json_object, default={}, help="more arguments of the template"
    )
    group.add_argument(
        "--reasoning-format",
        choices=("auto", "none", "deepseek", "deepseek-legacy"),
        default="auto",
        help="default auto: thoughts are apart from the answer; none: they stay in it",
    )
    group.add_argument(
        "--reasoning", choices=("on", "off", "auto"), default="auto", help="off: the model is not to think first"
    )
    group.add_argument(
        "--reasoning-budget", metavar="N", type=whole_number(-1), default=-1, help="tokens of thoughts; default -1: any"
    )
    group.add_argument("--reasoning-budget-message", metavar="TEXT", default="", help="said where the budget ends them")


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return value


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


def add_prefill(group: Any) -> None:
    group.add_argument(
        "--prefill",
        choices=PREFILLS,
        default="tail",
        help="what to process of a prompt that is not cached: all of it (full), or its first G tokens and last windows "
        "(tail), so that the first token does not wait for all of a long history; default tail",
    )
    group.add_argument(
        "--n-tail", metavar="N", type=whole_number(1), default=2, help="windows that tail processes; default 2"
    )
    group.add_argument(
        "--no-background",
        dest="background",
        action="store_false",
        help="with --recall and tail: do not read what was skipped while there is nothing else to do. Then it cannot "
        "be recalled; reading takes computing time, and one KV cache more",
    )


def add_drafts(group: Any) -> None:
    group.add_argument(
        "--spec-type",
        choices=("none", "ngram-simple"),
        default="none",
        help="drafts: with ngram-simple what followed the last tokens before is tried again in one batch, while that "
        "saves time by the times measured; answers with much to quote or edit come faster; default none",
    )


def add_compute(parser: argparse.ArgumentParser, stock: bool = True) -> None:
    group = parser.add_argument_group("computing")
    if stock:
        group.add_argument("--stock", action="store_true", help="full attention instead: llama.cpp as it is")
    group.add_argument(
        "--batch", metavar="N", type=whole_number(1, MAX_BATCH), default=512, help="tokens per batch; default 512"
    )
    group.add_argument("--threads", metavar="N", type=whole_number(1), help="default: half of the logical cores")
    group.add_argument(
        "--gpu-layers",
        metavar="N",
        type=whole_number(-1),
        help="layers on GPUs and other machines, -1 all; default 0, with --rpc -1",
    )
    add_rpc(group)


def add_rpc(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rpc",
        metavar="HOST:PORT,...",
        type=rpc_servers,
        help=f"machines that run `lminf-edge rpc-server`, to hold the layers together; default port {DEFAULT_PORT}; "
        "in trusted networks only",
    )


def rpc_servers(text: str) -> tuple[str, ...]:
    """An argparse type: servers with commas between them."""
    try:
        return parse_servers(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options that `sampling_params` collects; their names are its fields."""
    plain = SamplingParams()
    group = parser.add_argument_group(
        "sampling",
        "Small models may loop at the defaults (SmolLM2 does after 150 tokens): --repeat-penalty 1.1 "
        "--repeat-last-n 256 stops it.",
    )

    def add(flag: str, metavar: str, parse: Callable[[str], Any], text: str, name: str | None = None) -> None:
        name = name or flag.removeprefix("--").replace("-", "_")
        default = getattr(plain, name)
        group.add_argument(
            flag, dest=name, metavar=metavar, type=parse, default=default, help=f"{text}; default {default}"
        )

    last_n = whole_number(-1)
    add("--temp", "T", number(0), "temperature; 0: always the likeliest token", "temperature")
    add("--top-k", "K", whole_number(0), "sample from the K likeliest tokens; 0: off")
    add("--top-p", "P", number(0, 1), "sample from the likeliest tokens that sum to P; 1: off")
    add("--min-p", "P", number(0, 1), "drop tokens less likely than P times the likeliest; 0: off")
    add("--typical-p", "P", number(0, 1), "locally typical sampling; 1: off")
    add("--top-n-sigma", "N", number(-1), "drop logits more than N standard deviations below the largest; 0 or -1: off")
    add("--repeat-penalty", "R", number(0), "divide the logits of repeated tokens by R; 1: off")
    add("--repeat-last-n", "N", last_n, "tokens the penalties look back; 0: off, -1: the attention window")
    add("--frequency-penalty", "A", number(-100, 100), "subtract A for each repetition of a token; 0: off")
    add("--presence-penalty", "A", number(-100, 100), "subtract A once for a repeated token; 0: off")
    add("--dry-multiplier", "A", number(0), "DRY: penalize tokens that continue a repetition; 0: off")
    add("--dry-base", "B", number(1), "DRY: the penalty grows by B with each token of the repetition")
    add("--dry-allowed-length", "N", whole_number(0), "DRY: repetitions up to N tokens are free")
    add("--dry-penalty-last-n", "N", last_n, "DRY: tokens to look back; 0: off, -1: the attention window")
    group.add_argument(
        "--dry-sequence-breaker",
        dest="dry_sequence_breakers",
        metavar="TEXT",
        action="append",
        help='DRY: text that no repetition extends across, none for no text; repeatable; default \\n : " *',
    )
    add("--xtc-probability", "P", number(0, 1), "XTC: how often to drop all likely tokens but the last; 0: off")
    add("--xtc-threshold", "P", number(0, 1), "XTC: likely tokens have this probability or more; above 0.5: off")
    add("--dynatemp-range", "R", number(0), "vary the temperature by R, with the entropy of the prediction; 0: off")
    add("--dynatemp-exponent", "E", number(0), "exponent of that entropy")
    add("--mirostat", "N", whole_number(0, 2), "Mirostat 1 or 2 in place of all but the penalties; 0: off")
    add("--mirostat-tau", "T", number(0), "Mirostat: target entropy")
    add("--mirostat-eta", "E", number(0), "Mirostat: learning rate")
    add("--min-keep", "N", whole_number(0), "tokens that top-p, min-p, typical-p and XTC leave at least")
    group.add_argument(
        "--samplers",
        metavar="NAME;...",
        type=sampler_names,
        default=plain.samplers,
        help=f"those that take part, in this order; default {';'.join(plain.samplers)}",
    )
    group.add_argument("--seed", metavar="S", type=whole_number(-1), help="default: a different one each time")
    group.add_argument(
        "--no-loop-detection",
        dest="detect_loops",
        action="store_false",
        help="do not stop a text without a token limit when it repeats itself exactly, over and over",
    )


def sampler_names(text: str) -> tuple[str, ...]:
    """An argparse type: names of samplers with semicolons between them."""
    names = tuple(sampler_name(name.strip()) for name in text.split(";") if name.strip())
    unknown = [name for name in names if name not in SAMPLERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names


# --- models -----------------------------------------------------------------------------------------------------------


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """From the options of add_sampling. Raises UserError for values that llama.cpp cannot use."""
    values = {name: value for name, value in vars(args).items() if name in SamplingParams.__dataclass_fields__}
    breakers = values.pop("dry_sequence_breakers")
    if breakers is not None:
        # a shell has no easy way to say a line break
        texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in breakers if text != "none"]
        values["dry_sequence_breakers"] = tuple(texts)
    return SamplingParams(**values)


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
