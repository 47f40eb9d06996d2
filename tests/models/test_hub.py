"""Models of the Hugging Face hub, which is here a server of our own."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeHub
from fake_hub import DATA, REPO

from lminf_edge.cli.main import main
from lminf_edge.errors import UserError
from lminf_edge.files import locked
from lminf_edge.models import embedded_models, hub


def get(folder: Path, spec: str = REPO, seen: list[tuple[int, int]] | None = None) -> Path:
    found = hub.find(spec, folder)
    return hub.download(found, None if seen is None else lambda done, total: seen.append((done, total)))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def nobody() -> str:
    """The address of a port where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# --- what there is ----------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(make_hub: MakeHub, tmp_path: Path) -> None:
    made = make_hub()
    seen: list[tuple[int, int]] = []
    path = get(tmp_path, seen=seen)
    assert path.read_bytes() == DATA
    assert seen == sorted(seen)
    assert seen[-1] == (len(DATA), len(DATA))
    n_asked = len(made.asked)
    assert get(tmp_path) == path
    assert len(made.asked) == n_asked + 1  # the list alone
    assert files(tmp_path) == ["Tiny-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        ("", "b-Q4_K_M.gguf"),
        (":q8_0", "a/b.Q8_0.gguf"),
        (":Q4_K_M", "b-Q4_K_M.gguf"),
        (":IQ4_XS", "b-IQ4_XS.gguf"),
        (":UD-Q4_K_M", "b-UD-Q4_K_M.gguf"),
        (":a/b.Q8_0.gguf", "a/b.Q8_0.gguf"),
    ],
)
def test_a_quantization_is_chosen(make_hub: MakeHub, tmp_path: Path, spec: str, chosen: str) -> None:
    names = [
        "a/b.Q8_0.gguf",
        "b-IQ4_XS.gguf",
        "b-Q4_K_M.gguf",
        "b-Q4_K_S.gguf",
        "b-UD-Q4_K_M.gguf",
        "mmproj-Q4_K_M.gguf",
    ]
    make_hub(files={name: name.encode() for name in names})
    assert get(tmp_path, REPO + spec).read_text() == chosen


def test_without_the_default_quantization_the_first_is_taken() -> None:
    assert hub.choose(REPO, ["mmproj-b.gguf", "b-f16.gguf", "b-Q8_0.gguf"], "") == "b-Q8_0.gguf"


@pytest.mark.parametrize(("wanted", "chosen"), [("", "Q4_K_M/b.gguf"), ("bf16", "BF16/b.gguf")])
def test_a_folder_may_name_the_quantization(wanted: str, chosen: str) -> None:
    assert hub.choose(REPO, ["BF16/b.gguf", "Q4_K_M/b.gguf", "Q8_0/b-00001-of-00002.gguf"], wanted) == chosen


