"""What a run file, the environment and the command line say, before it is checked: values, and the place of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from launch.runfile.yaml_nodes import KeyPath, dotted


@dataclass
class RawValues:
    """Raw values and the place of each, filled source by source.

    Attributes:
        file: the run file's name.
        raw: the values.
        places: key path -> "run.yaml:12", or another source's name.
        problems: sentences of what could not even be read.
        complaints: (key path, sentence) of what is wrong with a value.
        origins: of a stage's values, key path -> the one that it has in the run file, below `stages`.
    """

    file: str
    raw: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    complaints: list[tuple[KeyPath, str]] = field(default_factory=list)
    origins: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest section around it."""
        return self.places.get(self._nearest(path), f"{self.file}:1")

    def complain(self, path: KeyPath, sentence: str) -> None:
        """Something is wrong with the value at `path`."""
        self.complaints.append((path, sentence))

    def told(self, path: KeyPath, sentence: str, is_common: bool = False) -> str:
        """A complaint with its place and its key, as the user wrote it.

        Args:
            path: of the value.
            sentence: what is wrong with it.
            is_common: all stages have it: what none of them sets is missing beside `stages`.
        """
        nearest = self._nearest(path)
        if nearest != path and nearest not in self.origins and not is_common:
            nearest = ()  # missing in this stage, and other stages have it
        is_of_file = is_common and not nearest
        written = path if is_of_file else (*self.origins.get(nearest, nearest), *path[len(nearest) :])
        key = f"{dotted(written)}: " if written else ""  # a problem between sections has no key of its own
        return f"{f'{self.file}:1' if is_of_file else self.place(nearest)}: {key}{sentence}"

    def put(self, path: KeyPath, value: Any, place: str, origin: KeyPath = ()) -> None:
        """Set one value, of the environment or the command line; sections around it are made.

        Args:
            path: of the value.
            value: the value, which may be a list or a section.
            place: where it comes from.
            origin: of one stage's value: of that stage, in the run file.
        """
        target: Any = self.raw
        for depth, part in enumerate(path):
            if isinstance(target, list) and not (isinstance(part, int) and part <= len(target)):
                told = dotted((*origin, *path))
                self.problems.append(f"{place}: {told}: there is no entry {part}; the next one is {len(target)}")
                return
            if not isinstance(target, dict | list):
                told, section = dotted((*origin, *path)), dotted((*origin, *path[:depth]))
                self.problems.append(f"{place}: {told}: {section} is a value, not a section")
                return
            if isinstance(target, list) and part == len(target):
                target.append(None)
            if depth + 1 == len(path):
                target[part] = value
            else:
                inner: Any = target.get(part) if isinstance(target, dict) else target[int(part)]
                if inner is None:
                    inner = target[part] = [] if isinstance(path[depth + 1], int) else {}
                    self._mark(path[: depth + 1], place, origin)
                target = inner
        self.forget_places(path)
        for below, _ in leaves(value, inner_too=True):
            self._mark(path + below, place, origin)

    def forget_places(self, path: KeyPath) -> None:
        """Of `path` and of all below it: other values take their place."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
            self.origins.pop(known, None)

    def copy(self) -> RawValues:
        """The same values, to be changed."""
        return RawValues(self.file, deepcopy(self.raw), dict(self.places), [], [], dict(self.origins))

    def _mark(self, path: KeyPath, place: str, origin: KeyPath) -> None:
        self.places[path] = place
        if origin:
            self.origins[path] = origin + path

    def _nearest(self, path: KeyPath) -> KeyPath:
        return next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.places), ())


def leaves(value: Any, inner_too: bool = False, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Key paths below `value` and their dotted form; a list of scalars is one leaf."""
    is_list_of_sections = isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)
    if inner_too or not ((isinstance(value, Mapping) and value) or is_list_of_sections):
        yield path, dotted(path)
    if isinstance(value, Mapping):
        children: list[tuple[str | int, Any]] = list(value.items())
    elif is_list_of_sections or (inner_too and isinstance(value, list)):
        children = list(enumerate(value))
    else:
        return
    for key, child in children:
        yield from leaves(child, inner_too, (*path, key))
