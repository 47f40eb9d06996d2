#!/usr/bin/env python3
"""The pinned upstream and the patches on top of it.

    upstream.py fetch      download the pinned sdist, unpack its llama.cpp and its Python half, apply patches/
                           (CMake calls this)
                           with --stock: the same without patches, to compare with
    upstream.py worktree   make a git work tree of the pin, one commit per patch, to edit the patches in
    upstream.py export     regenerate patches/ from that work tree                            (make patches)
    upstream.py check      say which patches apply to another llama.cpp, --tree DIR, which is left as it is

The pin is the one line of patches/upstream.txt, a pip requirement with its hash: pip downloads and verifies it, with
whatever index, proxy or mirror the user has told pip about. Standard library only.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
PIN = PATCHES / "upstream.txt"

# what libllama, ggml and the chat library are built from, and upstream's tests with what those of its chat library
# read; the rest of the 170 MB is models, tools and documentation
SERVER = tuple(f"tools/server/server-{name}" for name in ("chat.cpp", "chat.h", "common.cpp", "common.h", "http.h"))
TESTS = ("tests", "models/templates", *SERVER, "tools/mtmd/mtmd.h", "tools/mtmd/mtmd-helper.h")
BUILD_PARTS = ("CMakeLists.txt", "LICENSE", "licenses", "cmake", "common", "ggml", "include", "src", *TESTS, "vendor")
# llama-cpp-python itself, of which our package brings a copy
PYTHON_PARTS = ("LICENSE.md", "llama_cpp")


class UpstreamError(Exception):
    """One sentence for the user."""


def pin() -> tuple[str, str]:
    """The requirement ("name==version") and the sha256 that patches/upstream.txt names."""
    match = re.fullmatch(r"(\S+==\S+) --hash=sha256:([0-9a-f]{64})", PIN.read_text().strip())
    if not match:
        raise UpstreamError("patches/upstream.txt must be one line, NAME==VERSION --hash=sha256:HASH.")
    return match[1], match[2]


def patch_files() -> list[Path]:
    return sorted(PATCHES.glob("*.patch"))


def series_stamp(patches: Sequence[Path]) -> str:
    """Changes whenever the pin, a patch or the list of unpacked parts does."""
    digest = hashlib.sha256(repr((pin(), BUILD_PARTS, PYTHON_PARTS)).encode())
    for patch in patches:
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes())
    return digest.hexdigest()


def download(dest: Path) -> Path:
    """The pinned sdist in `dest`, downloaded and verified by pip unless it is there already."""
    requirement, sha256 = pin()
    for sdist in dest.glob("*.tar.gz"):
        if hashlib.sha256(sdist.read_bytes()).hexdigest() == sha256:
            return sdist
        sdist.unlink()
    print(f"downloading {requirement}", flush=True)
    name = requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
    command += ["--dest", str(dest), "--requirement", str(PIN)]
    if importlib.util.find_spec("scikit_build_core"):
        command += ["--no-build-isolation"]  # pip asks the sdist for its metadata: no second tool chain for that
    # the Python half only; llama.cpp itself is built by our CMakeLists.txt
    env = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise UpstreamError(pip_failure(requirement, result.stderr))
    return next(dest.glob("*.tar.gz"))


def pip_failure(requirement: str, stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"The {requirement} that the package index serves does not have the sha256 in patches/upstream.txt: "
            "do not use it; check the index, or the hash if you changed the version."
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")] or stderr.strip().splitlines()
    why = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
    return f"Could not download {requirement} from the package index ({why}): check the network and pip's settings."


def unpack(
    sdist: Path, dest: Path, parts: Sequence[str] | None, folder: Sequence[str] = ("vendor", "llama.cpp")
) -> None:
    """A folder of the sdist into `dest`: the named files and folders, or everything."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = member.name.split("/")[1:]
            if not member.isfile() or path[: len(folder)] != [*folder] or path[len(folder)] == ".git":
                continue
            path = path[len(folder) :]
            if parts is not None and not any("/".join(path[:n]) in parts for n in range(1, len(path) + 1)):
                continue
            target = dest.joinpath(*path)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            target.chmod(member.mode & 0o755 | 0o600)


