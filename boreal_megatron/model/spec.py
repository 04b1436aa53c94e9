"""Which module fills which slot of megatron-core's hybrid stack."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from boreal_megatron.model.gated_attention import CoreAttention, GatedAttention
from boreal_megatron.model.gated_deltanet import GatedDeltaNet
from boreal_megatron.model.norm import RMSNorm
from boreal_megatron.model.router import Router


class Stack(HybridStack):
    """megatron-core's stack with our final norm; upstream names Transformer Engine's."""

    def __init__(self, config, *args, post_layer_norm=True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class BagMTPLayer(MultiTokenPredictionLayer):
    """An MTP layer that is given the ids it embeds, already shifted by one position by the batch.

    Upstream rolls them itself, by a loop over documents on the host.
    """

    def _get_embeddings(
        self, input_ids, position_ids, embedding, hidden_states, packed_seq_params=None, padding_mask=None
    ):
        shifted = embedding(input_ids=input_ids, position_ids=None)
        return input_ids, position_ids, padding_mask, shifted, hidden_states


def stack_spec(model, kernels, context_mode="state"):
    """The hybrid stack of one network: `*` attention, `G` Gated DeltaNet, `-` dense, `E` MoE, `/` MTP.

    Args:
        model: `config.schema.Model`.
        kernels: `model.kernels.chosen`.
        context_mode: how Gated DeltaNet shares a row among context-parallel ranks, see there.
    """

    def mixer(spec):
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm, self_attention=spec, self_attn_bda=get_bias_dropout_add
            ),
        )

    def feed_forward(layer, mlp):
        return ModuleSpec(
            module=layer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=RMSNorm, mlp=mlp, mlp_bda=get_bias_dropout_add
            ),
        )

    attention = ModuleSpec(
        module=GatedAttention,
        params={"attn_mask_type": AttnMaskType.causal, "gate": model.attention.gate},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    gdn = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "shape": model.gdn,
            "column_linear": ColumnParallelLinear,
            "row_linear": RowParallelLinear,
            "context_mode": context_mode,
            "kernels": kernels,
        },
    )
    swiglu = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    moe = partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=partial(SequentialMLP, submodules=swiglu),
            shared_experts=partial(SharedExpertMLP, submodules=swiglu, gate=False),
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
                        enorm=RMSNorm,
                        hnorm=RMSNorm,
                        eh_proj=ColumnParallelLinear,
                        mtp_model_layer=None,
                        layer_norm=RMSNorm,
                    ),
                )
            ]
        ),
    )
    return ModuleSpec(
        module=Stack,
        submodules=HybridStackSubmodules(
            attention_layer=mixer(attention),
            gdn_layer=mixer(gdn),
            mlp_layer=feed_forward(MLPLayer, partial(MLP.as_mlp_submodule, submodules=swiglu)),
            moe_layer=feed_forward(MoETransformerLayer, moe),
            mtp_block_spec=mtp,
        ),
    )
