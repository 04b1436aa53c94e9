"""The sequence mixers on 2, 4 and 8 context-parallel ranks are the one-rank mixers: output and every gradient.

Relative norms of the difference, the largest over ranks; parameters' gradients are summed over ranks first. Chunks of
36 and 37 positions, random inputs and weights with fixed seeds. Measured: fp32 below 7e-7, bf16 below 1.2e-2.
"""

import json
import subprocess
import sys

import pytest
from tests.support.launch import ROOT, environment

SIZES = ("2", "4", "8")
FP32, BF16 = 3e-6, 3e-2


@pytest.fixture(scope="module")
def measured():
    """Ranks -> what `tests.support.context_worker.measure` found."""
    command = [sys.executable, "-m", "tests.support.context_worker", *SIZES]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def beyond(cases, limit):
    """What is not below a limit, worst first."""
    found = [(error, case, name) for case, errors in cases.items() for name, error in errors.items()]
    assert found
    return sorted((f for f in found if not f[0] < limit), reverse=True)


@pytest.mark.parametrize("size", SIZES)
def test_fp32_equals_one_rank(size, measured):
    """Documents that end on, or 1 to 3 positions beside, every border; that span chunks; that are 1 position long."""
    cases = measured[size]["fp32"]
    assert {case.split(":")[0] for case in cases} == {"attention", "state", "heads"}
    assert all({"out", "hidden"} < errors.keys() for errors in cases.values())
    assert not beyond(cases, FP32)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_equals_one_rank(size, measured):
    assert not beyond(measured[size]["bf16"], BF16)


def test_context_and_tensor_parallel_together(measured):
    """2 x 2 ranks, with sequence parallelism and without."""
    assert not beyond(measured["4"]["tensor"], FP32)


@pytest.mark.parametrize("size", SIZES)
def test_comparison_notices_what_it_should(size, measured):
    """A document reset that ranks forget on one border, and chunks that are zigzag halves, change everything."""
    for case, errors in measured[size]["controls"].items():
        assert min(errors.values()) > 0.1, case


@pytest.mark.parametrize("size", SIZES)
def test_selective_recomputation_changes_no_bit(size, measured):
    """Output and gradients are bit-equal; what attention keeps besides its inputs is small, DeltaNet's is not."""
    for kind, found in measured[size]["recompute"].items():
        assert found["different tensors"] == 0, kind
        assert found["kept bytes"] < (0.95 if kind == "attention" else 0.25), kind


@pytest.mark.parametrize("size", SIZES)
def test_nan_of_another_document_stays_there(size, measured):
    """A rank that holds NaN in one document hands nothing of it to the next document; of its own it does."""
    senders = int(size) - 1
    assert measured[size]["poison"] == {
        "inputs": 0,
        "inputs but one": 0,
        "inputs of one document": senders * 2 * 5,
        "state": 0,
        "state after one position": senders * 2 * 4 * 4,
        "state of one document": senders * 2 * 4 * 4,
    }
