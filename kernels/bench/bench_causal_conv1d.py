"""causal_conv1d at the sizes of BOREAL's Gated DeltaNet layers: 8,192 positions, q, k and v of every key head, written
apart from a slice of the fused projection."""

import torch
from boreal_kernels import causal_conv1d, testing

K, W = 128, 4  # head dim, taps
SHAPES = {
    "250m 8K": {"T": 8192, "heads": 8, "group": 2},
    "4b 8K": {"T": 8192, "heads": 16, "group": 2},
    "10b 8K": {"T": 8192, "heads": 8, "group": 4},
}
# What the ahead-of-time table compiles, in bf16 and FP32: every combination of constants that the presets launch on one
# rank. Packed rows in training, with a state where context-parallel ranks hand it on; single positions when decoding,
# of another number of heads, for the table knows kernels by their constants only.
VARIANTS = {
    f"{label} R={group}": {"T": T, "heads": 4 if T == 1 else 8, "group": group, **more}
    for group in (2, 4)
    for label, T, more in (
        ("packed", 40, {}),
        ("packed, state", 40, {"state": True}),
        ("decode", 1, {"documents": 0, "state": True, "final": True}),
    )
}
DTYPES = (torch.bfloat16, torch.float32)


def operation(*args, **options):
    """causal_conv1d, its results side by side."""
    y, state = causal_conv1d(*args, **options)
    return *y, state


# What `tune.py` tries: kernel -> (the direction it belongs to, launch configurations).
CANDIDATES = {
    f"causal_conv1d.{direction}": (
        direction,
        [
            {"BLOCK": block, "ROWS": rows, "PROGRAMS": programs, "num_warps": block // 128}
            for block in (256, 512, 1024) for rows in (4, 8) for programs in (396, 528, 792, 1056)
        ],
    )
    for direction in ("forward", "backward")
}  # fmt: skip


def inputs(T, heads, group, documents=8, state=False, final=False, head_dim=K, *, dtype, device, seed=1):
    """The operation's arguments; x is a slice of the fused projection [q K | k K | v R*K | z R*K | b R | a R], as in
    the model. `documents` of about one length share the row; 0: nothing is packed."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    split = (head_dim, head_dim, group * head_dim)
    width = sum(split)
    x = draw(1, T, heads, width + group * head_dim + 2 * group)[..., :width]
    ends = [T * n // documents + (n % 3 if n < documents else 0) for n in range(1, documents + 1)]
    return {
        "x": x,
        "weight": draw(heads * width, W) / W**0.5,
        "activation": "silu",
        "cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32, device=device) if documents else None,
        "initial_state": draw(max(documents, 1), heads * width, W - 1) if state else None,
        "output_final_state": final,
        "split": split,
    }


def cost(T, heads, group):
    """{direction: (bytes that must move, flops)} in bf16: each tensor once."""
    channels = heads * (2 + group) * K
    size = 2 * T * channels
    return {"forward": (2 * size, 2 * W * T * channels), "backward": (3 * size, 6 * W * T * channels)}


def proof(device):
    """Raise unless outputs and gradients agree with float64."""
    shape = dict(T=67, heads=2, group=2, documents=5, state=True, final=True, head_dim=8, device=device)
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        testing.assert_within(testing.errors(operation, inputs(**shape, dtype=dtype), "triton"), allowed)


def rivals():
    """{name: function of the same arguments}."""

    def eager(**arguments):
        return operation(**arguments, backend="torch")

    found = {"torch": eager, "torch.compile": torch.compile(eager)}
    try:
        from fla.modules.convolution import causal_conv1d as theirs
    except ImportError:
        return found

    def fla(x, weight, activation, cu_seqlens, initial_state, output_final_state, split):
        y, state = theirs(
            x.flatten(2), weight, initial_state=initial_state, output_final_state=output_final_state,
            activation=activation, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return *(part.contiguous() for part in y.view(x.shape).split(split, -1)), state

    return {**found, "fla": fla}
