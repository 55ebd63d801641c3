"""From what the ranks found to what is wrong, and on which node. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_dist.hardware import GB

Facts = Mapping[str, Any]
# How far a rank came in the collective, in order.
STAGES = ("nothing", "connected", "joined", "reduced")
FAILED_AT = {
    "nothing": "could not reach the meeting point",
    "connected": "could not join the process group",
    "joined": "did not finish an all-reduce",
}
MAX_NAMED = 8
MAX_USED_SHARE = 0.05  # of a GPU's memory before training; a CUDA context takes about 0.5 GB of 80
MIN_SHARED_MEMORY_BYTES = 512 * 1024**2  # where DeepSpeed (0.19) warns; NCCL takes some MB for each pair of GPUs
MAX_CLOCK_SKEW_S, MAX_TOLERATED_SKEW_S = 1.0, 120.0  # munge credentials of Slurm live 300 s


@dataclass(frozen=True)
class Problem:
    """Something wrong: `is_fatal` ends the job, else it is told."""

    nodes: tuple[str, ...]
    text: str
    is_fatal: bool = True

    def __str__(self) -> str:
        return f"{named(self.nodes)}: {self.text}"


def named(nodes: Sequence[str]) -> str:
    """Nodes as a user reads them."""
    more = f" and {len(nodes) - MAX_NAMED} more" if len(nodes) > MAX_NAMED else ""
    return ", ".join(nodes[:MAX_NAMED]) + more


def missing(ranks: Iterable[int], node_of_rank: Callable[[int], str | None], waited_s: float) -> list[Problem]:
    """A problem for each node whose ranks have not answered."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(node_of_rank(rank) or "a node that cannot be named", []).append(rank)
    return [
        Problem(
            (node,),
            f"{'rank' if len(late) == 1 else 'ranks'} {named([str(rank) for rank in late])} did not answer within "
            f"{waited_s:.0f} s; leave the node out, or look there for what hangs.",
        )
        for node, late in by_node.items()
    ]


def judge_facts(facts: Mapping[int, Facts], needed_bytes: int, place: str) -> list[Problem]:
    """What is wrong on the nodes by themselves, or among them.

    Args:
        facts: rank -> what `facts.gather` found, with "node", "rank" and "local_rank".
        needed_bytes: room that the run needs on the disk of its run directory.
        place: that directory, as the user knows it.
    """
    all_facts = [facts[rank] for rank in sorted(facts)]
    by_node = [fact for fact in all_facts if fact["local_rank"] == 0]
    problems = _complaints(all_facts)
    problems += _differences([(fact["node"], fact.get("versions", {})) for fact in all_facts])
    drivers = [(fact["node"], {"NVIDIA driver": gpu["driver"]}) for fact in by_node for gpu in fact.get("gpus", [])]
    problems += _differences(drivers)
    problems += _other_files(all_facts)
    problems += [problem for fact in by_node for problem in _node_problems(fact)]
    full = tuple(fact["node"] for fact in by_node if fact.get("free_bytes", needed_bytes) < needed_bytes)
    if full:
        free = min(fact["free_bytes"] for fact in by_node if fact["node"] in full)
        text = f"{free / GB:.2f} GB are free for {place}, and the run needs {needed_bytes / GB:.2f} GB; make room, or "
        problems.append(Problem(full, text + "set output_dir to another disk."))
    return problems + _gpu_problems(all_facts)


def judge_results(results: Mapping[int, Facts], nodes: Mapping[int, str]) -> list[Problem]:
    """What is wrong with the network: those that came least far are named.

    Args:
        results: rank -> "stage" it reached, "error" if any, "offset_s" of its clock from rank 0's.
        nodes: rank -> its node.
    """
    failed = {rank: result for rank, result in results.items() if result["stage"] != STAGES[-1]}
    if failed:
        least = min(failed.values(), key=lambda result: STAGES.index(result["stage"]))
        behind = [rank for rank in failed if failed[rank]["stage"] == least["stage"]]
        text = f"{FAILED_AT[least['stage']]} ({least['error']}); set cluster.interface to the network between nodes."
        return [Problem(_unique(nodes[rank] for rank in behind), text)]
    skews: dict[str, float] = {}
    for rank, result in results.items():
        skews.setdefault(nodes[rank], float(result.get("offset_s") or 0.0))
    return clock_problems(skews)


