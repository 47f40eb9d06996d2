"""Negative log likelihood of every token of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from lminf_edge.cache.token_log import Tokens, as_tokens
from lminf_edge.errors import UserError
from lminf_edge.evaluate.reader import Reader, reader_of

Nll = npt.NDArray[np.float64]

_BLOCK_BYTES = 8 << 20  # of float64 logits worked on at a time


def token_nll(llm: llama_cpp.Llama | Reader, tokens: Sequence[int] | Tokens) -> Nll:
    """-log p(tokens[i + 1] | tokens[: i + 1]) in nats, float64 (n_tokens - 1,), from an empty stream.

    Works for streams of any length with a Λ cache, and up to n_ctx tokens with a stock llama_cpp.Llama. Beside the
    result, memory is bounded by the logits of one batch. Raises ValueError if a stock context is too small.
    """
    result = np.empty(max(len(tokens) - 1, 0))
    for start, nll in nll_blocks(llm, tokens):
        result[start : start + len(nll)] = nll
    return result


def nll_blocks(
    llm: llama_cpp.Llama | Reader,
    tokens: Sequence[int] | Tokens,
    n_tokens: int | None = None,
    n_bos: int = 0,
    n_read: int = 0,
) -> Iterator[tuple[int, Nll]]:
    """The same, batch by batch: yields (i, nll) where nll[0] is that of token i + 1.

    The stream has n_tokens; None: as many as given. After the last it repeats from the first, without the n_bos. A
    reader that has read the first n_read of them goes on.
    """
    text = as_tokens(tokens)
    n_tokens = len(text) if n_tokens is None else n_tokens
    if n_tokens > len(text) <= n_bos:
        raise UserError(f"{len(text)} tokens are none to repeat after the first {n_bos}.")
    reader = llm if isinstance(llm, Reader) else reader_of(llm)
    if reader.limit is not None and n_tokens - 1 > reader.limit:
        raise UserError(
            f"{n_tokens} tokens do not fit the n_ctx of {reader.limit}: "
            "use a larger n_ctx, or lminf, which has no limit."
        )
    if n_read:
        assert n_read == reader.position
    else:
        reader.clear()
    for start in range(n_read, n_tokens - 1, reader.n_batch):
        at = np.arange(start, min(start + reader.n_batch, n_tokens - 1) + 1)
        batch = text[np.where(at < len(text), at, n_bos + (at - n_bos) % max(len(text) - n_bos, 1))]
        yield start, nll_from_logits(reader.read(batch[:-1]), batch[1:])


def nll_from_logits(logits: npt.NDArray[np.float32], targets: Tokens) -> Nll:
    """-log softmax(logits)[targets] for logits (n_rows, n_vocab) and targets (n_rows,), in float64."""
    result = np.empty(len(targets))
    for start, rows in row_blocks(logits):
        chosen = rows[np.arange(len(rows)), targets[start : start + len(rows)]]
        result[start : start + len(rows)] = -(chosen - log_sum_exp(rows))
    return result


def row_blocks(logits: npt.NDArray[np.float32]) -> Iterator[tuple[int, Nll]]:
    """The rows of logits (n_rows, n_vocab) in float64, a few at a time: yields (i, rows) where rows[0] is logits[i]."""
    n_rows = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(logits), n_rows):
        yield start, logits[start : start + n_rows].astype(np.float64)


def log_sum_exp(rows: Nll) -> Nll:
    """log of the sum of exp over each row: (n_rows, n_vocab), which is used up for it, to (n_rows,)."""
    largest = rows.max(axis=1)
    rows -= largest[:, None]
    np.exp(rows, out=rows)
    result: Nll = np.log(rows.sum(axis=1)) + largest
    return result
