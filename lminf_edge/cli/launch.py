"""Starts an agent against a server of ours: codex, claude (Claude Code), opencode or continue (its cn).

A server that runs at --url is used; otherwise one is started with -m or --hf, and ended with the agent. A model that is
not there yet is downloaded before. The agent gets its settings for this run alone, as arguments, environment variables
or a temporary file: nothing of the user's is changed.
What follows -- is the agent's, for example: lminf-edge launch codex -m model.gguf -- exec "say hello"

--json starts nothing and prints
  command, environment, files (name -> text; {folder} in the command is where they are to lie)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from lminf_edge.cli.agents import AGENTS, KEY_VARIABLE, Agent, Setup
from lminf_edge.cli.common import CommandError, print_json
from lminf_edge.cli.values import expand_home
from lminf_edge.models import download_from_hub, find_model, path_from_hub

HELP = "start an agent (codex, claude, opencode, continue) against a server of ours"

DEFAULT_URL = "http://127.0.0.1:8080"
_ASK_SECONDS = 5.0
_STOP_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("agent", choices=sorted(AGENTS), help="which agent")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-m", "--model", metavar="M", type=expand_home, help="the model of the server that is started if none runs"
    )
    # not `hf`, which would be downloaded whether a server runs or not
    source.add_argument("--hf", metavar="REPO", dest="hub_model", help="that model, from the Hugging Face hub")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of a running server; default {DEFAULT_URL}")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the server's; default ${KEY_VARIABLE}, and none if it is not set"
    )
    parser.add_argument(
        "--serve",
        metavar="OPTIONS",
        type=shlex.split,
        default=[],
        help='options of "lminf-edge serve" for a server that is started, as one argument: --serve "--n-local 8192"',
    )
    parser.add_argument("--print", action="store_true", help="start nothing, print what would be set")


def run(args: argparse.Namespace) -> int:
    agent: Agent = AGENTS[args.agent]
    url = args.url.rstrip("/").removesuffix("/v1")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or "none"
    if args.print or args.json:
        name = model_of(url, key) or expected_name(args)
        show(agent, agent.setup(url, name, key), args)
        return 0
    command = shutil.which(agent.command)
    if command is None:
        raise CommandError(f"{agent.command} is not installed: npm install -g {agent.package}.")
    with contextlib.ExitStack() as stack:
        for name_of in ("SIGTERM", "SIGHUP"):  # the server that was started ends with us, and so does the agent
            if (number := getattr(signal, name_of, None)) is not None:
                stack.callback(signal.signal, number, signal.signal(number, lambda number, _: sys.exit(128 + number)))
        found = model_of(url, key)
        if found is not None:
            name = found
        else:
            # here, where its progress is seen: what the server says goes to a log
            url, name = stack.enter_context(served(["-m", downloaded(args, url), *args.serve], args.api_key))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lminf-edge-"))
        setup = agent.setup(url, name, key)
        write(setup, Path(folder))
        # Ctrl-C is the agent's; a handler, unlike "ignore", is not inherited
        before = signal.signal(signal.SIGINT, lambda *_: None)
        stack.callback(signal.signal, signal.SIGINT, before)
        environment = {**os.environ, **setup.environment}
        return subprocess.run([command, *arguments(setup, folder), *args.rest], env=environment).returncode


def downloaded(args: argparse.Namespace, url: str) -> str:
    """What to give a server as its model, which is there. Raises UserError if it cannot be had."""
    if args.hub_model is not None:
        return str(download_from_hub(args.hub_model))
    if args.model is None:
        raise CommandError(
            f"No server runs at {url}: start one, or give -m MODEL or --hf USER/REPO to have one started."
        )
    find_model(args.model)
    return str(args.model)  # not its path: a model's name is what the agent is told


def expected_name(args: argparse.Namespace) -> str:
    """What a server that is started would call its model. Raises UserError if that is one that the hub has not."""
    if args.hub_model is not None:
        return path_from_hub(args.hub_model).stem
    return Path(args.model).stem if args.model else "model"


def arguments(setup: Setup, folder: str) -> list[str]:
    return [argument.replace("{folder}", folder) for argument in setup.arguments]


def write(setup: Setup, folder: Path) -> None:
    for name, text in setup.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def show(agent: Agent, setup: Setup, args: argparse.Namespace) -> None:
    command = [agent.command, *setup.arguments, *args.rest]
    if args.json:
        print_json({"command": command, "environment": setup.environment, "files": setup.files})
        return
    for name, text in setup.files.items():
        print(f"# {{folder}}/{name}\n{text}")
    for name, value in setup.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join(command))


def model_of(url: str, key: str) -> str | None:
    """The model of the server that runs there; None if nothing does. Raises CommandError if it is none of ours."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=_ASK_SECONDS) as answer:
            card = json.load(answer)["data"][0]
            return str(card["id"]) if "lminf" in card else _not_ours(url)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise CommandError(f"The server at {url} wants another key: --api-key, or {KEY_VARIABLE}.") from None
        return _not_ours(url)
    except urllib.error.URLError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        return _not_ours(url)


def _not_ours(url: str) -> str:
    raise CommandError(f"What runs at {url} is no lminf-edge: end it, or give the --url of another server.")


@contextlib.contextmanager
def served(options: list[str], key: str | None) -> Iterator[tuple[str, str]]:
    """A server of its own on a free port; its URL and its model's name. Raises CommandError if it does not start."""
    command = [sys.executable, "-m", "lminf_edge", "serve", "--port", "0", "--json", *options]
    environment = {**os.environ, **({KEY_VARIABLE: key} if key else {})}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # in a session of its own: Ctrl-C is the agent's
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, start_new_session=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait()
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it says nothing"])[-1]
                raise CommandError(f"The server did not start: {last.removeprefix('error: ')}")
            ready = json.loads(line)
            yield ready["url"], ready["model"]
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
