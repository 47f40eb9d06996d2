"""Recall against the rule in float64, and what changes what can be recalled: rollbacks, branches, a full archive."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from native_context import F16, F32, Q8_0, NativeContext
from reference.rule import Recall, Rule
from reference.transformer import Transformer

from lminf_edge import Llama
from lminf_edge.cli.demo import python_documentation

Tokens = npt.NDArray[np.int32]

PAPER, EXACT = 1, 1  # enum lminf_recall_rule, lminf_recall_index
EXACTLY: dict[str, int] = {"archive_type_k": F32, "archive_type_v": F32, "recall_index": EXACT}
SOME: dict[str, int] = {"n_recall": 16, "recall_distance": 100, **EXACTLY}
N_LOCAL, N_GLOBAL = 40, 4


@pytest.fixture(scope="module")
def text(tokens: Any) -> Tokens:
    return np.array(tokens[:500], dtype=np.int32)


@pytest.fixture(scope="module")
def transformer(nano_f32_path: str) -> Transformer:
    return Transformer(nano_f32_path)


def check(actual: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], n_batch: int) -> None:
    """All but the last micro-batch, of which the reference has a token more."""
    whole = len(actual) // n_batch * n_batch
    difference = np.abs(actual - expected)[:whole]
    assert np.isfinite(difference).all()
    assert difference.max() < 1e-3
    assert difference.mean() < 5e-5


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize(
    ("n_global", "n_local", "recall"),
    [
        (4, 60, Recall(16, 60, 32)),
        (4, 60, Recall(16, 60, 100)),
        (4, 60, Recall(7, 200, 33)),
        (4, 40, Recall(5, 40, 16, since=3)),
        (0, 40, Recall(8, 40, 16)),
        (10, 64, Recall(64, 33, 64)),
        (4, 60, Recall(4096, 60, 64)),
    ],
)
def test_the_rule_in_float64(
    nano_f32_path: str,
    transformer: Transformer,
    text: Tokens,
    n_global: int,
    n_local: int,
    recall: Recall,
    attention: str,
) -> None:
    expected = transformer.token_nll(text, Rule(n_local, n_global, recall=recall))
    without = transformer.token_nll(text, Rule(n_local, n_global))
    settings = {"n_recall": recall.n, "recall_distance": recall.distance, "recall_from": recall.since}
    with NativeContext(
        nano_f32_path, n_local, n_global, n_ubatch=recall.n_batch, attention=attention, **EXACTLY, **settings
    ) as context:
        check(context.token_nll(text), expected, recall.n_batch)
    assert np.abs(without - expected).max() > 0.05


def test_token_by_token(nano_f32_path: str, transformer: Transformer, text: Tokens) -> None:
    few = text[:300]
    expected = transformer.token_nll(few, Rule(40, 4, recall=Recall(16, 20, 1)))
    with NativeContext(nano_f32_path, 40, 4, n_ubatch=1, n_recall=16, **EXACTLY) as context:
        check(context.token_nll(few), expected, 1)


@pytest.mark.parametrize("recall", [Recall(64, 30, 32), Recall(200, 60, 50, since=1), Recall(330, 60, 50)])
@pytest.mark.parametrize("n_alike", [16, 17, 38])
def test_what_is_there_already_is_not_recalled_again(
    nano_f32_path: str, transformer: Transformer, tokens: Any, n_alike: int, recall: Recall
) -> None:
    """A text that comes again and again, as a file that an agent reads several times. Many of the tokens that have left
    the window are copies of others, and of 200 and 330 some have to be recalled as well. (What comes again is shorter
    than the window: else the keys inside of it would be the same, and rounding would say which ones are chosen.)
    """
    alike, others = np.split(np.array(tokens[: n_alike + 300], dtype=np.int32), [n_alike])
    parts = np.split(others, np.cumsum([20, 7, 1, 30, 12, 9, 25, 14, 3, 18]))
    again = np.concatenate([x for part in parts for x in (alike, part)])[:450]
    expected = transformer.token_nll(again, Rule(40, 4, recall=recall))
    settings = {"n_recall": recall.n, "recall_distance": recall.distance, "recall_from": recall.since}
    with NativeContext(nano_f32_path, 40, 4, n_ubatch=recall.n_batch, **EXACTLY, **settings) as context:
        check(context.token_nll(again), expected, recall.n_batch)


@pytest.mark.parametrize("n_batch", [1, 50])
@pytest.mark.parametrize(("n", "distance"), [(5, 40), (2, 20)])
def test_the_papers_rule(
    nano_f32_path: str, transformer: Transformer, text: Tokens, n: int, distance: int, n_batch: int
) -> None:
    few = text[:300]
    expected = transformer.token_nll(few, Rule(40, 4, recall=Recall(n, distance, n_batch, since=2, paper=True)))
    settings = {"recall_distance": distance, "recall_from": 2, "recall_rule": PAPER}
    with NativeContext(nano_f32_path, 40, 4, n_ubatch=n_batch, n_recall=n, **EXACTLY, **settings) as context:
        check(context.token_nll(few), expected, n_batch)


@pytest.mark.parametrize(("distance", "since", "n_batch"), [(32, 4, 1), (64, 0, 1), (128, 2, 50)])
def test_the_papers_rule_on_a_trained_model(stories_path: Any, distance: int, since: int, n_batch: int) -> None:
    """Five keys for each head, as the authors do, and heads that share keys. They insert them at half of the window,
    from the fifth layer on.
    """
    with contextlib.closing(Llama(stories_path, vocab_only=True, verbose=False)) as vocabulary:
        tokens = np.array(vocabulary.tokenize(python_documentation()[:2000].encode())[:400], dtype=np.int32)
    rule = Rule(64, 10, recall=Recall(5, distance, n_batch, since=since, paper=True))
    transformer = Transformer(stories_path)
    expected = transformer.token_nll(tokens, rule)
    settings = {"recall_distance": distance, "recall_from": since, "recall_rule": PAPER}
    with NativeContext(stories_path, 64, 10, n_ubatch=n_batch, n_recall=5, **EXACTLY, **settings) as context:
        check(context.token_nll(tokens), expected, n_batch)
    assert np.abs(transformer.token_nll(tokens, Rule(64, 10)) - expected).max() > 0.05


def test_sketches_find_nearly_the_same(nano_f32_path: str, tokens: Any) -> None:
    """Of 2,900 candidates 1,024 are looked at, token by token, and the neighbors of the best 64; the archive is
    quantized in both. A sample stands for the others: without it, where a query's votes were shared out among those
    looked at, it was 0.09, and without the neighbors, too, 0.21.
    """
    many = np.array(tokens[:2900], dtype=np.int32)
    found = []
    for index in (EXACT, 1 - EXACT):
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=64, n_recall=16, recall_index=index) as context:
            context.feed(many[:-100])
            context.n_batch = 1
            found.append(context.token_nll(many[-100:]))
    exact, sketched = found
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=64) as context:
        context.feed(many[:-100])
        without = context.token_nll(many[-100:])
    assert np.abs(sketched - exact).mean() < 0.07 * np.abs(without - exact).mean()


# --- what can be recalled ---------------------------------------------------------------------------------------------


def test_off_is_off(nano_f32_path: str, text: Tokens) -> None:
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL) as context:
        expected = context.token_nll(text)
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, **SOME) as context:
        assert context.set_recall(0)
        np.testing.assert_allclose(context.token_nll(text), expected, atol=1e-4)
        assert context.info().n_archived == len(text) - 1
        assert not context.set_recall(17)
        assert not context.set_recall(-1)


def test_rollback_and_another_text(nano_f32_path: str, text: Tokens) -> None:
    other = text[::-1].copy()
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_slack=64, n_ubatch=32, **SOME) as context:
        context.feed(text[:320])
        assert context.rollback(288)
        assert context.info().n_archived == 288
        found = context.feed(other[:96])
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_slack=64, n_ubatch=32, **SOME) as context:
        context.feed(text[:288])
        np.testing.assert_array_equal(found, context.feed(other[:96]))


def test_branches_share_what_they_have_in_common(nano_f32_path: str, tokens: Any) -> None:
    """More than a segment, and both go on within one: neither sees what the other writes."""
    many = np.array(tokens[:1600], dtype=np.int32)
    one, other = many[1200:1400], many[1400:1600]

    def fresh(last: Tokens) -> npt.NDArray[np.float32]:
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=40, **SOME) as context:
            context.feed(many[:1200])
            return context.feed(last)

    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=40, **SOME) as context:
        context.feed(many[:1200])
        archive, state = context.archive(), context.save()
        assert context.info().archive_bytes == context.archive_bytes()
        np.testing.assert_array_equal(context.feed(one), fresh(one))
        assert context.load(state)
        assert context.info().n_archived == 0
        assert context.info().n_forgotten == 1200
        assert context.set_archive(archive)
        assert context.info().n_forgotten == 0
        np.testing.assert_array_equal(context.feed(other), fresh(other))
        context.free_archive(archive)
    assert context.archive_bytes() == 0


def test_a_choice_serves_several_tokens_while_it_is_right(nano_f32_path: str, text: Tokens) -> None:
    """What was chosen before an archive, a rollback or a skip that took tokens away is not taken again."""
    settings = {"n_slack": 64, "n_ubatch": 1, "recall_every": 16, **SOME}

    def fresh(*runs: Tokens) -> npt.NDArray[np.float32]:
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, **settings) as context:
            return [context.feed(run) for run in runs][-1]

    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, **settings) as context:
        context.feed(text[:200])
        early = context.archive()
        context.feed(text[200:304])
        late, state = context.archive(), context.save()
        context.feed(text[304:307])
        assert context.set_archive(early)  # behind the stream: what it has not is not recalled
        assert context.info().n_archived == 200
        assert np.isfinite(context.feed(text[307:330])).all()
        assert context.load(state)
        assert context.set_archive(late)
        np.testing.assert_array_equal(context.feed(text[304:320]), fresh(text[:304], text[304:320]))
        assert context.rollback(310)
        assert context.skip(1000)
        assert np.isfinite(context.feed(text[316:340])).all()
        for archive in (early, late):
            context.free_archive(archive)


def test_another_context_gets_a_copy(nano_f32_path: str, text: Tokens) -> None:
    """Both write on: neither into what the other reads."""
    first, second = text[200:300], text[300:400]
    with (
        NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, **SOME) as one,
        NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, **SOME) as two,
    ):
        one.feed(text[:200])
        archive = one.archive()
        assert two.load(one.save())
        assert two.set_archive(archive)
        assert one.archive_bytes() == 2 * one.info().archive_bytes
        rows = (one.feed(first), two.feed(second))
        one.free_archive(archive)
    for found, run in zip(rows, (first, second), strict=True):
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, **SOME) as alone:
            alone.feed(text[:200])
            np.testing.assert_array_equal(found, alone.feed(run))


def test_an_archive_smaller_than_a_batch(nano_f32_path: str, text: Tokens) -> None:
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=64, n_archive=20, **SOME) as context:
        for i in range(0, 448, 64):
            assert np.isfinite(context.feed(text[i : i + 64])).all()


def test_sequences_recall_their_own(nano_f32_path: str, text: Tokens) -> None:
    texts = [text[:256], text[::-1][:256].copy()]
    alone = []
    for each in texts:
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=32, **SOME) as context:
            alone.append(context.feed(each))
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=32, n_seq_max=2, **SOME) as context:
        for i in range(0, 256, 16):
            rows = context.decode((0, texts[0][i : i + 16]), (1, texts[1][i : i + 16]))
            assert np.isfinite(rows).all()
        assert [context.info(seq_id).n_archived for seq_id in (0, 1)] == [256, 256]
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=32, n_seq_max=2, **SOME) as context:
        for seq_id, each in enumerate(texts):
            np.testing.assert_allclose(context.feed(each, seq_id), alone[seq_id], atol=1e-3)


def test_a_full_archive_forgets_the_oldest(nano_f32_path: str, text: Tokens) -> None:
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=32, n_archive=100, **SOME) as context:
        for i in range(0, 480, 32):
            assert np.isfinite(context.feed(text[i : i + 32])).all()
            info = context.info()
            assert 68 <= info.n_archived <= 100 or info.stream_pos <= 100
            assert info.n_archived + info.n_forgotten == info.stream_pos


def test_what_was_skipped_is_not_recalled(nano_f32_path: str, text: Tokens) -> None:
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=32, **SOME) as context:
        context.feed(text[:64])
        assert context.skip(100_000)
        context.feed(text[64:256])
        info = context.info()
        assert (info.n_archived, info.n_forgotten) == (256, 100_000)
        assert info.archive_bytes < 10 * context.archive_bytes()


# --- going back further than the window reaches -----------------------------------------------------------------------


def again(context: NativeContext, text: Tokens, n_read: int, n_kept: int) -> npt.NDArray[np.float64]:
    """Reads n_read tokens, goes back to n_kept and scores the rest."""
    context.feed(text[:n_read])
    assert context.info().n_rollback < n_read - n_kept <= context.info().n_rebuild
    assert context.rollback(n_kept)
    info = context.info()
    assert info.stream_pos == info.n_archived == n_kept
    return context.token_nll(text[n_kept:])


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize(("n_read", "n_kept"), [(450, 150), (450, 50), (400, 100)])
def test_the_window_is_made_anew(
    nano_f32_path: str, transformer: Transformer, text: Tokens, n_read: int, n_kept: int, attention: str
) -> None:
    """With an archive in f32 the tokens after that are those of the rule, in float64."""
    expected = transformer.token_nll(text, Rule(N_LOCAL, N_GLOBAL, recall=Recall(16, 100, 50)))
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, attention=attention, **SOME) as context:
        check(again(context, text, n_read, n_kept), expected[n_kept:], 50)


def test_the_window_is_made_anew_before_its_origin(nano_f32_path: str, transformer: Transformer, tokens: Any) -> None:
    """Positions in the graph have moved on several times, and must move back."""
    many = np.array(tokens[:1500], dtype=np.int32)
    expected = transformer.token_nll(many, Rule(N_LOCAL, N_GLOBAL, recall=Recall(16, 100, 50)))
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, n_slack=64, **SOME) as context:
        check(again(context, many, 1500, 300), expected[300:], 50)
        assert context.info().n_rebase >= 2
        # and what is there can be taken back, saved and restored as ever
        assert context.info().n_rollback >= 64
        state, archive = context.save(), context.archive()
        first = context.feed(many[:50])
        assert context.load(state)
        assert context.set_archive(archive)
        np.testing.assert_array_equal(context.feed(many[:50]), first)
        context.free_archive(archive)


def test_types_that_are_rounded_alike(nano_f32_path: str, text: Tokens) -> None:
    """f16 is rounded once more, as when positions are moved; nothing coarser is taken for what the window held."""
    for archive, cache, works in (
        (F16, F16, True),
        (F32, F16, True),
        (F16, F32, False),
        (Q8_0, F16, False),
        (Q8_0, Q8_0, False),
    ):
        settings = {"archive_type_k": archive, "archive_type_v": archive, "n_recall": 16, "n_ubatch": 50}
        kv: dict[str, Any] = {"type_k": cache, "type_v": cache, "flash_attn": cache == Q8_0}
        with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, **settings, **kv) as context:
            context.feed(text[:150])
            expected = context.token_nll(text[150:])
            assert (context.info().n_rebuild > 300) == works
            before = context.info()
            assert context.rollback(150) == works
            if works:
                found = context.token_nll(text[150:])
                np.testing.assert_allclose(found, expected, atol=0.1)
                assert np.abs(found - expected).mean() < 5e-3
            else:
                assert context.info().stream_pos == before.stream_pos


def test_it_is_not_made_of_what_is_not_there(nano_f32_path: str, text: Tokens, tokens: Any) -> None:
    many = np.array(tokens[:1200], dtype=np.int32)
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, n_archive=400, **SOME) as context:
        context.feed(many)
        info = context.info()
        assert info.n_rollback < info.n_rebuild == info.n_archived - (N_LOCAL - 1)
        least = 1200 - info.n_rebuild
        assert not context.rollback(least - 1)
        assert context.info().stream_pos == 1200
        assert context.rollback(least)
        assert np.isfinite(context.feed(text[:100])).all()
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, **SOME) as context:
        context.feed(text[:50])
        assert context.skip(1000)
        context.feed(text[50:450])
        assert context.info().n_rebuild == 399  # not across a skip
        assert context.rollback(1100)
        found = context.feed(text[100:200])
    with NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, n_ubatch=50, **SOME) as context:
        context.feed(text[:50])
        assert context.skip(1000)
        context.feed(text[50:100])
        np.testing.assert_allclose(found, context.feed(text[100:200]), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_recall": 5000}, "n_recall must be"),
        ({"n_recall": -1}, "n_recall must be"),
        ({"n_recall": 8, "recall_distance": -1}, "recall_distance must be"),
        ({"n_recall": 8, "recall_every": 0}, "recall_every must be"),
        ({"n_recall": 8, "recall_rule": 2}, "recall_rule must be"),
        ({"n_recall": 8, "n_archive": -1}, "n_archive must be"),
        ({"n_recall": 8, "archive_type_k": 30}, "an archive's types are"),
        ({"n_recall": 8, "recall_rule": PAPER, "attention": "fused"}, "needs the stock attention"),
        ({"n_recall": 8, "mode": "order"}, "needs the sink_mode CEILING"),
        ({"n_recall": 8, "n_archive": 2_000_000_000}, "choose a smaller n_archive"),
    ],
)
def test_what_makes_no_sense_is_refused(nano_f32_path: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        NativeContext(nano_f32_path, N_LOCAL, N_GLOBAL, **settings)
