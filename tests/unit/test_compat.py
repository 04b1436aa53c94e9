"""Each entry of compat.py, and each of the platform's names, is still needed: upstream, untouched, fails without it."""

import inspect

import pytest
import torch


def test_versions(mesh):
    from boreal_megatron import compat

    compat.check_versions()


def test_distributed_optimizer_still_wants_a_step_it_did_not_save(mesh):
    """Upstream indexes `tensors[key]` for every tensor of the optimizer's state; torch's AdamW has a `step` there."""
    from boreal_megatron.compat import apply
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    apply()
    patched = DistributedOptimizer._set_main_param_and_optimizer_states
    original = inspect.getclosurevars(patched).nonlocals["original"]
    parameter = torch.nn.Parameter(torch.zeros(2))
    main = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([main])
    main.grad = torch.ones(2)
    optimizer.step()

    class Fake:
        model_param_group_index_map = {parameter: (0, 0)}
        config = type("Config", (), {"use_precision_aware_optimizer_no_fp8_or_ds_fp8": False})

    fake = Fake()
    fake.optimizer = optimizer
    saved = {"param": torch.ones(2), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    with torch.no_grad():
        with pytest.raises(KeyError, match="step"):  # once this fails, compat._distributed_optimizer_step can go
            original(fake, parameter, saved)
        patched(fake, parameter, saved)
    assert torch.equal(main.detach(), torch.ones(2))
    assert torch.equal(optimizer.state[main]["exp_avg"], torch.ones(2))


def test_names_that_the_cpu_platform_gives_a_meaning(mesh):
    """They exist upstream, and answer for the CPU now."""
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    assert {mappings._gather_along_first_dim.__name__, mappings._reduce_scatter_along_first_dim.__name__} == {
        "gather_any",
        "reduce_scatter_any",
    }
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.zeros(1).cuda().device.type == "cpu"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert not torch.cuda.is_available()
    assert callable(token_dispatcher.maybe_move_tensor_to_cpu)
    tracker = random.get_cuda_rng_tracker()
    with tracker.fork():
        first = torch.rand(3)
    with tracker.fork():
        second = torch.rand(3)
    assert not torch.equal(first, second), "a stream goes on where it was"
