"""A run's ranks without its machines: are all stages built, and do their pieces make up the whole network?

One process on one CPU core is one rank of the world after another, with megatron-core's own process groups and network
on the meta device (`platform/meta.py`).

Built by the code that trains: the groups of all ranks; the network of one process; and one rank of every class, a class
being the ranks that differ only in their data-parallel position: its chunks (`boreal.build`), their pieces under
checkpoint names (`init.shards`), its DDP buffers (`optim.wrap`). What every single rank of the world owns of the
optimizer's state is computed by megatron-core's DistributedOptimizer from the buffers of its class.

Inferred: that the ranks of a class build the same, since no constructor asks for the data-parallel position. Not looked
at: values, activations, speed, and the machines.
"""

import time
import traceback
from collections import defaultdict
from math import prod
from typing import NamedTuple

import torch

from boreal_megatron import platform  # imports megatron-core in its own way

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from boreal_megatron import parallel
from boreal_megatron.config.check import check
from boreal_megatron.config.pattern import expand
from boreal_megatron.config.schema import Parallel
from boreal_megatron.errors import ProblemsError
from boreal_megatron.model import boreal, init
from boreal_megatron.plan import params
from boreal_megatron.plan.tiling import Piece, tiling
from boreal_megatron.platform import meta
from boreal_megatron.train import optim

SHOWN = 20  # problems; one mistake may show in every layer
BALANCING_BIAS = "expert_bias"  # the router's: saved, but no parameter
COLUMNS = {
    "parameters": "parameters",
    "weight_bytes": "weights",
    "gradient_bytes": "gradients",
    "state_bytes": "optimizer state",
}


class Seat(NamedTuple):
    """A rank's position in each kind of group. Ranks that agree in all but the last two are of one class."""

    pipeline: int
    tensor: int
    context: int
    expert: int
    expert_tensor: int
    data: int  # over data and context parallelism together, as the optimizer shards
    expert_data: int


GROUPS = Seat(
    pipeline="PIPELINE_MODEL_PARALLEL_GROUP",
    tensor="TENSOR_MODEL_PARALLEL_GROUP",
    context="CONTEXT_PARALLEL_GROUP",
    expert="EXPERT_MODEL_PARALLEL_GROUP",
    expert_tensor="EXPERT_TENSOR_PARALLEL_GROUP",
    data="DATA_PARALLEL_GROUP_WITH_CP",
    expert_data="EXPERT_DATA_PARALLEL_GROUP",
)  # megatron-core's names of them


class Built(NamedTuple):
    """One class of ranks: what the first of them built, and what all of them own of the optimizer's state."""

    seat: Seat
    layers: list  # a string of letters per chunk
    pieces: list
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    whole: dict  # what `owned` are pieces of: {key: (elements,)}
    owned: list  # empty where every rank has the whole state
    state_bytes: list  # per rank


class Member(NamedTuple):
    """A process group as one of its ranks sees it, for the optimizer's arithmetic."""

    number: int
    members: int

    def rank(self):
        return self.number

    def size(self):
        return self.members


