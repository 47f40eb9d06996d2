"""Archives in files: what was recalled before is recalled after, and bad files cost no more than what they held."""

from __future__ import annotations

import errno
import gc
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import F32, SMALL, MakeEngine, MakeLlama

from lminf_edge import Checkpoint, Llama, LMInfConfig
from lminf_edge.cache import segments
from lminf_edge.cache.segments import DATA_AT, Kept, Part, SegmentFolder, folder_beside
from lminf_edge.cache.token_log import Tokens
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request
from lminf_edge.errors import UserError

GREEDY = SamplingParams(temperature=0.0)
N_TOKENS = 2500  # two full segments and a part of one


def window(**recall: Any) -> LMInfConfig:
    return LMInfConfig(**{"n_global": 4, "n_local": 64, "n_recall": 16, **recall})


def read(llm: Llama, tokens: Tokens) -> None:
    for start in range(0, len(tokens), 500):
        llm.eval(tokens[start : start + 500])


def in_use(llm: Llama) -> int:
    """Bytes of memory of all archives of this process."""
    gc.collect()
    archive = llm.checkpoint().archive
    assert archive is not None
    return archive.n_bytes_all()


def files(folder: Path) -> dict[str, int]:
    """Names and times of the segments in a folder."""
    return {each.name: each.stat().st_mtime_ns for each in folder.rglob("*.segment")}


