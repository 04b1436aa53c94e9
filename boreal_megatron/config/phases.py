"""Where a run is among its phases: pure functions of (steps taken, raw tokens consumed)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A phase as planned, with full bags: steps and raw tokens at its two ends. A run whose bags are padded reads a
    little less per step and so takes a few steps more."""

    phase: object
    first_step: int
    end_step: int
    first_raw_token: int
    end_raw_token: int

    @property
    def steps(self):
        return self.end_step - self.first_step

    def progress(self, now, entered):
        """Share of the phase that is done, in its own unit, 0 to 1.

        Args:
            now, entered: (steps, raw tokens), at present and when the phase really began.
        """
        unit, end = (0, self.phase.until_steps) if self.phase.until_steps else (1, self.phase.until_raw_tokens)
        return min(1.0, (now[unit] - entered[unit]) / max(1, end - entered[unit]))


def spans(phases):
    """The plan of a run, shown before it starts and used by the learning rate."""
    out, step, raw = [], 0, 0
    for phase in phases:
        per_step = phase.raw_tokens_per_step()
        if phase.until_steps is not None:
            steps = max(0, phase.until_steps - step)
        else:
            steps = max(0, -(-(phase.until_raw_tokens - raw) // per_step))
        out.append(Span(phase, step, step + steps, raw, raw + steps * per_step))
        step, raw = out[-1].end_step, out[-1].end_raw_token
    return out


def at(phases, step, raw_tokens):
    """Index of the phase that the next step belongs to; None when the run is over."""
    for index, phase in enumerate(phases):
        if phase.until_steps is not None and step < phase.until_steps:
            return index
        if phase.until_raw_tokens is not None and raw_tokens < phase.until_raw_tokens:
            return index
    return None
