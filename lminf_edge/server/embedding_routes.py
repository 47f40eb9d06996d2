"""Embeddings and rankings, in OpenAI's, llama-server's, Jina's and TEI's forms."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from lminf_edge.server.bodies import BodyRoute
from lminf_edge.server.embedder import Embedder, Vectors
from lminf_edge.server.errors import ApiError
from lminf_edge.server.openai_routes import PROBLEMS
from lminf_edge.server.requests import (
    MAX_INPUTS,
    EmbeddingInput,
    EmbeddingRequest,
    PromptText,
    RerankRequest,
    TextContent,
)
from lminf_edge.server.state import ServerState
from lminf_edge.server.streaming import encoded, in_thread

router = APIRouter(tags=["embeddings"], route_class=BodyRoute)


def embedder_of(state: ServerState, ranks: bool) -> Embedder:
    """Raises ApiError if the server was not started with one of the kind."""
    option, what = ("--reranking", "rankings") if ranks else ("--embeddings", "embeddings")
    if state.embedder is None or state.embedder.ranks != ranks:
        raise ApiError(501, f"This server makes no {what}: start it with {option}.", f"{what}_disabled")
    return state.embedder


def inputs_of(embedder: Embedder, given: Any, is_cancelled: Callable[[], bool]) -> list[list[int]]:
    """The tokens of each text of a request. Raises ApiError and RequestCancelled."""
    is_list = isinstance(given, list) and not any(isinstance(part, int) for part in given)
    inputs = given if is_list else [given]
    if not 0 < len(inputs) <= MAX_INPUTS:
        raise ApiError(400, f"input: there may be 1 to {MAX_INPUTS} of them, not {len(inputs)}.", param="input")
    return [embedder.tokens_of(_text(each), is_cancelled) for each in inputs]


def _text(given: EmbeddingInput) -> str | list[Any]:
    if isinstance(given, PromptText):
        if given.multimodal_data:
            raise ApiError(400, "input.multimodal_data: only text can be read.", param="input")
        return given.prompt_string
    if isinstance(given, TextContent):
        return "".join(part.text for part in given.content)
    return given


async def respond_embeddings(request: Request, body: EmbeddingRequest, as_openai: bool) -> Response:
    state = ServerState.of(request)
    embedder = embedder_of(state, ranks=False)
    if as_openai and embedder.keeps_tokens:
        raise ApiError(400, "With --pooling none there is a vector for each token: ask /embeddings, without /v1.")
    cancelled = threading.Event()

    def told(vectors: Vectors) -> Any:
        if not as_openai:
            return vectors.tolist()
        if body.encoding_format == "base64":
            return base64.b64encode(np.asarray(vectors[0], dtype="<f4").tobytes()).decode("ascii")
        return vectors[0].tolist()

    def embed() -> Response:
        found, n_tokens = embedder.embed(inputs_of(embedder, body.input, cancelled.is_set), cancelled.is_set)
        if not as_openai:
            return encoded([{"index": i, "embedding": told(vectors)} for i, vectors in enumerate(found)])
        data = [{"object": "embedding", "index": i, "embedding": told(vectors)} for i, vectors in enumerate(found)]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return encoded({"object": "list", "data": data, "model": state.settings.model_name, "usage": usage})

    return await in_thread(request, embed, cancelled.set)


@router.post("/v1/embeddings", response_model=None, responses=PROBLEMS)
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A vector for each text. The server must be started with --embeddings."""
    return await respond_embeddings(request, body, as_openai=True)


@router.post("/embeddings", response_model=None, responses=PROBLEMS)
@router.post("/embedding", response_model=None, include_in_schema=False)
async def llama_cpp_embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A list of vectors for each text, in llama-server's form; with --pooling none one for each token."""
    return await respond_embeddings(request, body, as_openai=False)


@router.post("/rerank", response_model=None, responses=PROBLEMS)
@router.post("/reranking", response_model=None, include_in_schema=False)
@router.post("/v1/rerank", response_model=None, include_in_schema=False)
@router.post("/v1/reranking", response_model=None, include_in_schema=False)
async def rerank(request: Request, body: RerankRequest) -> Response:
    """Documents in the order of how well they answer a query. The server must be started with --reranking."""
    state = ServerState.of(request)
    embedder = embedder_of(state, ranks=True)
    is_tei = body.documents is None
    cancelled = threading.Event()

    def rank() -> Response:
        documents = body.given
        scores, n_tokens = embedder.rank(body.query, documents, cancelled.is_set)
        results: list[dict[str, Any]] = []
        for i in sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n]:
            result = {"index": i, "score" if is_tei else "relevance_score": scores[i]}
            results.append({**result, "text": documents[i]} if is_tei and body.return_text else result)
        if is_tei:
            return encoded(results)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        head = {"model": state.settings.model_name, "object": "list", "usage": usage}
        return encoded({**head, "results": results})

    return await in_thread(request, rank, cancelled.set)
