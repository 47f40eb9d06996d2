"""The models that are known by name: those that come with the package, and others, downloaded on first use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lminf_edge.errors import UserError
from lminf_edge.models import hub
from lminf_edge.models.named import NAMED_MODELS, OnProgress, cache_folder, get, is_present

_FOLDER = Path(__file__).parent


def embedded_models() -> dict[str, Path]:
    """Name and path of every model that comes with the package."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.gguf"))}


def path_text(name: str, path: object) -> str:
    """A path given as text, bytes or an os.PathLike, as text, with a leading `~` expanded.

    Raises ValueError, with the parameter's `name`, for anything else.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise UserError(f"{name} must be a path, not {path!r}.")
    text: str = os.fsdecode(path)
    return text if os.path.exists(text) else os.path.expanduser(text)


def find_model(name_or_path: str | bytes | os.PathLike[str]) -> str:
    """The path of a model; a file of that name goes before a model that is known by it.

    A real model is downloaded on first use, as stderr tells. Raises ValueError if there is no such model, or it
    cannot be had.
    """
    path = path_text("model_path", name_or_path)
    if os.path.exists(path):
        return path
    models = embedded_models()
    if path in models:
        return str(models[path])
    if path in NAMED_MODELS:
        return str(download(path))
    raise UserError(
        f"Model path does not exist: {path} (give the path of a GGUF file, many of which are on Hugging Face, "
        f"or the name of a model: {', '.join([*models, *NAMED_MODELS])})."
    )


def download(name: str) -> Path:
    """A real model in the user's cache, and its progress on stderr. Raises UserError if it cannot be had."""
    folder, model = cache_folder(), NAMED_MODELS[name]
    if is_present(name, folder):
        return get(name, folder)
    with _shown(model.about, model.download_bytes) as on_progress:
        return get(name, folder, on_progress)


def download_from_hub(spec: str) -> Path:
    """A file of the Hugging Face hub, user/repo[:quant], likewise."""
    found = hub.find(spec, cache_folder())
    if found.file is None:
        print(f"{found.note} What was downloaded before is used: {found.path.name}", file=sys.stderr, flush=True)
    if found.file is None or hub.is_present(found):
        return found.path
    with _shown(f"{found.path.name} of {found.repo}", found.file.n_bytes) as on_progress:
        return hub.download(found, on_progress)


def path_from_hub(spec: str) -> Path:
    """Where that file is, or will be. Raises UserError if there is none, or nobody can say."""
    return hub.find(spec, cache_folder()).path


@contextlib.contextmanager
def _shown(about: str, total: int) -> Iterator[OnProgress | None]:
    """Says on stderr what is downloaded; on a terminal, what to call with how far that is."""
    megabytes = total // 1_000_000
    print(f"downloading {about}, about {megabytes} MB, once", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        yield None
        return

    def show(done: int, total: int) -> None:
        done = min(done, total)
        bar = "#" * (24 * done // total)
        print(f"\r[{bar:24}] {done // 1_000_000} of {megabytes} MB", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
