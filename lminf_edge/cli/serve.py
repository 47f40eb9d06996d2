"""Serves a model to chat front ends through OpenAI's and llama.cpp's APIs, with a page to try it on.

Conversations may be of any length: of a history that is sent again, only what is new is processed. Conversations not in
use are kept in memory, then in files, and survive a restart. The sampling options hold for what a request leaves out. A
request without a token limit ends with finish_reason "length" once the model repeats itself exactly, again and again.

--json prints, once the server is ready,
  url, model, pid, sink, window, parallel, kv_bytes, folder (null if nothing is kept on disk)
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import (
    CommandError,
    add_compute,
    add_model,
    add_sampling,
    add_window,
    file_path,
    human_bytes,
    model_header,
    model_settings,
    options_named,
    print_json,
    require_vocabulary,
    sampling_params,
    size,
    whole_number,
    window_config,
)
from lminf_edge.errors import UserError

if TYPE_CHECKING:
    from lminf_edge.engine import Engine
    from lminf_edge.server.state import Embedder

HELP = "serve a model to chat front ends (needs the extra [server])"

KEY_VARIABLE = "LMINF_API_KEY"
MAX_PARALLEL = 64
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# what desktop apps made with Tauri, such as Jan, send; no page on the web has them
APP_ORIGINS = ("tauri://localhost", "http://tauri.localhost", "https://tauri.localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=whole_number(0, 65535), default=8080, help="default 8080; 0: any free port")
    parser.add_argument("--alias", metavar="NAME", help="the model's name for clients; default: its file name")
    parser.add_argument("--chat-format", metavar="NAME", help="one of llama_cpp's, instead of the model's own template")
    parser.add_argument("--embeddings", action="store_true", help="also serve /v1/embeddings, from a second context")
    add_conversations(parser)
    group = parser.add_argument_group("safety")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"asked from clients; must be given for an address other than this machine's; default ${KEY_VARIABLE}",
    )
    group.add_argument("--api-key-file", metavar="FILE", type=file_path, help="the same, from the first line of a file")
    group.add_argument(
        "--allowed-origin",
        metavar="URL",
        action="append",
        default=[],
        help="a web page that may use this server; repeatable",
    )
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name this server is reached by; repeatable",
    )
    group.add_argument("--max-body", metavar="SIZE", type=size, default=64 << 20, help="of a request; default 64M")
    group.add_argument(
        "--max-requests", metavar="N", type=whole_number(1, 4096), default=64, help="open at a time; default 64"
    )
    group.add_argument("--log-messages", action="store_true", help="write what people say into the log")
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole_number(-1),
        default=-1,
        help="limit for requests that set none; default -1, as 0: no limit",
    )
    add_sampling(parser)
    add_window(parser)
    add_compute(parser, stock=False)


def add_conversations(parser: argparse.ArgumentParser) -> None:
    """Options about conversations, for serve and chat."""
    group = parser.add_argument_group("conversations")
    group.add_argument(
        "--parallel",
        metavar="N",
        type=whole_number(1, MAX_PARALLEL),
        default=4,
        help="conversations in the context, answered together; each takes a whole KV cache; default 4",
    )
    group.add_argument(
        "--pin-system",
        action="store_true",
        help="keep a conversation's system block as its first tokens, which are never forgotten, up to --max-sinks",
    )
    group.add_argument("--max-sinks", metavar="N", type=whole_number(0), help="default: G, or 256 with --pin-system")
    group.add_argument(
        "--on-trim",
        choices=("continue", "reread"),
        default="continue",
        help="when a front end drops the oldest messages: go on with the stream that knew them, or read what is sent",
    )
    group.add_argument(
        "--memory", metavar="SIZE", type=size, default=1 << 30, help="for conversations not in the context; default 1G"
    )
    group.add_argument(
        "--disk", metavar="SIZE", type=size, default=8 << 30, help="for their files; default 8G; 0: none"
    )
    group.add_argument(
        "--folder", metavar="DIR", type=file_path, help="of these files; default: the user's data folder"
    )


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine of the command line. Raises ValueError, MemoryError or CommandError, in one sentence."""
    from lminf_edge.engine import load_engine
    from lminf_edge.engine.params import Defaults
    from lminf_edge.native import captured_errors, load_failure

    defaults = Defaults(sampling_params(args), args.max_tokens if args.max_tokens > 0 else None, args.detect_loops)
    path, _ = model_header(args.model)
    max_sinks = args.max_sinks if args.max_sinks is not None else 256 * args.pin_system
    folder = None if args.disk == 0 else args.folder or default_folder()
    with options_named(), captured_errors() as errors:
        try:
            engine = load_engine(
                path,
                parallel=args.parallel,
                lminf=window_config(args),
                max_sinks=max_sinks,
                pin_system=args.pin_system,
                on_trim=args.on_trim,
                folder=folder,
                memory_budget=args.memory,
                disk_budget=args.disk,
                chat_format=args.chat_format,
                verbose=False,
                **model_settings(args),
            )
        except ValueError as error:
            raise UserError(load_failure(path, errors) or str(error)) from error
    try:
        require_vocabulary(engine.llm)
    except CommandError:
        engine.close()
        engine.llm.close()
        raise
    engine.defaults = defaults
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it takes llama.cpp's warnings for errors
    return engine


