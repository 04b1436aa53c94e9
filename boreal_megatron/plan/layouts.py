"""Every layout of a network on so many GPUs: which are impossible and why, which do not fit, which are fastest.

The fields of a layout are chosen one after another. A rule of `config.rules` that depends on nothing still open is
looked at at once, so that what is impossible is left with its reason before anything is built on it. What remains is
ranked by `plan.time`, and `plan.memory` is asked in that order until enough layouts fit.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

from boreal_megatron.config import check, rules
from boreal_megatron.config.rules import CONTEXT, DELTANET, EXPERT, EXPERT_TENSOR, PIPELINE, SEQUENCE_PARALLEL
from boreal_megatron.config.rules import TENSOR, VIRTUAL, divisors
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import memory, time

RECOMPUTE = ("none", "selective", "full")  # each slower than the one before, and smaller
SHORTEST, LONGEST = 2048, 32_768  # positions of a micro-batch on one rank; windows alone may be shorter or longer
NOT_TRIED = {
    "precision: fp32": "slower than bf16 in every layout: it has no tensor cores",
    "precision: fp8": "not built: `precision` is bf16 or fp32",
    "micro_batch > 1 with context > 1": "a rank would exchange what it can keep",
    f"fewer than {SHORTEST:,} or more than {LONGEST:,} positions on a rank": "too little work, or no faster",
    "expert_tensor other than 1 and tensor": "the experts' ranks would not be those of the row",
    "pipeline_layers": "only the even split is tried; one with fewer layers beside the head may be faster",
}


class Candidate(NamedTuple):
    """A layout that can run: its configuration and the time of its step."""

    config: object
    estimate: time.Estimate
    bytes: int = 0  # of the fullest rank


@dataclass
class Reason:
    """Why layouts were left: what is said of the first of them, its fields as far as chosen, how many there are."""

    text: str
    example: dict
    layouts: int = 1


class Found(NamedTuple):
    """`best` layouts that fit, fastest first; `rejected`, a list of Reason; `slower`, how many possible layouts come
    behind them and were not asked whether they fit."""

    best: list
    rejected: list
    slower: int


def search(config, phase, world, gpu, top=5):
    """The fastest layouts for one phase.

    Args:
        config: `config.schema.Config`; its layout, micro_batch and recompute are replaced.
        phase: one of its phases.
        gpu: `hardware.GPU`.

    Returns:
        Found.

    Raises:
        BorealError: no layout can run; it names the nearest number of GPUs on which one can.
    """
    rejected = {}
    config = config.model_copy(update={"phases": (phase,)})
    possible = list(_possible(config, world, gpu, rejected))
    if not possible:
        near = [count for count in _outwards(world) if any(_possible(config, count, gpu, {}))]
        raise BorealError(
            f"no layout for {world} GPUs with {phase.sequence} positions a window and {phase.positions_per_step} a "
            f"step: {next(iter(rejected.values())).text}; nearest number of GPUs that has one: {', '.join(map(str, sorted(near[:2])))}"
        )
    queue, known = [], {}
    for number, candidate in enumerate(possible):
        _push(queue, number, candidate, "none", world, gpu, known)
    best, closest = [], None
    while queue and len(best) < top:
        _, number, estimate, candidate = heapq.heappop(queue)
        needs = _least(candidate, world) if candidate.recompute == "none" else 0
        if needs <= gpu.memory_gib * memory.GIB:
            needs = max(stage["total"] for stage in memory.per_rank(candidate, world)["stages"])
        if needs <= gpu.memory_gib * memory.GIB:
            best.append(Candidate(candidate, estimate, needs))
            continue
        closest = min(closest or needs, needs)
        too_much = f"needs {needs / memory.GIB:.1f} GiB on its fullest rank, a GPU has {gpu.memory_gib}"
        _note(rejected, "memory", lambda: (too_much, fields(candidate)))
        again = RECOMPUTE.index(candidate.recompute) + 1
        if again < len(RECOMPUTE):
            _push(queue, number, candidate, RECOMPUTE[again], world, gpu, known)
    if not best:
        raise BorealError(
            f"no layout for {world} GPUs fits in {gpu.memory_gib} GiB; the smallest needs {closest / memory.GIB:.1f} GiB on "
            "its fullest rank: take more GPUs, or ones with more memory"
        )
    return Found(best, list(rejected.values()), len(queue))


def _push(queue, number, config, recompute, world, gpu, known):
    candidate = config.model_copy(update={"recompute": recompute})
    estimate = time.step(candidate, candidate.phases[0], world, gpu, known=known)
    heapq.heappush(queue, (estimate.seconds, number, estimate, candidate))


def _possible(config, world, gpu, rejected):
    """Configurations of all layouts that no rule forbids."""
    values = check.values_of(config, world)
    table = [rule for rule in rules.table(1) if values.has(rule)]
    for chosen in _choose(values, {}, table, _choices(config, world, gpu), rejected):
        cut = {name.partition(".")[2]: value for name, value in chosen.items() if name.startswith("parallel.")}
        parallel = config.parallel.model_copy(update={**cut, "pipeline_layers": None})
        yield config.model_copy(update={"parallel": parallel, "micro_batch": chosen["micro_batch"]})


def _choices(config, world, gpu):
    """(field, its values given what was chosen before), in the order in which they are chosen."""
    phase, moe = config.phases[0], "E" in config.model.pattern
    layers = check.values_of(config, world)[rules.LAYERS]
    node, sizes = gpu.gpus_per_node, divisors(world)

    yield TENSOR, lambda v: [n for n in sizes if n <= node]
    yield SEQUENCE_PARALLEL, lambda v: [v[TENSOR] > 1]
    yield (
        CONTEXT,
        lambda v: [n for n in sizes if n == 1 or (n * v[TENSOR] <= world and phase.sequence // n >= SHORTEST)],
    )
    yield DELTANET, lambda v: ["state", "heads"] if v[CONTEXT] > 1 and "G" in config.model.pattern else ["state"]
    yield PIPELINE, lambda v: [n for n in sizes if n <= layers and n * v[TENSOR] * v[CONTEXT] <= world]
    rows = [n for n in divisors(phase.windows_per_step()) if n == 1 or n * phase.sequence <= LONGEST]
    yield "micro_batch", lambda v: rows if v[CONTEXT] == 1 else [1]
    yield VIRTUAL, lambda v: [n for n in sizes if n * v[PIPELINE] <= layers] if v[PIPELINE] > 1 else [1]
    yield EXPERT, lambda v: [n for n in sizes if n <= config.model.moe.experts] if moe else [1]
    yield EXPERT_TENSOR, lambda v: sorted({1, v[TENSOR]}) if moe else [1]


def _choose(values, chosen, open_rules, choices, rejected):
    """All ways to go on: {field: value} of what breaks no rule."""
    choices = list(choices)
    if not choices:
        yield chosen
        return
    (field, options), *later = choices
    unset = {name for name, _ in later}
    for value in options(values):
        mine, with_it = values.but(field, value), chosen | {field: value}
        left, broken = [], None
        for rule in open_rules:
            if mine.depends(rule) & unset:
                left.append(rule)
            elif not mine.holds(rule):
                broken = rule
                break
        if broken:
            _note(rejected, (broken.blame, broken.relation, broken.why), lambda: (check.broken(mine, broken), with_it))
        else:
            yield from _choose(mine, with_it, left, later, rejected)


def _note(rejected, key, example):
    """Count a reason, and keep what it says of the first layout that has it."""
    if key in rejected:
        rejected[key].layouts += 1
    else:
        rejected[key] = Reason(*example())


def fields(config):
    """What was chosen: field -> value."""
    return {**config.parallel.model_dump(), "micro_batch": config.micro_batch, "recompute": config.recompute}


def _least(config, world):
    """Bytes that the fullest rank has in any case: bf16 weights, FP32 gradients, its share of masters and moments."""
    weights = time.weights(config)
    data = check.data_size(config, world) * config.parallel.context
    experts = max(1, world // (config.parallel.pipeline * config.parallel.expert * config.parallel.expert_tensor))
    return max(6 * (w["dense"] + w["experts"]) + 12 * (w["dense"] / data + w["experts"] / experts) for w in weights)


def _outwards(world):
    """Other numbers of GPUs, the nearest first."""
    for distance in range(1, world + 1):
        yield from (count for count in (world - distance, world + distance) if count > 0)
