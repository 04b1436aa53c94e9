"""Forward and backward of what the run chose, against plain formulas in float64, on this rank alone.

T positions, k bag, v vocabulary, h hidden, H key heads, R value heads per key head, D head dim, E experts.
"""

import hashlib
import json
from dataclasses import fields

import boreal_kernels
import torch
import torch.nn.functional as F
from boreal_kernels import backend, launch, testing
from megatron.core.process_groups_config import ProcessGroupCollection

from boreal_megatron.config.schema import Parallel
from boreal_megatron.model import boreal, init
from boreal_megatron.model.kernels import chosen
from boreal_megatron.parallel import Mesh
from boreal_megatron.preflight.finding import SAME, Finding

# The largest difference from float64 that passes, over the largest value.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MARGIN = 1e-4  # positions whose last chosen expert leads by less may be routed otherwise by another order of summation
POSITIONS = 144  # FP8 wants multiples of 16; the documents have odd lengths
DOCUMENTS = (0, 71, POSITIONS)
WRONG = "do not train with it: `boreal doctor` knows versions that are wrong; kernels.*: torch is the way around"


def dtype_of(config):
    return torch.float32 if str(config.precision) == "fp32" else torch.bfloat16


def choices(here):
    """Which implementation runs, and how kernels are launched: other choices on two ranks are other bits."""
    found = chosen(here.config.kernels, here.config.model.gdn.head_dim, here.mesh.device)
    launches = hashlib.sha256(json.dumps(launch.read(), sort_keys=True).encode()).hexdigest()[:16]
    return [
        *(Finding(name, True, value=choice.backend, expected=SAME) for name, choice in found.items()),
        Finding("launch configurations", True, value=f"{launches} for {launch.device_name()}", expected=SAME),
    ]


# ---------------------------------------------------------------- operations


def cases(config, device):
    """{operation: its arguments}, packed in two documents of odd lengths, in the run's dtype and head size."""
    model, dtype = config.model, dtype_of(config)
    generator = torch.Generator(device).manual_seed(11)
    D, R, W, T, k = model.gdn.head_dim, model.gdn.value_heads // model.gdn.key_heads, model.gdn.conv_width, POSITIONS, 4
    H, h, v = 2, 128, 640

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32, device=device)
    targets = torch.randint(v, (k, T), generator=generator, device=device)
    weight = torch.full((k, T), 1 / k, device=device)
    return {
        "gated_delta_rule": dict(
            q=draw(1, T, H, D), k=draw(1, T, H, D), v=draw(1, T, H * R, D),
            a=draw(1, T, H * R) - 3, b=draw(1, T, H * R),
            A_log=draw(H * R, dtype=torch.float32), dt_bias=draw(H * R, dtype=torch.float32), cu_seqlens=cu_seqlens,
        ),
        "causal_conv1d": dict(
            x=draw(1, T, H * (2 + R) * D), weight=draw(H * (2 + R) * D, W) / W**0.5,
            activation="silu", cu_seqlens=cu_seqlens,
        ),
        "gated_rmsnorm": dict(
            x=draw(1, T, H * R, D), gate=draw(1, T, H * R, D), weight=draw(D),
            eps=model.norm_eps, activation=model.gdn.gate,
        ),
        "multi_hot_cross_entropy": dict(logits=draw(T, v), targets=targets, target_weight=weight),
        "linear_multi_hot_cross_entropy": dict(
            hidden=draw(T, h), weight=draw(v, h) / h**0.5, targets=targets, target_weight=weight,
        ),
        "bag_embedding": dict(ids=targets, weight=draw(v, h), vocab_start=0),
    }  # fmt: skip


def operations(here):
    """Each operation of `boreal_kernels` as chosen: outputs and every gradient, and the same bits twice."""
    config, device = here.config, here.mesh.device
    choice = chosen(config.kernels, config.model.gdn.head_dim, device)
    made, allowed = cases(config, device), ALLOWED[dtype_of(config)]
    assert made.keys() == backend.BACKENDS.keys()
    found, other = [], []
    for name, arguments in made.items():
        operation, runs = getattr(boreal_kernels, name), choice[name].backend
        found.append(verdict(f"{name} ({runs})", testing.errors(operation, arguments, runs), allowed))
        once, again = (testing.run_both_ways(operation, arguments, runs) for _ in range(2))
        other += [f"{name}: {key}" for key, x in once.items() if x is not None and not torch.equal(x, again[key])]
    advice = "other versions of what compiles them, or kernels.*: torch" if other else ""
    same = "the same bits twice"
    return [*found, Finding("repeatability", not other, ", ".join(other) or same, same, advice)]


def verdict(name, errors, allowed):
    """The worst of the errors {what: off by}."""
    worst = max(errors, key=errors.get)
    wrong = ", ".join(f"{what} off by {e:.1e}" for what, e in errors.items() if not e <= allowed)
    measured = wrong or f"{worst} off by {errors[worst]:.1e}"
    return Finding(name, not wrong, measured, f"within {allowed:g} of float64", WRONG if wrong else "")


# ---------------------------------------------------------------- router and experts


