"""The server's door: what clients may hold open, how much they may send, whose an error is, and the end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pace import within
from served import Served, serve

from lminf_edge import LMInfConfig
from lminf_edge.engine.loading import load_engine
from lminf_edge.errors import UserError
from lminf_edge.server import Settings, create_app, openai_routes, streaming
from lminf_edge.server.budget import SMALL, Budget
from lminf_edge.server.connections import Server
from lminf_edge.server.security import SecurityMiddleware, owner_of
from lminf_edge.text.formats import ChatDefaults, LibraryFormat
from lminf_edge.text.service import TextService
from lminf_edge.text.tokenizer import CachedTokenizer

WINDOW = LMInfConfig(n_global=4, n_local=128)
QUESTION = [{"role": "user", "content": "The ferry left at six."}]
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.fixture(scope="module")
def door(nano_path: str) -> Iterator[Served]:
    settings = Settings(
        model_name="nano",
        max_body=1 << 20,
        max_requests=2,
        max_connections=12,
        head_seconds=1.5,
        body_seconds=0.4,
        min_rate=1 << 20,
    )
    with serve(nano_path, settings, lminf=WINDOW) as served:
        yield served


@pytest.fixture(scope="module")
def served(nano_path: str) -> Iterator[Served]:
    with serve(nano_path, lminf=WINDOW) as served:
        yield served


def connect(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    connection = socket.create_connection((url.host, url.port))
    connection.settimeout(10)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    answer = b""
    try:
        while part := connection.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer


def chat(served: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2, **body})


# --- connections ------------------------------------------------------------------------------------------------------


def test_silent_connections_keep_nobody_out(door: Served) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(door))) for _ in range(40)]  # three times as many as may be
        with within(10, time.monotonic):
            with within(1.5, time.monotonic):
                assert httpx.get(f"{door.url}/v1/models").status_code == 200
            assert [read_all(each) for each in silent] == [b""] * 40
        assert len(door.server.server_state.connections) <= 1


def test_a_head_has_a_time(door: Served) -> None:
    """However many bytes of it come, and on a connection that was used before, too."""
    with closing(connect(door)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        with suppress(OSError):  # the end
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert 1.4 < time.monotonic() - started < 4.5


def test_bodies_that_drip_take_no_place(door: Served) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(door))) for _ in range(6)]
        for each in slow:
            each.sendall((HEAD + '100\r\n\r\n{"mess').encode())
        with within(3, time.monotonic):
            assert chat(door).status_code == 200
            for i in range(4):
                time.sleep(0.15)
                for each in slow:
                    if i < 2:
                        each.sendall(b" ")
            found = [each.recv(65536) for each in slow]
        assert all(each.startswith(b"HTTP/1.1 408") and b"in time" in each for each in found)


def test_health_answers_while_all_places_are_taken(door: Served) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=door.url, timeout=60))
        body = {"messages": QUESTION, "stream": True, "logit_bias": {"2": -100}}
        for _ in range(2):
            response = stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            assert response.status_code == 200
        assert client.get("/health").status_code == 200
        refused = chat(door)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"


CHUNKED = HEAD.partition("Content-Length")[0] + "Transfer-Encoding: chunked\r\n\r\n"
LARGE_FILE = b"GET /docs/ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"  # 1.5 MB, without a key
SMALL_FILE = b"GET /page/page.css HTTP/1.1\r\nHost: localhost\r\n\r\n"  # which the sockets do not hold


def test_who_needs_no_key_keeps_nobody_out(door: Served) -> None:
    """However much of an answer is still to be sent to them."""
    with ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            url = httpx.URL(door.url)
            connection.connect((url.host, url.port))
            with suppress(OSError):  # it has been dropped
                connection.sendall(LARGE_FILE * 4)
        for _ in range(3):
            assert httpx.get(f"{door.url}/v1/models", timeout=30).status_code == 200
        assert len(door.server.server_state.connections) <= 13  # one may be on its way out
    assert len(httpx.get(f"{door.url}/docs/ui/swagger-ui-bundle.js").content) > 1 << 20


def body_in_chunks(n: int, size: int) -> bytes:
    text = json.dumps({"messages": QUESTION, "max_tokens": 2}).encode()
    rest = n * size - len(text)
    text += b" " * rest
    return b"".join(b"%x\r\n%s\r\n" % (size, text[i : i + size]) for i in range(0, len(text), size)) + b"0\r\n\r\n"


@pytest.mark.parametrize(("n", "size"), [(100, 1000), (100, 1), (20_000, 40)])
def test_a_body_in_chunks(door: Served, n: int, size: int) -> None:
    with closing(connect(door)) as connection:
        connection.sendall(CHUNKED.encode() + body_in_chunks(n, size))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("key", ["key", "wrong"])
def test_a_body_in_tiny_chunks_is_refused(nano_path: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each takes the event loop some work; also when the request itself is refused already."""
    head = CHUNKED.replace("Host", f"X-Api-Key: {key}\r\nHost").encode()
    settings = Settings(model_name="nano", api_keys=("key",))
    with serve(nano_path, settings, lminf=WINDOW) as served, closing(connect(served)) as connection:
        connection.sendall(head)
        if key == "wrong":
            assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        n_sent, answer = 0, b""
        with suppress(OSError):  # it is closed
            connection.sendall(b"1\r\n \r\n" * 200)
            answer = read_all(connection)
            while n_sent < 10_000:
                connection.sendall(b"1\r\n \r\n" * 1000)
                n_sent += 1
        assert n_sent < 10_000
        if key == "key":
            assert answer.startswith(b"HTTP/1.1 400")
            assert b"too many small chunks: send larger ones." in answer
        assert httpx.get(f"{served.url}/health").status_code == 200
    assert not [each for each in caplog.records if each.exc_info]


