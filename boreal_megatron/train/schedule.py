"""The learning rate of a step: a pure function of the plan, the step and the raw tokens."""

import math

from boreal_megatron.config import phases


def learning_rate(config, now, entered):
    """Learning rate of the next update.

    The run's schedule spans, as one curve, all phases that have no piece of their own; warm-up counts steps.

    Args:
        config: `config.schema.Config`.
        now: (updates made, raw tokens consumed) so far.
        entered: the same when the present phase began; a phase that took longer than planned moves no later curve.
    """
    step, raw_tokens = now
    plan = phases.spans(config.phases)
    index = phases.at(config.phases, step, raw_tokens)
    index = len(plan) - 1 if index is None else index
    piece = plan[index].phase.learning_rate
    progress = plan[index].progress(now, entered)
    if piece is not None:
        return piece.end + (piece.start - piece.end) * _shape(piece.shape, progress, decay_fraction=1.0)
    schedule = config.schedule
    warm = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    shared = [span for span in plan if span.phase.learning_rate is None]
    before = sum(span.steps for span in plan[:index] if span.phase.learning_rate is None)
    total = sum(span.steps for span in shared)
    position = before + progress * plan[index].steps
    x = (position - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    factor = _shape(schedule.shape, min(1.0, max(0.0, x)), schedule.decay_fraction)
    floor = 1.0 if schedule.shape == "constant" else schedule.final_fraction
    return schedule.peak * warm * (floor + (1.0 - floor) * factor)


def _shape(shape, x, decay_fraction):
    """From 1 at x = 0 to 0 at x = 1 (`constant` stays at 1)."""
    if shape == "constant":
        return 1.0
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * x))
    if shape == "wsd":
        return min(1.0, (1.0 - x) / max(decay_fraction, 1e-9))
    return 1.0 - x
