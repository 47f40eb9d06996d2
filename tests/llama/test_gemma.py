"""A real pretrained model with two kinds of layers: Gemma 3 270M. 15 slide over 512 tokens, 3 have full attention.

make real-models downloads it; without it these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.gguf_file import copy_as_f32
from repository import ROOT, script
from test_llama_folder import process

from lminf_edge import Llama, LMInfConfig
from lminf_edge.evaluate import token_nll

real_models = script("real_models")

MakeGemma = Callable[..., Llama]


@pytest.fixture(scope="module")
def gemma_path() -> str:
    path: Path = real_models.FOLDER / real_models.NAMED_MODELS["gemma"].file
    if not path.exists():
        pytest.skip("build/models has no Gemma 3 270M: make real-models")
    return str(path)


@pytest.fixture
def make_gemma(gemma_path: str) -> Iterator[MakeGemma]:
    made: list[Llama] = []

    def make(n_global: int, n_local: int, **options: Any) -> Llama:
        config = LMInfConfig(n_global=n_global, n_local=n_local)
        made.append(Llama(gemma_path, lminf=config, verbose=False, n_batch=256, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture(scope="module")
def prose(gemma_path: str) -> np.ndarray:
    """1,000 tokens of English that hang together, int32 (n_tokens,)."""
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    text = license_text + "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    llm = Llama(gemma_path, vocab_only=True, verbose=False)
    tokens = np.array(llm.tokenize(text.encode(), add_bos=True)[:1000], dtype=np.int32)
    llm.close()
    return tokens


def test_inside_the_window_it_is_full_attention(gemma_path: str, prose: np.ndarray, tmp_path: Path) -> None:
    """Past the sliding layers' 512 tokens, before the window is full.

    In f32: with quantized weights llama.cpp rounds activations, which makes 0.06 nats a token out of any last bit.
    What is left is GELU, which llama.cpp looks up in a table of f16: 5e-4 nats a token.
    """
    path = str(tmp_path / "gemma-f32.gguf")
    copy_as_f32(gemma_path, path)
    f32: dict[str, Any] = {"type_k": 0, "type_v": 0, "n_batch": 256, "verbose": False}
    losses = []
    for options in ({"n_ctx": 1024, "logits_all": True}, {"lminf": LMInfConfig(n_global=10, n_local=1014)}):
        llm = Llama(path, **options, **f32)
        losses.append(token_nll(llm, prose[:600]))
        llm.close()
    difference = np.abs(losses[0] - losses[1])
    assert difference.mean() < 2e-3
    assert difference.max() < 0.1


def test_past_the_window_first_tokens_matter(make_gemma: MakeGemma, prose: np.ndarray) -> None:
    with_sinks = token_nll(make_gemma(10, 502), prose)[650:]
    without = token_nll(make_gemma(0, 512), prose)[650:]
    assert np.isfinite(with_sinks).all()
    assert with_sinks.mean() < without.mean() - 0.05


def test_it_tells_its_kinds_of_layers(make_gemma: MakeGemma) -> None:
    parts = make_gemma(10, 1014).stream_info().parts
    assert (parts.n_layer_full, parts.n_layer_sliding, parts.n_layer_recurrent) == (3, 15, 0)


@pytest.mark.filterwarnings("ignore:The attention window")
def test_it_chats_past_the_window(make_gemma: MakeGemma) -> None:
    """Each turn processes what is new, long after the first one has left the window."""
    llm = make_gemma(10, 246, chat_format="gemma", seed=1)
    messages: list[Any] = []
    for turn in range(6):
        messages.append(
            {"role": "user", "content": f"Story {turn}. " + "The ferry left at six, and nobody slept. " * 8}
        )
        n_before = llm.scheduler.counters.prefilled_tokens
        message = llm.create_chat_completion(messages, max_tokens=24, temperature=0.8)["choices"][0]["message"]
        assert message["content"].strip()
        messages.append(message)
        assert turn == 0 or llm.scheduler.counters.prefilled_tokens - n_before < 150
    assert llm.stream_info().evicted > 0


def test_a_stream_goes_on_in_another_process(
    gemma_path: str, prose: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of a window shorter than the sliding layers'
    answer, from_files, _ = process(gemma_path, tmp_path / "none", [prose[:350]])
    assert from_files == 0
    process(gemma_path, tmp_path / "kept", [prose[:300]])
    assert process(gemma_path, tmp_path / "kept", [prose[:350]]) == (answer, 1, 51)
