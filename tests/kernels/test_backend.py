"""Which implementation is chosen, and why; versions that compute wrong numbers are refused with the reason."""

import pytest
import torch
from boreal_kernels import backend, launch
from boreal_kernels.backend import BACKENDS, choose, known_bad, numbers, unfit


def test_cpu_tensors_take_torch_and_say_so():
    assert str(choose("bag_embedding", device="cpu")) == "bag_embedding: torch (cpu device)"
    assert choose("bag_embedding", "torch", device="cpu").reason == "asked for"


def test_a_name_is_a_promise(monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", None)
    with pytest.raises(ValueError, match="backend 'fla' cannot run here: it needs a CUDA device, found cpu"):
        choose("gated_delta_rule", "fla", device="cpu")
    assert "needs a CUDA device" in unfit("causal_conv1d", "triton", "cpu")
    with pytest.raises(ValueError, match="found 'fla', expected one of auto, triton, torch"):
        choose("causal_conv1d", "fla", device="cpu")
    with pytest.raises(ValueError, match="operation: found 'conv'"):
        choose("conv", device="cpu")


@pytest.fixture
def hopper(monkeypatch):
    """hopper(triton=.., ptxas=.., fla=..): what `unfit` finds on a Hopper GPU with these versions."""

    def install(**packages):
        found = {"triton": packages.get("triton"), "flash-linear-attention": packages.get("fla"), "flash-qla": None}
        monkeypatch.setattr(backend, "version", lambda name: found[name])
        monkeypatch.setattr(backend, "ptxas_version", lambda: packages.get("ptxas", (13, 4)))
        monkeypatch.setattr(backend, "use_newest_ptxas", lambda: None)
        monkeypatch.setattr(backend, "miscomputed", lambda: packages.get("miscomputed"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
        return lambda name, head_dim=128: unfit("gated_delta_rule", name, "cuda", head_dim)

    return install


@pytest.mark.parametrize("triton, bad", [((3, 3, 1), False), ((3, 4, 0), True), ((3, 7, 0), True), ((3, 7, 1), False)])
def test_fla_is_refused_where_triton_miscompiles_it(hopper, triton, bad):
    problem = hopper(triton=triton, fla=(0, 6, 0))("fla")
    assert (problem is not None) is bad
    if bad:
        assert "gradients wrong, outputs right" in problem and "install triton 3.7.1 or newer" in problem


@pytest.mark.parametrize("ptxas, bad", [((12, 9), True), ((13, 1), True), ((13, 3), False), ((13, 4), False)])
def test_own_kernels_are_refused_with_an_old_assembler(hopper, ptxas, bad):
    problem = hopper(triton=(3, 9, 0), ptxas=ptxas)("triton")
    assert (problem is not None) is bad
    if bad:
        assert "TRITON_PTXAS_PATH" in problem


def test_absence_and_head_dims_are_named(hopper):
    assert hopper(fla=(0, 6, 0))("triton") == "triton is not installed"
    assert hopper(triton=(3, 9, 0))("fla") == "flash-linear-attention is not installed"
    assert hopper(triton=(3, 9, 0))("triton", 96) == "head dim 96, expected one of 64, 128"
    assert hopper(triton=(3, 9, 0))("triton", 64) is None


def test_kernels_that_fail_their_self_test_are_refused(hopper):
    found = hopper(triton=(3, 9, 0), miscomputed="7 of 9 numbers differ")
    assert found("triton") == "7 of 9 numbers differ"
    assert unfit("causal_conv1d", "triton", "cuda") is None


def test_auto_takes_the_first_that_fits_and_tells_why_not_the_others(hopper):
    hopper(triton=(3, 9, 0), ptxas=(12, 9))
    backend._choose.cache_clear()
    try:
        choice = choose("gated_delta_rule", device="cuda", head_dim=128)
        assert choice.backend == "torch"
        assert choice.reason.startswith("not triton: ptxas 12.9: ") and "not fla: " in choice.reason
    finally:
        backend._choose.cache_clear()


def test_known_bad_rows_name_real_implementations():
    names = {name for implementations in BACKENDS.values() for name in implementations}
    assert {row.backend for row in backend.KNOWN_BAD} <= names
    assert known_bad("torch", (9, 0)) is None


def test_versions():
    assert numbers("3.7.1+git12") == (3, 7, 1)
    assert numbers("13.4") == (13, 4)
    assert numbers("0.6.0rc1") == (0, 6, 0)


def test_launch_table(monkeypatch):
    table = {
        "NVIDIA H200": {"op.forward": [{"when": {"D": 64}, "use": {"ROWS": 32}}]},
        "default": {"op.forward": [{"when": {"D": 64}, "use": {"ROWS": 8}}, {"when": {}, "use": {"ROWS": 4}}]},
    }
    monkeypatch.setattr(launch, "read", lambda: table)
    launch._config.cache_clear()
    try:
        monkeypatch.setattr(launch, "device_name", lambda: "NVIDIA H200")
        assert launch.config("op.forward", D=64) == {"ROWS": 32}
        assert launch.config("op.forward", D=128) == {"ROWS": 4}
        monkeypatch.setattr(launch, "device_name", lambda: "cpu")
        assert launch.config("op.forward", D=64, N=3) == {"ROWS": 8}
        launch.config("op.forward", D=64)["ROWS"] = 1
        assert launch.config("op.forward", D=64) == {"ROWS": 8}
        with pytest.raises(KeyError, match="no entry for other"):
            launch.config("other", D=64)
    finally:
        launch._config.cache_clear()
