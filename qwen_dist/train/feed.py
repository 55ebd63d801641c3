"""Micro-batches built ahead of the step that needs them, in a thread, so that the device never waits for data."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import numpy as np

from qwen_dist.data.batches import MicroBatch, build_micro_batch, seed_of_dropout
from qwen_dist.data.cache.prepare import Prepared
from qwen_dist.data.order.shard import StepPlan
from qwen_dist.train.world import World

STEPS_AHEAD = 2


@dataclass(frozen=True)
class StepInput:
    """What one rank computes in one optimizer step.

    Args:
        batches: its micro-batches, or its parts of them.
        samples_N: the numbers of the samples in them.
    """

    batches: list[MicroBatch]
    samples_N: np.ndarray


class Feed:
    """This rank's micro-batches, optimizer step by optimizer step.

    Args:
        prepared: the tokenized data.
        plan: which samples make up which step.
        world: this rank reads only its own share; ranks that share rows read the same.
        first_step: the step to begin with, from 1.
        pad_id: the token that stands in a micro-batch without samples, and after a row that is shared out.
        seed: the run's.
    """

    def __init__(
        self, prepared: Prepared, plan: StepPlan, world: World, first_step: int, pad_id: int, seed: int
    ) -> None:
        self._prepared, self._plan, self._world, self._pad_id, self._seed = prepared, plan, world, pad_id, seed
        self._ready: queue.Queue[StepInput | BaseException] = queue.Queue(STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first_step,), name="feed", daemon=True)
        self._thread.start()

    def next(self) -> tuple[StepInput, float]:
        """The next step's input, and the seconds that the step had to wait for it."""
        started = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item, time.perf_counter() - started

    def close(self) -> None:
        """Stop building ahead."""
        self._closed.set()
        while not self._ready.empty():
            self._ready.get_nowait()

    def _work(self, first_step: int) -> None:
        try:
            for step in range(first_step, self._plan.num_steps + 1):
                samples = self._plan.packs_of(step, self._world.data_rank, self._world.data_groups)
                batches = [self._batch(step, of_batch) for of_batch in samples]
                if self._world.device.type == "cuda":
                    batches = [batch.pin_memory() for batch in batches]
                if not self._put(StepInput(batches, np.concatenate(samples))):
                    return
        except BaseException as error:
            self._put(error)

    def _batch(self, step: int, samples_N: np.ndarray) -> MicroBatch:
        dropout_seed = seed_of_dropout(self._seed, step, samples_N, self._world.sequence_rank)
        return build_micro_batch(self._prepared, samples_N, self._pad_id, dropout_seed, self._world.part)

    def _put(self, item: StepInput | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
