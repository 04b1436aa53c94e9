"""The table of GPUs: `hardware.yaml` beside this file, and a file of one's own on top of it."""

import difflib
from pathlib import Path

import pydantic

from boreal_megatron.config.load import merge, read, validate
from boreal_megatron.config.schema import Frozen
from boreal_megatron.errors import BorealError

Rate = pydantic.PositiveFloat


class GPU(Frozen):
    """One kind of GPU with its links. `hardware.yaml` gives the units; `names` are what CUDA calls it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False)

    names: tuple[str, ...] = ()
    memory_gib: Rate
    bf16: Rate
    fp8: Rate
    hbm: Rate
    nvlink: Rate
    nic: Rate
    gpus_per_node: pydantic.PositiveInt


def load(path=None):
    """{key: GPU} of the table.

    Args:
        path: a YAML file whose entries are added, or merged into those of the same key.
    """
    entries = read(Path(__file__).with_name("hardware.yaml"))
    if path:
        entries = merge(entries, read(Path(path)))
    return {key: validate(GPU, values, f"GPU {key}") for key, values in entries.items()}


def gpu(name, path=None):
    """A GPU by its key or by the name that CUDA gives it.

    Raises:
        BorealError: for one that the table does not have; it lists those that it has.
    """
    known = load(path)
    by_name = {**known, **{n: found for found in known.values() for n in found.names}}
    if name in by_name or name.lower() in by_name:
        return by_name.get(name) or by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise BorealError(f"unknown GPU {name!r}; known: {', '.join(known)}{meant} (--hardware FILE.yaml adds others)")


def of_device(name):
    """The GPU that CUDA calls `name`, or None where the table does not have it (a CPU, another GPU)."""
    return next((found for found in load().values() if name in found.names), None)
