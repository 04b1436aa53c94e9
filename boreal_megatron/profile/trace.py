"""A step under torch.profiler: a trace for Perfetto, the operators of each kind of layer, memory over time."""

import bisect
import contextlib
import gzip
import json
from collections import defaultdict

import torch

from boreal_megatron.errors import STORAGE, BorealError

MICRO = 1e-6
TRACK = 2**30  # a thread number that no process has; operators and layers need not nest, so layers get their own
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # what a GPU does, in the profiler's words
TRACE, MEMORY, SNAPSHOT = "trace.json.gz", "memory.json", "memory.pickle"
SNAPSHOT_ENTRIES = 200_000


def annotation(device):
    """What shows a stretch of a step to nsys (name -> a context manager), or None where there is no nsys."""
    return torch.cuda.nvtx.range if device.type == "cuda" else None


@contextlib.contextmanager
def nsys_range(device):
    """What `nsys profile --capture-range=cudaProfilerApi` captures."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


def record(take, folder, device):
    """Take two steps under torch.profiler, the first to warm it up; leave the raw trace of the second and, on a GPU,
    the allocator's snapshot.

    Args:
        take: takes a step.

    Returns:
        path of the raw trace.
    """
    raw, activities = folder / "trace.json", [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, profile_memory=True) as profiler:
        take()
        profiler.step()
        take()
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        torch.cuda.memory._record_memory_history(enabled=None)
    profiler.export_chrome_trace(str(raw))
    return raw


def finish(raw, kinds):
    """Make of the raw trace what people look at.

    The trace is written beside it with the stretches on a track of their own, so is memory over time; the raw one is
    deleted.

    Args:
        kinds: {name of a stretch: kind}.

    Returns:
        dict: `operators` (as `operators`), `memory` {"peak_bytes": {kind: bytes}}, empty where nothing was allocated.

    Raises:
        BorealError: there is no whole trace.
    """
    try:
        trace = json.loads(raw.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # the profiler tells its log, and nobody else
        raise BorealError(
            f"{raw}: cannot be written by torch.profiler; expected room for some 100 MB: free some space (or raise the "
            "quota or file-size limit), or write to another disk with --out, and run again",
            STORAGE,
        ) from None
    events = trace["traceEvents"]
    spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in kinds]
    for span in spans:
        span["tid"] = TRACK
    title = {"ph": "M", "pid": spans[0]["pid"], "tid": TRACK, "ts": 0}
    events += [
        {**title, "name": "thread_name", "args": {"name": "step, by kind of layer"}},
        {**title, "name": "thread_sort_index", "args": {"sort_index": -1}},
    ]
    with gzip.open(raw.with_name(TRACE), "wt", compresslevel=6) as file:
        json.dump(trace, file)
    raw.unlink()
    starts = sorted((span["ts"], kinds[span["name"]]) for span in spans)

    def kind_at(moment):
        place = bisect.bisect_right(starts, moment, key=lambda start: start[0])
        return starts[place - 1][1] if place else "idle"

    memory = memory_over_time(events)
    peak = defaultdict(int)
    for moment, allocated in memory:
        peak[kind_at(moment)] = max(peak[kind_at(moment)], allocated)
    begin = starts[0][0]
    over_time = {
        "unit": "[ms since the traced step began, bytes allocated, kind]",
        "timeline": [[round((moment - begin) / 1000, 3), bytes_, kind_at(moment)] for moment, bytes_ in memory],
    }
    raw.with_name(MEMORY).write_text(json.dumps(over_time))
    return {"operators": operators(events, kinds, kind_at), "memory": {"peak_bytes": dict(peak)}}


def operators(events, kinds, kind_at):
    """Operators, or kernels where the trace has some, by their own time.

    Args:
        events: the trace's. kinds: {name of a stretch: kind}.
        kind_at: moment -> the kind that the host was at. A kernel's kind is that of the operator that launched it.

    Returns:
        list of {"name", "kind", "calls", "seconds"}, the longest first.
    """
    complete = [e for e in events if e.get("ph") == "X" and e["name"] not in kinds]
    host = [e for e in complete if e.get("cat") == "cpu_op"]
    launched = {e["args"]["External id"]: e["ts"] for e in host if "External id" in e.get("args", {})}
    device = [e for e in complete if e.get("cat") in DEVICE]
    if device:
        own = [(e, e["dur"], launched.get(e["args"].get("External id"), e["ts"])) for e in device]
    else:
        own = [(e, seconds, e["ts"]) for e, seconds in own_time(host)]
    calls, sums = defaultdict(int), defaultdict(float)
    for event, micros, moment in own:
        key = event["name"], kind_at(moment)
        calls[key] += 1
        sums[key] += micros * MICRO
    found = [
        {"name": name, "kind": kind, "calls": calls[name, kind], "seconds": total}
        for (name, kind), total in sums.items()
    ]
    return sorted(found, key=lambda each: -each["seconds"])


def own_time(events):
    """Yields (event, microseconds that are not those of an event inside it), thread by thread."""
    threads = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for each in threads.values():
        within = []  # [event, own microseconds], each inside the one before
        for event in sorted(each, key=lambda e: (e["ts"], -e["dur"])):
            while within and within[-1][0]["ts"] + within[-1][0]["dur"] <= event["ts"]:
                yield within.pop()
            if within:
                within[-1][1] -= event["dur"]
            within.append([event, event["dur"]])
        yield from within


def memory_over_time(events):
    """[(moment, bytes allocated after it)] of the device, or of the host where no device allocated anything."""
    seen = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"]
    of_device = any(args.get("Device Type") for _, args in seen)
    chosen = [(t, args["Total Allocated"]) for t, args in seen if bool(args.get("Device Type")) == of_device]
    return sorted(chosen)
