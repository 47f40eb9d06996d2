"""Whatever a grammar asks for: a token, or a sentence, in bounded time and memory; and ordinary ones as ever."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import MakeLlama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_grammar
from llama_cpp.llama_grammar import LlamaGrammar
from pace import pace, within
from repository import STOCK, SUPPORT
from served import Served, serve

from lminf_edge.engine.engine import Engine
from lminf_edge.engine.loading import load_engine
from lminf_edge.engine.params import SamplingParams
from lminf_edge.engine.request import Request
from lminf_edge.engine.sampler import sample_checked
from lminf_edge.errors import UserError
from lminf_edge.native import LIBRARY_NAMES, library_folder
from lminf_edge.server.grammars import schema_grammar
from lminf_edge.text.schema import schema_gbnf

WAIT = 20.0  # seconds until a process counts as held up
MOST = 0.5  # of work, for a grammar or a token: some ten times what was seen on a slow machine


def chain(n: int, rule: str, last: str) -> str:
    """root, then rules that each name the next: `rule` has N where the next one's name goes."""
    rules = [f"r{i} ::= {rule.replace('N', f'r{i + 1}')}" for i in range(n)]
    return "\n".join(["root ::= r0", *rules, f"r{n} ::= {last}"])


GRAMMARS = {
    "optional a thousand times": 'root ::= ("a"?){1000}',
    "one or two of the next": chain(24, "N | N N", '"a"'),
    "two of the next": chain(20, "N N", '"a"?'),
    "recursion behind nothing": 'root ::= e root "a" | "a"\ne ::= "x"?',
    "recursion without a token": 'root ::= "a" x\nx ::= e x\ne ::= f\nf ::= ""',
    "only recursion": 'root ::= e root\ne ::= f\nf ::= ""',
    "the same alternative": "root ::= " + " | ".join(['"a"'] * 40_000),
    "other alternatives": "root ::= " + " | ".join(f'"{i}"' for i in range(20_000)),
    "alternatives in a loop": "root ::= (" + " | ".join(f'"{i}"' for i in range(20_000)) + ")*",
    "a repetition that ends before it begins": 'root ::= "a"{3,1}',
    "a long text with many signs": 'root ::= "' + "a" * 100_000 + '"' + "+" * 100_000,
    "a long text a thousand times": 'root ::= "' + "a" * 200_000 + '"{1000}',
    "a long name for many parts": "r" * 100_000 + " ::= " + '("a")' * 20_000 + '\nroot ::= "a"',
    "parentheses": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "open parentheses": "root ::= " + "(" * 200_000,
    "optional parentheses": "root ::= " + "(" * 1000 + '"a"' + ")?" * 1000,
    "a long way down": chain(12_000, "N", '"a"'),
    "a large class": "root ::= [" + "a" * 200_000 + "]+",
    "large classes": "root ::= " + "[^a-bc-de-f]?" * 15_000,
    "tokens": "root ::= " + " | ".join(["<a>"] * 60_000),
    "a long token": "root ::= <" + "a" * 200_000 + ">",
    "stars of stars": 'root ::= (("a"* "b"*)* ("a"* "b"?)*){20}',
    "anything around itself": "root ::= . root . | . root | .",
    "two of itself": "root ::= s\ns ::= [a-z ] s s | [a-z ] s | [a-z ]?",
    "options in a row": "root ::= " + '"a"? [a-z]? .? ' * 300,
    "empty classes": 'root ::= [] [^] "a"',
    "a zero character": 'root ::= "\\x00"',
    "half a surrogate pair": 'root ::= "\ud800"',
    "huge numbers": 'root ::= "a"{' + "9" * 5000 + "}",
}


def objects(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **more}


def nested(n: int, around: Any) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(n):
        schema = around(schema)
    return schema


def reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