SPACES = " \t" * 12_000


@pytest.mark.parametrize(
    "request_",
    [
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nX:{SPACES}\0\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n" + " \r\n" * 8000 + "\0\r\n\r\n",
        f"{CHUNKED}1;{SPACES}\nx\r\n",
        f"{CHUNKED}0\r\nX:{SPACES}\0\r\n\r\n",
        f"{CHUNKED.replace('POST', 'HEAD')}ZZ\r\n",
    ],
)
def test_lines_that_are_much_work_or_none(served: Served, request_: str, caplog: pytest.LogCaptureFixture) -> None:
    """A pattern for headers took the square of the spaces that are side by side: seconds."""
    with within(1), closing(connect(served)) as connection:
        connection.sendall(request_.encode())
        assert read_all(connection).startswith(b"HTTP/1.1 400")
    assert not [each for each in caplog.records if each.exc_info]


def deaf(served: Served) -> socket.socket:
    """A connection that takes little at a time; the server's half of it, too."""
    served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    url = httpx.URL(served.url)
    connection.connect((url.host, url.port))
    return connection


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (LARGE_FILE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), b"x"),
        (SMALL_FILE, CHUNKED.replace("/v1/chat/completions", "/health").encode() + b"ZZ\r\n"),
    ],
)
def test_who_is_refused_and_does_not_read_is_given_up(nano_path: str, first: bytes, then: bytes) -> None:
    """In the middle of a response, or with a part of one that is not read."""
    settings = Settings(model_name="nano", max_connections=5, write_seconds=1.0)
    with serve(nano_path, settings, lminf=WINDOW) as served, ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(closing(deaf(served)))
            with suppress(OSError):  # it has been dropped
                connection.sendall(first)
                time.sleep(0.1)
                connection.sendall(then)
        time.sleep(0.2)
        assert len(served.server.server_state.connections) <= 5
        time.sleep(2)
        assert not served.server.server_state.connections


