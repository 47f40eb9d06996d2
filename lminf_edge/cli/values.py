"""Types of arguments: what the text of an option becomes, or a sentence that says what it must be."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lminf_edge.engine.params import SAMPLERS, sampler_name
from lminf_edge.errors import UserError
from lminf_edge.rpc import parse_servers


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number that is `least` or more and `most` or less."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        _check_range(value, least, most)
        return value

    return parse


def number(least: float, most: float | None = None) -> Callable[[str], float]:
    """An argparse type: a number that is `least` or more and `most` or less."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        _check_range(value, least, most)
        return value

    return parse


def _check_range(value: float, least: float, most: float | None) -> None:
    if not value >= least:  # catches nan as well
        raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"must be {most} or less, not {value}")


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(text: str) -> int:
    """An argparse type: a number of bytes, such as 500M or 2G."""
    digits, unit = text.strip(), ""
    if digits and not digits[-1].isdigit():
        digits, unit = digits[:-1], digits[-1].lower()
    if not digits.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 500M or 2G, not {text!r}")
    return int(digits) * _UNITS[unit]


def expand_home(text: str) -> str:
    """An argparse type: a path, with ~ for the home folder: a shell leaves it in --file=~/text."""
    return os.path.expanduser(text)


def file_path(text: str) -> Path:
    """An argparse type: the same as a Path."""
    return Path(expand_home(text))


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return value


def rpc_servers(text: str) -> tuple[str, ...]:
    """An argparse type: servers with commas between them."""
    try:
        return parse_servers(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sampler_names(text: str) -> tuple[str, ...]:
    """An argparse type: names of samplers with semicolons between them."""
    names = tuple(sampler_name(name.strip()) for name in text.split(";") if name.strip())
    unknown = [name for name in names if name not in SAMPLERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names


def names(text: str) -> tuple[str, ...]:
    """An argparse type: names with commas between them, in the order of the alphabet."""
    found = sorted({name.strip() for name in text.split(",")} - {""})
    if not found:
        raise argparse.ArgumentTypeError("must be a name, or several with commas between them")
    return tuple(found)


def addresses(text: str) -> tuple[str, ...]:
    """An argparse type: addresses with commas between them."""
    return tuple(dict.fromkeys(host for host in map(str.strip, text.split(",")) if host)) or ("127.0.0.1",)
