"""Which configurations can run: a table of rules over numbers, and where valid values may be found.

A rule says that one product of fields is a multiple of another, at most another, or equal to it. `check.py` looks at
the rules, notes which fields each depends on, and searches the candidates.
"""

import operator
import re
from collections.abc import Callable
from functools import cache
from math import gcd, isqrt, lcm, prod
from typing import NamedTuple

from boreal_megatron.config.fp8 import ALIGNMENT
from boreal_megatron.config.layout import nearest_split, padded

TENSOR, SEQUENCE_PARALLEL = "parallel.tensor", "parallel.sequence_parallel"
PIPELINE, VIRTUAL, SPLIT = "parallel.pipeline", "parallel.virtual_pipeline", "parallel.pipeline_layers"
CONTEXT, DELTANET = "parallel.context", "parallel.context_deltanet"
EXPERT, EXPERT_TENSOR = "parallel.expert", "parallel.expert_tensor"
KV_HEADS, KEY_HEADS, EXPERTS = "model.attention.kv_heads", "model.gdn.key_heads", "model.moe.experts"
HIDDEN, FFN, SHARED = "model.hidden_size", "model.ffn_hidden_size", "model.moe.shared_hidden_size"
VALUE_HEADS, GDN_DIM = "model.gdn.value_heads", "model.gdn.head_dim"
EXPERT_FFN, FP8 = "model.moe.expert_hidden_size", "precision.fp8"
CUT_BY_MODEL = (TENSOR, PIPELINE, CONTEXT)
# What is looked up like a field without being one, under the name that messages use.
LETTERS, LAYERS, PHASES = "letters of model.pattern", "layers of model.pattern", "number of phases"
DATA, TAPS, ROWS = "data parallel size", "(model.gdn.conv_width - 1)", "padded model.vocab_size"
QKV, GDN_IN = "rows of linear_qkv", "rows of Gated DeltaNet's in_proj"
ENTRIES, SUM, EMPTY = (f"{what} of {SPLIT}" for what in ("entries", "sum", "empty stages between the first and last"))
DERIVED = {
    DATA: lambda v: _data(v["world"] if "world" in v else 0, v.product(CUT_BY_MODEL)),
    TAPS: lambda v: v["model.gdn.conv_width"] - 1,
    ROWS: lambda v: padded(v["model.vocab_size"]),
    QKV: lambda v: 2 * (v["model.attention.heads"] + v[KV_HEADS]) * v["model.attention.head_dim"],
    GDN_IN: lambda v: 2 * (v[KEY_HEADS] * v[GDN_DIM] + v[VALUE_HEADS] * (v[GDN_DIM] + 1)),
    ENTRIES: lambda v: len(v[SPLIT]),
    SUM: lambda v: sum(v[SPLIT]),
    EMPTY: lambda v: v[SPLIT][1:-1].count(0),
}
CUT_BY_TENSOR = (
    KV_HEADS,
    KEY_HEADS,
    FFN,
    HIDDEN,
    ROWS,
    SHARED,
)

# What is said where the relation does not hold.
MULTIPLE, AT_MOST, EQUAL = "is not a multiple of", "exceeds", "must be"
HOLDS = {MULTIPLE: lambda a, b: a % b == 0, AT_MOST: operator.le, EQUAL: operator.eq}


class Rule(NamedTuple):
    """`subject RELATION other`, two products of names and numbers, wherever `when` holds."""

    blame: str  # the field that has to change, unless another one mends more
    subject: tuple
    relation: str
    other: tuple
    when: Callable = lambda v: True
    why: str = ""


