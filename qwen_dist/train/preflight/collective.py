"""A small all-reduce over all ranks: does the network work, how fast is it, and what time is it elsewhere?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from qwen_dist.train.preflight.place import Place

CONNECT_SHARE = 0.6  # of the time limit, to reach the meeting point
POLL_S = 0.5
CPU_BYTES, GPU_BYTES = 4 << 20, 256 << 20
NUM_WARMUPS, NUM_ROUNDS = 2, 5


def collective(
    place: Place, on_gpu: bool, is_host: bool, limit_s: float, is_lost: Callable[[], bool]
) -> dict[str, Any]:
    """Try it, for `limit_s` at most.

    Args:
        place: this rank; there are several.
        on_gpu: over NCCL, else over gloo.
        is_host: rank 0 opens the meeting point itself.
        is_lost: whether another rank has failed, so that the others wait for it in vain; asked every POLL_S.

    Returns:
        "stage" reached (see judge.STAGES), "error" or None; when all went well "bandwidth_bytes_s" (what each link
        carries: 2 (n - 1) / n of the bytes, as nccl-tests count) and "offset_s", this clock ahead of rank 0's.
    """
    result: dict[str, Any] = {"stage": "nothing", "error": None}

    def run() -> None:
        try:
            _try(place, on_gpu, is_host, limit_s, result)
        except Exception as error:  # torch raises many kinds, and each is a finding
            result["error"] = " ".join(str(error).split())[:200] or type(error).__name__

    thread = threading.Thread(target=run, daemon=True, name="collective")
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < deadline and not is_lost():
        thread.join(min(POLL_S, max(0.0, deadline - time.monotonic())))
    return {**result, "error": "no answer from the others"} if thread.is_alive() else result


def _try(place: Place, on_gpu: bool, is_host: bool, limit_s: float, result: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    # NCCL's own watchdog would abort the process before it can say what it waits for.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    assert place.address is not None and place.port is not None
    store = dist.TCPStore(
        place.address, place.port, place.world_size, is_host,
        timeout=timedelta(seconds=CONNECT_SHARE * limit_s), wait_for_workers=False,
    )  # fmt: skip
    prefixed = dist.PrefixStore("preflight", store)
    prefixed.set(f"rank_{place.rank}", "here")
    result["stage"] = "connected"
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=prefixed, rank=place.rank, world_size=place.world_size, timeout=timedelta(seconds=limit_s),
    )  # fmt: skip
    result["stage"] = "joined"
    total = torch.tensor([place.rank + 1.0], device=device)
    dist.all_reduce(total)
    if total.item() != (expected := place.world_size * (place.world_size + 1) / 2):
        raise ValueError(f"the sum over all ranks was {total.item():g}, not {expected:g}")
    result["bandwidth_bytes_s"] = _bandwidth(device, place.world_size)
    result["offset_s"] = _clock_offset(device, place.world_size)
    result["stage"] = "reduced"


def _bandwidth(device: Any, world_size: int) -> float:
    """Bytes/s that a link carries in an all-reduce, the best of a few."""
    import torch
    import torch.distributed as dist

    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    values = torch.zeros(num_bytes // 4, device=device)
    best_s = float("inf")
    for number in range(NUM_WARMUPS + NUM_ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= NUM_WARMUPS:
            best_s = min(best_s, time.perf_counter() - started)
    return 2 * (world_size - 1) / world_size * num_bytes / best_s


def _clock_offset(device: Any, world_size: int) -> float:
    """Seconds that this clock is ahead of rank 0's: all read theirs when a barrier opens, the closest of a few.

    Known to the time by which ranks leave a barrier apart, milliseconds.
    """
    import torch
    import torch.distributed as dist

    closest = float("inf")
    for _ in range(NUM_ROUNDS):
        dist.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        first = now.clone()
        dist.broadcast(first, src=0)
        offset = (now - first).item()
        closest = offset if abs(offset) < abs(closest) else closest
    return closest
