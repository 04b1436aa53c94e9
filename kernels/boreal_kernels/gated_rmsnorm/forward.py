"""Gated RMSNorm, forward: each program normalises ROWS rows.  Shapes: x, gate, y [rows, D], weight [D]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.shapes import strided_rows


@triton.jit
def row_offsets(row, group, outer, inner):
    """Element at which a row begins; see `shapes.strided_rows`. 64 bits: a row may begin beyond 2^31."""
    return (row // group).to(tl.int64) * outer + (row % group).to(tl.int64) * inner


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """act(gate) and act'(gate), FP32."""
    s = 1.0 / (1.0 + tl.exp(-gate))
    if SILU:
        return gate * s, s * (1.0 + gate * (1.0 - s))
    else:
        return s, s * (1.0 - s)


@triton.jit(do_not_specialize=["rows"])
def gated_rmsnorm_forward(
    x, gate, weight, y, rows, x_group, x_outer, x_inner, g_group, g_outer, g_inner, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at_x = row_offsets(row, x_group, x_outer, x_inner)[:, None] + column[None, :]
    at_gate = row_offsets(row, g_group, g_outer, g_inner)[:, None] + column[None, :]
    value = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    opened, _ = activate(tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32), SILU)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + eps)
    out = value * rstd[:, None] * scale[None, :] * opened
    at_y = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(y + at_y, out.to(y.dtype.element_ty), mask=inside)


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """y [.., D], contiguous, in x.dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    D = x.shape[-1]
    rows = x.numel() // D
    if rows == 0:
        return y
    x, *x_walk = strided_rows(x)
    gate, *gate_walk = strided_rows(gate)
    use = launch.config("gated_rmsnorm.forward", D=D)
    gated_rmsnorm_forward[(triton.cdiv(rows, use["ROWS"]),)](
        x, gate, weight.contiguous(), y, rows, *x_walk, *gate_walk, eps,
        D=D, WIDTH=triton.next_power_of_2(D), SILU=activation == "silu", enable_fp_fusion=True, **use,
    )  # fmt: skip
    return y
