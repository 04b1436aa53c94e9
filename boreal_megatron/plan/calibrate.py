"""What a run's own metrics say of the predicted step time: a factor for each kind of work, and the error that is left.

A factor is the median over steps of measured over predicted seconds. Steps that carry `kind_seconds` give one for each
kind; what they spent waiting for data and for nothing is `idle`, a share of the rest. A run without them gives one
factor for all kinds. The last quarter of every phase's steps is held out: no factor sees it, and the errors are its.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import yaml

from boreal_megatron.config import load
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.plan import time

WARM_UP = 5  # steps of each phase, and after each start: compilation, first allocations
FEWEST = 20  # steps after that
FEWEST_BY_KIND = 8  # of them with kind_seconds
HELD_OUT = 4  # the last one of so many parts
WORK = tuple(kind for kind in time.KINDS if kind != "idle")


def calibrate(folder, gpu):
    """Fit factors to a run.

    Args:
        folder: a run's checkpoint folder, with metrics.jsonl and at least one checkpoint.
        gpu: `hardware.GPU` that it ran on, with its own factors left out.

    Returns:
        dict: `factors` {kind: of its predicted seconds; idle: share of the rest}, `fitted` and `held_out` (steps),
        `by_kind` (whether the run told kinds apart), `before` and `after` (mean absolute error of a held-out step,
        relative), `predicted` and `measured` (mean seconds of a held-out step).

    Raises:
        BorealError: no checkpoint, no metrics, or too few steps.
    """
    config, world = _run(Path(folder))
    steps = _steps(Path(folder), config)
    plain = gpu.model_copy(update={"factors": {}})
    fit, held_out = [], []
    for of_phase in steps.values():
        end = len(of_phase) - len(of_phase) // HELD_OUT
        fit, held_out = fit + of_phase[:end], held_out + of_phase[end:]
    if len(fit) + len(held_out) < FEWEST:
        raise BorealError(
            f"{folder}: {len(fit) + len(held_out)} steps after the first {WARM_UP} of each phase, expected {FEWEST} or more; "
            "let the run go on"
        )
    predicted = _predict(config, world, plain)
    factors, by_kind = _factors(fit, predicted)
    fitted = _predict(config, world, plain.model_copy(update={"factors": factors}))
    return {
        "factors": factors,
        "by_kind": by_kind,
        "fitted": len(fit),
        "held_out": len(held_out),
        "before": _error(held_out, predicted),
        "after": _error(held_out, fitted),
        "predicted": mean(fitted[step["phase"]].seconds for step in held_out),
        "measured": mean(step["seconds"] for step in held_out),
    }


def _run(folder):
    """(Config, world) of the newest checkpoint."""
    found = sorted(folder.glob("iter_*/run_config.yaml"))
    if not found:
        raise BorealError(f"{folder} has no checkpoint with run_config.yaml; expected the run's checkpoint.folder")
    try:
        record = json.loads(found[-1].with_name("train_state.json").read_text())
        values = yaml.safe_load(found[-1].read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BorealError(f"{found[-1].parent} is not a complete checkpoint: {error}") from None
    if not record.get("layout"):
        raise BorealError(f"{found[-1].parent} was not written by a training run; expected a run's checkpoint.folder")
    return load.parse(values, str(found[-1])), record["layout"]["world"]


def _steps(folder, config):
    """{phase: its training records after the warm-up, in order}."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise BorealError(f"{path} does not exist; expected the metrics that `boreal train` writes")
    names = {phase.name for phase in config.phases}
    found, problems = defaultdict(list), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                if record["phase"] not in names or not record["seconds"] > 0:
                    raise ValueError(f"phase {record['phase']!r} of {record['seconds']} seconds")
                found[record["phase"]].append(record)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number}: {type(error).__name__}: {error}")
    if problems:
        raise ProblemsError(str(path), problems)
    return {phase: records[WARM_UP:] for phase, records in found.items()}


def _predict(config, world, gpu):
    """{phase name: Estimate}."""
    return {phase.name: time.step(config, phase, world, gpu) for phase in config.phases}


def _factors(steps, predicted):
    """({kind: factor}, whether kinds were told apart)."""
    told = [step for step in steps if step.get("kind_seconds")]
    if len(told) < FEWEST_BY_KIND:
        whole = median(step["seconds"] / predicted[step["phase"]].seconds for step in steps)
        return dict.fromkeys(WORK, whole), False
    ratios, waits = defaultdict(list), []
    for step in told:
        kinds, mine = step["kind_seconds"], predicted[step["phase"]].kinds()
        for kind in WORK:
            if mine.get(kind, 0) > 0 and kinds.get(kind, 0) > 0:
                ratios[kind].append(kinds[kind] / mine[kind])
        work = sum(kinds.get(kind, 0) for kind in WORK)
        waits.append((step["seconds"] - work) / work)
    factors = {kind: median(found) for kind, found in ratios.items()}
    if (idle := median(waits)) > 0:
        factors["idle"] = idle
    return factors, True


def _error(steps, predicted):
    """Mean over steps of |predicted - measured| / measured."""
    return mean(abs(predicted[step["phase"]].seconds / step["seconds"] - 1) for step in steps)


def table(found):
    """For people."""
    how = "kinds told apart by kind_seconds" if found["by_kind"] else "no kind_seconds: one factor for all kinds"
    lines = [f"{found['fitted']} steps fitted, the last {found['held_out']} held out; {how}", ""]
    for kind, factor in found["factors"].items():
        what = "of the rest" if kind == "idle" else "x predicted"
        lines.append(f"{kind:<16}{factor:>8.3f} {what}")
    return "\n".join(
        [
            *lines,
            "",
            f"error of a held-out step: {found['before']:.1%} before, {found['after']:.1%} after "
            f"({found['measured']:.3f} s measured, {found['predicted']:.3f} s predicted after)",
        ]
    )


EXPLAIN = """\
factor   median over the fitted steps of measured / predicted seconds, for each kind of work; idle: of the rest
steps    the first five of each phase and those after it started are left out, the last quarter of each phase is held out
use      --out FILE writes the factors for this GPU; `boreal plan layouts --hardware FILE` multiplies them in"""
