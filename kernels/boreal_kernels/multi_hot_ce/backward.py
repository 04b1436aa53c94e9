"""Multi-hot cross entropy, backward: d logits = g (softmax sum_i w_i - scatter(w)).  Shapes as in forward.py.

One program writes TILE * TILES columns of one row. A sweep writes the softmax part and knows nothing of bags; then at
most k columns are written again, each by the first of the targets that name it, with the weights of them all. So nothing
is added to memory, and the cost hardly depends on k. The second write takes its logit from `picked`: the gradient may
lie where the logits were, and p - w from a p that was rounded to bf16 would lose its digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.multi_hot_ce.forward import LOG2E, bag_sum, bag_sums, lanes


@triton.jit(do_not_specialize=["y_stride", "w_stride", "picked_stride", "first", "tokens"])
def ce_grad(
    logits, grad, targets, weights, picked, top, log_sum, factor, z_stride, grad_stride, y_stride, w_stride,
    picked_stride, first, tokens, columns,
    k: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (TILE * TILES)
    slot = tl.arange(0, 1 << LEVELS)
    w = tl.load(weights + slot * w_stride + row, mask=slot < k, other=0.0)
    used = w != 0.0
    w = tl.where(used, w * tl.load(factor), 0.0)
    w_row = bag_sum(w, LEVELS)
    counts = tl.max(used.to(tl.int32), axis=0) > 0
    row_max = tl.load(top + row)
    log2 = tl.load(log_sum + row)

    for tile in range(TILES):  # a constant: the end of the slice from `columns` would cost the loads their width
        column = begin + tile * TILE + tl.arange(0, TILE)
        z = tl.load(logits + row * z_stride + column, mask=column < columns, other=0.0).to(tl.float32)
        value = w_row * tl.exp2((z - row_max) * LOG2E - log2)
        value = tl.where((column < tokens) & counts, value, 0.0)
        tl.store(grad + row * grad_stride + column, value.to(grad.dtype.element_ty), mask=column < columns)

    tl.debug_barrier()  # the columns below have been written by other threads of this program
    column = tl.load(targets + slot * y_stride + row, mask=slot < k, other=0) - first
    here = used & (column >= 0) & (column < tokens)
    z = tl.load(picked + slot * picked_stride + row, mask=here, other=0.0)
    same = (column[:, None] == column[None, :]) & here[None, :]
    owned = bag_sums(tl.where(same, w[None, :], 0.0), 1 << LEVELS, LEVELS)
    earlier = tl.max((same & (slot[None, :] < slot[:, None])).to(tl.int32), axis=1) > 0
    value = w_row * tl.exp2((z - row_max) * LOG2E - log2) - owned
    owner = here & ~earlier & (column >= begin) & (column < begin + TILE * TILES)
    tl.store(grad + row * grad_stride + column, value.to(grad.dtype.element_ty), mask=owner)


def logits_gradient(
    logits: Tensor, grad: Tensor, targets: Tensor, w: Tensor, picked: Tensor, top: Tensor, log_sum: Tensor,
    factor: Tensor, first: int, tokens: int,
) -> None:  # fmt: skip
    """Writes d logits into `grad` [T, v/tp], which may be `logits`; factor [] FP32 multiplies it, the rest as `forward`
    takes and returns it."""
    rows, columns = logits.shape
    use = launch.config("multi_hot_ce.grad", columns=columns)
    grid = (rows, triton.cdiv(columns, use["TILE"] * use["TILES"]))
    ce_grad[grid](
        logits, grad, targets, w, picked, top, log_sum, factor, logits.stride(0), grad.stride(0), targets.stride(0),
        w.stride(0), picked.stride(0), first, tokens, columns, **lanes(targets), enable_fp_fusion=True, **use,
    )  # fmt: skip


def backward(
    d_loss: Tensor, logits: Tensor, targets: Tensor, w: Tensor, picked: Tensor, top: Tensor, log_sum: Tensor,
    first: int, tokens: int,
) -> Tensor:  # fmt: skip
    """d logits [T, v/tp], contiguous, in logits.dtype."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits_gradient(logits, grad, targets, w, picked, top, log_sum, d_loss.to(torch.float32), first, tokens)
    return grad
