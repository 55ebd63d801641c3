"""What a run file, the environment and the command line say, before it is checked: values, and the place of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launch.runfile.yaml_nodes import KeyPath, dotted


@dataclass
class RawValues:
    """Raw values and the place of each, filled source by source."""

    file: str
    raw: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest section around it."""
        nearest = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.places), ())
        return self.places.get(nearest, f"{self.file}:1")

    def complain(self, path: KeyPath, sentence: str) -> None:
        key = f"{dotted(path)}: " if path else ""  # a problem between sections has no key of its own
        self.problems.append(f"{self.place(path)}: {key}{sentence}")
