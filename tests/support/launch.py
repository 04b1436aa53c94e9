"""Real launches: `boreal` as a user starts it, alone or under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent

# Every kind of block; odd head counts kept off only where TP2 must divide.
MODEL = {
    "pattern": "*-GEG- / *-",
    "vocab_size": 640,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "attention": {"heads": 4, "kv_heads": 2, "head_dim": 16, "rope_theta": 10000.0},
    "gdn": {"key_heads": 2, "value_heads": 4, "head_dim": 16},
    "moe": {"experts": 4, "top_k": 2, "expert_hidden_size": 32, "shared_hidden_size": 32},
    "max_positions": 512,
}


def write_config(path, corpus, run, **changes):
    """The tests' configuration as a file."""
    values = {
        "model": MODEL,
        "precision": "fp32",
        "micro_batch": 2,
        "phases": [
            {"name": "superposition", "until_steps": 2, "bag_size": 4, "sequence": 96, "positions_per_step": 768},
            {"name": "recovery", "until_steps": 5, "sequence": 96, "positions_per_step": 768},
        ],
        "schedule": {"peak": 3e-3, "warmup_steps": 2},
        "data": {
            "tokenizer": str(corpus["tokenizer"]),
            "sources": {"text": str(corpus["train"])},
            "validation": str(corpus["valid"]),
            "boundaries": "align",
        },
        "checkpoint": {"folder": str(run), "every_steps": 2},
        "evaluation": {"every_steps": 100, "windows": 4, "final_windows": 8},
        "log": {"every_steps": 1},
    }
    values.update(changes)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **extra}


def command(processes, *words):
    """`boreal WORDS` in one process, or under torchrun in several."""
    if processes == 1:
        return [sys.executable, "-m", "boreal_megatron", *map(str, words)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "-m", "boreal_megatron", *map(str, words)]


def boreal(processes, *words, expect=0, timeout=240):
    """Run to the end; returns standard output and error together. Fails the test on another exit code."""
    done = subprocess.run(
        command(processes, *words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    text = done.stdout + done.stderr
    assert done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{text[-6000:]}"
    return text


def uninterrupted(corpus, folder, steps, every_steps):
    """A run on two processes with experts over both, on bags of 4 until step 3, that nothing happens to.

    Returns (configuration file, metrics, digests).
    """
    phases = [
        {"name": "superposition", "until_steps": 3, "bag_size": 4, "sequence": 96, "positions_per_step": 768},
        {"name": "recovery", "until_steps": steps, "sequence": 96, "positions_per_step": 768},
    ]
    config = write_config(
        folder / "config.yaml", corpus, folder / "run", phases=phases, parallel={"expert": 2},
        checkpoint={"folder": str(folder / "run"), "every_steps": every_steps},
    )  # fmt: skip
    text = boreal(2, "train", config)
    assert len(digests(text)) == 4
    return config, metrics(folder / "run"), digests(text)


def start_and_signal(processes, words, when, number, timeout=240):
    """Start, wait until `when(text so far)`, send a signal to the launched process, wait for the end.

    SIGKILL goes to every process of the launch at once, as when a machine dies. Returns (exit code, output).
    """
    process = subprocess.Popen(
        command(processes, *words),
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text, end = "", time.monotonic() + timeout
    try:
        for line in process.stdout:
            text += line
            if when(text):
                break
            assert time.monotonic() < end, text[-4000:]
        if number == signal.SIGKILL:
            kill_all(process.pid)
        else:
            process.send_signal(number)
        text += process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            kill_all(process.pid)
    return process.returncode, text


def kill_all(pid):
    """SIGKILL a process and all its descendants; torchrun's workers have sessions of their own."""
    leader = psutil.Process(pid)
    for process in [leader, *leader.children(recursive=True)]:
        process.kill()


def metrics(run, kind="train"):
    """Records of a run, by step."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r for r in map(json.loads, lines) if r["kind"] == kind}


def digests(text):
    """The state line that a run ends with."""
    line = [line for line in text.replace("\r", "\n").splitlines() if "state: parameters=" in line][-1]
    return line[line.index("parameters=") :].split()
