"""What this rank runs on: versions, the configuration as it was read here, environment, memory, clock."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from boreal_megatron import doctor, parallel, platform
from boreal_megatron.preflight.finding import SAME, Finding

FREE = 0.9  # of the device's memory before anything is allocated; more is another process's
BARRIERS = 5


def versions(here):
    """Every installed component, the driver and the kernel: the same on all ranks."""
    found = {row["name"]: row["found"] for row in doctor.examine() if row["found"]}
    found["linux"] = os.uname().release
    if name := platform.current().device_name():
        found |= {"device": name, "driver": driver()}
    return [Finding(name, True, value=version, expected=SAME) for name, version in found.items()]


def driver():
    """The version of NVIDIA's kernel module, "unknown" where a container hides it."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            return next((word for word in file.readline().split() if word[:1].isdigit()), "unknown")
    except OSError:
        return "unknown"


def components(here):
    """What `boreal doctor` knows to be wrong."""
    rows = doctor.examine()
    found = []
    for r in rows:
        if r["state"] in doctor.FAILURES:
            # A wrong version of what training can do without is no reason not to train.
            wrong = r["state"] == doctor.BAD or r["instead"] == "nothing"
            measured = f"{r['found']}: {r['state']}"
            found.append(Finding(r["name"], False if wrong else None, measured, r["needed"] or "another", r["advice"]))
    return found or [Finding("known bad versions", True, "none", "none")]


def configuration(here):
    """The resolved configuration: hosts may see other files under one name."""
    text = json.dumps(here.config.model_dump(mode="json"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return [Finding("resolved configuration", True, value=digest, expected=SAME)]


@dataclass(frozen=True)
class Variable:
    """Attributes: name; advised(config, device type): a value, or None where it does not matter; why."""

    name: str
    advised: Callable
    why: str


def _connections(config, device):
    cut = config.parallel
    ordered = device == "cuda" and (cut.tensor > 1 or cut.context > 1) and doctor.capability() < (10, 0)
    return "1" if ordered else None


def _on_cuda(value):
    return lambda config, device: value if device == "cuda" else None


# What `boreal preflight` explains and nothing sets. A value that differs from the advised one is a note, not a failure.
VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS", _connections,
        "1 starts kernels in the order of their launch, so that tensor- and context-parallel communication begins "
        "before the matrix product that hides it; Blackwell does not need it",
    ),
    Variable("PYTORCH_ALLOC_CONF", _on_cuda("expandable_segments:True"), "phases of other shapes fragment no memory"),
    Variable("NCCL_DEBUG", _on_cuda("WARN"), "NCCL says what it thinks is wrong"),
    Variable("TORCH_FR_BUFFER_SIZE", _on_cuda("20000"), "collectives that each rank remembers for a post-mortem"),
    Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", _on_cuda("1"), "writes them to files when a collective times out"),
    Variable(
        "OMP_NUM_THREADS", lambda config, device: str(max(1, (os.cpu_count() or 1) // local_world())),
        "CPU threads of a process: the host's cores over its processes; unset, every process takes all of them",
    ),
)  # fmt: skip


def environment(here):
    """Variables that change speed or what is known after a failure."""
    found = []
    for variable in VARIABLES:
        advised = variable.advised(here.config, here.mesh.device.type)
        if advised is None:
            continue
        value = os.environ.get(variable.name)
        same = value == advised
        found.append(
            Finding(variable.name, True if same else None, value or "unset", advised, "" if same else variable.why)
        )
    hazard = parallel.restart_hazard()
    return [*found, Finding("restarts", not hazard, hazard or "can find each other", "no hazard")]


def local_world():
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory(here):
    """Free memory, before this run takes any."""
    if device := platform.current().memory():
        free, total = device
        share, ok = free / total, free >= FREE * total
        return [
            Finding(
                "free device memory", ok, value=free / 2**30, unit="GiB",
                expected=f">= {FREE:.0%} of {total / 2**30:.4g} GiB",
                advice="" if ok else f"{1 - share:.0%} is taken: nvidia-smi names the processes that hold it",
            )
        ]  # fmt: skip
    return [Finding("free host memory", None, value=psutil.virtual_memory().available / 2**30, unit="GiB")]


def clock(here):
    """The time at which this rank left each of some barriers, which all leave at about once."""
    times = []
    for _ in range(BARRIERS):
        dist.barrier()
        times.append(time.time())
    return [Finding("clock", None, value=times)]
