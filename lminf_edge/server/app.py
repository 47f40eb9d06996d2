"""The ASGI application: routes, guard, shutdown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

import lminf_edge
from lminf_edge.server import (
    embedding_routes,
    llama_cpp_routes,
    messages_routes,
    metrics,
    openai_routes,
    response_routes,
)
from lminf_edge.server.embedder import Embedder
from lminf_edge.server.errors import add_error_handlers
from lminf_edge.server.security import SecurityMiddleware
from lminf_edge.server.settings import Settings, origin_pattern
from lminf_edge.server.state import ServerState
from lminf_edge.text.service import TextService

PAGE = Path(__file__).parent / "page"


def create_app(service: TextService | None, settings: Settings, embedder: Embedder | None = None) -> FastAPI:
    """An ASGI application. The caller closes the service's engine after the application has shut down.

        engine = load_engine("model.gguf", parallel=4)
        app = create_app(TextService(engine), Settings("model"))

    service   the engine and what turns text into tokens; None: for embeddings alone
    settings  the model's name, keys, limits
    embedder  for /v1/embeddings; None: such requests are refused
    """
    state = ServerState(service, settings, embedder)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.close(0)

    app = FastAPI(
        title="lminf-edge",
        summary="Endless conversations with GGUF models, by OpenAI's, Anthropic's and llama.cpp's APIs.",
        version=lminf_edge.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = state
    app.include_router(openai_routes.router)
    app.include_router(openai_routes.unprefixed)
    app.include_router(response_routes.router)
    app.include_router(response_routes.unprefixed)
    app.include_router(messages_routes.router)
    app.include_router(llama_cpp_routes.router)
    app.include_router(embedding_routes.router)
    app.include_router(metrics.router)
    add_error_handlers(app)

    if settings.page and service is not None:

        @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)  # Claude Code asks for the head first
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.mount("/docs/ui", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="docs")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.add_middleware(SecurityMiddleware, settings=settings, stopping=state.stopping, budget=state.budget)
    # around the guard: a listed page must be able to read why it was refused
    app.add_middleware(
        CORSMiddleware,
        allow_origin_regex=origin_pattern(settings.origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
    )
    return app