PATTERNS = [
    "^(a?){1000}$",
    "^(((a?)?)?)*$",
    "^(a*)*(b*)*$",
    "^(a|aa)+(a|aa)+$",
    "^}$",  # for these two, llama_cpp's converter waits for ever
    "^a]b$",
    "^a{1_000_000_000}$",
    "^a{1000000000}$",
    "^a{１００００００００}$",
    "^((a{1000}){1000}){1000}$",
    "^" + "a{1000}" * 500 + "$",
    "^" + "a" * 4000 + "{1000}$",
    "^" + "a" * 100_000 + "{1000}$",
    "^" + "(" * 3000 + "a" + ")" * 3000 + "$",
    "^" + "[a-z]?" * 600 + "$",
]

SCHEMAS = {
    **{f"pattern {pattern[:20]}": {"type": "string", "pattern": pattern} for pattern in PATTERNS},
    "references that double": {
        "$defs": {f"d_{i}": objects({"a": reference(f"d_{i + 1}"), "b": reference(f"d_{i + 1}")}) for i in range(40)}
        | {"d_40": {"type": "null"}},
        # all of them are known when the first is followed
        **objects({f"p{i}": reference(f"d_{i}") for i in range(41)}),
    },
    "names in names": nested(100, lambda inner: objects({"p" * 5000: inner})),
    "a name of a million": objects({"p" * 1_000_000: objects({"q": {"type": "null"}})}),
    "names that become one": objects({"é" * i: {"const": i} for i in range(1, 2500)}, required=["é"]),
    "one name for many": {"anyOf": [objects({"!": {"const": i}}) for i in range(2000)]},
    "all of a large one": {
        "$defs": {"x": objects({f"p{i}": {"type": "null"} for i in range(2000)})},
        "allOf": [reference("x")] * 3000,
    },
    "900 optional fields": objects({f"f{i}": {"type": "null"} for i in range(900)}),
    "5000 optional fields": objects({f"f{i}": {"type": "null"} for i in range(5000)}),
    "many words": {"enum": [str(i) for i in range(9000)]},
    "arrays in arrays": nested(100, lambda inner: {"type": "array", "items": inner, "maxItems": 1000}),
    "deep": nested(400, lambda inner: {"type": "array", "items": inner}),
    "alternatives in alternatives": nested(11, lambda inner: {"anyOf": [inner, inner]}),
    "many types": {"type": ["string", "null", "object", "array", "number"] * 1000},
    "digits": objects({f"f{i}": {"type": "number", "exclusiveMinimum": (i + 1) * 1e-39} for i in range(390)}),
    "less than none": {"type": "array", "items": {"type": "null"}, "minItems": -5, "maxItems": -1},
}


