"""What an export and an import refuse: every problem in one error, and never a folder that looks complete."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import namedtuple

import pytest
import torch
from boreal_megatron.cli import main
from boreal_megatron.config.presets import PRESETS
from boreal_megatron.config.schema import Model
from boreal_megatron.convert import export as export_module
from boreal_megatron.convert.export import export
from boreal_megatron.convert.importer import import_hf
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.errors import BorealError
from boreal_megatron.train import store
from safetensors.torch import load_file, save_file
from tests.support.networks import random_weights, tiny
from tests.support.unstarted import checkpoint, config_of

MODEL = tiny(vocab_size=300)  # 384 rows
NORM, OUT = "decoder.final_norm.weight", "decoder.layers.2.self_attention.out_proj.weight"
EXPERTS, EMBEDDING = "decoder.layers.5.mlp.experts.experts.linear_fc1.weight", "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Tokenizers of 300 and 320 entries."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = ["the quick brown fox jumps over the lazy dog and runs away, " * 9, "import os; print(os.environ)" * 9]
    return {size: train_bpe(text, size, folder / str(size)).folder for size in (300, 310)}


@pytest.fixture
def weights():
    return random_weights(MODEL)


@pytest.fixture
def written(words, tmp_path):
    """Function from weights to a checkpoint's path."""
    return lambda weights, model=MODEL: checkpoint(tmp_path / "run", model, words[300], weights)


@pytest.fixture
def exported(written, weights, tmp_path):
    export(written(weights), tmp_path / "hf")
    return tmp_path / "hf"


def refused(match, *args, **options):
    """The error of an export that leaves nothing behind."""
    out = args[1]
    with pytest.raises(BorealError, match=match) as found:
        export(*args, **options)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return str(found.value)


# ---------------------------------------------------------------- export: what is in the checkpoint


def test_all_wrong_tensors_in_one_error(written, weights, tmp_path):
    del weights[NORM]
    weights["decoder.layers.0.mixer.bias"] = torch.zeros(3)
    weights[OUT] = weights[OUT][:, 1:]
    weights["decoder.layers.2.self_attention.A_log"] = torch.zeros(6, dtype=torch.int32)
    text = refused("4 problems", written(weights), tmp_path / "hf")
    assert f"{NORM}: missing, expected (32,)" in text
    assert "decoder.layers.0.mixer.bias: found (3,), but the network has no such tensor" in text
    assert f"{OUT}: found shape (32, 47), expected (32, 48)" in text
    assert "A_log: found torch.int32" in text


def test_wrong_preset(written, weights, tmp_path):
    """Weights of one network beside the description of another: a long list is cut, with its length."""
    text = refused("more like these", written(weights, Model(**PRESETS["boreal-250m"])), tmp_path / "hf")
    assert "run_config.yaml" in text and "found shape (384, 32), expected (151936, 1024)" in text


def test_nan_is_refused_and_on_request_reported(written, weights, tmp_path):
    weights[NORM][3] = torch.nan
    weights[EXPERTS][2, 5, :2] = torch.tensor([torch.inf, -torch.inf])
    path = written(weights)
    text = refused("NaN or infinite numbers in 2 tensors", path, tmp_path / "hf")
    assert "model.norm.weight: 1" in text and "model.layers.2.mlp.experts.2.gate_proj.weight: 2" in text
    found = export(path, tmp_path / "hf", dtype="bf16", allow_nan=True)
    assert found["not_finite"] == {"model.norm.weight": 1, "model.layers.2.mlp.experts.2.gate_proj.weight": 2}
    assert load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")["model.norm.weight"].isnan().sum() == 1


def test_padding_that_holds_numbers(written, weights, tmp_path):
    weights[EMBEDDING][383, 5:7] = 0.1
    assert "rows 300..383" in refused(f"{EMBEDDING}: .* 2 of their numbers are not zero", written(weights), tmp_path / "hf")


def test_tokenizer_with_ids_beyond_the_vocabulary(words, weights, tmp_path):
    path = checkpoint(tmp_path / "run", MODEL, words[310], weights)
    refused("ids up to 309, the network has rows for 300", path, tmp_path / "hf")


