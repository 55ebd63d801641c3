"""The folders of this machine that ranks in a container must see. Pure, but for asking which model is a folder."""

from __future__ import annotations

import glob
import os

from qwen_dist.config import Run
from qwen_dist.errors import UserError
from qwen_dist.model_files import is_local


def mounts_of(run: Run) -> list[str]:
    """What a run reads and writes, and `cluster.container.mounts`, as SOURCE:TARGET[:FLAGS].

    Raises:
        UserError: a path that the container runtimes' lists cannot hold.
    """
    container = run.cluster.container
    assert container is not None
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    inside = {mount.split(":")[1] for mount in given}
    ours = [folder for folder in _folders(run) if folder not in inside]
    for path in [*ours, *container.mounts]:
        if "," in path or (path in ours and ":" in path):
            raise UserError(
                f"{path} cannot be mounted in a container: a list of mounts cannot hold ',' or ':' in a path; "
                "rename the folder."
            )
    return [*(f"{folder}:{folder}" for folder in ours), *given]


def _folders(run: Run) -> list[str]:
    """Folders that hold the run, its model and its rows; none that lies in another one."""
    models = [path for path in (run.model.path, run.model.tokenizer) if path is not None and is_local(path)]
    rows = [source.path for source in (*run.data.train, *run.data.eval) if os.path.isabs(source.path)]
    other_run = [run.init_from] if run.init_from is not None else []
    found = {run.output_dir, *other_run, *(_folder_of(path) for path in (*models, *rows))}
    return [folder for folder in sorted(found) if not any(_is_inside(folder, other) for other in found)]


def _folder_of(path: str) -> str:
    """The folder that holds `path`, or a pattern's matches; a folder itself."""
    while glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path)
    return path if os.path.isdir(path) else os.path.dirname(path)


def _is_inside(folder: str, other: str) -> bool:
    return folder != other and os.path.commonpath([folder, other]) == other
