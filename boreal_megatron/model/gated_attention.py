"""Gated grouped-query attention over packed documents.

t positions of one packed row, n query heads, g key/value heads, d head dim; per rank: n/tp, g/tp.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule

from boreal_megatron.model import rope

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
        out = self.core_attention(query, key, value, packed_seq_params.cu_seqlens_q)  # [t, 1, n*d]
        out = (out.float() * self.gate(gate.reshape(out.shape).float())).to(out.dtype)
        return self.linear_proj(out)


class CoreAttention(MegatronModule):
    """Causal softmax attention inside each document, by torch's scaled_dot_product_attention."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query, key, value, cu_seqlens):
        """[t, 1, n, d] and [t, 1, g, d] x2 -> [t, 1, n*d]; cu_seqlens [documents + 1] int32."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [1, heads, t, d]
        edges = cu_seqlens.tolist()
        out = [
            F.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=self.scale, enable_gqa=True
            )
            for a, b in zip(edges, edges[1:])
        ]
        out = torch.cat(out, dim=2) if len(out) > 1 else out[0]
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], 1, -1)
