"""`boreal checkpoint inspect | verify | diff | reshard` and `boreal train --resume-drill`, as a user meets them."""

import json
import shutil

import pytest
from boreal_megatron import checkpoint_tools
from boreal_megatron.cli import main
from boreal_megatron.config.load import load
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import loop, optim, store
from tests.support.launch import boreal, metrics, write_config


@pytest.fixture(scope="module")
def run(corpus, mesh, tmp_path_factory):
    """Five steps in this process, checkpoints after 2, 4 and 5; (config file, its summary)."""
    folder = tmp_path_factory.mktemp("tools")
    config = write_config(folder / "config.yaml", corpus, folder / "run", checkpoint={"folder": str(folder / "run"), "every_steps": 2})
    return config, loop.train(load([config]), world=1)


def folder_of(config):
    return config.parent / "run"


def said(capsys, *words, expect=0):
    assert main([str(word) for word in words]) == expect
    return capsys.readouterr().out


def test_inspect(run, capsys):
    text = said(capsys, "checkpoint", "inspect", folder_of(run[0]))
    assert "iter_0000005: step 5, phase recovery, training" in text and "megatron-core 0.19" in text
    found = json.loads(said(capsys, "checkpoint", "inspect", folder_of(run[0]) / "iter_0000002", "--tensors", "--json"))
    assert found["step"] == 2 and found["phase"] == "superposition" and found["layout"]["world"] == 1
    assert found["tensors"]["embedding.word_embeddings.weight"] == {"shape": [640, 64], "dtype": "float32"}
    # 45 parameters, and the router's bias, which no optimizer moves.
    assert {kind: group["tensors"] for kind, group in found["groups"].items()} == {
        "weights": 46, "master weights": 45, "exp_avg": 45, "exp_avg_sq": 45
    }  # fmt: skip
    assert found["raw_tokens"] == run[1]["raw_tokens"] - 3 * 768


def test_verify(run, capsys, tmp_path):
    assert "every file is there" in said(capsys, "checkpoint", "verify", folder_of(run[0]))
    path = shutil.copytree(folder_of(run[0]) / "iter_0000004", tmp_path / "iter_0000004")
    (path / "__7_0.distcp").write_text("foreign")
    (path / "run_config.yaml").write_text("")
    found = json.loads(said(capsys, "checkpoint", "verify", path, "--json", expect=1))[str(path)]
    assert [problem.split(":")[0] for problem in found] == ["__7_0.distcp", "run_config.yaml"]


def test_diff(run, capsys):
    paths = [folder_of(run[0]) / store.name(step) for step in (4, 5)]
    text = said(capsys, "checkpoint", "diff", *paths, expect=1)
    assert "state.step: 4 -> 5" in text and "embedding.word_embeddings.weight: relative" in text
    found = json.loads(said(capsys, "checkpoint", "diff", *paths, "--json", expect=1))
    assert found["config"] == {} and not found["only_a"] and not found["only_b"]
    moved = found["changed"]["optimizer.state.exp_avg.embedding.word_embeddings.weight"]
    assert 0 < moved["relative"] < 1 and 0 < moved["max"]
    assert "181 tensors are equal, 0 differ" in said(capsys, "checkpoint", "diff", paths[0], paths[0])


def resharded(capsys, source, out):
    """What `diff` says after a reshard to the optimizer that is not distributed, whose master weights are the weights."""
    found = json.loads(said(capsys, "checkpoint", "diff", source, out, "--json", expect=1))
    assert found["changed"] == {} and found["state"] == {} and found["only_b"] == []
    assert len(found["only_a"]) == 45 and all(name.startswith("optimizer.state.param.") for name in found["only_a"])
    return found["config"].keys() - {"checkpoint.folder"}


def test_reshard_to_another_optimizer(run, capsys, tmp_path):
    source, out = folder_of(run[0]) / "iter_0000002", tmp_path / "resharded"
    assert checkpoint_tools.reshard(source, out, ["optimizer.distributed=false"], world=1) == out / "iter_0000002"
    assert resharded(capsys, source, out) == {"optimizer.distributed"}
    with pytest.raises(BorealError, match="has checkpoints already"):
        checkpoint_tools.reshard(source, out, [], world=1)
    assert main(["checkpoint", "reshard", str(source), str(tmp_path / "new"), "parallel.tensor"]) == 1
    assert "'parallel.tensor' is no override" in capsys.readouterr().err


@pytest.mark.slow
def test_reshard_to_another_layout_trains_on(run, capsys, tmp_path):
    """From one process to tensor 2 without the distributed optimizer: the tensors are equal, and so are the next losses."""
    config, _ = run
    source, out = folder_of(config) / "iter_0000002", tmp_path / "resharded"
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "optimizer.distributed=false"]
    assert f"wrote {out}/iter_0000002" in boreal(2, "checkpoint", "reshard", source, out, *layout)
    assert resharded(capsys, source, out) == {"parallel.tensor", "parallel.sequence_parallel", "optimizer.distributed"}
    boreal(2, "train", out / "iter_0000002" / "run_config.yaml")
    expected, ours = metrics(folder_of(config)), metrics(out)
    assert list(ours) == [3, 4, 5]
    for step, record in ours.items():
        assert record["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert record["raw_tokens"] == expected[step]["raw_tokens"]


# ---------------------------------------------------------------- the drill


def test_drill_passes_and_leaves_nothing(run, capsys, tmp_path):
    """From the start over a phase switch, and from a checkpoint with fewer steps left than asked for."""
    config, summary = run
    folder = tmp_path / "run"
    values = load([config], [f"checkpoint.folder={folder}", "checkpoint.every_steps=3"])
    assert loop.train(values, world=1, resume_drill=3)["digest"] == summary["digest"]
    assert "resume drill passed: saved at step 0, loaded into a new network, 3 steps repeated" in capsys.readouterr().out
    shutil.rmtree(folder / "iter_0000005")
    (folder / store.TRACKER).write_text("3\n")
    assert loop.train(values, world=1, resume_drill=9)["digest"] == summary["digest"]
    assert "saved at step 3, loaded into a new network, 2 steps repeated" in capsys.readouterr().out
    assert sorted(p.name for p in folder.glob("*r*")) == ["iter_0000003", "iter_0000005", store.TRACKER, "metrics.jsonl", "tensorboard"]


def test_drill_notices_what_a_load_forgets(run, tmp_path, monkeypatch):
    """A second load that leaves the moments as a new optimizer has them."""
    values = load([run[0]], [f"checkpoint.folder={tmp_path}"])
    shutil.copytree(folder_of(run[0]) / "iter_0000002", tmp_path / "iter_0000002")
    (tmp_path / store.TRACKER).write_text("2\n")
    real, calls = optim.load, []

    def forgetful(optimizer, moments, step):
        calls.append(step)
        if len(calls) == 1:
            real(optimizer, moments, step)
        else:
            optimizer.reload_model_params()

    monkeypatch.setattr(optim, "load", forgetful)
    with pytest.raises(ProblemsError, match="the resume drill failed: 2 steps from step 2 do not repeat") as caught:
        loop.train(values, world=1, resume_drill=2)
    assert any(problem.startswith("as loaded: moments") for problem in caught.value.problems), caught.value.problems
    assert any(problem.startswith("2 steps later: losses") for problem in caught.value.problems)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000002", store.TRACKER]