class Process:
    """A grammar_process.py."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, str(SUPPORT / "grammar_process.py"), model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._read() == "ready\n"

    def _read(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], WAIT)[0]:
            self._process.kill()
            pytest.fail("the process was held up")
        return self._process.stdout.readline()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._read()
        assert line, "the process has ended"
        result: dict[str, Any] = json.loads(line)
        most = MOST * pace(time.process_time)
        assert result["made"] < 2 * most, result
        assert result.get("step", 0) < most, result
        if "error" in result:
            assert result["error"].endswith(".")
            assert result.get("status", 400) == 400
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(WAIT)


@pytest.fixture(scope="module")
def process(nano_path: str) -> Iterator[Process]:
    if sys.platform != "linux":
        pytest.skip("memory is limited as Linux does it")
    made = Process(nano_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", GRAMMARS)
def test_hostile_grammars(process: Process, name: str) -> None:
    process.ask({"grammar": GRAMMARS[name]})


@pytest.mark.parametrize("name", SCHEMAS)
def test_hostile_schemas(process: Process, name: str) -> None:
    process.ask({"schema": SCHEMAS[name]})


def repeated(inner: st.SearchStrategy[str], counts: st.SearchStrategy[int]) -> st.SearchStrategy[str]:
    signs = st.one_of(
        st.sampled_from(["?", "*", "+", "?*", "+?"]),
        st.builds("{{{},{}}}".format, counts, counts),
        st.builds("{{{}}}".format, counts),
    )
    return st.builds("({}){}".format, inner, signs)


EXPRESSIONS = st.recursive(
    st.sampled_from(['"a"', '"ab"', '"a"?', "[a-z ]", "[^a]", ".", "r0", "r1", "r2", '""']),
    lambda inner: st.one_of(
        repeated(inner, st.integers(0, 40)),
        st.lists(inner, min_size=2, max_size=4).map(" ".join),
        st.lists(inner, min_size=2, max_size=4).map(lambda parts: "(" + " | ".join(parts) + ")"),
    ),
    max_leaves=12,
)
TEXTS = st.lists(EXPRESSIONS, min_size=4, max_size=4).map(
    lambda rules: "\n".join(f"{name} ::= {rule}" for name, rule in zip(("root", "r0", "r1", "r2"), rules, strict=True))
)
REGEXES = st.recursive(
    st.sampled_from(["a", "ab", "[a-z]", "[^a]", ".", "}", "]", "\\]", "a|b", "|", '"']),
    lambda inner: st.one_of(
        repeated(inner, st.integers(0, 1200)), st.lists(inner, min_size=2, max_size=4).map("".join)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_grammar(process: Process, text: str) -> None:
    process.ask({"grammar": text})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=REGEXES)
def test_any_pattern(process: Process, pattern: str) -> None:
    process.ask({"schema": {"type": "string", "pattern": f"^{pattern}$"}})


def test_a_grammar_goes_on_after_many_that_failed(process: Process) -> None:
    """Nothing of them is kept."""
    for _ in range(20):
        assert "error" in process.ask({"grammar": GRAMMARS["optional a thousand times"]})
    assert process.ask({"grammar": 'root ::= "a"{30}'}).get("drawn", 0) >= 1


# --- ordinary ones ----------------------------------------------------------------------------------------------------


def fields(n: int) -> dict[str, Any]:
    return {f"field-{i}": {"type": ("string", "number", "boolean")[i % 3]} for i in range(n)}


ORDINARY_SCHEMAS = {
    "200 fields": objects(fields(200), required=list(fields(200))),
    "200 optional fields": objects(fields(200)),
    "300 words": {"enum": [f"{chr(97 + i % 26)}{i}" for i in range(300)]},
    "300 prices": objects({f"field-{i}": {"type": "number", "exclusiveMinimum": 0} for i in range(300)}),
    "maxLength": {"type": "string", "maxLength": 1000},
    "maxItems": {"type": "array", "items": objects(fields(4)), "minItems": 2, "maxItems": 300},
    "pattern": {"type": "string", "pattern": "^([a-z]{1,60}-)*[0-9]{2,10}(/[a-z0-9]*)*$"},
}
ORDINARY_GRAMMARS = {name: getattr(llama_grammar, name) for name in dir(llama_grammar) if name.endswith("_GBNF")}


def allowed(library: Path, model: str, grammars: dict[str, str]) -> list[str]:
    command = [sys.executable, str(SUPPORT / "grammar_probe.py"), model]
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(library)}
    return subprocess.run(
        command, env=environment, input=json.dumps(grammars), check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_ordinary_grammars_allow_what_they_did(nano_path: str) -> None:
    if not any((STOCK / name).exists() for name in LIBRARY_NAMES):
        pytest.fail("There is no stock library to compare with: make stock")
    ours = library_folder()
    assert ours is not None
    schemas = {name: schema_gbnf(schema) for name, schema in ORDINARY_SCHEMAS.items()}
    expected = allowed(STOCK, nano_path, ORDINARY_GRAMMARS | schemas)
    assert len(expected) == len(ORDINARY_GRAMMARS) + len(schemas) >= 12
    assert not any("refused" in line for line in expected)
    assert allowed(ours, nano_path, ORDINARY_GRAMMARS | schemas) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "^.{6}$",
        "^[ -~]{6}$",
        "^[^a]{6}$",
        "^[!-a]+[\\x00-\\x7F]{3}$",
        '^[\\n"x]{4}"+$',
        "^\\\\[b]\\\\{3}$",
        "^a|b{2}$",
        "^}x]$",
    ],
)
def test_strings_of_a_pattern_are_json(make_llama: MakeLlama, pattern: str) -> None:
    llm = make_llama(lminf=None, vocab_only=True)
    grammar = schema_grammar(llm, {"type": "string", "pattern": pattern}, "schema")
    rng = np.random.default_rng(0)
    for _ in range(8):
        sampler, drawn = llm._init_sampler(grammar=grammar, temp=0.0), list[int]()
        while llm.token_eos() not in drawn and len(drawn) < 60:
            logits = rng.standard_normal(llm.n_vocab()).astype(np.float32)
            logits[llm.token_eos()] = 9.0  # as soon as it may
            drawn.append(sample_checked(sampler, logits))
        text = llm.detokenize(drawn[:-1]).decode()
        assert re.fullmatch(pattern, json.loads(text), re.DOTALL), text


# --- the two faces, and the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(nano_f32_path: str) -> Iterator[Engine]:
    made = load_engine(nano_f32_path, parallel=1, verbose=False, n_threads=1, n_threads_batch=1)
    yield made
    made.close()
    made.model.close()


SENTENCES = [
    ('root ::= "a"', True, "allows no token"),
    ('root ::= "a', False, "cannot be used"),
    (GRAMMARS["two of the next"], False, "cannot be used"),
    (GRAMMARS["optional a thousand times"], False, "too much work"),
    (GRAMMARS["only recursion"], False, "allows no token"),
]


@pytest.mark.parametrize(("text", "banned", "sentence"), SENTENCES)
@pytest.mark.parametrize("face", ["stream", "no stream", "engine"])
def test_a_sentence_from_every_face(
    make_llama: MakeLlama, engine: Engine, face: str, text: str, banned: bool, sentence: str
) -> None:
    llm: Any = None if face == "engine" else make_llama(lminf=face == "stream", n_ctx=256)

    def complete(**sampling: Any) -> int:
        """Generates four tokens; how many there were."""
        if llm is not None:
            done = llm.create_completion("Anna", max_tokens=4, **sampling)
            return int(done["usage"]["completion_tokens"])
        request = Request(np.array([1, 300], np.int32), SamplingParams(**sampling), max_tokens=4, ignore_eog=True)
        engine.submit(request)
        return len(list(engine.stream(request)))

    n_vocab = engine.model.n_vocab
    bias = dict.fromkeys(range(n_vocab), float("-inf")) if banned else {}
    with pytest.raises(UserError, match=sentence):
        complete(grammar=LlamaGrammar(_grammar=text), logit_bias=bias)
    assert complete(temperature=0.0) == 4
    assert complete(temperature=0.0, logit_bias={2: float("-inf")}) == 4  # no grammar, and looked at all the same
    with pytest.raises(UserError, match="excludes them all"):  # whatever the grammar before it did
        complete(logit_bias=dict.fromkeys(range(n_vocab), float("-inf")))


def test_sample_alone_is_checked(make_llama: MakeLlama) -> None:
    llm = make_llama()
    llm.eval(llm.tokenize(b"Anna"))
    assert llm.detokenize([llm.sample(temp=0.0, grammar=LlamaGrammar(_grammar='root ::= "x"'))]) == b"x"
    with pytest.raises(UserError, match="cannot be used"):
        llm.sample(grammar=LlamaGrammar(_grammar="root ::= ("))


@pytest.fixture(scope="module")
def server(nano_f32_path: str) -> Iterator[Served]:
    with serve(nano_f32_path) as served:
        yield served


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Anna"}], "max_tokens": 50, **more}


SCHEMA = {"type": "string", "pattern": "^" + "a{1000}" * 500 + "$"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": objects({"x": SCHEMA})}}


@pytest.mark.parametrize(
    "request_",
    [
        *(("/completion", {"prompt": "Anna", "grammar": text}) for text in list(GRAMMARS.values())[:5]),
        ("/completion", {"prompt": "Anna", "json_schema": SCHEMA}),
        chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}),
        chat(tools=[TOOL], tool_choice="required"),
    ],
)
def test_hostile_requests_are_refused_soon(server: Served, request_: tuple[str, dict[str, Any]]) -> None:
    path, body = request_
    with httpx.Client(base_url=server.url, timeout=WAIT) as client:
        with within(4, time.monotonic):
            answer = client.post(path, json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"].endswith(".")
        assert client.get("/health").status_code == 200
