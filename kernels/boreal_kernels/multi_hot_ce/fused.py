"""Multi-hot cross entropy as torch sees its kernels: custom ops with fake tensors and gradients.

An op that adds to main_grad can have no gradient of its own (torch wants a differentiable op to change nothing). So the
op that computes gradients in the forward stands outside of the graph, and `multi_hot_ce_kept` hands them over inside.

A process group travels by its name, "" for none; an absent gradient as a tensor without elements.
"""

import torch
from torch import Tensor

from boreal_kernels.multi_hot_ce import backward, forward, linear
from boreal_kernels.multi_hot_ce.reference import poison


def multi_hot_cross_entropy(logits: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, tp_group) -> Tensor:
    """loss_sum; w [k, T] FP32, first and tokens as in `forward.statistics`."""
    return multi_hot_ce(_dense(logits), _dense(targets), _dense(w), first, tokens, _name(tp_group))[0]


def linear_multi_hot_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, tp_group,
    main_grad: Tensor | None, upstream: Tensor | None,
) -> Tensor:  # fmt: skip
    """loss_sum; upstream [] FP32, the rest as in the package's docstring and above."""
    hidden, weight, targets, w, group = _dense(hidden), _dense(weight), _dense(targets), _dense(w), _name(tp_group)
    need_hidden = torch.is_grad_enabled() and hidden.requires_grad
    need_weight = torch.is_grad_enabled() and weight.requires_grad
    if upstream is None or not (need_hidden or need_weight):
        return linear_multi_hot_ce(hidden, weight, targets, w, main_grad, first, tokens, group)[0]
    loss, d_hidden, d_weight = linear_multi_hot_ce_at_once(
        upstream, hidden.detach(), weight.detach(), targets, w, main_grad, first, tokens, group,
        need_hidden, need_weight,
    )  # fmt: skip
    return multi_hot_ce_kept(hidden, weight, loss, d_hidden, d_weight, upstream, main_grad)


def _dense(x: Tensor) -> Tensor:
    """x, or a copy where its last dim is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _name(tp_group) -> str:
    return "" if tp_group is None or tp_group.size() == 1 else tp_group.group_name


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


@torch.library.custom_op("boreal::multi_hot_ce", mutates_args=())
def multi_hot_ce(
    logits: Tensor, targets: Tensor, w: Tensor, first: int, tokens: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward.forward(logits, targets, w, first, tokens, group)


@multi_hot_ce.register_fake
def _(logits, targets, w, first, tokens, group):
    return w.new_empty(()), w.new_empty(w.shape[1]), w.new_empty(w.shape[1]), w.new_empty(w.shape)


@torch.library.custom_op("boreal::multi_hot_ce_backward", mutates_args=())
def multi_hot_ce_backward(
    d_loss: Tensor, logits: Tensor, targets: Tensor, w: Tensor, picked: Tensor, top: Tensor, log_sum: Tensor,
    first: int, tokens: int,
) -> Tensor:  # fmt: skip
    return backward.backward(d_loss, logits, targets, w, picked, top, log_sum, first, tokens)


@multi_hot_ce_backward.register_fake
def _(d_loss, logits, targets, w, picked, top, log_sum, first, tokens):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output):
    logits, targets, w, ctx.first, ctx.tokens, _ = inputs
    _, top, log_sum, picked = output
    ctx.save_for_backward(logits, targets, w, picked, top, log_sum)


def _gradient(ctx, d_loss, *_):
    return multi_hot_ce_backward(d_loss, *ctx.saved_tensors, ctx.first, ctx.tokens), None, None, None, None, None


multi_hot_ce.register_autograd(_gradient, setup_context=_setup)


@torch.library.custom_op("boreal::linear_multi_hot_ce", mutates_args=())
def linear_multi_hot_ce(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, main_grad: Tensor | None,
    first: int, tokens: int, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss; main_grad is for the backward."""
    return linear.statistics_only(hidden, weight, targets, w, first, tokens, group)


@linear_multi_hot_ce.register_fake
def _(hidden, weight, targets, w, main_grad, first, tokens, group):
    return w.new_empty(()), w.new_empty(w.shape[1]), w.new_empty(w.shape[1]), w.new_empty(w.shape)


