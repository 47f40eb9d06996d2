"""Measures the server, with real servers in processes of their own, and writes docs/server-performance/*.json.

    make bench-server, or: .venv/bin/python benchmarks/server_speed.py [--only NAME]... [--minutes 30]

About 45 minutes, most of it the mixed load; leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
from machine import ROOT, describe

from lminf_edge import Llama, LMInfConfig, native
from lminf_edge.bench.random_model import SHAPES, random_model
from lminf_edge.cache.token_log import Tokens
from lminf_edge.cli.demo import python_documentation
from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request

FIRST_WINDOW = 512  # the training length of nano
FIGURES = ROOT / "docs" / "server-performance"

CHAIN = "".join(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(24)) + 'r24 ::= "a"'
# requests that are too much work: what they are, where they go, and what they say
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    'grammar `root ::= ("a"?){1000}`': ("/completion", {"grammar": 'root ::= ("a"?){1000}'}),
    "grammar, 24 rules that are one or two of the next": ("/completion", {"grammar": "root ::= r0\n" + CHAIN}),
    "grammar, 60,000 alternatives": ("/completion", {"grammar": "root ::= " + " | ".join(['"a"'] * 60_000)}),
    "grammar, 20,000 alternatives in a loop": (
        "/completion",
        {"grammar": "root ::= (" + " | ".join(f'"{i}"' for i in range(20_000)) + ")*"},
    ),
    "schema, pattern `^(a?){1000}$`": ("/completion", {"json_schema": {"type": "string", "pattern": "^(a?){1000}$"}}),
    "tools, 12 schemas of 800 properties": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "?"}],
            "tool_choice": "required",
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": f"f{i}",
                        "parameters": {
                            "type": "object",
                            "properties": {f"p{j}": {"type": "integer"} for j in range(800)},
                            "required": [f"p{j}" for j in range(800)],
                        },
                    },
                }
                for i in range(12)
            ],
        },
    ),
    "text, a million characters that have no token": ("/tokenize", {"content": "\ufffd" * 1_000_000}),
}

Messages = list[dict[str, Any]]
Figures = dict[str, Any]


# --- a server and its clients -----------------------------------------------------------------------------------------


class Server:
    """lminf-edge serve in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "lminf_edge", "serve", "-m", model, "--port", "0", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The server did not start.")
        self.facts = json.loads(line)
        self.client = httpx.Client(base_url=self.facts["url"], timeout=3600)

    def resident(self) -> int:
        """Bytes of memory that are the server's own: files it has mapped, such as the model, aside."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        anonymous, shared = (int(re.findall(rf"Rss{kind}:\s+(\d+) kB", status)[0]) for kind in ("Anon", "Shmem"))
        return 1024 * (anonymous + shared)

    def accounted(self) -> float:
        """Bytes that are within the budget of memory: conversations, and the texts of messages."""
        return self.metric("memory_bytes") + self.metric("text_bytes")

    def metric(self, name: str) -> float:
        [value] = re.findall(rf"^lminf_{name} ([\d.e+-]+)$", self.client.get("/metrics").text, re.M)
        return float(value)

    def ask(
        self, messages: Messages, n_tokens: int, most: float = float("inf"), **more: Any
    ) -> tuple[str, float, Figures]:
        """An answer, the seconds until its first text came, and what the last chunk says.

        After more than `most` characters the client hangs up. Raises httpx.HTTPError and RuntimeError.
        """
        body = {
            "messages": messages,
            "max_tokens": n_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        data = json.dumps(body).encode()  # the client's own work is not part of what is measured
        started, first, text, last = time.perf_counter(), None, "", {}
        headers = {"Content-Type": "application/json"}
        with self.client.stream("POST", "/v1/chat/completions", content=data, headers=headers) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {response.read()[:200]!r}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):  # between chunks
                    continue
                last = json.loads(line[6:])
                if "error" in last:
                    raise RuntimeError(last["error"]["message"])
                piece = last["choices"][0]["delta"].get("content") or "" if last["choices"] else ""
                if piece and first is None:
                    first = time.perf_counter() - started
                text += piece
                if len(text) > most:
                    break
        return text, first or time.perf_counter() - started, last

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


class Talk:
    """A conversation that can be made as long as one likes, of Python's own documentation."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.messages: Messages = [{"role": "system", "content": f"Conversation {seed}: go on with what is said."}]
        words = python_documentation().split()
        self._rng = random.Random(seed)
        self._words = words

    def text(self, n_words: int) -> str:
        start = self._rng.randrange(len(self._words) - n_words)
        return " ".join(self._words[start : start + n_words])

    def say(self, n_words: int, n_answer: int = 8) -> tuple[float, Figures]:
        """A turn: seconds to the first text of the answer, and the figures of the last chunk."""
        self.messages.append({"role": "user", "content": self.text(n_words)})
        answer, first, last = self.server.ask(self.messages, n_answer, temperature=0)
        self.messages.append({"role": "assistant", "content": answer})
        return first, last

    def grow(self, n_tokens: int) -> int:
        """Until the history has about so many tokens, in messages of 300 words; returns how many it has."""
        n = 0
        while n < n_tokens:
            n_words = sum(len(message["content"].split()) for message in self.messages)
            words_to_go = (n_tokens - n) * n_words // n if n else 0  # the first request shows what a word has
            for _ in range(words_to_go // 600):
                self.messages.append({"role": "user", "content": self.text(300)})
                self.messages.append({"role": "assistant", "content": self.text(300)})
            n = self.say(300)[1]["usage"]["prompt_tokens"]
        return n


def n_processed(last: Figures) -> int:
    """Tokens of a prompt that the model processed, of what the last chunk says."""
    usage = last["usage"]
    details = usage["prompt_tokens_details"]
    return int(usage["prompt_tokens"] - details["cached_tokens"] - details["skipped_tokens"])


def n_cores() -> int:
    """Cores that this process and what it starts may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(values: Sequence[float]) -> Figures:
    return {
        "median": float(np.median(values)),
        "least": float(min(values)),
        "most": float(max(values)),
        "n": len(values),
    }


def quotients(values: Sequence[float], base: Sequence[float]) -> Figures:
    return {
        "ratio": spread([a / b for a, b in zip(values, base, strict=True)]),
        "ratio_of_medians": float(np.median(values) / np.median(base)),
    }


# --- experiments ------------------------------------------------------------------------------------------------------


def first_token(args: argparse.Namespace) -> Figures:
    """Time to the first token of the next turn, in conversations of different lengths, in turn."""
    return {"models": [_first_token(args, model) for model in ("nano", *args.model)], "load": os.getloadavg()[0]}


def _first_token(args: argparse.Namespace, model: str) -> Figures:
    with Server(model, *_window(FIRST_WINDOW), "--parallel", "2", "--disk", "0", "--threads", "1") as server:
        talks = {n: Talk(server, n) for n in args.lengths}
        lengths = {n: talk.grow(n) for n, talk in talks.items()}
        n_messages = {n: len(talk.messages) for n, talk in talks.items()}
        turns = []
        for n_words in (12, 100):
            seconds: dict[int, list[float]] = {n: [] for n in talks}
            read: list[int] = []
            for i in range(args.rounds + 2):
                for n, talk in talks.items():
                    first, last = talk.say(n_words)
                    if i >= 2:
                        seconds[n].append(first)
                        read.append(n_processed(last))
            short, long = (seconds[n] for n in args.lengths)
            turns.append(
                {
                    "n_words": n_words,
                    "tokens_read": spread(read),
                    "seconds": {n: spread(each) for n, each in seconds.items()},
                    **quotients(long, short),
                }
            )
    return {
        "model": Path(model).stem,
        "window": FIRST_WINDOW,
        "conversations": [{"tokens": lengths[n], "messages": n_messages[n]} for n in talks],
        "turns": turns,
    }


def agent(args: argparse.Namespace) -> Figures:
    """Time to the first token of an agent's turns, early and late in a session, in turn: each has a tool's output."""
    return {"models": [_agent(args, model) for model in ("nano", *args.model)], "load": os.getloadavg()[0]}


def _agent(args: argparse.Namespace, model: str) -> Figures:
    options = ("--parallel", "2", "--disk", "0", "--threads", str(args.threads))
    with Server(model, *_window(FIRST_WINDOW), *options) as server:
        agents = [AgentTalk(server, n, args.output_words) for n in args.agent_turns]
        for talk, n_turns in zip(agents, args.agent_turns, strict=True):
            talk.begin(n_turns - 2)
        turns: list[list[tuple[float, Figures]]] = [[] for _ in agents]
        for i in range(args.rounds_agent + 1):
            for talk, measured in zip(agents, turns, strict=True):
                turn = talk.turn()
                if i:  # the first of a session reads what was answered elsewhere
                    measured.append(turn)
    early, late = ([first for first, _ in measured] for measured in turns)
    return {
        "model": Path(model).stem,
        "window": FIRST_WINDOW,
        "n_threads": args.threads,
        "turns": args.agent_turns,
        "sessions": [
            {
                "tokens": measured[-1][1]["usage"]["prompt_tokens"],
                "tokens_read": spread([n_processed(last) for _, last in measured]),
                "seconds": spread([first for first, _ in measured]),
            }
            for measured in turns
        ],
        **quotients(late, early),
    }


class AgentTalk(Talk):
    """A session of an agent that calls a tool in each turn."""

    TOOL: ClassVar[Figures] = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a page up.",
            "parameters": {"type": "object", "properties": {"page": {"type": "integer"}}, "required": ["page"]},
        },
    }

    def __init__(self, server: Server, seed: int, n_words: int) -> None:
        super().__init__(server, seed)
        self._n_words = n_words
        self._n_calls = 0
        self._answer = ""

    def begin(self, n_turns: int) -> None:
        """Turns that were answered elsewhere."""
        self.messages.append({"role": "user", "content": "Look the pages up."})
        for _ in range(n_turns):
            self._add_turn("")

    def _add_turn(self, answer: str) -> None:
        self._n_calls += 1
        name = f"call_{self._n_calls}"
        call = {"name": "look_up", "arguments": json.dumps({"page": self._n_calls})}
        calls = [{"id": name, "type": "function", "function": call}]
        self.messages.append({"role": "assistant", "content": answer, "tool_calls": calls})
        self.messages.append({"role": "tool", "tool_call_id": name, "content": self.text(self._n_words)})

    def turn(self) -> tuple[float, Figures]:
        """Seconds to the first text of the answer to a tool's output, and the figures of the last chunk."""
        self._add_turn(self._answer)
        self._answer, first, last = self.server.ask(
            self.messages, 8, temperature=0, tools=[self.TOOL], tool_choice="none"
        )
        return first, last


def _window(size: int) -> tuple[str, ...]:
    return "--n-local", str(size - LMInfConfig.n_global)


def unseen(args: argparse.Namespace) -> Figures:
    """The first request of a new process, with a history that was never seen: a long one against three windows."""
    models = []
    for model, window in args.unseen:
        runs: dict[int, list[Figures]] = {3 * window + 32: [], args.unseen_tokens: []}
        options = (*_window(window), "--parallel", "1", "--disk", "0", "--threads", "1")
        with contextlib.closing(Llama(model, vocab_only=True, verbose=False)) as vocabulary:
            for i in range(args.rounds_unseen):
                for n in runs if i % 2 else reversed(runs):
                    messages = history(vocabulary, n, seed=1000 * i + n)
                    with Server(model, *options) as server:
                        _, first, last = server.ask(messages, 4, temperature=0)
                    usage = last["usage"]
                    runs[n].append({"seconds": first, "tokens": usage["prompt_tokens"], "processed": n_processed(last)})
        short, long = ([run["seconds"] for run in each] for each in runs.values())
        models.append(
            {
                "model": Path(model).stem,
                "window": window,
                "runs": [
                    {name: spread([run[name] for run in each]) for name in ("seconds", "tokens", "processed")}
                    for each in runs.values()
                ],
                **quotients(long, short),
            }
        )
    return {"models": models, "load": os.getloadavg()[0]}


def history(vocabulary: Llama, n_tokens: int, seed: int) -> Messages:
    """A conversation of so many tokens, the templates' own aside, in messages of at most 400."""
    words, rng = python_documentation().split(), random.Random(seed)
    messages: Messages = []
    while n_tokens > 0:
        start = rng.randrange(len(words) - 400)
        tokens = vocabulary.tokenize(" ".join(words[start : start + 400]).encode(), add_bos=False)[: min(n_tokens, 400)]
        n_tokens -= len(tokens)
        content = vocabulary.detokenize(tokens).decode("utf-8", errors="ignore")
        messages.append({"role": ("user", "assistant")[len(messages) % 2], "content": content})
    return messages if messages[-1]["role"] == "user" else [*messages, {"role": "user", "content": "Go on."}]


def cold(args: argparse.Namespace) -> Figures:
    """A conversation comes back from its file: the time against that of one in the context, and its size on disk."""
    rows = []
    for n in args.cold_lengths:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            hot, cold_seconds = [], []
            with Server("nano", "--parallel", "1", "--memory", "0", "--folder", name) as server:
                talk, other = Talk(server, 1), Talk(server, 2)
                n_tokens = talk.grow(n)
                for _ in range(args.rounds):
                    hot.append(talk.say(12)[0])
                    other.say(12)  # takes the only sequence
                    before = server.metric("restored_from_files_total")
                    cold_seconds.append(talk.say(12)[0])
                    assert server.metric("restored_from_files_total") > before
            states = list(folder.rglob("*.checkpoint"))
            largest = max(states, key=lambda path: path.stat().st_size)
            reads = []
            for _ in range(20):
                started = time.perf_counter()
                largest.read_bytes()
                reads.append(time.perf_counter() - started)
            limits = [2 * each + float(np.median(reads)) for each in hot]
            rows.append(
                {
                    "tokens": n_tokens,
                    "hot_seconds": spread(hot),
                    "cold_seconds": spread(cold_seconds),
                    "read_seconds": spread(reads),
                    "of_limit": spread([c / limit for c, limit in zip(cold_seconds, limits, strict=True)]),
                    "state_bytes": largest.stat().st_size,
                    "n_states": len(states),
                }
            )
    return {"conversations": rows}


def memory(args: argparse.Namespace) -> Figures:
    """Many conversations, few in the context: what the process takes, against what the budgets say."""
    budget = args.memory_mib << 20
    with Server("nano", "--parallel", "4", "--disk", "0", "--memory", str(budget)) as server:
        warm = Talk(server, 0)
        for _ in range(20):
            warm.say(300)
        before, known = server.resident(), server.accounted()
        talks = [Talk(server, 1 + i) for i in range(args.conversations)]
        samples = []
        for _ in range(args.turns):
            for talk in talks:
                talk.say(200)
            samples.append({"resident": server.resident(), "accounted": server.accounted()})
        n_known = server.metric("conversations")
    return {
        "budget_bytes": budget,
        "before": {"resident": before, "accounted": known},
        "samples": samples,
        "conversations": args.conversations,
        "remembered": n_known,
        "over_budget": [(sample["resident"] - before + known) / budget for sample in samples],
    }


def parallel(args: argparse.Namespace) -> Figures:
    """Tokens per second of 1 and of 4 conversations that answer at a time, in models of 1B parameters.

    The models have no vocabulary: tokens go into the engine itself, without HTTP around it. Beside it, what llama.cpp's
    own full attention makes of batches of 1 and of 4 tokens, all with logits: the most that weights read once can give.
    """
    return {"weights": [_parallel(args, weights) for weights in args.weights], "n_threads": args.threads}


def _parallel(args: argparse.Namespace, weights: str) -> Figures:
    path = random_model("llama-3.2-1b", SHAPES["llama-3.2-1b"], ROOT / "build" / "models", weights)
    settings = {"n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False}
    engine = load_engine(path, parallel=4, lminf=LMInfConfig(n_local=1014), n_ctx=None, **settings)
    stock = Llama(path, n_ctx=1024, **settings)
    rounds, stock_rounds = [], []
    for _ in range(args.rounds_parallel):
        rounds.append({n: _engine_rate(engine, n, args.n_answer) for n in (1, 4)})
        stock.reset()
        stock._ctx.kv_cache_clear()
        stock_rounds.append({n: _stock_rate(stock, n, args.n_answer // 4) for n in (1, 4)})
    engine.close()
    engine.model.close()
    stock.close()
    return {
        "model": path.stem,
        "weights": weights,
        "n_bytes": path.stat().st_size,
        "window": 1014,
        "one": spread([rates[1] for rates in rounds]),
        "four": spread([rates[4] for rates in rounds]),
        "ratio": spread([rates[4] / rates[1] for rates in rounds]),
        "stock_ratio": spread([rates[4] / rates[1] for rates in stock_rounds]),
    }


def _engine_rate(engine: Engine, n: int, n_answer: int) -> float:
    """Tokens per second in all, of n conversations."""

    def answer(prompt: Tokens) -> None:
        request = Request(prompt, SamplingParams(temperature=0.0), max_tokens=n_answer, ignore_eog=True)
        engine.submit(request)
        for _ in engine.stream(request):
            pass

    rng = np.random.default_rng()
    counters = engine.counters
    before = counters.generated_tokens, counters.decode_seconds
    threads = [
        threading.Thread(target=answer, args=(rng.integers(1000, 100_000, 64).astype(np.int32),)) for _ in range(n)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (counters.generated_tokens - before[0]) / (counters.decode_seconds - before[1])


def _stock_rate(llm: Llama, n: int, n_batches: int) -> float:
    """Tokens per second of batches of n tokens that all have logits."""
    rng = np.random.default_rng()
    seconds = []
    for _ in range(n_batches):
        llm._batch.set_batch(rng.integers(1000, 100_000, n).tolist(), n_past=llm.n_tokens, logits_all=True)
        started = time.perf_counter()
        llm._ctx.decode(llm._batch)
        seconds.append(time.perf_counter() - started)
        llm.n_tokens += n
    return n / float(np.median(seconds))


def _mixed_client(server: Server, i: int, until: float, first: list[float], errors: list[str]) -> int:
    """One user: talks, regenerates, edits, hangs up, begins anew."""
    rng, talk, n = random.Random(i), Talk(server, i), 0
    while time.monotonic() < until:
        kind = rng.choices(("say", "regenerate", "edit", "hang up", "new", "wrong"), (10, 3, 2, 2, 1, 1))[0]
        if kind == "new" or len(talk.messages) > 60:
            talk.messages = talk.messages[:1]
        if kind == "wrong":
            answer = server.client.post("/v1/chat/completions", json={"messages": "Hello"})
            if answer.status_code != 400:
                errors.append(f"{answer.status_code} for a wrong request")
            continue
        if kind == "regenerate" and len(talk.messages) > 2:
            talk.messages.pop()
        elif kind == "edit" and len(talk.messages) > 4:
            talk.messages = talk.messages[: 2 * rng.randrange(1, len(talk.messages) // 2) - 1]
        if talk.messages[-1]["role"] != "user":
            talk.messages.append({"role": "user", "content": talk.text(rng.choice((5, 30, 200, 1500)))})
        text, most = "", 20 if kind == "hang up" else float("inf")
        try:
            text, seconds, _ = server.ask(talk.messages, rng.choice((5, 30, 120)), most)
            if text:
                first.append(seconds)
        except (httpx.HTTPError, RuntimeError) as error:
            errors.append(repr(error))
        talk.messages.append({"role": "assistant", "content": text})
        n += 1
        time.sleep(rng.expovariate(2.0))
    return n


def mixed(args: argparse.Namespace) -> Figures:
    """A mixed load for a while: errors, memory by time, and how long the first token takes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Server("nano", "--parallel", "4", "--memory", "128M", "--disk", "512M", "--folder", folder) as server,
    ):
        first: list[float] = []
        errors: list[str] = []
        samples: list[Figures] = []

        started = time.monotonic()
        until = started + 60 * args.minutes
        with ThreadPoolExecutor(args.clients) as pool:
            clients = [pool.submit(_mixed_client, server, i, until, first, errors) for i in range(args.clients)]
            while time.monotonic() < until:
                samples.append({"minute": (time.monotonic() - started) / 60, "resident": server.resident()})
                time.sleep(min(5, 6 * args.minutes))
        after = [each["resident"] for each in samples if each["minute"] >= min(5, args.minutes / 2)]
        return {
            "minutes": args.minutes,
            "clients": args.clients,
            "turns": sum(client.result() for client in clients),
            "errors": errors[:20],
            "n_errors": len(errors),
            "first_token": {**spread(first), "p99": float(np.quantile(first, 0.99))},
            "samples": samples[:: max(1, len(samples) // 100)],
            "resident_after_5_minutes": spread(after),
            "restored": server.metric("restored_total"),
            "restored_from_files": server.metric("restored_from_files_total"),
            "cached": server.metric("cached_tokens_total") / server.metric("prompt_tokens_total"),
            "cancelled": server.metric("cancelled_total"),
            "load": os.getloadavg()[0],
        }


def post(url: str, data: bytes) -> tuple[int, float]:
    """The status, and the seconds that it took."""
    began = time.perf_counter()
    return httpx.post(url, content=data, timeout=3600).status_code, time.perf_counter() - began


def hostile(args: argparse.Namespace) -> Figures:
    """Gaps between the tokens of 8 streams, before and while a request comes that is too much work."""
    n_quiet, n_streams = (1.0, 2) if args.tiny else (6.0, 8)
    arrived: list[list[float]] = [[] for _ in range(n_streams)]
    done = threading.Event()

    def stream(times: list[float]) -> None:
        body = {"prompt": "Once upon a time", "n_predict": 10**6, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/completion", json=body) as response:
            for line in response.iter_lines():
                if line:
                    times.append(time.perf_counter())
                if done.is_set():
                    return

    def gaps(since: float, until: float) -> dict[str, float]:
        at = [np.array(list(times)) for times in arrived]  # of which there come more meanwhile
        found = [np.diff(times)[(times[1:] >= since) & (times[1:] <= until)] for times in at]
        return {"p99": float(np.quantile(np.concatenate(found), 0.99)), "most": float(np.concatenate(found).max())}

    requests = []
    with (
        Server("nano", "--parallel", str(n_streams + 1), "--disk", "0", "--threads", "1") as server,
        ProcessPoolExecutor(1) as elsewhere,  # what it takes to read an answer of megabytes is not the streams' doing
        ThreadPoolExecutor(n_streams) as pool,
    ):
        elsewhere.submit(post, server.facts["url"] + "/tokenize", b'{"content": ""}').result()
        streams = [pool.submit(stream, times) for times in arrived]
        try:
            for name, (path, body) in HOSTILE.items():
                data = json.dumps({"prompt": "a", "n_predict": 64, "max_tokens": 64, **body}).encode()
                time.sleep(n_quiet)
                began = time.perf_counter()
                status, seconds = elsewhere.submit(post, server.facts["url"] + path, data).result()
                ended = time.perf_counter()
                time.sleep(max(0.5, began + 2 - ended))
                requests.append({
                    "request": name, "status": status, "seconds": seconds,
                    "before": gaps(began - n_quiet, began), "during": gaps(began, max(ended, began + 2)),
                })  # fmt: skip
        finally:
            done.set()
        for each in streams:
            each.result()
    return {"streams": n_streams, "requests": requests, "load": os.getloadavg()[0]}


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "first_token": first_token,
    "agent": agent,
    "unseen": unseen,
    "cold": cold,
    "memory": memory,
    "parallel": parallel,
    "hostile": hostile,
    "mixed": mixed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, help="repeatable; default: all")
    parser.add_argument("--minutes", type=float, default=30, help="of mixed load; default 30")
    parser.add_argument(
        "--model", metavar="GGUF", action="append", default=[], help="one more, for first_token, agent and unseen"
    )
    parser.add_argument("--out", type=Path, default=FIGURES, help="default docs/server-performance")
    parser.add_argument("--tiny", action="store_true", help="little of everything, to try it out")
    args = parser.parse_args()
    tiny = args.tiny
    if tiny and args.out == FIGURES:
        parser.error("--tiny needs --out: its figures say nothing")
    args.lengths = (500, 3000) if tiny else (1000, 200_000)
    args.agent_turns, args.output_words = ((3, 6), 200) if tiny else ((10, 200), 3400)
    args.rounds_agent = 2 if tiny else 9
    args.cold_lengths = (500, 3000) if tiny else (10_000, 1_000_000)
    args.unseen_tokens, args.rounds_unseen = (3000, 2) if tiny else (200_000, 9)
    args.unseen = [("nano", 256), *((model, 512) for model in args.model)]
    args.rounds, args.rounds_parallel, args.n_answer = (3, 1, 8) if tiny else (30, 7, 48)
    args.weights = ("q4_0",) if tiny else ("q4_0", "q8_0")
    args.memory_mib, args.conversations, args.turns = (32, 10, 2) if tiny else (256, 100, 4)
    args.clients, args.threads = (4 if tiny else 16), n_cores()
    args.minutes = min(args.minutes, 0.3) if tiny else args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    folder = native.library_folder()
    assert folder is not None
    for name in args.only or EXPERIMENTS:
        machine, started = describe(folder, folder), time.time()
        figures = EXPERIMENTS[name](args)
        result = {
            "experiment": name,
            "what": (EXPERIMENTS[name].__doc__ or "").strip(),
            "seconds": round(time.time() - started, 1),
            "cores": n_cores(),
            "machine": machine,
            **figures,
        }
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(figures)[:300]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
