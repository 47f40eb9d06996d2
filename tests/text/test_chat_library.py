"""llama.cpp's chat library: every template it comes with, tools, thoughts, and what must not end or hang a process."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pace import within
from repository import ROOT

from lminf_edge.engine.request import RequestCancelled
from lminf_edge.text import library
from lminf_edge.text.answer import Delta, MessageReader, NamedCallReader
from lminf_edge.text.library import ChatError, Parser, Templates

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "send_mail",
            "description": "Sends a mail.",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
        },
    },
]
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Tromsø 東京 🌧","days":3}'},
}
ARGUMENTS = {"city": "Tromsø 東京 🌧", "days": 3}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How is the weather in Oslo?"}]
ANSWERED = [
    *ASKED,
    {"role": "assistant", "content": "", "reasoning_content": "They ask about Oslo.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": '{"sky":"grey"}'},
]


@functools.cache
def templates() -> dict[str, str]:
    """The texts of llama.cpp's templates, from the sdist."""
    found = list((ROOT / "build" / "upstream").glob("*.tar.gz"))
    if not found:
        pytest.skip("build/upstream has no sdist: make setup")
    texts = {}
    with tarfile.open(found[0]) as archive:
        for member in archive:
            if re.search(r"/llama\.cpp/models/templates/[^/]+\.jinja$", member.name):
                file = archive.extractfile(member)
                assert file is not None
                texts[Path(member.name).stem] = file.read().decode("utf-8")
    return texts


@functools.cache
def opened(name: str) -> Templates:
    return Templates(None, templates()[name], "<s>", "</s>")


def apply(name: str, messages: Any, **more: Any) -> dict[str, Any]:
    return opened(name).apply({"messages": messages, **more})


def read(parser: str, text: str, n_characters: int) -> list[Delta]:
    """The deltas of a text that comes in pieces of so many characters."""
    return read_pieces(parser, (text[start : start + n_characters] for start in range(0, len(text), n_characters)))


def read_pieces(parser: str, pieces: Iterable[str]) -> list[Delta]:
    reader = MessageReader(parser, False)
    deltas = []
    for piece in pieces:
        reader._due = 0.0  # parse each time, however fast the pieces come
        deltas += reader.push(piece)
    return deltas + reader.finish()


def message(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, Any]]]:
    """The content, the thoughts, the calls."""
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.call is not None:
            calls.setdefault(delta.call.index, [delta.call.name, ""])[1] += delta.text
    said, thought = (
        "".join(d.text for d in deltas if d.call is None and d.reasoning is kind) for kind in (False, True)
    )
    return said, thought, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def test_there_are_seventy_templates() -> None:
    assert len(templates()) >= 70


def test_all_templates_take_all_conversations() -> None:
    """Tools, results, thoughts, parts of text, developers: rendered, or refused by the template itself."""
    developer = [{"role": "developer", "content": "Be brief."}, ASKED[1]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "first part"}, {"type": "text", "text": "second"}]}]
    refused, deaf = set(), set()
    for name in templates():
        for messages, more, wanted in (
            (ASKED, {}, "Oslo"),
            (ASKED, {"tools": TOOLS}, "Oslo"),
            (ANSWERED, {"tools": TOOLS}, "grey"),
            (developer, {}, "Oslo"),
            (parts, {}, "second"),
        ):
            try:
                made = apply(name, messages, **more)
            except ChatError as error:
                refused.add(f"{name}: {error}")
                continue
            if wanted == "grey" and wanted not in made["prompt"]:
                deaf.add(name)
                continue
            assert wanted in made["prompt"], name
            assert made["prompt"].endswith(made["generation_prompt"]), name
    # those that know no results of tools, or no roles but two
    assert len(refused) <= 5, refused
    assert len(deaf) <= 8, deaf  # to results of tools


