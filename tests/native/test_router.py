"""Granite Switch: which adapter is on follows from all of a stream, however far back its token is.

test_reference_kinds.py compares it with float64; here is what moves a stream to another place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from native_context import Q8_0, NativeContext, last_error
from reference import kinds, random_model, tiny_models
from reference.random_model import ATTENTION, GATED, N_EMBD
from reference.rule import Rule
from reference.switched import Switched
from reference.tiny_models import Keys
from test_text_only import decode_embeddings

L, G = 32, 4
FIRST, SECOND, THIRD = kinds.KINDS["graniteswitch"].model.keys["adapters.token_ids_activate"]  # type: ignore[misc]
NEAR = 1e-4  # two orders of additions; another adapter changes logits by 1 and more

Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    return random_model.write("graniteswitch", kinds.KINDS["graniteswitch"].model, folder, seed=1)


def text(*adapters: tuple[int, int], n_tokens: int = 400) -> npt.NDArray[np.int32]:
    """Without tokens of adapters but for these: (place, token)."""
    tokens = tiny_models.tokens(n_tokens, seed=5)
    tokens[np.isin(tokens, (FIRST, SECOND, THIRD))] = 7
    for place, token in adapters:
        tokens[place] = token
    return tokens


def fresh(path: Path, tokens: npt.NDArray[np.int32], n: int) -> Logits:
    """The last n logits of a stream that has read nothing else."""
    with NativeContext(path, L, G, n_ubatch=16) as context:
        return context.feed(tokens)[-n:]


def check(actual: Logits, expected: Logits, other: Logits) -> None:
    """other: what another adapter gives."""
    assert np.abs(actual - expected).max() < NEAR
    assert np.abs(other - expected).max() > 1


def test_an_adapter_stays_on_when_its_token_has_left(path: Path) -> None:
    tokens, without = text((20, SECOND)), text()
    assert set(np.flatnonzero(tokens != without)) == {20}
    check(fresh(path, tokens, 10), fresh(path, tokens, 20)[10:], fresh(path, without, 10))


@pytest.mark.parametrize("n_back", [1, 30, 60])
def test_what_is_taken_back_turns_nothing_on(path: Path, n_back: int) -> None:
    tokens = text((20, FIRST), (400 - n_back, THIRD))
    after = text(n_tokens=30)
    kept = tokens[: 400 - n_back]
    with NativeContext(path, L, G, n_ubatch=16, n_slack=64) as context:
        context.feed(tokens)
        assert context.rollback(400 - n_back)
        found = context.feed(after)
    check(found, fresh(path, np.concatenate([kept, after]), 30), fresh(path, np.concatenate([tokens, after]), 30))


@pytest.mark.parametrize("n_read", [300, 3000])
def test_copies_and_states_have_the_adapter(path: Path, n_read: int) -> None:
    tokens = text((10, SECOND), n_tokens=n_read)
    after = text(n_tokens=30)
    with NativeContext(path, L, G, n_ubatch=16, n_seq_max=3) as context:
        context.feed(tokens, 0)
        state = context.save(0)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        assert context.load(state, 2)
        expected = context.feed(after, 0)
        for s in (1, 2):
            assert np.abs(context.feed(after, s) - expected).max() < NEAR
        context.rollback(0, 1)
        off = context.feed(after, 1)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        assert context.load(state)
        check(context.feed(after), expected, off)


@pytest.mark.parametrize("place", [10, 100, 299])
def test_a_skip_turns_on_what_its_tokens_do(path: Path, place: int) -> None:
    """Which tokens they are, is told or not; what was read before it and after it is not forgotten in either case."""
    tokens, after = text((5, FIRST), (place, THIRD), n_tokens=300), text(n_tokens=80)
    ends = []
    for adapters in (tokens, text((5, FIRST), n_tokens=300)):
        with NativeContext(path, L, G, n_ubatch=16) as context:
            context.feed(adapters[:8])
            assert context.skip_tokens(adapters[8:])
            state = context.save()
            ends.append(context.feed(after))
            context.rollback(0)
            assert context.load(state)
            assert np.abs(context.feed(after) - ends[-1]).max() < NEAR
    with NativeContext(path, L, G, n_ubatch=16) as context:
        context.feed(tokens[:8])
        assert context.skip(292)
        assert np.abs(context.feed(after) - ends[1]).max() < NEAR
    model, read = Switched(path), np.concatenate([tokens[:8], after])
    positions = np.concatenate([np.arange(8), np.arange(300, 380)])
    off = model.logits(read, Rule(L, G), positions=positions)[8:].astype(np.float32)
    numbers, route = model.numbers(np.concatenate([tokens, after])), model.route
    model.route = lambda _: route(numbers)[positions]  # type: ignore[method-assign]
    on = model.logits(read, Rule(L, G), positions=positions)[8:].astype(np.float32)
    check(ends[0], on, off)
    check(ends[1], off, on)


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 32, as a block of q8_0 has."""
    small = kinds.KINDS["graniteswitch"].model
    heads: Keys = {"attention.head_count": 2, "attention.head_count_kv": 2}
    wide = ATTENTION | GATED | {"attn_k.weight": (N_EMBD, N_EMBD), "attn_v.weight": (N_EMBD, N_EMBD)}
    model = replace(small, keys=small.keys | heads, blocks=(kinds.with_adapters(wide),) * 2)
    return random_model.write("wide", model, tmp_path_factory.mktemp("wide"), seed=1)


