# SPDX-License-Identifier: Apache-2.0
"""BOREAL decoder in plain PyTorch, for transformers 5.23 or newer: scoring, generation, fine-tuning.

Every layer is `x + mixer(norm(x))`, then `x + ffn(norm(x))`. Mixers: gated softmax attention (KV cache) or Gated
DeltaNet (a short convolution and one FP32 matrix state a head). FFNs: SwiGLU, or a mixture of SwiGLU experts.

Shapes: B batch, T new positions, S cached and new positions, h hidden; attention Hq query heads, Hkv key/value
heads, D head size; DeltaNet H key heads, HV value heads, K key size, V value size, C convolved channels, W conv width.
"""

import functools
from importlib import import_module
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_boreal import BorealConfig

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}
CHUNK = 64  # positions that the delta rule solves at once


# ---------------------------------------------------------------- the gated delta rule


def unit_length(x):
    """L2-normalises the last dim; the epsilon sits under the root, so that an all-zero row stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_step(q, k, v, g, beta, state):
    """One position of the recurrence (arXiv 2412.06464, equation 10): decay, read, correct, write, output.

    Args:
        q, k: [B, HV, 1, K], unit length, q scaled. v: [B, HV, 1, V]. g, beta: [B, HV, 1]. state: [B, HV, K, V].
        All FP32.

    Returns:
        output [B, HV, 1, V], new state.
    """
    state = state * g.exp().unsqueeze(-1)
    correction = beta.unsqueeze(-1) * (v - k @ state)  # [B, HV, 1, V]
    state = state + k.transpose(-1, -2) @ correction
    return q @ state, state


def gated_delta_chunks(q, k, v, g, beta, state):
    """The same recurrence over T positions, a chunk at a time; arguments as in `gated_delta_step` with T for 1.

    Within a chunk the corrections depend on each other through a unit lower triangular system; solving it turns the
    rest into matrix products. The last chunk is simply shorter.
    """
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        qc, kc, vc, gc, bc = (x[:, :, start : start + CHUNK] for x in (q, k, v, g, beta))
        # Log decay from column j to row i, summed directly: a difference of two running sums would lose the small
        # decays that follow a large one.
        between = gc.unsqueeze(-1).expand(*gc.shape, gc.shape[-1]).tril(-1).cumsum(-2)  # [B, HV, c, c]
        decay = between.exp().tril()
        entering = gc.cumsum(-1).exp().unsqueeze(-1)  # [B, HV, c, 1] from the entering state to each position
        to_end = decay[:, :, -1].unsqueeze(-1)  # [B, HV, c, 1] from each position to the chunk's last
        b = bc.unsqueeze(-1)

        system = b * (kc @ kc.transpose(-1, -2)) * decay  # its diagonal is read as ones by the solver
        error = b * (vc - entering * (kc @ state))
        correction = torch.linalg.solve_triangular(system, error, upper=False, unitriangular=True)  # [B, HV, c, V]

        scores = (qc @ kc.transpose(-1, -2)) * decay
        outputs.append(entering * (qc @ state) + scores @ correction)
        state = state * entering[:, :, -1:] + (to_end * kc).transpose(-1, -2) @ correction
    return torch.cat(outputs, dim=2), state


def torch_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """The gated delta rule from the convolution's output to the norm's input, in plain torch.

    Args:
        q, k: [B, T, H, K], not normalised. v: [B, T, HV, V]. a, b: [B, T, HV], before their activations.
        A_log, dt_bias: [HV]. state: [B, HV, K, V] in FP32, or None for zeros.

    Returns:
        output [B, T, HV, V], new state.
    """
    repeats = v.shape[2] // k.shape[2]
    q, k, v = q.float(), k.float(), v.float().transpose(1, 2)  # v [B, HV, T, V]
    q, k = unit_length(q) * q.shape[-1] ** -0.5, unit_length(k)
    # Value head j reads key head j // repeats.
    q, k = (x.repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (q, k))  # [B, HV, T, K]
    g, beta = (x.transpose(1, 2) for x in gates(a, b, A_log, dt_bias))  # [B, HV, T]
    if state is None:
        state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    rule = gated_delta_step if v.shape[2] == 1 else gated_delta_chunks
    out, state = rule(q, k, v, g, beta, state)
    return out.transpose(1, 2), state


def fla_delta_rule(q, k, v, a, b, A_log, dt_bias, state):
    """`torch_delta_rule` by flash-linear-attention."""
    fla = import_module("fla.ops.gated_delta_rule")
    g, beta = gates(a, b, A_log, dt_bias)
    # Its one-token kernel has no backward pass.
    steps = q.shape[1] == 1 and not torch.is_grad_enabled()
    rule = fla.fused_recurrent_gated_delta_rule if steps else fla.chunk_gated_delta_rule
    return rule(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def boreal_kernels_delta_rule(q, k, v, a, b, A_log, dt_bias, state, backend="auto"):
    """`torch_delta_rule` by boreal_kernels."""
    rule = import_module("boreal_kernels.gated_delta_rule").gated_delta_rule
    out, state, _ = rule(
        q, k, v, a, b, A_log, dt_bias, initial_state=state, output_final_state=True, backend=backend
    )
    return out, state


def gates(a, b, A_log, dt_bias):
    """Log decay g <= 0 and write strength beta, FP32, in the shape of a and b."""
    return -A_log.float().exp() * F.softplus(a.float() + dt_bias.float()), torch.sigmoid(b.float())


DELTA_RULES = {"torch": torch_delta_rule, "fla": fla_delta_rule, "boreal_kernels": boreal_kernels_delta_rule}


@functools.cache
def fastest_delta_rule(head_dim):
    """The name, in DELTA_RULES, of the fastest implementation that is installed for CUDA tensors."""
    if not torch.cuda.is_available():
        return "torch"
    try:
        kernels = import_module("boreal_kernels.backend")
        if kernels.choose("gated_delta_rule", device="cuda", head_dim=head_dim).backend == "triton":
            return "boreal_kernels"
    except ImportError:
        pass
    try:
        import_module("fla.ops.gated_delta_rule")
    except ImportError:
        return "torch"
    return "fla"


# ---------------------------------------------------------------- norms and rotary positions


class BorealRMSNorm(nn.Module):
    """weight * x / rms(x), in FP32, returned in the dtype of x."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(x.dtype)


