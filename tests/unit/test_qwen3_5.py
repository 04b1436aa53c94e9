"""Networks exported as Qwen3.5: transformers' own class computes what our decoder computes, and the rest is refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from boreal_megatron.config import schema
from boreal_megatron.convert import qwen3_5
from boreal_megatron.convert.hf import build_hf, write_hf
from boreal_megatron.convert.mapping import mapping
from boreal_megatron.convert.targets import TARGETS
from boreal_megatron.errors import BorealError
from tests.support.decoders import difference, full, in_pieces, some_ids
from tests.support.networks import random_weights, tiny


def qwen(gate="sigmoid", **changes):
    """A dense network with the gates of Qwen3.5; r = 2 in attention and r = 3 in DeltaNet."""
    attention = schema.Attention(heads=4, kv_heads=2, head_dim=8, gate=gate, rope_fraction=0.5, rope_theta=1e4)
    fields = dict(pattern="*-G-G-*-/*-", moe=None, attention=attention)
    return tiny(**(fields | changes))


NETWORKS = {
    "tied": qwen(),
    "untied, other sizes": qwen(
        pattern="G-*-",
        tie_embeddings=False,
        norm_eps=1e-5,
        attention=schema.Attention(heads=3, kv_heads=3, head_dim=16, gate="sigmoid", rope_theta=1e6),
        gdn=schema.GDN(key_heads=4, value_heads=4, head_dim=8, conv_width=2),
    ),
}
networks = pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)


def theirs(model, weights, described_by=None, **changes):
    """transformers' class, made from the target's configuration, with the tensors of the target's rules."""
    target = TARGETS["qwen3_5"]
    config = target.config_dict(described_by or model, eos_token_id=0, dtype="fp32") | changes
    decoder = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config)).eval()
    state = dict(pair for rule in target.rules(model) for pair in rule.to_hf(weights.__getitem__))
    missing, unexpected = decoder.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    assert all(name.startswith("mtp.") for name in unexpected)
    return decoder


def ours(model, weights):
    return build_hf(model, weights.__getitem__, eos_token_id=0)


# ---------------------------------------------------------------- the mathematics


@networks
@pytest.mark.parametrize("length", [1, 63, 130])
def test_logits_equal_ours(model, length):
    weights, ids = random_weights(model), some_ids(length, batch=2)
    found, expected = full(theirs(model, weights), ids), full(ours(model, weights), ids)
    assert expected.std() > 0.3, "logits this flat would agree with anything"
    assert (found - expected).abs().max() < 1e-4 and difference(found, expected) < 1e-5


@networks
def test_cached_decoding_equals_ours(model):
    """A prefill of odd length, several tokens at once, then single steps; greedy continuation too."""
    weights, ids = random_weights(model), some_ids(80, batch=2)
    a, b = theirs(model, weights), ours(model, weights)
    cuts = (67, 75, *range(76, 80))
    assert difference(in_pieces(a, ids, cuts), in_pieces(b, ids, cuts)) < 1e-5
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(a.generate(ids, **options), b.generate(ids, **options))


