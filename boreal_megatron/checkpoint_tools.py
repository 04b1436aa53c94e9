"""`boreal checkpoint inspect | verify | diff | reshard`: looking at checkpoints without, and with, their layout."""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import store


def add_parser(verbs):
    top = verbs.add_parser("checkpoint", help="inspect, verify, compare and reshard checkpoints")
    whats = top.add_subparsers(required=True, metavar="WHAT")
    one = "an iter_* folder, or the folder above it (its latest)"

    p = whats.add_parser("inspect", help="step, tokens, layout, versions and sizes")
    p.add_argument("checkpoint", help=one)
    p.add_argument("--tensors", action="store_true", help="also every tensor's name, shape and dtype")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_inspect)

    p = whats.add_parser("verify", help="read every byte and compare it with the manifest; exit 1 where one differs")
    p.add_argument("checkpoint", nargs="+", help=one)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_verify)

    p = whats.add_parser("diff", help="what differs between two checkpoints; exit 1 where anything does")
    p.add_argument("a", help=one)
    p.add_argument("b", help=one)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_diff)

    p = whats.add_parser(
        "reshard",
        help="write a checkpoint anew under another layout; start it with torchrun for layouts of several processes",
    )
    p.add_argument("checkpoint", help=one)
    p.add_argument("out", help="the folder above the new iter_* folder")
    p.add_argument("overrides", nargs="*", help="parallel.*, optimizer.distributed and others as a.b.c=value")
    p.set_defaults(run=_reshard)


# ---------------------------------------------------------------- inspect


def inspect(path):
    """What a checkpoint says of itself and what its tensors are.

    Returns:
        dict, JSON-able: path, step, contents, raw_tokens, positions, windows, phase, sources, layout, precision,
        pattern, bytes, files, environment, groups (kind -> tensors, numbers, bytes, dtypes), tensors (name -> shape,
        dtype).
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from boreal_megatron import safe

    said = store.describe(path)
    ledger = said["state"]["ledger"]
    files = json.loads((Path(path) / store.MANIFEST).read_text())["files"]
    tensors, groups = {}, defaultdict(lambda: {"tensors": 0, "numbers": 0, "bytes": 0, "dtypes": set()})
    for name, entry in sorted(safe.read_metadata(path).state_dict_metadata.items()):
        if not isinstance(entry, TensorStorageMetadata):
            continue
        dtype = entry.properties.dtype
        tensors[name] = {"shape": list(entry.size), "dtype": str(dtype).removeprefix("torch.")}
        group = groups[_kind(name)]
        group["tensors"] += 1
        group["numbers"] += entry.size.numel()
        group["bytes"] += entry.size.numel() * dtype.itemsize
        group["dtypes"].add(tensors[name]["dtype"])
    return {
        "path": str(path),
        "step": said["state"]["step"],
        "contents": said["contents"],
        "raw_tokens": sum(source["raw_tokens"] for source in ledger["sources"].values()),
        "positions": ledger["positions"],
        "windows": ledger["windows"],
        "phase": ledger["phase"],
        "sources": ledger["sources"],
        "layout": said["layout"],
        "precision": said["config"]["precision"],
        "pattern": said["config"]["model"]["pattern"],
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "files": len(files),
        "environment": json.loads((Path(path) / "environment.json").read_text()),
        "groups": {kind: {**group, "dtypes": sorted(group["dtypes"])} for kind, group in sorted(groups.items())},
        "tensors": tensors,
    }


def _kind(name):
    """weights, or the optimizer's part: master weights, exp_avg, exp_avg_sq."""
    if not name.startswith("optimizer.state."):
        return "weights"
    kind = name.split(".")[2]
    return "master weights" if kind in ("param", "fp32_param") else kind


