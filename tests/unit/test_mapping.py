"""Names and layouts: a round trip is equal to the bit, and rows land where their meaning says."""

import pytest
import torch

from boreal_megatron.config import schema
from boreal_megatron.convert import ops
from boreal_megatron.convert.hf_config import hf_config_dict, model_from_hf
from boreal_megatron.convert.mapping import from_hf, keeps_fp32, mapping, to_hf
from boreal_megatron.errors import BorealError
from tests.support.networks import random_weights, tiny

NETWORKS = {
    "tied": tiny(),
    "untied": tiny(tie_embeddings=False),
    "without MTP": tiny(pattern="2x(*-GE)"),
    "MoE in the MTP head": tiny(pattern="*-G-/GE"),
    "dense, ungrouped": tiny(
        pattern="*-G-",
        moe=None,
        attention=schema.Attention(heads=3, kv_heads=3, head_dim=8),
        gdn=schema.GDN(key_heads=4, value_heads=4, head_dim=8, conv_width=3),
    ),
}
networks = pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)


@networks
def test_round_trip_is_bit_equal(model):
    weights = random_weights(model)
    hf = list(to_hf(model, weights.__getitem__))
    assert len(dict(hf)) == len(hf), "an HF tensor is written twice"
    back = list(from_hf(model, dict(hf).__getitem__))
    assert len({(name, index) for name, index, _ in back}) == len(back), "a training tensor comes back twice"
    assert {name for name, _, _ in back} == set(weights)
    for name, index, tensor in back:
        assert torch.equal(tensor, weights[name] if index is None else weights[name][index]), name
    stacked = {name: sum(n == name for n, _, _ in back) for name, index, _ in back if index is not None}
    assert stacked == {name: len(weights[name]) for name in stacked}


@networks
def test_nothing_is_lost_or_made_up(model):
    weights = random_weights(model)
    hf = dict(to_hf(model, weights.__getitem__))
    numbers = [torch.cat([t.flatten() for t in side.values()]).sort().values for side in (weights, hf)]
    assert torch.equal(*numbers)


@networks
def test_config_round_trip(model):
    config = hf_config_dict(model, eos_token_id=0, dtype="bf16")
    back = model_from_hf(config)
    assert back.model_dump(exclude={"pattern"}) == model.model_dump(exclude={"pattern"})
    assert back == model_from_hf(hf_config_dict(back, eos_token_id=0, dtype="fp32"))


def test_training_names():
    """The names that training checkpoints use, one block of each kind."""
    names = list(random_weights(tiny(pattern="*-GE/*-", tie_embeddings=False)))
    half_blocks = {
        "*": ["self_attention.linear_proj", "self_attention.linear_qkv"]
        + ["self_attention.k_layernorm", "self_attention.q_layernorm", "input_layernorm"],
        "G": ["self_attention.in_proj", "self_attention.conv1d", "self_attention.out_norm", "self_attention.out_proj"]
        + ["input_layernorm"],
        "-": ["pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"],
        "E": ["pre_mlp_layernorm", "mlp.router", "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"]
        + ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"],
    }
    expected = ["embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"]
    for j, letter in enumerate("*-GE"):
        expected += [f"decoder.layers.{j}.{name}.weight" for name in half_blocks[letter]]
    expected += ["decoder.layers.2.self_attention.A_log", "decoder.layers.2.self_attention.dt_bias"]
    expected += ["decoder.layers.3.mlp.router.expert_bias"]
    expected += [f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")]
    for j, letter in enumerate("*-"):
        expected += [f"mtp.layers.0.mtp_model_layer.layers.{j}.{name}.weight" for name in half_blocks[letter]]
    assert sorted(names) == sorted(expected)


def test_attention_rows():
    """Rows carry (part, head, row) as numbers: q of head 3 must be found again at head 3, its gate right after it."""
    heads, kv_heads, d = 4, 2, 3
    label = {"q": 0, "gate": 1000, "k": 2000, "v": 3000}
    rows = []
    for kv in range(kv_heads):
        for part in ("q", "gate"):
            rows += [label[part] + 10 * head + i for head in (2 * kv, 2 * kv + 1) for i in range(d)]
        rows += [label[part] + 10 * kv + i for part in ("k", "v") for i in range(d)]
    q_and_gate, k, v = ops.split_attention(torch.tensor(rows).unsqueeze(1), heads, kv_heads, d)
    expected = [label[part] + 10 * head + i for head in range(heads) for part in ("q", "gate") for i in range(d)]
    assert q_and_gate.flatten().tolist() == expected
    assert k.flatten().tolist() == [2000, 2001, 2002, 2010, 2011, 2012]
    assert v.flatten().tolist() == [3000, 3001, 3002, 3010, 3011, 3012]


def test_conv_channels():
    """Two key heads with q 1, k 1 and v 2 channels each: grouped q k v v q k v v becomes flat q q k k v v v v."""
    grouped = torch.tensor([0, 10, 20, 21, 1, 11, 22, 23]).unsqueeze(1)
    (flat,) = ops.split_conv(grouped, 2, (1, 1, 2))
    assert flat.shape == (8, 1, 1) and flat.flatten().tolist() == [0, 1, 10, 11, 20, 21, 22, 23]


def test_fp32_names():
    kept = {name for name, _ in to_hf(tiny(), random_weights(tiny()).__getitem__) if keeps_fp32(name)}
    assert kept == {
        *(f"model.layers.{n}.linear_attn.{p}" for n in (1, 2) for p in ("A_log", "dt_bias")),
        *(f"model.layers.{n}.mlp.gate.{p}" for n in (2, 3) for p in ("weight", "e_score_correction_bias")),
    }


def test_wrong_shape_is_named():
    weights = random_weights(tiny())
    name = "decoder.layers.2.self_attention.in_proj.weight"
    hf = dict(to_hf(tiny(), weights.__getitem__))
    with pytest.raises(BorealError, match=name):
        dict(to_hf(tiny(), (weights | {name: weights[name][1:]}).__getitem__))
    name = "model.layers.1.linear_attn.in_proj_ba.weight"
    with pytest.raises(BorealError, match=name):
        list(from_hf(tiny(), (hf | {name: hf[name][1:]}).__getitem__))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "llama"}, "model_type"),
        ({"head_dim": None}, "head_dim"),
        ({"layer_types": ["full_attention"] * 3}, "3 mixer types"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"linear_value_head_dim": 16}, "linear_value_head_dim"),
    ],
)
def test_foreign_config_is_refused(change, word):
    config = hf_config_dict(tiny(), eos_token_id=0, dtype="fp32") | change
    with pytest.raises(BorealError, match=word):
        model_from_hf({key: value for key, value in config.items() if value is not None})


def test_network_without_attention_is_refused():
    with pytest.raises(BorealError, match="no attention"):
        hf_config_dict(tiny(pattern="G-"), eos_token_id=0, dtype="fp32")


def test_rules_stream():
    """No rule reads more than one tensor, so that an export holds one training tensor at a time."""
    assert all(len(rule.train) == 1 for rule in mapping(tiny()))
