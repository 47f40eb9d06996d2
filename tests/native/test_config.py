"""What LMInfConfig refuses and how the open parameters are filled in."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from lminf_edge import LMInfConfig, native
from lminf_edge.config import (
    MAX_RECALL,
    MAX_WINDOW,
    RECALL_PARAMETERS,
    Window,
    check_kv_type,
    check_memory,
    physical_memory,
    resolve,
    warn_of_window,
)
from lminf_edge.native import Params


@pytest.mark.parametrize(
    ("config", "n_ctx", "n_ctx_train", "expected"),  # expected: n_global, n_local, max_distance
    [
        (LMInfConfig(), None, 131072, (10, 4086, 4086)),
        (LMInfConfig(), None, 512, (10, 502, 502)),
        (LMInfConfig(), 256, 512, (10, 246, 246)),
        (LMInfConfig(), 0, 512, (10, 502, 502)),
        (LMInfConfig(n_local=100), None, 512, (10, 100, 100)),
        (LMInfConfig(n_local=100), 110, 512, (10, 100, 100)),
        (LMInfConfig(n_global=0), 64, 512, (0, 64, 64)),
        (LMInfConfig(n_global=50, n_local=8), None, 512, (50, 8, 8)),
        (LMInfConfig(n_local=100, max_distance=7), None, 512, (10, 100, 7)),
    ],
)
def test_resolve(config: LMInfConfig, n_ctx: int | None, n_ctx_train: int, expected: tuple[int, int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window = resolve(config, n_ctx, n_ctx_train)
    assert (window.n_global, window.n_local, window.max_distance) == expected
    assert window.size == window.n_global + window.n_local
    assert window.n_slack == 64


def test_the_default_window_never_exceeds_the_training_length() -> None:
    for n_ctx_train in (64, 512, 4096, 131072):
        assert resolve(LMInfConfig(), None, n_ctx_train).size == min(4096, n_ctx_train)


@pytest.mark.parametrize(
    ("n_ctx_train", "n_swa", "message"),
    [
        (512, 0, "513 tokens is longer than the 512 this model was trained on: .* a smaller n_ctx"),
        (1024, 1000, "513 tokens is shorter than the sliding window of 1000 .* a larger n_ctx"),
    ],
)
def test_a_window_too_long_or_too_short_warns_in_one_sentence(n_ctx_train: int, n_swa: int, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        warn_of_window(resolve(LMInfConfig(), 513, n_ctx_train), n_ctx_train, n_swa, "n_ctx")
    assert len(caught) == 1


def test_a_window_in_between_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_window(resolve(LMInfConfig(), 513, 513), 513, 513)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_global": -1}, "n_global must be 0 or more"),
        ({"n_local": 0}, "n_local must be 1 or more"),
        ({"n_local": -5}, "n_local must be 1 or more"),
        ({"max_distance": 0}, "max_distance must be 1 or more"),
        ({"n_slack": -1}, "n_slack must be 0 or more"),
        ({"n_checkpoints": -1}, "n_checkpoints must be 0 or more"),
        ({"pos_bound": -1}, "pos_bound must be 0 or more"),
        ({"n_local": 4.5}, "n_local must be a whole number"),
        ({"n_global": True}, "n_global must be a whole number"),
        ({"n_local": MAX_WINDOW + 1}, "or less"),
        ({"sink_mode": "none"}, "sink_mode must be one of ceiling, order, true"),
        ({"attention": "flash"}, "attention must be one of auto, fused, stock"),
        ({"n_recall": -1}, "n_recall must be 0 or more"),
        ({"n_recall": MAX_RECALL + 1}, f"n_recall must be at most {MAX_RECALL}, not {MAX_RECALL + 1}"),
        ({"n_recall": True}, "n_recall must be a whole number"),
        ({"recall_distance": 0}, "recall_distance must be 1 or more"),
        ({"recall_from": -1}, "recall_from must be 0 or more"),
        ({"recall_every": 0}, "recall_every must be 1 or more"),
        ({"recall_rule": "head"}, "recall_rule must be one of layer, paper"),
        ({"recall_index": "block"}, "recall_index must be one of sketch, exact"),
        ({"n_archive": 0}, "n_archive must be 1 or more"),
        ({"archive_type_k": "q4_1"}, "archive_type_k must be one of f32, f16, q8_0, q4_0"),
        ({"archive_type_v": 8}, "archive_type_v must be one of f32, f16, q8_0, q4_0"),
        ({"n_recall": 1, "sink_mode": "order"}, "n_recall=1 needs sink_mode 'ceiling', not 'order'"),
        ({"n_recall": 1, "recall_rule": "paper", "attention": "fused"}, "'paper' needs attention 'stock'"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LMInfConfig(**settings)
    assert_one_sentence(caught.value)


RECALL = {
    "n_recall": 7,
    "recall_distance": 500,
    "recall_from": 2,
    "recall_every": 3,
    "recall_rule": "paper",
    "recall_index": "exact",
    "n_archive": 1000,
    "archive_type_k": "f16",
    "archive_type_v": "q4_0",
}


def test_recall_reaches_the_library_field_by_field() -> None:
    window = resolve(LMInfConfig(n_local=100, **RECALL), None, 512)  # type: ignore[arg-type]
    assert window.recall_settings() == RECALL
    params = Params.of(window, n_seq_max=1)
    numbers = {"recall_rule": 1, "recall_index": 1, "archive_type_k": 1, "archive_type_v": 2}
    assert {name: getattr(params, name) for name in RECALL_PARAMETERS} == {**RECALL, **numbers}


def test_without_recall_parameters_are_the_librarys() -> None:
    window = resolve(LMInfConfig(n_local=100), None, 512)
    params, plain = Params.of(window, n_seq_max=0), native.load().default_params()
    names = [name for name in RECALL_PARAMETERS if name != "recall_distance"]
    assert [getattr(params, name) for name in names] == [getattr(plain, name) for name in names]
    assert (plain.recall_distance, window.recall_distance) == (0, 50)  # the library's is half of max_distance, too


@pytest.mark.parametrize(
    ("settings", "distance"), [({}, 50), ({"max_distance": 500}, 250), ({"recall_distance": 7}, 7)]
)
def test_where_recalled_tokens_stand(settings: dict[str, int], distance: int) -> None:
    window = resolve(LMInfConfig(n_local=100, n_recall=5, **settings), None, 512)  # type: ignore[arg-type]
    assert window.recall_distance == distance


@pytest.mark.parametrize(
    ("config", "n_ctx", "message"),
    [
        (LMInfConfig(), 10, "leaves no room beside n_global=10"),
        (LMInfConfig(n_global=600), None, "leaves no room"),
        (LMInfConfig(n_local=100), 100, "n_ctx=100 is not n_global"),
        (LMInfConfig(), -1, "n_ctx must be 0 or more"),
    ],
)
def test_contradictions(config: LMInfConfig, n_ctx: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(config, n_ctx, 512)
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(("size", "n_ubatch"), [(1, 64), (68, 64), (256, 64), (260, 128), (512, 128), (4096, 512)])
def test_default_ubatch_is_a_quarter_of_the_window(size: int, n_ubatch: int) -> None:
    window = Window(0, size, size, 64, "ceiling", 0, "auto")
    assert window.default_ubatch(on_gpu=True) == n_ubatch
    assert window.default_ubatch() == min(n_ubatch, 128)
    assert replace(window, n_recall=32).default_ubatch() == min(n_ubatch, 256)


def test_kv_types() -> None:
    assert check_kv_type("type_k", None) == 1
    assert check_kv_type("type_k", 8) == 8
    with pytest.raises(ValueError, match="type_v=999 is not a GGML type for a KV cache"):
        check_kv_type("type_v", 999)


def test_a_cache_larger_than_memory_is_refused() -> None:
    total = physical_memory()
    if total is None:
        pytest.skip("this system does not tell its memory")
    check_memory(total)
    with pytest.raises(MemoryError, match=f"{total + 1:,} bytes"):
        check_memory(total + 1)


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.endswith(".")
    assert ". " not in text
    assert "\n" not in text
