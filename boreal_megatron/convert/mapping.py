"""Training tensor names and layouts <-> Hugging Face names and layouts, as one list of rules.

Training tensors are full, unsharded and canonical; half-block j = 2 * layer is the mixer, j + 1 the FFN. Every
training tensor is in exactly one rule, and so is every Hugging Face tensor; a rule reads and writes a few of them,
which lets a checkpoint larger than memory stream through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from boreal_megatron.config.pattern import expand
from boreal_megatron.convert import ops
from boreal_megatron.errors import BorealError

# Endings of the Hugging Face tensors that stay FP32 in any export: the recurrence amplifies rounding of the decay,
# and top-k flips on rounding of the scores. `modeling_boreal.py` keeps the same four when it loads.
FP32_ENDINGS = ("A_log", "dt_bias", "mlp.gate.weight", "e_score_correction_bias")


@dataclass(frozen=True)
class Rule:
    """Some training tensors and the Hugging Face tensors that hold the same numbers.

    Attributes:
        train: training name -> shape, in the order in which `forward` takes them.
        hf: Hugging Face names, in the order in which `inverse` takes them.
        forward: training tensors -> tuple of Hugging Face tensors.
        inverse: Hugging Face tensors -> tuple of training tensors.
    """

    train: dict[str, tuple[int, ...]]
    hf: tuple[str, ...]
    forward: Callable = ops.same
    inverse: Callable = ops.same


def mapping(model):
    """All rules of a network, in the order of the network.

    Args:
        model: `schema.Model`.

    Returns:
        list of `Rule`.
    """
    main, mtp = expand(model.pattern)
    h, vocab = model.hidden_size, model.vocab_size
    rules = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, h)]
    rules += _layers(model, main, "decoder.layers", "model.layers")
    rules.append(_same("decoder.final_norm.weight", "model.norm.weight", h))
    if not model.tie_embeddings:
        rules.append(_same("output_layer.weight", "lm_head.weight", vocab, h))
    if mtp is not None:
        rules += [
            _same("mtp.layers.0.enorm.weight", "mtp.pre_fc_norm_embedding.weight", h),
            _same("mtp.layers.0.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", h),
            _same("mtp.layers.0.eh_proj.weight", "mtp.fc.weight", h, 2 * h),  # columns [embedding; hidden], both sides
            *_layers(model, mtp, "mtp.layers.0.mtp_model_layer.layers", "mtp.layers"),
            _same("mtp.layers.0.final_layernorm.weight", "mtp.norm.weight", h),
        ]
    return rules


def to_hf(model, get):
    """Yields (Hugging Face name, tensor), one rule's worth in memory at a time.

    Args:
        model: `schema.Model`.
        get: training name -> full tensor.

    Raises:
        BorealError: a tensor's shape is not the network's.
    """
    for rule in mapping(model):
        tensors = [_checked(name, get(name), shape, "training") for name, shape in rule.train.items()]
        yield from zip(rule.hf, rule.forward(*tensors), strict=True)


def from_hf(model, get):
    """Yields (training name, tensor); the inverse of `to_hf`, with `get` from Hugging Face name to tensor."""
    for rule in mapping(model):
        tensors = rule.inverse(*_checked_hf(rule, [get(name) for name in rule.hf]))
        yield from zip(rule.train, tensors, strict=True)


def keeps_fp32(hf_name):
    """Whether a Hugging Face tensor is stored in FP32 whatever the export's dtype."""
    return hf_name.endswith(FP32_ENDINGS)


# ---------------------------------------------------------------- rules of one half-block


def _layers(model, letters, train, hf):
    """Rules of a stack of half-blocks under the prefixes `train` and `hf`."""
    kinds = {"*": _attention, "G": _gdn, "-": _dense, "E": _moe}
    rules = []
    for j, letter in enumerate(letters):
        rules += kinds[letter](model, f"{train}.{j}", f"{hf}.{j // 2}")
    return rules


def _attention(model, train, hf):
    a, h = model.attention, model.hidden_size
    heads, kv_heads, d = a.heads, a.kv_heads, a.head_dim
    at, to = f"{train}.self_attention", f"{hf}.self_attn"
    return [
        _same(f"{train}.input_layernorm.weight", f"{hf}.input_layernorm.weight", h),
        Rule(
            {f"{at}.linear_qkv.weight": (2 * (heads + kv_heads) * d, h)},
            (f"{to}.q_proj.weight", f"{to}.k_proj.weight", f"{to}.v_proj.weight"),
            partial(ops.split_attention, heads=heads, kv_heads=kv_heads, d=d),
            partial(ops.join_attention, heads=heads, kv_heads=kv_heads, d=d),
        ),
        _same(f"{at}.q_layernorm.weight", f"{to}.q_norm.weight", d),
        _same(f"{at}.k_layernorm.weight", f"{to}.k_norm.weight", d),
        _same(f"{at}.linear_proj.weight", f"{to}.o_proj.weight", h, heads * d),
    ]


