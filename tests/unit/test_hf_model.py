"""The exported decoder: against a slow reference, against itself with a cache, and loaded where this package is not.

The reference below reads canonical training tensors, goes token by token in float64 and shares no code with the
modelling file or the mapping; what it agrees with is therefore the layout and the equations at once.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import DynamicCache, StaticCache

from boreal_megatron.config import schema
from boreal_megatron.config.pattern import expand
from boreal_megatron.convert.hf import build_hf, write_hf
from boreal_megatron.convert.hf_code import modeling_boreal
from boreal_megatron.convert.hf_config import model_from_hf
from boreal_megatron.convert.mapping import FP32_ENDINGS, keeps_fp32
from boreal_megatron.errors import BorealError
from tests.support.decoders import build, difference, full, in_pieces, some_ids
from tests.support.networks import random_weights, tiny

MODEL = tiny()
OTHER = tiny(  # the other gates, an untied head, another conv width, every rotated dimension, r = 1 in attention
    pattern="*EG-",
    tie_embeddings=False,
    attention=schema.Attention(heads=2, kv_heads=2, head_dim=8, gate="sigmoid", rope_fraction=1.0, rope_theta=100.0),
    gdn=schema.GDN(key_heads=3, value_heads=6, head_dim=8, conv_width=2, gate="sigmoid"),
)
LENGTHS = (1, 63, 64, 65, 130)


# ---------------------------------------------------------------- the slow reference


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


ACTIVATIONS = {"silu": silu, "sigmoid": sigmoid}


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rope(x, position, rope_dim, theta):
    x, half = x.clone(), rope_dim // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / rope_dim)
        a, b = x[i].item(), x[i + half].item()
        x[i] = a * math.cos(angle) - b * math.sin(angle)
        x[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return x


def attention(model, w, x, position, memory):
    """w: this mixer's tensors. memory: for each kv head, the (k, v) of all positions so far."""
    c = model.attention
    d, r = c.head_dim, c.heads // c.kv_heads
    rows = (w["linear_qkv.weight"] @ x).split(d)
    outputs = []
    for group in range(c.kv_heads):
        mine = rows[group * (2 * r + 2) : (group + 1) * (2 * r + 2)]
        queries, gates, k, v = mine[:r], mine[r : 2 * r], mine[2 * r], mine[2 * r + 1]
        k = rope(rms_norm(k, w["k_layernorm.weight"], model.norm_eps), position, c.rope_dim(), c.rope_theta)
        memory.setdefault(group, []).append((k, v))
        for q, gate in zip(queries, gates, strict=True):
            q = rope(rms_norm(q, w["q_layernorm.weight"], model.norm_eps), position, c.rope_dim(), c.rope_theta)
            weights = torch.exp(torch.stack([(q @ k) / math.sqrt(d) for k, _ in memory[group]]))
            out = sum(p * v for p, (_, v) in zip(weights / weights.sum(), memory[group], strict=True))
            outputs.append(out * ACTIVATIONS[c.gate](gate))
    return w["linear_proj.weight"] @ torch.cat(outputs)


def gated_deltanet(model, w, x, memory):
    """memory: "inputs", the last conv inputs; and for each value head its state [dk, dv]."""
    c = model.gdn
    d, r = c.head_dim, c.value_heads // c.key_heads
    group_rows, group_channels = (2 + 2 * r) * d + 2 * r, (2 + r) * d
    projected = (w["in_proj.weight"] @ x).split(group_rows)

    inputs = memory.setdefault("inputs", [torch.zeros(c.key_heads * group_channels, dtype=x.dtype)] * c.conv_width)
    inputs.append(torch.cat([rows[:group_channels] for rows in projected]))
    recent = torch.stack(inputs[-c.conv_width :], dim=1)  # oldest first
    mixed = silu((recent * w["conv1d.weight"]).sum(1)).split(group_channels)

    outputs = []
    for group in range(c.key_heads):
        q, k = mixed[group][:d], mixed[group][d : 2 * d]
        q = q / torch.sqrt(q @ q + 1e-6) / math.sqrt(d)
        k = k / torch.sqrt(k @ k + 1e-6)
        z = projected[group][group_channels : group_channels + r * d]
        b, a = projected[group][-2 * r : -r], projected[group][-r:]
        for i in range(r):
            head = group * r + i
            v = mixed[group][(2 + i) * d : (3 + i) * d]
            decay = torch.exp(-torch.exp(w["A_log"][head]) * torch.log1p(torch.exp(a[i] + w["dt_bias"][head])))
            state = decay * memory.get(head, torch.zeros(d, d, dtype=x.dtype))
            state = state + torch.outer(k, sigmoid(b[i]) * (v - state.T @ k))
            memory[head] = state
            normed = rms_norm(state.T @ q, w["out_norm.weight"], model.norm_eps)
            outputs.append(normed * ACTIVATIONS[c.gate](z[i * d : (i + 1) * d]))
    return w["out_proj.weight"] @ torch.cat(outputs)


