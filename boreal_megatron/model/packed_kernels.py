"""Softmax attention kernels that take all documents of a row at once.

Each is a function (q [t, n, d], k, v [S, g, d], lengths) -> [t, n*d]: the queries of a stretch of a document are its
last ones, and see the stretch's keys up to their own position.
"""

from typing import NamedTuple

import torch


class Lengths(NamedTuple):
    """`queries`, `keys`: int32 [stretches + 1] on the device, from 0; the longest of each; whether they are the same."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    same: bool


def kernel(name, config, *, scale, tp_group):
    """The kernel of that name ("te" or "flash") for megatron-core's TransformerConfig."""
    return {"te": _te, "flash": _flash}[name](config, scale, tp_group)


def _te(config, scale, tp_group):
    """Transformer Engine's, which asks cuDNN and flash-attn for their fastest one."""
    from transformer_engine.pytorch import DotProductAttention

    attention = DotProductAttention(
        config.num_attention_heads,
        config.kv_channels,
        num_gqa_groups=config.num_query_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        tp_size=tp_group.size(),
        tp_group=tp_group,
        softmax_scale=scale,
    )

    def run(q, k, v, lengths):
        return attention(
            q,
            k,
            v,
            qkv_format="thd",
            attn_mask_type="padding_causal" if lengths.same else "padding_causal_bottom_right",
            cu_seqlens_q=lengths.queries,
            cu_seqlens_kv=lengths.keys,
            max_seqlen_q=lengths.longest_query,
            max_seqlen_kv=lengths.longest_key,
        )

    return run


def _flash(config, scale, tp_group):
    """flash-attn's; since 2.1 its causal mask ends at the last query and the last key."""
    from flash_attn import flash_attn_varlen_func

    def run(q, k, v, lengths):
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            lengths.queries,
            lengths.keys,
            lengths.longest_query,
            lengths.longest_key,
            softmax_scale=scale,
            causal=True,
        )
        return out.flatten(1)

    return run
