"""rpc-servers in processes of their own, and what may lie between them and a client."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from llama_cpp import llama_cpp as bindings

HELLO_ANSWER = 8 + 28  # its size, and itself: three bytes of version come first
GET_ALLOC_SIZE, OP_OFFSET = 13, 56  # the message that asks whether a device has an operation, and which


@functools.cache
def fused_attention() -> int:
    """The number of the operation."""
    name = bindings._lib.ggml_op_name
    name.restype = ctypes.c_char_p
    return next(number for number in range(200) if name(number) == b"LMINF_ATTN")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class RpcServer:
    """`lminf-edge rpc-server`, of one thread."""

    def __init__(self, *options: str, port: int = 0, prefix: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
        self.port = port or free_port()
        self.name = f"{host}:{self.port}"
        command = [*prefix, sys.executable, "-m", "lminf_edge", "rpc-server", "--json", "--threads", "1"]
        options = ("--host", host, "--port", str(self.port), *options)
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.facts = json.loads(self.process.stdout.readline())
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._reader.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def rpc_servers(n: int, *options: str) -> Iterator[list[RpcServer]]:
    servers: list[RpcServer] = []
    try:
        for _ in range(n):
            servers.append(RpcServer(*options))
        yield servers
    finally:
        for server in servers:
            server.kill()


class Relay:
    """Hands connections on to a server, and counts bytes and questions for the fused attention.

    change    what becomes of the server's hello
    declines  the device has no fused attention
    """

    def __init__(self, port: int, change: Callable[[bytes], bytes] = bytes, declines: bool = False) -> None:
        self.to_server = self.to_client = self.n_asked = 0
        self._lock = threading.Lock()
        self._to, self._change, self._declines = port, change, declines
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._upward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._downward, args=(server, client), daemon=True).start()

    def _upward(self, client: socket.socket, server: socket.socket) -> None:
        while header := _receive_all(client, 9):
            command, size = struct.unpack("<BQ", header)
            body = _receive_all(client, size)
            asks = command == GET_ALLOC_SIZE and struct.unpack_from("<I", body, OP_OFFSET)[0] == fused_attention()
            with self._lock:
                self.to_server += len(header) + len(body)
                self.n_asked += asks
            if asks and self._declines:
                client.sendall(struct.pack("<QQ", 8, 0))
            else:
                server.sendall(header + body)
        _hang_up(server)

    def _downward(self, server: socket.socket, client: socket.socket) -> None:
        hello = _receive_all(server, HELLO_ANSWER)
        data = hello[:8] + self._change(hello[8:])
        while data:
            with self._lock:
                self.to_client += len(data)
            client.sendall(data)
            data = _receive(server)
        _hang_up(client)


def _receive(sock: socket.socket, most: int = 1 << 20) -> bytes:
    try:
        return sock.recv(min(most, 1 << 20))
    except OSError:
        return b""


def _receive_all(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size and (part := _receive(sock, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
