"""The layout bench: which layouts are run, against what, and how two runs are compared.

One BOREAL with every kind of half-block, packed documents of at most 150 tokens, 6 steps of 384 positions: 4 on bags
of 4, 2 on single tokens. One process makes the reference and a checkpoint after step 2; every layout goes on from that
checkpoint. fp32 unless the reference says otherwise; seed 1234.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass

import torch
from tests.support.launch import MODEL as SMALL
from tests.support.launch import ROOT, environment, metrics

FIRST, SWITCH, STEPS = 2, 4, 6  # the references' checkpoint, the other phase, the end

# What four pipeline stages, four ranks that share key heads, and four that share experts can divide.
MODEL = {
    **SMALL,
    "pattern": "*-GEG-*E / *-",
    "gdn": {**SMALL["gdn"], "key_heads": 4, "value_heads": 8},
    "moe": {**SMALL["moe"], "experts": 8},
}
RUN = {
    "model": MODEL,
    "micro_batch": 1,
    "phases": [
        {"name": "superposition", "until_steps": SWITCH, "bag_size": 4, "sequence": 96, "positions_per_step": 384},
        {"name": "recovery", "until_steps": STEPS, "sequence": 96, "positions_per_step": 384},
    ],
    "kernels": {"delta_rule": "torch", "others": "torch"},  # what a CPU takes, also where a device is imagined
}

# name -> overrides of the run that one process makes.
REFERENCES = {
    "fp32": [],
    "fp32, plain optimizer": ["optimizer.distributed=false"],
    "fp32, dense network": ["model.pattern=*-G-G-*- / *-"],
    "fp32, untied": ["model.tie_embeddings=false"],
    "fp32, odd vocabulary": ["model.vocab_size=641"],  # one row more than the tokenizer has ids: 768 with padding
    "bf16": ["precision=bf16"],
}


@dataclass(frozen=True)
class Layout:
    """A cell of the support table: a run on `world` processes with these overrides, against a reference.

    `start` is the step whose checkpoint it goes on from, 0 for none. `often` puts it into `make test`; `make test-all`
    has them all.
    """

    name: str
    world: int
    overrides: str
    reference: str = "fp32"
    start: int = FIRST
    often: bool = False

    def words(self):
        return [*REFERENCES[self.reference], *self.overrides.split()]


TP = "parallel.tensor=2 parallel.sequence_parallel=true"
PP, VPP, CP = "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.context=2"
HEADS, EP, ETP = "parallel.context_deltanet=heads", "parallel.expert=2", "parallel.expert_tensor=2"
GROUPED, OVERLAP = "kernels.experts=grouped_mm", "parallel.overlap=true"
NARROW = "optimizer.gradients=bf16"
LAYOUTS = [
    Layout("recompute selective", 1, "recompute=selective", often=True),
    Layout("recompute full", 1, "recompute=full"),
    Layout("data 2", 2, "", often=True),
    Layout("data 2, plain optimizer", 2, "", "fp32, plain optimizer", often=True),
    Layout("data 2, from nothing", 2, "", start=0),
    Layout("tensor 2 + sequence", 2, TP, often=True),
    Layout("tensor 2 + sequence, from nothing", 2, TP, start=0),
    Layout("tensor 2 + sequence, odd vocabulary", 2, TP, "fp32, odd vocabulary"),
    Layout("tensor 2 without sequence, dense", 2, "parallel.tensor=2", "fp32, dense network", often=True),
    Layout("pipeline 2", 2, PP, often=True),
    Layout("pipeline 2, from nothing", 2, PP, start=0),
    Layout("pipeline 2, untied head", 2, PP, "fp32, untied"),
    Layout("pipeline 2, uneven", 2, f"{PP} parallel.pipeline_layers=[1,3]"),
    Layout("pipeline 2, recompute full", 2, f"{PP} recompute=full"),
    Layout("pipeline 2 x virtual 2", 2, f"{PP} {VPP}", often=True),
    Layout("expert 2", 2, EP, often=True),
    Layout("expert 2, grouped experts, allgather", 2, f"{EP} {GROUPED} parallel.dispatcher=allgather"),
    Layout("expert 2 x tensor 2, grouped experts", 4, f"{EP} {ETP} {GROUPED}"),
    Layout("data 2, grouped experts, overlap", 2, f"{GROUPED} {OVERLAP}", often=True),
    Layout("data 2, plain optimizer, overlap", 2, OVERLAP, "fp32, plain optimizer"),
    Layout("pipeline 2 x virtual 2 x data 2, overlap", 4, f"{PP} {VPP} {OVERLAP}"),
    Layout("tensor 2 x pipeline 2 x data 2, untied, overlap", 8, f"{TP} {PP} {OVERLAP}", "fp32, untied"),
    Layout("expert tensor 2", 2, ETP),
    Layout("context 2", 2, CP, often=True),
    Layout("context 2, by heads", 2, f"{CP} {HEADS}"),
    Layout("context 2, recompute selective", 2, f"{CP} recompute=selective"),
    Layout("bf16: data 2", 2, "", "bf16"),
    Layout("bf16: tensor 2 + sequence", 2, TP, "bf16"),
    Layout("bf16: pipeline 2", 2, PP, "bf16"),
    Layout("bf16: context 2", 2, CP, "bf16"),
    Layout("bf16: data 2, bf16 gradients", 2, NARROW, "bf16"),
    Layout("bf16: tensor 2 + sequence, bf16 gradients, plain optimizer", 2, f"{TP} {NARROW} optimizer.distributed=false", "bf16"),
    Layout("bf16: pipeline 2 x data 2, bf16 gradients, overlap", 4, f"{PP} {NARROW} {OVERLAP}", "bf16"),
    Layout("tensor 2 x pipeline 2", 4, f"{TP} {PP}"),
    Layout("tensor 2 x context 2", 4, f"{TP} {CP}"),
    Layout("tensor 2 x context 2, by heads", 4, f"{TP} {CP} {HEADS}"),
    Layout("context 4", 4, "parallel.context=4"),
    Layout("context 2 x data 2, expert 4", 4, f"{CP} parallel.expert=4"),
    Layout("tensor 2 x pipeline 2, expert 2", 4, f"{TP} {PP} {EP}", often=True),
    Layout("tensor 2 x data 2, expert 2 x tensor 2", 4, f"{TP} {EP} {ETP}"),
    Layout("pipeline 4: embedding first, head and MTP last", 4, "parallel.pipeline=4 parallel.pipeline_layers=[0,2,2,0]"),
    Layout("pipeline 2 x virtual 2 x data 2", 4, f"{PP} {VPP}"),
    Layout("pipeline 2 x context 2, recompute full", 4, f"{PP} {CP} recompute=full"),
    Layout("tensor 2 x pipeline 2 x context 2, expert 2", 8, f"{TP} {PP} {CP} {EP}"),
    Layout("tensor 2 x pipeline 2 x virtual 2 x context 2, expert 2", 8, f"{TP} {PP} {VPP} {CP} {EP}"),
]  # fmt: skip
BY_NAME = {layout.name: layout for layout in LAYOUTS}

# (who writes the checkpoint, who goes on from it), by cell. `make test` goes once around the first ring, `make test-all`
# also around all FP32 cells of the same network and all bf16 cells.
SOON = ["tensor 2 + sequence", "pipeline 2", "data 2, plain optimizer", "context 2"]
SAME = [c.name for c in LAYOUTS if c.start and c.reference in ("fp32", "fp32, plain optimizer")]
BF16 = [c.name for c in LAYOUTS if c.reference == "bf16"]
RESHARDS = {pair: ring is SOON for ring in (BF16, SAME, SOON) for pair in zip(ring, ring[1:] + ring[:1], strict=True)}

# fault of tests/support/faults.py -> (the layout it is put into, what has to exceed its limit).
FAULTY = {
    "no_sequence_parallel_sum": ("tensor 2 + sequence", {"gradient", "copies"}),
    "tiled_heads": ("tensor 2 + sequence", {"loss", "gradient"}),
    "mtp_normalised_per_rank": ("context 2", {"gradient"}),
    "batched_p2p": ("pipeline 2 x virtual 2", {"loss", "gradient"}),
    "router_bias_not_reduced": ("data 2", {"router bias"}),
    "zigzag_rows": ("context 2", {"loss", "gradient"}),
    "documents_forgotten_on_later_stages": ("pipeline 2", {"loss", "gradient"}),
}


def launch(plan, folder, timeout, devices=()):
    """Run [(world, cases)] in one program; each record is then at its case's `out`. Returns what was printed.

    `devices`: the module that runs the program on devices that are not here, or nothing.
    """
    file = folder / "plan.json"
    file.write_text(json.dumps([{"world": world, "cases": cases} for world, cases in plan]))
    done = subprocess.run(
        [sys.executable, "-m", *devices, "tests.support.layout_worker", str(file)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    return done.stdout


def case(folder, config, name, words, source=None, start=0, every=STEPS, fault=None):
    """One entry of a launch; with `start` it goes on from that step's checkpoint of an earlier case."""
    run = folder / "".join(c if c.isalnum() else "-" for c in f"{name} {fault or ''}".strip())
    words = [*words, f"checkpoint.folder={run}", f"checkpoint.every_steps={every}"]
    return {
        "name": name, "config": [str(config), *words], "fault": fault, "out": str(run / "record.pt"), "run": str(run),
        "source": source and source["run"], "start": start,
    }  # fmt: skip


