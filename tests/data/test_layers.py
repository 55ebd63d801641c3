"""The data path goes one way: each package imports only from those before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPO

ORDER = ["reading", "formats", "encoding", "cache", "order", "batches"]
DATA = REPO / "qwen_dist" / "data"


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.py")), ids=lambda path: path.relative_to(DATA).as_posix())
def test_imports_go_left(path: Path) -> None:
    place = path.relative_to(DATA).parts[0].removesuffix(".py")
    imported = re.findall(r"(?:from|import) qwen_dist\.data\.(\w+)", path.read_text(encoding="utf-8"))
    allowed = ORDER[: ORDER.index(place) + 1] if place in ORDER else []
    assert set(imported) <= set(allowed)
