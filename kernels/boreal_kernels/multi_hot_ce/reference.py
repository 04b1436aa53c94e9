"""Multi-hot cross entropy in plain torch: the obvious one, the vocabulary-parallel one, the one fused with the head.

Shapes: logits z [T, v/tp], targets y [k, T], target weights w [k, T], hidden [T, h], head weight [v/tp, h].

All statistics are FP32 and small: per row a maximum, a sum of exponentials and the k target logits. Two collectives
combine them (max; then sum-exp and weighted target logits together). The backward rebuilds the softmax from the logits
and the log-sum-exp, so nothing of the size of the logits is kept besides the logits themselves.

`first` is the global id of this rank's column 0, `tokens` the number of its columns that are not padding.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype

LINEAR_ROWS = 1024  # rows of logits that exist at a time in the fused form
BLOCK_ELEMENTS = 1 << 19  # logits that are exponentiated at a time: 2 MB of FP32, which stay in a CPU's cache
PROMISE = 1e-6  # how far, relatively, a gradient may be from the promised one: the rounding of a few FP32 products


def plain(logits: Tensor, targets: Tensor, target_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one rank, by autograd: the twin of everything below. Every target must lie in the vocabulary."""
    logits = logits.to(accumulate_dtype(logits))
    w = weights(logits, targets, target_weight)
    log_p = logits.log_softmax(-1).gather(1, targets.t()).t()  # [k, T]
    return -(w * log_p).sum(), w.sum()


def weights(like: Tensor, targets: Tensor, target_weight: Tensor | None) -> Tensor:
    """w [k, T] in FP32 (float64 where `like` is), without a gradient; 1/k everywhere for None."""
    dtype = accumulate_dtype(like)
    if target_weight is None:
        return torch.full(targets.shape, 1.0 / targets.shape[0], dtype=dtype, device=like.device)
    return target_weight.detach().to(dtype)


def poison(promised: Tensor, found: Tensor) -> Tensor:
    """0 where the gradient of the loss is the promised one, else NaN; a scalar on the device, so that nothing waits."""
    kept = (found - promised).abs() <= PROMISE * promised.abs()
    return torch.where(kept, 0.0, torch.nan)


def _local_targets(targets: Tensor, w: Tensor, rows: int, first: int) -> tuple[Tensor, Tensor]:
    """Index into this rank's vocabulary rows [k, T], and the weight of the targets that lie there, 0 for others."""
    local = targets - first
    here = (local >= 0) & (local < rows)
    return local.masked_fill(~here, 0), w.masked_fill(~here, 0.0)


def _without_padding(logits: Tensor, tokens: int) -> Tensor:
    """The logits, -inf in the columns from `tokens` on."""
    if tokens == logits.shape[1]:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= tokens, -torch.inf)


def _statistics(logits: Tensor, local: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row maximum [T], sum exp(z - max) [T], target logits [k, T] of this rank's shard, FP32."""
    z = _without_padding(logits, tokens).to(accumulate_dtype(logits))
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
    """loss_sum and the global log-sum-exp [T], from every rank's statistics."""
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
    return loss.sum(), row_max + log_sum


def _counts(w: Tensor) -> Tensor:
    """Rows [T] that have a target at all."""
    return (w != 0).any(0)


def _logits_gradient(logits: Tensor, lse: Tensor, local: Tensor, w: Tensor, w_here: Tensor, tokens: int) -> Tensor:
    """softmax * sum_i w - scatter(w) [T, v/tp] in FP32; zero rows where no target counts, zeros in the padding."""
    grad = torch.empty_like(logits, dtype=lse.dtype)
    w_row = w.sum(0)
    for rows in _blocks(logits):
        block = torch.sub(logits[rows].to(lse.dtype), lse[rows, None], out=grad[rows])
        block.exp_().mul_(w_row[rows, None]).masked_fill_(~_counts(w[:, rows])[:, None], 0.0)
    # One target per row at a time: no two additions meet, so their order cannot matter.
    for index, weight in zip(local, w_here, strict=True):
        grad.scatter_add_(1, index[:, None], -weight[:, None])
    grad[:, tokens:] = 0.0
    return grad


class _MultiHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, w, first, tokens, tp_group):
        local, w_here = _local_targets(targets, w, logits.shape[1], first)
        loss_sum, lse = _combine(*_statistics(logits, local, tokens), w, w_here, tp_group)
        ctx.save_for_backward(logits, lse, local, w, w_here)
        ctx.tokens = tokens
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        logits, lse, local, w, w_here = ctx.saved_tensors
        grad = _logits_gradient(logits, lse, local, w * grad_loss, w_here * grad_loss, ctx.tokens)
        return grad.to(logits.dtype), None, None, None, None, None


