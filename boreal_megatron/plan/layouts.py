"""Every layout of a run on so many GPUs: which are impossible and why, which do not fit, which are fastest.

The fields of a layout are chosen one after another. A rule of `config.rules` that depends on nothing still open is
looked at at once, so that what is impossible is left with its reason before anything is built on it. What remains is
ranked by `plan.time`, and `plan.memory` is asked in that order until enough layouts fit.
"""

import contextlib
import heapq
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from boreal_megatron.config import check, phases, rules
from boreal_megatron.config.rules import CONTEXT, DELTANET, EXPERT, EXPERT_TENSOR, PIPELINE, SEQUENCE_PARALLEL
from boreal_megatron.config.rules import TENSOR, VIRTUAL, divisors
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import memory, time

RECOMPUTE = ("none", "selective", "full")  # each slower than the one before, and smaller
SHORTEST, LONGEST = 2048, 32_768  # positions of a micro-batch on one rank; windows alone may be shorter or longer
WEIGHT_AND_GRADIENT = 6  # bytes of a parameter on its rank, in bf16 and FP32; whatever else there is comes on top
EQUAL = 0.01  # of the time: the model tells no closer ones apart, and the plainer layout comes first
NOT_TRIED = {
    "precision fp32": "slower than bf16 in every layout: it has no tensor cores",
    "precision.fp8, parallel.dispatcher, parallel.overlap, kernels": "as the configuration says; write others as overrides",
    "micro_batch > 1 with context > 1": "a rank would exchange what it can keep",
    f"fewer than {SHORTEST:,} or more than {LONGEST:,} positions on a rank": "too little work, or no faster",
    "expert_tensor other than 1 and tensor": "the experts' ranks would not be those of the row",
    "pipeline_layers": "the even split only; one with fewer layers beside the head may be faster",
}


@dataclass
class Reason:
    """Why layouts were left: what is said of the first of them, its fields as far as chosen, how many there are."""

    text: str
    example: dict
    layouts: int = 1


class Candidate(NamedTuple):
    """A layout that can run: its configuration, the seconds of all phases that count, an Estimate for each of them, and
    the bytes of its fullest rank (0 until memory was asked)."""

    config: object
    seconds: float
    estimates: tuple
    bytes: int = 0

    def plainness(self):
        """Sizes of what cuts the network; smaller is plainer."""
        cut = self.config.parallel
        return cut.tensor * cut.pipeline * cut.virtual_pipeline * cut.context * cut.expert_tensor, cut.expert


class Found(NamedTuple):
    """`best`: layouts that fit, fastest first; `rejected`: a list of Reason; `slower`: how many possible layouts come
    behind them and were not asked whether they fit."""

    best: list
    rejected: list
    slower: int


def search(config, world, gpu, top=5, names=None, doublings=4):
    """The layouts with which a run takes the least time, several phases in one layout.

    Args:
        config: `config.schema.Config`; its layout, micro_batch and recompute are replaced.
        gpu: `hardware.GPU`.
        top: how many.
        doublings: of the GPUs, that are tried for an error's advice.
        names: phases whose time and memory count; None: all. The layout is possible for the others, too.

    Returns:
        Found.

    Raises:
        BorealError: no layout can run (it names the nearest numbers of GPUs on which one can), or none fits.
    """
    rejected, queue, known = {}, [], {}
    for number, candidate in enumerate(_possible(config, world, gpu, rejected)):
        _push(queue, number, candidate, world, gpu, known, names)
    if not queue:
        raise BorealError(_impossible(config, world, gpu, rejected))
    best, smallest = [], None
    while queue and len(best) < top:
        _, number, candidate = heapq.heappop(queue)
        if problems := check.problems(candidate.config, world):  # those that are no rule between numbers
            _note(rejected, "check", lambda: (problems[0], fields(candidate.config)))
            continue
        needs = WEIGHT_AND_GRADIENT * candidate.estimates[0].parameters
        whole = needs <= gpu.memory_gib * memory.GIB
        if whole:
            counted = candidate.config.model_copy(update={"phases": named(candidate.config, names)})
            needs = memory.needed(memory.per_rank(counted, world))
        if needs <= gpu.memory_gib * memory.GIB:
            best.append(candidate._replace(bytes=needs))
            continue
        smallest = min(smallest or needs, needs)
        text = f"needs {needs / memory.GIB:.1f} GiB on its fullest rank, a GPU has {gpu.memory_gib}"
        _note(rejected, "memory", lambda: (text, fields(candidate.config)))
        again = RECOMPUTE.index(candidate.config.recompute) + 1
        if whole and again < len(RECOMPUTE):
            smaller = candidate.config.model_copy(update={"recompute": RECOMPUTE[again]})
            _push(queue, number, smaller, world, gpu, known, names)
    if not best:
        raise BorealError(
            f"no layout for {world} GPUs fits into {gpu.memory_gib} GiB; the smallest needs "
            f"{smallest / memory.GIB:.1f} GiB on its fullest rank: {_enough(config, world, gpu, names, doublings)}"
        )
    close = [c for c in best if c.seconds <= (1 + EQUAL) * best[0].seconds]
    best = sorted(close, key=Candidate.plainness) + best[len(close) :]
    return Found(best, list(rejected.values()), len(queue))


