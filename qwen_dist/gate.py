"""A run's gate: at its end, the held-out loss is finite, and not above what the run file allows. Pure."""

from __future__ import annotations

import math


def gate_problem(step: int, eval_loss: float, max_loss: float | None) -> str | None:
    """Why a run that has made its last step does not count as done, with what to do about it; None: it does.

    Args:
        step: the last one.
        eval_loss: the held-out loss of its weights.
        max_loss: `evaluation.max_loss`.
    """
    kept = "its checkpoint is kept"
    if not math.isfinite(eval_loss):
        return (
            f"the held-out loss after step {step} is {eval_loss}, and a run's last one must be finite; {kept}, look at "
            "data.eval and at the losses in metrics.jsonl, and train anew under another name, as with a lower optim.lr"
        )
    if max_loss is not None and eval_loss > max_loss:
        return (
            f"the held-out loss after step {step} is {eval_loss:.7g}, above evaluation.max_loss={max_loss:g}; {kept}: "
            "raise evaluation.max_loss and give the same command to go on with it, or train anew under another name"
        )
    return None
