"""The Λ cache below Python: sequences, rollback, states, positions, refusals, and stock llama.cpp left as it was."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from native_context import ATTENTIONS, BF16, F16, F32, Q4_0, Q8_0, SILENT, NativeContext, _lib, last_error
from reference import models, tiny_models
from reference.rule import Rule
from reference.transformer import Transformer
from repository import SUPPORT

from lminf_edge.native import Params

L, G = 32, 4
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write("llama", tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, as quantized caches need."""
    return tiny_models.write("qwen3moe", tmp_path_factory.mktemp("native"))


TOKENS = tiny_models.tokens(700)


def has_huge_pages() -> bool:
    """On demand only: where all memory lies in them, or none may, nothing is to be seen of our asking."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    is_new = release is not None and (int(release[1]), int(release[2])) >= (6, 1)
    return is_new and setting.exists() and "[madvise]" in setting.read_text()


def fresh(path: Path, tokens: np.ndarray, **options: object) -> np.ndarray:
    """Logits of the last token of a stream that is fed from its start."""
    with NativeContext(path, L, G, **options) as context:  # type: ignore[arg-type]
        return context.feed(tokens)[-1]


@pytest.mark.parametrize("mode", ["ceiling", "order", "true"])
@pytest.mark.parametrize(("n_global", "max_distance"), [(0, 0), (4, 0), (4, 16), (4, 64), (50, 0)])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_the_rule_and_its_neighbours(tmp_path: Path, name: str, mode: str, n_global: int, max_distance: int) -> None:
    path = tiny_models.write(name, tmp_path)
    expected = Transformer(path).token_nll(TOKENS, Rule(L, n_global, max_distance or None, mode))  # type: ignore[arg-type]
    with NativeContext(path, L, n_global, max_distance=max_distance, mode=mode) as context:
        difference = np.abs(context.token_nll(TOKENS) - expected)
    assert difference.max() < 1e-3
    assert difference.mean() < 5e-5


def test_window_of_one_token(llama: Path) -> None:
    expected = Transformer(llama).token_nll(TOKENS, Rule(1, G))
    with NativeContext(llama, 1, G) as context:
        assert np.abs(context.token_nll(TOKENS) - expected).max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_window_of_one_token_goes_back_as_far_as_it_says(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    with NativeContext(path, 1, G, n_ubatch=16) as context:
        context.feed(TOKENS[:600])
        end = 600 - context.info().n_rollback
        assert end < 600
        assert context.rollback(end)
        assert context.info().stream_pos == end
        logits = context.feed(TOKENS[end : end + 20])
    with NativeContext(path, 1, G, n_ubatch=16) as context:
        # ggml's GELU looks up f16
        assert np.abs(context.feed(TOKENS[: end + 20])[end:] - logits).max() < 1e-2


@pytest.mark.parametrize("n_ubatch", [1, 7, 64, 512])
def test_every_batch_size_gives_the_same(llama: Path, n_ubatch: int) -> None:
    expected = Transformer(llama).token_nll(TOKENS, Rule(L, G))
    with NativeContext(llama, L, G, n_ubatch=n_ubatch) as context:
        assert np.abs(context.token_nll(TOKENS) - expected).max() < 1e-3


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize(
    ("type_k", "type_v", "bound"),
    [
        ("f16", "f16", 5e-3),
        ("bf16", "bf16", 4e-2),
        ("q8_0", "q8_0", 4e-2),
        ("q4_0", "q4_0", 0.5),
        ("q8_0", "f16", 4e-2),
        ("f32", "q8_0", 4e-2),
    ],
)
@pytest.mark.parametrize("attention", ["fused", "stock"])
def test_kv_types_stay_close_to_f32_through_rebases(
    wide: Path, type_k: str, type_v: str, bound: float, flash_attn: bool, attention: str
) -> None:
    """Mean |ΔNLL| against f32 KV on a random model, which is harder on a cache than a trained one."""
    if type_v.startswith("q") and not flash_attn:
        pytest.skip("llama.cpp keeps quantized V with flash attention only")
    expected = Transformer(wide).token_nll(TOKENS, Rule(L, G))
    settings: dict[str, Any] = {"type_k": TYPES[type_k], "type_v": TYPES[type_v], "flash_attn": flash_attn}
    with NativeContext(wide, L, G, n_ubatch=16, pos_bound=528, attention=attention, **settings) as context:
        assert np.abs(context.token_nll(TOKENS) - expected).mean() < bound
        assert context.info().n_rebase >= 1


#
# positions
#


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_rebasing_changes_nothing(tmp_path: Path, name: str) -> None:
    """The same losses whether graph positions grow to 1500 or never pass 528, for each way of rotating."""
    path = tiny_models.write(name, tmp_path)
    tokens = tiny_models.tokens(1500)
    with NativeContext(path, L, G, n_ubatch=16, pos_bound=1 << 20) as context:
        expected = context.token_nll(tokens)
        assert context.info().n_rebase == 0
    with NativeContext(path, L, G, n_ubatch=16, pos_bound=528) as context:
        actual = context.token_nll(tokens)
        assert context.info().n_rebase >= 4
        assert context.info().max_graph_pos < 528
    assert np.abs(actual - expected).mean() < 5e-5


@pytest.mark.parametrize("start", [1, 255, 256, 1 << 24, 1 << 33, (1 << 33) + 77, (1 << 62)])
def test_a_stream_may_begin_anywhere(llama: Path, start: int) -> None:
    with NativeContext(llama, L, G) as context:
        expected = context.token_nll(TOKENS)
    with NativeContext(llama, L, G) as context:
        assert context.seq_start(start)
        actual = context.token_nll(TOKENS)
        assert context.info().stream_pos == start + len(TOKENS) - 1
        assert context.info().max_graph_pos < context.info().pos_bound
    assert np.abs(actual - expected).max() < 1e-3
    assert np.abs(actual - expected).mean() < 5e-5


def test_llama_cpp_may_number_the_tokens(llama: Path) -> None:
    """A batch without positions, as llama_batch_get_one makes it, goes on for ever."""
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        expected = context.token_nll(TOKENS)
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        logits = []
        for begin in range(0, len(TOKENS), 16):
            block = TOKENS[begin : begin + 16]
            tokens = (llama_cpp.llama_token * len(block))(*block.tolist())
            assert llama_cpp.llama_decode(context.context, llama_cpp.llama_batch_get_one(tokens, len(block))) == 0
            logits.append(
                np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context.context), shape=(context.n_vocab,)))
            )
        assert context.info().n_rebase >= 1
        last = len(TOKENS) - len(block) - 1  # a batch ends here, and its last token is the one with logits
        nll = np.log(np.exp(logits[-2] - logits[-2].max()).sum()) + logits[-2].max() - logits[-2][TOKENS[last + 1]]
        assert nll == pytest.approx(expected[last], abs=1e-3)


def test_a_position_past_the_bound_is_refused(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        context.next_pos = lambda seq_id, n_tokens: 528  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            context.decode((0, TOKENS[:1]))
        assert context.info().stream_pos == 0


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("positions", [[0, 0], [0, 2], [1], [1, 0], [0, 1, 1], [-1], [5, 6]])
def test_positions_that_do_not_come_next_are_refused(llama: Path, positions: list[int], begun: bool) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        n_before = 10 * begun
        if begun:
            context.feed(TOKENS[:10])
        batch = llama_cpp.llama_batch_init(16, 0, 1)
        for i, position in enumerate(positions):
            batch.token[i], batch.pos[i], batch.logits[i] = int(TOKENS[10]), n_before + position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(positions)
        assert llama_cpp.llama_decode(context.context, batch) != 0
        llama_cpp.llama_batch_free(batch)
        assert context.info().stream_pos == n_before
        expected = fresh(llama, TOKENS[: n_before + 3], n_ubatch=16)
        assert np.abs(context.feed(TOKENS[n_before : n_before + 3])[-1] - expected).max() < 1e-4


def test_a_rebase_needs_no_more_memory_than_was_reserved(llama: Path) -> None:
    """A large window and small batches; llama.cpp compares when a context is freed."""
    logged: list[bytes] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, user_data: logged.append(text))
    for type_k in (F32, F16):
        with NativeContext(llama, 2000, G, n_ubatch=16, n_seq_max=2, type_k=type_k, attention="fused") as context:
            for _ in range(7):
                context.feed(TOKENS)
            assert context.info().n_rebase >= 1
            llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        sizes = [text for text in logged if b"compute buffer size" in text]
        assert sizes
        assert not any(b"does not match" in text for text in sizes)


#
# rollback
#


@pytest.mark.parametrize("n_tokens", [3, 20, 33, 100, 600])
@pytest.mark.parametrize("n_back", [1, 2, 17, 60])
def test_after_a_rollback_the_stream_is_as_if_fresh(llama: Path, n_tokens: int, n_back: int) -> None:
    other = TOKENS[::-1][:5]
    kept = max(0, n_tokens - n_back)
    expected = fresh(llama, np.concatenate([TOKENS[:kept], other]), n_slack=64, n_ubatch=16)
    with NativeContext(llama, L, G, n_slack=64, n_ubatch=16) as context:
        context.feed(TOKENS[:n_tokens])
        assert context.rollback(kept)
        assert context.info().stream_pos == kept
        assert np.abs(context.feed(other)[-1] - expected).max() < 1e-4


def test_the_slack_is_exactly_what_can_be_taken_back(llama: Path) -> None:
    with NativeContext(llama, L, G, n_slack=64, n_ubatch=16) as context:
        context.feed(TOKENS)
        before = context.info()
        assert 64 <= before.n_rollback < before.n_cells
        gone = before.stream_pos - before.n_rollback - 1
        assert not context.rollback(gone)
        # refused: nothing has changed
        assert bytes(context.info()) == bytes(before)
        expected = fresh(llama, np.concatenate([TOKENS, TOKENS[:3]]), n_slack=64, n_ubatch=16)
        assert np.abs(context.feed(TOKENS[:3])[-1] - expected).max() < 1e-4
        context.rollback(context.info().stream_pos - context.info().n_rollback)
        assert context.info().n_rollback == 0
        assert not context.rollback(context.info().stream_pos - 1)


def test_repeated_rollbacks_never_reach_recycled_cells(llama: Path) -> None:
    """Forward and back in random steps: a rollback either gives the fresh logits or is refused."""
    rng = np.random.default_rng(0)
    with NativeContext(llama, L, G, n_slack=20, n_ubatch=16, n_ctx=512) as context:
        context.feed(TOKENS)
        kept = TOKENS.tolist()
        refused = 0
        for _ in range(60):
            new = rng.integers(3, 250, rng.integers(1, 100)).astype(np.int32)
            context.feed(new)
            kept += new.tolist()
            back = int(rng.integers(0, 250))
            if context.rollback(max(0, len(kept) - back)):
                kept = kept[: max(0, len(kept) - back)]
            else:
                refused += 1
            assert context.info().stream_pos == len(kept)
        assert 5 < refused < 55
        context.feed(TOKENS[:9])
        kept += TOKENS[:9].tolist()
        logits = context.feed(TOKENS[9:10])[-1]
        expected = fresh(llama, np.array([*kept, TOKENS[9]], dtype=np.int32), n_slack=20, n_ubatch=16)
        assert np.abs(logits - expected).max() < 1e-4


def test_removing_anything_but_an_end_is_refused(llama: Path) -> None:
    remove = llama_cpp.llama_memory_seq_rm
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:200])
        before = bytes(context.info())
        assert not remove(context.memory, 0, 0, 10)
        assert not remove(context.memory, 0, 150, 160)
        assert remove(context.memory, 0, 200, -1)  # nothing there
        assert remove(context.memory, 0, 70, 70)
        assert bytes(context.info()) == before
        assert remove(context.memory, -1, 0, -1)
        assert context.info().stream_pos == 0
        assert np.abs(context.feed(TOKENS[:50])[-1] - fresh(llama, TOKENS[:50], n_ubatch=16)).max() < 1e-4


#
# skips
#


def skipped_positions(parts: list[tuple[int, int]]) -> np.ndarray:
    """[n_tokens], the positions of parts of (tokens skipped, tokens processed after that)."""
    positions: list[int] = []
    end = 0
    for n_skipped, n_processed in parts:
        positions += range(end + n_skipped, end + n_skipped + n_processed)
        end += n_skipped + n_processed
    return np.array(positions)


def feed_parts(context: NativeContext, tokens: np.ndarray, parts: list[tuple[int, int]]) -> np.ndarray:
    logits = []
    for n_skipped, n_processed in parts:
        if n_skipped:
            assert context.skip(n_skipped)
            assert context.info().n_window == context.info().n_rollback == 0
        logits.append(context.feed(tokens[:n_processed]))
        tokens = tokens[n_processed:]
    return np.concatenate(logits)


@pytest.mark.parametrize("mode", ["ceiling", "order", "true"])
@pytest.mark.parametrize("name", ["llama", "mpt"])
@pytest.mark.parametrize("seed", range(4))
def test_after_a_skip_tokens_see_the_sinks_and_what_was_processed_since(
    tmp_path: Path, name: str, mode: str, seed: int
) -> None:
    """Random lengths, rebases in between and after; n_global 0 may skip first thing."""
    rng = np.random.default_rng(seed)
    n_global = [4, 0, 40, 1][seed]
    skips = [int(n) for n in (L, *rng.integers(L, 1500, 2), 256 * int(rng.integers(1, 5)))]
    parts = [(0, n_global + int(rng.integers(0, 9)) if n_global else 0)]
    parts += [(int(n), int(m)) for n, m in zip(rng.permutation(skips), (1, *rng.integers(2, 30, 2), 560), strict=True)]
    positions = skipped_positions(parts)
    tokens = TOKENS[: len(positions)]
    path = tiny_models.write(name, tmp_path)
    expected = Transformer(path).logits(tokens, Rule(L, n_global, None, mode), positions=positions)  # type: ignore[arg-type]
    for attention in ("fused", "stock"):
        with NativeContext(path, L, n_global, mode=mode, attention=attention, n_ubatch=16, pos_bound=528) as context:
            actual = feed_parts(context, tokens, [part for part in parts if any(part)])
            assert np.abs(actual - expected).max() < 2e-3
            info = context.info()
            assert info.stream_pos == positions[-1] + 1
            assert info.n_evicted == info.stream_pos - (L - 1) - n_global
            assert info.n_rebase >= 1
            assert info.max_graph_pos < info.pos_bound


def test_a_skip_may_lead_anywhere(llama: Path) -> None:
    """All the same but for the distance of sinks, which the ceiling makes the same."""
    expected = None
    for n_skipped in (L, 255 - 10, 256 - 10, 257 - 10, 1 << 33, 1 << 62):
        with NativeContext(llama, L, G, n_ubatch=16) as context:
            logits = feed_parts(context, TOKENS[:300], [(0, 10), (n_skipped, 290)])
            assert context.info().stream_pos == 300 + n_skipped
        expected = logits if expected is None else expected
        assert np.abs(logits - expected).max() < 1e-3


def test_what_is_known_right_after_a_skip(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:20])
        assert context.skip(1000)
        info = context.info()
        assert (info.stream_pos, info.n_evicted, info.n_sink) == (1020, 1020 - G, G)
        assert (info.n_window, info.n_rollback) == (0, 0)
        assert llama_cpp.llama_memory_seq_pos_max(context.memory, 0) + 1 == context.next_pos(0, 1)
        context.feed(TOKENS[:5])
        info = context.info()
        assert (info.stream_pos, info.n_evicted, info.n_window, info.n_rollback) == (1025, 1020 - G, 5, 5)


@pytest.mark.parametrize("n_skipped", [236, 1000, 512 - 20])  # graph positions restart at 256, in between, at 256
def test_a_rollback_after_a_skip_leads_back_to_it_and_not_across(llama: Path, n_skipped: int) -> None:
    resume = 20 + n_skipped
    with NativeContext(llama, L, G, n_slack=64, n_ubatch=16) as context:
        expected = feed_parts(context, TOKENS, [(0, 20), (n_skipped, 50)])[20:]
        for kept in (49, 30, 1, 0):
            assert context.rollback(resume + kept)
            assert context.info().stream_pos == resume + kept
            assert context.info().n_rollback == kept
            assert np.abs(context.feed(TOKENS[20 + kept : 70]) - expected[kept:]).max() < 1e-4
        for gone in (resume - 1, resume - 250, 10, 1):
            assert not context.rollback(gone)
            assert "is gone" in last_error()
            assert context.info().stream_pos == resume + 50
        assert context.rollback(resume)
        assert not context.rollback(resume - 1)
        assert context.rollback(resume)  # nothing to do
        assert llama_cpp.llama_memory_seq_rm(context.memory, 0, context.next_pos(0, 1), -1)
        assert context.info().stream_pos == resume
        assert context.rollback(0)
        assert context.info().stream_pos == context.info().n_sink == 0
        assert np.abs(context.feed(TOKENS[:50])[-1] - fresh(llama, TOKENS[:50], n_ubatch=16)).max() < 1e-4
        # once cells have been recycled, a rollback ends where it does without a skip
        feed_parts(context, TOKENS, [(n_skipped, 500)])
        info = context.info()
        assert not context.rollback(info.stream_pos - info.n_rollback - 1)
        assert context.rollback(info.stream_pos - info.n_rollback)


@pytest.mark.parametrize("n_after", [0, 1, 20, 300])
@pytest.mark.parametrize("target", [1, 2])
def test_a_state_after_a_skip_goes_on_elsewhere(llama: Path, n_after: int, target: int) -> None:
    with NativeContext(llama, L, G, n_slack=64, n_ubatch=16, n_seq_max=2) as context:
        context.feed(TOKENS[:50], seq_id=0)
        assert context.set_sinks(2, seq_id=1)
        context.feed(TOKENS[:20], seq_id=1)
        assert context.skip(3000, seq_id=1)
        if n_after:
            context.feed(TOKENS[20 : 20 + n_after], seq_id=1)
        before = context.info(1)
        state = context.save(seq_id=1)
        expected = context.feed(TOKENS[320:350], seq_id=1)
        assert context.info(0).stream_pos == 50
    with NativeContext(llama, L, G, n_slack=64, n_ubatch=16, n_seq_max=target) as context:
        seq_id = target - 1
        context.feed(TOKENS[:99], seq_id)
        assert context.load(state, seq_id)
        after = context.info(seq_id)
        for name in ("stream_pos", "n_evicted", "n_sink", "n_global"):
            assert getattr(after, name) == getattr(before, name)
        assert np.abs(context.feed(TOKENS[320:350], seq_id) - expected).max() < 1e-4
        if n_after < 60:
            assert context.rollback(3020, seq_id)
            assert context.info(seq_id).n_window == 0
        assert not context.rollback(3019, seq_id)


@pytest.mark.parametrize("n_after", [0, 5])
def test_a_skipped_sequence_can_be_copied_and_skipped_again(llama: Path, n_after: int) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=2) as context:
        feed = [(0, 20), (100, 30), (40, 30)]
        expected = feed_parts(context, TOKENS, feed)[50:]
        assert context.rollback(0)
        context.feed(TOKENS[:20], 0)
        assert context.skip(100, 0)
        context.feed(TOKENS[20:50], 0)
        assert context.skip(40, 0)
        if n_after:
            context.feed(TOKENS[50 : 50 + n_after], 0)
        context.feed(TOKENS[300:340], 1)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        assert context.info(1).stream_pos == 190 + n_after
        for seq_id in (1, 0):
            assert np.abs(context.feed(TOKENS[50 + n_after : 80], seq_id) - expected[n_after:]).max() < 1e-4


def test_skipped_and_other_sequences_share_a_batch(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        expected = feed_parts(context, TOKENS, [(0, 20), (500, 12)])[20:]
    other = fresh(llama, TOKENS[:62], n_ubatch=16)
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=3) as context:
        context.feed(TOKENS[:20], 0)
        assert context.skip(500, 0)
        context.feed(TOKENS[:50], 2)
        logits = context.decode((0, TOKENS[20:32]), (2, TOKENS[50:62]))
        assert np.abs(logits[:12] - expected).max() < 1e-4
        assert np.abs(logits[-1] - other).max() < 1e-4


def test_a_skip_that_makes_no_sense_is_refused_and_nothing_changes(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        assert not context.skip(100)
        assert "holds 0 of its 4 sinks" in last_error()
        context.feed(TOKENS[: G - 1])
        assert not context.skip(100)
        assert "holds 3 of its 4 sinks" in last_error()
        context.feed(TOKENS[G - 1 : 50])
        before = bytes(context.info())
        for n_tokens in (L - 1, 0, -5, -(1 << 63)):
            assert not context.skip(n_tokens)
            assert "n_local = 32 tokens or more" in last_error()
        assert not context.skip((1 << 63) - 1)
        assert "can lead to stream position" in last_error()
        assert not context.skip(100, seq_id=1)
        assert "does not exist" in last_error()
        assert bytes(context.info()) == before
        assert np.abs(context.feed(TOKENS[50:51])[-1] - fresh(llama, TOKENS[:51], n_ubatch=16)).max() < 1e-4
    with NativeContext(llama, None) as context:
        assert not context.skip(100)
        assert "no Λ cache" in last_error()


#
# several sequences
#


def test_sequences_have_streams_of_their_own(llama: Path) -> None:
    one, two = TOKENS, TOKENS[::-1].copy()
    expected_one, expected_two = fresh(llama, one[:330], n_ubatch=16), fresh(llama, two[:165], n_ubatch=16)
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=3, pos_bound=1024) as context:
        for i in range(15):
            context.decode((0, one[i * 11 : i * 11 + 11]), (1, two[i * 11 : i * 11 + 11]))
        logits_two = context.decode((0, one[165:166]), (1, two[164:165]))  # positions apart, one token each
        assert context.rollback(164, 1)
        assert context.rollback(165, 0)
        logits_two = context.feed(two[164:165], 1)[-1]
        logits_one = context.feed(one[165:330], 0)[-1]
        assert np.abs(logits_one - expected_one).max() < 1e-4
        assert np.abs(logits_two - expected_two).max() < 1e-4
        assert context.info(0).stream_pos == 330
        assert context.info(1).stream_pos == 165
        assert context.info(2).stream_pos == 0


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_a_rebase_leaves_other_sequences_alone(wide: Path, kv_type: str) -> None:
    """Keys are rotated of those alone that have passed the bound, and of all of their layers."""
    settings: dict[str, Any] = {"type_k": TYPES[kv_type], "type_v": TYPES[kv_type], "flash_attn": True}
    with NativeContext(wide, L, G, n_ubatch=16, n_seq_max=3, pos_bound=560, **settings) as context:
        for seq_id in (0, 2):
            context.feed(TOKENS[seq_id : 90 + seq_id], seq_id)
        before = [context.save(seq_id) for seq_id in (0, 2)]
        logits = context.feed(np.concatenate([TOKENS, TOKENS]), 1)
        assert context.info(1).n_rebase >= 2
        assert [context.save(seq_id) for seq_id in (0, 2)] == before
    with NativeContext(wide, L, G, n_ubatch=16, pos_bound=560, **settings) as context:
        assert np.array_equal(context.feed(np.concatenate([TOKENS, TOKENS])), logits)


def test_copying_and_keeping_a_sequence(llama: Path) -> None:
    expected = fresh(llama, TOKENS[:211], n_ubatch=16)
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=3) as context:
        context.feed(TOKENS[:210], 0)
        context.feed(TOKENS[50:90], 2)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        llama_cpp.llama_memory_seq_keep(context.memory, 1)
        assert [context.info(s).stream_pos for s in range(3)] == [0, 210, 0]
        assert np.abs(context.feed(TOKENS[210:211], 1)[-1] - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "deepseek2"])
def test_a_restored_sequence_can_be_copied_before_anything_is_decoded(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    settings: dict[str, Any] = {"n_ubatch": 16, "n_seq_max": 2}
    with NativeContext(path, L, G, **settings) as context:
        context.feed(TOKENS[:100], 0)
        context.feed(TOKENS[100:190], 1)
        states = [context.save(s) for s in range(2)]
        expected = [context.feed(TOKENS[200:210], s) for s in range(2)]
    with NativeContext(path, L, G, **settings) as context:
        assert context.load(states[0], 0)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        assert context.load(states[1], 0)
        assert np.abs(context.feed(TOKENS[200:210], 1) - expected[0]).max() < 1e-5
        assert np.abs(context.feed(TOKENS[200:210], 0) - expected[1]).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
@pytest.mark.parametrize("seq_id", [2, 300, 1 << 30])
def test_sequences_that_do_not_exist_change_nothing(tmp_path: Path, name: str, seq_id: int) -> None:
    with NativeContext(models.write(name, tmp_path), L, G, n_ubatch=16, n_seq_max=2) as context:
        context.feed(TOKENS[:100])
        memory, state = context.memory, context.save()
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        llama_cpp.llama_memory_seq_cp(memory, 0, seq_id, -1, -1)
        llama_cpp.llama_memory_seq_cp(memory, seq_id, 0, -1, -1)
        llama_cpp.llama_memory_seq_keep(memory, seq_id)
        assert not llama_cpp.llama_memory_seq_rm(memory, seq_id, -1, -1)
        assert llama_cpp.llama_memory_seq_pos_min(memory, seq_id) == -1
        assert llama_cpp.llama_memory_seq_pos_max(memory, seq_id) == -1
        assert llama_cpp.llama_state_seq_get_size(context.context, seq_id) == 0
        assert llama_cpp.llama_state_seq_set_data(context.context, buffer, len(state), seq_id) == 0
        assert context.save() == state


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "lfm2"])
def test_after_an_aborted_batch_every_sequence_holds_what_it_says(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    always = llama_cpp.ggml_abort_callback(lambda data: True)
    never = llama_cpp.ggml_abort_callback(lambda data: False)
    with NativeContext(path, L, G, n_ubatch=64, n_seq_max=4, n_rs_seq=4) as context:
        for s in (0, 2, 3, 1):  # so that recurrent states lie in another order than a batch of 0 and 1 wants
            context.feed(TOKENS[:60], s)
        assert context.rollback(58, 3)  # of states a snapshot, which is taken over by the next batch that touches them
        llama_cpp.llama_set_abort_callback(context.context, always, ctypes.c_void_p(0))
        with pytest.raises(RuntimeError):
            context.decode((0, TOKENS[60:66]), (1, TOKENS[60:66]))
        llama_cpp.llama_set_abort_callback(context.context, never, ctypes.c_void_p(0))
        ends = [context.info(s).stream_pos for s in range(4)]
        if context.info(2).n_rollback > 0:  # no recurrent layers: only the batch is taken back
            assert ends == [60, 60, 60, 58]
        for s, end in enumerate(ends):
            expected = fresh(path, TOKENS[: end + 1], n_ubatch=64)
            # ggml's GELU looks up f16
            assert np.abs(context.feed(TOKENS[end : end + 1], s)[-1] - expected).max() < 1e-2


def test_a_copy_may_stop_short(llama: Path) -> None:
    expected = fresh(llama, TOKENS[:211], n_ubatch=16)
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=2, n_slack=32) as context:
        context.feed(TOKENS[:230], 0)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, 0, 210)
        assert context.info(1).stream_pos == 210
        assert np.abs(context.feed(TOKENS[210:211], 1)[-1] - expected).max() < 1e-4
        # what cannot be exact is not copied
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, 100, 120)
        assert context.info(1).stream_pos == 211


def test_clearing(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:200])
        llama_cpp.llama_memory_clear(context.memory, True)
        assert context.info().stream_pos == context.info().n_sink == context.info().n_window == 0
        assert np.abs(context.feed(TOKENS[:50])[-1] - fresh(llama, TOKENS[:50], n_ubatch=16)).max() < 1e-4


#
# states
#


@pytest.mark.parametrize("n_tokens", [2, 30, 300])
def test_a_state_goes_on_in_another_context(llama: Path, n_tokens: int) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        context.feed(TOKENS[:n_tokens])
        state = context.save()
        expected = context.feed(TOKENS[n_tokens : n_tokens + 20])
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        context.feed(TOKENS[100:177])  # something else was there
        assert context.load(state)
        assert context.info().stream_pos == n_tokens
        assert np.abs(context.feed(TOKENS[n_tokens : n_tokens + 20]) - expected).max() < 1e-5


@pytest.mark.parametrize("n_tokens", [50, 300, 1000])
def test_a_restored_state_gives_the_same_bits(nano_path: str, n_tokens: int) -> None:
    """Quantized weights make rounding visible: the cells must be where they were."""
    tokens = np.random.default_rng(n_tokens).integers(3, 2000, n_tokens + 100).astype(np.int32)
    with NativeContext(nano_path, 64, G) as context:
        context.feed(tokens[:n_tokens])
        state = context.save()
        expected = context.feed(tokens[n_tokens:])
    with NativeContext(nano_path, 64, G) as context:
        assert context.load(state)
        np.testing.assert_array_equal(context.feed(tokens[n_tokens:]), expected)


def test_a_state_moves_to_another_sequence(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=2) as context:
        context.feed(TOKENS[:300])
        assert context.load(context.save(0), 1)
        assert np.abs(context.feed(TOKENS[300:310], 0) - context.feed(TOKENS[300:310], 1)).max() < 1e-5


def test_the_whole_context_is_saved_and_restored(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=2) as context:
        context.feed(TOKENS[:300], 0)
        context.feed(TOKENS[40:100], 1)
        size = llama_cpp.llama_state_get_size(context.context)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_get_data(context.context, state, size) == size
        expected = [context.feed(TOKENS[:9], s) for s in range(2)]
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=2) as context:
        assert llama_cpp.llama_state_set_data(context.context, state, size) == size
        for s in range(2):
            assert np.abs(context.feed(TOKENS[:9], s) - expected[s]).max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_a_whole_state_that_breaks_off_leaves_no_half_of_it(tmp_path: Path, name: str) -> None:
    path = models.write(name, tmp_path)
    with NativeContext(path, L, G, n_ubatch=16, n_seq_max=2) as context:
        for s in range(2):
            context.feed(TOKENS[:100], s)
        size = llama_cpp.llama_state_get_size(context.context)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_get_data(context.context, state, size) == size
        assert llama_cpp.llama_state_set_data(context.context, state, size - 100) == 0
        assert [context.info(s).stream_pos for s in range(2)] == [0, 0]
        expected = fresh(path, TOKENS[:50], n_ubatch=16)
        assert np.abs(context.feed(TOKENS[:50])[-1] - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "deepseek2", "graniteswitch"])
def test_a_state_may_stay_on_the_device(tmp_path: Path, name: str) -> None:
    on_device = 2  # LLAMA_STATE_SEQ_FLAGS_ON_DEVICE
    with NativeContext(models.write(name, tmp_path), L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:100])
        size = llama_cpp.llama_state_seq_get_size_ext(context.context, 0, on_device)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(context.context, state, size, 0, on_device) == size
        expected = context.feed(TOKENS[100:130])
        assert llama_cpp.llama_state_seq_set_data_ext(context.context, state, size, 0, on_device) == size
        assert np.array_equal(context.feed(TOKENS[100:130]), expected)


@pytest.mark.parametrize("n_before", [0, 10])
def test_a_hybrid_model_s_state_after_a_skip_without_sinks(tmp_path: Path, n_before: int) -> None:
    path = models.write("qwen35", tmp_path)
    with NativeContext(path, L, 0, n_ubatch=16) as context, NativeContext(path, L, 0, n_ubatch=16) as other:
        if n_before > 0:
            context.feed(TOKENS[:n_before])
        assert context.skip(100)
        assert other.load(context.save())
        assert np.array_equal(context.feed(TOKENS[100:130]), other.feed(TOKENS[100:130]))


@pytest.mark.parametrize(
    "other",
    [{"n_local": 33}, {"n_global": 9}, {"max_distance": 16}, {"mode": "order"}, {"type_k": F16}, {"type_v": F16}],
)
def test_a_foreign_state_is_refused_and_nothing_is_lost(llama: Path, other: dict[str, object]) -> None:
    with NativeContext(llama, **{"n_local": L, "n_global": G, "n_ubatch": 16, **other}) as context:  # type: ignore[arg-type]
        context.feed(TOKENS[:200])
        state = context.save()
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:200])
        assert not context.load(state)
        assert "the saved state does not fit" in last_error()
        assert np.abs(context.feed(TOKENS[200:201])[-1] - fresh(llama, TOKENS[:201], n_ubatch=16)).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "deepseek2", "graniteswitch"])
def test_a_changed_state_is_refused_or_can_be_continued(tmp_path: Path, name: str) -> None:
    """In a process of its own: what is trusted and should not be ends in an abort."""
    path = models.write(name, tmp_path)
    command = [sys.executable, str(SUPPORT / "state_mutations.py"), str(path), "auto"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    n_refused, n_taken = map(int, result.stdout.split())
    assert n_refused > 1000
    assert n_taken > 100


def test_a_state_from_a_context_with_larger_positions_is_taken(llama: Path) -> None:
    """Its graph positions lie beyond this context's bound until the next token."""
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=1 << 20) as context:
        context.feed(TOKENS[:680])
        state = context.save()
        expected = context.feed(TOKENS[680:])
    with NativeContext(llama, L, G, n_ubatch=16, pos_bound=528) as context:
        assert context.load(state)
        assert context.info().stream_pos == 680
        assert np.abs(context.feed(TOKENS[680:]) - expected).max() < 1e-3
        assert context.info().max_graph_pos < 528


