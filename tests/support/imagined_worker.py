"""What one process finds on imagined CUDA devices, as JSON.

    python -m tests.support.imagined_worker CONFIG OUT.json    CONFIG: a run's; its kernels are plain torch's
"""

import dataclasses
import json
import os
import pickle
import sys
import tempfile

from tests.support import imagined_cuda

imagined_cuda.start()

import torch
import torch.distributed as dist
import triton
from boreal_kernels import (
    backend, bag_embedding, causal_conv1d, gated_delta_rule, gated_rmsnorm, linear_multi_hot_cross_entropy
)  # fmt: skip
from boreal_megatron import parallel
from boreal_megatron.acceptance import parts
from boreal_megatron.config.load import load
from boreal_megatron.config.schema import Parallel
from boreal_megatron.log import quiet
from boreal_megatron.preflight import run as preflight, speed
from boreal_megatron.train import loop
from tests.support.imagined_cuda import waits
from tests.unit.test_gpu_acceptance import SMALL

TORCH = ("kernels.delta_rule=torch", "kernels.others=torch")


@triton.jit
def nothing(x):
    pass


def noticed():
    """{mistake: what it raises}; None for one that nobody notices."""
    device, host = torch.ones(3, device="cuda"), torch.ones(3)
    other = torch.ones(3, device="cuda:1")
    mistakes = {
        "device and host": lambda: device + host,
        "two devices": lambda: torch.cat([device, other]),
        "a gradient's": lambda: torch.autograd.grad(device.requires_grad_() * device, device, host),
        "NumPy": lambda: device.detach().numpy(),
        "NCCL and the host": lambda: dist.all_reduce(host),
        "a pickle": lambda: pickle.loads(pickle.dumps(other)) + device,
        "a kernel's": lambda: nothing[(1,)](host),
    }
    found = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
            found[name] = None
        except (RuntimeError, TypeError, AssertionError) as error:
            found[name] = str(error)
    fine = [device + 2.0, device[torch.tensor([0, 2])], host.cuda() + device, torch.ones_like(host, device="cuda") + device]
    assert all(x.is_cuda and x.device == torch.device("cuda", 0) for x in fine)
    return found


def kernels():
    """{operation: waits of a forward and backward pass}, by the kernels that run on a GPU."""
    backend.miscomputed = lambda: None  # a proof that a process makes once, and that asks for its results
    draw = lambda *shape: torch.randn(*shape, device="cuda").requires_grad_()  # noqa: E731
    documents = torch.tensor([0, 5, 9], dtype=torch.int32, device="cuda")
    ids = torch.randint(16, (2, 9), device="cuda")
    operations = {
        "bag_embedding": lambda: bag_embedding(ids, draw(16, 8), vocab_start=0, backend="triton"),
        "causal_conv1d": lambda: causal_conv1d(
            draw(1, 9, 2, 4), draw(8, 4), activation="silu", cu_seqlens=documents, backend="triton"
        )[0],
        "gated_rmsnorm": lambda: gated_rmsnorm(
            draw(9, 64), draw(9, 64), draw(64), eps=1e-6, activation="silu", backend="triton"
        ),
        "gated_delta_rule": lambda: gated_delta_rule(
            draw(1, 9, 1, 64), draw(1, 9, 1, 64), draw(1, 9, 2, 64), draw(1, 9, 2), draw(1, 9, 2), draw(2), draw(2),
            cu_seqlens=documents, backend="triton",
        )[0],
        "linear_multi_hot_cross_entropy": lambda: linear_multi_hot_cross_entropy(
            draw(9, 8), draw(16, 8), ids, None, backend="triton"
        )[0],
    }  # fmt: skip
    found = {}
    for name, operation in operations.items():
        waits.clear()
        operation().sum().backward()
        found[name] = listed()
    return found


def step(bench):
    """Waits of the third of three steps."""
    settings = parts.config(bench, bench.scale.model, parts.PRECISIONS["bf16"], steps=10)
    with parts.training(settings, bench.mesh) as (take, *_):
        take()
        take()
        waits.clear()
        take()
    return listed()


def listed():
    return sorted([*key, count] for key, count in waits.items())


def main(file, out):
    quiet()
    found, config, before = {}, load([file]), dict(os.environ)
    loop.train(config, world=1)
    found["environment"] = sorted(name for name in {*before, *os.environ} if os.environ.get(name) != before.get(name))
    parallel.stop()
    mesh = parallel.start(Parallel(), seed=1234)
    found["device"] = str(mesh.device)
    found["noticed"] = noticed()
    found["kernels"] = kernels()
    parts.PRECISIONS = {name: (*words, *TORCH) for name, words in parts.PRECISIONS.items()}
    with tempfile.TemporaryDirectory() as folder:
        bench = parts.Bench.here(dataclasses.replace(SMALL, curve=3), mesh, folder)
        found["step"] = step(bench)
        found["acceptance"] = [row for run in parts.RUN.values() for row in run(bench)]
    parallel.stop()
    speed.SIDE["cuda"], speed.COPIED["cuda"] = 256, 1 << 20  # of speeds that mean nothing here
    preflight.preflight(config, say=lambda report: found.update(preflight=report["rows"]))
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
