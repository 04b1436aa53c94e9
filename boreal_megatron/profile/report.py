"""One HTML page about a profile: the table of kinds, where in the depth of the network time goes, ranks, memory,
operators, and what got slower."""

import html
import re

from boreal_megatron import page as parts
from boreal_megatron.profile import compare
from boreal_megatron.profile.rates import WAITS

PAGE = "report.html"
OPERATORS = 30
MOMENTS = 1500  # of memory in the plot; each is the highest of its stretch
HALF_BLOCK = re.compile(r"(forward|backward) (\w+) (\d+)")
COLOURS = {
    "gdn": "C0", "attention": "C1", "dense": "C2", "moe": "C3", "heads": "C4", "mtp": "C5",
    "communication": "C6", "optimizer": "C7", "data": "C8", "idle": "0.8",
}  # fmt: skip


def page(summary, memory):
    """The page.

    Args:
        summary: `run.profile`'s.
        memory: [[ms, bytes allocated, kind], ..] of the traced step.

    Returns:
        the text, ASCII.
    """
    return parts.ascii_only("".join(_sections(summary, memory)))


def _sections(summary, memory):
    yield parts.head("Profile")
    pattern = summary["config"]["model"]["pattern"]
    yield f"<p>{html.escape(compare.heading(summary))}</p>\n<p><code>{html.escape(pattern)}</code></p>"
    if found := summary.get("comparison"):
        yield from _comparison(found)
    yield "<h2>Kinds of time</h2>" + _kinds(summary)
    yield parts.table(compare.TITLES, compare.rows(summary))
    yield (
        "<p>Time is measured: the mean over timed steps and ranks. Collectives are the share of a kind's time in them, "
        "in the traced step, waiting for other ranks included. GFLOP and GB are computed from shapes, for the "
        "whole run's step; TFLOP/s and GB/s are a device's. The roofline is the least time that the device needs for "
        "these FLOPs or these bytes, and the share is of the time it took.</p>\n"
    )
    yield "<h2>Half-blocks</h2>" + _depth(summary)
    if summary["world"] > 1:
        yield f"<h2>Ranks</h2><p>{html.escape(compare.slowest(summary))}</p>" + _ranks(summary)
    if memory:
        yield "<h2>Memory</h2>" + _memory(memory)
        peaks = sorted(summary["memory"]["peak_bytes"].items(), key=lambda pair: -pair[1])
        yield parts.table(("highest during", "MB"), [[kind, f"{n / 1e6:,.1f}"] for kind, n in peaks])
        yield "<p>On a CPU, what was allocated before the traced step is not in it: weights and moments.</p>"
    yield "<h2>Operators</h2><p>Own time in one step of rank 0, under torch.profiler, which slows small ones down.</p>"
    yield parts.table(
        ("operator", "kind", "calls", "ms"),
        [
            [each["name"], each["kind"], f"{each['calls']:,}", f"{each['seconds'] * 1000:,.3f}"]
            for each in summary["operators"][:OPERATORS]
        ],
    )
    yield parts.END


def _comparison(found):
    yield "<h2>What got slower</h2>"
    lines = list(compare.render_comparison(found))
    differs = "".join(f"<li>{html.escape(line)}</li>" for line in found["differs"])
    yield f"<p>{html.escape(lines[0])}</p>" + (f"<p>Not the same in both:</p><ul>{differs}</ul>" if differs else "")
    rows = found["kinds"]

    def draw(axes):
        lost = [row["lost"] * 1000 for row in rows[::-1]]
        axes.barh([row["name"] for row in rows[::-1]], lost, color=["C3" if ms > 0 else "C2" for ms in lost])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title="Lost (right) and won (left)", xlabel="ms a step")

    yield parts.plot(draw, f"Bars: {rows[0]['name']} lost most, {rows[0]['lost'] * 1000:.2f} ms a step.")
    for title, key in (("kind", "kinds"), ("part of a step", "parts"), ("operator under the profiler", "operators")):
        yield parts.table((title, "before, ms", "now, ms", "lost, ms"), compare.lost_rows(found[key][: compare.SHOWN]))


def _kinds(summary):
    rows = summary["kinds"]

    def draw(axes):
        names = list(rows)[::-1]
        bars = axes.barh(names, [rows[n]["seconds"] * 1000 for n in names], color=[COLOURS[n] for n in names])
        axes.bar_label(bars, [f"{rows[n]['share']:.1%}" for n in names], padding=3)
        axes.set(title="A step", xlabel="ms, mean over ranks")
        axes.margins(x=0.12)

    return parts.plot(draw, "Bars: " + ", ".join(f"{kind} {row['share']:.1%}" for kind, row in rows.items()) + ".")


def _depth(summary):
    from matplotlib.patches import Patch

    found = {}
    for name, seconds in summary["parts"].items():
        if match := HALF_BLOCK.fullmatch(name):
            way, kind, number = match.groups()
            found[int(number), kind, way] = seconds * 1000

    def draw(axes):
        for way, hatch in (("forward", ""), ("backward", "//")):
            mine = {key: ms for key, ms in found.items() if key[2] == way}
            below = [found.get((n, kind, "forward"), 0.0) if way == "backward" else 0.0 for n, kind, _ in mine]
            colours = [COLOURS[kind] for _, kind, _ in mine]
            numbers = [n for n, _, _ in mine]
            axes.bar(numbers, list(mine.values()), bottom=below, color=colours, hatch=hatch, edgecolor="black", lw=0.5)
        axes.set(title="Time along the network", xlabel="half-block", ylabel="ms a step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        shown = [Patch(color=COLOURS[kind], label=kind) for kind in dict.fromkeys(kind for _, kind, _ in found)]
        axes.legend(handles=[*shown, Patch(facecolor="white", edgecolor="black", hatch="//", label="backward")])

    return parts.plot(draw, "Bars: forward and backward time of every half-block.")


def _ranks(summary):
    ranks = summary["ranks"]

    def draw(axes):
        left = [0.0] * len(ranks)
        labels = [f"rank {rank['rank']}" for rank in ranks]
        for kind in ranks[0]["kinds"]:
            ms = [rank["kinds"][kind] * 1000 for rank in ranks]
            hatch = "//" if kind in WAITS else ""
            axes.barh(labels, ms, left=left, color=COLOURS[kind], hatch=hatch, edgecolor="black", lw=0.3, label=kind)
            left = [a + b for a, b in zip(left, ms)]
        axes.set(title="A step of every rank (hatched: waiting)", xlabel="ms")
        axes.invert_yaxis()
        axes.legend(ncols=5, fontsize=8)

    return parts.plot(draw, "Bars: each rank's time by kind.", height=2.5 + 0.25 * min(len(ranks), 60))


def _memory(memory):
    width = max(1, len(memory) // MOMENTS)
    highest = [max(memory[i : i + width], key=lambda moment: moment[1]) for i in range(0, len(memory), width)]

    def draw(axes):
        axes.plot([ms for ms, _, _ in highest], [n / 1e6 for _, n, _ in highest], color="0.3", lw=0.8)
        for kind in dict.fromkeys(kind for _, _, kind in highest):
            mine = [(ms, n / 1e6) for ms, n, k in highest if k == kind]
            axes.plot(*zip(*mine), ".", ms=3, color=COLOURS[kind], label=kind)
        axes.set(title="Allocated in the traced step", xlabel="ms", ylabel="MB")
        axes.legend(ncols=2, fontsize=8)

    return parts.plot(draw, f"Memory over time, {max(n for _, n, _ in memory) / 1e6:,.1f} MB at most.")
