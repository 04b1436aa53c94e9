"""What context-parallel ranks exchange inside the sequence mixers; everything outside them works position by position.

Each rank holds one contiguous chunk of the packed row, in rank order (`data.batch.chunk`). What depends on documents
is decided from the row's edges on the host (`packing.Packing.edges`), and every rank takes part in every exchange of
the forward and of the backward pass whatever its documents are, so that no rank waits for one that has nothing to say.
All functions are differentiable.

Shapes: cp ranks, T positions of the row, t = T / cp of a chunk, H key heads and HV value heads of this tensor-parallel
rank, K key and V value head dim, C convolution channels, W convolution taps.
"""

from bisect import bisect_left, bisect_right

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region

# ---------------------------------------------------------------- attention


def halves(rank, size):
    """Which two of the row's 2 * cp halves a rank computes: an early one, which has few keys to look at, and a late
    one, which has many; every rank's sum is the same."""
    return rank, 2 * size - 1 - rank


def to_zigzag(x, group):
    """This rank's chunk [t, ..] -> the two halves it computes, [t, ..], in row order. Each half has t/2 positions."""
    assert x.shape[0] % 2 == 0, (
        f"a context-parallel chunk of {x.shape[0]} positions has no halves: 2 * {group.size()} must divide the row"
    )
    leave, arrive, swap = _routes(group)
    splits = [[count * x.shape[0] // 2 for count in counts] for counts in (arrive, leave)]
    return all_to_all(group, _swap(x) if swap else x, *splits)


def from_zigzag(x, group):
    """The inverse of `to_zigzag`."""
    leave, arrive, swap = _routes(group)
    splits = [[count * x.shape[0] // 2 for count in counts] for counts in (leave, arrive)]
    x = all_to_all(group, x, *splits)
    return _swap(x) if swap else x


def _routes(group):
    """Halves of this rank's chunk that each rank computes, halves that come from each, and whether the chunk's second
    half goes to the lower rank: an all-to-all sends in rank order."""
    rank, size = group.rank(), group.size()
    leave, arrive = [0] * size, [0] * size
    for half in (2 * rank, 2 * rank + 1):
        leave[half if half < size else 2 * size - 1 - half] += 1
    for half in halves(rank, size):
        arrive[half // 2] += 1
    return leave, arrive, 2 * rank >= size


def _swap(x):
    return x.roll(x.shape[0] // 2, dims=0)


def gather_keys_values(key, value, group):
    """Keys and values of the whole row, [t, 1, g, d] -> [T, 1, g, d] each, by one collective; their gradients are
    summed over the ranks that looked at them."""
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=group)  # [T, 2, g, d]
    return both.split(1, dim=1)


# ---------------------------------------------------------------- Gated DeltaNet by heads


def positions_to_heads(x, group):
    """[t, H, d] of a chunk -> [T, H/cp, d]: the whole row, this rank's share of the heads."""
    x = x.unflatten(1, (group.size(), -1)).transpose(0, 1)  # [cp, t, H/cp, d], the receiver leads
    return all_to_all(group, x.flatten(0, 1))


def heads_to_positions(x, group):
    """The inverse of `positions_to_heads`."""
    x = all_to_all(group, x).unflatten(0, (group.size(), -1))  # [cp, t, H/cp, d], the sender leads
    return x.transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- Gated DeltaNet by state


def previous_inputs(x, count, edges, group):
    """What the convolution reads before the chunk: the last `count` = W - 1 inputs of the rank before.

    Positions of another document than the chunk's first are zeros, cut off rather than multiplied, so that a NaN in
    one document cannot reach the next. The first rank receives from the last, and drops all of it.

    Args:
        x: [t, C] convolution inputs, t >= count.

    Returns:
        [count, C], oldest first.
    """
    rank, size, t = group.rank(), group.size(), x.shape[0]
    assert t >= count, f"a context-parallel chunk of {t} positions is shorter than the {count} the convolution reads"
    to, source = [0] * size, [0] * size
    to[(rank + 1) % size] = source[(rank - 1) % size] = count
    received = all_to_all(group, x[t - count :], source, to)
    begin = edges[bisect_right(edges, rank * t) - 1]  # where the document of the chunk's first position begins
    same = min(count, rank * t - begin)
    return F.pad(received[count - same :], (0, 0, count - same, 0))


def last_stretch(edges, t, group):
    """Where in the chunk its last stretch of one document begins, 0..t-1."""
    begin, end = group.rank() * t, (group.rank() + 1) * t
    return max(edges[bisect_left(edges, end) - 1] - begin, 0)


def entering_state(state, transition, edges, t, group):
    """The recurrent state with which this rank's chunk begins, zero where a document begins with it.

    Every rank gives what its last stretch of one document does to a state S that enters it, S -> transition S + state.
    The state after chunk j is that, with what entered chunk j if the stretch fills the chunk, else with zero:

        S_in(j+1) = state(j) + [fills(j)] transition(j) S_in(j),   S_in(j) = 0 unless a document continues into j

    Args:
        state: [HV, K, V] FP32.
        transition: [HV, K, K] FP32.

    Returns:
        [HV, K, V] FP32. Both passes exchange in FP32: a state is a sum over the whole document.
    """
    return _EnteringState.apply(state, transition, edges, t, group)


class _EnteringState(torch.autograd.Function):
    """With D(j) the gradient of S_in(j) and G(j) that of the state after chunk j, folded from the last rank down:

        G(j) = D(j+1) if a document continues into j+1, else 0;   D(j) = own gradient + [fills(j)] transition(j)^T G(j)
        d state(j) = G(j),   d transition(j) = [fills(j)] G(j) S_in(j)^T
    """

    @staticmethod
    def forward(ctx, state, transition, edges, t, group):
        rank, size = group.rank(), group.size()
        begins = range(0, size * t, t)
        following = [edges[bisect_left(edges, begin)] for begin in begins]  # the first edge at the chunk or after
        continues = [edge > begin for edge, begin in zip(following, begins)]
        fills = [edge >= begin + t for edge, begin in zip(following, begins)]

        pairs = _all_gather(torch.cat([state, transition], dim=-1), group)  # [cp, HV, K, V + K]
        states, transitions = pairs.split([state.shape[-1], transition.shape[-1]], dim=-1)
        entering = torch.zeros_like(state)
        for j in range(rank):
            entering = states[j] + transitions[j] @ entering if fills[j] else states[j]
        entering = entering.clone() if continues[rank] else torch.zeros_like(state)

        ctx.continues, ctx.fills, ctx.group = continues, fills, group
        ctx.save_for_backward(entering, transitions[rank + 1 :].contiguous())
        return entering

    @staticmethod
    def backward(ctx, grad):
        entering, later = ctx.saved_tensors
        rank, size = ctx.group.rank(), ctx.group.size()
        own = _all_gather(grad, ctx.group)  # [cp, HV, K, V]
        leaving = torch.zeros_like(grad)
        for j in reversed(range(rank + 1, size)):
            entered = own[j] + later[j - rank - 1].mT @ leaving if ctx.fills[j] else own[j]
            leaving = entered if ctx.continues[j] else torch.zeros_like(grad)
        transition = leaving @ entering.mT
        if not ctx.fills[rank]:
            transition = torch.zeros_like(transition)
        return leaving, transition, None, None, None


def _all_gather(x, group):
    """[d, ..] -> [cp, d, ..]."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.unflatten(0, (group.size(), -1))