def test_longer_context_equals_ours():
    """YaRN, asked for in the same words of both classes."""
    model, weights, ids = NETWORKS["tied"], random_weights(NETWORKS["tied"]), some_ids(70)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 2.0}
    yarn |= {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    decoder = ours(model, weights)
    plain = full(decoder, ids)
    decoder.config.rope_parameters = dict(yarn)
    found = full(theirs(model, weights, rope_parameters=dict(yarn)), ids)
    assert difference(found, full(decoder, ids)) < 1e-5 < 1e-2 < difference(found, plain)


def norms_not_centred(model, weights, ids, monkeypatch):
    monkeypatch.setattr(qwen3_5, "centre", lambda w: (w,))
    return full(theirs(model, weights), ids), full(ours(model, weights), ids)


def rows_by_key_head(model, weights, ids, monkeypatch):
    def ungrouped(rows, groups, sizes):
        return rows.split([groups * size for size in sizes])

    monkeypatch.setattr(qwen3_5.ops, "split_groups", ungrouped)
    found = theirs(model, weights)
    monkeypatch.undo()
    return full(found, ids), full(ours(model, weights), ids)


def test_a_forced_gate_is_noticed():
    """A SiLU gate, exported all the same."""
    silu, weights, ids = qwen(gate="silu"), random_weights(qwen()), some_ids(63)
    found = full(theirs(silu, weights, described_by=NETWORKS["tied"]), ids)
    assert difference(found, full(ours(silu, weights), ids)) > 1e-2


@pytest.mark.parametrize("mistake", [norms_not_centred, rows_by_key_head])
def test_a_wrong_layout_is_noticed(mistake, monkeypatch):
    model = NETWORKS["tied"]
    found, expected = mistake(model, random_weights(model), some_ids(63), monkeypatch)
    assert difference(found, expected) > 1e-2


# ---------------------------------------------------------------- the rules


@networks
def test_rules_round_trip(model):
    """To the bit, but for norm weights below 0.5, which come back within 2^-24; all training tensors, MTP included."""
    weights, rules = random_weights(model), qwen3_5.rules(model)
    exported = {}
    for rule in rules:
        pairs = rule.to_hf(weights.__getitem__)
        assert {name: tuple(tensor.shape) for name, tensor in pairs} == rule.hf_shapes()
        assert not exported.keys() & dict(pairs).keys(), "a tensor is written twice"
        exported |= pairs
    back = dict(pair for rule in rules for pair in rule.from_hf(exported.__getitem__))
    assert back.keys() == weights.keys() == {name for rule in mapping(model) for name in rule.train}
    small = 0
    for name, tensor in weights.items():
        exact = tensor >= 0.5 if "norm" in name else torch.ones_like(tensor, dtype=torch.bool)
        small += int((~exact).sum())
        assert torch.equal(back[name][exact], tensor[exact]), name
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=2**-24)
    assert small > 0


def test_centring_at_every_size():
    """Exact from 0.5 up to 2^23; within 2^-24 from -1."""
    generator = torch.Generator().manual_seed(0)
    large = 2.0 ** torch.empty(10_000).uniform_(-1, 23, generator=generator)
    small = torch.empty(10_000).uniform_(-1, 0.5, generator=generator)
    for weight, tolerance in ((large, 0), (small, 2**-24)):
        (back,) = qwen3_5.uncentre(*qwen3_5.centre(weight))
        assert (back.double() - weight.double()).abs().max() <= tolerance


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(attention=tiny().attention), ["attention.gate: found 'silu'; expected 'sigmoid'"]),
        (dict(gdn=schema.GDN(key_heads=2, value_heads=6, head_dim=8, gate="sigmoid")), ["gdn.gate: found 'sigmoid'"]),
        (dict(pattern="*-GE", moe=tiny().moe), ["1 of 2 FFNs", "sigmoid scores"]),
        (dict(pattern="*-G-/G-"), ["MTP head of `G-`"]),
        (dict(pattern="G-G-"), ["no attention half-block"]),
    ],
)
def test_each_difference_is_named(change, words):
    found = TARGETS["qwen3_5"].check(qwen(**change))
    assert len(found) == 1 and all(word in found[0] for word in words)
    assert "expected" in found[0]


def test_all_differences_are_listed():
    model = tiny(pattern="*EG-/GE", gdn=schema.GDN(key_heads=2, value_heads=6, head_dim=8, gate="sigmoid"))
    assert len(TARGETS["qwen3_5"].check(model)) == 4
    with pytest.raises(BorealError, match="4 problems(?s:.*)attention.gate(?s:.*)gdn.gate(?s:.*)MoE(?s:.*)MTP"):
        qwen3_5.config_dict(model, eos_token_id=0, dtype="fp32")


def test_boreal_takes_everything_with_attention():
    check = TARGETS["boreal"].check
    assert check(tiny()) == check(qwen()) == [] and TARGETS["qwen3_5"].check(qwen()) == []
    assert "no attention half-block" in check(tiny(pattern="G-"))[0]


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_folder_loads_without_code_of_ours(dtype, tmp_path):
    model, ids = NETWORKS["tied"], some_ids(70)
    weights = random_weights(model)
    words = tmp_path / "tokenizer"
    words.mkdir()
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0")).save(str(words / "tokenizer.json"))
    out = tmp_path / "model"
    write_hf(out, model, weights.__getitem__, tokenizer_folder=words, dtype=dtype, eos_token_id=0, target="qwen3_5")
    assert not list(out.glob("*.py")) and "auto_map" not in json.loads((out / "config.json").read_text())
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is Qwen3_5ForCausalLM and not any(report.values()), report
    if dtype == "fp32":
        assert torch.equal(full(loaded, ids), full(theirs(model, weights), ids))
    else:
        assert loaded.dtype == torch.bfloat16
        assert (full(loaded, ids) - full(ours(model, weights), ids)).abs().mean() < 0.1
