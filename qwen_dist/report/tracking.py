"""Weights & Biases: the same metrics, from rank 0, off the critical path, under one run id that survives resume."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from qwen_dist.config import Run
from qwen_dist.log import get_logger

CLOSE_TIMEOUT_S = 60.0


class Tracker:
    """Sends metrics to W&B from a thread of its own: starting, a slow network and failures never hold up a step.

    Args:
        run: the run; its resolved config is W&B's config (it holds no secret: keys come from W&B's own login).
        run_id: W&B's id of this run, made once for a run directory.
        folder: where the client keeps its files.
    """

    def __init__(self, run: Run, run_id: str, folder: Path) -> None:
        self._run, self._run_id, self._folder = run, run_id, folder
        self._entries: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, entry: dict[str, Any]) -> None:
        """Queue one object of metrics.jsonl."""
        self._entries.put(entry)

    def close(self) -> None:
        """Send what is queued and finish the W&B run; gives up after a minute."""
        self._entries.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            get_logger().warning("W&B did not finish in %.0f s; metrics.jsonl has everything.", CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        try:
            client = self._start()
            while (entry := self._entries.get()) is not None:
                client.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])
            client.finish()
        except Exception as error:
            get_logger().warning("W&B stopped (%s); training goes on, metrics.jsonl has everything.", error)

    def _start(self) -> Any:
        import wandb

        settings = self._run.tracking.wandb
        assert settings is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or self._run.name,
            mode=settings.mode,
            id=self._run_id,
            resume="allow" if settings.mode == "online" else None,
            dir=str(self._folder),
            config=self._run.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
