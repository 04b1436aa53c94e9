"""Do the kernels, as compiled here, compute exactly?  Shapes: the package's docstring.

Hopper's matrix products read registers and shared memory on their own time, and versions of Triton and of ptxas have
let them read too late: results that are plausible and wrong. So: inputs with which every number on the way has few
digits, and results that must agree with float64 in every bit, forward and backward, in bf16 and in FP32.

    keys     one of an orthonormal basis, +-1/2 in 4 places (raw, 2^11 times that: the norm's epsilon rounds away)
    queries  +-1/2 in 4 places; values, states and gradients of results -1, 0 or 1
    gates    beta = 1; alpha = 1 or 1/2, by FP32 numbers whose product with log2(e) rounds to a whole number
"""

import math

import torch
from torch import Tensor

LENGTHS = (70, 3, 0, 64)  # two chunks and a short one, a short one alone, none, exactly one
LOG2E = 1.4426950408889634
LEAVES = ("q", "k", "v", "a", "b", "dt_bias", "initial_state")  # A_log's gradient is a product with a rounded number


def run(device, K: int = 128, V: int = 128, R: int = 2, dtypes=(torch.bfloat16, torch.float32)) -> None:
    """Raise RuntimeError, naming the compilers, unless every output and gradient equals float64's."""
    from boreal_kernels import testing
    from boreal_kernels.gated_delta_rule import fused

    made, halvings, weights = inputs(K, V, R)
    wanted = exact(made, halvings, weights, R)
    for dtype in dtypes:
        moved = {name: x.to(device, dtype if name in ("q", "k", "v") else None) for name, x in made.items()}
        moved |= {name: moved[name].requires_grad_() for name in LEAVES}
        results = fused.gated_delta_rule(**moved, output_final_state=True, output_transition=True, scale=0.125)
        loss = sum((x.double() * w.to(device)).sum() for x, w in zip(results, weights, strict=True))
        found = dict(zip(("o", "state", "transition"), results, strict=True))
        found |= dict(zip(LEAVES, torch.autograd.grad(loss, [moved[name] for name in LEAVES]), strict=True))
        for name, want in wanted.items():
            got = found[name].detach().cpu()
            want = want.float().to(got.dtype)  # float64 leaves 1e-16 of noise on numbers that FP32 holds exactly
            if not torch.equal(got, want):
                tools, wrong = testing.toolchain(), (got != want).sum().item()
                what = name if name in ("o", "state", "transition") else f"gradient of {name}"
                off = (got.double() - want.double()).abs().max()
                raise RuntimeError(
                    f"gated_delta_rule: {what} in {dtype}: {wrong} of {want.numel()} numbers differ from float64, off "
                    f"by up to {off:.3g}, where all must be equal. Triton {tools['triton']} with ptxas "
                    f"{tools['ptxas']} miscompiles it on {tools['device']}; use other versions, or backend torch or fla"
                )


def inputs(K: int, V: int, R: int) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """(arguments of the operation, -log2 alpha [1, T, R], weights of its results in the loss). One key head."""
    T, N = sum(LENGTHS), len(LENGTHS)
    generator = torch.Generator().manual_seed(6)
    integers = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)  # noqa: E731

    def sparse(*shape):  # -1, 0 or 1, one in 32 not 0: sums of few numbers stay within the 8 digits of bf16
        return (integers(0, 2, *shape) * 2 - 1) * (integers(0, 32, *shape) == 0)

    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    vectors = torch.zeros(2, T, K // 4, 4)
    for t in range(T):
        vectors[0, t, integers(0, K // 4, 1)] = (2 * integers(0, 2, 4) - 1).float()
        vectors[1, t, integers(0, K // 4, 1)] = hadamard[integers(0, 4, 1)].float()
    q, k = vectors.view(2, 1, T, 1, K) * 2.0**10
    halvings = (integers(0, 32, 1, T, R) == 0).long()
    raw = torch.where(halvings > 0, exactly(32.0), torch.tensor(-200.0))  # softplus: 32 ln 2, or 0
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    made = {
        "q": q, "k": k, "v": sparse(1, T, R, V).float(), "a": raw, "b": torch.full((1, T, R), 200.0),
        "A_log": exactly(-5.0).expand(R).clone(), "dt_bias": torch.zeros(R), "cu_seqlens": bounds,
        "initial_state": sparse(N, R, K, V).float(),
    }  # fmt: skip
    weights = [sparse(1, T, R, V).double(), sparse(N, R, K, V).double(), sparse(N, R, K, K).double()]
    return made, halvings, weights


def exactly(power: float) -> Tensor:
    """The FP32 number next to power * ln 2 whose FP32 product with log2(e) is `power`."""
    near = torch.tensor(power * math.log(2), dtype=torch.float32)
    factor = torch.tensor(LOG2E, dtype=torch.float32)
    for x in (near, near.nextafter(torch.tensor(math.inf)), near.nextafter(torch.tensor(-math.inf))):
        if x * factor == power:
            return x
    raise AssertionError(f"no FP32 number has {power} as its log2")


def exact(made: dict[str, Tensor], halvings: Tensor, weights: list[Tensor], R: int) -> dict[str, Tensor]:
    """Results and gradients by name, float64, token by token; gates as the numbers they are meant to be."""
    q, k, v, initial = (made[name].double().requires_grad_() for name in ("q", "k", "v", "initial_state"))
    g = -halvings.double() * math.log(2)
    g.requires_grad_()
    alpha = torch.where(halvings > 0, 0.5, 1.0).double() + g - g.detach()  # the value exact, and the gradient alpha's
    queries, keys = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (q[0, :, 0], k[0, :, 0]))  # [T, K]
    K, V = q.shape[-1], v.shape[-1]
    outputs, states = [], []
    for n, length in enumerate(LENGTHS):
        S = torch.cat([initial[n], torch.eye(K).double().expand(R, K, K)], dim=-1)  # [R, K, V + K]
        for t in range(len(outputs), len(outputs) + length):
            S = alpha[0, t, :, None, None] * S
            value = torch.nn.functional.pad(v[0, t], (0, K))
            S = S + keys[t][:, None] * (value - keys[t] @ S)[:, None, :]
            outputs.append(0.125 * (queries[t] @ S[..., :V]))
        states.append(S)
    o, S = torch.stack(outputs)[None], torch.stack(states)
    results = (o, S[..., :V], S[..., V:])
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    dq, dk, dv, dg, d_initial = torch.autograd.grad(loss, (q, k, v, g, initial))
    dg = dg * torch.where(halvings > 0, 0.5, 1.0)  # d/d log alpha
    da = torch.where(halvings > 0, -dg / 32, 0.0)  # exp(A_log) = 1/32; softplus' = 1 or 0
    wanted = dict(zip(("o", "state", "transition"), (x.detach() for x in results), strict=True))
    return wanted | {
        "q": dq, "k": dk, "v": dv, "a": da, "b": torch.zeros_like(da), "dt_bias": da.sum((0, 1)),
        "initial_state": d_initial,
    }  # fmt: skip
