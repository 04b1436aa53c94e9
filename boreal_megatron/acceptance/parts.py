"""The parts of the GPU acceptance: right, layer by layer, and fast, by what `boreal train` itself runs.

A part is a function that yields rows. Each runs in a process of its own, so that a crash or a hang costs one part. All
of them run on a CPU too, where speeds mean nothing and are not held against goals.
"""

import contextlib
import gc
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from boreal_megatron import doctor, parallel, platform
from boreal_megatron.acceptance.rows import BELOW, FAIL, NOTE, PASS, row
from boreal_megatron.config.load import parse
from boreal_megatron.data import batch
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.indexed import IndexedWriter
from boreal_megatron.errors import BorealError
from boreal_megatron.model import boreal
from boreal_megatron.model.head import Losses
from boreal_megatron.preflight.parity import part_of_gradient, whole
from boreal_megatron.plan import flops, hardware, memory
from boreal_megatron.train import checkpoint, step as train_step

# FP8 as the configuration spells it; one that refuses it is a row that says so.
PRECISIONS = {"fp32": ("precision=fp32",), "bf16": ("precision=bf16",), "fp8": ("precision.fp8=tensorwise",)}
BAGS = (1, 4)
COMPARED = ("output", "gradient", "weights")  # of each half-block: what it adds to the stream and to its gradient
# The largest relative errors (L2) of these three, and of the losses, against FP32 on a CPU. bf16 on a CPU has up to
# 0.037, 0.020 and 0.009 over BOREAL-250M's half-blocks, where what is added drowns in the rounding of a larger stream;
# on a GPU, and in FP8: not measured.
LIMITS = {"fp32": (1e-3, 1e-3, 1e-3, 1e-4), "bf16": (0.15, 0.1, 0.03, 5e-3), "fp8": (0.4, 0.3, 0.2, 2e-2)}
GOALS = {"bf16, bags of 1": 121_000.0}  # positions/s of BOREAL-250M at 8K on one H200; a ceiling of 144,000 is derived
BLOCKED = 0.5  # seconds that training may stand still for a checkpoint
FP8_LOSS = 0.05  # nats that FP8 may lie above bf16 at the end of the curves
GIB = 2**30


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        model: of the throughput, parity, checkpoint and loss parts, as in a configuration. wide: of the layer pair.
        sequence, windows: positions of a window, windows of a step, all of one micro-batch.
        warmup, steps: steps that are not and that are timed. curve: steps of a loss curve.
        parity: positions of the parity row, in two documents.
    """

    model: dict
    wide: dict
    sequence: int
    windows: int
    warmup: int
    steps: int
    curve: int
    parity: int


FULL = Scale(
    model={"preset": "boreal-250m"},
    wide={"preset": "boreal-10b-moe", "pattern": "*-GE", "vocab_size": 8192},
    sequence=8192,
    windows=4,
    warmup=5,
    steps=20,
    curve=60,
    parity=512,
)


@dataclass(frozen=True)
class Bench:
    """What a part is given: its Scale, the mesh of one rank, a folder for files, and the GPU or None."""

    scale: Scale
    mesh: parallel.Mesh
    folder: Path
    gpu: hardware.GPU | None

    @classmethod
    def here(cls, scale, mesh, folder):
        return cls(scale, mesh, Path(folder), hardware.of_device(platform.current().device_name()))


# ---------------------------------------------------------------- a run


def config(bench, model, overrides, *, bag=1, steps, sequence=None, windows=None):
    """A `config.schema.Config` of so many steps on the bytes of Python's own sources.

    Raises:
        ProblemsError: for what this version does not have, such as FP8.
    """
    sequence, windows = sequence or bench.scale.sequence, windows or bench.scale.windows
    values = {
        "model": dict(model),
        "micro_batch": windows,
        "phases": [
            {
                "name": "only",
                "until_steps": steps,
                "bag_size": bag,
                "sequence": sequence,
                "positions_per_step": sequence * windows,
            }
        ],
        "schedule": {"peak": 1e-3, "warmup_steps": 10, "shape": "constant"},
        "data": {"tokenizer": "none", "sources": {"bytes": str(bench.folder / "bytes")}},
        "checkpoint": {"folder": str(bench.folder / "checkpoints"), "async_save": True},
    }
    return parse(values, "acceptance", overrides)


def text(prefix):
    """Python's standard library as a data set of bytes, id 256 behind each file, unless it is there."""
    if not Path(f"{prefix}.idx").exists():
        with IndexedWriter(prefix, np.uint16) as writer:
            for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
                writer.append(np.append(np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16), 256))


