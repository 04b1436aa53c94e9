"""The launch examples as far as one machine without Slurm can tell: what they start, with what, and what comes after.

`srun` and `scontrol` are stubs that write down how they were called; torchrun's own parser and `boreal check` judge it.
"""

import os
import re
import shlex
import subprocess

import pytest
from tests.support.launch import ROOT

from boreal_megatron.config import check, load

SLURM = ROOT / "examples/slurm"
README = (SLURM / "README.md").read_text()
SCRIPTS = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
JOBS = {"one_node.sbatch": 8, "two_nodes.sbatch": 16, "32_nodes.sbatch": 256, "64_nodes.sbatch": 512}  # the world of each

STUBS = {
    # A run of NEW_STEP steps, if it says so, that ends with CODE.
    "srun": """printf '%s\\n' "$@" > "$RECORD/srun"; env > "$RECORD/environment"
        run=$(printf '%s\\n' "$@" | sed -n 's/^checkpoint.folder=//p')
        [ -z "$NEW_STEP" ] || echo "$NEW_STEP" > "$run/latest_checkpointed_iteration.txt"; exit "$CODE" """,
    "scontrol": """[ "$1 $2" = "show hostnames" ] && { printf 'node07\\nnode08\\n'; exit; }
        echo "$@" >> "$RECORD/scontrol" """,
}


def headers(job):
    """The `#SBATCH --name=value` lines of a job; True for those without a value."""
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(.+))?$", (SLURM / job).read_text(), re.MULTILINE)
    return {name: value or True for name, value in options}


@pytest.fixture
def submit(tmp_path):
    """Run a job as Slurm would, on the first node, from a folder that has the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    record, stubs = tmp_path / "record", tmp_path / "stubs"
    record.mkdir(), stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}\n")
        (stubs / name).chmod(0o755)

    def run(job, *overrides, code=0, new_step=""):
        asked = headers(job)
        slurm = {
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_JOB_ID": "4200123",
            "SLURM_NNODES": asked["nodes"],
            "SLURM_GPUS_ON_NODE": asked["gpus-per-node"],
            "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
        }
        environment = {
            "PATH": f"{stubs}:{os.environ['PATH']}", "USER": "somebody", "HOME": str(tmp_path), "RECORD": str(record),
            "CODE": str(code), "NEW_STEP": new_step, **slurm,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", SLURM / job, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        said = {file.name: file.read_text().splitlines() for file in record.iterdir()}
        return done, said.get("srun"), said.get("scontrol", []), said.get("environment", [])

    return run


def torchrun_and_words(command):
    """A torchrun command, read by torchrun's own parser: (its options, the words after `boreal train`)."""
    from torch.distributed.run import parse_args

    options = parse_args(command)
    assert options.module and options.training_script == "boreal_megatron"
    assert options.training_script_args[0] == "train"
    return options, options.training_script_args[1:]


def problems(words, world):
    config = load.load([ROOT / w for w in words if "=" not in w], [w for w in words if "=" in w])
    return check.problems(config, world)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_short(script):
    """bash reads every script, and each fits on one screen."""
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) < 60


@pytest.mark.parametrize("job, world", JOBS.items())
def test_job_starts_torchrun_for_its_nodes_and_configuration(submit, job, world):
    """One agent a node, a process a GPU, one rendezvous; the configuration fits the world that the headers ask for."""
    done, srun, scontrol, environment = submit(job, "seed=7")
    assert done.returncode == 0 and not scontrol, done.stderr
    agent = srun.index(".venv/bin/torchrun")
    assert {"--ntasks-per-node=1", "--cpus-per-task=64", "--kill-on-bad-exit=1"} <= set(srun[:agent])
    options, words = torchrun_and_words(srun[agent + 1 :])
    nodes, gpus = int(options.nnodes), int(options.nproc_per_node)
    assert (nodes, gpus, nodes * gpus) == (int(headers(job)["nodes"]), 8, world)
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node07:20123", "4200123")
    run = f"runs/{headers(job)['job-name']}"
    assert [word for word in words if not word.endswith(".yaml")] == ["seed=7", f"checkpoint.folder={run}"]
    assert problems(words, world) == []
    assert f"TORCH_FR_DUMP_TEMP_FILE={run}/flight_recorder/rank_" in environment
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment


@pytest.mark.parametrize(
    "code, new_step, expect, queued", [(0, "500", 0, False), (1, "500", 0, True), (134, "", 1, False)]
)
def test_job_is_queued_again_only_after_a_new_checkpoint(submit, code, new_step, expect, queued):
    """Finished; stopped by a signal or a fault after a checkpoint; failed without one, which would only fail again."""
    done, _, scontrol, _ = submit("two_nodes.sbatch", code=code, new_step=new_step)
    assert done.returncode == expect, done.stderr
    assert scontrol == (["requeue 4200123"] if queued else [])


def test_a_resumed_job_without_progress_is_not_queued_again(submit, tmp_path):
    """The checkpoint that the job found when it started is no progress."""
    submit("one_node.sbatch", code=1, new_step="500")
    (tmp_path / "record/scontrol").unlink()
    done, _, scontrol, _ = submit("one_node.sbatch", code=1)
    assert done.returncode == 1 and not scontrol
    assert "the last is of step 500" in done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_job_leaves_time_to_save(job):
    """torchrun's patience ends before Slurm's, Slurm warns all steps, the job may return and its log is kept."""
    asked = headers(job)
    seconds = re.fullmatch(r"TERM@(\d+)", asked["signal"])
    patience = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", (SLURM / "environment.sh").read_text())
    assert 30 < int(patience[1]) < int(seconds[1])
    assert asked["requeue"] is True and asked["open-mode"] == "append" and asked["ntasks-per-node"] == "1"


def test_every_variable_has_its_row():
    """Set, commented out or read in a script: one row each in the README, and no row without a variable."""
    text = "\n".join(path.read_text() for path in SCRIPTS)
    used = set(re.findall(r"export ([A-Z][A-Z0-9_]+)=", text)) | set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", text))
    off = set(re.findall(r"^# export ([A-Z][A-Z0-9_]+)=", text, re.MULTILINE))
    rows = re.findall(r"^\| `([A-Z][A-Z0-9_]+)`( #)? \|", README, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(used)
    assert {name for name, mark in rows if mark} == off


def test_readme_commands_fit_their_worlds():
    """torchrun's parser takes each command of the README, and each configuration fits nodes x processes."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("torchrun")]
    worlds = []
    for command in commands:
        options, words = torchrun_and_words(command)
        worlds.append(int(options.nnodes.split(":")[-1]) * int(options.nproc_per_node))
        assert problems(words, worlds[-1]) == []
    assert worlds == list(JOBS.values())
    assert re.findall(r"^sbatch (\S+)", "\n".join(lines), re.MULTILINE) == [f"examples/slurm/{job}" for job in JOBS]
