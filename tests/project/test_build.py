"""The pin, the patches and the scripts around them: nothing drifts, and what is wrong is said in one sentence."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from repository import ROOT, script

import lminf_edge
from lminf_edge import native, startup

release = script("release")
upstream = script("upstream")
setup = script("setup")


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The pinned sdist, which `make setup` has left in build/upstream."""
    found = list((ROOT / "build" / "upstream").glob("*.tar.gz"))
    if not found:
        pytest.skip("build/upstream has no sdist: make setup")
    return found[0]


@pytest.fixture(scope="session")
def pristine(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp as its authors made it. Tests that change it put it back."""
    tree = tmp_path_factory.mktemp("upstream") / "llama.cpp"
    upstream.unpack(sdist, tree, ("src", "ggml", "include", "common"))
    return tree


# --- the pin ----------------------------------------------------------------------------------------------------------


def test_the_pin_is_one_line() -> None:
    assert len(upstream.PIN.read_text().splitlines()) == 1
    assert len(upstream.pin()[1]) == 64


def test_our_copy_of_llama_cpp_is_the_pinned_one(sdist: Path) -> None:
    """The structs of its Python half fit the library; what it needs is installed with ours."""
    copy = startup.copy_of_llama_cpp()
    assert copy is not None
    installed = {path.relative_to(copy).as_posix(): path.read_bytes() for path in Path(copy).rglob("*.py")}
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}

        def read(name: str) -> bytes:
            file = archive.extractfile(members[name])
            assert file is not None
            return file.read()

        prefix = "llama_cpp/"
        assert installed == {
            name.removeprefix(prefix): read(name)
            for name in members
            if name.startswith(prefix) and name.endswith(".py")
        }
        needs = re.search(r"^dependencies = \[(.*?)\]", read("pyproject.toml").decode(), re.MULTILINE | re.DOTALL)
    assert needs is not None
    ours = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'"([\w-]+)', needs[1])
    assert len(names) == 4
    assert [name for name in names if f'"{name}>=' not in ours] == []


def test_the_pinned_bytes_are_those_that_were_built(sdist: Path) -> None:
    assert hashlib.sha256(sdist.read_bytes()).hexdigest() == upstream.pin()[1]


# --- releases ---------------------------------------------------------------------------------------------------------


def test_a_release_needs_a_tag_that_fits_and_a_section_of_the_changelog() -> None:
    release.check("v1.2.0", "1.2.0")
    with pytest.raises(release.ReleaseError, match=r"The tag v1\.3 is not v1\.2\.0"):
        release.check("v1.3", "1.2.0")
    changelog = "# Changelog\n\n## Unreleased\n\n- a\n\n## 1.2.0 - 2026-12-01\n\n### Added\n\n- b\n\n## 1.1.0\n"
    assert release.notes(changelog, "1.2.0") == "### Added\n\n- b"
    for number in ("1.1.0", "1.2", "2.0"):
        with pytest.raises(release.ReleaseError, match=f"says nothing of {number}"):
            release.notes(changelog, number)


def test_the_version_is_in_one_place() -> None:
    assert release.version() == lminf_edge.__version__
    assert importlib.metadata.version("lminf-edge") == lminf_edge.__version__
    files = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", ROOT / "CITATION.cff", *ROOT.glob("scripts/*.py")]
    assert [path.name for path in files if f'"{lminf_edge.__version__}"' in path.read_text()] == []


# --- the patches ------------------------------------------------------------------------------------------------------


def test_patches_apply_without_fuzz_or_offset_and_only_once(pristine: Path) -> None:
    patches = upstream.patch_files()
    assert patches
    for patch in patches:
        applied = upstream.git(pristine, "apply", "--verbose", str(patch))
        assert applied.returncode == 0, applied.stderr
        assert "offset" not in applied.stderr
    after = tree_digest(pristine)
    upstream.apply_patches(pristine, patches)
    assert tree_digest(pristine) == after
    for patch in reversed(patches):
        upstream.git_checked(pristine, "apply", "--reverse", str(patch))


def test_patches_say_why_they_are_there() -> None:
    for patch in upstream.patch_files():
        header = patch.read_text().split("\ndiff --git", 1)[0]
        assert re.search(r"^Retired by: ", header, re.MULTILINE), patch.name
        assert re.search(r"^Forwarded: ", header, re.MULTILINE), patch.name


def test_patches_are_named_in_their_readme() -> None:
    readme = (ROOT / "patches" / "README.md").read_text()
    for patch in upstream.patch_files():
        assert f"`{patch.name[:4]}`" in readme
        for path in re.findall(r"^\+\+\+ b/.*/(.*)$", patch.read_text(), re.MULTILINE):
            assert f"`{path}`" in readme, f"{patch.name} touches {path}"


def test_a_patch_that_does_not_fit_is_named(pristine: Path, tmp_path: Path) -> None:
    patch = tmp_path / "0001-wrong.patch"
    patch.write_text("--- a/src/llama.cpp\n+++ b/src/llama.cpp\n@@ -1,2 +1,2 @@\n-not there\n+nor this\n context\n")
    before = tree_digest(pristine)
    with pytest.raises(upstream.UpstreamError, match=r"^0001-wrong\.patch does not apply to llama-cpp-python==.*\.$"):
        upstream.apply_patches(pristine, [patch])
    assert tree_digest(pristine) == before


def test_whether_the_patches_apply_to_another_tree(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree_digest(pristine)
    assert upstream.check(pristine)
    assert "FAIL" not in capsys.readouterr().out
    assert tree_digest(pristine) == before

    for name in {name for patch in upstream.patch_files() for name in upstream.touched_files(patch)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((pristine / name).read_bytes())
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "llama.h").touch()
    (tmp_path / "ggml/src/ggml-cuda/ggml-cuda.cu").write_text("rewritten\n")
    assert not upstream.check(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert [re.sub(r"FAIL  (\d+).*", r"\1", line) for line in failed] == ["0006"]
    assert any(line.strip().startswith("patch failed: ggml/src/ggml-cuda/ggml-cuda.cu:") for line in lines)
    assert lines[-1].startswith(f"{len(upstream.patch_files()) - 1} of {len(upstream.patch_files())} patches apply")

    with pytest.raises(upstream.UpstreamError, match=r"is no source tree of llama\.cpp"):
        upstream.check(tmp_path / "src")


def test_patches_are_small() -> None:
    """At most 200 added lines, blank ones among them: whatever needs more belongs into native/."""
    added = [
        line
        for patch in upstream.patch_files()
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+") and not line.startswith("+++ b/")
    ]
    assert 100 < len(added) <= 200


def test_patches_survive_the_way_through_a_work_tree(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make worktree` and `make patches` do gives back the same files."""
    tree, exported = tmp_path / "tree", tmp_path / "patches"
    exported.mkdir()
    # only the files that the patches touch, for speed
    for patch in upstream.patch_files():
        for path in upstream.touched_files(patch):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes((pristine / path).read_bytes())
    upstream.commit_series(tree)
    monkeypatch.setattr(upstream, "PATCHES", exported)
    upstream.export(tree)
    assert {path.name for path in exported.iterdir()} == {path.name for path in (ROOT / "patches").glob("*.patch")}
    for path in exported.iterdir():
        assert path.read_text() == (ROOT / "patches" / path.name).read_text()


def test_export_refuses_a_work_tree_with_changes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one\n")
    with pytest.raises(upstream.UpstreamError, match="is not a work tree"):
        upstream.export(tmp_path)
    upstream.git_checked(tmp_path, "init", "--quiet")
    upstream.git_checked(tmp_path, "add", "file")
    with pytest.raises(upstream.UpstreamError, match="not committed"):
        upstream.export(tmp_path)


def tree_digest(tree: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in tree.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_mirror_touches_only_what_differs(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    for folder, files in (
        (source, {"same": "1", "changed": "2", "new/file": "3"}),
        (dest, {"same": "1", "changed": "0", "old": "4"}),
    ):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            os.utime(folder / name, (1000, 1000))
    upstream.mirror(source, dest)
    assert {path.name: path.read_text() for path in dest.rglob("*") if path.is_file()} == {
        "same": "1",
        "changed": "2",
        "file": "3",
    }
    assert (dest / "same").stat().st_mtime == 1000
    assert (dest / "changed").stat().st_mtime > 1000  # newer than what was built of it


def isolate_pip(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", **settings}.items():
        monkeypatch.setenv(name, value)


def test_other_bytes_under_the_pinned_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, version = upstream.pin()[0].split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    index, dest = tmp_path / "index", tmp_path / "dest"
    index.mkdir()
    dest.mkdir()
    with tarfile.open(index / f"{stem}.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(f"{stem}/PKG-INFO")
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    isolate_pip(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index))
    with pytest.raises(upstream.UpstreamError, match="does not have the sha256") as caught:
        upstream.download(dest)
    assert "\n" not in str(caught.value)
    assert not list(dest.iterdir())


def test_an_index_out_of_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_pip(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    with pytest.raises(upstream.UpstreamError, match="check the network and pip's settings") as caught:
        upstream.download(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_machine_without_compiler_or_git_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match=r"^No C\+\+ compiler found"):
        setup.check_machine()
    (tmp_path / "c++").touch(mode=0o755)
    with pytest.raises(setup.SetupError, match=r"^git is needed"):
        setup.check_machine()
    (tmp_path / "git").touch(mode=0o755)
    setup.check_machine()
    monkeypatch.setenv("CXX", "nosuch++ -O2")
    with pytest.raises(setup.SetupError, match=r"nosuch\+\+"):
        setup.check_machine()


# --- what was built ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of Linux libraries")
def test_each_library_is_installed_once_and_without_links() -> None:
    """A wheel holds no links, and finds no library outside of its folder."""
    folder = native.library_folder()
    assert folder is not None
    if folder.name != "lib":
        pytest.skip("LMINF_LIB_PATH is set")
    names = {path.name for path in folder.iterdir()}
    assert {"libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu.so", "LICENSE.llama.cpp"} <= names
    assert not [path.name for path in folder.iterdir() if path.is_symlink() or ".so." in path.name]
    loaded = subprocess.run(["ldd", folder / "libllama.so"], check=True, capture_output=True, text=True).stdout
    assert "not found" not in loaded
    for line in loaded.splitlines():
        if "libggml" in line:
            assert f"=> {folder}/libggml" in line
    assert (folder.parent / "include" / "lminf.h").is_file()
