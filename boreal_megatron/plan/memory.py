"""Bytes of every rank of a run, from its description alone. No torch.

Weights, gradients and optimizer state are exact (`shards.py`), activations follow the code tensor by tensor
(`activations.py`), what lies outside of tensors is assumed (`reserved`). Kept activations add up over the micro-batches
that the pipeline schedule has in flight; the fullest moment is looked for along the schedule.
"""

from functools import cache, partial
from typing import NamedTuple

from boreal_megatron.config.check import check, data_size
from boreal_megatron.config.pattern import expand
from boreal_megatron.plan import activations, shards

GIB = 2**30
KIND = {"*": "attention", "G": "gdn", "-": "dense", "E": "moe"}

# Assumptions, not measured here: what lies on a GPU besides the tensors that are counted.
IMBALANCE = 1.25  # what the busiest rank's experts get, over the mean; exactly 1 where a rank has all experts
LIBRARIES = 3 * GIB // 2  # CUDA context, kernels, cuBLAS workspaces
COMMUNICATOR = GIB // 2  # NCCL's buffers of one process group of several ranks
FP8_COPIES = 2  # bytes of a weight: Transformer Engine keeps it in FP8, by rows and transposed
FRAGMENTS = 0.05  # of the activations: what torch's allocator has and cannot give

EXPLAIN = f"""\
Bytes of the fullest rank of each pipeline stage, in the phase that needs most; GiB of 2^30 bytes.
  weights, gradients, optimizer   exact, megatron-core's padding included: gradients in optimizer.gradients (those of
                     embedding and head also in FP32), FP32 moments, an FP32 master of bf16 weights;
                     optimizer.distributed shards the state over the data-parallel ranks
  activations        what autograd keeps of one micro-batch, tensor by tensor, by kind of half-block; `ends` are embedding,
                     rotary table and final norm, `losses` the gradients of hidden states, computed with the loss
  in flight          micro-batches whose backward pass is still to come at the fullest moment (1F1B; interleaved: a chunk
                     counts as its share), with what a stage received and sent
  alive besides      then, while some half-block's gradients or the logits are computed
  buffers            sequence parallelism's gathered input, which stays
~ assumed            kernels: Triton's on CUDA, also where fla or flash_qla run (the plain torch rule is counted too, but
                     for its second pass over a row that context-parallel ranks share by state); a document a window
  ~ imbalance        --imbalance, positions of the busiest rank's experts over the mean
  ~ logits           Triton's loss takes its budget of {activations.LOSS_BUDGET / 1e6:.0f} MB, or all rows where they are less
  ~ reserved         {LIBRARIES / GIB:.1f} GiB CUDA context and libraries, {COMMUNICATOR / GIB:.1f} GiB a process group (NCCL), and
                     {FRAGMENTS:.0%} of the activations lost to fragmentation; in FP8 also {FP8_COPIES} bytes of each weight that
                     it computes with (activations are counted in bf16, which is more than FP8 keeps)"""


class Chunk(NamedTuple):
    """One micro-batch in one chunk: `kinds` {kind: bytes kept}, their sum, the bytes at the fullest moment of its passes."""

    kinds: dict
    kept: int
    fullest: int


def per_rank(config, world, *, imbalance=IMBALANCE, kernels=activations.CUDA, held=None):
    """Bytes of the fullest rank of each pipeline stage, in the phase that needs most.

    Args:
        config: `config.schema.Config`. world: number of ranks.
        imbalance: positions that the busiest rank's experts get, over the mean.
        kernels: whose operations run, `activations.CUDA` or `.CPU`.
        held: `shards.held`, where it is known; then the configuration counts as checked.

    Returns:
        dict for JSON: `world`, `phase`, `imbalance`, and for each pipeline rank in `stages` {"layers": a string per
        virtual stage, "weights", "gradients", "optimizer", "activations": {kind: bytes that a micro-batch keeps},
        "in_flight": how many of them are kept at the fullest moment (a chunk counts as its share), "kept": their bytes,
        "temporary": bytes alive besides, "peak": both together, "buffers", "reserved" (assumed), "total"}.

    Raises:
        ProblemsError: of the configuration.
    """
    if held is None:
        check(config, world)
        held = shards.held(config, world)
    found = [_phase(config, world, phase, held, imbalance, kernels) for phase in config.phases]
    return max(found, key=needed)


def needed(found):
    """Bytes of the fullest rank, of what `per_rank` returns."""
    return max(stage["total"] for stage in found["stages"])


def fits(config, world, gpu, **options):
    """Whether every rank fits into a `hardware.GPU`; options as `per_rank`."""
    return needed(per_rank(config, world, **options)) <= gpu.memory_gib * GIB


