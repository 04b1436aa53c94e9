"""What every kernel costs, compiled for Hopper without one: registers, stack, shared memory.

    python kernels/bench/compiled.py                    compare with compiled.json; exit 1 on growth or a new spill
    python kernels/bench/compiled.py --write            rewrite this Triton's part of it
    python kernels/bench/compiled.py --only gated_rmsnorm --few     one operation, its first variant
    python kernels/bench/compiled.py --json             print what was found

A kernel that needs more registers or shared memory than recorded, or any stack that is not recorded, is refused: it may
still be right, but somebody has to look at it and rewrite the table. Tables of two versions of Triton lie side by side.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from boreal_kernels import testing

HERE = Path(__file__).parent
TABLE = HERE / "compiled.json"
COSTS = ("registers", "stack", "shared")


def operations(only=None):
    """{operation: its bench module}."""
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return {name: importlib.import_module(f"bench_{name}") for name in names if not only or name in only}


def compile_all(report, only=None, few=False):
    """{label: costs} of every kernel that forward and backward of every variant launch, without running one."""
    found = {}
    for name, bench in operations(only).items():
        for variant, shape in list(bench.VARIANTS.items())[: 1 if few else None]:
            shape = dict(shape)
            for dtype in shape.pop("dtypes", bench.DTYPES)[: 1 if few else None]:
                del report[:]
                arguments = bench.inputs(**shape, dtype=dtype, device="cpu")
                with torch.no_grad():  # decoding has kernels of its own
                    bench.operation(**arguments, backend="triton")
                testing.run_both_ways(bench.operation, arguments, "triton")
                for kernel in report:
                    label = f"{name}: {kernel['kernel']} {_constants(kernel['constants'])} {str(dtype).removeprefix('torch.')}"
                    found[label] = {key: kernel[key] for key in (*COSTS, "warps", "stages")}
                print(f"{name}: {variant}, {dtype}: {len(report)} kernels", file=sys.stderr)
    return dict(sorted(found.items()))


def _constants(constants):
    return " ".join(f"{key}={value}" for key, value in sorted(constants.items()))


def problems(found, recorded):
    """One line for each kernel that got dearer or is not recorded."""
    lines = []
    for label, costs in found.items():
        if label not in recorded:
            lines.append(f"{label}: not recorded; found {costs}")
            continue
        for key in COSTS:
            if costs[key] > recorded[label][key]:
                lines.append(f"{label}: {key}: found {costs[key]}, recorded {recorded[label][key]}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table's part of this Triton")
    parser.add_argument("--only", nargs="+", metavar="OP", help="these operations")
    parser.add_argument("--few", action="store_true", help="the first variant and dtype of each")
    parser.add_argument("--json", action="store_true", help="print the costs")
    args = parser.parse_args()

    found = compile_all(testing.compile_only(), args.only, args.few)
    tools = testing.toolchain()
    key = f"triton {tools['triton']}, ptxas {tools['ptxas']}, sm_90"
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if args.json:
        print(json.dumps({key: found}, indent=1))
    if args.write:
        kept = table.get(key, {}) if args.only or args.few else {}
        table[key] = dict(sorted({**kept, **found}.items()))
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
        return 0
    if key not in table:
        print(f"{TABLE.name} has no part for {key}; parts: {', '.join(table) or 'none'}. --write adds one.", file=sys.stderr)
        return 1
    wrong = problems(found, table[key])
    print("\n".join(wrong) or f"{len(found)} kernels at or below the recorded cost ({key})", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
