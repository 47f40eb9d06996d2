"""A model over several machines: the same answers, states that move between layouts, a sentence for each failure."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import F32, MakeLlama
from remote import HELLO_ANSWER, Relay, RpcServer, free_port, rpc_servers

from lminf_edge import Checkpoint, Llama, LMInfConfig, rpc
from lminf_edge.cache.token_log import Tokens
from lminf_edge.cli import main
from lminf_edge.errors import UserError
from lminf_edge.evaluate import token_nll


@pytest.fixture(scope="module")
def servers() -> Iterator[list[str]]:
    """Two machines."""
    with rpc_servers(2) as made:
        yield [server.name for server in made]


@pytest.fixture
def relays(servers: list[str]) -> Iterator[list[Relay]]:
    """Their bytes, counted."""
    made = [Relay(int(server.split(":")[1])) for server in servers]
    yield made
    for relay in made:
        relay.close()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lminf_edge", *arguments], capture_output=True, text=True)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["fused", "stock"])
@pytest.mark.parametrize("n_gpu_layers", [-1, 2])
def test_losses_are_those_of_one_machine(
    make_llama: MakeLlama, relays: list[Relay], tokens: Tokens, attention: str, n_gpu_layers: int
) -> None:
    """With all layers on two servers, and with some of them here."""
    lminf = LMInfConfig(n_global=4, n_local=124, attention=attention)
    here = make_llama(lminf=lminf, **F32)
    there = make_llama(lminf=lminf, **F32, rpc_servers=[relay.name for relay in relays], n_gpu_layers=n_gpu_layers)
    assert here.stream_info().attention == there.stream_info().attention == attention
    assert all(relay.to_server > 500_000 for relay in relays)  # each got weights
    expected, found = token_nll(here, tokens[:1500]), token_nll(there, tokens[:1500])
    assert there.stream_info().evicted > 1000
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - expected).mean() < 1e-6


@pytest.mark.parametrize(("type_k", "type_v"), [(1, 1), (8, 8), (8, 2)])
def test_every_kv_type_is_fused_as_it_is_here(
    make_llama: MakeLlama, servers: list[str], tokens: Tokens, type_k: int, type_v: int
) -> None:
    here = make_llama(type_k=type_k, type_v=type_v)
    there = make_llama(type_k=type_k, type_v=type_v, rpc_servers=servers)
    assert there.stream_info().attention == "fused"
    np.testing.assert_allclose(token_nll(there, tokens[:500]), token_nll(here, tokens[:500]), atol=1e-4)


def test_layers_on_a_device_without_it_attend_through_stock_operations(
    make_llama: MakeLlama, servers: list[str], tokens: Tokens
) -> None:
    relay = Relay(int(servers[0].split(":")[1]), declines=True)
    there = make_llama(**F32, rpc_servers=[relay.name, servers[1]])
    parts = there.stream_info().parts
    assert 0 < parts.n_layer_fused < parts.n_layer_full
    assert relay.n_asked == 1
    np.testing.assert_allclose(token_nll(there, tokens[:500]), token_nll(make_llama(**F32), tokens[:500]), atol=1e-4)
    with pytest.raises(UserError, match="there is no fused attention for layer 0 of this model on RPC"):
        make_llama(lminf=LMInfConfig(n_global=4, n_local=64, attention="fused"), rpc_servers=[relay.name, servers[1]])
    relay.close()


def test_a_device_is_asked_once_for_each_kind(make_llama: MakeLlama, relays: list[Relay], tokens: Tokens) -> None:
    llm = make_llama(rpc_servers=[relay.name for relay in relays])
    for token in tokens[:300]:
        llm.eval([token])
    asked = [relay.n_asked for relay in relays]
    assert all(1 <= n <= 10 for n in asked)
    for token in tokens[300:600]:
        llm.eval([token])
    assert [relay.n_asked for relay in relays] == asked


def test_without_lminf(nano_f32_path: str, servers: list[str]) -> None:
    settings: dict[str, Any] = {"n_ctx": 256, "verbose": False, "n_threads": 1}
    text = [
        llm("The night was", max_tokens=20, temperature=0)["choices"][0]["text"]
        for llm in (Llama(nano_f32_path, **settings), Llama(nano_f32_path, **settings, rpc_servers=servers))
    ]
    assert text[0] == text[1] != ""


def test_models_of_a_process_share_a_server(make_llama: MakeLlama, servers: list[str], tokens: Tokens) -> None:
    one = make_llama(**F32, rpc_servers=servers)
    other = make_llama(**F32, rpc_servers=servers[0])
    local = make_llama(**F32, n_gpu_layers=-1)  # servers are for those who name them
    nll = token_nll(one, tokens[:300])
    one.close()
    np.testing.assert_allclose(token_nll(other, tokens[:300]), nll, atol=1e-4)
    np.testing.assert_allclose(token_nll(local, tokens[:300]), nll, atol=1e-4)
    other.close()
    again = make_llama(**F32, rpc_servers=servers)  # a server that was left can be had again
    np.testing.assert_allclose(token_nll(again, tokens[:300]), nll, atol=1e-4)


def test_a_pickled_model_knows_its_servers(make_llama: MakeLlama, servers: list[str], tokens: Tokens) -> None:
    llm = make_llama(rpc_servers=",".join(servers))
    pickled = pickle.dumps(llm)
    nll = token_nll(llm, tokens[:100])
    llm.close()
    assert pickle.loads(pickle.dumps(make_llama()))._connection is None
    with contextlib.closing(pickle.loads(pickled)) as copy:
        assert list(copy._connection.servers) == servers
        np.testing.assert_allclose(token_nll(copy, tokens[:100]), nll, atol=1e-4)


def test_what_crosses_the_network(make_llama: MakeLlama, relays: list[Relay], tokens: Tokens) -> None:
    """Weights once, then activations: as docs/rpc.md says, for a model of 256 channels and 4096 tokens."""
    llm = make_llama(rpc_servers=[relay.name for relay in relays])
    assert sum(relay.to_server for relay in relays) > 4 * 4_000_000
    llm.eval(tokens[:300])

    def decode(several: Tokens) -> list[tuple[int, int]]:
        for token in several:
            llm.eval([token])
        assert len(llm.scores)  # waits for the last logits: eval only asks for them
        return [(relay.to_server, relay.to_client) for relay in relays]

    before = decode(tokens[300:310])  # the graph of single tokens is known now
    decode(tokens[310:350])
    first, second = (
        ((relay.to_server - up) / 40, (relay.to_client - down) / 40)
        for relay, (up, down) in zip(relays, before, strict=True)
    )
    channels, logits = 4 * 256, 4 * llm.n_vocab()
    assert channels < first[0] < channels + 8000
    assert channels <= first[1] < channels + 100
    assert channels < second[0] < channels + 8000
    assert logits <= second[1] < logits + 100


# --- states -----------------------------------------------------------------------------------------------------------


def test_states_move_between_layouts(make_llama: MakeLlama, servers: list[str], tokens: Tokens, tmp_path: Path) -> None:
    layouts: list[dict[str, Any]] = [{}, {"rpc_servers": servers}, {"rpc_servers": servers[:1], "n_gpu_layers": 2}]
    models = [make_llama(**F32, **layout) for layout in layouts]
    models[0].eval(tokens[:500])
    models[0].eval(tokens[500:600])
    expected = models[0].scores[-1].copy()
    for source in models:
        source.reset()
        source.eval(tokens[:500])
        source.checkpoint().save(tmp_path / "state")
        for target in models:
            target.restore(Checkpoint.load(tmp_path / "state"))
            target.eval(tokens[500:600])
            np.testing.assert_allclose(target.scores[-1], expected, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "sentence"),
    [
        ("", None),
        (",", "A server is host"),
        ("a:b", "not 'a:b'"),
        ("a:0", "not 'a:0'"),
        ("a:65536", "not 'a:65536'"),
        ("[::1]:5", "IPv4"),
        ("bücher.example", "IPv4"),
        ("a\0b", "IPv4"),
        ("a..b", "a..b:50052 cannot be reached"),
        (":50052", "A server is host"),
        ("a,b,a:50052", "a:50052 is given twice"),
        (["a"] * 17, "1 to 16"),
        ([1], "must be a text"),
        (7, "must be a text"),
    ],
)
def test_bad_addresses(nano_path: str, servers: Any, sentence: str | None) -> None:
    if sentence is None:  # nothing is no server
        Llama(nano_path, lminf=True, rpc_servers=servers, verbose=False).close()
        return
    with pytest.raises(UserError, match=sentence):
        Llama(nano_path, lminf=True, rpc_servers=servers, verbose=False)


def test_addresses() -> None:
    assert rpc.parse_servers("a, 10.0.0.2:7") == ("a:50052", "10.0.0.2:7")
    assert rpc.parse_servers(["a", "b:1"]) == ("a:50052", "b:1")


def test_a_machine_that_cannot_be_reached(nano_path: str) -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be reached \(Connection refused\)"):
        Llama(nano_path, lminf=True, rpc_servers=f"127.0.0.1:{port}", verbose=False)
    with pytest.raises(UserError, match=r"nowhere\.invalid:50052 cannot be reached"):
        Llama(nano_path, lminf=True, rpc_servers="nowhere.invalid", verbose=False)
    found = run("generate", "-m", "nano", "-p", "a", "--rpc", f"127.0.0.1:{port}")
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "does not answer as"), (b"", "does not answer as")],
)
def test_something_else_listens_there(nano_path: str, answer: bytes, sentence: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def serve() -> None:
            client, _ = sock.accept()
            client.recv(64)
            client.sendall(answer)
            client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match=sentence):
            Llama(nano_path, lminf=True, rpc_servers=f"127.0.0.1:{sock.getsockname()[1]}", verbose=False)
        thread.join()


def other_build(hello: bytes) -> bytes:
    return hello[:2] + bytes([hello[2] ^ 1]) + hello[3:]


def stock(hello: bytes) -> bytes:
    return bytes([7, 0, 0]) + hello[3:]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(other_build, "another build of lminf-edge"), (stock, "stock llama.cpp's rpc-server \\(version 7.0.0\\)")],
)
def test_another_build_is_refused(
    nano_path: str, servers: list[str], change: Callable[[bytes], bytes], sentence: str
) -> None:
    relay = Relay(int(servers[0].split(":")[1]), change)
    with pytest.raises(UserError, match=sentence):
        Llama(nano_path, lminf=True, rpc_servers=relay.name, verbose=False)
    # and by the library itself, if it is not asked in our way
    code = "import sys; from lminf_edge import rpc; rpc._library().ggml_backend_rpc_add_server(sys.argv[1].encode())"
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    for name, accepted in ((relay.name, False), (servers[0], True)):
        found = subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True)
        assert (found.returncode == 0) is accepted
        assert ("version mismatch" in found.stderr) is not accepted
    relay.close()


def test_a_stock_client_refuses_our_server(servers: list[str]) -> None:
    """It accepts no other major version than its own, which is 7."""
    host, port = servers[0].split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(bytes([14, 24]) + bytes(7) + bytes(24))
        assert sock.recv(HELLO_ANSWER, socket.MSG_WAITALL)[8] >= 128


def test_a_server_that_is_busy(nano_path: str, servers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_SECONDS", 0.3)
    host, port = servers[0].split(":")
    with socket.create_connection((host, int(port))) as other:
        other.sendall(bytes([14]))
        with pytest.raises(UserError, match="does not answer: it serves another client"):
            Llama(nano_path, lminf=True, rpc_servers=servers[0], verbose=False)


def test_servers_that_were_held_for_a_failed_load_are_free_again(nano_path: str, servers: list[str]) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        Llama(nano_path, lminf=True, rpc_servers=[*servers, f"127.0.0.1:{free_port()}"], verbose=False)
    # another process can have them
    found = run("generate", "-m", "nano", "-p", "a", "-n", "3", "--rpc", ",".join(servers))
    assert found.returncode == 0, found.stderr


# --- machines that go away --------------------------------------------------------------------------------------------


def is_one_sentence(text: str, *gone: str) -> bool:
    return text.startswith(f"error: An rpc-server is gone ({', '.join(gone)})") and text.count("\n") == 1


@pytest.mark.parametrize("which", [0, 1])
def test_a_machine_that_goes_away_in_mid_stream(which: int) -> None:
    with rpc_servers(2) as servers:
        arguments = ["-m", "nano", "-p", "The night was", "-n", "-1", "--ignore-eos", "--no-loop-detection"]
        command = [sys.executable, "-m", "lminf_edge", "generate", *arguments, "--threads", "1"]
        command += ["--rpc", ",".join(server.name for server in servers)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stderr is not None
            assert len(client.stdout.read(500)) == 500
            servers[which].process.kill()
            client.stdout.read()
            assert is_one_sentence(client.stderr.read(), servers[which].name)
        assert client.returncode == 1


@pytest.mark.parametrize("lminf", [True, False])
def test_a_machine_that_goes_away_before_a_program_ends(lminf: bool) -> None:
    """One that does not close its model."""
    code = f"""
