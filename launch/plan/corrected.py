"""A plan with measured numbers in place of modelled ones, where there are any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launch.plan.choose import Question
from launch.plan.probe import Correction, Probed, kept_probe
from launch.plan.probe_math import modelled_rate
from launch.planner import DataCounts, Plan, make_plan, question_of
from qwen_dist.config import Run
from qwen_dist.hardware import Hardware
from qwen_dist.layout import Layout

Ask = Callable[[Question, Layout], Probed | None]


def corrected_plan(run: Run, hardware: Hardware, counts: DataCounts, ask: Ask = kept_probe) -> Plan:
    """`make_plan`, and made anew with what a probe measured of its layout.

    Args:
        run, hardware, counts: as for `make_plan`.
        ask: what was measured: `kept_probe` looks for it, `run_probe` measures.

    Raises:
        UserError: as `make_plan`, or the probe.
    """
    plan = make_plan(run, hardware, counts)
    question = question_of(run, hardware, counts)
    probed = ask(question, plan.chosen.layout)
    if probed is None:
        return plan
    corrected = make_plan(run, hardware, counts, probed.measured)
    return replace(corrected, correction=Correction(probed, modelled_rate(question, corrected.chosen.layout)))
