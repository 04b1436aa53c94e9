"""gated_rmsnorm at the sizes of BOREAL's Gated DeltaNet layers: 8,192 positions, one row a position and value head."""

import torch
from boreal_kernels import gated_rmsnorm, testing

operation = gated_rmsnorm
SHAPES = {
    "250m 8K": {"T": 8192, "heads": 16, "D": 128},
    "10b 8K": {"T": 8192, "heads": 32, "D": 128},
}
# What the ahead-of-time table compiles, in bf16 and FP32: every combination of constants that the presets launch.
VARIANTS = {f"{act} D={D}": {"T": 4, "heads": 2, "D": D, "activation": act} for D in (64, 128) for act in ("silu", "sigmoid")}
DTYPES = (torch.bfloat16, torch.float32)

# What `tune.py` tries: kernel -> (the direction it belongs to, launch configurations).
CANDIDATES = {
    "gated_rmsnorm.forward": (
        "forward", [{"ROWS": rows, "num_warps": warps} for rows in (4, 8, 16, 32) for warps in (2, 4, 8)],
    ),
    "gated_rmsnorm.backward": (
        "backward",
        [
            {"ROWS": rows, "PROGRAMS": programs, "num_warps": warps}
            for rows in (4, 8, 16) for programs in (264, 528, 1056) for warps in (2, 4)
        ],
    ),
}  # fmt: skip


def inputs(T, heads, D, activation="silu", *, dtype, device, seed=1):
    """The operation's arguments; `gate` is a view of the fused projection, as in the model."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    gate = draw(1, T, heads, 3 * D)[..., D : 2 * D]
    return {"x": draw(1, T, heads, D), "gate": gate, "weight": draw(D), "eps": 1e-6, "activation": activation}


def cost(T, heads, D):
    """{direction: (bytes that must move, flops)} in bf16: each tensor once."""
    size = 2 * T * heads * D
    return {"forward": (3 * size, 0), "backward": (5 * size, 0)}


def proof(device):
    """Raise unless outputs and gradients agree with float64."""
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        made = inputs(T=67, heads=3, D=128, dtype=dtype, device=device)
        testing.assert_within(testing.errors(operation, made, "triton"), allowed)


def rivals():
    """{name: function of the same arguments}."""

    def eager(x, gate, weight, eps, activation):
        return gated_rmsnorm(x, gate, weight, eps=eps, activation=activation, backend="torch")

    found = {"torch": eager, "torch.compile": torch.compile(eager)}
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated
    except ImportError:
        return found

    def fla(x, gate, weight, eps, activation):
        return rms_norm_gated(x, gate, weight, None, activation="swish" if activation == "silu" else activation, eps=eps)

    return {**found, "fla": fla}
