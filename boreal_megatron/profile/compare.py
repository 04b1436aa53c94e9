"""What got slower between two profiles, and the profile as text. Summaries are `run.profile`'s. No torch."""

import json
from pathlib import Path

from boreal_megatron.errors import BorealError

MADE_BY, SUMMARY = "boreal profile", "summary.json"
SHOWN = 8  # rows of each list, for people
NOT_THE_WORK = ("checkpoint", "evaluation", "log", "seed")  # parts of a configuration that no profile depends on


def load(path):
    """The summary of a profile.

    Args:
        path: its folder or its summary.json.

    Raises:
        BorealError: it is none.
    """
    path = Path(path)
    path = path / SUMMARY if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BorealError(f"{path} is no profile: {error}; name a folder that boreal profile wrote") from None
    if not isinstance(found, dict) or found.get("made_by") != MADE_BY:
        raise BorealError(f"{path} is no profile: it says nothing of {MADE_BY!r}; name a folder that it wrote")
    return found


def compare(now, before):
    """What one profile takes longer for than another.

    Args:
        now, before: summaries.

    Returns:
        dict: `before` (when and where it was made), `step_seconds` and `lost_seconds` of a step; `kinds`, `parts` and
        `operators`, lists of {"name", "before", "now", "lost"} in seconds of a step, what lost most first; `differs`,
        a line for everything but the times that is not the same in both.
    """

    def kinds(summary):
        return {kind: row["seconds"] for kind, row in summary["kinds"].items()}

    def operators(summary):
        return {f"{each['name']} ({each['kind']})": each["seconds"] for each in summary["operators"]}

    return {
        "before": {key: before[key] for key in ("made_at", "device", "world")},
        "step_seconds": [before["step_seconds"], now["step_seconds"]],
        "lost_seconds": now["step_seconds"] - before["step_seconds"],
        "kinds": _lost(kinds(now), kinds(before)),
        "parts": _lost(now["parts"], before["parts"]),
        "operators": _lost(operators(now), operators(before)),
        "differs": list(_differences(_circumstances(now), _circumstances(before))),
    }


def _lost(now, before):
    rows = [
        {"name": n, "before": before.get(n, 0.0), "now": now.get(n, 0.0), "lost": now.get(n, 0.0) - before.get(n, 0.0)}
        for n in {**before, **now}
    ]
    return sorted(rows, key=lambda row: -row["lost"])


def _circumstances(summary):
    same = {key: summary[key] for key in ("device", "world", "versions", "phase", "warmup_steps", "timed_steps")}
    return same | {key: value for key, value in summary["config"].items() if key not in NOT_THE_WORK}


def _differences(now, before, path=""):
    """Yields `a.b.c: before, now` for every leaf that differs."""
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(b, a, f"{path}{key}.")
        elif a != b:
            yield f"{path}{key}: {a}, now {b}"


# -------------------------------------------------------------- for people


def heading(summary):
    """One line: what ran, and how fast."""
    mfu = f"{summary['mfu']:.1%} of the peak" if summary["mfu"] is not None else "MFU not known: no peak for it"
    return (
        f"phase {summary['phase']} on {summary['world']} x {summary['device']}: "
        f"{summary['step_seconds'] * 1000:,.1f} ms a step ({summary['timed_steps']} timed), "
        f"{summary['positions_per_second']:,.0f} positions/s, "
        f"{summary['teraflops']:.4g} model TFLOP/s a device ({mfu})"
    )


TITLES = ("kind", "ms a step", "share", "collectives", "GFLOP", "TFLOP/s", "GB", "GB/s", "of roofline")


def rows(summary):
    """The table of kinds, a list of cells each, under TITLES."""

    def number(value, scale=1.0):
        return f"{value / scale:,.4g}" if value is not None else "-"

    found = []
    for kind, row in summary["kinds"].items():
        roofline = f"{row['roofline']:.1%}" if row["roofline"] is not None else "-"
        found.append(
            [
                kind,
                f"{row['seconds'] * 1000:,.2f}",
                f"{row['share']:.1%}",
                f"{row['collectives']:.1%}" if row["collectives"] else "-",
                number(row["flops"], 1e9),
                number(row["teraflops"]),
                number(row["bytes"], 1e9),
                number(row["gigabytes_per_second"]),
                roofline,
            ]
        )
    return found


def render(summary):
    """A summary for people."""
    lines = [heading(summary), *_aligned([TITLES, *rows(summary)])]
    lines.append(
        "(collectives: share of the kind's time, with waiting; GFLOP and GB: computed, of the whole run's step)"
    )
    if summary["world"] > 1:
        lines.append(slowest(summary))
    if "comparison" in summary:
        lines += ["", *render_comparison(summary["comparison"])]
    return "\n".join(lines)


def slowest(summary):
    """Who holds the others up."""
    found = summary["slowest_rank"]
    whole = sum(summary["ranks"][found["rank"]]["traced"]["kinds"].values())
    return (
        f"slowest rank: {found['rank']} on {found['host']}, at work of its own for {found['seconds'] * 1000:,.1f} ms "
        f"of the traced step's {whole * 1000:,.1f}; the others wait for it"
    )


def render_comparison(found):
    """Lines: what lost most, and what else differs."""
    before, now, lost = (s * 1000 for s in (*found["step_seconds"], found["lost_seconds"]))
    yield f"a step takes {lost:+,.1f} ms: {before:,.1f} before ({found['before']['made_at']}), {now:,.1f} now"
    for title, key in (("kinds", "kinds"), ("parts", "parts"), ("operators under the profiler", "operators")):
        yield f"what got slower, {title}:"
        yield from _aligned([["", "before", "now", "lost"], *lost_rows(found[key][:SHOWN])])
    for line in found["differs"]:
        yield f"not the same: {line}"


def lost_rows(each):
    """Cells of `compare`'s rows, in ms."""
    return [[row["name"], *(f"{row[key] * 1000:,.2f}" for key in ("before", "now", "lost"))] for row in each]


def _aligned(cells):
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        f"  {row[0]:<{widths[0]}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(row[1:], widths[1:]))
        for row in cells
    ]
