"""Transformer Engine's modules on a device against plain ones, attention and grouped experts against theirs, and FP8
through steps, a checkpoint, a resume and an export. Seeds and tolerances stand in each test.

None of this has run on a GPU yet: the tolerances are what the formats allow, not what was measured.
"""

import importlib.util

import pytest
import torch
from boreal_megatron.data import batch
from boreal_megatron.model import boreal
from boreal_megatron.model.experts import GroupedExperts
from boreal_megatron.train import checkpoint, optim
from boreal_megatron.train.step import forward_backward, means
from megatron.core.transformer.moe.experts import SequentialMLP
from tests.support import record
from tests.support.checkpoints import built, save
from tests.support.configs import config_for, tiny_model
from tests.support.launch import boreal as command
from tests.support.launch import digests, metrics, write_config
from tests.unit.test_model import windows

needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
PLAIN = dict(linears="local", attention="sdpa", experts="sequential")
# Heads, widths and gates that FP8 and the attention kernels take.
MODEL = dict(
    hidden_size=128,
    ffn_hidden_size=256,
    attention=dict(heads=4, kv_heads=2, head_dim=64, rope_theta=10000.0),
    gdn=dict(key_heads=2, value_heads=8, head_dim=64),
    moe=dict(experts=4, top_k=2, expert_hidden_size=64, shared_hidden_size=64),
)


def make(seed):
    return batch.make(windows(2, 1, 64, seed), boundaries="align", device="cuda")


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def one_pass(mesh, kernels, precision):
    """(losses, {checkpoint name: gradient}) of one network, which is the same whatever its modules."""
    config = config_for(tiny_model(**MODEL), precision=precision, kernels=kernels)
    _, wrapped, _ = built(config, mesh)
    losses, _ = forward_backward(config, wrapped, mesh, config.phases[0], [make(0)])
    return means(losses), record.gathered(wrapped, mesh, {"copies": 0.0}, record.gradients(wrapped))


@needs_te
@pytest.mark.parametrize("precision, loss, gradient", [("fp32", 1e-4, 2e-2), ("bf16", 5e-3, 8e-2)])
@pytest.mark.parametrize("kernels", [
    dict(linears="te", attention="sdpa", experts="sequential"),
    dict(linears="te", attention="sdpa", experts="te"),
    dict(linears="te", attention="te", experts="grouped_mm"),
], ids=["linears", "experts", "all"])  # fmt: skip
def test_same_loss_and_gradients_as_plain_modules(kernels, precision, loss, gradient, mesh):
    """seed 0. FP32 products of Transformer Engine are in TF32 (10 bits); bf16 has 8 and rounds in other places."""
    if precision == "fp32" and kernels["attention"] == "te":
        pytest.skip("attention and grouped products are bf16 kernels")
    plain, expected = one_pass(mesh, PLAIN, precision)
    te, found = one_pass(mesh, kernels, precision)
    for a, b in zip(te, plain, strict=True):
        assert abs(a - b) <= loss * b
    assert found.keys() == expected.keys()
    worst = {name: relative(found[name], expected[name]) for name in found if expected[name].norm() > 1e-4}
    assert max(worst.values()) <= gradient, sorted(worst.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("name", ["te", "flash"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_packed_attention_is_torchs(name, head_dim, mesh):
    """seed 0, bf16: three documents, grouped heads; outputs and gradients within 2 % of torch's."""
    from boreal_megatron.model.gated_attention import CoreAttention, PackedAttention
    from boreal_megatron.model.packing import Packing
    from boreal_megatron.model.provider import MODULE, missing
    from megatron.core.transformer import TransformerConfig

    if reason := missing(MODULE[name]):
        pytest.skip(reason)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=head_dim,
        bf16=True,
    )
    edges = (0, 13, 300, 512)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
    lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=287, max_seqlen_kv=287)
    packing = Packing(**lengths, edges=edges)
    generator = torch.Generator("cuda").manual_seed(0)
    row = [
        torch.randn(512, 1, heads, head_dim, device="cuda", generator=generator).bfloat16().requires_grad_()
        for heads in (4, 2, 2)
    ]
    arguments = dict(layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=mesh.groups)
    results = []
    for attention in (CoreAttention(config, **arguments), PackedAttention(config, kernel=name, **arguments)):
        out = attention(*row, packing)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), row)])
    for theirs, ours in zip(*results, strict=True):
        assert relative(ours, theirs) < 0.02


