"""The benches without a GPU: their proofs pass, their shapes and costs are whole, and nothing is timed here."""

import json
import subprocess
import sys

import pytest
from boreal_kernels import launch
from tests.support.launch import ROOT

BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))
from compiled import operations  # noqa: E402

BENCHES = operations()
sys.path.remove(str(BENCH))


SOON = ("bag_embedding", "gated_rmsnorm")  # 20 s of interpreted kernels each for the others


@pytest.mark.parametrize("name", [n if n in SOON else pytest.param(n, marks=pytest.mark.slow) for n in BENCHES])
def test_proof_passes(name, device):
    BENCHES[name].proof(device)


@pytest.mark.parametrize("name", BENCHES)
def test_bench_is_whole(name):
    bench = BENCHES[name]
    for shape in bench.SHAPES.values():
        cost = bench.cost(**shape)
        assert set(cost) == {"forward", "backward"}
        assert all(moved > 0 and flops >= 0 for moved, flops in cost.values())
    assert callable(bench.rivals()["torch"])
    for kernel, (direction, candidates) in bench.CANDIDATES.items():
        assert direction in cost
        recorded = launch.read()["default"][kernel]
        assert all(entry["use"].keys() == use.keys() for entry in recorded for use in candidates), kernel


@pytest.mark.parametrize("script", ["run.py", "tune.py"])
def test_nothing_is_timed_without_a_gpu(script):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, str(BENCH / script), "--all"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == "" and run.stderr.startswith("No CUDA device: nothing to")


def test_mixers_that_cannot_run_here_say_why():
    words = ["--preset", "tiny", "--positions", "64", "--documents", "2", "--repeat", "1", "--json"]
    run = subprocess.run([sys.executable, str(ROOT / "tools" / "bench_mixer.py"), *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["mixer"]: row for row in json.loads(run.stdout)["rows"]}
    assert rows["boreal, torch"]["ms"] > 0
    assert "flash" in rows["megatron-core"].get("why_not", "flash") or rows["megatron-core"]["ms"] > 0
    if rows["boreal, triton"].get("why_not"):
        assert rows["boreal, triton"]["why_not"].startswith("kernels.delta_rule: gated_delta_rule: backend 'triton'")