@contextlib.contextmanager
def training(settings, mesh):
    """A network, its optimizer and a function that takes a step and returns (Step, seconds of it)."""
    text(settings.data.sources["bytes"].prefix)
    gc.collect()
    here = platform.current()
    here.free_cache()
    with contextlib.closing(Loader(settings, 0, 1, mesh.device)) as loader:
        _, wrapped, optimizer, state = checkpoint.begin(settings, mesh, loader, None)
        now = {"state": state}

        def take(**options):
            here.synchronize()
            began = time.perf_counter()
            step = train_step.take(settings, wrapped, optimizer, mesh, loader, now["state"], **options)
            here.synchronize()
            now["state"] = step.state
            return step, time.perf_counter() - began

        yield take, wrapped, optimizer, now
        # The schedule's hooks hold the network in a cycle through autograd; the next one may need the memory.
        hooks = wrapped[0].config
        hooks.grad_scale_func = hooks.finalize_model_grads_func = hooks.no_sync_func = None


def shares(wrapped, take, mesh):
    """{kind of layer: share of a step's time}."""
    from boreal_megatron.profile.timers import Clock, by_kind

    clock = Clock(wrapped, mesh)
    with clock.running():
        _, seconds = take(mark=clock.mark)
    return {kind: spent / seconds for kind, spent in by_kind(clock.spans(), seconds).items()}


# ---------------------------------------------------------------- parts


def environment(bench):
    """Versions; fails on those that are known to be wrong."""
    for component in doctor.examine():
        bad = component["state"] in doctor.FAILURES
        if component["found"]:
            yield row(
                "environment",
                component["name"],
                component["found"],
                status=FAIL if bad else NOTE,
                why=component["advice"],
            )


def throughput(bench, precision):
    """The small model as it trains: positions/s, TFLOP/s, MFU, memory, share of each kind of layer."""
    for bag in BAGS:
        what = f"{precision}, bags of {bag}"
        try:
            settings = config(bench, bench.scale.model, PRECISIONS[precision], bag=bag, steps=1000)
            yield from timed(bench, "throughput", what, settings)
        except BorealError as error:  # this version, or this machine, does not have it
            yield row("throughput", what, why=str(error))


def wide(bench):
    """Two card layers of the large model at their full width, with every expert."""
    settings = config(bench, bench.scale.wide, PRECISIONS["bf16"], steps=1000)
    yield from timed(bench, "layer pair", "bf16, all experts on one GPU", settings)


