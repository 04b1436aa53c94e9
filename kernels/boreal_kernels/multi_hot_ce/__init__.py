"""multi_hot_ce: cross entropy of one prediction against a bag of k targets, over a vocabulary split across ranks.

Shapes: logits [T, v/tp] or hidden [T, h] with weight [v/tp, h]; targets [k, T]. Rank r of tp_group holds the vocabulary
rows r*v/tp .. (r+1)*v/tp - 1.
"""

import torch
from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.multi_hot_ce import reference
from boreal_kernels.shapes import expect_dims, expect_shape


def _check_targets(op: str, T: int, targets: Tensor, target_weight: Tensor | None) -> None:
    expect_dims(op, "targets", targets, "[k, T]", 2)
    expect_shape(op, "targets", targets, "[k, T]", (targets.shape[0], T))
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets: found {targets.dtype}, expected torch.int64")
    if target_weight is not None:
        expect_shape(op, "target_weight", target_weight, "[k, T]", targets.shape)


def multi_hot_cross_entropy(
    logits: Tensor, targets: Tensor, target_weight: Tensor | None, *, tp_group=None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """loss_sum = sum_{i,t} w_it (logsumexp(z_t) - z_t[y_it]) and weight_sum = sum w, in FP32.

    logits [T, v/tp]; targets y [k, T] int64, global ids; target_weight w [k, T], 1/k everywhere if None. A target of
    weight 0 may hold any id, a position whose weights are all 0 any logits, NaN included. A weighted target must lie
    within the vocabulary; that is not checked, it would stall the device.
    tp_group: the torch.distributed group that splits v, None for one rank; every rank gets the same two numbers.
    Returns two scalars; loss_sum is differentiable in logits (d = softmax * sum_i w - scatter(w), in logits.dtype),
    weight_sum and target_weight are not. Raises ValueError for shapes or dtypes that do not fit.
    Source: token superposition training (arXiv 2605.06546); at k = 1 the usual vocabulary-parallel cross entropy.
    """
    op = "multi_hot_cross_entropy"
    resolve(backend, op, device=logits.device)
    expect_dims(op, "logits", logits, "[T, v/tp]", 2)
    _check_targets(op, logits.shape[0], targets, target_weight)
    return reference.multi_hot_cross_entropy(logits, targets, target_weight, tp_group=tp_group)


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_weight: Tensor | None,
    *,
    tp_group=None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """multi_hot_cross_entropy of logits = hidden @ weight.T, without ever holding all the logits.

    hidden [T, h], the same on every rank of tp_group; weight [v/tp, h]; the rest as in multi_hot_cross_entropy.
    The gradient of hidden is this rank's part of it, a sum over its own v/tp rows: the caller owns the tensor-parallel
    reduction (all-reduce, or reduce-scatter under sequence parallelism). The gradient of weight is whole.
    """
    op = "linear_multi_hot_cross_entropy"
    resolve(backend, op, device=hidden.device)
    expect_dims(op, "hidden", hidden, "[T, h]", 2)
    expect_dims(op, "weight", weight, "[v/tp, h]", 2)
    expect_shape(op, "weight", weight, "[v/tp, h]", (weight.shape[0], hidden.shape[1]))
    if weight.dtype != hidden.dtype:
        raise ValueError(f"{op}: weight: found {weight.dtype}, expected hidden's {hidden.dtype}")
    _check_targets(op, hidden.shape[0], targets, target_weight)
    return reference.linear_multi_hot_cross_entropy(hidden, weight, targets, target_weight, tp_group=tp_group)
