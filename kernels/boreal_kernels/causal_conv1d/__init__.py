"""causal_conv1d: the short depthwise convolution before Gated DeltaNet.  Shapes: x [B, T, C], weight [C, W]."""

from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.causal_conv1d import reference
from boreal_kernels.shapes import expect_dims, expect_one_of, expect_shape, sequences

ACTIVATIONS = ("silu", None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y_t = act(sum_w weight[:, w] * x_{t-W+1+w}), per channel, no bias; sums in FP32.

    x [B, T, C]; weight [C, W]; cu_seqlens [N+1] integers for packed documents (then B must be 1), else N = B.
    initial_state [N, C, W-1]: the inputs before each sequence, oldest first; zeros if None.
    Returns y [B, T, C] in x.dtype and, if output_final_state, the last W-1 inputs of each sequence [N, C, W-1] in
    x.dtype (a sequence shorter than W-1 keeps the end of its initial state), else None.
    Differentiable in x, weight and initial_state. Raises ValueError for shapes or names that do not fit.
    Source: Gated DeltaNet (arXiv 2412.06464), short convolution.
    """
    op = "causal_conv1d"
    resolve(backend, op, device=x.device)
    expect_one_of(op, "activation", activation, ACTIVATIONS)
    expect_dims(op, "x", x, "[B, T, C]", 3)
    expect_dims(op, "weight", weight, "[C, W]", 2)
    B, T, C = x.shape
    W = weight.shape[1]
    expect_shape(op, "weight", weight, "[C, W]", (C, W))
    N = sequences(op, B, cu_seqlens)
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, "[N, C, W-1]", (N, C, W - 1))
    return reference.causal_conv1d(
        x,
        weight,
        activation=activation,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )
