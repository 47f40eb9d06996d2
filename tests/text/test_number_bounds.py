"""Grammars of numbers between bounds: what they take and what they don't, compared with decimals one by one."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lminf_edge.errors import UserError
from lminf_edge.text.schema import enforceable, schema_gbnf
from lminf_edge.text.schema_bounds import loosened

KEYWORDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
NO_NUMBERS = ["", "-", "+1", "01", "-01", "00", "1.", ".5", "-.5", "1e0", "1E0", "0x1", "1,5", "--1", "1.-1"]
# with a sign or without, up to 2 digits before the point and behind it
TEXTS = [
    sign + str(whole) + fraction
    for whole in range(33)
    for fraction in ["", *(f".{i}" for i in range(10)), *(f".{i:02}" for i in range(100))]
    for sign in ("", "-")
]


def expression(bounds: dict[str, Any]) -> re.Pattern[str]:
    """The grammar's rule as a regular expression, which it nearly is."""
    rules = dict(line.split(" ::= ") for line in schema_gbnf({"type": "number", **bounds}).splitlines())
    parts = re.findall(r'"[^"]*"|\[[^]]*\]|\{[^}]*\}|[|()?]', rules["root"])
    assert "".join(parts) == rules["root"].replace(" ", "")
    return re.compile("".join(re.escape(part[1:-1]) if part[0] == '"' else part for part in parts))


def is_within(text: str, bounds: dict[str, Any], number: Callable[[str], Any] = Decimal) -> bool:
    """By how whoever reads the text understands numbers."""
    value, limits = number(text), {name: number(str(limit)) for name, limit in bounds.items()}
    return (
        value >= limits.get("minimum", value)
        and value <= limits.get("maximum", value)
        and ("exclusiveMinimum" not in limits or value > limits["exclusiveMinimum"])
        and ("exclusiveMaximum" not in limits or value < limits["exclusiveMaximum"])
    )


def some_bounds(n: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    limits = [*range(-12, 13), *(rng.randrange(-3200, 3200) / 100 for _ in range(60)), -0.0, 0.1, -0.1, 31.99]
    made: list[dict[str, Any]] = [{name: limit} for name in KEYWORDS for limit in limits[:30]]
    made += [{"minimum": limit, "maximum": limit} for limit in limits]
    while len(made) < n:
        names = rng.sample(KEYWORDS, rng.choice([1, 2, 2, 2, 3, 4]))
        made.append({name: rng.choice(limits) for name in names})
    return made


def test_every_number_of_few_digits() -> None:
    n_empty = n_taken = 0
    for bounds in some_bounds(300):
        within = {text for text in TEXTS if is_within(text, bounds)}
        if not within:
            n_empty += 1
            with pytest.raises(UserError, match="within the bounds"):
                expression(bounds)
            continue
        takes = expression(bounds).fullmatch
        taken = {text for text in TEXTS if takes(text)}
        assert taken <= within, bounds
        # a minus before 0 is taken where there are other numbers below 0
        assert all(text[0] == "-" and Decimal(text) == 0 for text in within - taken), bounds
        assert not any(map(takes, NO_NUMBERS)), bounds
        n_taken += len(taken)
    assert n_empty > 20
    assert n_taken > 300_000


LIMITS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, max_value=1e38, min_value=-1e38),
    st.floats(-10, 10),
    st.integers(-(1 << 62), 1 << 62).filter(lambda value: float(value) == value),
    st.sampled_from([0, -0.0, 1, 100, 1e-7, -1e-7, 1e20, 1e15, 999999999999999.9, 1e16, 1e23, 5e-324, 0.1, 2.2e-16]),
)


