"""Whether a run may start with the weights that another one has trained. Pure."""

from __future__ import annotations

from qwen_dist.config import Run

# Of adapters, what decides which weights they are, and what these mean beside the base.
OF_ADAPTERS = ("kind", "rank", "alpha", "rslora", "dora", "init", "targets")
OF_MODEL = ("path", "revision")


def misfit(then: Run, now: Run) -> tuple[str, str] | None:
    """Why `now` cannot start with the weights of `then`: the key that differs and a sentence about it, or None.

    Where every weight is trained the checkpoint has all of them; adapters mean nothing without the base and the
    settings that they were trained with.
    """
    if then.method.has_adapters != now.method.has_adapters:
        return "method.kind", (
            f"is {now.method.kind}, and what it starts from was trained with {then.method.kind}; make them the same, "
            "or export that run and set model.path of a run file of its own to the export"
        )
    if not now.method.has_adapters:
        return None
    pairs = [(f"model.{key}", getattr(then.model, key), getattr(now.model, key)) for key in OF_MODEL]
    pairs += [(f"method.{key}", getattr(then.method, key), getattr(now.method, key)) for key in OF_ADAPTERS]
    for key, before, after in pairs:
        if before != after:
            return key, (
                f"is {_shown(after)}, and what it starts from was trained with {_shown(before)}; adapters go on as "
                "they were made: make them the same"
            )
    return None


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else "unset" if value is None else str(value)
