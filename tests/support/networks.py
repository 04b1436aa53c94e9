"""Tiny networks that hold every kind of block, and random canonical training tensors for them."""

import torch

from boreal_megatron.config import schema
from boreal_megatron.convert.mapping import mapping, training_shapes


def tiny(**changes):
    """Every half-block in a network of a few thousand weights; heads are grouped in both mixers (r = 2 and r = 3)."""
    fields = dict(
        pattern="*-G-GE*E/*-",
        vocab_size=128,
        hidden_size=32,
        ffn_hidden_size=40,
        attention=schema.Attention(heads=4, kv_heads=2, head_dim=8, gate="silu", rope_fraction=0.5, rope_theta=1e4),
        gdn=schema.GDN(key_heads=2, value_heads=6, head_dim=8),
        moe=schema.MoE(experts=6, top_k=2, expert_hidden_size=12, shared_hidden_size=20),
        max_positions=512,
    )
    return schema.Model(**(fields | changes))


def random_weights(model, seed=0):
    """Training name -> FP32 tensor: large enough that every part moves the logits, with residual branches small
    enough that rounding in one layer is not magnified by the next."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in training_shapes(mapping(model)).items():
        x = torch.randn(shape, generator=generator)
        if "norm" in name:
            x = 1.0 + 0.3 * x
        elif name.endswith("A_log"):
            x = torch.log(0.05 + 2.0 * torch.rand(shape, generator=generator))
        elif name.endswith("dt_bias"):
            x = -2.0 + 0.5 * x
        elif name.endswith("expert_bias"):
            x = 0.2 * x
        elif name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")):
            x = 0.3 * shape[-1] ** -0.5 * x
        elif name.endswith("word_embeddings.weight"):
            x = 3.0 * shape[-1] ** -0.5 * x
        elif not name.endswith("conv1d.weight"):
            x = shape[-1] ** -0.5 * x
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            x[model.vocab_size :] = 0.0  # padding
        weights[name] = x
    return weights