import sys
from lminf_edge import Llama
llm = Llama("nano", lminf={lminf}, rpc_servers=sys.argv[1], verbose=False)
input("loaded\\n")
"""
    with rpc_servers(1) as (server,):
        command = [sys.executable, "-u", "-c", code, server.name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "loaded\n"
            server.process.kill()
            server.process.wait()
            try:
                _, error = program.communicate("\n", timeout=20)
            finally:
                program.kill()
        assert is_one_sentence(error.splitlines(keepends=True)[-1], server.name)  # llama.cpp may have logged one
        assert program.returncode == 1


class ChatServer:
    """`lminf-edge serve` over rpc-servers."""

    def __init__(self, model: str, folder: Path, servers: Sequence[RpcServer] = ()) -> None:
        command = [sys.executable, "-m", "lminf_edge", "serve", "-m", model, "--port", "0", "--json", "--threads", "1"]
        command += ["--folder", str(folder), "--parallel", "1", "--n-local", "128", "--prefill", "full", "--temp", "0"]
        if servers:
            command += ["--rpc", ",".join(server.name for server in servers)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]

    def ask(self, messages: list[dict[str, str]], n: int = 30) -> Any:
        body = {"messages": messages, "max_tokens": n}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60).json()

    def close(self) -> str:
        """Ends it; what it had to say."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate()[1]


