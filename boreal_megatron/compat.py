"""Every change to a megatron-core function, in one place.

Each entry says why, for which versions and where upstream; `tests/unit/test_compat.py` fails once an entry is no
longer needed. Order of preference before an entry is added here: a config field, a slot, a subclass.
"""

from importlib.metadata import version

MEGATRON_CORE = ("0.19.2", "0.20")  # tested from, up to but not including


def check_versions():
    """Refuse a megatron-core that these entries were not written for."""
    from packaging.version import Version

    from boreal_megatron.errors import BorealError

    found = Version(version("megatron-core"))
    low, high = MEGATRON_CORE
    if not Version(low) <= found < Version(high):
        raise BorealError(
            f"megatron-core {found} is installed, expected >={low},<{high}; run: pip install 'megatron-core=={low}'"
        )


def apply():
    """Install every entry. Idempotent."""
    check_versions()
    _distributed_optimizer_step()


def _distributed_optimizer_step():
    """Resuming the distributed optimizer with torch's AdamW.

    Why: the checkpoint keeps `step` in the parameter group, so `_set_main_param_and_optimizer_states` raises KeyError
    for torch AdamW, whose state holds a `step` tensor (TE's and apex's FusedAdam have none). None is skipped there.
    Versions: 0.19.2. Upstream: optimizer/distrib_optimizer.py, `_set_main_param_and_optimizer_states`.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "boreal", False):
        return

    def set_states(self, model_param, tensors):
        return original(self, model_param, {"step": None, **tensors})

    set_states.boreal = True
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