def git(tree: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs git in `tree`, blind to any repository around it (the build folder lies in this project's own)."""
    if not shutil.which("git"):
        raise UpstreamError("git is needed to apply the patches to llama.cpp: install it and try again.")
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(["git", *args], cwd=tree, env=env, capture_output=True, text=True)


def git_checked(tree: Path, *args: str) -> str:
    result = git(tree, *args)
    if result.returncode:
        raise UpstreamError(f"git {args[0]} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def apply_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Applies the series in order, without fuzz; what is in `tree` already is left alone."""
    for patch in patches:
        if git(tree, "apply", "--reverse", "--check", str(patch)).returncode == 0:
            continue
        result = git(tree, "apply", "--whitespace=nowarn", str(patch))
        if result.returncode:
            reason = result.stderr.strip().splitlines()[0]
            raise UpstreamError(f"{patch.name} does not apply to {pin()[0]}: {reason}.")


def touched_files(patch: Path) -> list[str]:
    """The files of llama.cpp that a patch changes."""
    return re.findall(r"^--- a/(.+)$", patch.read_text(encoding="utf-8"), re.M)


def check(tree: Path) -> bool:
    """Prints what of the series applies to `tree`, without fuzz; whether all of it does.

    What a patch that does not apply leaves out is missing for those after it, which may fail for that reason.
    """
    if not (tree / "src" / "llama.h").exists() and not (tree / "include" / "llama.h").exists():
        raise UpstreamError(f"{tree} is no source tree of llama.cpp: give one with --tree.")
    patches, n_failed = patch_files(), 0
    with tempfile.TemporaryDirectory(prefix="lminf-check-") as folder:
        copy = Path(folder)
        for name in sorted({name for patch in patches for name in touched_files(patch)}):
            if (tree / name).exists():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tree / name, copy / name)
        for patch in patches:
            result = git(copy, "apply", "--reject", "--whitespace=nowarn", str(patch))
            fails = result.returncode != 0
            print(f"{'FAIL' if fails else 'ok  '}  {patch.name}")
            for line in result.stderr.splitlines() if fails else ():
                if line.startswith("error: ") and not line.endswith("searching for:"):
                    print(f"      {line.removeprefix('error: ')}")
            n_failed += fails
    print(f"{len(patches) - n_failed} of {len(patches)} patches apply to {tree}")
    return n_failed == 0


def mirror(source: Path, dest: Path) -> None:
    """Makes `dest` equal to `source`, touching only files that differ, so that ninja rebuilds only those."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    present = {path.relative_to(dest) for path in dest.rglob("*") if path.is_file()} if dest.exists() else set()
    for path in present - wanted:
        (dest / path).unlink()
    for path in wanted:
        if path not in present or not filecmp.cmp(source / path, dest / path, shallow=False):
            (dest / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).replace(dest / path)
            os.utime(dest / path)


def fetch(dest: Path, stock: bool) -> None:
    """Leaves dest/llama.cpp patched and dest/python, or dest/stock as it is, beside the sdist they came from."""
    dest.mkdir(parents=True, exist_ok=True)
    name, patches = ("stock", []) if stock else ("llama.cpp", patch_files())
    stamp = dest / f"{name}.stamp"
    wanted = series_stamp(patches)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    sdist = download(dest)
    with tempfile.TemporaryDirectory(dir=dest, prefix="unpack-") as fresh:
        tree = Path(fresh) / "llama.cpp"
        unpack(sdist, tree, BUILD_PARTS)
        apply_patches(tree, patches)
        stamp.unlink(missing_ok=True)
        mirror(tree, dest / name)
        if not stock:
            unpack(sdist, Path(fresh) / "python", PYTHON_PARTS, folder=())
            mirror(Path(fresh) / "python", dest / "python")
    stamp.write_text(wanted)
    print(f"llama.cpp of {pin()[0]} with {len(patches)} patches is in {dest / name}", flush=True)


IDENTITY = ("-c", "user.name=lminf-edge", "-c", "user.email=lminf-edge@localhost", "-c", "commit.gpgsign=false")


def worktree(dest: Path, tree: Path) -> None:
    """The whole of llama.cpp in `tree`, as a git repository to edit the patches in."""
    if tree.exists():
        raise UpstreamError(f"{tree} exists already: edit it, or delete it to start again from patches/.")
    dest.mkdir(parents=True, exist_ok=True)
    unpack(download(dest), tree, None)
    commit_series(tree)
    print(f"{tree}: edit and commit there (one commit per patch), then run: make patches")


def commit_series(tree: Path) -> None:
    """Makes `tree` a git repository: what is there, with the tag "upstream", then one commit per patch."""
    git_checked(tree, "init", "--quiet")
    git_checked(tree, "add", "--all", "--force")
    git_checked(tree, *IDENTITY, "commit", "--quiet", "--message", pin()[0])
    git_checked(tree, "tag", "upstream")
    git_checked(tree, *IDENTITY, "am", "--quiet", *map(str, patch_files()))


def export(tree: Path) -> None:
    """Rewrites patches/*.patch from the commits after the tag "upstream" of `tree`."""
    if not (tree / ".git").exists():
        raise UpstreamError(f"{tree} is not a work tree: make one with scripts/upstream.py worktree.")
    if git_checked(tree, "status", "--porcelain", "--untracked-files=no").strip():
        raise UpstreamError(f"{tree} has changes that are not committed: commit them (one commit per patch) first.")
    for patch in patch_files():
        patch.unlink()
    # no commit ids, no git version, no counts: a patch file changes only when its content does
    quiet = ("--zero-commit", "--no-signature", "--no-numbered", "--no-stat", "--abbrev=10")
    git_checked(tree, "format-patch", *quiet, "--output-directory", str(PATCHES), "upstream..HEAD")
    print(f"wrote {len(patch_files())} patches")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["fetch", "worktree", "export", "check"])
    parser.add_argument("--dest", type=Path, default=ROOT / "build" / "upstream", help="where the sdist is unpacked")
    parser.add_argument("--stock", action="store_true", help="fetch it without the patches")
    parser.add_argument(
        "--tree", type=Path, default=ROOT / "build" / "worktree", help="the git work tree; of check: any source tree"
    )
    args = parser.parse_args()
    try:
        if args.command == "fetch":
            fetch(args.dest, args.stock)
        elif args.command == "worktree":
            worktree(args.dest, args.tree)
        elif args.command == "check":
            return 0 if check(args.tree) else 1
        else:
            export(args.tree)
    except UpstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
