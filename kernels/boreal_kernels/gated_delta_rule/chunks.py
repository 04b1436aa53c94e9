"""Where the chunks lie, and how kernels walk views.  Shapes: N sequences, C = 64 positions a chunk.

A sequence is a document of the packed row, or one of B rows. Every sequence is cut into chunks from its own first
position, so no chunk holds two of them; only the last is short. How many there are depends on lengths that the host
does not know: tables on the device say what each program does, and grids are as large as lengths could make them.

    spans   [N, 4] int32       first chunk, batch row, first position, length
    chunks  [bound, 4] int32   sequence, batch row, first position, length: 0 beyond the last chunk
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64


@triton.jit(do_not_specialize=["T", "N", "bound"])
def chunk_table(cu_seqlens, spans, chunks, T, N, bound, PACKED: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """One program a sequence. Whatever cu_seqlens holds, no entry of a table points outside of memory."""
    n = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if PACKED:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            at = start + lane
            begins = tl.load(cu_seqlens + at, mask=at < n, other=0).to(tl.int32)
            ends = tl.load(cu_seqlens + at + 1, mask=at < n, other=0).to(tl.int32)
            total += (tl.maximum(ends - begins, 0) + C - 1) // C
        first = tl.minimum(tl.sum(total), bound)
        begin = tl.maximum(tl.minimum(tl.load(cu_seqlens + n).to(tl.int32), T), 0)
        end = tl.maximum(tl.minimum(tl.load(cu_seqlens + n + 1).to(tl.int32), T), begin)
        length = tl.minimum(end - begin, (bound - first) * C)
        batch = 0
    else:
        first = n * ((T + C - 1) // C)
        begin = 0
        length = T
        batch = n
    tl.store(spans + n * 4, first)
    tl.store(spans + n * 4 + 1, batch)
    tl.store(spans + n * 4 + 2, begin)
    tl.store(spans + n * 4 + 3, length)
    count = (length + C - 1) // C
    if n == N - 1:
        count = bound - first
    for start in range(0, count, BLOCK):
        at = start + lane
        row = chunks + (first + at) * 4
        tl.store(row, tl.zeros([BLOCK], tl.int32) + n, mask=at < count)
        tl.store(row + 1, tl.zeros([BLOCK], tl.int32) + batch, mask=at < count)
        tl.store(row + 2, begin + at * C, mask=at < count)
        tl.store(row + 3, tl.maximum(tl.minimum(length - at * C, C), 0), mask=at < count)


def table(B: int, T: int, cu_seqlens: Tensor | None, device) -> tuple[Tensor, Tensor]:
    """(spans, chunks) of B rows of T positions, or of the documents in one row."""
    N, bound = counts(B, T, cu_seqlens)
    spans = torch.empty(N, 4, dtype=torch.int32, device=device)
    chunks = torch.empty(bound, 4, dtype=torch.int32, device=device)
    packed = cu_seqlens is not None
    chunk_table[(N,)](
        cu_seqlens.contiguous() if packed else spans, spans, chunks, T, N, bound,
        PACKED=packed, C=CHUNK, BLOCK=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return spans, chunks


def counts(B: int, T: int, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(sequences, the most chunks that they can have)."""
    if cu_seqlens is None:
        return B, B * triton.cdiv(T, CHUNK)
    N = cu_seqlens.numel() - 1
    return N, min(T, T // CHUNK + N)  # at most one short chunk a document, and none without a position


def walk(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, batch, time, head): strides of x [B, T, H, D], copied where its last dim is not dense."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, *walk_gates(x)[1:]


def walk_gates(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, batch, time, head): strides of x [B, T, HV, ..]; batch is 0 with one row, whatever its length."""
    return x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2)
