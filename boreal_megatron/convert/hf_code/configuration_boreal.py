# SPDX-License-Identifier: Apache-2.0
"""Configuration of BOREAL models: hybrid Gated DeltaNet / gated attention decoders with dense or MoE FFNs."""

from typing import Optional, Union

from transformers import PreTrainedConfig


class BorealConfig(PreTrainedConfig):
    """Describes a BOREAL decoder. Layer n is the mixer `layer_types[n]`, then the FFN `mlp_types[n]`.

    Attributes:
        layer_types: "full_attention" or "linear_attention" (Gated DeltaNet), one a layer.
        mlp_types: "dense" or "moe", one a layer.
        rope_theta, partial_rotary_factor: RoPE's base, and the share of each attention head, from its first dimension
            on, that it rotates. `rope_parameters`, where it repeats them, decides.
        rope_parameters (or `rope_scaling`): `rope_type` "default", or "yarn" with `factor`,
            `original_max_position_embeddings` and, if wanted, `beta_fast`, `beta_slow`, `attention_factor`.
        attention_gate, linear_gate: activation of the output gates, "silu" or "sigmoid".
        num_experts and the fields after it: read only where `mlp_types` has "moe".
        num_nextn_predict_layers: MTP blocks in the weight file (`mtp.*`), which this code does not read.
        mtp_layer_types, mtp_mlp_types: what those blocks are made of.
    """

    model_type = "boreal"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 4
    layer_types: Optional[list[str]] = None
    mlp_types: Optional[list[str]] = None
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 256
    partial_rotary_factor: float = 0.25
    rope_theta: float = 1e7
    rope_parameters: Optional[dict] = None
    attention_gate: str = "silu"
    linear_num_key_heads: int = 8
    linear_num_value_heads: int = 16
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    linear_gate: str = "silu"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    use_cache: bool = True
    num_nextn_predict_layers: int = 0
    mtp_layer_types: Optional[list[str]] = None
    mtp_mlp_types: Optional[list[str]] = None
    bos_token_id: Optional[int] = None
    pad_token_id: Optional[int] = None
    eos_token_id: Optional[Union[int, list[int]]] = None

    def __post_init__(self, **kwargs):
        count = self.num_hidden_layers
        if self.layer_types is None:  # one attention layer opens each group of four
            self.layer_types = ["linear_attention" if n % 4 else "full_attention" for n in range(count)]
        if self.mlp_types is None:
            self.mlp_types = ["dense"] * count
        super().__post_init__(**kwargs)
        self.rope_theta = self.rope_parameters["rope_theta"]
        self.partial_rotary_factor = self.rope_parameters["partial_rotary_factor"]
        for name, known in (("layer_types", ("full_attention", "linear_attention")), ("mlp_types", ("dense", "moe"))):
            kinds = getattr(self, name)
            if len(kinds) != count or not set(kinds) <= set(known):
                raise ValueError(
                    f"{name}: found {kinds}; expected {count} entries (num_hidden_layers), each one of {known}"
                )
        for name in ("attention_gate", "linear_gate"):
            if getattr(self, name) not in ("silu", "sigmoid"):
                raise ValueError(f"{name}: found {getattr(self, name)!r}; expected 'silu' or 'sigmoid'")


__all__ = ["BorealConfig"]
