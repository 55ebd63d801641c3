"""Is a gradient the one that it must be? Pure: numbers in, a sentence out where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qwen_dist.errors import counted

# Largest |difference| / |expected| of a parameter's gradient. fp32: 2e-6 on CPU; kernels sum in other orders. bf16: 8
# bits, 0.4 % an operation: after two layers 1 to 3 % with heads of 128, up to 10 % with heads of 8. Samples that see
# each other move gradients by their own size, a wrong scale by half or more.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
# The same of the loss, whose rounding evens out over the tokens.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.01}
# A wrong scale is a factor: the same in every parameter, but for rounding.
SAME_FACTOR = 0.1


@dataclass(frozen=True)
class Compared:
    """One parameter's gradient beside what it must be.

    Attributes:
        difference: norm of the difference, as a share of the expected norm.
        scale: the factor that brings the expected gradient nearest to the one that was found.
    """

    name: str
    difference: float
    scale: float


@dataclass(frozen=True)
class Setting:
    """How the tested step was spread, and by which versions."""

    accumulation: int
    packs_at_once: int
    world_size: int
    zero_stage: int
    attention: str
    versions: str
    sequence: int = 1


@dataclass(frozen=True)
class Found:
    """What the engine computed beside what it must: of each trained parameter, of the loss, of the gradient's norm.

    Attributes:
        loss: of the engine and of plain torch.
        grad_norm: as well.
    """

    parameters: Sequence[Compared]
    loss: tuple[float, float]
    grad_norm: tuple[float, float]

    @property
    def worst(self) -> Compared:
        """The parameter that is furthest off; NaN is the furthest."""
        return max(self.parameters, key=lambda compared: (not compared.difference >= 0, compared.difference))


def problem(found: Found, precision: str, setting: Setting) -> str | None:
    """What is wrong, as a sentence without its end; None where everything lies within the tolerance."""
    tolerance = TOLERANCE[precision]
    wrong = [compared for compared in found.parameters if not compared.difference <= tolerance]
    loss_is_wrong = not _relative(found.loss) <= LOSS_TOLERANCE[precision]
    told = []
    if loss_is_wrong:
        told.append(f"the loss is {found.loss[0]:.6g} and must be {found.loss[1]:.6g}")
    if wrong:
        told.append(_of_gradients(wrong, len(found.parameters), loss_is_wrong, setting))
    elif not _relative(found.grad_norm) <= tolerance:
        ours, expected = found.grad_norm
        told.append(f"the norm that clips gradients is {ours:.4g} and must be {expected:.4g}")
    return "; ".join(told) if told else None


def _of_gradients(wrong: Sequence[Compared], num_parameters: int, loss_is_wrong: bool, setting: Setting) -> str:
    scale = median(compared.scale for compared in wrong)
    is_factor = all(abs(compared.scale - scale) <= SAME_FACTOR * abs(scale) for compared in wrong)
    if len(wrong) == num_parameters and is_factor and not loss_is_wrong:
        return f"gradients are {scale:.3g} of what they must be{_cause(scale, setting)}"
    worst = Found(wrong, (1, 1), (1, 1)).worst
    cause = f": samples of a pack see each other, with attention {setting.attention}" if loss_is_wrong else ""
    return (
        f"gradients of {len(wrong)} of {counted(num_parameters, 'parameter')} differ, most that of {worst.name} "
        f"by {100 * worst.difference:.3g} % (its scale is {worst.scale:.3g}){cause}"
    )


def _cause(scale: float, setting: Setting) -> str:
    """Which number of the setting the factor is, where it is one."""
    parts = {
        "accumulation": setting.accumulation,
        "the number of processes": setting.world_size,
        "parallel.sequence": setting.sequence,
    }
    for verb, factor in (("divides by", 1 / scale), ("multiplies by", scale)):
        for name, number in parts.items():
            if number > 1 and abs(factor - number) <= SAME_FACTOR * number:
                return f": DeepSpeed {verb} {name}, {number}"
    return ""


def _relative(pair: tuple[float, float]) -> float:
    ours, expected = pair
    return abs(ours - expected) / abs(expected)
