"""The whole Gated DeltaNet mixer, projections included, forward and backward on this device.

    python tools/bench_mixer.py --preset boreal-10b-moe --positions 8192 [--documents 4] [--json]

Ours on each implementation of the delta rule, beside megatron-core's module, which needs flash-linear-attention. What cannot
run here is listed with the reason. bf16 on CUDA, fp32 on a CPU; one rank, random weights, seed 1.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import torch
from boreal_kernels.backend import BACKENDS
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from boreal_megatron import parallel
from boreal_megatron.config.presets import PRESETS
from boreal_megatron.config.schema import Config, Kernels, Model, Parallel
from boreal_megatron.log import quiet
from boreal_megatron.model import provider
from boreal_megatron.model.config import transformer_config
from boreal_megatron.model.gated_deltanet import GatedDeltaNet
from boreal_megatron.model.kernels import chosen
from boreal_megatron.model.norm import RMSNorm
from boreal_megatron.model.packing import Packing


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=sorted(PRESETS), default="boreal-10b-moe")
    p.add_argument("--positions", type=int, default=8192)
    p.add_argument("--documents", type=int, default=1, help="of equal length, packed into the row")
    p.add_argument("--repeat", type=int, default=20)
    p.add_argument("--json", action="store_true")
    args = p.parse_args()
    if args.positions < 1 or args.documents < 1 or args.positions % args.documents:
        p.error(f"{args.documents} documents do not divide {args.positions} positions")
    quiet()
    rows = list(bench(args))
    if args.json:
        print(json.dumps({"command": sys.argv, "device": device_name(), "torch": torch.__version__, "rows": rows}, indent=1))
        return
    print(f"{args.preset}, {args.positions} positions, {args.documents} documents, {device_name()}, torch {torch.__version__}")
    for row in rows:
        print(f"{row['mixer']:24s} " + (row["why_not"] if "why_not" in row else f"{row['ms']:10.3f} ms"))


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def bench(args):
    """One dict a mixer: its median time of a forward and backward pass, or why it cannot run."""
    model = Model.model_validate(PRESETS[args.preset])
    config = Config.model_validate(
        dict(
            model=model.model_dump(exclude_none=True),
            precision="bf16" if torch.cuda.is_available() else "fp32",
            phases=[dict(name="only", until_steps=1, sequence=args.positions, positions_per_step=args.positions)],
            schedule=dict(peak=1.0),
            data=dict(tokenizer="none", sources={"text": "none"}),
            checkpoint=dict(folder="none"),
        )
    )
    mesh = parallel.start(Parallel(), seed=1)
    settings, length = transformer_config(config, provider.chosen(config, mesh.device)), args.positions // args.documents
    edges = tuple(range(0, args.positions + 1, length))
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=mesh.device)
    packing = Packing(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=length, max_seqlen_kv=length,
        edges=edges, chunk_cu_seqlens=cu_seqlens,
    )  # fmt: skip
    hidden = torch.randn(args.positions, 1, model.hidden_size, device=mesh.device, dtype=settings.params_dtype)
    makers = {f"boreal, {name}": (ours, name) for name in BACKENDS["gated_delta_rule"]} | {"megatron-core": (theirs, None)}
    for label, (make, name) in makers.items():
        try:
            mixer = make(settings, model.gdn, mesh, name)
            yield {"mixer": label, "ms": milliseconds(mixer, hidden, packing, args.repeat)}
        except (ValueError, ImportError) as error:
            yield {"mixer": label, "why_not": str(getattr(error, "problems", [error])[0])}
    parallel.stop()


def ours(settings, shape, mesh, name):
    kernels = chosen(Kernels(delta_rule=name), shape.head_dim, mesh.device)
    mixer = GatedDeltaNet(
        settings, 1, shape=shape, column_linear=ColumnParallelLinear, row_linear=RowParallelLinear,
        pg_collection=mesh.groups, kernels=kernels,
    )  # fmt: skip
    return filled(mixer, mesh)


def theirs(settings, shape, mesh, name):
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet as Theirs
    from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules

    settings = dataclasses.replace(
        settings,
        linear_conv_kernel_dim=shape.conv_width,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
        linear_num_key_heads=shape.key_heads,
        linear_num_value_heads=shape.value_heads,
    )
    parts = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear)
    return filled(Theirs(settings, parts, layer_number=1, pg_collection=mesh.groups), mesh)


def filled(mixer, mesh):
    """Random matrices, decays that remember about ten positions."""
    mixer.to(mesh.device)
    generator = torch.Generator(mesh.device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("dt_bias"):
                parameter.fill_(-2.0)
            elif name.endswith("A_log"):
                parameter.fill_(-0.7)
    return mixer


def milliseconds(mixer, hidden, packing, repeat):
    """Median time of a forward and backward pass, after two to warm up."""
    hidden, times = hidden.requires_grad_(), []
    for _ in range(repeat + 2):
        if hidden.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = mixer(hidden, None, packed_seq_params=packing)
        out[0].sum().backward()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
        mixer.zero_grad()
        hidden.grad = None
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