def test_several_adapters_are_a_mean_in_a_quantized_cache_too(quantizable: Path) -> None:
    """As llama.cpp does it, whose own cache in q8_0 has the mean of rounded numbers."""
    tokens = text((20, FIRST), (60, THIRD), (61, THIRD), (62, SECOND), (63, FIRST), n_tokens=200)
    model = Switched(quantizable)
    expected = model.logits(tokens, Rule(L, G))
    assert model.adapters[[19, 20, 60, 61, 62, 63]].tolist() == [0, 1, 2, 2, 2, 2]
    for options, limit in (({}, NEAR), ({"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}, 0.5)):
        with NativeContext(quantizable, L, G, n_ubatch=16, **options) as context:  # type: ignore[arg-type]
            assert np.abs(context.feed(tokens) - expected).max() < limit


# what is recalled depends on where micro-batches begin: places to go back to are multiples of 16
# where recalled tokens stand where sinks do, states without recall fit
RECALL = {"n_recall": 16, "recall_distance": L, "archive_type_k": 0, "archive_type_v": 0}


def test_a_window_made_anew_has_the_adapter_of_its_place(path: Path) -> None:
    tokens = text((20, SECOND), (250, THIRD), (251, THIRD), (252, THIRD), n_tokens=600)
    after = text(n_tokens=30)
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        context.feed(tokens)
        assert context.info().n_rollback < 392 <= context.info().n_rebuild
        assert context.rollback(208)
        found = context.feed(after)
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        context.feed(tokens[:208])
        expected = context.feed(after)
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        context.feed(tokens)
        other = context.feed(after)
    check(found, expected, other)


def test_it_is_not_made_anew_where_nobody_knows_the_adapter(path: Path) -> None:
    """A state says what was on as far back as its own context could go, an archive of another one may go further."""
    tokens = text((20, SECOND), (255, THIRD), n_tokens=600)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        context.feed(tokens)
        state = context.save()
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        context.feed(tokens)
        archive, far = context.archive(), context.info().n_rebuild
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        assert context.load(state)
        assert context.set_archive(archive)
        context.free_archive(archive)
        assert context.info().n_rebuild == 600 - 256 < far
        assert not context.rollback(255)
        assert context.rollback(256)
        found = context.feed(text(n_tokens=30))
    with NativeContext(path, L, G, n_ubatch=16, **RECALL) as context:
        context.feed(tokens[:256])
        assert np.abs(context.feed(text(n_tokens=30)) - found).max() < NEAR


def test_embeddings_are_refused_and_nothing_is_lost(path: Path) -> None:
    tokens = text((20, SECOND))
    rows = np.zeros((4, N_EMBD), dtype=np.float32)
    with NativeContext(path, L, G, n_ubatch=16) as context:
        first = context.feed(tokens[:160])
        place = context.next_pos(0, 4)
        assert decode_embeddings(context, rows, list(range(place, place + 4))) != 0
        assert "give it tokens, not embeddings" in last_error()
        np.testing.assert_array_equal(np.concatenate([first, context.feed(tokens[160:])]), fresh(path, tokens, 400))
