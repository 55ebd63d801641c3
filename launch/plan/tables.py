"""What `qwen-dist plan` shows besides the plan itself: memory by part, other layouts, other numbers of GPUs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from launch.plan.choose import needed_bytes
from launch.plan.scaling import Scaled
from launch.planner import Plan
from launch.show import GB, hours, layout_name
from launch.zero import Setting
from qwen_dist.memory import Parts

WIDE = 80  # columns from which tables have all their columns
MOMENTS = ("load", "rest", "loss", "backward", "update", "save")
HOST_MOMENTS = ("load", "train", "save", "export")


def columns() -> int:
    """The terminal's width, or what COLUMNS says; 80 where there is neither."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def details_text(plan: Plan, width: int) -> str:
    """Memory of a GPU and of a machine by part and moment, and the layouts that were looked at; on CPU nothing."""
    memory, hardware = plan.chosen.memory, plan.hardware
    if hardware.gpu is None:
        return ""
    own = memory_text(f"GB of {hardware.gpu.memory_bytes / GB:.1f} a GPU", memory.gpu, MOMENTS)
    host = memory_text(f"GB of {hardware.host_memory_bytes / GB:,.0f} a machine", memory.hosts, HOST_MOMENTS)
    return "\n\n".join([own, host, layouts_text(plan, width)])


def memory_text(title: str, moments: Mapping[str, Parts], names: Sequence[str]) -> str:
    """GB by part, a column each moment; parts that never hold anything are left out."""
    parts = {name: [getattr(moments[moment], name) for moment in names] for name in vars(moments[names[0]])}
    rows = [(name, *map(_gb, values)) for name, values in parts.items() if any(values)]
    total = ("all", *(_gb(moments[moment].total) for moment in names))
    return table([(title, *names), *rows, total])


def layouts_text(plan: Plan, width: int) -> str:
    """The chosen layout and the others, each with what it needs and why it was not taken."""
    is_wide, layers = width >= WIDE, plan.shape.num_layers
    rows = [("layout", *(("recomputed", "packs", "GB") if is_wide else ()), "s/step", "")]
    chosen = (plan.chosen, "chosen")
    for option, remark in (chosen, *((option, option.reason) for option in plan.choice.alternatives)):
        layout, row = option.layout, [layout_name(option.layout)]
        if is_wide:
            recomputed = f"{layout.recomputed_layers}/{layers}"
            row += [recomputed, str(layout.packs_per_micro_batch), _gb(needed_bytes(plan.hardware, option.memory))]
        rows.append((*row, f"{option.time.total_s:,.1f}" if option.time else "", remark))
    return table(rows, is_last_text=True)


def scaling_text(plan: Plan, rows: Sequence[Scaled], width: int) -> str:
    """The same run on other numbers of GPUs, a line each."""
    wanted = ["GPUs", "packs/step", "s/step", "tokens/s", "hours", "GPU-hours", "layout"]
    if width < WIDE:
        wanted = ["GPUs", "packs/step", "s/step", "hours", "layout"]
    found = [tuple(wanted)]
    for row in rows:
        cells = _scaled_cells(row)
        found.append(tuple(cells[name] for name in wanted))
    text = table(found, is_last_text=True)
    if all(row.is_as_asked for row in rows):
        return text
    asked = plan.run.batch.packs_per_step
    note = f"* more than batch.packs_per_step={asked}, which does not divide over so many GPUs: another optimization."
    return "\n".join([text, *textwrap.wrap(note, width)])


def _scaled_cells(row: Scaled) -> dict[str, str]:
    """Column -> cell."""
    gpus, time = row.hardware.world_size, row.option.time
    cells = {"GPUs": f"{gpus:,}", "packs/step": f"{row.packs_per_step:,}{'' if row.is_as_asked else '*'}"}
    cells |= dict.fromkeys(("s/step", "tokens/s", "hours", "GPU-hours"), "")
    cells["layout"] = row.option.needs or layout_name(row.option.layout)
    if row.hours is not None and time is not None:
        cells |= {"s/step": f"{time.total_s:,.1f}", "tokens/s": f"{time.tokens_per_gpu_s * gpus:,.0f}"}
        cells |= {"hours": hours(row.hours), "GPU-hours": hours(row.hours * gpus)}
    return cells


def explained_text(settings: Iterable[Setting], width: int) -> str:
    """Every DeepSpeed value, its reason below it."""
    lines: list[str] = []
    for setting in settings:
        value = str(setting.value).lower() if isinstance(setting.value, bool) else str(setting.value)
        lines.append(f"{setting.key} = {value}")
        lines += textwrap.wrap(setting.reason, max(20, width), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, ...]], is_last_text: bool = False) -> str:
    """Rows of equal length as aligned columns: the first is text, the others numbers, the last one maybe text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(_aligned(row, widths, is_last_text)).rstrip() for row in rows)


def _aligned(row: tuple[str, ...], widths: Sequence[int], is_last_text: bool) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        is_text = column == 0 or (is_last_text and column == len(row) - 1)
        yield f"{cell:<{width}}" if is_text else f"{cell:>{width}}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.1f}" if num_bytes else "-"