def swiglu(fc1, fc2, x):
    gate, up = fc1[: len(fc1) // 2] @ x, fc1[len(fc1) // 2 :] @ x
    return fc2 @ (silu(gate) * up)


def moe(model, w, x):
    scores = sigmoid(w["router.weight"] @ x)
    biased = scores + w["router.expert_bias"]
    chosen = sorted(range(len(biased)), key=lambda e: -biased[e])[: model.moe.top_k]
    out = swiglu(w["shared_experts.linear_fc1.weight"], w["shared_experts.linear_fc2.weight"], x)
    for e in chosen:
        expert = swiglu(w["experts.experts.linear_fc1.weight"][e], w["experts.experts.linear_fc2.weight"][e], x)
        out = out + model.moe.route_scale * scores[e] / sum(scores[c] for c in chosen) * expert
    return out


def reference_logits(model, weights, ids):
    """[T] ids -> [T, vocab] float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def under(prefix):
        return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}

    letters = expand(model.pattern)[0]
    halves = [under(f"decoder.layers.{j}.") for j in range(len(letters))]
    mixers = [under(f"decoder.layers.{j}.self_attention.") for j in range(len(letters))]
    ffns = [under(f"decoder.layers.{j}.mlp.") for j in range(len(letters))]
    memories = [{} for _ in letters]
    embedding = weights["embedding.word_embeddings.weight"]
    head = embedding if model.tie_embeddings else weights["output_layer.weight"]
    logits = []
    for position, token in enumerate(ids.tolist()):
        x = embedding[token]
        for j, letter in enumerate(letters):
            norm = "input_layernorm.weight" if letter in "*G" else "pre_mlp_layernorm.weight"
            normed = rms_norm(x, halves[j][norm], model.norm_eps)
            if letter == "*":
                x = x + attention(model, mixers[j], normed, position, memories[j])
            elif letter == "G":
                x = x + gated_deltanet(model, mixers[j], normed, memories[j])
            elif letter == "-":
                x = x + swiglu(ffns[j]["linear_fc1.weight"], ffns[j]["linear_fc2.weight"], normed)
            else:
                x = x + moe(model, ffns[j], normed)
        logits.append(head @ rms_norm(x, weights["decoder.final_norm.weight"], model.norm_eps))
    return torch.stack(logits)


@pytest.fixture(scope="module")
def decoder():
    return build(MODEL)


@pytest.fixture(scope="module")
def reference():
    """The reference's logits over 40 tokens."""
    ids = some_ids(40)
    return ids, reference_logits(MODEL, random_weights(MODEL), ids[0])


# ---------------------------------------------------------------- the equations


@pytest.mark.parametrize("model", [MODEL, OTHER], ids=["tied", "untied"])
def test_equals_the_reference(model):
    weights = random_weights(model)
    ids = some_ids(70)
    expected = reference_logits(model, weights, ids[0])
    assert expected.std() > 0.3, "logits this flat would agree with anything"
    assert difference(full(build(model), ids)[0], expected) < 1e-4


def without_correction(q, k, v, g, beta, state):
    """Gated linear attention, which the delta rule is often taken for."""
    outputs = []
    for t in range(q.shape[2]):
        write = k[:, :, t, :, None] * (beta[:, :, t, None] * v[:, :, t])[:, :, None]
        state = state * g[:, :, t, None, None].exp() + write
        outputs.append((q[:, :, t, None] @ state))
    return torch.cat(outputs, dim=2), state


def conv_reversed(decoder, patch):
    conv = decoder.model.layers[1].linear_attn.conv1d
    conv.weight.data = conv.weight.data.flip(-1)


def unbiased_choice(decoder, patch):
    for n in (2, 3):
        decoder.model.layers[n].mlp.gate.e_score_correction_bias.zero_()


def tiled_key_heads(decoder, patch):
    patch.setattr(torch.Tensor, "repeat_interleave", lambda x, r, dim: torch.cat([x] * r, dim=dim))


MISTAKES = {
    "key heads tiled over value heads": tiled_key_heads,
    "attention gate missing": lambda m, p: setattr(m.model.layers[0].self_attn, "gate", torch.ones_like),
    "attention gate sigmoid for silu": lambda m, p: setattr(m.model.layers[0].self_attn, "gate", torch.sigmoid),
    "DeltaNet gate missing": lambda m, p: setattr(m.model.layers[1].linear_attn.norm, "gate", torch.ones_like),
    "no error correction": lambda m, p: p.setattr(modeling_boreal, "gated_delta_chunks", without_correction),
    "keys not normalised": lambda m, p: p.setattr(modeling_boreal, "unit_length", lambda x: x),
    "no RoPE": lambda m, p: p.setattr(modeling_boreal, "rotate", lambda x, cos, sin: x),
    "convolution reversed": conv_reversed,
    "bias left out of the choice of experts": unbiased_choice,
    "routed scale forgotten": lambda m, p: setattr(m.model.layers[2].mlp.gate, "scale", 1.0),
    "query norm forgotten": lambda m, p: setattr(m.model.layers[0].self_attn.q_norm, "forward", lambda x: x),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_reference_notices(mistake, decoder, reference, monkeypatch):
    """Each usual mistake moves the logits far beyond the tolerance, so agreement with the reference means something."""
    ids, expected = reference
    assert difference(full(decoder, ids)[0], expected) < 1e-4
    wrong = copy.deepcopy(decoder)
    mistake(wrong, monkeypatch)
    assert difference(full(wrong, ids)[0], expected) > 1e-2


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_steps(length):
    """The chunkwise rule against its recurrence, with decays from none to total, entering state included."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))
    q, k = modeling_boreal.unit_length(q), modeling_boreal.unit_length(k)
    g = -torch.exp(4 * torch.randn(2, 3, length, generator=generator))
    beta = torch.rand(2, 3, length, generator=generator)
    state = torch.randn(2, 3, 8, 8, generator=generator)
    out, last = modeling_boreal.gated_delta_chunks(q, k, v, g, beta, state)
    steps = []
    for t in range(length):
        step, state = modeling_boreal.gated_delta_step(*(x[:, :, t : t + 1] for x in (q, k, v, g, beta)), state)
        steps.append(step)
    torch.testing.assert_close(out, torch.cat(steps, dim=2), rtol=0, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the cache


def test_stepwise_equals_full(decoder):
    """Token by token through the cache, against passes of a token, a chunk, and a little more or less than that."""
    ids = some_ids(LENGTHS[-1], batch=2)
    steps = in_pieces(decoder, ids, range(1, ids.shape[1]))
    for length in LENGTHS:
        assert difference(steps[:, :length], full(decoder, ids[:, :length])) < 1e-5


@pytest.mark.parametrize("cuts", [(1, 2, 62), (64, 66), (3, 65, 100, 129), (130 - 64,)])
def test_chunked_prefill_equals_full(decoder, cuts):
    ids = some_ids(130, batch=2)
    assert difference(in_pieces(decoder, ids, cuts), full(decoder, ids)) < 1e-5


def test_states_are_fp32():
    """A bf16 decoder keeps its DeltaNet state in FP32."""
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(MODEL).items()}
    decoder = build_hf(MODEL, weights.__getitem__, eos_token_id=0)
    with torch.no_grad():
        out = decoder(some_ids(9), use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert out.past_key_values.layers[1].recurrent_states[0].dtype == torch.float32
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_greedy_equals_argmax_loop(decoder):
    prompt = some_ids(66, batch=2)
    ids = prompt
    for _ in range(12):
        ids = torch.cat((ids, full(decoder, ids)[:, -1:].argmax(-1)), dim=1)
    generated = decoder.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(generated, ids)


def test_sampling_and_beams(decoder):
    prompt = some_ids(5)
    torch.manual_seed(0)
    several = decoder.generate(
        prompt, max_new_tokens=6, do_sample=True, temperature=5.0, num_return_sequences=3, eos_token_id=-1
    )
    assert several.shape == (3, 11) and len({tuple(row) for row in several.tolist()}) > 1
    with_cache, without = (
        decoder.generate(prompt, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=use, eos_token_id=-1)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_generation_stops_at_eos(decoder):
    prompt = some_ids(5)
    free = decoder.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)[0, 5:].tolist()
    stopped = decoder.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=free[2])[0, 5:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_refuses_what_it_cannot_do(decoder):
    static = StaticCache(config=decoder.config, max_cache_len=16)
    for cache in (static, DynamicCache()):
        with pytest.raises(ValueError, match="cache that grows"):
            decoder(some_ids(5), past_key_values=cache)
    with pytest.raises(ValueError, match="cache that grows"):
        decoder.generate(some_ids(5), max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="attention_mask"):
        decoder(some_ids(5), attention_mask=torch.ones(1, 4))


def test_loss_and_optional_outputs(decoder):
    ids = some_ids(9, batch=2)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        out = decoder(ids, labels=labels, output_hidden_states=True)
        last = decoder(ids, logits_to_keep=1).logits
        loss, *_ = decoder(ids, labels=labels, return_dict=False)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(out.loss - expected) < 1e-6 and torch.equal(loss, out.loss)
    assert last.shape == (2, 1, MODEL.vocab_size)
    assert difference(last, out.logits[:, -1:]) < 1e-6  # a product of fewer rows may round otherwise
    assert len(out.hidden_states) == 5  # the embedding and four layers
    assert difference(decoder.lm_head(out.hidden_states[-1]), out.logits) < 1e-6


def test_every_weight_gets_a_gradient():
    decoder = build(MODEL)
    for layer in decoder.model.layers[2:]:
        layer.mlp.gate.e_score_correction_bias.zero_()  # which keeps an expert from every token
    ids = some_ids(100, batch=4)
    decoder(ids, labels=ids).loss.backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# ---------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "notes.txt").write_text("not part of a tokenizer")
    return folder


def export(folder, tokenizer_folder, model=MODEL, **changes):
    options = dict(tokenizer_folder=tokenizer_folder, dtype="fp32", eos_token_id=0) | changes
    write_hf(folder, model, random_weights(model).__getitem__, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    return export(tmp_path_factory.mktemp("exports") / "fp32", tokenizer_folder, max_shard_bytes=60_000)


STRANGER = """
import json, sys
sys.path = [p for p in sys.path if p]  # not the current folder

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("boreal_megatron", "boreal_kernels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
try:
    import boreal_megatron
    raise SystemExit("boreal_megatron is visible here")
except ModuleNotFoundError:
    pass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, ids, result = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), sys.argv[3]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(ids).logits
    hidden = body(ids).last_hidden_state
torch.save({
    "logits": logits,
    "from_body": model.lm_head(hidden).detach(),
    "generated": model.generate(ids, max_new_tokens=6, do_sample=False),
    "eos": model.generation_config.eos_token_id,
    "report": {name: sorted(map(str, found)) for name, found in report.items()},
    "config": config.to_dict(),
    "dtypes": {name: str(tensor.dtype) for name, tensor in half.state_dict().items()},
    "half_logits": half(ids).logits.detach(),
    "word": AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(7),
    "modules": sorted(m for m in sys.modules if m.startswith("boreal")),
}, result)
"""


def test_loads_without_this_package(folder, decoder, tmp_path):
    """A fresh process that cannot import boreal_megatron loads the folder through the Auto classes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    ids = some_ids(70)
    command = [sys.executable, "-c", STRANGER, str(folder), json.dumps(ids[0].tolist()), str(tmp_path / "result")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "newly initialized" not in run.stderr and "mtp" not in run.stderr, run.stderr
    found = torch.load(tmp_path / "result")

    assert found["modules"] == []
    assert difference(found["logits"], full(decoder, ids)) < 1e-6
    assert difference(found["from_body"], found["logits"]) < 1e-6
    assert torch.equal(found["generated"], decoder.generate(ids, max_new_tokens=6, do_sample=False))
    assert not any(found["report"].values()), found["report"]
    assert found["eos"] == 0 and found["word"] == "w7"
    assert [kind[:4] for kind in found["config"]["layer_types"]] == ["full", "line", "line", "full"]
    wrong = {n: d for n, d in found["dtypes"].items() if d != ("torch.float32" if keeps_fp32(n) else "torch.bfloat16")}
    assert wrong == {}
    assert (found["half_logits"] - found["logits"]).abs().median() < 0.05  # a router may flip in bf16


def test_files_of_an_export(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*files, "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json"]
        + ["tokenizer_config.json", "configuration_boreal.py", "modeling_boreal.py"]
    )
    stored, total = {}, 0
    for file in files:
        assert (folder / file).stat().st_size < 60_000 + 20_000  # tensors and the header that names them
        with safe_open(folder / file, "pt") as content:
            for name in content.keys():
                assert index["weight_map"][name] == file
                stored[name] = content.get_tensor(name)
                total += stored[name].nbytes
    assert stored.keys() == index["weight_map"].keys() and index["metadata"]["total_size"] == total
    assert "mtp.fc.weight" in stored and "lm_head.weight" not in stored


def test_bf16_export_keeps_fp32_tensors(tmp_path, tokenizer_folder):
    folder = export(tmp_path / "bf16", tokenizer_folder, dtype="bf16")
    with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as content:
        for name in content.keys():
            assert content.get_tensor(name).dtype == (torch.float32 if keeps_fp32(name) else torch.bfloat16), name
    loaded = modeling_boreal.BorealForCausalLM.from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if keeps_fp32(name) else torch.bfloat16), name
    assert set(FP32_ENDINGS) == set(modeling_boreal.BorealForCausalLM._keep_in_fp32_modules_strict)


def test_saved_again_it_is_the_same(folder, tmp_path, decoder):
    """save_pretrained after from_pretrained changes no weight of the decoder, tied head included."""
    modeling_boreal.BorealForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    again = modeling_boreal.BorealForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    expected = decoder.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert model_from_hf(json.loads((tmp_path / "config.json").read_text())) == MODEL


def test_untied_head_survives(tmp_path, tokenizer_folder):
    folder = export(tmp_path / "untied", tokenizer_folder, model=OTHER)
    loaded = modeling_boreal.BorealForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, random_weights(OTHER)["output_layer.weight"])
    assert difference(full(loaded, some_ids(9)), full(build(OTHER), some_ids(9))) < 1e-6


