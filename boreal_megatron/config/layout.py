"""How a network is cut into pipeline stages and its vocabulary into rows. No torch: planners and checks use it too."""

from boreal_megatron.config.pattern import expand

VOCABULARY_BLOCK = 128  # rows that tile tensor cores; the same in every layout, as a checkpoint's shapes have to be


def padded_vocab(model):
    """Rows of the embedding and of the output matrix: `vocab_size` rounded up to a multiple of 128.

    Rows vocab_size.. are padding: zero, of no token, and without a part in the softmax. model: `schema.Model`.
    """
    return padded(model.vocab_size)


def padded(rows):
    """The multiple of 128 from so many rows on."""
    return -(-rows // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


def stages(layers, parallel):
    """Card layers of each of the pipeline * virtual_pipeline stages, in the network's order.

    Stage s is chunk s // pipeline of pipeline rank s % pipeline, which is also megatron-core's order.

    Args:
        parallel: `schema.Parallel`; without its `pipeline_layers` the split is even.
    """
    if parallel.pipeline_layers is not None:
        return list(parallel.pipeline_layers)
    return even(layers, parallel.pipeline * parallel.virtual_pipeline)


def stage_pattern(pattern, parallel):
    """megatron-core's pattern: expanded, with `|` between stages and `/` before the MTP block.

    An empty stage is an empty string between two pipes, or at an end.
    """
    main, mtp = expand(pattern)
    cut, position = [], 0
    for layers in stages(len(main) // 2, parallel):
        cut.append(main[2 * position : 2 * (position + layers)])
        position += layers
    return "|".join(cut) + (f"/{mtp}" if mtp else "")


def even(layers, count):
    """As even as can be, the earlier stages taking the remainder, because the last one also has the head and the MTP
    block."""
    base, extra = divmod(layers, count)
    return [base + (stage < extra) for stage in range(count)]


def nearest_split(given, layers, count):
    """A split of all layers over `count` stages like the one given, with no empty stage between the first and the
    last; even if the given one has another number of stages. Needs count <= layers + 2."""
    split = list(given) if len(given) == count else even(layers, count)
    split[1:-1] = [max(1, n) for n in split[1:-1]]
    while sum(split) > layers:
        spare = [n if n > 1 or stage in (0, count - 1) else 0 for stage, n in enumerate(split)]
        split[spare.index(max(spare))] -= 1
    while sum(split) < layers:
        split[split.index(min(filter(None, split), default=0))] += 1
    return split
