"""What a rank holds from the first step to the last: weights, gradients, optimizer state. Exact, from shapes alone.

megatron-core's DDP lays a chunk's gradients out in one buffer for each dtype and kind (dense or expert), parameters last
to first. With the distributed optimizer each parameter begins at a multiple of 64 elements, a buffer ends at a multiple
of 128 and of its data-parallel size, and each of its data-parallel ranks owns the state of an equal stretch of it
(megatron-core 0.19.2, optimizer/param_layout.py and distrib_optimizer.py). `boreal check --dry-run` reads the same
bytes off the buffers themselves; tests compare the two.
"""

from functools import cache, partial
from math import lcm
from typing import NamedTuple

from boreal_megatron.config.layout import padded_vocab, stage_pattern
from boreal_megatron.config.pattern import expand

START, END = 64, 128  # elements: what a parameter begins at, and a bucket ends at, with the distributed optimizer
MOMENTS, MASTER = 8, 4  # bytes an element
FP32, BF16 = 4, 2


class Weight(NamedTuple):
    """One parameter of a rank: `elements` of it there. `alone` has a bucket of its own: it is tied across stages.
    `rows` of the vocabulary have their gradient added up in FP32, beside a bf16 buffer if that is what the run has.
    `product`: FP8 computes with it, where the run has FP8."""

    elements: int
    fp32: bool = False
    expert: bool = False
    alone: bool = False
    rows: bool = False
    product: bool = False


def chunks(config):
    """For each pipeline rank its chunks of the network, as (letters, has the embedding, has the head and MTP)."""
    cut = config.parallel
    main = stage_pattern(config.model.pattern, cut).partition("/")[0].split("|")
    last = len(main) - 1
    stages = [(letters, number == 0, number == last) for number, letters in enumerate(main)]
    return [stages[rank :: cut.pipeline] for rank in range(cut.pipeline)]