def fixed(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def near(limit: float) -> list[str]:
    """Texts of numbers about a limit, with more digits than it has and with less."""
    exact = Decimal(str(limit))
    steps = [Decimal(sign).scaleb(-n) for n in (0, 1, 7, *range(12, 18), 20, 25) for sign in (1, -1)]
    values = [Decimal(0), exact, *(Decimal(math.nextafter(limit, way)) for way in (math.inf, -math.inf))]
    with localcontext() as context:
        context.prec = 1000
        values += [exact + step for step in steps]
        values += [round(value, n) for value, n in itertools.product(values, (0, 3, 10, 13, 14, 15, 16))]
    return [fixed(value) for value in values]


@settings(max_examples=200, deadline=None)
@given(bounds=st.dictionaries(st.sampled_from(KEYWORDS), LIMITS, min_size=1))
def test_bounds_of_any_size(bounds: dict[str, Any]) -> None:
    texts = [text for limit in bounds.values() for text in near(limit)]
    # what must be taken: few digits, beside an open bound no more than doubles of its size tell apart, and no minus
    # but of what is below 0
    sizes = [len(fixed(abs(Decimal(str(bounds[name])))).partition(".")[0]) for name in bounds if "exclusive" in name]
    n_digits = min([3, *(max(15 - size, 0) for size in sizes)])
    plain = [text for text in texts if len(text.partition(".")[2]) <= n_digits and len(text) <= 14 and text != "-0"]
    try:
        takes = expression(bounds).fullmatch
    except UserError:
        assert not any(is_within(text, bounds) for text in plain)
        return
    for text in filter(takes, texts):
        assert is_within(text, bounds), text
        assert is_within(text, bounds, float), text
        assert is_within(text, bounds, json.loads), text  # large integers remain what they are
    for text in plain:
        assert takes(text) or not is_within(text, bounds), text


@pytest.mark.parametrize("limit", [0.1, 1, 100, 123456.7, 1e14, 1e15, 1e20, 1e-7, -5, -99.5])
def test_what_rounds_to_an_open_bound_is_not_within_it(limit: float) -> None:
    """99.9999999999999999 is 100 as a double."""
    for name, sign in (("exclusiveMaximum", -1), ("exclusiveMinimum", 1)):
        takes = expression({name: limit}).fullmatch
        with localcontext() as context:
            context.prec = 100
            texts = [fixed(Decimal(str(limit)) + Decimal(sign).scaleb(-n)) for n in range(-6, 40)]
        taken = [text for text in texts if takes(text)]
        assert taken
        assert all(is_within(text, {name: limit}, float) for text in taken)


@pytest.mark.parametrize(("step", "n_digits"), [(1, 0), (1.0, 0), (0.1, 1), (0.01, 2), (1e-7, 7)])
def test_multiples_have_so_many_digits(step: float, n_digits: int) -> None:
    takes = expression({"multipleOf": step, "minimum": -3, "exclusiveMaximum": 20}).fullmatch
    for text in TEXTS:
        if is_within(text, {"minimum": -3, "exclusiveMaximum": 20}):
            assert bool(takes(text)) == (len(text.partition(".")[2]) <= n_digits), text
        else:
            assert not takes(text)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"minimum": 1, "maximum": 0.5}, "no number of 16 digits after the point is within the bounds"),
        ({"exclusiveMinimum": 1, "maximum": 1}, "no number of 14 digits"),
        ({"minimum": 0.25, "maximum": 0.75, "multipleOf": 1}, "no number of 0 digits"),
        ({"minimum": 1e50}, "more than 40 digits"),
        ({"maximum": -1e50}, "more than 40 digits"),
        ({"multipleOf": 0.25}, "only 1, 0.1, 0.01"),
        ({"multipleOf": 0}, "only 1, 0.1, 0.01"),
        ({"multipleOf": 0.0001, "maximum": 1e12}, "beside such bounds"),
        ({"minimum": "1"}, "minimum is a number"),
        ({"minimum": math.inf}, "minimum is a number"),
        ({"maximum": 10**400}, "maximum is a number"),
        ({"maximum": (1 << 53) + 1}, "maximum is a number"),
    ],
)
def test_other_bounds_are_refused(bounds: dict[str, Any], said: str) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number", **bounds}}}
    with pytest.raises(UserError, match=said) as refused:
        enforceable(schema)
    assert str(refused.value).startswith("at #/properties/x, ")
    # of tools that are not strict they are dropped, as nothing was promised; the others stay if that is enough
    left = {name: value for name, value in bounds.items() if "multipleOf" in bounds and name != "multipleOf"}
    assert loosened(schema) == {"type": "object", "properties": {"x": {"type": "number", **left}}}


def test_bounds_that_no_answer_reaches_say_nothing() -> None:
    assert expression({"minimum": 0, "maximum": 1.7976931348623157e308}) == expression({"minimum": 0})


def test_flags_of_the_fourth_draft() -> None:
    schema = {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": False}
    meant = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert enforceable(schema) == loosened(schema) == meant
    assert enforceable(meant | {"exclusiveMinimum": True}) == {"type": "number", "maximum": 1}
    whole = enforceable({"type": "integer", "minimum": 0, "exclusiveMinimum": True})
    assert whole == {"type": "integer", "minimum": 1}
