"""`boreal preflight` on two gloo ranks, whole and with faults put into rank 1.

    python -m tests.support.preflight_worker PLAN.json

PLAN.json: a list of lists of {"words": of the command, "fault": name or null, "out": where rank 0's output goes}; those
of an inner list run at the same time. Prints one JSON list, the exit codes of the two ranks of every case, None where a
rank had to be ended. Ranks are forks of a process that has imported everything.
"""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from boreal_megatron import cli, doctor
from boreal_megatron.config import load
from boreal_megatron.log import quiet
from boreal_megatron.preflight import host, parity, run, speed, storage  # noqa: F401

PATIENCE = 120


def everything():
    """One of each: all have to be found in one run, and nothing else."""
    wrong_gradient()
    slow_device()
    corrupt_all_to_all()
    full_disk()
    other_version()
    other_configuration()
    fast_clock()
    failing_check()


def wrong_gradient():
    """The delta rule's gradient of v is 1 % too large in FP32; its output is right."""
    right = parity.boreal_kernels.gated_delta_rule

    def wrong(q, k, v, *more, **options):
        if v.dtype is torch.float32:
            v = 1.01 * v - (0.01 * v).detach()
        return right(q, k, v, *more, **options)

    parity.boreal_kernels.gated_delta_rule = wrong


def slow_device():
    right = speed.seconds
    speed.seconds = lambda call: right(lambda: (time.sleep(0.1), call()))


def corrupt_all_to_all():
    """One number of what is sent."""
    right = dist.all_to_all_single

    def wrong(output, sent, **options):
        sent = sent.clone()
        sent[5] += 1
        return right(output, sent, **options)

    dist.all_to_all_single = wrong


def full_disk():
    """The file that the probe writes lies on a device without room."""
    right = storage.write_and_read

    def wrong(here):
        (here.folder / f"preflight-{here.mesh.rank}.tmp").symlink_to("/dev/full")
        return right(here)

    storage.write_and_read = wrong


def other_version():
    right = doctor.found
    other = {"triton": "3.6.0", "zstandard": None}
    doctor.found = lambda name: other[name] if name in other else right(name)


def other_configuration():
    right = load.load
    load.load = lambda files, overrides: right(files, [*overrides, "seed=5"])


def fast_clock():
    class Fast:
        time = staticmethod(lambda: time.time() + 7000)

    host.time = Fast


def failing_check():
    """`memory` raises."""

    def wrong(*args):
        raise RuntimeError("memory is not what it was")

    host.psutil.virtual_memory = wrong


def hang():
    """Rank 1 stands still where rank 0 does not wait for it; rank 0 then waits in the next collective."""
    doctor_examine = doctor.examine
    calls = []

    def still():
        calls.append(1)
        if len(calls) > 1:
            time.sleep(1000)
        return doctor_examine()

    doctor.examine = still


def absent():
    time.sleep(1000)


FAULTS = {fault.__name__: fault for fault in (everything, hang, absent)}


def main(plan):
    quiet()
    doctor.examine()  # imports Triton and asks its assembler, once for all ranks
    codes = []
    for cases in json.loads(Path(plan).read_text()):
        launches = [start(case) for case in cases]
        for ranks in launches:
            ranks[0].join(PATIENCE)
        for ranks in launches:
            ranks[1].join(3)
            codes.append([process.exitcode for process in ranks])
            for process in ranks:
                process.kill()
    print(json.dumps(codes))


def start(case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=rank, args=(number, port, case)) for number in range(2)]
    for process in ranks:
        process.start()
    return ranks


def rank(number, port, case):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if number == 1 and case["fault"]:
        FAULTS[case["fault"]]()
    with open(case["out"] if number == 0 else os.devnull, "w") as out, contextlib.redirect_stdout(out):
        code = cli.main(["preflight", *case["words"]])
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
