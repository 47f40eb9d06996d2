"""Models with more than plain attention: the reference against llama.cpp, and the Λ cache against the reference.

Each is compared logit by logit over 900 tokens. Two right answers differ by the order of additions and by angles in
f32: reference and llama.cpp's own attention by 2e-4 at most and 5e-6 on average, over three seeds. GELU is read from a
table of f16, where an argument that is rounded the other way moves single logits by 5e-3, and the average one by 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from native_context import NativeContext
from reference import kinds, random_model, tiny_models
from reference.gguf_file import Array
from reference.rule import Rule
from reference.switched import Switched
from reference.transformer import Block, Transformer, nll_from_logits

L, G = 32, 4
GELU = {"gemma2", "gemma3", "gemma4"}


class Tiny:
    """A model of a kind, a stream for it, and what the rule makes of that."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind = name, kinds.KINDS[name]
        self.path = random_model.write(name, self.kind.model, folder, seed=1)
        self.tokens = tiny_models.tokens(900, seed=2)
        self.max, self.mean = (1e-2, 3e-4) if name in GELU else (4e-4, 1e-5)

    def read(self) -> Transformer:
        return self.kind.reader(self.path)

    @cached_property
    def expected(self) -> Array:
        return self.read().logits(self.tokens, Rule(L, G))

    def check(self, actual: npt.NDArray[np.float32], expected: Array, tokens: npt.NDArray[np.int32]) -> None:
        nll = nll_from_logits(actual[:-1], tokens[1:]) - nll_from_logits(expected[:-1], tokens[1:])
        for difference in (np.abs(actual - expected), np.abs(nll)):
            assert np.isfinite(difference).all()
            assert difference.max() < self.max
            assert difference.mean() < self.mean


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("kinds"))


every_kind = pytest.mark.parametrize("tiny", kinds.KINDS, indirect=True)


@every_kind
def test_full_attention_is_that_of_llama_cpp(tiny: Tiny) -> None:
    from reference import stock

    actual = stock.logits(tiny.path, tiny.tokens, n_ctx=1024)
    tiny.check(actual, tiny.read().logits(tiny.tokens), tiny.tokens)


@every_kind
@pytest.mark.parametrize("attention", ["auto", "stock"])
@pytest.mark.parametrize("n_ubatch", [1, 13, 512])
def test_the_cache_follows_the_rule(tiny: Tiny, n_ubatch: int, attention: str) -> None:
    with NativeContext(tiny.path, L, G, n_ubatch=n_ubatch, attention=attention) as context:
        tiny.check(context.feed(tiny.tokens), tiny.expected, tiny.tokens)
        # chunks of 8192 are only moved as a whole: see below
        if n_ubatch < 512 and tiny.name != "llama4":
            assert context.info().n_rebase >= 1


@every_kind
def test_sequences_keep_to_themselves(tiny: Tiny) -> None:
    """Two streams in the same batches, one of which begins later."""
    other = tiny_models.tokens(600, seed=3)
    with NativeContext(tiny.path, L, G, n_ubatch=16, n_seq_max=2) as context:
        first, second = [context.feed(tiny.tokens[:300])], []
        for i in range(300, 900, 8):
            both = context.decode((0, tiny.tokens[i : i + 8]), (1, other[i - 300 : i - 292]))
            first.append(both[:8])
            second.append(both[8:])
    tiny.check(np.concatenate(first), tiny.expected, tiny.tokens)
    tiny.check(np.concatenate(second), tiny.read().logits(other, Rule(L, G)), other)


def gaps_of(name: str) -> tuple[int, ...]:
    """Tokens skipped before each hundred; a chunk ends within the second and the third hundred of llama4."""
    return (0, 16234, 24476, 8192) if name == "llama4" else (0, 48, 1052, 400)


def positions_between(gaps: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(100 * i, 100 * (i + 1)) + sum(gaps[: i + 1]) for i in range(len(gaps))])


@every_kind
def test_a_skip_leaves_sinks_and_recurrent_states(tiny: Tiny) -> None:
    """No query sees across it but for the sinks. What is recurrent knows of the tokens that were read, no others."""
    gaps = gaps_of(tiny.name)
    tokens, actual = tiny.tokens[: 100 * len(gaps)], []
    with NativeContext(tiny.path, L, G, n_ubatch=16) as context:
        for i, gap in enumerate(gaps):
            assert gap == 0 or context.skip(gap)
            actual.append(context.feed(tokens[100 * i : 100 * (i + 1)]))
    expected = tiny.read().logits(tokens, Rule(L, G), positions=positions_between(gaps))
    tiny.check(np.concatenate(actual), expected, tokens)