@pytest.mark.parametrize(
    ("paths", "wanted", "said"),
    [
        ([], "", "has no GGUF files"),
        (["mmproj-f16.gguf"], "", "has no GGUF files"),
        (["b-Q8_0.gguf"], "Q4_0", r"has no Q4_0: it has b-Q8_0\.gguf\."),
        (["b-Q4_K_M.gguf"], "Q4_K", "has no Q4_K: "),
        (["Q8_0/b-00001-of-00002.gguf"], "Q8_0", "one of several parts"),
        (["b-Q4_K_M-00001-of-00002.gguf", "b-Q4_K_M-00002-of-00002.gguf"], "", "one of several parts"),
    ],
)
def test_what_there_is_not(paths: list[str], wanted: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hub.choose(REPO, paths, wanted)


@pytest.mark.parametrize(
    "spec", ["", "a", "a/", "/a/b", "../b", "a/..", "a/b/c", "a/b:", "a/b:../c", "a b/c", "a/b?x=1"]
)
def test_what_is_no_repository(make_hub: MakeHub, tmp_path: Path, spec: str) -> None:
    made = make_hub()
    with pytest.raises(UserError, match="is no repository"):
        get(tmp_path, spec)
    assert not made.asked


# --- what the hub may answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../x.gguf",
        "/x.gguf",
        "a/../../x.gguf",
        "..\\x.gguf",
        "C:x.gguf",
        ".gguf",
        "a//x.gguf",
        "x\0.gguf",
        "-x.gguf",
        3,
    ],
)
def test_names_that_lead_elsewhere_are_not_taken(make_hub: MakeHub, tmp_path: Path, path: Any) -> None:
    good = {"oid": "0" * 64, "size": 3}
    make_hub(
        files={}, entries=[{"path": path, "lfs": good}, None, {"path": "y.gguf", "lfs": {"oid": "../x", "size": 3}}]
    )
    with pytest.raises(UserError, match="has no GGUF files"):
        get(tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "HF_TOKEN"),
        (403, "HF_TOKEN"),
        (404, "There is no someone/Tiny-GGUF"),
        (429, "status 429"),
        (500, "status 500"),
    ],
)
def test_the_hub_refuses(make_hub: MakeHub, tmp_path: Path, status: int, said: str) -> None:
    make_hub(status=status)
    with pytest.raises(UserError, match=said) as refused:
        get(tmp_path)
    assert str(refused.value).endswith(".")
    assert not files(tmp_path)


def test_no_list(make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_hub()
    for text in (b"<html>", b"{}3", b"3", b"[" * 100_000):
        monkeypatch.setattr(made, "listing", lambda text=text: text)
        with pytest.raises(UserError, match="sends no list"):
            get(tmp_path)


def test_the_token_is_for_the_hub_alone(make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cdn = make_hub()
    made = make_hub(cdn=cdn.url)  # another port
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get(tmp_path).read_bytes() == DATA
    assert {token for _, token, _ in made.asked} == {"Bearer hf_secret"}
    assert [token for _, token, _ in cdn.asked] == [None]
    made.cdn = made.url  # to itself
    made.files["Tiny-Q4_K_M.gguf"] = DATA[:-1]
    get(tmp_path)
    assert {token for _, token, _ in made.asked} == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "a\nb")
    with pytest.raises(UserError, match="HF_TOKEN is no token"):
        get(tmp_path)


@pytest.mark.parametrize("cdn", ["file:///etc", "ftp://127.0.0.1"])
def test_other_protocols_are_not_followed(make_hub: MakeHub, tmp_path: Path, cdn: str) -> None:
    make_hub(cdn=cdn)
    with pytest.raises(UserError):
        get(tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".gguf")]


# --- what may happen on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_a_download_that_is_cut_goes_on(make_hub: MakeHub, tmp_path: Path, takes_ranges: bool) -> None:
    made = make_hub(cut=[1_200_000, 2_300_000], takes_ranges=takes_ranges)
    assert get(tmp_path).read_bytes() == DATA
    assert [wanted for _, _, wanted in made.asked[1:]][:2] == [None, "bytes=1200000-"]
    assert files(tmp_path) == ["Tiny-Q4_K_M.gguf"]


def test_the_next_try_goes_on_where_the_last_one_ended(make_hub: MakeHub, tmp_path: Path) -> None:
    made = make_hub(cut=[1_000_000, 0, 0, 0, 0])
    with pytest.raises(UserError, match="it sends nothing"):
        get(tmp_path)
    assert files(tmp_path) == ["Tiny-Q4_K_M.gguf.part"]
    made.asked.clear()
    assert get(tmp_path).read_bytes() == DATA
    assert [wanted for _, _, wanted in made.asked] == [None, "bytes=1000000-"]


@pytest.mark.parametrize("sent", [DATA[:-1] + bytes([DATA[-1] ^ 1]), DATA + b"x"])
def test_another_file_is_not_kept(make_hub: MakeHub, tmp_path: Path, sent: bytes) -> None:
    made = make_hub(sent={"Tiny-Q4_K_M.gguf": sent})
    with pytest.raises(UserError, match="another sha256"):
        get(tmp_path)
    assert not files(tmp_path)
    made.sent.clear()
    assert get(tmp_path).read_bytes() == DATA


