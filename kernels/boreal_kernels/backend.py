"""Which implementation of an operation runs, and why.

A request is a name or "auto". A name is a promise: it runs as named or raises, it never becomes something else. "auto"
takes the first of the operation's implementations that the device and the installed versions allow. A module asks once,
when it is built (`choose`), keeps the name and logs the reason.

    torch       plain torch, anywhere: every operation's definition
    triton      this package's kernels, on CUDA
    fla         flash-linear-attention's chunked kernel
    flash_qla   flash-qla's, through flash-linear-attention
"""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import torch

BACKENDS = {  # operation -> implementations, best first
    "gated_delta_rule": ("triton", "fla", "flash_qla", "torch"),
    "causal_conv1d": ("triton", "torch"),
    "gated_rmsnorm": ("triton", "torch"),
    "multi_hot_cross_entropy": ("triton", "torch"),
    "linear_multi_hot_cross_entropy": ("triton", "torch"),
    "bag_embedding": ("triton", "torch"),
}

HOPPER = (9, 0)


@dataclass(frozen=True)
class KnownBad:
    """An implementation that computes wrong numbers with some version of what it is built with.

    Attributes:
        backend: whose kernels.
        package: "triton", or "ptxas" for the assembler that Triton calls.
        since, before: versions [since, before) are bad.
        capability: on these devices.
        reason: what goes wrong, and where it is reported.
    """

    backend: str
    package: str
    since: tuple[int, ...]
    before: tuple[int, ...]
    capability: tuple[int, int]
    reason: str


KNOWN_BAD = (
    KnownBad(
        "fla", "triton", (3, 4, 0), (3, 7, 1), HOPPER,
        "the gated backward's tl.trans of a matrix product is miscompiled: gradients wrong, outputs right "
        "(flash-linear-attention issues 640, 826, 984)",
    ),
    KnownBad(
        "triton", "ptxas", (0,), (13, 3), HOPPER,
        "registers of an asynchronous matrix product's operand are reused before they are read (Triton pull request 11781)",
    ),
)  # fmt: skip

# Set by `testing`: how kernels treat CPU tensors, None (not at all), "interpret" or "compile" (and not launch).
on_cpu = None


@dataclass(frozen=True)
class Choice:
    """What runs: the implementation's name, and why in one clause."""

    operation: str
    backend: str
    reason: str

    def __str__(self):
        return f"{self.operation}: {self.backend} ({self.reason})"


def choose(operation: str, request: str = "auto", *, device, head_dim: int | None = None) -> Choice:
    """The implementation of `operation` that `request` stands for on `device`.

    Args:
        request: a name from BACKENDS[operation], or "auto".
        device: torch.device or its name.
        head_dim: K = V of the delta rule; the other operations have no such limit.

    Raises:
        ValueError: unknown operation or name, or a named implementation that cannot run there, with the reason.
    """
    if operation not in BACKENDS:
        raise ValueError(f"operation: found {operation!r}, expected one of {', '.join(BACKENDS)}")
    return _choose(operation, request, torch.device(device).type, head_dim)


def resolve(backend: str, operation: str, *, device, head_dim: int | None = None) -> str:
    """`choose` without the reason, for one call of an operation."""
    return choose(operation, backend, device=device, head_dim=head_dim).backend


@cache
def _choose(operation: str, request: str, device: str, head_dim: int | None) -> Choice:
    names = BACKENDS[operation]
    if request != "auto":
        if request not in names:
            raise ValueError(f"{operation}: backend: found {request!r}, expected one of auto, {', '.join(names)}")
        if problem := unfit(operation, request, device, head_dim):
            raise ValueError(f"{operation}: backend {request!r} cannot run here: {problem}; use auto or torch")
        return Choice(operation, request, "asked for")
    if device != "cuda":
        return Choice(operation, "torch", f"{device} device")
    passed_over = []
    for name in names:
        problem = unfit(operation, name, device, head_dim)
        if problem is None:
            return Choice(operation, name, "; ".join(passed_over) or "the first choice on CUDA")
        passed_over.append(f"not {name}: {problem}")
    raise AssertionError("torch runs everywhere")


def unfit(operation: str, name: str, device: str, head_dim: int | None = None) -> str | None:
    """Why an implementation cannot run on a device here, or None."""
    if name == "torch":
        return None
    if device == "cpu" and name == "triton" and on_cpu:
        return None
    if device != "cuda":
        return f"it needs a CUDA device, found {device}"
    if version("triton") is None:
        return "triton is not installed"
    if operation == "gated_delta_rule" and head_dim is not None:
        allowed = {"triton": (64, 128), "flash_qla": (128,), "fla": (64, 128, 256)}[name]
        if head_dim not in allowed:
            return f"head dim {head_dim}, expected one of {', '.join(map(str, allowed))}"
    if name in ("fla", "flash_qla") and version("flash-linear-attention") is None:
        return "flash-linear-attention is not installed"
    if name == "flash_qla" and version("flash-qla") is None:
        return "flash-qla is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}, expected 8.0 or newer"
    if name == "triton":
        use_newest_ptxas()
    problem = known_bad(name, capability)
    if problem is None and name == "triton" and operation == "gated_delta_rule":
        problem = miscomputed()
    return problem


def known_bad(name: str, capability: tuple[int, int]) -> str | None:
    """The first row of KNOWN_BAD that holds here, in words, or None."""
    for row in KNOWN_BAD:
        if row.backend != name or row.capability != capability:
            continue
        found = ptxas_version() if row.package == "ptxas" else version(row.package)
        if found is not None and row.since <= found < row.before:
            text = ".".join(map(str, found))
            mend = f"install {row.package} {'.'.join(map(str, row.before))} or newer"
            if row.package == "ptxas":
                mend = "point TRITON_PTXAS_PATH at a newer one"
            return f"{row.package} {text}: {row.reason}; {mend}"
    return None


@cache
def miscomputed() -> str | None:
    """What the delta rule's kernels get wrong on this device, or None: a small case, computed once a process, in which
    every number is exact."""
    from triton.errors import TritonError

    from boreal_kernels.gated_delta_rule import selftest

    try:
        selftest.run("cuda")
    except (RuntimeError, TritonError) as error:  # wrong numbers, or kernels that do not compile or fit here
        return str(error)
    return None


@cache
def version(package: str) -> tuple[int, ...] | None:
    """(3, 7, 1) of an installed package, without importing it; None if there is none."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = package.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            return None
        text = getattr(__import__(module), "__version__", "0")
    return numbers(text)


def numbers(text: str) -> tuple[int, ...]:
    """(3, 7, 1) of "3.7.1+git"."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


@cache
def ptxas_version() -> tuple[int, ...]:
    """(13, 4) of the assembler that Triton calls for the devices here."""
    from triton import knobs

    return numbers(knobs.nvidia.ptxas.version)


def use_newest_ptxas() -> None:
    """Let Triton assemble with the newest ptxas that came with it.

    Wheels of Triton 3.8 and newer carry two. For Hopper they call the one of CUDA 12.9, which KNOWN_BAD lists; beside it
    lies one of CUDA 13, named after another architecture. Where TRITON_PTXAS_PATH is set, it stays.
    """
    from triton import knobs

    if os.environ.get("TRITON_PTXAS_PATH") or not hasattr(knobs.nvidia, "ptxas_blackwell"):
        return
    newest = max(knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell, key=lambda tool: numbers(tool.version))
    knobs.nvidia.ptxas = newest.path
    ptxas_version.cache_clear()
