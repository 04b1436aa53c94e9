"""Bag embedding as torch sees its kernels: custom ops with fake tensors and a gradient."""

import torch
from torch import Tensor

from boreal_kernels.bag_embedding.backward import backward
from boreal_kernels.bag_embedding.forward import forward


@torch.library.custom_op("boreal::bag_embedding", mutates_args=())
def bag_embedding(
    ids: Tensor, weight: Tensor, vocab_start: int, valid: Tensor | None, main_grad: Tensor | None
) -> Tensor:
    return forward(ids, weight, vocab_start, valid)


@bag_embedding.register_fake
def _(ids, weight, vocab_start, valid, main_grad):
    return weight.new_empty(ids.shape[1], weight.shape[1])


@torch.library.custom_op("boreal::bag_embedding_backward", mutates_args=())
def bag_embedding_backward(dout: Tensor, ids: Tensor, vocab_start: int, valid: Tensor | None, rows: int) -> Tensor:
    dweight = dout.new_zeros(rows, dout.shape[1])
    backward(dout, ids, vocab_start, valid, dweight, add=False)
    return dweight


@bag_embedding_backward.register_fake
def _(dout, ids, vocab_start, valid, rows):
    return dout.new_empty(rows, dout.shape[1])


@torch.library.custom_op("boreal::bag_embedding_add_gradient", mutates_args=("main_grad",))
def bag_embedding_add_gradient(
    dout: Tensor, ids: Tensor, vocab_start: int, valid: Tensor | None, main_grad: Tensor
) -> None:
    backward(dout, ids, vocab_start, valid, main_grad, add=True)


@bag_embedding_add_gradient.register_fake
def _(dout, ids, vocab_start, valid, main_grad):
    return None


def _setup(ctx, inputs, output):
    ids, weight, ctx.vocab_start, valid, main_grad = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids, valid)
    # Not saved: others add to this buffer between forward and backward, which autograd would take for a mistake.
    ctx.main_grad = main_grad


def _gradient(ctx, dout):
    ids, valid = ctx.saved_tensors
    dweight = None
    if ctx.main_grad is None:
        dweight = bag_embedding_backward(dout, ids, ctx.vocab_start, valid, ctx.rows)
    else:
        bag_embedding_add_gradient(dout, ids, ctx.vocab_start, valid, ctx.main_grad)
    return None, dweight, None, None, None


bag_embedding.register_autograd(_gradient, setup_context=_setup)
