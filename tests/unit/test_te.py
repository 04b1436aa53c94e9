"""Transformer Engine's modules on the meta device, where they are installed: a Hopper is imagined (`platform/meta.py`),
nothing is computed. Names, shapes, shards and dtypes in checkpoints are those of plain modules; what `config/fp8.py`
says is in FP8 is what Transformer Engine's linears hold. Without it, as in CI, these are passed over."""

import importlib.util
import json

import pytest
from tests.support.launch import ROOT, boreal
from tests.unit.test_dry_run import EVERYTHING, answer, python, write

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)

# Both networks of a configuration, then what differs between them and between TE's linears and the table of FP8.
COMPARE = """
import json, sys
import torch
from boreal_megatron import dry_run as d, parallel, platform
from boreal_megatron.config import fp8
from boreal_megatron.config.load import load
from boreal_megatron.config.schema import Parallel
from boreal_megatron.log import quiet
from megatron.core.dist_checkpointing.dict_utils import nested_values

quiet()
platform.imagine()
PLAIN = ["kernels.linears=local", "kernels.attention=sdpa", "kernels.experts=sequential", "precision.fp8=null"]

def build(words):
    config = load(sys.argv[1:2], [*sys.argv[2:], *words]).model_copy(update={"parallel": Parallel()})
    _, mesh = d._become(0, 1, config)
    chunks = d.boreal.build(config, mesh)
    pieces = [[*p[:4], str(s.data.dtype)] for p, s in zip(d._pieces(chunks, mesh), d.init.shards(chunks[0], mesh))]
    saved = chunks[0].sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})
    parallel.stop()
    return config, chunks[0], sorted(pieces), saved

_, _, plain, _ = build(PLAIN)
found = {}
for experts in ("grouped_mm", "te"):
    config, model, pieces, saved = build(["kernels.linears=te", "kernels.attention=te", "kernels.experts=" + experts])
    keys = {id(entry.data): entry.key for entry in nested_values(saved)}
    te = {id(p) for m in model.modules() if type(m).__name__.startswith("TE") for n, p in m.named_parameters(recurse=False)
          if "layer_norm" not in n}
    weights = [i for i in keys if not keys[i].endswith(("_extra_state", "expert_bias"))]
    wrong = [keys[i] for i in weights if (i in te) != (fp8.row_of(config, keys[i]).precision == fp8.FP8)]
    settings = model.config
    found[experts] = {
        "same": pieces == plain, "tensors": len(plain), "wrong": wrong, "in te": len(te),
        "bf16 ends": [settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16]
        if settings.first_last_layers_bf16 else None,
        "grouped": sum(type(m).__name__ == "TEGroupedMLP" for m in model.modules()),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("name, words", [
    ("tiny_cpu", ["model.gdn.value_heads=8", "precision.fp8=tensorwise"]),
    pytest.param("boreal_250m", ["precision.fp8=delayed"], marks=pytest.mark.slow),
    pytest.param("boreal_10b_moe", ["precision.fp8=blockwise"], marks=pytest.mark.slow),
])  # fmt: skip
def test_checkpoint_names_shapes_and_dtypes_are_those_of_plain_modules(name, words):
    if "delayed" in words[-1]:  # experts=te is refused with it by `boreal check`; this network has none
        assert name == "boreal_250m"
    found = answer(python(COMPARE, ROOT / f"examples/configs/{name}.yaml", *words))
    for experts, got in found.items():
        assert got["same"] and got["tensors"] > 50, (experts, got)
        assert got["wrong"] == [] and got["in te"] > 20, (experts, got)
        assert got["bf16 ends"] == (None if "delayed" in words[-1] else [2, 2])
    assert found["te"]["grouped"] == {"tiny_cpu": 2, "boreal_250m": 0, "boreal_10b_moe": 10}[name]
    assert found["grouped_mm"]["grouped"] == 0


def test_every_stage_of_every_axis(tmp_path):
    """All classes of 16 ranks under every kind of parallelism: their pieces are the network, as plain modules' are."""
    config = write(tmp_path / "config.yaml", EVERYTHING, kernels={"linears": "te", "experts": "te"})
    found = json.loads(boreal(1, "check", config, "--world", 16, "--dry-run", "--json"))
    assert found["classes"] == 8 and [s["layers"] for s in found["stages"]] == [["*-", "G-"], ["GE", "*E/*-"]]


# A linear on the CPU that pretends to have been in FP8: what it remembers goes into a checkpoint and comes back.
REMEMBER = """
import json
import torch
from boreal_megatron import compat, platform
platform.current().setup()
compat.apply()
from boreal_megatron.platform import meta
meta._gpu()
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

def linear():
    return te.Linear(16, 16, bias=False, device="cpu", init_method=lambda w: None)

first, second = linear(), linear()
empty = first.get_extra_state().numel()
first.fp8_meta["recipe"], first.fp8 = Float8CurrentScaling(), True
stateless = first.get_extra_state().numel()
first.fp8_meta |= {"recipe": DelayedScaling(amax_history_len=4), "num_gemms": 1}
first.init_fp8_meta_tensors(first.fp8_meta["recipe"])
for side in ("scaling_fwd", "scaling_bwd"):
    first.fp8_meta[side].scale.uniform_()
    first.fp8_meta[side].amax_history.uniform_()
second.load_state_dict(first.state_dict())
same = [torch.equal(getattr(first.fp8_meta[s], n), getattr(second.fp8_meta[s], n))
        for s in ("scaling_fwd", "scaling_bwd") for n in ("scale", "amax_history")]
pickled = b"recipe" in first.get_extra_state().numpy().tobytes()
print(json.dumps([empty, stateless, same, pickled]))
"""


def test_delayed_scaling_comes_back_without_a_pickle():
    assert answer(python(REMEMBER)) == [0, 0, [True] * 4, False]
