"""What a model's size is: from its config.json, or for known Qwen models without any file.

Standard library only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

# hidden_size of the dense Qwen families by size name, from their published config.json files.
HIDDEN_SIZES = {
    "qwen1.5": {"0.5b": 1024, "1.8b": 2048, "4b": 2560, "7b": 4096, "14b": 5120, "32b": 5120, "72b": 8192},
    "qwen2": {"0.5b": 896, "1.5b": 1536, "7b": 3584, "72b": 8192},
    "qwen2.5": {"0.5b": 896, "1.5b": 1536, "3b": 2048, "7b": 3584, "14b": 5120, "32b": 5120, "72b": 8192},
    "qwen3": {"0.6b": 1024, "1.7b": 2048, "4b": 2560, "8b": 4096, "14b": 5120, "32b": 5120},
}
HIDDEN_SIZE_14B = 5120


def hidden_size_of(config: dict[str, Any]) -> int:
    """`hidden_size` of a model's config.json."""
    return int(config["hidden_size"])


def hidden_size(model_path: str) -> int:
    """Hidden size of a model, without the network.

    Args:
        model_path: a local folder, a bare config.json, or a hub id.

    Returns:
        The size in the local config.json; of a hub id, the known size of its name; otherwise that of a 14B model.
    """
    path = Path(model_path)
    file = path / "config.json" if path.is_dir() else path
    try:
        return hidden_size_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    name = re.search(r"(qwen[\d.]+)-(\d+(?:\.\d+)?b)", model_path.lower())
    return HIDDEN_SIZES.get(name[1], {}).get(name[2], HIDDEN_SIZE_14B) if name else HIDDEN_SIZE_14B
