"""A Hugging Face folder becomes a checkpoint: bit for bit what was exported, and training goes on from it anywhere."""

import hashlib
import json

import pytest
import torch
from boreal_megatron.cli import main
from boreal_megatron.config.load import load
from boreal_megatron.config.schema import Model
from boreal_megatron.convert.export import export
from boreal_megatron.convert.importer import import_hf
from boreal_megatron.convert.mapping import keeps_fp32, mapping
from boreal_megatron.convert.reader import TensorReader
from boreal_megatron.train import loop, store
from tests.support.launch import MODEL, boreal, metrics, write_config

VALUES = MODEL | {"vocab_size": 700}
TP = ["parallel.tensor=2", "parallel.sequence_parallel=true"]


@pytest.fixture(scope="module")
def original(corpus, mesh, tmp_path_factory):
    """A checkpoint after 5 steps, and its configuration."""
    folder = tmp_path_factory.mktemp("import")
    config = write_config(folder / "config.yaml", corpus, folder / "run", model=VALUES)
    loop.train(load([config]), world=1)
    return store.latest(folder / "run"), config


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_round_trip_is_bit_equal(original, dtype, tmp_path):
    path, config = original
    export(path, tmp_path / "hf", dtype=dtype, max_shard_bytes=200_000)
    found = import_hf(tmp_path / "hf", tmp_path / "run", load([config]))
    assert found["checkpoint"] == str(tmp_path / "run" / "iter_0000000") and not found["not_finite"]
    assert store.verify(found["checkpoint"]) == []
    theirs, ours = TensorReader(path), TensorReader(found["checkpoint"])
    assert ours.shapes == theirs.shapes
    kept = {name for rule in mapping(Model(**VALUES)) for name in rule.train if keeps_fp32(rule.hf[0])}
    assert len(kept) == 6
    for name in theirs.shapes:
        kind = torch.float32 if dtype == "fp32" or name in kept else torch.bfloat16
        assert ours.dtypes[name] == kind and torch.equal(ours(name), theirs(name).to(kind)), name
    export(found["checkpoint"], tmp_path / "again", dtype=dtype, max_shard_bytes=200_000)
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


@pytest.mark.slow
def test_training_goes_on_at_any_layout(original, tmp_path, capsys):
    """Four updates with a fresh optimizer: equal losses on one process and under tensor parallelism."""
    path, config = original
    hf, runs = tmp_path / "hf", [tmp_path / "one", tmp_path / "two"]
    export(path, hf)
    for run in runs:
        assert main(["import", str(hf), str(run), str(config)]) == 0
        assert f"boreal train {config} checkpoint.folder={run}" in capsys.readouterr().out
    words = ["phases.1.until_steps=4"]
    loop.train(load([config], [*words, f"checkpoint.folder={runs[0]}"]), world=1)
    text = boreal(2, "train", config, *words, *TP, f"checkpoint.folder={runs[1]}")
    assert "resuming from" in text and "iter_0000000" in text
    one, two = ([r["loss"] for r in metrics(run).values()] for run in runs)
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-6)


def test_a_bf16_folder_is_training_weights_too(original, tmp_path):
    """FP32 training starts from the rounded numbers, and its first loss is near that of the exact ones."""
    path, config = original
    losses = []
    for dtype in ("fp32", "bf16"):
        export(path, tmp_path / dtype, dtype=dtype)
        import_hf(tmp_path / dtype, tmp_path / f"run-{dtype}", load([config]))
        words = ["phases.0.until_steps=1", "phases.1.until_steps=2", f"checkpoint.folder={tmp_path / f'run-{dtype}'}"]
        loop.train(load([config], words), world=1)
        losses.append(metrics(tmp_path / f"run-{dtype}")[1]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_the_command_answers_in_json(original, tmp_path, capsys):
    path, config = original
    export(path, tmp_path / "hf")
    words = ["import", tmp_path / "hf", tmp_path / "run", config, "checkpoint.folder=elsewhere", "--json"]
    assert main([str(word) for word in words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"] == 66 and store.saved_config(found["checkpoint"]).model.vocab_size == 700
