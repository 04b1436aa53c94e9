"""From seconds to rates: model FLOPs, memory traffic and what the device could do. Arithmetic only, no torch.

FLOPs are the model's (`plan.flops`): a window counts as one document, recomputation does not count.
"""

from boreal_megatron.plan import flops, hardware

TERA, GIGA = 1e12, 1e9


def step_flops(config, phase):
    """{kind: FLOPs of one training step of the whole run}, kinds of `plan.flops.KINDS` that the network has."""
    per_position = flops.by_kind(flops.training(config.model, phase.sequence))
    return {kind: n * phase.positions_per_step for kind, n in per_position.items()}


def peak(config, device_name):
    """(FLOP/s, bytes/s) of the device in the run's precision, or None where the table of GPUs does not say.

    Args:
        device_name: what CUDA calls it, or None.
    """
    found = hardware.of_device(device_name)
    if found is None or config.precision != "bf16":
        return None
    return found.bf16 * TERA, found.hbm * GIGA


def of_step(config, phase, world, seconds, limits, kind_seconds=None):
    """What a training record says of a step's speed.

    Args:
        seconds: of the step. limits: `peak`.
        kind_seconds: {kind: seconds, mean over ranks}, in steps where they were measured.

    Returns:
        dict: `teraflops` (model TFLOP/s a device), `mfu` (their share of the peak) and `kind_mfu` (the same of each kind
        of layer, within its own time); the last two None where they are not known.
    """
    work = step_flops(config, phase)
    rate = sum(work.values()) / seconds / world
    shares = None
    if limits and kind_seconds:
        shares = {k: n / world / kind_seconds[k] / limits[0] for k, n in work.items() if kind_seconds[k] > 0}
    return {"teraflops": rate / TERA, "mfu": rate / limits[0] if limits else None, "kind_mfu": shares}
