"""gated_rmsnorm: plain torch against the formula in float64, output and every gradient, FP32 tolerance 1e-5 relative,
absolute; the kernels against plain torch in float64, tolerances in TOLERANCE of the largest value."""

import pytest
import torch
from boreal_kernels import gated_rmsnorm, testing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}  # bf16: an output's own rounding is 2^-9


def by_hand(x, gate, weight, eps, activation):
    act = gate.sigmoid() * (gate if activation == "silu" else 1)
    return weight * x / (x * x).mean(-1, keepdim=True).add(eps).sqrt() * act


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("lead", [(), (1,), (3, 65, 2)])
def test_against_the_formula(normal, gradients, lead, activation):
    inputs = [normal(*lead, 7), normal(*lead, 7), normal(7)]
    double = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    y = gated_rmsnorm(*inputs, eps=1e-6, activation=activation)
    want = by_hand(*double, 1e-6, activation)
    for a, b in zip([y, *gradients([y], inputs)], [want, *gradients([want], double)], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gradcheck(normal, activation):
    inputs = [normal(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 4), (2, 3, 4), (4,))]
    assert torch.autograd.gradcheck(lambda *x: gated_rmsnorm(*x, eps=1e-3, activation=activation), inputs)


def test_eps_matters_and_zero_rows_are_safe(normal, gradients):
    x, gate, weight = torch.zeros(2, 4).requires_grad_(), normal(2, 4).requires_grad_(), normal(4).requires_grad_()
    y = gated_rmsnorm(x, gate, weight, eps=1e-6, activation="silu")
    assert (y == 0).all()
    assert all(grad.isfinite().all() for grad in gradients([y], [x, gate, weight]))
    small = torch.full((1, 4), 1e-3)
    y = gated_rmsnorm(small, torch.zeros(1, 4), torch.ones(4), eps=3e-6, activation="sigmoid")
    torch.testing.assert_close(y, torch.full((1, 4), 0.25))  # 1e-3 / sqrt(1e-6 + 3e-6) * 1/2


def test_bf16_is_computed_in_fp32(normal):
    x, gate, weight = normal(5, 64).bfloat16(), normal(5, 64).bfloat16(), normal(64)
    y = gated_rmsnorm(x, gate, weight, eps=1e-6, activation="silu")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, gated_rmsnorm(x.float(), gate.float(), weight, eps=1e-6, activation="silu").bfloat16())


def test_strided_inputs_between_nans(normal, poisoned):
    x, gate, weight = normal(5, 6), normal(5, 6), normal(6)
    got = gated_rmsnorm(poisoned(x), poisoned(gate), poisoned(weight), eps=1e-6, activation="silu")
    torch.testing.assert_close(got, gated_rmsnorm(x, gate, weight, eps=1e-6, activation="silu"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gate=torch.zeros(2, 5)), r"gate: found shape \[2, 5\], expected \[.., D\] = \[2, 4\]"),
        (dict(weight=torch.zeros(5)), "weight: found shape"),
        (dict(activation="gelu"), "found 'gelu', expected one of 'silu', 'sigmoid'"),
        (dict(eps=0.0), "eps: found 0.0"),
        (dict(backend="te"), "found 'te'"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(x=torch.zeros(2, 4), gate=torch.zeros(2, 4), weight=torch.ones(4), eps=1e-6, activation="silu")
    gated_rmsnorm(**good)
    with pytest.raises(ValueError, match=message):
        gated_rmsnorm(**{**good, **change})


def made(lead, D, dtype, device, scale=1.0):
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: (scale * torch.randn(*shape, generator=generator)).to(device, dtype)  # noqa: E731
    return dict(x=draw(*lead, D), gate=draw(*lead, D), weight=draw(D) / scale, eps=1e-6, activation="silu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lead, D", [((), 128), ((1,), 64), ((63,), 128), ((2, 65, 3), 64), ((1, 500, 2), 7)])
def test_kernels(device, lead, D, dtype):
    for activation in ("silu", "sigmoid"):
        inputs = made(lead, D, dtype, device) | {"activation": activation}
        with testing.poisoned_memory():
            found = testing.errors(gated_rmsnorm, inputs, "triton")
        testing.assert_within(found, TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_kernels_with_large_and_tiny_norms(device, scale):
    testing.assert_within(testing.errors(gated_rmsnorm, made((65,), 64, torch.float32, device, scale), "triton"), 2e-6)


def test_kernels_walk_views(device):
    """The gate is a slice of the fused projection, the gradient of the output a slice of something wider."""
    inputs = made((1, 33, 4), 64, torch.bfloat16, device)
    views = inputs | {name: testing.spread(inputs[name]) for name in ("x", "gate")}
    assert views["gate"].stride(-2) == 80
    a, b = (testing.run_both_ways(gated_rmsnorm, x, "triton") for x in (inputs, views))
    assert all(torch.equal(a[name], b[name]) for name in a)
    x, gate, weight = (inputs[name].requires_grad_() for name in ("x", "gate", "weight"))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    grads = []
    for grad in (dy, testing.spread(dy), dy.transpose(1, 2).contiguous().transpose(1, 2)):
        y = gated_rmsnorm(x, gate, weight, eps=1e-6, activation="silu", backend="triton")
        grads.append(torch.autograd.grad(y, (x, gate, weight), grad))
    assert all(torch.equal(p, q) for other in grads[1:] for p, q in zip(grads[0], other, strict=True))


def test_kernels_repeat_bit_for_bit_and_are_custom_ops(device):
    from boreal_kernels.gated_rmsnorm import fused

    inputs = made((1, 65, 2), 64, torch.bfloat16, device)
    first = testing.run_both_ways(gated_rmsnorm, inputs, "triton")
    again = testing.run_both_ways(gated_rmsnorm, inputs, "triton")
    assert all(torch.equal(first[name], again[name]) for name in first)
    leaves = [inputs[name].requires_grad_() for name in ("x", "gate", "weight")]
    torch.library.opcheck(fused.gated_rmsnorm, (*leaves, 1e-6, "silu"))


def test_kernels_refuse_what_they_do_not_read(device):
    inputs = {n: x.double() if torch.is_tensor(x) else x for n, x in made((2,), 8, torch.float32, device).items()}
    with pytest.raises(ValueError, match=r"x: found torch.float64, expected one of .*backend='torch' takes any"):
        gated_rmsnorm(**inputs, backend="triton")
