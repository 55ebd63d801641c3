"""Whether a run hangs, and who holds it up: decided from what every rank wrote about itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_dist.train.faults.place import END, START_UP, Place

# No phase between two notes of a place is as long as 10 usual steps.
USUAL_STEPS = 10
# torch's own NCCL monitor ends a process after 8 minutes, and process groups that DeepSpeed makes wait for 10 (torch
# 2.13, deepspeed 0.19.8): we come first, with a better message.
MAX_BOUND_S = 420.0
# So many times the floor are given to what takes long once: the loading of a model, the first step, which compiles, and
# a save, whose fsync waits for a whole checkpoint, or for a file system's other server to take over.
LONG_FACTOR = 5
# A process that lives tells of itself fifteen times within the bound.
SILENT_SHARE = 0.5
MAX_SAMPLES, MAX_RANKS = 8, 8


@dataclass(frozen=True)
class Seen:
    """What a rank has told.

    Attributes:
        place: where it was.
        host: its machine.
        idle_s: seconds since it last went on, by now.
        silent_s: seconds since it last told of itself.
    """

    place: Place
    host: str
    idle_s: float
    silent_s: float


@dataclass(frozen=True)
class Blame:
    """Why a run does not go on.

    Attributes:
        kind: "ended": ranks have left; "silent": their processes are stopped, dead or cut off; "behind": they live, and
            have not come as far as others; "apart": all live, and are at the same place.
        ranks: those that hold it up, in order; of "apart" all.
    """

    kind: Literal["ended", "silent", "behind", "apart"]
    ranks: tuple[int, ...]


def bound_s(floor_s: float, step_times_s: Sequence[float]) -> float:
    """Seconds without progress that are too many.

    Args:
        floor_s: faults.hang_timeout_s.
        step_times_s: of the last steps of this attempt; none: the first one is under way.
    """
    if not step_times_s:
        return long_s(floor_s)
    usual_s = sorted(step_times_s)[len(step_times_s) // 2]
    return max(floor_s, min(USUAL_STEPS * usual_s, MAX_BOUND_S))


def long_s(floor_s: float) -> float:
    """Seconds without progress that are too many where all ranks live, but are at something long."""
    return LONG_FACTOR * floor_s


def left_s(seen: Mapping[int, Seen], bound_s: float, long_s: float) -> float:
    """Seconds until no rank has gone on for too long, should none go on; 0 or less: the run hangs.

    One rank that goes on is enough: the others may wait for its save, or its share of an evaluation. Before the first
    step there is no progress to see: there a rank counts while it tells of itself.
    """
    silent_s = max(rank.silent_s for rank in seen.values())
    phases = {rank.place.phase for rank in seen.values()}
    if START_UP in phases:
        return long_s - silent_s
    is_long = "save" in phases and silent_s <= SILENT_SHARE * bound_s
    return (max(bound_s, long_s) if is_long else bound_s) - min(rank.idle_s for rank in seen.values())


def blame(seen: Mapping[int, Seen], world_size: int, bound_s: float) -> Blame:
    """Who holds up a run that hangs.

    Args:
        seen: by rank, those that ever told of themselves; the one that asks is among them.
        world_size: number of ranks.
        bound_s: the bound that was exceeded.
    """
    if ended := [rank for rank, found in seen.items() if found.place.phase == END]:
        return Blame("ended", tuple(sorted(ended)))
    never = set(range(world_size)) - seen.keys()
    if silent := never | {rank for rank, found in seen.items() if found.silent_s > SILENT_SHARE * bound_s}:
        return Blame("silent", tuple(sorted(silent)))
    first = min(found.place.order for found in seen.values())
    behind = tuple(sorted(rank for rank, found in seen.items() if found.place.order == first))
    return Blame("apart" if 1 < world_size == len(behind) else "behind", behind)


def sentence(blame: Blame, seen: Mapping[int, Seen], bound_s: float, samples: Sequence[int] | None) -> str:
    """The one line that a user gets.

    Args:
        blame: who.
        seen: what every rank has told.
        bound_s: the bound that was exceeded.
        samples: the numbers of the samples in the last micro-batch of the first rank to blame.
    """
    first = blame.ranks[0]
    found = seen.get(first)
    names = _names(blame.ranks, seen)
    where = f"{found.place}{_samples(samples)}" if found else "nothing at all"
    others = max((other.place for rank, other in seen.items() if rank not in blame.ranks), key=_order, default=None)
    wait = f"; others wait at {others}" if others else ""
    since = f" for {found.silent_s:.0f} s" if found else ""
    what = {
        "ended": f"{names} ended in {where}, and said why",
        "silent": f"nothing was heard of {names}{since} (stopped, dead or cut off), last of {where}",
        "behind": f"{names} came no further than {where}",
        "apart": f"all ranks live and wait for each other at {where}; look at the network between them",
    }[blame.kind]
    return f"No rank made progress for {bound_s:.0f} s: {what}{wait}."


def lost_sentence(gone: Sequence[int], seen: Mapping[int, Seen]) -> str:
    """The one line where a collective has failed because ranks are gone."""
    one = len(gone) == 1
    why = (
        f"killed, as the system does when memory runs out, or {'its machine is' if one else 'their machines are'} lost"
    )
    names = _names(gone, seen)
    return f"{names[0].upper()}{names[1:]} {'is' if one else 'are'} gone ({why}), last of {seen[gone[0]].place}."


def _order(place: Place) -> tuple[int, ...]:
    return place.order


def _names(ranks: Sequence[int], seen: Mapping[int, Seen]) -> str:
    told = [f"{rank} ({seen[rank].host})" if rank in seen else str(rank) for rank in ranks[:MAX_RANKS]]
    more = f" and {len(ranks) - MAX_RANKS} more" if len(ranks) > MAX_RANKS else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(told)}{more}"


def _samples(samples: Sequence[int] | None) -> str:
    if samples is None or len(samples) == 0:
        return ""
    more = f" and {len(samples) - MAX_SAMPLES} more" if len(samples) > MAX_SAMPLES else ""
    word = "sample" if len(samples) == 1 else "samples"
    return f" ({word} {', '.join(str(number) for number in samples[:MAX_SAMPLES])}{more})"
