"""The time of a training step as a sum of named terms, for one configuration on one kind of GPU.

    step = m * slowest rank + (sum of the other ranks) / virtual_pipeline + what happens once a step

m micro-batches; a rank's time is forward + backward of its half-blocks (`plan.work`), on the pipeline rank with the
most. The second term is the pipeline's bubble: where ranks are equal, (pipeline - 1) / virtual_pipeline of one.
"""

from collections import Counter
from functools import cache
from typing import NamedTuple

from boreal_megatron.config import check, layout
from boreal_megatron.config.schema import Parallel
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import flops
from boreal_megatron.plan.work import Rank, software_of

KINDS = (*flops.KINDS, "communication", "optimizer", "idle")  # exchanges within a half-block count for its kind
FORMULAS = {  # term -> (how it is counted, the rates it uses)
    "gemm": ("rounds of tiles x (k + start), forward and twice backward", "gemm gemm_fp8 gemm_start"),
    "expert_gemm": ("the same for the rows of each local expert", "gemm grouped"),
    "attention_core": ("2 T heads d a position forward, twice backward", "attention_forward attention_backward"),
    "delta_rule": ("value heads x (d/128)^2 a position; twice with context_deltanet=state", "fla_forward fla_backward"),
    "elementwise": ("bytes of norms, gates, convolution, permutation", "hbm"),
    "head": ("gemm over the vocabulary, once for each head", "gemm"),
    "gradient_accumulation": ("bytes to add a micro-batch's gradients", "hbm"),
    "tensor_communication": ("5 x t h a half-block, 2 of them under products", "nvlink collective"),
    "dispatch": ("copies of tokens to experts and back, both ways", "dispatch nic collective"),
    "context_communication": ("queries, keys, values, states within a row", "nvlink nic collective"),
    "pipeline_communication": ("t h to each neighbour; under the next chunk if virtual", "nvlink nic collective"),
    "bubble": ("the other ranks' micro-batch / virtual_pipeline", ""),
    "gradient_reduce": ("gradient bytes over data x context ranks", "nvlink nic"),
    "parameter_gather": ("parameter bytes over data x context ranks", "nvlink nic"),
    "tied_gradients": ("the embedding's gradient, first and last stage", "nic"),
    "host": ("what calibration found beside all else, a share of it", ""),
    "optimizer": ("bytes of gradients, masters and moments", "hbm"),
}
NOT_MODELLED = (
    "natural routing (experts get equal shares), the host's launches, stragglers, power limits, reading data, "
    "evaluation, checkpoints, failures"
)
UPDATE = 30  # bytes of a parameter: gradient, master weight and two moments in FP32, read and written; weight in bf16
BUFFERS = 12  # bytes of a local parameter: its FP32 gradient is cleared, and divided by the targets


class Term(NamedTuple):
    """A named part of a step, on the slowest pipeline rank."""

    name: str
    kind: str
    seconds: float


class Estimate(NamedTuple):
    """A step of one configuration."""

    seconds: float
    terms: tuple
    positions: int
    world: int
    flops: float  # of a position, forward + backward
    peak: float  # of the GPU, TFLOP/s
    parameters: int  # of the fullest rank

    def rate(self):
        """Positions a second of one GPU."""
        return self.positions / self.seconds / self.world

    def teraflops(self):
        """Model TFLOP/s of one GPU; what is recomputed does not count."""
        return self.flops * self.rate() / 1e12

    def mfu(self):
        return self.teraflops() / self.peak

    def kinds(self):
        """kind -> seconds, those that there are."""
        found = Counter()
        for term in self.terms:
            found[term.kind] += term.seconds
        return dict(found)


def step(config, phase, world, gpu, software=None, known=None):
    """The time of one step.

    Args:
        config: `config.schema.Config` that `config.check` has nothing against.
        phase: the one of its phases that is meant.
        gpu: `hardware.GPU`; its `factors` multiply the seconds of a kind of work.
        software: `work.Software`; None: what this code does with the configuration.
        known: a dict that keeps what layouts of one search have in common.

    Returns:
        Estimate.

    Raises:
        BorealError: the table has no rates for this GPU.
    """
    if gpu.rates is None:
        raise BorealError(
            "this GPU has no rates; copy the section `rates` of h100 in plan/hardware.yaml to its entry and change it"
        )
    cut = config.parallel
    software = software or software_of(config)
    stage, rank = _stage_work(config, phase.sequence, gpu, software, {} if known is None else known)
    micro_batches = phase.positions_per_step // (phase.sequence * config.micro_batch * check.data_size(config, world))
    chunks = [[stage(letters) for letters in mine] for mine in _letters(config)]
    held = _held(config.model, cut, chunks)
    totals = [sum(chunk.seconds for chunk in mine) for mine in chunks]
    slowest = max(range(cut.pipeline), key=totals.__getitem__)
    terms = Counter()
    for chunk in chunks[slowest]:
        terms.update(chunk.work)
    if cut.pipeline > 1 and cut.virtual_pipeline == 1:
        terms["pipeline_communication", "communication"] = rank.factor("communication") * 2 * _neighbour(rank, world)
    terms = Counter({key: micro_batches * seconds for key, seconds in terms.items()})
    terms.update(_once(config, rank, world, max(held, key=sum)))
    terms["bubble", "communication"] = (sum(totals) - totals[slowest]) / cut.virtual_pipeline
    terms["host", "idle"] = gpu.factors.get("idle", 0.0) * terms.total()
    return Estimate(
        seconds=terms.total(),
        terms=tuple(Term(*key, seconds) for key, seconds in terms.items() if seconds),
        positions=phase.positions_per_step,
        world=world,
        flops=_flops(config.model, phase.sequence),
        peak=gpu.bf16,
        parameters=sum(max(held, key=sum)),
    )


