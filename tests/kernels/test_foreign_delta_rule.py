"""The adapters for flash-linear-attention and flash-qla, which need a GPU: against a stand-in for both with their
calling convention (flash-linear-attention 0.6.0), written in plain torch. Outputs and every gradient against the
torch backend in float64, tolerance 2e-6 of the largest value in FP32, 1e-2 in bf16. Nothing here says that the
libraries' kernels are right.
"""

import functools
import sys
import types

import pytest
import torch
from boreal_kernels import gated_delta_rule, testing
from boreal_kernels.gated_delta_rule import foreign, reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def compute(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel):
    """What the libraries compute, from the log decay and the write strength, in float64."""
    assert q.dtype == k.dtype == v.dtype and use_qk_l2norm_in_kernel
    assert all(x.dtype == torch.float32 for x in (g, beta, initial_state) if x is not None)
    a = -g.double() + torch.log(-torch.expm1(g.double()))  # softplus^-1
    none = torch.zeros(g.shape[-1], dtype=torch.float64)
    o, state, _ = reference.recurrent(
        q, k, v, a, beta.double().logit(), none, none, cu_seqlens=cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, scale=scale,
    )  # fmt: skip
    return o.to(q.dtype), None if state is None else state.float()


@pytest.fixture
def libraries(monkeypatch):
    """The stand-ins in sys.modules; yields the list of calls (their cu_seqlens)."""
    calls = []

    # No **kwargs, which swallow a misspelt name in the library.
    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
        cu_seqlens_cpu=None, chunk_indices=None, cp_context=None,
    ):  # fmt: skip
        assert not (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first or cp_context)
        calls.append(cu_seqlens)
        return compute(
            q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
        )

    @functools.wraps(chunk_gated_delta_rule)
    def dispatching(*args, **kwargs):
        raise AssertionError("this may run flash-qla")

    class FlashQLABackend:
        def verify(self, name, q, k, v, g, beta, **options):
            assert name == "chunk_gated_delta_rule"
            if q.dtype == torch.float32 or (q.shape[-1], v.shape[-1]) != (128, 128):
                return False, f"not {q.dtype} with K, V = {q.shape[-1]}, {v.shape[-1]}"
            return True, None

        def chunk_gated_delta_rule(self, *args, **options):
            return chunk_gated_delta_rule(*args, **options)

    contents = {
        "fla": {},
        "fla.ops": {},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": dispatching},
        "fla.ops.gated_delta_rule.backends": {},
        "fla.ops.gated_delta_rule.backends.flash_qla": {"FlashQLABackend": FlashQLABackend},
        "flash_qla": {},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def make(normal, N, T, K, V, dtype, *, packed=False, H=1, HV=2, state=False, **options):
    """Arguments of the operation: N rows, or N documents of T, T+1, .. positions in one."""
    made = {}
    if packed:
        ends = torch.tensor([T + n for n in range(N)]).cumsum(0)
        made["cu_seqlens"] = torch.cat([torch.zeros(1), ends]).int()
    B, T = (1, int(ends[-1])) if packed else (N, T)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "a": (B, T, HV), "b": (B, T, HV)}
    made |= {name: normal(*shape).to(dtype) for name, shape in shapes.items()}
    made |= {"A_log": normal(HV), "dt_bias": normal(HV)}
    return made | ({"initial_state": normal(N, HV, K, V)} if state else {}) | options


def operation(*, backend, **arguments):
    """A foreign backend by its name, or this package's."""
    rules = {"fla": foreign.fla, "flash_qla": foreign.flash_qla}
    return rules.get(backend, functools.partial(gated_delta_rule, backend=backend))(**arguments)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transition", [False, True], ids=["", "transition"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_fla(libraries, normal, packed, state, transition, dtype):
    options = dict(output_final_state=state, output_transition=transition)
    inputs = make(normal, 2, 5, 6, 4, dtype, packed=packed, H=2, HV=4, state=state, **options)
    testing.assert_within(testing.errors(operation, inputs, "fla"), TOLERANCE[dtype])
    o, *rest = foreign.fla(**inputs)
    assert o.dtype == dtype and [x is not None for x in rest] == [state, transition]
    assert all(x.dtype == torch.float32 for x in rest if x is not None)
    assert libraries[-1] is inputs.get("cu_seqlens")  # not a copy: the library remembers what it derived from this one


def test_scale_and_transition_beside_a_state_that_is_not_asked_for(libraries, normal):
    inputs = make(normal, 2, 3, 4, 4, torch.float32, state=True, output_transition=True, scale=0.3)
    testing.assert_within(testing.errors(operation, inputs, "fla"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_flash_qla(libraries, normal, packed):
    inputs = make(normal, 2, 3, 128, 128, torch.bfloat16, packed=packed, state=packed, output_final_state=packed)
    testing.assert_within(testing.errors(operation, inputs, "flash_qla"), TOLERANCE[torch.bfloat16])
    o, state, transition = foreign.flash_qla(**inputs)
    assert o.dtype == torch.bfloat16 and (state is not None) == packed and transition is None


def test_mixed_dtypes_meet_in_the_wider(libraries, normal):
    """The libraries want one; the output is in v's."""
    inputs = make(normal, 1, 4, 4, 4, torch.bfloat16)
    inputs["q"] = inputs["q"].float()
    assert foreign.fla(**inputs)[0].dtype == torch.bfloat16
    testing.assert_within(testing.errors(operation, inputs, "fla"), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "rule, change, message",
    [
        (foreign.fla, dict(K=257), "found K = 257, expected at most 256; use backend torch"),
        (foreign.fla, dict(dtype=torch.float64), r"q: found torch.float64.*backend='torch' takes any"),
        (foreign.flash_qla, dict(output_transition=True), "has no transition.*use backend triton or torch"),
        (foreign.flash_qla, dict(K=64), "refuses this call: not torch.bfloat16 with K, V = 64, 128; use backend"),
        (foreign.flash_qla, dict(dtype=torch.float32), "refuses this call: not torch.float32"),
    ],
)
def test_what_they_cannot_do_is_refused(libraries, normal, rule, change, message):
    inputs = make(normal, **{**dict(N=1, T=2, K=128, V=128, dtype=torch.bfloat16), **change})
    with pytest.raises(ValueError, match=message):
        rule(**inputs)
    assert not libraries


@pytest.mark.parametrize(
    "rule, missing, package",
    [
        (foreign.fla, "fla.ops.gated_delta_rule", "flash-linear-attention"),
        (foreign.flash_qla, "fla.ops.gated_delta_rule.backends.flash_qla", "flash-linear-attention"),
        (foreign.flash_qla, "flash_qla", "flash-qla"),
    ],
)
def test_a_missing_package_is_named(libraries, monkeypatch, normal, rule, missing, package):
    monkeypatch.setitem(sys.modules, missing, None)  # its import raises ModuleNotFoundError
    with pytest.raises(ValueError, match=rf"needs the package {package} .*pip install {package}, or use backend"):
        rule(**make(normal, 1, 2, 128, 128, torch.bfloat16))