def _gdn(model, train, hf):
    g, h = model.gdn, model.hidden_size
    key_heads, value_heads, d = g.key_heads, g.value_heads, g.head_dim
    r = value_heads // key_heads
    conv_sizes = (d, d, r * d)  # rows of q, k and v in one key head's group
    qkvz, ba = 2 * d + 2 * r * d, 2 * r
    at, to = f"{train}.self_attention", f"{hf}.linear_attn"
    return [
        _same(f"{train}.input_layernorm.weight", f"{hf}.input_layernorm.weight", h),
        Rule(
            {f"{at}.in_proj.weight": (key_heads * (qkvz + ba), h)},
            (f"{to}.in_proj_qkvz.weight", f"{to}.in_proj_ba.weight"),
            partial(ops.split_gdn_projection, key_heads=key_heads, qkvz_rows=qkvz, ba_rows=ba),
            partial(ops.join_gdn_projection, key_heads=key_heads),
        ),
        Rule(
            {f"{at}.conv1d.weight": (key_heads * sum(conv_sizes), g.conv_width)},
            (f"{to}.conv1d.weight",),
            partial(ops.split_conv, key_heads=key_heads, sizes=conv_sizes),
            partial(ops.join_conv, key_heads=key_heads, sizes=conv_sizes),
        ),
        _same(f"{at}.A_log", f"{to}.A_log", value_heads),
        _same(f"{at}.dt_bias", f"{to}.dt_bias", value_heads),
        _same(f"{at}.out_norm.weight", f"{to}.norm.weight", d),
        _same(f"{at}.out_proj.weight", f"{to}.out_proj.weight", h, value_heads * d),
    ]


def _dense(model, train, hf):
    norm = _same(f"{train}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", model.hidden_size)
    return [norm, *_swiglu(f"{train}.mlp", f"{hf}.mlp", model.hidden_size, model.ffn_hidden_size)]


def _moe(model, train, hf):
    m, h = model.moe, model.hidden_size
    f, experts = m.expert_hidden_size, range(m.experts)
    at, to = f"{train}.mlp", f"{hf}.mlp"
    return [
        _same(f"{train}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", h),
        _same(f"{at}.router.weight", f"{to}.gate.weight", m.experts, h),
        _same(f"{at}.router.expert_bias", f"{to}.gate.e_score_correction_bias", m.experts),
        Rule(
            {f"{at}.experts.experts.linear_fc1.weight": (m.experts, 2 * f, h)},
            tuple(f"{to}.experts.{e}.{half}_proj.weight" for e in experts for half in ("gate", "up")),
            ops.split_experts_gate_up,
            ops.join_experts_gate_up,
        ),
        Rule(
            {f"{at}.experts.experts.linear_fc2.weight": (m.experts, h, f)},
            tuple(f"{to}.experts.{e}.down_proj.weight" for e in experts),
            ops.split_experts,
            ops.join_experts,
        ),
        *_swiglu(f"{at}.shared_experts", f"{to}.shared_expert", h, m.shared_hidden_size),
    ]


def _swiglu(train, hf, h, f):
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return [
        Rule({f"{train}.linear_fc1.weight": (2 * f, h)}, gate_up, ops.split_gate_up, ops.join_gate_up),
        _same(f"{train}.linear_fc2.weight", f"{hf}.down_proj.weight", h, f),
    ]


def _same(train, hf, *shape):
    return Rule({train: shape}, (hf,))


# ---------------------------------------------------------------- checks


def _checked(name, tensor, shape, side):
    if tuple(tensor.shape) != shape:
        raise BorealError(
            f"{side} tensor {name}: found shape {tuple(tensor.shape)}, expected {shape}; "
            "check that the weights and the model description belong together"
        )
    return tensor


def _checked_hf(rule, tensors):
    """Refuses shapes that are not the rule's; the expected ones come from running the rule on shapes alone."""
    blanks = [torch.empty(shape, device="meta") for shape in rule.train.values()]
    expected = [tuple(blank.shape) for blank in rule.forward(*blanks)]
    return [_checked(n, t, s, "Hugging Face") for n, t, s in zip(rule.hf, tensors, expected, strict=True)]
