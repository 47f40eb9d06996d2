"""What a saved state can recall: as the stream could, in this process; elsewhere nothing, and that is said."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import F32, MakeLlama

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cache.token_log import Tokens

N_TOKENS = 2500  # two full segments and a part of one
NOTHING = "Nothing from before this state can be recalled"


def window(**recall: Any) -> LMInfConfig:
    return LMInfConfig(**{"n_global": 4, "n_local": 64, "n_recall": 16, "n_checkpoints": 0, **recall})


def follow(llm: Llama, tokens: Tokens) -> Any:
    """The logits of the tokens that follow, read in parts and one by one."""
    rows = []
    for part in (tokens[:60], tokens[60:61], tokens[61:62], tokens[62:180]):
        llm.eval(part)
        rows.append(llm.scores[-1].copy())
    return np.stack(rows)


def nothing_recalled(is_said: bool) -> contextlib.AbstractContextManager[Any]:
    """Whether nothing can be recalled, and a warning says so."""
    return pytest.warns(RuntimeWarning, match=NOTHING) if is_said else contextlib.nullcontext()


def load(llm: Llama, state: llama_cpp.LlamaState) -> None:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.load_state(state)


def in_use(llm: Llama) -> int:
    """Bytes of memory of all archives of this process."""
    gc.collect()
    archive = llm.checkpoint().archive
    assert archive is not None
    return archive.n_bytes_all()


@pytest.fixture(params=["memory", "files"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> LMInfConfig:
    return window(archive=tmp_path / "archive") if request.param == "files" else window()


@pytest.mark.parametrize("n_tokens", [40, 1024, N_TOKENS])
def test_it_recalls_as_the_stream_did(
    make_llama: MakeLlama, tokens: Tokens, config: LMInfConfig, n_tokens: int
) -> None:
    llm = make_llama(lminf=config, **F32)
    llm.eval(tokens[:n_tokens])
    state = llm.save_state()
    went_on = follow(llm, tokens)
    load(llm, state)
    expected = follow(llm, tokens)
    np.testing.assert_allclose(expected, went_on, atol=1e-4)  # other cells are used, so sums have another order
    for others in (tokens[::-1][:1500], tokens[700:1000]):  # in a longer stream, and in another one
        llm.eval(others)
        load(llm, state)
        info = llm.stream_info()
        assert (info.position, info.archived, info.forgotten) == (n_tokens, n_tokens, 0)
        np.testing.assert_array_equal(follow(llm, tokens), expected)
        llm.reset()
    with nothing_recalled(True):
        llm.load_state(pickle.loads(pickle.dumps(state)))
    assert np.abs(follow(llm, tokens) - expected).max() > 0.01


def test_branches_from_one_state(make_llama: MakeLlama, tokens: Tokens) -> None:
    """What one of them writes into a segment that both began with, the other does not read."""
    llm = make_llama(lminf=window(recall_every=4))
    llm.eval(tokens[:1500])
    state = llm.save_state()
    one, two = tokens[::-1][:700], tokens[2000:2900]
    expected = []
    for branch in (one, two, one, two):
        load(llm, state)
        llm.eval(branch)
        expected.append(follow(llm, tokens))
    np.testing.assert_array_equal(expected[2], expected[0])
    np.testing.assert_array_equal(expected[3], expected[1])
    assert np.abs(expected[0] - expected[1]).max() > 1
    load(llm, state)
    llm.eval(one)
    later = llm.save_state()
    del state
    llm.eval(two)
    load(llm, later)
    np.testing.assert_array_equal(follow(llm, tokens), expected[0])


def test_memory_is_shared_and_freed(make_llama: MakeLlama, tokens: Tokens, config: LMInfConfig) -> None:
    llm = make_llama(lminf=config)
    segment = llm.scheduler.model.parts.archive_token_bytes * 1024
    empty = in_use(llm)
    llm.eval(tokens[:2500])
    read = in_use(llm)
    states = [llm.save_state() for _ in range(20)]
    assert in_use(llm) == read
    assert [state.llama_state_size for state in states] == [len(states[0].llama_state)] * 20
    llm.eval(tokens[:100])
    assert in_use(llm) == read  # behind what the states read
    llm.reset()
    assert in_use(llm) - empty == read - empty >= segment
    del states
    assert in_use(llm) == empty


def test_states_give_way_to_streams_and_that_is_said(make_llama: MakeLlama, tokens: Tokens) -> None:
    """The oldest first: else a stream whose segments they share could not free any, and would forget nearly all."""
    probe = make_llama(lminf=window())
    segment, before = probe.scheduler.model.parts.archive_token_bytes * 1024, in_use(probe)
    llm = make_llama(lminf=window(archive_memory=before + 4 * segment + 1000))
    llm.eval(tokens[:1200])
    first = llm.save_state()
    llm.reset()
    llm.eval(tokens[::-1][:900])
    second = llm.save_state()
    load(llm, second)
    for _ in range(4):
        llm.eval(tokens[:1000])
    info = llm.stream_info()
    assert info.archived + info.forgotten == info.position == 4900
    assert info.archived > 2048
    assert info.archive_bytes <= 4 * segment
    assert first.archive is second.archive is None
    with pytest.warns(RuntimeWarning, match=f"{NOTHING}: its archive gave way"):
        llm.load_state(first)
    assert (llm.n_tokens, llm.stream_info().archived) == (1200, 0)


def test_another_llama_of_this_process_recalls_it(make_llama: MakeLlama, tokens: Tokens, config: LMInfConfig) -> None:
    llm = make_llama(lminf=config)
    llm.eval(tokens[:N_TOKENS])
    state = llm.save_state()
    load(llm, state)
    expected = follow(llm, tokens)
    llm.close()
    other = make_llama(lminf=window())
    load(other, state)
    np.testing.assert_array_equal(follow(other, tokens), expected)
    coarse = make_llama(lminf=window(archive_type_k="q4_0"))
    with pytest.warns(RuntimeWarning, match=f"{NOTHING}: its archive has other types than this stream's"):
        coarse.load_state(state)
    assert (coarse.n_tokens, coarse.stream_info().archived) == (N_TOKENS, 0)
    segment = other.scheduler.model.parts.archive_token_bytes * 1024
    small = make_llama(lminf=window(archive_memory=in_use(other) + segment))
    with pytest.warns(RuntimeWarning, match=f"{NOTHING}: archive_memory has no room for a copy"):
        small.load_state(state)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copy_is_llama_cpps_alone_and_that_is_said(make_llama: MakeLlama, tokens: Tokens, how: Any) -> None:
    llm = make_llama(lminf=window())
    llm.eval(tokens[:300])
    state = how(llm.save_state())
    assert type(state) is llama_cpp.LlamaState
    llm.reset()
    with pytest.warns(RuntimeWarning, match=f"{NOTHING}: only in the process that saved it") as told:
        llm.load_state(state)
    assert [Path(each.filename).name for each in told] == [Path(__file__).name]
    info = llm.stream_info()
    assert (info.position, info.archived, info.forgotten) == (300, 0, 300)
    load(llm, llm.save_state())  # all that the stream could recall, which was nothing
    llm.reset()
    load(llm, llm.save_state())


def test_without_recall_it_is_llama_cpps(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    llm.eval(tokens[:300])
    state = llm.save_state()
    assert type(state) is llama_cpp.LlamaState
    llm.reset()
    load(llm, state)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_caches(make_llama: MakeLlama, tokens: Tokens, tmp_path: Path, kind: str) -> None:
    """From llama_cpp's cache in memory a conversation comes back with what it can recall."""
    llm = make_llama(lminf=window())
    llm.set_cache(llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path)))
    one, two = tokens[:1300].tolist(), tokens[::-1][:1300].tolist()
    for prompt in (one, two):
        llm.create_completion(prompt, max_tokens=4, temperature=0.0)
    with nothing_recalled(kind == "disk"):
        llm.create_completion([*one, 5, 6, 7], max_tokens=4, temperature=0.0)
    info = llm.stream_info()
    assert info.position == 1306
    assert info.archived == (1306 if kind == "ram" else 1306 - 1300)
