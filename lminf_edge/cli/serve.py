"""Serves a model to chat front ends and agents through OpenAI's, Anthropic's and llama.cpp's APIs, with a page.

Conversations may be of any length: of a history sent again, only the new part is processed. Conversations not in use
are kept in memory, then in files, and survive a restart. The sampling options are defaults for requests. A request
without a token limit ends with finish_reason "length" once the model repeats itself exactly, over and over.

--json prints, once the server is ready,
  url, model, pid, sink, window (null without one), parallel, kv_bytes, folder (null if nothing is kept on disk)
  (of a server of embeddings or rankings alone, the first three)
  parts: n_layer_full, n_layer_sliding, n_layer_recurrent, n_layer_fused, window_bytes, sink_bytes, sliding_bytes,
  recurrent_bytes
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import (
    CommandError,
    chat_defaults,
    describe_layers,
    gpu_note,
    human_bytes,
    model_header,
    model_settings,
    options_named,
    print_json,
    require_vocabulary,
    sampling_params,
    show_note,
    weightless,
    window_config,
)
from lminf_edge.cli.options import (
    add_chat_template,
    add_compute,
    add_drafts,
    add_model,
    add_prefill,
    add_sampling,
    add_window,
)
from lminf_edge.cli.values import addresses, file_path, names, size, whole_number
from lminf_edge.errors import UserError

if TYPE_CHECKING:
    from lminf_edge.engine.engine import Engine
    from lminf_edge.server.connections import Server
    from lminf_edge.server.embedder import Embedder
    from lminf_edge.server.state import ServerState
    from lminf_edge.text.service import TextService

HELP = "serve a model to chat front ends"

KEY_VARIABLE = "LMINF_API_KEY"
MAX_PARALLEL = 64
FAILED = 1
CLOSE_SECONDS = 1.0  # for worker threads whose clients are gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--host",
        type=addresses,
        default=("127.0.0.1",),
        help="address to listen on, or several with commas between them; default 127.0.0.1, this machine only",
    )
    parser.add_argument("--port", type=whole_number(0, 65535), default=8080, help="default 8080; 0: any free port")
    parser.add_argument(
        "--alias",
        metavar="NAME,...",
        type=names,
        help="the model's name for clients, of several the first in the alphabet; default: its file name",
    )
    parser.add_argument("--tags", metavar="NAME,...", type=names, default=(), help="labels for /v1/models")
    parser.add_argument("--no-ui", dest="page", action="store_false", help="no page to chat on")
    parser.add_argument("--no-slots", dest="slots", action="store_false", help="tell nothing of slots at /slots")
    parser.add_argument("--no-metrics", dest="metrics", action="store_false", help="tell no figures at /metrics")
    add_chat_template(parser)
    parser.add_argument(
        "--embeddings",
        action="store_true",
        help="also serve /v1/embeddings, from a second context; a model that is no text generator serves them alone",
    )
    parser.add_argument(
        "--reranking", action="store_true", help="serve /rerank alone, with a model that was made for that"
    )
    parser.add_argument(
        "--pooling",
        choices=("none", "mean", "cls", "last", "rank"),
        help="what makes one vector of those of a text's tokens; default: as the model says, else mean",
    )
    add_conversations(parser)
    group = parser.add_argument_group("safety")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        action="append",
        default=[],
        help="clients must send it; required if --host is not this machine only; repeatable: different keys share "
        f"no cache; default ${KEY_VARIABLE}",
    )
    group.add_argument("--api-key-file", metavar="FILE", type=file_path, help="more keys, one per line of a file")
    group.add_argument(
        "--allowed-origin",
        metavar="URL",
        action="append",
        default=[],
        help="a web page that may use this server; repeatable. localhost: those of this machine, at any port; apps: "
        "those of desktop apps (Electron, Tauri, Obsidian, VS Code, ...)",
    )
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name this server is reached by; repeatable",
    )
    group.add_argument(
        "--max-body", metavar="SIZE", type=size, default=16 << 20, help="largest request body; default 16M"
    )
    group.add_argument(
        "--max-requests",
        metavar="N",
        type=whole_number(1, 4096),
        default=64,
        help="requests answered at a time; default 64",
    )
    group.add_argument("--log-messages", action="store_true", help="log the messages of conversations")
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
    """Options about conversations."""
    group = parser.add_argument_group("conversations")
    group.add_argument(
        "--parallel",
        metavar="N",
        type=whole_number(1, MAX_PARALLEL),
        default=4,
        help="conversations in the context, decoded together; each takes a whole KV cache; default 4",
    )
    group.add_argument(
        "--pin-system",
        action="store_true",
        help="keep a conversation's system block among its first tokens, which never leave, up to --max-sinks",
    )
    group.add_argument("--max-sinks", metavar="N", type=whole_number(0), help="default: G, or 256 with --pin-system")
    add_prefill(group)
    add_drafts(group)
    group.add_argument(
        "--memory",
        metavar="SIZE",
        type=size,
        default=1 << 30,
        help="memory for conversations not in the context; default 1G",
    )
    group.add_argument(
        "--disk", metavar="SIZE", type=size, default=8 << 30, help="disk for their files; default 8G; 0: none"
    )
    group.add_argument(
        "--folder", metavar="DIR", type=file_path, help="folder of these files; default: the user's data folder"
    )
    group.add_argument(
        "--slot-save-path",
        metavar="DIR",
        type=file_path,
        help="let clients save what a slot holds to files in this folder, tokens included; default: they may not",
    )


def open_service(args: argparse.Namespace) -> TextService:
    """Makes the service from the options. Raises UserError or MemoryError, in one sentence."""
    from lminf_edge.engine.loading import load_engine
    from lminf_edge.engine.params import Defaults
    from lminf_edge.native import captured_errors
    from lminf_edge.text.service import LEAST_TEXT_BYTES, TEXT_BYTES, TextService

    limit = args.max_tokens if args.max_tokens > 0 else None
    defaults = Defaults(sampling_params(args), limit, args.detect_loops, drafts=args.spec_type != "none")
    chat = chat_defaults(args)
    path, _ = model_header(args.model)
    max_sinks = args.max_sinks if args.max_sinks is not None else 256 * args.pin_system
    # without remembered texts every turn tokenizes its whole history
    text_bytes = min(max(args.memory // 16, LEAST_TEXT_BYTES), TEXT_BYTES)
    folder = None if args.disk == 0 else args.folder or default_folder()
    with options_named(), captured_errors():
        engine = load_engine(
            path,
            parallel=args.parallel,
            lminf=replace(window_config(args), prefill=args.prefill, n_tail=args.n_tail),
            max_sinks=max_sinks,
            folder=folder,
            memory_budget=args.memory,
            disk_budget=args.disk - (0 if folder is None else response_bytes(args)),
            background=args.background,
            chat_format=args.chat_format,
            verbose=False,
            **model_settings(args),
        )
    try:
        require_vocabulary(engine.model.llama)
        service = TextService(engine, defaults, args.pin_system, text_bytes, chat)
    except UserError:
        engine.close()
        engine.model.close()
        raise
    show_note(engine.model.note)
    show_note(gpu_note(args))
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it reports llama.cpp's warnings as errors
    return service


def response_bytes(args: argparse.Namespace) -> int:
    """What stored responses may take: a part of the disk or, where nothing is kept on disk, of the memory."""
    return int(args.disk or args.memory) // 16


def default_folder() -> Path:
    from platformdirs import user_data_path

    return user_data_path("lminf-edge", appauthor=False) / "conversations"


def run(args: argparse.Namespace) -> int:
    from lminf_edge.server import Settings, create_app
    from lminf_edge.server.connections import Server, listen
    from lminf_edge.server.security import LOOPBACK, allowed_hosts
    from lminf_edge.server.settings import APP_ORIGINS
    from lminf_edge.server.state import freeze_heap, prepare_process

    prepare_process()
    keys = api_keys(args)
    for host in args.host:
        if host not in LOOPBACK and not keys:
            raise CommandError(f"To listen at {host}, which others can reach, give --api-key or set {KEY_VARIABLE}.")
    with ExitStack() as stack:
        sockets = [stack.enter_context(listen(args.host[0], args.port))]
        port = sockets[0].getsockname()[1]
        sockets += [stack.enter_context(listen(host, port)) for host in args.host[1:]]
        embeds_alone = args.reranking or (args.embeddings and not generates(args.model))
        service = None if embeds_alone else open_service(args)
        name = args.alias[0] if args.alias else Path(args.model).stem
        settings = Settings(
            model_name=name,
            aliases=args.alias or (),
            tags=args.tags,
            model_file=Path(model_header(args.model)[0]).name,
            slot_folder=args.slot_save_path,
            page=args.page,
            slots=args.slots,
            metrics=args.metrics,
            api_keys=keys,
            hosts=allowed_hosts(args.host, args.allowed_host),
            origins=(*APP_ORIGINS, *(origin.rstrip("/") for origin in args.allowed_origin)),
            max_body=args.max_body,
            max_requests=args.max_requests,
            max_connections=args.max_requests + 256,
            log_messages=args.log_messages,
            response_bytes=response_bytes(args),
        )
        app = create_app(service, settings, open_embedder(args, stack))
        server = Server(app, log_level="warning" if args.json else "info")
        stack.callback(close, service.engine if service else None, server, app.state.server)
        # uvicorn raises the signal that stopped it again, so that a handler set before it runs: this one exits, and
        # the callbacks above run
        signal.signal(signal.SIGTERM, exit_once)
        show_log(args.log_messages)
        host = f"[{args.host[0]}]" if ":" in args.host[0] else args.host[0]
        url = f"http://{host}:{port}"
        announce(args, service.engine if service else None, name, url)
        freeze_heap()
        server.run(sockets=sockets)
    return FAILED if server.has_failed else 0


def exit_once(*_: Any) -> None:
    """A handler of SIGTERM: a second one must not interrupt the shutdown."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def close(engine: Engine | None, server: Server, state: ServerState) -> None:
    """Closes everything. Threads that still work for clients that are gone end with the process."""
    if engine is not None:
        engine.close()
    if not state.close(CLOSE_SECONDS):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(FAILED if server.has_failed else 0)
    if engine is not None:
        engine.model.close()


