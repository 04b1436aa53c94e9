"""What is wrong with a configuration beyond its types: every problem at once, with the nearest valid values.

No torch; answers before any process starts.
"""

from boreal_megatron.config.layout import stages
from boreal_megatron.config.pattern import expand
from boreal_megatron.errors import BorealError, ProblemsError

VOCABULARY_MULTIPLE = 128  # rows that tile tensor cores and every tensor-parallel size


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
    """All problems as lines of text; empty when it can run."""
    try:
        main, mtp = expand(config.model.pattern)
    except BorealError as error:
        return [f"model.pattern: {error}"]
    has_experts = "E" in main + (mtp or "")
    return [
        *_model(config.model, has_experts),
        *_layout(config, len(main) // 2, has_experts, world),
        *_phases(config, world),
    ]


def data_size(config, world):
    """Data-parallel size: what remains of the world."""
    return max(1, world // (config.parallel.tensor * config.parallel.pipeline))


def _model(model, has_experts):
    if has_experts and model.moe is None:
        yield "model.moe: missing, but model.pattern has E (MoE) blocks; describe the experts or use - (dense)"
    if model.moe and model.moe.top_k > model.moe.experts:
        yield f"model.moe.top_k={model.moe.top_k} exceeds model.moe.experts={model.moe.experts}"
    yield from _divides("model.attention.kv_heads", model.attention.kv_heads, "model.attention.heads", model.attention.heads)
    yield from _divides("model.gdn.key_heads", model.gdn.key_heads, "model.gdn.value_heads", model.gdn.value_heads)
    rope = model.attention.rope_dim()
    if rope < 2 or rope % 2:
        yield (
            f"model.attention.rope_fraction={model.attention.rope_fraction} rotates {rope} of "
            f"{model.attention.head_dim} dims; expected an even number of at least 2"
        )
    if model.vocab_size % VOCABULARY_MULTIPLE:
        up = -(-model.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        yield f"model.vocab_size={model.vocab_size} is not a multiple of {VOCABULARY_MULTIPLE}; nearest above: {up}"


def _layout(config, layers, has_experts, world):
    model, cut = config.model, config.parallel
    sizes = {
        "model.attention.kv_heads": model.attention.kv_heads,
        "model.gdn.key_heads": model.gdn.key_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.hidden_size": model.hidden_size,
        "model.vocab_size": model.vocab_size,
    }
    if model.moe:
        sizes["model.moe.shared_hidden_size"] = model.moe.shared_hidden_size
    for name, size in sizes.items():
        yield from _divides("parallel.tensor", cut.tensor, name, size)
    if cut.sequence_parallel and cut.tensor == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor > 1; set it to false"
    if has_experts and cut.tensor > 1 and not cut.sequence_parallel:
        yield "parallel.tensor > 1 with MoE blocks needs parallel.sequence_parallel=true; set it"
    if cut.pipeline > layers or 0 in stages(layers, cut.pipeline):
        yield f"parallel.pipeline={cut.pipeline} exceeds the network's {layers} layers; at most {layers}"
    if cut.expert > 1 and model.moe is None:
        yield f"parallel.expert={cut.expert} but the network has no experts; set it to 1"
    if model.moe:
        yield from _divides("parallel.expert", cut.expert, "model.moe.experts", model.moe.experts)
    if world is None:
        return
    model_parallel = cut.tensor * cut.pipeline
    if world % model_parallel:
        yield (
            f"world={world} processes is not a multiple of parallel.tensor*parallel.pipeline={model_parallel}; "
            f"nearest: {_nearest_multiples(world, model_parallel)}"
        )
    elif (world // cut.pipeline) % cut.expert:
        yield (
            f"parallel.expert={cut.expert} does not divide world/parallel.pipeline={world // cut.pipeline}; "
            f"nearest: {_divisors(world // cut.pipeline, cut.expert)}"
        )


def _phases(config, world):
    model, cut = config.model, config.parallel
    rows = config.micro_batch * (data_size(config, world) if world else 1)
    for number, phase in enumerate(config.phases):
        where = f"phases.{number} ({phase.name})"
        yield from _divides(f"{where}.sequence", phase.sequence, f"{where}.positions_per_step", phase.positions_per_step)
        if phase.windows_per_step() % rows:
            unit = phase.sequence * rows
            yield (
                f"{where}.positions_per_step={phase.positions_per_step} is {phase.windows_per_step()} windows of "
                f"{phase.sequence}, not a multiple of micro_batch x data parallel = {rows}; "
                f"nearest: {_nearest_multiples(phase.positions_per_step, unit)}"
            )
        if cut.sequence_parallel and (phase.sequence * config.micro_batch) % cut.tensor:
            yield f"{where}.sequence*micro_batch={phase.sequence * config.micro_batch} is not a multiple of parallel.tensor={cut.tensor}"
        if phase.sequence > model.max_positions:
            yield f"{where}.sequence={phase.sequence} exceeds model.max_positions={model.max_positions}"
        for name in phase.blend or ():
            if name not in config.data.sources:
                yield f"{where}.blend names {name!r}; data.sources has: {', '.join(config.data.sources)}"
    for unit in ("until_raw_tokens", "until_steps"):
        ends = [getattr(phase, unit) for phase in config.phases if getattr(phase, unit)]
        if ends != sorted(set(ends)):
            yield f"phases: {unit} counts from the start of the run and must grow from phase to phase; found {ends}"
    names = [phase.name for phase in config.phases]
    if len(set(names)) < len(names):
        yield f"phases: names must differ; found {names}"


def _divides(name, value, whole_name, whole):
    if whole % value:
        yield f"{name}={value} does not divide {whole_name}={whole}; nearest: {_divisors(whole, value)}"


def _divisors(whole, near, count=3):
    """The divisors of `whole` nearest to `near`, ascending."""
    every = [d for d in range(1, whole + 1) if whole % d == 0]
    return ", ".join(map(str, sorted(sorted(every, key=lambda d: abs(d - near))[:count])))


def _nearest_multiples(value, unit):
    below, above = value // unit * unit, -(-value // unit) * unit
    return ", ".join(str(n) for n in sorted({below, above}) if n)
