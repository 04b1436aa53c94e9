"""gated_delta_rule's kernels against plain torch in float64, outputs and every gradient; exact arithmetic bit for bit.

Errors are of the largest value. Seeds: `made`, and the tests' own. A chunk is 64 positions.
"""

import pytest
import torch
from boreal_kernels import gated_delta_rule, launch, testing

# bf16: inputs of matrix products are rounded to 2^-9 on the way. What A_log and dt_bias get are sums over all
# positions, of either sign: an error of the terms is a larger part of the sum.
FP32 = {"": 5e-6, "gradient of A_log": 3e-5, "gradient of dt_bias": 3e-5}
BF16 = {"": 1.5e-2, "gradient of A_log": 3e-2, "gradient of dt_bias": 3e-2}
ALL = dict(output_final_state=True, output_transition=True)


@pytest.fixture(autouse=True)
def wide_tiles(device, monkeypatch):
    """Interpreted, FP32 runs in bf16's tiles: fewer programs, same code. On a GPU in its own, which save registers."""
    table = launch.config
    if device.type == "cpu":
        monkeypatch.setattr(launch, "config", lambda kernel, **shape: table(kernel, **shape | {"bits": 16}))


def made(device, T, H=1, R=2, K=64, V=64, bounds=None, initial=False, dtype=torch.float32, B=1, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    HV = H * R
    x = dict(q=draw(B, T, H, K), k=draw(B, T, H, K), v=draw(B, T, HV, V), a=draw(B, T, HV) - 2, b=draw(B, T, HV))
    x = {name: y.to(device, dtype) for name, y in x.items()}
    x |= {"A_log": (0.3 * draw(HV)).to(device), "dt_bias": draw(HV).to(device)}
    N = B
    if bounds is not None:
        N, x["cu_seqlens"] = len(bounds) - 1, torch.tensor(bounds, dtype=torch.int32, device=device)
    if initial:
        x["initial_state"] = draw(N, HV, K, V).to(device)
    return x | options


def errors(inputs):
    with testing.poisoned_memory():
        return testing.errors(gated_delta_rule, inputs, "triton")


def assert_close(inputs, relative, absolute):
    """As `errors`, but for gradients that vanish: float64 itself leaves 1e-16 where the truth is 1e-22."""
    doubles = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
    found = testing.run_both_ways(gated_delta_rule, inputs, "triton")
    wanted = testing.run_both_ways(gated_delta_rule, doubles, "torch")
    for name, want in wanted.items():
        assert (found[name] - want).abs().max() <= relative * want.abs().max() + absolute, name


@pytest.mark.parametrize("T, B", [(1, 2), (63, 1), (64, 1), (65, 2), (130, 1)])
def test_rows(device, T, B):
    testing.assert_within(errors(made(device, T, B=B, initial=T != 64, output_final_state=True)), FP32)


@pytest.mark.parametrize("bounds", [(0, 1, 3, 6, 7), (0, 0, 5, 5, 70, 70)], ids=str)
def test_documents_and_the_transition(device, bounds):
    """Tiny ones, empty ones, boundaries beside a chunk's edge; int64 bounds; the transition."""
    inputs = made(device, bounds[-1], R=1, bounds=bounds, initial=len(bounds) == 6, **ALL)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].long()
    testing.assert_within(errors(inputs), FP32)


@pytest.mark.parametrize("H, R, K, V", [(2, 2, 64, 128), (1, 4, 64, 64), (1, 1, 128, 64)])
def test_heads_and_widths(device, H, R, K, V):
    """Value head j reads key head j // R, each with its own gates; more tiles of columns than one."""
    inputs = made(device, 4, H, R, K, V, initial=True, **ALL)
    testing.assert_within(errors(inputs), FP32)


def test_bf16(device):
    testing.assert_within(errors(made(device, 66, R=1, dtype=torch.bfloat16, initial=True, **ALL)), BF16)
    inputs = made(device, 20, R=1, K=128, V=128, bounds=(0, 7, 20), dtype=torch.bfloat16, output_final_state=True)
    testing.assert_within(errors(inputs), BF16)


def test_every_result_may_stand_alone(device):
    """Gradients of one result only: the others' are absent, not zeros somebody has to make."""
    inputs = made(device, 5, initial=True)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    for used in range(3):
        grads = []
        for backend, convert in (("triton", lambda x: x), ("torch", lambda x: x.double())):
            results = gated_delta_rule(**{n: convert(x) for n, x in inputs.items()}, **ALL, backend=backend)
            loss = (results[used].double() * torch.linspace(-1, 1, results[used].numel()).view_as(results[used])).sum()
            grads.append(torch.autograd.grad(loss, list(inputs.values()), allow_unused=True))
        for name, got, want in zip(inputs, *grads, strict=True):
            want = torch.zeros_like(got) if want is None else want
            assert (got - want).abs().max() <= 3e-5 * want.abs().max() + 1e-9, (used, name)


