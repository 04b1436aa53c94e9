"""What `boreal plan layouts` says: the ranking, the run it makes for, why the first is before the second."""

from boreal_megatron.config import phases
from boreal_megatron.plan import layouts, memory, time

DAY = 86_400
RELIABILITY = ("measured", "published", "derived", "assumed")  # a term is as good as the worst rate it uses
NAMES = {
    "tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP", "expert_tensor": "ETP"
}  # fmt: skip


def report(found, counted, world, gpu, bag):
    """The answer for programs.

    Args:
        found: `layouts.Found`. counted: the phases that it is about. bag: raw tokens of a position
            in superposition, to compare with; None: no comparison.

    Returns:
        dict: `precision`, `layouts` (fastest first: fields, step times and terms of each phase, memory),
        `other_precisions` (the fastest layout of each), `run` (days and GPU-hours), `rejected`, `not_tried`, `slower`,
        `assumed` (the rates that nobody has measured or published).
    """
    return {
        "gpus": world,
        "precision": str(found.best[0].config.precision),
        "layouts": [_layout(candidate, counted) for candidate in found.best],
        "other_precisions": [
            {"precision": str(candidate.config.precision), **_layout(candidate, counted)} for candidate in found.others
        ],
        "run": run(found.best[0], counted, world, bag),
        "rejected": [vars(reason) for reason in found.rejected],
        "not_tried": layouts.NOT_TRIED,
        "slower": found.slower,
        "assumed": [name for name, rate in gpu.rates if rate.source == "assumed"],
        "factors": gpu.factors,
    }


def _layout(candidate, counted):
    steps = []
    for phase, found in zip(counted, candidate.estimates, strict=True):
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


def run(candidate, counted, world, bag):
    """Days and GPU-hours of the phases as they are, and with half of their raw tokens in bags."""
    spans = [span for span in phases.spans(candidate.config.phases) if span.phase in counted]
    raw_tokens = sum(span.end_raw_token - span.first_raw_token for span in spans)
    found = {"raw_tokens": raw_tokens, **_cost(candidate.seconds, world)}
    if bag:
        found["superposition"] = {"bag_size": bag, **_cost(candidate.seconds * (1 + 1 / bag) / 2, world)}
    return found


def _cost(seconds, world):
    return {"days": seconds / DAY, "gpu_hours": seconds * world / 3600}


def table(answer):
    """The ranking for people."""
    steps = answer["layouts"][0]["steps"]
    shapes = {(step["sequence"], step["positions_per_step"]): number for number, step in enumerate(steps)}
    widths = f"{'layout':<44}{'micro':>6} {'recompute':<10}{'GiB':>6}"
    lines = []
    for (sequence, positions), number in shapes.items():
        step = steps[number]
        lines.append(
            f"windows of {sequence:,}, {positions:,} positions a step, {answer['gpus']} GPUs, {answer['precision']}"
        )
        lines.append(f"{widths}{'s/step':>9}{'pos/s/GPU':>11}{'TFLOP/s':>9}{'MFU':>7}")
        lines += [_line(row, number, answer["gpus"]) for row in answer["layouts"]]
        for row in answer["other_precisions"]:
            gain = step["seconds"] / row["steps"][number]["seconds"]
            lines += [f"with precision {row['precision']}, {gain:.2f} times the first's rate", _line(row, number, answer["gpus"])]
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


def _line(row, number, world):
    step = row["steps"][number]
    return (
        f"{_words(row['parallel'], world):<44}{row['micro_batch']:>6} {row['recompute']:<10}"
        f"{row['memory_gib']:>6.1f}{step['seconds']:>9.3f}{step['positions_per_second_per_gpu']:>11,.0f}"
        f"{step['teraflops']:>9.0f}{step['mfu']:>7.1%}"
    )


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
        lines.append(f"{step['phase']}: milliseconds of a step, the first and the second layout")
        for name in sorted({*mine, *other}, key=lambda n: -mine.get(n, 0)):
            how, rates = time.FORMULAS[name]
            sources = [getattr(gpu.rates, rate).source for rate in rates.split()]
            worst = max(sources, key=RELIABILITY.index, default="exact")
            a, b = (1000 * found.get(name, 0) for found in (mine, other))
            lines.append(f"  {name:<24}{a:>9.1f}{b:>9.1f}  {how} [{worst}]")
        if other:
            gain = {name: other.get(name, 0) - mine.get(name, 0) for name in {*mine, *other}}
            order = sorted(gain, key=gain.get)
            wins, losses = [n for n in order[::-1] if gain[n] > 0][:2], [n for n in order if gain[n] < 0][:2]
            lines.append(f"  the first wins most by {_list(wins)}, and loses most by {_list(losses)}")
        lines.append("")
    lines += ["not tried"] + [f"  {what}: {why}" for what, why in answer["not_tried"].items()]
    lines += ["", f"not modelled: {time.NOT_MODELLED}", "", "rates"]
    for name, rate in gpu.rates:
        lines.append(f"  {name:<20}{rate.value:>8g} {rate.unit} [{rate.source}: {rate.by}]")
    return "\n".join(lines)


def _list(names):
    return " and ".join(names) or "nothing"


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
        f"# Predicted, not measured: {step['positions_per_second_per_gpu']:,.0f} positions a second and GPU, "
        f"{step['mfu']:.1%} MFU (windows of {step['sequence']:,}), {first['memory_gib']:.1f} GiB.\n"
        f"parallel: {{{cut}}}\nmicro_batch: {first['micro_batch']}\nrecompute: {first['recompute']}\n"
    )