@torch.library.custom_op("boreal::linear_multi_hot_ce_again", mutates_args=("main_grad",))
def linear_multi_hot_ce_again(
    d_loss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor,
    picked: Tensor, top: Tensor, log_sum: Tensor, main_grad: Tensor | None, first: int, tokens: int,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_hidden, d_weight = linear.gradients_again(
        d_loss.to(torch.float32), hidden, weight, targets, w, picked, top, log_sum, main_grad, first, tokens,
        need_hidden, need_weight,
    )  # fmt: skip
    return _or_empty(d_hidden, hidden), _or_empty(d_weight, weight)


@linear_multi_hot_ce_again.register_fake
def _(d_loss, hidden, weight, targets, w, picked, top, log_sum, main_grad, first, tokens, need_hidden, need_weight):
    return _fake_gradients(hidden, weight, main_grad, need_hidden, need_weight)


def _fake_gradients(hidden, weight, main_grad, need_hidden, need_weight):
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return d_hidden, weight.new_empty(weight.shape if need_weight and main_grad is None else 0)


def _setup_again(ctx, inputs, output):
    # main_grad is no saved tensor: other heads and microbatches change it before this one's backward.
    hidden, weight, targets, w, ctx.main_grad, ctx.first, ctx.tokens, _ = inputs
    _, top, log_sum, picked = output
    ctx.save_for_backward(hidden, weight, targets, w, picked, top, log_sum)


def _gradient_again(ctx, d_loss, *_):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = linear_multi_hot_ce_again(
        d_loss, *ctx.saved_tensors, ctx.main_grad, ctx.first, ctx.tokens, need_hidden, need_weight
    )
    d_weight = d_weight if need_weight and ctx.main_grad is None else None
    return d_hidden if need_hidden else None, d_weight, None, None, None, None, None, None


linear_multi_hot_ce.register_autograd(_gradient_again, setup_context=_setup_again)


@torch.library.custom_op("boreal::linear_multi_hot_ce_at_once", mutates_args=("main_grad",))
def linear_multi_hot_ce_at_once(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, main_grad: Tensor | None,
    first: int, tokens: int, group: str, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss, d_hidden, d_weight = linear.gradients_at_once(
        upstream, hidden, weight, targets, w, main_grad, first, tokens, group, need_hidden, need_weight
    )
    return loss, _or_empty(d_hidden, hidden), _or_empty(d_weight, weight)


@linear_multi_hot_ce_at_once.register_fake
def _(upstream, hidden, weight, targets, w, main_grad, first, tokens, group, need_hidden, need_weight):
    return w.new_empty(()), *_fake_gradients(hidden, weight, main_grad, need_hidden, need_weight)


@torch.library.custom_op("boreal::multi_hot_ce_kept", mutates_args=())
def multi_hot_ce_kept(
    hidden: Tensor, weight: Tensor, loss: Tensor, d_hidden: Tensor, d_weight: Tensor, upstream: Tensor,
    main_grad: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss as a function of hidden and weight, whose gradients are there already."""
    return loss.clone()


@multi_hot_ce_kept.register_fake
def _(hidden, weight, loss, d_hidden, d_weight, upstream, main_grad):
    return loss.new_empty(())


def _setup_kept(ctx, inputs, output):
    _, _, _, d_hidden, d_weight, upstream, ctx.main_grad = inputs
    ctx.save_for_backward(d_hidden, d_weight, upstream)


def _gradient_kept(ctx, d_loss):
    d_hidden, d_weight, upstream = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    nan = poison(upstream, d_loss)
    if need_weight and ctx.main_grad is not None and not need_hidden:
        multi_hot_ce_poison(ctx.main_grad, nan)
    return (
        d_hidden + nan.to(d_hidden.dtype) if need_hidden else None,
        d_weight + nan.to(d_weight.dtype) if need_weight and ctx.main_grad is None else None,
        None, None, None, None, None,
    )  # fmt: skip


multi_hot_ce_kept.register_autograd(_gradient_kept, setup_context=_setup_kept)


@torch.library.custom_op("boreal::multi_hot_ce_poison", mutates_args=("main_grad",))
def multi_hot_ce_poison(main_grad: Tensor, nan: Tensor) -> None:
    main_grad[0, 0] += nan


@multi_hot_ce_poison.register_fake
def _(main_grad, nan):
    return None
