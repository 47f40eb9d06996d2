#!/usr/bin/env python3
"""Checks that a tag fits the version and the changelog, and prints that version's section of the changelog.

    release.py v0.2.0

The version is __version__ in lminf_edge/__init__.py; pyproject.toml reads it from there. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ReleaseError(Exception):
    """One sentence for the user."""


def version() -> str:
    text = (ROOT / "lminf_edge" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.M)
    assert found is not None
    return found[1]


def notes(changelog: str, number: str) -> str:
    """The section of a version, without its heading. Raises ReleaseError if there is none, or nothing in it."""
    sections = re.split(r"^## ", changelog, flags=re.M)[1:]
    for section in sections:
        heading, _, text = section.partition("\n")
        if heading.split()[:1] == [number]:
            if not text.strip():
                break
            return text.strip()
    raise ReleaseError(f"CHANGELOG.md says nothing of {number}: give its Unreleased section this number and a date.")


def check(tag: str, number: str) -> None:
    if tag != f"v{number}":
        raise ReleaseError(f"The tag {tag} is not v{number}: __version__ in lminf_edge/__init__.py says {number}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag", metavar="TAG", help="vVERSION")
    args = parser.parse_args()
    try:
        check(args.tag, version())
        print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version()))
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
