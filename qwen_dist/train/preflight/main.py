"""One rank of a preflight: look, meet, judge, try the network, say how it went."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_dist.config import Run
from qwen_dist.disk_room import missing_room
from qwen_dist.errors import EXIT_DONE, EXIT_ENVIRONMENT, EnvironmentNotReady, UserError, counted
from qwen_dist.hardware import GB
from qwen_dist.run_dir import RunDir
from qwen_dist.train.preflight import facts as look
from qwen_dist.train.preflight.collective import collective
from qwen_dist.train.preflight.judge import Facts, Problem, judge_facts, judge_results, missing
from qwen_dist.train.preflight.meeting import Meeting
from qwen_dist.train.preflight.place import Place, attempt_name, node_of_rank, place_of
from qwen_dist.train.ranks import local_world_size, rank_environment

# Two minutes at most, all in all: imports take seconds, and much longer where all nodes read one slow disk.
FACTS_WITHIN_S = 75.0
# Of that, after which a step that hangs is given up, so that its rank can still say so.
STEP_SHARES = {"software": 0.8, "files": 0.3, "rendezvous": 0.3, "node": 0.5, "nvme": 0.3}
NETWORK_SHARE = 0.4  # of that, in which the network must answer: 30 s
RESULT_LATE_S = 3.0  # how much later than its limit a rank's result may lie in the folder
VERDICT_LATE_S = 5.0  # how much later than rank 0's own deadline the others stop to wait for it
# srun ends the step at the first bad exit and drops what a task has just written: the words get this long to arrive.
WORDS_ARRIVE_S = 1.0


def main(run_path: str, attempt: str | None, within_s: float = FACTS_WITHIN_S) -> int:
    """Check this node together with all others.

    Args:
        run_path: the run directory.
        attempt: a name that all ranks of this start share; None: Slurm's.
        within_s: seconds that all ranks have to start and to look at their nodes.

    Returns:
        The exit code: 0, or 3 on all ranks; 2 where it was started in a wrong way.
    """
    deadline = time.monotonic() + within_s
    try:
        place = place_of(os.environ)
        run_dir = RunDir(Path(run_path).absolute())
        run, fingerprints = look.read_record(run_dir)
        if not _on_gpu(run):
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads this when it is imported (0.19.8)
        name = attempt_name(os.environ, place.world_size, attempt)
        meeting = _meet(run_dir, name, place)
        _tell(meeting, "facts", _facts(run, run_dir, place, fingerprints, within_s))
        is_well = _agree(run, run_dir, place, meeting, deadline, within_s)
        is_well = is_well and _try_network(run, place, meeting, deadline, within_s)
        return EXIT_DONE if is_well else EXIT_ENVIRONMENT
    except UserError as error:
        if rank_environment(dict(os.environ))["LOCAL_RANK"] == "0":  # one voice a node
            _say([f"error: {error}"])
        time.sleep(WORDS_ARRIVE_S)
        return error.exit_code


def _facts(
    run: Run, run_dir: RunDir, place: Place, fingerprints: dict[str, str | None], within_s: float
) -> dict[str, Any]:
    """Everything that this rank sees by itself."""

    def software() -> dict[str, Any]:
        found = look.software()
        return found | (look.gpu(place.local_rank) if _on_gpu(run) else {})

    steps = {
        "software": software,
        "files": lambda: look.files(run, run_dir, fingerprints),
        "rendezvous": lambda: look.rendezvous(place, _is_host(place)),
    }
    if place.local_rank == 0:
        steps["node"] = lambda: look.node(run, run_dir)
        if run.zero.nvme_path is not None:
            steps["nvme"] = lambda: look.nvme(run, local_world_size(dict(os.environ)))
    found = look.gather([look.Step(name, STEP_SHARES[name] * within_s, step) for name, step in steps.items()])
    return {"rank": place.rank, "local_rank": place.local_rank, "node": place.node, **found}


def _agree(run: Run, run_dir: RunDir, place: Place, meeting: Meeting, deadline: float, within_s: float) -> bool:
    """Whether all nodes are well by themselves: rank 0 waits for the facts of all, and judges them."""
    ranks = range(place.world_size)
    if place.rank != 0:
        return _hear(meeting, "verdict", place, deadline + VERDICT_LATE_S)
    facts = meeting.wait("facts", ranks, deadline)
    late = [rank for rank in ranks if rank not in facts]
    problems = missing(late, lambda rank: node_of_rank(rank, os.environ), within_s)
    problems += judge_facts(facts, missing_room(run, run_dir), str(run_dir.path))
    return _pronounce(meeting, "verdict", problems, len({fact["node"] for fact in facts.values()}))


def _try_network(run: Run, place: Place, meeting: Meeting, facts_deadline: float, within_s: float) -> bool:
    """Whether all ranks together can compute; rank 0 says the last word."""
    limit_s, ranks = NETWORK_SHARE * within_s, range(place.world_size)
    deadline = time.monotonic() + limit_s + RESULT_LATE_S

    def is_lost() -> bool:
        """Rank 0 looks for all: it opened the meeting point, which the others leave when it does."""
        return place.rank == 0 and any(result["error"] for result in meeting.read("result", ranks).values())

    result: dict[str, Any] = {"stage": "reduced", "error": None}
    if place.world_size > 1:
        result = collective(place, _on_gpu(run), _is_host(place), limit_s, is_lost)
    _tell(meeting, "result", result)
    if place.rank != 0:
        return _hear(meeting, "end", place, deadline + VERDICT_LATE_S)
    results, facts = meeting.wait("result", ranks, deadline), meeting.read("facts", ranks)
    nodes = {rank: str(fact["node"]) for rank, fact in facts.items()}
    problems = missing([rank for rank in ranks if rank not in results], nodes.get, limit_s)
    problems = problems or judge_results(results, nodes)
    is_well = _pronounce(meeting, "end", problems, len(set(nodes.values())))
    if is_well:
        _say([summary(facts, result, time.monotonic() - facts_deadline + within_s)])
    return is_well


def summary(facts: Mapping[int, Facts], result: Facts, took_s: float) -> str:
    """The one line of a preflight that found nothing wrong."""
    first, nodes = facts[0], list(dict.fromkeys(str(fact["node"]) for fact in facts.values()))
    versions = first["versions"]
    driver = next((f"driver {gpu['driver']}" for gpu in first.get("gpus", [])), None)
    names = (f"{name} {versions[name]}" for name in ("CUDA", "torch", "deepspeed") if name in versions)
    speed = result.get("bandwidth_bytes_s")
    ranks = f"{len(facts)} × {first['gpu']['name']}" if "gpu" in first else counted(len(facts), "CPU rank")
    parts = [counted(len(nodes), "node"), ranks, driver, *names]
    parts += [f"all-reduce {speed / GB:.2f} GB/s" if speed else None, f"{took_s:.0f} s"]
    return f"preflight: all well: {', '.join(part for part in parts if part)}"


def _on_gpu(run: Run) -> bool:
    return run.cluster.device != "cpu"


def _is_host(place: Place) -> bool:
    """Whether this rank opens the meeting point; torchrun's agent has opened it before it starts ranks."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _meet(run_dir: RunDir, name: str, place: Place) -> Meeting:
    try:
        return Meeting(run_dir.preflight / name, place.rank, nudges=place.local_rank == 0)
    except OSError as error:
        raise _unwritable(run_dir.preflight, place.node, error) from None


