"""From a checkpoint of two processes to a Hugging Face model: equal logits, cached decoding, text, without us."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tests.support.launch import boreal, environment, write_config


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Trained 5 steps under tensor 2 + sequence parallelism."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder / "config.yaml", corpus, folder / "run")
    boreal(2, "train", config, "parallel.tensor=2", "parallel.sequence_parallel=true")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    text = boreal(1, "export", run, out, "--json")
    return out, json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def test_logits_equal_the_trained_models(exported):
    out, found = exported
    assert found["positions"] >= 130
    assert found["max_logit_difference"] < 1e-4
    assert found["max_decode_difference"] < 1e-4
    files = {p.name for p in out.iterdir()}
    assert files >= {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "configuration_boreal.py", "modeling_boreal.py",
    }  # fmt: skip
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(name.startswith("mtp.") for name in weights)


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
    from boreal_megatron.train import checkpoint

    path = checkpoint.resolve(exported[1]["checkpoint"])
    ours = build_hf(checkpoint.saved_config(path).model, TensorReader(path), 0)
    with torch.no_grad():
        expected = ours(torch.arange(1, 41)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_generate_continues_prompts(run):
    words = ["generate", run, "--prompt", "import ", "--prompt", "def ", "--tokens", "10", "--temperature", "0", "--json"]
    first, again = (boreal(1, *words) for _ in range(2))
    texts = json.loads([line for line in first.splitlines() if line.startswith("[")][-1])
    assert texts[0].startswith("import ") and texts[1].startswith("def ")
    assert len(texts[0]) > len("import ")
    assert [line for line in again.splitlines() if line.startswith("[")][-1] == json.dumps(texts)


def test_export_refuses_a_folder_that_is_something_else(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    text = boreal(1, "export", run, tmp_path / "mine", expect=1)
    assert "mine" in text and "Traceback" not in text
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
