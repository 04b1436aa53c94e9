"""What a check says, how ranks are compared, and the table."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

PASS, FAIL, NOTE = "pass", "FAIL", "note"
# A rank's rate over the median of all ranks' below which it is slow. CPUs are shared with other work, GPUs are not.
PEERS = {"cuda": 0.9, "cpu": 0.3}
CLOCK = 0.5  # seconds that a clock may be off from rank 0's: logs and file times of several hosts are read together
SAME = "the same on all ranks"
ABSENT = "not installed"
SHOWN = 6  # ranks named in one line


@dataclass(frozen=True)
class Finding:
    """What one rank found of one thing.

    Attributes:
        name: of the thing, the same on all ranks.
        ok: None where there is nothing to hold it against.
        measured: for people; made from value and unit where it is empty.
        expected, advice: for people.
        value: what is compared between ranks: a number in `unit`, or text.
    """

    name: str
    ok: bool | None
    measured: str = ""
    expected: str = ""
    advice: str = ""
    value: object = None
    unit: str = ""

    @property
    def shown(self):
        if self.measured or self.value is None:
            return self.measured
        return f"{self.value:.3g} {self.unit}".rstrip() if isinstance(self.value, float) else str(self.value)


@dataclass(frozen=True)
class Check:
    """Attributes: name; run(here), a list of Findings on this rank; compare({rank: Finding}, device type), which may
    judge a finding by those of the other ranks."""

    name: str
    run: Callable
    compare: Callable = lambda findings, device: findings


def equal(findings, device):
    """All ranks have to have the value that most have, or rank 0's where two are as frequent."""
    values = {rank: f.shown for rank, f in findings.items() if f.value is not None}
    count = Counter(values.values())
    most = max(count.values(), default=0)
    usual = next((value for _, value in sorted(values.items()) if count[value] == most), None)
    return {
        rank: replace(
            f, ok=False, measured=f.shown, expected=f"{usual}, as on {most} of {len(values)} ranks",
            advice=f.advice or "install and configure the same on every host",
        )
        if values.get(rank, usual) != usual
        else f
        for rank, f in findings.items()
    }  # fmt: skip


def peers(findings, device):
    """No rank may be much slower than the median one."""
    rates = [f.value for f in findings.values() if f.value is not None]
    if len(rates) < 2:
        return findings
    median, least = statistics.median(rates), PEERS[device]
    return {
        rank: replace(
            f, ok=False, expected=f">= {least:g} of the median rank's {median:.3g} {f.unit}",
            advice="other work on this host, a hot or capped GPU, a slow link: look at it, or leave the host out",
        )
        if f.value is not None and f.value < least * median
        else f
        for rank, f in findings.items()
    }  # fmt: skip


def clocks(findings, device):
    """Rank 0's clock is the measure; of several looks the one that was disturbed least counts."""
    mine = findings[0].value if 0 in findings else None
    judged = {}
    for rank, f in findings.items():
        if mine is None or f.value is None:
            judged[rank] = f
            continue
        off = min((theirs - ours for theirs, ours in zip(f.value, mine)), key=abs)
        judged[rank] = replace(
            f, ok=abs(off) <= CLOCK, value=off, unit="s", expected=f"within {CLOCK} s of rank 0's",
            advice="" if abs(off) <= CLOCK else "set the host's clock (chronyd, ntpd)",
        )  # fmt: skip
    return judged


def judge(checks, answers, device):
    """Compare ranks.

    Args:
        checks: list of Check.
        answers: rank -> {"host": name, "found": {check name: list of Findings}}.
        device: type, "cuda" or "cpu".

    Returns:
        list of dicts: check, rank, host, status (PASS, FAIL or NOTE), and a Finding's fields.
    """
    rows = []
    for check in checks:
        found = {rank: answer["found"].get(check.name, []) for rank, answer in sorted(answers.items())}
        for name in dict.fromkeys(f.name for findings in found.values() for f in findings):
            same = {rank: next((f for f in findings if f.name == name), None) for rank, findings in found.items()}
            if check.compare is equal:  # a rank that did look and has not found it differs, too
                absent = Finding(name, True, value=ABSENT, expected=SAME)
                same = {rank: f or absent if found[rank] else None for rank, f in same.items()}
            judged = check.compare({rank: f for rank, f in same.items() if f}, device)
            rows += [row(check.name, rank, answers[rank]["host"], f) for rank, f in judged.items()]
    return rows


def row(check, rank, host, finding):
    status = NOTE if finding.ok is None else PASS if finding.ok else FAIL
    return {"check": check, "rank": rank, "host": host, "status": status, **asdict(finding), "measured": finding.shown}


def table(rows, world):
    """The rows for people: what ranks say alike in one line, failures last, with hosts and advice."""
    groups = {}
    for r in rows:
        alike = r["status"] == PASS and r["expected"] == SAME  # versions and the like: one line a check
        groups.setdefault((r["check"], alike or r["name"], r["status"], r["expected"], r["advice"]), []).append(r)
    lines = [("", "check", "what", "measured", "expected", "where")]
    listed, advices = [], []
    for (check, name, status, expected, advice), same in sorted(groups.items(), key=lambda group: group[0][2] == FAIL):
        if name is True:
            values = dict.fromkeys(f"{r['name']} {r['measured']}" for r in same)
            listed.append(f"{PASS}  {check}, {SAME}: {', '.join(values)}")
            continue
        lines.append((status, check, name, _span(same), expected or "-", _where(same, world)))
        advices.append(advice)
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    first, *others = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths)), line[5]]) for line in lines]
    others = [line + (f"\n      {advice}" if advice else "") for line, advice in zip(others, advices)]
    return "\n".join([*listed, "", first, *others])


def _span(same):
    values = [r["value"] for r in same]
    if len(same) > 1 and all(isinstance(v, float) for v in values):
        return f"{min(values):.3g} to {max(values):.3g} {same[0]['unit']}".rstrip()
    texts = list(dict.fromkeys(r["measured"] for r in same))
    return texts[0] + (f" and {len(texts) - 1} others" if len(texts) > 1 else "")


def _where(same, world):
    if len(same) == world:
        return f"all {world} ranks" if world > 1 else f"rank 0 ({same[0]['host']})"
    names = [f"rank {r['rank']} ({r['host']})" for r in same[:SHOWN]]
    return ", ".join(names) + (f" and {len(same) - SHOWN} more" if len(same) > SHOWN else "")
