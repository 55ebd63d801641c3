"""Shared by tests that start real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """A replay in this process switches checks on that other tests do not want; one thread, since cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