@cache
def table(phases):
    """All rules for a run of so many phases; what concerns few fields comes first."""
    rows = [row_of(f"phases.{number}") for number in range(phases)]
    experts = PIPELINE, EXPERT, EXPERT_TENSOR
    return (
        *_model(),
        *_layout(),
        *_fp8(),
        *(rule for row in rows for rule in _rows(*row)),
        Rule("world", ("world",), MULTIPLE, CUT_BY_MODEL),
        Rule(EXPERT, ("world",), MULTIPLE, experts, lambda v: v[EXPERT] * v[EXPERT_TENSOR] > 1),
        *(rule for row in rows for rule in _steps(*row)),
    )


def _model():
    yield _divides(KV_HEADS, "model.attention.heads")
    yield _divides(KEY_HEADS, VALUE_HEADS)
    yield Rule("model.moe.top_k", ("model.moe.top_k",), AT_MOST, (EXPERTS,))


def _layout():
    for whole in CUT_BY_TENSOR:
        yield _divides(TENSOR, whole)
    alone, moe = f"with {TENSOR}=1", f"with MoE blocks and {TENSOR} > 1"
    split = (SEQUENCE_PARALLEL,)
    yield Rule(SEQUENCE_PARALLEL, split, EQUAL, (False,), lambda v: v[TENSOR] == 1, alone)
    # megatron-core's MoE layer refuses to train otherwise.
    yield Rule(SEQUENCE_PARALLEL, split, EQUAL, (True,), lambda v: v[TENSOR] > 1 and "E" in v[LETTERS], moe)

    yield _divides(EXPERT, EXPERTS)
    yield _divides(EXPERT_TENSOR, "model.moe.expert_hidden_size")
    for name in (EXPERT, EXPERT_TENSOR):
        yield Rule(name, (name,), EQUAL, (1,), lambda v: "E" not in v[LETTERS], "without MoE blocks in model.pattern")

    yield Rule(VIRTUAL, (VIRTUAL,), EQUAL, (1,), lambda v: v[PIPELINE] == 1, f"with {PIPELINE}=1")
    ends = f"(only {SPLIT} can leave the first and the last stage empty)"
    yield Rule(PIPELINE, (PIPELINE,), AT_MOST, (LAYERS,), lambda v: v[SPLIT] is None, ends)
    yield Rule(VIRTUAL, (PIPELINE, VIRTUAL), AT_MOST, (LAYERS,), lambda v: v[SPLIT] is None and v[VIRTUAL] > 1, ends)
    for what, other in ((ENTRIES, (PIPELINE, VIRTUAL)), (SUM, (LAYERS,)), (EMPTY, (0,))):
        yield Rule(SPLIT, (what,), EQUAL, other, lambda v: v[SPLIT] is not None)

    def by_heads(v):
        return v[CONTEXT] > 1 and v[DELTANET] == "heads" and "G" in v[LETTERS]

    yield Rule(CONTEXT, (KEY_HEADS,), MULTIPLE, (TENSOR, CONTEXT), by_heads, f"with {DELTANET}=heads")


def _fp8():
    """Every dim of every product in FP8, on one rank; `config/fp8.py` lists the products."""

    def with_blocks(letters):
        return lambda v: v[FP8] is not None and any(letter in v[LETTERS] for letter in letters)

    def experts(v):
        return with_blocks("E")(v) and v["kernels.experts"] == "te"

    why = "in FP8"
    # The projection into the MTP block is the one linear that tensor parallelism cuts along the hidden size.
    yield Rule(HIDDEN, (HIDDEN,), MULTIPLE, (ALIGNMENT,), lambda v: v[FP8] and "/" not in v["model.pattern"], why)
    yield Rule(HIDDEN, (HIDDEN,), MULTIPLE, (ALIGNMENT, TENSOR), lambda v: v[FP8] and "/" in v["model.pattern"], why)
    yield Rule(FFN, (FFN,), MULTIPLE, (ALIGNMENT, TENSOR), with_blocks("-"), why)
    yield Rule(SHARED, (SHARED,), MULTIPLE, (ALIGNMENT, TENSOR), with_blocks("E"), why)
    yield Rule(EXPERT_FFN, (EXPERT_FFN,), MULTIPLE, (ALIGNMENT, EXPERT_TENSOR), experts, why)
    for product in ((QKV,), ("model.attention.heads", "model.attention.head_dim")):
        yield Rule(TENSOR, product, MULTIPLE, (ALIGNMENT, TENSOR), with_blocks("*"), why)
    for product in ((GDN_IN,), (VALUE_HEADS, GDN_DIM)):
        yield Rule(TENSOR, product, MULTIPLE, (ALIGNMENT, TENSOR), with_blocks("G"), why)