def test_long_contents_stay_out_of_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt and parser as if they were in it, whatever they are made of."""
    odd = ["", " spaces \n", 'quotes " and \\', "東京 🌧", "a zero \0 inside", "half a pair \ud83d", "<|im_end|>"]
    sides = ("user", "assistant")
    long = [{"role": sides[i % 2], "content": text * 300} for i, text in enumerate(odd)]
    for name in templates():
        for messages in ([ASKED[0], *long], [*ANSWERED[:-1], {**ANSWERED[-1], "content": "grey " * 99}]):
            made = []
            for least in (10**9, -1, 256):
                monkeypatch.setattr(library, "LONG", least)
                with contextlib.suppress(ChatError):
                    made.append(apply(name, messages, tools=TOOLS))
            assert len(made) in (0, 3)
            assert all(each == made[0] for each in made), (name, messages)


def test_thoughts_are_apart() -> None:
    made = apply("Qwen-Qwen3-0.6B", ASKED)
    text = "<think>\nThey greet.\n</think>\n\nHello."
    said, thought, _ = message(read(made["parser"], text, 1))
    assert (said, thought.strip()) == ("Hello.", "They greet.")
    kept = apply("Qwen-Qwen3-0.6B", ASKED, reasoning_format="none")
    said, thought, _ = message(read(kept["parser"], text, 1))
    assert ("They greet." in said, thought) == (True, "")
    # thoughts that the prompt has begun
    begun = apply("Qwen3.5-4B", ASKED)
    assert begun["generation_prompt"].endswith("<think>\n")
    said, thought, _ = message(read(begun["parser"], "They greet.\n</think>\n\nHello.", 2))
    assert (said, thought.strip()) == ("Hello.", "They greet.")


def test_several_calls_and_what_is_no_message() -> None:
    made = apply("Qwen-Qwen2.5-7B-Instruct", ASKED, tools=TOOLS, parallel_tool_calls=True)
    assert made["grammar_lazy"]
    assert made["triggers"]
    calls = [("get_weather", {"city": "Oslo", "days": 1}), ("send_mail", {"to": "Ann"})]
    text = "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )
    for n in (1, 2, 7, len(text)):
        assert message(read(made["parser"], text, n))[2] == calls
    harmony = apply("openai-gpt-oss-120b", ASKED)
    assert message(read(harmony["parser"], "no channel at all", 4)) == ("no channel at all", "", [])


def test_a_call_that_is_json_is_read_as_it_comes() -> None:
    text = '{ "name": "send_mail", "arguments": {"to": "a}\\"b", "x": [{}]} }\n'
    for n in (1, 5, len(text)):
        reader = NamedCallReader()
        deltas = [d for i in range(0, len(text), n) for d in reader.push(text[i : i + n])] + reader.finish()
        assert message(deltas) == ("", "", [("send_mail", {"to": 'a}"b', "x": [{}]})])
    reader = NamedCallReader()
    assert [d.text for d in [*reader.push('{"na'), *reader.finish()]] == ['{"na']


def test_a_library_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY_NAMES", ("libnothing.so",))
    with pytest.raises(ImportError, match=r"^llama\.cpp's chat library is not in .*: reinstall lminf_edge, or .*\.$"):
        library.load.__wrapped__()


# --- what must not end or hang the process ----------------------------------------------------------------------------

LONG = "{% set n = namespace(s='x ') %}{% for i in range(20) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
MOST = 100.0  # seconds of work; 30 with sanitizers
HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "a range": "{{ range(10000000000) | length }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "repetition": "{{ 'x' * 100000000000 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "itself": "{% set n = namespace(a=1) %}{% set n.a = n %}{{ n | tojson }}",
    "nested lists": "{% set n = namespace(a=[]) %}{% for i in range(1000000) %}{% set n.a = [n.a] %}{% endfor %}",
    "parentheses": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "negations": "{{ " + "not " * 100000 + "1 }}",
    "minus": "{{ " + "-" * 100000 + "1 }}",
    "a long sum": "{{ " + "1 + " * 100000 + "1 }}",
    "members": "{{ messages" + ".a" * 100000 + " }}",
    "ifs": "{% if x %}" * 100000 + "{% endif %}" * 100000,
    "elifs": "{% if x %}" + "{% elif x %}" * 100000 + "{% endif %}",
    "replacements": "{% set n = namespace(s='ab') %}{% for i in range(40) %}"
    "{% set n.s = n.s | replace('a', 'aa') | replace('b', 'bb') %}{% endfor %}{{ n.s }}",
    "lists in lists": "{{ " + "[" * 1900 + "1" + "]" * 1900 + " }}",
    "calls": "{{ namespace" + "()" * 1900 + " }}",
    "loops in loops": "{% for x in [1] %}" * 20000 + "{% endfor %}" * 20000,
    "elses": "{% if 0 %}{% else %}" * 20000 + "{% endif %}" * 20000,
    "copies of a list": "{% set a = range(100000) %}{% for i in range(20000) %}{% set b = a[1:] %}{% endfor %}",
    "sums of lists": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "a growing list": "{% set a = [] %}{% for i in range(9000) %}{% for j in range(9000) %}{{ a.append(i) }}"
    "{% endfor %}{% endfor %}",
    "objects": "{% for i in range(9000) %}{% for j in range(9000) %}{% set a = {i: {j: {}}} %}{% endfor %}{% endfor %}",
    "variables": "".join(f"{{% set v{i} = 1 %}}" for i in range(9000)) + "{% for i in range(99999) %}{% endfor %}",
    "the largest": "{% set a = range(900000) %}{% for i in range(9000) %}{% set b = a | max %}{% endfor %}",
    "one of many": "{% set a = range(900000) %}{% for i in range(9000) %}{% set b = 'x' in a %}{% endfor %}",
    "comparisons": "{% set a = 'x' * 1000000 %}{% for i in range(900000) %}{% set b = a == a %}{% endfor %}",
    "equal tuples": "{% set n = namespace(a=(1, 2)) %}{% for i in range(20000) %}{% set n.a = (n.a, 1) %}{% endfor %}"
    "{% for i in range(999) %}{% set b = n.a == n.a %}{% endfor %}",
    "pieces": LONG + "{% set a = n.s.split(' ') %}",
    "pieces from the end": LONG + "{% set a = n.s.rsplit(' ') %}",
    "between all": LONG + "{% set a = n.s.replace('', n.s) %}",
    "indentation": "{{ 'x\ny' | indent(2000000000) }}",
    "indented JSON": "{{ [1] | tojson(indent=2000000000) }}",
    "joined": "{% set n = namespace(a=['x']) %}{% for i in range(99) %}"
    "{% set n.a = [n.a | join('y'), n.a | join('z')] %}{% endfor %}",
    "not closed": "{% for",
    "no filter": "{{ 1 | nothing }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name: str) -> None:
    with within(MOST), pytest.raises(ChatError) as refused:
        Templates(None, HOSTILE[name]).apply({"messages": ASKED})
    assert len(str(refused.value)) < 600


LATER = {  # with a long conversation, which has more of everything
    "freed": "{% set n.a = [n.a] %}{% endfor %}",
    "freed from above": "{% set b = [] %}{% set c = i == 0 or n.a.append(b) %}{% set n.a = b %}{% endfor %}",
    "as text": "{% set n.a = [n.a] %}{% endfor %}{{ n.a | string }}",
    "as JSON": "{% set n.a = [n.a] %}{% endfor %}{{ n.a | tojson }}",
    "joined": "{% set n.a = [n.a] %}{% endfor %}{{ n.a | join }}",
    "a key": "{% set n.a = (n.a, 1) %}{% endfor %}{% set b = {n.a: 1} %}",
    "compared": "{% set n.a = (n.a, 1) %}{% endfor %}{% set b = n.a == n.a %}",
}


@pytest.mark.parametrize("name", LATER)
def test_values_nest_deep(name: str) -> None:
    """Far deeper than the stack reaches; where the conversation is no trial."""
    chat = Templates(
        None,
        "{% if messages[0].content == 'Be brief.' %}{% set n = namespace(a=(1, 2)) %}{% for i in range(100000) %}"
        + LATER[name]
        + "{% endif %}{{ messages[0].content }}",
    )
    with within(MOST), contextlib.suppress(ChatError):
        chat.apply({"messages": [*ASKED, {"role": "user", "content": "x" * 10**6}]})
    assert chat.apply({"messages": ASKED[1:]})["prompt"] == ASKED[1]["content"]


def deep(n: int) -> str:
    return '{"a":' * n + "1" + "}" * n


@pytest.mark.parametrize("text", [deep(100_000), "[" * 100_000, '{"a":"' + "x" * 100_000, "[" * 200 + "]" * 200])
def test_hostile_answers(text: str) -> None:
    """What a model writes is parsed without recursion that the stack cannot bear."""
    for name in ("Qwen-Qwen2.5-7B-Instruct", "Mistral-Small-3.2-24B-Instruct-2506", "openai-gpt-oss-120b"):
        made = apply(name, ASKED, tools=TOOLS)
        for call in (
            f'<tool_call>\n{{"name": "get_weather", "arguments": {text}',
            f"[TOOL_CALLS]get_weather[ARGS]{text}",
        ):
            for is_partial in (True, False):
                with contextlib.suppress(ChatError):
                    Parser(made["parser"]).parse(call, is_partial)
            message(read(made["parser"], "Hello", 5))


def test_hostile_requests() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": deep(100_000)}}
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    many = {"type": ["string", "object", "array", "integer"], "properties": {}}
    for _ in range(12):
        many = {"type": ["string", "object", "array", "integer"], "properties": {"a": many}, "items": many}
    for more in (
        {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        *(
            {"messages": ASKED, "tool_choice": "required", "tools": [{"type": "function", "function": function}]}
            for function in (
                {"name": "f", "parameters": {"type": "object", "properties": {"a": many}}},
                {"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}},
                {"name": "f", "parameters": {"allOf": [loop]}},
                {"name": "f", "parameters": json.loads(deep(250))},
                {"name": 1},
            )
        ),
        {"messages": "none"},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {},
    ):
        with within(MOST), contextlib.suppress(ChatError):
            assert opened("Qwen-Qwen2.5-7B-Instruct").apply(more)["prompt"]


def test_a_call_can_be_cancelled() -> None:
    chat = Templates(
        None, "{% if messages[0].content == 'Be brief.' %}" + HOSTILE["loops"] + "{% endif %}{{ messages[0].content }}"
    )
    cancelled = threading.Event()
    threading.Timer(0.05, cancelled.set).start()
    with within(5, time.monotonic), pytest.raises(RequestCancelled):
        chat.apply({"messages": [*ASKED, {"role": "user", "content": "x" * 10**6}]}, cancelled.is_set)


@pytest.fixture
def slow() -> MessageReader:
    return MessageReader(apply("Qwen-Qwen3-0.6B", ASKED)["parser"], False)


def test_parsing_takes_little_of_the_time(slow: MessageReader) -> None:
    """However long a text gets."""
    parsed, pushed = 0.0, 0.0
    original = slow._read

    def timed(text: str, is_partial: bool) -> Any:
        nonlocal parsed
        began = time.perf_counter()
        try:
            return original(text, is_partial)
        finally:
            parsed += time.perf_counter() - began

    slow._read = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    while (pushed := time.perf_counter() - began) < 1.5:
        slow.push("word " * 8)
        time.sleep(0.0002)
    assert parsed < 0.04 * pushed
