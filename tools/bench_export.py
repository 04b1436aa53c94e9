"""How fast `boreal export` is on this machine: a synthetic checkpoint, exported, beside a plain safetensors write
and a plain read of the checkpoint.

    python tools/bench_export.py --parameters 1e9 [--folder DIR] [--repeat 3] [--warm] [--json]

The checkpoint is a real one in format: BOREAL-10B's widths and block mix, random bf16 weights only, in pieces as 8 ranks
leave them. Both writes make the same bytes in files of the same size and end with fsync; the plain one saves tensors
that are in memory already. The checkpoint is dropped from the page cache before every run, unless --warm. Every run is
a process of its own, whose peak memory is VmHWM; what was written is deleted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from boreal_megatron.config.presets import PRESETS
from boreal_megatron.config.schema import Config, Model
from boreal_megatron.convert import hf, writer
from boreal_megatron.convert.export import export
from boreal_megatron.convert.mapping import keeps_fp32, mapping
from boreal_megatron.durable import flush
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.plan import params
from boreal_megatron.train import store

RANKS = 8
SHARD_BYTES = 1_000_000_000  # the plain write has a whole file in memory
SHARE = 0.4  # of the disk's free space that may be used
WRITE, READ = "plain safetensors write", "plain read of the checkpoint"
RUNS = ("export", "export --no-verify", WRITE, READ)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parameters", type=float, default=1e9, help="about so many")
    p.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--warm", action="store_true", help="leave the checkpoint in the page cache")
    p.add_argument("--json", action="store_true")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-export-") as folder:
        found = bench(Path(folder), args)
    print(json.dumps(found, indent=1) if args.json else table(found))


def bench(folder, args):
    model = about(args.parameters)
    count = params.count(model)["with_mtp"]
    free = shutil.disk_usage(folder).free
    if 4 * count > SHARE * free:  # checkpoint and export, 2 bytes a number each
        sys.exit(
            f"{count / 1e9:.2f}e9 parameters take {4 * count / 1e9:.0f} GB; found {free / 1e9:.0f} GB free in {folder}, "
            f"of which {SHARE:.0%} may be used; ask for at most --parameters {SHARE * free / 4:.1e}"
        )
    checkpoint, largest = synthetic(folder, model)
    runs = {name: [] for name in RUNS}
    for _ in range(args.repeat):
        for name, measured in runs.items():
            if not args.warm:
                forget(checkpoint)
            command = [sys.executable, __file__, "--child", name, str(checkpoint), str(folder / "out")]
            measured.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            shutil.rmtree(folder / "out", ignore_errors=True)
    return {
        "parameters": count,
        "written_gb": runs["export"][0]["bytes"] / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "runs": {name: summary(measured) for name, measured in runs.items()},
    }


def about(parameters):
    """BOREAL-10B with as many groups of its repeated block as make about so many parameters."""
    choices = [
        Model(**PRESETS["boreal-10b-moe"] | {"pattern": f"{groups}x(*-GEG-G-) / *-"}) for groups in range(1, 11)
    ]
    return min(choices, key=lambda model: abs(params.count(model)["with_mtp"] - parameters))


def synthetic(folder, model):
    """A finished checkpoint; returns its path and the bytes of its largest tensor."""
    text = [Path(__file__).read_text()]
    train_bpe(text, 300, folder / "tokenizer")
    config = Config(
        model=model,
        phases=[dict(name="none", until_steps=1, sequence=4096, positions_per_step=4096)],
        schedule=dict(peak=1e-3),
        data=dict(tokenizer=str(folder / "tokenizer"), sources={"none": "none"}),
        checkpoint=dict(folder=str(folder / "run")),
    )
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)) * 0.02
    largest = 0

    def tensors():
        nonlocal largest
        for rule in mapping(model):
            for name, shape in rule.train.items():
                kind = torch.float32 if keeps_fp32(rule.hf[0]) else torch.bfloat16
                tensor = torch.empty(shape, dtype=kind)
                for part in tensor.view(-1).split(len(noise)):
                    part.copy_(noise[: len(part)])
                if name.endswith("word_embeddings.weight"):
                    tensor[model.vocab_size :] = 0
                largest = max(largest, tensor.nbytes * (model.moe.experts if rule.index is not None else 1))
                yield name, rule.index, tensor
                del tensor, part

    partial = store.begin(config.checkpoint.folder, 0, 2 * params.count(model)["with_mtp"])
    writer.write_tensors(partial, tensors(), RANKS)
    state = {"step": 0}
    return store.finish(partial, config, {"state": state, "layout": None, "contents": "weights"}), largest


def forget(checkpoint):
    """Out of the page cache."""
    for file in checkpoint.glob("*.distcp"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(name, checkpoint, out):
    """One run in this process: seconds, bytes, peak memory."""
    if name == READ:
        seconds, size = read(Path(checkpoint))
    elif name == WRITE:
        seconds, size = plain(checkpoint, Path(out))
    else:
        began = time.perf_counter()
        verify = name == "export"
        size = export(checkpoint, out, dtype="bf16", verify=verify, max_shard_bytes=SHARD_BYTES)["bytes"]
        seconds = time.perf_counter() - began
    peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return {"seconds": seconds, "bytes": size, "peak_memory_gb": int(peak[0].split()[1]) * 1024 / 1e9}


def plain(checkpoint, out):
    """`safetensors.torch.save_file` of the same files; only the saving and its fsync are timed."""
    from safetensors.torch import save_file

    model = store.saved_config(checkpoint).model
    plan = hf.planned(mapping(model), "bf16", SHARD_BYTES)
    out.mkdir()
    seconds = 0.0
    for file in plan.sizes:
        tensors = {n: torch.zeros(p.shape, dtype=p.dtype).fill_(0.02) for n, p in plan.places.items() if p.file == file}
        began = time.perf_counter()
        save_file(tensors, out / file, metadata={"format": "pt"})
        flush(out / file)
        seconds += time.perf_counter() - began
    return seconds, sum(plan.sizes.values())


def read(checkpoint):
    """All its files, one after the other, into the same memory."""
    block, size = bytearray(1 << 24), 0
    began = time.perf_counter()
    for file in checkpoint.glob("*.distcp"):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(block):
                size += count
    return time.perf_counter() - began, size


def summary(measured):
    speeds = [m["bytes"] / m["seconds"] / 1e6 for m in measured]
    return {
        "best_mb_per_s": max(speeds),
        "median_mb_per_s": statistics.median(speeds),
        "seconds": [round(m["seconds"], 2) for m in measured],
        "peak_memory_gb": max(m["peak_memory_gb"] for m in measured),
    }


def table(found):
    lines = [
        f"{found['parameters'] / 1e9:.2f}e9 parameters, {found['written_gb']:.2f} GB of bf16, largest training tensor "
        f"{found['largest_tensor_gb']:.2f} GB",
        f"{'':<28}{'best MB/s':>12}{'median MB/s':>14}{'peak GB':>10}   seconds",
    ]
    for name, row in found["runs"].items():
        lines.append(
            f"{name:<28}{row['best_mb_per_s']:>12,.0f}{row['median_mb_per_s']:>14,.0f}{row['peak_memory_gb']:>10.2f}"
            f"   {row['seconds']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
