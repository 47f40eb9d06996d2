"""Lends this machine to a model that another one runs: with --rpc it has layers computed here.

Client and server must be the same build of lminf-edge. A server serves one client at a time, holds nothing between two
clients, and ends with Ctrl-C. It lends the GPUs, or the CPU where there are none. There is no password and no
encryption: use it in trusted networks only.

--json prints, once it listens,
  host, port, build, threads, devices: [{"name", "description", "free", "total" (bytes of memory)}, ...]
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from lminf_edge import rpc
from lminf_edge.cli.common import CommandError, human_bytes, print_json
from lminf_edge.cli.values import whole_number

HELP = "lend this machine to a model on another one (--rpc)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, this machine only"
    )
    parser.add_argument(
        "--port", type=whole_number(1, 65535), default=rpc.DEFAULT_PORT, help=f"default {rpc.DEFAULT_PORT}"
    )
    parser.add_argument("--threads", metavar="N", type=whole_number(1), help="default: half of the logical cores")


def run(args: argparse.Namespace) -> int:
    address = _check_address(args.host, args.port)
    devices = rpc.own_devices()
    n_threads = args.threads or max((os.cpu_count() or 2) // 2, 1)
    if not ipaddress.ip_address(address).is_loopback:
        print(
            f"warning: Whoever reaches {args.host}:{args.port} can use this machine, read what is computed on it, and "
            "probably take it over: listen in trusted networks only.",
            file=sys.stderr,
        )
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what upstream's server prints about its clients is a log
    threading.Thread(target=_announce, args=(args, address, n_threads, devices), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the server to return
    rpc.serve(address, args.port, devices, n_threads)
    raise CommandError(f"Port {args.port} of {args.host} cannot be used.")


def _announce(args: argparse.Namespace, address: str, n_threads: int, devices: Sequence[rpc.Device]) -> None:
    """Says what there is, once it can be reached."""
    while not rpc.is_reachable(f"{address}:{args.port}"):
        time.sleep(0.05)
    build = rpc.build().hex()
    if args.json:
        shown = [
            {"name": each.name, "description": each.description, "free": each.free, "total": each.total}
            for each in devices
        ]
        print_json({"host": args.host, "port": args.port, "build": build, "threads": n_threads, "devices": shown})
    else:
        print(f"rpc-server at {args.host}:{args.port}, build {build}, {n_threads} threads for a CPU")
        for each in devices:
            memory = f"{human_bytes(each.free)} of {human_bytes(each.total)} free"
            print(f"{each.name}: {each.description}, {memory}")
    sys.stdout.flush()


def _check_address(host: str, port: int) -> str:
    """The address of a host of this machine. Raises CommandError if a server cannot listen there."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"Port {port} of {host} cannot be used: {reason}.") from error
    return address