GATES = {  # a, with A_log = 0 and dt_bias = 0: g = -softplus(a)
    "keep": lambda a: a - 30.0,
    "forget": lambda a: torch.full_like(a, 50.0),
    "alternate": lambda a: torch.where(torch.arange(a.shape[1])[:, None] % 2 == 0, -40.0,
    80.0).expand_as(a).contiguous(),
    "once": lambda a: torch.where(torch.arange(a.shape[1])[:, None] == 30, 1e4, a - 3.0),
}


@pytest.mark.parametrize("gates", GATES)
def test_extreme_gates(device, gates):
    inputs = made(device, 66 if gates == "once" else 20, R=1, initial=True, output_final_state=True)
    inputs |= {"a": GATES[gates](inputs["a"].cpu()).to(device)}
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("A_log", "dt_bias")}
    assert_close(inputs, 2e-5, 1e-12)


def test_a_gate_that_forgets_gets_no_gradient_and_spares_its_neighbours(device):
    """Not 1e-7 of its neighbours': times g = -1e4 that would be all of A_log's gradient."""
    inputs = made(device, 40, R=1)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("A_log", "dt_bias")}
    inputs["a"][:, 20] = 1e4
    found = testing.run_both_ways(gated_delta_rule, inputs, "triton")["gradient of a"]
    assert (found[:, 20] == 0).all() and (found[:, 19] != 0).all()


@pytest.mark.parametrize("strength", [20.0, -200.0], ids=["beta 1", "beta 0"])
def test_identical_keys(device, strength):
    """The worst case of the inverse: all entries below the diagonal equal beta. Power series reach 1e10 here."""
    inputs = made(device, 64, R=1)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 64, -1, -1).contiguous()
    inputs |= {"a": torch.full_like(inputs["a"], -20.0), "b": torch.full_like(inputs["b"], strength)}
    # Full strength overwrites whatever a gate let through: then gates get nothing but what rounding leaves.
    assert_close(inputs, 1e-5, 1e-12)


def test_zero_and_opposite_keys(device):
    inputs = made(device, 20, R=1)
    inputs["k"][:, 5:9] = 0
    inputs["k"][:, 10] = -inputs["k"][:, 9]
    testing.assert_within(errors(inputs), FP32)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_values(device, scale):
    inputs = made(device, 20, R=1, dtype=torch.bfloat16)
    testing.assert_within(errors(inputs | {"v": inputs["v"] * scale}), BF16)


def test_views_of_the_fused_convolution(device):
    """q, k, v are slices, and so is the gradient of o; a and b are strided. Their neighbours are NaN."""
    inputs = made(device, 5, H=2, R=1, initial=True)
    views = dict(inputs)
    for name in ("q", "k", "v"):
        views[name] = testing.spread(inputs[name])
    for name in ("a", "b"):
        views[name] = inputs[name].mT.contiguous().mT
    assert not any(views[name].is_contiguous() for name in ("q", "k", "v", "a", "b"))
    first, second = (testing.run_both_ways(gated_delta_rule, x, "triton") for x in (inputs, views))
    assert all(torch.equal(first[name], second[name]) for name in first)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "a", "b")]
    o = gated_delta_rule(*leaves, inputs["A_log"], inputs["dt_bias"], backend="triton")[0]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(device)
    first, second = (torch.autograd.grad(o, leaves, x, retain_graph=True) for x in (do, testing.spread(do)))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nan_stays_in_its_document(device):
    """A short chunk's padding lies on the next document's positions."""
    bounds = (0, 5, 9, 11)
    inputs = made(device, 11, R=1, bounds=bounds, output_final_state=True)
    clean = testing.run_both_ways(gated_delta_rule, inputs, "triton")
    for name in ("q", "k", "v", "a", "b"):
        inputs[name][:, 5:9] = torch.nan
    dirty = testing.run_both_ways(gated_delta_rule, inputs, "triton")
    for name in ("output 0", *(f"gradient of {x}" for x in "qkvab")):
        for part in (slice(0, 5), slice(9, 11)):
            assert torch.equal(clean[name][:, part], dirty[name][:, part]), name
    assert torch.equal(clean["output 1"][[0, 2]], dirty["output 1"][[0, 2]])


