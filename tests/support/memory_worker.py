"""The most bytes of tensors that are alive during a training step, on every rank of a real run.

    python -m tests.support.memory_worker WORLD PLAN.json OUT

PLAN.json: a list of configurations as dicts, of runs on WORLD ranks, which are gloo processes, forks of one that has
imported everything. OUT.NUMBER.RANK becomes what `measure` returns of configuration NUMBER.

What is counted is storages as torch's dispatcher returns them, once each, whichever tensors share them. What a CPU
kernel allocates and frees inside is not seen.
"""

import gc
import json
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from boreal_megatron import parallel
from boreal_megatron.config import schema
from boreal_megatron.data import batch
from boreal_megatron.log import quiet
from boreal_megatron.model import boreal, gated_attention
from boreal_megatron.model import router as router_module
from boreal_megatron.train import optim, step
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            self._see(x, made=False)  # it was there before
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self._see(x, made=True)
        return out

    def _see(self, x, made):
        if not isinstance(x, torch.Tensor) or (key := x.untyped_storage()._cdata) in self.known:
            return
        storage = x.untyped_storage()
        size = storage.nbytes() if made else 0
        self.known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key, size):
        del self.known[key]
        self.bytes -= size


def batches(config, phase, count, context):
    """`count` micro-batches of random ids, a document a window."""
    random, k, bags = np.random.default_rng(1), phase.bag_size, phase.sequence + 1
    valid = np.ones((k, bags), bool)
    fixed = dict(valid=valid, weight=valid.astype(np.float32), document=np.zeros(bags, np.int64))
    windows = [
        dict(ids=random.integers(0, config.model.vocab_size, (k, bags)), **fixed) for _ in range(config.micro_batch)
    ]
    return [batch.make(windows, boundaries="flat", device="cpu", context=context) for _ in range(count)]


def measure(config, mesh):
    """Two steps of every phase on this rank; the second one's bytes, beyond what was there before it.

    Returns:
        list of {"peak": bytes alive at most, "kept": {half-block: bytes that its forward pass left alive}}.
    """
    chunks = boreal.build(config, mesh)
    even_routes(chunks)
    wrapped = optim.wrap(config, chunks)
    optim.build(config, wrapped)
    found = []
    for phase in config.phases:
        count = phase.windows_per_step() // config.micro_batch // mesh.dp_size
        rows = batches(config, phase, count, mesh.context)
        step.forward_backward(config, wrapped, mesh, phase, rows)
        alive, kept = Alive(), {}
        hooks = [hook for chunk in chunks for hook in _note(chunk, alive, kept)]
        with alive:
            step.forward_backward(config, wrapped, mesh, phase, rows)
        for hook in hooks:
            hook.remove()
        found.append({"peak": alive.peak, "kept": kept})
    return found


def even_routes(chunks):
    """Every expert gets as many positions as any other: position t has experts t * top_k, t * top_k + 1 and so on."""
    for chunk in chunks:
        for _, router in router_module.routers(chunk):
            router.gating = partial(_even, router.gating, router.topk)


def _even(gating, k, x):
    logits = gating(x)  # [.., experts]
    positions, experts = logits.flatten(0, -2).shape
    chosen = (torch.arange(positions)[:, None] * k + torch.arange(k)) % experts
    even = torch.zeros(positions, experts).scatter(1, chosen, 4.0)
    return logits * 0 + even.view_as(logits)


def _note(chunk, alive, kept):
    """Hooks that put into `kept` what each layer's first forward pass leaves alive."""
    for number, layer in enumerate(chunk.decoder.layers):
        name = f"{chunk.vp_stage or 0}.{number}{chunk.decoder.layer_type_list[number]}"

        def before(*_, name=name):
            kept.setdefault(name, -alive.bytes)

        def after(*_, name=name):
            if kept[name] <= 0:
                kept[name] += alive.bytes

        yield layer.register_forward_pre_hook(before)
        yield layer.register_forward_hook(after)


def unseen(*sizes, make=gated_attention.causal_lower_right):
    """torch cannot make this subclass of Tensor under a dispatch mode; it has no elements."""
    with _disable_current_modes():
        return make(*sizes)


def rank_of(number, world, plan, out):
    gated_attention.causal_lower_right = unseen
    for turn, values in enumerate(plan):
        config = schema.Config.model_validate(values)
        store = dist.FileStore(f"{out}.store.{turn}", world)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world)
        found = measure(config, parallel.start(config.parallel, config.seed))
        Path(f"{out}.{turn}.{number}").write_text(json.dumps(found))
        parallel.stop()
        gc.collect()  # with the process groups go gloo's threads


def main(world, plan, out):
    quiet()
    gc.freeze()
    arguments = (int(world), json.loads(Path(plan).read_text()), out)
    start_processes(rank_of, arguments, int(world), start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
