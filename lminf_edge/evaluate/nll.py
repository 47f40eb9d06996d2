"""Negative log likelihood of every token of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from lminf_edge import Llama
from lminf_edge.history import Tokens, as_tokens

Nll = npt.NDArray[np.float64]

_BLOCK_BYTES = 8 << 20  # of float64 logits worked on at a time


def token_nll(llm: llama_cpp.Llama, tokens: Sequence[int] | Tokens) -> Nll:
    """-log p(tokens[i + 1] | tokens[: i + 1]) in nats, float64 (n_tokens - 1,), from an empty stream.

    Works for streams of any length with a Λ cache, and up to n_ctx tokens with a stock llama_cpp.Llama. Beside the
    result, memory is bounded by the logits of one batch. Raises ValueError if a stock context is too small.
    """
    result = np.empty(max(len(tokens) - 1, 0))
    for start, nll in nll_blocks(llm, tokens):
        result[start : start + len(nll)] = nll
    return result


def nll_blocks(llm: llama_cpp.Llama, tokens: Sequence[int] | Tokens) -> Iterator[tuple[int, Nll]]:
    """The same, batch by batch: yields (i, nll) where nll[0] is that of tokens[i + 1]."""
    text = as_tokens(tokens)
    stream = llm.stream if isinstance(llm, Llama) and llm.has_stream else None
    if stream is None and len(text) - 1 > llm.n_ctx():
        raise ValueError(
            f"{len(text)} tokens do not fit the n_ctx of {llm.n_ctx()}: "
            "use a larger n_ctx, or lminf, which has no limit."
        )
    llm.reset()
    llm._ctx.kv_cache_clear()
    for start in range(0, len(text) - 1, llm.n_batch):
        batch = text[start : min(start + llm.n_batch, len(text) - 1)]
        if stream is not None:
            stream.decode(batch, logits_all=True)
            logits = stream.logits_block()
        else:
            llm._batch.set_batch(batch.tolist(), n_past=start, logits_all=True)
            llm._ctx.decode(llm._batch)
            logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(batch), llm.n_vocab()))
        yield start, nll_from_logits(logits, text[start + 1 : start + 1 + len(batch)])
    if stream is None:
        llm._ctx.kv_cache_clear()


def nll_from_logits(logits: npt.NDArray[np.float32], targets: Tokens) -> Nll:
    """-log softmax(logits)[targets] for logits (n_rows, n_vocab) and targets (n_rows,), in float64."""
    result = np.empty(len(targets))
    n_rows = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(targets), n_rows):
        rows = logits[start : start + n_rows].astype(np.float64)
        chosen = rows[np.arange(len(rows)), targets[start : start + n_rows]]
        largest = rows.max(axis=1)
        rows -= largest[:, None]
        np.exp(rows, out=rows)
        result[start : start + n_rows] = np.log(rows.sum(axis=1)) + largest - chosen
    return result