def test_many_objects_need_more_than_their_bytes(door: Served) -> None:
    """A message takes kilobytes until it is rendered."""
    few, many = ([{"role": "user", "content": "a" * n}] * (930_000 // (n + 30)) for n in (2000, 1))
    assert httpx.post(f"{door.url}/apply-template", json={"messages": few}).status_code == 200
    refused = httpx.post(f"{door.url}/apply-template", json={"messages": many})
    assert refused.status_code == 413
    assert "for each message" in refused.json()["error"]["message"]


def test_generation_waits_for_who_reads_slowly(nano_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written for a client is held within a bound, and none of it is lost."""
    monkeypatch.setattr(streaming, "MAX_UNREAD", 100_000)
    n_tokens = 600
    options = {"n_predict": n_tokens, "n_probs": 20, "stream": True, "ignore_eos": True}
    body = json.dumps({"prompt": "a", **options}).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve(nano_path, lminf=WINDOW) as served, closing(deaf(served)) as connection:
        connection.sendall(head.encode() + body)
        n_written, n_before = 0, -1
        while n_written != n_before:
            n_before = n_written
            time.sleep(1)
            n_written = served.engine.counters.batches  # one for each token
        assert 10 < n_written < n_tokens // 2
        answer = read_all(connection)
        assert answer.count(b"data: ") == n_tokens + 1
        assert chat(served).status_code == 200


def test_bodies_are_held_within_a_budget(door: Served) -> None:
    n_bytes = (1 << 20) - SMALL
    with ExitStack() as stack:
        large = [stack.enter_context(closing(connect(door))) for _ in range(8)]
        for each in large:
            each.sendall((HEAD + f"{1 << 20}\r\n\r\n").encode() + b" " * ((1 << 20) - 1))
        found = [each.recv(65536)[:12] for each in large]
        n_held = 4 * (1 << 20) // n_bytes
        assert found.count(b"HTTP/1.1 503") == 8 - n_held
        assert found.count(b"HTTP/1.1 408") == n_held
    assert chat(door, user="x" * 900_000).status_code == 200


@contextmanager
def bare_server(app: Any, **settings: Any) -> Iterator[int]:
    """The HTTP server alone; its port."""
    stopping = asyncio.Event()
    state = SimpleNamespace(settings=Settings("bare", **settings), is_alive=True, stopping=stopping)
    app.state = SimpleNamespace(server=state)
    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(app, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


class Sender:
    """An application that sends more than the sockets' buffers hold."""

    N_BYTES = 24 << 20

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * self.N_BYTES, "more_body": True})
            await send({"type": "http.response.body", "body": b"y"})
            self.has_ended.set()


@pytest.mark.parametrize("reads", [False, True])
def test_who_does_not_read_is_given_up(reads: bool) -> None:
    """And who reads slowly is not."""
    app = Sender()
    with bare_server(app, write_seconds=0.3, min_rate=1 << 10) as port:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)  # a kernel may allow far more by itself
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        if not reads:
            assert app.has_ended.wait(5)
            assert len(read_all(connection)) < app.N_BYTES
        else:
            n_read = 0
            for _ in range(16):  # 0.8 s, nearly three times write_seconds; a sixth of what is sent
                time.sleep(0.05)
                n_read += len(connection.recv(1 << 18))
            assert not app.has_ended.is_set()
            assert n_read + len(read_all(connection)) > app.N_BYTES
        connection.close()


def test_the_end_waits_for_nobody_who_does_not_read() -> None:
    with ExitStack() as stack:
        with bare_server(Sender(), write_seconds=60, stop_seconds=0.3) as port:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
            started = time.monotonic()
        assert time.monotonic() - started < 3


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_levels", [100_000, 300])
def test_deep_json_is_refused(served: Served, n_levels: int) -> None:
    data = b'{"messages": ' + b"[" * n_levels + b"]" * n_levels + b"}"
    response = httpx.post(
        f"{served.url}/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body of the request is nested too deeply."


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [0] * 10**6}),
        ("/v1/chat/completions", {"messages": QUESTION, "tools": [0] * 10**6}),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {str(i): "" for i in range(10**5)}}),
        ("/v1/completions", {"prompt": [None] * 10**6}),
        ("/v1/embeddings", {"input": [None] * 10**6}),
        ("/completion", {"prompt": [None] * 10**6}),
        ("/completion", {"prompt": "", "logit_bias": [0] * 10**6}),
        ("/detokenize", {"tokens": [None] * 10**6}),
    ],
)
def test_a_million_wrong_parts_cost_little(served: Served, path: str, body: Any) -> None:
    data = json.dumps(body).encode()
    with within(3, time.monotonic):  # a minute and gigabytes, were each of them noted down
        response = httpx.post(f"{served.url}{path}", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "-1E+999", "9" * 400 + ".5"])
