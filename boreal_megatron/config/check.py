"""What is wrong with a configuration beyond its types: every problem at once, with the nearest valid values.

No torch; answers before any process starts. What makes a configuration right is the table in `rules.py`; here is which
field to change, to what, and how to say so.
"""

import re
from math import prod

from boreal_megatron.config.pattern import expand
from boreal_megatron.config.rules import CANDIDATES, LAYERS, LETTERS, MULTIPLE, OR, PHASES
from boreal_megatron.config.rules import Values, candidates, kind, table
from boreal_megatron.errors import BorealError, ProblemsError

SUGGESTIONS = 3  # of the values nearest to a wrong one


def check(config, world=None):
    """Raise a ProblemsError unless the configuration can run.

    Args:
        config: `schema.Config`.
        world: number of processes; None leaves out what depends on it.
    """
    found = problems(config, world)
    if found:
        raise ProblemsError("configuration", found)


def problems(config, world=None):
    """All problems, a line for each field that has to change; empty when the configuration can run.

    A single line's values are each valid as they stand. Of several lines each is valid with the nearest values of those
    before it, and names them where they matter; all the nearest values together are right but for rare combinations,
    as the search does not go back.
    """
    if world is not None and world < 1:
        return [f"world={world}; expected 1 process or more"]
    try:
        expand(config.model.pattern)
    except BorealError as error:
        return [f"model.pattern: {error}"]
    values = values_of(config, world)
    rules = [rule for rule in table(len(config.phases)) if values.has(rule)]
    return [*_plain(config, values[LETTERS]), *_broken(values, rules)]


