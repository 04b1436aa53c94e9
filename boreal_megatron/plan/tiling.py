"""Whether pieces make up full tensors: every element held exactly once, declared copies aside."""

from bisect import bisect_left
from collections import defaultdict
from itertools import product
from math import prod
from typing import NamedTuple


class Piece(NamedTuple):
    """The box at `offset` with `size` of a full tensor of `shape`, on a rank.

    `replica` is all zeros for a piece that counts; any other is a copy, which a piece that counts must equal.
    """

    key: str
    shape: tuple
    offset: tuple
    size: tuple
    rank: int
    replica: tuple = (0,)


def tiling(pieces, whole):
    """Problems as lines of text: a hole, an overlap, a copy of nothing; a tensor missing, unknown or of another shape.

    Args:
        pieces: Pieces, of all ranks.
        whole: {key: shape} of the full tensors.
    """
    by_key = defaultdict(list)
    for piece in pieces:
        by_key[piece.key].append(piece)
    found = [f"{key}: hole: no rank has any of it" for key in whole if key not in by_key]
    for key, mine in by_key.items():
        if key in whole:
            found += (f"{key}: {problem}" for problem in _tiling(mine, whole[key]))
        else:
            found.append(f"{key}: the network has no such tensor, {_ranks({p.rank for p in mine})} has")
    return found


def _tiling(pieces, shape):
    """Problems of one tensor. Where pieces begin and end cuts it into cells; each belongs to one piece that counts."""
    fits = []
    for p in pieces:
        if _fits(p, shape):
            fits.append(p)
        else:
            yield f"rank {p.rank} has {_box(p.offset, p.size)} of {p.shape}; the tensor is {shape}"
    edges = [{0, full} for full in shape]
    for p in fits:
        for axis, (a, n) in enumerate(zip(p.offset, p.size)):
            edges[axis] |= {a, a + n}
    cuts = [sorted(e) for e in edges]
    holders = {cell: [] for cell in product(*(range(len(c) - 1) for c in cuts))}
    copies, counted = defaultdict(list), set()
    for p in fits:
        if any(p.replica):
            copies[p.offset, p.size, p.replica].append(p.rank)
            continue
        counted.add((p.offset, p.size))
        spans = [range(bisect_left(c, a), bisect_left(c, a + n)) for c, a, n in zip(cuts, p.offset, p.size)]
        for cell in product(*spans):
            holders[cell].append(p.rank)

    def say(cells):
        """(elements of all cells, the first one's box)."""
        boxes = [([c[i] for c, i in zip(cuts, cell)], [c[i + 1] - c[i] for c, i in zip(cuts, cell)]) for cell in cells]
        return f"{sum(prod(size) for _, size in boxes):,} elements", _box(*boxes[0])

    if holes := [cell for cell, ranks in holders.items() if not ranks]:
        elements, box = say(holes)
        yield f"hole of {elements}: no rank has {box} of {shape}; {_ranks({p.rank for p in pieces})} has other parts"
    if overlaps := [cell for cell, ranks in holders.items() if len(ranks) > 1]:
        elements, box = say(overlaps)
        yield f"overlap of {elements}: {_ranks(holders[overlaps[0]])} has {box} of {shape}"
    for (offset, size, replica), ranks in copies.items():
        if len(ranks) > 1:
            yield f"overlap: {_ranks(ranks)} has {_box(offset, size)} as the same copy {replica}"
        elif (offset, size) not in counted:
            yield f"rank {ranks[0]} has a copy of {_box(offset, size)}, which no rank has as its own"


def _fits(piece, shape):
    inside = all(0 <= a and a + n <= full for a, n, full in zip(piece.offset, piece.size, shape))
    return inside and piece.shape == shape and len(piece.offset) == len(piece.size) == len(shape)


def _ranks(ranks):
    """For example `rank 3`, or `each of ranks 0, 1, 2 and 61 more`; a rank that has something twice is named twice."""
    ranks = sorted(ranks)
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {', '.join(map(str, ranks[:3]))}{more}"


def _box(offset, size):
    return f"[{', '.join(f'{a}:{a + n}' for a, n in zip(offset, size))}]"