def rotary_tables(config, position_ids):
    """cos and sin, FP32 [B, 1, T, rope_dim], both halves alike, times the attention factor of YaRN where it is used."""
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        rope_dim = int(config.head_dim * rope["partial_rotary_factor"])
        steps = torch.arange(0, rope_dim, 2, device=position_ids.device, dtype=torch.float32) / rope_dim
        frequencies, factor = rope["rope_theta"] ** -steps, 1.0  # [rope_dim / 2]
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies  # [B, 1, T, rope_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x, cos, sin):
    """RoPE over the first dimensions of x [B, heads, T, D]: dimension i pairs with i + rope_dim / 2."""
    rope_dim = cos.shape[-1]
    turned, still = x[..., :rope_dim], x[..., rope_dim:]
    first, second = turned.float().chunk(2, dim=-1)
    turned = turned.float() * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), still), dim=-1)


# ---------------------------------------------------------------- mixers


class BorealAttention(nn.Module):
    """Grouped-query softmax attention whose output is gated element by element before `o_proj`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.gate = GATES[config.attention_gate]
        h, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(h, heads * 2 * d, bias=False)  # each head: d rows of query, d rows of gate
        self.k_proj = nn.Linear(h, kv_heads * d, bias=False)
        self.v_proj = nn.Linear(h, kv_heads * d, bias=False)
        self.o_proj = nn.Linear(heads * d, h, bias=False)
        self.q_norm = BorealRMSNorm(d, config.rms_norm_eps)
        self.k_norm = BorealRMSNorm(d, config.rms_norm_eps)

    def forward(self, x, rotary, visible, cache):
        """x [B, T, h]; visible: bool [B, 1, T, S], or None for plain causal attention."""
        batch, length, _ = x.shape
        d = self.head_dim
        q, gate = self.q_proj(x).view(batch, length, -1, 2 * d).chunk(2, dim=-1)  # [B, T, Hq, D] each
        q = rotate(self.q_norm(q).transpose(1, 2), *rotary)  # [B, Hq, T, D]
        k = rotate(self.k_norm(self.k_proj(x).view(batch, length, -1, d)).transpose(1, 2), *rotary)  # [B, Hkv, T, D]
        v = self.v_proj(x).view(batch, length, -1, d).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # [B, Hkv, S, D]
        # Causality by flag needs as many queries as keys; a lone query sees everything, and needs no mask at all.
        masking = {"attn_mask": visible} if visible is not None or length == 1 else {"is_causal": True}
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **masking)
        out = out.transpose(1, 2) * self.gate(gate.float())  # [B, T, Hq, D], gate evaluated in FP32
        return self.o_proj(out.to(x.dtype).reshape(batch, length, -1))


class BorealGatedRMSNorm(BorealRMSNorm):
    """RMSNorm, then the gate; statistics, gate and products in FP32."""

    def __init__(self, size, eps, gate):
        super().__init__(size, eps)
        self.gate = GATES[gate]

    def forward(self, x, z):
        return super().forward(x.float()) * self.gate(z.float())


class BorealGatedDeltaNet(nn.Module):
    """Gated DeltaNet: a linear-attention state that decays, and is corrected rather than added to.

    Attributes:
        rules: device type -> the name, in DELTA_RULES, of the implementation that runs there; "torch" where none is.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.rules = {"cuda": fastest_delta_rule(config.linear_key_head_dim)}
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.conv_width = config.linear_conv_kernel_dim
        self.repeats = self.value_heads // self.key_heads  # value heads that read one key head
        queries, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        channels = 2 * queries + values
        h = config.hidden_size
        self.in_proj_qkvz = nn.Linear(h, 2 * queries + 2 * values, bias=False)
        self.in_proj_ba = nn.Linear(h, 2 * self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, self.conv_width, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.value_heads))
        self.norm = BorealGatedRMSNorm(self.value_dim, config.rms_norm_eps, config.linear_gate)
        self.out_proj = nn.Linear(values, h, bias=False)

    def forward(self, x, cache):
        """x [B, T, h], zero at padding: zero keys write nothing, and a zero state has nothing to decay."""
        batch, length, _ = x.shape
        r, dk, dv = self.repeats, self.key_dim, self.value_dim
        # Both projections hold one group of rows for each key head.
        grouped = self.in_proj_qkvz(x).view(batch, length, self.key_heads, -1)
        q, k, v, z = grouped.split([dk, dk, r * dv, r * dv], dim=-1)
        b, a = self.in_proj_ba(x).view(batch, length, self.key_heads, -1).split([r, r], dim=-1)
        b, a = b.flatten(2), a.flatten(2)  # [B, T, HV]

        mixed = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), dim=-1)  # [B, T, C]
        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        mixed = self._convolve(mixed.transpose(1, 2), cache).transpose(1, 2)
        q, k, v = mixed.split([self.key_heads * dk, self.key_heads * dk, self.value_heads * dv], dim=-1)
        q, k = (t.reshape(batch, length, self.key_heads, dk) for t in (q, k))
        v = v.reshape(batch, length, self.value_heads, dv)
        rule = DELTA_RULES[self.rules.get(x.device.type, "torch")]
        out, state = rule(q, k, v, a, b, self.A_log, self.dt_bias, state)  # [B, T, HV, V], [B, HV, K, V]
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)

        out = self.norm(out, z.reshape(batch, length, self.value_heads, dv))  # [B, T, HV, V]
        return self.out_proj(out.to(x.dtype).flatten(2))

    def _convolve(self, x, cache):
        """Causal depthwise convolution and SiLU over x [B, C, T], continuing from the cached inputs if there are."""
        length = x.shape[-1]
        if cache is not None:
            x = cache.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_width)  # [B, C, T or more]
        x = F.pad(x, (self.conv_width - 1, 0))
        return F.silu(self.conv1d(x)[..., -length:])


