"""A model over three hosts, each in a network namespace of its own: a client, and a wire to each of two servers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
from remote import RpcServer

PORT = 50052
CLIENT, A, B = (f"lminf-{name}-{os.getpid()}" for name in ("client", "a", "b"))
ADDRESSES = {A: "10.91.1.2", B: "10.91.2.2"}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip to make network namespaces with")
    made: list[str] = []
    try:
        try:
            for host in (CLIENT, A, B):
                ip("netns", "add", host)
                made.append(host)
                ip("-n", host, "link", "set", "lo", "up")
            for number, host in enumerate((A, B), start=1):
                wire = f"to{number}"
                ip("-n", CLIENT, "link", "add", wire, "type", "veth", "peer", "name", "wire", "netns", host)
                ip("-n", CLIENT, "address", "add", f"10.91.{number}.1/24", "dev", wire)
                ip("-n", host, "address", "add", f"{ADDRESSES[host]}/24", "dev", "wire")
                ip("-n", CLIENT, "link", "set", wire, "up")
                ip("-n", host, "link", "set", "wire", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel or user may not make network namespaces: {error.stderr.strip()}")
        yield
    finally:
        for host in made:
            ip("netns", "delete", host)


@pytest.fixture
def servers(hosts: None) -> Iterator[list[RpcServer]]:
    with contextlib.ExitStack() as stack:
        made = []
        for host, address in ADDRESSES.items():
            server = RpcServer(host=address, port=PORT, prefix=("ip", "netns", "exec", host))
            stack.callback(server.kill)
            made.append(server)
        yield made


def command(model: str, *options: str, servers: Sequence[RpcServer] = ()) -> list[str]:
    command = [sys.executable, "-m", "lminf_edge", "generate", "-m", model, "-p", "The night was", "--temp", "0"]
    command += ["--n-global", "4", "--n-local", "60", "--kv-type", "f32", "--threads", "1", "--ignore-eos", *options]
    if servers:
        command += ["--rpc", ",".join(server.name for server in servers)]
    return command


def generate(model: str, *options: str, servers: Sequence[RpcServer] = ()) -> str:
    prefix = ("ip", "netns", "exec", CLIENT) if servers else ()
    done = subprocess.run([*prefix, *command(model, *options, servers=servers)], check=True, capture_output=True)
    return str(json.loads(done.stdout)["text"])


def received(host: str) -> int:
    (link,) = json.loads(ip("-n", host, "-s", "-j", "link", "show", "wire"))
    return int(link["stats64"]["rx"]["bytes"])


def test_the_text_of_one_host(nano_f32_path: str, servers: list[RpcServer]) -> None:
    expected = generate(nano_f32_path, "-n", "100", "--json")
    assert generate(nano_f32_path, "-n", "100", "--json", servers=servers) == expected
    assert all(received(host) > 5_000_000 for host in (A, B))  # half of the weights


def test_a_host_that_vanishes(nano_f32_path: str, servers: list[RpcServer]) -> None:
    """Its wire is cut: client and server notice, and once it is back the server takes the next client."""
    running = ["ip", "netns", "exec", CLIENT]
    running += command(nano_f32_path, "-n", "-1", "--no-loop-detection", servers=servers)
    with subprocess.Popen(running, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stderr is not None
        assert len(client.stdout.read(300)) == 300
        ip("-n", B, "link", "set", "wire", "down")
        cut = time.monotonic()
        client.stdout.read()
        error = client.stderr.read()
        assert error.startswith(f"error: An rpc-server is gone ({servers[1].name}), ")
        assert error.count("\n") == 1
    assert client.returncode == 1
    assert 20 < time.monotonic() - cut < 50
    time.sleep(max(0.0, cut + 50 - time.monotonic()))  # the server's half of the connection has ended as well
    ip("-n", B, "link", "set", "wire", "up")
    assert generate(nano_f32_path, "-n", "5", "--json", servers=servers) == generate(nano_f32_path, "-n", "5", "--json")