def _inspect(args):
    found = inspect(store.resolve(args.checkpoint))
    if not args.tensors:
        del found["tensors"]
    if args.json:
        print(json.dumps(found, indent=1))
        return
    layout, packages = found["layout"], found["environment"]["packages"]
    print(f"{found['path']}: step {found['step']}, phase {found['phase'] or '-'}, {found['contents']}")
    print(f"  data        {found['raw_tokens']:,} raw tokens, {found['positions']:,} positions, {found['windows']:,} windows")
    for name, cursor in found["sources"].items():
        print(f"    {name}: epoch {cursor['epoch']}, offset {cursor['offset']:,}, {cursor['raw_tokens']:,} raw tokens read")
    print(f"  network     {found['pattern']}, {found['precision']}")
    if layout:
        said = {key: value for key, value in layout.items() if key == "world" or value not in (1, None)}
        print("  layout      " + ", ".join(f"{key} {value}" for key, value in said.items()))
    print("  written by  " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    print(f"  on disk     {found['bytes'] / 1e6:,.1f} MB in {found['files']} files")
    for kind, group in found["groups"].items():
        print(
            f"    {kind:<15}{group['numbers']:>16,} numbers in {group['tensors']:,} tensors, {group['bytes'] / 1e6:,.1f} MB "
            f"({', '.join(group['dtypes'])})"
        )
    for name, tensor in found.get("tensors", {}).items():
        print(f"    {name}  {tensor['shape']}  {tensor['dtype']}")


# ---------------------------------------------------------------- verify


def _verify(args):
    from boreal_megatron.log import bar

    found = {}
    for given in args.checkpoint:
        # A folder that never got its manifest is looked at as well: that is what verify is for.
        path = Path(given) if Path(given).name.startswith("iter_") and Path(given).is_dir() else store.resolve(given)
        with bar(path.name, "B") as progress:
            found[str(path)] = store.verify(path, progress=progress)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for path, problems in found.items():
            print(ProblemsError(path, problems) if problems else f"{path}: every file is there, whole, and the only one")
    return 1 if any(found.values()) else 0


# ---------------------------------------------------------------- diff


def diff(a, b, progress=None):
    """What differs between two checkpoints: configuration, state, and every tensor, one at a time.

    Args:
        a, b: iter_* folders.
        progress: called with (tensors compared, tensors in all), or None.

    Returns:
        dict: config and state (key -> [a's, b's]), only_a and only_b (tensor names), equal (a count), and changed: name
        -> found difference in words ("shape"), or largest absolute and relative L2 difference.
    """
    from boreal_megatron.convert.reader import TensorReader

    said = [store.describe(path) for path in (a, b)]
    readers = [TensorReader(path, leave_out=()) for path in (a, b)]
    names = [reader.shapes.keys() for reader in readers]
    out = {
        "config": _differing(*(store.flat(_indexed(one["config"])) for one in said)),
        "state": _differing(*(store.flat(_indexed(one["state"])) for one in said)),
        "only_a": sorted(names[0] - names[1]),
        "only_b": sorted(names[1] - names[0]),
        "equal": 0,
        "changed": {},
    }
    both = sorted(names[0] & names[1])
    for count, name in enumerate(both, 1):
        shapes = [reader.shapes[name] for reader in readers]
        if shapes[0] != shapes[1]:
            out["changed"][name] = {"shape": [list(shape) for shape in shapes]}
        else:
            one, two = (reader(name).double() for reader in readers)
            apart = (one - two).norm().item()
            if apart == 0.0:
                out["equal"] += 1
            else:
                largest, size = (one - two).abs().max().item(), max(one.norm().item(), two.norm().item())
                out["changed"][name] = {"max": largest, "relative": apart / size}
        if progress:
            progress(count, len(both))
    return out


def _indexed(values):
    """Lists as dicts, so that every leaf has a dotted name."""
    if isinstance(values, dict):
        return {str(key): _indexed(value) for key, value in values.items()}
    if isinstance(values, list):
        return {str(number): _indexed(value) for number, value in enumerate(values)}
    return values


def _differing(a, b):
    return {key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _diff(args):
    from boreal_megatron.log import bar

    paths = [store.resolve(args.a), store.resolve(args.b)]
    with bar("comparing", "tensors") as progress:
        found = diff(*paths, progress)
    different = any(value for key, value in found.items() if key != "equal")
    if args.json:
        print(json.dumps(found, indent=1))
        return int(different)
    for part in ("config", "state"):
        for key, (one, two) in found[part].items():
            print(f"{part}.{key}: {one!r} -> {two!r}")
    for part, path in (("only_a", paths[0]), ("only_b", paths[1])):
        for name in found[part]:
            print(f"{name}: only in {path}")
    largest_first = sorted(found["changed"].items(), key=lambda item: -item[1].get("relative", float("inf")))
    for name, how in largest_first:
        if "shape" in how:
            print(f"{name}: shape {how['shape'][0]} -> {how['shape'][1]}")
        else:
            print(f"{name}: relative {how['relative']:.2e}, largest {how['max']:.2e}")
    print(f"{found['equal']} tensors are equal, {len(found['changed'])} differ")
    return int(different)


# ---------------------------------------------------------------- reshard


def reshard(path, out, overrides, world):
    """Load a checkpoint under another layout and save it there: fewer or more files, with or without the distributed
    optimizer. Training does the same by itself when it resumes; this proves that it will, and where. It needs no GPU;
    the amax histories of delayed FP8 scaling stay behind, and begin anew.

    Args:
        path: the iter_* folder.
        out: the folder above the new one; it has no checkpoints yet.
        overrides: `a.b.c=value` words on the checkpoint's configuration.
        world: processes of this launch.

    Returns:
        path of the new checkpoint (the same on every rank).
    """
    from boreal_megatron import parallel
    from boreal_megatron.config import load as config_load
    from boreal_megatron.config.check import check
    from boreal_megatron.log import Reporter
    from boreal_megatron.model import boreal
    from boreal_megatron.train import checkpoint, optim

    values = store.describe(path)["config"]
    config = config_load.parse(values, str(Path(path) / "run_config.yaml"), [*overrides, f"checkpoint.folder={out}"])
    check(config, world)
    if Path(out).exists() and any(Path(out).glob("iter_*")):
        raise BorealError(f"{out} has checkpoints already; name a folder without any")
    mesh = parallel.start(config.parallel, config.seed)
    if problems := checkpoint.damage(path, mesh):
        raise ProblemsError(f"{path} is damaged", problems)
    plain = config.plain()
    wrapped = optim.wrap(plain, boreal.build(plain, mesh))
    optimizer = optim.build(plain, wrapped)
    state = checkpoint.load(path, plain, wrapped, optimizer, mesh)
    saver = checkpoint.Saver(config, mesh, Reporter(None, False, 0, 0))
    saver.save(wrapped, optimizer, state)
    saver.close()
    return saver.last_good


def _reshard(args):
    from boreal_megatron.log import quiet

    quiet()
    strange = [word for word in args.overrides if "=" not in word]
    if strange:
        raise BorealError(f"{strange[0]!r} is no override; expected a.b.c=value")
    made = reshard(store.resolve(args.checkpoint), args.out, args.overrides, int(os.environ.get("WORLD_SIZE", 1)))
    from boreal_megatron import parallel

    parallel.stop()
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {made}")
        sys.stdout.flush()
