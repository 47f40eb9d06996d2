#!/usr/bin/env python3
"""Writes docs/commands.md from the command line's parsers and docs/api.md from signatures and docstrings.

    make reference, or: .venv/bin/python scripts/reference_pages.py

Neither page depends on the machine, the terminal or the version of Python: options are read off the parsers, and the
API off the sources, which need not be imported. `make test` fails if a page is not what this writes.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lminf_edge.cli.main import FAILED, INTERRUPTED, USAGE, build_parser

ROOT = Path(__file__).resolve().parent.parent

# --- Markdown ---------------------------------------------------------------------------------------------------------

# "name  what it is", with the columns that docstrings here have
_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)")


def escape(text: str) -> str:
    """Plain text as Markdown shows it; `code` stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*|<[\]])", r"\\\1", part) for part in parts)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Code in a table's cell."""
    return f"`{text}`".replace("|", r"\|")


def markdown(doc: str, language: str) -> str:
    """A docstring: its columns become a table, and what is indented a listing."""
    parts: list[str] = []
    lines = doc.strip().splitlines()
    while lines:
        n = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        block, lines = lines[:n], lines[n + 1 :]
        parts += _block(block, language)
    # blocks of one listing with an empty line between them
    return "\n\n".join(parts).replace(f"\n```\n\n```{language}\n", "\n\n")


def _block(lines: list[str], language: str) -> Iterator[str]:
    while lines:
        if lines[0].startswith("- "):
            n = next((i for i, line in enumerate(lines) if i and line[:2] not in ("- ", "  ")), len(lines))
            yield "\n".join(map(escape, lines[:n]))
        elif lines[0].startswith(" "):
            n = next((i for i, line in enumerate(lines) if not line.startswith(" ")), len(lines))
            indent = min(len(line) - len(line.lstrip()) for line in lines[:n])
            yield f"```{language}\n" + "\n".join(line[indent:] for line in lines[:n]) + "\n```"
        elif _ENTRY.fullmatch(lines[0]):
            n = next((i for i, line in enumerate(lines) if not _ENTRY.fullmatch(line) and line[:1] != " "), len(lines))
            yield table(("", ""), _entries(lines[:n]))
        else:
            n = next((i for i, line in enumerate(lines) if _ENTRY.fullmatch(line) or line[:1] == " "), len(lines))
            yield "\n".join(map(escape, lines[:n]))
        lines = lines[n:]


def _names(line: str) -> list[str]:
    entry = _ENTRY.fullmatch(line)
    return entry["names"].split(", ") if entry else []


def _entries(lines: Iterable[str]) -> list[list[str]]:
    rows: list[list[str]] = []
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry:
            rows.append([", ".join(map(code, _names(line))), escape(entry["text"])])
        else:
            rows[-1][1] += " " + escape(line.strip())
    return rows


# --- commands ---------------------------------------------------------------------------------------------------------

COMMANDS_HEAD = f"""# Commands

Written by `scripts/reference_pages.py` (`make reference`) from what `--help` says: do not edit.

`lminf-edge COMMAND --help` shows the same in the terminal, `lminf-edge --version` the version. Each command has these
two options:

- `--json`: one JSON object, and nothing else, on stdout. Progress, warnings and errors go to stderr.
- `--debug`: show where an error comes from; the same as `LMINF_DEBUG=1`.

Exit status: 0; {FAILED} when something failed, with a sentence on stderr that says what to do; {USAGE} for wrong usage;
{INTERRUPTED} after Ctrl-C.
"""
COMMON = ("help", "json", "debug")  # in the head of the page


@dataclass(frozen=True)
class Group:
    """A group of options: its title, what it says about them, and a row for each of them."""

    title: str
    description: str
    rows: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        text = table(("option", ""), self.rows)
        return f"{escape(self.description)}\n\n{text}" if self.description else text


def option(action: argparse.Action) -> str:
    """-m M, --model M without the repetition; an argument without an option by its name."""
    values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = "" if action.nargs == 0 else str(action.metavar or values)
    return code(f"{', '.join(action.option_strings)} {value}".strip())


