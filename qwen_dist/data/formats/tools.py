"""Tools that a row offers, and calls of them: as the user wrote them, once it is clear that they can be rendered."""

from __future__ import annotations

from typing import Any

from qwen_dist.data.formats.json_values import brief, check_json, from_json
from qwen_dist.data.reading.rows import BadRow, kind_of


def read_tools(value: Any, name: str) -> tuple[dict[str, Any], ...] | None:
    """Row-level tools: a list of objects, or a JSON string of one; null or empty: no tools.

    Raises:
        BadRow: anything else.
    """
    if isinstance(value, str):
        value = from_json(value, f"{name} is") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{name} must be a list of objects, not {kind_of(value)}")
    check_json(value, f"{name} is")
    return tuple(value)


def read_tool_calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls as [{"name", "arguments"}], from OpenAI's nested form, the flat one, or a JSON string of it.

    Raises:
        BadRow: a call without a name, or arguments that are no object.
    """
    if isinstance(value, str):
        value = from_json(value, "has a tool call that is") if value.strip() else None
    if value is None or value == []:
        return ()
    found = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise BadRow('has a tool call without "name"')
        if "arguments" not in inner:
            _check_no_arguments(call, inner)
        arguments = inner.get("arguments", {})
        what = "has tool call arguments that are"
        parsed = from_json(arguments, what) if isinstance(arguments, str) else arguments
        if not isinstance(parsed, dict):
            raise BadRow(f"{what} {kind_of(parsed)}, not an object")
        check_json(parsed, what)
        found.append({"name": inner["name"], "arguments": arguments})
    return tuple(found)


def _check_no_arguments(call: dict[str, Any], inner: dict[str, Any]) -> None:
    """Refuse a call without arguments that has something else, which may be its arguments under another name."""
    others = {key for value in (call, inner) for key in value if value[key] is not None}
    other = min(others - {"function", "name", "id", "type", "index"}, default=None)
    if other is not None:
        raise BadRow(f'has a tool call with {brief(other)} and without "arguments", which belong beside "name"')
