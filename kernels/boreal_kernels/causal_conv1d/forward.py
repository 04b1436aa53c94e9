"""Causal depthwise convolution, forward.  Shapes: x [B, T, G, c], C = G*c channels, weight [C, W], N documents.

A program takes BLOCK channels through consecutive positions and keeps the last W - 1 inputs in registers, so that each
input is read once. Where a document begins they are replaced by what came before it: its initial state, or zeros. So a
tap never reaches into another document, whatever the lengths, and the grid is a function of the shape alone. The final
states are written by programs of their own in the same launch, so one position is decoded by one launch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch


@triton.jit
def document_at(cu_seqlens, t, N):
    """Index of the document that holds position t."""
    low = 0
    high = N - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle + 1).to(tl.int32) <= t:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def next_document(cu_seqlens, document, t, N):
    """(index, end) of the document that begins at t, where `document` ends. Past the last one: that one."""
    document = tl.minimum(document + 1, N - 1)
    end = tl.load(cu_seqlens + document + 1).to(tl.int32)
    while (end <= t) & (document < N - 1):  # documents without a position
        document += 1
        end = tl.load(cu_seqlens + document + 1).to(tl.int32)
    return document, end


@triton.jit
def bounds(cu_seqlens, document, T):
    """[start, end) of a document; without packing each row is one."""
    start, end = 0, T
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + document).to(tl.int32)
        end = tl.load(cu_seqlens + document + 1).to(tl.int32)
    return start, end


@triton.jit
def read(x, channel, there, C: tl.constexpr):
    """The channels that `x` points at, FP32, zeros if they are not `there`: one truth for the whole row."""
    return tl.load(x, mask=channel < tl.where(there, C, 0), other=0.0).to(tl.float32)


@triton.jit
def history(state, stride, channel, there, C: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before a document, nearest first, FP32; zeros without a `state` or if it is not `there`."""
    before = ()
    for back in tl.static_range(1, W):
        if state is None:
            before = before + (tl.zeros(channel.shape, tl.float32),)
        else:
            before = before + (read(state + (W - 1 - back) * stride, channel, there, C),)
    return before