def compare(ours, theirs, start):
    """How far one run is from its reference after step `start`: {what: largest difference}, relative but for counts.

    A gradient's difference is the norm of the difference over the norm, of the worst tensor and of `all gradients`
    together; `zero gradients` counts tensors without any; `expert loads` counts positions that went to another expert;
    `copies` is the largest difference between two ranks' copies of one tensor; `samples` counts steps that read other
    windows, or one twice.
    """
    steps = range(start + 1, STEPS + 1)
    a, b = torch.load(ours["out"]), torch.load(theirs["out"])
    m, n = metrics(ours["run"]), metrics(theirs["run"])
    validation = [metrics(r["run"], "validation")[STEPS]["loss"] for r in (ours, theirs)]
    found = {
        "loss": max(_relative(m[s]["loss"], n[s]["loss"]) for s in steps),
        "MTP loss": max(_relative(m[s]["mtp_loss"], n[s]["mtp_loss"]) for s in steps),
        "validation loss": _relative(*validation),
        "gradient norm": max(_relative(m[s]["gradient_norm"], n[s]["gradient_norm"]) for s in steps),
        "expert loads": max(_moved(m[s].get("expert_loads"), n[s].get("expert_loads")) for s in steps),
        "raw tokens": max(abs(m[s]["raw_tokens"] - n[s]["raw_tokens"]) for s in steps),
        "copies": a["copies"],
        "samples": sum(int(a["samples"][s] != b["samples"][s]) for s in steps),
        "zero gradients": sum(int(not g.any()) for s in steps for g in a["gradients"][s].values()),
    }
    worst, whole = {}, []
    for s in steps:
        x, y = a["gradients"][s], b["gradients"][s]
        assert x.keys() == y.keys(), sorted(x.keys() ^ y.keys())
        worst |= {f"{name} at step {s}": _distance(x[name], y[name]) for name in x}
        whole.append(_distance(*(torch.cat([g[name].flatten() for name in x]) for g in (x, y))))
    found["gradient"], found["gradient of"] = _largest(worst)
    found["all gradients"] = max(whole)
    x, y = a["parameters"], b["parameters"]
    assert x.keys() == y.keys(), sorted(x.keys() ^ y.keys())
    bias = [name for name in x if name.endswith("expert_bias")]
    found["router bias"] = max((float((x[name] - y[name]).abs().max()) for name in bias), default=0.0)
    found["parameter"], found["parameter of"] = _largest({k: _distance(x[k], y[k]) for k in x if k not in bias})
    return found