# ---------------------------------------------------------------- FFNs


class BorealMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size, width):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BorealRouter(nn.Module):
    """Sigmoid scores in FP32. The correction bias chooses the experts, the scores alone weigh them."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x):
        """x [tokens, h] -> chosen experts [tokens, k], their weights [tokens, k] in FP32."""
        scores = torch.sigmoid(F.linear(x.float(), self.weight.float()))  # [tokens, E]
        chosen = (scores + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, self.scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)


class BorealMoE(nn.Module):
    """Routed experts plus one shared expert that every token passes."""

    def __init__(self, config):
        super().__init__()
        self.gate = BorealRouter(config)
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(BorealMLP(config.hidden_size, width) for _ in range(config.num_experts))
        self.shared_expert = BorealMLP(config.hidden_size, config.shared_expert_intermediate_size)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])  # [B * T, h]
        chosen, weights = (t.flatten() for t in self.gate(tokens))  # [B * T * k], the k choices of a token together
        pairs = chosen.argsort(stable=True)  # one expert's choices together
        counts = torch.zeros(len(self.experts), dtype=chosen.dtype, device=x.device)
        counts = counts.scatter_add_(0, chosen, torch.ones_like(chosen)).tolist()  # waits for the device, once
        routed = torch.zeros_like(tokens, dtype=torch.float32)  # k contributions are summed in FP32
        for expert, mine in zip(self.experts, pairs.split(counts)):
            # A compiled graph holds every expert, since it cannot know who comes away empty.
            if not torch.compiler.is_compiling() and len(mine) == 0:
                continue
            rows = mine // self.gate.top_k
            contribution = expert(tokens[rows]).float() * weights[mine].unsqueeze(-1)
            routed.index_add_(0, rows, contribution)
        return routed.to(x.dtype).view_as(x) + self.shared_expert(x)


# ---------------------------------------------------------------- the decoder


class BorealDecoderLayer(GradientCheckpointingLayer):
    """One mixer and one FFN, each on a normed input and added to the residual stream."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = BorealRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BorealRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attends = config.layer_types[layer_idx] == "full_attention"
        if self.attends:
            self.self_attn = BorealAttention(config, layer_idx)
        else:
            self.linear_attn = BorealGatedDeltaNet(config, layer_idx)
        moe = config.mlp_types[layer_idx] == "moe"
        self.mlp = BorealMoE(config) if moe else BorealMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x, rotary, visible, real, past_key_values=None):
        """x [B, T, h]; visible as in attention; real: [B, T, 1], 1 at tokens and 0 at padding, or None.

        The cache goes by the name under which transformers takes it away from a layer that it will run twice.
        """
        mixed = self.input_layernorm(x)
        if real is not None:
            mixed = mixed * real
        if self.attends:
            x = x + self.self_attn(mixed, rotary, visible, past_key_values)
        else:
            x = x + self.linear_attn(mixed, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class BorealPreTrainedModel(PreTrainedModel):
    config_class = BorealConfig
    base_model_prefix = "model"
    _no_split_modules = ["BorealDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _is_stateful = True  # the DeltaNet state cannot be rolled back
    # Rounding of the decay is amplified by the recurrence, and rounding of the scores flips the choice of experts.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "mlp.gate.weight", "e_score_correction_bias"]
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]

    @torch.no_grad()
    def _init_weights(self, module):
        """Fresh weights; the functions of `init` leave alone what a checkpoint has filled."""
        super()._init_weights(module)
        if isinstance(module, BorealRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, BorealGatedDeltaNet):
            # Decay exp(-A * dt) with A uniform in (0.01, 16) and dt log-uniform in (0.001, 0.1): half-lives from
            # under one to thousands of tokens.
            a = torch.empty_like(module.A_log).uniform_(0.01, 16.0)
            dt = 0.001 * 100.0 ** torch.rand_like(module.dt_bias)
            init.copy_(module.A_log, a.log())
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class BorealModel(BorealPreTrainedModel):
    """Token ids -> hidden states after the final norm."""

    def __init__(self, config):
        super().__init__(config)
        config.standardize_rope_params()  # from_pretrained(rope_parameters=...) sets what it was given, as it is
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in ("default", "yarn"):
            raise ValueError(f"rope_parameters: found rope_type {rope_type!r}; expected 'default' or 'yarn'")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BorealDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = BorealRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: [B, T], the positions that are not in the cache yet.
            attention_mask: [B, S], 1 at tokens and 0 at padding, cached positions included. Padding comes before the
                tokens of a row, or, where nothing will go on from a cache, after them.
            position_ids: [B, T]; by default they count on from the cache.
            past_key_values: a growing cache; made here when `use_cache` and none is given.
            inputs_embeds: [B, T, h] in place of input_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = x.shape

        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        replayed = self.gradient_checkpointing and self.training  # layers that run twice must not write a cache
        if cache is None and use_cache and not replayed:
            cache = DynamicCache(config=self.config)
        if cache is not None and (len(cache.layers) != len(self.layers) or cache.get_max_length() != -1):
            raise ValueError(
                f"past_key_values: found a {type(cache).__name__} of {len(cache.layers)} layers; expected a cache that "
                "grows, made for this model: DynamicCache(config=model.config), or cache_implementation 'dynamic' or "
                "'offloaded' in generate"
            )
        seen = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=x.device).expand(batch, -1)
        rotary = rotary_tables(self.config, position_ids)
        visible, real = masks(attention_mask, seen, length, x)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []  # the input of every layer
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            x = layer(x, rotary, visible, real, past_key_values=cache)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
        )


