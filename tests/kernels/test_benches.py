"""The benches without a GPU: their proofs pass, their shapes and costs are whole, and nothing is timed here."""

import subprocess
import sys

import pytest
from boreal_kernels import launch
from tests.support.launch import ROOT

BENCH = ROOT / "kernels" / "bench"
sys.path.insert(0, str(BENCH))
from compiled import operations  # noqa: E402

sys.path.remove(str(BENCH))
BENCHES = operations()


@pytest.mark.parametrize("name", BENCHES)
def test_bench_is_whole_and_its_proof_passes(name, device):
    bench = BENCHES[name]
    bench.proof(device)
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
