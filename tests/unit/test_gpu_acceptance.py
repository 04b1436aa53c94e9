"""The GPU acceptance on a CPU, at a small size: every part runs, finds what it is for, and invents nothing."""

import importlib.util
import json
import sys

import pytest
import torch
from boreal_megatron.acceptance import parts as acceptance, rows as rows_of
from tests.support.configs import TINY
from tests.support.launch import ROOT

MODEL = TINY | {"vocab_size": 384}
SMALL = acceptance.Scale(
    model=MODEL, wide=MODEL | {"pattern": "*-GE"}, sequence=64, windows=2, warmup=1, steps=2, curve=12, parity=48
)
NEEDS_CUDA = ("peak memory", "MFU")


@pytest.fixture(scope="module")
def bench(mesh, tmp_path_factory):
    return acceptance.Bench.here(SMALL, mesh, tmp_path_factory.mktemp("acceptance"))


@pytest.fixture(scope="module")
def rows(bench):
    """{part: its rows}, of all parts in their order."""
    return {name: list(run(bench)) for name, run in acceptance.RUN.items()}


def of(rows, what):
    (found,) = [r for r in rows if r["what"] == what]
    return found


def test_nothing_fails_and_what_was_not_measured_has_a_reason(rows):
    for name, found in rows.items():
        assert found, name
        assert not [r for r in found if r["status"] == rows_of.FAIL], name
        for r in found:
            assert (r["measured"] is None) == (r["status"] == rows_of.UNMEASURED)
            assert r["measured"] is not None or r["why"], r


def test_speed_is_that_of_the_steps(rows):
    for bag in acceptance.BAGS:
        what = f"bf16, bags of {bag}"
        positions, raw = of(rows["bf16"], f"{what}: positions"), of(rows["bf16"], f"{what}: raw tokens")
        assert raw["measured"] == bag * positions["measured"] > 0
        assert positions["status"] == rows_of.NOTE  # a CPU is held to no goal
        assert of(rows["bf16"], f"{what}: planned memory")["measured"] > 0
        assert 0 < of(rows["bf16"], f"{what}: share of gdn")["measured"] < 100
        for name in NEEDS_CUDA:
            (r,) = [r for r in rows["bf16"] if r["what"].startswith(f"{what}: {name}")]
            assert r["status"] == rows_of.UNMEASURED
    assert of(rows["wide"], "bf16, all experts on one GPU: positions")["measured"] > 0


def test_parity_is_each_half_blocks_own(bench, rows, monkeypatch):
    """bf16 differs from FP32 by rounding, and not by nothing; a wrong weight is the error of its half-block alone."""
    names = [f"{number} {letter}" for number, letter in enumerate(TINY["pattern"].split("/")[0].strip())]
    for name in names:
        exact, rounded = (of(rows["parity"], f"{p}: half-block {name}")["errors"] for p in ("fp32", "bf16"))
        assert max(exact.values()) < 1e-5 and 1e-3 < rounded["weights"] < 0.02, name
    build = acceptance.boreal.build

    def wrong(settings, mesh):
        chunks = build(settings, mesh)
        with torch.no_grad():
            chunks[0].decoder.layers[2].self_attention.A_log.add_(1.0)
        return chunks

    monkeypatch.setattr(acceptance.boreal, "build", wrong)
    failed = [
        r["what"] for r in acceptance.parity(bench) if r["status"] == rows_of.FAIL and r["what"].startswith("fp32")
    ]
    assert failed[0] == "fp32: half-block 2 G" and not any("half-block" in what for what in failed[1:])


def test_losses_fall_and_checkpoints_are_verified(rows):
    curve = of(rows["loss"], "bf16: last steps")["curve"]
    assert len(curve) == SMALL.curve and curve[-1] < curve[0] - 0.2
    stood = of(rows["checkpoint"], "later save: training stood still")["measured"]
    assert 0 < stood <= of(rows["checkpoint"], "later save: written and verified after")["measured"]


def test_the_tool_reports_parts_that_run_that_crash_and_that_have_no_time(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("gpu_acceptance", ROOT / "tools" / "gpu_acceptance.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "PARTS", {"kernels": rows_of.Part(60), "unheard-of": rows_of.Part(60)})

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--out", str(tmp_path), *more])
        code = tool.main()
        assert capsys.readouterr().out == (tmp_path / "acceptance.md").read_text()
        return code, json.loads((tmp_path / "acceptance.json").read_text())["rows"]

    code, found = run()
    (crashed,) = [r for r in found if r["status"] == rows_of.FAIL]
    assert code == 1 and crashed["part"] == "unheard-of" and "exit code 2" in crashed["why"]
    assert sum(r["part"] == "kernels" for r in found) >= 5  # proofs, here "not measured"
    code, found = run("--minutes", "0", "--only", "kernels")
    assert code == 0 and [r["status"] for r in found] == [rows_of.UNMEASURED] and "no time" in found[0]["why"]
