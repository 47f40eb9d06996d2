#!/usr/bin/env python3
"""Installs the wheel in dist/ where there is no compiler, cmake or git, and runs it; then on emulated processors.

    test_wheel.py [--require] [NAME]...

    root        in a fresh environment whose PATH has nothing else: doctor, demo, a chat with smollm2, a server
    variants    the operation against float64, in each variant that this processor can run
    x86         under qemu, on four processors: the variant that is taken, the operation, ten tokens of nano
    arm         the same on three Arm processors, with a wheel that clang 19 builds for them and Debian's Python

What cannot run here is skipped and says so; with --require that is a failure. It runs after make wheel, whose build
folder it uses; the wheel for Arm it makes itself. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv" / "bin"
BIN = ROOT / "build" / "wheel" / "bin"
IS_X86_LINUX = platform.machine() == "x86_64" and sys.platform == "linux"

# processor of qemu, and the variant: qemu emulates no AVX-512
X86 = {"Nehalem": "sse42", "Haswell": "haswell", "Skylake-Server": "haswell", "max": "haswell"}
ARM = {"cortex-a53": "armv8.0_1", "neoverse-n1": "armv8.2_2", "max": "armv9.2_2"}
ARM_OPTIONS = (
    "CMAKE_SYSTEM_NAME=Linux",
    "CMAKE_SYSTEM_PROCESSOR=aarch64",
    "CMAKE_C_COMPILER=clang-19",
    "CMAKE_CXX_COMPILER=clang++-19",
    "CMAKE_C_COMPILER_TARGET=aarch64-linux-gnu",
    "CMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu",
    "GGML_OPENMP=OFF",  # clang's library for it is not at hand for Arm
)


class Skipped(Exception):
    """Why a test cannot run here, in one sentence."""


class Failed(Exception):
    """What failed, in one sentence."""


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a command prints; its errors are in front of it. The last line is never one of theirs."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"} if env is None else dict(env),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        print((result.stderr + result.stdout)[-3000:])
        raise Failed(f"{Path(command[0]).name} ended with status {result.returncode}")
    return result.stderr + result.stdout


def last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2]


def wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise Skipped("dist/ has no wheel: make wheel")
    return wheels[-1]


class Install:
    """The wheel, installed in an environment of its own. PATH has nothing but what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.env = {"PATH": str(self.bin), "HOME": str(folder), "OMP_WAIT_POLICY": "passive"}
        # how the package index is reached
        self.env |= {
            name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "http", "SSL"))
        }
        run(sys.executable, "-m", "venv", folder / "venv")
        options = ["--quiet", "--only-binary", ":all:", "--disable-pip-version-check"]
        self.run("pip", "install", *options, str(wheel()))

    def run(self, program: str, *arguments: str) -> str:
        return run(self.bin / program, *arguments, env=self.env, cwd=self.folder)


def test_root() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        install = Install(Path(folder))
        for tool in ("c++", "cc", "gcc", "clang", "cmake", "ninja", "git", "make"):
            if shutil.which(tool, path=install.env["PATH"]):
                raise Failed(f"{tool} is there: this proves nothing")
        installed = time.monotonic()
        install.run("lminf-edge", "get", "smollm2")
        downloaded = time.monotonic()
        chat = ("chat", "-m", "smollm2", "-p", "Hello!", "-n", "20", "--json")
        answer = json.loads(last_line(install.run("lminf-edge", *chat)))
        print(f"smollm2: {answer['text']!r}")
        seconds = time.monotonic() - downloaded + installed - started
        print(
            f"from the wheel to an answer of 20 tokens: {seconds:.0f} s, and {downloaded - installed:.0f} s of download"
        )
        report = json.loads(last_line(install.run("lminf-edge", "doctor", "--json")))
        print(next(check["found"] for check in report["checks"] if check["name"] == "CPU variant"))
        if not report["ok"]:
            raise Failed("doctor finds something wrong")
        demo = install.run("lminf-edge", "demo", "--tokens", "2048", "--stock-tokens", "1024")
        if "It does not remember the middle" not in demo:
            raise Failed("demo does not come to its end")
        _serve(install)