def poisoned(state: bytes, value: float, n_newest: int, is_transposed: bool) -> bytes:
    """The f32 state of sequence 1 of 2 with other keys and values for its newest tokens, sinks too if that is all."""
    n_layer, row = 2, 32  # of the model "llama"
    words = np.frombuffer(state, dtype=np.float32).copy()
    integers = np.frombuffer(state, dtype=np.int32)
    at = (8 + 60 + 48 + 16 + 8) // 4  # llama.cpp's words, header, sequence, part, cells
    n_used = int(integers[at - 1])
    at += n_used + 3
    positions = integers[at : at + 3 * n_used : 3]
    newest = positions > positions.max() - n_newest
    at += 3 * n_used + 2
    for is_value in (False, True):
        for _ in range(n_layer):
            block = words[at + 3 : at + 3 + n_used * row]
            at += 3 + n_used * row
            (block.reshape(row, n_used).T if is_value and is_transposed else block.reshape(n_used, row))[newest] = value
    at += 16 // 4  # the part of the sinks
    assert len(words) - at == 2 * n_layer * row * G
    if newest.all():
        words[at:] = value
    return words.tobytes()


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_gone_with_its_tokens(
    llama: Path, attention: str, flash_attn: bool, value: float
) -> None:
    is_transposed = attention == "stock" and not flash_attn
    settings: dict[str, Any] = {"n_ubatch": 16, "attention": attention, "flash_attn": flash_attn}
    expected = fresh(llama, TOKENS[:80], **settings)
    with NativeContext(llama, L, G, n_slack=32, n_seq_max=2, **settings) as context:
        context.feed(TOKENS[:50], 1)
        assert context.skip(300, 1)
        skipped = context.feed(TOKENS[50:80], 1)
        memory = context.memory
        ways_to_empty = (
            lambda: context.rollback(0, 1),
            lambda: llama_cpp.llama_memory_clear(memory, False),
            lambda: llama_cpp.llama_memory_seq_rm(memory, -1, -1, -1),
            lambda: llama_cpp.llama_memory_seq_keep(memory, 0),
            lambda: context.load(short, 1) or context.rollback(0, 1),
        )
        assert context.rollback(0, 1)
        context.feed(TOKENS[:50], 1)
        short = context.save(1)
        context.feed(TOKENS[50:200], 1)
        state = context.save(1)
        for empty in ways_to_empty:
            assert context.load(poisoned(state, value, 1000, is_transposed), 1)
            assert not np.isfinite(context.feed(TOKENS[:20], 1)).any()
            empty()
            context.rollback(0, 1)
            assert np.abs(context.feed(TOKENS[:80], 1)[-1] - expected).max() < 1e-4
        # the newest tokens only, which a rollback takes back
        assert context.load(state, 1)
        following = context.feed(TOKENS[200:220], 1)
        assert context.rollback(200, 1)
        context.feed(TOKENS[300:307], 1)
        assert context.load(poisoned(context.save(1), value, 7, is_transposed), 1)
        assert context.rollback(200, 1)
        assert np.abs(context.feed(TOKENS[200:220], 1) - following).max() < 1e-4
        # and those before a skip
        assert context.load(short, 1)
        context.feed(TOKENS[300:307], 1)
        assert context.load(poisoned(context.save(1), value, 7, is_transposed), 1)
        assert context.skip(293, 1)
        assert np.abs(context.feed(TOKENS[50:80], 1) - skipped).max() < 1e-4


