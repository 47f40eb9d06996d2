"""Regular expressions of JSON schemas, as llama.cpp's converter understands them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NoReturn

from lminf_edge.errors import UserError

MAX_REPEATS = 1000  # minItems, maxLength and the like


def refuse(place: str, reason: str) -> NoReturn:
    """`place` is where in a schema, "#" its whole."""
    raise UserError(f"at {place[:200]}, {reason}" if place != "#" else reason)


# of a regular expression: an escape, a class, a number of repetitions, another quantifier that is lazy, what closes one
# that was not opened, a quote, a dot
_PATTERN_PART = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}\??|[*+?]\?|[\]}\".]", re.DOTALL)
# a group that is more than a group, such as one that looks ahead
_GROUP = re.compile(r"^(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[(]|\((?!\?)|\(\?:)*?(\(\?[^:])", re.DOTALL)
_CLASS_CHARACTER = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[^xuUdws]|[^\\]"
_CLASS_PART = re.compile(rf"\\[dws]|({_CLASS_CHARACTER})(?:-({_CLASS_CHARACTER}))?", re.DOTALL)
_CONTROL = {"\\t": 9, "\\n": 10, "\\r": 13, "\\f": 12, "\\v": 11}
_FORBIDDEN = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))  # in a string of JSON, as it stands
_NAMED = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}  # of \s, what a string of JSON holds as it stands
_ANY = r"[^\"\\\x7F\x00-\x1F]"


def json_pattern(pattern: str, place: str = "#") -> str:
    """A pattern, anchored and for what stands in a string of JSON, in what llama.cpp's converter understands.

    Raises UserError for what has no grammar.
    """
    begins = pattern.startswith("^")
    ends = pattern.endswith("$") and not re.search(r"(?<!\\)(?:\\\\)*\\\$$", pattern)
    inside = pattern[begins : len(pattern) - ends]
    if group := _GROUP.search(inside):
        refuse(place, f"{group[1]} of a pattern cannot be enforced")

    def part(match: re.Match[str]) -> str:
        text = match[0]
        if len(text) > 1 and text[0] in "{*+?":
            text = text.removesuffix("?")  # how much is taken first is nothing to a match of the whole
        if text[0] == "{":
            if not re.fullmatch(r"\{[0-9]+(,[0-9]*)?\}", text):  # Python's int takes more than digits
                refuse(place, f"{text[:50]} of a pattern is no number of repetitions")
            if any(len(number) > 9 or int(number) > MAX_REPEATS for number in re.findall("[0-9]+", text)):
                refuse(place, f"nothing may be repeated more than {MAX_REPEATS:,} times")
            return text
        if text[0] == "[":
            return _json_class(text, place)
        if text == ".":
            return _ANY
        if text in ('"', '\\"', "\\\\"):
            return r"(\\[\"])" if text[-1] == '"' else r"(\\\\)"
        if text in ("]", "}"):
            return f"\\{text}"
        if text[0] == "\\":
            return _json_escape(text, place)
        return text

    made = _PATTERN_PART.sub(part, inside)
    if begins and ends and "|" not in made:
        return f"^{made}$"
    if "|" in made and (begins != ends):
        refuse(place, "a pattern with alternatives can be enforced only if it has ^ and $ around it, or neither")
    before, after = "" if begins else f"({_ANY})*", "" if ends else f"({_ANY})*"
    return f"^{before}({made}){after}$"


def _json_escape(text: str, place: str) -> str:
    """What stands for an escape outside of a class."""
    if text[1] in _NAMED:
        return f"[{_NAMED[text[1]]}]"
    if text[1] in "DWS":
        return f'[^\\"\\\\\\x7F\\x00-\\x1F{_NAMED[text[1].lower()]}]'
    if text[1] in "tnrfv" or text[1].isalnum():
        refuse(place, f"{text} of a pattern cannot be enforced")
    if text[1] in "^$.[]()|{}*+?":
        return text
    return text[1]


def _json_class(text: str, place: str) -> str:
    """A character class without the characters that JSON escapes."""
    negated = text.startswith("[^")
    ranges = list(_ranges(text[1 + negated : -1], place))
    if negated:
        return f'[^\\"\\\\\\x7F\\x00-\\x1F{_class_text(ranges)}]'
    for start, end in _FORBIDDEN:
        ranges = [
            piece
            for low, high in ranges
            for piece in ((low, min(high, start - 1)), (max(low, end + 1), high))
            if piece[0] <= piece[1]
        ]
    if not ranges:
        refuse(place, f"{text[:50]} of a pattern takes only characters that JSON escapes")
    return f"[{_class_text(ranges)}]"


def _ranges(body: str, place: str) -> Iterator[tuple[int, int]]:
    end = 0
    for match in _CLASS_PART.finditer(body):
        if match.start() != end:
            break
        end = match.end()
        if match[1] is None:
            yield from _ranges(_NAMED[match[0][1]], place)
            continue
        low, high = _code_point(match[1]), _code_point(match[2] or match[1])
        if low > high:
            refuse(place, f"{match[0][:50]} of a pattern is no range")
        yield low, high
    if end != len(body):
        refuse(place, f"[{body[:50]}] of a pattern cannot be enforced")


def _class_text(ranges: list[tuple[int, int]]) -> str:
    return "".join(f"\\U{low:08X}" + (f"-\\U{high:08X}" if high > low else "") for low, high in ranges)


def _code_point(character: str) -> int:
    if character[:2] in ("\\x", "\\u", "\\U") and len(character) > 2:
        return int(character[2:], 16)
    return _CONTROL.get(character, ord(character[-1]))
