"""Trains many layouts in one program and writes down what they computed.

    python -m tests.support.layout_worker PLAN.json

PLAN.json: a list of {"world", "cases": [{"name", "config": [file, overrides..], "fault": name or null, "out": file,
"run": folder, "source": the run of an earlier case or null, "start": the step to go on from, 0 for none}]}.
The cases of a world run one after another in the same processes; these are forks of one that has imported
everything, because importing megatron-core takes longer than a run. A run is `boreal train`'s own loop, and
tests/support/record.py saves what it computed.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path


def main(plan):
    # Imported here, once for all ranks.
    from boreal_megatron.log import quiet
    from tests.support import faults, record  # noqa: F401
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    quiet()
    gc.freeze()  # or every collection of every rank would walk, and so copy, what they share; a save collects thrice
    failed = False
    for launch in json.loads(open(plan).read()):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (launch["world"], launch["cases"], folder)
            try:
                start_processes(run, arguments, launch["world"], start_method="fork")
            except (ProcessExitedException, ProcessRaisedException):  # the other worlds' records are still wanted
                traceback.print_exc()
                failed = True
    return failed


def run(rank, world, cases, folder):
    """One rank. An exception ends all ranks of this world: the others may be waiting for this one."""
    import torch.distributed as dist
    from boreal_megatron import parallel, platform
    from boreal_megatron.config.load import load
    from boreal_megatron.train import loop
    from tests.support.faults import FAULTS
    from tests.support.record import recorded

    os.environ["LOCAL_RANK"] = str(rank)
    for number, case in enumerate(cases):
        began = time.perf_counter()
        store = dist.FileStore(os.path.join(folder, str(number)), world)
        dist.init_process_group(platform.current().backend, store=store, rank=rank, world_size=world)
        if rank == 0:
            prepare(case)
        dist.barrier()
        with FAULTS[case["fault"]](), recorded(case["out"]):
            # Without threads what a rank reads is recorded step by step.
            loop.train(load(case["config"][:1], [*case["config"][1:], "data.prefetch_workers=0"]), world=world)
        parallel.stop()
        gc.collect()  # with the process groups go gloo's threads
        if rank == 0:
            print(f"case {case['name']}: {time.perf_counter() - began:.1f} s", flush=True)


def prepare(case):
    """The run's folder, with the checkpoint that it goes on from."""
    folder = Path(case["run"])
    folder.mkdir()
    if case["start"]:
        step = f"iter_{case['start']:07d}"
        shutil.copytree(f"{case['source']}/{step}", folder / step)
        (folder / "latest_checkpointed_iteration.txt").write_text(f"{case['start']}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