def test_a_copy_leaves_nothing_of_a_recurrent_state_that_is_not_finite(tmp_path: Path) -> None:
    path = models.write("qwen35", tmp_path)
    with NativeContext(path, L, G, n_ubatch=16, n_seq_max=3) as context:
        context.feed(TOKENS[:50], 1)
        state = context.save(1, partial=True)
        rows = np.frombuffer(state[-4096:], np.float32).copy()  # the end of the last layer's state
        rows[:] = np.nan
        context.feed(TOKENS[:50], 0)
        assert context.load(state[:-4096] + rows.tobytes(), 0, partial=True)
        assert not np.isfinite(context.feed(TOKENS[50:52], 0)).all()
        llama_cpp.llama_memory_seq_cp(context.memory, 1, 0, -1, -1)
        expected = fresh(path, TOKENS[:50], n_ubatch=16)
        assert np.abs(context.feed(TOKENS[:50], 2)[-1] - expected).max() < 1e-4


def test_a_state_is_as_large_as_what_is_used(llama: Path) -> None:
    with NativeContext(llama, L, G, n_ubatch=16) as context:
        context.feed(TOKENS[:10])
        small = len(context.save())
        context.feed(TOKENS[:500])
        full = len(context.save())
        context.feed(TOKENS)
        assert len(context.save()) == full
    assert small < full / 4