def test_numbers_that_json_does_not_have(served: Served, number: str) -> None:
    """They would come back in the answer, which is JSON."""
    data = f'{{"input": "infinite, 1e9", "max_output_tokens": 1, "metadata": {{"a": [{number}]}}}}'
    response = httpx.post(f"{served.url}/v1/responses", content=data)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The body of the request has a number that JSON does not have."
    fine = httpx.post(f"{served.url}/v1/responses", content=data.replace(number, '"NaN", 1e300'), timeout=60)
    assert fine.status_code == 200, fine.text


def test_numbers_that_llama_cpp_does_not_have(served: Served) -> None:
    data = json.dumps({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": [10**400]}})
    response = httpx.post(f"{served.url}/v1/chat/completions", content=data)
    assert response.status_code == 400
    assert "a number is too large: give it as a text." in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [r"\ud800", r"a\udc00\ud83d", r"\\ud800 \ud83d\ude00 \udfff"])
def test_half_a_surrogate_is_replaced(served: Served, content: str) -> None:
    data = b'\xef\xbb\xbf{"content": "%s"}' % content.encode()
    response = httpx.post(f"{served.url}/tokenize", content=data, headers={"Content-Type": "application/json"})
    tokens = response.json()["tokens"]
    text = httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json()["content"]
    expected = json.loads(f'"{content}"').encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert text.strip() == expected


def test_a_long_text_is_tokenized_and_health_answers_meanwhile(served: Served) -> None:
    latencies: list[float] = []
    done = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=served.url, timeout=30) as client:
            while not done.is_set():
                started = time.monotonic()
                assert client.get("/health").status_code == 200
                latencies.append(time.monotonic() - started)
                time.sleep(0.02)

    looking = threading.Thread(target=look)
    looking.start()
    text = httpx.post(f"{served.url}/tokenize", json={"content": "the sea was calm. " * 60_000}, timeout=60)
    done.set()
    looking.join()
    assert len(text.json()["tokens"]) > 200_000
    assert max(latencies) < 0.5


