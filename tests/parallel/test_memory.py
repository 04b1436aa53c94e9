"""Planned activations beside those alive on real ranks, cut in every way; sizes that no formula was written beside."""

import json
import subprocess
import sys

import pytest
from boreal_megatron.plan import activations, memory
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT, environment

MODEL = {
    "vocab_size": 600,
    "hidden_size": 96,
    "ffn_hidden_size": 176,
    "attention": {"heads": 8, "kv_heads": 4, "head_dim": 20, "rope_fraction": 0.5, "rope_theta": 1e4},
    "gdn": {"key_heads": 8, "value_heads": 16, "head_dim": 12},
    "moe": {"experts": 8, "top_k": 2, "expert_hidden_size": 52, "shared_hidden_size": 36},
}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
CASES = {  # pattern, layout, micro-batches, changes
    "pipeline": ("*-GE*-G-/*-", {"pipeline": 2}, 3, {}),
    "interleaved": ("*-GE*-G-/*-", {"pipeline": 2, "virtual_pipeline": 2}, 4, {}),
    "tensor, sequence, expert": ("*-GE*-/*-", SEQUENCE | {"expert": 2}, 1, {}),
}
SLOW = {
    "uneven pipeline, FP32": ("*-GE*-G-", {"pipeline": 2, "pipeline_layers": (3, 1)}, 4, {"precision": "fp32"}),
    "pipeline, full": ("*-GE*-G-/*-", {"pipeline": 2}, 3, {"recompute": "full"}),
    "pipeline, selective": ("*-GE*-G-/*-", {"pipeline": 2}, 2, {"recompute": "selective"}),
    "interleaved, FP32": ("*-GE*-G-", {"pipeline": 2, "virtual_pipeline": 2}, 2, {"precision": "fp32"}),
    "tensor": ("*-G-G-*-", {"tensor": 2}, 1, {}),
    "tensor, sequence, FP32, full": ("*-GE*-", SEQUENCE, 1, {"precision": "fp32", "recompute": "full"}),
    "tensor, sequence, selective": ("*-GE*-", SEQUENCE | {"expert": 2}, 1, {"recompute": "selective"}),
    "expert tensor": ("*-GE*E", SEQUENCE | {"expert_tensor": 2}, 1, {}),
    "expert": ("GE*E", {"expert": 2}, 1, {}),
    "context by state": ("*-GEG-", {"context": 2}, 1, {}),
    "context by heads": ("*-GE*-", {"context": 2, "context_deltanet": "heads"}, 1, {}),
}
RANKS = 2


def planned_and_measured(cases, folder):
    """[(name, rank, planned bytes, measured bytes)] of all cases, each on RANKS processes."""
    configs = {}
    for name, (pattern, cut, count, changes) in cases.items():
        data = RANKS // (cut.get("tensor", 1) * cut.get("pipeline", 1) * cut.get("context", 1))
        phase = dict(name="only", until_steps=4, sequence=160, positions_per_step=160 * count * data, bag_size=2)
        values = dict(precision="bf16", phases=[phase], parallel=cut) | changes
        configs[name] = config_for(tiny_model(**MODEL, pattern=pattern), **values)
    plan = folder / "plan.json"
    plan.write_text(json.dumps([config.model_dump(mode="json", exclude_none=True) for config in configs.values()]))
    words = [sys.executable, "-m", "tests.support.memory_worker", str(RANKS), str(plan), str(folder / "out")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for number, (name, config) in enumerate(configs.items()):
        stages = memory.per_rank(config, RANKS, kernels=activations.CPU, imbalance=1.0)["stages"]
        for rank in range(RANKS):
            (measured,) = json.loads((folder / f"out.{number}.{rank}").read_text())
            found.append((name, rank, stages[rank * len(stages) // RANKS]["peak"], measured["peak"]))
    return found


def assert_close(found):
    wrong = [
        f"{name}, rank {rank}: {mine / real - 1:+.1%}"
        for name, rank, mine, real in found
        if abs(mine / real - 1) > 0.05
    ]
    assert not wrong, wrong


def test_activations_of_real_ranks(tmp_path):
    assert_close(planned_and_measured(CASES, tmp_path))


@pytest.mark.slow
def test_activations_of_more_layouts(tmp_path):
    assert_close(planned_and_measured(SLOW, tmp_path))
