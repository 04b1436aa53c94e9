"""The dry run: what it finds in real layouts, that it finds planted mistakes, and that real ranks hold the same.

A process that has imagined its ranks can do nothing else, so every dry run here has a process of its own.
"""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from boreal_megatron.config.schema import Model
from boreal_megatron.convert.mapping import mapping
from boreal_megatron.plan.params import count
from boreal_megatron.plan.tiling import Piece, tiling
from tests.support.launch import ROOT, boreal, environment
from tests.support.layouts import MODEL

# Rows as `config.check` wants them of every layout below.
PHASE = {"name": "only", "until_steps": 4, "sequence": 96, "positions_per_step": 96 * 64}
EVERYTHING = {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual_pipeline": 2, "context": 2, "expert": 2}


def write(path, parallel, **changes):
    values = {
        "model": MODEL,
        "parallel": parallel,
        "precision": "bf16",
        "phases": [PHASE],
        "schedule": {"peak": 1e-3},
        "data": {"tokenizer": "none", "sources": {"text": "none"}},
        "checkpoint": {"folder": "none"},
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def python(code, *words, **variables):
    """Start `python -c CODE WORDS`, which finds this checkout before what is installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        env=environment(PYTHONPATH=path, TORCH_CPP_LOG_LEVEL="ERROR", **variables),
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


# ---------------------------------------------------------------- the pure part

SHAPE = (4, 6)
GRID = [Piece("w", SHAPE, (a, b), (2, 3), 2 * (a // 2) + b // 3) for a in (0, 2) for b in (0, 3)]
COPIES = [piece._replace(rank=piece.rank + 4, replica=(0, 1)) for piece in GRID]
STATE = [Piece("state", (100,), (start,), (25,), start // 25) for start in (0, 25, 50, 75)]


def test_whole_tensors_have_no_problems():
    assert tiling(GRID + COPIES + STATE, {"w": SHAPE, "state": (100,)}) == []


@pytest.mark.parametrize(
    "pieces, whole, said",
    [
        (GRID[:1] + GRID[2:], {"w": SHAPE}, ["w: hole of 6 elements: no rank has [0:2, 3:6] of", "ranks 0, 2, 3"]),
        (GRID + [GRID[1]._replace(rank=7)], {"w": SHAPE}, ["w: overlap of 6 elements: each of ranks 1, 7 has [0:2"]),
        (GRID + GRID[3:], {"w": SHAPE}, ["overlap", "each of ranks 3, 3"]),
        (
            GRID[:3] + [GRID[3]._replace(offset=(2, 2))],
            {"w": SHAPE},
            ["hole of 2 elements: no rank has [2:4, 5:6]", "overlap of 2 elements: each of ranks 2, 3 has [2:4, 2:3]"],
        ),
        (GRID[:3] + [GRID[3]._replace(offset=(2, 4))], {"w": SHAPE}, ["rank 3 has [2:4, 4:7]", "hole of 6"]),
        (GRID[:3] + [GRID[3]._replace(shape=(4, 7))], {"w": SHAPE}, ["rank 3", "(4, 7); the tensor is (4, 6)", "hole"]),
        (GRID + [COPIES[0]._replace(offset=(1, 0))], {"w": SHAPE}, ["rank 4 has a copy of [1:3, 0:3], which no rank"]),
        (GRID + COPIES[:1] * 2, {"w": SHAPE}, ["overlap: each of ranks 4, 4 has [0:2, 0:3] as the same copy (0, 1)"]),
        (COPIES, {"w": SHAPE}, ["hole of 24 elements"]),
        (GRID, {"w": SHAPE, "v": (3,)}, ["v: hole: no rank has any of it"]),
        (GRID, {}, ["w: the network has no such tensor, each of ranks 0, 1, 2 and 1 more has"]),
        (
            [*STATE[:2], STATE[2]._replace(offset=(51,), size=(24,)), STATE[3]],
            {"state": (100,)},
            ["state: hole of 1 elements: no rank has [50:51] of (100,)"],
        ),
    ],
    ids=[
        "a dropped shard", "a duplicated shard", "twice on one rank", "a wrong offset", "an offset outside",
        "another shape", "a copy of nothing", "one copy twice", "copies only", "a tensor missing", "a tensor unknown",
        "a hole in the optimizer's ranges",
    ],
)  # fmt: skip
def test_tiling_names_what_is_wrong(pieces, whole, said):
    found = "\n".join(tiling(pieces, whole))
    assert all(words in found for words in said), found


# ---------------------------------------------------------------- dry runs


def test_every_axis_at_once(tmp_path):
    config = write(tmp_path / "config.yaml", EVERYTHING)
    found = json.loads(boreal(1, "check", config, "--world", 16, "--dry-run", "--json"))
    assert found["classes"] == 8 and found["world"] == 16 and found["distributed"]
    assert [stage["layers"] for stage in found["stages"]] == [["*-", "G-"], ["GE", "*E/*-"]]
    assert found["parameters"] == count(Model(**MODEL))["with_mtp"]
    assert found["tensors"] == len({name for rule in mapping(Model(**MODEL)) for name in rule.train})
    for stage in found["stages"]:
        assert stage["parameters"][0] * 2 <= stage["weight_bytes"][0] <= stage["weight_bytes"][1]
        assert stage["parameters"][1] * 4 <= stage["gradient_bytes"][1]
        assert 0 < stage["state_bytes"][0] < stage["state_bytes"][1]


def test_what_is_wrong_is_said_before_anything_is_built(tmp_path):
    config = write(tmp_path / "config.yaml", EVERYTHING)
    assert "world=12" in boreal(1, "check", config, "--world", 12, "--dry-run", expect=1)
    assert "--world" in boreal(1, "check", config, "--dry-run", expect=1)


PLANTED = """
import json, sys
from boreal_megatron import dry_run as d
from boreal_megatron.config.load import load
from boreal_megatron.errors import ProblemsError
from boreal_megatron.log import quiet
from boreal_megatron.model import gated_deltanet

quiet()
config = load(sys.argv[1:2])
shards, sharded, build, owned = d.init.shards, gated_deltanet.SHARDED, d.boreal.build, d._owned

def drop(model, mesh):
    mine = list(shards(model, mesh))
    return mine[:-1] if mesh.rank == 1 else mine

def shift(model, mesh):
    for shard in shards(model, mesh):
        if mesh.rank == 1 and shard.key.endswith("layers.0.self_attention.linear_proj.weight"):
            shard.global_offset = (0, 0)
        yield shard

def refuse(config, mesh):
    assert mesh.pp_rank == 0 or mesh.world == 1, "no such stage"
    return build(config, mesh)

def shrink(buffer):
    ranges = owned(buffer)
    if buffer.data_parallel_group.rank() == 1:
        ranges |= {p: (start, end - 1) for p, (start, end) in ranges.items()}
    return ranges

def said():
    try:
        return str(d.dry_run(config, 16))
    except ProblemsError as error:
        return str(error)

found = {"nothing": said()}
plain = load(sys.argv[1:2], ["optimizer.distributed=false", "precision=fp32"])
found["plain"] = d.table(d.dry_run(plain, 16))
found["odd vocabulary"] = d.table(d.dry_run(load(sys.argv[1:2], ["model.vocab_size=641"]), 16))
for name, module, attribute, value in [
    ("drop", d.init, "shards", drop),
    ("shift", d.init, "shards", shift),
    ("unsaved", gated_deltanet, "SHARDED", {k: v for k, v in sharded.items() if k != "conv1d.weight"}),
    ("other axis", gated_deltanet, "SHARDED", {**sharded, "conv1d.weight": 1}),
    ("shrink", d, "_owned", shrink),
    ("refuse", d.boreal, "build", refuse),
]:
    original = getattr(module, attribute)
    setattr(module, attribute, value)
    found[name] = said()
    setattr(module, attribute, original)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_planted_mistakes_are_named(tmp_path):
    config = write(tmp_path / "config.yaml", EVERYTHING)
    found = answer(python(PLANTED, config))
    assert "'classes': 8" in found["nothing"]
    assert "whole on each: optimizer.distributed=false" in found["plain"]
    assert f"{count(Model(**MODEL))['with_mtp']:,} parameters: every element once" in found["plain"]
    odd = count(Model(**MODEL | {"vocab_size": 641}))["with_mtp"]
    assert f"{odd:,} parameters and 8,128 zeros that pad the vocabulary: every element once" in found["odd vocabulary"]
    assert "hole of" in found["drop"] and "no rank has" in found["drop"], found["drop"]
    assert "tensor 1, context 0" in found["drop"] and "under checkpoint names" in found["drop"], found["drop"]
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert f"{name}: overlap of 2,048 elements: each of ranks 0, 1 has [0:64, 0:32]" in found["shift"], found["shift"]
    assert f"{name}: hole of 2,048 elements: no rank has [0:64, 32:64] of (64, 64)" in found["shift"], found["shift"]
    assert "64,824 parameters are built, 64,312 are under checkpoint names" in found["unsaved"], found["unsaved"]
    assert "conv1d.weight: rank 0 has [0:128, 0:4] of (128, 8); the tensor is (256, 4)" in found["other axis"]
    assert "optimizer state of" in found["shrink"] and "hole of 1 elements" in found["shrink"], found["shrink"]
    assert "rank 8 (pipeline 1" in found["refuse"] and re.search(r"AssertionError at <string>:\d+: no such", found["refuse"])


HELD = """
import json, os, sys
from boreal_megatron import dry_run as d
from boreal_megatron.config.load import load
from boreal_megatron.log import quiet

quiet()
config, world = load(sys.argv[1:2]), 8

def held(mesh):
    chunks = d.boreal.build(config, mesh)
    pieces = d._pieces(chunks, mesh)
    names = {p: f"{i} {name}" for i, chunk in enumerate(chunks) for name, p in chunk.named_parameters()}
    wrapped = d.optim.wrap(config, chunks)
    buffers = [b for w in wrapped for b in [*w.buffers, *w.expert_parallel_buffers]]
    ranges = {names[p]: where for b in buffers for p, where in d._owned(b).items()}
    return pieces, sorted(ranges.items()), sum(b.grad_data.nbytes for b in buffers), wrapped

if "RANK" in os.environ:
    *mine, wrapped = held(d.parallel.start(config.parallel, config.seed))
    parts = d.optim.parts(d.optim.build(config, wrapped))
    moments = [s for part in parts for state in part.optimizer.state.values() for s in state.values() if s.dim()]
    masters = [p for part in parts for g in part.shard_fp32_from_float16_groups for p in g if p is not None]
    print(json.dumps([*mine, sum(x.nbytes for x in moments + masters)]))
else:
    found = d.dry_run(config, world)
    everyone = []
    for rank in range(world):
        everyone.append(held(d._become(rank, world, config)[1])[:-1])
        d.parallel.stop()
    print(json.dumps([found, everyone]))
"""


@pytest.mark.slow
def test_real_ranks_hold_what_the_dry_run_imagines(tmp_path):
    """Eight gloo processes: the same shards, the same ranges of the optimizer's state, the same bytes."""
    config = write(tmp_path / "config.yaml", EVERYTHING, kernels={"experts": "grouped_mm"})  # what a GPU would run
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "8"}
    found, imagined = answer(python(HELD, config))
    ranks = [python(HELD, config, RANK=str(rank), LOCAL_RANK=str(rank), **meet) for rank in range(8)]
    real = [answer(rank) for rank in ranks]
    assert [mine[:-1] for mine in real] == imagined
    for stage, ranks in zip(found["stages"], (real[:4], real[4:]), strict=True):
        for key, at in (("gradient_bytes", -2), ("state_bytes", -1)):
            assert stage[key] == [min(r[at] for r in ranks), max(r[at] for r in ranks)], key


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, overlays",
    [(256, []), (512, []), (512, ["boreal_10b_moe_context.yaml"])],
    ids=["256", "512", "512, context"],
)
def test_the_largest_network(world, overlays):
    """BOREAL-10B-MoE on its two worlds, and with the overlay for long rows; 30 s each on one core with start-up."""
    files = [ROOT / "examples/configs" / name for name in ("boreal_10b_moe.yaml", *overlays)]
    found = json.loads(boreal(1, "check", *files, "--world", world, "--dry-run", "--json", timeout=600))
    assert found["classes"] == 64 and found["parameters"] == 11_498_604_672
    assert "".join(stage["layers"][chunk] for chunk in range(1 + len(overlays)) for stage in found["stages"]) == (
        "*-G-G-G-*-GEG-GE" + 8 * "*-GEG-G-" + "/*-"
    )