def _rows(sequence, step, row):
    """How long a packed row must be; `row` is the product that gives its positions."""

    def by_state(v):
        return v[CONTEXT] > 1 and v[DELTANET] == "state" and "G" in v[LETTERS]

    yield _divides(sequence, step)
    yield Rule(sequence, (sequence,), AT_MOST, ("model.max_positions",))
    # A context-parallel rank attends with one early and one late of 2 * context pieces of the row.
    bags = "positions (bags, folded before context parallelism cuts the row)"
    yield Rule(CONTEXT, row, MULTIPLE, (2, CONTEXT), lambda v: v[CONTEXT] > 1, bags)
    # The convolution reads back into the chunk before, and no further.
    yield Rule(CONTEXT, (CONTEXT, TAPS), AT_MOST, row, by_state, bags)
    yield Rule(sequence, row, MULTIPLE, (CONTEXT, TENSOR), lambda v: v[SEQUENCE_PARALLEL])
    cut, uncut = (ALIGNMENT, CONTEXT, TENSOR), (ALIGNMENT, CONTEXT)
    yield Rule(sequence, row, MULTIPLE, cut, lambda v: v[FP8] and v[SEQUENCE_PARALLEL], "in FP8")
    yield Rule(sequence, row, MULTIPLE, uncut, lambda v: v[FP8] and not v[SEQUENCE_PARALLEL], "in FP8")


def _steps(sequence, step, row):
    """Whole micro-batches on every rank, if windows are whole; the interleaved schedule takes them in groups of the
    pipeline's size."""

    def windows(v):
        return v[step] % v[sequence] == 0

    yield Rule(step, (step,), MULTIPLE, (*row, DATA), lambda v: windows(v) and v[VIRTUAL] == 1)
    grouped = f"with {VIRTUAL} > 1"
    yield Rule(step, (step,), MULTIPLE, (*row, DATA, PIPELINE), lambda v: windows(v) and v[VIRTUAL] > 1, grouped)


def _divides(part, whole):
    return Rule(part, (whole,), MULTIPLE, (part,))


def row_of(at):
    """(sequence, positions_per_step, factors of a row's length) of a phase, as names."""
    return f"{at}.sequence", f"{at}.positions_per_step", (f"{at}.sequence", "micro_batch")


