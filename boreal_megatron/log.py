"""What a run says: Megatron's log line and a progress bar on the terminal, JSON lines and TensorBoard for tools."""

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm

LINE = (
    " [{time}] iteration {step:8d}/{steps:8d} | consumed samples: {samples:12d} | "
    "elapsed time per iteration (ms): {ms:.1f} | throughput per GPU (TFLOP/s/GPU): {teraflops:.3f} | "
    "learning rate: {lr:.6E} | global batch size: {batch:5d} | lm loss: {loss:.6E} | {mtp}loss scale: 1.0 | grad norm: {norm:.3f} | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |"
)


class Reporter:
    """Speaks on one rank and is silent on the others.

    Args:
        folder: where `metrics.jsonl` and `tensorboard/` go.
        speaks: whether this rank does.
        steps: planned steps, for the bar.
        step: steps already taken; later records of an interrupted run are cut off `metrics.jsonl`.
    """

    def __init__(self, folder, speaks, steps, step):
        self.speaks, self.steps = speaks, steps
        if not speaks:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _keep_until(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        # In a file the log lines tell the progress, and a bar would only be noise.
        self.bar = tqdm(
            total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def say(self, text):
        """A line for people."""
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def record(self, kind, step, **values):
        """A record for programs: one JSON line, and each number, in dicts too, as a TensorBoard scalar."""
        if not self.speaks:
            return
        values = {key: value for key, value in values.items() if value is not None}
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for key, value in values.items():
            inside = {f"{key}/{part}": each for part, each in value.items()} if isinstance(value, dict) else {key: value}
            for name, number in inside.items():
                if isinstance(number, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", number, step)

    def advance(self, step, loss):
        if self.speaks:
            self.bar.total = max(self.bar.total, step)
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self):
        if self.speaks:
            self.bar.close()
            self.board.close()
            self.file.close()


def megatron_line(*, step, steps, samples, seconds, teraflops, lr, batch, loss, mtp_loss, norm):
    """The line that people's log parsers read."""
    mtp = f"mtp_1 loss: {mtp_loss:.6E} | " if mtp_loss is not None else ""
    return LINE.format(
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        step=step,
        steps=steps,
        samples=samples,
        ms=seconds * 1000,
        teraflops=teraflops,
        lr=lr,
        batch=batch,
        loss=loss,
        mtp=mtp,
        norm=norm,
    )


def _keep_until(path, step):
    """Drop records past `step`: a resumed run writes them again. A run from the start sets the old file aside."""
    if not path.exists():
        return
    if step == 0:
        path.replace(path.with_suffix(".jsonl.old"))
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)


def quiet():
    """Leave out what megatron-core says about optional packages that are not installed; errors still show."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch|boreal_megatron\.platform)\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor")
    # The process that a save starts imports megatron-core anew and takes its filters from the environment.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")


@contextlib.contextmanager
def bar(what, unit):
    """A progress bar driven by (done, total) calls."""
    with tqdm(desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, disable=not sys.stderr.isatty()) as shown:

        def progress(done, total):
            shown.total = total
            shown.update(done - shown.n)

        yield progress
