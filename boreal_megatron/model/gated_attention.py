"""Gated grouped-query attention over packed documents.

T positions of one packed row, t = T / cp of this context-parallel rank, n query heads, g key/value heads, d head dim;
per tensor-parallel rank: n/tp, g/tp.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from boreal_megatron.model import context, packed_kernels, rope
from boreal_megatron.model.packed_kernels import Lengths

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GatedAttention(SelfAttention):
    """megatron-core's projections, q/k norms and checkpoint layout, with partial RoPE, documents and the chosen gate.

    megatron-core's own forward rotates packed rows by looping over documents on the host and hard-wires a sigmoid
    gate; arXiv 2505.06708 has the gate, and BOREAL's cards ask for SiLU.
    """

    def __init__(self, *args, gate, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = GATES[gate]

    def forward(self, hidden_states, attention_mask=None, *, rotary_pos_emb, packed_seq_params, **unused):
        query, key, value, gate = self.get_query_key_value_tensors(hidden_states, output_gate=True)
        query = rope.rotate(query, rotary_pos_emb)  # [t, 1, n, d]
        key = rope.rotate(key, rotary_pos_emb)  # [t, 1, g, d]
        core = partial(self.core_attention, packing=packed_seq_params)
        if self.config.recompute_granularity == "selective" and self.training:
            out = tensor_parallel.checkpoint(core, False, query, key, value)  # [t, 1, n*d]
        else:
            out = core(query, key, value)  # [t, 1, n*d]
        out = (out.float() * self.gate(gate.reshape(out.shape).float())).to(out.dtype)
        return self.linear_proj(out)


class CoreAttention(MegatronModule):
    """Causal softmax attention inside each document, by torch's scaled_dot_product_attention.

    Late positions have more keys than early ones, so under context parallelism each rank computes an early and a late
    half of the row's queries instead of its own chunk, against the keys and values of the whole row.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, *, pg_collection, softmax_scale=None, **unused
    ):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(self, query, key, value, packing):
        """[t, 1, n, d] and [t, 1, g, d] x2 -> [t, 1, n*d]; `packing.edges` are the documents of the whole row."""
        t, group = query.shape[0], self.cp_group
        parts = [(0, t)]  # stretches of the row whose queries this rank computes
        if group.size() > 1:
            query = context.to_zigzag(query, group)
            key, value = context.gather_keys_values(key, value, group)
            parts = [(half * t // 2, (half + 1) * t // 2) for half in context.halves(group.rank(), group.size())]
        stretches = [
            (max(begin, document), min(end, next_document), document)
            for begin, end in parts
            for document, next_document in zip(packing.edges, packing.edges[1:])
            if max(begin, document) < min(end, next_document)
        ]  # (first query, after the last query, first key): each inside one document
        out = self.attend(query, key, value, stretches, packing)  # [t, 1, n*d]
        return context.from_zigzag(out, group) if group.size() > 1 else out

    def attend(self, query, key, value, stretches, packing):
        """The queries of one stretch after another, each with its document's keys."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, n, t, d], [1, g, T, d] x2
        out, done = [], 0
        for a, b, document in stretches:
            out.append(self.stretch(q[:, :, done : done + b - a], k[:, :, document:b], v[:, :, document:b]))
            done += b - a
        out = torch.cat(out, dim=2) if len(out) > 1 else out[0]
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], 1, -1)

    def stretch(self, q, k, v):
        """The last queries of a stretch of one document, with all its keys."""
        aligned, mask = q.shape[2] == k.shape[2], None
        if not aligned:
            from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, for seconds

            mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=aligned, scale=self.scale, enable_gqa=True)


class PackedAttention(CoreAttention):
    """CoreAttention by one call of a kernel that takes all documents at once (`model/packed_kernels.py`)."""

    def __init__(self, config, *args, kernel, pg_collection, softmax_scale=None, **kwargs):
        super().__init__(config, *args, pg_collection=pg_collection, softmax_scale=softmax_scale, **kwargs)
        self.kernel = packed_kernels.kernel(kernel, config, scale=softmax_scale, tp_group=pg_collection.tp)

    def attend(self, query, key, value, stretches, packing):
        if self.cp_group.size() == 1:
            longest = packing.max_seqlen_q
            lengths = Lengths(packing.cu_seqlens_q, packing.cu_seqlens_kv, longest, longest, same=True)
        else:
            key, value = (torch.cat([x[document:b] for _, b, document in stretches]) for x in (key, value))
            counts = [(b - a, b - document) for a, b, document in stretches]
            ends = torch.tensor([(0, 0), *counts]).cumsum(0).to(query.device, torch.int32, non_blocking=True)
            lengths = Lengths(*ends.T.contiguous(), *(max(column) for column in zip(*counts)), same=False)
        return self.kernel(query[:, 0], key[:, 0], value[:, 0], lengths).unsqueeze(1)
