"""Which module fills which slot of megatron-core's hybrid stack."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from boreal_megatron.model.gated_attention import GatedAttention
from boreal_megatron.model.gated_deltanet import GatedDeltaNet
from boreal_megatron.model.router import Router


class Stack(HybridStack):
    """megatron-core's stack with the chosen final norm; upstream names Transformer Engine's."""

    def __init__(self, config, *args, norm, post_layer_norm=True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)


class BagMTPLayer(MultiTokenPredictionLayer):
    """An MTP layer that is given the ids it embeds, already shifted by one position by the batch.

    Upstream rolls them itself, by a loop over documents on the host.
    """

    def _get_embeddings(
        self, input_ids, position_ids, embedding, hidden_states, packed_seq_params=None, padding_mask=None
    ):
        shifted = embedding(input_ids=input_ids, position_ids=None)
        return input_ids, position_ids, padding_mask, shifted, hidden_states


def stack_spec(model, kernels, modules, context_mode="state"):
    """The hybrid stack of one network: `*` attention, `G` Gated DeltaNet, `-` dense, `E` MoE, `/` MTP.

    Checkpoints have one set of names, those of separate norms: where a linear holds the norm before it, the norm's
    weight is written under the norm's own name.

    Args:
        model: `config.schema.Model`.
        kernels: `model.kernels.chosen`.
        modules: `model.provider.modules`.
        context_mode: how Gated DeltaNet shares a row among context-parallel ranks, see there.
    """
    norm, holds_norm = modules.norm, modules.norm_column
    after_norm = holds_norm or modules.column

    def before(linear, slot):
        """The norm before a linear: in its slot, or the name in checkpoints of the one that the linear holds."""
        return {"sharded_state_dict_keys_map": {f"{linear}.layer_norm_": f"{slot}."}} if holds_norm else {slot: norm}

    def mixer(spec, linear):
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                self_attention=spec,
                self_attn_bda=get_bias_dropout_add,
                **before(f"self_attention.{linear}", "input_layernorm"),
            ),
        )

    def feed_forward(layer, mlp, **norms):
        return ModuleSpec(
            module=layer, submodules=TransformerLayerSubmodules(mlp=mlp, mlp_bda=get_bias_dropout_add, **norms)
        )

    attention = ModuleSpec(
        module=GatedAttention,
        params={"attn_mask_type": AttnMaskType.causal, "gate": model.attention.gate},
        submodules=SelfAttentionSubmodules(
            linear_qkv=after_norm,
            core_attention=modules.core_attention,
            linear_proj=modules.row,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    gdn = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "shape": model.gdn,
            "column_linear": after_norm,
            "row_linear": modules.row,
            "context_mode": context_mode,
            "kernels": kernels,
        },
    )
    dense = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=after_norm, linear_fc2=modules.row))
    shared = MLPSubmodules(linear_fc1=modules.column, linear_fc2=modules.row)
    moe = partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=modules.experts,
            shared_experts=partial(SharedExpertMLP, submodules=shared, gate=False),
            router=Router,
        ),
    )
    mtp = ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[
                ModuleSpec(
                    module=BagMTPLayer,
                    submodules=MultiTokenPredictionLayerSubmodules(
                        enorm=norm,
                        hnorm=norm,
                        eh_proj=modules.column,
                        mtp_model_layer=None,
                        layer_norm=norm,
                    ),
                )
            ]
        ),
    )
    return ModuleSpec(
        module=Stack,
        params={"norm": norm},
        submodules=HybridStackSubmodules(
            attention_layer=mixer(attention, "linear_qkv"),
            gdn_layer=mixer(gdn, "in_proj"),
            mlp_layer=feed_forward(MLPLayer, dense, **before("mlp.linear_fc1", "pre_mlp_layernorm")),
            # Router and shared expert read the same normalised positions: this norm has a slot of its own.
            moe_layer=feed_forward(MoETransformerLayer, moe, pre_mlp_layernorm=norm),
            mtp_block_spec=mtp,
        ),
    )