def masks(attention_mask, seen, length, x):
    """What attention may see and what DeltaNet must not.

    Returns:
        visible: bool [B, 1, T, S], or None where causality alone decides and needs no mask.
        real: [B, T, 1] in the dtype of x, or None without padding among the new positions.
    """
    total = seen + length
    if attention_mask is not None and attention_mask.shape != (x.shape[0], total):
        raise ValueError(
            f"attention_mask: found shape {tuple(attention_mask.shape)}, expected {(x.shape[0], total)}: one entry "
            "for each cached and each new position"
        )
    # A compiled graph cannot branch on what a mask holds, so there every mask counts as padded.
    tracing = torch.compiler.is_compiling()
    padded = attention_mask is not None and (tracing or not bool(attention_mask.all()))
    if not padded and (length == 1 or seen == 0):
        return None, None
    if padded and seen and not tracing and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask: found padding after a token, and cached positions; expected padding before the tokens "
            "only, since a DeltaNet state that ran over padding cannot go on from the token before it; set "
            "tokenizer.padding_side = 'left'"
        )
    query = torch.arange(seen, total, device=x.device).unsqueeze(-1)
    key = torch.arange(total, device=x.device)
    visible = (key <= query)[None, None]  # [1, 1, T, S]
    if not padded:
        return visible, None
    keep = attention_mask.to(device=x.device, dtype=torch.bool)
    # A padded query still sees itself, since a softmax over nothing is not a number.
    visible = visible & (keep[:, None, None, :] | (key == query))
    return visible, keep[:, seen:, None].to(x.dtype)


class BorealForCausalLM(BorealPreTrainedModel, GenerationMixin):
    """The decoder and its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = BorealModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Cache] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `BorealModel.forward`, plus:

        Args:
            labels: [B, T], equal to input_ids; the shift by one happens here, -100 is ignored.
            logits_to_keep: how many positions, counted from the end, get logits (0: all), or their indices.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])  # [B, kept, vocab]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


__all__ = ["BorealConfig", "BorealForCausalLM", "BorealModel", "BorealPreTrainedModel"]
