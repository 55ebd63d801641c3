"""torch.compile of each decoder layer."""

from __future__ import annotations

import os
import shutil

import torch

from qwen_dist.errors import EnvironmentNotReady
from qwen_dist.train.model.last_layer import selects_its_rows
from qwen_dist.train.model.recompute import decoder_layers


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile what stands around the attention of each layer; the attention stays a call of its own.

    For any number of tokens at once (`dynamic`): packs are not all full, and with shapes as constants torch would
    compile anew for each until it gave up (8 times, torch 2.13). Padding them would cost tokens instead. Weights keep
    their shapes; layers of one kind share what was compiled. Recomputation stands around the compiled layer. A last
    layer that computes only some rows (`last_layer.py`) stays as it is: a hook inside it reads which ones, and torch
    (2.13) compiles what that hook saw the first time.

    Args:
        model: a causal language model with its adapters.
        backend: of torch.compile.

    Raises:
        EnvironmentNotReady: there is no C++ compiler, which torch (CPU) and Triton (GPU) call.
    """
    compiler = os.environ.get("CXX", "c++")
    if backend == "inductor" and shutil.which(compiler) is None:
        raise EnvironmentNotReady(
            f"model.compile needs a C++ compiler, and {compiler} is not there; install one (apt install g++), or set "
            "model.compile=false."
        )
    for layer in decoder_layers(model):
        if not selects_its_rows(layer):
            layer.compile(dynamic=True, backend=backend)
