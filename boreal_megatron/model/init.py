"""Initial weights, by name: the same full tensors whatever the layout.

Each tensor is drawn from its own generator, seeded by (seed, checkpoint name), and every rank keeps its shard of it.
So one process and 512 start from the same network, which seeds per rank cannot give.
"""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

# Linears that write into the residual stream: their deviation shrinks with depth.
RESIDUAL = ("linear_proj.weight", "out_proj.weight", "linear_fc2.weight")
# Matrices with a row for each token, and zero rows behind them (`config.layout.padded_vocab`).
VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialise(model, seed, mesh):
    """Fill this stage's parameters in place.

    Args:
        model: a BorealModel; `model.description` and its config give deviations and depth.
        seed: the run's seed.
        mesh: whose data-parallel group says which replicas exist.
    """
    depth = model.config.num_layers
    std = model.description.init_std
    for shard in shards(model, mesh):
        if "norm" in shard.key or shard.key.endswith("expert_bias"):
            continue  # constructed as ones and zeros
        axes = shard.prepend_axis_num  # experts are stacked along a leading axis
        shape = shard.global_shape[axes:]
        name = ":".join([str(seed), shard.key, *(str(i) for i in shard.global_offset[:axes])])
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        )
        full = draw(shard.key, shape, std, depth, generator)
        if shard.key.endswith(VOCABULARY):
            full[model.description.vocab_size :] = 0.0
        window = tuple(
            slice(start, start + size) for start, size in zip(shard.global_offset[axes:], shard.data.shape)
        )
        shard.data.copy_(full[window])


def draw(key, shape, std, depth, generator):
    """One full tensor, FP32.

    Matrices N(0, std), residual outputs N(0, std / sqrt(depth)) with depth in half-blocks, convolutions uniform in
    +-1/sqrt(width). The decay starts as in Mamba2 and Gated DeltaNet: A ~ U(0.01, 16) and softplus(dt_bias)
    log-uniform in [1e-3, 0.1], which gives a median half-life of 11 positions.
    """
    if key.endswith("A_log"):
        return torch.empty(shape).uniform_(0.01, 16.0, generator=generator).log()
    if key.endswith("dt_bias"):
        low, high = math.log(1e-3), math.log(0.1)
        dt = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))  # softplus^-1(dt)
    if key.endswith("conv1d.weight"):
        bound = 1.0 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if key.endswith(RESIDUAL):
        std = std / math.sqrt(depth)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def shards(model, mesh):
    """Every parameter and buffer of this stage as megatron-core ShardedTensors, whose data are views of it."""
    for entry in nested_values(model.sharded_state_dict(metadata={"dp_cp_group": mesh.groups.dp_cp})):
        if isinstance(entry, ShardedTensorFactory):
            yield from nested_values(entry.build())
        elif isinstance(entry, ShardedTensor):
            yield entry
