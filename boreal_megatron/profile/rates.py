"""From seconds to rates: model FLOPs, memory traffic and what the device could do. Arithmetic only, no torch.

FLOPs are the model's (`plan.flops`): a window counts as one document, recomputation does not count.
"""

from collections import Counter

from boreal_megatron.plan import flops, hardware

TERA, GIGA = 1e12, 1e9
LETTERS = {"*": "attention", "G": "gdn", "-": "dense", "E": "moe"}  # of the pattern -> kind of time
WAITS = ("communication", "data", "idle")  # kinds of time in which a rank does no work of its own


def step_flops(config, phase):
    """{kind: FLOPs of one training step of the whole run}, kinds of `plan.flops.KINDS` that the network has."""
    per_position = flops.by_kind(flops.training(config.model, phase.sequence))
    return {kind: n * phase.positions_per_step for kind, n in per_position.items()}


def peak(config, device_name):
    """(FLOP/s in bf16, also for FP8 runs; bytes/s) of the device, or None: no bf16 run, or not in the table of GPUs.

    Args:
        device_name: what CUDA calls it, or None.
    """
    found = hardware.of_device(device_name)
    if found is None or config.precision.compute != "bf16":
        return None
    return found.bf16 * TERA, found.hbm * GIGA


def of_step(config, phase, world, seconds, limits, kind_seconds=None):
    """What a training record says of a step's speed.

    Args:
        seconds: of the step. limits: `peak`.
        kind_seconds: {kind: seconds, mean over ranks}, in steps where they were measured.

    Returns:
        dict: `teraflops` (model TFLOP/s a device), `mfu` (their share of the peak) and `kind_mfu` (the same of each
        kind of layer, within its own time); the last two None where they are not known.
    """
    work = step_flops(config, phase)
    rate = sum(work.values()) / seconds / world
    shares = None
    if limits and kind_seconds:
        shares = {k: n / world / kind_seconds[k] / limits[0] for k, n in work.items() if kind_seconds[k] > 0}
    return {"teraflops": rate / TERA, "mfu": rate / limits[0] if limits else None, "kind_mfu": shares}


def table(seconds, work, moved, exchanges, world, limits):
    """A row for each kind of time.

    Args:
        seconds: {kind: seconds of a step, mean over ranks}.
        work: `step_flops`. moved: `traffic.step_bytes`, computed, not measured. exchanges: `exchanged`.
        limits: `peak`.

    Returns:
        {kind: dict}: `seconds`, `share` of the step; `collectives`, the share of it in collectives; `flops` and `bytes`
        of the whole run's step, None where there are none; a device's `teraflops` and `gigabytes_per_second`;
        `roofline`, the least time that the device would need for either, as a share of the time it took, None where its
        peaks are not known.
    """
    whole, rows = sum(seconds.values()), {}
    for kind, took in seconds.items():
        flops_, bytes_ = work.get(kind), moved.get(kind)
        least = max((flops_ or 0) / limits[0], (bytes_ or 0) / limits[1]) / world if limits and bytes_ else None
        rows[kind] = {
            "seconds": took,
            "share": took / whole,
            "collectives": exchanges.get(kind, 0.0),
            "flops": flops_,
            "teraflops": flops_ / world / took / TERA if flops_ and took else None,
            "bytes": bytes_,
            "gigabytes_per_second": bytes_ / world / took / GIGA if bytes_ and took else None,
            "roofline": least / took if least and took else None,
        }
    return rows


def exchanged(ranks):
    """{kind: share of its time that went into collectives}, transfer and waiting, in the traced step of all ranks."""
    took, within = Counter(), Counter()
    for rank in ranks:
        took.update(rank["traced"]["kinds"])
        within.update(rank["traced"]["collectives"])
    return {kind: within[kind] / took[kind] for kind in within}


def own_seconds(rank):
    """Seconds of the traced step in which a rank was at work of its own, outside of collectives: a rank that waits for
    others waits in them, within its layers too."""
    kinds, collectives = rank["traced"]["kinds"], rank["traced"]["collectives"]
    return sum(seconds - collectives.get(kind, 0.0) for kind, seconds in kinds.items() if kind not in WAITS)


def parts(ranks):
    """{name of a stretch: seconds of a step, mean over the ranks that have it}, as every rank of a pipeline stage has
    half-blocks that the others do not."""
    found = {}
    for rank in ranks:
        for name, seconds in rank["parts"].items():
            found.setdefault(name, []).append(seconds)
    return {name: sum(each) / len(each) for name, each in found.items()}
