"""A step under torch.profiler: a trace for Perfetto, the operators of each kind of layer, memory over time."""

import bisect
import contextlib
import gzip
import json
from collections import defaultdict

import torch

from boreal_megatron import platform
from boreal_megatron.errors import STORAGE, BorealError

MICRO = 1e-6
TRACK = 2**30  # a thread number that no process has; operators and layers need not nest, so layers get their own
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # what a GPU does, in the profiler's words
TRACE, MEMORY, SNAPSHOT = "trace.json.gz", "memory.json", "memory.pickle"


def record(take, folder):
    """Take two steps under torch.profiler, the first to warm it up; leave the raw trace of the second and, on a GPU,
    the allocator's snapshot.

    Args:
        take: takes a step.

    Returns:
        path of the raw trace.
    """
    raw, here = folder / "trace.json", platform.current()
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    options = dict(activities=here.activities(), schedule=schedule, profile_memory=True)
    with here.memory_history(folder / SNAPSHOT), torch.profiler.profile(**options) as profiler:
        take()
        profiler.step()
        take()
    profiler.export_chrome_trace(str(raw))
    return raw


class Trace:
    """One step of one rank as the profiler saw it.

    Args:
        raw: path of the trace that the profiler wrote.
        kinds: {name of a stretch: kind}.

    Raises:
        BorealError: there is no whole trace.
    """

    def __init__(self, raw, kinds):
        try:
            self.whole = json.loads(raw.read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # the profiler tells its log, and nobody else
            raise BorealError(
                f"{raw}: cannot be written by torch.profiler; expected room for some 100 MB: free some space (or raise "
                "the quota or file-size limit), or write to another disk with --out, and run again",
                STORAGE,
            ) from None
        events = self.whole["traceEvents"]
        self.spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in kinds]
        others = [e for e in events if e.get("ph") == "X" and e["name"] not in kinds]
        self.host = [e for e in others if e.get("cat") == "cpu_op"]
        self.device = [e for e in others if e.get("cat") in DEVICE]
        self.gloo = [e for e in others if e.get("cat") == "user_annotation" and e["name"].startswith("gloo:")]
        self.launched = {e["args"]["External id"]: e["ts"] for e in self.host if "External id" in e.get("args", {})}
        self.starts = sorted((span["ts"], kinds[span["name"]]) for span in self.spans)

    def kind_at(self, moment):
        """The kind that the host was at."""
        place = bisect.bisect_right(self.starts, moment, key=lambda start: start[0])
        return self.starts[place - 1][1] if place else "idle"

    def kind_of(self, event):
        """The kind of what runs on the device is that of the operator that launched it."""
        return self.kind_at(self.launched.get(event.get("args", {}).get("External id"), event["ts"]))

    def operators(self):
        """Operators, or kernels where there are some, by their own time.

        Returns:
            list of {"name", "kind", "calls", "seconds"}, the longest first.
        """
        own = [(e, e["dur"]) for e in self.device] or own_time(self.host)
        calls, sums = defaultdict(int), defaultdict(float)
        for event, micros in own:
            key = event["name"], self.kind_of(event)
            calls[key] += 1
            sums[key] += micros * MICRO
        found = [{"name": n, "kind": k, "calls": calls[n, k], "seconds": total} for (n, k), total in sums.items()]
        return sorted(found, key=lambda each: -each["seconds"])

    def collectives(self):
        """{kind: seconds that its collectives took}, waiting for the other ranks included."""
        sums = defaultdict(float)
        for event in [*self.gloo, *(e for e in self.device if e["name"].startswith("nccl"))]:
            sums[self.kind_of(event)] += event["dur"] * MICRO
        return dict(sums)

    def write(self, folder):
        """The trace for Perfetto, with the stretches on a track of their own, and memory over time.

        Returns:
            {kind: most bytes allocated during it}.
        """
        begin, track = self.starts[0][0], {"ph": "M", "pid": self.spans[0]["pid"], "tid": TRACK, "ts": 0}
        for span in self.spans:
            span["tid"] = TRACK
        self.whole["traceEvents"] += [
            {**track, "name": "thread_name", "args": {"name": "step, by kind of layer"}},
            {**track, "name": "thread_sort_index", "args": {"sort_index": -1}},
        ]
        with gzip.open(folder / TRACE, "wt", compresslevel=6) as file:
            json.dump(self.whole, file)
        peak, timeline = defaultdict(int), []
        for moment, allocated in memory_over_time(self.whole["traceEvents"]):
            kind = self.kind_at(moment)
            peak[kind] = max(peak[kind], allocated)
            timeline.append([round((moment - begin) / 1000, 3), allocated, kind])
        unit = "[ms since the traced step began, bytes allocated, kind]"
        (folder / MEMORY).write_text(json.dumps({"unit": unit, "timeline": timeline}))
        return dict(peak)


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
