"""Checkpoints: exact in another process, constant in size, and refused when anything is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import Checkpoint, CheckpointError, Llama, LMInfConfig
from lminf_edge.cache.checkpoint import HEADER_BYTES, Identity, model_digest
from lminf_edge.cache.token_log import BLOCK, KEY_BYTES, TokenLog, Tokens

IDENTITY = Identity(b"m" * 32, 4, 64, 64, 0, 1, 1, 0)
BASE = bytes(range(KEY_BYTES))


def small() -> Checkpoint:
    log = TokenLog(range(5), n_base=2 * BLOCK, base=BASE)
    state = np.arange(9, dtype=np.uint8)
    return Checkpoint(IDENTITY, 2 * BLOCK + 7, 3, 4, log, state, {515: state[:3] + 7, 517: state[:0]})


def next_logits(llm: Llama, token: int) -> Any:
    llm.eval([token])
    return llm.scores[-1]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    small().save(path)
    loaded = Checkpoint.load(path)
    assert (loaded.identity, loaded.position, loaded.n_rollback, loaded.n_skipped) == (IDENTITY, 519, 3, 4)
    assert (loaded.log.n_base, loaded.log.base) == (512, BASE)
    assert loaded.log.recent().tolist() == [0, 1, 2, 3, 4]
    assert loaded.state.tolist() == list(range(9))
    assert {at: state.tolist() for at, state in loaded.earlier.items()} == {515: [7, 8, 9], 517: []}
    assert path.stat().st_size == loaded.nbytes == HEADER_BYTES + 5 * 4 + 9 + 2 * 16 + 3
    assert path.read_bytes() == small().to_bytes()
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_every_flipped_byte_is_noticed() -> None:
    data = small().to_bytes()
    for i in range(len(data)):
        for bit in (1, 128):
            damaged = bytearray(data)
            damaged[i] ^= bit
            with pytest.raises(CheckpointError) as caught:
                Checkpoint.from_bytes(bytes(damaged))
            assert str(caught.value).endswith(".")
            assert "\n" not in str(caught.value)


def test_every_cut_and_every_addition_is_noticed() -> None:
    data = small().to_bytes()
    for n_bytes in range(len(data)):
        with pytest.raises(CheckpointError):
            Checkpoint.from_bytes(data[:n_bytes])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        Checkpoint.from_bytes(data + b"x")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Checkpoint.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    small().save(path)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                replace(small(), position=9).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    small().save(path)
    script = (
        "import numpy as np, sys\n"
        "from dataclasses import replace\n"
        "from lminf_edge.cache.checkpoint import Checkpoint\n"
        "small = Checkpoint.load(sys.argv[1])\n"
        "large = replace(small, position=520, state=np.zeros(1 << 22, dtype=np.uint8))\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    large.save(sys.argv[1])\n"
    )
    for delay in (0.0, 0.005, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        process.stdout.close()
        assert Checkpoint.load(path).position in (519, 520)


def test_constant_size(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    sizes = []
    for end in (600, 1800, 3000):
        llm.eval(tokens[llm.n_tokens : end])
        sizes.append(llm.checkpoint().nbytes - 4 * end)
    assert max(sizes) - min(sizes) < 0.01 * sizes[0]
    assert sizes[0] < llm.stream_info().kv_bytes + 4096
    llm.reset()
    llm.eval(tokens[:10])
    assert llm.checkpoint().nbytes < sizes[0] / 5  # used cells only


def test_restore_goes_back_exactly(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    for n_tokens in (1, 30, 100, 300, 1500):
        llm.reset()
        llm.eval(tokens[:n_tokens])
        checkpoint = llm.checkpoint()
        expected = next_logits(llm, 99)
        llm.eval(tokens[1000:1400])
        llm.restore(checkpoint)
        assert llm.input_ids.tolist() == tokens[:n_tokens].tolist()
        assert llm.stream_info().position == n_tokens
        # the cells may lie elsewhere, and their sums be added up in another order: 2.6e-4 was measured
        np.testing.assert_allclose(next_logits(llm, 99), expected, atol=1e-3)


@pytest.mark.parametrize("kv_type", [0, 1, 8])
def test_restore_in_another_process(
    make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, nano_f32_path: str, kv_type: int
) -> None:
    llm = make_llama(type_k=kv_type, type_v=kv_type)
    llm.eval(tokens[:700])
    llm.checkpoint().save(tmp_path / "a.ckpt")
    expected = next_logits(llm, 99)
    script = (
        "import json, sys\n"
        "from lminf_edge import Checkpoint, Llama, LMInfConfig\n"
        "path, model, kv_type = sys.argv[1:]\n"
        "llm = Llama(model, lminf=LMInfConfig(n_global=4, n_local=64), verbose=False, n_threads=1,\n"
        "            type_k=int(kv_type), type_v=int(kv_type))\n"
        "llm.restore(Checkpoint.load(path))\n"
        "llm.eval([99])\n"
        "print(json.dumps([llm.stream_info().position, llm.scores[-1].tolist()]))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.ckpt"), nano_f32_path, str(kv_type)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    position, logits = json.loads(output)
    assert position == 701
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_prompt_goes_on_from_a_loaded_checkpoint(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path) -> None:
    llm = make_llama()
    llm.eval(tokens[:900])
    llm.checkpoint().save(tmp_path / "a.ckpt")
    other = make_llama()
    other.restore(Checkpoint.load(tmp_path / "a.ckpt"))
    assert other.reach(tokens[:950]) == 900
    expected = llm.create_completion(tokens[:950].tolist(), max_tokens=10, temperature=0.0)
    response = other.create_completion(tokens[:950].tolist(), max_tokens=10, temperature=0.0)
    assert response["choices"][0]["text"] == expected["choices"][0]["text"]


def test_other_parameters_and_models_are_refused_and_nothing_changes(
    make_llama: MakeLlama, tokens: Tokens, nano_path: str
) -> None:
    llm = make_llama()
    llm.eval(tokens[:300])
    expected = llm.scores[-1]
    others = {
        "n_global=5": {"lminf": LMInfConfig(n_global=5, n_local=64)},
        "n_local=63": {"lminf": LMInfConfig(n_global=4, n_local=63)},
        "max_distance=60": {"lminf": LMInfConfig(n_global=4, n_local=64, max_distance=60)},
        "sink_mode=true": {"lminf": LMInfConfig(n_global=4, n_local=64, sink_mode="true")},
        "type_k=q8_0": {"type_k": 8},
        "v_transposed=1": {"lminf": LMInfConfig(n_global=4, n_local=64, attention="stock")},
        "another model": {"model": nano_path},
        "RoPE": {"rope_freq_base": 20000.0},
    }
    for message, settings in others.items():
        other = make_llama(**settings)
        other.eval(tokens[:50])
        with pytest.raises(CheckpointError, match=message):
            llm.restore(other.checkpoint())
        assert llm.stream_info().position == 300
        np.testing.assert_array_equal(llm.scores[-1], expected)


def test_other_batches_and_slack_are_not_refused(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens[:500])
    checkpoint = llm.checkpoint()
    expected = next_logits(llm, 99)
    other = make_llama(n_batch=256, n_ubatch=128, lminf=LMInfConfig(n_global=4, n_local=64, n_slack=100))
    other.restore(checkpoint)
    np.testing.assert_allclose(next_logits(other, 99), expected, atol=1e-3)


def test_a_state_the_library_refuses_leaves_the_stream_as_it_was(
    make_llama: MakeLlama, tokens: Tokens, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = make_llama()
    llm.eval(tokens[:300])
    good = llm.checkpoint()
    expected = next_logits(llm, 99)
    rng = np.random.default_rng(0)
    for n_bytes in (0, 10, 100, len(good.state) // 2, len(good.state) - 1):
        with pytest.raises(CheckpointError, match="cannot be restored"):
            llm.restore(replace(good, state=good.state[:n_bytes].copy()))
        assert llm.stream_info().position == llm.n_tokens == 301
    for _ in range(20):
        state = good.state.copy()
        state[rng.integers(0, 200, size=4)] ^= rng.integers(1, 256, size=4).astype(np.uint8)
        try:
            llm.restore(replace(good, state=state))
        except CheckpointError:
            assert llm.n_tokens == 301
        else:
            llm.n_tokens = llm.n_tokens  # usable
            llm.restore(good)
            llm.eval([99])
    llm.n_tokens = 300
    np.testing.assert_allclose(next_logits(llm, 99), expected, atol=1e-4)
    assert capfd.readouterr().err == ""


def test_a_position_that_does_not_match_is_refused(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens[:100])
    with pytest.raises(CheckpointError, match="cannot be restored"):
        llm.restore(replace(llm.checkpoint(), position=99))
    assert llm.stream_info().position == 100


def test_reach() -> None:
    checkpoint = replace(small(), log=TokenLog(range(100)), n_rollback=10)

    def reach(prompt: Any) -> int:
        return checkpoint.reach(TokenLog(prompt))

    prompt = np.arange(200, dtype=np.int32)
    assert reach(prompt) == 100
    assert reach(prompt[:100]) == 99  # the last token gives the logits
    assert reach(prompt[:91]) == 90
    assert reach(prompt[:90]) == 0  # further back than n_rollback
    prompt[95] = -1
    assert reach(prompt) == 95
    assert reach(prompt[:0]) == 0


def test_model_digest_sees_any_part_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    data = bytearray(os.urandom(3 << 20))
    path.write_bytes(data)
    first = model_digest(path, {"a": 1})
    assert model_digest(path, {"a": 1}) == first != model_digest(path, {"a": 2})
    for at in (0, 1 << 19, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert model_digest(path, {"a": 1}) != first
    path.write_bytes(data + b"x")
    assert model_digest(path, {"a": 1}) != first


def test_the_format(tmp_path: Path) -> None:
    """The layout other programs may rely on, field by field."""
    data = small().to_bytes()
    assert data[:8] == b"LMINFCKP"
    assert struct.unpack_from("<II", data, 8) == (6, 3)
    assert data[16:48] == b"m" * 32
    assert struct.unpack_from("<11i", data, 48) == (4, 64, 64, 0, 1, 1, 0, 0, 0, 0, 0)
    assert struct.unpack_from("<qqQ", data, 92) == (519, 4, 512)
    assert data[116:132] == BASE
    assert struct.unpack_from("<QQQQ", data, 132) == (5, 9, 2 * 16 + 3, 0)
    assert HEADER_BYTES == 164 + 32
    assert struct.unpack_from("<5i", data, HEADER_BYTES) == (0, 1, 2, 3, 4)
    assert data[HEADER_BYTES + 20 : HEADER_BYTES + 29] == bytes(range(9))
    assert struct.unpack_from("<qQ3sqQ", data, HEADER_BYTES + 29) == (515, 3, b"\x07\x08\x09", 517, 0)


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (8, struct.pack("<I", 3), "has format 3, this version of lminf_edge reads 6"),
        (92, struct.pack("<q", -1), "numbers of tokens make no sense"),
        (100, struct.pack("<q", -1), "numbers of tokens make no sense"),
        (100, struct.pack("<q", 520), "numbers of tokens make no sense"),
        (108, struct.pack("<Q", 511), "numbers of tokens make no sense"),
        (132, struct.pack("<Q", 6), "cut short or damaged"),
        (132, struct.pack("<Q", 1 << 63), "cut short or damaged"),
        (148, struct.pack("<Q", 34), "cut short or damaged"),
        (156, struct.pack("<Q", 1), "cut short or damaged"),
        (148, struct.pack("<QQ", 34, 1), "earlier states make no sense"),
        (148, struct.pack("<QQ", 0, 35), "its archive makes no sense"),
        (HEADER_BYTES + 29, struct.pack("<q", 519), "earlier states make no sense"),
        (HEADER_BYTES + 29, struct.pack("<q", 517), "earlier states make no sense"),
        (HEADER_BYTES + 29, struct.pack("<q", 0), "earlier states make no sense"),
        (HEADER_BYTES + 37, struct.pack("<Q", 2), "earlier states make no sense"),
        (HEADER_BYTES + 37, struct.pack("<Q", 1 << 63), "earlier states make no sense"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(tmp_path: Path, at: int, value: bytes, what: str) -> None:
    data = small().to_bytes()
    changed = data[:at] + value + data[at + len(value) :]
    digest = hashlib.sha256(changed[: HEADER_BYTES - 32] + changed[HEADER_BYTES:]).digest()  # one that fits
    changed = changed[: HEADER_BYTES - 32] + digest + changed[HEADER_BYTES:]
    (tmp_path / "a.ckpt").write_bytes(changed)
    for read in (lambda: Checkpoint.from_bytes(changed), lambda: Checkpoint.load(tmp_path / "a.ckpt")):
        with pytest.raises(CheckpointError, match=what):
            read()
