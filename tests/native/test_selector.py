"""Layers that select tokens (DeepSeek's sparse attention): while no more are in view than are selected, all are.

test_reference_kinds.py compares such a model with float64, which knows no selection, and with llama.cpp's attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from native_context import F16, Q8_0, NativeContext
from reference import kinds, random_model, stock, tiny_models
from reference.random_model import ATTENTION, GATED, HEAD, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, Shapes
from reference.rule import Rule
from reference.unsupported_models import EXPERTS, N_EXPERT

from lminf_edge import Llama, LMInfConfig
from lminf_edge.cli import main
from lminf_edge.engine.loading import load_engine
from lminf_edge.patched import PatchedLlama

L, G = 32, 4
TOKENS = tiny_models.tokens(700, seed=2)
MODEL = kinds.KINDS["deepseek32"].model


def write(folder: Path, n_selected: int) -> Path:
    """The same weights, whatever n_selected is."""
    model = replace(MODEL, keys=MODEL.keys | {"attention.indexer.top_k": n_selected})
    return random_model.write(f"select-{n_selected}", model, folder, seed=1)


def test_what_is_selected_makes_a_difference_without_a_window(tmp_path: Path) -> None:
    """So that what follows says something: with llama.cpp's own cache the tokens selected are few of many."""
    few, all_of_them = (stock.logits(write(tmp_path, n), TOKENS[:200], n_ctx=256) for n in (L + G, 1024))
    np.testing.assert_allclose(few[: L + G], all_of_them[: L + G], atol=1e-4)
    assert np.abs(few - all_of_them)[L + G :].max() > 1


@pytest.mark.parametrize("attention", ["auto", "stock"])
def test_as_many_as_are_in_view_are_all_of_them(tmp_path: Path, attention: str) -> None:
    path = write(tmp_path, L + G)
    with NativeContext(path, L, G, n_ubatch=16, attention=attention) as context:
        found = context.feed(TOKENS)
        assert context.info().n_rebase >= 1
    with NativeContext(write(tmp_path, 1024), L, G, n_ubatch=16, attention=attention) as context:
        np.testing.assert_array_equal(found, context.feed(TOKENS))
    expected = kinds.KINDS["deepseek32"].reader(path).logits(TOKENS, Rule(L, G))
    assert np.abs(found - expected).max() < 4e-4


@pytest.mark.parametrize(
    ("n_local", "n_global", "n_recall"), [(L + 1, G, 0), (L, G + 1, 0), (L, G, 1), (4096, 10, 0), (L, 0, 5)]
)
def test_more_are_refused(tmp_path: Path, n_local: int, n_global: int, n_recall: int) -> None:
    path = write(tmp_path, L + G)
    with pytest.raises(ValueError, match=r"selects, and would have \d+ in view: choose .* = 36 or less$") as caught:
        NativeContext(path, n_local, n_global, n_recall=n_recall)
    assert f"have {n_local + n_global + n_recall} in view" in str(caught.value)


def test_the_paper_s_recall_is_refused(tmp_path: Path) -> None:
    """Its heads have other tokens in view each, in all more than a query selects."""
    with pytest.raises(ValueError, match="the paper's recall gives each its own: choose the recall_rule LAYER"):
        NativeContext(write(tmp_path, 1024), L, G, n_recall=8, recall_rule=1)


def test_keys_that_nobody_reads_take_a_micro_batch_of_memory(tmp_path: Path) -> None:
    """Beside as many layers of the window, whatever its length."""
    path = write(tmp_path, 4096)
    sizes = []
    for n_local in (400, 3000):
        with NativeContext(path, n_local, 0, n_ubatch=64, n_slack=8, type_k=F16, type_v=F16) as context:
            info = context.info()
            latent = kinds.N_LORA + kinds.N_ROT
            # a row of sinks is there for what is none
            sizes.append(info.kv_bytes - 2 * 2 * latent * (info.n_cells + 1))
    assert sizes[0] == sizes[1]
    assert 0 <= sizes[0] - 2 * 2 * kinds.N_INDEX * 256 < 64  # what ggml aligns tensors to


