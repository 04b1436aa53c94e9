"""multi_hot_ce: cross entropy of one prediction against a bag of k targets, over a vocabulary split across ranks.

Shapes: logits [T, v/tp] or hidden [T, h] with weight [v/tp, h]; targets [k, T]. Rank r of tp_group holds the vocabulary
rows r*v/tp .. (r+1)*v/tp - 1.
"""

import torch
from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.multi_hot_ce import reference
from boreal_kernels.shapes import expect_dims, expect_kernel_dtypes, expect_shape


def multi_hot_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    target_weight: Tensor | None,
    *,
    vocab_size: int | None = None,
    tp_group=None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """loss_sum = sum_{i,t} w_it (logsumexp(z_t) - z_t[y_it]) and weight_sum = sum w, in FP32.

    logits [T, v/tp]; targets y [k, T] int64, global ids; target_weight w [k, T], 1/k everywhere if None. A target of
    weight 0 may hold any id, a position whose weights are all 0 any logits, NaN included. A weighted target must lie
    within the vocabulary; that is not checked, it would stall the device.
    vocab_size: columns whose global id is not below it are padding: whatever they hold, NaN included, they have no
    probability and gradient 0. None: there is none.
    tp_group: the torch.distributed group that splits v, None for one rank; every rank gets the same two numbers.
    Returns two scalars; loss_sum is differentiable in logits (d = softmax * sum_i w - scatter(w), in logits.dtype),
    weight_sum and target_weight are not. Raises ValueError for shapes or dtypes that do not fit.
    Source: token superposition training (arXiv 2605.06546); at k = 1 the usual vocabulary-parallel cross entropy.
    """
    op = "multi_hot_cross_entropy"
    backend = resolve(backend, op, device=logits.device)
    expect_dims(op, "logits", logits, "[T, v/tp]", 2)
    _check_targets(op, logits, targets, target_weight)
    first, tokens = _shard(op, logits.shape[1], vocab_size, tp_group)
    w = reference.weights(logits, targets, target_weight)
    if backend == "triton":
        expect_kernel_dtypes(op, logits=logits)
        from boreal_kernels.multi_hot_ce import fused

        return fused.multi_hot_cross_entropy(logits, targets, w, first, tokens, tp_group), w.sum()
    return reference.multi_hot_cross_entropy(logits, targets, w, first, tokens, tp_group), w.sum()


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_weight: Tensor | None,
    *,
    vocab_size: int | None = None,
    main_grad: Tensor | None = None,
    upstream: float | Tensor | None = None,
    tp_group=None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """multi_hot_cross_entropy of logits = hidden @ weight.T, without ever holding all the logits.

    hidden [T, h], the same on every rank of tp_group; weight [v/tp, h]; the rest as in multi_hot_cross_entropy. Padding
    rows of weight, and hidden states of positions that have a target, must be finite.
    The gradient of hidden is this rank's part of it, a sum over its own v/tp rows: the caller owns the tensor-parallel
    reduction (all-reduce, or reduce-scatter under sequence parallelism). The gradient of weight is whole.

    upstream: a promise that the gradient of loss_sum will be this scalar, to 1e-6 of it: a number, or a tensor [] on
    the device. Gradients are then computed in the forward, while the logits are there (3 matrix products a chunk of
    rows). The backward compares, without a synchronisation: where the promise is broken, the gradient of hidden is
    NaN, and the weight's too where it is returned; main_grad[0, 0] becomes NaN where hidden needs no gradient. None:
    the backward makes the logits a second time (4 products), for any gradient. Inside of a recomputed (checkpointed)
    region only None is right: a promise may add to main_grad twice.
    main_grad: [v/tp, h] FP32, contiguous; the gradient of weight is added to it, and None is returned for weight. When:
    in the forward with `upstream`, in the backward without. So zero it before the forward, and not in between.
    Without a gradient to compute (no_grad, or nothing requires one) both are ignored; a frozen weight or a detached
    hidden costs no product.
    """
    op = "linear_multi_hot_cross_entropy"
    backend = resolve(backend, op, device=hidden.device)
    expect_dims(op, "hidden", hidden, "[T, h]", 2)
    expect_dims(op, "weight", weight, "[v/tp, h]", 2)
    expect_shape(op, "weight", weight, "[v/tp, h]", (weight.shape[0], hidden.shape[1]))
    if weight.dtype != hidden.dtype:
        raise ValueError(f"{op}: weight: found {weight.dtype}, expected hidden's {hidden.dtype}")
    _expect_device(op, "weight", weight, hidden)
    _check_targets(op, hidden, targets, target_weight)
    if main_grad is not None:
        expect_shape(op, "main_grad", main_grad, "[v/tp, h]", weight.shape)
        _expect_device(op, "main_grad", main_grad, hidden)
        if main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
            raise ValueError(
                f"{op}: main_grad: found {main_grad.dtype} with strides {main_grad.stride()}, "
                "expected torch.float32, contiguous"
            )
        main_grad = main_grad.detach()
    first, tokens = _shard(op, weight.shape[0], vocab_size, tp_group)
    w = reference.weights(hidden, targets, target_weight)
    upstream = _scalar(op, upstream, w)
    if backend == "triton":
        expect_kernel_dtypes(op, hidden=hidden, weight=weight)
        from boreal_kernels.multi_hot_ce import fused as implementation
    else:
        implementation = reference
    loss_sum = implementation.linear_multi_hot_cross_entropy(
        hidden, weight, targets, w, first, tokens, tp_group, main_grad, upstream
    )
    return loss_sum, w.sum()


def _check_targets(op: str, rows: Tensor, targets: Tensor, target_weight: Tensor | None) -> None:
    """Raise ValueError unless targets and weights are [k, T] for the T of `rows` [T, ..]."""
    expect_dims(op, "targets", targets, "[k, T]", 2)
    expect_shape(op, "targets", targets, "[k, T]", (targets.shape[0], rows.shape[0]))
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets: found {targets.dtype}, expected torch.int64")
    _expect_device(op, "targets", targets, rows)
    if target_weight is not None:
        expect_shape(op, "target_weight", target_weight, "[k, T]", targets.shape)
        _expect_device(op, "target_weight", target_weight, rows)


def _expect_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: found it on {tensor.device}, expected {like.device}")


def _shard(op: str, columns: int, vocab_size: int | None, tp_group) -> tuple[int, int]:
    """(global id of this rank's column 0, how many of its columns are not padding)."""
    rank, ranks = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    if vocab_size is None:
        return rank * columns, columns
    if not 1 <= vocab_size <= ranks * columns:
        raise ValueError(f"{op}: vocab_size: found {vocab_size}, expected 1 .. {ranks * columns}, all ranks' columns")
    return rank * columns, max(0, min(columns, vocab_size - rank * columns))


def _scalar(op: str, upstream: float | Tensor | None, w: Tensor) -> Tensor | None:
    """`upstream` as a tensor [] of w's dtype and device."""
    if upstream is None:
        return None
    if not isinstance(upstream, Tensor):
        return torch.full((), float(upstream), dtype=w.dtype, device=w.device)
    expect_shape(op, "upstream", upstream, "[]", ())
    _expect_device(op, "upstream", upstream, w)
    return upstream.detach().to(w.dtype)
