"""Multi-hot cross entropy, forward: what each rank knows of its shard, then the loss.

Shapes: logits z [T, v/tp], targets y [k, T], their weights w [k, T] FP32.

    ce_stats    a row's m = max z, s = sum exp(z - m), t = sum_i w_i (z[y_i] - m), u = sum_i w_i; sums over i only where
                y_i lies in this shard.                                              -> stats [4, T], z[y] [k, T]
    gather      every rank's four numbers, in rank order                             -> [tp, 4, T]
    ce_loss     M = max m,  S = sum s exp(m - M),  loss = w_row log S - sum (t + u (m - M))      -> [T]

Everything is relative to a maximum, so logits around 300 or 10,000 cost no digits. The softmax is exp2((z - M) log2 e -
log2 S): M and log2 S stay two numbers, their sum would round.

Sums over a bag are trees over a power of two of lanes: k equal targets of weight 1/k give the bits of one target of
weight 1 for k = 2, 4, 8, 16.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from boreal_kernels import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a maximum starts: finite, also times log2 e, so that a shard without any logit gives exp2(-inf) = 0 and not
# -inf - -inf = NaN.
LOWEST = tl.constexpr(-2e38)


@triton.jit
def bag_sum(x, LEVELS: tl.constexpr):
    """The sum of x [2^LEVELS], neighbours first; a scalar."""
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(x, [1 << (LEVELS - 1 - level), 2]))
        x = left + right
    return tl.sum(x, axis=0)  # of one element


@triton.jit
def bag_sums(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """The same of every row of x [ROWS, 2^LEVELS]; [ROWS]."""
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(x, [ROWS, 1 << (LEVELS - 1 - level), 2]))
        x = left + right
    return tl.reshape(x, [ROWS])


@triton.jit(do_not_specialize=["rows", "y_stride", "w_stride", "picked_stride", "first", "tokens"])
def ce_stats(
    logits, targets, weights, picked, stats, rows, z_stride, y_stride, w_stride, picked_stride, first, tokens, columns,
    k: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * z_stride
    lane = tl.arange(0, LANES)
    depth = tl.arange(0, DEPTH)
    # Maximum and sum of each lane by itself: no exchange between warps until the end of the row.
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, columns, DEPTH * LANES):
        column = start + depth[:, None] * LANES + lane[None, :]
        # `columns` is a multiple of 16 and masks 16 bytes at a time; `tokens` may be odd, so it only selects.
        z = tl.load(z_row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        z = tl.where(column < tokens, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((z - higher[None, :]) * LOG2E), axis=0)
        top = higher
    row_max = tl.max(top, axis=0)
    sum_exp = tl.sum(total * tl.exp2((top - row_max) * LOG2E), axis=0)

    slot = tl.arange(0, 1 << LEVELS)
    w = tl.load(weights + slot * w_stride + row, mask=slot < k, other=0.0)
    column = tl.load(targets + slot * y_stride + row, mask=slot < k, other=0) - first
    here = (w != 0.0) & (column >= 0) & (column < columns)
    z = tl.load(z_row + column, mask=here, other=0.0).to(tl.float32)
    z = tl.where(here & (column >= tokens), float("-inf"), z)  # a target in the padding has probability 0
    tl.store(picked + slot * picked_stride + row, z, mask=slot < k)
    tl.store(stats + row, row_max)
    tl.store(stats + rows + row, sum_exp)
    tl.store(stats + 2 * rows + row, bag_sum(tl.where(here, w * (z - row_max), 0.0), LEVELS))
    tl.store(stats + 3 * rows + row, bag_sum(tl.where(here, w, 0.0), LEVELS))


@triton.jit(do_not_specialize=["rows", "ranks", "w_stride"])
def ce_loss(
    stats, weights, loss, top, log_sum, rows, ranks, w_stride,
    k: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    row = row.to(tl.int64)
    row_max = tl.full([ROWS], LOWEST, tl.float32)
    for rank in range(ranks):
        row_max = tl.maximum(row_max, tl.load(stats + 4 * rank * rows + row, mask=inside, other=0.0))
    sum_exp = tl.zeros([ROWS], tl.float32)
    relative = tl.zeros([ROWS], tl.float32)
    for rank in range(ranks):
        at = stats + 4 * rank * rows + row
        lower = tl.load(at, mask=inside, other=0.0) - row_max
        sum_exp += tl.load(at + rows, mask=inside, other=1.0) * tl.exp2(lower * LOG2E)
        relative += tl.load(at + 2 * rows, mask=inside, other=0.0)
        relative += tl.load(at + 3 * rows, mask=inside, other=0.0) * lower
    slot = tl.arange(0, 1 << LEVELS)
    w = tl.load(
        weights + slot[None, :] * w_stride + row[:, None], mask=inside[:, None] & (slot < k)[None, :], other=0.0
    )
    counts = tl.max((w != 0.0).to(tl.int32), axis=1) > 0
    log2 = tl.log2(sum_exp)
    value = bag_sums(w, ROWS, LEVELS) * (log2 * LN2) - relative
    tl.store(loss + row, tl.where(counts, value, 0.0), mask=inside)
    tl.store(top + row, row_max, mask=inside)
    tl.store(log_sum + row, log2, mask=inside)


def lanes(targets: Tensor) -> dict[str, int]:
    """The bag as a kernel counts it: k targets on 2^LEVELS lanes."""
    k = targets.shape[0]
    return {"k": k, "LEVELS": (k - 1).bit_length()}


def statistics(logits: Tensor, targets: Tensor, w: Tensor, picked: Tensor, first: int, tokens: int) -> Tensor:
    """stats [4, T] of this rank's shard; writes its target logits into `picked` [k, T], 0 for targets elsewhere.

    logits [T, v/tp], last dim dense. targets, w, picked: [k, T], last dim dense, w FP32. first: the global id of column
    0; tokens: columns that are not padding.
    """
    rows, columns = logits.shape
    stats = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    use = launch.config("multi_hot_ce.stats", columns=columns)
    ce_stats[(rows,)](
        logits, targets, w, picked, stats, rows, logits.stride(0), targets.stride(0), w.stride(0), picked.stride(0),
        first, tokens, columns, **lanes(targets), enable_fp_fusion=True, **use,
    )  # fmt: skip
    return stats


def gather(stats: Tensor, group: str) -> Tensor:
    """[tp, 4, T]: the statistics of every rank of a group, named as torch names it; "" is no group."""
    if not group:
        return stats[None]
    group = _resolve_process_group(group)
    gathered = stats.new_empty(group.size() * 4, stats.shape[1])
    dist.all_gather_into_tensor(gathered, stats, group=group)
    return gathered.unflatten(0, (-1, 4))


def losses(stats: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [T], M [T], log2 S [T]) from stats [tp, 4, T] and w [k, T]; the same bits on every rank."""
    ranks, _, rows = stats.shape
    loss, top, log_sum = (torch.empty(rows, dtype=torch.float32, device=stats.device) for _ in range(3))
    use = launch.config("multi_hot_ce.loss")
    ce_loss[(triton.cdiv(rows, use["ROWS"]),)](
        stats, w, loss, top, log_sum, rows, ranks, w.stride(0), **lanes(w), enable_fp_fusion=True, **use
    )
    return loss, top, log_sum


def forward(
    logits: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], M [T], log2 S [T], target logits [k, T]), FP32; arguments as in `statistics` and `gather`."""
    picked = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    stats = statistics(logits, targets, w, picked, first, tokens)
    loss, top, log_sum = losses(gather(stats, group), w)
    return loss.sum(), top, log_sum, picked
