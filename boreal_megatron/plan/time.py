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
BUFFERS = 3  # times a local gradient's bytes: it is cleared, and divided by the targets


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
    cut = config.parallel
    work = work_of(config, phase.sequence, gpu, software, {} if known is None else known)
    rank, micro_batches = work.rank, _micro_batches(config, phase, world)
    stages = letters_of(config.model.pattern, cut.pipeline, cut.virtual_pipeline, cut.pipeline_layers)
    held = _held(config.model, cut, [work.parameters(letters) for letters in stages])
    totals = [work.seconds(letters) for letters in stages]
    slowest = max(range(cut.pipeline), key=totals.__getitem__)
    terms = work.terms(stages[slowest])
    if cut.pipeline > 1 and cut.virtual_pipeline == 1:
        terms["pipeline_communication", "communication"] = rank.factor("communication") * 2 * _neighbour(rank, world)
    terms = {key: micro_batches * seconds for key, seconds in terms.items()}
    terms |= _once(config, rank, world, max(held, key=sum))
    terms["bubble", "communication"] = (sum(totals) - totals[slowest]) / cut.virtual_pipeline
    terms["host", "idle"] = gpu.factors.get("idle", 0.0) * sum(terms.values())
    return Estimate(
        seconds=sum(terms.values()),
        terms=tuple(Term(*key, seconds) for key, seconds in terms.items() if seconds),
        positions=phase.positions_per_step,
        world=world,
        flops=_flops(config.model, phase.sequence),
        peak=gpu.bf16,
        parameters=sum(max(held, key=sum)),
    )


def passes(micro_batches, slowest, together, virtual_pipeline):
    """Seconds of all micro-batches' passes, of what one takes on the slowest pipeline rank and on all together; neither
    makes it less by growing."""
    return micro_batches * slowest + (together - slowest) / virtual_pipeline


def _held(model, cut, half_blocks):
    """[dense, experts' parameters] of each pipeline rank; norms count as if tensor parallelism cut them."""
    held = [list(each) for each in half_blocks]
    embedding = layout.padded_vocab(model) * model.hidden_size // cut.tensor
    held[0][0] += embedding
    if not model.tie_embeddings or cut.pipeline > 1:
        held[-1][0] += embedding
    return held


@cache
def _flops(model, sequence):
    return sum(flops.training(model, sequence).values())


def _micro_batches(config, phase, world):
    return phase.positions_per_step // (phase.sequence * config.micro_batch * check.data_size(config, world))


@cache
def letters_of(pattern, pipeline, virtual_pipeline, pipeline_layers=None):
    """The half-blocks of each pipeline rank, sorted; the last rank's end with `/` and the MTP head's."""
    cut = Parallel(pipeline=pipeline, virtual_pipeline=virtual_pipeline, pipeline_layers=pipeline_layers)
    main, _, mtp = layout.stage_pattern(pattern, cut).partition("/")
    chunks = main.split("|")
    stages = ["".join(sorted("".join(chunks[number::pipeline]))) for number in range(pipeline)]
    return (*stages[:-1], f"{stages[-1]}/{mtp}")


@cache
def _counted(letters):
    """((half-block, how many), ...), whether the heads follow, the MTP head's half-blocks."""
    main, last, mtp = letters.partition("/")
    return tuple(Counter(main).items()), bool(last), mtp


def work_of(config, sequence, gpu, software, known):
    """The Work of a layout; those that differ in their pipeline or world only have one. `known` keeps them.

    Raises:
        BorealError: the table has no rates for this GPU.
    """
    if gpu.rates is None:
        raise BorealError(
            "this GPU has no rates; copy the section `rates` of h100 in plan/hardware.yaml to its entry and change it"
        )
    cut = config.parallel
    plain = (cut.tensor, cut.sequence_parallel, cut.context, cut.context_deltanet, config.micro_batch)
    plain = (*plain, config.recompute, config.precision.compute, config.precision.fp8)
    key = (*plain, cut.expert, cut.expert_tensor)
    if key not in known:
        rank = Rank(config, sequence, gpu, software or software_of(config))
        known[key] = Work(rank, config.recompute, known.setdefault(plain, {}))
    return known[key]


