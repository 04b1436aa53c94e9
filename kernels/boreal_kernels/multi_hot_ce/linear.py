"""The head and its loss together, a chunk of rows at a time: matrix products by torch, the rest by our two kernels.

Shapes: hidden x [T, h], head weight W [v/tp, h]; a chunk has c rows, and its logits Z [c, v/tp] are all that exists of
them. The gradient takes their place.

    Z = x W^T  ->  ce_stats, gather, ce_loss  ->  Z = ce_grad(Z)  ->  dx = Z W,  dW += Z^T x

`gradients_at_once` does all of it in one pass, three products a chunk, for a gradient of the loss known in advance.
`statistics_only` stops after the loss, and `gradients_again` makes Z a second time: four products a chunk, for any.
"""

from contextlib import contextmanager
from functools import cache
from math import ceil

import torch
from torch import Tensor

from boreal_kernels.multi_hot_ce.backward import logits_gradient
from boreal_kernels.multi_hot_ce.forward import gather, losses, statistics

BUDGET_BYTES = 750_000_000  # for a chunk's logits and the partial sums of its dx

# What `plan` expects of a device: one H200 as published for cuBLAS and for copies. Nothing of it is measured here.
FLOPS_PER_S = 740e12
BYTES_PER_S = 4.3e12
PROCESSORS = 132
TILE = (128, 256)  # rows and columns of the output that cuBLAS gives a processor at a time
EXPOSED = 0.6  # the share of dW's read and write that its product does not hide
LAUNCH_S = 20e-6  # what a chunk costs besides
MOST_ROWS = 16384


@cache
def plan(rows: int, columns: int, hidden: int, budget_bytes: int, element_bytes: int = 2) -> tuple[int, int]:
    """(rows per chunk, slabs): the quickest way through `rows` that keeps to the budget, by a model of the device.

    A chunk is a multiple of 128 rows. dx [c, h] is a small output: at h = 2560, 2,048 rows are 160 tiles, for which 132
    processors take two turns, 264. So its sum over the vocabulary is split into slabs, products of their own with FP32
    outputs that are added afterwards. A slab is `columns` / slabs wide and starts at a multiple of 16 bytes. More rows
    mean fewer passes over dW, 8 bytes an element each.

    budget_bytes: for a chunk's logits and the slabs' outputs; where 128 rows exceed it, it is 128 rows and no slabs.
    """
    best = (float("inf"), 128, 1)
    for slabs in (1, 2, 4, 8):
        if columns % slabs or columns // slabs * element_bytes % 16 and slabs > 1:
            continue
        for chunk in range(128, min(128 * ceil(rows / 128), MOST_ROWS) + 1, 128):
            if chunk * _bytes_per_row(columns, hidden, slabs, element_bytes) > budget_bytes:
                break
            full, rest = divmod(rows, chunk)
            seconds = full * _seconds(chunk, columns, hidden, slabs) + (rest and _seconds(rest, columns, hidden, slabs))
            best = min(best, (seconds, chunk, slabs))
    return best[1:]


def _bytes_per_row(columns: int, hidden: int, slabs: int, element_bytes: int) -> int:
    return columns * element_bytes + (slabs * hidden * 4 if slabs > 1 else 0)


def _seconds(chunk: int, columns: int, hidden: int, slabs: int) -> float:
    """What a chunk costs that depends on the plan: dx, the pass over dW, the slabs' outputs."""
    tiles = ceil(chunk / TILE[0]) * ceil(hidden / TILE[1]) * slabs
    turns = ceil(tiles / PROCESSORS)
    whole = 2 * TILE[0] * TILE[1] * (columns / slabs) * PROCESSORS / FLOPS_PER_S  # one turn of all processors
    passes = EXPOSED * 8 * columns * hidden + (8 * slabs * chunk * hidden if slabs > 1 else 0)
    return turns * whole + passes / BYTES_PER_S + LAUNCH_S