def test_bits_repeat_and_do_not_depend_on_the_place(device):
    inputs = made(device, 20, R=1, bounds=(0, 3, 20), dtype=torch.bfloat16, output_final_state=True)
    first, again = (testing.run_both_ways(gated_delta_rule, inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        alone = {n: x[:, 3:] if x.dim() > 2 else x for n, x in inputs.items() if n not in ("cu_seqlens",
        "output_final_state")}
        assert torch.equal(gated_delta_rule(**alone, backend="triton")[0], first["output 0"][:, 3:])


def test_one_token_is_one_step(device):
    """Decoding: one launch, FP32, from every position's state to the next."""
    for dtype, allowed in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        inputs = made(device, 1, R=2, K=64, V=128, B=2, initial=True, dtype=dtype, output_final_state=True)
        with torch.no_grad():
            for change in ({}, {"initial_state": None}):
                found = gated_delta_rule(**inputs | change, backend="triton")
                wanted = gated_delta_rule(**inputs | change, backend="torch")
                for got, want in zip(found[:2], wanted[:2], strict=True):
                    assert got.dtype == want.dtype
                    assert (got.double() - want.double()).abs().max() <= allowed * want.abs().max()


def test_exact_arithmetic(device):
    from boreal_kernels.gated_delta_rule import selftest

    if device.type == "cuda":
        selftest.run(device)
    else:
        selftest.run(device, 64, 64, 1)


def test_the_self_test_notices_and_names_the_compilers(device, monkeypatch):
    from boreal_kernels.gated_delta_rule import fused, selftest

    right = fused.gated_delta_rule

    def wrong(*args, **options):
        o, state, transition = right(*args, **options)
        change = torch.where(torch.arange(o.numel(), device=o.device) == o.abs().argmax(), 1 + 2**-8, 1.0)
        return o * change.view_as(o), state, transition  # one number, by its last digit in bf16

    monkeypatch.setattr(fused, "gated_delta_rule", wrong)
    with pytest.raises(RuntimeError, match=r"numbers differ from float64.*Triton \d+\.\d+.* with ptxas \d+"):
        selftest.run(device, 64, 64, 1, (torch.float32,))


def test_custom_ops(device):
    from boreal_kernels.gated_delta_rule import fused

    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "cu_seqlens", "initial_state")
    inputs = made(device, 3, R=1, bounds=(0, 3), initial=True)
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in (inputs[name] for name in names)]
    torch.library.opcheck(fused.gated_delta_rule_chunks, (*inputs, 0.125, True, True))
    inputs = [x.detach() for x in made(device, 1, R=1, initial=True).values()]
    torch.library.opcheck(fused.gated_delta_rule_step, (*inputs, 0.125, True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(1, 4, 2, 32), k=torch.zeros(1, 4, 2, 32)), "K: found 32, expected one of 64, 128"),
        (dict(v=torch.zeros(1, 4, 4, 32)), "V: found 32, expected one of 64, 128"),
        (dict(v=torch.zeros(1, 4, 4, 64).double()), "v: found torch.float64, expected one of"),
        (dict(a=torch.zeros(1, 4, 4).long()), "a: found torch.int64, expected one of"),
        (dict(initial_state=torch.zeros(1, 4, 64, 64).double()), "initial_state: found torch.float64"),
        (dict(v=torch.zeros(1, 4, 3, 64)), "HV = 3 value heads over H = 2"),
        (dict(cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens: found \[0, 3\], expected 0 .. T = 4"),
        (dict(cu_seqlens=torch.tensor([0, 3, 1, 4])), "not decreasing"),
        (dict(b=torch.zeros(1, 4, 4, device="meta")), "b: found device meta"),
    ],
)
def test_misuse_is_named_before_a_launch(change, message):
    good = dict(q=torch.zeros(1, 4, 2, 64), k=torch.zeros(1, 4, 2, 64), v=torch.zeros(1, 4, 4, 64))
    good |= dict(a=torch.zeros(1, 4, 4), b=torch.zeros(1, 4, 4), A_log=torch.zeros(4), dt_bias=torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**good | change, backend="triton")


def test_wrong_documents_touch_no_other_memory(device):
    """On a device nobody reads cu_seqlens; the tables that are made of it must stay within what was allocated."""
    from boreal_kernels.gated_delta_rule.chunks import table

    for bounds in ((0, 200, 100, 300), (-70, 64, 1000), (5, 5, 5)):
        T = 150
        spans, chunks = (x.cpu() for x in table(1, T, torch.tensor(bounds, device=device), device))
        first, _, begin, length = spans.unbind(1)
        assert (first >= 0).all() and (begin >= 0).all() and (length >= 0).all() and (begin + length <= T).all()
        assert (first + (length + 63) // 64 <= len(chunks)).all()
