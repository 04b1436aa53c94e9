"""gated_rmsnorm: the output norm of Gated DeltaNet, weight * rmsnorm(x) * act(gate).  Shapes: [.., D]."""

from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.gated_rmsnorm import reference
from boreal_kernels.shapes import expect_kernel_dtypes, expect_one_of, expect_shape

ACTIVATIONS = ("silu", "sigmoid")


def gated_rmsnorm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, activation: str, backend: str = "auto"
) -> Tensor:
    """weight * x/sqrt(mean(x^2) + eps) * act(gate), norm over the last dim, all of it in FP32.

    x, gate [.., D]; weight [D], shared over everything but D; activation "silu" or "sigmoid".
    Returns [.., D] in x.dtype. Differentiable in x, gate and weight. Raises ValueError for shapes or names that do not
    fit. Source: Gated DeltaNet (arXiv 2412.06464), output gate; "sigmoid" as in Kimi Linear (arXiv 2510.26692).
    """
    op = "gated_rmsnorm"
    backend = resolve(backend, op, device=x.device)
    expect_one_of(op, "activation", activation, ACTIVATIONS)
    if not eps > 0:
        raise ValueError(f"{op}: eps: found {eps}, expected a number above 0")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x: found shape {list(x.shape)}, expected [.., D] with D >= 1")
    expect_shape(op, "gate", gate, "[.., D]", x.shape)
    expect_shape(op, "weight", weight, "[D]", x.shape[-1:])
    if backend == "triton":
        expect_kernel_dtypes(op, x=x, gate=gate, weight=weight)
        from boreal_kernels.gated_rmsnorm import fused

        return fused.gated_rmsnorm(x, gate, weight, eps, activation)
    return reference.gated_rmsnorm(x, gate, weight, eps=eps, activation=activation)
