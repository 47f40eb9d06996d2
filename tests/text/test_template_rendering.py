"""llama.cpp's engine renders its 70 templates as Jinja2 itself does, in the way of Hugging Face's transformers."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import datetime
import functools
import itertools
import json
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
import pytest
from pace import within
from test_chat_library import ANSWERED, ASKED, TOOLS, apply, opened, templates

from lminf_edge.text.library import ChatError, Templates

DEVELOPER = [{"role": "developer", "content": "Be brief."}, ASKED[1]]
CONVERSATIONS: dict[str, tuple[Any, Any, Any]] = {  # what we are given, what Jinja2 is, and tools
    "a question": (ASKED, ASKED, None),
    "tools": (ASKED, ASKED, TOOLS),
    "thoughts, a call and its result": (ANSWERED, ANSWERED, TOOLS),
    "a developer": (DEVELOPER, ASKED, None),  # is a system message to who does not know it
}

# where llama.cpp does more than Jinja2 with the same values
NO_SYSTEM = "it knows no system messages: llama.cpp puts them before the first of the user"
NO_DESCRIPTION = "it wants the description of each parameter, and Jinja2 raises where there is none"
CALLED = "thoughts, a call and its result"
DIFFERENT = {
    ("CohereForAI-c4ai-command-r-plus-tool_use", "tools"): NO_DESCRIPTION,
    ("CohereForAI-c4ai-command-r-plus-tool_use", CALLED): NO_DESCRIPTION,
    ("google-gemma-2-2b-it", "a question"): NO_SYSTEM,
    ("google-gemma-2-2b-it", "tools"): NO_SYSTEM,
    ("google-gemma-2-2b-it", CALLED): NO_SYSTEM + "; then both refuse a tool's message",
    ("google-gemma-2-2b-it", "a developer"): NO_SYSTEM,
    (
        "google-gemma-4-31B-it-interleaved",
        CALLED,
    ): "llama.cpp puts results into the turn of their call",
    (
        "mistralai-Ministral-3-14B-Reasoning-2512",
        CALLED,
    ): "llama.cpp makes thoughts a part of the content",
}


class Generation(jinja2.ext.Extension):
    """{% generation %}, which marks what a model is trained on."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def environment() -> jinja2.Environment:
    made = jinja2.sandbox.SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )

    def fail(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, default=list, **{"ensure_ascii": False, **options})

    made.filters |= {"tojson": to_json, "safe": str}
    made.globals["raise_exception"] = fail
    made.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return made