def _tell(meeting: Meeting, kind: str, value: dict[str, Any]) -> None:
    try:
        meeting.tell(kind, value)
    except OSError as error:
        raise _unwritable(meeting.folder, str(value.get("node", "this node")), error) from None


def _unwritable(path: Path, node: str, error: OSError) -> EnvironmentNotReady:
    return EnvironmentNotReady(
        f"{node}: {path} cannot be written ({error.strerror}); make room there, or set output_dir to another disk."
    )


def _hear(meeting: Meeting, kind: str, place: Place, deadline: float) -> bool:
    """What rank 0 has decided; where it says nothing, the first of the others speaks."""
    heard = meeting.wait(kind, [0], deadline)
    if heard:
        is_well = bool(heard[0]["is_well"])
    else:
        present = meeting.read("facts", range(place.world_size))
        node = str(present[0]["node"]) if 0 in present else node_of_rank(0, os.environ) or "the node of rank 0"
        if place.rank == min(set(present) - {0}, default=place.rank):
            _say([f"error: {node}: rank 0 did not answer; leave the node out, or look there for what hangs."])
        is_well = False
    if not is_well:
        _leave_with_3()
        time.sleep(2 * WORDS_ARRIVE_S)
    return is_well


def _pronounce(meeting: Meeting, kind: str, problems: Sequence[Problem], num_nodes: int) -> bool:
    """Say what is wrong, and tell the others whether to go on."""
    fatal = [problem for problem in problems if problem.is_fatal]
    _say([f"{'error' if problem.is_fatal else 'warning'}: {problem}" for problem in problems])
    if fatal:
        _say([f"preflight: {counted(len(fatal), 'problem')} on {counted(num_nodes, 'node')}; nothing was trained."])
    _tell(meeting, kind, {"is_well": not fatal, "problems": [str(problem) for problem in problems]})
    if fatal:
        _leave_with_3()
        time.sleep(WORDS_ARRIVE_S)
    return not fatal


def _leave_with_3() -> None:
    """From here on TERM changes nothing: srun and torchrun send it to the others when the first has left."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_ENVIRONMENT))


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