def dry_run(config, world, progress=lambda done, total: None):
    """Build every class of ranks, and prove that their pieces are the network.

    Afterwards the process is of no other use (`platform.imagine`).

    Args:
        config: `config.schema.Config`.
        world: number of ranks of the run.
        progress: called with (built, all) classes.

    Returns:
        dict for JSON: `world`, `classes`, `tensors`, `parameters` (with MTP, a tied embedding once), `padding` (of the
        vocabulary, besides), `distributed`, `seconds`, and for each pipeline stage in `stages` {"layers": a string per
        virtual stage, and [least, most] over its ranks of "parameters", "weight_bytes", "gradient_bytes" and
        "state_bytes", padding included}. The optimizer's state is FP32: two moments, and a master copy of weights that
        are not FP32.

    Raises:
        ProblemsError: of the configuration; or a class that is not built, a hole, an overlap, a wrong name or count.
    """
    began, counts = time.perf_counter(), params.count(config.model)
    check(config, world)
    platform.imagine()
    alone = config.model_copy(update={"parallel": Parallel()})
    _, mesh = _become(0, 1, alone)
    whole = {piece.key: piece.shape for piece in _pieces(boreal.build(alone, mesh), mesh)}
    parallel.stop()
    groups, _ = _become(0, world, config)
    parallel.stop()
    classes = defaultdict(dict)
    for rank, seat in enumerate(_seats(groups, world)):
        classes[seat[:-2]][rank] = seat
    built = []
    for seats in classes.values():
        built.append(_build(config, world, seats))
        progress(len(built), len(classes))
    problems = _problems(config, counts, whole, built)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ProblemsError(f"dry run of {world} ranks", problems[:SHOWN] + more)
    return {
        "world": world,
        "classes": len(classes),
        "tensors": len(whole),
        "parameters": counts["with_mtp"],
        "padding": counts["padding"],
        "distributed": config.optimizer.distributed,
        "stages": [_stage([b for b in built if b.seat.pipeline == s]) for s in range(config.parallel.pipeline)],
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(found):
    """What `dry_run` returns, for people."""
    layers = [" | ".join(stage["layers"]) for stage in found["stages"]]
    width = max(map(len, layers))
    rows = [f"{'stage':<7}{'layers':<{width}}" + "".join(f"{name:>24}" for name in COLUMNS.values())]
    for number, stage in enumerate(found["stages"]):
        cells = [_least_most(stage[key], "" if key == "parameters" else "GB") for key in COLUMNS]
        rows.append(f"{number:<7}{layers[number]:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    how = "sharded over data-parallel ranks" if found["distributed"] else "whole on each: optimizer.distributed=false"
    rows.append(f"(per rank, least-most; the optimizer's state is {how})")
    rows.append(f"{found['world']} ranks: {found['classes']} classes built in {found['seconds']} s")
    padding = f" and {found['padding']:,} zeros that pad the vocabulary" if found["padding"] else ""
    rows.append(f"{found['tensors']} tensors, {found['parameters']:,} parameters{padding}: every element once")
    return "\n".join(rows)


def _become(rank, world, config):
    """Be a rank of a world, until `parallel.stop`: (the ranks of every group, mesh)."""
    platform.current().setup()
    groups = meta.join(rank, world)
    return groups, parallel.start(config.parallel, config.seed)


def _seats(groups, world):
    """The Seat of every rank, read off megatron-core's groups."""
    columns = []
    for name in GROUPS:
        places = [(rank, number) for group in groups[name] for number, rank in enumerate(group)]
        assert sorted(rank for rank, _ in places) == list(range(world)), f"{name} does not have every rank once"
        columns.append([number for _, number in sorted(places)])
    return [Seat(*row) for row in zip(*columns)]


def _build(config, world, seats):
    """A class, given the seats of its ranks."""
    rank, seat = next(iter(seats.items()))
    _, mesh = _become(rank, world, config)
    try:
        chunks = boreal.build(config, mesh)
        pieces = _pieces(chunks, mesh)
        names = {p: f"{name} of chunk {i}" for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
        weight_bytes = sum(p.nbytes for p in names)
        wrapped = optim.wrap(config, chunks)
    except Exception as error:  # whatever megatron-core or the network says: whether it is built is the question
        who = f"rank {rank} ({_named(seat, Seat._fields)})"
        *_, line = traceback.extract_tb(error.__traceback__)  # many assertions of megatron-core's have no other text
        where = f"{line.filename}:{line.lineno}"
        raise ProblemsError("dry run", [f"{who} is not built: {type(error).__name__} at {where}: {error}"]) from error
    whole, owned, state_bytes = _optimizer_state(config, wrapped, names, seats)
    parallel.stop()
    _, mtp = expand(config.model.pattern)
    return Built(
        seat=seat,
        layers=["".join(c.decoder.layer_type_list) + (f"/{mtp}" if c.mtp_process else "") for c in chunks],
        pieces=pieces,
        parameters=sum(p.numel() for p in names),
        weight_bytes=weight_bytes,
        gradient_bytes=sum(
            gradients.nbytes
            for chunk in wrapped
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
            for gradients in [buffer.grad_data, *buffer.extra_main_grads]
        ),
        whole=whole,
        owned=owned,
        state_bytes=state_bytes,
    )


def _optimizer_state(config, wrapped, names, seats):
    """(whole, owned, state_bytes) of Built, from one rank's buffers and the seats of all ranks that have the same."""
    first = next(iter(seats.values()))
    dense, experts = ("pipeline", "tensor"), ("pipeline", "expert", "expert_tensor")
    buffers = [
        *((b, "data", dense) for w in wrapped for b in w.buffers),
        *((b, "expert_data", experts) for w in wrapped for b in w.expert_parallel_buffers),
    ]
    whole, owned, state_bytes = {}, [], dict.fromkeys(seats, 0)
    for buffer, axis, place in buffers:
        where = _named([getattr(first, kind) for kind in place], place)
        keys = {p: f"optimizer state of {names[p]} ({where})" for p in buffer.params}
        whole |= {key: (p.numel(),) for p, key in keys.items()}
        group = buffer.data_parallel_group
        assert group.rank() == getattr(first, axis), (first, axis)
        for rank, seat in seats.items():
            buffer.data_parallel_group = Member(getattr(seat, axis), group.size())
            ranges = _owned(buffer) if config.optimizer.distributed else {p: (0, p.numel()) for p in keys}
            for p, (start, end) in ranges.items():
                state_bytes[rank] += (end - start) * (8 if p.dtype is torch.float32 else 12)
                if config.optimizer.distributed:
                    owned.append(Piece(keys[p], (p.numel(),), (start,), (end - start,), rank))
    return whole, owned, list(state_bytes.values())


def _owned(buffer):
    """{parameter: (start, end)} of the flat elements that the buffer's data-parallel rank has the state of."""
    found = {}
    for buckets in DistributedOptimizer._build_gbuf_range_map(buffer).values():
        for bucket in buckets:
            found |= {p: (r["param"].start, r["param"].end) for p, r in bucket["param_map"].items()}
    return found


def _pieces(chunks, mesh):
    """This rank's weights and saved buffers. The axis along which experts are stacked counts like any other."""
    return [
        Piece(
            s.key,
            tuple(s.global_shape),
            tuple(s.global_offset),
            (1,) * s.prepend_axis_num + tuple(s.data.shape),
            mesh.rank,
            s.replica_id if isinstance(s.replica_id, tuple) else (s.replica_id,),
        )
        for chunk in chunks
        for s in init.shards(chunk, mesh)
    ]


def _problems(config, counts, whole, built):
    pieces = [piece for b in built for piece in b.pieces]
    found = tiling(pieces, whole)
    for b in built:
        has = {"under checkpoint names": _elements(b.pieces), "in the optimizer": sum(n for (n,) in b.whole.values())}
        found += (
            f"{_named(b.seat, Seat._fields)}: {b.parameters:,} parameters are built, {n:,} are {where}"
            for where, n in has.items()
            if n != b.parameters
        )
    total, planned = _elements(p for p in pieces if not any(p.replica)), counts["with_mtp"] + counts["padding"]
    if total != planned:
        found.append(f"all ranks together have {total:,} parameters; `boreal plan params` says {planned:,} with padding")
    if config.optimizer.distributed:
        found += tiling([piece for b in built for piece in b.owned], {k: s for b in built for k, s in b.whole.items()})
    return found


def _elements(pieces):
    return sum(prod(p.size) for p in pieces if not p.key.endswith(BALANCING_BIAS))


def _stage(built):
    """One pipeline stage, from its classes."""
    values = {key: [getattr(b, key) for b in built] for key in COLUMNS}
    values["state_bytes"] = [n for each in values["state_bytes"] for n in each]
    return {"layers": built[0].layers, **{key: [min(v), max(v)] for key, v in values.items()}}


def _named(place, kinds):
    return ", ".join(f"{kind.replace('_', ' ')} {number}" for kind, number in zip(kinds, place))


def _least_most(values, unit):
    texts = [f"{n / 1e9:.3f}" if unit else f"{n:,}" for n in values]
    return "-".join(dict.fromkeys(texts)) + (f" {unit}" if unit else "")
