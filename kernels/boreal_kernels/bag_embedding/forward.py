"""Bag embedding, forward: a program makes WIDTH columns of a bag.  Shapes: ids [k, T], weight [rows, h] -> [T, h]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch


@triton.jit
def load_slot(
    ids, valid, slot, bag, inside, ids_slot, ids_bag, valid_slot, valid_bag, start, rows, VALID: tl.constexpr
):  # fmt: skip
    """What a slot of a bag holds: its local row, whether that is ours, whether the id exists; nothing beyond `inside`.

    64 bits: an absent id may hold anything, and the rows begin beyond 2^31 elements.
    """
    exists = inside
    if VALID:
        exists = tl.load(valid + slot * valid_slot + bag * valid_bag, mask=inside, other=0).to(tl.int1)
    local = tl.load(ids + slot * ids_slot + bag * ids_bag, mask=inside, other=0).to(tl.int64) - start
    return local, exists & (local >= 0) & (local < rows), exists


@triton.jit(do_not_specialize=["start", "rows"])
def bag_embedding_forward(
    ids, valid, weight, out, start, rows, ids_slot, ids_bag, valid_slot, valid_bag, weight_row, weight_column,
    k: tl.constexpr, h: tl.constexpr, WIDTH: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    count = 0
    for slot in tl.static_range(k):
        local, here, exists = load_slot(
            ids, valid, slot, bag, bag >= 0, ids_slot, ids_bag, valid_slot, valid_bag, start, rows, VALID
        )
        count += exists.to(tl.int32)
        # Of a row of another rank no column is read: no traffic, and what lies there may be a NaN.
        width = tl.where(here, h, 0)
        at = local * weight_row + column.to(tl.int64) * weight_column
        row = tl.load(weight + at, mask=column < width, other=0.0).to(tl.float32)
        if slot == 0:
            total = row  # not 0 + row, which would lose the sign of -0.0
        else:
            total += row
    if k > 1:
        total = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))  # an empty bag is 0/1
    tl.store(out + bag * h + column, total.to(out.dtype.element_ty), mask=column < h)


def slot_arguments(ids: Tensor, valid: Tensor | None) -> tuple[Tensor, int, int, int, int]:
    """(valid, strides of ids, strides of valid) for `load_slot`, which does not read `valid` where there is none."""
    valid = ids if valid is None else valid
    return valid, *ids.stride(), *valid.stride()


def forward(ids: Tensor, weight: Tensor, vocab_start: int, valid: Tensor | None) -> Tensor:
    """[T, h], contiguous, in weight.dtype."""
    k, T = ids.shape
    rows, h = weight.shape
    out = torch.empty(T, h, dtype=weight.dtype, device=weight.device)
    slots, *strides = slot_arguments(ids, valid)
    use = launch.config("bag_embedding.forward", h=h)
    bag_embedding_forward[(T, triton.cdiv(h, use["WIDTH"]))](
        ids, slots, weight, out, vocab_start, rows, *strides, *weight.stride(),
        k=k, h=h, VALID=valid is not None, enable_fp_fusion=True, **use,
    )  # fmt: skip
    return out
