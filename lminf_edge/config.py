"""The parameters of the Λ cache, and how omitted ones are resolved."""

from __future__ import annotations

import operator
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lminf_edge.errors import UserError

SinkMode = Literal["ceiling", "order", "true"]
SINK_MODES: tuple[SinkMode, ...] = ("ceiling", "order", "true")  # their index is enum lminf_sink_mode
Attention = Literal["auto", "fused", "stock"]
ATTENTIONS: tuple[Attention, ...] = ("auto", "fused", "stock")  # their index is enum lminf_attention
RecallRule = Literal["layer", "paper"]
RECALL_RULES: tuple[RecallRule, ...] = ("layer", "paper")  # their index is enum lminf_recall_rule
RecallIndex = Literal["sketch", "exact"]
RECALL_INDEXES: tuple[RecallIndex, ...] = ("sketch", "exact")  # their index is enum lminf_recall_index
ArchiveType = Literal["f32", "f16", "q8_0", "q4_0"]

Prefill = Literal["full", "tail"]
PREFILLS: tuple[Prefill, ...] = ("full", "tail")

DEFAULT_WINDOW = 4096
DEFAULT_SLACK = 64
MAX_WINDOW = 1 << 30
MAX_BYTES = 1 << 62

# GGML type number -> (name, bytes per block, elements per block), for types that a KV cache may have
KV_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 4, 1),
    1: ("f16", 2, 1),
    30: ("bf16", 2, 1),
    8: ("q8_0", 34, 32),
    2: ("q4_0", 18, 32),
    3: ("q4_1", 20, 32),
    6: ("q5_0", 22, 32),
    7: ("q5_1", 24, 32),
    20: ("iq4_nl", 18, 32),
}
KV_TYPE_DEFAULT = 1