def clock_problems(skews_s: Mapping[str, float]) -> list[Problem]:
    """Nodes whose clock is more than a second from the middle of all; node -> seconds from any common origin."""
    middle = sorted(skews_s.values())[len(skews_s) // 2] if skews_s else 0.0
    return [
        Problem(
            (node,),
            f"its clock is {abs(skew - middle):.1f} s {'ahead' if skew > middle else 'behind'}; set it by NTP.",
            is_fatal=abs(skew - middle) > MAX_TOLERATED_SKEW_S,
        )
        for node, skew in skews_s.items()
        if abs(skew - middle) > MAX_CLOCK_SKEW_S
    ]


def _complaints(all_facts: Sequence[Facts]) -> list[Problem]:
    """What ranks found by themselves, each sentence once with all its nodes."""
    nodes_of: dict[str, list[str]] = {}
    for fact in all_facts:
        for text in fact["complaints"]:
            nodes_of.setdefault(text, []).append(fact["node"])
    return [Problem(_unique(nodes), text) for text, nodes in nodes_of.items()]


def _differences(values: Sequence[tuple[str, Mapping[str, str]]]) -> list[Problem]:
    """Nodes that have another value than most; where two are as frequent, than the first."""
    problems = []
    for key in dict.fromkeys(key for _, value in values for key in value):
        usual = Counter(value[key] for _, value in values if key in value).most_common(1)[0][0]
        others: dict[str, list[str]] = {}
        for node, value in values:
            if key in value and value[key] != usual:
                others.setdefault(value[key], []).append(node)
        for other, nodes in others.items():
            text = f"{key} {other}, where the others have {usual}; use one environment on all nodes."
            problems.append(Problem(_unique(nodes), text))
    return problems


def _other_files(all_facts: Sequence[Facts]) -> list[Problem]:
    """Nodes that see another run directory, or no tokenized data where others do."""
    digests = [(fact["node"], {"run.json": fact["run_json"]}) for fact in all_facts if "run_json" in fact]
    problems = [
        Problem(problem.nodes, "another run.json than on the others; put output_dir on a disk that all nodes share.")
        for problem in _differences(digests)
    ]
    for split in dict.fromkeys(split for fact in all_facts for split in fact.get("prepared", {})):
        seen = {fact["node"]: fact["prepared"].get(split) for fact in all_facts if "prepared" in fact}
        blind = tuple(node for node, is_there in seen.items() if is_there is False)
        if blind and len(blind) < len(seen):
            text = f"does not see the tokenized data.{split} that others see; put output_dir on a disk that all share,"
            problems.append(Problem(blind, text + " or set data.cache to node."))
    return problems


def _node_problems(fact: Facts) -> list[Problem]:
    node, problems = (fact["node"],), []
    for gpu in fact.get("gpus", []):
        if gpu["is_broken"]:
            problems.append(
                Problem(node, f"GPU {gpu['index']} has bad memory that cannot be replaced; drain the node.")
            )
        elif gpu["needs_reset"]:
            text = f"GPU {gpu['index']} has bad memory that a reset of the GPU would replace; drain the node."
            problems.append(Problem(node, text))
        elif gpu["errors"]:
            text = f"GPU {gpu['index']} has {gpu['errors']} uncorrected memory errors; reset it, or drain the node."
            problems.append(Problem(node, text, is_fatal=False))
    if "gpus" in fact and fact.get("shm_bytes", MIN_SHARED_MEMORY_BYTES) < MIN_SHARED_MEMORY_BYTES:
        text = f"{fact['shm_bytes'] / GB:.2f} GB free in /dev/shm, which NCCL uses; give the container 1 GB or more."
        problems.append(Problem(node, text, is_fatal=False))
    return problems


def _gpu_problems(all_facts: Sequence[Facts]) -> list[Problem]:
    """GPUs of another type than most, or in use before training."""
    with_gpu = [fact for fact in all_facts if "gpu" in fact]
    problems = [
        Problem(problem.nodes, problem.text.replace("use one environment on all nodes", "the slowest decides"), False)
        for problem in _differences([(fact["node"], {"GPU": fact["gpu"]["name"]}) for fact in with_gpu])
    ]
    for fact in with_gpu:
        used = fact["gpu"]["memory_bytes"] - fact["gpu"]["free_bytes"]
        if used > MAX_USED_SHARE * fact["gpu"]["memory_bytes"]:
            text = f"GPU {fact['local_rank']} has {used / GB:.1f} GB in use by another process; end it, or expect less."
            problems.append(Problem((fact["node"],), text, is_fatal=False))
    return problems


def _unique(nodes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(nodes))
