"""The house: every import goes down a layer or stays in it, and none goes round in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import lminf_edge

PACKAGE = Path(lminf_edge.__file__).parent

# from the ground up; what stands in one line may import one another, but for circles
LAYERS = (
    ("errors", "files", "startup", "backends", "loops"),
    ("gguf_header", "models", "config", "structures", "native", "rpc"),
    ("cache",),
    ("model", "scores"),
    ("engine",),
    ("text",),
    (
        "completion",
        "chat_completion",
        "guard",
        "llama",
        "patched",
        "patching",
        "server",
        "evaluate",
        "weightless",
        "bench",
    ),
    ("cli", "llm_plugin", "__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


class Imports(ast.NodeVisitor):
    """What a module imports of ours when it runs."""

    def __init__(self, modules: set[str]) -> None:
        self.modules = modules
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {name.name for name in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0
        module = node.module or ""
        names = {f"{module}.{name.name}" for name in node.names}
        self.found |= names if names <= self.modules else {*names, module}


def graph() -> dict[str, set[str]]:
    """Modules, without the package's name, and those of ours that they import."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    edges = {}
    for name, path in files.items():
        imports = Imports({f"lminf_edge.{each}" for each in files})
        imports.visit(ast.parse(path.read_text(encoding="utf-8")))
        ours = {each.removeprefix("lminf_edge.") for each in imports.found if each.startswith("lminf_edge.")}
        edges[name] = (ours & files.keys()) - {name}
    return edges


def test_no_line_goes_up() -> None:
    edges = graph()
    assert len(edges) > 50
    assert {name.split(".")[0] for name in edges} <= RANK.keys()
    up = [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if RANK[other.split(".")[0]] > RANK[name.split(".")[0]] and name not in ("__init__", "__main__")
    ]
    assert up == []


def test_no_circle() -> None:
    edges = graph()
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        walk(name, ())


def test_files_have_a_reason_to_be_long() -> None:
    """Two may: llama_cpp's surface is as wide as it is, and a step of the scheduler is one thing."""
    long = {path.name for path in PACKAGE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert long == {"llama.py", "scheduler.py"}
