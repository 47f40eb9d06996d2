"""Makes an engine for a model file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lminf_edge.cache.store import CheckpointStore
from lminf_edge.config import LMInfConfig, Window, resolve
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.scheduler import Scheduler
from lminf_edge.errors import UserError
from lminf_edge.gguf_header import read_header
from lminf_edge.model import Model, training_length
from lminf_edge.models import find_model

N_LEAST = 4  # conversations that the budgets have room for
N_AHEAD = 8  # tokens generated before anyone has taken them: enough for a consumer that is briefly late


def load_engine(
    model: str | os.PathLike[str],
    *,
    parallel: int = 1,
    lminf: LMInfConfig | None = None,
    n_ctx: int | None = None,
    max_sinks: int = 0,
    folder: Path | None = None,
    memory_budget: int = 1 << 30,
    disk_budget: int = 8 << 30,
    background: bool = True,
    **kwargs: Any,
) -> Engine:
    """Loads a model and starts an engine for it. Close both: `engine.close()`, then `engine.model.close()`.

    model          a path, or the name of an embedded model
    parallel       slots: conversations in the context, which can decode at the same time
    lminf, n_ctx   the window, as for Llama
    max_sinks      sinks that a conversation can have, if more than n_global
    folder         where conversations are kept on disk, in a folder for each model; None: nowhere
    memory_budget  bytes for conversations that are not in the context, and for what the others were before
    disk_budget    bytes for their files
    background     with recall and prefill "tail", while there are no requests read what was skipped, in one sequence
                   more than there are slots

    The other arguments are Llama's. Raises UserError, in one sentence, for invalid ones, as Llama does.
    """
    if parallel < 1:
        raise UserError(f"parallel must be 1 or more, not {parallel}.")
    config = lminf or LMInfConfig()
    room = max(max_sinks, config.n_global)
    if room > config.n_global and config.n_local is None:
        # the window stays what it would be without the additional sinks
        config, n_ctx = replace(config, n_local=window_of(model, config, n_ctx, room).n_local), None
    reads_skipped = background and config.n_recall > 0 and config.prefill == "tail"
    loaded = Model.load(model, replace(config, n_global=room), n_ctx, parallel + reads_skipped, **kwargs)
    try:
        place = None if folder is None else Path(os.path.expanduser(folder)) / loaded.identity.folder_name
        # one conversation must not take the place of all others
        n_least = 1 if parallel == 1 and folder is None else N_LEAST
        share = max(memory_budget, 0 if folder is None else disk_budget) // n_least
        archives = loaded.archives(place)
        store = CheckpointStore(loaded.identity, place, memory_budget, disk_budget, share, archives=archives)
        scheduler = Scheduler(
            loaded,
            store,
            n_sinks=config.n_global,
            prefill=config.prefill,
            n_tail=config.n_tail,
            n_ahead=N_AHEAD,
            reads_skipped=reads_skipped,
        )
        return Engine(scheduler)
    except BaseException:
        loaded.close()
        raise


def window_of(model: str | os.PathLike[str], config: LMInfConfig, n_ctx: int | None, room: int) -> Window:
    """The window a model would have with these parameters and room for so many sinks."""
    header = read_header(find_model(model))
    return resolve(config, n_ctx, training_length(header, {}), header.most_local(room, config.n_recall))
