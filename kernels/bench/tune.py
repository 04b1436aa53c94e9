"""Measure launch configurations on this GPU and rewrite its part of `boreal_kernels/launch.json`.

    python kernels/bench/tune.py gated_rmsnorm          try the bench's CANDIDATES, keep the fastest of each kernel
    python kernels/bench/tune.py --all --dry-run        print what would be written

Kernels are tuned one after another at every shape of the bench, by the time of the direction they belong to. The bench's
proof has to pass with what was found, else nothing is written.
"""

import argparse
import json
import sys

import torch
from boreal_kernels import launch
from compiled import operations
from run import measure


class Trial:
    """Stands in for `launch.config`: candidates for one kernel, the table for the others, and who asked for what."""

    def __init__(self):
        self.table, self.kernel, self.use, self.asked = launch.config, None, None, {}

    def __call__(self, kernel, **shape):
        self.asked.setdefault(kernel, shape)
        return dict(self.use) if kernel == self.kernel else self.table(kernel, **shape)


def tune(bench, trial):
    """{kernel: entries of the table} for one operation; the fastest candidate at each distinct question."""
    found = {}
    for shape in bench.SHAPES.values():
        for kernel, (direction, candidates) in bench.CANDIDATES.items():
            times = []
            for use in candidates:
                trial.kernel, trial.use, trial.asked = kernel, use, {}
                try:
                    times.append(measure(bench, shape, bench.fast)[direction])
                except Exception as error:  # more shared memory or registers than there are
                    print(f"{kernel} {use}: {type(error).__name__}: {error}", file=sys.stderr)
                    times.append(float("inf"))
            best = min(range(len(times)), key=times.__getitem__)
            print(f"{kernel} {trial.asked.get(kernel)}: {times[best]:.4f} ms with {candidates[best]}", file=sys.stderr)
            entry = {"when": trial.asked.get(kernel, {}), "use": candidates[best]}
            entries = found.setdefault(kernel, [])
            if entry["when"] not in [e["when"] for e in entries]:
                entries.append(entry)
    trial.kernel = None
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("operation", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    args = parser.parse_args()
    known = operations()
    if not args.all and not args.operation:
        parser.error(f"name operations ({', '.join(known)}) or --all")
    if not torch.cuda.is_available():
        print("No CUDA device: nothing to measure here.", file=sys.stderr)
        return 1

    table = json.loads(launch.TABLE.read_text())
    launch.config = trial = Trial()
    for name in known if args.all else args.operation:
        bench = known[name]
        bench.fast = lambda bench=bench, **arguments: bench.operation(**arguments, backend="triton")
        table.setdefault(launch.device_name(), {}).update(tune(bench, trial))
    launch.config = trial.table
    if args.dry_run:
        print(json.dumps(table[launch.device_name()], indent=2))
        return 0
    before = launch.TABLE.read_text()
    launch.TABLE.write_text(json.dumps(table, indent=2) + "\n")
    launch.read.cache_clear()
    launch._config.cache_clear()
    try:
        for name in known if args.all else args.operation:
            known[name].proof("cuda")
    except BaseException:
        launch.TABLE.write_text(before)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