class Work:
    """What half-blocks cost one rank, for each micro-batch. Letters of the network's last ones end with `/` and the MTP
    head's.

    Args:
        rank: `work.Rank`.
        recompute: as in the configuration.
        half_blocks: a dict for those that expert parallelism leaves alone.
    """

    def __init__(self, rank, recompute, half_blocks):
        self.rank, self.recompute = rank, recompute
        self._plain, self._own, self._seconds = half_blocks, {}, {}

    def seconds(self, letters):
        if letters not in self._seconds:
            blocks, last, mtp = _counted(letters)
            found = sum(count * self._half_block(letter)[1] for letter, count in blocks)
            found += sum(self._half_block(letter)[1] for letter in mtp)
            self._seconds[letters] = found + sum(seconds for *_, seconds in self._ends(last, mtp))
        return self._seconds[letters]

    def terms(self, letters):
        """{(term, kind): seconds}."""
        found = Counter()
        blocks, last, mtp = _counted(letters)
        for letter, count in blocks:
            for name, kind, seconds in self._half_block(letter)[0]:
                found[name, kind] += count * seconds
        for letter in mtp:
            for name, _, seconds in self._half_block(letter)[0]:
                found[name, "mtp"] += seconds
        for name, kind, seconds in self._ends(last, mtp):
            found[name, kind] += seconds
        return found

    def parameters(self, letters):
        """(dense, experts') of half-blocks, and of the MTP head's projection."""
        blocks, _, mtp = _counted(letters)
        each = [(count, *self._half_block(letter)[2]) for letter, count in (*blocks, *((letter, 1) for letter in mtp))]
        join = 2 * self.rank.model.hidden_size**2 // self.rank.cut.tensor if mtp else 0
        return sum(n * dense for n, dense, _ in each) + join, sum(n * experts for n, _, experts in each)

    def _half_block(self, letter):
        """([(term, kind, seconds)], seconds together, its parameters)."""
        kept = self._own if letter == "E" else self._plain
        if letter not in kept:
            pieces = [
                (piece.name, piece.kind, self.rank.factor(piece.kind) * self._passes(piece))
                for piece in self.rank.half_block(letter)
            ]
            kept[letter] = pieces, sum(seconds for *_, seconds in pieces), self.rank.parameters(letter)
        return kept[letter]

    def _passes(self, piece):
        again = self.recompute == "full" or (self.recompute == "selective" and piece.selective)
        return piece.forward * (1 + again) + piece.backward

    def _ends(self, last, mtp):
        """(term, kind, seconds) of the heads, which are not recomputed; the MTP head's projection goes with its kind."""
        if not last:
            return []
        if mtp not in self._plain:
            heads = [self.rank.head(layout.padded_vocab(self.rank.model))] * (1 + bool(mtp))
            pieces = [self.rank.mtp_join(), *heads] if mtp else heads
            self._plain[mtp] = [
                (piece.name, piece.kind, self.rank.factor(piece.kind) * (piece.forward + piece.backward))
                for piece in pieces
            ]
        return self._plain[mtp]


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
            found["optimizer", "optimizer"] += rank.memory(update + BUFFERS * rank.software.gradient_bytes * held)
    if cut.pipeline > 1 and (config.model.tie_embeddings or "/" in config.model.pattern):
        nbytes = layout.padded_vocab(config.model) * config.model.hidden_size // cut.tensor * 4
        found["tied_gradients", "communication"] = nbytes / (rank.rate["nic"] * 1e9)
    return {(name, kind): rank.factor(kind) * seconds for (name, kind), seconds in found.items()}