@pytest.mark.parametrize("counts", [(5, 0, 7, 84), (0, 0, 0, 3)], ids=str)
def test_grouped_experts_on_the_device(counts, mesh):
    """seed 0, bf16: odd counts, experts without rows; outputs and gradients within 2 % of sequential ones."""
    results = []
    for kernels, kind in ((PLAIN, SequentialMLP), (PLAIN | {"experts": "grouped_mm"}, GroupedExperts)):
        config = config_for(tiny_model(**MODEL), precision="bf16", kernels=kernels)
        [model] = boreal.build(config, mesh)
        (experts,) = [module for module in model.modules() if isinstance(module, kind)]
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(sum(counts), 128, device="cuda", generator=generator).bfloat16().requires_grad_()
        probabilities = torch.rand(sum(counts), device="cuda", generator=generator)
        out, _ = experts(x, torch.tensor(counts, device="cuda"), probabilities)
        weights = [p for _, p in experts.named_parameters()]
        gradients = torch.autograd.grad(out.float().square().sum(), [x, *weights])
        if kind is SequentialMLP:  # an fc1 and an fc2 for each expert
            gradients = [gradients[0], torch.stack(gradients[1::2]), torch.stack(gradients[2::2])]
        results.append([out, *gradients])
    for sequential, grouped in zip(*results, strict=True):
        assert relative(grouped, sequential) < 0.02


@needs_te
@pytest.mark.parametrize("recipe, experts", [
    ("tensorwise", "grouped_mm"), ("tensorwise", "te"), ("blockwise", "grouped_mm"), ("blockwise", "te"),
    ("delayed", "grouped_mm"),
])  # fmt: skip
def test_fp8_learns_and_resumes(recipe, experts, mesh, tmp_path):
    """Eight steps on one batch: the loss falls by a tenth at least, and stays within 5 % of bf16's. Four of them, a
    checkpoint, a new network and the other four: the same losses to 1 %, and the same amax histories at the start."""
    model = tiny_model(**MODEL)

    def steps(config, wrapped, optimizer, count):
        out = []
        for _ in range(count):
            optimizer.zero_grad()
            losses, _ = forward_backward(config, wrapped, mesh, config.phases[0], [make(0)])
            norm = optim.gradient_norm(optimizer)
            optim.set_learning_rate(optimizer, 3e-3, 0.0)
            optim.update(optimizer, norm, 1.0)
            out.append(means(losses)[0])
        return out

    bf16 = config_for(model, precision="bf16", kernels=dict(experts=experts))
    _, wrapped, optimizer = built(bf16, mesh)
    expected = steps(bf16, wrapped, optimizer, 8)
    config = config_for(model, precision=dict(fp8=recipe), kernels=dict(experts=experts))
    _, wrapped, optimizer = built(config, mesh)
    first = steps(config, wrapped, optimizer, 4)
    path = save(tmp_path, config, wrapped, optimizer, mesh, step=4)
    remembered = extra_states(wrapped)
    losses = first + steps(config, wrapped, optimizer, 4)
    assert losses[-1] < 0.9 * losses[0]
    assert all(abs(a - b) <= 0.05 * b for a, b in zip(losses, expected, strict=True)), (losses, expected)
    assert bool(remembered) == (recipe == "delayed")
    _, wrapped, optimizer = built(config.model_copy(update={"seed": 9}), mesh)
    checkpoint.load(path, config, wrapped, optimizer, mesh)
    loaded = extra_states(wrapped)
    assert loaded.keys() == remembered.keys() and all(torch.equal(loaded[name], remembered[name]) for name in loaded)
    again = steps(config, wrapped, optimizer, 4)
    assert all(abs(a - b) <= 0.01 * b for a, b in zip(again, losses[4:], strict=True)), (again, losses)
    # The same checkpoint goes on without Transformer Engine.
    plain = bf16.model_copy(update={"kernels": config.kernels.model_copy(update=PLAIN)})
    _, wrapped, optimizer = built(plain, mesh)
    assert checkpoint.load(path, plain, wrapped, optimizer, mesh).step == 4


def extra_states(wrapped):
    return {
        name: value
        for chunk in wrapped
        for name, value in chunk.module.state_dict().items()
        if name.endswith("_extra_state") and value is not None and value.numel()
    }


@needs_te
def test_a_run_in_fp8_is_resumed_and_exported(corpus, tmp_path):
    """The commands of a user: 4 steps, the other 4, an export whose logits `boreal export --check` compares."""
    model = {**MODEL, "pattern": "*-GEG- / *-", "vocab_size": 640, "max_positions": 512}
    phase = {"name": "only", "sequence": 96, "positions_per_step": 768}
    changes = dict(model=model, precision={"fp8": "tensorwise"})
    for steps in (4, 8):
        phases = [{**phase, "until_steps": steps}]
        config = write_config(tmp_path / "config.yaml", corpus, tmp_path / "run", phases=phases, **changes)
        text = command(1, "train", config, timeout=600)
        assert "FP8 (tensorwise)" in text and len(digests(text)) == 4
    assert [*metrics(tmp_path / "run")] == [*range(1, 9)]
    command(1, "export", tmp_path / "run", tmp_path / "hf", "--check", timeout=600)
