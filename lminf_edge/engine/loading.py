"""An engine for a model file."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from lminf_edge.checkpoint import Identity
from lminf_edge.config import LMInfConfig, Window, resolve
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.snapshots import SnapshotStore
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import read_header
from lminf_edge.llama import Llama, training_length
from lminf_edge.models import find_model


def load_engine(
    model: str | os.PathLike[str],
    *,
    parallel: int = 1,
    lminf: LMInfConfig | None = None,
    n_ctx: int | None = None,
    max_sinks: int = 0,
    pin_system: bool = False,
    on_trim: str = "continue",
    folder: Path | None = None,
    memory_budget: int = 1 << 30,
    disk_budget: int = 8 << 30,
    **kwargs: Any,
) -> Engine:
    """
    parallel       conversations in the context, which can answer at the same time
    lminf, n_ctx   the window, as for Llama
    max_sinks      room for so many sinks per conversation, if that is more than n_global
    pin_system     keep each conversation's system block as sinks, up to max_sinks
    on_trim        see Engine
    folder         where conversations are kept on disk, below it a folder for each model; None: nowhere
    memory_budget  bytes for conversations that are not in the context
    disk_budget    bytes for their files

    The other arguments are Llama's. Raises ValueError, in one sentence, for what cannot be, as Llama does.
    """
    if parallel < 1:
        raise UserError(f"parallel must be 1 or more, not {parallel}.")
    config = lminf or LMInfConfig()
    room = max(max_sinks, config.n_global)
    if room > config.n_global and config.n_local is None:
        # the window stays what it would be without room for more sinks
        config, n_ctx = replace(config, n_local=window_of(model, config, n_ctx).n_local), None
    llm = Llama(model, lminf=replace(config, n_global=room), n_ctx=n_ctx, n_seq_max=parallel, **kwargs)
    try:
        place = None if folder is None else folder / folder_name(llm.identity)
        try:
            store = SnapshotStore(llm.identity, place, memory_budget, disk_budget)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"The conversations in {place} cannot be used, perhaps by another server: {error}."
            ) from error
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"The conversations in {place} cannot be used: {error}.") from error
        return Engine(llm, store, n_sinks=config.n_global, pin_system=pin_system, on_trim=on_trim)
    except BaseException:
        llm.close()
        raise


def folder_name(identity: Identity) -> str:
    """Names what states can be exchanged: the number of sinks aside, the model and everything about its cache."""
    return hashlib.sha256(repr(replace(identity, n_global=0)).encode()).hexdigest()[:16]


def window_of(model: str | os.PathLike[str], config: LMInfConfig, n_ctx: int | None) -> Window:
    """The window a model would have with these parameters."""
    return resolve(config, n_ctx, training_length(read_header(find_model(model)), {}))
