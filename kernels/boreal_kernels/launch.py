"""How a kernel is launched: tile sizes, warps and stages, read from `launch.json` and never searched at run time.

A search at run time may end differently on two ranks, and another tile size is another order of summation: the same
model would compute different bits on different machines. `kernels/bench/tune.py` measures and rewrites the table.
"""

import json
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("launch.json")


def config(kernel: str, **shape: int) -> dict:
    """The recorded launch configuration of a kernel for this device, e.g. {"ROWS": 8, "num_warps": 4}.

    The table maps device name -> kernel -> entries {"when": {..}, "use": {..}}. The first entry counts whose `when` agrees
    with `shape`, of this device where it has one, else of "default".

    Raises:
        KeyError: the table has no entry for that kernel and shape.
    """
    return dict(_config(kernel, device_name(), tuple(sorted(shape.items()))))


@cache
def _config(kernel: str, device: str, shape: tuple) -> dict:
    table, facts = read(), dict(shape)
    for name in (device, "default"):
        for entry in table.get(name, {}).get(kernel, ()):
            if all(facts.get(key) == value for key, value in entry["when"].items()):
                return entry["use"]
    raise KeyError(f"{TABLE.name} has no entry for {kernel} with {facts} on {device!r} or by default")


@cache
def read() -> dict:
    """The whole table."""
    return json.loads(TABLE.read_text())


@cache
def device_name() -> str:
    """What the table calls this device: torch's name of it, e.g. "NVIDIA H200"; "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