def _relative(a, b):
    return _number(abs(a - b) / abs(b))


def _moved(a, b):
    """Positions that went to another expert."""
    return sum(abs(x - y) for p, q in zip(a or [], b or [], strict=True) for x, y in zip(p, q, strict=True))


def _distance(a, b):
    return _number(float((a - b).norm() / b.norm()))


def _number(difference):
    """NaN is as far as can be: max() would pass over it."""
    return math.inf if math.isnan(difference) else difference


def _largest(values):
    name = max(values, key=values.get)
    return values[name], name


# What a green cell keeps to, by precision. fp32: only the order of sums differs. bf16: every layout rounds its own
# partial sums to 8 bits (even two stages do: autograd adds up a tied weight's gradients in bf16 on one rank, and
# megatron-core in FP32 across two), and a few dozen choices of an expert flip, which one router's gradient feels most.
LIMITS = {
    "fp32": {
        "loss": 1e-5, "MTP loss": 1e-5, "validation loss": 1e-5, "gradient norm": 1e-4, "gradient": 1e-4,
        "all gradients": 1e-4, "parameter": 1e-4, "router bias": 1e-7, "expert loads": 0, "raw tokens": 0, "copies": 0,
        "samples": 0, "zero gradients": 0,
    },
    "bf16": {
        "loss": 1e-3, "MTP loss": 1e-3, "validation loss": 1e-3, "gradient norm": 1e-2, "gradient": 0.5,
        "all gradients": 0.05, "parameter": 0.1, "raw tokens": 0, "copies": 0, "samples": 0,
        "zero gradients": 0,
    },
}  # fmt: skip


def limits(layout):
    return LIMITS["bf16" if layout.reference == "bf16" else "fp32"]


def violations(found, limits):
    """What exceeds its limit, with a text; empty for a green cell."""
    return {
        what: f"{found[what]:.3g} > {limit:.3g}" + (f" ({found[f'{what} of']})" if f"{what} of" in found else "")
        for what, limit in limits.items()
        if not found[what] <= limit
    }
