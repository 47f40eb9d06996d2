"""Chats with a model in the terminal, for as long as you like.

Ctrl-C stops generation; at the prompt it exits. A line that ends in \\ continues on the next.
A completion without a limit (-n) stops once it repeats itself exactly, over and over.

  /stats          stream position, memory and speed
  /rewind [N]     take back the last N questions and their answers; default 1
  /system TEXT    start over with this system message; without TEXT, show the current one
  /recall [N]     let each layer recall N tokens that have left the window, 0 to --recall; without N, --recall
  /save FILE      write the conversation as JSON, as OpenAI's messages
  /load FILE      continue a saved conversation
  /help, /quit
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lminf_edge.cli.common import CommandError, check_output, human_bytes, print_error, print_json, read_text
from lminf_edge.cli.options import (
    add_chat_template,
    add_compute,
    add_drafts,
    add_model,
    add_prefill,
    add_sampling,
    add_window,
)
from lminf_edge.cli.progress import Progress as ProgressBar
from lminf_edge.cli.values import expand_home, whole_number

if TYPE_CHECKING:
    from lminf_edge.engine.request import Request
    from lminf_edge.text.answer import Delta
    from lminf_edge.text.service import Exchange, TextService

HELP = "chat with a model in the terminal, for as long as you like"

MEMORY_FOR_REWIND = 512 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-s", "--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        type=expand_home,
        help="a UTF-8 text of any length to talk about, processed first",
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="send this message, print the reply and exit")
    parser.add_argument(
        "-n", "--tokens", metavar="N", type=whole_number(-1), default=-1, help="per reply; default -1, no limit"
    )
    parser.add_argument("--pin-system", action="store_true", help="never forget the system message, up to --max-sinks")
    parser.add_argument("--max-sinks", metavar="N", type=whole_number(0), help="default: G, or 256 with --pin-system")
    add_chat_template(parser)
    add_prefill(parser)
    add_drafts(parser)
    add_sampling(parser)
    add_window(parser)
    add_compute(parser, stock=False)


def run(args: argparse.Namespace) -> int:
    if args.json and args.prompt is None:
        raise CommandError("--json needs --prompt: a conversation is for people.")
    text = None if args.file is None else read_text(args.file)
    with contextlib.ExitStack() as stack:
        service = open_service(args)
        stack.callback(service.engine.model.close)
        stack.callback(service.engine.close)
        chat = Chat(service, args)
        if text is not None:
            chat.read_first(text)
        if args.prompt is not None:
            return ask_once(chat, args)
        Terminal(chat).talk()
    return 0


def open_service(args: argparse.Namespace) -> TextService:
    """A service for one conversation, kept in memory only."""
    from lminf_edge.cli import serve

    settings = {"parallel": 1, "memory": MEMORY_FOR_REWIND, "disk": 0, "folder": None}
    return serve.open_service(argparse.Namespace(**{**vars(args), **settings, "max_tokens": args.tokens}))


def ask_once(chat: Chat, args: argparse.Namespace) -> int:
    if not args.json:
        show(chat.answer(args.prompt))
        print()
        return 0
    deltas = list(chat.answer(args.prompt))
    text, thoughts = ("".join(delta.text for delta in deltas if delta.reasoning is kind) for kind in (False, True))
    report = {"text": text, **({"reasoning": thoughts} if thoughts else {}), "finish_reason": chat.finish_reason}
    print_json({**report, **chat.stats()})
    return 0


def show(deltas: Iterator[Delta]) -> None:
    """Prints a reply as it comes. Thoughts are dimmed on a terminal, and left out elsewhere."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else (None, "")
    thinks = False
    try:
        for delta in deltas:
            if delta.reasoning and dim is None:
                continue
            if delta.reasoning is not thinks:
                thinks = delta.reasoning
                print(dim if thinks else f"{plain}\n\n", end="")
            print(delta.text, end="", flush=True)
    finally:
        if thinks:
            print(plain, end="", flush=True)


