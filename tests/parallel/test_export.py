"""From a checkpoint of any layout to one and the same Hugging Face folder, which computes what was trained."""

import contextlib
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boreal_megatron.cli import main
from boreal_megatron.config.load import load
from boreal_megatron.convert import ops
from boreal_megatron.convert.export import export
from boreal_megatron.convert.mapping import mapping, training_shapes
from boreal_megatron.errors import BorealError
from boreal_megatron.train import loop, store
from safetensors import safe_open
from tests.support.launch import MODEL, ROOT, environment, write_config
from tests.support.networks import tiny
from tests.support.unstarted import checkpoint, constant

VOCABULARY = 700  # 60 more than the tokenizer has, 68 fewer than the network's rows
TP, PP, EP = "parallel.tensor=2 parallel.sequence_parallel=true", "parallel.pipeline=2", "parallel.expert=2"
LAYOUTS = {
    2: [TP, PP, EP],
    4: [f"{TP} {PP} {EP}"],
}
MORE_LAYOUTS = {
    1: ["optimizer.distributed=false"],
    2: [
        "", "optimizer.distributed=false", f"{PP} parallel.virtual_pipeline=2 parallel.pipeline_layers=[0,1,1,1]",
        "parallel.context=2", "parallel.expert_tensor=2",
    ],
    4: [f"{TP} {PP}", f"{TP} parallel.context=2", "parallel.pipeline=4 parallel.pipeline_layers=[0,1,2,0]"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(corpus, mesh, tmp_path_factory):
    """Trained 5 steps in this process; the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder / "config.yaml", corpus, folder / "run", model=MODEL | {"vocab_size": VOCABULARY})
    loop.train(load([config]), world=1)
    return folder / "run"


def resharded(run, folder, layouts):
    """The checkpoint saved under every layout: {words: its folder}."""
    made, plan = {}, []
    for world, words in layouts.items():
        cases = [(str(run), str(folder / f"{world}-{n}"), word.split()) for n, word in enumerate(words)]
        made |= {f"{world} processes, {word}": Path(case[1]) for word, case in zip(words, cases, strict=True)}
        plan.append({"world": world, "cases": cases})
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.reshard_worker", str(file)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return made


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def layouts(run, tmp_path_factory):
    return resharded(run, tmp_path_factory.mktemp("layouts"), LAYOUTS)


@pytest.fixture(scope="module")
def exported(layouts, tmp_path_factory):
    """Of the checkpoint that two pipeline stages saved."""
    out = tmp_path_factory.mktemp("hf") / "model"
    (path,) = (path for words, path in layouts.items() if words.endswith(f", {PP}"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export", str(path), str(out), "--check", "--json"]) == 0
    return out, json.loads(said.getvalue())


def assert_same_bytes(run, checkpoints, folder):
    for dtype in ("fp32", "bf16"):
        export(run, folder / dtype, dtype=dtype, max_shard_bytes=200_000)
        expected = contents(folder / dtype)
        assert sum(name.endswith(".safetensors") for name in expected) > 2
        for words, path in checkpoints.items():
            assert len(list(store.resolve(path).glob("*.distcp"))) == int(words.split()[0])
            export(path, folder / "other", dtype=dtype, max_shard_bytes=200_000)
            assert contents(folder / "other") == expected, (dtype, words)


def test_every_layout_gives_the_same_bytes(run, layouts, tmp_path):
    assert_same_bytes(run, layouts, tmp_path)


@pytest.mark.slow
def test_more_layouts_give_the_same_bytes(run, tmp_path):
    assert_same_bytes(run, resharded(run, tmp_path, MORE_LAYOUTS), tmp_path)


def test_padding_is_dropped_and_mtp_is_kept(exported):
    out, found = exported
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    assert sum(name.startswith("mtp.") for name in names) == 15
    with safe_open(out / names["model.embed_tokens.weight"], "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [VOCABULARY, 64]
    assert found["notes"] == ["60 of the 700 vocabulary rows belong to no token of the tokenizer"]
    assert {p.name for p in out.iterdir()} >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "configuration_boreal.py", "modeling_boreal.py", "export_report.json", "export_report.md",
    }  # fmt: skip


def test_the_report_compares_every_layer(exported):
    out, found = exported
    report = json.loads((out / "export_report.json").read_text())
    assert report == found["report"] and report["agrees"] and not report["disagreements"]
    assert list(report["measured"]) == ["embedding", "layer 0", "layer 1", "layer 2", "logits", "cached decoding"]
    assert report["positions"] >= 130
    assert all(0 < d["largest"] and d["max_difference"] < 1e-5 * d["largest"] for d in report["measured"].values())
    generation = report["generation"]
    assert generation["agrees"] and generation["equal_tokens"] == generation["tokens"] == len(generation["ids"]) > 0
    assert report["checkpoint"]["step"] == 5 and len(report["checkpoint"]["manifest_sha256"]) == 64
    text = (out / "export_report.md").read_text()
    assert "They agree." in text and "| layer 2 |" in text and str(Path(found["checkpoint"]).parent) not in text


@pytest.mark.slow
@pytest.mark.parametrize("target", ["boreal", "qwen3_5"])
def test_bf16_agrees_with_weights_rounded_alike(corpus, mesh, tmp_path, target):
    model = MODEL | {"pattern": "*-G- / *-", "attention": MODEL["attention"] | {"gate": "sigmoid"}}
    config = write_config(tmp_path / "config.yaml", corpus, tmp_path / "run", model=model)
    loop.train(load([config]), world=1)
    report = export(tmp_path / "run", tmp_path / "hf", dtype="bf16", target=target, prove=True)["report"]
    assert all(d["max_difference"] < 1e-5 * d["largest"] for d in report["measured"].values())


@pytest.mark.slow
def test_a_disagreement_is_found_and_the_folder_gets_another_name(run, tmp_path, monkeypatch):
    """Gate and up of every SwiGLU exchanged: all layers are wrong, and an earlier export stays as it was."""
    export(run, tmp_path / "hf")
    before = contents(tmp_path / "hf")
    monkeypatch.setattr(ops, "split_gate_up", lambda fc1: fc1.chunk(2)[::-1])
    with pytest.raises(BorealError, match="layer 0 differs by"):
        export(run, tmp_path / "hf", prove=True)
    assert sorted(os.listdir(tmp_path)) == ["hf", "hf.disagrees"]
    assert contents(tmp_path / "hf") == before
    assert "THEY DISAGREE" in (tmp_path / "hf.disagrees" / "export_report.md").read_text()


@pytest.mark.slow
def test_loads_where_boreal_megatron_is_not_installed(exported, tmp_path):
    """Another folder, an import hook that refuses our packages: logits again equal, and text comes out."""
    out, _ = exported
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("boreal_megatron", "boreal_kernels", "megatron"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(out)!r})
ids = torch.arange(1, 41)[None]
torch.save(model(ids).logits.detach(), "logits.pt")
prompt = tokenizer("def ", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
assert text.startswith("def "), text
assert not [m for m in sys.modules if m.startswith("boreal_megatron")]
"""
    env = environment(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=env, check=True)
    from boreal_megatron.convert.hf import build_hf
    from boreal_megatron.convert.reader import TensorReader

    path = store.resolve(exported[1]["checkpoint"])
    ours = build_hf(store.saved_config(path).model, TensorReader(path), 0)
    with torch.no_grad():
        expected = ours(torch.arange(1, 41)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_generate_continues_prompts(run, capsys):
    words = ["generate", str(run), "--prompt", "import ", "--prompt", "def ", "--tokens", "10", "--json"]
    assert main([*words, "--temperature", "0"]) == main([*words, "--temperature", "0"]) == main([*words, "--seed", "1"]) == 0
    first, again, sampled = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == again and first != sampled
    assert first[0].startswith("import ") and first[1].startswith("def ") and len(first[0]) > len("import ")


LARGE = """
import json, sys
from boreal_megatron.convert.export import export
from boreal_megatron.convert.mapping import mapping, training_shapes
found = export(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
peak = [line.split() for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(json.dumps([found["bytes"], int(peak[1]) * 1024]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_memory_is_the_largest_tensor_and_1_gb(dtype, corpus, tmp_path):
    """A fresh process, a checkpoint of 1.4 GB whose largest tensor, the embedding, has 1.07 GB."""
    large = tiny(vocab_size=131_072, hidden_size=2048, ffn_hidden_size=8192)
    shapes = training_shapes(mapping(large))
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    assert max(sizes) > 1.05e9 and sum(sizes) > 1.3e9
    path = checkpoint(tmp_path / "run", large, corpus["tokenizer"], constant(shapes))
    command = [sys.executable, "-c", LARGE, str(path), str(tmp_path / "hf"), dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    size, peak = json.loads(done.stdout)
    assert size >= sum(sizes) * (0.5 if dtype == "bf16" else 1.0)
    assert peak < max(sizes) + 1e9, f"{peak / 1e9:.2f} GB"