@contextmanager
def exact_reduction():
    """cuBLAS adds the parts of a split sum in FP32; by default it may do so in bf16."""
    flags = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a [S, n, m] @ b [S, m, p] in FP32, from operands of any dtype."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # torch has no product with another dtype on a CPU


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [n, p] FP32 += a [n, m] @ b [m, p], the product in FP32 and never in memory."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class Head:
    """One pass over the rows: chunks of logits in one buffer, and the gradients that grow from them.

    Args:
        hidden [T, h], weight [v/tp, h], targets [k, T], w [k, T] FP32, all with a dense last dim.
        first, tokens: as in `forward.statistics`.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int):
        self.hidden, self.weight, self.targets, self.w = hidden, weight, targets, w
        self.first, self.tokens = first, tokens
        T, columns = hidden.shape[0], weight.shape[0]
        self.chunk, self.slabs = plan(T, columns, hidden.shape[1], BUDGET_BYTES, hidden.element_size())
        self.buffer = hidden.new_empty(min(self.chunk, T), columns)
        self.counts = (w != 0).any(0)[:, None]  # [T, 1]

    def chunks(self):
        """(rows, x [c, h], logits [c, v/tp]) one after the other; rows without a target are zeros in x."""
        T = self.hidden.shape[0]
        for start in range(0, T, self.chunk):
            rows = slice(start, min(start + self.chunk, T))
            x = self.hidden[rows]
            # Without a target a row may hold NaN, and the product for dW would multiply it by zero.
            x = torch.where(self.counts[rows], x, 0.0)
            yield rows, x, torch.mm(x, self.weight.t(), out=self.buffer[: x.shape[0]])

    def statistics(self, rows: slice, z: Tensor, picked: Tensor) -> Tensor:
        return statistics(z, self.targets[:, rows], self.w[:, rows], picked[:, rows], self.first, self.tokens)

    def gradients(self, rows, x, z, picked, top, log_sum, factor, d_hidden: Tensor | None, d_weight: Tensor | None):
        """Turns a chunk's logits into their gradient, and that into rows of d_hidden and a part of d_weight."""
        logits_gradient(
            z, z, self.targets[:, rows], self.w[:, rows], picked[:, rows], top, log_sum, factor, self.first, self.tokens
        )
        if d_hidden is not None and self.slabs == 1:
            torch.mm(z, self.weight, out=d_hidden[rows])
        elif d_hidden is not None:
            width = z.shape[1] // self.slabs
            parts = products(z.unflatten(1, (self.slabs, width)).transpose(0, 1), self.weight.unflatten(0, (-1, width)))
            d_hidden[rows] = parts.sum(0)
        if d_weight is not None:
            add_product(d_weight, z.t(), x)


def statistics_only(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], M [T], log2 S [T], target logits [k, T]), FP32. One product a chunk, one collective."""
    head = Head(hidden, weight, targets, w, first, tokens)
    picked = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    with exact_reduction():
        stats = torch.cat([head.statistics(rows, z, picked) for rows, _, z in head.chunks()], dim=1)
    loss, top, log_sum = losses(gather(stats, group), w)
    return loss.sum(), top, log_sum, picked


def gradients_again(
    factor: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor,
    picked: Tensor, top: Tensor, log_sum: Tensor, main_grad: Tensor | None, first: int, tokens: int,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(d hidden, d weight) for the gradient `factor` [] of loss_sum, from what `statistics_only` returned.

    d weight is added to main_grad [v/tp, h] FP32 where it is given, and None is returned. Three products a chunk.
    """
    head = Head(hidden, weight, targets, w, first, tokens)
    d_hidden, d_weight = _made(hidden, weight, main_grad, need_hidden, need_weight)
    with exact_reduction():
        for rows, x, z in head.chunks():
            head.gradients(rows, x, z, picked, top[rows], log_sum[rows], factor, d_hidden, d_weight)
    return d_hidden, _returned(d_weight, weight, main_grad)


def gradients_at_once(
    factor: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, main_grad: Tensor | None,
    first: int, tokens: int, group: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss_sum [], d hidden, d weight), gradients as in `gradients_again`. Three products, one collective a chunk."""
    head = Head(hidden, weight, targets, w, first, tokens)
    d_hidden, d_weight = _made(hidden, weight, main_grad, need_hidden, need_weight)
    picked = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    parts = []
    with exact_reduction():
        for rows, x, z in head.chunks():
            loss, top, log_sum = losses(gather(head.statistics(rows, z, picked), group), w[:, rows])
            parts.append(loss)
            head.gradients(rows, x, z, picked, top, log_sum, factor, d_hidden, d_weight)
    return torch.cat(parts).sum(), d_hidden, _returned(d_weight, weight, main_grad)


def _made(hidden, weight, main_grad, need_hidden, need_weight):
    """(d hidden, FP32 d weight) to write into, None for what is not needed."""
    d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    if not need_weight:
        return d_hidden, None
    zeros = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if main_grad is None else main_grad
    return d_hidden, zeros


def _returned(d_weight, weight, main_grad):
    return d_weight.to(weight.dtype) if d_weight is not None and main_grad is None else None