def show_log(messages: bool) -> None:
    """Sends our log to stderr, as uvicorn does."""
    log = logging.getLogger("lminf_edge.server")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO if messages else logging.WARNING)


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys that clients may send; empty: no key is required. Raises CommandError for an empty key."""
    keys: list[str] = list(args.api_key)
    if args.api_key_file is not None:
        lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
        in_file = [line for line in lines if line.strip()]
        if not in_file:
            raise CommandError(f"{args.api_key_file} has no API key: write one in each line.")
        keys += in_file
    elif not keys and KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    keys = [key.strip() for key in keys]
    if not all(keys):
        raise CommandError("The API key is empty.")
    return tuple(dict.fromkeys(keys))


def generates(name_or_path: str) -> bool:
    """Whether the model predicts the next token. Raises CommandError or UserError if it cannot be used."""
    path, header = model_header(name_or_path)
    if not header.is_causal:
        return False
    with weightless(path) as model:
        return not model.is_encoder


def open_embedder(args: argparse.Namespace, stack: ExitStack) -> Embedder | None:
    if not (args.embeddings or args.reranking):
        return None
    from lminf_edge import Llama
    from lminf_edge.native import captured_errors
    from lminf_edge.server.embedder import POOLINGS, Embedder

    path, header = model_header(args.model)
    n_ctx = header.n_ctx_train or 512
    settings: dict[str, Any] = {**model_settings(args), "n_batch": n_ctx, "n_ubatch": n_ctx}
    pooling = "rank" if args.reranking else args.pooling
    if pooling is not None:
        settings["pooling_type"] = POOLINGS[pooling]
    with captured_errors():
        llm = Llama(path, embedding=True, n_ctx=n_ctx, verbose=False, **settings)
    stack.callback(llm.close)
    return Embedder(llm, keeps_tokens=pooling == "none")


def announce(args: argparse.Namespace, engine: Engine | None, name: str, url: str) -> None:
    if engine is None:
        what = "rankings" if args.reranking else "embeddings"
        if args.json:
            print_json({"url": url, "model": name, "pid": os.getpid()})
        else:
            print(f"{name} at {url}: {what}")
        print(end="", flush=True)
        return
    folder = engine.store.folder
    if args.json:
        print_json(
            {
                "url": url,
                "model": name,
                "pid": os.getpid(),
                "sink": engine.n_sinks,
                "window": engine.n_local,
                "parallel": len(engine.slots),
                "kv_bytes": engine.parts.kv_bytes,
                "parts": asdict(engine.parts),
                "folder": None if folder is None else str(folder),
            }
        )
    else:
        print(f"{name} at {url}, API at {url}/v1")
        is_constant = engine.model.is_constant
        window = "" if is_constant else f"window {engine.n_sinks} + {engine.n_local} tokens; "
        print(
            f"{window}{len(engine.slots)} conversations at a time in {human_bytes(engine.parts.kv_bytes)} of "
            f"{'states' if is_constant else 'KV cache'}; others in {human_bytes(args.memory)} of memory"
            + (f" and {human_bytes(args.disk)} in {folder}" if folder else "")
        )
        if engine.parts.n_kinds > 1:
            print(f"layers: {describe_layers(engine.parts)}")
    print(end="", flush=True)
