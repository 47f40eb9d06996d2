"""The numpy reference against llama.cpp's own attention, and its blocks against the rule written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from conftest import SHARED
from reference import gguf_file, tiny_models
from reference.gguf_file import Array
from reference.rule import Rope, Rule, attend
from reference.transformer import Transformer, nll_from_logits

# ggml reads GELU from a table in f16: a rounding that goes the other way is visible
GELU = {"gptneox", "phi2", "mpt", "grok"}

Table = list[list[int | None]]

# Tables of distances for 8 queries and keys: a row per query, a column per key j <= i, None for "not attended".
N = None
WINDOW_3: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [N, 2, 1, 0],
    [N, N, 2, 1, 0],
    [N, N, N, 2, 1, 0],
    [N, N, N, N, 2, 1, 0],
    [N, N, N, N, N, 2, 1, 0],
]
CEILING_3_2: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [3, 3, 2, 1, 0],
    [3, 3, N, 2, 1, 0],
    [3, 3, N, N, 2, 1, 0],
    [3, 3, N, N, N, 2, 1, 0],
]
CEILING_3_2_AT_7: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [7, 2, 1, 0],
    [7, 7, 2, 1, 0],
    [7, 7, N, 2, 1, 0],
    [7, 7, N, N, 2, 1, 0],
    [7, 7, N, N, N, 2, 1, 0],
]
ORDER_3_2: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [4, 3, 2, 1, 0],
    [4, 3, N, 2, 1, 0],
    [4, 3, N, N, 2, 1, 0],
    [4, 3, N, N, N, 2, 1, 0],
]
TRUE_3_2: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [3, 2, 1, 0],
    [4, 3, 2, 1, 0],
    [5, 4, N, 2, 1, 0],
    [6, 5, N, N, 2, 1, 0],
    [7, 6, N, N, N, 2, 1, 0],
]
CEILING_1_1: Table = [
    [0],
    [1, 0],
    [1, N, 0],
    [1, N, N, 0],
    [1, N, N, N, 0],
    [1, N, N, N, N, 0],
    [1, N, N, N, N, N, 0],
    [1, N, N, N, N, N, N, 0],
]
CEILING_2_5: Table = [
    [0],
    [1, 0],
    [2, 1, 0],
    [2, 2, 1, 0],
    [2, 2, 2, 1, 0],
    [2, 2, 2, 2, 1, 0],
    [2, 2, 2, 2, 2, 1, 0],
    [2, 2, 2, 2, 2, N, 1, 0],
]
FULL: Table = [list(range(i, -1, -1)) for i in range(8)]

TABLES = [
    pytest.param(Rule(), FULL, id="full"),
    pytest.param(Rule(8, 3), FULL, id="window-not-left"),
    pytest.param(Rule(3), WINDOW_3, id="no-sinks"),
    pytest.param(Rule(3, 2), CEILING_3_2, id="ceiling"),
    pytest.param(Rule(3, 2, 7), CEILING_3_2_AT_7, id="ceiling-beyond-window"),
    pytest.param(Rule(3, 2, mode="order"), ORDER_3_2, id="order"),
    pytest.param(Rule(3, 2, mode="true"), TRUE_3_2, id="true"),
    pytest.param(Rule(1, 1), CEILING_1_1, id="window-of-one"),
    pytest.param(Rule(2, 5), CEILING_2_5, id="more-sinks-than-window"),
]


POLICY = {"ceiling": "lminf", "order": "sinks", "true": "sinks-uncapped"}


def as_array(table: Table) -> oracle.Table:
    """As the oracle has it: every row as long as the last."""
    unseen = oracle.UNSEEN
    filled = [[unseen if d is None else d for d in row] + [unseen] * (len(table) - len(row)) for row in table]
    return np.array(filled)


def attend_by_table(q: Array, k: Array, v: Array, table: Table, rope: Rope, slopes: Array) -> Array:
    """The oracle's attention. Shapes as for attend."""
    n_rot = 2 * len(rope.frequencies)
    pairs = np.arange(n_rot) if rope.adjacent else np.arange(n_rot).reshape(2, -1).T.ravel()
    order = np.concatenate([pairs, np.arange(n_rot, q.shape[2])])
    magnitude = np.where(np.arange(q.shape[2]) < n_rot, rope.magnitude, 1.0)
    frequencies = np.zeros(q.shape[2] // 2)
    frequencies[: len(rope.frequencies)] = rope.frequencies
    q, k = ((x * magnitude)[..., order] for x in (q, k))
    return oracle.attend(q, k, v, as_array(table), frequencies, slopes)


@pytest.mark.parametrize(("rule", "table"), TABLES)
def test_the_oracle_makes_the_same_table(rule: Rule, table: Table) -> None:
    if rule.n_local is None:
        made = oracle.distances(len(table), "full")
    else:
        ceiling = rule.max_distance or 0
        made = oracle.distances(len(table), POLICY[rule.mode], rule.n_global, rule.n_local, ceiling)
    np.testing.assert_array_equal(made, as_array(table))


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("encoding", ["adjacent", "halves", "alibi"])
@pytest.mark.parametrize(("rule", "table"), TABLES)
def test_blocks_follow_the_table(rule: Rule, table: Table, encoding: str, block: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(8, heads, 6)) for heads in (4, 2, 2))
    slopes = np.array([0.5, 0.25, 0.125, 0.0625]) * (encoding == "alibi")
    # two pairs turn, the last two dimensions of a head do not
    frequencies = np.zeros(0) if encoding == "alibi" else np.array([1.0, 0.3])
    rope = Rope(frequencies, adjacent=encoding == "adjacent", magnitude=1.1)
    blocked = attend(q, k, v, rule, rope, slopes, lambda dots: dots / math.sqrt(6), block)
    np.testing.assert_allclose(blocked, attend_by_table(q, k, v, table, rope, slopes), atol=1e-12)


