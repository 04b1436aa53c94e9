"""Training tensor names and layouts <-> Hugging Face names and layouts, as one list of rules.

Training tensors are full, unsharded and canonical; half-block j = 2 * layer is the mixer, j + 1 the FFN. Every
training tensor is in exactly one rule (stacked experts: each of them in one), and so is every Hugging Face tensor; a
rule reads and writes a few of them, which lets a checkpoint larger than memory stream through.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from boreal_megatron.config.layout import padded_vocab
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
        train: training name -> shape of what the rule reads of it, in the order in which `forward` takes them.
        hf: Hugging Face names, in the order in which `inverse` takes them.
        forward: training tensors -> tuple of Hugging Face tensors.
        inverse: Hugging Face tensors -> tuple of training tensors.
        index: the rule reads `tensor[index]`, one of several stacked along the first dim; None: whole tensors.
    """

    train: dict[str, tuple[int, ...]]
    hf: tuple[str, ...]
    forward: Callable = ops.same
    inverse: Callable = ops.same
    index: int | None = None

    def hf_shapes(self):
        """Hugging Face name -> shape, from running the rule on shapes alone."""
        blanks = [torch.empty(shape, device="meta") for shape in self.train.values()]
        return {name: tuple(t.shape) for name, t in zip(self.hf, self.forward(*blanks), strict=True)}

    def to_hf(self, get):
        """(Hugging Face name, tensor) pairs.

        Args:
            get: training name -> full tensor. If it has a method `part(name, index)`, stacked tensors are read by that.
        """
        tensors = [_checked(name, self._read(get, name), shape, "training") for name, shape in self.train.items()]
        try:
            return list(zip(self.hf, self.forward(*tensors), strict=True))
        except BorealError as error:
            raise BorealError(f"{', '.join(self.train)}: {error}") from None

    def from_hf(self, get):
        """(training name, tensor) pairs, of `self.index`; `get` is from Hugging Face name to tensor."""
        tensors = [_checked(name, get(name), shape, "Hugging Face") for name, shape in self.hf_shapes().items()]
        return list(zip(self.train, self.inverse(*tensors), strict=True))

    def _read(self, get, name):
        if self.index is None:
            return get(name)
        return get.part(name, self.index) if hasattr(get, "part") else get(name)[self.index]


def mapping(model):
    """All rules of a network, in the order of the network.

    Args:
        model: `schema.Model`.

    Returns:
        list of `Rule`.
    """
    main, mtp = expand(model.pattern)
    h = model.hidden_size
    rules = [_vocabulary(model, "embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    rules += _layers(model, main, "decoder.layers", "model.layers")
    rules.append(_same("decoder.final_norm.weight", "model.norm.weight", h))
    if not model.tie_embeddings:
        rules.append(_vocabulary(model, "output_layer.weight", "lm_head.weight"))
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
        BorealError: a tensor's shape is not the network's, or padding holds numbers.
    """
    for rule in mapping(model):
        yield from rule.to_hf(get)


def from_hf(model, get):
    """Yields (training name, index or None, tensor); the inverse of `to_hf`, with `get` from Hugging Face name to tensor.
    Those with an index belong stacked."""
    for rule in mapping(model):
        for name, tensor in rule.from_hf(get):
            yield name, rule.index, tensor


def training_shapes(rules):
    """Training name -> shape of the full tensor."""
    shapes = {}
    for rule in rules:
        for name, shape in rule.train.items():
            shapes[name] = shape if rule.index is None else (rule.index + 1, *shape)
    return shapes


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
    at, to = f"{train}.mlp", f"{hf}.mlp"
    return [
        _same(f"{train}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", h),
        _same(f"{at}.router.weight", f"{to}.gate.weight", m.experts, h),
        _same(f"{at}.router.expert_bias", f"{to}.gate.e_score_correction_bias", m.experts),
        *(
            replace(rule, index=e)
            for e in range(m.experts)
            for rule in _swiglu(f"{at}.experts.experts", f"{to}.experts.{e}", h, m.expert_hidden_size)
        ),
        *_swiglu(f"{at}.shared_experts", f"{to}.shared_expert", h, m.shared_hidden_size),
    ]


def _swiglu(train, hf, h, f):
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return [
        Rule({f"{train}.linear_fc1.weight": (2 * f, h)}, gate_up, ops.split_gate_up, ops.join_gate_up),
        _same(f"{train}.linear_fc2.weight", f"{hf}.down_proj.weight", h, f),
    ]


def _vocabulary(model, train, hf):
    """One row a token; training pads them to a number that every layout divides."""
    rows, padded = model.vocab_size, padded_vocab(model)
    return Rule(
        {train: (padded, model.hidden_size)},
        (hf,),
        partial(ops.drop_rows, rows=rows),
        partial(ops.pad_rows, rows=padded),
    )


def _same(train, hf, *shape):
    return Rule({train: shape}, (hf,))


def _checked(name, tensor, shape, side):
    if tuple(tensor.shape) != shape:
        raise BorealError(
            f"{side} tensor {name}: found shape {tuple(tensor.shape)}, expected {shape}; "
            "check that the weights and the model description belong together"
        )
    return tensor