def weights(config, letters, first, last):
    """The Weights of one chunk in the network's order, of one tensor- and expert-parallel rank."""
    model, cut = config.model, config.parallel
    _, mtp = expand(model.pattern)
    h, rows = model.hidden_size, padded_vocab(model) // cut.tensor * model.hidden_size
    several, tied = cut.pipeline > 1, model.tie_embeddings
    found = []
    if first or (last and mtp):
        found.append(Weight(rows, alone=several and (tied or bool(mtp)), rows=True))
    blocks = {letter: half_block(model, cut, letter) for letter in set(letters)}
    for letter in letters:
        found += blocks[letter]
    if last:
        found.append(Weight(h))
        if mtp:
            found += [Weight(h), Weight(h), Weight(2 * h * h // cut.tensor, product=True)]
            for letter in mtp:
                found += half_block(model, cut, letter)
            found.append(Weight(h))
        if not tied or (several and not mtp):
            found.append(Weight(rows, alone=tied, rows=True))
    return found if config.precision.compute == "bf16" else [weight._replace(fp32=True) for weight in found]


def half_block(model, cut, letter):
    """`weights` of one half-block, its input norm first."""
    h, tensor = model.hidden_size, cut.tensor
    found = [Weight(h)]
    if letter == "*":
        a = model.attention
        heads, both = a.heads * a.head_dim, 2 * (a.heads + a.kv_heads) * a.head_dim
        return [*found, *products(heads * h // tensor, both * h // tensor), Weight(a.head_dim), Weight(a.head_dim)]
    if letter == "G":
        g = model.gdn
        keys, values = g.key_heads * g.head_dim, g.value_heads * g.head_dim
        gates = Weight(g.value_heads // tensor, fp32=True)  # A_log and dt_bias
        projection = (2 * keys + 2 * values + 2 * g.value_heads) * h // tensor
        convolution = (2 * keys + values) * g.conv_width // tensor
        rest = Weight(convolution), Weight(g.head_dim)
        return [*found, gates, gates, *products(projection, values * h // tensor), *rest]
    if letter == "-":
        return [*found, *products(2 * model.ffn_hidden_size * h // tensor, model.ffn_hidden_size * h // tensor)]
    m = model.moe
    found.append(Weight(m.experts * h, fp32=True))
    expert = m.expert_hidden_size * h // cut.expert_tensor
    found += [Weight(2 * expert, expert=True), Weight(expert, expert=True)] * (m.experts // cut.expert)
    shared = m.shared_hidden_size * h // tensor
    return [*found, *products(2 * shared, shared)]


def products(*elements):
    return [Weight(each, product=True) for each in elements]


def fp8_elements(config, letters, first, last):
    """Elements of one chunk's weights that FP8 computes with."""
    if config.precision.fp8 is None:
        return 0
    experts = config.kernels.experts == "te"
    mine = weights(config, letters, first, last)
    return sum(w.elements for w in mine if w.product or (w.expert and experts))


def held(config, world):
    """For each pipeline rank {"weights", "gradients", "optimizer"} in bytes; "optimizer" is (least, most) over the
    ranks of the stage. The state is FP32: two moments, and a master copy of weights that are not FP32."""
    cut = config.parallel
    ranks = world // cut.pipeline
    data, expert_data = ranks // cut.tensor, ranks // (cut.expert * cut.expert_tensor)
    chunk = cache(partial(_chunk, config, data, expert_data))  # most chunks of a network are alike
    found = []
    for stage in chunks(config):
        sizes, gradients, dense, experts = zip(*(chunk(*each) for each in stage), strict=True)
        dense, experts = [sum(shares) for shares in zip(*dense)], [sum(shares) for shares in zip(*experts)]
        # The order of ranks: tensor, context, data; for experts their tensor, expert, data; then pipeline stages.
        both = {dense[i // cut.tensor] + experts[i // (cut.expert * cut.expert_tensor)] for i in range(ranks)}
        found.append({"weights": sum(sizes), "gradients": sum(gradients), "optimizer": (min(both), max(both))})
    return found


def _chunk(config, data, expert_data, letters, first, last):
    """(bytes of weights, of gradients, of the dense optimizer state of each data-parallel rank, of the experts')."""
    groups = {}
    for weight in weights(config, letters, first, last):
        groups.setdefault((weight.fp32, weight.expert), []).append(weight)
    size, gradients, dense, experts = 0, 0, [0] * data, [0] * expert_data
    for (fp32, expert), group in groups.items():
        size += (FP32 if fp32 else BF16) * sum(w.elements for w in group)
        owned = experts if expert else dense
        elements, shares = buffer(group, len(owned), config.optimizer.distributed)
        narrow = config.optimizer.gradients == "bf16" and not fp32
        gradients += (BF16 if narrow else FP32) * elements
        gradients += narrow * FP32 * sum(w.elements for w in group if w.rows)
        state = MOMENTS + (0 if fp32 else MASTER)
        for rank, share in enumerate(shares):
            owned[rank] += share * state
    return size, gradients, dense, experts


def buffer(group, ranks, distributed):
    """(elements of the buffer with padding, elements whose state each data-parallel rank owns)."""
    if not distributed:
        whole = sum(w.elements for w in group)
        return whole, [whole] * ranks
    shares, begin, at, stretches = [0] * ranks, 0, 0, []
    for number, weight in enumerate(reversed(group)):
        at += -at % START
        if weight.alone and stretches:
            at = begin = _close(begin, at, stretches, shares)
            stretches = []
        if stretches and stretches[-1][1] == at:
            stretches[-1][1] += weight.elements
        else:
            stretches.append([at, at + weight.elements])
        at += weight.elements
        if weight.alone or number == len(group) - 1:
            at = begin = _close(begin, at, stretches, shares)
            stretches = []
    return at, shares


def _close(begin, at, stretches, shares):
    """End a bucket: its padded end; adds to `shares` what each rank owns of its stretches."""
    ranks = len(shares)
    end = at + -at % lcm(ranks, END)
    part = (end - begin) // ranks
    for a, b in stretches:
        first, last = (a - begin) // part, (b - 1 - begin) // part
        for rank in range(first, last + 1):
            shares[rank] += part
        shares[first] -= a - begin - first * part
        shares[last] -= begin + (last + 1) * part - b
    return end