def test_what_an_earlier_try_left_is_checked(make_hub: MakeHub, tmp_path: Path) -> None:
    make_hub()
    found = hub.find(REPO, tmp_path)
    found.path.parent.mkdir(parents=True)
    part = found.path.with_name(found.path.name + ".part")
    for left in (b"something else", DATA + b"more"):
        part.write_bytes(left)
        with pytest.raises(UserError, match="another sha256"):
            hub.download(found)
    assert hub.download(found).read_bytes() == DATA


def test_a_new_version_leaves_the_old_one(make_hub: MakeHub, tmp_path: Path) -> None:
    made = make_hub()
    old = get(tmp_path)
    made.files["Tiny-Q4_K_M.gguf"] = b"new"
    made.sent["Tiny-Q4_K_M.gguf"] = b"bad"
    with pytest.raises(UserError, match="another sha256"):
        get(tmp_path)
    assert old.read_bytes() == DATA
    made.sent.clear()
    assert get(tmp_path).read_bytes() == b"new"
    assert old.read_bytes() == DATA


def test_one_process_downloads(make_hub: MakeHub, tmp_path: Path) -> None:
    make_hub()
    found = hub.find(REPO, tmp_path)
    found.path.parent.mkdir(parents=True)
    with locked(found.path.with_name(found.path.name + ".part")), pytest.raises(UserError, match="Another process"):
        hub.download(found)
    assert hub.download(found).read_bytes() == DATA


def test_a_full_disk(make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hub()
    monkeypatch.setattr(hub, "_ROOM", 1 << 60)
    with pytest.raises(UserError, match="There is no room for Tiny-Q4_K_M"):
        get(tmp_path)


# --- without a network ------------------------------------------------------------------------------------------------


def test_what_is_there_needs_no_hub(make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hub()
    path = get(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", nobody())
    for spec in (REPO, f"{REPO}:Q4_K_M", f"{REPO}:Tiny-Q4_K_M.gguf"):
        found = hub.find(spec, tmp_path)
        assert "cannot be reached" in found.note
        assert hub.download(found) == path
    for spec in (f"{REPO}:Q8_0", "someone/else"):
        with pytest.raises(UserError, match=r"cannot be reached \(.*\): check the network") as refused:
            get(tmp_path, spec)
        assert "\n" not in str(refused.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(tmp_path) == path


def test_a_command_with_it(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whole commands, with a model that works: nano under another name."""
    make_hub(files={"Nano-Q8_0.gguf": embedded_models()["nano"].read_bytes()})
    monkeypatch.setattr("lminf_edge.models.cache_folder", lambda: tmp_path)
    assert main(["get", "--hf", REPO, "--json"]) == 0
    output, errors = capfd.readouterr()
    [entry] = json.loads(output)
    assert entry["name"] == REPO
    assert Path(entry["path"]).name == "Nano-Q8_0.gguf"
    assert errors == f"downloading Nano-Q8_0.gguf of {REPO}, about 6 MB, once\n"
    assert main(["generate", "--hf", f"{REPO}:Q8_0", "-p", "Anna", "-n", "3"]) == 0
    assert "downloading" not in capfd.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", nobody())
    assert main(["info", "--hf", REPO, "--json"]) == 0
    assert "What was downloaded before is used: Nano-Q8_0.gguf" in capfd.readouterr().err
    assert main(["generate", "--hf", "someone/else", "-p", "Anna"]) == 1
    assert capfd.readouterr().err.startswith("error: 127.0.0.1:")


@pytest.mark.parametrize("command", ["serve", "chat", "ppl -f x", "passkey", "bench", "demo", "launch codex"])
def test_either_a_model_or_a_repository(capfd: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "-m", "smollm2", "--hf", REPO])
    assert "not allowed with argument" in capfd.readouterr().err