# Where valid values of a field may be found; which of them are is for the rules to say. The order is that in which
# fields are tried that no broken rule blames.
CANDIDATES = {
    "micro_batch": lambda v, at: divisors(gcd(*_windows(v))),
    "world": lambda v, at: _worlds(v),
    TENSOR: lambda v, at: divisors(v[KV_HEADS]),
    SEQUENCE_PARALLEL: lambda v, at: (False, True),
    PIPELINE: lambda v, at: range(1, v[LAYERS] + 3),
    VIRTUAL: lambda v, at: range(1, v[LAYERS] + 3),
    SPLIT: lambda v, at: _splits(v),
    CONTEXT: lambda v, at: divisors(gcd(*(v.product(row_of(f"phases.{n}")[2]) for n in range(v[PHASES])))),
    DELTANET: lambda v, at: ("state", "heads"),
    EXPERT: lambda v, at: divisors(v.get(EXPERTS, 1)),
    EXPERT_TENSOR: lambda v, at: divisors(v.get("model.moe.expert_hidden_size", 1)),
    KV_HEADS: lambda v, at: divisors(v["model.attention.heads"]),
    KEY_HEADS: lambda v, at: divisors(v[VALUE_HEADS]),
    "model.moe.top_k": lambda v, at: range(1, v[EXPERTS] + 1),
    HIDDEN: lambda v, at: _widths(v, HIDDEN, TENSOR),
    FFN: lambda v, at: _widths(v, FFN, TENSOR),
    SHARED: lambda v, at: _widths(v, SHARED, TENSOR),
    EXPERT_FFN: lambda v, at: _widths(v, EXPERT_FFN, EXPERT_TENSOR),
    VALUE_HEADS: lambda v, at: around(v[VALUE_HEADS], lcm(v[KEY_HEADS], ALIGNMENT // 2 * v[TENSOR])) if v[FP8] else [],
    "phases.*.sequence": lambda v, at: divisors(v[f"{at}.positions_per_step"]),
    "phases.*.positions_per_step": lambda v, at: around(v[f"{at}.positions_per_step"], _group(v, at)),
}
OR = {CONTEXT: DELTANET}  # what a line also offers, where that mends as much


def kind(name):
    """The key of CANDIDATES that a field has, if it is there."""
    return re.sub(r"^phases\.\d+\.", "phases.*.", name)


def candidates(field, v):
    return CANDIDATES[kind(field)](v, field.rpartition(".")[0])


def divisors(whole):
    low = [d for d in range(1, isqrt(whole) + 1) if whole % d == 0]
    return sorted({*low, *(whole // d for d in low)})


def around(value, unit):
    """The multiples of a unit next to a value, not 0."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n]


def _widths(v, field, cut):
    """Widths whose shards FP8 takes."""
    return around(v[field], ALIGNMENT * v[cut]) if v[FP8] else []


def _data(world, cut):
    """1 where the world is not known, or is itself wrong."""
    return world // cut if world and world % cut == 0 else 1


def _windows(v):
    """Windows of a step, of every phase where they are whole."""
    for number in range(v[PHASES]):
        sequence, step, _ = row_of(f"phases.{number}")
        if v[step] % v[sequence] == 0:
            yield v[step] // v[sequence]


def _worlds(v):
    """Those whose data-parallel size divides every step, and the nearest that divide at all."""
    cut = v.product(CUT_BY_MODEL)
    nearest = around(v["world"], lcm(cut, v.product((PIPELINE, EXPERT, EXPERT_TENSOR))))
    return sorted({*nearest, *(cut * data for data in divisors(gcd(*_windows(v))))})


def _splits(v):
    count = v.product((PIPELINE, VIRTUAL))
    possible = v[SPLIT] is not None and count <= v[LAYERS] + 2
    return [tuple(nearest_split(v[SPLIT], v[LAYERS], count))] if possible else []


def _group(v, at):
    """Positions that all ranks together take at a time."""
    return v.product((*row_of(at)[2], DATA)) * (v[PIPELINE] if v[VIRTUAL] > 1 else 1)


class Values(dict):
    """Fields by dotted name, and what is derived from them."""

    def __missing__(self, name):
        return DERIVED[name](self)

    def product(self, names):
        return prod(self[name] if isinstance(name, str) else name for name in names)

    def holds(self, rule):
        return not rule.when(self) or HOLDS[rule.relation](self.product(rule.subject), self.product(rule.other))

    def depends(self, rule):
        """The fields that decide whether a rule holds."""
        noting = _Noting(self)
        noting.holds(rule)
        return noting.read

    def but(self, field, value):
        return Values({**self, field: value})

    def has(self, rule):
        """Whether everything is known that a rule speaks of."""
        return all(not isinstance(name, str) or name in DERIVED or name in self for name in rule.subject + rule.other)


class _Noting(Values):
    """Notes which fields are read; a derived value reads fields itself."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, name):
        if name in self:
            self.read.add(name)
        return super().__getitem__(name)
