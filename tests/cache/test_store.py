"""What is on disk is a cache and is input: broken, full, foreign or hostile, it costs speed and nothing else."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import run
from conftest import MakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lminf_edge.cache import files as files_module
from lminf_edge.cache import store as store_module
from lminf_edge.cache.checkpoint import HEADER_BYTES, Checkpoint, CheckpointError, Identity
from lminf_edge.cache.conversation import Conversation, Stored
from lminf_edge.cache.files import SUFFIX
from lminf_edge.cache.store import CheckpointStore
from lminf_edge.cache.token_log import TokenLog, Tokens
from lminf_edge.errors import UserError

IDENTITY = Identity(b"m" * 32, 4, 64, 64, 0, 1, 1, 0)
SALT = b"salt"
LARGE = 1 << 30
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")

MakeStore = Callable[..., CheckpointStore]


def open_store(folder: Path | None, memory: int = LARGE, disk: int = LARGE) -> CheckpointStore:
    return CheckpointStore(IDENTITY, folder, memory, disk)


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    made: list[CheckpointStore] = []

    def make(*args: Any, **kwargs: Any) -> CheckpointStore:
        made.append(open_store(*args, **kwargs))
        return made[-1]

    yield make
    for store in made:
        store.close()


def checkpoint_of(log: TokenLog, n_tokens: int, state: Any) -> Checkpoint:
    """Of the first n_tokens of a conversation whose stream has 7 more, which the client dropped, and skipped 4."""
    first = TokenLog(log.recent()[:n_tokens])
    return Checkpoint(IDENTITY, n_tokens + 7, 5, 4, first, np.asarray(state, dtype=np.uint8))


def talk(store: CheckpointStore, seed: int, n_tokens: int = 300, n_bytes: int = 500, **names: str) -> Conversation:
    """A conversation with checkpoints half way and at its end, and a label of its own unless told otherwise."""
    rng = np.random.default_rng(seed)
    log = TokenLog(rng.integers(0, 4096, n_tokens, dtype=np.int32))
    conversation = Conversation(log=log, is_hot=True, **{"label": f"chat {seed}", **names})
    for n in (n_tokens // 2, n_tokens):
        state = rng.integers(0, 256, n_bytes, dtype=np.uint8)
        store.add(conversation, checkpoint_of(log, n, state), {log.key(n, SALT): n})
    conversation.is_hot = False
    store.release(conversation)
    store.save(conversation)
    store.trim()
    return conversation


def known(store: CheckpointStore) -> dict[str, Any]:
    """All that can be got from a store: of each checkpoint and of each conversation, by name."""
    found: dict[str, Any] = {}
    for conversation in list(store.conversations.values()):
        tokens = store.log(conversation).recent().tolist() if conversation.label else []
        found[conversation.name] = (conversation.owner, conversation.label, tokens)
        for stored in list(conversation.checkpoints):
            try:
                checkpoint = store.fetch(stored).result(5)
            except CheckpointError:
                store.forget(stored)
                continue
            head = stored.head()
            found[stored.name] = (head, checkpoint.log.recent().tolist(), checkpoint.state.tolist())
    return found


def flushed(store: CheckpointStore) -> None:
    """Waits for the thread that writes."""
    store._writes.submit(int).result(5)
    store._settle()


def path_of(folder: Path, stored: Stored) -> Path:
    return folder / f"{stored.name}{SUFFIX}"


def test_a_store_that_is_closed_as_garbage_writes_everything(tmp_path: Path) -> None:
    """As that of a Llama in a cycle of references, whose finalizer closes it."""

    class Owner:
        def __init__(self) -> None:
            self.store, self.me = open_store(tmp_path), self
            talk(self.store, 1)
            flushed(self.store)

        def __del__(self) -> None:
            talk(self.store, 2)
            self.store.close()

    Owner()
    gc.collect()
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 4


def test_two_files_of_one_prefix_are_one_conversation(make_store: MakeStore, tmp_path: Path) -> None:
    """As an end between writing the one and deleting the other leaves them: what is used is also counted."""
    store = make_store(tmp_path)
    conversation = talk(store, 1)
    flushed(store)
    for stored in conversation.checkpoints:
        shutil.copy(path_of(tmp_path, stored), tmp_path / f"{stored.name[::-1]}{SUFFIX}")
    store.close()
    again = make_store(tmp_path)
    [found] = again.conversations.values()
    assert len(found.checkpoints) == 2
    assert again.disk_bytes == found.disk_bytes > 0
    again.disk_budget = 0
    again.trim()
    flushed(again)
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["", "the same"])
def test_a_restart_keeps_everything(make_store: MakeStore, tmp_path: Path, label: str) -> None:
    store = make_store(tmp_path)
    for i in range(3):
        talk(store, i, owner=f"owner {i}", label=label)
    before = known(store)
    assert len(before) == 9
    store.close()
    again = make_store(tmp_path)
    assert known(again) == before
    assert again.failures.n_damaged == again.failures.n_failed == 0
    assert again.disk_bytes == sum(each.disk_bytes for each in again.conversations.values())


def test_tokens_are_on_disk_only_for_a_conversation_with_a_name(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    talk(store, 0, label="")
    talk(store, 1)
    store.close()
    tokens = {name: np.random.default_rng(seed).integers(0, 4096, 300, dtype="<i4") for seed, name in enumerate("ab")}
    data = b"".join(file.read_bytes() for file in tmp_path.glob(f"*{SUFFIX}"))
    assert tokens["a"][:100].tobytes() not in data
    assert tokens["b"][:100].tobytes() in data


def test_the_deepest_over_all_salts(make_store: MakeStore) -> None:
    store = make_store(None)
    log = TokenLog(np.arange(100, dtype=np.int32))
    conversation = Conversation(log=log)
    for n, salt in ((40, b"a"), (60, b"b"), (80, b"c")):
        store.add(conversation, checkpoint_of(log, n, [0]), {log.key(n, salt): n})
    for salts, expected in (([b"a"], 40), ([b"a", b"b"], 60), ([b"b", b"a"], 60), ([b"c", b"a"], 80)):
        found = store.find(log, 1, 99, salts)
        assert found is not None
        assert found[1] == expected
    assert store.find(log, 41, 99, [b"a"]) is None
    assert store.find(log, 1, 39, [b"a", b"b", b"c"]) is None
    assert store.find(log, 1, 99, [b"d"]) is None


def test_named_conversations(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for i, (owner, label) in enumerate([("me", "chat"), ("me", "chat"), ("you", "chat"), ("me", ""), ("me", "other")]):
        talk(store, i, owner=owner, label=label).used = float(i + 1)
    order = [each.name for each in store.named("me", "chat")]
    assert len(order) == 2
    assert [each.used for each in store.named("me", "chat")] == [2.0, 1.0]
    assert store.named("me", "") == store.named("him", "chat") == []
    store.close()
    assert [each.name for each in make_store(tmp_path).named("me", "chat")] == order


def test_the_tokens_of_a_conversation_are_read_without_its_state(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name may stand for many conversations, and states are large."""
    store = make_store(tmp_path)
    conversation = talk(store, 0)
    expected = store.log(conversation).recent().tolist()
    store.close()
    again = make_store(tmp_path)
    monkeypatch.setattr(Checkpoint, "from_bytes", lambda data: pytest.fail("the whole file was read"))
    assert again.log(again.conversations[conversation.name]).recent().tolist() == expected