def timed(bench, part, what, settings):
    """Rows of one configuration's speed and memory."""
    scale = bench.scale
    with training(settings, bench.mesh) as (take, wrapped, _, _):
        peak_memory = platform.current().peak_memory()
        for _ in range(scale.warmup):
            take()
        seconds = sorted(take()[1] for _ in range(scale.steps))[scale.steps // 2]
        taken = peak_memory()
        peak = taken and taken / GIB
        try:
            kinds, why = shares(wrapped, take, bench.mesh), ""
        except Exception as error:  # must not cost what was measured
            kinds, why = {"each kind of layer": None}, f"{type(error).__name__}: {error}"
    phase = settings.phases[0]
    rate = phase.positions_per_step / seconds
    teraflops = rate * sum(flops.training(settings.model, phase.sequence).values()) / 1e12
    goal = GOALS.get(what) if part == "throughput" and bench.gpu else None
    status = NOTE if goal is None else PASS if rate >= goal else BELOW
    yield row(part, f"{what}: positions", rate, "/s", status, goal and f"{goal:,.0f}")
    yield row(part, f"{what}: raw tokens", rate * phase.bag_size, "/s")
    yield row(part, f"{what}: model FLOPs", teraflops, "TFLOP/s")
    no_gpu = "" if bench.gpu else "this device is not in plan/hardware.yaml"
    yield row(part, f"{what}: MFU of the bf16 peak", bench.gpu and 100 * teraflops / bench.gpu.bf16, "%", why=no_gpu)
    yield row(part, f"{what}: peak memory", peak, "GiB", why="" if peak else "no CUDA device")
    yield planned(part, what, settings, peak)
    for kind, share in kinds.items():
        yield row(part, f"{what}: share of {kind}", share and 100 * share, "%", why=why)


def planned(part, what, settings, peak):
    """The planner's figure beside the measured one."""
    try:
        (stage,) = memory.per_rank(settings, 1)["stages"]
    except Exception as error:  # must not cost what was measured
        return row(part, f"{what}: planned memory", why=f"{type(error).__name__}: {error}")
    total = stage["total"] / GIB
    return row(part, f"{what}: planned memory", total, "GiB", goal=f"{peak:.1f} measured" if peak else "")


def blocked(bench):
    """How long training stands still for a checkpoint that is written in the background."""
    settings = config(bench, bench.scale.model, PRECISIONS["bf16"], steps=1000)
    heard = Heard()
    with training(settings, bench.mesh) as (take, wrapped, optimizer, now):
        take()
        saver = checkpoint.Saver(settings, bench.mesh, heard)
        for _ in range(2):  # the first one also allocates what later ones find
            saver.save(wrapped, optimizer, now["state"])
            while saver.flying:
                take()
                saver.poll()
        saver.close()
    first, later = heard.records
    for which, save in (("first save", first), ("later save", later)):
        ok = PASS if save["waited_seconds"] <= BLOCKED else BELOW
        held = bench.gpu is not None and which == "later save"
        goal = f"{BLOCKED:g}" if held else ""
        yield row(
            "checkpoint", f"{which}: training stood still", save["waited_seconds"], "s", ok if held else NOTE, goal
        )
        yield row("checkpoint", f"{which}: written and verified after", save["seconds"], "s")
    yield row("checkpoint", "shards", later["shard_bytes"] / 1e9, "GB")


class Heard:
    """A `log.Reporter` that keeps what it is told."""

    def __init__(self):
        self.records = []

    def say(self, line):
        pass

    def record(self, kind, step, **values):
        self.records.append(values)


def curves(bench):
    """The loss of FP8 beside bf16's, same data, same initial weights."""
    found = {}
    for precision in ("bf16", "fp8"):
        try:
            settings = config(bench, bench.scale.model, PRECISIONS[precision], steps=bench.scale.curve)
            with training(settings, bench.mesh) as (take, _, _, _):
                losses = [take()[0].loss for _ in range(bench.scale.curve)]
        except BorealError as error:
            yield row("loss", f"{precision}: last steps", why=str(error))
            continue
        found[precision] = sum(losses[-10:]) / len(losses[-10:])
        yield row("loss", f"{precision}: last steps", found[precision], "nats") | {"curve": losses}
    if len(found) == 2:
        gap = found["fp8"] - found["bf16"]
        yield row("loss", "fp8 above bf16", gap, "nats", PASS if gap <= FP8_LOSS else FAIL, f"<= {FP8_LOSS:g}")


# ---------------------------------------------------------------- layer by layer


def reference(bench):
    """FP32 of the same weights and tokens; run where no GPU is seen. Writes reference.pt."""
    torch.save(trace(bench, "fp32"), bench.folder / "reference.pt")
    yield row("parity", "reference", "FP32 on a CPU")


def parity(bench):
    """Every half-block on this device against the reference, and the losses of the whole network."""
    wanted = torch.load(bench.folder / "reference.pt")
    for precision, (*limits, loss_limit) in LIMITS.items():
        try:
            found = trace(bench, precision, wanted)
        except BorealError as error:
            yield row("parity", f"{precision}: all half-blocks", why=str(error))
            continue
        for name, block in wanted["blocks"].items():
            errors = {kind: relative(found["blocks"][name][kind], block[kind]) for kind in COMPARED}
            said = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
            ok = all(error <= limit for error, limit in zip(errors.values(), limits, strict=True))
            goal = "<= " + ", ".join(f"{limit:g}" for limit in limits)
            found_row = row("parity", f"{precision}: half-block {name}", said, "", PASS if ok else FAIL, goal)
            yield found_row | {"errors": errors}
        for name in ("loss", "MTP loss"):
            error = abs(found[name] - wanted[name]) / wanted[name]
            ok = PASS if error <= loss_limit else FAIL
            yield row("parity", f"{precision}: {name}, end to end", error, "", ok, f"<= {loss_limit:g}")


def trace(bench, precision, given=None):
    """One row of two documents, forward and backward, half-block by half-block.

    Where another trace is given, every half-block gets that one's input, and the gradient of that one's output: errors
    are then each half-block's own, and do not grow with depth. The losses are end to end all the same.

    Returns:
        {"loss", "MTP loss": nats a target; "blocks": {"2 G": {"output": what it adds to the stream, "gradient": what it
        adds to the stream's gradient, "weights": {checkpoint name: gradient}, and "stream", "upstream": its output and
        that output's gradient}}}
    """
    positions = bench.scale.parity
    settings = config(bench, bench.scale.model, PRECISIONS[precision], steps=1, sequence=positions, windows=1)
    [model] = boreal.build(settings, bench.mesh)
    model.train()
    weight, row_of_tokens = settings.phases[0].mtp_weight, made(bench, positions)
    with torch.no_grad():
        losses = model(row_of_tokens)

    blocks = {}  # name -> (layer, input, output, the leaf that goes on in its place)
    stack = model.decoder
    for number, (letter, layer) in enumerate(zip(stack.layer_type_list, stack.layers, strict=True)):

        def cut(module, args, kwargs, out, name=f"{number} {letter}"):
            hidden = out[0] if isinstance(out, tuple) else out
            stream = hidden if given is None else given["blocks"][name]["stream"].to(hidden)
            leaf = stream.detach().requires_grad_()
            blocks[name] = (module, kwargs["hidden_states"], hidden, leaf)
            return (leaf, *out[1:]) if isinstance(out, tuple) else leaf

        layer.register_forward_hook(cut, with_kwargs=True)
    again = model(row_of_tokens, weight)
    (again[Losses.MAIN] + weight * again[Losses.MTP]).backward()

    found = {
        "loss": losses[Losses.MAIN] / losses[Losses.MAIN_COUNT],
        "MTP loss": losses[Losses.MTP] / losses[Losses.MTP_COUNT],
    }
    found = {name: loss.item() for name, loss in found.items()} | {"blocks": {}}
    for name, (module, before, out, leaf) in reversed(blocks.items()):
        upstream = leaf.grad if given is None else given["blocks"][name]["upstream"].to(leaf.grad)
        before.retain_grad()  # the first one is no leaf
        out.backward(upstream)
        found["blocks"][name] = {
            "output": plain(out) - plain(before),
            "gradient": plain(before.grad) - plain(upstream),
            "weights": flat(whole(module, bench.mesh, part_of_gradient(module))),
            "stream": plain(out),
            "upstream": plain(leaf.grad),
        }
    found["blocks"] = dict(reversed(found["blocks"].items()))
    return found


def plain(x):
    return x.detach().float().cpu()


def flat(weights):
    """Gradients by checkpoint name as one vector."""
    return torch.cat([plain(weights[name]).flatten() for name in sorted(weights)])


def made(bench, positions):
    """A row of seeded tokens in two documents, bags of 1."""
    rng = np.random.default_rng(5)
    shape = (1, positions + 1)
    window = {"ids": rng.integers(0, 256, shape), "valid": np.ones(shape, bool), "weight": np.ones(shape, np.float32)}
    window["document"] = (np.arange(positions + 1) > positions // 3).astype(np.int64)
    return batch.make([window], boundaries="align", device=bench.mesh.device)


def relative(found, wanted):
    """L2 error over the L2 norm; infinite where something is not finite."""
    error = (found - wanted).norm() / wanted.norm()
    return error.item() if error.isfinite() else float("inf")


RUN = {
    "environment": environment,
    "reference": reference,
    "parity": parity,
    "bf16": lambda bench: throughput(bench, "bf16"),
    "fp8": lambda bench: throughput(bench, "fp8"),
    "wide": wide,
    "checkpoint": blocked,
    "loss": curves,
}  # `kernels` is the tool's own
