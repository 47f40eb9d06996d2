"""Measuring a model on a stream."""

from lminf_edge.evaluate.nll import nll_blocks, token_nll

__all__ = ["nll_blocks", "token_nll"]
