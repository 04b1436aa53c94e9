"""The table of GPUs: `hardware.yaml` beside this file, and a file of one's own on top of it."""

import difflib
from pathlib import Path
from typing import Literal

import pydantic
import yaml

from boreal_megatron.config.load import merge, read, validate
from boreal_megatron.config.schema import Frozen
from boreal_megatron.errors import BorealError

Rate = pydantic.PositiveFloat


class Table(Frozen):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False)


class Achieved(Table):
    """A rate that is reached in practice, where it comes from, and from whom."""

    value: Rate
    unit: str = ""
    source: Literal["measured", "published", "derived", "assumed"]
    by: str


class Rates(Table):
    """What `plan.work` divides work by."""

    multiprocessors: Achieved
    gemm: Achieved
    gemm_fp8: Achieved
    gemm_start: Achieved
    grouped: Achieved
    attention_forward: Achieved
    attention_backward: Achieved
    flash_qla_forward: Achieved
    flash_qla_backward: Achieved
    fla_forward: Achieved
    fla_backward: Achieved
    hbm: Achieved
    nvlink: Achieved
    dispatch: Achieved
    nic: Achieved
    collective: Achieved


class GPU(Table):
    """One kind of GPU with its links. `hardware.yaml` gives the units; `names` are what CUDA calls it; `factors` are
    what `plan calibrate` multiplies the seconds of a kind of work by."""

    names: tuple[str, ...] = ()
    memory_gib: Rate
    bf16: Rate
    fp8: Rate
    hbm: Rate
    nvlink: Rate
    nic: Rate
    gpus_per_node: pydantic.PositiveInt
    rates: Rates | None = None
    factors: dict[str, Rate] = {}


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
    """A GPU by its key or by the name that CUDA gives it; errors as `key`."""
    return load(path)[key(name, path)]


def key(name, path=None):
    """The key of a GPU, from itself or from the name that CUDA gives it.

    Raises:
        BorealError: for one that the table does not have; it lists those that it has.
    """
    known = load(path)
    for found in known:
        if name.lower() == found or name in known[found].names:
            return found
    near = difflib.get_close_matches(name.lower(), known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise BorealError(f"unknown GPU {name!r}; known: {', '.join(known)}{meant} (--hardware FILE.yaml adds others)")


def with_factors(name, factors, path=None):
    """The text of a file for --hardware: the one at `path`, if any, with these factors for a GPU."""
    own = read(Path(path)) if path else {}
    found = key(name, path)
    own[found] = own.get(found, {}) | {"factors": factors}
    return yaml.safe_dump(own, sort_keys=False)


def of_device(name):
    """The GPU that CUDA calls `name`, or None where the table does not have it (a CPU, another GPU)."""
    return next((found for found in load().values() if name in found.names), None)
