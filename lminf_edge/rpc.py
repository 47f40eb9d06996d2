"""A model over several machines, through llama.cpp's RPC backend: servers, connections, and what goes wrong with them.

Upstream's client ends the process with a stack trace where a server cannot be reached, refuses, or is gone. So each
server is greeted here first, with deadlines, and whatever is wrong with it raises UserError. One that is gone later
cannot be survived, since layers and their part of the KV cache are gone with it: the process ends with one sentence and
status 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lminf_edge import native
from lminf_edge.errors import UserError, wants_debug

DEFAULT_PORT = 50052
MAX_SERVERS = 16  # as many devices as llama.cpp takes

_SECONDS = 5.0  # to reach a machine, and for its answer
_HELLO, _HELLO_REQUEST, _HELLO_ANSWER = 14, struct.Struct("<BQ24x"), struct.Struct("<QBBB25x")
_LEAST_MAJOR = 128  # of our builds, see native/rpc/lminf-rpc.h
_CPU, _GPU, _INTEGRATED_GPU = 0, 1, 2  # enum ggml_backend_dev_type
_FAILED = 1

_lock = threading.Lock()
_users: Counter[str] = Counter()  # models of this process on each server
_held: dict[str, int] = {}  # a backend for each, which keeps the one connection that they share


# --- the client -------------------------------------------------------------------------------------------------------


def parse_servers(servers: str | Sequence[str]) -> tuple[str, ...]:
    """ "host:port,host" or a list of its parts, as host:port each. Raises UserError."""
    parts: Any = servers.split(",") if isinstance(servers, str) else servers
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"rpc_servers must be a text such as host:port,host:port or a list, not {servers!r}.")
    found = []
    for part in parts:
        host, colon, port = part.strip().partition(":")
        port = port if colon else str(DEFAULT_PORT)
        is_host = host and host.isascii() and host.isprintable()
        if not (is_host and port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
            raise UserError(f"A server is host or host:port, with a name or an IPv4 address, not {part!r}.")
        found.append(f"{host}:{int(port)}")
    if not 1 <= len(found) <= MAX_SERVERS:
        raise UserError(f"There must be 1 to {MAX_SERVERS} servers, not {len(found)}.")
    for server in found:
        if found.count(server) > 1:
            raise UserError(f"The server {server} is given twice.")
    return tuple(found)


@dataclass(frozen=True)
class Connection:
    """What a model may lie on: the devices of servers, and behind them this machine's GPUs."""

    servers: tuple[str, ...]
    devices: Any  # for llama_model_params: an array that ends with a null pointer

    def close(self) -> None:
        """To be called when the model is freed."""
        with _lock:
            for server in self.servers:
                _release(server)


def connect(servers: str | Sequence[str]) -> Connection:
    """Raises UserError, in one sentence, if a server cannot be used."""
    names = parse_servers(servers)
    library, ggml = _library(), _ggml()
    _end_in_a_sentence()
    devices = []
    with _lock, contextlib.ExitStack() as undo:
        for server in names:
            if not _users[server]:
                _greet(server)
                _held[server] = library.ggml_backend_rpc_init(os.fsencode(server), 0)
            _users[server] += 1
            undo.callback(_release, server)
            registry = library.ggml_backend_rpc_add_server(os.fsencode(server))
            count = ggml.ggml_backend_reg_dev_count(registry)
            devices += [ggml.ggml_backend_reg_dev_get(registry, i) for i in range(count)]
        undo.pop_all()
    devices += _local_gpus(ggml)
    return Connection(names, (ctypes.c_void_p * (len(devices) + 1))(*devices, None))


def _release(server: str) -> None:
    _users[server] -= 1
    if not _users[server]:
        _ggml().ggml_backend_free(_held.pop(server))


def _local_gpus(ggml: Any) -> list[int]:
    """As llama.cpp chooses them itself: integrated ones only if there are no others."""
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    for kind in (_GPU, _INTEGRATED_GPU):
        gpus = [device for device in devices if ggml.ggml_backend_dev_type(device) == kind]
        if gpus:
            return gpus
    return []


def _greet(server: str) -> None:
    """Says hello as upstream's client does, to a server that may be anything. Raises UserError if it cannot be used."""
    try:
        sock = _reach(server)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        raise UserError(
            f"{server} cannot be reached ({reason}): start `lminf-edge rpc-server` there, and check the address."
        ) from error
    with sock:
        try:
            sock.sendall(_HELLO_REQUEST.pack(_HELLO, _HELLO_REQUEST.size - 9))
            answer = b""
            while len(answer) < _HELLO_ANSWER.size:
                part = sock.recv(_HELLO_ANSWER.size - len(answer))
                if not part:
                    break
                answer += part
        except TimeoutError as error:
            raise UserError(
                f"{server} does not answer: it serves another client, and takes one at a time, or it is no rpc-server."
            ) from error
        except OSError:
            answer = b""
    size, *version = _HELLO_ANSWER.unpack(answer) if len(answer) == _HELLO_ANSWER.size else (0,)
    if size != _HELLO_ANSWER.size - 8:
        raise UserError(f"{server} does not answer as an rpc-server: start `lminf-edge rpc-server` there.")
    if version[0] < _LEAST_MAJOR:
        raise UserError(
            f"{server} is a stock llama.cpp's rpc-server (version {version[0]}.{version[1]}.{version[2]}): start "
            "`lminf-edge rpc-server` there."
        )
    if bytes(version) != build():
        raise UserError(
            f"{server} runs another build of lminf-edge ({bytes(version).hex()}, this is {build().hex()}): install the "
            "same version on both machines."
        )


