"""Every kernel compiled for Hopper without one, and its registers, stack and shared memory against the recorded table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
OPERATIONS = sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))
OTHER_TRITON = "3.7.1"


def compiled(*options, **env):
    """Run `kernels/bench/compiled.py`, which compiles in a process that interprets nothing."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | env
    command = [sys.executable, str(BENCH / "compiled.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def test_first_variants_cost_what_the_table_says():
    run = compiled("--few")
    assert run.returncode == 0, run.stderr
    assert "at or below the recorded cost" in run.stderr


def test_growth_and_unrecorded_kernels_are_refused():
    sys.path.insert(0, str(BENCH))
    try:
        from compiled import problems
    finally:
        sys.path.remove(str(BENCH))
    recorded = {"a": {"registers": 64, "stack": 0, "shared": 1024}}
    assert problems({"a": {"registers": 60, "stack": 0, "shared": 1024}}, recorded) == []
    assert problems({"a": {"registers": 64, "stack": 8, "shared": 1024}}, recorded) == ["a: stack: found 8, recorded 0"]
    [line] = problems({"b": {"registers": 1, "stack": 0, "shared": 0}}, recorded)
    assert line.startswith("b: not recorded")


def test_every_operation_is_in_the_table():
    table = json.loads((BENCH / "compiled.json").read_text())
    assert len(table) == 2
    for part in table.values():
        for operation in OPERATIONS:
            assert any(label.startswith(f"{operation}: ") for label in part), operation


@pytest.mark.slow
def test_all_variants_cost_what_the_table_says():
    run = compiled()
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_all_variants_with_another_triton():
    """The other Triton's code through this Triton's newest assembler."""
    folder = ROOT / ".venv" / f"triton-{OTHER_TRITON}"
    if not (folder / "triton").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        install.append(f"triton=={OTHER_TRITON}")
        if subprocess.run(install).returncode:
            pytest.skip(" ".join(install))
    from triton import knobs

    assembler = knobs.nvidia.ptxas_blackwell.path
    run = compiled(PYTHONPATH=str(folder), TRITON_PTXAS_PATH=assembler)
    assert run.returncode == 0, run.stderr