class _Head:
    """Gradients of hidden and weight, a block of rows at a time; None for what is not needed.

    The weight's goes into main_grad where there is one. Either way its sum is FP32: a bf16 running sum over many blocks
    stops growing.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, main_grad: Tensor | None, needed: tuple[bool, bool], dtype):
        self.weight = weight
        self.hidden_grad = torch.empty_like(hidden) if needed[0] else None
        self.sum = None
        if needed[1]:
            self.sum = torch.zeros_like(weight, dtype=dtype) if main_grad is None else main_grad
        self.weight_is_returned = needed[1] and main_grad is None

    def add(self, rows: slice, block: Tensor, grad: Tensor) -> None:
        """block [c, h] are the hidden states, grad [c, v/tp] the gradient of their logits."""
        grad = grad.to(block.dtype)
        if self.hidden_grad is not None:
            self.hidden_grad[rows] = grad @ self.weight
        if self.sum is not None:
            self.sum += grad.t() @ block

    def weight_grad(self) -> Tensor | None:
        return self.sum.to(self.weight.dtype) if self.weight_is_returned else None


def _row_blocks(hidden: Tensor, w: Tensor):
    """(rows, hidden[rows]) that together cover hidden."""
    for start in range(0, hidden.shape[0], LINEAR_ROWS):
        rows = slice(start, start + LINEAR_ROWS)
        # A row without targets may hold NaN, and 0 * NaN would poison the weight's gradient.
        yield rows, hidden[rows].masked_fill(~_counts(w[:, rows])[:, None], 0.0)


class _LinearMultiHot(torch.autograd.Function):
    """The logits are made again in the backward, and gradients from them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, w, first, tokens, tp_group, main_grad):
        local, w_here = _local_targets(targets, w, weight.shape[0], first)
        parts = [_statistics(block @ weight.t(), local[:, rows], tokens) for rows, block in _row_blocks(hidden, w)]
        row_max, sum_exp, picked = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        loss_sum, lse = _combine(row_max, sum_exp, picked, w, w_here, tp_group)
        ctx.save_for_backward(hidden, weight, lse, local, w, w_here)
        # Not a saved tensor: other heads and microbatches add to it before this one's backward.
        ctx.main_grad, ctx.tokens = main_grad, tokens
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        hidden, weight, lse, local, w, w_here = ctx.saved_tensors
        w, w_here = w * grad_loss, w_here * grad_loss
        head = _Head(hidden, weight, ctx.main_grad, ctx.needs_input_grad[:2], lse.dtype)
        for rows, block in _row_blocks(hidden, w):
            logits = block @ weight.t()
            grad = _logits_gradient(logits, lse[rows], local[:, rows], w[:, rows], w_here[:, rows], ctx.tokens)
            head.add(rows, block, grad)
        return head.hidden_grad, head.weight_grad(), None, None, None, None, None, None


class _PromisedLinearMultiHot(torch.autograd.Function):
    """Gradients in the forward, for the promised gradient of the loss; the backward checks the promise."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, w, first, tokens, tp_group, main_grad, upstream):
        local, w_here = _local_targets(targets, w, weight.shape[0], first)
        head = _Head(hidden, weight, main_grad, ctx.needs_input_grad[:2], w.dtype)
        loss_sum = 0.0
        for rows, block in _row_blocks(hidden, w):
            logits, at, weight_here = block @ weight.t(), local[:, rows], w_here[:, rows]
            loss, lse = _combine(*_statistics(logits, at, tokens), w[:, rows], weight_here, tp_group)
            loss_sum = loss_sum + loss
            head.add(
                rows, block, _logits_gradient(logits, lse, at, w[:, rows] * upstream, weight_here * upstream, tokens)
            )
        ctx.save_for_backward(head.hidden_grad, head.weight_grad(), upstream)
        ctx.main_grad = main_grad
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, upstream = ctx.saved_tensors
        nan = poison(upstream, grad_loss)
        if grad_hidden is None and grad_weight is None:
            ctx.main_grad[0, 0] += nan
        grads = [None if grad is None else grad + nan.to(grad.dtype) for grad in (grad_hidden, grad_weight)]
        return *grads, None, None, None, None, None, None, None


def multi_hot_cross_entropy(logits: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, tp_group) -> Tensor:
    """loss_sum; w as `weights` makes it, the rest as in the package's docstring."""
    return _MultiHot.apply(logits, targets, w, first, tokens, tp_group)


def linear_multi_hot_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, tp_group,
    main_grad: Tensor | None, upstream: Tensor | None,
) -> Tensor:  # fmt: skip
    """loss_sum; w as `weights` makes it, upstream [] in w's dtype, the rest as in the package's docstring."""
    inputs = (hidden, weight, targets, w, first, tokens, tp_group, main_grad)
    if upstream is None or not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return _LinearMultiHot.apply(*inputs)
    return _PromisedLinearMultiHot.apply(*inputs, upstream)
