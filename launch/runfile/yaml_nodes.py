"""YAML as this project reads it: plain values, each with the line it stands on.

Scalars follow YAML 1.2: `2e-5` is a number, `12:00:00` and `off` are text. A key given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from qwen_dist.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML publishes no types
    """SafeLoader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def read_nodes(text: str, name: str) -> tuple[Any, dict[KeyPath, int], list[str]]:
    """Parse a YAML document.

    Args:
        text: the document.
        name: the file's name, for messages.

    Returns:
        The plain value, the line (from 1) of every key path in it, and problems as `name:line: sentence`.

    Raises:
        UserError: not YAML at all.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        problems: list[str] = []
        value = _plain(loader, root, (), lines, problems, name) if root is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {reason}.") from None
    finally:
        loader.dispose()
    return value, lines, problems


def _plain(
    loader: _Loader,
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    problems: list[str],
    name: str,
    parents: frozenset[int] = frozenset(),
) -> Any:
    """`node` as dict, list or scalar; notes the line of every path below it."""
    if id(node) in parents:
        raise yaml.constructor.ConstructorError(problem="an alias inside its own anchor", problem_mark=node.start_mark)
    parents = parents | {id(node)}
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(loader, item, (*path, index), lines, problems, name, parents)
            for index, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        inner = (*path, key)
        if key in found:
            problems.append(f"{name}:{line}: {dotted(inner)}: given twice, first on line {lines[inner]}")
            continue
        lines[inner] = line
        found[key] = _plain(loader, value_node, inner, lines, problems, name, parents)
    return found


def read_scalar(text: str) -> Any:
    """A value from the environment or the command line: a YAML scalar, or a list or mapping in brackets.

    Text that is no valid YAML is taken as it stands, so `data.system.text=You: be brief` needs no quotes.
    """
    text = text.strip()
    loader = _Loader("")
    try:
        if text[:1] in ("[", "{", '"', "'"):
            try:
                return yaml.load(text, Loader=_Loader)  # a SafeLoader
            except yaml.YAMLError:
                return text
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0)` as `data.train.0`."""
    return ".".join(str(part) for part in path)
