"""One device on its own: the rate of matrix products and copies, and whether the same product has the same bits."""

import time

import torch

from boreal_megatron import platform
from boreal_megatron.preflight.finding import Finding

# Shares of the data sheet's figure (`plan/hardware.yaml`) from which on a rate passes. Good devices reach about 0.7 of
# the matrix peak and 0.9 of the memory's in public measurements; ours on a GPU: not measured.
FRACTIONS = {"matrix product": 0.55, "memory copy": 0.75}
SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
COPIED = {"cuda": 1 << 30, "cpu": 32 << 20}  # bytes
SAMPLES, CALLS, AGAIN = 5, 4, 20


def rates(here):
    """TFLOP/s of a bf16 product (FP32 on a CPU), GB/s read and written by a copy."""
    device = here.mesh.device
    side, moved = SIDE[device.type], COPIED[device.type]
    a, b = (matrix(side, device, seed) for seed in (1, 2))
    product = 2 * side**3 / seconds(lambda: a @ b) / 1e12
    source = torch.zeros(moved, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * moved / seconds(lambda: target.copy_(source)) / 1e9
    gpu = here.gpu
    return [
        held("matrix product", product, "TFLOP/s", gpu and gpu.bf16, FRACTIONS),
        held("memory copy", copy, "GB/s", gpu and gpu.hbm, FRACTIONS),
    ]


def held(name, rate, unit, peak, fractions):
    """A rate beside what is expected of this device; a note where the table of GPUs does not have it."""
    if not peak:
        return Finding(name, None, value=rate, unit=unit)
    least = fractions[name.split(" over ")[0]] * peak
    ok = rate >= least
    advice = "" if ok else "hot, capped or shared: nvidia-smi -q -d CLOCK,POWER,PERFORMANCE"
    return Finding(name, ok, value=rate, unit=unit, expected=f">= {least:.3g} of {peak:g} {unit}", advice=advice)


def repeats(here):
    """The same product many times: a device that computes other bits at times is broken."""
    device = here.mesh.device
    a, b = (matrix(SIDE[device.type], device, seed) for seed in (3, 4))
    first = a @ b
    other = sum(not torch.equal(first, a @ b) for _ in range(AGAIN))
    return [
        Finding(
            "matrix product", not other, f"{other} of {AGAIN} differ", "the same bits every time",
            "" if not other else "take this device out of service",
        )
    ]  # fmt: skip


def matrix(side, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPE[device.type]
    return torch.randn(side, side, generator=generator, device=device).to(dtype)


def seconds(call):
    """One call of the fastest sample: other work on the machine only makes samples slower."""
    call()
    best, here = float("inf"), platform.current()
    for _ in range(SAMPLES):
        here.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        here.synchronize()
        best = min(best, (time.perf_counter() - began) / CALLS)
    return best
