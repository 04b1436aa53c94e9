"""`boreal preflight` on two gloo ranks: a sound launch passes, every fault put into rank 1 is found and is named, and a
rank that hangs or is not there is named instead of waited for."""

import json
import subprocess
import sys

import pytest
from boreal_megatron.config.load import dump
from tests.support.configs import config_for, tiny_model
from tests.support.launch import ROOT, boreal, environment

# (check, beginning of the name) -> (the rank whose row fails, what it says). Rank 0 receives rank 1's wrong number.
FAULTS = {
    ("kernels", "gated_delta_rule"): (1, "gradient of v off by 1"),
    ("speed", "matrix product"): (1, "TFLOP/s"),
    ("speed", "memory copy"): (1, "GB/s"),
    ("network", "all-to-all over world: numbers"): (0, "1 wrong numbers from rank 1"),
    ("storage", "write, read, compare"): (1, "No space left on device"),
    ("versions", "triton"): (1, "3.6.0"),
    ("versions", "zstandard"): (1, "not installed"),
    ("configuration", "resolved configuration"): (1, ""),
    ("clock", "clock"): (1, "7e+03 s"),
    ("memory", "memory"): (1, "RuntimeError: memory is not what it was"),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """{fault: (exit codes of both ranks, what rank 0 printed)}."""
    folder = tmp_path_factory.mktemp("preflight")
    config = config_for(tiny_model(), checkpoint={"folder": str(folder / "run")})
    dump(config, folder / "run.yaml")
    words = {
        None: ["parallel.tensor=2", "parallel.sequence_parallel=true", "precision=bf16"],
        "everything": ["--json", "parallel.expert=2"],
        "hang": ["--json", "--timeout", "15"],
        "absent": ["--timeout", "4"],
    }
    cases = [
        {"words": [str(folder / "run.yaml"), *more], "fault": fault, "out": str(folder / f"{fault}.txt")}
        for fault, more in words.items()
    ]
    plan = [cases[:1], cases[1:2], cases[2:]]  # nobody else runs while speeds are compared
    (folder / "plan.json").write_text(json.dumps(plan))
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.preflight_worker", str(folder / "plan.json")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    codes = json.loads(run.stdout.splitlines()[-1])
    left = [path.name for path in (folder / "run").iterdir()]
    found = {case["fault"]: (code, open(case["out"]).read()) for case, code in zip(cases, codes, strict=True)}
    print(run.stderr[-2000:])
    return found | {"left": left}


def test_a_sound_launch_passes(launches):
    codes, text = launches[None]
    assert codes == [0, 0] and "FAIL" not in text and text.rstrip().endswith("preflight: nothing failed"), text
    for name in (
        "gated_delta_rule (torch)",
        "experts",
        "all-reduce over world",
        "one folder for all ranks",
        "matrix product",
    ):
        (line,) = [line for line in text.splitlines() if f" {name}  " in line and "rate" not in line][:1]
        assert line.endswith("all 2 ranks"), line
    assert launches["left"] == []  # of the storage probes


def test_every_fault_is_found_and_named(launches):
    codes, text = launches["everything"]
    found = json.loads(text)
    assert codes == [1, 1] and found["ok"] is False
    failed = [row for row in found["rows"] if row["status"] == "FAIL"]
    for (check, name), (rank, says) in FAULTS.items():
        rows = [r for r in failed if r["check"] == check and r["name"].startswith(name)]
        assert [r["rank"] for r in rows] == [rank], (name, rows)
        assert says in rows[0]["measured"] and rows[0]["host"] and rows[0]["expected"], rows[0]
    beyond = [r for r in failed if not any(r["check"] == c and r["name"].startswith(n) for c, n in FAULTS)]
    assert not beyond


def test_a_rank_that_hangs_is_named(launches):
    codes, text = launches["hang"]
    silent = {r["rank"]: r for r in json.loads(text)["rows"] if r["check"] == "silence"}
    assert codes == [1, None]
    assert silent[1]["status"] == "FAIL" and "in: components" in silent[1]["measured"]
    assert silent.get(0, {"status": "note"})["status"] == "note"  # it waits for rank 1


def test_a_rank_that_never_comes_is_named(launches):
    codes, text = launches["absent"]
    (line,) = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert codes == [1, None]
    assert "rank 1 (host unknown)" in line and "in: starting" in line


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    dump(config_for(tiny_model(), checkpoint={"folder": str(tmp_path / "run")}), tmp_path / "run.yaml")
    assert "preflight: nothing failed" in boreal(2, "preflight", tmp_path / "run.yaml")
