"""From our description of a network to megatron-core's TransformerConfig: every field that BOREAL depends on."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from boreal_megatron import platform
from boreal_megatron.config import fp8
from boreal_megatron.config.pattern import expand
from boreal_megatron.model import provider

RECOMPUTE = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn", "moe"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}
FP8 = {
    None: {},
    "tensorwise": dict(fp8="hybrid", fp8_recipe="tensorwise"),
    "delayed": dict(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=1024, fp8_amax_compute_algo="max"),
    "blockwise": dict(fp8="e4m3", fp8_recipe="blockwise"),
}


def transformer_config(config, choices):
    """`config.schema.Config` -> TransformerConfig. One half-block of the pattern is one layer of megatron-core's.

    Args:
        choices: `model.provider.chosen`.
    """
    model, layout = config.model, config.parallel
    main, mtp = expand(model.pattern)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.compute]
    moe = {}
    if model.moe:
        moe = dict(
            num_moe_experts=model.moe.experts,
            moe_router_topk=model.moe.top_k,
            moe_ffn_hidden_size=model.moe.expert_hidden_size,
            moe_shared_expert_intermediate_size=model.moe.shared_hidden_size,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_topk_scaling_factor=model.moe.route_scale,
            moe_router_bias_update_rate=config.phases[0].router_bias_rate,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
        )
    return TransformerConfig(
        num_layers=len(main),
        is_hybrid_model=True,
        mtp_num_layers=1 if mtp else None,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention.heads,
        num_query_groups=model.attention.kv_heads,
        kv_channels=model.attention.head_dim,
        attention_output_gate=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        # `model/init.py` gives every weight its value by name, the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=platform.current().name == "cpu",
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        # With batched point-to-point calls and virtual stages both directions share a peer, and data gets crossed.
        batch_p2p_comm=False,
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision.compute == "bf16",
        calculate_per_token_loss=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **provider.fields(choices),
        **FP8[config.precision.fp8],
        **_bf16_ends(config, len(main)),
        **moe,
        **RECOMPUTE[config.recompute],
    )


def _bf16_ends(config, half_blocks):
    """The first and last half-blocks under FP8, where they stay in bf16."""
    inside = fp8.half_blocks(config)
    if len(inside) in (0, half_blocks):
        return {}
    return dict(
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=inside.start,
        num_layers_at_end_in_bf16=half_blocks - inside.stop,
    )
