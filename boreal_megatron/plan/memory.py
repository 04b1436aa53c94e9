"""Bytes of every rank of a run, from its description alone. No torch."""

from boreal_megatron.config.check import check, data_size
from boreal_megatron.config.pattern import expand
from boreal_megatron.plan import activations, shards

GIB = 2**30
KIND = {"*": "attention", "G": "gdn", "-": "dense", "E": "moe"}


def per_rank(config, world, *, imbalance=1.0, device="cuda"):
    """Bytes of the fullest rank of each pipeline stage, in the phase that needs most.

    Args:
        config: `config.schema.Config`. world: number of ranks.
        imbalance: tokens that the busiest rank's experts get, over the mean (an assumption).
        device: "cuda", or "cpu" for the plain torch operations.

    Returns:
        dict for JSON: `world`, `phase`, `stages`: for each pipeline rank {"layers", "weights", "gradients",
        "optimizer", "activations": {kind: bytes of one micro-batch}, "in_flight": micro-batches held at most,
        "peak": bytes of all activations at the fullest moment, "temporary": what of that is not kept activations,
        "reserved": outside of tensors, "total"}.
    """
    check(config, world)
    found = [_phase(config, world, phase, imbalance, device) for phase in config.phases]
    return max(found, key=lambda phase: max(stage["total"] for stage in phase["stages"]))


def fits(config, world, gpu, **options):
    """Whether every rank fits into `hardware.GPU`."""
    return max(stage["total"] for stage in per_rank(config, world, **options)["stages"]) <= gpu.memory_gib * GIB


def _phase(config, world, phase, imbalance, device):
    row = activations.Row.of(config, phase, device, imbalance)
    microbatches = phase.windows_per_step() // config.micro_batch // data_size(config, world)
    _, mtp = expand(config.model.pattern)
    stages = []
    for rank, (held, chunks) in enumerate(zip(shards.held(config, world), shards.chunks(config), strict=True)):
        kinds, temporary = {}, 0
        for letters, _, last in chunks:
            for letter in letters:
                bytes_ = sum(activations.half_block(row, letter).values())
                temporary = max(temporary, bytes_)
                kept = row.stream if config.recompute == "full" else bytes_
                kinds[KIND[letter]] = kinds.get(KIND[letter], 0) + kept
            if last:
                kept, logits = activations.head(row)
                kinds["heads"] = sum(kept.values()) * (2 if mtp else 1)
                temporary = max(temporary, logits)
                if mtp:
                    kinds["mtp"] = sum(sum(activations.half_block(row, letter).values()) for letter in mtp)
        flight = in_flight(config.parallel, rank, microbatches)
        activation = sum(kinds.values()) * flight // len(chunks)
        reserved = 3 * GIB
        total = held["weights"] + held["gradients"] + held["optimizer"][1] + activation + temporary + reserved
        stages.append(
            {
                "layers": [letters + (f"/{mtp}" if last and mtp else "") for letters, _, last in chunks],
                "weights": held["weights"],
                "gradients": held["gradients"],
                "optimizer": held["optimizer"][1],
                "activations": kinds,
                "in_flight": flight,
                "temporary": temporary,
                "peak": activation + temporary,
                "reserved": reserved,
                "total": total,
            }
        )
    return {"world": world, "phase": phase.name, "stages": stages}


def in_flight(cut, rank, microbatches):
    """Forward passes of chunks whose backward pass has not begun, at most (1F1B, or interleaved 1F1B)."""
    warmup = cut.pipeline - rank - 1
    if cut.virtual_pipeline > 1:
        warmup = 2 * warmup + (cut.virtual_pipeline - 1) * cut.pipeline
    return min(warmup + 1, microbatches * cut.virtual_pipeline)