def is_required(action: argparse.Action) -> bool:
    """Whether it cannot be left out; before Python 3.13 argparse says so of NAME... as well."""
    return action.required and action.nargs not in ("?", "*")


def groups(parser: argparse.ArgumentParser) -> list[Group]:
    found = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in COMMON]
        rows = []
        for action in actions:
            text = escape((action.help or "") % {**vars(action), "prog": parser.prog})
            rows.append((option(action), f"{text}; required" if is_required(action) else text))
        if rows:
            title = "" if group in (parser._positionals, parser._optionals) else group.title or ""
            found.append(Group(title, group.description or "", tuple(rows)))
    return found


def usage(parser: argparse.ArgumentParser) -> str:
    """The program and what cannot be left out."""
    needed = [option(action).strip("`") for action in parser._actions if is_required(action)]
    for alternatives in parser._mutually_exclusive_groups:
        if alternatives.required:
            needed.append("(" + " | ".join(option(action).strip("`") for action in alternatives._group_actions) + ")")
    needed += [f"[{option(action).strip('`')} ...]" for action in parser._actions if action.nargs == "*"]
    # the short name is enough here
    return " ".join([parser.prog, *(re.sub(r"(-\w), --[\w-]+", r"\1", each) for each in needed), "[options]"])


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def commands_page() -> str:
    parser = build_parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {action.dest: action.help or "" for action in subcommands._choices_actions}
    parsers: dict[str, argparse.ArgumentParser] = dict(subcommands.choices)
    of_command = {name: groups(each) for name, each in parsers.items()}
    having: dict[Group, list[str]] = {}
    for name, found in of_command.items():
        for group in found:
            having.setdefault(group, []).append(name)
    shared = {
        group: f"Options: {group.title} ({', '.join(names)})"
        for group, names in having.items()
        if group.title and len(names) > 1
    }

    rows = [(f"[`{name}`]({anchor(name)})", escape(summary)) for name, summary in summaries.items()]
    parts = [COMMANDS_HEAD, table(("command", ""), rows) + "\n"]
    for name, each in parsers.items():
        parts.append(f"## {name}\n\n```sh\n{usage(each)}\n```\n")
        parts.append(markdown(each.description or "", "text") + "\n")
        for group in of_command[name]:
            if group not in shared:
                parts.append((f"**{group.title.capitalize()}**\n\n" if group.title else "") + group.markdown() + "\n")
        links = [f"[{group.title}]({anchor(shared[group])})" for group in of_command[name] if group in shared]
        if links:
            parts.append(f"And the options of {', '.join(links)}.\n")
        if each.epilog:
            parts.append(markdown(each.epilog, "text") + "\n")
    for group, heading in shared.items():
        parts.append(f"## {heading}\n\n{group.markdown()}\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


# --- the Python API ---------------------------------------------------------------------------------------------------

API_HEAD = """# Python API

Written by `scripts/reference_pages.py` (`make reference`) from signatures and docstrings: do not edit.

Import `lminf_edge` before `llama_cpp`. Arrays are numpy's, with their shape and type in words: int32 `(n_tokens,)`.
Wrong arguments and unusable files raise `UserError`, a `ValueError` whose text says what to do. Anything else that is
raised, and not named here, is a bug. What is not on this page may change in any version.

`Tokens` is int32 `(n_tokens,)`, `Logits` float32 `(n_rows, n_vocab)`, `Nll` float64 `(n_tokens,)`, in nats.
"""

# heading, what it is for, and the names in it as PLACE:NAME, where the place is a module or a folder of them
API = (
    (
        "The model",
        "What is not said here of a `Llama` is llama_cpp's: "
        "[its reference](https://llama-cpp-python.readthedocs.io/en/latest/api-reference/).",
        ("llama:Llama", "config:LMInfConfig", "config:StreamInfo", "config:Parts", "engine:SamplingParams"),
    ),
    ("Keeping a stream", "", ("cache:Checkpoint", "cache:CheckpointError")),
    ("For programs that make a `llama_cpp.Llama`", "", ("patching:patch", "patching:unpatch")),
    ("Errors", "", ("errors:UserError", "guard:ClosedError", "guard:StreamTakenError")),
    (
        "Measuring",
        "In `lminf_edge.evaluate`.",
        (
            "evaluate:token_nll",
            "evaluate:nll_blocks",
            "evaluate:divergence_blocks",
            "evaluate:reader_of",
            "evaluate:Reader",
        ),
    ),
    (
        "Several streams at a time",
        "What the server runs on. Tokens in, tokens out: text is the caller's matter.",
        (
            "engine:load_engine",
            "engine:Engine",
            "engine:Request",
            "engine:Output",
            "engine:RequestStats",
            "engine:RequestCancelled",
            "engine:EngineClosedError",
        ),
    ),
    (
        "The server",
        "In `lminf_edge.server`, for an ASGI server of your own; `lminf-edge serve` runs the same application.",
        (
            "server:create_app",
            "server:Settings",
            "text:TextService",
            "engine:Defaults",
            "server:Embedder",
        ),
    ),
)

WIDTH = 100


@dataclass(frozen=True)
class Source:
    """A module, as text and parsed."""

    name: str
    lines: list[str]
    tree: ast.Module

    @classmethod
    def of(cls, path: Path) -> Source:
        text = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(ROOT / "lminf_edge").with_suffix("").parts)
        return cls(name, text.splitlines(), ast.parse(text))

    def definition(self, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node
        return None

    def comment(self, node: ast.stmt) -> str:
        """What is said about a field behind it, or on the lines before."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        # columns are counted in bytes
        after = self.lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        if after.startswith("#"):
            return after.lstrip("# ")
        before: list[str] = []
        for line in reversed(self.lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            before.insert(0, line.strip().lstrip("# "))
        return " ".join(before)


def find(place: str, name: str) -> tuple[Source, ast.ClassDef | ast.FunctionDef]:
    """The definition of a name, and the module it is in."""
    path = ROOT / "lminf_edge" / place
    for each in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        source = Source.of(each)
        node = source.definition(name)
        if node:
            return source, node
    raise SystemExit(f"error: lminf_edge/{place} defines no {name}.")


def unparse(node: ast.AST) -> str:
    """Source, the same from each Python: 3.10 writes a space more."""
    return ast.unparse(node).replace("lambda :", "lambda:")


def decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    return {unparse(each).partition("(")[0] for each in node.decorator_list}


def call(name: str, parameters: Sequence[str], returns: str = "") -> str:
    """A signature on one line, or on several if it is long."""
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){returns}"


def parameters(arguments: ast.arguments) -> list[str]:
    """Each with its type and default, without self and cls."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    found = [parameter(each, default) for each, default in zip(plain, defaults, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        del found[0]
    if arguments.vararg:
        found.append("*" + parameter(arguments.vararg))
    elif arguments.kwonlyargs:
        found.append("*")
    found += [parameter(*each) for each in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        found.append("**" + parameter(arguments.kwarg))
    return found


def parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    text = argument.arg + (f": {unparse(argument.annotation)}" if argument.annotation else "")
    if default is None:
        return text
    return text + (" = " if argument.annotation else "=") + unparse(default)


def function(node: ast.FunctionDef) -> str:
    returns = f" -> {unparse(node.returns)}" if node.returns else ""
    return call(node.name, parameters(node.args), returns)


def listing(text: str) -> str:
    return f"```python\n{text}\n```\n"


def default(value: ast.expr, source: Source) -> ast.expr:
    """A field's default as a caller would write it: no factory, and a constant's value for its name."""
    if isinstance(value, ast.Call) and unparse(value.func) == "field":
        (factory,) = (keyword.value for keyword in value.keywords if keyword.arg == "default_factory")
        return ast.Call(factory, [], [])
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and unparse(node.targets[0]) == unparse(value):
            return node.value
    return value


def field_text(node: ast.AnnAssign, source: Source) -> str:
    value = f" = {unparse(default(node.value, source))}" if node.value else ""
    return f"{unparse(node.target)}: {unparse(node.annotation)}{value}"


def public_fields(node: ast.ClassDef) -> list[tuple[str, ast.AnnAssign]]:
    return [
        (each.target.id, each)
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and not each.target.id.startswith("_")
    ]


def class_parts(source: Source, node: ast.ClassDef) -> Iterator[str]:
    fields = public_fields(node) if "dataclass" in decorators(node) else []
    bases_here = [found for base in node.bases if isinstance(found := source.definition(unparse(base)), ast.ClassDef)]
    inherited = [each for base in bases_here if fields for _, each in public_fields(base)]  # by keyword only
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    constructor = next((each for each in methods if each.name == "__init__"), None)
    bases = ", ".join(base for base in map(unparse, node.bases) if base not in ("RemoteLlama", "abc.ABC"))
    if fields:
        texts = ["*", *(field_text(each, source) for each in inherited)] if inherited else []
        yield listing(call(node.name, [*(field_text(each, source) for _, each in fields), *texts]))
    elif constructor and not bases.endswith("Error"):
        yield listing(call(node.name, parameters(constructor.args)))
    else:
        yield listing(f"class {node.name}({bases})" if bases else f"class {node.name}")
    for documented in (node, constructor):
        doc = documented and ast.get_docstring(documented)
        if doc:
            yield markdown(doc, "python") + "\n"
    told = {name for line in (ast.get_docstring(node) or "").splitlines() for name in _names(line)}
    comments = [
        (f"`{name}`", escape(comment))
        for name, each in fields
        if name not in told and (comment := source.comment(each))
    ]
    if comments:
        yield table(("", ""), comments) + "\n"

    members = []
    for method in methods:
        doc, has = ast.get_docstring(method), decorators(method)
        if doc is None or method.name.startswith("_") or f"{method.name}.setter" in has:
            continue
        if has & {"property"}:
            shown = method.name + (f": {unparse(method.returns)}" if method.returns else "")
        elif has & {"classmethod", "staticmethod"}:
            shown = f"{node.name}.{function(method)}"
        else:
            shown = function(method)
        members.append(f"{listing(shown)}\n{markdown(doc, 'python')}\n")
    if members:
        yield f"#### Members of `{node.name}`\n"
        yield from members


def api_page() -> str:
    parts = [API_HEAD]
    for heading, _, names in API:
        links = ", ".join(f"[`{name}`]({anchor(name)})" for name in (each.partition(":")[2] for each in names))
        parts.append(f"- {heading}: {links}")
    parts.append("")
    for heading, text, names in API:
        parts.append(f"## {heading}\n")
        if text:
            parts.append(text + "\n")
        for each in names:
            place, _, name = each.partition(":")
            source, node = find(place, name)
            parts.append(f"### {name}\n\n`from {exporter(source.name, name)} import {name}`\n")
            if isinstance(node, ast.ClassDef):
                parts += class_parts(source, node)
            else:
                parts += [listing(function(node)), markdown(ast.get_docstring(node) or "", "python") + "\n"]
    return "\n".join(parts)


def exporter(module: str, name: str) -> str:
    """The shortest module that has the name in its __all__, else the one that defines it."""
    package = module
    found = f"lminf_edge.{module}"
    while package:
        package = package.rpartition(".")[0]
        init = ROOT / "lminf_edge" / package.replace(".", "/") / "__init__.py"
        if name in exported(init):
            found = f"lminf_edge.{package}".rstrip(".")
    return found


def exported(init: Path) -> list[str]:
    """The names in the __all__ of a module."""
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.Assign) and unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


# ----------------------------------------------------------------------------------------------------------------------

PAGES = {"docs/commands.md": commands_page, "docs/api.md": api_page}


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for name, page in PAGES.items():
        (ROOT / name).write_text(page())
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
