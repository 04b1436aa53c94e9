"""Which module fills each of megatron-core's slots, and which library works around them: chosen once, with a reason,
when a network is built. Nobody else asks what is installed.

    slot              implementations, best first on CUDA
    linears           te, local                     projections and norms; te's linears hold the norm before them
    attention         te, flash, sdpa               the softmax between the projections
    experts           grouped_mm, te, sequential    the routed experts' two products
    dispatcher        what `parallel.dispatcher` says: how positions reach their experts
    weight gradients  te, apex, separate            who adds them to the FP32 buffers
    optimizer         te, apex, torch               whose AdamW megatron-core found when it was imported
"""

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from boreal_megatron.errors import ProblemsError

SLOTS = {  # of `config.kernels`; the last of each is plain torch, and runs anywhere
    "linears": ("te", "local"),
    "attention": ("te", "flash", "sdpa"),
    "experts": ("grouped_mm", "te", "sequential"),
}
ON_GPU = ("cuda", "meta")  # the meta device stands for a GPU (`dry_run.py`)
FP8_SINCE = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0)}  # compute capability
INSTALL = {  # module -> how to get it
    "transformer_engine": 'pip install --no-build-isolation "transformer-engine[pytorch]"',
    "flash_attn": "pip install --no-build-isolation flash-attn",
    "deep_ep": "build DeepEP from github.com/deepseek-ai/DeepEP",
}
MODULE = {"te": "transformer_engine", "flash": "flash_attn", "deepep": "deep_ep", "hybridep": "deep_ep"}
# What a choice means for megatron-core's TransformerConfig, where it means something.
FIELDS = {
    ("linears", "te"): dict(
        transformer_impl="transformer_engine", bias_activation_fusion=True, moe_permute_fusion=True
    ),
    ("linears", "local"): dict(transformer_impl="local"),
    ("experts", "te"): dict(moe_grouped_gemm=True),
    ("dispatcher", "alltoall"): dict(moe_token_dispatcher_type="alltoall"),
    ("dispatcher", "allgather"): dict(moe_token_dispatcher_type="allgather"),
    ("dispatcher", "deepep"): dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep"),
    ("dispatcher", "hybridep"): dict(
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep"
    ),
    ("weight gradients", "te"): dict(gradient_accumulation_fusion=True),
    ("weight gradients", "apex"): dict(gradient_accumulation_fusion=True),
}


@dataclass(frozen=True)
class Choice:
    """What fills a slot: the implementation's name, and why in one clause."""

    slot: str
    name: str
    reason: str


class Modules(NamedTuple):
    """Classes and builders for `model/spec.py`. `norm_column` is a norm and the linear after it in one, or None."""

    norm: object
    column: object
    row: object
    norm_column: object
    core_attention: object
    experts: object


def chosen(config, device):
    """{slot: Choice} of a network.

    Args:
        config: `config.schema.Config`.
        device: torch.device of the parameters.

    Raises:
        ProblemsError: what was asked for by name cannot run on this device, or its library is missing; every problem,
            each with what may be asked for instead.
    """
    found, problems = {}, []
    for slot, names in SLOTS.items():
        request = getattr(config.kernels, slot)
        problem = None if request == "auto" else unfit(slot, request, config, device)
        if problem:
            problems.append(f"kernels.{slot}={request}: {problem}; or use auto or {names[-1]}")
        found[slot] = (
            _first(slot, config, device) if request == "auto" else Choice(slot, request, "asked for")
        )
    dispatcher = config.parallel.dispatcher
    if problem := unfit("dispatcher", dispatcher, config, device):
        problems.append(f"parallel.dispatcher={dispatcher}: {problem}; or use alltoall")
    found["dispatcher"] = Choice("dispatcher", dispatcher, "as parallel.dispatcher says")
    if problem := _no_fp8(config, found["linears"], device):
        problems.append(
            f"precision.fp8={config.precision.fp8}: {problem}; or leave precision.fp8 out, for bf16"
        )
    if problems:
        raise ProblemsError("modules", problems)
    found["weight gradients"] = _weight_gradients(found["linears"], device)
    found["optimizer"] = _optimizer()
    return found


def unfit(slot, name, config, device):
    """Why an implementation cannot run on a device here, or None."""
    if name in ("local", "sdpa", "sequential", "alltoall", "allgather"):
        return None
    if name == "grouped_mm":
        return _no_grouped_mm(config, device)
    if device.type not in ON_GPU:
        return f"it needs a CUDA device, found {device.type}"
    if slot == "attention" and config.precision.compute != "bf16":
        return f"its kernels take bf16, found {config.precision.compute}"
    return missing(MODULE[name])


