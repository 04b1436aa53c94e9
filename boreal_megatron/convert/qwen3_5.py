"""BOREAL networks whose mathematics is that of Qwen3.5's text model, in the names and layouts of transformers' own
`Qwen3_5ForCausalLM`: a folder that loads without code of ours.

Shapes: h hidden; Hk key heads, HV value heads, r = HV / Hk; dk = dv = d head size. Two things differ from the names
and layouts of `mapping`. Qwen3.5 keeps the rows of DeltaNet's projections in one matrix for q, k and v, and one each
for z, b and a, heads in order, not grouped by key head. And its RMSNorms, all but DeltaNet's own, multiply by 1 + w.
"""

from dataclasses import replace
from functools import partial

import torch

from boreal_megatron.config.pattern import expand
from boreal_megatron.convert import hf_config, ops
from boreal_megatron.convert.mapping import mapping
from boreal_megatron.errors import ProblemsError

# Endings of the norms that multiply by 1 + w; `linear_attn.norm.weight` multiplies by w.
CENTRED = (
    "layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight",
    "mtp.norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight",
)  # fmt: skip
SHARED_KEYS = (  # of config.json, with the meaning they have in an export as `boreal`
    "dtype", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "initializer_range",
    "eos_token_id",
)  # fmt: skip


def problems(model):
    """What keeps a network (`schema.Model`) from being a Qwen3.5 text model, a line each; [] if nothing does."""
    main, mtp = expand(model.pattern)
    do = "export it as boreal"
    found = hf_config.problems(model)
    if model.attention.gate != "sigmoid":
        found.append(
            f"model.attention.gate: found {model.attention.gate!r}; expected 'sigmoid', the gate of Qwen3.5's "
            f"attention; {do}"
        )
    if model.gdn.gate != "silu":
        found.append(f"model.gdn.gate: found {model.gdn.gate!r}; expected 'silu', the gate of Qwen3.5's DeltaNet; {do}")
    if "E" in main:
        found.append(
            f"model.pattern: found MoE half-blocks `E` ({main.count('E')} of {len(main) // 2} FFNs); expected dense "
            "ones `-` only: these experts are chosen by sigmoid scores and a balancing bias, scaled, and stand beside an "
            f"ungated shared expert; those of qwen3_5_moe by a softmax, beside a gated one, in every layer; {do}"
        )
    if mtp not in (None, "*-"):
        found.append(f"model.pattern: found an MTP head of `{mtp}`; expected `*-`, as Qwen3.5 has, or none; {do}")
    return found


def config_dict(model, *, eos_token_id, dtype):
    """What goes into config.json; arguments as in `hf_config.hf_config_dict`.

    Raises:
        ProblemsError: the network is not a Qwen3.5 text model.
    """
    if different := problems(model):
        raise ProblemsError("this network is not a Qwen3.5 text model", different)
    ours = hf_config.hf_config_dict(model, eos_token_id=eos_token_id, dtype=dtype)
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **{key: ours[key] for key in SHARED_KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "mtp_num_hidden_layers": ours["num_nextn_predict_layers"],
    }


def rules(model):
    """`mapping.mapping` with Qwen3.5's names and layouts on the Hugging Face side. Rows move and keep their values;
    norm weights go through `centre`."""
    return [_translated(model.gdn, rule) for rule in mapping(model)]


def _translated(gdn, rule):
    name, projection = rule.hf[0], "in_proj_qkvz.weight"
    if name.endswith(CENTRED):
        return replace(rule, forward=centre, inverse=uncentre)
    if name.endswith(projection):
        heads, d, r = gdn.key_heads, gdn.head_dim, gdn.value_heads // gdn.key_heads
        return replace(
            rule,
            hf=tuple(name.replace(projection, f"in_proj_{part}.weight") for part in ("qkv", "z", "b", "a")),
            forward=partial(split_projection, key_heads=heads, sizes=(d, d, r * d, r * d, r, r)),
            inverse=partial(join_projection, key_heads=heads, sizes=(d, d, r * d)),
        )
    return rule


def centre(weight):
    """w -> w - 1 in FP32. 1 + (w - 1), which `uncentre` and the model compute, is w to the bit where w >= 0.5, since
    neither step rounds there, and within 2^-24 of it between -1 and 0.5."""
    return (weight.float() - 1.0,)


def uncentre(weight):
    return (weight.float() + 1.0,)


def split_projection(projection, key_heads, sizes):
    """Per key head [q d | k d | v r*d | z r*d | b r | a r] -> qkv [2*Hk*d + HV*d, h], z [HV*d, h], b and a [HV, h]."""
    q, k, v, z, b, a = ops.split_groups(projection, key_heads, sizes)
    return torch.cat((q, k, v)), z, b, a


def join_projection(qkv, z, b, a, key_heads, sizes):
    """The inverse of `split_projection`; sizes: rows of q, k and v in one key head's group."""
    q, k, v = qkv.split([key_heads * size for size in sizes])
    return (ops.join_groups((q, k, v, z, b, a), key_heads),)