def test_fresh_weights_are_sensible():
    """A model made from its configuration alone: small logits, decays that neither forget at once nor never."""
    torch.manual_seed(0)
    decoder = modeling_boreal.BorealForCausalLM(build(MODEL).config)
    layer = decoder.model.layers[1].linear_attn
    decay = torch.exp(-layer.A_log.exp() * F.softplus(layer.dt_bias))
    assert ((decay > 0.1) & (decay < 1)).all()
    assert full(decoder, some_ids(9)).isfinite().all()
    assert 0.01 < decoder.model.layers[2].mlp.gate.weight.std() < 0.03


def test_replaces_an_export_and_nothing_else(tmp_path, tokenizer_folder):
    target = tmp_path / "model"
    export(target, tokenizer_folder, model=OTHER)
    counts = []
    export(target, tokenizer_folder, progress=lambda done, total: counts.append((done, total)))
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 4
    assert [done for done, _ in counts] == list(range(1, len(counts) + 1)) and counts[-1][0] == counts[-1][1]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(BorealError, match="not an export"):
        export(precious, tokenizer_folder)
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]


def test_failure_leaves_the_old_export(tmp_path, tokenizer_folder):
    target = export(tmp_path / "model", tokenizer_folder)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    weights = random_weights(MODEL)

    def broken(name):
        if name == "decoder.final_norm.weight":
            raise OSError("storage went away")
        return weights[name]

    with pytest.raises(OSError, match="storage"):
        write_hf(target, MODEL, broken, tokenizer_folder=tokenizer_folder, dtype="fp32", eos_token_id=0)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_missing_tokenizer_is_found_before_writing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BorealError, match="tokenizer folder"):
        export(tmp_path / "model", tmp_path / "empty")
    assert not (tmp_path / "model").exists()


def test_modelling_files_import_nothing_of_ours():
    for name in ("configuration_boreal.py", "modeling_boreal.py"):
        text = (Path(modeling_boreal.__file__).parent / name).read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n") and "megatron" not in text
