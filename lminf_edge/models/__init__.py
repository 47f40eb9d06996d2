"""The models that come with the package, known by name."""

from __future__ import annotations

import os
from pathlib import Path

from lminf_edge.errors import UserError

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
    """The path of a model; a file of that name goes before an embedded model.

    Raises ValueError if it is neither.
    """
    path = path_text("model_path", name_or_path)
    if os.path.exists(path):
        return path
    models = embedded_models()
    if path in models:
        return str(models[path])
    raise UserError(
        f"Model path does not exist: {path} (give the path of a GGUF file, many of which are on Hugging Face, "
        f"or the name of an embedded model: {', '.join(models)})."
    )