# --- whose an error is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [ValueError("v"), TypeError("t"), KeyError("k"), RuntimeError("r")])
def test_a_fault_of_ours_is_not_the_clients(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception, stream: bool
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise fault

    for target, name in ((openai_routes, "asked_chat"), (CachedTokenizer, "encode")):
        caplog.clear()
        with monkeypatch.context() as patched:
            patched.setattr(target, name, fail)
            response = chat(served, stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["message"].endswith("the server's log says why.")
        [record] = [each for each in caplog.records if each.name == "lminf_edge.server"]
        assert record.exc_info
        assert record.exc_info[1] is fault
        monkeypatch.setenv("LMINF_DEBUG", "1")
        with monkeypatch.context() as patched:
            patched.setattr(target, name, fail)
            assert type(fault).__name__ in chat(served, stream=stream).json()["error"]["message"]
        monkeypatch.delenv("LMINF_DEBUG")


def test_a_fault_of_the_client_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise UserError("Do it otherwise.")

    monkeypatch.setattr(openai_routes, "asked_chat", fail)
    response = chat(served)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "Do it otherwise.")


def use_template(served: Served, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    chat_format = LibraryFormat(served.service.llm, ChatDefaults(template=template))
    monkeypatch.setattr(served.service.template, "_format", chat_format)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | nonsense }}",
        "{{ raise_exception('No system, please') }}",
        "{{ messages[0].content.nothing() }}",
        "{{ messages[0]['content'] | map(attribute=1, b=2) | list }}",
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_fails_is_the_clients(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, template: str, stream: bool
) -> None:
    use_template(served, monkeypatch, template)
    response = chat(served, stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("The model's chat template refuses these messages: ")
    assert not caplog.records


def test_template_arguments_may_have_any_name(served: Served) -> None:
    names = ("is_cancelled", "owner", "arguments", "suffix_", "made", "text")
    assert chat(served, chat_template_kwargs=dict.fromkeys(names, 1)).status_code == 200


def test_a_template_that_takes_long_keeps_nobody_waiting(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = "{% for i in range(15000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    content = "The ferry. " * 4000  # the work that a template may take grows with what it is given
    template = "{% if messages[0].content == '" + content + "' %}" + loops + "{% endif %}"
    use_template(served, monkeypatch, template + "{{ messages[0].content }}")
    asking = threading.Thread(
        target=lambda: httpx.post(
            f"{served.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": content}], "max_tokens": 2},
            timeout=60,
        )
    )
    started = time.monotonic()
    asking.start()
    time.sleep(0.05)
    assert httpx.get(f"{served.url}/health").status_code == 200
    n_seconds = time.monotonic() - started
    asking.join()
    assert n_seconds < 0.5 * (time.monotonic() - started)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_each_key_is_an_owner() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        owners.append(scope["state"]["owner"])

    async def ask(guard: SecurityMiddleware, key: str) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                owners.append(message["status"])

        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "GET", "scheme": "http", "path": "/v1/models", "headers": headers}
        await guard(scope, receive, send)

    async def ask_all(keys: tuple[str, ...]) -> None:
        guard = SecurityMiddleware(app, Settings("nano", api_keys=keys), asyncio.Event(), Budget(1 << 20))
        for key in ("one", "two", "three", "one"):
            await ask(guard, key)

    owners: list[Any] = []
    asyncio.run(ask_all(("one", "two")))
    assert owners == [owner_of(b"one"), owner_of(b"two"), 401, owner_of(b"one")]
    assert len(owner_of(b"one")) == 32
    owners.clear()
    asyncio.run(ask_all(()))
    assert owners == [""] * 4


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_dead_engine_ends_the_server(nano_path: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = load_engine(nano_path, parallel=1, verbose=False, lminf=WINDOW)
    app = create_app(TextService(engine), Settings(model_name="nano"))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = Server(app, log_level="critical")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        engine.close()
        thread.join(5)
        assert not thread.is_alive()
    assert server.has_failed
    assert "engine has stopped" in caplog.text

    async def statuses() -> list[int]:
        app.state.server.stopping.clear()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = [await client.get(path) for path in ("/health", "/metrics")]
            found.append(await client.post("/v1/chat/completions", json={"messages": QUESTION}))
            found.append(await client.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True}))
        return [each.status_code for each in found]

    assert asyncio.run(statuses()) == [503] * 4
    engine.model.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_sigterm_ends_streams_properly(nano_path: str) -> None:
    command = [sys.executable, "-m", "lminf_edge", "serve", "-m", nano_path, "--port", "0", "--disk", "0"]
    options = ["--parallel", "2", "--n-local", "128", "--threads", "1", "--api-key", "first", "--api-key", "second"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().split(" at ")[1].split(",")[0]
    assert httpx.get(f"{url}/v1/models?api_key=hush", headers={"X-Api-Key": "second"}).status_code == 200
    answers_of: list[str] = []
    begun = threading.Semaphore(0)

    def ask(i: int) -> None:
        body = {"messages": [{"role": "user", "content": f"{i}"}], "stream": True, "logit_bias": {"2": -100}}
        headers = {"Authorization": "Bearer first"}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
            begun.release()
            answers_of.append("".join(response.iter_text()))  # raises where the end is missing

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for each in asking:
        each.start()
    for _ in asking:
        assert begun.acquire(timeout=30)
    address = httpx.URL(url)
    with (
        socket.create_connection((address.host, address.port)),  # says nothing
        socket.create_connection((address.host, address.port)) as half,
    ):
        half.sendall((HEAD.replace("Host", "X-Api-Key: first\r\nHost") + '100\r\n\r\n{"mess').encode())
        with within(5, time.monotonic):
            process.send_signal(signal.SIGTERM)
            log = "".join(process.communicate(timeout=20))
    for each in asking:
        each.join()
    assert process.returncode == 0
    for text in answers_of:
        *_, error, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        assert json.loads(error)["error"]["type"] == "unavailable_error"
        assert done == "[DONE]"
    assert len(answers_of) == 8
    assert "GET /v1/models" in log
    assert "hush" not in log
    assert "Traceback" not in log
