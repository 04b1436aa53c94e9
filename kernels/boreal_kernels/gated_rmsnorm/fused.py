"""Gated RMSNorm as torch sees its kernels: custom ops with fake tensors and a gradient."""

import torch
from torch import Tensor

from boreal_kernels.gated_rmsnorm.backward import backward
from boreal_kernels.gated_rmsnorm.forward import forward


@torch.library.custom_op("boreal::gated_rmsnorm", mutates_args=())
def gated_rmsnorm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    return forward(x, gate, weight, eps, activation)


@gated_rmsnorm.register_fake
def _(x, gate, weight, eps, activation):
    return x.new_empty(x.shape)


@torch.library.custom_op("boreal::gated_rmsnorm_backward", mutates_args=())
def gated_rmsnorm_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dy, x, gate, weight, eps, activation)


@gated_rmsnorm_backward.register_fake
def _(dy, x, gate, weight, eps, activation):
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, gate, weight, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(x, gate, weight)


def _gradient(ctx, dy):
    return *gated_rmsnorm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.activation), None, None


gated_rmsnorm.register_autograd(_gradient, setup_context=_setup)
