"""The network's description <-> the `config.json` of an export."""

from boreal_megatron.config import schema
from boreal_megatron.config.pattern import expand
from boreal_megatron.errors import BorealError

MIXER_NAMES = {"*": "full_attention", "G": "linear_attention"}
FFN_NAMES = {"-": "dense", "E": "moe"}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}

AUTO_MAP = {
    "AutoConfig": "configuration_boreal.BorealConfig",
    "AutoModel": "modeling_boreal.BorealModel",
    "AutoModelForCausalLM": "modeling_boreal.BorealForCausalLM",
}


def problems(model):
    """What keeps a network (`schema.Model`) from being a Hugging Face model; [] if nothing does."""
    if "*" in expand(model.pattern)[0]:
        return []
    return [
        f"model.pattern: found no attention half-block `*` in {model.pattern!r} before any `/`; expected at least one, "
        "since transformers counts generated positions on an attention layer's cache; such a network stays a checkpoint"
    ]


def hf_config_dict(model, *, eos_token_id, dtype):
    """Describes a network in the words of Qwen3-Next and DeepSeek configurations.

    Args:
        model: `schema.Model`.
        eos_token_id: one id, or a list of ids that end a generation.
        dtype: "fp32" or "bf16", of the stored weights.

    Returns:
        what goes into config.json.
    """
    if dtype not in DTYPE_NAMES:
        raise BorealError(f"dtype: found {dtype!r}; expected one of {', '.join(DTYPE_NAMES)}")
    if found := problems(model):
        raise BorealError("; ".join(found))
    main, mtp = expand(model.pattern)
    attention, gdn, moe = model.attention, model.gdn, model.moe
    layer_types, mlp_types = _type_names(main)
    rope = {"rope_theta": attention.rope_theta, "partial_rotary_factor": attention.rope_fraction}
    config = {
        "architectures": ["BorealForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "boreal",
        "dtype": DTYPE_NAMES[dtype],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "mlp_types": mlp_types,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rope_parameters": {"rope_type": "default"} | rope,
        **rope,  # also where readers from before transformers 5 look
        "attention_gate": attention.gate,
        "linear_num_key_heads": gdn.key_heads,
        "linear_num_value_heads": gdn.value_heads,
        "linear_key_head_dim": gdn.head_dim,
        "linear_value_head_dim": gdn.head_dim,
        "linear_conv_kernel_dim": gdn.conv_width,
        "linear_gate": gdn.gate,
        "num_experts": moe.experts if moe else 0,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "eos_token_id": eos_token_id,
        "num_nextn_predict_layers": 0 if mtp is None else 1,
    }
    if moe:
        config |= {
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_hidden_size,
            "shared_expert_intermediate_size": moe.shared_hidden_size,
            "routed_scaling_factor": moe.route_scale,
        }
    if mtp is not None:
        config["mtp_layer_types"], config["mtp_mlp_types"] = _type_names(mtp)
    return config


def model_from_hf(config):
    """The inverse of `hf_config_dict`; the pattern comes back written out, such as `*-G-GEGE/*-`.

    Args:
        config: the contents of config.json.

    Returns:
        `schema.Model`.

    Raises:
        BorealError: another model type, a missing key, or something the network cannot be.
    """
    if config.get("model_type") != "boreal":
        raise BorealError(f"config.json: found model_type {config.get('model_type')!r}; expected 'boreal'")
    try:
        return _model(config)
    except KeyError as missing:
        raise BorealError(
            f"config.json: {missing.args[0]!r} is missing or has an unknown entry; expected the keys of a BOREAL export"
        ) from None


def _model(config):
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        raise BorealError(
            f"config.json: found linear_key_head_dim {config['linear_key_head_dim']} and linear_value_head_dim "
            f"{config['linear_value_head_dim']}; expected one size for both"
        )
    rope = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise BorealError(
            f"config.json: found rope_type {rope['rope_type']!r}; expected 'default', since training knows no RoPE "
            "scaling; take the folder as it was before the scaling was written into it"
        )
    pattern = _letters(config["layer_types"], config["mlp_types"])
    if config["num_nextn_predict_layers"]:
        pattern += "/" + _letters(config["mtp_layer_types"], config["mtp_mlp_types"])
    moe = None
    if config["num_experts"]:
        moe = schema.MoE(
            experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            expert_hidden_size=config["moe_intermediate_size"],
            shared_hidden_size=config["shared_expert_intermediate_size"],
            route_scale=config["routed_scaling_factor"],
        )
    return schema.Model(
        pattern=pattern,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        attention=schema.Attention(
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            gate=config["attention_gate"],
            rope_fraction=rope["partial_rotary_factor"],
            rope_theta=rope["rope_theta"],
        ),
        gdn=schema.GDN(
            key_heads=config["linear_num_key_heads"],
            value_heads=config["linear_num_value_heads"],
            head_dim=config["linear_key_head_dim"],
            conv_width=config["linear_conv_kernel_dim"],
            gate=config["linear_gate"],
        ),
        moe=moe,
        tie_embeddings=config["tie_word_embeddings"],
        norm_eps=config["rms_norm_eps"],
        init_std=config["initializer_range"],
        max_positions=config["max_position_embeddings"],
    )


def _type_names(letters):
    return [MIXER_NAMES[a] for a in letters[::2]], [FFN_NAMES[b] for b in letters[1::2]]


def _letters(layer_types, mlp_types):
    if len(layer_types) != len(mlp_types):
        raise BorealError(
            f"config.json: found {len(layer_types)} mixer types and {len(mlp_types)} FFN types; "
            "expected as many of each"
        )
    mixers = {name: letter for letter, name in MIXER_NAMES.items()}
    ffns = {name: letter for letter, name in FFN_NAMES.items()}
    return "".join(mixers[a] + ffns[b] for a, b in zip(layer_types, mlp_types, strict=True))
