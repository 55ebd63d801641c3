"""The copy of a save on a GPU: what the step had computed, whatever is enqueued behind it."""

from __future__ import annotations

import threading

import pytest
import torch

from qwen_dist.train.checkpoint.background import HostCopy
from qwen_dist.train.checkpoint.shard_file import Piece

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUMEL = 64 * 2**20


def test_an_update_comes_after_the_copy() -> None:
    device = torch.device("cuda", 0)
    host, busy = HostCopy(device), torch.randn(8192, 8192, device=device)
    states = [torch.full((NUMEL,), float(number), device=device) for number in range(4)]
    pieces = [Piece(f"master/{number}", state, (NUMEL,)) for number, state in enumerate(states)]
    for round_number in range(3):
        for _ in range(20):  # still computing when the step ends on the host
            busy = busy @ busy / busy.norm()
        for state in states:
            state.add_(1)
        found: list[list[Piece]] = []
        host.begin()
        thread = threading.Thread(target=lambda found=found: found.append(host.take(pieces)))
        thread.start()
        host.before_update()
        for state in states:
            state.add_(1)
        thread.join()
        for number, copy in enumerate(found[0]):
            assert copy.tensor.is_pinned()
            assert torch.equal(copy.tensor, torch.full((NUMEL,), float(number + 2 * round_number + 1)))
    torch.cuda.synchronize()