def default_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("lminf-edge", appauthor=False) / "conversations"


def run(args: argparse.Namespace) -> int:
    check_server_installed()
    import uvicorn

    from lminf_edge.server import Settings, create_app
    from lminf_edge.server.security import MAX_HEADER_BYTES

    key = api_key(args)
    if args.host not in LOOPBACK and key is None:
        raise CommandError(f"To listen at {args.host}, which others can reach, give --api-key or set {KEY_VARIABLE}.")
    with ExitStack() as stack:
        sock = stack.enter_context(listen(args.host, args.port))
        engine = open_engine(args)
        name = args.alias or Path(args.model).stem
        settings = Settings(
            model_name=name,
            api_key=key,
            hosts=allowed_hosts(args.host, args.allowed_host),
            origins=(*APP_ORIGINS, *(origin.rstrip("/") for origin in args.allowed_origin)),
            max_body=args.max_body,
            max_requests=args.max_requests,
            log_messages=args.log_messages,
        )
        app = create_app(engine, settings, open_embedder(args, stack))
        stack.callback(engine.llm.close)  # when nobody uses it any more:
        stack.callback(app.state.server.threads.shutdown)
        stack.callback(engine.close)
        # uvicorn raises the signal that ended it once more, in a handler of its own if there is one: then what is
        # above happens, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        show_log(args.log_messages)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{sock.getsockname()[1]}"
        announce(args, engine, name, url)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_level="warning" if args.json else "info",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=args.max_requests + 256,  # connections; those beyond the limit are told so by the guard
            timeout_graceful_shutdown=3,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[sock])
    return 0


def check_server_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import fastapi_offline  # noqa: F401
        import platformdirs  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise CommandError(f'{error.name} is missing: install the extra, pip install "lminf-edge[server]".') from None


def show_log(messages: bool) -> None:
    """Our log goes where uvicorn's goes, to stderr."""
    log = logging.getLogger("lminf_edge.server")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO if messages else logging.WARNING)


def api_key(args: argparse.Namespace) -> str | None:
    """The key clients must send, None for none. Raises CommandError for one that is no key."""
    key: str | None = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)
    if args.api_key_file is not None:
        lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
        key = lines[0] if lines else ""
    if key is not None and not key.strip():
        raise CommandError("The API key is empty.")
    return None if key is None else key.strip()


def allowed_hosts(host: str, more: list[str]) -> tuple[str, ...]:
    """Names a Host header may carry: this machine's, those listed, and the address unless it is all of them."""
    names = [*LOOPBACK, *more]
    if host not in ("0.0.0.0", "::"):
        names.append(host)
    return tuple(dict.fromkeys(name.lower() for name in names))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises CommandError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is said; it would hold answers back for 40 ms
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise CommandError(f"Port {port} of {host} cannot be used: {error.strerror}.") from error
    return sock


def open_embedder(args: argparse.Namespace, stack: ExitStack) -> Embedder | None:
    if not args.embeddings:
        return None
    from lminf_edge import Llama
    from lminf_edge.native import captured_errors
    from lminf_edge.server.state import Embedder

    path, header = model_header(args.model)
    n_ctx = header.n_ctx_train or 512
    settings: dict[str, Any] = {**model_settings(args), "n_batch": n_ctx, "n_ubatch": n_ctx}
    with captured_errors():
        llm = Llama(path, embedding=True, n_ctx=n_ctx, verbose=False, **settings)
    stack.callback(llm.close)
    return Embedder(llm)


def announce(args: argparse.Namespace, engine: Engine, name: str, url: str) -> None:
    folder = engine.store.folder
    if args.json:
        print_json(
            {
                "url": url,
                "model": name,
                "pid": os.getpid(),
                "sink": engine.n_sinks,
                "window": engine.window.n_local,
                "parallel": len(engine.slots),
                "kv_bytes": engine.kv_bytes,
                "folder": None if folder is None else str(folder),
            }
        )
    else:
        print(f"{name} at {url}, API at {url}/v1")
        print(
            f"window {engine.n_sinks} + {engine.window.n_local} tokens; {len(engine.slots)} conversations at a time in "
            f"{human_bytes(engine.kv_bytes)} of KV cache; others in {human_bytes(args.memory)} of memory"
            + (f" and {human_bytes(args.disk)} in {folder}" if folder else "")
        )
    print(end="", flush=True)
