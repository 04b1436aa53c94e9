"""Causal depthwise convolution, backward.  Shapes: x [B, T, G, c], C = G*c channels, weight [C, W], N documents.

With w_j the weight of the tap j positions back, a_t the output before the activation, and sums over one document:

    d_t = dy_t act'(a_t)      dx_t = sum over j of w_j d_{t+j}      dw_j = sum over t of d_t x_{t-j}

a_t is computed again from the inputs. The gradient of the initial state is dx at the W - 1 positions before a document;
the gradient of the final state adds to dx at the last W - 1 positions, the initial state's among them.

A program takes BLOCK channels through consecutive positions, with the last W - 1 inputs and the W - 1 unfinished dx in
registers; it stores dx_{t-W+1} when it has d_t. It goes W - 1 positions further than the dx that it owns, and leaves
one partial sum of dw over its own positions; their sum is taken last. Their number is a function of the shape alone.
The initial states' gradients are written by programs of their own in the same launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.causal_conv1d.forward import (
    aligned,
    bounds,
    convolved,
    document_at,
    history,
    inputs_before,
    next_document,
    places,
    read,
    rows_of,
    shifted,
    taps_of,
    time_programs,
)


@triton.jit
def through_activation(grad, out, SILU: tl.constexpr):
    """grad * act'(out)."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-out))
        return grad * (s * (1.0 + out * (1.0 - s)))
    else:
        return grad


@triton.jit
def given(channel, C: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr):
    """The channels to read: C, which is none, for those in parts of which no gradient is given."""
    begin = 0
    for i in tl.static_range(len(SPLIT)):
        if not GIVEN[i]:
            channel = tl.where((channel % WIDTH >= begin) & (channel % WIDTH < begin + SPLIT[i]), C, channel)
        begin = begin + SPLIT[i]
    return channel


@triton.jit
def zeros(count: tl.constexpr, BLOCK: tl.constexpr):
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros([BLOCK], tl.float32),)
    return found


@triton.jit
def added(totals, grad, value, before, W: tl.constexpr):
    """The sums of dw with those of one position."""
    sums = (totals[0] + grad * value,)
    for back in tl.static_range(1, W):
        sums = sums + (totals[back] + grad * before[back - 1],)
    return sums


