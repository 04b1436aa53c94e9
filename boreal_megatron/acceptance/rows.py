"""The report of the GPU acceptance: its parts, its rows, its table. Starts without torch."""

from dataclasses import dataclass

PASS, FAIL, BELOW, NOTE, UNMEASURED = "pass", "FAIL", "below goal", "note", "not measured"


@dataclass(frozen=True)
class Part:
    """Attributes: limit: seconds after which its process is ended; hidden: whether it is to see no GPU."""

    limit: int
    hidden: bool = False


PARTS = {
    "environment": Part(60),
    "kernels": Part(180),
    "reference": Part(240, hidden=True),  # started first, waited for here
    "parity": Part(120),
    "bf16": Part(120),
    "fp8": Part(120),
    "wide": Part(120),
    "checkpoint": Part(120),
    "loss": Part(120),
}


def row(part, what, measured=None, unit="", status=NOTE, goal="", why=""):
    """One line of the report; a `measured` of None is "not measured" unless something failed, and `why` says why."""
    if measured is None and status != FAIL:
        status = UNMEASURED
    return {"part": part, "what": what, "measured": measured, "unit": unit, "status": status, "goal": goal, "why": why}


def report(rows):
    """The rows as one Markdown table."""
    lines = ["| part | what | measured | goal | status | |", "|---|---|---|---|---|---|"]
    for r in rows:
        value = r["measured"]
        shown = f"{value:,.4g} {r['unit']}".rstrip() if isinstance(value, float) else value or UNMEASURED
        why = " ".join(str(r["why"]).split()).replace("|", "/")
        lines.append(f"| {r['part']} | {r['what']} | {shown} | {r['goal'] or ''} | {r['status']} | {why} |")
    return "\n".join(lines)
