"""What fills each slot, and why: on this machine by the real answer, on an imagined GPU by what is installed there; and
that routed experts as one grouped product are megatron-core's experts one after another, in values, gradients and
checkpoints. Seeds and tolerances stand in each test."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from boreal_megatron.errors import ProblemsError
from boreal_megatron.model import boreal, packed_kernels, provider
from boreal_megatron.model.experts import GroupedExperts
from boreal_megatron.model.gated_attention import CoreAttention, PackedAttention
from boreal_megatron.model.init import shards
from boreal_megatron.model.packing import Packing
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from tests.support.configs import config_for, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("meta")


def library(tmp_path, monkeypatch, *files):
    """Empty modules that can be found, and nothing more: nothing here imports them."""
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.fixture
def nothing_installed(monkeypatch):
    """Of what this file is about."""
    find = importlib.util.find_spec
    hidden = {*provider.INSTALL, "apex", "fused_weight_gradient_mlp_cuda"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


def names(config, device):
    return {slot: choice.name for slot, choice in provider.chosen(config, device).items()}


def test_the_cpu_runs_plain_modules_and_says_so(mesh):
    model = boreal.build(config_for(tiny_model()), mesh)[0]
    assert {c.name for s, c in model.choices.items() if s in provider.SLOTS} == {"local", "sdpa", "sequential"}
    lines = provider.lines(model.choices)
    assert "experts: sequential (cpu device)" in lines and "attention: sdpa (cpu device)" in lines
    assert any(line.startswith("weight gradients: separate") for line in lines)
    assert any(line.startswith("optimizer: torch (torch's AdamW") for line in lines)


def test_a_gpu_takes_the_best_that_is_installed(tmp_path, monkeypatch, nothing_installed):
    bf16 = config_for(tiny_model(), precision="bf16")
    found = provider.chosen(bf16, GPU)
    assert [found[slot].name for slot in provider.SLOTS] == ["local", "sdpa", "grouped_mm"]
    assert found["linears"].reason.startswith("not te: transformer_engine is not installed: pip install")
    gradients = found["weight gradients"]
    assert gradients.name == "separate" and "NVIDIA's apex is not installed" in gradients.reason
    assert names(config_for(tiny_model()), GPU)["experts"] == "sequential"  # fp32: torch's kernel takes bf16
    odd = tiny_model(moe=dict(experts=4, top_k=2, expert_hidden_size=36, shared_hidden_size=32))
    assert "multiples of 8" in provider.chosen(config_for(odd, precision="bf16"), GPU)["experts"].reason
    with pytest.raises(ProblemsError, match="kernels.experts=grouped_mm: rows of .* multiples of 8"):
        provider.chosen(config_for(odd, precision="bf16", kernels={"experts": "grouped_mm"}), CPU)
    monkeypatch.undo()
    library(tmp_path, monkeypatch, "transformer_engine/__init__.py", "flash_attn/__init__.py")
    assert names(bf16, GPU) | {"optimizer": 0} == {
        "linears": "te", "attention": "te", "experts": "grouped_mm", "dispatcher": "alltoall",
        "weight gradients": "te", "optimizer": 0,
    }  # fmt: skip
    assert names(config_for(tiny_model()), GPU)["attention"] == "sdpa"  # fp32
    fields = provider.fields(provider.chosen(bf16, GPU))
    assert fields["transformer_impl"] == "transformer_engine" and fields["gradient_accumulation_fusion"]


def test_what_was_asked_for_by_name_is_not_replaced(nothing_installed):
    """Every problem at once, each with an alternative."""
    asked = dict(linears="te", attention="flash", experts="te")
    config = config_for(
        tiny_model(), kernels=asked, precision=dict(fp8="blockwise"), parallel=dict(expert=2, dispatcher="hybridep")
    )
    with pytest.raises(ProblemsError) as error:
        provider.chosen(config, CPU)
    needs = "it needs a CUDA device, found cpu"
    assert error.value.problems == [
        f"kernels.linears=te: {needs}; or use auto or local",
        f"kernels.attention=flash: {needs}; or use auto or sdpa",
        f"kernels.experts=te: {needs}; or use auto or sequential",
        f"parallel.dispatcher=hybridep: {needs}; or use alltoall",
        f"precision.fp8=blockwise: {needs}; or leave precision.fp8 out, for bf16",
    ]
    with pytest.raises(ProblemsError) as error:
        provider.chosen(config, GPU)
    first, second, _, fourth, fifth = error.value.problems
    assert "transformer_engine is not installed: pip install" in first and "pip install" in second
    assert "deep_ep is not installed: build DeepEP" in fourth and fourth.endswith("or use alltoall")
    assert "transformer_engine is not installed" in fifth


@pytest.mark.parametrize("fp8, capability, fits", [
    ("tensorwise", (8, 9), True), ("blockwise", (8, 9), False), ("delayed", (8, 0), False), ("blockwise", (9, 0), True),
])  # fmt: skip
def test_fp8_needs_a_gpu_that_has_it(fp8, capability, fits, tmp_path, monkeypatch):
    library(tmp_path, monkeypatch, "transformer_engine/__init__.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = config_for(tiny_model(), precision=dict(fp8=fp8), kernels=dict(attention="sdpa"))
    if fits:
        assert provider.chosen(config, GPU)["linears"].name == "te"
    else:
        with pytest.raises(ProblemsError, match=rf"GPU of compute capability \d.\d or newer, found {capability[0]}"):
            provider.chosen(config, GPU)


def test_which_apex(tmp_path, monkeypatch, nothing_installed):
    config = config_for(tiny_model(), precision="bf16")
    assert provider.apex() is None
    monkeypatch.undo()
    library(tmp_path / "pypi", monkeypatch, "apex/__init__.py", "apex/models.py")
    assert provider.apex() == "another"
    if not provider.missing("transformer_engine"):
        pytest.skip("Transformer Engine is installed, and nothing asks for apex beside it")
    assert "another package" in provider.chosen(config, GPU)["weight gradients"].reason
    library(tmp_path / "nvidia", monkeypatch, "apex/__init__.py", "apex/optimizers/fused_adam.py")
    assert provider.apex() == "nvidia"
    assert "built without" in provider.chosen(config, GPU)["weight gradients"].reason
    library(tmp_path / "nvidia", monkeypatch, "fused_weight_gradient_mlp_cuda.py")
    assert provider.chosen(config, GPU)["weight gradients"].name == "apex"


# ---------------------------------------------------------------- routed experts


@pytest.fixture(scope="module")
def both(mesh):
    """The experts of one network twice, by both modules, with the same weights."""
    found = []
    for name, kind in (("sequential", SequentialMLP), ("grouped_mm", GroupedExperts)):
        model = boreal.build(config_for(tiny_model(), kernels=dict(experts=name)), mesh)[0]
        (experts,) = [module for module in model.modules() if isinstance(module, kind)]
        found.append((model, experts))
    return found


def test_grouped_experts_start_and_are_saved_as_sequential_ones(both, mesh):
    """The same checkpoint names, places and initial values; what was taken apart for a checkpoint is put together."""
    found = [{(s.key, s.global_offset): (s.global_shape, s.data) for s in shards(model, mesh)} for model, _ in both]
    assert found[0].keys() == found[1].keys()
    assert all(found[1][k][0] == shape and torch.equal(found[1][k][1], data) for k, (shape, data) in found[0].items())
    for name in ("linear_fc1", "linear_fc2"):
        factory = both[1][1].sharded_state_dict(metadata={})[f"{name}.weight"]
        parts = [[piece.data for piece in expert] for expert in factory.build()]
        assert torch.equal(factory.merge_fn(parts), factory.data)


@pytest.mark.parametrize("counts", [(5, 0, 7, 12), (0, 0, 0, 3), (0, 0, 0, 0)], ids=str)
def test_grouped_experts_compute_what_sequential_ones_do(both, counts):
    """seed 0, FP32: outputs and every gradient to 1e-5 of the largest; experts without rows among them, odd counts."""
    generator = torch.Generator().manual_seed(0)
    rows, h = sum(counts), 64
    x, weight = torch.randn(rows, h, generator=generator), torch.randn(rows, h, generator=generator)
    probabilities, results = torch.rand(rows, generator=generator), []
    for _, experts in both:
        experts.zero_grad()
        inputs = [x.clone().requires_grad_(), probabilities.clone().requires_grad_()]
        out, bias = experts(inputs[0], torch.tensor(counts), inputs[1])
        assert bias is None
        (out * weight).sum().backward()
        if isinstance(experts, SequentialMLP):
            gradients = [
                torch.stack([getattr(e, name).weight.grad for e in experts.local_experts])
                for name in ("linear_fc1", "linear_fc2")
            ]
        else:
            gradients = [experts.linear_fc1.weight.grad, experts.linear_fc2.weight.grad]
        results.append([out, *(i.grad for i in inputs), *gradients])
    for sequential, grouped in zip(*results, strict=True):
        assert sequential.shape == grouped.shape
        assert not sequential.numel() or (sequential - grouped).abs().max() <= 1e-5 * max(sequential.abs().max(), 1e-9)


# ---------------------------------------------------------------- attention over packed documents


class Rank:
    """A context-parallel group of which only this rank is there: what it exchanges, the test has."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def reference(q, k, v, lengths):
    """What the kernels promise, stretch by stretch."""
    out = []
    for a, b, c, d in zip(lengths.queries, lengths.queries[1:], lengths.keys, lengths.keys[1:]):
        assert b - a <= lengths.longest_query and d - c <= lengths.longest_key
        assert not lengths.same or (a, b) == (c, d)
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out.append(F.scaled_dot_product_attention(*heads, mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out).flatten(1)


@pytest.mark.parametrize("rank, size", [(0, 1), (0, 2), (1, 2), (2, 4)])
def test_kernels_are_told_the_same_documents_as_torch(rank, size, monkeypatch):
    """seed 0: three documents over 64 positions; the kernel is a plain one that takes what flash-attn takes."""
    from boreal_megatron.model import context

    generator, edges, T = torch.Generator().manual_seed(0), (0, 13, 40, 64), 64
    row = [torch.randn(T, 1, heads, 8, generator=generator) for heads in (4, 2, 2)]
    halves = [torch.arange(i * T // (2 * size), (i + 1) * T // (2 * size)) for i in context.halves(rank, size)]
    mine = torch.cat(halves) if size > 1 else torch.arange(T)
    monkeypatch.setattr(context, "to_zigzag", lambda x, group: row[0][mine])
    monkeypatch.setattr(context, "from_zigzag", lambda x, group: x)
    monkeypatch.setattr(context, "gather_keys_values", lambda k, v, group: row[1:])
    monkeypatch.setattr(packed_kernels, "kernel", lambda name, config, **unused: reference)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    packing = Packing(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=27, max_seqlen_kv=27, edges=edges)
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8
    )
    groups = type("Groups", (), {"cp": Rank(rank, size), "tp": Rank(0, 1)})
    arguments = dict(layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=groups)
    query, key, value = (x[mine] for x in row)
    plain = CoreAttention(config, **arguments)(query, key, value, packing)
    packed = PackedAttention(config, kernel="flash", **arguments)(query, key, value, packing)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)
