"""Kills runs in the middle of their saves, and looks at what is left.

    python -m tests.support.crash_worker PLAN.json

PLAN.json: {"world", "config": [file, overrides..], "out": file, "points": [{"at": share or null, "words": [..]}]}. Each
point is a run of forked ranks that counts what is done to files under its checkpoint folder, in ranks and in writers;
before the operation that lies at this share of an undisturbed run, SIGKILL to all of them. A point without `at` runs
undisturbed and gives the count. Then the tracker's checkpoint is verified and a second run goes on to the end.
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def main(plan):
    import torch.multiprocessing  # noqa: F401  imported once, for all forks
    from boreal_megatron.log import quiet
    from boreal_megatron.train import loop  # noqa: F401

    quiet()
    gc.freeze()
    plan = json.loads(Path(plan).read_text())
    total, found = None, []
    for number, point in enumerate(plan["points"]):
        folder = Path(plan["out"]).parent / f"run-{number}"
        config = [*plan["config"], f"checkpoint.folder={folder}", *point["words"]]
        limit = None if point["at"] is None else max(1, round(point["at"] * total))
        count, digest = launch(plan["world"], config, folder, limit)
        if point["at"] is None:
            total = count
            found.append({"count": count, "digest": digest})
        else:
            found.append({"killed": digest is None, **inspected(folder)})
            _, found[-1]["digest"] = launch(plan["world"], config, folder, None)
            found[-1]["after"] = inspected(folder)
    Path(plan["out"]).write_text(json.dumps(found))


def inspected(folder):
    """What a user would find: the tracker's step, what verify says of it, the newest step announced as verified."""
    from boreal_megatron.train import store

    path, metrics = store.latest(folder) if (folder / store.TRACKER).exists() else None, folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {
        "tracker": store.step_of(path) if path else 0,
        "problems": store.verify(path) if path else [],
        "announced": max([r["step"] for r in records if r["kind"] == "checkpoint"], default=0),
        "folders": sorted(p.name for p in folder.glob("iter_*")),
    }


def launch(world, config, folder, limit):
    """(operations counted, the digest that the run ends with, or None if it was killed)."""
    counter = multiprocessing.get_context("fork").Value("l", 0)
    with tempfile.TemporaryDirectory() as rendezvous:
        leader = os.fork()
        if leader == 0:
            os.setpgid(0, 0)
            import torch.multiprocessing

            sys.addaudithook(watch(str(folder), counter, limit))
            arguments = (world, config, rendezvous)
            torch.multiprocessing.start_processes(run, arguments, world, start_method="fork")
            os._exit(0)
        os.waitpid(leader, 0)
        try:
            os.killpg(leader, signal.SIGKILL)  # whoever the signal of a dying rank found in the kernel
        except ProcessLookupError:
            pass
        result = Path(rendezvous) / "digest"
        return counter.value, json.loads(result.read_text()) if result.exists() else None


def watch(folder, counter, limit):
    def hook(event, arguments):
        changes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if not changes or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if not str(arguments[0]).startswith(folder):
            return
        with counter.get_lock():
            counter.value += 1
            reached = counter.value == limit
        if reached:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    return hook


def run(rank, world, config, rendezvous):
    import torch.distributed as dist
    from boreal_megatron import parallel
    from boreal_megatron.config.load import load
    from boreal_megatron.train import loop

    store = dist.FileStore(os.path.join(rendezvous, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    summary = loop.train(load(config[:1], config[1:]), world=world)
    parallel.stop()
    if rank == 0:
        (Path(rendezvous) / "digest").write_text(json.dumps(summary["digest"]))


if __name__ == "__main__":
    main(sys.argv[1])