@pytest.fixture(scope="module")
def original(nano_f32_path: str, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint file, and the logits of what follows if it is restored from memory."""
    path = tmp_path_factory.mktemp("original") / "a"
    llm = Llama(nano_f32_path, **{**SMALL, "lminf": window()})
    read(llm, tokens[:N_TOKENS])
    checkpoint = llm.checkpoint()
    checkpoint.save(path)
    llm.restore(checkpoint)
    llm.eval(tokens[N_TOKENS : N_TOKENS + 200])
    logits = llm.scores[-1].copy()
    llm.close()
    return path, logits


@pytest.fixture
def saved(original: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A copy of that, to be damaged."""
    path, logits = original
    shutil.copy(path, tmp_path / "a")
    shutil.copytree(folder_beside(path), folder_beside(tmp_path / "a"))
    return tmp_path / "a", logits


# --- beside a checkpoint ----------------------------------------------------------------------------------------------


def test_a_file_recalls_as_the_stream_did(
    make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, saved: tuple[Path, Any]
) -> None:
    path, expected = saved
    for place in ("ram", tmp_path / "archive"):
        llm = make_llama(lminf=window(archive=place))
        llm.restore(Checkpoint.load(path))
        info = llm.stream_info()
        assert (info.archived, info.forgotten) == (N_TOKENS, 0)
        llm.eval(tokens[N_TOKENS : N_TOKENS + 200])
        np.testing.assert_array_equal(llm.scores[-1], expected)
    without = make_llama(lminf=window())
    shutil.rmtree(folder_beside(path))
    without.restore(Checkpoint.load(path))
    without.eval(tokens[N_TOKENS : N_TOKENS + 200])
    assert np.abs(without.scores[-1] - expected).max() > 0.01


def test_only_what_is_new_is_written(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm, path = make_llama(lminf=window()), tmp_path / "a"
    read(llm, tokens[:1500])
    llm.checkpoint().save(path)
    first = files(tmp_path)
    assert len(first) == 3  # a full segment, a part of one, and what their sketches need
    read(llm, tokens[1500:1600])
    llm.checkpoint().save(path)
    second = files(tmp_path)
    assert len(second) == 3  # what the file names no more is gone
    assert len(first.items() & second.items()) == 2
    llm.reset()
    (folder_beside(path) / f"{'ab' * 32}.segment.part").touch()  # of a process that was killed
    llm.checkpoint().save(path)
    assert not folder_beside(path).exists()


def test_a_branch_within_a_segment_has_its_own(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    """The same segment, written anew from its middle on, is another."""
    llm = make_llama(lminf=window(n_slack=200))
    other = tokens[::-1].copy()
    read(llm, tokens[:1500])
    made = [llm.checkpoint()]
    made[0].save(tmp_path / "0")
    llm.n_tokens = 1400
    read(llm, other[:100])
    made.append(llm.checkpoint())
    made[1].save(tmp_path / "1")
    again = make_llama(lminf=window(n_slack=200))
    for i in range(2):
        again.restore(Checkpoint.load(tmp_path / str(i)))
        llm.restore(made[i])
        assert again.stream_info().archived == 1500
        for each in (again, llm):
            read(each, tokens[2000:2100])
        np.testing.assert_array_equal(again.scores[-1], llm.scores[-1])
    assert len(set(files(folder_beside(tmp_path / "0"))) & set(files(folder_beside(tmp_path / "1")))) == 2


def test_a_file_that_was_cut_is_written_again(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(lminf=window())
    read(llm, tokens[:N_TOKENS])
    checkpoint = llm.checkpoint()
    checkpoint.save(tmp_path / "a")
    for file in folder_beside(tmp_path / "a").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    checkpoint.save(tmp_path / "a")
    llm.restore(Checkpoint.load(tmp_path / "a"))
    assert llm.stream_info().archived == N_TOKENS


def test_what_was_loaded_can_be_saved_elsewhere(make_llama: MakeLlama, saved: tuple[Path, Any]) -> None:
    path, _ = saved
    Checkpoint.load(path).save(path.with_name("b"))
    before = files(folder_beside(path))
    Checkpoint.load(path).save(path)
    assert files(folder_beside(path)) == before
    assert set(files(folder_beside(path.with_name("b")))) == set(before)
    shutil.rmtree(folder_beside(path))
    llm = make_llama(lminf=window())
    llm.restore(Checkpoint.load(path.with_name("b")))
    assert llm.stream_info().forgotten == 0


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "is missing": Path.unlink,
    "is cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "is cut short or": lambda path: os.truncate(path, 0),
    "is damaged": lambda path: flip(path, -1),
    "is damaged.": lambda path: flip(path, DATA_AT),
    "is not one of this version": lambda path: flip(path, 8),
    "cannot be read": replace_by_link,
    "cannot be read (": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_file_costs_what_it_held(
    make_llama: MakeLlama,
    tokens: Tokens,
    saved: tuple[Path, Any],
    caplog: pytest.LogCaptureFixture,
    what: str,
    which: int,
) -> None:
    path, expected = saved
    kept = Checkpoint.load(path).kept
    assert kept is not None
    part = [part for part in kept.parts if part.first >= 0][which]
    DAMAGES[what](folder_beside(path) / f"{part.name}.segment")
    llm = make_llama(lminf=window())
    with caplog.at_level(logging.WARNING):
        llm.restore(Checkpoint.load(path))
    info = llm.stream_info()
    assert info.forgotten == part.n_tokens
    assert info.archived == N_TOKENS - part.n_tokens
    assert f"{part.n_tokens} of {N_TOKENS} archived tokens cannot be recalled" in caplog.text
    assert what in caplog.text
    llm.eval(tokens[N_TOKENS : N_TOKENS + 200])
    assert np.isfinite(llm.scores[-1]).all()
    assert np.abs(llm.scores[-1] - expected).max() > 0


def test_without_the_axes_sketches_are_made_anew(
    make_llama: MakeLlama, tokens: Tokens, saved: tuple[Path, Any], tmp_path: Path
) -> None:
    path, expected = saved
    kept = Checkpoint.load(path).kept
    assert kept is not None
    assert kept.parts[0].first == -1
    flip(folder_beside(path) / f"{kept.parts[0].name}.segment", -1)
    plain = make_llama(lminf=window(n_recall=0))
    plain.eval(tokens[: N_TOKENS + 200])
    effect = np.abs(plain.scores[-1] - expected).mean()
    for place in ("ram", tmp_path / "archive"):
        llm = make_llama(lminf=window(archive=place))
        llm.restore(Checkpoint.load(path))
        assert llm.stream_info().forgotten == 0
        llm.eval(tokens[N_TOKENS : N_TOKENS + 200])
        # learned from the archive's rounded keys: tokens of the short list may be others, and a hit at times
        assert np.abs(llm.scores[-1] - expected).mean() < 0.25 * effect


def test_other_types_and_other_parameters(
    make_llama: MakeLlama, saved: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = saved
    llm = make_llama(lminf=window(archive_type_v="q4_0"))
    with caplog.at_level(logging.WARNING):
        llm.restore(Checkpoint.load(path))
    assert llm.stream_info().forgotten == N_TOKENS
    assert "archived in other types" in caplog.text
    with pytest.raises(UserError, match="n_recall=16"):
        make_llama(lminf=window(n_recall=8)).restore(Checkpoint.load(path))
    smaller = make_llama(lminf=window(n_archive=1200))
    smaller.restore(Checkpoint.load(path))
    smaller.eval([7])
    assert smaller.stream_info().archived <= 1200


def test_a_file_of_another_stream_is_not_taken(make_llama: MakeLlama, tokens: Tokens, saved: tuple[Path, Any]) -> None:
    path, _ = saved
    other = make_llama(lminf=window())
    read(other, tokens[::-1][:N_TOKENS].copy())
    other.checkpoint().save(path.with_name("b"))
    mine, theirs = (sorted(files(folder_beside(path.with_name(name)))) for name in ("a", "b"))
    assert not set(mine) & set(theirs)
    for a, b in zip(mine, theirs, strict=True):
        shutil.copy(folder_beside(path.with_name("b")) / b, folder_beside(path) / a)
    llm = make_llama(lminf=window())
    llm.restore(Checkpoint.load(path))
    assert llm.stream_info().forgotten == N_TOKENS


def test_what_names_the_files_is_checked() -> None:
    kept = Kept((8, 8), ((0, 5), (7, 1030)), (Part(-1, 0, 9, "ab" * 32), Part(0, 1024, 5, "cd" * 32)))
    data = kept.to_bytes()
    assert Kept.from_bytes(data) == kept
    assert Kept.from_bytes(b"") is None
    for wrong in (
        data[:-1],
        data + b"\0",
        data[:5],
        Kept((8, 8), ((5, 0),), ()).to_bytes(),
        Kept((8, 8), ((0, 5), (4, 9)), ()).to_bytes(),
        Kept((8, 8), ((-1, 5),), ()).to_bytes(),
        Kept((8, 8), (), kept.parts[::-1]).to_bytes(),
        Kept((8, 8), (), (Part(0, 1025, 5, "cd" * 32),)).to_bytes(),
        Kept((8, 8), (), (Part(1 << 62, 1, 5, "cd" * 32),)).to_bytes(),
    ):
        with pytest.raises(ValueError, match="makes no sense"):
            Kept.from_bytes(wrong)


def test_a_full_disk_leaves_the_old_file(
    make_llama: MakeLlama, tokens: Tokens, saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    before = path.read_bytes()
    llm = make_llama(lminf=window())
    read(llm, tokens[:1100])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            llm.checkpoint().save(path)
    assert path.read_bytes() == before
    again = make_llama(lminf=window())
    again.restore(Checkpoint.load(path))
    assert again.stream_info().forgotten == 0


# --- in files while it runs -------------------------------------------------------------------------------------------


def test_an_archive_in_files_takes_little_memory(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    plain = make_llama(lminf=window())
    read(plain, tokens)
    segment = plain.stream_info().archive_bytes // 3
    bounded = {"archive": tmp_path, "n_archive": 1 << 20, "archive_memory": in_use(plain) + 3 * segment}
    llm = make_llama(lminf=window(**bounded))
    for start in range(0, len(tokens), 500):
        llm.eval(tokens[start : start + 500])
        llm.scheduler.store._writes.submit(int).result(5)
    assert llm.stream_info().forgotten == 0
    assert llm.stream_info().archive_bytes <= 2 * segment
    assert len(files(tmp_path)) == 2
    for each in (plain, llm):  # each takes one more
        each.eval(tokens[:100])
    np.testing.assert_array_equal(llm.scores[-1], plain.scores[-1])
    llm.close()
    assert not files(tmp_path)  # no checkpoint names them


def test_files_hold_what_they_may(
    make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, make_engine: MakeEngine
) -> None:
    probe = make_llama(lminf=window())
    parts = probe.scheduler.model.parts
    assert parts.n_archive == 262144
    of_file = DATA_AT + 1024 * parts.archive_token_bytes
    with pytest.raises(UserError, match=r"archive of 2049 tokens needs 3.4 MiB of files.* a larger archive_disk"):
        make_llama(lminf=window(archive=tmp_path, archive_disk=2 * of_file, n_archive=2049))
    with pytest.raises(UserError, match=r"archive of 1024 tokens needs 1.7 MiB of files"):
        make_llama(lminf=window(archive=tmp_path, archive_disk=of_file - 1))
    llm = make_llama(lminf=window(archive=tmp_path, archive_disk=3 * of_file - 1))
    assert llm.scheduler.model.parts.n_archive == 2048
    for start in range(0, 9000, 500):
        llm.eval(tokens[start % 3000 : start % 3000 + 500])
        llm.scheduler.store._writes.submit(int).result(5)
        assert len(files(tmp_path)) <= 2
    assert 1024 <= llm.stream_info().archived <= 2048
    llm.close()
    many = make_engine(lminf=window(archive=tmp_path, archive_disk=9 * of_file), n_parallel=4)
    assert many.parts.n_archive == 9 // len(many.scheduler.model.sequences) * 1024


def test_a_damaged_file_is_written_again(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(lminf=window())
    read(llm, tokens)
    sequence = llm.slot.sequence
    archive, folder = sequence.archive(), SegmentFolder(tmp_path)
    assert archive is not None
    kept, _ = folder.write(archive)
    folder.hold(kept)
    for damage in DAMAGES.values():
        for part in kept.parts:
            damage(folder.path(part.name))
            if folder.path(part.name).is_dir():
                folder.path(part.name).rmdir()
            damaged, whole = sequence.new_archive(), sequence.new_archive()
            assert damaged is not None
            assert whole is not None
            assert folder.load(kept, damaged) or part.first < 0
            assert folder.write(archive) == (kept, None)
            assert folder.load(kept, whole) is None


def test_a_branch_does_not_change_what_is_in_files(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(lminf=window(archive=tmp_path))
    plain = make_llama(lminf=window())
    for each in (llm, plain):
        read(each, tokens[:2100])
    llm.scheduler.store._writes.submit(int).result(5)
    for each in (llm, plain):
        each.eval(tokens[2100:2110])
        each.n_tokens = 2040  # within the second segment
        each.eval(tokens[::-1][:50].copy())
    assert llm.stream_info().archived == 2090
    np.testing.assert_array_equal(llm.scores[-1], plain.scores[-1])


def test_a_file_that_was_changed_is_written_anew(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    """It does not take the place of the same segment in memory."""
    llm, plain = make_llama(lminf=window(archive=tmp_path)), make_llama(lminf=window())
    for i in range(2):
        llm.reset()
        read(llm, tokens)
        llm.scheduler.store._writes.submit(int).result(5)
        if i == 0:
            kept = llm.checkpoint()  # so that the files stay
            for path in tmp_path.rglob("*.segment"):
                flip(path, 6000)
    read(plain, tokens)
    for each in (llm, plain):
        each.eval(tokens[:100])
    np.testing.assert_array_equal(llm.scores[-1], plain.scores[-1])
    written = {path: hashlib.sha256(path.read_bytes()[DATA_AT:]).hexdigest() for path in tmp_path.rglob("*.segment")}
    assert all(path.stem == digest for path, digest in written.items())
    assert kept.archive is not None


def test_a_folder_is_used_by_one_at_a_time(make_llama: MakeLlama, tmp_path: Path) -> None:
    first = make_llama(lminf=window(archive=tmp_path))
    with pytest.raises(UserError, match="is in use"):
        make_llama(lminf=window(archive=tmp_path))
    first.close()
    make_llama(lminf=window(archive=tmp_path))
    make_llama(lminf=window(archive=tmp_path), checkpoint_folder=tmp_path / "store")  # has files of its own
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        make_llama(lminf=window(archive=tmp_path / "file"))


# --- in a store -------------------------------------------------------------------------------------------------------


def answer(engine: Engine, tokens: Tokens) -> tuple[list[int], int, int]:
    """What is generated, and of how many tokens how many can be recalled."""
    request = Request(tokens, GREEDY, max_tokens=4, ignore_eog=True)
    engine.submit(request)
    made = [output.token for output in engine.stream(request)]
    return made, request.stats.position, request.stats.n_archived


def close(engine: Engine) -> None:
    engine.close()
    engine.model.close()


@pytest.fixture(params=["ram", "files"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {} if request.param == "ram" else {"archive": tmp_path / "archive"}


def test_conversations_recall_after_a_restart(
    make_engine: MakeEngine, tokens: Tokens, tmp_path: Path, place: dict[str, Any]
) -> None:
    def start(**settings: Any) -> Engine:
        return make_engine(**{"parallel": 1, "lminf": window(**place), "folder": tmp_path / "store", **settings})

    one, two = tokens[:2300], tokens[::-1][:1300].copy()
    uninterrupted = make_engine(parallel=1, lminf=window())
    expected = [answer(uninterrupted, each)[0] for part in (-100, None) for each in (one[:part], two[:part])]
    found = []
    for part in (-100, None):
        for each in (one, two):
            engine = start()
            made, position, archived = answer(engine, each[:part])
            found.append(made)
            assert archived == position == len(each[:part]) + 3
            close(engine)
    assert found == expected
    # what branches share is there once: three full segments, what sketches need twice, and the ends of four turns
    assert len(files(tmp_path)) <= 3 + 2 + 6
    engine = start()
    for stored in [stored for each in engine.store.conversations.values() for stored in list(each.checkpoints)]:
        engine._command(lambda stored=stored: engine.store.forget(stored)).result(5)
    close(engine)
    assert not files(tmp_path)


def test_a_budget_on_disk(make_engine: MakeEngine, tokens: Tokens, tmp_path: Path) -> None:
    """The oldest tokens of what was used least recently go, and that is told."""
    one, two = tokens[:2300], tokens[::-1][:1300].copy()
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    answer(engine, one)
    answer(engine, two)
    close(engine)
    sizes = sum(each.stat().st_size for each in tmp_path.rglob("*.segment"))
    shutil.rmtree(tmp_path)
    budget = sizes * 3 // 4
    engine = make_engine(parallel=1, lminf=window(archive_disk=budget), folder=tmp_path)
    answer(engine, one)
    answer(engine, two)
    close(engine)
    assert 0 < sum(each.stat().st_size for each in tmp_path.rglob("*.segment")) <= budget
    engine = make_engine(parallel=1, lminf=window(archive_disk=budget), folder=tmp_path)
    _, position, archived = answer(engine, np.concatenate([two, tokens[:5]]))
    assert archived == position
    _, position, archived = answer(engine, np.concatenate([one, tokens[:5]]))
    assert 0 < archived < position == 2308
    close(engine)
    engine = make_engine(parallel=1, lminf=window(archive_disk=0), folder=tmp_path)
    _, position, archived = answer(engine, np.concatenate([two, tokens[:9]]))
    assert archived < position


def test_what_no_checkpoint_names_is_swept(make_engine: MakeEngine, tokens: Tokens, tmp_path: Path) -> None:
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    answer(engine, tokens[:1100])
    close(engine)
    before = set(files(tmp_path))
    [folder] = {path.parent for path in tmp_path.rglob("*.segment")}
    foreign = folder / "notes.segment"
    for name in (f"{'ab' * 32}.segment", f"{'ab' * 32}.segment.part"):
        (folder / name).write_bytes(b"x")
    foreign.write_bytes(b"x")
    close(make_engine(parallel=1, lminf=window(), folder=tmp_path))
    assert set(files(tmp_path)) == before | {foreign.name}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: two segments of nano fit."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_has_nothing_of_a_save_that_failed(make_llama: MakeLlama, tokens: Tokens, small_disk: Path) -> None:
    llm = make_llama(lminf=window())
    read(llm, tokens[:500])
    llm.checkpoint().save(small_disk / "a")
    before = sorted(small_disk.rglob("*"))
    read(llm, tokens)
    for name in ("a", "b"):
        with pytest.raises(OSError, match=f"No space left on device: .*/{name}.archive"):
            llm.checkpoint().save(small_disk / name)
        assert sorted(small_disk.rglob("*")) == before
    llm.restore(Checkpoint.load(small_disk / "a"))
    assert llm.stream_info().archived == 500


@pytest.mark.parametrize("fails_late", [False, True])
def test_a_full_disk_while_it_runs(
    make_engine: MakeEngine,
    tokens: Tokens,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fails_late: bool,
) -> None:
    expected = answer(make_engine(parallel=1, lminf=window()), tokens)
    if fails_late:  # while it is written, not before
        usage = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    with caplog.at_level(logging.WARNING):
        engine = make_engine(parallel=1, lminf=window(archive=small_disk), folder=small_disk / "store")
        assert answer(engine, tokens) == expected
        close(engine)
    assert "No space left on device" in caplog.text
    assert not list(small_disk.rglob("*.part"))
    engine = make_engine(parallel=1, lminf=window(archive=small_disk), folder=small_disk / "store")
    _, position, archived = answer(engine, np.concatenate([tokens, tokens[:9]]))
    assert position == 3012
    assert 0 < archived <= position
    close(engine)


def test_a_folder_that_cannot_be_written(
    make_engine: MakeEngine,
    tokens: Tokens,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: SegmentFolder, name: str, data: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(SegmentFolder, "_write_file", refuse)
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        _, position, archived = answer(engine, tokens[:1500])
        assert archived == position
        close(engine)
    assert "Read-only file system" in caplog.text
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        made, position, archived = answer(engine, tokens[:1600])
    assert len(made) == 4
    assert (position, archived) == (1603, 1603 - 1500 + 1)
    assert "archived tokens cannot be recalled: they are not in its files" in caplog.text


# --- memory -----------------------------------------------------------------------------------------------------------


def test_checkpoints_give_way_before_streams(make_engine: MakeEngine, tokens: Tokens) -> None:
    one, two = tokens[:2300], tokens[::-1][:2300].copy()
    engine = make_engine(parallel=1, lminf=window(), memory_budget=1 << 30)
    _, position, archived = answer(engine, one)
    assert archived == position
    segment = engine.parts.archive_token_bytes * 1024
    engine.store.archives.memory_budget = 5 * segment
    assert answer(engine, two)[1:] == (2303, 2303)
    _, position, archived = answer(engine, np.concatenate([one, tokens[:5]]))
    assert archived < 100 < position
    engine.store.archives.memory_budget = 1 << 40
    three = tokens[700:]
    answer(engine, three)
    answer(engine, tokens[500:])
    _, position, archived = answer(engine, np.concatenate([three, tokens[:5]]))
    assert archived == position


def test_a_stream_has_the_memory_it_is_told(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(lminf=window())
    segment = llm.scheduler.model.parts.archive_token_bytes * 1024
    llm.close()
    with pytest.raises(UserError, match=r"archives may take .* a larger archive_memory"):
        make_llama(lminf=window(archive_memory=2 * segment, n_archive=131072))
    for archive in ("ram", tmp_path):  # the newest tokens are in memory, wherever the others are
        with pytest.raises(
            UserError, match=r"smallest archive needs 1.7 MiB .* may take 1.0 MiB.* a larger archive_memory"
        ):
            make_llama(lminf=window(archive_memory=1 << 20, archive=archive))
    make_llama(lminf=window(archive_memory=1 << 20, n_recall=0))
    other = make_llama(lminf=window())
    other.eval(tokens[:100])
    llm = make_llama(lminf=window(archive_memory=in_use(other) + 2 * segment, n_archive=2048))
    read(llm, tokens)
    info = llm.stream_info()
    assert info.archive_bytes == 2 * segment
    assert 1000 < info.archived < 2048


def test_by_default_it_holds_what_fits(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(lminf=window())
    segment = llm.scheduler.model.parts.archive_token_bytes * 1024
    assert llm.scheduler.model.parts.n_archive == 262144
    before = in_use(llm)  # nothing is reserved
    read(llm, tokens[:500])
    assert in_use(llm) - before <= segment
    llm.close()
    gc.collect()
    small = make_llama(lminf=window(archive_memory=2 * segment + 100))
    assert small.scheduler.model.parts.n_archive == 2048
    for start in range(0, 6000, 500):
        small.eval(tokens[start % 3000 : start % 3000 + 500])
    info = small.stream_info()
    assert 1024 <= info.archived <= 2048
    assert info.archived + info.forgotten == 6000
    assert info.archive_bytes <= 2 * segment


def test_segments_are_read_once(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama(lminf=window())
    read(llm, tokens[:2100])
    checkpoint = llm.checkpoint()
    assert checkpoint.archive is not None
    folder = SegmentFolder(tmp_path)
    kept, error = folder.write(checkpoint.archive)
    assert error is None
    n_names = len(segments._names)
    assert folder.write(checkpoint.archive) == (kept, None)
    assert len(segments._names) == n_names
    assert sum(folder._sizes.values()) == sum(each.stat().st_size for each in tmp_path.iterdir())


# --- going back -------------------------------------------------------------------------------------------------------


def test_a_prompt_that_diverges_far_back(make_llama: MakeLlama, tokens: Tokens) -> None:
    """Beyond the slack the window is made anew, if the archive holds what it did."""
    prompt = np.concatenate([tokens[:320], tokens[::-1][:100]])  # where a micro-batch begins: choices are one's
    plain = window(n_checkpoints=0)
    exact = window(n_checkpoints=0, archive_type_k="f32", archive_type_v="f32")
    fresh = make_llama(lminf=exact, **F32)
    fresh.eval(prompt)
    for config, reaches in ((plain, 0), (exact, 320)):
        llm = make_llama(lminf=config, **F32)
        llm.eval(tokens[:1280])
        assert llm.reach(prompt) == reaches
        next(llm.generate(prompt, temp=0))
        assert llm.scheduler.counters.cached_tokens == reaches
        assert llm.n_tokens == len(prompt)
        if config is exact:
            np.testing.assert_allclose(llm.scores[-1], fresh.scores[-1], atol=2e-3)


def test_what_is_in_files_comes_back_from_there(make_engine: MakeEngine, tokens: Tokens, tmp_path: Path) -> None:
    """A checkpoint in memory gives its archive up where memory is short, and has it again when it is needed."""
    one, two = tokens[:1300], tokens[::-1][:1300].copy()
    engine = make_engine(parallel=1, lminf=window(), folder=tmp_path)
    engine.store.archives.memory_budget = 0
    for _ in range(2):
        for i, each in enumerate((one, two)):
            assert answer(engine, np.concatenate([each, tokens[: 5 * i]]))[1] > 1300
            engine.store._writes.submit(int).result(10)
    assert all(each.archive is None for each in engine.store.checkpoints)
    before = engine.scheduler.counters.cached_tokens
    _, position, archived = answer(engine, np.concatenate([one, tokens[:9]]))
    assert archived == position
    assert engine.scheduler.counters.cached_tokens - before >= 1300 - 1
    close(engine)
