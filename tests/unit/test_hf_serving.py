"""The exported decoder as people use it: padded batches, fine-tuning, saving, longer contexts, kernels, compilation."""

import functools
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from boreal_kernels.gated_delta_rule import gated_delta_rule as kernels_rule
from safetensors import safe_open
from transformers import DynamicCache, Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5 import modeling_qwen3_5

from boreal_megatron.convert.hf_code import modeling_boreal
from boreal_megatron.convert.hf_code.configuration_boreal import BorealConfig
from boreal_megatron.convert.hf_code.modeling_boreal import BorealForCausalLM
from boreal_megatron.convert.hf_config import hf_config_dict, model_from_hf
from boreal_megatron.errors import BorealError
from tests.support.decoders import build, difference, full, in_pieces, some_ids
from tests.support.networks import tiny

MODEL = tiny()  # both mixers, dense and MoE
DENSE = tiny(pattern="*-G-", moe=None)
LENGTHS = (130, 65, 17, 3, 1)  # the last two are shorter than the convolution is wide


@pytest.fixture(scope="module")
def decoder():
    return build(MODEL)


def padded(lengths, side):
    """Rows of those lengths alone, and as one batch with its mask; padding is token 7."""
    width = max(lengths)
    rows = [some_ids(n, seed=n) for n in lengths]
    gaps = [(width - n, 0) if side == "left" else (0, width - n) for n in lengths]
    ids = torch.cat([F.pad(row, gap, value=7) for row, gap in zip(rows, gaps, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)])
    return rows, ids, mask


def gradients_of(decoder):
    """Of the parameters that took part; an expert without tokens has none."""
    return {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- padded batches


def test_left_padded_generation(decoder):
    """Greedy ids and the logits of every step are those of each prompt alone."""
    rows, ids, mask = padded(LENGTHS, "left")
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True)
    together = decoder.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = decoder.generate(row, **options)
        assert torch.equal(together.sequences[i, ids.shape[1] :], alone.sequences[0, row.shape[1] :])
        assert difference(torch.stack(together.logits)[:, i], torch.cat(alone.logits)) < 1e-5
    unmasked = decoder.generate(ids, attention_mask=torch.ones_like(mask), **options)
    assert difference(unmasked.logits[0][1:], together.logits[0][1:]) > 1e-2, "padding that nothing notices"


def test_left_padded_beams(decoder):
    """Beams change places between steps, and their caches with them."""
    rows, ids, mask = padded((17, 3), "left")
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=-1)
    together = decoder.generate(ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, ids.shape[1] :], decoder.generate(row, **options)[0, row.shape[1] :])


