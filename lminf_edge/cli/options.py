"""Options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lminf_edge.cli.common import KV_TYPE_NUMBERS
from lminf_edge.cli.values import (
    expand_home,
    file_path,
    json_object,
    number,
    rpc_servers,
    sampler_names,
    size,
    whole_number,
)
from lminf_edge.config import (
    ARCHIVE_TYPES,
    ATTENTIONS,
    DEFAULT_ARCHIVE,
    MAX_RECALL,
    PREFILLS,
    RECALL_INDEXES,
    RECALL_RULES,
    LMInfConfig,
)
from lminf_edge.engine.params import SamplingParams
from lminf_edge.rpc import DEFAULT_PORT

MAX_BATCH = 65536


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
