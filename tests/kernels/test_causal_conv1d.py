"""causal_conv1d: against a float64 loop over documents, taps and positions; outputs and every gradient.

Tolerances: float64 1e-12 absolute, FP32 1e-5 absolute (four products of unit normals, dW sums 150 of them). The kernels
against plain torch in float64, tolerances in TOLERANCE of the largest value.
"""

import pytest
import torch
from boreal_kernels import causal_conv1d, launch, testing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # an output's own rounding: 2^-9, 2^-12


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


def test_groups_and_parts(normal):
    """[B, T, G, c] is [B, T, C] seen by groups; `split` cuts each group."""
    x, weight = normal(2, 9, 3, 8), normal(24, 4)
    want, last = causal_conv1d(x.flatten(2), weight, activation="silu", output_final_state=True)
    y, state = causal_conv1d(x, weight, activation="silu", output_final_state=True)
    parts, again = causal_conv1d(x, weight, activation="silu", output_final_state=True, split=(2, 1, 5))
    assert y.shape == x.shape and y.is_contiguous() and torch.equal(y.flatten(2), want)
    assert torch.equal(torch.cat(parts, -1), y) and [p.shape[-1] for p in parts] == [2, 1, 5]
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(state, last) and torch.equal(again, last)


@pytest.mark.parametrize(
    "change",
    [dict(split=(2, 3)), dict(split=(4, 0)), dict(split=()), dict(x=torch.zeros(1, 4, 8), split=(4, 4))],
)
def test_a_split_that_does_not_fit_is_named(change):
    good = dict(x=torch.zeros(1, 4, 2, 4), weight=torch.zeros(8, 4), activation=None, split=(1, 3))
    causal_conv1d(**good)
    with pytest.raises(ValueError, match="split: found .* expected x .* positive sizes that add up to c"):
        causal_conv1d(**{**good, **change})


def flat(**arguments):
    """causal_conv1d, its results side by side."""
    y, state = causal_conv1d(**arguments)
    return *(y if isinstance(y, tuple) else (y,)), state


@pytest.fixture
def tiles(monkeypatch):
    """tiles(BLOCK, ROWS, PROGRAMS) instead of launch.json's, so that little data crosses every edge of a program."""

    def use(BLOCK, ROWS, PROGRAMS):
        found = dict(BLOCK=BLOCK, ROWS=ROWS, PROGRAMS=PROGRAMS, num_warps=4)
        monkeypatch.setattr(launch, "config", lambda kernel, **shape: dict(found))

    return use


# Documents of 1, 2 and 3 positions and of none, first and last; then ends 5 apart, which fall on every row of a block.
BOUNDS = (0, 0, 1, 3, 3, 6, 11, 16, 21, 26, 26)