def _serve(install: Install) -> None:
    command = [str(install.bin / "lminf-edge"), "serve", "-m", "nano", "--port", "0", "--json"]
    with subprocess.Popen(command, env=install.env, cwd=install.folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            body = json.dumps({"prompt": "The night was", "max_tokens": 10}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                text = json.load(response)["choices"][0]["text"]
        finally:
            server.terminate()
    print(f"serve: {text!r}")
    if not text:
        raise Failed("the server does not answer")


def build_operation_test(folder: str) -> Path:
    """In the build folder of a wheel."""
    where = ROOT / "build" / folder
    run("cmake", "-S", ROOT, "-B", where, "-G", "Ninja", "-DLMINF_TESTS=ON", "-DLMINF_PORTABLE=ON")
    run("cmake", "--build", where, "--target", "test-attn", "--parallel", "2")
    return where / "bin"


def test_variants() -> None:
    """As the wheel was built: the same folder."""
    if not IS_X86_LINUX:
        raise Skipped("this is no x86-64 Linux")
    build_operation_test("wheel")
    able = 0
    for path in sorted(BIN.glob("libggml-cpu-*.so")):
        name = path.stem.removeprefix("libggml-cpu-")
        result = subprocess.run(
            [BIN / "test-attn", "--load", path, "--percent", "10"], capture_output=True, text=True, check=False
        )
        if "is not supported on this system" in result.stderr:
            print(f"{name}: not for this processor")
            continue
        if result.returncode or " 0 failed" not in result.stdout:
            print(result.stdout[-2000:], result.stderr[-2000:])
            raise Failed(f"the operation in the variant {name}")
        print(f"{name}: {result.stdout.strip().splitlines()[-1]}")
        able += 1
    if not able:
        raise Failed("no variant runs on this processor")


def emulator(name: str) -> str:
    found = shutil.which(name) or shutil.which(f"{name}-static")
    if not found:
        raise Skipped(f"{name} is not installed (Debian: qemu-user-static)")
    return found


def run_operation(programs: Path, variant: str, *emulated: str | Path) -> None:
    """The operation on the variant that the loader takes."""
    output = run(*emulated, programs / "test-attn", "--load", programs, "--percent", "2", "--threads", "1")
    if f"libggml-cpu-{variant}.so" not in output:
        print(output)
        raise Failed(f"another variant than {variant} was taken")
    print(f"  {variant}: {last_line(output)}", flush=True)


def run_nano(python: Sequence[str | Path], variant: str, env: Mapping[str, str], folder: Path) -> None:
    """Ten tokens in Python, on the variant that the package takes."""
    script = (
        "import llama_cpp\nfrom lminf_edge import backends, native\nnative.load()\n"
        "print(backends.taken(llama_cpp.llama_cpp._lib, native.library_folder()).stem)"
    )
    taken = last_line(run(*python, "-c", f"import lminf_edge\n{script}", env=env, cwd=folder))
    if taken != f"libggml-cpu-{variant}":
        raise Failed(f"the wheel takes {taken}, not {variant}")
    generate = ("generate", "-m", "nano", "-p", "The night was", "-n", "10", "--threads", "1", "--json")
    output = run(*python, "-m", "lminf_edge", *generate, env=env, cwd=folder)
    print(f"  {taken}: {json.loads(last_line(output))['text']!r}", flush=True)


def test_x86() -> None:
    if not IS_X86_LINUX:
        raise Skipped("this is no x86-64 Linux")
    qemu = emulator("qemu-x86_64")
    programs = build_operation_test("wheel")
    with tempfile.TemporaryDirectory() as folder:
        install = Install(Path(folder))
        for cpu, variant in X86.items():
            print(cpu, flush=True)
            emulated = (qemu, "-cpu", cpu)
            run_operation(programs, variant, *emulated)
            run_nano((*emulated, install.bin / "python"), variant, install.env, install.folder)


def arm_python() -> Path:
    """Debian's Python for Arm, unpacked in build/debian-arm64; what is installed here is not touched."""
    root = ROOT / "build" / "debian-arm64"
    found = sorted(root.glob("usr/bin/python3.*"))
    if found:
        return found[0]
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Skipped("apt-get and dpkg-deb are not here, and the Python for Arm comes from Debian's packages")
    root.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        apt = ["apt-get", "--quiet", "--yes", "--no-install-recommends"]
        for name, value in {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "Dir::State": f"{folder}/state",
            "Dir::State::status": "/dev/null",  # nothing is installed: all that is needed is downloaded
            "Dir::Cache": f"{folder}/cache",
            "Debug::NoLocking": "true",
            "pkgCacheGen::Essential": "none",  # nor what every system must have
        }.items():
            apt += ["--option", f"{name}={value}"]
        for part in ("state/lists/partial", "cache/archives/partial"):
            Path(folder, part).mkdir(parents=True)
        try:
            run(*apt, "update")
            run(*apt, "install", "--download-only", "python3-minimal", "libpython3-stdlib", "libstdc++6")
        except Failed:
            raise Skipped("apt-get finds no packages for arm64 (Debian has them in the same archive)") from None
        unpacked = Path(folder, "root")
        for package in sorted(Path(folder).glob("cache/archives/*.deb")):
            run("dpkg-deb", "--extract", package, unpacked)
        if not (unpacked / "lib").exists():  # a link, of a package that nothing here needs
            (unpacked / "lib").symlink_to("usr/lib")
        unpacked.rename(root)
    return arm_python()


def test_arm() -> None:
    if not IS_X86_LINUX:
        raise Skipped("there is no stand-in for an Arm processor here")
    qemu = emulator("qemu-aarch64")
    for program, package in (("clang++-19", "clang-19"), ("aarch64-linux-gnu-ld", "g++-aarch64-linux-gnu")):
        if not shutil.which(program):
            raise Skipped(f"{program} is not installed (Debian: {package})")
    python = arm_python()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, ROOT / "scripts" / "wheel.py", "--into", folder, *ARM_OPTIONS)
        (made,) = Path(folder).glob("*.whl")
        print(made.name, flush=True)
        programs = build_operation_test("wheel-aarch64")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", folder]
        pip += ["--only-binary", ":all:", "--python-version", python.name.removeprefix("python")]
        for minor in range(17, 42):  # of glibc: pip does not know that one runs what is for an older one
            pip += ["--platform", f"manylinux_2_{minor}_aarch64"]
        run(*pip, made)
        env = {"PATH": folder, "HOME": folder, "PYTHONPATH": folder}
        for cpu, variant in ARM.items():
            print(cpu, flush=True)
            emulated = (qemu, "-L", python.parent.parent.parent, "-cpu", cpu)
            run_operation(programs, variant, *emulated)
            run_nano((*emulated, python), variant, env, Path(folder))


TESTS: dict[str, Callable[[], None]] = {
    "root": test_root,
    "variants": test_variants,
    "x86": test_x86,
    "arm": test_arm,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[*TESTS, []], help="default: all of them")
    parser.add_argument("--require", action="store_true", help="what cannot run here is a failure")
    args = parser.parse_args()
    failed = False
    for name in args.names or TESTS:
        print(f"--- {name}", flush=True)
        started = time.monotonic()
        try:
            TESTS[name]()
            print(f"{name}: passed in {time.monotonic() - started:.0f} s", flush=True)
        except Skipped as why:
            print(f"{name}: NOT RUN: {why}")
            failed = failed or args.require
        except Failed as why:
            print(f"{name}: FAILED: {why}")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
