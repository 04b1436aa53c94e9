"""Progress of long work on stderr: a bar on a terminal, else a line now and then that a log file can keep."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10


class Bar:
    """`update(n, note)` as work gets done; use as a context manager.

    Args:
        what: said before the numbers.
        total: how much there is to do, or None.
        unit: of the numbers.
        silent: say nothing.
    """

    def __init__(self, what, total, unit="B", silent=False):
        self.what, self.total, self.unit, self.silent = what, total, unit, silent
        self.done, self.note = 0, ""
        self.began = self.said = time.monotonic()
        terminal = sys.stderr.isatty() and not silent
        self.bar = tqdm(desc=what, total=total, unit=unit, unit_scale=True, file=sys.stderr) if terminal else None

    def update(self, count, note=""):
        self.done, self.note = self.done + count, note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif not self.silent and time.monotonic() - self.said >= LINE_SECONDS:
            self._say()

    def _say(self):
        self.said = time.monotonic()
        line = tqdm.format_meter(
            self.done, self.total, self.said - self.began, prefix=self.what, unit=self.unit, unit_scale=True,
            ncols=0, postfix=self.note,
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.bar is not None:
            self.bar.close()
        elif not self.silent:
            self._say()
