"""Every step's finished gradients and the last parameters of a training run, as full tensors by checkpoint name."""

import contextlib

import torch
import torch.distributed as dist
from boreal_megatron.data.dataset import VALIDATION
from boreal_megatron.data.source import Source
from boreal_megatron.model import boreal, init
from boreal_megatron.train import health, optim, state as train_state


@contextlib.contextmanager
def recorded(out):
    """What is trained while it lasts is written to `out` by rank 0: {"gradients": {step: {name: tensor}},
    "parameters": {name: tensor}, "copies": the largest difference between two ranks' copies of one tensor, "samples":
    {step: [(source, its cursor), ..] sorted, of all windows read for training}}."""
    record = {"gradients": {}, "parameters": {}, "copies": 0.0, "samples": {}}
    now = {"windows": []}
    originals = boreal.build, optim.wrap, health.check, train_state.digest, Source.read_window

    def build(config, mesh):
        now["mesh"] = mesh
        return originals[0](config, mesh)

    def wrap(config, chunks):
        now["wrapped"] = originals[1](config, chunks)
        return now["wrapped"]

    def check(step, loss, norm, latest):  # after the gradients are finished, before the weights move
        record["gradients"][step] = gathered(now["wrapped"], now["mesh"], record, gradients(now["wrapped"]))
        record["samples"][step] = samples(now["windows"], now["mesh"])
        now["windows"] = []
        originals[2](step, loss, norm, latest)

    def digest(chunks, optimizer, state):
        record["parameters"] = gathered(now["wrapped"], now["mesh"], record)
        return originals[3](chunks, optimizer, state)

    def read_window(source, start, *shape):
        if source.name != VALIDATION:
            now["windows"].append((source.name, start))
        return originals[4](source, start, *shape)

    def install(values):
        boreal.build, optim.wrap, health.check, train_state.digest, Source.read_window = values

    install((build, wrap, check, digest, read_window))
    try:
        yield
    finally:
        install(originals)
        # The schedule's hooks on the configuration close a circle through autograd's nodes, which Python's collector
        # cannot see; the process groups in it, with three threads each, would outlive the run.
        settings = now["wrapped"][0].config
        settings.grad_scale_func = settings.finalize_model_grads_func = settings.no_sync_func = None
    if dist.get_rank() == 0:
        torch.save(record, out)


def samples(windows, mesh):
    """What all data-parallel ranks read in a step, sorted; ranks of one network must have read the same."""
    everyone = [None] * mesh.world
    dist.all_gather_object(everyone, (mesh.dp_rank, windows))
    by_rank = {}
    for rank, read in everyone:
        assert by_rank.setdefault(rank, read) == read, (rank, by_rank[rank], read)
    return sorted(window for read in by_rank.values() for window in read)


def gradients(wrapped):
    """A function from a parameter's shard (a view of it) to the same part of its finished FP32 gradient, or None for
    a buffer's shard. The distributed optimizer's ranks own a part each of the gradients: they are gathered first."""
    for chunk in wrapped:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    summed_in_fp32 = bucket.params_with_extra_main_grads  # beside the buffer
                    for p in summed_in_fp32:
                        p.main_grad_copy_in_grad_buffer.copy_(p.main_grad)
                    own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
                    for p in summed_in_fp32:
                        p.main_grad.copy_(p.main_grad_copy_in_grad_buffer)
    parameters = [p for chunk in wrapped for p in chunk.parameters()]

    def same_part(shard):
        for p in parameters:
            offset = shard.data_ptr() - p.data_ptr()
            if 0 <= offset < p.nbytes:
                first = p.main_grad.storage_offset() + offset // p.itemsize
                return p.main_grad.as_strided(shard.shape, shard.stride(), first)

    return same_part


def gathered(wrapped, mesh, record, part=lambda shard: shard):
    """{checkpoint name: full FP32 tensor} on rank 0, from every rank's shards; copies are compared on the way."""
    mine = [
        (s.key, s.global_shape, s.global_offset, s.prepend_axis_num, values.detach().float().cpu().clone())
        for chunk in wrapped
        for s in init.shards(chunk.module, mesh)
        if (values := part(s.data)) is not None
    ]
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    if everyone is None:
        return {}
    out = {}
    for key, shape, offset, axes, data in (shard for shards in everyone for shard in shards):
        full = out.setdefault(key, torch.full(shape, torch.nan))
        assert data.isfinite().all(), f"{key}: NaN or inf, which comparisons would pass over"
        window = (*offset[:axes], *(slice(a, a + n) for a, n in zip(offset[axes:], data.shape, strict=True)))
        if full[window].isnan().all():  # nobody's yet
            full[window] = data
        else:
            record["copies"] = max(record["copies"], float((full[window] - data).abs().max()))
    missing = [key for key, full in out.items() if full.isnan().any()]
    assert not missing, f"no rank has all of {missing}"
    return out
