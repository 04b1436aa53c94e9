"""Saves one checkpoint again under many layouts, in one program.

    python -m tests.support.reshard_worker PLAN.json

PLAN.json: a list of {"world", "cases": [[checkpoint, out, overrides], ..]}. Every case is what `boreal checkpoint
reshard` does under torchrun: it loads the checkpoint in that layout and saves it. The ranks are forks of one process
that has imported everything, because importing megatron-core takes longer than a case.
"""

import gc
import json
import os
import sys
import tempfile


def main(plan):
    from boreal_megatron.log import quiet
    from boreal_megatron.train import loop  # noqa: F401  imported once, for all forks
    from torch.multiprocessing import start_processes

    quiet()
    gc.freeze()  # or every collection of every rank would walk, and so copy, what they share
    for launch in json.loads(open(plan).read()):
        with tempfile.TemporaryDirectory() as folder:
            start_processes(run, (launch["world"], launch["cases"], folder), launch["world"], start_method="fork")


def run(rank, world, cases, folder):
    import torch.distributed as dist
    from boreal_megatron import parallel
    from boreal_megatron.checkpoint_tools import reshard
    from boreal_megatron.train import store

    for number, (checkpoint, out, overrides) in enumerate(cases):
        file = dist.FileStore(os.path.join(folder, str(number)), world)
        dist.init_process_group("gloo", store=file, rank=rank, world_size=world)
        reshard(store.resolve(checkpoint), out, overrides, world)
        parallel.stop()
        gc.collect()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
