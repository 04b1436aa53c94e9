"""causal_conv1d: the short depthwise convolution before Gated DeltaNet.  Shapes: x [B, T, C], weight [C, W]."""

from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.causal_conv1d import reference
from boreal_kernels.shapes import expect_dims, expect_kernel_dtypes, expect_one_of, expect_shape, sequences

ACTIVATIONS = ("silu", None)
KERNEL_WIDTHS = (2, 3, 4)  # W


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    split: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
    """y_t = act(sum_w weight[:, w] * x_{t-W+1+w}), per channel, no bias; sums in FP32.

    x [B, T, C], or [B, T, G, c] with the C = G*c channels in G groups, for example a slice of a fused projection;
    weight [C, W]; cu_seqlens [N+1] integers for packed documents (then B must be 1), else N = B.
    initial_state [N, C, W-1]: the inputs before each sequence, oldest first; zeros if None.
    split: sizes that add up to c. The channels of each group are cut into consecutive parts of these sizes.
    Returns y in x's shape and dtype, contiguous, or with `split` the tuple of its parts [B, T, G, split[i]], each
    contiguous; and, if output_final_state, the last W-1 inputs of each sequence [N, C, W-1] in x.dtype (a sequence
    shorter than W-1 keeps the end of its initial state), else None.
    Differentiable in x, weight and initial_state. Raises ValueError for shapes or names that do not fit.
    Source: Gated DeltaNet (arXiv 2412.06464), short convolution.
    """
    op = "causal_conv1d"
    backend = resolve(backend, op, device=x.device)
    expect_one_of(op, "activation", activation, ACTIVATIONS)
    if x.dim() == 4:
        expect_dims(op, "x", x, "[B, T, G, c]", 4)
    else:
        expect_dims(op, "x", x, "[B, T, C] or [B, T, G, c]", 3)
    expect_dims(op, "weight", weight, "[C, W]", 2)
    C, W = x[0, 0].numel(), weight.shape[1]
    expect_shape(op, "weight", weight, "[C, W]", (C, W))
    N = sequences(op, x.shape[0], cu_seqlens)
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, "[N, C, W-1]", (N, C, W - 1))
    if split is not None and (x.dim() != 4 or min(split, default=0) < 1 or sum(split) != x.shape[-1]):
        raise ValueError(
            f"{op}: split: found {tuple(split)} with x {list(x.shape)}, expected x [B, T, G, c] and positive sizes "
            "that add up to c"
        )
    options = dict(
        activation=activation,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        split=split,
    )
    if backend == "torch":
        return reference.causal_conv1d(x, weight, **options)
    expect_kernel_dtypes(op, x=x, weight=weight, initial_state=initial_state)
    if W not in KERNEL_WIDTHS:
        raise ValueError(f"{op}: weight: found W = {W}, expected one of {KERNEL_WIDTHS}; backend='torch' takes any")
    from boreal_kernels.causal_conv1d import fused

    return fused.apply(x, weight, **options)
