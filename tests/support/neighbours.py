"""Refused configurations and the valid neighbours that their problem lines suggest.

A line is `FIELD=value what is wrong; ...; nearest: 1, 2`, in which a phase's field carries the phase's name:
`phases.0 (superposition).sequence=90`.
"""

import re

import yaml
from boreal_megatron.config import schema

SPARSE = "*-GEG-*E / *-"  # 4 card layers
DENSE = "*-G-G- / *-"


def cases():
    """(name, overrides, world): overrides by dotted path of the tests' configuration, one of which is wrong (or world).

    The configuration is `launch.write_config`'s: 3 card layers, 2 key/value and 2 key heads, 4 experts, rows of 2 x 96
    positions, 4 micro-batches a step.
    """
    return [
        ("tensor", {"model.pattern": DENSE, "parallel.tensor": 3}, 2),
        ("tensor with experts", {"parallel.tensor": 3, "parallel.sequence_parallel": True}, 2),
        ("pipeline", {"model.pattern": SPARSE, "parallel.pipeline": 5}, 4),
        ("virtual pipeline", {"model.pattern": SPARSE, "parallel.pipeline": 2, "parallel.virtual_pipeline": 3}, 2),
        ("context by heads", {"parallel.context": 4, "parallel.context_deltanet": "heads"}, 4),
        ("expert", {"parallel.expert": 3}, 2),
        ("expert tensor", {"parallel.expert_tensor": 3}, 2),
        ("sequence", {"phases.0.sequence": 90}, 2),
        ("positions a step", {"phases.0.positions_per_step": 864}, 2),
        ("positions a step, interleaved", {
            "model.pattern": SPARSE, "parallel.pipeline": 2, "parallel.virtual_pipeline": 2,
            "phases.0.positions_per_step": 576,
        }, 2),
        ("world", {"parallel.pipeline": 2}, 3),
    ]  # fmt: skip


def changed(config, overrides):
    """The configuration with other values at dotted paths. `world` is no field and is left out."""
    values = config.model_dump(exclude_none=True)
    values["phases"] = list(values["phases"])
    for path, value in overrides.items():
        here, (*parents, last) = values, path.split(".")
        if path == "world":
            continue
        for part in parents:
            here = here[int(part) if part.isdigit() else part]
        here[last] = value
    return schema.Config.model_validate(values)


def field(line):
    """The dotted path that a line is about."""
    found = re.match(r"(phases\.\d+) \(.*?\)\.(\w+)=|([\w.]+)=", line)
    return found[3] or f"{found[1]}.{found[2]}"


def suggestions(line):
    """The valid values that a line gives for its field: ints, true or false, or lists of ints; empty without any."""
    found = re.search(r"; nearest[^:;]*: ([^;]*)", line)
    return yaml.safe_load(f"[{found[1]}]") if found else []


def alternatives(line):
    """(dotted path, value) of what a line offers instead."""
    return re.findall(r"; or ([\w.]+)=(\w+)", line)
