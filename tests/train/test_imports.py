"""A rank's imports: without the collector, and without a compiler that it has no use for."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

from qwen_dist.train.imports import imports_that_stay

IMPORTS = """
import os, sys
from qwen_dist.train.imports import NO_COMPILER, import_muon_uncompiled

import_muon_uncompiled()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert "torch._inductor.compile_fx" not in sys.modules, "Inductor was imported"
assert NO_COMPILER not in os.environ
os.environ[NO_COMPILER] = "0"
import_muon_uncompiled()
assert os.environ[NO_COMPILER] == "0"
"""


def test_deepspeeds_muon_does_not_bring_inductor() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environ | {"DS_ACCELERATOR": "cpu"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_collector_works_again_and_passes_over_what_was_imported() -> None:
    gc.unfreeze()
    with imports_that_stay():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled() and gc.get_freeze_count() >= len(kept)
    gc.unfreeze()