#
# parameters and models
#


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_local": 0}, "n_local must be 1 or more"),
        ({"n_local": -5}, "n_local must be 1 or more"),
        ({"n_global": -1}, "n_global must be 0 or more"),
        ({"max_distance": -1}, "max_distance must be 1 or more"),
        ({"n_slack": -2}, "n_slack must be 0 or more"),
        ({"pos_bound": 100}, "pos_bound = 100 is too small"),
        ({"n_local": 1_000_000_000}, "choose a smaller n_local"),
        ({"n_local": 2_147_483_000}, "more cells than a KV cache can index"),
        ({"type_k": Q8_0}, "heads of key size 16"),
    ],
)
def test_bad_parameters_get_one_sentence(llama: Path, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NativeContext(llama, **{"n_local": L, "n_global": G, **options})  # type: ignore[arg-type]


def test_a_failed_context_leaves_nothing_behind(llama: Path) -> None:
    with pytest.raises(ValueError, match="n_local"):
        NativeContext(llama, 1_000_000_000, G)
    with NativeContext(llama, None) as context:
        assert not _lib.lminf_enabled(context.context)


# with an f16 cache llama.cpp rounds queries to f16 as well, which the fused attention does not
@pytest.mark.parametrize(
    ("type_kv", "attention", "bound"),
    [(F32, "stock", 1e-5), (F16, "stock", 1e-3), (F32, "fused", 1e-5), (F16, "fused", 1e-2)],
)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_until_the_window_is_full_it_is_plain_attention(
    llama: Path, type_kv: int, attention: str, bound: float, flash_attn: bool
) -> None:
    with NativeContext(llama, None, type_k=type_kv, type_v=type_kv) as context:
        expected = context.token_nll(TOKENS[:64])
    settings: dict[str, Any] = {"type_k": type_kv, "type_v": type_kv, "flash_attn": flash_attn}
    with NativeContext(llama, 64, G, attention=attention, **settings) as context:
        assert np.abs(context.token_nll(TOKENS[:64]) - expected).max() < bound


@pytest.mark.parametrize("vocab_only", [False, True])
def test_the_c_entry_point(llama: Path, vocab_only: bool) -> None:
    """lminf_init_from_model, which C programs call; the other tests come through lminf_set_next."""
    create = _lib.lminf_init_from_model
    create.argtypes = (ctypes.c_void_p, llama_cpp.llama_context_params, Params)
    create.restype = ctypes.c_void_p
    model_params = llama_cpp.llama_model_default_params()
    model_params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(llama).encode(), model_params)
    context = create(model, llama_cpp.llama_context_default_params(), Params(G, L, 0, -1, 0, 0, 0))
    if vocab_only:
        assert context is None
        assert "only its vocabulary was loaded" in last_error()
    else:
        assert _lib.lminf_enabled(ctypes.c_void_p(context))
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


