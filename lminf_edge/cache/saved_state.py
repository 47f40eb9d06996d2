"""What `Llama.save_state` returns where streams recall: llama_cpp's state, and beside it what it can recall."""

from __future__ import annotations

from typing import Any

import llama_cpp

from lminf_edge.cache.archive import Archive


class SavedState(llama_cpp.LlamaState):
    """Shares the segments of its archive with the stream, as a checkpoint does. Pickled, it is llama_cpp's alone."""

    def __init__(self, archive: Archive, **fields: Any) -> None:
        super().__init__(**fields)
        self.archive: Archive | None = archive  # None: it gave that up where memory was short

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("input_ids", "scores", "n_tokens", "llama_state", "llama_state_size", "seed")
        return llama_cpp.LlamaState, tuple(getattr(self, name) for name in names)


def why_nothing_is_recalled(state: llama_cpp.LlamaState, types: tuple[int, int]) -> str | None:
    """Of a state that was loaded into a stream with archives of these types; None: it never held anything."""
    if not isinstance(state, SavedState):
        return "only in the process that saved it, and not as a copy, a state has its archive"
    if state.archive is None:
        return "its archive gave way to that of a stream, as archive_memory is used up"
    if not state.archive.ranges:
        return None
    if state.archive.types != types:
        return "its archive has other types than this stream's"
    return "archive_memory has no room for a copy of its archive"