def _phase(config, world, phase, held, imbalance, kernels):
    row = activations.Row.of(config, phase, kernels, imbalance)
    count = phase.windows_per_step() // config.micro_batch // data_size(config, world)
    stages, one = [], cache(partial(_chunk, row))  # most chunks of a network are alike
    for rank, (state, cut) in enumerate(zip(held, shards.chunks(config), strict=True)):
        chunks = [one(*chunk) for chunk in cut]
        peak, kept, in_flight = fullest(chunks, row, rank, count)
        copies = FP8_COPIES * sum(shards.fp8_elements(config, *chunk) for chunk in cut)
        kinds = {}
        for kind, size in (item for chunk in chunks for item in chunk.kinds.items()):
            kinds[kind] = kinds.get(kind, 0) + size
        parts = {
            "weights": state["weights"],
            "gradients": state["gradients"],
            "optimizer": state["optimizer"][1],
            "peak": peak,
            "buffers": row.whole if config.parallel.sequence_parallel else 0,
            "reserved": reserved(config, world) + int(FRAGMENTS * peak) + copies,
        }
        stages.append(
            {
                "layers": [letters for letters, _, _ in cut],
                "activations": kinds,
                "in_flight": in_flight,
                "kept": kept,
                "temporary": peak - kept,
                **parts,
                "total": sum(parts.values()),
            }
        )
    return {"world": world, "phase": phase.name, "imbalance": row.imbalance, "stages": stages}


def reserved(config, world):
    """Assumed bytes outside of tensors, without what fragments."""
    cut = config.parallel
    stage = world // cut.pipeline
    groups = [world, cut.tensor, cut.pipeline, cut.context, stage // cut.tensor]
    if config.model.moe:
        groups += [cut.expert, cut.expert_tensor, stage // (cut.expert * cut.expert_tensor)]
    return LIBRARIES + COMMUNICATOR * sum(size > 1 for size in groups)


def _chunk(row, letters, first, last):
    """`Chunk` of one chunk of the network."""
    _, mtp = expand(row.model.pattern)
    rotary = activations.FLOAT * row.T * row.model.attention.rope_dim()
    kinds, most = {"ends": rotary}, 0
    kept = {letter: activations.kept(row, letter) for letter in set(letters)}
    passing = {letter: activations.passing(row, letter) for letter in set(letters)}

    def keep(kind, tensors):
        kinds[kind] = kinds.get(kind, 0) + sum(tensors.values())

    def moment(besides):
        nonlocal most
        most = max(most, sum(kinds.values()) + besides)

    if first:
        keep("ends", activations.embedding(row))
        moment(activations.embedding_passing(row))
    if row.recompute == "full":  # the inputs of all half-blocks stay until the last of them is done
        for letter in letters:
            keep(KIND[letter], kept[letter])
    for letter in letters:
        if row.recompute != "full":
            keep(KIND[letter], kept[letter])
        moment(passing[letter])
    if last:
        keep("ends", activations.norm(row, "final norm", row.S, row.model.hidden_size))
        if mtp:
            keep("mtp", activations.mtp(row, mtp))
            moment(activations.mtp_passing(row, mtp))
        keep("losses", activations.losses(row, mtp))
        moment(activations.loss_passing(row, mtp))
    return Chunk(kinds, sum(kinds.values()), most)


def fullest(chunks, row, rank, count):
    """(bytes, bytes kept, micro-batches kept) at the fullest moment of a pipeline rank's schedule of `count` of them.

    1F1B, interleaved where there are several chunks: `warmup` forward passes, then one forward and one backward in turn
    (megatron-core's pipeline_parallel/schedules.py). A stage also keeps what it received and what it sent on.
    """
    stages = row.cut.pipeline
    if stages == 1:
        return chunks[0].fullest, chunks[0].kept, 1
    beside = []
    for number in range(len(chunks)):
        received = not rank == number == 0 and row.e < activations.FLOAT  # in FP32 the first norm keeps it anyway
        sent = not (rank == stages - 1 and number == len(chunks) - 1)
        beside.append(row.stream * (received + sent))
    order = [n // stages % len(chunks) for n in range(count * len(chunks))]
    warmup = stages - rank - 1
    if len(chunks) > 1:
        warmup = 2 * warmup + (len(chunks) - 1) * stages
    warmup = min(warmup, len(order))
    passes = [True] * warmup + [True, False] * (len(order) - warmup) + [False] * warmup
    forward, backward = iter(order), (len(chunks) - 1 - number for number in order)
    alive, flight, most = 0, 0, (0, 0, 0)
    for ahead in passes:
        number = next(forward if ahead else backward)
        size = chunks[number].kept + beside[number]
        if ahead:
            alive, flight = alive + size, flight + 1
        most = max(most, (alive - chunks[number].kept + chunks[number].fullest, alive, flight / len(chunks)))
        if not ahead:
            alive, flight = alive - size, flight - 1
    return most
