"""How far the predictions of a cache are from those of full attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lminf_edge.cache.token_log import Tokens
from lminf_edge.evaluate.nll import Nll, log_sum_exp, row_blocks
from lminf_edge.evaluate.reader import Reader


def divergence_blocks(reference: Reader, reader: Reader, tokens: Tokens) -> Iterator[tuple[int, Nll]]:
    """KL(reference || reader) of the predictions after each token, in nats, from empty streams, batch by batch.

    Yields (i, divergence) where divergence[0], float64 (n_tokens,), is that after tokens[i]. Memory is bounded by the
    logits of two batches. Raises ValueError if the tokens do not fit a stock context.
    """
    n_batch = min(reference.n_batch, reader.n_batch)
    reference.clear()
    reader.clear()
    for start in range(0, len(tokens), n_batch):
        batch = tokens[start : start + n_batch]
        yield start, kl_from_logits(reference.read(batch), reader.read(batch))


def kl_from_logits(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> Nll:
    """KL(softmax(reference) || softmax(other)) in nats, row by row: (n_rows, n_vocab) both, to float64 (n_rows,)."""
    result = np.empty(len(reference))
    for (start, p), (_, q) in zip(row_blocks(reference), row_blocks(other), strict=True):
        log_p = p - log_sum_exp(p.copy())[:, None]
        log_q = q - log_sum_exp(q.copy())[:, None]
        result[start : start + len(p)] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result