def test_another_tokenizer_than_the_checkpoints(written, words, weights, tmp_path):
    path = written(weights)
    refused("another tokenizer .310 entries", path, tmp_path / "hf", tokenizer=words[310])
    assert export(path, tmp_path / "hf", tokenizer=words[300])["notes"] == []


def test_a_smaller_tokenizer_is_a_note(words, tmp_path):
    larger = tiny(vocab_size=320)
    path = checkpoint(tmp_path / "run", larger, words[300], random_weights(larger))
    assert export(path, tmp_path / "hf")["notes"] == ["20 of the 320 vocabulary rows belong to no token of the tokenizer"]


def test_masquerade(written, weights, tmp_path):
    text = refused("cannot be exported as qwen3_5", written(weights), tmp_path / "hf", target="qwen3_5")
    assert "attention.gate" in text and "MoE" in text
    refused("--as llama: expected one of boreal, qwen3_5", tmp_path / "run", tmp_path / "hf", target="llama")


# ---------------------------------------------------------------- export: files


def test_damaged_checkpoints(written, weights, tmp_path):
    path = written(weights)
    refused("no checkpoint", tmp_path, tmp_path / "hf")
    (shard,) = path.glob("*.distcp")
    whole = shard.read_bytes()
    middle = bytearray(whole)
    middle[whole.index(weights[OUT].numpy().tobytes()) + 2] ^= 1  # in the fraction of its first number
    shard.write_bytes(middle)
    refused(f"{shard.name}: its contents changed", path, tmp_path / "hf")
    assert export(path, tmp_path / "hf", verify=False)["tensors"]
    shutil.rmtree(tmp_path / "hf")
    shard.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read", path, tmp_path / "hf", verify=False)
    shard.unlink()
    refused("cannot be read: FileNotFoundError", path, tmp_path / "hf", verify=False)