BLOCK = 8
SPARSE: Shapes = EXPERTS | {
    "exp_probs_b.bias": (N_EXPERT,),
    "indexer.q_proj.weight": (N_HEAD_KV * kinds.N_INDEX, N_EMBD),
    "indexer.k_proj.weight": (kinds.N_INDEX, N_EMBD),
    "indexer.q_norm.weight": (kinds.N_INDEX,),
    "indexer.k_norm.weight": (kinds.N_INDEX,),
}


def write_blocks(folder: Path, n_selected: int, head: int = HEAD) -> Path:
    """MiniMax M3, whose queries select so many blocks of eight positions."""
    attention = ATTENTION | {
        "attn_q.weight": (N_HEAD * head, N_EMBD),
        "attn_k.weight": (N_HEAD_KV * head, N_EMBD),
        "attn_v.weight": (N_HEAD_KV * head, N_EMBD),
        "attn_output.weight": (N_EMBD, N_HEAD * head),
        "attn_q_norm.weight": (head,),
        "attn_k_norm.weight": (head,),
    }
    model = random_model.Model(
        "minimax-m3",
        {
            "attention.key_length": head,
            "attention.value_length": head,
            "leading_dense_block_count": 1,
            "expert_count": N_EXPERT,
            "expert_used_count": N_EXPERT,
            "expert_feed_forward_length": N_FF,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "attention.indexer.head_count": N_HEAD_KV,
            "attention.indexer.key_length": kinds.N_INDEX,
            "attention.indexer.top_k": n_selected,
            "attention.indexer.block_size": BLOCK,
            "attention.indexer.local_blocks": 1,
        },
        random_model.OUTPUT,
        (attention | GATED, attention | SPARSE),
    )
    return random_model.write(f"blocks-{n_selected}", model, folder, seed=1)


