"""gated_delta_rule: the linear attention of Gated DeltaNet.  Shapes: q, k [B, T, H, K], v, o [B, T, HV, V]."""

import torch
from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.gated_delta_rule import reference
from boreal_kernels.shapes import expect_dims, expect_kernel_dtypes, expect_one_of, expect_shape, sequences

HEAD_DIMS = (64, 128)  # that the kernels take, of keys and of values


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    output_transition: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gated delta rule, from the convolution's output to the input of the output norm. Per value head:

        q <- scale * q / sqrt(|q|^2 + 1e-6)     k <- k / sqrt(|k|^2 + 1e-6)
        alpha = exp(-exp(A_log) * softplus(a + dt_bias))     beta = sigmoid(b)
        S_t = alpha_t S_{t-1} + k_t (beta_t (v_t - alpha_t S_{t-1}^T k_t))^T     o_t = S_t^T q_t

    q, k [B, T, H, K], not normalised; v [B, T, HV, V]; a, b [B, T, HV]; A_log, dt_bias [HV]. HV is a multiple of H and
    value head j reads key head j // (HV/H). cu_seqlens [N+1] integers for packed documents (then B must be 1), else
    N = B. initial_state [N, HV, K, V], zeros if None; scale defaults to K^-0.5.

    Returns (o, state, transition):
        o           [B, T, HV, V] in v.dtype
        state       [N, HV, K, V] FP32, each sequence's last state, if output_final_state, else None
        transition  [N, HV, K, K] FP32, Phi in S_end = Phi S_begin + S_end_from_zero, if output_transition, else None;
                    it composes the sequence's pieces across context-parallel ranks

    Plain torch computes in FP32 (float64 if any input is). The kernels multiply matrices in bf16 with FP32 sums where
    q, k and v are all bf16, else in FP32; gates, norms and the running state are FP32 either way. Differentiable in
    every floating tensor. Raises ValueError for shapes that do not fit.

    The kernels check the values of cu_seqlens (from 0, not decreasing, up to T) only where it lies on the CPU: on a
    device a check would stall the host every layer. There a wrong one leaves outputs undefined, but no memory
    outside of the tensors is touched. Source: Gated DeltaNet (arXiv 2412.06464).
    """
    op = "gated_delta_rule"
    expect_dims(op, "q", q, "[B, T, H, K]", 4)
    expect_dims(op, "v", v, "[B, T, HV, V]", 4)
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    backend = resolve(backend, op, device=q.device, head_dim=K)
    expect_shape(op, "k", k, "[B, T, H, K]", (B, T, H, K))
    expect_shape(op, "v", v, "[B, T, HV, V]", (B, T, HV, V))
    if HV % H:
        raise ValueError(f"{op}: found HV = {HV} value heads over H = {H} key heads, expected HV a multiple of H")
    for name, tensor in (("a", a), ("b", b)):
        expect_shape(op, name, tensor, "[B, T, HV]", (B, T, HV))
    for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
        expect_shape(op, name, tensor, "[HV]", (HV,))
    N = sequences(op, B, cu_seqlens)
    if initial_state is not None:
        expect_shape(op, "initial_state", initial_state, "[N, HV, K, V]", (N, HV, K, V))
    inputs = (q, k, v, a, b, A_log, dt_bias)
    options = dict(
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        output_transition=output_transition,
    )
    if backend == "triton":
        names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
        expect_kernel_dtypes(op, **dict(zip(names, inputs, strict=True)), initial_state=initial_state)
        expect_one_of(op, "K", K, HEAD_DIMS)
        expect_one_of(op, "V", V, HEAD_DIMS)
        for name, tensor in (*zip(names, inputs, strict=True), *options.items()):
            if isinstance(tensor, Tensor) and tensor.device != q.device:
                raise ValueError(f"{op}: {name}: found device {tensor.device}, expected that of q, {q.device}")
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            _expect_bounds(op, cu_seqlens, T)
        from boreal_kernels.gated_delta_rule import fused

        return fused.gated_delta_rule(*inputs, **options, scale=float(K**-0.5 if scale is None else scale))

    if backend != "torch":
        from boreal_kernels.gated_delta_rule import foreign

        return getattr(foreign, backend)(*inputs, **options, scale=scale)

    # One token (decoding) is one step of the recurrence; a chunk would be padding but for one row.
    rule = reference.recurrent if T == 1 else reference.chunked
    return rule(*inputs, **options, scale=scale)


def _expect_bounds(op: str, cu_seqlens: Tensor, T: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
        raise ValueError(f"{op}: cu_seqlens: found {bounds[:8]}, expected 0 .. T = {T}, not decreasing")
