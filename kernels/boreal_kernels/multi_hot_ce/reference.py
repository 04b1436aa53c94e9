"""Multi-hot cross entropy in plain torch: the obvious one, the vocabulary-parallel one, the one fused with the head.

Shapes: logits z [T, v/tp], targets y [k, T], target weights w [k, T], hidden [T, h], head weight [v/tp, h].

All statistics are FP32 and small: per row a maximum, a sum of exponentials and the k target logits. Two collectives
combine them (max; then sum-exp and weighted target logits together). The backward rebuilds the softmax from the logits
and the log-sum-exp, so nothing of the size of the logits is kept besides the logits themselves.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype

LINEAR_ROWS = 1024  # rows of logits that exist at a time in the fused form
BLOCK_ELEMENTS = 1 << 19  # logits that are exponentiated at a time: 2 MB of FP32, which stay in a CPU's cache


def plain(logits: Tensor, targets: Tensor, target_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one rank, by autograd: the twin of everything below. Every target must lie in the vocabulary."""
    logits = logits.to(accumulate_dtype(logits))
    w = _weights(logits, targets, target_weight)
    log_p = logits.log_softmax(-1).gather(1, targets.t()).t()  # [k, T]
    return -(w * log_p).sum(), w.sum()


def _weights(like: Tensor, targets: Tensor, target_weight: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(like)
    if target_weight is None:
        return torch.full(targets.shape, 1.0 / targets.shape[0], dtype=dtype, device=like.device)
    return target_weight.detach().to(dtype)


def _local_targets(targets: Tensor, w: Tensor, rows: int, tp_group) -> tuple[Tensor, Tensor]:
    """Index into this rank's vocabulary rows [k, T], and the weight of the targets that lie there, 0 for others."""
    local = targets - (0 if tp_group is None else dist.get_rank(tp_group) * rows)
    here = (local >= 0) & (local < rows)
    return local.masked_fill(~here, 0), w.masked_fill(~here, 0.0)


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row maximum [T], sum exp(z - max) [T], target logits [k, T] of this rank's shard, FP32."""
    z = logits.to(accumulate_dtype(logits))
    # A shard may be -inf throughout (vocabulary padding); a finite maximum keeps -inf - -inf = NaN away.
    row_max = z.amax(-1).clamp_min(torch.finfo(z.dtype).min)
    sum_exp = torch.empty_like(row_max)
    for rows in _blocks(z):
        sum_exp[rows] = (z[rows] - row_max[rows, None]).exp_().sum(-1)
    return row_max, sum_exp, z.gather(1, local.t()).t()


def _blocks(z: Tensor):
    """Slices of rows that together cover z, each of about BLOCK_ELEMENTS."""
    step = max(1, BLOCK_ELEMENTS // max(1, z.shape[1]))
    return [slice(start, start + step) for start in range(0, z.shape[0], step)]


def _combine(row_max: Tensor, sum_exp: Tensor, picked: Tensor, w: Tensor, w_here: Tensor, tp_group):
    """loss_sum, weight_sum, and the global log-sum-exp [T], from every rank's statistics."""
    local_max = row_max
    if tp_group is not None:
        row_max = row_max.clone()
        dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=tp_group)
    # Relative to the maximum: logits around 100 would cost the loss two digits.
    relative = torch.where(w_here != 0, w_here * (picked - row_max), 0.0).sum(0)  # [T]
    both = torch.stack([sum_exp * (local_max - row_max).exp(), relative])  # [2, T]
    if tp_group is not None:
        dist.all_reduce(both, op=dist.ReduceOp.SUM, group=tp_group)
    log_sum = both[0].log()  # [T]
    w_row = w.sum(0)  # [T]
    loss = torch.where(_counts(w), w_row * log_sum - both[1], 0.0)
    return loss.sum(), w.sum(), row_max + log_sum


def _counts(w: Tensor) -> Tensor:
    """Rows [T] that have a target at all."""
    return (w != 0).any(0)


def _logits_gradient(logits: Tensor, lse: Tensor, local: Tensor, w: Tensor, w_here: Tensor) -> Tensor:
    """softmax * sum_i w - scatter(w) [T, v/tp] in FP32; zero rows where no target counts."""
    grad = torch.empty_like(logits, dtype=lse.dtype)
    w_row = w.sum(0)
    for rows in _blocks(logits):
        block = torch.sub(logits[rows].to(lse.dtype), lse[rows, None], out=grad[rows])
        block.exp_().mul_(w_row[rows, None]).masked_fill_(~_counts(w[:, rows])[:, None], 0.0)
    # One target per row at a time: no two additions meet, so their order cannot matter.
    for index, weight in zip(local, w_here, strict=True):
        grad.scatter_add_(1, index[:, None], -weight[:, None])
    return grad


class _MultiHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, w, tp_group):
        local, w_here = _local_targets(targets, w, logits.shape[1], tp_group)
        loss_sum, weight_sum, lse = _combine(*_statistics(logits, local), w, w_here, tp_group)
        ctx.save_for_backward(logits, lse, local, w, w_here)
        ctx.mark_non_differentiable(weight_sum)
        return loss_sum, weight_sum

    @staticmethod
    def backward(ctx, grad_loss, _):
        logits, lse, local, w, w_here = ctx.saved_tensors
        grad = _logits_gradient(logits, lse, local, w * grad_loss, w_here * grad_loss)
        return grad.to(logits.dtype), None, None, None


class _LinearMultiHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, w, tp_group):
        local, w_here = _local_targets(targets, w, weight.shape[0], tp_group)
        parts = []
        for start in range(0, hidden.shape[0], LINEAR_ROWS):
            rows = slice(start, start + LINEAR_ROWS)
            parts.append(_statistics(hidden[rows] @ weight.t(), local[:, rows]))
        row_max, sum_exp, picked = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        loss_sum, weight_sum, lse = _combine(row_max, sum_exp, picked, w, w_here, tp_group)
        ctx.save_for_backward(hidden, weight, lse, local, w, w_here)
        ctx.mark_non_differentiable(weight_sum)
        return loss_sum, weight_sum

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden, weight, lse, local, w, w_here = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # FP32: a bf16 running sum over many row blocks stops growing.
        grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], LINEAR_ROWS):
            rows = slice(start, start + LINEAR_ROWS)
            # A row without targets may hold NaN, and 0 * NaN would poison the weight's gradient.
            block = hidden[rows].masked_fill(~_counts(w[:, rows])[:, None], 0.0)
            grad = _logits_gradient(
                block @ weight.t(), lse[rows], local[:, rows], w[:, rows] * grad_loss, w_here[:, rows] * grad_loss
            ).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ block
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def multi_hot_cross_entropy(logits, targets, target_weight, *, tp_group=None) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    return _MultiHot.apply(logits, targets, _weights(logits, targets, target_weight), tp_group)


def linear_multi_hot_cross_entropy(hidden, weight, targets, target_weight, *, tp_group=None) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    return _LinearMultiHot.apply(hidden, weight, targets, _weights(hidden, targets, target_weight), tp_group)