@triton.jit(do_not_specialize=["T", "N", "blocks", "spans", "programs"])
def causal_conv1d_backward(
    x, weight, cu_seqlens, initial, dys, d_final, dx, partial, d_initial, T, N, blocks, spans, programs,
    state_document, state_channel, state_tap,
    C: tl.constexpr, WIDTH: tl.constexpr, X_ROW: tl.constexpr, X_GROUP: tl.constexpr, SPLIT: tl.constexpr,
    GIVEN: tl.constexpr, ALIGN: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += (channel // WIDTH).to(tl.int64) * X_GROUP + channel % WIDTH
    wanted = given(channel, C, WIDTH, SPLIT, GIVEN)
    taps = taps_of(weight, channel, C, W)
    if initial is not None:
        initial += channel.to(tl.int64) * state_channel
    if d_final is not None:
        d_final += channel * (W - 1)

    if program < programs:
        document = program // spans
        begin = (program % spans) * (blocks * ROWS - (W - 1))
        t = begin
        row = tl.cast(document, tl.int64) * T + t
        if cu_seqlens is not None:
            document = document_at(cu_seqlens, t, N)
        start, end = bounds(cu_seqlens, document, T)
        state = None
        if initial is not None:
            state = initial + tl.cast(document, tl.int64) * state_document
        x += row * X_ROW
        before = inputs_before(x, state, state_tap, t - start, channel, C, X_ROW, W)
        oldest = tl.maximum(begin, start)  # dx of earlier positions is another program's, or none
        dy, dy_row = places(dys, row, channel, C, WIDTH, SPLIT, ALIGN)
        to_dx = dx + row * C + channel
        unfinished = zeros(W - 1, BLOCK)  # dx of the positions before t, nearest first
        totals = zeros(W, BLOCK)
        for block in range(blocks):
            ahead = ()  # all of a block's loads are under way before the first is needed
            grads = ()
            for i in tl.static_range(ROWS):
                ahead = ahead + (read(x + i * X_ROW, channel, t + i < T, C),)
                grads = grads + (read(dy + i * dy_row, wanted, t + i < T, C),)
            for i in tl.static_range(ROWS):
                if t == end:  # the document's last dx are finished; another begins, or the row is over
                    for back in tl.static_range(1, W):
                        value = unfinished[back - 1].to(dx.dtype.element_ty)
                        tl.store(to_dx + (i - back) * C, value, mask=channel < tl.where(t - back >= oldest, C, 0))
                    oldest = t
                    if cu_seqlens is not None:
                        document, end = next_document(cu_seqlens, document, t, N)
                        if initial is not None:
                            state = initial + tl.cast(document, tl.int64) * state_document
                    before = history(state, state_tap, channel, t < T, C, W)
                grad = through_activation(grads[i], convolved(ahead[i], before, taps, W), SILU)
                # The program's last W - 1 positions belong to the next one.
                if i < ROWS - (W - 1):
                    totals = added(totals, grad, ahead[i], before, W)
                elif block < blocks - 1:
                    totals = added(totals, grad, ahead[i], before, W)
                # What d_t adds to positions before its document is not stored.
                finished = unfinished[W - 2] + grad * taps[W - 1]
                there = (t - (W - 1) >= oldest) & (t < T)
                value = finished.to(dx.dtype.element_ty)
                tl.store(to_dx + (i - (W - 1)) * C, value, mask=channel < tl.where(there, C, 0))
                fresh = grad * taps[0]
                if d_final is not None:
                    left = end - t  # positions of the document from this one on
                    d_state = d_final + tl.cast(document, tl.int64) * (C * (W - 1)) + (W - 1 - left)
                    fresh += read(d_state, channel, (left >= 1) & (left <= W - 1), C)
                further = (fresh,)
                for back in tl.static_range(1, W - 1):
                    further = further + (unfinished[back - 1] + grad * taps[back],)
                unfinished = further
                before = shifted(ahead[i], before, W)
                t += 1
            x += ROWS * X_ROW
            dy += ROWS * dy_row
            to_dx += ROWS * C
        to_sums = partial + tl.cast(program, tl.int64) * (W * C) + channel
        for back in tl.static_range(W):
            tl.store(to_sums + (W - 1 - back) * C, totals[back], mask=channel < C)
    elif d_initial is not None:
        document = program - programs
        start, end = bounds(cu_seqlens, document, T)
        row = tl.cast(start, tl.int64)
        if cu_seqlens is None:
            row += tl.cast(document, tl.int64) * T
        x += row * X_ROW
        dy, dy_row = places(dys, row, channel, C, WIDTH, SPLIT, ALIGN)
        state = initial + tl.cast(document, tl.int64) * state_document
        before = history(state, state_tap, channel, True, C, W)
        sums = zeros(W - 1, BLOCK)  # oldest first, as in the state
        for i in tl.static_range(W - 1):
            there = start + i < end
            value = read(x + i * X_ROW, channel, there, C)
            grad = read(dy + i * dy_row, wanted, there, C)
            grad = through_activation(grad, convolved(value, before, taps, W), SILU)
            further = ()
            for tap in tl.static_range(W - 1):
                if tap >= i:
                    further = further + (sums[tap] + tl.where(there, grad * taps[i + W - 1 - tap], 0.0),)
                else:
                    further = further + (sums[tap],)
            sums = further
            before = shifted(value, before, W)
        to_state = d_initial + (tl.cast(document, tl.int64) * C + channel) * (W - 1)
        for tap in tl.static_range(W - 1):
            total = sums[tap]
            if d_final is not None:  # a document of less than W - 1 positions hands some of its initial state on
                d_state = d_final + tl.cast(document, tl.int64) * (C * (W - 1)) + (tap - (end - start))
                total += read(d_state, channel, tap >= end - start, C)
            tl.store(to_state + tap, total.to(d_initial.dtype.element_ty), mask=channel < C)


def backward(
    grads: list[Tensor | None], x: Tensor, weight: Tensor, activation: str | None, cu_seqlens: Tensor | None,
    initial_state: Tensor | None, output_final_state: bool, split: list[int],
) -> list[Tensor]:  # fmt: skip
    """dx [B, T, G, c], dweight and, if there is an initial state, its gradient: contiguous, each in its tensor's dtype.

    `grads`: of what `forward` returns. None: zeros.
    """
    B, T, G, c = x.shape
    C, W = weight.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_initial = None
    if initial_state is not None:
        d_initial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    d_final = grads[-1] if output_final_state else None
    dys = grads[: len(split)]
    use = launch.config("causal_conv1d.backward", itemsize=x.element_size())
    tiles = triton.cdiv(C, use["BLOCK"])
    blocks, spans = time_programs(B, T, use["ROWS"], W - 1, max(1, use.pop("PROGRAMS") // tiles))
    partial = torch.empty(B * spans, W, C, dtype=torch.float32, device=x.device)
    x, x_row, x_group = rows_of(x)
    causal_conv1d_backward[(B * spans + (0 if d_initial is None else N), tiles)](
        x, weight.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(), initial_state,
        tuple(dx if dy is None else dy.contiguous() for dy in dys),  # one that is not given is not read
        None if d_final is None else d_final.contiguous(), dx, partial, d_initial, T, N, blocks, spans, B * spans,
        *(initial_state.stride() if initial_state is not None else (0,) * 3),
        C=C, WIDTH=c, X_ROW=x_row, X_GROUP=x_group, SPLIT=tuple(split), GIVEN=tuple(dy is not None for dy in dys),
        ALIGN=aligned(split), W=W, SILU=activation == "silu", enable_fp_fusion=True, **use,
    )  # fmt: skip
    dweight = partial.sum(0).t().to(weight.dtype).contiguous()
    return [dx, dweight] + ([] if d_initial is None else [d_initial])