def values_of(config, world=None):
    """Every field of a configuration by its dotted name, and what the rules look up besides."""
    main, mtp = expand(config.model.pattern)
    values = Values(_flat("", config.model_dump()))
    values |= {LETTERS: main + (mtp or ""), LAYERS: len(main) // 2, PHASES: len(config.phases)}
    values |= {} if world is None else {"world": world}
    return values


def broken(values, rule):
    """What is wrong where a rule does not hold, without what to do."""
    return _line(values, rule.blame, [rule], "").removesuffix("; ")


def data_size(config, world):
    """Data-parallel size: what remains of the world."""
    cut = config.parallel
    return max(1, world // (cut.tensor * cut.pipeline * cut.context))


def _broken(v, rules):
    """Lines: mends one field after another with its nearest valid value until all rules hold."""
    start, mended = v, set()
    while broken := [rule for rule in rules if not v.holds(rule)]:
        depends = {rule: v.depends(rule) for rule in rules}
        field, nearest = _choose(v, depends, broken, mended)
        if not nearest:
            rules = [rule for rule in rules if rule is not broken[0]]
            if not start.holds(broken[0]):
                yield _line(start, field, broken[:1], f"no value of {field} alone mends this")
            continue
        after = v.but(field, min(nearest, key=lambda value: _distance(value, v[field])))
        told = [rule for rule in broken if field in depends[rule] and after.holds(rule)]
        given = [f"{name}={_text(v[name])}" for name in sorted(mended) if any(name in depends[rule] for rule in told)]
        say = f"nearest{' with ' + ', '.join(given) if given else ''}: {', '.join(map(_text, nearest))}"
        other = OR.get(field)
        if other and all(other in depends[rule] for rule in broken):
            say += "".join(f"; or {other}={value}" for value in _nearest(other, v, depends, broken, broken))
        yield _line(v, field, told, say)
        v, mended = after, mended | {field}


def _choose(v, depends, broken, mended):
    """A field to change and its nearest valid values: one that mends all rules, else one that mends the first, which
    depends on the fewest fields. Of several it is one whose value need not change beyond a factor of 2, then one that
    the rules blame."""
    names = sorted((name for name in v if kind(name) in CANDIDATES), key=lambda name: [*CANDIDATES].index(kind(name)))
    order = [field for field in dict.fromkeys([*(rule.blame for rule in broken), *names]) if field not in mended]
    for rules, patient in ((broken, False), (broken[:1], False), (broken[:1], True)):
        far = None
        for field in order:
            if all(field in depends[rule] for rule in rules):
                if nearest := _nearest(field, v, depends, broken, rules, patient):
                    if any(_close(value, v[field]) for value in nearest):
                        return field, nearest
                    far = far or (field, nearest)
        if far:
            return far
    return broken[0].blame, []


def _nearest(field, v, depends, broken, mend, patient=False):
    """The values of a field nearest to its own with which the rules of `mend` hold, and all others that depend on it.

    Only a rule that also depends on what is wrong elsewhere may be left broken (any, if patient), and as few of those
    as can be.
    """
    mine = [rule for rule in depends if field in depends[rule]]
    elsewhere = {name for rule in broken if field not in depends[rule] for name in depends[rule]}
    found = {}
    for value in candidates(field, v):
        values = v.but(field, value)
        left = [rule for rule in mine if not values.holds(rule)]
        if all(rule not in mend and (patient or values.depends(rule) & elsewhere) for rule in left):
            found.setdefault(len(left), []).append(value)
    best = found[min(found)] if found else []
    return sorted(sorted(best, key=lambda value: _distance(value, v[field]))[:SUGGESTIONS])


def _close(value, other):
    return type(value) is not int or other <= 2 * value <= 4 * other


def _distance(value, other):
    return abs(value - other) if isinstance(value, int) else 0


def _line(v, field, rules, say):
    """What is wrong with one field: what it fails itself, then what fails because of it, then what to do."""
    own, others = {}, {}
    for rule in rules:
        subject, other = _factors(v, rule.subject), _factors(v, rule.other)
        left, right = _product(v, subject), f"{_product(v, other, beside=subject[0])} {rule.why}".rstrip()
        if rule.relation == MULTIPLE and other == (field,):
            own.setdefault("does not divide", []).append(f"{left} {rule.why}".rstrip())
        elif subject == (field,):
            own.setdefault(rule.relation, []).append(right)
        else:
            others.setdefault(f"{rule.relation} {right}", []).append(left)
    own = [f"{relation} {', '.join(values)}" for relation, values in own.items()]
    clauses = [f"{', '.join(lefts)} {right}" for right, lefts in others.items()]
    head = _product(v, (field,)) + (" " + ", ".join(own) if own else ": " + clauses.pop(0))
    return "; ".join([head, *clauses, say])


def _factors(v, names):
    """What a product consists of but for fields that are 1, which say nothing."""
    return tuple(name for name in names if not isinstance(name, str) or v[name] != 1) or names[:1]


def _product(v, names, beside=""):
    """`a*b=2*3=6`; a number alone is just that. Names in the phase of a field said before go without its number."""
    values = [v[name] if isinstance(name, str) else name for name in names]
    words = [_label(v, name, beside) if isinstance(name, str) else _text(name) for name in names]
    if len(names) > 1:
        return f"{'*'.join(words)}={'*'.join(map(_text, values))}={prod(values)}"
    return f"{words[0]}={_text(values[0])}" if isinstance(names[0], str) else words[0]


def _label(v, name, beside):
    phase = re.match(r"(phases\.\d+)\.(\w+)", name)
    if not phase:
        return name
    return phase[2] if beside.startswith(phase[1] + ".") else f"{phase[1]} ({v[phase[1] + '.name']}).{phase[2]}"


def _text(value):
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _flat(at, value):
    """(dotted name, value) of everything in nested dicts and lists of dicts."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        yield at, value
        return
    for key, inner in items:
        yield from _flat(f"{at}.{key}" if at else str(key), inner)


def _plain(config, letters):
    """Problems that no number mends."""
    model = config.model
    yield from fp8_problems(config)
    yield from _dispatcher(config)
    if config.optimizer.gradients == "bf16" and config.precision.compute == "fp32":
        yield "optimizer.gradients=bf16 with precision.compute=fp32; expected fp32, or bf16 weights to go with it"
    if "E" in letters and model.moe is None:
        yield "model.moe: missing, but model.pattern has E (MoE) blocks; describe the experts or use - (dense)"
    rope = model.attention.rope_dim()
    if rope < 2 or rope % 2:
        yield (
            f"model.attention.rope_fraction={model.attention.rope_fraction} rotates {rope} of "
            f"{model.attention.head_dim} dims; expected an even number of at least 2"
        )
    for number, phase in enumerate(config.phases):
        for name in phase.blend or ():
            source = config.data.sources.get(config.data.source_of(name))
            at = f"phases.{number} ({phase.name}).blend"
            if source is None:
                yield f"{at} names {name!r}; data.sources has: {', '.join(config.data.sources)}"
            elif "/" in name and source.bins is None:
                yield f"{at} names {name!r}, a curriculum bin; data.sources.{name.rpartition('/')[0]} has no bins"
            elif "/" in name and name.rpartition("/")[0] in phase.blend:
                yield f"{at} names {name!r} and all of {name.rpartition('/')[0]!r}; name one of them, or bins only"
    for unit in ("until_raw_tokens", "until_steps"):
        ends = [getattr(phase, unit) for phase in config.phases if getattr(phase, unit)]
        if ends != sorted(set(ends)):
            yield f"phases: {unit} counts from the start of the run and must grow from phase to phase; found {ends}"
    names = [phase.name for phase in config.phases]
    if len(set(names)) < len(names):
        yield f"phases: names must differ; found {names}"


def fp8_problems(config):
    """What else than FP8 a configuration asks for that FP8 does not go with."""
    fp8, kernels = config.precision.fp8, config.kernels
    if fp8 is None:
        return
    at = f"precision.fp8={fp8}"
    if config.precision.compute != "bf16":
        yield f"{at} with precision.compute={config.precision.compute}; expected bf16 around FP8, or no precision.fp8"
    if kernels.linears == "local":
        yield f"{at} with kernels.linears=local; FP8 needs Transformer Engine's; use te or auto, or no precision.fp8"
    if fp8 == "delayed" and kernels.experts == "te":
        yield (
            f"{at} with kernels.experts=te: a checkpoint cannot keep the amax history of single experts; "
            "use kernels.experts=grouped_mm, or precision.fp8=tensorwise"
        )


def _dispatcher(config):
    """DeepEP exchanges between ranks; where every rank has all of every expert there is nothing to exchange."""
    cut = config.parallel
    if cut.dispatcher in ("deepep", "hybridep") and cut.expert * cut.expert_tensor == 1:
        yield (
            f"parallel.dispatcher={cut.dispatcher} with parallel.expert*parallel.expert_tensor=1; "
            "expected more than 1, or parallel.dispatcher=alltoall"
        )
