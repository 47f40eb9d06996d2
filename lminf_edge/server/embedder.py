"""Embeddings and rankings of texts, from a context of their own."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as bindings

from lminf_edge.engine.request import RequestCancelled
from lminf_edge.llama import Llama
from lminf_edge.scores import check_numbers
from lminf_edge.server.errors import ApiError
from lminf_edge.text.tokenizer import LONG_TEXT, Tokenizer, in_turn

Vectors = npt.NDArray[np.float32]  # (n_vectors, n_embd): one, or one for each token if nothing pools them

POOLINGS: dict[str, int] = {
    "none": llama_cpp.LLAMA_POOLING_TYPE_NONE,
    "mean": llama_cpp.LLAMA_POOLING_TYPE_MEAN,
    "cls": llama_cpp.LLAMA_POOLING_TYPE_CLS,
    "last": llama_cpp.LLAMA_POOLING_TYPE_LAST,
    "rank": llama_cpp.LLAMA_POOLING_TYPE_RANK,
}


@dataclass
class EmbedderCounters:
    tokens: int = 0
    batches: int = 0
    longest: int = 0


class Embedder:
    """One text at a time."""

    def __init__(self, llm: Llama, keeps_tokens: bool = False) -> None:
        """
        llm           loaded with embedding=True
        keeps_tokens  where nothing pools the tokens of a text, their vectors are wanted; else their mean stands for it
        """
        self.llm, self._lock = llm, threading.Lock()
        self._long = threading.Lock()  # long texts take turns, see CachedTokenizer
        self.counters = EmbedderCounters()
        pooling = int(llm.pooling_type())
        self.ranks = pooling == POOLINGS["rank"]
        self.pools = pooling != POOLINGS["none"]
        self.keeps_tokens = keeps_tokens and not self.pools
        # llama.cpp rounds contexts up, beyond the positions that the model has
        self.n_most = min(llm.n_ctx(), llm.n_batch, llm._model.n_ctx_train() or llm.n_ctx())

    def tokens_of(self, text: str | Sequence[int | str], is_cancelled: Callable[[], bool] = lambda: False) -> list[int]:
        """The tokens of a text, which may be tokens already, or both mixed.

        Raises ApiError for ids out of range, and RequestCancelled.
        """
        if is_cancelled():
            raise RequestCancelled
        if isinstance(text, str):
            return self._tokens(text, is_cancelled, add_special=True)
        tokens: list[int] = []
        for part in text:
            if is_cancelled():
                raise RequestCancelled
            tokens += self._tokens(part, is_cancelled, add_special=False) if isinstance(part, str) else [part]
        if any(not 0 <= token < self.llm.n_vocab() for token in tokens):
            raise ApiError(400, f"input: this model's tokens are 0 to {self.llm.n_vocab() - 1}.", param="input")
        return tokens

    def _tokens(
        self, text: str, is_cancelled: Callable[[], bool], add_special: bool, special: bool = False
    ) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        with in_turn(self._long, is_cancelled) if len(data) > LONG_TEXT else contextlib.nullcontext():
            tokens: list[int] = Tokenizer(self.llm).token_array(data, add_special, special, is_cancelled).tolist()
            return tokens

    def embed(
        self, inputs: Sequence[Sequence[int]], is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[list[Vectors], int]:
        """Vectors for each text (n_tokens,), and the number of tokens in all; those so far once it is cancelled.

        They have length 1, but not those of single tokens. Raises ApiError for a text too long.
        """
        found, n_tokens = [], 0
        for tokens in inputs:
            if is_cancelled():
                break
            vectors = self._run(tokens)
            if not self.pools and not self.keeps_tokens:
                vectors = vectors.mean(axis=0, keepdims=True)
            if not self.keeps_tokens:
                vectors = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) or 1.0)
            found.append(vectors)
            n_tokens += len(tokens)
        return found, n_tokens

    def rank(
        self, query: str, documents: Sequence[str], is_cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[list[float], int]:
        """How well each document answers the query, and the number of tokens in all.

        Raises as `embed` does, and RequestCancelled.
        """
        scores, n_tokens = [], 0
        for document in documents:
            if is_cancelled():
                break
            tokens = self._pair(query, document, is_cancelled)
            scores.append(float(self._run(tokens)[0, 0]))
            n_tokens += len(tokens)
        return scores, n_tokens

    def _pair(self, query: str, document: str, is_cancelled: Callable[[], bool]) -> list[int]:
        """A query and a document as the model knows them: by its template, or with a separator between them."""
        template = self.llm.metadata.get("tokenizer.chat_template.rerank")
        if template:
            given = {"{query}": query, "{document}": document}
            text = "".join(given.get(part, part) for part in re.split(r"({query}|{document})", template))
            return self._tokens(text, is_cancelled, add_special=False, special=True)
        vocab = self.llm._model.vocab
        end = bindings.llama_vocab_eos(vocab)
        separator = bindings.llama_vocab_sep(vocab)
        end = separator if end < 0 else end
        ends = [end] if bindings.llama_vocab_get_add_eos(vocab) else []
        return [
            *([bindings.llama_vocab_bos(vocab)] if bindings.llama_vocab_get_add_bos(vocab) else []),
            *self._tokens(query, is_cancelled, add_special=False),
            *ends,
            *([separator] if bindings.llama_vocab_get_add_sep(vocab) else []),
            *self._tokens(document, is_cancelled, add_special=False),
            *ends,
        ]

    def _run(self, tokens: Sequence[int]) -> Vectors:
        llm = self.llm
        if not 1 <= len(tokens) <= self.n_most:
            what = "is empty" if not tokens else f"of {len(tokens)} tokens is too large"
            raise ApiError(400, f"input: a text {what}: it may have 1 to {self.n_most} tokens.", param="input")
        context: Any = llm._ctx
        with self._lock:
            llm._batch.reset()
            llm._batch.add_sequence(list(tokens), 0, True)
            context.kv_cache_clear()
            context.decode(llm._batch)
            llm._batch.reset()
            self.counters.tokens += len(tokens)
            self.counters.batches += 1
            self.counters.longest = max(self.counters.longest, len(tokens))
            shape = (1 if self.pools else len(tokens), 1 if self.ranks else llm.n_embd())
            if self.pools:
                pointer = bindings.llama_get_embeddings_seq(context.ctx, 0)
            else:
                pointer = bindings.llama_get_embeddings(context.ctx)
            vectors: Vectors = np.ctypeslib.as_array(pointer, shape=shape).copy()
        check_numbers(np.abs(vectors))
        return vectors
