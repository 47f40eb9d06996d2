"""The structures of lminf.h."""

from __future__ import annotations

import ctypes

from lminf_edge.config import (
    ARCHIVE_TYPES,
    ATTENTIONS,
    RECALL_INDEXES,
    RECALL_PARAMETERS,
    RECALL_RULES,
    SINK_MODES,
    Window,
)

_CHOICES: dict[str, tuple[str, ...]] = {
    "sink_mode": SINK_MODES,
    "attention": ATTENTIONS,
    "recall_rule": RECALL_RULES,
    "recall_index": RECALL_INDEXES,
}


class Params(ctypes.Structure):
    """struct lminf_params"""

    _fields_ = (
        ("n_global", ctypes.c_int32),
        ("n_local", ctypes.c_int32),
        ("max_distance", ctypes.c_int32),
        ("n_slack", ctypes.c_int32),
        ("sink_mode", ctypes.c_int32),
        ("pos_bound", ctypes.c_int32),
        ("attention", ctypes.c_int32),
        ("n_seq_max", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in RECALL_PARAMETERS),
        ("archive_bytes", ctypes.c_uint64),
        ("archive_disk", ctypes.c_uint64),
    )
    n_global: int
    n_local: int
    max_distance: int
    n_slack: int
    sink_mode: int
    pos_bound: int
    attention: int
    n_seq_max: int
    n_recall: int
    recall_distance: int
    recall_from: int
    recall_every: int
    recall_rule: int
    recall_index: int
    n_archive: int
    archive_type_k: int
    archive_type_v: int
    archive_bytes: int
    archive_disk: int

    @classmethod
    def of(cls, window: Window, n_seq_max: int) -> Params:
        values = {name: getattr(window, name) for name in cls.__annotations__ if name != "n_seq_max"}
        for name, choices in _CHOICES.items():
            values[name] = choices.index(values[name])
        for name in ("archive_type_k", "archive_type_v"):
            values[name] = ARCHIVE_TYPES[values[name]]
        return cls(n_seq_max=n_seq_max, **values)


class Info(ctypes.Structure):
    """struct lminf_info"""

    _fields_ = (
        ("stream_pos", ctypes.c_int64),
        ("n_evicted", ctypes.c_int64),
        ("n_sink", ctypes.c_int32),
        ("n_global", ctypes.c_int32),
        ("n_window", ctypes.c_int32),
        ("n_cells", ctypes.c_int32),
        ("n_rollback", ctypes.c_int32),
        ("n_rebase", ctypes.c_int32),
        ("max_graph_pos", ctypes.c_int32),
        ("pos_bound", ctypes.c_int32),
        ("kv_bytes", ctypes.c_uint64),
        ("n_archived", ctypes.c_int64),
        ("n_forgotten", ctypes.c_int64),
        ("archive_bytes", ctypes.c_uint64),
        ("n_rebuild", ctypes.c_int64),
    )
    stream_pos: int
    n_evicted: int
    n_sink: int
    n_global: int
    n_window: int
    n_cells: int
    n_rollback: int
    n_rebase: int
    max_graph_pos: int
    pos_bound: int
    kv_bytes: int
    n_archived: int
    n_forgotten: int
    archive_bytes: int
    n_rebuild: int


class NativeParts(ctypes.Structure):
    """struct lminf_parts"""

    _fields_ = (
        ("n_layer_full", ctypes.c_int32),
        ("n_layer_sliding", ctypes.c_int32),
        ("n_layer_recurrent", ctypes.c_int32),
        ("n_layer_fused", ctypes.c_int32),
        ("window_bytes", ctypes.c_uint64),
        ("sink_bytes", ctypes.c_uint64),
        ("sliding_bytes", ctypes.c_uint64),
        ("recurrent_bytes", ctypes.c_uint64),
        ("archive_token_bytes", ctypes.c_uint64),
        ("n_archive", ctypes.c_uint64),
    )


class Segment(ctypes.Structure):
    """struct lminf_segment"""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("first", ctypes.c_int64),
        ("n_tokens", ctypes.c_int64),
        ("n_bytes", ctypes.c_uint64),
    )
    id: int
    first: int
    n_tokens: int
    n_bytes: int