@triton.jit
def inputs_before(x, state, stride, age, channel, C: tl.constexpr, X_ROW: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before row x, which is the document's number `age`, nearest first, FP32."""
    before = ()
    for back in tl.static_range(1, W):
        value = read(x - back * X_ROW, channel, age >= back, C)
        if state is not None:
            earlier = read(state + (W - 1 + age - back) * stride, channel, age < back, C)
            value = tl.where(age >= back, value, earlier)
        before = before + (value,)
    return before


@triton.jit
def taps_of(weight, channel, C: tl.constexpr, W: tl.constexpr):
    """The weights by distance, that of the position itself first, FP32."""
    taps = ()
    for back in tl.static_range(W):
        taps = taps + (tl.load(weight + channel * W + (W - 1 - back), mask=channel < C, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def convolved(value, before, taps, W: tl.constexpr):
    """The output at one position before the activation."""
    out = value * taps[0]
    for back in tl.static_range(1, W):
        out += before[back - 1] * taps[back]
    return out


@triton.jit
def shifted(value, before, W: tl.constexpr):
    """`before` of the next position."""
    after = (value,)
    for back in tl.static_range(1, W - 1):
        after = after + (before[back - 1],)
    return after


@triton.jit
def places(
    parts, row, channel, C: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Where the channels of a row lie among the contiguous `parts`, [rows, G, SPLIT[i]] each, and a row's length there.

    ALIGN divides every SPLIT[i], and tells the compiler how many channels side by side stay so in every row.
    """
    group = channel // WIDTH
    within = channel % WIDTH
    begin = SPLIT[0]
    place = parts[0] + row * (C // WIDTH * SPLIT[0]) + (group * SPLIT[0] + within)
    size = tl.full(channel.shape, SPLIT[0] // ALIGN, tl.int32)
    for i in tl.static_range(1, len(SPLIT)):
        here = parts[i] + row * (C // WIDTH * SPLIT[i]) + (group * SPLIT[i] + within - begin)
        place = tl.where(within >= begin, here, place)
        size = tl.where(within >= begin, SPLIT[i] // ALIGN, size)
        begin = begin + SPLIT[i]
    return place, size * (C // WIDTH * ALIGN)


@triton.jit(do_not_specialize=["T", "N", "blocks", "spans", "programs"])
def causal_conv1d_forward(
    x, weight, cu_seqlens, initial, parts, final, T, N, blocks, spans, programs,
    state_document, state_channel, state_tap,
    C: tl.constexpr, WIDTH: tl.constexpr, X_ROW: tl.constexpr, X_GROUP: tl.constexpr, SPLIT: tl.constexpr,
    ALIGN: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += (channel // WIDTH).to(tl.int64) * X_GROUP + channel % WIDTH
    if initial is not None:
        initial += channel.to(tl.int64) * state_channel

    if program < programs:
        document = program // spans
        t = (program % spans) * (blocks * ROWS)
        row = tl.cast(document, tl.int64) * T + t
        if cu_seqlens is not None:
            document = document_at(cu_seqlens, t, N)
        start, end = bounds(cu_seqlens, document, T)
        state = None
        if initial is not None:
            state = initial + tl.cast(document, tl.int64) * state_document
        x += row * X_ROW
        before = inputs_before(x, state, state_tap, t - start, channel, C, X_ROW, W)
        taps = taps_of(weight, channel, C, W)
        y, y_row = places(parts, row, channel, C, WIDTH, SPLIT, ALIGN)
        for _ in range(blocks):
            ahead = ()  # all of a block's loads are under way before the first is needed
            for i in tl.static_range(ROWS):
                ahead = ahead + (read(x + i * X_ROW, channel, t + i < T, C),)
            for i in tl.static_range(ROWS):
                if cu_seqlens is not None:
                    if t == end:
                        document, end = next_document(cu_seqlens, document, t, N)
                        if initial is not None:
                            state = initial + tl.cast(document, tl.int64) * state_document
                        before = history(state, state_tap, channel, t < T, C, W)
                out = convolved(ahead[i], before, taps, W)
                if SILU:
                    out = out / (1.0 + tl.exp(-out))
                tl.store(y + i * y_row, out.to(y.dtype.element_ty), mask=channel < tl.where(t < T, C, 0))
                before = shifted(ahead[i], before, W)
                t += 1
            x += ROWS * X_ROW
            y += ROWS * y_row
    elif final is not None:
        document = program - programs
        start, end = bounds(cu_seqlens, document, T)
        x += tl.cast(end, tl.int64) * X_ROW
        if cu_seqlens is None:
            x += tl.cast(document, tl.int64) * T * X_ROW
        state = None
        if initial is not None:
            state = initial + tl.cast(document, tl.int64) * state_document
        last = inputs_before(x, state, state_tap, end - start, channel, C, X_ROW, W)
        at = final + (tl.cast(document, tl.int64) * C + channel) * (W - 1)
        for back in tl.static_range(1, W):
            tl.store(at + (W - 1 - back), last[back - 1].to(final.dtype.element_ty), mask=channel < C)


def rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    """How a kernel walks x [B, T, G, c]: (x as rows [B*T, G, c], the strides of a row and of a group).

    A view whose rows are evenly spaced and whose last dim is dense is walked where it lies, else x is a copy. The
    strides are constants of the kernel: they are the projection's, and say how many channels a thread may read at once.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    x = x.flatten(0, 1)
    return x, x.stride(0), x.stride(1)


def aligned(split: list[int]) -> int:
    """The largest power of 2 that divides every size, 8 at most: 16 bytes of bf16 is a thread's longest read."""
    return math.gcd(8, *split)


def time_programs(B: int, T: int, steps: int, lost: int, wanted: int) -> tuple[int, int]:
    """(blocks of `steps` positions for each program, programs for each row of T), about `wanted` programs in all.

    `lost`: positions of each program that the next one does again.
    """
    blocks = max(1, triton.cdiv(triton.cdiv(B * T, wanted) + lost, steps))
    return blocks, triton.cdiv(T, blocks * steps - lost)


def forward(
    x: Tensor, weight: Tensor, activation: str | None, cu_seqlens: Tensor | None, initial_state: Tensor | None,
    output_final_state: bool, split: list[int],
) -> list[Tensor]:  # fmt: skip
    """The parts of y [B, T, G, split[i]], contiguous, and the final state [N, C, W-1] if asked for, in x.dtype."""
    B, T, G, c = x.shape
    C, W = weight.shape
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    parts = [torch.empty(B, T, G, size, dtype=x.dtype, device=x.device) for size in split]
    final = torch.empty(N, C, W - 1, dtype=x.dtype, device=x.device) if output_final_state else None
    use = launch.config("causal_conv1d.forward", itemsize=x.element_size())
    tiles = triton.cdiv(C, use["BLOCK"])
    blocks, spans = time_programs(B, T, use["ROWS"], 0, max(1, use.pop("PROGRAMS") // tiles))
    x, x_row, x_group = rows_of(x)
    causal_conv1d_forward[(B * spans + (N if output_final_state else 0), tiles)](
        x, weight.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(), initial_state, tuple(parts),
        final, T, N, blocks, spans, B * spans, *(initial_state.stride() if initial_state is not None else (0,) * 3),
        C=C, WIDTH=c, X_ROW=x_row, X_GROUP=x_group, SPLIT=tuple(split), ALIGN=aligned(split), W=W,
        SILU=activation == "silu", enable_fp_fusion=True, **use,
    )  # fmt: skip
    return parts + ([final] if output_final_state else [])
