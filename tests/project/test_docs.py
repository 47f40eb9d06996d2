"""The documentation: pages made of the code are what the code says, links lead somewhere, commands can be typed."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT, script

import lminf_edge
from lminf_edge import evaluate
from lminf_edge.cli.main import build_parser

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md"), ROOT / "patches/README.md"})


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("reference_pages")


@pytest.mark.parametrize("name", ["docs/commands.md", "docs/api.md"])
def test_reference_pages_are_what_the_code_says(reference: ModuleType, name: str) -> None:
    assert (ROOT / name).read_text() == reference.PAGES[name](), f"{name} is another: make reference"


def test_pages_do_not_depend_on_the_terminal_and_the_home_folder(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("HOME", "/somewhere/else")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/another-name"])
    page = reference.commands_page()
    assert "somewhere" not in page
    assert page == (ROOT / "docs/commands.md").read_text()


def test_every_public_name_is_in_the_reference(reference: ModuleType) -> None:
    server = reference.exported(ROOT / "lminf_edge/server/__init__.py")  # which need not be installed
    names = {*lminf_edge.__all__, *evaluate.__all__, *server} - {"__version__"}
    assert names <= {each.partition(":")[2] for _, _, found in reference.API for each in found}


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def texts(path: Path) -> str:
    """All strings of a source, with … for what is put into them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_errors_in_troubleshooting_are_those_of_the_code() -> None:
    sources = [*ROOT.glob("lminf_edge/**/*.py"), *ROOT.glob("scripts/*.py")]
    code = "\n".join([*map(texts, sources), *(path.read_text() for path in ROOT.glob("native/src/*.cpp"))])
    rows = re.findall(r'^\| (?:\d+, )?"(.*?)" \|', (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 30
    for row in rows:
        for part in row.split("…"):
            assert part.strip(" .:") in code, row


def commands(page: Path) -> list[str]:
    """What begins with lminf-edge, on lines of its own in the shell's listings."""
    listings = re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "\n".join(listings).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("lminf-edge ") and "[options]" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_typed(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command, comments=True)
        _, *arguments = itertools.takewhile(lambda word: word not in ("|", "--"), words)  # the rest is not ours
        if arguments != ["--version"]:
            build_parser().parse_args(arguments)  # ends the test if it cannot


def test_there_are_links_and_commands_to_look_at() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 10