def _reach(server: str) -> socket.socket:
    host, port = server.split(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.settimeout(_SECONDS)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


@functools.cache
def _end_in_a_sentence() -> Any:
    """Sets ggml's handler of fatal errors. It is never freed: a thread of ggml's calls it."""
    stderr = os.dup(2)  # llama_cpp silences it while a model is loaded

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
    def handler(message: bytes) -> None:
        if b"ggml-rpc" not in message or wants_debug():
            os.write(stderr, message + b"\n")
        if b"ggml-rpc" not in message:
            return  # ggml aborts
        gone = ", ".join(_gone()) or f"one of {', '.join(_held)}"
        os.write(
            stderr,
            f"error: An rpc-server is gone ({gone}), and its layers with it: start it again, and then this program. "
            "What is on disk is as it was.\n".encode(),
        )
        os._exit(_FAILED)

    set_callback = _ggml().ggml_set_abort_callback
    set_callback.argtypes, set_callback.restype = [type(handler)], ctypes.c_void_p
    set_callback(handler)
    return handler


def _gone() -> list[str]:
    """Servers that cannot be reached any more."""
    found: list[str] = []
    for attempt in range(10):  # a process that is being killed may close the port after the connection
        time.sleep(0.1 * attempt)
        found = [server for server in _held if not is_reachable(server)]
        if found:
            break
    return found


def is_reachable(server: str) -> bool:
    """Whether somebody listens there."""
    try:
        _reach(server).close()
    except OSError:
        return False
    return True


# --- the library ------------------------------------------------------------------------------------------------------


def build() -> bytes:
    """What a client and a server must agree on, three bytes."""
    return bytes(_library().lminf_rpc_version(i) for i in range(3))


@functools.cache
def _library() -> Any:
    """libggml-rpc. Raises UserError if this build has none."""
    native.load()
    folder = native.library_folder()
    assert folder is not None
    paths = [folder / name.replace("llama", "ggml-rpc") for name in native.LIBRARY_NAMES]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        raise UserError(f"The llama.cpp library in {folder} was built without RPC: reinstall lminf_edge.")
    library = ctypes.CDLL(str(path))
    library.lminf_rpc_version.argtypes, library.lminf_rpc_version.restype = [ctypes.c_int32], ctypes.c_uint8
    add, init = library.ggml_backend_rpc_add_server, library.ggml_backend_rpc_init
    add.argtypes, add.restype = [ctypes.c_char_p], ctypes.c_void_p
    init.argtypes, init.restype = [ctypes.c_char_p, ctypes.c_uint32], ctypes.c_void_p
    start = library.ggml_backend_rpc_start_server
    start.argtypes = [*[ctypes.c_char_p] * 2, *[ctypes.c_size_t] * 2, ctypes.c_void_p]
    start.restype = None
    return library


@functools.cache
def _ggml() -> Any:
    """ggml's devices."""
    native.load()
    from llama_cpp import llama_cpp as bindings

    library = bindings._lib
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, *arguments in (
        ("ggml_backend_dev_count", size),
        ("ggml_backend_dev_get", pointer, size),
        ("ggml_backend_dev_type", ctypes.c_int, pointer),
        ("ggml_backend_dev_by_type", pointer, ctypes.c_int),
        ("ggml_backend_dev_name", ctypes.c_char_p, pointer),
        ("ggml_backend_dev_description", ctypes.c_char_p, pointer),
        ("ggml_backend_dev_memory", None, pointer, ctypes.POINTER(size), ctypes.POINTER(size)),
        ("ggml_backend_free", None, pointer),
        ("ggml_backend_reg_dev_count", size, pointer),
        ("ggml_backend_reg_dev_get", pointer, pointer, size),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device that a server lends."""

    pointer: int
    name: str
    description: str
    free: int  # bytes of its memory
    total: int


def own_devices() -> list[Device]:
    """What this machine lends: its GPUs, or else its CPU."""
    ggml = _ggml()
    found = []
    for pointer in _local_gpus(ggml) or [ggml.ggml_backend_dev_by_type(_CPU)]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(pointer, ctypes.byref(free), ctypes.byref(total))
        name, description = ggml.ggml_backend_dev_name(pointer), ggml.ggml_backend_dev_description(pointer)
        found.append(Device(pointer, name.decode(), description.decode().strip(), free.value, total.value))
    return found


def serve(address: str, port: int, devices: Sequence[Device], n_threads: int) -> None:
    """Serves one client after another until the process ends; returns only if it cannot listen there."""
    pointers = (ctypes.c_void_p * len(devices))(*(device.pointer for device in devices))
    # not with upstream's cache of weights: a file that was cut off when it was written is taken for the whole
    _library().ggml_backend_rpc_start_server(f"{address}:{port}".encode(), None, n_threads, len(devices), pointers)
