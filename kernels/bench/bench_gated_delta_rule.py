"""gated_delta_rule at the sizes of BOREAL's Gated DeltaNet layers: packed rows, 8 key, 16 or 32 value heads of 128."""

import torch
from boreal_kernels import gated_delta_rule, testing

operation = gated_delta_rule
SHAPES = {
    "250m 8K": {"T": 8192, "H": 8, "R": 2, "D": 128},
    "10b 8K": {"T": 8192, "H": 8, "R": 4, "D": 128},
    "10b 4 x 8K": {"T": 32768, "H": 8, "R": 4, "D": 128, "documents": 4},
    "10b 32K": {"T": 32768, "H": 8, "R": 4, "D": 128},
}
# What the ahead-of-time table compiles: the combinations of constants that the presets launch in bf16, packed rows in
# training, first and second pass of a context-parallel rank, decoding; and FP32, which is for small runs and slow to
# compile, once.
VARIANTS = {
    **{f"R={R} D={D}": {"T": 64, "H": 1, "R": R, "D": D} for R, D in ((2, 128), (4, 128), (2, 64))},
    "entering": {"T": 64, "H": 1, "R": 2, "D": 128, "initial": True},
    "last state": {"T": 64, "H": 1, "R": 2, "D": 128, "initial": True, "output_final_state": True},
    "transition": {
        "T": 64, "H": 1, "R": 2, "D": 128, "documents": 0, "output_final_state": True, "output_transition": True,
    },
    "decode": {"T": 1, "H": 1, "R": 2, "D": 128, "documents": 0, "initial": True, "output_final_state": True},
    "FP32": {"T": 64, "H": 1, "R": 2, "D": 64, "dtypes": (torch.float32,)},
}  # fmt: skip
DTYPES = (torch.bfloat16,)
# Tiles narrower than 64 columns stay out: Triton 3.7.1 reads past shared memory with them (issue 11366).
CANDIDATES = {
    "gated_delta_rule.intra": ("forward", [{"MERGE": "tf32", "num_warps": warps} for warps in (4, 8)]),
    "gated_delta_rule.scan": ("forward", [{"BV": 64, "num_warps": 4, "num_stages": stages} for stages in (1, 2, 3)]),
    "gated_delta_rule.scans": ("backward", [{"BV": 64, "num_warps": 4, "num_stages": stages} for stages in (1, 2)]),
    "gated_delta_rule.gradients": (
        "backward",
        [{"BV": 64, "num_warps": warps, "num_stages": stages} for warps in (4, 8) for stages in (1, 2)],
    ),
}  # fmt: skip


def inputs(T, H, R, D, documents=1, initial=False, *, dtype, device, seed=1, **options):
    """The operation's arguments. q, k, v are slices of one tensor, as in the model; documents=0 packs none."""
    generator = torch.Generator(device).manual_seed(seed)
    where = dict(generator=generator, device=device)
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, dtype=dtype, **where)  # noqa: E731
    q, k, v = draw(1, T, H, (2 + R) * D).split([D, D, R * D], dim=-1)
    made = {"q": q, "k": k, "v": v.reshape(1, T, H * R, D), "a": draw(1, T, H * R) - 3, "b": draw(1, T, H * R)}
    made |= {"A_log": draw(H * R, dtype=torch.float32), "dt_bias": draw(H * R, dtype=torch.float32)}
    if documents:
        made["cu_seqlens"] = torch.arange(documents + 1, dtype=torch.int32, device=device) * (T // documents)
    if initial:
        made["initial_state"] = draw(max(documents, 1), H * R, D, D, dtype=torch.float32)
    return made | options


def cost(T, H, R, D, documents=1):
    """{direction: (bytes that must move, flops)} in bf16: each tensor once, and what one kernel hands to the next."""
    HV, C = H * R, 64
    keys, values, square, state = (2 * T * x for x in (2 * H * D, HV * D, HV * C, HV * D * D // C))
    forward = 2 * (keys + values) + 2 * keys + 2 * 2 * square + values
    backward = 2 * 2 * square + 2 * (keys + 2 * values + square) + 2 * 2 * state + 3 * values + 2 * keys + 3 * values
    pairs, through = 2 * T * HV * C * D, 2 * T * HV * D * D  # a product of [C, D] x [D, C], and of [C, D] x [D, D]
    return {"forward": (forward, 4 * pairs + 3 * through), "backward": (backward, 12 * pairs + 11 * through)}


def proof(device):
    """Raise unless outputs and gradients agree with float64, and products with exact numbers are exact."""
    from boreal_kernels.gated_delta_rule import selftest

    dims = (128, 128) if torch.device(device).type == "cuda" else (64, 64)  # interpreted, a minute less
    selftest.run(device, *dims)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        options = dict(documents=2, initial=True, output_final_state=True, dtype=dtype, device=device)
        made = inputs(T=130, H=1, R=2, D=128, **options)
        testing.assert_within(testing.errors(operation, made, "triton"), allowed)


def rivals():
    """{name: function of the same arguments}."""

    def eager(**arguments):
        return gated_delta_rule(**arguments, backend="torch")

    found = {"torch": eager}
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return found

    def fla(q, k, v, a, b, A_log, dt_bias, cu_seqlens=None, initial_state=None, output_final_state=False):
        g = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias)
        R = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(R, dim=2) for x in (q, k))
        return chunk_gated_delta_rule(
            q.contiguous(), k.contiguous(), v, g, b.sigmoid(), initial_state=initial_state,
            output_final_state=output_final_state, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    return {**found, "fla": fla}