def test_a_conversation_survives(nano_f32_path: str, tmp_path: Path) -> None:
    """An rpc-server is killed while a turn is generated: all is started again, and the conversation goes on."""
    folder = tmp_path / "known"
    messages = [{"role": "user", "content": "The sea was calm, and the ship went on. " * 20}]
    with rpc_servers(2) as servers:
        chat = ChatServer(nano_f32_path, folder, servers)
        try:
            answer = chat.ask(messages)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
            while not list(folder.rglob("*.checkpoint")):  # two seconds after the answer
                time.sleep(0.1)
            body = {"messages": messages, "max_tokens": 5000, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{chat.url}/v1/chat/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                for _ in range(40):
                    next(lines)
                servers[1].process.kill()
                with pytest.raises(httpx.HTTPError):
                    list(lines)
            assert is_one_sentence(chat.process.communicate()[1].splitlines(keepends=True)[-1], servers[1].name)
            assert chat.process.returncode == 1
        finally:
            chat.process.kill()

    # on two servers again, on this machine alone, and as if it had never been
    answers = []
    with rpc_servers(2) as servers:
        for place, used in ((folder, servers), (folder, []), (tmp_path / "unknown", [])):
            chat = ChatServer(nano_f32_path, place, used)
            answers.append(chat.ask(messages))
            chat.close()
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] > 200
    assert cached[1] > 200
    assert cached[2] == 0
    assert answers[0]["choices"] == answers[1]["choices"] == answers[2]["choices"]