# --- the conversation -------------------------------------------------------------------------------------------------


@dataclass
class Chat:
    """A conversation with its messages, in OpenAI's form."""

    service: TextService
    args: argparse.Namespace
    messages: list[dict[str, str]] = field(default_factory=list)
    recall: int | None = None  # None: as many as --recall says
    preface: str = ""  # already processed; precedes the next question
    finish_reason: str = "stop"
    last: dict[str, Any] = field(default_factory=dict)  # statistics of the last completion

    def __post_init__(self) -> None:
        if self.args.system is not None:
            self.begin(self.args.system)

    def begin(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}]

    def read_first(self, text: str) -> None:
        """Processes the text that the next question is about, with a progress bar."""
        self.preface = text.rstrip() + "\n\n"
        with ProgressBar() as bar:
            bar.begin("reading")
            exchange = self._exchange(lambda request: bar.at(request.n_done))
            # one token, discarded: a prompt is processed when a token is generated
            messages = [*self.messages, {"role": "user", "content": self.preface.rstrip()}]
            try:
                prompt = exchange.chat_prompt(messages)
                bar.expect(len(prompt.tokens))
                for _ in exchange.answer(prompt, self.service.defaults.sampling, max_tokens=1):
                    pass
            except KeyboardInterrupt:
                exchange.cancel()
                raise

    def answer(self, question: str) -> Iterator[Delta]:
        """The reply and the thoughts before it, piece by piece. If the iterator is closed early, the reply is what was
        generated so far."""
        question, self.preface = self.preface + question, ""
        self.messages.append({"role": "user", "content": question})
        exchange = self._exchange(None)
        pieces: list[str] = []
        thoughts: list[str] = []

        def said(deltas: list[Delta]) -> Iterator[Delta]:
            for delta in deltas:
                if delta.text:
                    (thoughts if delta.reasoning else pieces).append(delta.text)
                    yield delta

        self.finish_reason = "interrupted"
        try:
            prompt = exchange.chat_prompt(self.messages)
            reader = prompt.new_reader()
            answer = exchange.answer(prompt, self.service.defaults.sampling)
            with contextlib.closing(iter(answer)) as parts:
                for part in parts:
                    yield from said(reader.push(part.text))
            yield from said(reader.finish())
            self.finish_reason = answer.text.finish_reason
        finally:
            exchange.cancel()
            message = {"role": "assistant", "content": "".join(pieces)}
            if thoughts:
                message["reasoning_content"] = "".join(thoughts)
            self.messages.append(message)
            self.last = {**exchange.usage.openai(), **exchange.usage.timings(), **exchange.stream_info()}

    def rewind(self, n: int) -> int:
        """Removes the last n questions with their replies; returns how many there were."""
        n_done = 0
        while n_done < n and any(message["role"] == "user" for message in self.messages):
            while self.messages.pop()["role"] != "user":
                pass
            n_done += 1
        return n_done

    def stats(self) -> dict[str, Any]:
        reading = self.service.engine.scheduler.reading
        return {
            "messages": len(self.messages),
            **self.last,
            **({"reading": asdict(reading)} if reading is not None else {}),
        }

    def save(self, path: Path) -> None:
        """Raises CommandError if the file cannot be written."""
        check_output(path)
        unfinished = path.with_name(f".{path.name}.part")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror}.") from error

    def load(self, path: Path) -> None:
        """Raises CommandError, and nothing is changed, if the file holds no conversation."""
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            known = ("role", "content", "reasoning_content")
            messages = [{name: str(each[name]) for name in known if name in each} for each in messages]
            if not all("role" in message and "content" in message for message in messages):
                raise KeyError
        except OSError as error:
            raise CommandError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{path} holds no conversation that was saved here.") from error
        self.messages = messages

    def _exchange(self, on_progress: Callable[[Request], None] | None) -> Exchange:
        from lminf_edge.text.service import Exchange

        return Exchange(self.service, label="chat", recall=self.recall, on_progress=on_progress)


