"""token_nll against llama_cpp's own logits, and its independence of batches."""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest
from conftest import MakeLlama

from lminf_edge import LMInfConfig
from lminf_edge.cache.token_log import Tokens
from lminf_edge.evaluate import nll_blocks, token_nll
from lminf_edge.evaluate.reader import LambdaReader


@pytest.fixture(scope="module")
def stock(nano_f32_path: str) -> Iterator[llama_cpp.Llama]:
    llm = llama_cpp.Llama(
        nano_f32_path, n_ctx=512, n_batch=128, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
        type_k=0, type_v=0,
    )  # fmt: skip
    yield llm
    llm.close()


def test_against_the_logits(stock: llama_cpp.Llama, tokens: Tokens) -> None:
    stock.reset()
    stock.eval(tokens[:200].tolist())
    logprobs = stock.logits_to_logprobs(stock.scores[:199])
    expected = -logprobs[np.arange(199), tokens[1:200]]
    nll = token_nll(stock, tokens[:200])
    assert (nll.dtype, nll.shape) == (np.float64, (199,))
    np.testing.assert_allclose(nll, expected, atol=1e-4)
    np.testing.assert_allclose(token_nll(stock, tokens[:200].tolist()), nll)


def test_stock_and_lambda_agree_inside_the_window(
    stock: llama_cpp.Llama, make_llama: MakeLlama, tokens: Tokens
) -> None:
    llm = make_llama(lminf=True, type_k=0, type_v=0)
    np.testing.assert_allclose(token_nll(llm, tokens[:502]), token_nll(stock, tokens[:502]), atol=1e-4)


def test_batches_do_not_matter(make_llama: MakeLlama, tokens: Tokens) -> None:
    expected = token_nll(make_llama(type_k=0, type_v=0), tokens[:600])
    for n_batch in (512, 100, 3):
        llm = make_llama(n_batch=n_batch, type_k=0, type_v=0)
        np.testing.assert_allclose(token_nll(llm, tokens[:600]), expected, atol=1e-4)


def test_from_an_empty_stream_whatever_was_there(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(type_k=0, type_v=0)
    expected = token_nll(llm, tokens[:400])
    llm.eval(tokens[1000:1100])
    np.testing.assert_allclose(token_nll(llm, tokens[:400]), expected, atol=1e-5)
    assert llm.input_ids.tolist() == tokens[:399].tolist()


def test_blocks(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama(n_batch=64)
    blocks = list(nll_blocks(llm, tokens[:200]))
    assert [(start, len(nll)) for start, nll in blocks] == [(0, 64), (64, 64), (128, 64), (192, 7)]
    np.testing.assert_array_equal(np.concatenate([nll for _, nll in blocks]), token_nll(llm, tokens[:200]))


def test_a_reader_that_skips_is_prefill_tail(make_llama: MakeLlama, tokens: Tokens) -> None:
    config = LMInfConfig(n_global=6, n_local=90, prefill="tail", n_tail=2)
    llm, prompt = make_llama(lminf=config, n_batch=64), tokens[:1000]
    answer = llm.generate(prompt.tolist())
    next(answer)
    expected, skipped = llm.scores[-1], llm.stream_info().skipped
    answer.close()
    assert skipped == 1000 - 2 * 90 - 6
    reader = LambdaReader(llm)
    reader.clear()
    reader.read(prompt[:6])
    reader.skip(prompt[6 : 6 + skipped])
    for start in range(6 + skipped, 1000, 64):
        logits = reader.read(prompt[start : start + 64], logits_all=False)
    np.testing.assert_array_equal(logits[-1], expected)
    assert (reader.position, llm.stream_info().skipped) == (1000, skipped)
    assert [reader.sees(at) for at in (5, 6, 819, 911, 999)] == [True, False, False, True, True]


def test_nothing_to_predict(make_llama: MakeLlama, tokens: Tokens) -> None:
    llm = make_llama()
    assert token_nll(llm, []).shape == token_nll(llm, tokens[:1]).shape == (0,)
    assert token_nll(llm, tokens[:2]).shape == (1,)


def test_a_stock_context_that_is_too_small(stock: llama_cpp.Llama, tokens: Tokens) -> None:
    assert len(token_nll(stock, tokens[:513])) == 512
    with pytest.raises(ValueError, match="514 tokens do not fit the n_ctx of 512"):
        token_nll(stock, tokens[:514])
    # and it works as before
    assert stock("Anna", max_tokens=3)["usage"]["completion_tokens"] == 3