def test_so_it_is_where_blocks_are_selected(tmp_path: Path) -> None:
    """llama.cpp's own cache selects with flash attention only: the same of all blocks, another of few."""
    tokens = TOKENS[:200]
    with NativeContext(write_blocks(tmp_path, 200 // BLOCK), None, flash_attn=True) as context:
        all_of_them = context.feed(tokens)
    with NativeContext(write_blocks(tmp_path, 6), None, flash_attn=True) as context:
        few = context.feed(tokens)
    np.testing.assert_allclose(few[: 6 * BLOCK], all_of_them[: 6 * BLOCK], atol=1e-4)
    assert np.abs(few - all_of_them)[6 * BLOCK :].max() > 0.5
    with NativeContext(write_blocks(tmp_path, 200), 200, G, flash_attn=True) as context:
        assert np.abs(context.feed(tokens) - all_of_them).max() < 4e-3  # flash attention rounds queries to f16
    # a block of sinks, and a window in five
    with NativeContext(write_blocks(tmp_path, 6), L, G, flash_attn=True) as context:
        assert np.isfinite(context.feed(TOKENS)).all()


@pytest.mark.parametrize(("n_local", "n_global", "n_recall"), [(L + 2, G, 0), (L, 2 * G + 1, 0), (L, G, 1)])
def test_more_blocks_are_refused(tmp_path: Path, n_local: int, n_global: int, n_recall: int) -> None:
    with pytest.raises(ValueError, match="6 blocks of 8 tokens that it selects, and could have tokens of 7 in view"):
        NativeContext(write_blocks(tmp_path, 6), n_local, n_global, n_recall=n_recall)


def test_where_blocks_are_selected_values_are_not_quantized(tmp_path: Path) -> None:
    path = write_blocks(tmp_path, 6, head=32)
    with pytest.raises(ValueError, match=r"q8_0 with flash attention only, .*: choose f16"):
        NativeContext(path, L, G, type_k=Q8_0, type_v=Q8_0, flash_attn=True)
    with NativeContext(path, L, G, type_k=Q8_0, type_v=F16, flash_attn=True) as context:
        found = context.feed(TOKENS)
    with NativeContext(path, L, G, flash_attn=True) as context:
        assert np.abs(context.feed(TOKENS) - found).mean() < 0.05


# --- the window that is chosen ----------------------------------------------------------------------------------------

WRITERS = [(write, 36), (write_blocks, 6)]  # 36 tokens, and 6 blocks of 8


@pytest.mark.parametrize(("make", "n_selected"), WRITERS)
@pytest.mark.parametrize(("n_global", "n_recall"), [(10, 0), (0, 0), (17, 2), (1, 3)])
def test_by_default_a_window_is_the_largest_that_runs(
    tmp_path: Path, make: Callable[[Path, int], Path], n_selected: int, n_global: int, n_recall: int
) -> None:
    path = str(make(tmp_path, n_selected))
    config = LMInfConfig(n_global=n_global, n_recall=n_recall)
    n_blocks = n_selected - -(-n_global // BLOCK) - n_recall
    expected = n_selected - n_global - n_recall if make is write else (n_blocks - 1) * BLOCK + 1
    llm = Llama(path, lminf=config, verbose=False)
    assert llm.scheduler.window.n_local == expected
    llm.eval(TOKENS[:200].tolist())
    llm.close()
    for larger, n_ctx in ((replace(config, n_local=expected + 1), None), (config, n_global + expected + 1)):
        with pytest.raises(ValueError, match=r"that it selects, and (w|c)ould have .*: choose [^:]+$"):
            Llama(path, lminf=larger, n_ctx=n_ctx, verbose=False)


def test_so_it_is_with_lminf_true_and_in_a_program_that_asks_for_more(tmp_path: Path) -> None:
    path = str(write(tmp_path, 36))
    for llm in (Llama(path, lminf=True, verbose=False), PatchedLlama(path, n_ctx=100, verbose=False)):
        assert llm.n_ctx() == 36
        llm.close()
    overrides = {"deepseek32.attention.indexer.top_k": 50}
    llm = Llama(path, lminf=True, kv_overrides=overrides, verbose=False)
    assert llm.n_ctx() == 50
    llm.close()
    with pytest.raises(ValueError, match="n_global=30 and n_recall=6 leave no room for a window among the tokens that"):
        Llama(path, lminf=LMInfConfig(n_global=30, n_recall=6), verbose=False)


def test_room_for_more_sinks_is_left(tmp_path: Path) -> None:
    engine = load_engine(str(write(tmp_path, 100)), max_sinks=40, verbose=False)
    assert (engine.n_sinks, engine.max_sinks, engine.window.n_local) == (10, 40, 60)
    engine.close()
    engine.model.close()


@pytest.mark.parametrize(("make", "n_selected"), WRITERS)
def test_info_says_so_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path, int], Path], n_selected: int
) -> None:
    path = str(make(tmp_path, n_selected))
    assert main(["info", "-m", path, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    llm = Llama(path, lminf=True, verbose=False)
    window = llm.scheduler.window
    assert (report["window"]["n_local"], report["window"]["kv_bytes"]) == (window.n_local, llm.stream_info().kv_bytes)
    assert report["recommended"] == f"--n-global 10 --n-local {window.n_local} --kv-type f16"
    llm.close()
    n_values = kinds.N_LORA + kinds.N_ROT if make is write else 2 * N_HEAD_KV * HEAD
    assert report["kv_bytes_per_token"]["f16"] == 2 * 2 * n_values  # of both layers; what selects takes no more for it
    assert main(["info", "-m", path, "--n-local", "100"]) == 1
    assert "that it selects" in capfd.readouterr().err
