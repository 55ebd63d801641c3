"""RMSNorm and SwiGLU that keep less for backward, and liger-kernel's fused ones where they compute.

transformers' own (5.23) keep each norm's input in fp32, its normalised copy where the weight is trained, and SiLU of
the gate beside the gate. What is here keeps the inputs as they came and makes the rest anew in backward: element by
element, without a product. Values are the same bit for bit. Of Qwen3-14B's 283 kB a token and layer it saves 68 (LoRA)
or 100 (full); liger's keep the same tensors.

Legend: ... any dimensions, H of a norm, I of an MLP.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn.functional import silu

from qwen_dist.backends import choose_kernels, installed_packages
from qwen_dist.config import Model


class _Norm(torch.autograd.Function):
    """Weight x (input / its root mean square), the quotient in fp32 and then rounded, as Qwen's norm is defined."""

    @staticmethod
    def forward(ctx: Any, input_H: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        exact_H = input_H.float()
        rms_inverse = torch.rsqrt(exact_H.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(input_H, weight_H, rms_inverse)
        return weight_H * (exact_H * rms_inverse).to(input_H.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad_H,) = grad_outputs
        input_H, weight_H, rms_inverse = ctx.saved_tensors
        normed_H = input_H.float() * rms_inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_H * normed_H.to(input_H.dtype)).sum_to_size(weight_H.shape)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad_normed_H = (grad_H * weight_H).float()
        mean = (grad_normed_H * normed_H).mean(-1, keepdim=True)
        return normed_H.mul_(-mean).add_(grad_normed_H).mul_(rms_inverse).to(input_H.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """SiLU(gate) x up."""

    @staticmethod
    def forward(ctx: Any, gate_I: torch.Tensor, up_I: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_I, up_I)
        return silu(gate_I).mul_(up_I)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad_I,) = grad_outputs
        gate_I, up_I = ctx.saved_tensors
        grad_up_I, grad_gate_I = silu(gate_I).mul_(grad_I), grad_I * up_I
        torch.ops.aten.silu_backward.grad_input(grad_gate_I, gate_I, grad_input=grad_gate_I)
        return grad_gate_I, grad_up_I


def norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Forward of a Qwen RMSNorm."""
    normed: torch.Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)
    return normed


def mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward of a Qwen MLP."""
    product: torch.Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
    return product


def kernels_in_force(settings: Model, model_type: str, device: str) -> tuple[str, str]:
    """Whose kernels compute on this machine, `("liger" | "torch", reason)`.

    Args:
        settings: the run's.
        model_type: of the model's config.json.
        device: "cuda" or "cpu".

    Raises:
        EnvironmentNotReady: liger was asked for and cannot run here.
    """
    return choose_kernels(settings.kernels, device, model_type, installed_packages())


def use_kernels(model: torch.nn.Module, settings: Model, device: str) -> tuple[str, str]:
    """Let a causal language model of transformers, not yet wrapped, compute with liger's kernels or ours.

    Args, returns and raises as `kernels_in_force`.
    """
    model_type = str(model.config.model_type)
    which, reason = kernels_in_force(settings, model_type, device)
    if which == "liger":
        use_liger(model, model_type)
    else:
        use_lean(model)
    return which, reason


def use_lean(model: torch.nn.Module) -> None:
    """Let a model's norms and dense MLPs keep no more than their inputs; experts stay as they are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm_forward, module)  # type: ignore[method-assign]
        elif type(module).__name__.endswith("MLP") and module.config.hidden_act in ("silu", "swish"):
            module.forward = types.MethodType(mlp_forward, module)  # type: ignore[method-assign]


def use_liger(model: torch.nn.Module, model_type: str) -> None:
    """Let a model compute with liger's RMSNorm, RoPE and SwiGLU; the loss stays ours, and so do experts."""
    from liger_kernel.transformers import monkey_patch

    apply: Any = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    # transformers runs experts as grouped products; liger's would also fail at a dense layer among them (0.8.5).
    has_experts = model_type.endswith("_moe")
    apply(
        rope=True,
        rms_norm=True,
        swiglu=not has_experts,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
