"""The gated delta rule as torch sees its kernels: custom ops with fake tensors and a gradient."""

import torch
from torch import Tensor

from boreal_kernels.gated_delta_rule.backward import backward
from boreal_kernels.gated_delta_rule.chunks import CHUNK, counts
from boreal_kernels.gated_delta_rule.forward import compute_dtype, forward
from boreal_kernels.gated_delta_rule.step import step


@torch.library.custom_op("boreal::gated_delta_rule", mutates_args=())
def gated_delta_rule_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    output_final_state: bool,
    output_transition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward(
        q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state, scale, output_final_state, output_transition
    )


@gated_delta_rule_chunks.register_fake
def _(q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state, scale, output_final_state, output_transition):
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    N, bound = counts(B, T, cu_seqlens)
    dtype = compute_dtype(q, k, v)
    new = lambda *shape, dtype=torch.float32: q.new_empty(shape, dtype=dtype)  # noqa: E731
    return (
        new(B, T, HV, V, dtype=v.dtype),
        new(N, HV, K, V) if output_final_state else new(0),
        new(N, HV, K, K) if output_transition else new(0),
        new(bound, H, CHUNK, K, dtype=dtype),
        new(bound, H, CHUNK, K, dtype=dtype),
        new(2, B, T, H),
        new(bound, HV, CHUNK, CHUNK, dtype=dtype),
        new(bound, HV, CHUNK),
        new(N, 4, dtype=torch.int32),
        new(bound, 4, dtype=torch.int32),
    )


@torch.library.custom_op("boreal::gated_delta_rule_backward", mutates_args=())
def gated_delta_rule_backward(
    do: Tensor | None,
    d_state: Tensor | None,
    d_transition: Tensor | None,
    qn: Tensor,
    kn: Tensor,
    norms: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None,
    F: Tensor,
    gamma: Tensor,
    spans: Tensor,
    chunks: Tensor,
    scale: float,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(
        do, d_state, d_transition, qn, kn, norms, v, a, b, A_log, dt_bias, initial_state, F, gamma, spans, chunks,
        scale, (q_dtype, k_dtype),
    )  # fmt: skip


@gated_delta_rule_backward.register_fake
def _(
    do, d_state, d_transition, qn, kn, norms, v, a, b, A_log, dt_bias, initial_state, F, gamma, spans, chunks, scale,
    q_dtype, k_dtype,
):  # fmt: skip
    shape = (*v.shape[:2], qn.shape[1], qn.shape[3])
    return (
        qn.new_empty(shape, dtype=q_dtype),
        kn.new_empty(shape, dtype=k_dtype),
        v.new_empty(v.shape),
        *(x.new_empty(x.shape) for x in (a, b, A_log, dt_bias)),
        qn.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


def _setup(ctx, inputs, output):
    q, k, v, a, b, A_log, dt_bias, _, initial_state, ctx.scale, ctx.final_state, ctx.transition = inputs
    ctx.dtypes = q.dtype, k.dtype
    ctx.save_for_backward(*output[3:6], v, a, b, A_log, dt_bias, initial_state, *output[6:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, d_state, d_transition, *_):
    initial_state = ctx.saved_tensors[8]
    d_state = d_state if ctx.final_state else None
    d_transition = d_transition if ctx.transition else None
    if do is None and d_state is None and d_transition is None:
        return (None,) * 12
    *grads, d_initial = gated_delta_rule_backward(
        do, d_state, d_transition, *ctx.saved_tensors, ctx.scale, *ctx.dtypes
    )
    return *grads, None, None if initial_state is None else d_initial, None, None, None


gated_delta_rule_chunks.register_autograd(_gradient, setup_context=_setup)


@torch.library.custom_op("boreal::gated_delta_rule_step", mutates_args=())
def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    return step(q, k, v, a, b, A_log, dt_bias, initial_state, scale, output_final_state)


@gated_delta_rule_step.register_fake
def _(q, k, v, a, b, A_log, dt_bias, initial_state, scale, output_final_state):
    (B, _, H, K), (HV, V) = q.shape, v.shape[2:]
    state = q.new_empty((B, HV, K, V) if output_final_state else (0,), dtype=torch.float32)
    return v.new_empty(B, 1, HV, V), state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    output_transition: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See the package's docstring. One token of every row is one step, where no gradient is wanted."""
    inputs = (q, k, v, a, b, A_log, dt_bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, initial_state))
    if q.shape[1] == 1 and cu_seqlens is None and not output_transition and not wanted:
        o, state = gated_delta_rule_step(*inputs, initial_state, scale, output_final_state)
        return o, state if output_final_state else None, None
    o, state, transition, *_ = gated_delta_rule_chunks(
        *inputs, cu_seqlens, initial_state, scale, output_final_state, output_transition
    )
    return o, state if output_final_state else None, transition if output_transition else None
