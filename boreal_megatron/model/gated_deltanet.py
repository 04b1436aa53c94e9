"""The Gated DeltaNet mixer (arXiv 2412.06464) as a tensor-parallel megatron-core module.

t positions of one packed row, b = 1, H key heads, R value heads per key head, K key/value head dim; per rank: H/tp.

`in_proj` rows and conv channels are grouped by key head, [q K | k K | v R*K | z R*K | b R | a R], so that a
tensor-parallel shard is a contiguous block of rows and a checkpoint reshards like any column-parallel weight.
"""

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from boreal_kernels import causal_conv1d, gated_delta_rule, gated_rmsnorm

# Parameters cut along dim 0 by tensor parallelism, besides the linears, which say so themselves.
SHARDED = {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}


class GatedDeltaNet(MegatronModule):
    """hidden [t/sp, 1, h] -> [t/sp, 1, h]. Fills the attention slot of a megatron-core layer.

    A_log and dt_bias stay FP32 under bf16: g = -exp(A_log) softplus(a + dt_bias) sets the memory's half-life, and a
    bf16 A_log is off by up to 0.8 % of it. The state and g are FP32 inside the op.

    Args:
        shape: `config.schema.GDN`.
        column_linear, row_linear: the parallel linear classes.
    """

    def __init__(
        self, config, layer_number, *, shape, column_linear, row_linear, pg_collection, pp_layer_offset=None, name=None
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        tp = self.tp_group.size()
        self.heads = shape.key_heads // tp  # H
        self.group = shape.value_heads // shape.key_heads  # R
        self.head_dim = shape.head_dim  # K
        self.activation = shape.gate
        self.eps = config.layernorm_epsilon
        width = (2 + self.group) * self.head_dim  # conv channels of one key head
        self.splits = [width, self.group * self.head_dim, self.group, self.group]  # qkv, z, b, a
        device = torch.cuda.current_device()

        linear = dict(config=config, bias=False, skip_bias_add=False, is_expert=False, tp_group=self.tp_group)
        self.in_proj = column_linear(
            config.hidden_size,
            shape.key_heads * sum(self.splits),
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.out_proj = row_linear(
            shape.value_heads * self.head_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **linear,
        )
        self.conv1d = torch.nn.Module()
        self.conv1d.weight = torch.nn.Parameter(
            torch.zeros(self.heads * width, shape.conv_width, dtype=config.params_dtype, device=device)
        )
        value_heads = self.heads * self.group
        self.A_log = torch.nn.Parameter(torch.zeros(value_heads, dtype=torch.float32, device=device))
        self.dt_bias = torch.nn.Parameter(torch.zeros(value_heads, dtype=torch.float32, device=device))
        for name in SHARDED:
            set_tensor_model_parallel_attributes(self.get_parameter(name), is_parallel=True, dim=0, stride=1)
        self.out_norm = torch.nn.Module()
        self.out_norm.weight = torch.nn.Parameter(
            torch.ones(self.head_dim, dtype=config.params_dtype, device=device)
        )

    def forward(self, hidden_states, attention_mask=None, *, packed_seq_params, **unused):
        cu_seqlens = packed_seq_params.cu_seqlens_q
        mixed, _ = self.in_proj(hidden_states)  # [t, 1, H*(qkv + z + b + a)]
        t = mixed.shape[0]
        mixed = mixed.transpose(0, 1).view(1, t, self.heads, -1)
        qkv, z, b, a = mixed.split(self.splits, dim=-1)
        qkv, _ = causal_conv1d(
            qkv.reshape(1, t, -1), self.conv1d.weight, activation="silu", cu_seqlens=cu_seqlens
        )
        K = self.head_dim
        q, k, v = qkv.view(1, t, self.heads, -1).split([K, K, self.group * K], dim=-1)
        value_heads = self.heads * self.group
        out, _, _ = gated_delta_rule(
            q,
            k,
            v.reshape(1, t, value_heads, K),
            a.reshape(1, t, value_heads),
            b.reshape(1, t, value_heads),
            self.A_log,
            self.dt_bias,
            cu_seqlens=cu_seqlens,
        )
        # Every rank normalises its own heads with the same weight, so the weight's gradient is summed over tensor
        # parallel ranks here, with sequence parallelism and without (Megatron-LM#7452 is the sum left out).
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight, group=self.tp_group)
        out = gated_rmsnorm(
            out, z.reshape(1, t, value_heads, K), weight, eps=self.eps, activation=self.activation
        )
        out = out.reshape(1, t, value_heads * K).transpose(0, 1).contiguous()  # [t, 1, H*R*K]
        return self.out_proj(out)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        own = {name: self.get_parameter(name) for name in (*SHARDED, "out_norm.weight")}
        state = make_sharded_tensors_for_checkpoint(
            own, prefix, SHARDED, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        for name in ("in_proj", "out_proj"):
            module = getattr(self, name)
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return state
