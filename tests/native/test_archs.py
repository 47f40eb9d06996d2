"""Every architecture of the pinned llama.cpp, and every variant of it, as a tiny random model.

native/tests/test-archs makes and checks them; architectures.json says what to expect of each. An architecture that is
new in llama.cpp fails here until it is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

import pytest
from repository import script

models = script("models")

EXPECTED: dict[str, dict[str, Any]] = models.expected()

RUNNING = [name for name, expected in EXPECTED.items() if expected["verdict"] == "runs"]
CONSTANT = [name for name, expected in EXPECTED.items() if expected["verdict"] == "constant"]
REFUSED = [name for name, expected in EXPECTED.items() if expected["verdict"] == "refused"]

# Another order of additions changes results by this much at most (normalized mean squared error). More where something
# makes much of a last digit: llama.cpp looks GELU up in a table of f16, where it decides about the entry; with sharp
# attention it decides between keys. "rounding" in the data is what was seen.
ROUNDING = 1e-11
ROUNDING_SENSITIVE = 1e-8
# without sinks, results are others, by many times that: a rule that is not in the graph would change nothing
DIFFERENT = 1e-8
# As a part of what quantizing the cache changes with llama.cpp's own. It rotates queries, keys and values so that they
# quantize better: where only some of them are, the error is many times as large.
QUANTIZED = 2.0

ALIKE = ("stock", "rebase", "rollback", "sequences", "operations", "recall", "snapshots", "partial")

# one of each kind, and of what changes how positions are used
RANDOM = (
    "llama",
    "bloom",
    "gemma3",
    "gemma4/shared",
    "llama4",
    "granitehybrid",
    "graniteswitch",
    "lfm2",
    "lfm2moe",
    "plamo2",
    "qwen35/sections",
    "qwen2vl",
    "deepseek2",
    "deepseek32",
    "dots3note",
    "kimi-linear",
    "mistral3/temperature",
)


@pytest.fixture(scope="session")
def program() -> Path:
    if not list(models.ROOT.glob("build/py3-none-*/CMakeCache.txt")):
        pytest.skip("build/ has no library: make setup")
    path: Path = models.build()
    return path


@pytest.fixture(scope="session")
def pending(program: Path) -> Any:
    """All of them at once, as they take a second or two each."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        yield {name: pool.submit(models.check, program, name) for name in EXPECTED}
        pool.shutdown(cancel_futures=True)


def limit(name: str) -> float:
    return ROUNDING_SENSITIVE if "rounding" in EXPECTED[name] else ROUNDING


def test_every_architecture_is_classified(program: Path) -> None:
    assert models.names(program) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict(pending: Mapping[str, Future[dict[str, Any]]], name: str) -> None:
    result, expected = pending[name].result(), EXPECTED[name]
    assert result["verdict"] == expected["verdict"], result


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_sentence_that_names_the_architecture_and_what_works(
    pending: Mapping[str, Future[dict[str, Any]]], name: str
) -> None:
    why = pending[name].result()["why"]
    assert f"'{name.partition('/')[0]}'" in why
    assert EXPECTED[name]["why"] in why
    assert "\n" not in why
    assert ". " not in why
    assert ": run it without one, " in why


@pytest.mark.parametrize("name", RUNNING)
def test_it_does_what_it_should(pending: Mapping[str, Future[dict[str, Any]]], name: str) -> None:
    result = pending[name].result()
    assert not result["faults"]
    checks = result["checks"]
    for check in ALIKE:
        if check in checks and EXPECTED[name].get(check, True):
            assert checks[check] <= limit(name), (check, checks)
    if result["layers"]["full"]:
        assert checks["sinks"] >= max(DIFFERENT, 10 * EXPECTED[name].get("rounding", 0))
    else:
        assert checks["sinks"] == 0
    if EXPECTED[name].get("quantized", True):
        assert checks["quantized"] <= QUANTIZED
    else:
        assert checks["quantized"] is None
    # of a ring that is not full, attention reads what is filled
    assert checks["filled"] == (0 if result["layers"]["fused"] else None)
    assert {
        "stock",
        "rebase",
        "sinks",
        "state",
        "rollback",
        "sequences",
        "memory",
        "operations",
        "batches",
    } <= checks.keys()
    assert result["rebases"] > 0


@pytest.mark.parametrize("name", CONSTANT)
def test_sequences_of_a_constant_one_do_not_see_each_other(
    pending: Mapping[str, Future[dict[str, Any]]], name: str
) -> None:
    assert pending[name].result()["sequences"] <= ROUNDING


@pytest.mark.parametrize("name", RUNNING)
def test_layers_and_bytes_add_up(pending: Mapping[str, Future[dict[str, Any]]], name: str) -> None:
    result = pending[name].result()
    layers, size = result["layers"], result["bytes"]
    assert layers["full"] + layers["sliding"] > 0
    assert layers["fused"] == (layers["full"] + layers["sliding"]) * EXPECTED[name].get("fused", True)
    assert (size["window"] > 0) == (layers["full"] > 0)
    assert (size["sinks"] > 0) == (layers["full"] > 0)
    assert (size["sliding"] > 0) == (layers["sliding"] > 0)
    assert (size["recurrent"] > 0) == (layers["recurrent"] > 0)
    # what a state that cannot be undone takes back, snapshots must
    assert (result["rollback"] == 0) == (layers["recurrent"] > 0)


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations(program: Path, name: str) -> None:
    """Ten rounds on three sequences; what each comes to is compared with a fresh run."""
    done = models.run(program, "--random", name, "10")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["error"] <= 100 * limit(name), found  # the worst of single batches, not the mean of a text
    assert found["operations"] > 300


def test_the_page_is_what_was_found(pending: Mapping[str, Future[dict[str, Any]]]) -> None:
    found = models.page({name: future.result() for name, future in pending.items()})
    assert models.PAGE.read_text() == found, "docs/models.md is another: make models"


def test_a_crash_is_one_failure(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint('last words', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    program.chmod(0o755)
    assert models.check(program, "llama") == {"name": "llama", "verdict": "crashes", "why": "last words"}