def fields(config):
    """What a layout chooses, in the form of an overlay of a configuration file."""
    return {
        "parallel": config.parallel.model_dump(exclude_none=True),
        "micro_batch": config.micro_batch,
        "recompute": config.recompute,
    }


def estimate(config, world, gpu, known=None, names=None):
    """A Candidate of a configuration as it is; the arguments are those of `search`."""
    known = {} if known is None else known
    shapes, estimates, seconds = {}, [], 0.0
    counted = named(config, names)
    for span in phases.spans(config.phases):
        if span.phase not in counted:
            continue
        shape = span.phase.sequence, span.phase.positions_per_step
        if shape not in shapes:
            shapes[shape] = time.step(config, span.phase, world, gpu, known=known.setdefault(shape[0], {}))
        estimates.append(shapes[shape])
        seconds += span.steps * shapes[shape].seconds
    return Candidate(config, seconds, tuple(estimates))


def named(config, names):
    """The phases that count.

    Raises:
        BorealError: a name that no phase has.
    """
    known = [phase.name for phase in config.phases]
    if wrong := [name for name in names or () if name not in known]:
        raise BorealError(f"no phase is called {', '.join(wrong)}; the run has: {', '.join(known)}")
    return tuple(phase for phase in config.phases if not names or phase.name in names)


def _push(queue, number, config, world, gpu, known, names):
    candidate = estimate(config, world, gpu, known, names)
    heapq.heappush(queue, (candidate.seconds, (number, config.recompute), candidate))


def _enough(config, world, gpu, names, doublings):
    """What would do: the first doubling of the GPUs on which a layout fits."""
    for count in (world << n for n in range(1, doublings + 1)):
        with contextlib.suppress(BorealError):
            search(config, count, gpu, 1, names, doublings=0)
            return f"take {count} GPUs, or ones with more memory"
    return "take GPUs with more memory"


def _impossible(config, world, gpu, rejected):
    """Says why there is none, and where the nearest are."""
    first = max(rejected.values(), key=lambda reason: reason.layouts).text if rejected else "no layout divides it"
    near = []
    for distance in range(1, world + 1):
        near += [n for n in (world - distance, world + distance) if n > 0 and any(_possible(config, n, gpu, {}))]
        if near:
            break
    return f"no layout for {world} GPUs: {first}; nearest number of GPUs that has one: {', '.join(map(str, near))}"


def _possible(config, world, gpu, rejected):
    """Configurations of all layouts that no rule forbids."""
    plain = config.parallel.model_copy(update={"pipeline_layers": None})
    values = check.values_of(config.model_copy(update={"parallel": plain}), world)
    table = [rule for rule in rules.table(len(config.phases)) if values.has(rule)]
    for chosen in _choose(values, {}, table, list(_choices(config, world, gpu)), rejected):
        cut = {name.partition(".")[2]: value for name, value in chosen.items() if name.startswith("parallel.")}
        parallel = plain.model_copy(update=cut)
        yield config.model_copy(
            update={"parallel": parallel, "micro_batch": chosen["micro_batch"], "recompute": RECOMPUTE[0]}
        )


def _choices(config, world, gpu):
    """(field, its values given what was chosen before), in the order in which they are chosen."""
    letters, layers = (check.values_of(config)[name] for name in (rules.LETTERS, rules.LAYERS))
    longest = max(phase.sequence for phase in config.phases)
    windows = gcd(*(phase.windows_per_step() for phase in config.phases))
    rows = [n for n in divisors(windows) if n == 1 or n * longest <= LONGEST]
    sizes = divisors(world)

    yield TENSOR, lambda v: [n for n in sizes if n <= gpu.gpus_per_node]
    yield SEQUENCE_PARALLEL, lambda v: [v[TENSOR] > 1]
    yield CONTEXT, lambda v: [n for n in sizes if n == 1 or (n * v[TENSOR] <= world and longest // n >= SHORTEST)]
    yield DELTANET, lambda v: ["state", "heads"] if v[CONTEXT] > 1 and "G" in letters else ["state"]
    yield PIPELINE, lambda v: [n for n in sizes if n <= layers and n * v[TENSOR] * v[CONTEXT] <= world]
    yield "micro_batch", lambda v: rows if v[CONTEXT] == 1 else [1]
    yield VIRTUAL, lambda v: [n for n in sizes if n * v[PIPELINE] <= layers] if v[PIPELINE] > 1 else [1]
    yield EXPERT, lambda v: [n for n in sizes if n <= config.model.moe.experts] if "E" in letters else [1]
    yield EXPERT_TENSOR, lambda v: sorted({1, v[TENSOR]}) if "E" in letters else [1]


def _choose(values, chosen, open_rules, choices, rejected):
    """All ways to go on: {field: value} of what breaks no rule."""
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
            key = broken.blame, broken.relation, broken.why
            _note(rejected, key, lambda: (check.broken(mine, broken), with_it))
        else:
            yield from _choose(mine, with_it, left, later, rejected)


def _note(rejected, key, example):
    """Count a reason, and keep what it says of the first layout that has it."""
    if key in rejected:
        rejected[key].layouts += 1
    else:
        rejected[key] = Reason(*example())