#
# what computes the attention
#


def chosen(context: NativeContext) -> str:
    params = Params()
    assert _lib.lminf_get_params(context.context, ctypes.byref(params))
    return ATTENTIONS[params.attention]


def test_the_fused_attention_is_chosen_where_it_can_be(llama: Path, wide: Path) -> None:
    for attention, expected in (("auto", "fused"), ("fused", "fused"), ("stock", "stock")):
        with NativeContext(llama, L, G, attention=attention) as context:
            assert chosen(context) == expected
    with NativeContext(llama, L, 0) as context:
        assert chosen(context) == "fused"
    q5_0 = {"type_k": 6, "type_v": 6, "flash_attn": True}  # a type the operation does not take
    with NativeContext(wide, L, G, **q5_0) as context:
        assert chosen(context) == "stock"
    with pytest.raises(ValueError, match=r"no fused attention for layer 0 of this model on CPU .* q5_0 and q5_0"):
        NativeContext(wide, L, G, attention="fused", **q5_0)


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_sequences_side_by_side_are_what_they_are_alone(llama: Path, attention: str, n_threads: int) -> None:
    with NativeContext(llama, L, G, n_ubatch=16, attention=attention) as context:
        alone = context.feed(TOKENS[:200])
    with NativeContext(llama, L, G, n_ubatch=16, n_seq_max=3, attention=attention, n_threads=n_threads) as context:
        together = [
            context.decode((0, TOKENS[i : i + 16]), (1, TOKENS[i : i + 16]), (2, TOKENS[i : i + 16]))
            for i in range(0, 192, 16)
        ]
    for seq_id in range(3):
        logits = np.concatenate([block[16 * seq_id : 16 * (seq_id + 1)] for block in together])
        assert np.abs(logits - alone[:192]).max() < 1e-3


def huge_page_bytes() -> int:
    """Of this process."""
    (line,) = (line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHugePages" in line)
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages on demand (Linux 6.1)")
def test_the_cache_lies_in_huge_pages(llama: Path) -> None:
    before = huge_page_bytes()
    with NativeContext(llama, 1 << 18, G) as context:
        kv_bytes = context.info().kv_bytes
        assert kv_bytes > 16 << 20
        assert huge_page_bytes() - before > kv_bytes // 2  # memory in pieces may not yield all of it