@pytest.mark.parametrize("label", ["x" * 1024, "\0", "'; DROP TABLE", "\ud800", "🙂" * 1024, "../../etc/passwd"])
def test_labels_of_any_kind(make_store: MakeStore, tmp_path: Path, label: str) -> None:
    store = make_store(tmp_path)
    name = talk(store, 0, label=label, owner=label).name
    store.close()
    assert [each.name for each in make_store(tmp_path).named(label, label)] == [name]


def test_the_newest_checkpoint_is_the_one_made_last(make_store: MakeStore, tmp_path: Path) -> None:
    """After an edit it is not the longest one; neither before nor after a restart."""
    store = make_store(tmp_path)
    conversation = talk(store, 0)
    edited = TokenLog([*range(100)])
    conversation.set_tokens(edited.recent())
    store.add(conversation, checkpoint_of(edited, 100, [1]), {edited.key(100, SALT): 100})
    store.save(conversation)
    store.close()
    again = make_store(tmp_path)
    conversation = again.conversations[conversation.name]
    assert conversation.tip is not None
    assert conversation.tip.n_tokens == conversation.n_tokens == 100
    assert again.log(conversation).recent().tolist() == edited.recent().tolist()


def test_what_is_written_while_python_ends(tmp_path: Path) -> None:
    """Its threads may be gone by then."""
    script = (
        f"import atexit, sys; from pathlib import Path; sys.path[:0] = {sys.path!r}\n"
        "from test_store import open_store, talk\n"
        f"store = open_store(Path({str(tmp_path)!r}))\n"
        "atexit.register(store.close); atexit.register(talk, store, 0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with two conversations, and all that is known of them."""
    folder = tmp_path_factory.mktemp("written")
    store = open_store(folder)
    for i in range(2):
        talk(store, i, owner="me")
    everything = known(store)
    store.close()
    return folder, everything


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_costs_its_checkpoint_at_most(
    written: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source, everything = written
    folder = tmp_path_factory.mktemp("damaged") / "store"
    shutil.copytree(source, folder)
    victim = data.draw(st.sampled_from(sorted(folder.glob(f"*{SUFFIX}"))))
    content = bytearray(victim.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "zeros", "random"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content += data.draw(st.binary(min_size=1, max_size=100))
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    else:
        content = bytearray(data.draw(st.binary(max_size=2000)))
    is_changed = bytes(content) != victim.read_bytes()
    victim.write_bytes(content)
    store = open_store(folder)
    try:
        found = known(store)
    finally:
        store.close()
    lost = {name for name in everything if name not in found}
    assert lost <= {victim.name.removesuffix(SUFFIX)}
    assert bool(lost) == is_changed
    for name, what in found.items():
        if isinstance(what[0], str):  # a conversation: of its tokens as many as are left
            assert what[:2] == everything[name][:2]
            assert what[2] == everything[name][2][: len(what[2])]
        else:
            assert what == everything[name]


VALUES = [-1, 0, 1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, True, None, "", "x", [], {}, "\0", "../../x"]


@pytest.mark.parametrize("field", list(files_module.Head.__dataclass_fields__))
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_any_value_in_any_field(make_store: MakeStore, tmp_path: Path, field: str, value: Any) -> None:
    """With a hash that fits: what cannot be is given up, the rest costs what the checkpoint is for."""
    store = make_store(tmp_path)
    bad, good = talk(store, 0, label=""), talk(store, 1)
    expected = {name: what for name, what in known(store).items() if name in (good.name, *names(good))}
    store.close()
    victim = path_of(tmp_path, bad.checkpoints[0])
    forge(victim, lambda head: {**head, field: value})
    again = make_store(tmp_path)
    found = known(again)
    assert expected.items() <= found.items()
    log = TokenLog(np.arange(200, dtype=np.int32))
    assert again.find(log, 1, 199, [SALT]) is None
    again.disk_budget = 0
    again.trim()
    flushed(again)
    assert again.disk_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda head: [],
        lambda head: {},
        lambda head: {**head, "more": 1},
        lambda head: {key: value for key, value in head.items() if key != "keys"},
        lambda head: {**head, "keys": {"x": 1}},
        lambda head: {**head, "keys": {"0" * 32: -1}},
        lambda head: {**head, "keys": {"0" * 32: "1"}},
        lambda head: {**head, "n_bytes": head["n_bytes"] + 1},
        lambda head: {**head, "n_dropped": head["position"] + 1},
    ],
)
def test_heads_that_make_no_sense(make_store: MakeStore, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    store = make_store(tmp_path)
    conversation = talk(store, 0)
    store.close()
    victim = path_of(tmp_path, conversation.checkpoints[0])
    forge(victim, change)
    again = make_store(tmp_path)
    assert again.failures.n_damaged == 1
    assert len(again.conversations[conversation.name].checkpoints) == 1
    assert not victim.exists()


def test_a_head_and_a_checkpoint_belong_together(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    one, other = talk(store, 0), talk(store, 1)
    store.close()
    paths = [path_of(tmp_path, each.checkpoints[0]) for each in (one, other)]
    a, b = (path.read_bytes() for path in paths)
    assert len(a) == len(b)
    n_front = len(a) - checkpoint_bytes(a)
    paths[0].write_bytes(a[:n_front] + b[n_front:])
    assert make_store(tmp_path).failures.n_damaged == 1


def test_a_file_in_the_place_of_another(make_store: MakeStore, tmp_path: Path) -> None:
    """It says what it is of; one that was changed under a running server is not used."""
    store = make_store(tmp_path)
    one, other = talk(store, 0), talk(store, 1)
    store.close()
    store = make_store(tmp_path)
    shutil.copy(path_of(tmp_path, one.checkpoints[0]), path_of(tmp_path, other.checkpoints[0]))
    stored = next(
        each for each in store.conversations[other.name].checkpoints if each.name == other.checkpoints[0].name
    )
    with pytest.raises(CheckpointError, match="another checkpoint"):
        store.fetch(stored).result(5)
    assert store.failures.n_damaged == 1


def names(conversation: Conversation) -> list[str]:
    return [stored.name for stored in conversation.checkpoints]


def checkpoint_bytes(data: bytes) -> int:
    n_head = files_module._FRONT.unpack_from(data)[2]
    return len(data) - files_module._FRONT.size - int(n_head)


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the head of a file, with a hash that fits."""
    data = path.read_bytes()
    body = data[len(data) - checkpoint_bytes(data) :]
    front = files_module._FRONT
    head = json.dumps(change(json.loads(data[front.size : len(data) - len(body)]))).encode()
    tokens_digest = front.unpack_from(data)[3]
    digest = files_module._hash(tokens_digest + head + body[:HEADER_BYTES])
    packed = front.pack(files_module.MAGIC, files_module.VERSION, len(head), tokens_digest, digest)
    path.write_bytes(packed + head + body)


def test_a_forged_file_that_is_sound_is_taken(make_store: MakeStore, tmp_path: Path) -> None:
    """So the tests above are of the values, and not of the hash."""
    store = make_store(tmp_path)
    conversation = talk(store, 0)
    store.close()
    for stored in conversation.checkpoints:
        forge(path_of(tmp_path, stored), lambda head: {**head, "owner": "another"})
    again = make_store(tmp_path)
    assert again.failures.n_damaged == 0
    assert [each.name for each in again.named("another", "chat 0")] == [conversation.name]


# --- what is not ours -------------------------------------------------------------------------------------------------


def replace_by(kind: str, path: Path, target: Path) -> None:
    """Something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "socket":
        os.chdir(path.parent)  # their paths must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)


KINDS = ("fifo", "folder", "link", "socket")


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before the start", "after it"])
def test_something_else_in_the_place_of_a_file(
    kind: str, when: str, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "store"
    store = make_store(folder)
    bad, good = talk(store, 0), talk(store, 1)
    expected = {name: what for name, what in known(store).items() if name in (good.name, *names(good))}
    store.close()
    target = tmp_path / "target"
    shutil.copy(path_of(folder, good.checkpoints[0]), target)
    if when == "after it":
        store = make_store(folder)
    for stored in bad.checkpoints:
        replace_by(kind, path_of(folder, stored), target)
    if when == "before the start":
        store = make_store(folder)
    found = {name: what for name, what in known(store).items() if name != bad.name}
    assert store.failures.n_damaged >= 2
    assert found == expected
    store.disk_budget = 0
    store.close()
    assert target.exists()
    for stored in bad.checkpoints:
        assert os.path.lexists(path_of(folder, stored))  # not ours


@posix
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fifo"])  # that can be locked as well
def test_something_else_in_the_place_of_the_lock(
    kind: str, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").write_bytes(b"precious")
    folder = tmp_path / "store"
    folder.mkdir()
    replace_by(kind, folder / "lock", tmp_path / "target")
    with pytest.raises(UserError, match="--folder"):
        make_store(folder)
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_other_peoples_files_stay(make_store: MakeStore, tmp_path: Path) -> None:
    name = "b" * 32
    others = {
        f"notes{SUFFIX}": b"precious",
        f"{'A' * 32}{SUFFIX}": b"precious",
        f"{name}{SUFFIX}": b"precious " * 100,  # our name, something else
        f"{'c' * 32}{SUFFIX}": b"LMINFSTO" + (99).to_bytes(4, "little") + bytes(500),  # a later version
        f"{'d' * 31}{SUFFIX}": b"precious",
        f".{'e' * 32}{SUFFIX}": b"precious",
        f"{'f' * 32}.state": b"LMINFCKP precious",
        "notes.txt": b"precious",
        "index.sqlite": b"precious",
    }
    for each, content in others.items():
        (tmp_path / each).write_bytes(content)
    (tmp_path / f"{'1' * 32}{SUFFIX}").mkdir()
    store = make_store(tmp_path)
    conversation = talk(store, 0)
    store.disk_budget = 0
    store.close()
    assert conversation.checkpoints == []
    make_store(tmp_path)
    for each, content in others.items():
        assert (tmp_path / each).read_bytes() == content
    assert (tmp_path / f"{'1' * 32}{SUFFIX}").is_dir()
    assert len(list(tmp_path.iterdir())) == len(others) + 2  # and the lock


def test_unfinished_files_are_deleted(make_store: MakeStore, tmp_path: Path) -> None:
    part = tmp_path / f"{'a' * 32}{SUFFIX}.part"
    part.write_bytes(b"of a process that was killed")
    make_store(tmp_path)
    assert not part.exists()


@posix
def test_files_are_closed_to_others(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    talk(store, 0)
    store.close()
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    for file in (tmp_path / "store").iterdir():
        assert file.stat().st_mode & 0o077 == 0


# --- disks that are full or do not work -------------------------------------------------------------------------------

FULL = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE]


@pytest.mark.parametrize("code", FULL, ids=os.strerror)
@pytest.mark.parametrize("where", [(os, "open"), (os, "fsync"), (os, "replace"), (shutil, "disk_usage")], ids=str)
def test_a_write_that_fails_costs_nothing_and_is_tried_again(
    code: int,
    where: tuple[Any, str],
    make_store: MakeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    store = make_store(tmp_path)
    old = talk(store, 9)
    flushed(store)
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        made = [talk(store, i) for i in range(3)]
        flushed(store)
        store.forget(old.checkpoints[0])
        for conversation in made:
            for stored in conversation.checkpoints:
                assert len(store.fetch(stored).result(5).state) == 500
        store.trim()
        flushed(store)
    assert store.failures.n_failed > 0
    assert store.failures.last == os.strerror(code)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    for conversation in made:
        store.save(conversation)
    flushed(store)
    expected = known(store)
    store.close()
    found = known(make_store(tmp_path))
    assert expected == {name: what for name, what in found.items() if name in expected}


def test_a_folder_that_cannot_be_listed(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        store = make_store(tmp_path)
    assert store.failures.n_failed == 1
    assert "Answers do not depend on it" in caplog.text
    talk(store, 0)
    flushed(store)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2


def test_memory_stays_within_its_budget_on_a_full_disk(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = make_store(tmp_path, memory=200_000)
    monkeypatch.setattr(shutil, "disk_usage", fail)
    for i in range(20):
        talk(store, i, n_bytes=30_000)
        assert store.memory_bytes <= 200_000
    assert 0 < len(store.conversations) < 20
    flushed(store)
    assert not list(tmp_path.glob(f"*{SUFFIX}*"))


def test_an_engine_answers_whatever_the_disk_does(
    make_engine: MakeEngine, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    engine = make_engine(parallel=1, folder=tmp_path)
    answers = []
    for is_full in (False, True):
        if is_full:
            monkeypatch.setattr(os, "fsync", fail)
        for start in (0, 300):  # each takes the slot from the other
            prompt = tokens[start + 100 * is_full : start + 200]
            answers.append(run(engine, tokens[start : start + 200], 5, label="chat")[1])
            run(engine, prompt[::-1].copy(), 5, label="another chat")
    assert answers[:2] == answers[2:]
    engine.call(lambda: flushed(engine.store))
    assert engine.store.failures.n_failed > 0
    assert engine.counters.failed == 0
    engine.close()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_store import flushed, known, open_store, talk

def limit(n_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

folder = Path({folder!r})
limit({first})
store = open_store(folder)
made = [talk(store, i, n_tokens=20_000, n_bytes=100_000) for i in range(3)]
flushed(store)
expected = known(store)
assert store.failures.n_failed > 0, "nothing failed"
assert len(expected) == 9
limit(resource.RLIM_INFINITY)
for conversation in made:
    store.save(conversation)
store.close()
again = open_store(folder)
assert known(again) == expected, (len(known(again)), store.failures.last)
assert again.failures.n_failed == again.failures.n_damaged == 0
again.close()
"""


@posix
@pytest.mark.parametrize("first", [0, 200, 10_000, 150_000])  # from the start on, in heads, tokens and states
def test_a_real_limit(tmp_path: Path, first: int) -> None:
    script = LIMITED.format(path=sys.path, folder=str(tmp_path / "store"), first=first)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_folders_that_cannot_be_used(make_store: MakeStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make_store(tmp_path / "mine")
    for folder, reason in (
        (tmp_path / "file", "--folder"),
        (tmp_path / "file" / "below", "--folder"),
        (tmp_path / "\0", "--folder"),
        (tmp_path / ("x" * 300), "--folder"),
        (tmp_path / "mine", "perhaps by another server: end that one"),
    ):
        with pytest.raises(UserError, match=reason):
            make_store(folder)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(make_store: MakeStore, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--folder"):
        make_store(tmp_path)
    tmp_path.chmod(0o700)


# --- budgets ----------------------------------------------------------------------------------------------------------


def assert_counted(store: CheckpointStore) -> None:
    everything = list(store.conversations.values())
    assert store.memory_bytes == sum(each.memory_bytes for each in everything)
    assert store.disk_bytes == (sum(each.disk_bytes for each in everything) if store.folder else 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_totals_are_those_of_what_is_there(make_store: MakeStore, tmp_path: Path, on_disk: bool) -> None:
    rng = np.random.default_rng(0)
    store = make_store(tmp_path if on_disk else None, memory=60_000, disk=150_000)
    for i in range(60):
        talk(store, i, n_tokens=int(rng.integers(2, 2000)), n_bytes=int(rng.integers(1, 9000)))
        assert_counted(store)
        if store.conversations:
            other = list(store.conversations.values())[int(rng.integers(len(store.conversations)))]
            if rng.integers(2) == 0 and other.checkpoints:
                store.forget(other.checkpoints[0])
            else:
                log = TokenLog(np.concatenate([store.log(other).recent(), rng.integers(0, 4096, 50, dtype=np.int32)]))
                other.log = log
                store.add(other, checkpoint_of(log, len(log), [1, 2, 3]), {log.key(len(log), SALT): len(log)})
        flushed(store)
        assert_counted(store)
        store.trim()
        assert store.memory_bytes <= 60_000 + 60 * 6000 * on_disk  # what finds those on disk stays
        assert store.disk_bytes <= 150_000
    store.close()
    assert sum(file.stat().st_size for file in tmp_path.glob(f"*{SUFFIX}")) <= 150_000 * 1.05


def test_a_budget_that_has_become_smaller(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for i in range(10):
        talk(store, i, n_bytes=10_000).used = float(i + 1)
    store.close()
    again = make_store(tmp_path, disk=60_000)
    assert 0 < again.disk_bytes <= 60_000
    labels = {each.label for each in again.conversations.values()}
    assert labels <= {f"chat {i}" for i in range(7, 10)}  # those used last
    again.close()
    assert sum(file.stat().st_size for file in tmp_path.glob(f"*{SUFFIX}")) <= 60_000


def test_memory_is_counted_within_five_percent(make_store: MakeStore) -> None:
    store = make_store(None)
    talk(store, 1000)  # what is made once
    gc.collect()
    tracemalloc.start()
    before = store.memory_bytes
    for i in range(100):
        talk(store, i, n_tokens=5000, n_bytes=4096)
    gc.collect()
    real, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert store.memory_bytes - before == pytest.approx(real, rel=0.05)


def test_many_small_conversations_do_not_fill_memory(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LEAST_MEMORY", 50_000)
    store = make_store(tmp_path, memory=0)
    for i in range(40):
        talk(store, i, n_tokens=2, n_bytes=1)
    assert store.memory_bytes <= 50_000
    assert 5 < len(store.conversations) < 40
