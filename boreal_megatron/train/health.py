"""Refuse to move the weights on numbers that are not numbers."""

import math

from boreal_megatron.errors import BorealError


def check(step, loss, norm, latest):
    """Raise before the update if the loss or the gradient norm is not finite.

    Args:
        step: the step being made.
        loss: mean main loss of the global batch. norm: global gradient norm.
        latest: folder of the last complete checkpoint, or None.
    """
    bad = [f"{name}={value}" for name, value in (("loss", loss), ("gradient norm", norm)) if not math.isfinite(value)]
    if bad:
        where = f"resume from {latest}" if latest else "there is no checkpoint yet"
        raise BorealError(
            f"step {step}: {', '.join(bad)}; expected finite numbers. The weights were not moved; {where}, with a "
            "lower learning rate or without the step's data"
        )