# --- the server -------------------------------------------------------------------------------------------------------


def test_what_the_server_says_of_itself() -> None:
    with rpc_servers(1) as (server,):
        device, *more = server.facts["devices"]
        assert not more
        assert device["total"] >= device["free"] > 0
        assert (server.facts["host"], server.facts["port"]) == ("127.0.0.1", server.port)
        assert server.facts["build"] == rpc.build().hex()
        assert not [line for line in server.log if "warning" in line]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == -signal.SIGINT


def test_a_server_for_others_warns() -> None:
    server = RpcServer(host="0.0.0.0")
    server.kill()
    assert "listen in trusted networks only" in server.log[0]


def test_addresses_that_cannot_be_listened_at(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
        assert main(["rpc-server", "--port", port]) == 1
        assert capfd.readouterr().err == f"error: Port {port} of 127.0.0.1 cannot be used: Address already in use.\n"
    for host in ("nowhere.invalid", "a..b", "192.0.2.1"):
        assert main(["rpc-server", "--host", host]) == 1
        assert capfd.readouterr().err.startswith(f"error: Port 50052 of {host} cannot be used: ")


def test_a_server_that_clients_leave_early_serves_the_next(nano_path: str) -> None:
    with rpc_servers(1) as (server,):
        for data in (b"", b"\x0e", b"GET / HTTP/1.1\r\n\r\n", bytes([14, 24]) + bytes(31) + b"\xff" * 100):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(data)
        Llama(nano_path, lminf=True, rpc_servers=server.name, verbose=False).close()
        assert server.process.poll() is None
        os.kill(server.process.pid, 0)
