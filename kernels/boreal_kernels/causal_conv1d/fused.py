"""The causal convolution as torch sees its kernels: custom ops with fake tensors and a gradient.

Both return a list, for the number of results depends on the arguments: the parts of y, then the final state; dx,
dweight, then the initial state's gradient. x is always [B, T, G, c] here, and `split` has at least one part.
"""

import torch
from torch import Tensor

from boreal_kernels.causal_conv1d.backward import backward
from boreal_kernels.causal_conv1d.forward import forward


@torch.library.custom_op("boreal::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    split: list[int],
) -> list[Tensor]:
    return forward(x, weight, activation, cu_seqlens, initial_state, output_final_state, split)


@causal_conv1d.register_fake
def _(x, weight, activation, cu_seqlens, initial_state, output_final_state, split):
    B, T, G, _ = x.shape
    C, W = weight.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [x.new_empty(B, T, G, size) for size in split] + [x.new_empty(N, C, W - 1)] * output_final_state


@torch.library.custom_op("boreal::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    grads: list[Tensor | None],
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    split: list[int],
) -> list[Tensor]:
    return backward(grads, x, weight, activation, cu_seqlens, initial_state, output_final_state, split)


@causal_conv1d_backward.register_fake
def _(grads, x, weight, activation, cu_seqlens, initial_state, output_final_state, split):
    return [t.new_empty(t.shape) for t in (x, weight, initial_state) if t is not None]


def _setup(ctx, inputs, output):
    x, weight, ctx.activation, cu_seqlens, initial_state, ctx.final, ctx.split = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, initial_state)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grads):
    x, weight, cu_seqlens, initial_state = ctx.saved_tensors
    found = causal_conv1d_backward(
        list(grads), x, weight, ctx.activation, cu_seqlens, initial_state, ctx.final, ctx.split
    )
    d_initial = found[2] if initial_state is not None else None
    return found[0], found[1], None, None, d_initial, None, None


causal_conv1d.register_autograd(_gradient, setup_context=_setup)


def apply(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    split: tuple[int, ...] | None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
    """See the package's docstring."""
    groups = x if x.dim() == 4 else x[:, :, None]
    sizes = list(split or groups.shape[-1:])
    found = causal_conv1d(groups, weight, activation, cu_seqlens, initial_state, output_final_state, sizes)
    y = tuple(found[: len(sizes)]) if split else found[0].view(x.shape)
    return y, found[-1] if output_final_state else None
