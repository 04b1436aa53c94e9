"""gated_rmsnorm: against the formula in float64, output and every gradient. FP32 tolerance 1e-5 relative, absolute."""

import pytest
import torch
from boreal_kernels import gated_rmsnorm


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
