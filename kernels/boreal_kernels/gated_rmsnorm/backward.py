"""Gated RMSNorm, backward.  Shapes: x, gate, dy [rows, D], weight [D].

With n = x rstd and a = act(gate):

    dgate = dy w n act'(gate)       dn = dy w a       dx = rstd (dn - n mean(dn n))       dw = sum over rows of dy n a

A fixed number of programs share the rows, each in order, and leave one partial sum of dw; their sum is taken last. So
the order of summation is a function of the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.gated_rmsnorm.forward import activate, row_offsets
from boreal_kernels.shapes import strided_rows


@triton.jit(do_not_specialize=["rows", "blocks"])
def gated_rmsnorm_backward(
    x, gate, weight, dy, dx, dgate, partial, rows, blocks,
    x_group, x_outer, x_inner, g_group, g_outer, g_inner, d_group, d_outer, d_inner, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    for block in range(blocks):
        row = (program * blocks + block) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at_x = row_offsets(row, x_group, x_outer, x_inner)[:, None] + column[None, :]
        at_gate = row_offsets(row, g_group, g_outer, g_inner)[:, None] + column[None, :]
        at_dy = row_offsets(row, d_group, d_outer, d_inner)[:, None] + column[None, :]
        value = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
        opened, slope = activate(tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32), SILU)
        grad = tl.load(dy + at_dy, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / D + eps)
        normed = value * rstd[:, None]
        scaled = grad * scale[None, :]
        d_normed = scaled * opened
        mean = tl.sum(d_normed * normed, axis=1) / D
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        d_value = rstd[:, None] * (d_normed - normed * mean[:, None])
        tl.store(dx + at, d_value.to(dx.dtype.element_ty), mask=inside)
        tl.store(dgate + at, (scaled * normed * slope).to(dgate.dtype.element_ty), mask=inside)
        total += tl.sum(grad * normed * opened, axis=0)
    tl.store(partial + program * D + column, total, mask=column < D)


def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgate, dweight), contiguous, each in its tensor's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    D = x.shape[-1]
    rows = x.numel() // D
    if rows == 0:
        return dx, dgate, torch.zeros_like(weight)
    use = launch.config("gated_rmsnorm.backward", D=D)
    programs = use.pop("PROGRAMS")
    blocks = triton.cdiv(triton.cdiv(rows, use["ROWS"]), programs)  # of ROWS rows, for each program
    programs = triton.cdiv(rows, blocks * use["ROWS"])
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    x, *x_walk = strided_rows(x)
    gate, *gate_walk = strided_rows(gate)
    dy, *dy_walk = strided_rows(dy)
    gated_rmsnorm_backward[(programs,)](
        x, gate, weight.contiguous(), dy, dx, dgate, partial, rows, blocks, *x_walk, *gate_walk, *dy_walk, eps,
        D=D, WIDTH=triton.next_power_of_2(D), SILU=activation == "silu", enable_fp_fusion=True, **use,
    )  # fmt: skip
    return dx, dgate, partial.sum(0).to(weight.dtype)
