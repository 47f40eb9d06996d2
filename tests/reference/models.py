"""All tiny models, by name."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from reference import kinds, more_models, random_model, tiny_models, unsupported_models

# with a Λ cache, beyond those of tiny_models
SERVED = more_models.MODELS | {name: kind.model for name, kind in kinds.KINDS.items()}
REFUSED = {name: refused.model for name, refused in unsupported_models.MODELS.items()}
BY_NAME = SERVED | REFUSED | more_models.CONSTANT


def write(name: str, folder: str | PathLike[str]) -> Path:
    """Write the model to "<folder>/tiny-<name>.gguf"."""
    if name in tiny_models.MODELS:
        return tiny_models.write(name, folder)
    return random_model.write(name, BY_NAME[name], folder)