@pytest.mark.parametrize("tiny", ["llama4"], indirect=True)
def test_chunks_are_no_windows_and_stay_where_they_are(tiny: Tiny) -> None:
    """A window instead would be seen, and so would chunks that a rebase has moved: it takes whole ones."""
    tokens, positions = tiny.tokens[:400], positions_between(gaps_of("llama4"))
    model = tiny.read()
    right = model.logits(tokens, Rule(L, G), positions=positions)
    model.sliding_rule = lambda rule: Rule(8192)  # type: ignore[method-assign]
    assert np.abs(model.logits(tokens, Rule(L, G), positions=positions) - right).max() > 20 * tiny.max

    stream = tiny_models.tokens(26000, seed=3)
    ends = []
    for pos_bound in (0, 1 << 20):
        with NativeContext(tiny.path, L, G, n_ubatch=512, pos_bound=pos_bound) as context:
            for begin in range(0, len(stream), 512):
                end = context.decode((0, stream[begin : begin + 512]))
            assert context.info().n_rebase == (pos_bound == 0)
            ends.append(end)
    assert np.abs(ends[0] - ends[1]).max() < 10 * tiny.max  # angles in f32, at positions of 26,000 and of 9,600


Wrong = Callable[[Transformer], Rule]


def no_sinks(model: Transformer) -> Rule:
    return Rule(L)


def sinks_at_true_distance(model: Transformer) -> Rule:
    return Rule(L, G, mode="true")


def sinks_one_too_far(model: Transformer) -> Rule:
    return Rule(L, G, L + 1)


def window_one_too_long(model: Transformer) -> Rule:
    return Rule(L + 1, G, L)


def sinks_on_sliding_layers(model: Transformer) -> Rule:
    trained = model.sliding_rule(Rule())
    model.sliding_rule = lambda rule: Rule(trained.n_local, rule.n_global)  # type: ignore[method-assign]
    return Rule(L, G)


def one_rule_for_all_layers(model: Transformer) -> Rule:
    model.sliding_rule = lambda rule: rule  # type: ignore[method-assign]
    return Rule(L, G)


def one_rope_for_all_layers(model: Transformer) -> Rule:
    rope = model.rope
    model.rope = lambda n_ctx, rule, sliding=False: rope(n_ctx, rule)  # type: ignore[method-assign]
    return Rule(L, G)


def temperature_by_position(model: Transformer) -> Rule:
    temperature = model.temperature
    model.temperature = lambda block: temperature(  # type: ignore[method-assign]
        Block(block.layer, Rule(), block.rope, block.positions, block.tokens)
    )
    return Rule(L, G)


def adapters_of_the_window(model: Transformer) -> Rule:
    assert isinstance(model, Switched)
    route = model.route
    model.route = (
        lambda numbers: np.array(  # type: ignore[method-assign]
            [route(numbers[max(0, i + 1 - L) : i + 1])[-1] for i in range(len(numbers))]
        )
    )
    return Rule(L, G)


def sections_all_turning(model: Transformer) -> Rule:
    del model.metadata[f"{model.name}.rope.dimension_sections"]
    return Rule(L, G)


WRONG: list[tuple[str, Wrong]] = [
    *(
        (name, wrong)
        for name in kinds.KINDS
        if name != "lfm2-sliding"
        for wrong in (no_sinks, sinks_at_true_distance, sinks_one_too_far, window_one_too_long)
    ),
    *(
        (name, wrong)
        for name, kind in kinds.KINDS.items()
        if kind.sliding
        for wrong in (sinks_on_sliding_layers, one_rule_for_all_layers)
    ),
    ("gemma3", one_rope_for_all_layers),
    ("mistral3", temperature_by_position),
    ("qwen3vl", sections_all_turning),
    ("graniteswitch", adapters_of_the_window),
]


@pytest.mark.parametrize(("tiny", "wrong"), WRONG, indirect=["tiny"])
def test_a_wrong_rule_would_be_seen(tiny: Tiny, wrong: Wrong) -> None:
    """What the comparisons above would say of it: off by far more than their bounds, on average and at most."""
    model, tokens = tiny.read(), tiny.tokens[:300]
    rule = wrong(model)
    difference = np.abs(model.logits(tokens, rule) - tiny.expected[:300])
    assert difference.max() > 20 * tiny.max
    assert difference.mean() > 20 * tiny.mean
