"""All checks on all ranks, in one order; the verdict on rank 0."""

import datetime
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroup, TCPStore

from boreal_megatron import parallel, platform
from boreal_megatron.config.check import check as check_config
from boreal_megatron.errors import BorealError
from boreal_megatron.plan import hardware
from boreal_megatron.preflight import host, network, parity, speed, storage
from boreal_megatron.preflight.finding import FAIL, Check, Finding, clocks, equal, judge, peers, table
from boreal_megatron.preflight.roll import JOINING, WATCH, Roll, Watch

CHECKS = (
    Check("versions", host.versions, equal),
    Check("components", host.components),
    Check("configuration", host.configuration, equal),
    Check("environment", host.environment),
    Check("memory", host.memory),
    Check("storage", storage.probe),
    Check("clock", host.clock, clocks),
    Check("choices", parity.choices, equal),
    Check("kernels", parity.operations),
    Check("mixture", parity.mixture),
    Check("speed", speed.rates, peers),
    Check("repeatability", speed.repeats),
    Check("network", network.exchanges, peers),
)
START = Check(JOINING, None)
SILENCE = Check(WATCH, None)
HEARING = 10  # seconds


@dataclass(frozen=True)
class Here:
    """What checks are given.

    Attributes:
        config: `config.schema.Config`. mesh: `parallel.Mesh`. folder: where checkpoints will lie, a Path.
        alone: a process group of this rank only. store: torch's, of this preflight.
        gpu: `plan.hardware.GPU`, or None where the table does not have this device.
        hosts: of every rank, in order.
    """

    config: object
    mesh: parallel.Mesh
    folder: Path
    alone: ProcessGroup
    store: object
    gpu: hardware.GPU | None
    hosts: list[str]


def preflight(config, *, folder=None, patience=180.0, say=print, checks=CHECKS):
    """Run all checks on this rank; rank 0 says the verdict, and all ranks return it.

    Args:
        config: `config.schema.Config`.
        folder: where to try the storage; default `checkpoint.folder`.
        patience: seconds without a word after which a rank counts as hung. Kernels compile in less.
        say: called on rank 0 with the report.

    Returns:
        whether nothing failed.

    Raises:
        ProblemsError: the configuration does not fit the world.
        BorealError: the ranks' store is gone.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_config(config, world)
    store, place = join(patience), Path(folder or config.checkpoint.folder)
    name = socket.gethostname()
    roll, watch = Roll(store, rank, name), None
    device = platform.current().name
    if rank == 0:

        def conclude(answers):
            storage.clean(place)
            found = report([START, *checks, SILENCE], answers, device, world)
            say(found)
            return int(not found["ok"])

        watch = Watch(store.clone(), world, patience, conclude)
        watch.start()
    try:
        here = start(config, place, store, patience, name)
    except Exception as error:  # whatever keeps a rank from joining is what people have to read
        roll.end(JOINING, [broken(JOINING, error)])
        checks = ()
    for check in checks:
        roll.begin(check.name)
        roll.end(check.name, attempt(check, here))
    roll.over()
    return verdict(store, watch, rank, world, patience)


def join(patience):
    """The store of this launch: torchrun's, rank 0's where there is none, or this process's own."""
    if "WORLD_SIZE" not in os.environ:
        return HashStore()
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]),
        is_master=not shared and os.environ["RANK"] == "0", timeout=datetime.timedelta(seconds=patience),
        wait_for_workers=False,  # rank 0 names who is missing
    )  # fmt: skip
    # A restarted worker must not read what its predecessor said.
    return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def start(config, folder, store, patience, name):
    """This rank's place among the others."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    # Longer than rank 0's patience: it is the one to say who hangs.
    mesh = parallel.start(config.parallel, config.seed, store=PrefixStore("groups", store), timeout=10 * patience)
    store.set(f"host/{rank}", name)
    hosts = [store.get(f"host/{other}").decode() for other in range(world)]
    return Here(
        config=config,
        mesh=mesh,
        folder=folder,
        alone=torch.distributed.new_group([rank], use_local_synchronization=True),
        store=store,
        gpu=hardware.of_device(platform.current().device_name()),
        hosts=hosts,
    )


def attempt(check, here):
    """A check's findings; an exception is one."""
    try:
        return check.run(here)
    except Exception as error:  # a check that cannot be done has failed, and the others are still wanted
        return [broken(check.name, error)]


def broken(name, error):
    return Finding(name, False, f"{type(error).__name__}: {str(error)[:300]}", "no error")


def report(checks, answers, device, world):
    """{"ok", "world", "rows"}; the rows of `finding.judge`."""
    rows = judge(checks, answers, device)
    return {"ok": not any(r["status"] == FAIL for r in rows), "world": world, "device": device, "rows": rows}


def text(found):
    """A report for people."""
    failed = [r for r in found["rows"] if r["status"] == FAIL]
    hosts = sorted({r["host"] for r in failed})
    count = f"{len(failed)} finding{'s' if len(failed) != 1 else ''} failed"
    end = f"{count} on {', '.join(hosts)}" if failed else "nothing failed"
    return f"{table(found['rows'], found['world'])}\n\npreflight: {end}"


def verdict(store, watch, rank, world, patience):
    """Rank 0's, told to all; rank 0, which may hold the store, waits until everybody has heard it."""
    if rank == 0:
        watch.join()
        if not watch.complete():
            raise BorealError("rank 0 lost the store through which ranks answer; is its host out of memory or network?")
        store.set("verdict", str(watch.conclude(watch.answers)))
    store.wait(["verdict"], datetime.timedelta(seconds=2 * patience))
    code = int(store.get("verdict"))
    heard, end = store.add("heard", 1), time.monotonic() + HEARING
    while rank == 0 and heard < world and time.monotonic() < end:
        time.sleep(0.05)
        heard = store.add("heard", 0)
    return code == 0