def mixture(here):
    """The router's and the expert layer's outputs and gradients, built as the run builds them but on one rank."""
    if here.config.model.moe is None:
        return [Finding("router and experts", None, "the network has none")]
    layer, mesh, config = expert_layer(here)
    moe, dtype, device = config.model.moe, dtype_of(config), here.mesh.device
    generator = torch.Generator(device).manual_seed(12)
    hidden = torch.randn(POSITIONS, 1, config.model.hidden_size, generator=generator, device=device).to(dtype)
    with torch.no_grad():
        layer.router.expert_bias.copy_(0.1 * torch.randn(moe.experts, generator=generator, device=device))

    weights = {key: x.double() for key, x in whole(layer, mesh).items()}
    clear = margin(hidden, weights, moe) > MARGIN  # [T]
    grad = torch.randn(hidden.shape, generator=generator, device=device).to(dtype) * clear[:, None, None]
    probabilities = torch.randn(POSITIONS, moe.experts, generator=generator, device=device) * clear[:, None]

    def backward(x, outputs, grads, parameters):
        for p in parameters:
            p.grad = None
        torch.autograd.backward(outputs, grads)
        return x.grad

    found = []
    for name, run, wanted, cotangent, keys in (
        ("router", lambda x: layer.router(x)[0], route, probabilities, ("router.weight",)),
        ("experts", lambda x: layer(x)[0], mix, grad, None),
    ):
        x = hidden.clone().requires_grad_()
        out = run(x)
        dx = backward(x, out, cotangent.view(out.shape).to(out.dtype), layer.parameters())
        mine = {"output": out.detach().view(cotangent.shape) * nonzero(cotangent), "gradient of hidden": dx}
        mine |= {f"gradient of {key}": g for key, g in whole(layer, mesh, part_of_gradient(layer)).items()}

        leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
        x = hidden.double().requires_grad_()
        out = wanted(x[:, 0], leaves, moe)
        out.backward(cotangent.view(out.shape).double())
        theirs = {"output": out.detach().view(cotangent.shape) * nonzero(cotangent), "gradient of hidden": x.grad}
        theirs |= {f"gradient of {key}": w.grad for key, w in leaves.items() if keys is None or key in keys}
        errors = {what: off(mine[what], want) for what, want in theirs.items() if want is not None}
        found.append(verdict(name, errors, ALLOWED[dtype]))
        if name == "router":  # FP32 whatever the network's dtype, but for what it hands back to it
            exact = {what: e for what, e in errors.items() if what != "gradient of hidden"}
            found.append(verdict("router in FP32", exact, ALLOWED[torch.float32]))
    return found


def nonzero(cotangent):
    return (cotangent != 0).any(-1, keepdim=True)


def off(found, wanted):
    """The largest difference over the largest value; infinite where one is not a number."""
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return error.item() if error.isfinite() else float("inf")


def expert_layer(here):
    """(the MoE layer, the mesh of this rank alone, its configuration): the run's network cut down to one expert layer
    of at most 2 top_k experts, for memory."""
    model = here.config.model
    moe = model.moe.model_copy(update={"experts": min(model.moe.experts, 2 * model.moe.top_k)})
    small = model.model_copy(update={"pattern": "*E", "moe": moe, "vocab_size": 128})
    config = here.config.model_copy(update={"model": small, "parallel": Parallel(), "recompute": "none"})
    groups = ProcessGroupCollection(**{f.name: here.alone for f in fields(ProcessGroupCollection)})
    mesh = Mesh(groups=groups, rank=0, world=1, device=here.mesh.device)
    [network] = boreal.build(config, mesh)
    return network.decoder.layers[1].mlp, mesh, config


def part_of_gradient(layer):
    """A function from a piece of a parameter (a view of it) to the same piece of its gradient; None for a buffer's."""
    parameters = list(layer.parameters())

    def part(shard):
        for p in parameters:
            offset = shard.data_ptr() - p.data_ptr()
            if 0 <= offset < p.nbytes:
                return None if p.grad is None else p.grad.as_strided(shard.shape, shard.stride(), offset // p.itemsize)
        return None

    return part


def whole(layer, mesh, part=lambda shard: shard):
    """{checkpoint name: full tensor}, experts stacked, whichever implementation holds them."""
    out = {}
    for s in init.shards(layer, mesh):
        if (piece := part(s.data)) is None:
            continue
        full = out.setdefault(s.key, torch.zeros(s.global_shape, dtype=piece.dtype, device=piece.device))
        window = [slice(a, a + 1) for a in s.global_offset[: s.prepend_axis_num]]
        window += [slice(a, a + n) for a, n in zip(s.global_offset[s.prepend_axis_num :], piece.shape, strict=True)]
        full[tuple(window)] = piece.detach().view(full[tuple(window)].shape)
    return out


def scores(x, weights):
    """(sigmoid scores [T, E], the same with the balancing bias)."""
    plain = torch.sigmoid(x @ weights["router.weight"].T)
    return plain, plain + weights["router.expert_bias"]


def margin(hidden, weights, moe):
    """[T]: by how much the last chosen expert leads the first that is not."""
    _, biased = scores(hidden[:, 0].double(), weights)
    best = biased.topk(min(moe.top_k + 1, moe.experts), dim=-1).values
    return best[:, moe.top_k - 1] - best[:, -1] if moe.experts > moe.top_k else torch.ones_like(best[:, 0])


def route(x, weights, moe):
    """noaux_tc (arXiv 2412.19437): top-k of score + bias, weights from the scores alone. [T, h] -> [T, E]."""
    plain, biased = scores(x, weights)
    at = biased.topk(moe.top_k, dim=-1).indices
    taken = plain.gather(1, at)
    share = taken / taken.sum(-1, keepdim=True) if moe.top_k > 1 else taken
    return torch.zeros_like(plain).scatter(1, at, moe.route_scale * share)


def mix(x, weights, moe):
    """Every expert on every position, weighted; and the shared one. [T, h] -> [T, h]."""
    share = route(x, weights, moe)
    up, down = (weights[f"experts.experts.linear_fc{n}.weight"] for n in (1, 2))
    routed = sum(share[:, e, None] * swiglu(x, up[e], down[e]) for e in range(moe.experts))
    shared = (weights[f"shared_experts.linear_fc{n}.weight"] for n in (1, 2))
    return routed + swiglu(x, *shared)


def swiglu(x, up, down):
    gate, value = (x @ up.T).chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down.T
