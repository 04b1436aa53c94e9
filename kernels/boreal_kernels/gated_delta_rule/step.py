"""Gated delta rule, one token: decoding.  Shapes: q, k [B, 1, H, K], v, o [B, 1, HV, V], state [B, HV, K, V] FP32.

Gates, norms, state update and output in one launch; nothing is kept for a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.gated_delta_rule.chunks import walk, walk_gates
from boreal_kernels.gated_delta_rule.forward import L2_EPS, LOG2E, sigmoid, softplus


@triton.jit
def normalised_row(x):
    return tl.div_rn(x, tl.sqrt_rn(tl.sum(x * x, axis=0) + L2_EPS))


@triton.jit(do_not_specialize=["HV"])
def gated_delta_rule_step(
    q, k, v, a, b, A_log, dt_bias, initial, o, state,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, a_batch, a_head, b_batch, b_head, scale, HV,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Columns tile*BV .. of one row and value head. FP32 throughout, and no matrix product: each number is used
    once."""
    TILES: tl.constexpr = V // BV
    pid = tl.program_id(0)
    head = pid // TILES % HV
    n = (pid // TILES // HV).to(tl.int64)
    column = tl.arange(0, K)
    value = pid % TILES * BV + tl.arange(0, BV)
    q_row = normalised_row(tl.load(q + n * q_batch + head // R * q_head + column).to(tl.float32)) * scale
    k_row = normalised_row(tl.load(k + n * k_batch + head // R * k_head + column).to(tl.float32))
    v_row = tl.load(v + n * v_batch + head * v_head + value).to(tl.float32)
    raw = tl.load(a + n * a_batch + head * a_head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    g = -tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E) * softplus(raw) * LOG2E
    beta = sigmoid(tl.load(b + n * b_batch + head * b_head).to(tl.float32))
    at = (n * HV + head) * (K * V) + column[:, None] * V + value[None, :]
    if INITIAL:
        S = tl.load(initial + at).to(tl.float32) * tl.exp2(g)
        write = beta * (v_row - tl.sum(S * k_row[:, None], axis=0))
        S += k_row[:, None] * write[None, :]
    else:
        S = k_row[:, None] * (beta * v_row)[None, :]
    tl.store(o + (n * HV + head) * V + value, tl.sum(S * q_row[:, None], axis=0).to(o.dtype.element_ty))
    if STATE:
        tl.store(state + at, S)


def step(
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
    """(o, state); `state` is empty where not asked for."""
    (B, _, H, K), (HV, V) = q.shape, v.shape[2:]
    o = torch.empty(B, 1, HV, V, dtype=v.dtype, device=v.device)
    state = torch.empty((B, HV, K, V) if output_final_state else (0,), dtype=torch.float32, device=v.device)
    walks = []
    for x in (q, k, v):
        x, batch, _, head = walk(x)
        walks.append((x, batch, head))
    (q, *q_walk), (k, *k_walk), (v, *v_walk) = walks
    _, a_batch, _, a_head = walk_gates(a)
    _, b_batch, _, b_head = walk_gates(b)
    use = launch.config("gated_delta_rule.step", K=K, V=V)
    gated_delta_rule_step[(B * HV * (V // use["BV"]),)](
        q, k, v, a, b, A_log.contiguous(), dt_bias.contiguous(),
        o if initial_state is None else initial_state.contiguous(), o, state,
        *q_walk, *k_walk, *v_walk, a_batch, a_head, b_batch, b_head, scale, HV,
        R=HV // H, K=K, V=V, INITIAL=initial_state is not None, STATE=output_final_state, enable_fp_fusion=True, **use,
    )  # fmt: skip
    return o, state
