"""llama-server's own tests, against `lminf-edge serve`: their ServerProcess starts ours instead.

Copied beside the tests' utils.py. ServerProcess has a field for each of llama-server's options; what we have no option
for fails at once, with its name. Every server is forked from this process, which has imported everything: it is up in
0.1 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import requests
import utils

import lminf_edge.engine.loading
import lminf_edge.server.app
import lminf_edge.server.connections  # noqa: F401
from lminf_edge.cli import serve
from lminf_edge.cli.main import Parser, main

SECONDS = 20.0  # for an answer; some tests would wait for ten minutes
PORT = int(os.environ.get("LMINF_TEST_PORT", "8080"))


def known_options() -> set[str]:
    parser = Parser()
    serve.add_arguments(parser)
    return {name for action in parser._actions for name in action.option_strings}


OPTIONS = known_options()


def value(flag: str) -> Callable[[Any], list[str]]:
    """Makes an option of a field's value."""
    return lambda given: [flag, str(given)]


def switch(flag: str) -> Callable[[Any], list[str]]:
    return lambda given: [flag] if given else []


def ignored(_: Any) -> list[str]:
    """For a field that says what is always so here, or where the difference shows in no answer."""
    return []


FIELDS: dict[str, Callable[[Any], list[str]]] = {
    "server_host": value("--host"),
    "api_key": value("--api-key"),
    "temperature": value("--temp"),
    "seed": value("--seed"),
    "model_alias": value("--alias"),
    "model_tags": value("--tags"),
    "n_batch": value("--batch"),
    "n_predict": value("--max-tokens"),
    "n_slots": value("--parallel"),
    "slot_save_path": value("--slot-save-path"),
    "server_embeddings": switch("--embeddings"),
    "server_reranking": switch("--reranking"),
    "pooling": value("--pooling"),
    "chat_template": value("--chat-template"),
    "chat_template_file": value("--chat-template-file"),
    "reasoning": value("--reasoning"),
    "reasoning_format": value("--reasoning-format"),
    "debug": ignored,  # see make_request_as_here
    "no_ui": switch("--no-ui"),
    "cors_origins": value("--allowed-origin"),
    **dict.fromkeys(("model_hf_repo", "model_hf_file", "model_file", "offline", "server_port", "n_ctx"), ignored),
    **dict.fromkeys(("n_ubatch", "fa", "kv_unified", "swa_full", "server_continuous_batching", "jinja"), ignored),
    **dict.fromkeys(("cache_prompt", "external_server", "log_path", "backend_sampling"), ignored),
    "server_slots": lambda given: [] if given else ["--no-slots"],
    "server_metrics": lambda given: [] if given else ["--no-metrics"],
    **dict.fromkeys(("process", "ready", "pid"), ignored),
}


class NotServedError(Exception):
    """A field of ServerProcess that `lminf-edge serve` has no option for."""


def options_of(server: utils.ServerProcess) -> list[str]:
    """The options of `lminf-edge serve` for what a test has set."""
    fields = {name: given for name, given in vars(server).items() if given is not None}
    for name, given in fields.items():
        if name not in FIELDS and given:
            raise NotServedError(f"no option for {name}")
    fields = {"temperature": server.temperature, "seed": server.seed, **fields}
    window = (server.n_ctx or 2048) // (server.n_slots or 4)
    made = ["--port", str(PORT), "--disk", "0", "--threads", "2"]
    made += ["--n-global", "4", "--n-local", str(window - 4), "--prefill", "full"]
    for name, given in fields.items():
        made += FIELDS[name](given) if name in FIELDS else []
    for option in made:
        if option.startswith("--") and option not in OPTIONS:
            raise NotServedError(f"no option {option}")
    return made


def start(self: utils.ServerProcess, timeout_seconds: float = 20) -> None:
    model = models.find(self.model_hf_repo, self.model_hf_file)
    command = ["serve", "-m", str(model), *options_of(self)]
    self.server_port = PORT
    log = Path(self.log_path or "server.log")
    self.pid = os.fork()
    if self.pid == 0:
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
        os._exit(main(command))
    utils.server_instances.add(self)
    until = time.monotonic() + timeout_seconds
    while time.monotonic() < until:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(self.make_url("/health"), timeout=5).ok:
                return
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
            raise RuntimeError("the server did not start: " + log.read_text()[-500:])
        time.sleep(0.01)
    raise TimeoutError("the server does not answer")


def stop(self: utils.ServerProcess) -> None:
    utils.server_instances.discard(self)
    if getattr(self, "pid", 0):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0


utils.ServerProcess.start, utils.ServerProcess.stop = start, stop
send, make_request = requests.Session.send, utils.ServerProcess.make_request


def send_for_a_while(self: requests.Session, request: Any, **kwargs: Any) -> requests.Response:
    return send(self, request, **{**kwargs, "timeout": min(kwargs.get("timeout") or SECONDS, SECONDS)})


def make_request_as_here(
    self: utils.ServerProcess, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any
) -> utils.ServerResponse:
    """What llama-server tells of every request when it is started with --verbose, ours tells of those that ask for it.

    Names of headers have no case, but those of the dict that the tests look into do.
    """
    if self.debug and isinstance(data, dict) and "chat" in path:
        data = {"verbose": True, **data}
    response = make_request(self, method, path, data, *args, **kwargs)
    response.headers = requests.structures.CaseInsensitiveDict(response.headers)
    return response


utils.ServerProcess.make_request = make_request_as_here
requests.Session.send = send_for_a_while  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_server_stays() -> Iterator[None]:
    yield
    for server in list(utils.server_instances):
        server.stop()


results: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has the outcome of its worst part."""
    name = report.nodeid.removeprefix("unit/")
    if report.outcome == "passed" and (report.when != "call" or name in results):
        return
    reason = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = " ".join(str(crash.message if crash else report.longrepr).split())[:300]
    results[name] = {"id": name, "outcome": report.outcome, "reason": reason}


def pytest_sessionfinish() -> None:
    Path(os.environ["LMINF_TEST_RESULTS"]).write_text(json.dumps(list(results.values())))
