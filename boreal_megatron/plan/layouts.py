"""Every layout of a run on so many GPUs: which are impossible and why, which do not fit, which are fastest.

The fields of a layout are chosen one after another. A rule of `config.rules` that depends on nothing still open is
looked at at once, so that what is impossible is left with its reason before anything is built on it. What remains is
ranked by `plan.time`, which is asked only where bounds from below do not decide, and `plan.memory` is asked in that
order until enough layouts fit.
"""

import contextlib
import heapq
import itertools
from dataclasses import dataclass
from math import gcd
from operator import itemgetter
from typing import NamedTuple

from boreal_megatron.config import check, phases, rules
from boreal_megatron.config.rules import CONTEXT, DELTANET, EXPERT, EXPERT_TENSOR, PIPELINE, SEQUENCE_PARALLEL
from boreal_megatron.config.rules import TENSOR, VIRTUAL, divisors
from boreal_megatron.config.schema import Parallel, Precision
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import memory, shards, time

RECOMPUTE = ("none", "selective", "full")  # each slower than the one before, and smaller
SHORTEST, LONGEST = 2048, 32_768  # positions of a micro-batch on one rank; windows alone may be shorter or longer
WEIGHT = 2  # bytes of a parameter on its rank, its gradient comes on top, and whatever else there is
ROUNDING = 1e-9  # of a sum in another order
OF_A_MICRO_BATCH = itemgetter(
    TENSOR, SEQUENCE_PARALLEL, CONTEXT, DELTANET, EXPERT, EXPERT_TENSOR, "micro_batch", "recompute", "precision"
)  # what decides how long its passes through the whole network take
EQUAL = 0.01  # of the time: the model tells no closer ones apart, and the plainer layout comes first
NOT_TRIED = {
    "precision fp32": "slower than bf16 in every layout: it has no tensor cores",
    "other recipes of precision.fp8": "the rates tell none from another",
    "optimizer.gradients, parallel.dispatcher, parallel.overlap, kernels": "as the configuration says; write others as overrides",
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
    """`best`: layouts that fit, fastest first; `others`: the fastest that fits in each other precision;
    `rejected`: a list of Reason; `slower`: how many possible layouts come behind them and were not asked whether they
    fit."""

    best: list
    others: list
    rejected: list
    slower: int


def search(config, world, gpu, top=5, names=None, doublings=4):
    """The layouts with which a run takes the least time, several phases in one layout, and the best of each other
    precision: that changes what is computed, so it is only shown.

    Args:
        config: `config.schema.Config`; its layout, micro_batch and recompute are replaced.
        gpu: `hardware.GPU`.
        top: how many.
        doublings: of the GPUs, that are tried for an error's advice.
        names: phases whose time and memory count; None: all. The layout is possible for the others, too.

    Returns:
        Found.

    Raises:
        ProblemsError: of the configuration, on any number of GPUs.
        BorealError: no layout can run (it names the nearest numbers of GPUs on which one can), or none fits.
    """
    check.check(config.model_copy(update={"parallel": Parallel(), "micro_batch": 1}), 1)  # wrong on any number of GPUs
    rejected, queue, smallest = {}, [], None
    costs = Costs(config, world, gpu, names)
    best = {precision: [] for precision in precisions(config, rejected)}
    wanted = {precision: top if precision == config.precision else 1 for precision in best}
    tickets = itertools.count()
    looks = costs.soon, costs.at_least, lambda chosen: costs.estimate(laid_out(config, chosen)).seconds

    def consider(chosen):
        """Queues a layout by its bound; whoever comes first is looked at closer, and comes again with what that says."""
        heapq.heappush(queue, (looks[0](chosen), next(tickets), chosen, 1))

    for chosen in _possible(config, world, gpu, rejected, list(best)):
        consider(chosen)
    if not any(chosen["precision"] == config.precision for _, _, chosen, _ in queue):
        raise BorealError(_impossible(config, world, gpu, rejected))
    while queue and any(len(best[p]) < wanted[p] for p in best):
        _, ticket, chosen, looked = heapq.heappop(queue)
        if len(best[chosen["precision"]]) == wanted[chosen["precision"]]:
            continue
        if looked < len(looks):
            heapq.heappush(queue, (looks[looked](chosen), ticket, chosen, looked + 1))
            continue
        run = laid_out(config, chosen)
        candidate = costs.estimate(run)
        if problems := check.problems(run, world):  # those that are no rule between numbers
            _note(rejected, "check", lambda: (problems[0], fields(run)))
            continue
        needs = (WEIGHT + (4 if run.optimizer.gradients == "fp32" else 2)) * candidate.estimates[0].parameters
        whole = needs <= gpu.memory_gib * memory.GIB
        if whole:
            needs = costs.needs(run)
        if needs <= gpu.memory_gib * memory.GIB:
            best[run.precision].append(candidate._replace(bytes=needs))
            continue
        smallest = min(smallest or needs, needs)
        text = f"needs {needs / memory.GIB:.1f} GiB on its fullest rank, a GPU has {gpu.memory_gib}"
        _note(rejected, "memory", lambda: (text, fields(run)))
        again = RECOMPUTE.index(run.recompute) + 1
        if whole and again < len(RECOMPUTE):
            consider(chosen | {"recompute": RECOMPUTE[again]})
    mine = best.pop(config.precision)
    if not mine:
        raise BorealError(
            f"no layout for {world} GPUs fits into {gpu.memory_gib} GiB; the smallest needs "
            f"{smallest / memory.GIB:.1f} GiB on its fullest rank: {_enough(config, world, gpu, names, doublings)}"
        )
    close = [c for c in mine if c.seconds <= (1 + EQUAL) * mine[0].seconds]
    mine = sorted(close, key=Candidate.plainness) + mine[len(close) :]
    return Found(mine, [c for found in best.values() for c in found], list(rejected.values()), len(queue))


def precisions(config, rejected):
    """The configuration's own `config.schema.Precision`, and bf16 without FP8 and with it where that can be; what
    cannot is noted."""
    own = config.precision
    found = {own.compute + bool(own.fp8) * " fp8": own}
    for fp8 in (None, "tensorwise"):
        other = Precision(compute="bf16", fp8=fp8)
        if problem := next(check.fp8_problems(config.model_copy(update={"precision": other})), None):
            _note(rejected, "precision", lambda: (problem, {}))
        else:
            found.setdefault("bf16" + bool(fp8) * " fp8", other)
    return list(found.values())


def laid_out(config, chosen):
    """The configuration with a layout."""
    cut = {name.partition(".")[2]: value for name, value in chosen.items() if name.startswith("parallel.")}
    parallel = config.parallel.model_copy(update=cut | {"pipeline_layers": None})
    rest = {name: chosen[name] for name in ("micro_batch", "recompute", "precision")}
    return config.model_copy(update=rest | {"parallel": parallel})


def fields(config):
    """What a layout chooses, in the form of an overlay of a configuration file."""
    return {
        "parallel": config.parallel.model_dump(exclude_none=True),
        "micro_batch": config.micro_batch,
        "recompute": config.recompute,
    }


class Costs:
    """What layouts of a run cost, with what they have in common kept.

    Args:
        as those of `search`.

    Attributes:
        phases: those that count.
    """

    def __init__(self, config, world, gpu, names=None):
        self.config, self.world, self.gpu, self.phases = config, world, gpu, named(config, names)
        spans = [span for span in phases.spans(config.phases) if span.phase in self.phases]
        self.shapes = [(span.phase.sequence, span.phase.positions_per_step) for span in spans]
        self.steps = dict.fromkeys(self.shapes, 0)
        for shape, span in zip(self.shapes, spans, strict=True):
            self.steps[shape] += span.steps
        self.example = {shape: span.phase for shape, span in zip(self.shapes, spans, strict=True)}
        self.known = {sequence: {} for sequence, _ in self.shapes}
        self.works, self.held = {}, {}
        (self.network,) = time.letters_of(config.model.pattern, 1, 1)
        self.heads = self.network[self.network.index("/") :]

    def estimate(self, config):
        """A Candidate of a configuration as it is."""
        found = {
            shape: time.step(config, phase, self.world, self.gpu, known=self.known[phase.sequence])
            for shape, phase in self.example.items()
        }
        seconds = sum(steps * found[shape].seconds for shape, steps in self.steps.items())
        return Candidate(config, seconds, tuple(found[shape] for shape in self.shapes))

    def at_least(self, chosen):
        """A bound from below of the seconds of a layout as `_possible` gives it: without what happens once a step."""
        stages = time.letters_of(self.config.model.pattern, chosen[PIPELINE], chosen[VIRTUAL])

        def each(work):
            seconds = [work.seconds(letters) for letters in stages]
            return max(seconds), sum(seconds)

        return self._passes(chosen, each)

    def soon(self, chosen):
        """A bound below that one, and sooner known: pipeline ranks are as alike as they can be. The slowest takes no less
        than its share, or than the heads, which one rank has."""

        def alike(work):
            together = work.seconds(self.network)
            return max(together / chosen[PIPELINE], work.seconds(self.heads)), together

        return self._passes(chosen, alike)

    def _passes(self, chosen, seconds_of):
        """`seconds_of` a Work gives those of a micro-batch on the slowest pipeline rank, and on all together."""
        key = OF_A_MICRO_BATCH(chosen)
        if key not in self.works:
            run = laid_out(self.config, chosen)
            works = {n: time.work_of(run, n, self.gpu, None, known) for n, known in self.known.items()}
            self.works[key] = [(*shape, steps, works[shape[0]]) for shape, steps in self.steps.items()]
        rows = chosen["micro_batch"] * (self.world // (chosen[TENSOR] * chosen[PIPELINE] * chosen[CONTEXT]))
        return (1 - ROUNDING) * sum(
            steps * time.passes(positions // (sequence * rows), *seconds_of(work), chosen[VIRTUAL])
            for sequence, positions, steps, work in self.works[key]
        )

    def needs(self, config):
        """Bytes of the fullest rank of a configuration that `check` has nothing against."""
        key = config.parallel, config.precision.compute
        if key not in self.held:
            self.held[key] = shards.held(config, self.world)
        counted = config.model_copy(update={"phases": self.phases})
        return memory.needed(memory.per_rank(counted, self.world, held=self.held[key]))


def named(config, names):
    """The phases that count.

    Raises:
        BorealError: a name that no phase has.
    """
    known = [phase.name for phase in config.phases]
    if wrong := [name for name in names or () if name not in known]:
        raise BorealError(f"no phase is called {', '.join(wrong)}; the run has: {', '.join(known)}")
    return tuple(phase for phase in config.phases if not names or phase.name in names)


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
        worlds = (n for n in (world - distance, world + distance) if n > 0)
        near += [n for n in worlds if any(_possible(config, n, gpu, {}, [config.precision]))]
        if near:
            break
    return f"no layout for {world} GPUs: {first}; nearest number of GPUs that has one: {', '.join(map(str, near))}"


def _possible(config, world, gpu, rejected, precisions):
    """{field: value} of all layouts that no rule forbids."""
    values = check.values_of(config, world).but(rules.SPLIT, None)
    table = [rule for rule in rules.table(len(config.phases)) if values.has(rule)]
    fp8 = list(dict.fromkeys(precision.fp8 for precision in precisions))
    choices = [(rules.FP8, lambda v: fp8), *_choices(config, world, gpu)]
    undecided = [(_Asked(rule), {rules.FP8}) for rule in table]
    for chosen in _choose(values, {}, undecided, choices, rejected):
        for precision in precisions:
            if precision.fp8 == chosen[rules.FP8]:
                yield chosen | {"recompute": RECOMPUTE[0], "precision": precision}


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


def _choose(values, chosen, undecided, choices, rejected):
    """All ways to go on: {field: value} of what breaks no rule. `undecided` are (_Asked, fields that it was seen to
    depend on); as long as those keep their values it depends on no other."""
    if not choices:
        yield chosen
        return
    (field, options), *later = choices
    unset = {name for name, _ in later}
    for value in options(values):
        mine, with_it = values.but(field, value), chosen | {field: value}
        left, broken = [], None
        for asked, fields in undecided:
            holds = None
            if field in fields:
                fields, holds = asked.look(mine)
            if not fields.isdisjoint(unset):
                left.append((asked, fields))
            elif not holds:
                broken = asked.rule
                break
        if broken:
            key = broken.blame, broken.relation, broken.why
            _note(rejected, key, lambda: (check.broken(mine, broken), with_it))
        else:
            yield from _choose(mine, with_it, left, later, rejected)


class _Asked:
    """A rule, and what it said before: where it reads the same values it says the same."""

    def __init__(self, rule):
        self.rule = rule
        self.said = {}  # fields -> (what reads them, {their values: whether it holds})

    def look(self, values):
        """(the fields that decide whether it holds, whether it does)."""
        for fields, (read, said) in self.said.items():
            holds = said.get(read(values))
            if holds is not None:
                return fields, holds
        fields, holds = frozenset(values.depends(self.rule)), values.holds(self.rule)
        read, said = self.said.setdefault(fields, (itemgetter(*fields), {}))
        said[read(values)] = holds
        return fields, holds


def _note(rejected, key, example):
    """Count a reason, and keep what it says of the first layout that has it."""
    if key in rejected:
        rejected[key].layouts += 1
    else:
        rejected[key] = Reason(*example())
