"""A network on the kernels, through megatron-core's schedule: loss and every gradient equal those on plain torch.

fp32 on the CPU (interpreted) or one GPU, seed 0; a gradient's difference is measured against its norm.
"""

import pytest
import torch
from boreal_megatron.config import schema
from boreal_megatron.errors import ProblemsError
from boreal_megatron.model import boreal
from boreal_megatron.model.kernels import chosen, lines
from boreal_megatron.train import optim
from boreal_megatron.train.step import forward_backward, means
from tests.support.configs import config_for, tiny_model
from tests.unit.test_model import make

MODEL = tiny_model(pattern="*-G- / *-", vocab_size=200, gdn=schema.GDN(key_heads=1, value_heads=2, head_dim=64), moe=None)


def step(mesh, delta_rule, others, bag, **changes):
    """(loss, MTP loss, {name: gradient}) of one global batch, two micro-batches of two documents each."""
    kernels = schema.Kernels(delta_rule=delta_rule, others=others)
    config = config_for(MODEL, **changes).model_copy(update={"kernels": kernels})
    [model] = boreal.build(config, mesh)
    wrapped = optim.wrap(config, [model])
    optim.build(config, wrapped)
    batches = [make(count=1, bag=bag, positions=18, seed=seed, vocab=200) for seed in (0, 1)]
    losses, _ = forward_backward(config, wrapped, mesh, config.phases[0], batches)
    return *means(losses), {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def bags_of_one(mesh):
    return step(mesh, "triton", "triton", 1)


@pytest.mark.parametrize("bag", [1, 4])
def test_loss_and_gradients_equal_plain_torchs(mesh, bags_of_one, bag):
    loss, mtp, grads = bags_of_one if bag == 1 else step(mesh, "triton", "triton", bag)
    want_loss, want_mtp, wanted = step(mesh, "torch", "torch", bag)
    assert loss == pytest.approx(want_loss, rel=1e-6) and mtp == pytest.approx(want_mtp, rel=1e-6)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert wanted[name].norm() > 0, name
        assert (grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


def test_recomputation_changes_no_bit(mesh, bags_of_one):
    *losses, grads = bags_of_one
    *again, recomputed = step(mesh, "triton", "triton", 1, recompute="selective")
    assert losses == again
    assert all(torch.equal(grad, recomputed[name]) for name, grad in grads.items())


def test_a_named_implementation_runs_or_stops_the_run():
    device = torch.device("meta")
    with pytest.raises(ProblemsError) as error:
        chosen(schema.Kernels(delta_rule="fla", others="triton"), 128, device)
    text = str(error.value)
    assert "kernels.delta_rule: gated_delta_rule: backend 'fla' cannot run here: it needs a CUDA device" in text
    assert "kernels.others: bag_embedding" in text
    assert lines(chosen(schema.Kernels(), 128, device)) == [
        "torch (meta device): gated_delta_rule, causal_conv1d, gated_rmsnorm, multi_hot_cross_entropy, "
        "linear_multi_hot_cross_entropy, bag_embedding"
    ]