def test_a_rule_without_window_has_no_sinks_apart() -> None:
    with pytest.raises(ValueError, match="window"):
        Rule().sink_positions(np.arange(2), np.arange(1))


def stock_deviation(path: Path, tokens: npt.NDArray[np.int32], n_ctx: int = 256) -> float:
    """Largest difference in nats between the likelihoods of the reference and of llama.cpp."""
    # not before a test wants it: importing it loads the native library
    from reference import stock

    expected = nll_from_logits(stock.logits(path, tokens, n_ctx)[:-1], tokens[1:])
    return float(np.abs(Transformer(path).token_nll(tokens, n_ctx=n_ctx) - expected).max())


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_full_attention_is_that_of_llama_cpp(name: str, tmp_path: Path) -> None:
    path = tiny_models.write(name, tmp_path)
    assert stock_deviation(path, tiny_models.tokens(120)) < (5e-4 if name in GELU else 1e-4)


def test_long_rope_factors_follow_the_context(tmp_path: Path) -> None:
    path = tiny_models.write("phi3", tmp_path)
    tokens = tiny_models.tokens(120)
    assert stock_deviation(path, tokens, n_ctx=512) < 1e-4
    model = Transformer(path)
    short, long = model.rope(256, Rule()).frequencies, model.rope(512, Rule()).frequencies
    assert not np.allclose(short, long)
    # with a window the stream's length no longer matters, but the ceiling does
    np.testing.assert_array_equal(model.rope(512, Rule(256)).frequencies, short)
    np.testing.assert_array_equal(model.rope(256, Rule(257)).frequencies, long)
    np.testing.assert_array_equal(model.rope(256, Rule(256, 4, 257)).frequencies, long)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_a_wrong_distance_shows(name: str, tmp_path: Path) -> None:
    model = Transformer(tiny_models.write(name, tmp_path))
    tokens = tiny_models.tokens(120)
    right = model.token_nll(tokens, Rule(32, 4))
    for wrong in (Rule(32, 4, 33), Rule(33, 4, 32), Rule(32, 5), Rule(32, 4, mode="order"), Rule(32, 4, mode="true")):
        assert np.abs(right - model.token_nll(tokens, wrong)).max() > 1e-2


def test_nll_is_that_of_the_logits(tmp_path: Path) -> None:
    model = Transformer(tiny_models.write("llama", tmp_path))
    tokens = tiny_models.tokens(600)
    rule = Rule(64, 4)
    logits = model.logits(tokens, rule)
    assert logits.shape == (600, tiny_models.N_VOCAB)
    np.testing.assert_allclose(model.token_nll(tokens, rule), nll_from_logits(logits[:-1], tokens[1:]), atol=1e-10)


def test_models_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first = tiny_models.write("llama", tmp_path).read_bytes()
    assert tiny_models.write("llama", tmp_path).read_bytes() == first
    assert tiny_models.write("llama", tmp_path, seed=1).read_bytes() != first


def test_a_copy_as_f32_is_the_same_model(tmp_path: Path) -> None:
    path = tiny_models.write("llama", tmp_path)
    copy = tmp_path / "copy.gguf"
    gguf_file.copy_as_f32(path, copy)
    read, copied = gguf_file.read(path), gguf_file.read(copy)
    assert {k: v for k, v in copied.metadata.items() if not k.startswith("GGUF.")} == {
        k: v for k, v in read.metadata.items() if not k.startswith("GGUF.")
    }
    for name, tensor in read.tensors.items():
        np.testing.assert_array_equal(copied.tensors[name], tensor)


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    path = tiny_models.write("llama", tmp_path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"klama"))
    with pytest.raises(ValueError, match="klama"):
        Transformer(path)


def test_a_trained_model_is_that_of_llama_cpp() -> None:
    path = SHARED / "models" / "stories260K.gguf"
    if not path.is_file():
        pytest.skip("stories260K.gguf is not there (see LMINF_SHARED)")
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[1], rng.integers(259, 512, 399)]).astype(np.int32)
    assert stock_deviation(path, tokens, n_ctx=512) < 1e-4