def by_jinja(source: str, messages: Any, tools: Any, has_objects: bool) -> str:
    """has_objects: the arguments of a call are an object, and no text."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for call in message.get("tool_calls", ()):
            if has_objects:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if "reasoning_content" in message and "reasoning_content" not in source:
            message["thinking"] = message["reasoning_content"]
    now = datetime.datetime.now()
    return (
        environment()
        .from_string(source)
        .render(
            messages=messages,
            tools=tools,
            functions=json.dumps(tools, indent=2) if tools else "",
            add_generation_prompt=True,
            enable_thinking=True,
            bos_token="<s>",
            eos_token="</s>",
            date_string=now.strftime("%d %b %Y"),
            datetime=now.strftime("%b %d %Y"),
        )
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_those_of_jinja(conversation: str) -> None:
    given, told, tools = CONVERSATIONS[conversation]
    different = set()
    for name, source in templates().items():
        try:
            made = apply(name, given, **({"tools": tools} if tools else {}))["prompt"]
        except ChatError as error:
            made = str(error)
        # some templates go through tools that are not there; to some the arguments of a call are a text
        for no_tools, has_objects in itertools.product((None, []), (True, False)):
            with contextlib.suppress(jinja2.TemplateError, TypeError):
                if by_jinja(source, told, tools or no_tools, has_objects) == made:
                    break
        else:
            different.add(name)
    assert different == {name for name, where in DIFFERENT if where == conversation}


# what is written for an answer, by templates of other shapes; the library executes what comes before it once
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
SHAPES = {
    "at the end": LOOP + "{% if add_generation_prompt %}<assistant>{% endif %}",
    "at the end, with a text behind": LOOP + "{% if add_generation_prompt %}<assistant>{% endif %} ",
    "an expression": LOOP + "{{ '<assistant>' if add_generation_prompt else '' }}",
    "by a name": "{% set begins = add_generation_prompt %}" + LOOP + "{% if begins %}<assistant>{% endif %}",
    "in the loop": "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if loop.last and add_generation_prompt %}<assistant>{% endif %}{% endfor %}",
    "by a macro": "{% macro begin() %}{% if add_generation_prompt %}<assistant>{% endif %}{% endmacro %}"
    + LOOP + "{{ begin() }}",
    "named before, in a comment": "{# add_generation_prompt #}" + LOOP + "{% if add_generation_prompt %}<a>{% endif %}",
    "named before, in a text": "{{ 'add_generation_prompt' }}" + LOOP + "{% if add_generation_prompt %}<a>{% endif %}",
    "with a list that grows": "{% set said = [1] %}" + LOOP
    + "{% if add_generation_prompt %}{% set more = said.append(2) %}{% endif %}{{ said | length }}",
    "with a namespace that changes": "{% set ns = namespace(n=1) %}" + LOOP
    + "{% if add_generation_prompt %}{% set ns.n = ns.n + 1 %}<assistant>{% endif %}{{ ns.n }}",
    "with a variable that changes": "{% set n = 1 %}" + LOOP
    + "{% if add_generation_prompt %}{% set n = n + 1 %}<assistant>{% endif %}{{ n }}",
    "not at all": LOOP,
    "not named alone": LOOP + "{% if no_add_generation_prompt is not defined %}<b>{% endif %}",
    "before all": "{% if add_generation_prompt %}<a>{% endif %}" + LOOP,
    "if it is there": LOOP + "{% if add_generation_prompt is defined %}<assistant>{% endif %}",
}  # fmt: skip


def begin_of_answer(with_it: str, without: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(with_it, without, strict=False))
    return with_it[sum(1 for _ in same) :]


def check_beginnings(chat: Templates, messages: Any, **more: Any) -> tuple[str, str]:
    """Prompts with and without the beginning of an answer: each call makes both, and begins with another one."""
    made = [chat.apply({"messages": messages, "add_generation_prompt": each, **more}) for each in (True, False, True)]
    assert made[0]["prompt"] == made[2]["prompt"]
    assert len({each["generation_prompt"] for each in made}) == 1
    return made[0]["prompt"], made[1]["prompt"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_beginning_of_an_answer_is_found_in_templates_of_any_shape(shape: str) -> None:
    chat = Templates(None, SHAPES[shape], "<s>", "</s>")
    expected = environment().from_string(SHAPES[shape])
    for messages in (ASKED, [*ASKED, *ASKED[1:]]):
        with_it, without = check_beginnings(chat, messages)
        assert with_it == expected.render(messages=messages, add_generation_prompt=True)
        assert without == expected.render(messages=messages)
        made = chat.apply({"messages": messages})
        assert made["generation_prompt"] == begin_of_answer(with_it, without)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_beginning_of_an_answer_is_what_a_template_writes_for_it(conversation: str) -> None:
    messages, _, tools = CONVERSATIONS[conversation]
    more = {"tools": tools} if tools else {}
    different = set()
    for name in templates():
        try:
            with_it, without = check_beginnings(opened(name), messages, **more)
        except ChatError:
            continue
        if apply(name, messages, **more)["generation_prompt"] != begin_of_answer(with_it, without):
            different.add(name)
    assert not different


def keys_of_one_hash(n_keys: int) -> list[str]:
    """Keys of two words each that llama.cpp's own hash of a string, and of any text before it, cannot tell apart."""
    try:
        hash_bytes = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    except (OSError, AttributeError):
        pytest.skip("how this library hashes the name of a type is not known")
    hash_bytes.restype, hash_bytes.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    name = b"N5jinja14value_string_tE"
    prime, rng = np.uint64(0x100000001B3), np.random.default_rng(1)

    def mixed(state: Any, word: Any) -> Any:
        return (state ^ word) * prime

    with np.errstate(over="ignore"):
        begin = mixed(np.uint64(0xCBF29CE484222325), np.uint64(hash_bytes(name, len(name), 0xC70F6907)))
        target = mixed(begin, np.frombuffer(b"abcdefgh", np.uint64)) ^ np.frombuffer(b"ijklmnop", np.uint64)
        found: list[str] = []
        while len(found) < n_keys:
            first = rng.integers(48, 91, (1 << 18, 8), dtype=np.uint8)
            second = (mixed(begin, first.view(np.uint64)[:, 0]) ^ target).view(np.uint8).reshape(-1, 8)
            fit = ((second > 34) & (second < 127) & (second != 92)).all(axis=1)
            found += [bytes(each).decode() for each in np.hstack([first, second])[fit]]
    return found[:n_keys]


def test_keys_that_were_chosen_to_have_one_hash_cost_what_others_do() -> None:
    chat = Templates(None, "{{ x[0] | length }}", "<s>", "</s>")
    keys = keys_of_one_hash(1000)
    assert len(set(keys)) == 1000
    with within(3):  # ten, were they compared with each other
        made = chat.apply({"messages": ASKED, "template_kwargs": {"x": [dict.fromkeys(keys, 1)] * 40}})
    assert made["prompt"] == "1000"
