"""The acceptance as `tools/gpu_acceptance.py` runs it: nothing is wrong, and what it is for was measured."""

import json
import subprocess
import sys

import pytest
from tests.support.launch import ROOT


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("acceptance")
    run = subprocess.run(
        [sys.executable, "tools/gpu_acceptance.py", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    print(run.stdout, run.stderr)
    assert run.stdout, run.stderr
    return json.loads((out / "acceptance.json").read_text())["rows"]


def test_nothing_is_wrong(rows):
    assert not [r for r in rows if r["status"] == "FAIL"]


@pytest.mark.parametrize("part", ["kernels", "parity", "throughput", "layer pair", "checkpoint", "loss"])
def test_every_part_measures(rows, part):
    assert [r for r in rows if r["part"] == part and r["measured"] is not None]