class Chunk(NamedTuple):
    """One stage of the network on one rank: {(term, kind): seconds of a micro-batch}, their sum, its parameters."""

    work: dict
    seconds: float
    dense: int
    experts: int


def _held(model, cut, chunks):
    """(dense, experts' parameters) that each pipeline rank has; norms count as if tensor parallelism cut them."""
    held = [[sum(c.dense for c in mine), sum(c.experts for c in mine)] for mine in chunks]
    embedding = layout.padded_vocab(model) * model.hidden_size // cut.tensor
    held[0][0] += embedding
    if not model.tie_embeddings or cut.pipeline > 1:
        held[-1][0] += embedding
    return held


@cache
def _flops(model, sequence):
    return sum(flops.training(model, sequence).values())


def _letters(config):
    """Half-blocks of each pipeline rank's chunks; the network's last chunk ends with `/` and the MTP head's."""
    cut = config.parallel
    stages = _stages(config.model.pattern, cut.pipeline, cut.virtual_pipeline, cut.pipeline_layers)
    return [stages[number :: cut.pipeline] for number in range(cut.pipeline)]


@cache
def _stages(pattern, pipeline, virtual_pipeline, pipeline_layers):
    cut = Parallel(pipeline=pipeline, virtual_pipeline=virtual_pipeline, pipeline_layers=pipeline_layers)
    main, _, mtp = layout.stage_pattern(pattern, cut).partition("/")
    stages = main.split("|")
    return (*stages[:-1], f"{stages[-1]}/{mtp}")


def _stage_work(config, sequence, gpu, software, known):
    """(letters of a stage -> Chunk; the Rank behind it).

    Layouts that differ in their pipeline or world only have these in common.
    """
    cut = config.parallel
    key = (cut.tensor, cut.context, cut.context_deltanet, cut.expert, cut.expert_tensor, cut.sequence_parallel)
    key = (*key, config.micro_batch, config.recompute)
    if key in known:
        return known[key]
    rank = Rank(config, sequence, gpu, software)

    def seconds(piece):
        again = config.recompute == "full" or (config.recompute == "selective" and piece.selective)
        return piece.forward * (1 + again) + piece.backward

    @cache
    def half_block(letter):
        return [(piece.name, piece.kind, rank.factor(piece.kind) * seconds(piece)) for piece in rank.half_block(letter)]

    @cache
    def stage(letters):
        main, last, mtp = letters.partition("/")
        found = Counter()
        for letter, blocks in Counter(main).items():
            for name, kind, each in half_block(letter):
                found[name, kind] += blocks * each
        for letter in mtp:
            for name, _, each in half_block(letter):
                found[name, "mtp"] += each
        if mtp:
            join = rank.mtp_join()
            found[join.name, join.kind] += rank.factor("mtp") * (join.forward + join.backward)
        if last:
            head = rank.head(layout.padded_vocab(config.model))
            found[head.name, head.kind] += (1 + bool(mtp)) * rank.factor("heads") * (head.forward + head.backward)
        return Chunk(found, found.total(), *_parameters(rank, main + mtp, mtp))

    known[key] = stage, rank
    return known[key]


def _parameters(rank, letters, mtp):
    """(dense, experts') parameters of a stage's half-blocks, and of the MTP head's projection."""
    each = [rank.parameters(letter) for letter in letters]
    join = 2 * rank.model.hidden_size**2 // rank.cut.tensor if mtp else 0
    return sum(dense for dense, _ in each) + join, sum(experts for _, experts in each)


def _neighbour(rank, world):
    """Seconds to hand a micro-batch's hidden states to the next pipeline rank."""
    inside = world <= rank.gpu.gpus_per_node
    nbytes = rank.local * rank.model.hidden_size * rank.dtype
    return nbytes / (rank.rate["nvlink" if inside else "nic"] * 1e9) + rank.rate["collective"] * 1e-6


def _once(config, rank, world, elements):
    """{(term, kind): seconds} of what happens once a step."""
    cut, sharded = config.parallel, config.optimizer.distributed
    strides = cut.tensor, cut.expert * cut.expert_tensor  # of the ranks that have the same dense, the same experts
    found, seen = Counter(), 1 - rank.software.hidden_data
    for held, stride in zip(elements, strides):
        size = world // (cut.pipeline * stride)
        if held:
            received = held * (size - 1) / size
            reduced = rank.software.gradient_bytes * (1 if sharded else 2)
            found["gradient_reduce", "communication"] += seen * rank.exchange(reduced * received, size, stride)
            if sharded:
                gathered = rank.dtype * received
                found["parameter_gather", "optimizer"] += seen * rank.exchange(gathered, size, stride)
            update = UPDATE * held / (size if sharded else 1)
            found["optimizer", "optimizer"] += rank.memory(update + BUFFERS * held)
    if cut.pipeline > 1 and (config.model.tie_embeddings or "/" in config.model.pattern):
        nbytes = layout.padded_vocab(config.model) * config.model.hidden_size // cut.tensor * 4
        found["tied_gradients", "communication"] = nbytes / (rank.rate["nic"] * 1e9)
    return Counter({(name, kind): rank.factor(kind) * seconds for (name, kind), seconds in found.items()})
