"""The layout bench: which layouts are run, against what, and how two runs are compared.

One BOREAL with every kind of half-block, packed documents of at most 150 tokens, 6 steps of 768 positions: 4 on bags
of 4, 2 on single tokens. One process makes the reference and a checkpoint after step 2; every layout goes on from that
checkpoint. fp32 unless the reference says otherwise; seed 1234.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from tests.support.launch import ROOT, environment, metrics

MODEL = {
    "pattern": "*-GEG-*E / *-",
    "vocab_size": 640,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope_theta": 10000.0},
    "gdn": {"key_heads": 4, "value_heads": 8, "head_dim": 16},
    "moe": {"experts": 8, "top_k": 2, "expert_hidden_size": 32, "shared_hidden_size": 32},
    "max_positions": 512,
}
RUN = {
    "model": MODEL,
    "micro_batch": 1,
    "phases": [
        {"name": "superposition", "until_steps": 4, "bag_size": 4, "sequence": 96, "positions_per_step": 768},
        {"name": "recovery", "until_steps": 6, "sequence": 96, "positions_per_step": 768},
    ],
}
FIRST, STEPS = 2, (3, 4, 5, 6)  # the checkpoint's step; the steps that are compared

# name -> overrides of the run that one process makes.
REFERENCES = {
    "fp32": [],
    "fp32, plain optimizer": ["optimizer.distributed=false"],
    "fp32, dense network": ["model.pattern=*-G-G-*- / *-"],
    "bf16": ["precision=bf16"],
}


@dataclass(frozen=True)
class Layout:
    """A cell of the support table: `boreal train` on `world` processes with these overrides, against a reference."""

    name: str
    world: int
    overrides: str
    reference: str = "fp32"

    def words(self):
        return [*REFERENCES[self.reference], *(f"parallel.{word}" if "." not in word.split("=")[0] and not word.startswith("recompute") else word for word in self.overrides.split())]  # fmt: skip


TP = "tensor=2 sequence_parallel=true"
LAYOUTS = [
    Layout("recompute selective", 1, "recompute=selective"),
    Layout("recompute full", 1, "recompute=full"),
    Layout("data 2", 2, ""),
    Layout("data 2, plain optimizer", 2, "", "fp32, plain optimizer"),
    Layout("tensor 2 + sequence", 2, TP),
    Layout("tensor 2 without sequence, dense", 2, "tensor=2", "fp32, dense network"),
    Layout("pipeline 2", 2, "pipeline=2"),
    Layout("pipeline 2, uneven", 2, "pipeline=2 pipeline_layers=[1,3]"),
    Layout("pipeline 2 x virtual 2", 2, "pipeline=2 virtual_pipeline=2"),
    Layout("expert 2", 2, "expert=2"),
    Layout("expert tensor 2", 2, "expert_tensor=2"),
    Layout("context 2, states", 2, "context=2"),
    Layout("context 2, heads", 2, "context=2 context_deltanet=heads"),
    Layout("context 2, recompute selective", 2, "context=2 recompute=selective"),
    Layout("pipeline 2, recompute full", 2, "pipeline=2 recompute=full"),
    Layout("bf16: data 2", 2, "", "bf16"),
    Layout("bf16: tensor 2 + sequence", 2, TP, "bf16"),
    Layout("bf16: pipeline 2", 2, "pipeline=2", "bf16"),
    Layout("bf16: context 2", 2, "context=2", "bf16"),
    Layout("tensor 2 x pipeline 2", 4, f"{TP} pipeline=2"),
    Layout("context 2 x tensor 2", 4, f"{TP} context=2"),
    Layout("context 2 x tensor 2, heads", 4, f"{TP} context=2 context_deltanet=heads"),
    Layout("context 4", 4, "context=4"),
    Layout("context 2 x data 2 x expert 4", 4, "context=2 expert=4"),
    Layout("tensor 2 x expert 2 x pipeline 2", 4, f"{TP} pipeline=2 expert=2"),
    Layout("tensor 2 x expert 2 x expert tensor 2", 4, f"{TP} expert=2 expert_tensor=2"),
    Layout("pipeline 4, embedding first, head and MTP last", 4, "pipeline=4 pipeline_layers=[0,2,2,0]"),
    Layout("pipeline 2 x virtual 2 x data 2", 4, "pipeline=2 virtual_pipeline=2"),
    Layout("pipeline 2 x context 2, recompute full", 4, "pipeline=2 context=2 recompute=full"),
    Layout("tensor 2 x pipeline 2 x context 2 x expert 2", 8, f"{TP} pipeline=2 context=2 expert=2"),
    Layout("tensor 2 x pipeline 2 x virtual 2 x context 2 x expert 2", 8, f"{TP} pipeline=2 virtual_pipeline=2 context=2 expert=2"),
]  # fmt: skip


def launch(world, cases, folder, timeout=600):
    """Run cases in one launch of `world` processes; each record is then at its `out`. Returns what was printed."""
    file = folder / f"cases-{world}.json"
    file.write_text(json.dumps(cases))
    worker = ["-m", "tests.support.layout_worker", str(file)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [sys.executable, *(torchrun if world > 1 else []), *worker],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def case(folder, config, name, words, start=None, fault=None):
    """One entry of a launch. `start` is the reference run whose checkpoint it goes on from."""
    run = folder / name.replace(" ", "-").replace(",", "").replace(":", "")
    run.mkdir()
    if start:
        step = f"iter_{FIRST:07d}"
        shutil.copytree(start / step, run / step)
        (run / "latest_checkpointed_iteration.txt").write_text(f"{FIRST}\n")
    words = [*words, f"checkpoint.folder={run}"]
    return {"name": name, "config": [str(config), *words], "fault": fault, "out": str(run / "record.pt"), "run": str(run)}


def compare(ours, theirs):
    """How far one run is from its reference: {what: largest difference}, relative but for what is counted.

    A gradient's difference is the norm of the difference over the norm; `zero gradients` counts tensors without any.
    """
    a, b = torch.load(ours["out"]), torch.load(theirs["out"])
    m, n = metrics(ours["run"]), metrics(theirs["run"])
    validation = [metrics(r["run"], "validation")[STEPS[-1]]["loss"] for r in (ours, theirs)]
    found = {
        "loss": max(_relative(m[s]["loss"], n[s]["loss"]) for s in STEPS),
        "MTP loss": max(_relative(m[s]["mtp_loss"], n[s]["mtp_loss"]) for s in STEPS),
        "validation loss": _relative(*validation),
        "gradient norm": max(_relative(m[s]["gradient_norm"], n[s]["gradient_norm"]) for s in STEPS),
        "expert loads": max(_moved(m[s]["expert_loads"], n[s]["expert_loads"]) for s in STEPS),
        "raw tokens": max(abs(m[s]["raw_tokens"] - n[s]["raw_tokens"]) for s in STEPS),
        "copies": a["copies"],
        "zero gradients": sum(int(not g.any()) for s in STEPS for g in a["gradients"][s].values()),
    }
    worst = {}
    for s in STEPS:
        x, y = a["gradients"][s], b["gradients"][s]
        assert x.keys() == y.keys(), sorted(x.keys() ^ y.keys())
        worst |= {f"{name} at step {s}": _distance(x[name], y[name]) for name in x}
    found["gradient"], found["gradient of"] = _largest(worst)
    x, y = a["parameters"], b["parameters"]
    assert x.keys() == y.keys(), sorted(x.keys() ^ y.keys())
    bias = [name for name in x if name.endswith("expert_bias")]
    found["router bias"] = max((float((x[name] - y[name]).abs().max()) for name in bias), default=0.0)
    found["parameter"], found["parameter of"] = _largest({k: _distance(x[k], y[k]) for k in x if k not in bias})
    return found


def _relative(a, b):
    return abs(a - b) / abs(b)


def _moved(a, b):
    """Positions that went to another expert."""
    return sum(abs(x - y) for p, q in zip(a or [], b or [], strict=True) for x, y in zip(p, q, strict=True))


def _distance(a, b):
    return float((a - b).norm() / b.norm())


def _largest(values):
    name = max(values, key=values.get)
    return values[name], name


# What a green cell keeps to, by precision. fp32: the order of sums differs, nothing else.
LIMITS = {
    "fp32": {
        "loss": 1e-5, "MTP loss": 1e-5, "validation loss": 1e-5, "gradient norm": 1e-4, "gradient": 1e-4, "parameter": 1e-4,
        "router bias": 1e-7, "expert loads": 0, "raw tokens": 0, "copies": 0, "zero gradients": 0,
    },
}  # fmt: skip


def violations(found, limits):
    """What exceeds its limit, as text; empty for a green cell."""
    return [
        f"{what}: {found[what]:.3g} > {limit:.3g}" + (f" ({found[f'{what} of']})" if f"{what} of" in found else "")
        for what, limit in limits.items()
        if not found[what] <= limit
    ]
