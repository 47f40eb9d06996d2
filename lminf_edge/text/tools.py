"""Tools as clients give them, checked and completed: for Llama and the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lminf_edge.engine.request import RequestCancelled
from lminf_edge.errors import UserError
from lminf_edge.text.schema import enforceable
from lminf_edge.text.schema_bounds import check_size, count_parts, loosened

MAX_TOOLS = 1024
MAX_TOOL_PARTS = 30_000  # of all their schemas


class ToolError(UserError):
    """`param` is the argument to blame: "tools", "tools.0.function.parameters", "tool_choice"."""

    def __init__(self, message: str, param: str = "tools") -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Tools:
    """
    functions  completed with what templates expect
    choice     "auto", "none", "required", or {"type": "function", "function": {"name": ...}}
    strict     names of those whose calls must follow their schema in all
    """

    functions: list[dict[str, Any]]
    choice: Any
    strict: frozenset[str]


def check_tools(
    tools: Sequence[Any],
    choice: Any = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Tools:
    """Raises ToolError for what is not a tool, or a choice that cannot be made, and RequestCancelled."""
    if len(tools) > MAX_TOOLS:
        raise ToolError(f"tools: there may be {MAX_TOOLS:,} at most.")
    functions: list[dict[str, Any]] = []
    strict: set[str] = set()
    names: set[str] = set()
    n_parts = 0
    for i, tool in enumerate(tools):
        if is_cancelled():
            raise RequestCancelled
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ToolError(f"tools.{i}: a tool has a function with a name.")
        name = function["name"]
        if name in names:
            raise ToolError(f"tools.{i}: there are two functions {name[:100]!r}.")
        names.add(name)
        if not isinstance(function.get("description", ""), str):
            raise ToolError(f"tools.{i}: a description is text.")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        try:
            n_parts += count_parts(parameters)
            if function.get("strict"):
                strict.add(name)
                parameters = enforceable(parameters)
            else:
                parameters = loosened(parameters)
                check_size(parameters)
        except UserError as error:
            param = f"tools.{i}.function.parameters"
            raise ToolError(f"{param}: {error}.", param) from None
        if n_parts > MAX_TOOL_PARTS:
            raise ToolError(f"tools: their schemas have more than {MAX_TOOL_PARTS:,} parts.")
        kept = {key: value for key, value in function.items() if key != "strict"}  # not for the prompt
        functions.append({**tool, "type": "function", "function": {**kept, "parameters": parameters}})
    return Tools(functions, _choice(choice, names), frozenset(strict))


def _choice(choice: Any, names: Iterable[str]) -> Any:
    """A choice that can be enforced."""
    if choice in ("auto", "none") or choice is None:
        return choice or "auto"
    if choice == "required":
        if not names:
            raise ToolError('tool_choice: "required" needs tools.', "tool_choice")
        return choice
    if not isinstance(choice, Mapping) or not isinstance(choice.get("function"), Mapping):
        raise ToolError('tool_choice must be "auto", "none", "required" or a function.', "tool_choice")
    name = choice["function"].get("name")
    if name not in names:
        raise ToolError(f"tool_choice: there is no tool {str(name)[:100]!r}.", "tool_choice")
    return {"type": "function", "function": {"name": name}}
