"""The first rows of a run's data, tokenized now and without the cache: enough to look at, whatever its size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from qwen_dist.config import Run
from qwen_dist.data.cache.counts import check_results, count
from qwen_dist.data.cache.inputs import read_inputs
from qwen_dist.data.cache.part import Part, encode_part
from qwen_dist.data.cache.prepared import Prepared, write_arrays
from qwen_dist.data.reading.convert import to_jsonl
from qwen_dist.errors import UserError
from qwen_dist.run_dir import write_json

MAX_ROWS = 200  # of each source: a fraction of a second to tokenize


def prepare_few(run: Run, folder: Path) -> Prepared:
    """Tokenize the first rows of each source of `data.train`, about 200, as `prepare` would all of them.

    Args:
        folder: where the tokens go; it is made.

    Raises:
        UserError: files, rows or settings that cannot be trained on.
    """
    folder.mkdir()
    inputs = read_inputs(run, "train")
    files, formats, units, results, paths, unread = [], [], [], [], [], []
    rows_of = Counter[int]()
    for file, policy, unread_keys in zip(inputs.files, inputs.policies, inputs.unread, strict=True):
        if rows_of[file.source] >= MAX_ROWS:
            continue
        number = len(files)
        jsonl, path = folder / f"{number}.jsonl", folder / f"{number}.npz"
        units.append(to_jsonl(file, jsonl, MAX_ROWS))
        part = Part(number, number, file, jsonl, 0, jsonl.stat().st_size, policy)
        results.append(encode_part(part, inputs.tokenizer, path))
        rows_of[file.source] += results[-1].num_rows
        files.append(file)
        formats.append(policy.row_format)
        paths.append(path)
        unread.append(unread_keys)
    try:
        check_results(inputs.sources, files, units, results, run.data.max_tokens, "train")
    except UserError as error:
        raise UserError(f"Of the first {MAX_ROWS} rows of each source: {error}") from None
    write_arrays(folder, results, paths)
    meta = {
        "fingerprint": "few",
        "counts": count(inputs.sources, files, formats, results),
        "files": [
            {"path": file.path, "source": file.source, "unit": unit, "unread_keys": keys}
            for file, unit, keys in zip(files, units, unread, strict=True)
        ],
    }
    write_json(folder / "meta.json", meta)
    return Prepared(folder)
