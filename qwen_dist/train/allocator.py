"""How torch takes memory of a GPU. Standard library only: it is set before torch is imported."""

from __future__ import annotations

from collections.abc import MutableMapping

# The first since torch 2.10, which reads the second as well.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environ: MutableMapping[str, str]) -> None:
    """Let torch's segments of GPU memory grow in place, unless the user has set up the allocator.

    Packs of many lengths leave gaps in segments of fixed size; the plan counts on gaps of 4 % (`FRAGMENTATION` of
    qwen_dist/memory.py), which holds for growing ones.
    """
    if not any(name in environ for name in VARIABLES):
        environ[VARIABLES[0]] = "expandable_segments:True"