ARCHIVE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
DEFAULT_ARCHIVE = 262144  # tokens, where they fit, as in the library
IN_MEMORY = "ram"  # of an archive
DEFAULT_ARCHIVE_DISK = 16 << 30  # bytes
MAX_RECALL = 4096


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What is recalled of the tokens that have left the window: see LMInfConfig."""

    # in the order of struct lminf_params
    n_recall: int = 0
    recall_distance: int | None = None
    recall_from: int = 0
    recall_every: int = 1
    recall_rule: RecallRule = "layer"
    recall_index: RecallIndex = "sketch"
    n_archive: int | None = None
    archive_type_k: ArchiveType = "q8_0"
    archive_type_v: ArchiveType = "q8_0"

    def check_recall(self) -> None:
        """Raises UserError, in one sentence, for values out of range."""
        _check("n_recall", self.n_recall, 0)
        if self.n_recall > MAX_RECALL:
            raise UserError(f"n_recall must be at most {MAX_RECALL}, not {self.n_recall}.")
        _check("recall_distance", self.recall_distance, 1)
        _check("recall_from", self.recall_from, 0)
        _check("recall_every", self.recall_every, 1)
        _check("n_archive", self.n_archive, 1)
        for name, values in (
            ("recall_rule", RECALL_RULES),
            ("recall_index", RECALL_INDEXES),
            ("archive_type_k", tuple(ARCHIVE_TYPES)),
            ("archive_type_v", tuple(ARCHIVE_TYPES)),
        ):
            if getattr(self, name) not in values:
                raise UserError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}.")

    def recall_settings(self) -> dict[str, Any]:
        """These parameters by name."""
        return {name: getattr(self, name) for name in RECALL_PARAMETERS}


RECALL_PARAMETERS = tuple(each.name for each in fields(Recall))


@dataclass(frozen=True)
class LMInfConfig(Recall):
    """Parameters of the Λ cache (LM-Infinite, Han et al., NAACL 2024, doi 10.18653/v1/2024.naacl-long.222).

    A token attends to the last `n_local` tokens at their true distances and to the first `n_global` tokens of the
    stream, once these have left the window, at the one distance `max_distance`.

    n_global       tokens kept from the start of the stream, 0 or more
    n_local        tokens in the window; None: the rest of n_ctx, or of min(4096, training length) without n_ctx,
                   and no more than a model with sparse attention selects
    max_distance   distance ceiling; None: n_local
    n_slack        tokens that can always be rolled back, at one more cell of cache each; None: 64
    sink_mode      "ceiling": the rule above; "order": StreamingLLM's positions inside the cache; "true": true
                   distances. The last two exist for comparison.
    n_checkpoints  automatic checkpoints kept in memory, so that a prompt that diverges earlier need not be processed
                   from its start; each is as large as the used part of the cache; 0: none
    pos_bound      for tests: graph positions stay below this; 0: chosen by the library
    prefill        "full": all of a prompt that is not cached is processed; "tail": if that exceeds n_tail windows by
                   a window or more, only its sinks and its last n_tail windows are
    n_tail         windows that prefill "tail" processes, 1 or more
    n_recall       tokens that have left the window and are attended to again, in each layer those its queries look for
                   most, in spans of 16; 0: none. 32 is a good number. See docs/design.md, "Recall"
    recall_distance  where they stand for a query, in tokens; None: half of max_distance, the middle of the window
    recall_from    the first layer that recalls
    recall_every   decoded tokens, or last ones of a prompt, that a choice serves, 1 or more
    recall_rule    "layer": one choice for all queries of a micro-batch and all heads; "paper": LM-Infinite's code,
                   n_recall tokens for each query head, for the newest query of a batch alone (for comparison)
    recall_index   "sketch": 32 numbers of 2 bits for each key make a short list, whose keys are then looked at;
                   "exact": all keys are
    n_archive      tokens of a stream that can be recalled, the newest; None: 262144, or as many as fit: in memory into
                   archive_memory, in files into its share of archive_disk. Both are taken as a stream grows
    archive_type_k, archive_type_v  "f32", "f16", "q8_0" or "q4_0": how their keys and values are kept
    archive        "ram": they are kept in memory; else a folder: all but the last 1024 tokens are kept in files there,
                   read as they are needed, so that an archive can be larger than memory (not on Windows)
    archive_memory  bytes of memory that all archives of the process take at most; None: half of the machine's. What
                   checkpoints and saved states can recall gives way first, then the oldest tokens of a stream
    archive_disk   bytes of the files that archives are kept in, with checkpoint_folder or a folder for `archive`
    attention      "fused": one operation for sinks and window, on CPU, CUDA and Metal; "stock": operations that every
                   ggml backend has, slower; "auto": fused if possible. The results differ only in rounding.

    Raises ValueError, in one sentence, for values out of range.
    """

    n_global: int = 10
    n_local: int | None = None
    max_distance: int | None = None
    n_slack: int | None = None
    sink_mode: SinkMode = "ceiling"
    n_checkpoints: int = 4
    pos_bound: int = 0
    attention: Attention = "auto"
    prefill: Prefill = "full"
    n_tail: int = 2
    archive: str | os.PathLike[str] = IN_MEMORY
    archive_memory: int | None = None
    archive_disk: int = DEFAULT_ARCHIVE_DISK

    def __post_init__(self) -> None:
        _check("n_global", self.n_global, 0)
        _check("n_local", self.n_local, 1)
        _check("max_distance", self.max_distance, 1)
        _check("n_slack", self.n_slack, 0)
        _check("n_checkpoints", self.n_checkpoints, 0)
        _check("pos_bound", self.pos_bound, 0)
        _check("n_tail", self.n_tail, 1)
        if self.prefill not in PREFILLS:
            raise UserError(f"prefill must be one of {', '.join(PREFILLS)}, not {self.prefill!r}.")
        if self.sink_mode not in SINK_MODES:
            raise UserError(f"sink_mode must be one of {', '.join(SINK_MODES)}, not {self.sink_mode!r}.")
        if self.attention not in ATTENTIONS:
            raise UserError(f"attention must be one of {', '.join(ATTENTIONS)}, not {self.attention!r}.")
        self.check_recall()
        if self.archive_memory is not None:
            whole_number("archive_memory", self.archive_memory, 1, MAX_BYTES)
        whole_number("archive_disk", self.archive_disk, 0, MAX_BYTES)
        if not isinstance(self.archive, (str, os.PathLike)) or not os.fspath(self.archive):
            raise UserError(f"archive must be {IN_MEMORY!r} or the path of a folder, not {self.archive!r}.")
        if self.n_recall and self.sink_mode != "ceiling":
            raise UserError(f"n_recall={self.n_recall} needs sink_mode 'ceiling', not {self.sink_mode!r}.")
        if self.n_recall and self.recall_rule == "paper" and self.attention == "fused":
            raise UserError("recall_rule 'paper' needs attention 'stock': its heads attend to different tokens.")


@dataclass(frozen=True)
class Window(Recall):
    """The resolved parameters."""

    n_global: int
    n_local: int
    max_distance: int
    n_slack: int
    sink_mode: SinkMode
    pos_bound: int
    attention: Attention
    recall_distance: int = field(default=0, kw_only=True)
    n_archive: int = field(default=0, kw_only=True)  # 0: the library chooses
    archive_bytes: int = 0  # of memory; 0: the library chooses
    archive_disk: int = 0  # bytes of files; 0: archives are in memory

    @property
    def recall(self) -> dict[str, int]:
        """What a state depends on of what is recalled."""
        rule = RECALL_RULES.index(self.recall_rule)
        return {
            "n_recall": self.n_recall,
            "recall_distance": self.recall_distance,
            "recall_from": self.recall_from,
            "recall_rule": rule,
        }

    @property
    def size(self) -> int:
        """Tokens a query attends to at most, but for those that are recalled: n_global + n_local."""
        return self.n_global + self.n_local

    def default_ubatch(self, on_gpu: bool = False) -> int:
        """Default micro-batch, in tokens: see default_ubatch()."""
        return default_ubatch(self.size, on_gpu, recalls=self.n_recall > 0)


def default_ubatch(window: int, on_gpu: bool = False, recalls: bool = False) -> int:
    """A quarter of the window, in tokens, as a power of two in 64..128, with recall in 64..256, on a GPU in 64..512.

    The cache holds one micro-batch of cells beside the window. Prefill on a CPU is as fast with 128 as with 512, but
    each micro-batch searches the archive.
    """
    return min(512 if on_gpu else 256 if recalls else 128, max(64, 1 << (window // 4 - 1).bit_length()))


@dataclass(frozen=True)
class Parts:
    """The layers of a model by what they remember, and the bytes of that, for all sequences of a context."""

    n_layer_full: int  # the first and the last tokens: attention with the rule of the Λ cache
    n_layer_sliding: int  # a sliding window, as the model was trained with
    n_layer_recurrent: int  # a state
    n_layer_fused: int  # of the first two, those whose attention is one fused operation
    window_bytes: int  # of the windows of layers with full attention, slack and micro-batch included
    sink_bytes: int  # of their sinks, and of the cells that keys to select tokens by are written to
    sliding_bytes: int  # of sliding windows
    recurrent_bytes: int  # of states
    archive_token_bytes: int = 0  # of one token in the archive of a sequence; archives come on top of all this
    n_archive: int = 0  # tokens that the archive of a sequence holds

    @property
    def kv_bytes(self) -> int:
        """Bytes of all of them, archives left out."""
        return self.window_bytes + self.constant_bytes

    @property
    def constant_bytes(self) -> int:
        """Bytes that do not depend on n_local."""
        return self.sink_bytes + self.sliding_bytes + self.recurrent_bytes

    @property
    def n_kinds(self) -> int:
        """Kinds of layers with a memory."""
        return sum(n > 0 for n in (self.n_layer_full, self.n_layer_sliding, self.n_layer_recurrent))


@dataclass(frozen=True)
class StreamInfo:
    """The position of a stream and the contents of its cache, in tokens, cells (one for each token) and bytes."""

    position: int  # tokens processed since the start of the stream, without limit
    evicted: int  # tokens that no query can attend to any more
    skipped: int  # tokens that were never processed: prefill "tail"
    sink_cells: int  # first tokens kept
    window_cells: int  # cells in use in the window, slack included
    kv_bytes: int  # bytes of all that the model remembers a stream by: parts.kv_bytes
    rebases: int  # times the positions in the graph were moved back
    max_graph_position: int  # largest position ever used in the graph
    checkpoint_bytes: int  # bytes of the automatic checkpoints
    attention: Attention | None  # "fused" or "stock"; None: there is none, the model is purely recurrent
    parts: Parts
    archived: int = 0  # tokens that can be recalled once they have left the window
    forgotten: int = 0  # tokens processed that cannot: dropped from a full archive, or lost with a state without one
    archive_bytes: int = 0  # bytes of memory of the archive that these are recalled from; in files come on top


def resolve(config: LMInfConfig, n_ctx: int | None, n_ctx_train: int, n_most: int = MAX_WINDOW) -> Window:
    """Resolves what `config` omits.

    n_ctx is the attention window n_global + n_local (0: the training length), n_ctx_train the model's training length;
    n_most the most n_local by default; all in tokens. Raises ValueError if they contradict each other.
    """
    if n_ctx is not None:
        _check("n_ctx", n_ctx, 0)
    if config.n_local is not None:
        n_local = config.n_local
        if n_ctx is not None and n_ctx != config.n_global + n_local:
            raise UserError(
                f"n_ctx={n_ctx} is not n_global + n_local = {config.n_global} + {n_local}: "
                "give only one of n_ctx and n_local."
            )
    else:
        size = min(DEFAULT_WINDOW, n_ctx_train) if n_ctx is None else n_ctx or n_ctx_train
        n_local = min(size - config.n_global, n_most if n_ctx is None else size)
        if n_ctx is None and n_most < 1:
            raise UserError(
                f"n_global={config.n_global} and n_recall={config.n_recall} leave no room for a window among the "
                "tokens that this model selects: choose smaller ones."
            )
        if n_local < 1:
            raise UserError(
                f"An attention window of {size} tokens leaves no room beside n_global={config.n_global}: "
                "give a larger n_ctx or a smaller n_global."
            )
    max_distance = n_local if config.max_distance is None else config.max_distance
    window = Window(
        n_global=config.n_global,
        n_local=n_local,
        max_distance=max_distance,
        n_slack=DEFAULT_SLACK if config.n_slack is None else config.n_slack,
        sink_mode=config.sink_mode,
        pos_bound=config.pos_bound,
        attention=config.attention,
        **{
            **config.recall_settings(),
            "recall_distance": config.recall_distance or max(1, max_distance // 2),
            "n_archive": config.n_archive or 0,
        },
        archive_bytes=config.archive_memory if config.archive_memory is not None else (physical_memory() or 0) // 2,
        archive_disk=0 if config.archive == IN_MEMORY else config.archive_disk,
    )
    return window


def warn_of_window(window: Window, n_ctx_train: int, n_swa: int, parameter: str = "n_local") -> None:
    """Warns of a window that is longer than what the model was trained on, or shorter than its sliding windows.

    n_swa is the window of layers that have one of their own, 0 if there are none, `parameter` what set the window.
    """
    if window.size > n_ctx_train:
        warnings.warn(
            f"The attention window of {window.size} tokens is longer than the {n_ctx_train} this model was trained on: "
            f"expect worse text than with a smaller {parameter}.",
            stacklevel=3,
        )
    if window.size < n_swa:
        warnings.warn(
            f"The attention window of {window.size} tokens is shorter than the sliding window of {n_swa} that other "
            f"layers of this model have: expect worse text than with a larger {parameter}.",
            stacklevel=3,
        )


def check_kv_type(name: str, value: int | None) -> int:
    """The GGML type number of a cache, f16 for None. Raises ValueError for a type no cache can have."""
    if value is None:
        return KV_TYPE_DEFAULT
    if not hasattr(value, "__index__") or (value := operator.index(value)) not in KV_TYPES:
        known = ", ".join(f"{number} ({kind})" for number, (kind, _, _) in KV_TYPES.items())
        raise UserError(f"{name}={value} is not a GGML type for a KV cache: use one of {known}.")
    return value


def is_quantized(kv_type: int) -> bool:
    """Whether a cache of this GGML type is quantized."""
    return KV_TYPES[kv_type][2] > 1


def check_memory(n_bytes: int, what: str = "KV cache", parameters: str = "n_ctx or n_local") -> None:
    """Raises MemoryError if a cache, or `what`, of this size cannot fit in this machine's memory."""
    total = physical_memory()
    if total is not None and n_bytes > total:
        raise MemoryError(
            f"The {what} would take {n_bytes:,} bytes and this machine has {total:,} bytes of memory: "
            f"give a smaller {parameters}."
        )


def physical_memory() -> int | None:
    """Bytes of memory in this machine, None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def whole_number(name: str, value: Any, least: int, most: int = MAX_WINDOW) -> int:
    """The value of a parameter as an int. Raises ValueError, with the name, for other types and out of range."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{name} must be a whole number, not {value!r}.")
    number = operator.index(value)
    if not least <= number <= most:
        raise UserError(f"{name} must be {least} to {most}, not {number}.")
    return number


def _check(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} must be a whole number, not {value!r}.")
    if value < least:
        raise UserError(f"{name} must be {least} or more, not {value}.")
    if value > MAX_WINDOW:
        raise UserError(f"{name} must be {MAX_WINDOW} or less, not {value}.")
