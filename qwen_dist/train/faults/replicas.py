"""Silent corruption: weights that every rank must hold alike are compared, bit for bit.

A memory cell that flips, a kernel that computes wrongly on one GPU, other weights on one node's disk: such a rank goes
on with a model of its own, and no loss shows it. ZeRO-2 replicates every weight: a frozen one keeps what befell it; a
trained one is gathered anew after each update, from shards that exist once, so that only the last step's fault is seen.
ZeRO-3 keeps whole what is below its persistence threshold, norms and biases, and has one copy of all else.
Shapes: K tensors, W ranks, N words of 4 bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from qwen_dist.errors import RunFailed, counted
from qwen_dist.log import get_logger
from qwen_dist.train.engine import Engine

# Words at a time. A CPU's share of them stays in its cache: 3.2 GB/s on a core instead of 0.4. A GPU's take 3 x 32 MB.
CHUNK_WORDS, CHUNK_WORDS_GPU = 1 << 16, 1 << 22
MAX_TOLD = 3


def compare_replicas(engine: Engine, step: int, is_first: bool) -> None:
    """Compare all replicated weights over the ranks; all ranks call it together.

    Args:
        step: the last one that was made.
        is_first: in this process; nothing was computed here yet.

    Raises:
        RunFailed: they differ; names the rank and the weight.
    """
    if engine.world.world_size == 1:
        return
    replicas = dict(replicated(engine))
    if is_first:
        size_mb = sum(tensor.numel() * tensor.element_size() for tensor in replicas.values()) / 1e6
        get_logger().debug("%s of %.1f MB are compared over the ranks", counted(len(replicas), "weight"), size_mb)
    if not replicas:
        return
    names = list(replicas)
    hashes_WK = engine.world.gather(torch.stack([hash_of(tensor) for tensor in replicas.values()]))
    found = disagreements(names, hashes_WK.tolist())
    if found:
        raise RunFailed(sentence(found, step, engine.world.world_size, is_first))


def replicated(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter and buffer that is whole on each rank between two steps."""
    module = engine.ds_engine.module
    for name, parameter in module.named_parameters():
        is_sharded = hasattr(parameter, "ds_id")
        if not is_sharded or (parameter.ds_persist and parameter.data.numel() == parameter.ds_numel):
            yield name, parameter.data
    yield from module.named_buffers()


def hash_of(tensor: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor's bits, an int64 scalar on its device; nothing waits for it.

    The sum over words of word x (2 x place + 1), modulo 2^64. An odd factor has an inverse there, so another word
    changes the sum; two words that change places change it too, as |difference| < 2^32 and |distance| < 2^31.
    """
    bytes_N = tensor.detach().contiguous().view(-1).view(torch.uint8)
    padding = -bytes_N.numel() % 4
    if padding:
        bytes_N = torch.nn.functional.pad(bytes_N, (0, padding))
    words_N = bytes_N.view(torch.int32)
    chunk = CHUNK_WORDS_GPU if tensor.is_cuda else CHUNK_WORDS
    factor_C = 2 * torch.arange(min(chunk, words_N.numel()), device=tensor.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words_N.numel(), chunk):
        words_C = words_N[start : start + chunk].long()
        total += (words_C * factor_C[: len(words_C)]).sum() + 2 * start * words_C.sum()
    return total


def disagreements(names: Sequence[str], hashes_WK: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Weight -> the ranks that hold it otherwise than most; all ranks where there is no majority. Pure."""
    found: dict[str, list[int]] = {}
    for name, of_ranks in zip(names, zip(*hashes_WK, strict=True), strict=True):
        (most, times), *others = Counter(of_ranks).most_common()
        if not others:
            continue
        has_majority = 2 * times > len(of_ranks)
        found[name] = [rank for rank, value in enumerate(of_ranks) if not has_majority or value != most]
    return found


def sentence(found: dict[str, list[int]], step: int, world_size: int, is_first: bool) -> str:
    """What differs, and what to do."""
    ranks = sorted({rank for of_name in found.values() for rank in of_name})
    shown = ", ".join(list(found)[:MAX_TOLD]) + (f" and {len(found) - MAX_TOLD} more" if len(found) > MAX_TOLD else "")
    if len(ranks) == world_size:
        who = f"ranks {' and '.join(map(str, ranks))} differ" if world_size == 2 else "the ranks differ from each other"
    else:
        plural = "s" if len(ranks) > 1 else ""
        who = f"rank{plural} {', '.join(map(str, ranks))} differ{'' if plural else 's'} from the others"
    when = f"before step {step + 1}" if is_first else f"after step {step}"
    fix = (
        "see to it that model.path holds the same files on every machine"
        if is_first
        else "suspect that GPU or its memory, and start again without it: the run goes on from its last checkpoint"
    )
    return f"Weights that all ranks must hold alike differ {when}: {who} in {shown}; {fix}."