def test_existing_folders(written, weights, tmp_path):
    path, out = written(weights), tmp_path / "hf"
    export(path, out)
    (out / "stale.txt").touch()
    with pytest.raises(BorealError, match="not an export .stale.txt."):
        export(path, out)
    (out / "stale.txt").unlink()
    before = (out / "config.json").stat().st_ino
    export(path, out)
    assert (out / "config.json").stat().st_ino != before and sorted(os.listdir(tmp_path)) == ["hf", "run"]
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("boreal export", "somebody else"))  # a model that was downloaded
    with pytest.raises(BorealError, match="not an export"):
        export(path, out)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BorealError, match="not an export"):
        export(path, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(BorealError, match="cannot be written"):
        export(path, tmp_path / "file" / "hf")


def test_no_room(written, weights, tmp_path, monkeypatch):
    path = written(weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(10_050_000))
    refused("0.01 GB free, the export takes 0.01 GB", path, tmp_path / "hf")


def test_disk_full_midway(written, weights, tmp_path, monkeypatch):
    path, writes = written(weights), iter(range(1000))
    real = os.pwrite

    def pwrite(*args):
        if next(writes) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused("no space left on the disk", path, tmp_path / "hf")


def slow_export(path, out, started):
    """Stops in the middle of the weights and says so, as if the disk were slow."""
    real, count = os.pwrite, itertools.count()

    def pwrite(*args):
        if next(count) == 40:
            started.set()
            time.sleep(60)
        return real(*args)

    os.pwrite = pwrite
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(["export", str(path), str(out)]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted(number, written, weights, tmp_path):
    path, out = written(weights), tmp_path / "hf"
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    process = fork.Process(target=slow_export, args=(path, out, started))
    process.start()
    try:
        assert started.wait(60)
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == (130 if number == signal.SIGINT else -number)
    finally:
        process.kill()
        process.join()
    left = tmp_path / ".hf.unfinished"
    assert not out.exists() and (number == signal.SIGINT) == (not left.exists())
    assert not left.exists() or [p.suffix for p in left.iterdir()] == [".safetensors"]
    assert export(path, out)["tensors"] == 103 and sorted(os.listdir(tmp_path)) == ["hf", "run"]


def test_killed_between_the_renames(exported, tmp_path):
    """The earlier export comes back under its name, even if the next export then fails."""
    exported.rename(tmp_path / ".hf.replaced")
    (tmp_path / ".hf.unfinished").mkdir()
    with pytest.raises(BorealError, match="expected one of"):
        export(tmp_path / "run", exported, target="llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module.hf, "fill", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(tmp_path / "run", exported)
    assert sorted(os.listdir(tmp_path)) == ["hf", "run"] and (exported / "config.json").exists()


def test_the_command_says_it_without_a_traceback(written, weights, tmp_path, capsys):
    weights[NORM][0] = torch.nan
    words = ["export", str(written(weights)), str(tmp_path / "hf")]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("boreal: NaN or infinite numbers in 1 tensors")
    assert main([*words, "--allow-nan", "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "103 tensors" in said and "warning: model.norm.weight has 1 numbers" in said


# ---------------------------------------------------------------- import


def import_refused(match, folder, config):
    out = folder.parent / "imported"
    with pytest.raises(BorealError, match=match) as found:
        import_hf(folder, out, config)
    assert not out.exists() or not list(out.iterdir())
    return str(found.value)


@pytest.fixture
def config(words, tmp_path):
    return config_of(MODEL, words[300], tmp_path / "elsewhere")


def changed(folder, change):
    """The export with other tensors in its one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_import_of_another_network(exported, words, tmp_path):
    other = MODEL.model_copy(update={"norm_eps": 1e-5, "pattern": "*-G-GE*-/*-", "init_std": 0.5, "max_positions": 99})
    text = import_refused("2 problems", exported, config_of(other, words[300], tmp_path))
    assert "model.norm_eps: the folder has 1e-06, the configuration 1e-05" in text
    assert "model.pattern: the folder has '*-G-GE*E/*-', the configuration '*-G-GE*-/*-'" in text


def test_import_of_wrong_tensors(exported, config):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 31)
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(32, dtype=torch.float16)

    changed(exported, change)
    text = import_refused("4 problems", exported, config)
    assert "model.norm.weight: missing, expected (32,)" in text
    assert "lm_head.weight: found (2,), but the network has no such tensor" in text
    assert "up_proj.weight: found shape (40, 31), expected (40, 32)" in text
    assert "input_layernorm.weight: found F16" in text


def test_import_of_mixed_dtypes(exported, config):
    name = "model.layers.0.mlp.up_proj.weight"
    changed(exported, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    assert name in import_refused("different dtypes", exported, config)


def test_import_of_nan(exported, config, tmp_path):
    changed(exported, lambda tensors: tensors["model.norm.weight"][:2].fill_(torch.nan))
    assert "model.norm.weight: 2" in import_refused("NaN or infinite", exported, config)
    assert import_hf(exported, tmp_path / "run-nan", config, allow_nan=True)["not_finite"] == {"model.norm.weight": 2}


def test_import_of_damaged_folders(exported, config):
    (file,) = exported.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    import_refused("no whole safetensors file", exported, config)
    file.write_bytes(whole[:4])
    import_refused("no whole safetensors file", exported, config)
    file.rename(exported / "model.safetensors")
    import_refused("names files that are not there: model-00001-of-00001.safetensors", exported, config)
    (exported / "model.safetensors.index.json").unlink()
    (exported / "model.safetensors").unlink()
    import_refused("no .safetensors files", exported, config)
    (exported / "config.json").write_text("[]")
    import_refused("expected an object", exported, config)
    (exported / "config.json").write_text(json.dumps({"model_type": "llama"}))
    import_refused("model_type", exported, config)
    shutil.rmtree(exported)
    import_refused("config.json cannot be read", exported, config)


def test_import_with_another_tokenizer(exported, config, words):
    values = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(words[310])})})
    import_refused("ids up to 309", exported, values)
    shutil.copy(words[310] / "tokenizer.json", exported)
    import_refused("is another tokenizer", exported, config)


def test_import_into_a_run(exported, config, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(BorealError, match="holds iter_0000007 already"):
        import_hf(exported, tmp_path / "run", config)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_import_without_room(exported, config, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(1000))
    import_refused("GB free, a checkpoint needs", exported, config)
