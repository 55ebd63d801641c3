"""loss.png: the loss of every step, the held-out loss, and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, TRAIN, HELD_OUT, FAINT = "#1f2933", "#2563eb", "#d97706", "#cbd5e1"


def draw_loss(entries: list[dict[str, Any]], name: str, path: Path) -> None:
    """Draw the curve of a run from the objects of its metrics.jsonl.

    Args:
        entries: objects of metrics.jsonl; must hold at least one step.
        name: the run's name, the title.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [entry for entry in entries if "loss" in entry]
    held_out = [entry for entry in entries if "eval_loss" in entry]
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss.plot([e["step"] for e in steps], [e["loss"] for e in steps], color=TRAIN, linewidth=1.4, label="training")
    if held_out:
        points = [e["step"] for e in held_out], [e["eval_loss"] for e in held_out]
        loss.plot(*points, color=HELD_OUT, marker="o", markersize=3.5, linewidth=1.2, label="held out")
    loss.set_title(name, loc="left", color=INK, fontsize=12, fontweight="bold")
    loss.set_ylabel("loss per trained token (nats)", color=INK)
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, loc="upper right")
    rate.plot([e["step"] for e in steps], [e["lr"] for e in steps], color=INK, linewidth=1)
    rate.set_ylabel("lr", color=INK)
    rate.set_xlabel("optimizer step", color=INK)
    rate.set_ylim(bottom=0)
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
    partial = path.with_name(f".{path.name}.incomplete.png")
    figure.savefig(partial)
    partial.replace(path)
