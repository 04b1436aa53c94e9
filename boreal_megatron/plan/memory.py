"""Bytes of every rank of a run, from its description alone. No torch.

Weights, gradients and optimizer state are exact (`shards.py`), activations follow the code tensor by tensor
(`activations.py`), what lies outside of tensors is assumed (`ASSUMED`). Kept activations add up over the micro-batches
that a pipeline schedule has in flight; the fullest moment is looked for along the schedule.
"""

from typing import NamedTuple

from boreal_megatron.config.check import check, data_size
from boreal_megatron.config.pattern import expand
from boreal_megatron.plan import activations, shards

GIB = 2**30
KIND = {"*": "attention", "G": "gdn", "-": "dense", "E": "moe"}


class Chunk(NamedTuple):
    """One micro-batch in one chunk: `kinds` {kind: bytes kept}, and the bytes at the fullest moment of its passes."""

    kinds: dict
    fullest: int

    @property
    def kept(self):
        return sum(self.kinds.values())


def per_rank(config, world, *, imbalance=1.0, kernels=activations.CUDA):
    """Bytes of the fullest rank of each pipeline stage, in the phase that needs most.

    Args:
        config: `config.schema.Config`. world: number of ranks.
        imbalance: positions that the busiest rank's experts get, over the mean.
        kernels: whose operations run, `activations.CUDA` or `.CPU`.

    Returns:
        dict for JSON: `world`, `phase`, `imbalance`, and for each pipeline rank in `stages` {"layers": a string per
        virtual stage, "weights", "gradients", "optimizer", "activations": {kind: bytes that a micro-batch keeps},
        "in_flight": micro-batches kept at most (a chunk counts as its share), "temporary": bytes besides at the fullest
        moment, "peak": of all activations then, "reserved": outside of tensors, assumed, "total"}.

    Raises:
        ProblemsError: of the configuration.
    """
    check(config, world)
    found = [_phase(config, world, phase, imbalance, kernels) for phase in config.phases]
    return max(found, key=needed)


def needed(found):
    """Bytes of the fullest rank, of what `per_rank` returns."""
    return max(stage["total"] for stage in found["stages"])


def fits(config, world, gpu, **options):
    """Whether every rank fits into a `hardware.GPU`; options as `per_rank`."""
    return needed(per_rank(config, world, **options)) <= gpu.memory_gib * GIB


def _phase(config, world, phase, imbalance, kernels):
    row = activations.Row.of(config, phase, kernels, imbalance)
    count = phase.windows_per_step() // config.micro_batch // data_size(config, world)
    stages = []
    for rank, (held, cut) in enumerate(zip(shards.held(config, world), shards.chunks(config), strict=True)):
        chunks = [_chunk(row, *chunk) for chunk in cut]
        peak, in_flight = fullest(chunks, row.cut, rank, count, row.stream, row.e)
        kinds = {kind: sum(c.kinds.get(kind, 0) for c in chunks) for kind in dict.fromkeys(k for c in chunks for k in c.kinds)}
        reserved = 3 * GIB
        state = {"weights": held["weights"], "gradients": held["gradients"], "optimizer": held["optimizer"][1]}
        stages.append(
            {
                "layers": [letters for letters, _, _ in cut],
                **state,
                "activations": kinds,
                "in_flight": in_flight,
                "temporary": peak - round(in_flight * sum(kinds.values())),
                "peak": peak,
                "reserved": reserved,
                "total": sum(state.values()) + peak + reserved,
            }
        )
    return {"world": world, "phase": phase.name, "imbalance": imbalance, "stages": stages}


def _chunk(row, letters, first, last):
    """`Chunk` of one chunk of the network."""
    _, mtp = expand(row.model.pattern)
    rotary = activations.FLOAT * row.T * row.model.attention.rope_dim()
    kinds, most = {"ends": rotary}, 0

    def keep(kind, tensors):
        kinds[kind] = kinds.get(kind, 0) + sum(tensors.values())

    def moment(besides):
        nonlocal most
        most = max(most, sum(kinds.values()) + besides)

    if first:
        keep("ends", activations.embedding(row))
        moment(activations.embedding_passing(row))
    if row.recompute == "full":  # inputs of half-blocks stay until the last of them is done
        for letter in letters:
            keep(KIND[letter], activations.kept(row, letter))
    for letter in letters:
        if row.recompute != "full":
            keep(KIND[letter], activations.kept(row, letter))
        moment(activations.passing(row, letter))
    if last:
        keep("ends", activations.norm(row, "final norm", row.S, row.model.hidden_size))
        if mtp:
            keep("mtp", activations.mtp(row, mtp))
            moment(activations.mtp_passing(row, mtp))
        keep("losses", activations.losses(row, mtp))
        moment(activations.loss_passing(row, mtp))
    return Chunk(kinds, most)


def fullest(chunks, cut, rank, count, stream, e):
    """(bytes, micro-batches kept) at the fullest moment of a pipeline rank's schedule: 1F1B, interleaved with several
    chunks.

    A stage also keeps what it received and what it sent: megatron-core's lists of inputs and outputs.
    """
    if cut.pipeline == 1:
        return chunks[0].fullest, 1
    beside = []
    for number in range(len(chunks)):
        first = rank == number == 0
        last = rank == cut.pipeline - 1 and number == len(chunks) - 1
        beside.append(stream * ((not first and e < activations.FLOAT) + (not last)))
    order = [n % (cut.pipeline * len(chunks)) // cut.pipeline for n in range(count * len(chunks))]
    warmup = cut.pipeline - rank - 1
    if len(chunks) > 1:
        warmup = 2 * warmup + (len(chunks) - 1) * cut.pipeline
    warmup = min(warmup, len(order))
    alive, most, flight, ahead, back = 0, 0, 0, list(order), [len(chunks) - 1 - number for number in order]
    passes = [True] * warmup + [True, False] * (len(order) - warmup) + [False] * warmup
    held = 0
    for forward in passes:
        number = (ahead if forward else back).pop(0)
        mine = chunks[number].kept + beside[number]
        if forward:
            alive, held = alive + mine, held + 1
        most = max(most, alive - chunks[number].kept + chunks[number].fullest)
        flight = max(flight, held)
        if not forward:
            alive, held = alive - mine, held - 1
    return most, flight / len(chunks)
