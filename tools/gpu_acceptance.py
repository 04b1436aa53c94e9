#!/usr/bin/env python
"""One GPU against the whole system: kernel proofs, parity layer by layer, speed, loss, checkpoint. Under 8 minutes.

    python tools/gpu_acceptance.py --out DIR                     every part, in processes of their own
    python tools/gpu_acceptance.py --out DIR --only parity bf16  some

Writes DIR/acceptance.json and DIR/acceptance.md after every part. What was not measured says so, with the reason. Exit
code 1 if something is wrong; a goal of speed that is missed is `below goal` and no failure.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from boreal_megatron.acceptance.rows import FAIL, PARTS, PASS, report, row
from boreal_megatron.log import bar, quiet

ROOT = Path(__file__).resolve().parent.parent


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, help="some parts; parity needs reference")
    p.add_argument("--minutes", type=float, default=8, help="no part starts or goes on after; default: %(default)s")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # this process is one part
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args.part, args.out)
    chosen = [name for name in PARTS if not args.only or name in args.only]
    end = time.monotonic() + 60 * args.minutes
    # What needs no GPU runs beside what does.
    running = {name: begin(name, args.out) for name in chosen if PARTS[name].hidden}
    found = {}
    with bar("acceptance", "parts") as progress:
        for done, name in enumerate(chosen):
            found[name] = finish(name, running.get(name), args.out, end)
            rows = [r for part in found.values() for r in part]
            (args.out / "acceptance.json").write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")
            (args.out / "acceptance.md").write_text(report(rows) + "\n")
            progress(done + 1, len(chosen))
    print(report(rows))
    return int(any(r["status"] == FAIL for r in rows))


def begin(name, out):
    """Start a part as a process; its rows will lie in DIR/NAME.json, what it says in DIR/NAME.log."""
    (out / f"{name}.json").unlink(missing_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if PARTS[name].hidden else {}
    with (out / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "--out", str(out), "--part", name],
            cwd=ROOT, env={**os.environ, **hidden}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(name, process, out, end):
    """A part's rows, and one more where it did not come to its end."""
    left = end - time.monotonic()
    if left <= 0:
        if process:
            process.kill()
        return [row(name, "all of it", why="no time was left: --minutes, --only")]
    process, limit = process or begin(name, out), min(PARTS[name].limit, left)
    try:
        code = process.wait(limit)
        problem = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        problem = f"not finished after {limit:.0f} s"
    path = out / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    if problem:
        last = (out / f"{name}.log").read_text().strip().splitlines()[-1:]
        rows.append(row(name, "the rest of it", status=FAIL, why=f"{problem}: {' '.join(last)[:300]}"))
    return rows


def run_part(name, out):
    """This process's part; its rows are on the disk as they come."""
    quiet()
    rows = []
    for found in kernels() if name == "kernels" else part(name, out):
        rows.append(found)
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return 0


def part(name, out):
    from boreal_megatron import parallel
    from boreal_megatron.acceptance import parts
    from boreal_megatron.config.schema import Parallel

    mesh = parallel.start(Parallel(), seed=1234)
    return parts.RUN[name](parts.Bench.here(parts.FULL, mesh, out))


def kernels():
    """The proofs of `kernels/bench`, and each kernel's time at its first shape."""
    import torch

    sys.path.insert(0, str(ROOT / "kernels" / "bench"))
    import run

    for name, bench in run.operations().items():
        if not torch.cuda.is_available():
            yield row("kernels", f"{name}: proof", why="no CUDA device")
            continue
        try:
            bench.proof("cuda")
        except Exception as error:  # wrong numbers, or kernels that do not compile or fit here
            yield row(
                "kernels", f"{name}: proof", "wrong", status=FAIL, why=f"{type(error).__name__}: {str(error)[:300]}"
            )
            continue
        yield row("kernels", f"{name}: proof", "outputs and gradients agree with float64", status=PASS)
        label, shape = next(iter(bench.SHAPES.items()))
        times = run.measure(
            bench, shape, lambda bench=bench, **arguments: bench.operation(**arguments, backend="triton")
        )
        for direction, ms in times.items():
            yield row("kernels", f"{name}: {direction}, {label}", ms, "ms")


if __name__ == "__main__":
    sys.exit(main())
