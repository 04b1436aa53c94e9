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


def test_plain_optimizer_still_numbers_bf16_weights_only(mesh, tmp_path):
    """A bf16 network with FP32 parameters: upstream's own function pairs moments with other weights' shapes."""
    from boreal_megatron.compat import apply
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from tests.support.checkpoints import built
    from tests.support.configs import config_for, tiny_model

    apply()
    patched = Float16OptimizerWithFloat16Params.sharded_state_dict
    original = inspect.getclosurevars(patched).nonlocals["original"]
    config = config_for(tiny_model(), precision="bf16", optimizer={"distributed": False})
    [chunk], _, optimizer = built(config, mesh)
    part = optimizer.chained_optimizers[0]
    for values in part.optimizer.state.values():
        values["step"] += 1  # as after a step: upstream leaves out what is zero
    with pytest.raises((AssertionError, KeyError)):  # once this fails, compat._plain_optimizer_fp32_weights can go
        original(part, chunk.sharded_state_dict())
    patched(part, chunk.sharded_state_dict())


def test_distributed_optimizer_still_shifts_what_is_behind_a_padded_bucket(mesh):
    """A tied embedding in a bucket of its own, as under pipeline parallelism: its saved master weights are its weights."""
    from boreal_megatron.compat import apply
    from boreal_megatron.model import boreal
    from boreal_megatron.train import optim
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from tests.support.configs import config_for, tiny_model

    apply()
    patched = DistributedOptimizer.sharded_param_state_fully_reshardable
    original = inspect.getclosurevars(patched).nonlocals["original"]
    config = config_for(tiny_model(ffn_hidden_size=95))
    chunks = boreal.build(config, mesh)
    weight = chunks[0].embedding.word_embeddings.weight
    weight.shared_embedding = True
    optimizer = optim.build(config, optim.wrap(config, chunks))
    part = optim.parts(optimizer)[0]
    padding = [bucket.grad_data.numel() - bucket.numel_unpadded for buffer in part.buffers for bucket in buffer.buckets]
    assert len(padding) == 2 and padding[0] > 0, padding

    def saved(function):
        network = chunks[0].sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})
        entries = nested_values(function(part, network, metadata={}))
        return next(e.data for e in entries if e.key == "optimizer.state.param.embedding.word_embeddings.weight")

    # once the first fails, compat._distributed_optimizer_buckets can go
    assert not torch.equal(saved(original), weight)
    assert torch.equal(saved(patched), weight)


def test_save_still_starts_a_manager(mesh):
    """Upstream's queue of results is a proxy to a spawned process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    source = inspect.getsource(filesystem_async.get_write_results_queue)
    assert "ctx.Manager().Queue()" in source  # once this fails, look whether compat._results_of_a_save can go
    assert type(filesystem_async.get_write_results_queue()).__name__ == "Results"


def test_results_pass_a_fork_once(mesh):
    import os
    import queue

    from boreal_megatron.compat import Results

    results = Results()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    child = os.fork()
    if child == 0:
        results.put({"written": list(range(100_000))})
        os._exit(0)
    os.waitpid(child, 0)
    assert len(results.get_nowait()["written"]) == 100_000
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("cut")
    results.file.truncate(5)
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_torch_still_unpickles_whatever_a_checkpoint_names(mesh):
    """In the sources: torch's own functions are replaced in this process."""
    from pathlib import Path

    from torch.distributed.checkpoint import default_planner, filesystem

    # once these fail, look whether compat._no_code_from_checkpoints can go
    assert "metadata = pickle.load(metadata_file)" in Path(filesystem.__file__).read_text()
    assert "value, weights_only=False" in Path(default_planner.__file__).read_text()


def test_an_output_layer_still_refuses_fused_weight_gradients_without_apex(mesh):
    """Ours multiplies nothing. Once the first build works, compat._output_layer_without_apex can go."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, layers
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        gradient_accumulation_fusion=True,
        use_cpu_initialization=True,
    )

    def output_layer():
        return ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_, bias=False)

    assert layers._grad_accum_fusion_available  # as `apply` leaves it
    layers._grad_accum_fusion_available = False
    try:
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            output_layer()
    finally:
        layers._grad_accum_fusion_available = True
    output_layer()
