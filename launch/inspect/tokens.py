"""Every training sample as one JSON object a line: token ids and labels, before packing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen_dist.errors import UserError

if TYPE_CHECKING:
    from qwen_dist.data.cache.prepared import Prepared


def write_tokens(prepared: Prepared, out: str) -> None:
    """Every sample as one JSON object a line, whole or not at all; "-": to stdout.

    Raises:
        UserError: the file cannot be written.
    """
    if out == "-":
        _write_lines(prepared, sys.stdout)
        return
    path = Path(out)
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        with partial.open("w", encoding="utf-8") as file:
            _write_lines(prepared, file)
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"--tokens {out} cannot be written ({error.strerror}); name a file in a folder of yours."
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _write_lines(prepared: Prepared, file: TextIO) -> None:
    for index in range(prepared.num_samples):
        ids_T, labels_T = prepared.sample(index)
        origin = prepared.origin(index)
        line: dict[str, Any] = {"source": origin.pop("source"), "line": origin.pop("place"), **origin}
        line |= {"input_ids": ids_T.tolist(), "labels": labels_T.tolist()}
        if prepared.has_weights:
            line["weights"] = [round(weight, 6) for weight in prepared.weights(index).tolist()]
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
