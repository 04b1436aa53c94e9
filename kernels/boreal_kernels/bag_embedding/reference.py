"""Bag embedding in plain torch.  Shapes: ids [k, T], weight [v/tp, h] -> [T, h].

The backward is written out so that the gradient is one dense [v/tp, h] for the whole bag, summed in FP32 before it
takes the weight's dtype; torch's own would sum bf16 gradients in bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype


class _BagEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, ids: Tensor, weight: Tensor, vocab_start: int, valid: Tensor | None, main_grad: Tensor | None
    ) -> Tensor:
        k, rows = ids.shape[0], weight.shape[0]
        local = ids - vocab_start
        here = (local >= 0) & (local < rows)
        count = None
        if valid is not None:
            here &= valid
            count = valid.sum(0).clamp_min(1)[:, None]  # [T, 1]; 1 where the bag is empty: 0/1 = 0
        local = local.masked_fill(~here, 0)
        ctx.save_for_backward(local, here, count)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.main_grad = main_grad  # not saved: others add to it between forward and backward

        picked = F.embedding(local, weight).to(accumulate_dtype(weight)).masked_fill(~here[..., None], 0.0)  # [k, T, h]
        total = picked[0] if k == 1 else picked.sum(0)  # sum() of one row would turn -0.0 into 0.0
        return (total / (k if count is None else count)).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        local, here, count = ctx.saved_tensors
        grad = grad.to(accumulate_dtype(grad))
        grad = grad / (local.shape[0] if count is None else count)  # [T, h]
        each = torch.where(here[..., None], grad, 0.0)  # [k, T, h]
        # Ordered, unlike index_add on a GPU: the same batch gives the same bits.
        grad_weight = torch.ops.aten.embedding_dense_backward(each, local, ctx.weight_shape[0], -1, False)
        if ctx.main_grad is None:
            return None, grad_weight.to(ctx.weight_dtype), None, None, None
        ctx.main_grad.add_(grad_weight)
        return None, None, None, None, None


def bag_embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    vocab_start: int,
    valid: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """See the package's docstring."""
    return _BagEmbedding.apply(ids, weight, vocab_start, valid, main_grad)
