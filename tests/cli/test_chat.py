"""lminf-edge chat and serve, as a user runs them."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import TEXT

from lminf_edge import Llama
from lminf_edge.cli import main
from lminf_edge.cli.chat import Chat
from lminf_edge.errors import UserError
from lminf_edge.server.security import allowed_hosts
from lminf_edge.text.chat import ChatOptions
from lminf_edge.text.formats import BuiltinFormat, ChatDefaults, builtin_templates, find_format

COMMAND = [sys.executable, "-m", "lminf_edge"]
FEW = ["-m", "nano", "--threads", "1", "--n-local", "128"]


def chat(*options: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "chat", *FEW, "--temp", "0", "-n", "12", *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_a_conversation_and_its_commands(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"The ferry left at six.\nAnd then?\n/stats\n/save {saved}\n/rewind\n/stats\n/load {saved}\n/stats\n/quit\n"
    done = chat("--system", "Go on with the story.", lines=lines)
    assert (done.returncode, done.stderr) == (0, "")
    messages = json.loads(saved.read_text())["messages"]
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[1]["content"] == "The ferry left at six."
    assert messages[2]["content"] in done.stdout
    counts = [line.split()[0] for line in done.stdout.splitlines() if "messages; stream position" in line]
    assert counts == ["5", "3", "5"]
    assert "1 taken back" in done.stdout


def test_a_line_can_go_on(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    chat(lines=f"one\\\ntwo\n/save {saved}\n")
    assert json.loads(saved.read_text())["messages"][0]["content"] == "one\ntwo"


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"messages": [1]}')
    wrong = ["/", "/nonsense", "/rewind x", "/save", f"/load {tmp_path}/none", f"/load {tmp_path}/broken.json"]
    done = chat(lines="\n".join([*wrong, f"/save {tmp_path}", "/rewind", "/help", ""]))
    errors = done.stderr.splitlines()
    assert done.returncode == 0
    assert len(errors) == 7
    assert all(line.startswith("error: ") for line in errors)
    assert "nothing to take back" in done.stdout
    assert "/rewind [N]" in done.stdout


def test_recall_can_be_changed_between_questions() -> None:
    done = chat("--recall", "5", lines="/recall 3\nAnd then?\n/stats\n/recall\n/recall 9\n/recall x\n")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.endswith("recalled in each layer")] == [
        "3 tokens are recalled in each layer",
        "5 tokens are recalled in each layer",
    ]
    assert re.search(r"stream position (\d+),.* KV cache .*, \1 tokens can be recalled; last prompt", done.stdout)
    assert done.stderr.splitlines() == [
        f"error: /recall takes a number of 0 to 5, the value of --recall, not {wrong!r}." for wrong in ("9", "x")
    ]


def test_a_long_file_is_read_first(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 20, encoding="utf-8")
    done = chat("--file", str(book), "-p", "And then?", "--json")
    report = json.loads(done.stdout)
    assert report["prompt_tokens"] > 1500
    assert report["prompt_tokens"] - report["prompt_tokens_details"]["cached_tokens"] < 40
    assert report["text"]
    assert report["finish_reason"] == "length"


def test_what_is_read_in_the_background_is_told(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 20, encoding="utf-8")
    asked = "And then?\n/stats\n"
    done = chat("--file", str(book), "--recall", "5", lines=asked)
    [n_recallable] = re.findall(r", (\d+) tokens can be recalled, reading what was skipped: \d+ %; last", done.stdout)
    assert int(n_recallable) < 500
    assert "reading" not in chat("--file", str(book), "--recall", "5", "--no-background", lines=asked).stdout


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    # a process started in the background may have Ctrl-C switched off
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lminf_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "chat", *FEW]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("Tell me a story without an end.\n")
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdin.write("/stats\n/quit\n")
        process.stdin.flush()
        rest = process.stdout.read()
        assert process.wait(60) == 0
        assert "2 messages; stream position" in rest
        assert "[stopped]" in process.stderr.read()


def test_json_is_for_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-m", "nano", "--json"]) == 1
    assert "--json needs --prompt" in capsys.readouterr().err


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lminf_edge.cli.chat import Terminal

    class Refusing:
        pass

    import argparse

    talk = Chat(Refusing(), argparse.Namespace(system="Be brief."))  # type: ignore[arg-type]

    def fail(question: str) -> Any:
        talk.messages.append({"role": "user", "content": question})
        talk.messages.append({"role": "assistant", "content": ""})
        raise ValueError("no")
        yield

    monkeypatch.setattr(talk, "answer", fail)
    for debug in ("0", "1"):
        monkeypatch.setenv("LMINF_DEBUG", debug)
        Terminal(talk).print_answer("What?")
        assert talk.messages == [{"role": "system", "content": "Be brief."}]
        said = capsys.readouterr().err
        assert "This is a bug in lminf-edge (ValueError: no)" in said
        assert ("Traceback" in said) == (debug == "1")


# --- serve ------------------------------------------------------------------------------------------------------------


def serve(folder: Path, *options: str) -> tuple[subprocess.Popen[str], Any]:
    command = [*COMMAND, "serve", *FEW, "--port", "0", "--folder", str(folder), "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def ask(url: str, messages: list[dict[str, str]]) -> Any:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_restart_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    if how is signal.SIGINT and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        pytest.skip("Ctrl-C is switched off here")
    process, facts = serve(tmp_path)
    assert (facts["model"], facts["window"], facts["parallel"]) == ("nano", 128, 4)
    messages = [{"role": "user", "content": TEXT * 2}]
    answer = ask(facts["url"], messages)
    process.send_signal(how)  # at once: the conversation is in memory only
    process.wait(30)
    messages += [answer["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    process, facts = serve(tmp_path, "--parallel", "1")
    usage = ask(facts["url"], messages)["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 20
    process.terminate()
    assert process.wait(30) == 0


def test_the_system_block_can_be_pinned(tmp_path: Path) -> None:
    process, facts = serve(tmp_path, "--pin-system", "--max-sinks", "30", "--disk", "0")
    assert facts["folder"] is None
    short = [{"role": "system", "content": "Go on with the story of the ferry."}, {"role": "user", "content": "Six."}]
    long = [
        {"role": "system", "content": "Go on with the story of the ferry. " * 9},
        {"role": "user", "content": "Six."},
    ]
    first, second = ask(facts["url"], short)["lminf"], ask(facts["url"], long)["lminf"]
    assert 10 <= first["sink"] < 30
    assert "warning" not in first
    assert second["sink"] == 30
    assert "give a larger --max-sinks" in second["warning"]
    process.terminate()
    process.wait(30)


def test_what_a_request_leaves_out_is_the_servers_to_say(tmp_path: Path) -> None:
    options = ["--max-tokens", "40", "--temp", "0", "--repeat-penalty", "2", "--repeat-last-n", "20"]
    process, facts = serve(tmp_path, *options)

    def said(**body: Any) -> Any:
        body = {"prompt": "Anna", **body}
        return httpx.post(f"{facts['url']}/v1/completions", json=body, timeout=60).json()

    answers = [said(), said(temperature=0, max_tokens=40), said(repeat_penalty=1.0), said(max_tokens=3)]
    props = httpx.get(f"{facts['url']}/props").json()["default_generation_settings"]["params"]
    process.terminate()
    process.wait(30)
    assert [each["usage"]["completion_tokens"] for each in answers] == [40, 40, 40, 3]
    texts = [each["choices"][0]["text"] for each in answers]
    assert texts[0] == texts[1] != texts[2]
    assert (props["repeat_last_n"], props["n_predict"], props["temperature"]) == (20, 40, 0.0)


def test_messages_are_logged_if_asked_for(tmp_path: Path) -> None:
    process, facts = serve(tmp_path, "--log-messages")
    ask(facts["url"], [{"role": "user", "content": "the treasure"}])
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert "the treasure" in log


def failed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["serve", "-m", "nano", *options]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_what_cannot_be_served(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMINF_API_KEY", raising=False)
    assert "give --api-key" in failed(capsys, "--host", "0.0.0.0")
    assert "The API key is empty" in failed(capsys, "--api-key", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be used" in failed(capsys, "--port", str(taken.getsockname()[1]))
    (tmp_path / "file").write_text("x")
    assert "cannot be used" in failed(capsys, "--port", "0", "--folder", str(tmp_path / "file"))
    assert main(["serve", "-m", "nosuch.gguf", "--port", "0"]) == 1
    with pytest.raises(SystemExit):
        main(["serve", "-m", "nano", "--memory", "5X"])


def test_names_a_server_goes_by() -> None:
    assert "192.168.1.5" in allowed_hosts(["192.168.1.5", "0.0.0.0"], [])
    assert "0.0.0.0" not in allowed_hosts(["0.0.0.0"], ["My.Host"])
    assert "my.host" in allowed_hosts(["0.0.0.0"], ["My.Host"])


def test_an_idle_conversation_is_written(tmp_path: Path) -> None:
    process, facts = serve(tmp_path)
    ask(facts["url"], [{"role": "user", "content": TEXT}])
    deadline = time.monotonic() + 20
    while not list(tmp_path.rglob("*.checkpoint")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", sorted(builtin_templates()))
def test_llama_cpps_templates_by_name(nano_path: str, name: str) -> None:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    made = find_format(llm, ChatDefaults(template=name))
    assert isinstance(made, BuiltinFormat)
    asked = [{"role": "user", "content": "Who is there? " * 200}]
    text = made.render(asked, ChatOptions(), lambda: False).text
    assert asked[0]["content"].strip() in text
    begun = made.render(
        [*asked, {"role": "assistant", "content": "Nobody"}], ChatOptions(continue_final_message=True), bool
    )
    assert begun.text == text + "Nobody"
    llm.close()


def test_a_template_by_name_is_as_llama_server_has_it(nano_path: str) -> None:
    llm = Llama(nano_path, vocab_only=True, verbose=False)
    made = find_format(llm, ChatDefaults(template="llama3"))
    told = [{"role": "system", "content": "Book"}, {"role": "user", "content": "Hey"}]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = (
        f"{header.format('system')}Book<|eot_id|>{header.format('user')}Hey<|eot_id|>{header.format('assistant')}"
    )
    assert made.render(told, ChatOptions(), lambda: False).text == expected
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(UserError, match="calls no tools"):
        made.render(told, ChatOptions(tools=tools, tool_choice="required"), lambda: False)
    llm.close()
