"""SIGKILL at any moment of a save: the tracker's checkpoint is whole, nothing verified is lost, and the run ends as if
it had not been killed."""

import json
import random
import subprocess
import sys

import pytest
from tests.support.launch import ROOT, environment, write_config

# In turn, so that every few points see each way to save.
WAYS = (
    ["checkpoint.keep_last=1"],
    ["checkpoint.async_save=true", "checkpoint.keep_last=1"],
    ["checkpoint.async_save=true"],
)


def killed_runs(corpus, folder, points, seed):
    """Two ranks with experts over both, five steps over a phase switch, a save at every step."""
    config = write_config(
        folder / "config.yaml", corpus, folder / "run", parallel={"expert": 2}, evaluation={"every_steps": 1000, "windows": 2}
    )
    draw = random.Random(seed)
    kills = [{"at": draw.random(), "words": WAYS[number % len(WAYS)]} for number in range(points)]
    plan = {
        "world": 2,
        "config": [str(config), "checkpoint.every_steps=1"],
        "out": str(folder / "found.json"),
        "points": [{"at": None, "words": WAYS[1]}, *kills],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_worker", folder / "plan.json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads((folder / "found.json").read_text())


def check(found):
    whole, *killed = found
    assert whole["count"] > 100
    assert all(point["killed"] for point in killed)
    for point in killed:
        assert point["problems"] == [] and point["tracker"] >= point["announced"]
        assert point["digest"] == whole["digest"]
        # What the killed save left is gone.
        assert point["after"]["tracker"] == 5 and point["after"]["problems"] == []
        assert all(name[5:].isdigit() for name in point["after"]["folders"])
    return killed


def test_three_kills(corpus, tmp_path):
    check(killed_runs(corpus, tmp_path, 3, seed=1))


@pytest.mark.slow
def test_twenty_four_kills(corpus, tmp_path):
    killed = check(killed_runs(corpus, tmp_path, 24, seed=2))
    assert len({point["tracker"] for point in killed}) >= 4  # early and late in the run
    assert any(name.endswith(".partial") for point in killed for name in point["folders"])