# --- the terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """Reads lines, prints replies."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def talk(self) -> None:
        with contextlib.suppress(ImportError):  # not on Windows: lines can be edited there without it
            import readline  # noqa: F401
        if sys.stdin.isatty():
            print("/help says what can be done here.")
        while True:
            try:
                line = self.read_line()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                if line.strip() in ("/quit", "/exit"):
                    return
                try:
                    name, _, argument = line[1:].strip().partition(" ")
                    self.command(name, argument.strip())
                except CommandError as error:
                    print(f"error: {error}", file=sys.stderr)
            elif line.strip():
                self.print_answer(line)

    @staticmethod
    def read_line() -> str:
        prompt = "> " if sys.stdin.isatty() else ""
        lines = [input(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(". " if prompt else ""))
        return "\n".join(lines)

    def print_answer(self, question: str) -> None:
        preface = self.chat.preface
        answer = self.chat.answer(question)
        try:
            show(answer)
            print()
        except KeyboardInterrupt:
            print("\n[stopped]", file=sys.stderr)
        except Exception as error:
            print_error(error)
            answer.close()  # type: ignore[attr-defined]
            self.chat.rewind(1)
            self.chat.preface = preface
            return
        finally:
            answer.close()  # type: ignore[attr-defined]
        if warning := self.chat.last.get("warning"):
            print(f"warning: {warning}", file=sys.stderr)

    def command(self, name: str, argument: str = "") -> None:
        """Runs a /command. Raises CommandError if it fails."""
        chat = self.chat
        if name == "help":
            print((__doc__ or "").strip())
        elif name == "stats":
            print(stats_line(chat.stats()))
        elif name == "rewind":
            if not (argument or "1").isdecimal():
                raise CommandError(f"/rewind takes a number, not {argument!r}.")
            n_done = chat.rewind(int(argument or 1))
            print(f"{n_done} taken back" if n_done else "there is nothing to take back")
        elif name == "recall":
            print(f"{self.set_recall(argument)} tokens are recalled in each layer")
        elif name == "system":
            if argument:
                chat.begin(argument)
                print("a new conversation")
            else:
                system = [message["content"] for message in chat.messages if message["role"] == "system"]
                print(system[0] if system else "there is no system message")
        elif name in ("save", "load"):
            if not argument:
                raise CommandError(f"/{name} needs the name of a file.")
            path = Path(argument).expanduser()
            if name == "save":
                chat.save(path)
                print(f"{len(chat.messages)} messages in {path}")
            else:
                chat.load(path)
                print(f"{len(chat.messages)} messages from {path}")
        else:
            raise CommandError(f"There is no /{name}: see /help.")

    def set_recall(self, argument: str) -> int:
        most = self.chat.service.engine.n_recall
        if not (argument or "0").isdecimal() or int(argument or 0) > most:
            raise CommandError(f"/recall takes a number of 0 to {most}, the value of --recall, not {argument!r}.")
        self.chat.recall = int(argument) if argument else None
        return most if self.chat.recall is None else self.chat.recall


def stats_line(stats: dict[str, Any]) -> str:
    if "position" not in stats:
        return f"{stats['messages']} messages, nothing asked yet"
    recallable = f", {stats['archived']:,} tokens can be recalled" if "archived" in stats else ""
    if reading := stats.get("reading"):
        recallable += f", reading what was skipped: {100 * reading['n_read'] // reading['n_tokens']} %"
    known = stats["prompt_tokens_details"]["cached_tokens"]
    window = "" if stats["window"] is None else f"window {stats['sink']} + {stats['window']}, "
    return (
        f"{stats['messages']} messages; stream position {stats['position']:,}, "
        f"{window}KV cache {human_bytes(stats['kv_bytes'])}{recallable}; "
        f"last prompt {stats['prompt_tokens']:,} tokens, "
        f"{known:,} of them known; {stats['predicted_per_second']:.1f} tokens/s"
    )
