"""The curves of a run, drawn from its metrics.jsonl."""

import json
import math
from pathlib import Path


def plot_losses(folder, out, *, unigram_entropy=None):
    """Loss over raw tokens: training, validation, phases, and the unigram entropy as the line to be under.

    In superposition a bag's cross-entropy cannot fall below the entropy of its own counts, at most log k, so
    training is drawn minus log k (arXiv 2605.06546).

    Args:
        folder: where `metrics.jsonl` lies.
        out: PNG path.
        unigram_entropy: nats a token, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in records if r["kind"] == "train"]
    tokens = {r["step"]: r["raw_tokens"] for r in training}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), gridspec_kw={"width_ratios": [2, 1]})
    for number, phase in enumerate(dict.fromkeys(r["phase"] for r in training)):
        mine = [r for r in training if r["phase"] == phase]
        x = [r["raw_tokens"] / 1e6 for r in mine]
        left.plot(x, [r["loss_minus_log_bag"] for r in mine], lw=1, color=f"C{number}", label=f"training, {phase}")
        left.axvspan(x[0], x[-1], color=f"C{number}", alpha=0.06)
    checks = [r for r in records if r["kind"] == "validation" and r["step"] in tokens]
    x = [tokens[r["step"]] / 1e6 for r in checks]
    left.plot(x, [r["loss"] - math.log(r["bag_size"]) for r in checks], "ko-", ms=4, lw=1, label="validation")
    if unigram_entropy is not None:
        left.axhline(unigram_entropy, ls="--", color="grey", label=f"unigram entropy {unigram_entropy:.2f}")
    left.set(xlabel="raw tokens (millions)", ylabel="nats a target, minus log(bag size)", title="Loss")
    left.legend(fontsize=8)
    balanced = [r for r in training if "max_violation_mean" in r]
    right.plot([r["step"] for r in balanced], [r["max_violation_mean"] for r in balanced], lw=1)
    right.set(xlabel="step", ylabel="MaxVio, mean over layers", title="Expert balance", ylim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
