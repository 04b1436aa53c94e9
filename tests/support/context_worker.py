"""Measures both sequence mixers on context-parallel ranks against the same module on one rank.

`python -m tests.support.context_worker 2 4 8` prints one JSON object, {ranks: what `measure` found}. A launch's
processes are forks of one that has imported everything: importing megatron-core takes longer than all the rest.

Shapes: T positions of the row, t of a rank's chunk, h hidden.
"""

import json
import os
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from boreal_megatron import parallel
from boreal_megatron.config.schema import Kernels, Parallel
from boreal_megatron.data import batch
from boreal_megatron.log import quiet
from boreal_megatron.model import context, provider, rope
from boreal_megatron.model.config import transformer_config
from boreal_megatron.model.kernels import chosen
from boreal_megatron.model.packing import Packing
from boreal_megatron.model.spec import stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from tests.support.configs import config_for, tiny_model

MODEL = tiny_model(gdn=dict(key_heads=8, value_heads=16, head_dim=16))  # heads divide by every tp * cp here
KINDS = ("attention", "state", "heads")
CHUNK = 36  # t: more than one chunk of the rule, even for attention
NORMS = ("q_layernorm.weight", "k_layernorm.weight")  # their gradients are summed over TP by megatron-core's finalize


def documents(size, t):
    """Name -> where the row of size * t positions is cut into documents, besides its ends."""
    borders = range(t, size * t, t)
    cases = {f"{d:+d} of every border": [b + d for b in borders] for d in (-3, -2, -1, 1, 2, 3)}
    cases["one document"] = []
    cases["on every border"] = [*borders]
    cases["several in a chunk"] = [b + d for b in (0, *borders) for d in (5, 6, t // 2, t - 5)]
    cases["short ones over every border"] = [b + d for b in borders for d in (-2, -1, 1)]
    if size >= 4:
        cases["over three ranks"] = [t + t // 3, 3 * t + t // 2]
    return cases


def row(cuts, length, place=(0, 1)):
    """The batch of one window whose documents end at `cuts`."""
    document = np.searchsorted(np.array(cuts), np.arange(length + 1), side="right")
    window = {"ids": np.ones((1, length + 1), int), "valid": np.ones((1, length + 1), bool), "document": document}
    window["weight"] = window["valid"].astype(np.float32)
    made = batch.make([window], boundaries="align", device="cpu", context=place)
    assert made.edges == (0, *cuts, length)
    return made


def groups(tp, cp):
    """Of this process, where tensor-parallel ranks are neighbours. Every process makes them all."""
    world = dist.get_world_size()
    found = {}
    for name, members in (
        ("tp", [[*range(i, i + tp)] for i in range(0, world, tp)]),
        ("cp", [[*range(i, world, tp)] for i in range(tp)] if cp > 1 else [[i] for i in range(world)]),
    ):
        made = [(ranks, dist.new_group(ranks)) for ranks in members]
        (found[name],) = [group for ranks, group in made if dist.get_rank() in ranks]
    return ProcessGroupCollection(**found)


def build(kind, pg, **changes):
    """A mixer with weights that depend on names only, cut for its tensor-parallel rank."""
    kernels = chosen(Kernels(), MODEL.gdn.head_dim, torch.device("cpu"))
    run = config_for(MODEL, **changes)
    choices = provider.chosen(run, torch.device("cpu"))
    mode = "heads" if kind == "heads" else "state"
    layers = stack_spec(MODEL, kernels, provider.modules(choices), context_mode=mode).submodules
    layer = layers.attention_layer if kind == "attention" else layers.gdn_layer
    config = transformer_config(run, choices)
    module = build_module(layer.submodules.self_attention, config=config, layer_number=1, pg_collection=pg)
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        shape = [*p.shape]
        if getattr(p, "tensor_model_parallel", False):
            shape[p.partition_dim] *= pg.tp.size()
        x = torch.randn(shape, generator=generator)
        if "norm" in name:
            x = 1 + 0.3 * x
        elif name == "A_log":  # half-lives longer than a chunk, so that states matter ranks away
            x = (0.01 + 0.1 * x.sigmoid()).log()
        elif name == "dt_bias":
            x = -2 + 0.5 * x
        else:
            x = shape[-1] ** -0.5 * x
        p.data.copy_(shard(x, p, pg.tp))
    return module


def shard(x, p, tp):
    """What this tensor-parallel rank has of a whole parameter or its gradient."""
    if not getattr(p, "tensor_model_parallel", False):
        return x
    return x.chunk(tp.size(), dim=p.partition_dim)[tp.rank()]


def run(module, made, hidden, grad, keep=lambda x: x):
    """Forward and backward: {"out", "hidden" and every parameter's name: output or gradient}. `keep` sees every tensor
    that the forward pass saves for the backward pass."""
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    table = rope.rotary(made.positions[0], MODEL.attention.rope_dim(), MODEL.attention.rope_theta)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, _ = module(hidden, None, rotary_pos_emb=table, packed_seq_params=Packing.of(made))
    out.backward(grad)
    return {"out": out.detach(), "hidden": hidden.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}


class Row:
    """A row's input and output gradient [T, 1, h], and each mixer's result on one rank."""

    def __init__(self, length, solo, **changes):
        generator = torch.Generator().manual_seed(1)
        self.length = length
        self.solo = {kind: build(kind, solo, **changes) for kind in ("attention", "state")}
        dtype = next(self.solo["attention"].parameters()).dtype
        self.hidden, self.grad = (
            torch.randn(length, 1, MODEL.hidden_size, generator=generator).to(dtype) for _ in range(2)
        )
        self.known = {}

    def expected(self, kind, cuts):
        """The first rank's computation, for all."""
        kind = "attention" if kind == "attention" else "state"
        if (kind, *cuts) not in self.known:
            result = [None]
            if dist.get_rank() == 0:
                result = [run(self.solo[kind], row(cuts, self.length), self.hidden, self.grad)]
            dist.broadcast_object_list(result)
            (self.known[kind, *cuts],) = result
        return self.known[kind, *cuts]

    def found(self, module, pg, cuts, rows, **options):
        """This rank's result when it holds the positions `rows` of the row."""
        made = row(cuts, self.length, (pg.cp.rank(), pg.cp.size()))
        return run(module, made, self.hidden[rows], self.grad[rows], **options)

    def errors(self, module, pg, kind, cuts, told=None, zigzag=False):
        """Relative norms of the difference to one rank, the largest over ranks. `told` are the documents that the
        ranks are told of, if others."""
        t = self.length // pg.cp.size()
        if zigzag:
            parts = [torch.arange(i * t // 2, (i + 1) * t // 2) for i in context.halves(pg.cp.rank(), pg.cp.size())]
            rows = torch.cat(parts)
        else:
            rows = torch.arange(self.length)[batch.chunk(self.length, pg.cp.rank(), pg.cp.size())]
        if module.config.sequence_parallel:
            rows = rows.chunk(pg.tp.size())[pg.tp.rank()]
        expected, found = self.expected(kind, cuts), self.found(module, pg, cuts if told is None else told, rows)
        parameters = dict(module.named_parameters())
        summed(found, parameters, pg.cp)
        if pg.tp.size() > 1:
            summed(found, [name for name in NORMS if name in parameters], pg.tp)
        worst = []
        for name, x in found.items():
            y = shard(expected[name], parameters[name], pg.tp) if name in parameters else expected[name][rows]
            worst.append((x.double() - y.double()).norm() / y.double().norm())
        worst = torch.stack(worst).nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return dict(zip(found, worst.tolist()))


def summed(found, names, group):
    """Replace some of this rank's tensors by their FP32 sums over a group."""
    flat = torch.cat([torch.zeros(1), *(found[name].float().flatten() for name in names)])
    dist.all_reduce(flat, group=group)
    sizes = [1, *(found[name].numel() for name in names)]
    found.update((name, x.view_as(found[name])) for name, x in zip(names, flat.split(sizes)[1:]))


def measure(size):
    """Everything for one number of ranks, {kind of check: {case: {what: number}}}; relative norms but where said."""
    solo, pg = groups(1, 1), groups(1, size)
    layout = dict(parallel=dict(context=size))
    found = {"fp32": {}, "bf16": {}, "tensor": {}, "controls": {}, "recompute": {}}

    mixers = {kind: build(kind, pg, **layout) for kind in KINDS}
    whole = Row(size * CHUNK, solo)
    for kind, mixer in mixers.items():
        for name, cuts in documents(size, CHUNK).items():
            found["fp32"][f"{kind}: {name}"] = whole.errors(mixer, pg, kind, cuts)
    odd = Row(size * (CHUNK + 1), solo)
    for kind in ("state", "heads"):
        for name in ("one document", "-2 of every border"):
            cuts = documents(size, CHUNK + 1)[name]
            found["fp32"][f"{kind}: {name}, odd chunk"] = odd.errors(mixers[kind], pg, kind, cuts)

    borders = documents(size, CHUNK)["on every border"]
    for kind, mixer in mixers.items():
        forgotten = whole.errors(mixer, pg, kind, borders, told=borders[1:])
        found["controls"][f"{kind}: forgotten reset on a border"] = forgotten
        found["controls"][f"{kind}: zigzag chunks"] = whole.errors(mixer, pg, kind, [], zigzag=True)
    found["poison"] = poison(pg.cp)

    half = Row(size * CHUNK, solo, precision="bf16")
    for kind in KINDS:
        mixer = build(kind, pg, precision="bf16", **layout)
        for name in ("one document", "several in a chunk"):
            found["bf16"][f"{kind}: {name}"] = half.errors(mixer, pg, kind, documents(size, CHUNK)[name])

    rows, cuts = batch.chunk(whole.length, pg.cp.rank(), size), documents(size, CHUNK)["-2 of every border"]
    for kind, mixer in mixers.items():
        again, kept, results = build(kind, pg, recompute="selective", **layout), [], []
        for module in (mixer, again):
            saved = []
            results.append(whole.found(module, pg, cuts, rows, keep=lambda x: saved.append(x.nbytes) or x))
            kept.append(sum(saved))
        different = sum(not torch.equal(*pair) for pair in zip(*(r.values() for r in results), strict=True))
        found["recompute"][kind] = {"different tensors": different, "kept bytes": kept[1] / kept[0]}

    if size == 4:
        pg = groups(2, 2)
        short = Row(2 * CHUNK, solo)
        for sequence in (True, False):
            layout = dict(parallel=dict(context=2, tensor=2, sequence_parallel=sequence))
            for kind in KINDS:
                mixer = build(kind, pg, **layout)
                for name in ("one document", "-2 of every border", "several in a chunk"):
                    case = f"{kind}: {name}, sequence parallel {sequence}"
                    found["tensor"][case] = short.errors(mixer, pg, kind, documents(2, CHUNK)[name])
    return found


def poison(group):
    """How many NaN reach the ranks' chunks from the rank before, which holds nothing else in its other documents."""
    size, t, count = group.size(), 8, 3
    nan, state = torch.full((t, 5), torch.nan), torch.full((2, 4, 4), torch.nan)
    last = nan.clone()
    last[-1] = 1.0
    on_borders = [0, *range(t, size * t, t), size * t]
    one_before = [0, *range(t - 1, size * t - 1, t), size * t]
    one = [0, size * t]
    found = {
        "inputs": context.previous_inputs(nan, count, on_borders, group),
        "inputs but one": context.previous_inputs(last, count, one_before, group),
        "inputs of one document": context.previous_inputs(last, count, one, group),
        "state": context.entering_state(state, state, on_borders, t, group),
        "state after one position": context.entering_state(state, state, one_before, t, group),
        "state of one document": context.entering_state(state, state, one, t, group),
    }
    numbers = torch.tensor([int(x.isnan().sum()) for x in found.values()])
    dist.all_reduce(numbers, group=group)
    return dict(zip(found, numbers.tolist()))


def worker(rank, size, folder):
    quiet()
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel.start(Parallel(context=size), seed=1)
    found = measure(size)
    if rank == size - 1:
        with open(os.path.join(folder, "found.json"), "w") as file:
            json.dump(found, file)
    parallel.stop()


if __name__ == "__main__":
    everything = {}
    for ranks in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(worker, (ranks, folder), ranks, start_method="fork")
            with open(os.path.join(folder, "found.json")) as file:
                everything[ranks] = json.load(file)
    print(json.dumps(everything))
