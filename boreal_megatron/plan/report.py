"""What `boreal plan layouts` says: the ranking, the run it makes for, why the first is before the second."""

from boreal_megatron.config import phases
from boreal_megatron.plan import layouts, memory, time

DAY = 86_400
RELIABILITY = ("measured", "published", "derived", "assumed")  # a term is as good as the worst rate it uses
NAMES = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP", "expert_tensor": "ETP"}  # fmt: skip


def report(found, config, world, gpu, bag):
    """The answer for programs.

    Args:
        found: `layouts.Found`. config: the Config that was asked about. bag: raw tokens of a position in superposition.

    Returns:
        dict: `layouts` (fastest first: fields, step times and terms of each phase, memory), `run` (days and GPU-hours),
        `rejected`, `not_tried`, `slower`, `assumed` (the rates that nobody has measured or published).
    """
    return {
        "gpus": world,
        "layouts": [_layout(candidate) for candidate in found.best],
        "run": run(found.best[0], world, bag),
        "rejected": [vars(reason) for reason in found.rejected],
        "not_tried": layouts.NOT_TRIED,
        "slower": found.slower,
        "assumed": [name for name, rate in gpu.rates if rate.source == "assumed"],
        "factors": gpu.factors,
    }


def _layout(candidate):
    steps = []
    for phase, found in zip(candidate.config.phases, candidate.estimates, strict=True):
        steps.append(
            {
                "phase": phase.name,
                "sequence": phase.sequence,
                "positions_per_step": phase.positions_per_step,
                "seconds": found.seconds,
                "positions_per_second_per_gpu": found.rate(),
                "teraflops": found.teraflops(),
                "mfu": found.mfu(),
                "terms": [term._asdict() for term in found.terms],
            }
        )
    return {**layouts.fields(candidate.config), "memory_gib": candidate.bytes / memory.GIB, "steps": steps}


def run(candidate, world, bag):
    """Days and GPU-hours of the phases as they are and, of a run without bags, with half of its raw tokens in bags."""
    spans = phases.spans(candidate.config.phases)
    found = {"raw_tokens": spans[-1].end_raw_token, **_cost(candidate.seconds, world)}
    if all(span.phase.bag_size == 1 for span in spans):
        found["superposition"] = {"bag_size": bag, **_cost(candidate.seconds * (1 + 1 / bag) / 2, world)}
    return found


def _cost(seconds, world):
    return {"days": seconds / DAY, "gpu_hours": seconds * world / 3600}


def table(answer, config):
    """The ranking for people."""
    shapes = {(phase.sequence, phase.positions_per_step): number for number, phase in enumerate(config.phases)}
    widths = f"{'layout':<44}{'micro':>6} {'recompute':<10}{'GiB':>6}"
    lines = []
    for (sequence, positions), number in shapes.items():
        lines.append(f"windows of {sequence:,}, {positions:,} positions a step, {answer['gpus']} GPUs")
        lines.append(f"{widths}{'s/step':>9}{'pos/s/GPU':>11}{'TFLOP/s':>9}{'MFU':>7}")
        for row in answer["layouts"]:
            step = row["steps"][number]
            lines.append(
                f"{_words(row['parallel'], answer['gpus']):<44}{row['micro_batch']:>6} {row['recompute']:<10}"
                f"{row['memory_gib']:>6.1f}{step['seconds']:>9.3f}{step['positions_per_second_per_gpu']:>11,.0f}"
                f"{step['teraflops']:>9.0f}{step['mfu']:>7.1%}"
            )
        lines.append("")
    made = answer["run"]
    lines.append(f"{made['raw_tokens']:,} raw tokens with the first: {_days(made)}")
    if bags := made.get("superposition"):
        lines.append(f"the same, half of them in bags of {bags['bag_size']}: {_days(bags)}")
    lines += ["", "left out"]
    lines += [f"{reason['layouts']:>7}  {reason['text']}" for reason in answer["rejected"]]
    lines.append(f"{answer['slower']:>7}  slower than these; memory not looked at")
    kind = f"calibrated ({', '.join(answer['factors'])})" if answer["factors"] else "not calibrated on a run"
    lines += ["", f"Predicted, {kind}; assumed rates: {', '.join(answer['assumed'])}."]
    return "\n".join(lines)


def _words(parallel, world):
    """For example `TP2 PP4 VPP2 EP16 DP64`; sizes of 1 are not said."""
    sizes = [f"{name}{parallel[field]}" for field, name in NAMES.items() if parallel[field] > 1]
    data = world // (parallel["tensor"] * parallel["pipeline"] * parallel["context"])
    by_heads = ["GDN by heads"] if parallel["context"] > 1 and parallel["context_deltanet"] == "heads" else []
    return " ".join([*sizes, f"DP{data}", *by_heads])


def _days(cost):
    return f"{cost['days']:,.1f} days, {cost['gpu_hours']:,.0f} GPU-hours, without failures"


def explanation(answer, gpu):
    """Each term of the fastest layout's step, beside the next one's, with its formula and where its rates come from."""
    first, *others = answer["layouts"]
    lines = []
    for number, step in enumerate(first["steps"]):
        mine = _by_name(step)
        other = _by_name(others[0]["steps"][number]) if others else {}
        lines.append(f"milliseconds of a step, windows of {step['sequence']:,}: the first, the second, how")
        for name in sorted({*mine, *other}, key=lambda n: -mine.get(n, 0)):
            how, rates = time.FORMULAS[name]
            sources = [getattr(gpu.rates, rate).source for rate in rates.split()]
            worst = max(sources, key=RELIABILITY.index, default="exact")
            a, b = (1000 * found.get(name, 0) for found in (mine, other))
            lines.append(f"  {name:<24}{a:>9.1f}{b:>9.1f}  {how} [{worst}]")
        lines.append("")
        if other:
            gains = sorted(mine, key=lambda n: mine[n] - other.get(n, 0))
            losses = [n for n in reversed(gains) if mine[n] > other.get(n, 0)][:2]
            wins = [n for n in sorted({*mine, *other}, key=lambda n: mine.get(n, 0) - other.get(n, 0)) if mine.get(n, 0) < other.get(n, 0)][:2]  # fmt: skip
            lines.append(
                f"the first gains most in {' and '.join(wins) or 'nothing'}; it loses in {' and '.join(losses) or 'nothing'}"
            )
    lines += ["not tried"] + [f"  {what}: {why}" for what, why in answer["not_tried"].items()]
    lines += ["", f"not modelled: {time.NOT_MODELLED}", "", "rates"]
    for name, rate in gpu.rates:
        lines.append(f"  {name:<20}{rate.value:>8g} {rate.unit} [{rate.source}: {rate.by}]")
    return "\n".join(lines)


def _by_name(step):
    found = {}
    for term in step["terms"]:
        found[term["name"]] = found.get(term["name"], 0) + term["seconds"]
    return found


def overlay(answer, command):
    """The fastest layout as a configuration file to put over another."""
    first = answer["layouts"][0]
    step = first["steps"][0]
    cut = ", ".join(f"{key}: {str(value).lower()}" for key, value in first["parallel"].items())
    return (
        f"# {command}\n"
        f"# Predicted, not measured: {step['positions_per_second_per_gpu']:,.0f} positions a second and GPU at windows of "
        f"{step['sequence']:,}, {step['mfu']:.1%} MFU, {first['memory_gib']:.1f} GiB.\n"
        f"parallel: {{{cut}}}\nmicro_batch: {first['micro_batch']}\nrecompute: {first['recompute']}\n"
    )