def made(
    device, dtype=torch.float32, B=1, T=26, bounds=BOUNDS, W=4, state=True, final=True, split=(4, 4, 8), scale=1.0
):  # fmt: skip
    """Arguments with x a slice of a projection; `split` None: x [B, T, C]."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: (scale * torch.randn(*shape, generator=generator)).to(device, dtype)  # noqa: E731
    x = testing.spread(draw(B, T, 2, 16))
    return dict(
        x=x if split else x.flatten(2),
        weight=draw(32, W) / scale,
        activation="silu",
        cu_seqlens=cu(*bounds).to(device) if bounds else None,
        initial_state=draw(len(bounds) - 1 if bounds else B, 32, W - 1) if state else None,
        output_final_state=final,
        split=split,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels(device, tiles, dtype):
    tiles(32, 4, 2)
    with testing.poisoned_memory():
        found = testing.errors(flat, made(device, dtype), "triton")
    assert len(found) == 7
    testing.assert_within(found, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "change",
    [
        dict(bounds=None, B=2, T=9),
        dict(bounds=None, B=3, T=1),
        dict(bounds=None, B=2, T=2, split=None),
        dict(bounds=(0, 7, 64), T=64, state=False, final=False),
        dict(bounds=(0, 65), T=65, W=2, state=False, split=None),
        dict(W=3, final=False, split=(16,)),
        dict(state=False, split=(15, 1)),
    ],
    ids=str,
)
def test_kernels_of_other_shapes(device, tiles, change):
    tiles(32, 4, 2)
    with testing.poisoned_memory():
        found = testing.errors(flat, made(device, **change), "triton")
    testing.assert_within(found, 2e-6)


def test_kernels_without_activation_as_launched(device):
    inputs = made(device, T=6, bounds=(0, 1, 6)) | {"activation": None}
    with testing.poisoned_memory():
        testing.assert_within(testing.errors(flat, inputs, "triton"), 2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_kernels_with_large_and_tiny_inputs(device, tiles, scale):
    """At 1e4 exp overflows for half the outputs; at 1e-4 all of them are tiny."""
    tiles(32, 4, 1)
    inputs = made(device, T=9, bounds=(0, 4, 9), scale=scale)
    testing.assert_within(testing.errors(flat, inputs, "triton"), 2e-6)


def test_kernels_make_the_same_bits_whatever_the_programs(device, tiles):
    """Where programs end changes nothing but the order in which dw is summed; a second run changes not even that."""
    runs = []
    for config in ((32, 4, 1), (32, 4, 1), (16, 8, 6)):
        tiles(*config)
        runs.append(testing.run_both_ways(flat, made(device, torch.bfloat16), "triton"))
    first, again, other = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    first.pop("gradient of weight")
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_kernels_walk_views(device, tiles):
    """x and the state are views between NaNs; the gradients of the outputs are views or missing."""
    from boreal_kernels.causal_conv1d.forward import rows_of

    tiles(32, 4, 2)
    views = made(device, T=11, bounds=(0, 2, 11))
    assert rows_of(views["x"])[0].data_ptr() == views["x"].data_ptr() and rows_of(views["x"])[1:] == (64, 32)
    plain = {name: x.contiguous() if torch.is_tensor(x) else x for name, x in views.items()}
    views["initial_state"] = testing.spread(views["initial_state"].mT).mT
    a, b = (testing.run_both_ways(flat, x, "triton") for x in (plain, views))
    assert all(torch.equal(a[name], b[name]) for name in a)

    leaves = [plain[name].requires_grad_() for name in ("x", "weight", "initial_state")]
    q, k, v, state = flat(**plain, backend="triton")
    dk = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(device)
    want = torch.autograd.grad((q, k, v, state), leaves, [torch.zeros_like(q), dk, torch.zeros_like(v), 0 * state])
    for grad in (dk, testing.spread(dk), dk.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v, state = flat(**plain, backend="triton")
        with testing.poisoned_memory():
            found = torch.autograd.grad(k, leaves, grad)
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))

    for backend in ("triton", "torch"):
        state = flat(**plain, backend=backend)[-1]
        found, want = torch.autograd.grad(state, [leaves[0], leaves[2]], torch.ones_like(state)), found
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_kernels_keep_nan_in_its_document(device, tiles):
    tiles(32, 4, 2)
    bounds = (0, 5, 7, 7, 15)
    clean, dirty = (made(device, T=15, bounds=bounds) for _ in range(2))
    dirty["x"][:, 5:7] = torch.nan
    dirty["initial_state"][1:3] = torch.nan
    a, b = (testing.run_both_ways(flat, x, "triton") for x in (clean, dirty))
    for name in a:
        if name == "gradient of weight":
            continue
        by_document = name in ("output 3", "gradient of initial_state")
        kept = [0, 3] if by_document else [*range(5), *range(7, 15)]
        if name == "gradient of initial_state":
            kept.append(2)  # the state of a document without a position goes through no activation
        assert torch.equal(*(x[name][kept] if by_document else x[name][:, kept] for x in (a, b))), name
        assert b[name].isnan().any(), name


def test_kernels_decode_what_they_prefill(device):
    inputs = made(device, T=8, bounds=None, B=2, split=None, state=False, final=True)
    x = inputs.pop("x")
    want = causal_conv1d(x, **inputs, backend="triton")[0]
    outputs = []
    for part in (slice(0, 2), slice(2, 6), slice(6, 7), slice(7, 8)):
        y, inputs["initial_state"] = causal_conv1d(x[:, part], **inputs, backend="triton")
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-6, atol=1e-6)


def test_kernels_are_custom_ops(device, tiles):
    from boreal_kernels.causal_conv1d import fused

    tiles(32, 8, 1)
    inputs = made(device, T=5, bounds=(0, 2, 5))
    for name in ("x", "weight", "initial_state"):
        inputs[name].requires_grad_()
    inputs["split"] = list(inputs["split"])
    torch.library.opcheck(fused.causal_conv1d, tuple(inputs.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(1, 4, 3, dtype=torch.float64)), "x: found torch.float64, expected one of"),
        (dict(weight=torch.zeros(3, 5)), "weight: found W = 5, expected one of .*backend='torch' takes any"),
        (dict(weight=torch.zeros(3, 1)), "weight: found W = 1"),
    ],
)
def test_kernels_refuse_what_they_do_not_read(device, change, message):
    inputs = dict(x=torch.zeros(1, 4, 3), weight=torch.zeros(3, 4)) | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{name: x.to(device) for name, x in inputs.items()}, activation=None, backend="triton")
