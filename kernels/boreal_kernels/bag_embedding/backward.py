"""Bag embedding, backward.  Shapes: ids [k, T], dout [T, h] -> dweight [rows, h]; the k*T slots are entries.

    dweight[r] = sum over the entries (i, t) with id r of dout[t] / (ids in bag t)

A token may fill one slot in twenty, so the work is shared out by entry, not by token. The entries are sorted by row,
stably; those of other ranks and of absent ids get the key `rows` and come last. Blocks of BLOCK sorted entries are
summed side by side: the run of one row within a block is one program's. A row that lies within a block is finished
there; a row that reaches over a block's end leaves FP32 partial sums, which a second kernel adds in ascending order.
So the order of summation follows from the ids alone, each row has one writer, and the grid follows from the shape
alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.bag_embedding.forward import load_slot, slot_arguments

UNROLL = tl.constexpr(4)  # rows in flight: the sum waits for each, their loads do not


@triton.jit(do_not_specialize=["T", "start", "rows"])
def bag_embedding_keys(
    ids, valid, keys, share, T, start, rows, ids_slot, ids_bag, valid_slot, valid_bag,
    k: tl.constexpr, BAGS: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """keys [k, T]: the local row of every entry, `rows` for those that have none; share [T]: 1 / (ids in the bag)."""
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    inside = bag < T
    count = tl.zeros([BAGS], tl.int32)
    for slot in tl.static_range(k):
        local, here, exists = load_slot(
            ids, valid, slot, bag, inside, ids_slot, ids_bag, valid_slot, valid_bag, start, rows, VALID
        )
        count += exists.to(tl.int32)
        tl.store(keys + slot * T.to(tl.int64) + bag, tl.where(here, local, rows).to(tl.int32), mask=inside)
    tl.store(share + bag, tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32)), mask=inside)


@triton.jit
def finish(dweight, key, column, total, inside, row_stride, column_stride, ADD: tl.constexpr):
    """A row's sum into its place: added there, or stored."""
    at = dweight + key.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total.to(dweight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["entries", "T", "rows"])
def bag_embedding_runs(
    keys, order, share, dout, dweight, partial, entries, T, rows,
    dout_row, dout_column, dweight_row, dweight_column,
    h: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The run of equal keys that begins at an entry, or at the start of a block, up to the block's end.

    partial [blocks, 2, h] FP32: of the run at a block's start, and of one that begins inside it, where the row reaches
    over the block's ends.
    """
    entry = tl.program_id(0)
    key = tl.load(keys + entry)
    before = tl.load(keys + entry - 1, mask=entry > 0, other=-1)
    first = entry // BLOCK * BLOCK
    if (key == rows) | ((entry != first) & (before == key)):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < h
    others = first + tl.arange(0, BLOCK)
    same = tl.load(keys + others, mask=(others >= entry) & (others < entries), other=-1) == key
    length = tl.sum(same.to(tl.int32), axis=0)
    columns = dout + column.to(tl.int64) * dout_column
    total = tl.zeros([WIDTH], tl.float32)
    for done in range(0, length, UNROLL):
        for step in tl.static_range(UNROLL):
            here = done + step < length
            bag = tl.load(order + entry + done + step, mask=here, other=0) % T
            row = tl.load(columns + bag * dout_row, mask=column < tl.where(here, h, 0), other=0.0)
            total += row.to(tl.float32) * tl.load(share + bag, mask=here, other=0.0)
    after = tl.load(keys + first + BLOCK, mask=first + BLOCK < entries, other=-1)
    if (before == key) | (after == key):
        which = (first // BLOCK).to(tl.int64) * 2 + (entry != first).to(tl.int64)
        tl.store(partial + which * h + column, total, mask=inside)
    else:
        finish(dweight, key, column, total, inside, dweight_row, dweight_column, ADD)


@triton.jit(do_not_specialize=["entries", "rows"])
def bag_embedding_joins(
    keys, dweight, partial, entries, rows, dweight_row, dweight_column,
    h: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The row that begins in a block and reaches over its end: its partial sums, in ascending order."""
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    end = first + BLOCK  # below `entries`: the last block has no program
    key = tl.load(keys + end - 1)
    after = tl.load(keys + end)
    at_first = tl.load(keys + first) == key
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    if (key == rows) | (after != key) | (at_first & (before == key)):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < h
    total = tl.load(partial + (block * 2 + 1 - at_first.to(tl.int64)) * h + column, mask=inside, other=0.0)
    block += 1
    more = after == key
    while more:
        for step in tl.static_range(UNROLL):
            first = (block + step) * BLOCK
            more = tl.load(keys + first, mask=first < entries, other=-1) == key  # sorted: no gaps between
            at = (block + step) * 2 * h + column
            total += tl.load(partial + at, mask=column < tl.where(more, h, 0), other=0.0)
        block += UNROLL
    finish(dweight, key, column, total, inside, dweight_row, dweight_column, ADD)


def backward(
    dout: Tensor, ids: Tensor, vocab_start: int, valid: Tensor | None, dweight: Tensor, add: bool
) -> None:
    """Add the weight's gradient to dweight [rows, h], or store its rows that are not zero."""
    k, T = ids.shape
    rows, h = dweight.shape
    entries = k * T
    keys = torch.empty(entries, dtype=torch.int32, device=ids.device)
    share = torch.empty(T, dtype=torch.float32, device=ids.device)
    slots, *strides = slot_arguments(ids, valid)
    use = launch.config("bag_embedding.keys")
    bag_embedding_keys[(triton.cdiv(T, use["BAGS"]),)](
        ids, slots, keys, share, T, vocab_start, rows, *strides,
        k=k, VALID=valid is not None, enable_fp_fusion=True, **use,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)

    use = launch.config("bag_embedding.backward", h=h)
    blocks, tiles = triton.cdiv(entries, use["BLOCK"]), triton.cdiv(h, use["WIDTH"])
    partial = torch.empty(blocks, 2, h, dtype=torch.float32, device=ids.device)
    bag_embedding_runs[(entries, tiles)](
        keys, order, share, dout, dweight, partial, entries, T, rows, *dout.stride(), *dweight.stride(),
        h=h, ADD=add, enable_fp_fusion=True, **use,
    )  # fmt: skip
    if blocks > 1:
        bag_embedding_joins[(blocks - 1, tiles)](
            keys, dweight, partial, entries, rows, *dweight.stride(), h=h, ADD=add, enable_fp_fusion=True, **use
        )
