"""Time the kernels on this GPU, beside everything else that computes the same.

    python kernels/bench/run.py --all                       every operation, shape and implementation
    python kernels/bench/run.py gated_rmsnorm --json out.json
    python kernels/bench/run.py --all --table               the Markdown table of kernels/README.md

An operation's proof runs first (outputs and every gradient against float64); where it fails, or where there is no CUDA
device, nothing is timed and the exit status is 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
from boreal_kernels import backend, testing
from compiled import operations

# One H200 or H100 SXM: sustained copies and bf16 matrix products, TB/s and TFLOP/s; the figures of the roofline.
PEAKS = {"NVIDIA H200": (4.8, 989), "NVIDIA H100 80GB HBM3": (3.35, 989)}


def milliseconds(function):
    """Median time of one call by CUDA events, the cache cold as in a network."""
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def measure(bench, shape, call):
    """{"forward": ms, "backward": ms} of one implementation."""
    arguments = bench.inputs(**shape, dtype=torch.bfloat16, device="cuda")
    leaves = {
        name: x.detach().requires_grad_() for name, x in arguments.items() if torch.is_tensor(x) and x.is_floating_point()
    }
    arguments |= leaves
    with torch.no_grad():
        forward = milliseconds(lambda: call(**arguments))
    outputs = call(**arguments)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None and x.requires_grad]
    grads = [torch.randn_like(x) for x in outputs]
    inputs = list(leaves.values())
    backward = milliseconds(
        lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
    )
    return {"forward": forward, "backward": backward}


def rows(name, bench):
    """One dict for each shape, implementation and direction."""
    calls = {"boreal": lambda **arguments: bench.operation(**arguments, backend="triton"), **bench.rivals()}
    terabytes, teraflops = PEAKS.get(torch.cuda.get_device_name(), (None, None))
    for label, shape in bench.SHAPES.items():
        for who, call in calls.items():
            try:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                times = measure(bench, shape, call)
                peak = torch.cuda.max_memory_allocated() - before
            except Exception as error:  # a rival that cannot run this shape is a result too
                if who == "boreal":
                    raise
                yield {"operation": name, "shape": label, "who": who, "error": f"{type(error).__name__}: {error}"[:200]}
                continue
            for direction, ms in times.items():
                moved, flops = bench.cost(**shape)[direction]
                row = {"operation": name, "shape": label, "who": who, "direction": direction, "ms": ms}
                row |= {"gigabytes_per_s": moved / ms / 1e6, "teraflops": flops / ms / 1e9, "peak_bytes": peak}
                if terabytes:
                    row["roofline"] = max(moved / (terabytes * 1e9), flops / (teraflops * 1e9)) / ms
                yield row


def environment():
    """What the figures belong to."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **testing.toolchain(),
        "commit": commit.stdout.strip(),
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def table(results):
    """Markdown: one line a measurement."""
    lines = ["| operation | shape | direction | who | ms | GB/s | TFLOP/s | % of roofline |", "|---|---|---|---|---|---|---|---|"]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['operation']} | {r['shape']} | | {r['who']} | {r['error']} | | | |")
            continue
        share = f"{100 * r['roofline']:.0f}" if "roofline" in r else "unknown device"
        lines.append(
            f"| {r['operation']} | {r['shape']} | {r['direction']} | {r['who']} | {r['ms']:.3f} "
            f"| {r['gigabytes_per_s']:.0f} | {r['teraflops']:.0f} | {share} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("operation", nargs="*", help="which operations")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, as they come")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    known = operations()
    if unknown := set(args.operation) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if not args.all and not args.operation:
        parser.error(f"name operations ({', '.join(known)}) or --all")
    if not torch.cuda.is_available():
        print("No CUDA device: nothing to time here. Right or wrong: pytest tests/kernels.", file=sys.stderr)
        return 1

    results, failed = [], False
    for name in known if args.all else args.operation:
        for operation in (o for o in backend.BACKENDS if o.endswith(name)):
            print(backend.choose(operation, device="cuda"), file=sys.stderr)
        try:
            known[name].proof("cuda")
        except AssertionError as error:
            print(f"{name}: the proof fails, so nothing is timed: {error}", file=sys.stderr)
            results.append({"operation": name, "shape": "", "who": "boreal", "error": f"proof: {error}"})
            failed = True
            continue
        for row in rows(name, known[name]):
            results.append(row)
            print(json.dumps(row), file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    if args.table:
        print(table(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