def missing(module):
    """Why a library cannot be used, and how to get it; None where it is installed."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed: {INSTALL[module]}"


def apex():
    """Which package `import apex` would find: "nvidia", "another" (PyPI's has nothing to do with it), or None."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return (
        "nvidia" if any((folder / "optimizers/fused_adam.py").exists() for folder in folders) else "another"
    )


def modules(choices):
    """The classes that were chosen, a Modules."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP

    from boreal_megatron.model.experts import GroupedExperts
    from boreal_megatron.model.gated_attention import CoreAttention, PackedAttention
    from boreal_megatron.model.norm import RMSNorm

    name = {slot: choice.name for slot, choice in choices.items()}
    norm, column, row, norm_column = (RMSNorm, ColumnParallelLinear, RowParallelLinear, None)
    if "te" in name.values():
        from megatron.core.extensions import transformer_engine as te
    if name["linears"] == "te":
        norm, column, row = te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear
        norm_column = te.TELayerNormColumnParallelLinear
    if name["experts"] == "grouped_mm":
        experts = GroupedExperts
    elif name["experts"] == "te":
        grouped = GroupedMLPSubmodules(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear)
        experts = partial(TEGroupedMLP, submodules=grouped)
    else:
        experts = partial(SequentialMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    core = (
        CoreAttention if name["attention"] == "sdpa" else partial(PackedAttention, kernel=name["attention"])
    )
    return Modules(norm, column, row, norm_column, core, experts)


def fields(choices):
    """What the choices mean for megatron-core's TransformerConfig, as a dict."""
    return {key: value for c in choices.values() for key, value in FIELDS.get((c.slot, c.name), {}).items()}


def lines(choices):
    """What to tell people: a line a slot."""
    return [f"{choice.slot}: {choice.name} ({choice.reason})" for choice in choices.values()]


def _first(slot, config, device):
    """The best implementation that can run."""
    names = SLOTS[slot]
    if device.type not in ON_GPU:
        return Choice(slot, names[-1], f"{device.type} device")
    passed_over = []
    for name in names:
        problem = unfit(slot, name, config, device)
        if problem is None:
            return Choice(slot, name, "; ".join(passed_over) or "the first choice on CUDA")
        passed_over.append(f"not {name}: {problem}")
    raise AssertionError("the last one runs everywhere")


def _no_grouped_mm(config, device):
    """torch's operation takes rows of whole 16 bytes, and on CUDA bf16 only."""
    if config.model.moe is None:
        return None
    compute = config.precision.compute
    if device.type in ON_GPU and compute != "bf16":
        return f"on CUDA it takes bf16, found {compute}"
    widths = (config.model.hidden_size, config.model.moe.expert_hidden_size // config.parallel.expert_tensor)
    whole = {"bf16": 8, "fp32": 4}[compute]
    if any(width % whole for width in widths):
        return f"rows of {widths[0]} and {widths[1]} numbers, expected multiples of {whole}"
    return None


def _no_fp8(config, linears, device):
    fp8 = config.precision.fp8
    if fp8 is None:
        return None
    if problem := unfit("linears", "te", config, device):
        return problem
    if linears.name != "te":
        return "it needs Transformer Engine's linears, found kernels.linears=local"
    found, needed = torch.cuda.get_device_capability(), FP8_SINCE[fp8]
    if found < needed:
        return f"it needs a GPU of compute capability {needed[0]}.{needed[1]} or newer, found {found[0]}.{found[1]}"
    return None


def _weight_gradients(linears, device):
    slot = "weight gradients"
    if linears.name == "te":
        return Choice(
            slot, "te", "Transformer Engine's linears add them in the product; nothing of apex is needed"
        )
    if device.type not in ON_GPU:
        return Choice(slot, "separate", f"{device.type} device")
    if apex() == "nvidia" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        return Choice(slot, "apex", "apex's fused_weight_gradient_mlp_cuda")
    why = {
        None: "NVIDIA's apex is not installed",
        "another": "the apex here is PyPI's, another package; NVIDIA's is built from github.com/NVIDIA/apex",
        "nvidia": "apex was built without fused_weight_gradient_mlp_cuda",
    }[apex()]
    return Choice(slot, "separate", f"{why}; a sum after the product replaces it")


def _optimizer():
    from megatron.core import optimizer

    library = optimizer.Adam.__module__.partition(".")[0]
    if library == "transformer_engine":
        return Choice("optimizer", "te", "Transformer Engine's FusedAdam")
    if library == "apex":
        return Choice("optimizer", "apex", "apex's FusedAdam; no Transformer Engine")
    other = "the apex here is PyPI's, another package" if apex() == "another" else "no NVIDIA apex"
    return Choice("optimizer", "torch", f"torch's AdamW; no Transformer Engine, {other}")
