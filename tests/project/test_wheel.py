"""The check of a wheel, the choice of a CPU variant, and modules that cannot be loaded: without building a wheel."""

from __future__ import annotations

import ctypes
import platform
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from repository import script

from lminf_edge import backends, native
from lminf_edge.errors import UserError

wheel = script("wheel")

TAG = "manylinux_2_28_x86_64"


def elf(n_initializers: int) -> bytes:
    """The part of an ELF file that says what runs when it is loaded."""
    header, section = bytearray(64), bytearray(64)
    header[40:48], header[58:60], header[60:62] = (64).to_bytes(8, "little"), b"\x40\x00", b"\x01\x00"
    section[4:8], section[32:40] = (14).to_bytes(4, "little"), (8 * n_initializers).to_bytes(8, "little")
    return bytes(header + section)


def write_wheel(folder: Path, variants: set[str], n_initializers: int = 1, without: str = "", tag: str = TAG) -> Path:
    path = folder / f"lminf_edge-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in wheel.WANTED:
            if name != without:
                archive.writestr(name, "")
        for name in (*wheel.LIBRARIES, *(f"ggml-cpu-{variant}" for variant in variants)):
            if name != without:
                archive.writestr(f"lminf_edge/lib/lib{name}.so", elf(n_initializers))
    return path


def test_a_whole_wheel(tmp_path: Path) -> None:
    variants = wheel.variants(TAG)
    assert len(variants) == 14
    assert "CPU variants, 14: alderlake" in "\n".join(wheel.check(write_wheel(tmp_path, variants)))


def test_modules_for_gpus_have_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wheel(tmp_path, wheel.variants(TAG))
    monkeypatch.setattr(wheel, "MAX_BYTES", path.stat().st_size + 500)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("lminf_edge/lib/libggml-cuda.so", bytes(100_000))
    assert ", 0.1 modules for GPUs\n" in "\n".join(wheel.check(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("lminf_edge/lib/other.bin", bytes(1000))
    with pytest.raises(wheel.WheelError, match="bytes without models and modules for GPUs, more than"):
        wheel.check(path)


@pytest.mark.parametrize("without", ["haswell", "x64", "lminf_edge/_vendor/LICENSE.llama-cpp-python.md", "ggml-rpc"])
def test_what_is_missing_is_named(tmp_path: Path, without: str) -> None:
    path = write_wheel(tmp_path, wheel.variants(TAG) - {without}, without=without)
    with pytest.raises(wheel.WheelError, match=without):
        wheel.check(path)


def test_an_ignored_option_leaves_one_variant(tmp_path: Path) -> None:
    with pytest.raises(wheel.WheelError, match="other CPU variants than it should have: alderlake, "):
        wheel.check(write_wheel(tmp_path, set()))


def test_code_that_runs_when_a_variant_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(wheel.WheelError, match="alderlake has code that runs when it is loaded"):
        wheel.check(write_wheel(tmp_path, wheel.variants(TAG), n_initializers=2))


def test_the_processor_is_the_options_or_this_one() -> None:
    assert wheel.target(["GGML_CUDA=ON"]) == platform.machine()
    assert wheel.target(["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=riscv64"]) == "riscv64"


def test_a_build_folder_forgets_options_of_before(tmp_path: Path) -> None:
    cache, module, object_file = (tmp_path / name for name in ("CMakeCache.txt", "bin/libggml-cuda.so", "a.o"))
    wheel.forget_other_options(tmp_path, ["GGML_CUDA=ON"])
    module.parent.mkdir()
    for path in (cache, module, object_file):
        path.touch()
    wheel.forget_other_options(tmp_path, ["GGML_CUDA=ON"])
    assert cache.exists()
    assert module.exists()
    wheel.forget_other_options(tmp_path, [])
    assert not cache.exists()
    assert not module.exists()
    assert object_file.exists()  # what is compiled the same way is not compiled again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF files")
def test_initializers_are_counted_in_real_libraries() -> None:
    folder = native.library_folder()
    assert folder is not None
    assert wheel.n_initializers((folder / "libllama.so").read_bytes()) > 1  # tables of names
    assert wheel.n_initializers((folder / "libggml-cpu.so").read_bytes()) == 1


def test_a_variant_where_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import llama_cpp

    monkeypatch.setenv("LMINF_CPU_VARIANT", "haswell")
    with pytest.raises(UserError, match="is built for one CPU and has no variants: unset it"):
        backends.load(llama_cpp.llama_cpp._lib, str(tmp_path))


def test_a_module_without_its_driver_is_told(tmp_path: Path) -> None:
    import llama_cpp

    name = "ggml-cuda.dll" if sys.platform == "win32" else "libggml-cuda.so"
    (tmp_path / name).write_bytes(b"not a library")
    (unused,) = backends.unused(llama_cpp.llama_cpp._lib, tmp_path)
    assert unused.name == "cuda"
    assert unused.reason


@pytest.mark.skipif(sys.platform == "win32", reason="the names of files")
@pytest.mark.parametrize("n_devices", [0, 1])
def test_a_module_without_a_device_is_told(n_devices: int, tmp_path: Path) -> None:
    folder = native.library_folder()
    assert folder is not None
    base = next(folder.glob("libggml-base.*"))
    modules = [ctypes.CDLL(str(shutil.copy(base, tmp_path / f"libggml-{name}.so"))) for name in ("cuda", "rpc")]
    registries = [ctypes.cast(module.ggml_backend_reg_dev_count, ctypes.c_void_p).value for module in modules]
    library = SimpleNamespace(
        ggml_backend_reg_count=lambda: 2,
        ggml_backend_reg_get=lambda i: registries[i],
        ggml_backend_reg_dev_count=lambda registry: n_devices * (registry == registries[0]),
    )
    unused = backends.unused(library, tmp_path)
    assert unused == [backends.Unused("cuda", "it found no device that it can use")][n_devices:]


def test_the_file_whose_code_runs() -> None:
    import llama_cpp

    folder = native.library_folder()
    assert folder is not None
    path = backends.taken(llama_cpp.llama_cpp._lib, folder)
    assert path is not None
    assert path.parent == folder
    assert "ggml-cpu" in path.name
