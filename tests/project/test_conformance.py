"""The vectors of conformance/, the oracle that they are from, this build against them, and that what is wrong fails."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import run
import vectors
from reference.rule import Rule
from reference.transformer import Transformer
from repository import ROOT
from vectors import Case, Vectors, compare

FAR = 500  # times the tolerance: how far the nearest wrong rule is, at least


@cache
def tiny() -> Vectors:
    return vectors.load("tiny")


CASES = tuple(tiny().cases)


def lminf() -> Case:
    return tiny().cases["lminf"]


def test_a_context_shift_written_out() -> None:
    """Six cells, one is kept: half of four is discarded before the sixth token and every second one after it."""
    unseen = oracle.UNSEEN
    expected = [
        [0, unseen, unseen, unseen, unseen, unseen, unseen, unseen],
        [1, 0, unseen, unseen, unseen, unseen, unseen, unseen],
        [2, 1, 0, unseen, unseen, unseen, unseen, unseen],
        [3, 2, 1, 0, unseen, unseen, unseen, unseen],
        [4, 3, 2, 1, 0, unseen, unseen, unseen],
        [3, unseen, unseen, 2, 1, 0, unseen, unseen],
        [4, unseen, unseen, 3, 2, 1, 0, unseen],
        [3, unseen, unseen, unseen, unseen, 2, 1, 0],
    ]
    np.testing.assert_array_equal(oracle.distances(8, "shift", n_global=1, n_local=5), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_gives_the_vectors(name: str) -> None:
    case = tiny().cases[name]
    losses = tiny().oracle.losses(tiny().tokens, case.table(len(tiny().tokens)))
    assert compare(losses, case.losses, 1e-6).conforms


def test_the_oracle_reads_quantized_weights() -> None:
    """Of the embedded model the beginning, as losses do not depend on what follows."""
    nano = vectors.load("nano")
    case, tokens = nano.cases["lminf"], nano.tokens[:120]
    assert compare(nano.oracle.losses(tokens, case.table(120)), case.losses[:119], 1e-6).conforms


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("recall", "shift")])
def test_the_reference_of_the_other_tests_agrees(name: str) -> None:
    case = tiny().cases[name]
    modes = {"sinks": "order", "sinks-uncapped": "true"}
    rule = Rule(**case.parameters, mode=modes.get(case.policy, "ceiling"))  # type: ignore[arg-type]
    assert compare(Transformer(tiny().model).token_nll(tiny().tokens, rule), case.losses, 1e-6).conforms


def test_this_build_conforms() -> None:
    from adapters import this_build

    records = run.run(this_build, "tiny")
    assert len(records) == 44
    assert all(map(run.conforms, records)), [run.line(record) for record in records]


WRONG = {
    "window one longer": {"n_local": 25, "max_distance": 24},
    "window one shorter": {"n_local": 23, "max_distance": 24},
    "one sink more": {"n_global": 5},
    "one sink less": {"n_global": 3},
    "sinks one too far": {"max_distance": 25},
    "sinks one too near": {"max_distance": 23},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_off_by_one_does_not_conform(name: str) -> None:
    parameters = {**lminf().parameters, **WRONG[name]}
    table = oracle.distances(len(tiny().tokens), "lminf", **parameters)
    found = compare(tiny().oracle.losses(tiny().tokens, table), lminf().losses, tiny().tolerance)
    assert not found.conforms
    assert found.mean > FAR * tiny().tolerance
    assert found.first is not None
    assert found.first >= 23


@pytest.mark.parametrize("name", [name for name in CASES if name != "lminf"])
def test_another_policy_does_not_conform(name: str) -> None:
    """Sinks at their true distances, at those of the cache, no sinks, ..."""
    found = compare(tiny().cases[name].losses, lminf().losses, tiny().tolerance)
    assert not found.conforms
    assert found.mean > FAR * tiny().tolerance


def test_a_build_with_a_wrong_rule_does_not_conform() -> None:
    """The whole way: our cache, told to keep sinks at their true distances, is not taken for the rule."""
    from adapters import this_build

    losses = this_build.losses(tiny(), tiny().cases["sinks-uncapped"], "auto", 64)
    found = compare(losses, lminf().losses, tiny().tolerance)
    assert not found.conforms
    assert vectors.nearest(losses, tiny()).case == "sinks-uncapped"


def test_what_is_compared() -> None:
    expected = np.array([1.0, 2.0, 3.0, 4.0])
    assert compare([1.0, 2.0, 3.0, 4.0], expected, 0.1).conforms
    assert compare([1.0, 2.5, 3.0, 5.0], expected, 0.1) == vectors.Difference("", 1.0, 0.375, 2)
    assert compare([3.0, 4.5], expected, 0.1).first == 4  # the losses of the last tokens
    assert compare([1.0, 2.0, math.nan, 4.0], expected, 0.1).first == 3
    for losses in ([], [1.0] * 5, [[1.0] * 4]):
        with pytest.raises(ValueError, match="losses of shape"):
            compare(losses, expected, 0.1)


@pytest.mark.parametrize("right", [True, False])
def test_losses_from_a_file(right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = lminf().losses + (0.0 if right else 1e-3)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"tiny": {"lminf": losses.tolist()}}))
    monkeypatch.setattr("sys.argv", ["run.py", "--losses", str(path)])
    assert run.main() == (0 if right else 1)


def test_the_page_has_the_figures_that_were_kept() -> None:
    kept = run.kept_results()
    assert "this_build" in kept
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert run.page(text, kept) == text
    assert all(map(run.conforms, kept["this_build"]["records"]))


def test_the_oracle_is_small_and_needs_only_numpy() -> None:
    lines = Path(oracle.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imports <= {"__future__", "struct", "pathlib", "typing", "numpy"}
