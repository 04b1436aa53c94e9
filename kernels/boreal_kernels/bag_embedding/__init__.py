"""bag_embedding: the input of token superposition, the mean embedding of a bag.  Shapes: ids [k, T] -> [T, h]."""

import torch
from torch import Tensor

from boreal_kernels.backend import resolve
from boreal_kernels.bag_embedding import reference
from boreal_kernels.shapes import expect_dims, expect_integers, expect_kernel_dtypes, expect_shape


def bag_embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    vocab_start: int,
    valid: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """This rank's share of (1/k) sum_i E[ids_i]: its rows summed in FP32 and divided, before the tensor-parallel sum.

    ids [k, T] int32 or int64; weight [v/tp, h], the rows vocab_start .. vocab_start + v/tp - 1 of the embedding. Ids of
    other ranks count in the mean but add nothing here. valid [k, T] bool: ids that exist; the divisor is then their
    number in the bag, an absent id may hold anything, a bag without any is zero. main_grad [v/tp, h] FP32: backward
    adds the weight's gradient to it and returns none (the kernels then make no dense one); the caller tells the
    optimizer's hooks.
    Returns [T, h] in weight.dtype; at k = 1 without `valid` the same bits as torch.nn.functional.embedding.
    Differentiable in weight; its gradient is summed in FP32 in a fixed order and rounded once. Raises ValueError for
    shapes, dtypes or devices that do not fit. Source: token superposition training (arXiv 2605.06546).
    """
    op = "bag_embedding"
    backend = resolve(backend, op, device=weight.device)
    expect_dims(op, "ids", ids, "[k, T]", 2)
    expect_dims(op, "weight", weight, "[v/tp, h]", 2)
    expect_integers(op, "ids", ids)
    if vocab_start < 0:
        raise ValueError(f"{op}: vocab_start: found {vocab_start}, expected 0 or more")
    if valid is not None:
        expect_shape(op, "valid", valid, "[k, T]", ids.shape)
        if valid.dtype is not torch.bool:
            raise ValueError(f"{op}: valid: found {valid.dtype}, expected torch.bool")
    if main_grad is not None:
        expect_shape(op, "main_grad", main_grad, "[v/tp, h]", weight.shape)
        if main_grad.dtype is not torch.float32:
            raise ValueError(f"{op}: main_grad: found {main_grad.dtype}, expected torch.float32")
    for name, tensor in (("ids", ids), ("valid", valid), ("main_grad", main_grad)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{op}: {name}: found device {tensor.device}, expected the weight's, {weight.device}")
    if backend == "triton":
        expect_kernel_dtypes(op, weight=weight)
        from boreal_kernels.bag_embedding import fused

        return fused.bag_embedding(ids, weight, vocab_start, valid, main_grad)
    return reference.bag_embedding(ids, weight, vocab_start=vocab_start, valid=valid, main_grad=main_grad)
