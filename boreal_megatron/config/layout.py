"""How a network is cut into pipeline stages. No torch: planners and checks use it too."""

from boreal_megatron.config.pattern import expand


def stages(layers, pipeline):
    """Card layers of each stage: as even as can be, the earlier stages taking the remainder, because the last one
    also has the head and the MTP block."""
    base, extra = divmod(layers, pipeline)
    return [base + (stage < extra) for stage in range(pipeline)]


def stage_pattern(pattern, pipeline):
    """megatron-core's pattern: expanded, with `|` between pipeline stages and `/` before the MTP block."""
    main, mtp = expand(pattern)
    cut, position = [], 0
    for layers in stages(len(main) // 2, pipeline):
        cut.append(main[2 * position : 2 * (position + layers)])
        position += layers
    return "|".join(cut) + (f"/{mtp}" if mtp else "")
