"""`boreal profile`: a few real training steps, first timed, then under torch.profiler, and what they say.

The timed steps are the figures: torch.profiler slows down what it looks at. Nothing of a run is read or written; the
weights are fresh ones.
"""

import contextlib
import json
import shutil
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from boreal_megatron import parallel, platform
from boreal_megatron.config import check
from boreal_megatron.data.dataset import Loader, check_tokenizer
from boreal_megatron.data.indexed import write_errors
from boreal_megatron.durable import write_atomically
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.page import need_matplotlib
from boreal_megatron.profile import compare, rates, report, timers, trace, traffic
from boreal_megatron.train import checkpoint, step as train_step

TRACED = 2  # steps, of which the first warms the profiler up


def profile(config, *, world, out, steps=3, warmup=2, phase=None, baseline=None, progress=lambda done, total: None):
    """Profile a configuration.

    Args:
        config: `config.schema.Config`.
        world: number of processes.
        out: the folder to write; an earlier profile there is replaced.
        steps: timed ones. warmup: steps before them.
        phase: name of the phase to train in; None for the first.
        baseline: an earlier profile to compare with, its folder or summary.json; None for none.
        progress: called with (done, all) steps.

    Returns:
        the summary, a dict for JSON, on rank 0; None on other ranks.

    Raises:
        BorealError: a wrong request, or a folder that cannot be written.
    """
    alone = _request(config, steps, warmup, phase)
    check.check(alone, world)
    check_tokenizer(alone)
    need_matplotlib("profile")
    out, [phase] = Path(out), alone.phases
    mesh = parallel.start(alone.parallel, alone.seed)
    before = checkpoint.first_rank(compare.load, baseline) if baseline else None
    partial = checkpoint.first_rank(_begin, out)
    try:
        with contextlib.closing(Loader(alone, mesh.dp_rank, mesh.dp_size, mesh.device, mesh.context)) as loader:
            ranks, traced = _measure(alone, mesh, loader, steps, warmup, partial, progress)
        if mesh.rank:
            return None
        summary = _summary(config, phase, world, ranks, traced, steps, warmup)
        if before:
            summary["comparison"] = compare.compare(summary, before)
        with write_errors(out):
            write_atomically(partial / compare.SUMMARY, json.dumps(summary, indent=1))
            memory = json.loads((partial / trace.MEMORY).read_text())["timeline"]
            write_atomically(partial / report.PAGE, report.page(summary, memory))
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
        return summary
    finally:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _request(config, steps, warmup, phase):
    """The configuration with the one phase, long enough."""
    named = {each.name: each for each in config.phases}
    problems = []
    if steps < 1:
        problems.append(f"steps={steps}; expected at least 1")
    if warmup < 0:
        problems.append(f"warmup={warmup}; expected 0 or more")
    if phase is not None and phase not in named:
        problems.append(f"phase={phase!r}; the configuration has {', '.join(named)}")
    if problems:
        raise ProblemsError("profile", problems)
    one = named[phase] if phase else config.phases[0]
    one = one.model_copy(update={"until_steps": warmup + steps + TRACED, "until_raw_tokens": None})
    return config.model_copy(update={"phases": (one,)})


def _begin(out):
    """A folder beside `out` to write into, after a look at what is there already."""
    if out.exists():
        if not out.is_dir() or any(out.iterdir()):
            try:
                compare.load(out)
            except BorealError:
                raise BorealError(
                    f"{out} exists and is no profile; expected a new folder, or one that boreal profile wrote: name "
                    "another with --out, or move it away"
                ) from None
    partial = out.with_name(out.name + ".partial")
    with write_errors(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    return partial


def _measure(config, mesh, loader, steps, warmup, partial, progress):
    """Warm up, time, trace.

    Returns:
        what every rank measured, a list of dicts; what the trace of rank 0 says, None on other ranks.
    """
    _, wrapped, optimizer, state = checkpoint.begin(config, mesh, loader, None)
    total = warmup + steps + TRACED

    def take(clock=None):
        nonlocal state
        began = time.perf_counter()
        with clock.running() if clock else contextlib.nullcontext():
            mark = {"mark": clock.mark} if clock else {}
            state = train_step.take(config, wrapped, optimizer, mesh, loader, state, **mark).state
        progress(state.step, total)
        return time.perf_counter() - began

    for _ in range(warmup):
        take()
    clock, each = timers.Clock(wrapped, mesh, platform.current().ranges()), []
    with platform.current().captured():
        for _ in range(steps):
            dist.barrier()
            seconds = take(clock)
            each.append((seconds, clock.spans()))
    mine = {
        "rank": mesh.rank,
        "host": socket.gethostname(),
        "pipeline": mesh.pp_rank,
        "step_seconds": [seconds for seconds, _ in each],
        "kinds": _mean([timers.by_kind(spans, seconds) for seconds, spans in each]),
        "parts": _mean([timers.by_name(spans) for _, spans in each]),
    }
    # Every rank is traced: what it waited in collectives is seen nowhere else, and all are slowed down alike.
    clock = timers.Clock(wrapped, mesh, torch.profiler.record_function)
    beside = None if mesh.rank else partial.parent  # other ranks may not see the folder
    with write_errors(partial), tempfile.TemporaryDirectory(dir=beside, prefix=partial.name) as raw_folder:
        raw = trace.record(lambda: each.append((take(clock), clock.spans())), Path(raw_folder))
        seen = trace.Trace(raw, {name: kind for kind, name, _ in clock.taken})
        seconds, spans = each[-1]
        mine["traced"] = {"kinds": timers.by_kind(spans, seconds), "collectives": seen.collectives()}
        ranks = [None] * mesh.world
        dist.all_gather_object(ranks, mine)
        if mesh.rank:
            return ranks, None
        for snapshot in Path(raw_folder).glob(trace.SNAPSHOT):
            snapshot.rename(partial / snapshot.name)
        return ranks, {"operators": seen.operators(), "memory": {"peak_bytes": seen.write(partial)}}


def _mean(dicts):
    return {key: sum(each[key] for each in dicts) / len(dicts) for key in dicts[0]}


def _summary(config, phase, world, ranks, traced, steps, warmup):
    """What is known, for programs; times are of one step, mean over the timed steps and over the ranks."""
    device = platform.current().device_name()
    limits = rates.peak(config, device)
    seconds = sum(sum(rank["step_seconds"]) for rank in ranks) / (steps * world)
    kinds = _mean([rank["kinds"] for rank in ranks])
    speed = rates.of_step(config, phase, world, seconds, limits)
    slowest = max(ranks, key=rates.own_seconds)
    return {
        "made_by": compare.MADE_BY,
        "made_at": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device or "CPU",
        "world": world,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "phase": phase.name,
        "warmup_steps": warmup,
        "timed_steps": steps,
        "step_seconds": seconds,
        "positions_per_second": phase.positions_per_step / seconds,
        "raw_tokens_per_second": phase.raw_tokens_per_step() / seconds,
        "teraflops": speed["teraflops"],
        "mfu": speed["mfu"],
        "kinds": rates.table(
            kinds,
            rates.step_flops(config, phase),
            traffic.step_bytes(config, phase, world),
            rates.exchanged(ranks),
            world,
            limits,
        ),
        "parts": rates.parts(ranks),
        "ranks": ranks,
        "slowest_rank": {"rank": slowest["rank"], "host": slowest["host"], "seconds": rates.own_seconds(slowest)},
        "operators": traced["operators"],
        "memory": traced["memory"],
        "config": config.model_dump(mode="json"),
    }
