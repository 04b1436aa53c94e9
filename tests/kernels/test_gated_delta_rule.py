"""gated_delta_rule: the chunked form against the recurrence in float64, outputs and every gradient.

Tolerances: float64 1e-10 absolute (both forms are exact up to rounding); FP32 against float64 2e-5 of the largest
entry of each tensor. Seed: conftest's `normal`.
"""

import inspect

import pytest
import torch
from boreal_kernels import gated_delta_rule
from boreal_kernels.gated_delta_rule.reference import CHUNK, chunked, recurrent

FP32_RELATIVE = 2e-5


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def make(normal, B, T, H, HV, K, V, dtype=torch.float64):
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, HV, V), (B, T, HV), (B, T, HV), (HV,), (HV,))
    return [normal(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def with_grads(rule, inputs, gradients, state=None, **options):
    outputs = [x for x in rule(*inputs, initial_state=state, **options) if x is not None]
    return outputs + gradients(outputs, inputs + ([] if state is None else [state]))


def assert_close(found, expected, relative):
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        worst = (x.double() - y.double()).abs().max().item()
        bound = relative * max(1.0, y.abs().max().item())
        assert worst <= bound, f"tensor {i} of outputs + gradients: off by {worst:.3e}, allowed {bound:.3e}"


def test_recurrence_is_the_papers_matrix_form(normal):
    """S_t = alpha (I - beta k k^T) S_{t-1} + beta k v^T with the state written as matrices, o = S^T q."""
    T, H, HV, K, V = 7, 2, 4, 3, 5
    q, k, v, a, b, A_log, dt_bias = (x.detach() for x in make(normal, 1, T, H, HV, K, V))
    o, state, _ = recurrent(q, k, v, a, b, A_log, dt_bias, output_final_state=True)
    for j in range(HV):
        S = torch.zeros(K, V, dtype=torch.float64)
        for t in range(T):
            qt, kt = q[0, t, j // 2], k[0, t, j // 2]
            qt, kt = qt / (qt @ qt + 1e-6).sqrt() * K**-0.5, kt / (kt @ kt + 1e-6).sqrt()
            alpha = torch.exp(-torch.exp(A_log[j]) * torch.log1p(torch.exp(a[0, t, j] + dt_bias[j])))
            beta = 1 / (1 + torch.exp(-b[0, t, j]))
            S = alpha * (torch.eye(K, dtype=torch.float64) - beta * torch.outer(kt, kt)) @ S
            S = S + beta * torch.outer(kt, v[0, t, j])
            torch.testing.assert_close(o[0, t, j], S.T @ qt, rtol=0, atol=1e-12)
        torch.testing.assert_close(state[0, j], S, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [1, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [16, CHUNK, 64])
def test_lengths(normal, gradients, T, chunk):
    inputs = make(normal, 2, T, 2, 4, 6, 5)
    state = normal(2, 4, 6, 5, dtype=torch.float64).requires_grad_()
    want = with_grads(recurrent, inputs, gradients, state, output_final_state=True)
    got = with_grads(lambda *x, **o: chunked(*x, **o, chunk=chunk), inputs, gradients, state, output_final_state=True)
    assert_close(got, want, 1e-10)


@pytest.mark.parametrize("transition", [False, True], ids=["", "transition"])
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial"])
@pytest.mark.parametrize(
    "bounds",
    [
        (0, 64, 128, 150),  # at chunk edges
        (0, 5, 63, 65, 66, 150),  # off the edges, several in one chunk, one token
        (0, 150),
        (0, 0, 70, 70, 150, 150),  # empty documents
    ],
)
@pytest.mark.parametrize("chunk", [CHUNK, 64])
def test_documents(normal, gradients, bounds, initial, transition, chunk):
    inputs = make(normal, 1, bounds[-1], 1, 2, 4, 3)
    state = normal(len(bounds) - 1, 2, 4, 3, dtype=torch.float64).requires_grad_() if initial else None
    options = dict(cu_seqlens=cu(*bounds), output_final_state=True, output_transition=transition)
    want = with_grads(recurrent, inputs, gradients, state, **options)
    got = with_grads(lambda *x, **o: chunked(*x, **o, chunk=chunk), inputs, gradients, state, **options)
    assert_close(got, want, 1e-10)


def test_documents_equal_separate_calls(normal):
    bounds = (0, 5, 64, 100, 164)
    q, k, v, a, b, A_log, dt_bias = (x.detach() for x in make(normal, 1, bounds[-1], 2, 4, 6, 5))
    initial = normal(4, 4, 6, 5, dtype=torch.float64)
    o, state, _ = gated_delta_rule(
        q, k, v, a, b, A_log, dt_bias, cu_seqlens=cu(*bounds), initial_state=initial, output_final_state=True
    )
    for n in range(4):
        part = slice(bounds[n], bounds[n + 1])
        pieces = [x[:, part] for x in (q, k, v, a, b)]
        o_n, state_n, _ = gated_delta_rule(
            *pieces, A_log, dt_bias, initial_state=initial[n : n + 1], output_final_state=True
        )
        torch.testing.assert_close(o[:, part], o_n, rtol=0, atol=1e-12)
        torch.testing.assert_close(state[n], state_n[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("edge", [64, 70])
def test_no_leak_between_documents(normal, gradients, edge):
    """Whatever is in document 0, document 1's outputs, state and gradients have the same bits, and the reverse."""
    T = 140
    for changed, kept in ((slice(0, edge), slice(edge, T)), (slice(edge, T), slice(0, edge))):
        inputs = make(normal, 1, T, 2, 4, 8, 8, dtype=torch.float32)
        other = [x.detach().clone() for x in inputs]
        for x in other[:5]:
            x[:, changed] = 30 * normal(*x[:, changed].shape)
        other = [x.requires_grad_() for x in other]
        n = 0 if kept.start == 0 else 1
        results = []
        for x in (inputs, other):
            o, state, _ = chunked(*x, cu_seqlens=cu(0, edge, T), output_final_state=True)
            grads = gradients([o[:, kept], state[n]], x)
            results.append([o[:, kept], state[n], *(grad[:, kept] for grad in grads[:5])])
            assert all((grad[:, changed] == 0).all() for grad in grads[:5])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


def test_gradcheck(normal):
    """Central differences in float64: grouped heads, three documents, odd length, entering states, all outputs."""
    inputs = make(normal, 1, 7, 1, 2, 3, 2)
    state = normal(3, 2, 3, 2, dtype=torch.float64).requires_grad_()

    def rule(*x):
        return chunked(
            *x[:-1],
            initial_state=x[-1],
            cu_seqlens=cu(0, 2, 4, 7),
            output_final_state=True,
            output_transition=True,
            chunk=4,
        )

    assert torch.autograd.gradcheck(rule, (*inputs, state))


def test_gradcheck_rows(normal):
    inputs = make(normal, 2, 5, 2, 4, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: chunked(*x, chunk=4)[0], inputs)


GATES = {  # log-scale of A, shift of a: alpha near 0, near 1, and both side by side
    "forget": lambda a: (6.0, a.abs() + 20.0),  # alpha = exp(-400 * 20)
    "keep": lambda a: (-6.0, a - 20.0),  # alpha = 1 - 5e-12
    "mixed": lambda a: (3.0, torch.where(a > 1.0, 50.0, a - 8.0)),  # hard resets among decays of about 0.99
}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("bounds", [None, (0, 40, 64, 130)], ids=["row", "documents"])
def test_extreme_gates_fp32(normal, gradients, gates, bounds):
    inputs = [x.detach() for x in make(normal, 1, 130, 2, 4, 16, 16, dtype=torch.float32)]
    A_log, a = GATES[gates](inputs[3])
    inputs[3], inputs[5], inputs[6] = a, torch.full((4,), A_log), torch.zeros(4)
    options = dict(cu_seqlens=None if bounds is None else cu(*bounds), output_final_state=True)
    got = with_grads(chunked, [x.requires_grad_() for x in inputs], gradients, **options)
    double = [x.detach().double().requires_grad_() for x in inputs]
    want = with_grads(recurrent, double, gradients, **options)
    assert all(x.isfinite().all() for x in got)
    assert_close(got, want, FP32_RELATIVE)


def test_repeated_keys_at_full_write_strength_fp32(normal, gradients):
    """The worst case for the inverse of I + M: every entry below the diagonal is 1."""
    inputs = [x.detach() for x in make(normal, 1, 128, 1, 2, 8, 8, dtype=torch.float32)]
    inputs[1] = inputs[1][:, :1].expand(-1, 128, -1, -1).clone()
    inputs[3], inputs[4] = torch.full_like(inputs[3], -20.0), torch.full_like(inputs[4], 20.0)
    got = with_grads(chunked, [x.requires_grad_() for x in inputs], gradients)
    want = with_grads(recurrent, [x.detach().double().requires_grad_() for x in inputs], gradients)
    assert_close(got, want, FP32_RELATIVE)


def test_value_heads_repeat_interleave_their_key_head(normal):
    """Value head j reads key head j // G; tiling (j % H) would give other numbers."""
    q, k, v, a, b, A_log, dt_bias = (x.detach() for x in make(normal, 1, 70, 2, 4, 6, 5))
    o = gated_delta_rule(q, k, v, a, b, A_log, dt_bias)[0]
    interleaved = gated_delta_rule(
        *(x.repeat_interleave(2, dim=2) for x in (q, k)), v, a, b, A_log, dt_bias
    )[0]
    tiled = gated_delta_rule(*(x.repeat(1, 1, 2, 1) for x in (q, k)), v, a, b, A_log, dt_bias)[0]
    torch.testing.assert_close(o, interleaved, rtol=0, atol=1e-12)
    assert (o - tiled).abs().max() > 0.1


def test_transition_joins_two_halves(normal):
    """S_end = Phi S_begin + S_end_from_zero: what a context-parallel rank sends on."""
    T, cut = 100, 37
    q, k, v, a, b, A_log, dt_bias = (x.detach() for x in make(normal, 2, T, 2, 4, 6, 5))
    halves = [[x[:, part] for x in (q, k, v, a, b)] for part in (slice(0, cut), slice(cut, T))]
    _, whole, phi = gated_delta_rule(
        q, k, v, a, b, A_log, dt_bias, output_final_state=True, output_transition=True
    )
    (_, s1, phi1), (_, s2, phi2) = (
        gated_delta_rule(*half, A_log, dt_bias, output_final_state=True, output_transition=True) for half in halves
    )
    torch.testing.assert_close(phi2 @ s1 + s2, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(phi2 @ phi1, phi, rtol=0, atol=1e-12)


def test_decoding_continues_prefill(normal):
    T, prefill = 70, 66
    q, k, v, a, b, A_log, dt_bias = (x.detach() for x in make(normal, 2, T, 2, 4, 6, 5, dtype=torch.float32))
    want = gated_delta_rule(q, k, v, a, b, A_log, dt_bias)[0]
    state, outputs = None, []
    for part in [slice(0, prefill)] + [slice(t, t + 1) for t in range(prefill, T)]:
        o, state, _ = gated_delta_rule(
            *(x[:, part] for x in (q, k, v, a, b)), A_log, dt_bias, initial_state=state, output_final_state=True
        )
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=0, atol=2e-6)


def test_strided_inputs_between_nans(normal, poisoned, gradients):
    inputs = make(normal, 1, 70, 2, 4, 6, 5, dtype=torch.float32)
    views = [poisoned(x).requires_grad_() for x in inputs]
    assert not views[0].is_contiguous()
    got = with_grads(gated_delta_rule, views, gradients, cu_seqlens=cu(0, 30, 70), output_final_state=True)
    want = with_grads(gated_delta_rule, inputs, gradients, cu_seqlens=cu(0, 30, 70), output_final_state=True)
    assert_close(got, want, 1e-6)  # sums over strided memory run in another order


def test_two_runs_have_the_same_bits(normal, gradients):
    inputs = make(normal, 1, 130, 2, 4, 16, 16, dtype=torch.float32)
    options = dict(cu_seqlens=cu(0, 50, 130), output_final_state=True)
    runs = [with_grads(gated_delta_rule, inputs, gradients, **options) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_bf16_inputs_are_computed_in_fp32(normal):
    inputs = [x.detach().bfloat16() for x in make(normal, 1, 70, 2, 4, 16, 16, dtype=torch.float32)]
    o, state, phi = gated_delta_rule(*inputs, output_final_state=True, output_transition=True)
    assert (o.dtype, state.dtype, phi.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    want, want_state, want_phi = recurrent(
        *(x.double() for x in inputs), output_final_state=True, output_transition=True
    )
    assert torch.equal(o, gated_delta_rule(*(x.float() for x in inputs))[0].bfloat16())
    assert_close([state, phi], [want_state, want_phi], FP32_RELATIVE)
    assert_close([o], [want], 2**-8)


def test_scale(normal):
    inputs = make(normal, 1, 20, 2, 4, 16, 16)
    o = gated_delta_rule(*inputs)[0]
    torch.testing.assert_close(gated_delta_rule(*inputs, scale=1.0)[0], 4 * o)


def test_documents_are_not_read_on_the_host():
    """A host read would stall the device every layer."""
    source = inspect.getsource(chunked)
    assert not any(call in source for call in (".tolist()", ".item()", ".cpu()", "int(cu"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=torch.zeros(1, 4, 2, 3)), r"k: found shape \[1, 4, 2, 3\], expected \[B, T, H, K\]"),
        (dict(v=torch.zeros(1, 4, 3, 5)), "HV = 3 value heads over H = 2"),
        (dict(a=torch.zeros(1, 4, 2)), "a: found shape"),
        (dict(A_log=torch.zeros(2)), "A_log: found shape"),
        (dict(initial_state=torch.zeros(2, 4, 6, 5)), "initial_state: found shape"),
        (dict(cu_seqlens=torch.tensor([0.0, 4.0])), "cu_seqlens: found torch.float32"),
        (dict(cu_seqlens=torch.tensor([4])), r"cu_seqlens: found shape \[1\]"),
        (dict(backend="cutlass"), "found 'cutlass', expected one of auto, triton"),
    ],
)
def test_misuse_is_named(change, message):
    good = dict(
        q=torch.zeros(1, 4, 2, 6),
        k=torch.zeros(1, 4, 2, 6),
        v=torch.zeros(1, 4, 4, 5),
        a=torch.zeros(1, 4, 4),
        b=torch.zeros(1, 4, 4),
        A_log=torch.zeros(4),
        dt_bias=torch.zeros(4),
    )
    gated_delta_rule(**good)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**good, **change})


def test_packed_rows_are_refused():
    x = [torch.zeros(2, 4, 2, 6)] * 2 + [torch.zeros(2, 4, 4, 5)] + [torch.zeros(2, 4, 4)] * 2 + [torch.zeros(4)] * 2
    with pytest.raises(ValueError, match="B = 2 with cu_seqlens, expected B = 1"):
        gated_delta_rule(*x, cu_seqlens=cu(0, 4))
