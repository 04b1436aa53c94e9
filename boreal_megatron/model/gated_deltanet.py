"""The Gated DeltaNet mixer (arXiv 2412.06464) as a tensor-parallel megatron-core module.

T positions of one packed row, t = T / cp of this context-parallel rank, n stretches of one document in that chunk,
b = 1, H key heads, R value heads per key head, K key/value head dim, W convolution taps; per tensor-parallel rank
H/tp.

`in_proj` rows and conv channels are grouped by key head, [q K | k K | v R*K | z R*K | b R | a R], so that a
tensor-parallel shard is a contiguous block of rows and a checkpoint reshards like any column-parallel weight.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from boreal_kernels import causal_conv1d, gated_delta_rule, gated_rmsnorm
from boreal_megatron.model import context

# Parameters cut along dim 0 by tensor parallelism, besides the linears, which say so themselves.
SHARDED = {"A_log": 0, "dt_bias": 0, "conv1d.weight": 0}


class GatedDeltaNet(MegatronModule):
    """hidden [t/sp, 1, h] -> [t/sp, 1, h]. Fills the attention slot of a megatron-core layer.

    A_log and dt_bias stay FP32 under bf16: g = -exp(A_log) softplus(a + dt_bias) sets the memory's half-life, and a
    bf16 A_log is off by up to 0.8 % of it. The state and g are FP32 inside the op.

    Args:
        shape: `config.schema.GDN`.
        column_linear, row_linear: the parallel linear classes.
        kernels: `model.kernels.chosen`, which implementations run.
        context_mode: how context-parallel ranks share the row. "state": each runs its own chunk, and they hand the
            recurrent state on. "heads": each runs the whole row for its share of the heads.
    """

    def __init__(
        self,
        config,
        layer_number,
        *,
        shape,
        column_linear,
        row_linear,
        pg_collection,
        kernels,
        context_mode="state",
        pp_layer_offset=None,
        name=None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp
        tp, cp = self.tp_group.size(), self.cp_group.size()
        assert context_mode == "state" or shape.key_heads % (tp * cp) == 0, (
            f"{shape.key_heads} key heads do not divide over tensor {tp} x context {cp} ranks"
        )
        self.context_mode = context_mode if cp > 1 else "whole"
        self.heads = shape.key_heads // tp  # H
        self.group = shape.value_heads // shape.key_heads  # R
        self.head_dim = shape.head_dim  # K
        self.conv = partial(causal_conv1d, backend=kernels["causal_conv1d"].backend)
        self.rule = partial(gated_delta_rule, backend=kernels["gated_delta_rule"].backend)
        self.norm = partial(gated_rmsnorm, backend=kernels["gated_rmsnorm"].backend)
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
        mixed, _ = self.in_proj(hidden_states)  # [t, 1, H*(qkv + z + b + a)]
        core = partial(self.core, packing=packed_seq_params)
        if self.config.recompute_granularity == "selective" and self.training:
            out = tensor_parallel.checkpoint(core, False, mixed)
        else:
            out = core(mixed)
        return self.out_proj(out)

    def core(self, mixed, packing):
        """[t, 1, H*(qkv + z + b + a)] -> [t, 1, H*R*K]: all between the projections."""
        t = mixed.shape[0]
        mixed = mixed.transpose(0, 1).view(1, t, self.heads, -1)
        qkv, z, b, a = mixed.split(self.splits, dim=-1)
        mix = {"whole": self.whole, "heads": self.by_heads, "state": self.by_state}[self.context_mode]
        out = mix(qkv, b, a, packing)  # [1, t, H*R, K]
        # Every rank normalises its own heads with the same weight, so the weight's gradient is summed over tensor
        # parallel ranks here, with sequence parallelism and without (Megatron-LM#7452 is the sum left out).
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight, group=self.tp_group)
        z = z.unflatten(-1, (self.group, self.head_dim))  # [1, t, H, R, K], a view
        out = self.norm(out.reshape(z.shape), z, weight, eps=self.eps, activation=self.activation)
        return out.reshape(1, t, -1).transpose(0, 1).contiguous()

    def whole(self, qkv, b, a, packing):
        """One rank has the row and all heads: qkv [1, t, H, (2 + R)*K], b, a [1, t, H, R] -> [1, t, H*R, K]."""
        return self.mix_row(qkv, b, a, self.conv1d.weight, self.A_log, self.dt_bias, packing.cu_seqlens_q)

    def by_heads(self, qkv, b, a, packing):
        """As `whole`: the whole row for 1/cp of the heads, between two all-to-alls.

        A rank has gradients for its own heads' parameters and zeros for the others'; the gradient sum over
        context-parallel ranks completes them.
        """
        group = self.cp_group
        mixed = torch.cat([qkv, b, a], dim=-1)[0]  # [t, H, (2 + R)*K + 2R]
        mixed = context.positions_to_heads(mixed, group)[None]  # [1, T, H/cp, ..]
        qkv, b, a = mixed.split([qkv.shape[-1], b.shape[-1], a.shape[-1]], dim=-1)
        parameters = [p.chunk(group.size())[group.rank()] for p in (self.conv1d.weight, self.A_log, self.dt_bias)]
        out = self.mix_row(qkv, b, a, *parameters, packing.cu_seqlens_q)  # [1, T, H*R/cp, K]
        return context.heads_to_positions(out[0], group)[None]

    def by_state(self, qkv, b, a, packing):
        """As `whole`: this rank's chunk, with what the ranks before hand on.

        The rule runs twice over the chunk's last stretch of one document: once from zero, for what the stretch does
        to any state that enters it, and again from the state that does enter. A document over many chunks thus costs
        two passes, and in return no rank waits for another's pass, only for the exchange of [K, 2K] per value head.
        The last rank's first pass is used by no one; all ranks run it at the same time, so skipping it saves none.
        """
        edges, cu_seqlens, group, t = packing.edges, packing.chunk_cu_seqlens, self.cp_group, qkv.shape[1]
        fresh = cu_seqlens.numel() - 2  # n - 1: every stretch but the chunk's first begins with nothing
        before = context.previous_inputs(qkv[0].flatten(1), self.conv1d.weight.shape[1] - 1, edges, group)
        before = F.pad(before.mT[None], (0, 0, 0, 0, 0, fresh))  # [n, C, W-1]
        q, k, v, a, b = self.convolve(qkv, b, a, self.conv1d.weight, cu_seqlens, before)
        last = context.last_stretch(edges, t, group)
        _, state, transition = self.rule(
            *(x[:, last:] for x in (q, k, v, a, b)),
            self.A_log,
            self.dt_bias,
            output_final_state=True,
            output_transition=True,
        )
        state = context.entering_state(state[0], transition[0], edges, t, group)  # [H*R, K, K]
        state = F.pad(state[None], (0, 0, 0, 0, 0, 0, 0, fresh))  # [n, H*R, K, K]
        out, _, _ = self.rule(
            q, k, v, a, b, self.A_log, self.dt_bias, cu_seqlens=cu_seqlens, initial_state=state
        )
        return out

    def mix_row(self, qkv, b, a, weight, A_log, dt_bias, cu_seqlens):
        """Convolution and rule of a whole row, for the heads that are given."""
        inputs = self.convolve(qkv, b, a, weight, cu_seqlens)
        out, _, _ = self.rule(*inputs, A_log, dt_bias, cu_seqlens=cu_seqlens)
        return out

    def convolve(self, qkv, b, a, weight, cu_seqlens, initial_state=None):
        """The rule's arguments: q, k [1, t, H, K], v [1, t, H*R, K], a, b [1, t, H*R]."""
        K, R = self.head_dim, self.group
        (q, k, v), _ = self.conv(
            qkv, weight, activation="silu", cu_seqlens=cu_seqlens, initial_state=initial_state, split=(K, K, R * K)
        )
        return q, k, v.unflatten(-1, (R, K)).flatten(2, 3), a.flatten(2), b.flatten(2)

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
