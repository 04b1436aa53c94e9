"""causal_conv1d: against a float64 loop over documents, taps and positions; outputs and every gradient.

Tolerances: float64 1e-12 absolute, FP32 1e-5 absolute (four products of unit normals, dW sums 150 of them).
"""

import pytest
import torch
from boreal_kernels import causal_conv1d


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def by_hand(x, weight, *, activation, cu_seqlens=None, initial_state=None):
    """The definition: each sequence by itself, its history in front, every output a sum over taps."""
    C, W = weight.shape
    if cu_seqlens is None:
        sequences = list(x)
    else:
        sequences = [x[0, start:end] for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    outputs, states = [], []
    for n, sequence in enumerate(sequences):
        history = x.new_zeros(W - 1, C) if initial_state is None else initial_state[n].t()
        full = torch.cat([history, sequence])
        for t in range(len(sequence)):
            outputs.append(sum(weight[:, w] * full[t + w] for w in range(W)))
        states.append(full[len(full) - (W - 1) :].t())
    y = torch.stack(outputs).view(x.shape)
    return y * y.sigmoid() if activation == "silu" else y, torch.stack(states)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("bounds", [None, (0, 1, 3, 3, 10, 23), (0, 23)])
def test_against_the_definition(normal, gradients, bounds, W, initial, activation):
    B, T, C = (2, 23, 3) if bounds is None else (1, 23, 3)
    N = B if bounds is None else len(bounds) - 1
    inputs = [normal(B, T, C, dtype=torch.float64), normal(C, W, dtype=torch.float64)]
    if initial:
        inputs.append(normal(N, C, W - 1, dtype=torch.float64))
    inputs = [x.requires_grad_() for x in inputs if x.numel()]
    state = None
    if initial:
        state = inputs[2] if W > 1 else torch.zeros(N, C, 0, dtype=torch.float64)
    options = dict(activation=activation, cu_seqlens=None if bounds is None else cu(*bounds), initial_state=state)
    got = causal_conv1d(*inputs[:2], **options, output_final_state=True)
    want = by_hand(*inputs[:2], **options)
    for x, y in zip([*got, *gradients(got, inputs)], [*want, *gradients(want, inputs)], strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_gradcheck(normal):
    inputs = [normal(*s, dtype=torch.float64).requires_grad_() for s in ((1, 9, 2), (2, 4), (3, 2, 3))]
    assert torch.autograd.gradcheck(
        lambda x, w, s: causal_conv1d(
            x, w, activation="silu", cu_seqlens=cu(0, 2, 4, 9), initial_state=s, output_final_state=True
        ),
        inputs,
    )


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
def test_fp32_lengths(normal, gradients, T):
    x, weight = normal(2, T, 5).requires_grad_(), normal(5, 4).requires_grad_()
    got = causal_conv1d(x, weight, activation="silu", output_final_state=True)
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = by_hand(x64, w64, activation="silu")
    pairs = zip([*got, *gradients(got, [x, weight])], [*want, *gradients(want, [x64, w64])], strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_document(normal, gradients):
    x, weight = normal(1, 20, 3), normal(3, 4)
    x[:, 7:12] = torch.nan
    x.requires_grad_()
    y, state = causal_conv1d(x, weight, activation="silu", cu_seqlens=cu(0, 7, 12, 20), output_final_state=True)
    clean = torch.cat([y[:, :7], y[:, 12:]], dim=1)
    assert clean.isfinite().all() and y[:, 7:12].isnan().all()
    assert state[[0, 2]].isfinite().all()
    (grad,) = gradients([clean], [x])
    assert grad[:, :7].isfinite().all() and grad[:, 12:].isfinite().all()
    alone = causal_conv1d(x[:, 12:].detach(), weight, activation="silu")[0]
    assert torch.equal(alone, y[:, 12:])


def test_strided_inputs_between_nans(normal, poisoned):
    x, weight, state = normal(1, 20, 3), normal(3, 4), normal(2, 3, 3)
    options = dict(activation="silu", cu_seqlens=cu(0, 7, 20), output_final_state=True)
    got = causal_conv1d(poisoned(x), poisoned(weight), initial_state=poisoned(state), **options)
    want = causal_conv1d(x, weight, initial_state=state, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_decoding_continues_prefill(normal):
    x, weight = normal(2, 12, 3), normal(3, 4)
    want = causal_conv1d(x, weight, activation="silu")[0]
    state, outputs = None, []
    for part in (slice(0, 2), slice(2, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        y, state = causal_conv1d(
            x[:, part], weight, activation="silu", initial_state=state, output_final_state=True
        )
        outputs.append(y)
    # Not bit for bit: torch's vector and scalar SiLU differ in the last digit.
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-6, atol=1e-6)


def test_bf16_sums_in_fp32(normal):
    x, weight = normal(1, 20, 3).bfloat16(), normal(3, 4).bfloat16()
    y, state = causal_conv1d(x, weight, activation="silu", output_final_state=True)
    assert y.dtype == state.dtype == torch.bfloat16
    assert torch.equal(y, causal_conv1d(x.float(), weight.float(), activation="silu")[0].bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4, 3)), r"x: found shape \[4, 3\], expected \[B, T, C\]"),
        (dict(weight=torch.zeros(2, 4)), r"weight: found shape \[2, 4\], expected \[C, W\] = \[3, 4\]"),
        (dict(activation="relu"), "found 'relu', expected one of 'silu', None"),
        (dict(initial_state=torch.zeros(1, 3, 4)), "initial_state: found shape"),
        (dict(backend="fla"), "found 'fla'"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(x=torch.zeros(1, 4, 3), weight=torch.zeros(3, 4), activation=None)
    causal_conv1d(**good)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**good, **change})