def test_cache_reorder(decoder):
    ids = some_ids(20, batch=3)
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(ids[:, :15], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        out = decoder(ids[:, 15:], past_key_values=cache).logits
    swapped = torch.cat((ids[[2, 0, 0], :15], ids[:, 15:]), dim=1)
    assert difference(out, full(decoder, swapped)[:, 15:]) < 1e-5


@pytest.mark.parametrize("cuts", [(40,), (40, 69), (55, 57, 60), (2, 68, 69)])
def test_left_padding_across_chunks(decoder, cuts):
    """Several new tokens at once after a cache, with padding in the first chunks and none in the last."""
    rows, ids, mask = padded((70, 20), "left")
    cache, logits = None, []
    for start, end in zip((0, *cuts), (*cuts, 70), strict=True):
        with torch.no_grad():
            out = decoder(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for i, row in enumerate(rows):
        assert difference(logits[i, 70 - row.shape[1] :], full(decoder, row)[0]) < 1e-5


def test_prefill_in_chunks(decoder):
    prompt = some_ids(70, batch=2)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    chunked = decoder.generate(prompt, prefill_chunk_size=13, **options)
    assert torch.equal(chunked, decoder.generate(prompt, **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_training(side):
    """The loss of a padded batch is that of its rows, and so is every gradient, whatever the padding is."""
    rows, ids, mask = padded(LENGTHS, side)
    decoder = build(MODEL).train()
    before = F.pad(mask, (1, -1))  # a row's first token has nothing to be predicted from
    labels = ids.masked_fill(mask * before == 0, -100)
    decoder(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss.backward()
    found = gradients_of(decoder)
    decoder.zero_grad()
    for row in rows[:-1]:  # the last has nothing to predict
        decoder(row, labels=row, num_items_in_batch=1).loss.backward()
    for name, grad in gradients_of(decoder).items():
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name

    poisoned = ids.where(mask == 1, 23)
    real = mask == 1
    # Other padding goes to other experts, whose products then have other numbers of rows, and may round otherwise.
    assert difference(*(full(decoder, x, attention_mask=mask)[real] for x in (ids, poisoned))) < 1e-6
    if side == "left":
        assert difference(*(full(decoder, x)[real] for x in (ids, poisoned))) > 1e-2, "padding that nothing notices"


def test_refuses_padding_after_tokens_in_a_cache(decoder):
    _, ids, mask = padded((9, 5), "right")
    with torch.no_grad():
        cache = decoder(ids, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="padding_side = 'left'"):
            decoder(ids[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Same gradients to the bit, from layers that really run twice; no cache is written by either run."""
    decoder = build(MODEL).train()
    _, ids, mask = padded((70, 20), "left")
    labels = ids.masked_fill(mask == 0, -100)
    runs = []
    decoder.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def step():
        decoder.zero_grad()
        out = decoder(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        return out, gradients_of(decoder)

    _, expected = step()
    assert len(runs) == 1
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    out, found = step()
    assert len(runs) == 3 and out.past_key_values is None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    decoder.eval()
    with torch.no_grad():
        assert decoder(ids, attention_mask=mask).past_key_values.get_seq_length() == 70


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied, tmp_path):
    decoder = build(tiny(tie_embeddings=tied))
    decoder.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    again = BorealForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    expected, found = decoder.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ids = some_ids(9)
    assert torch.equal(full(again, ids), full(decoder, ids))


# ---------------------------------------------------------------- rotary positions

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32768}
YARNS = {
    "defaults": YARN,
    "everything": YARN | {"beta_fast": 24, "beta_slow": 2, "attention_factor": 1.5, "rope_theta": 5e5}
    | {"partial_rotary_factor": 0.5},
}  # fmt: skip


def boreal_config(**changes):
    """A configuration with the attention heads of the BOREAL presets: 64 rotated dimensions of 256, base 1e7."""
    heads = dict(head_dim=256, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=262144)
    return BorealConfig(**heads, **changes)


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
def test_yarn_is_that_of_transformers(yarn, field):
    """Frequencies and attention factor, against transformers' own function over a Qwen3-Next configuration."""
    config = boreal_config(**{field: dict(yarn)})
    theirs = Qwen3NextConfig(
        head_dim=256, max_position_embeddings=262144, rope_parameters={"rope_theta": 1e7} | yarn
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    positions = torch.tensor([[0, 1, 77, 40000]])
    angles = positions[0, :, None] * frequencies
    for found, function in zip(modeling_boreal.rotary_tables(config, positions), (torch.cos, torch.sin), strict=True):
        assert torch.equal(found[0, 0], factor * function(torch.cat((angles, angles), dim=-1)))


def test_yarn_of_the_presets():
    """Pairs 0..10 of 32 keep their frequency, 17..31 turn 8 times slower, and cos and sin grow by 1 + 0.1 ln 8."""
    (_, plain), (cos, scaled) = (
        modeling_boreal.rotary_tables(boreal_config(**extra), torch.tensor([[0, 1]]))
        for extra in ({}, {"rope_parameters": dict(YARN)})
    )
    factor = cos[0, 0, 0, 0]
    assert cos.shape[-1] == 64 and abs(factor - 1.2079) < 1e-4
    plain, scaled = plain[0, 0, 1, :32].asin(), (scaled[0, 0, 1, :32] / factor).asin()
    torch.testing.assert_close(scaled[:11], plain[:11], rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled[17:], plain[17:] / 8, rtol=1e-5, atol=0)
    assert (scaled[11:17] < 0.99 * plain[11:17]).all() and (scaled[11:17] > 1.01 * plain[11:17] / 8).all()


def test_unscaled_positions_are_unchanged():
    """To the bit what exports without YaRN have always computed, from both spellings of the configuration."""
    positions = torch.tensor([[0, 1, 77, 40000]])
    angles = positions[0, :, None].float() * 1e6 ** -(torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    spellings = (
        dict(rope_theta=1e6, partial_rotary_factor=0.5),
        dict(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        dict(rope_parameters={"rope_type": "default"}, rope_theta=1e6, partial_rotary_factor=0.5),
    )
    for spelling in spellings:
        config = boreal_config(**spelling)
        cos, _ = modeling_boreal.rotary_tables(config, positions)
        assert torch.equal(cos[0, 0], torch.cat((angles, angles), dim=-1).cos())
        assert (config.rope_theta, config.partial_rotary_factor) == (1e6, 0.5)


def test_yarn_of_a_saved_model(decoder, tmp_path):
    """Asked for when loading, without repeating base and share; kept when saved; not taken for a trained network."""
    decoder.save_pretrained(tmp_path / "plain")
    longer = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    loaded = BorealForCausalLM.from_pretrained(tmp_path / "plain", rope_parameters=longer)
    assert loaded.config.rope_parameters == longer | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ids = some_ids(40)
    assert difference(full(loaded, ids), full(decoder, ids)) > 1e-2
    loaded.save_pretrained(tmp_path / "yarn")
    again = BorealForCausalLM.from_pretrained(tmp_path / "yarn")
    assert torch.equal(full(again, ids), full(loaded, ids))
    with pytest.raises(BorealError, match="rope_type 'yarn'"):
        model_from_hf(json.loads((tmp_path / "yarn/config.json").read_text()))


def test_rope_in_config_json():
    """In the field of transformers 5 and in those from before it; a folder with only the older ones still loads."""
    config = hf_config_dict(MODEL, eos_token_id=0, dtype="fp32")
    expected = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert config["rope_parameters"] == {"rope_type": "default"} | expected
    assert config.items() >= expected.items()
    old = {name: value for name, value in config.items() if name != "rope_parameters"}
    assert BorealConfig(**old).rope_parameters == config["rope_parameters"]
    assert model_from_hf(old) == model_from_hf(config)


def test_other_scalings_are_refused():
    with pytest.raises(ValueError, match="'linear'; expected 'default' or 'yarn'"):
        modeling_boreal.BorealModel(boreal_config(rope_parameters={"rope_type": "linear", "factor": 2.0}))


# ---------------------------------------------------------------- implementations of the delta rule


def kernels(monkeypatch):
    """boreal_kernels through the adapter, in plain torch."""
    on_cpu = functools.partial(modeling_boreal.boreal_kernels_delta_rule, backend="torch")
    monkeypatch.setitem(modeling_boreal.DELTA_RULES, "boreal_kernels", on_cpu)


def flash(monkeypatch):
    """The torch functions that transformers holds to the signature of flash-linear-attention, in its place."""
    package = types.ModuleType("fla.ops.gated_delta_rule")
    package.chunk_gated_delta_rule = modeling_qwen3_5.torch_chunk_gated_delta_rule
    package.fused_recurrent_gated_delta_rule = modeling_qwen3_5.torch_recurrent_gated_delta_rule
    monkeypatch.setitem(sys.modules, package.__name__, package)


RULES = pytest.mark.parametrize("name, install", [("boreal_kernels", kernels), ("fla", flash)])


@RULES
@pytest.mark.parametrize("length", [1, 65])
def test_delta_rules_agree(name, install, length, monkeypatch):
    """Outputs, last states and all gradients of an adapter, against the torch rule; r = 3, odd sizes, a given state."""
    install(monkeypatch)
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 2, 8)] * 2 + [(2, length, 6, 5)] + [(2, length, 6)] * 2 + [(6,)] * 2 + [(2, 6, 8, 5)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = [torch.randn(shape, generator=generator) for shape in (shapes[2], shapes[-1])]
    found = {}
    for rule in ("torch", name):
        out, state = modeling_boreal.DELTA_RULES[rule](*inputs)
        loss = (out * weights[0]).sum() + (state * weights[1]).sum()
        found[rule] = [out, state, *torch.autograd.grad(loss, inputs)]
    for ours, expected in zip(found[name], found["torch"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@RULES
def test_decoder_runs_on_another_rule(name, install, monkeypatch):
    """Prefill, several tokens at once and single steps through an adapter, from `rules` of each layer."""
    install(monkeypatch)
    decoder, ids = build(MODEL), some_ids(80, batch=2)
    expected = full(decoder, ids)
    used = []
    rule = modeling_boreal.DELTA_RULES[name]
    monkeypatch.setitem(modeling_boreal.DELTA_RULES, name, lambda *args: used.append(args[0].shape[1]) or rule(*args))
    for module in decoder.modules():
        if isinstance(module, modeling_boreal.BorealGatedDeltaNet):
            module.rules["cpu"] = name
    assert difference(in_pieces(decoder, ids, (70, 77, 78, 79)), expected) < 1e-5
    assert used == [70, 70, 7, 7, 1, 1, 1, 1, 1, 1]


def test_choice_of_rule(monkeypatch):
    """Torch without CUDA; with it, flash-linear-attention where boreal_kernels has nothing faster than torch."""
    choose = functools.partial(modeling_boreal.fastest_delta_rule.__wrapped__, 128)
    assert torch.cuda.is_available() or choose() == "torch"
    assert build(DENSE).model.layers[1].linear_attn.rules == {"cuda": choose()}
    found = sys.modules["boreal_kernels.backend"]

    def kernels_choose(name):
        choice = found.Choice("gated_delta_rule", name, "said by a test")
        monkeypatch.setattr(found, "choose", lambda *args, **kwargs: choice)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    kernels_choose("torch")
    assert choose() == "torch"
    flash(monkeypatch)
    assert choose() == "fla"
    kernels_choose("triton")
    assert choose() == "boreal_kernels"
    assert kernels_rule is sys.modules["boreal_kernels.gated_delta_rule"].gated_delta_rule


# ---------------------------------------------------------------- compilation


@pytest.mark.parametrize("model, lengths", [(DENSE, (70, 70)), (tiny(pattern="*EG-"), (20, 7))], ids=["dense", "MoE"])
def test_compiles_as_one_graph(model, lengths):
    """Logits and gradients of a whole-graph compilation: over two chunks, and with a mask, which no graph looks into.

    The graph holds the experts that no token chose, too: their gradients are zeros, where there are none otherwise.
    """
    torch._dynamo.reset()
    decoder = build(model)
    for name, bias in decoder.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            bias[0] = -100.0  # nobody chooses this expert
    _, ids, mask = padded(lengths, "left")
    options = dict(labels=ids, use_cache=False, attention_mask=None if mask.all() else mask)

    def run(forward):
        decoder.zero_grad()
        out = forward(ids, **options)
        out.loss.backward()
        return out.logits.detach()[mask == 1], gradients_of(decoder)

    (logits, grads) = run(decoder)
    with torch.compiler.set_stance("default"):  # the CPU platform, where another test has installed it, asks for eager
        found, found_grads = run(torch.compile(decoder, fullgraph=True, backend="eager"))
    assert difference(found, logits) < 1e-6
    for name, grad in found_grads.items():
        expected = grads.get(name, torch.zeros_like(grad))
        assert (grad - expected).norm() <= 1e-5 * expected.norm(), name
    assert (len(found_grads) > len(grads)) is (model is not DENSE), "an expert without tokens is what MoE is here for"
    torch._dynamo.reset()
