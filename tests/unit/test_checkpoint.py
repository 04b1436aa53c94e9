"""Saving and loading in one process: what a checkpoint holds, when it counts, and what a failed save leaves."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from boreal_megatron import platform
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import checkpoint, optim, store
from boreal_megatron.train.state import State, digest
from boreal_megatron.train.step import forward_backward
from tests.support.checkpoints import Said, built, into, save
from tests.support.configs import config_for, tiny_model
from tests.unit.test_model import make


def steps(config, mesh, wrapped, optimizer, first, count):
    """Losses and gradient norms of updates on seeded batches number first, first + 1, ..."""
    out = []
    for number in range(first, first + count):
        optimizer.zero_grad()
        losses, _ = forward_backward(config, wrapped, mesh, config.phases[0], [make(seed=number)])
        norm = optim.gradient_norm(optimizer)
        optim.set_learning_rate(optimizer, 1e-2, 0.1)
        optim.update(optimizer, norm, 1.0)
        out.append([*losses.tolist(), norm])
    return torch.tensor(out)


def variant(config, distributed):
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"distributed": distributed})})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("before", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("after", [True, False], ids=["to-distributed", "to-plain"])
def test_distributed_optimizer_comes_and_goes(before, after, precision, mesh, tmp_path):
    """Three steps, a checkpoint, three more in a new network: as without it, with the same optimizer bit for bit. The
    two sum gradient norms in another order, so between them clipping differs in the last bit."""
    config = config_for(tiny_model(), precision=precision)
    ours, theirs = variant(config, before), variant(config, after)
    _, wrapped, optimizer = built(ours, mesh)
    steps(ours, mesh, wrapped, optimizer, 0, 3)
    path = save(tmp_path, ours, wrapped, optimizer, mesh, step=3)
    expected = steps(ours, mesh, wrapped, optimizer, 3, 3)
    _, wrapped, optimizer = built(theirs.model_copy(update={"seed": 9}), mesh)
    assert checkpoint.load(path, theirs, wrapped, optimizer, mesh).step == 3
    exact = {} if before == after else {"rtol": 1e-5 if precision == "fp32" else 1e-3}
    torch.testing.assert_close(steps(theirs, mesh, wrapped, optimizer, 3, 3), expected, **{"rtol": 0, "atol": 0} | exact)


def test_same_layout_comes_back_bit_for_bit_and_hyperparameters_are_the_configurations(mesh, tmp_path):
    config = config_for(tiny_model(), precision="bf16")
    chunks, wrapped, optimizer = built(config, mesh)
    steps(config, mesh, wrapped, optimizer, 0, 2)
    path = save(tmp_path, config, wrapped, optimizer, mesh, step=2)
    expected = digest(chunks, optimizer, State(step=2))
    torch.manual_seed(77)
    changed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"beta2": 0.5}), "seed": 9})
    chunks, wrapped, optimizer = built(changed, mesh)
    assert digest(chunks, optimizer, State(step=2))["parameters"] != expected["parameters"]
    state = checkpoint.load(path, changed, wrapped, optimizer, mesh)
    assert digest(chunks, optimizer, state) == expected
    assert {g["betas"] for part in optim.parts(optimizer) for g in part.optimizer.param_groups} == {(0.9, 0.5)}


def test_weights_alone_start_the_optimizer_anew(mesh, tmp_path):
    """As from an imported model: master weights are the checkpoint's, moments zero, the first step that of a new run."""
    config = config_for(tiny_model(), precision="bf16")
    chunks, wrapped, optimizer = built(config, mesh)
    partial = store.begin(tmp_path, 0, 1)
    record = {"state": State().to_dict(), "layout": None, "contents": "weights"}
    from megatron.core import dist_checkpointing

    dist_checkpointing.save({"model": [c.sharded_state_dict() for c in chunks]}, str(partial))
    path = store.finish(partial, config, record)
    weights = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    chunks, wrapped, optimizer = built(config.model_copy(update={"seed": 9}), mesh)
    assert checkpoint.load(path, config, wrapped, optimizer, mesh) == State()
    assert all(torch.equal(p, weights[name]) for name, p in chunks[0].named_parameters())
    # Without gradients and decay an update moves nothing: the master weights are the loaded ones, not those drawn.
    wrapped[0].zero_grad_buffer()
    optim.gradient_norm(optimizer)
    optim.set_learning_rate(optimizer, 1e-2, 0.0)
    optim.update(optimizer, 0.0, 1.0)
    assert all(torch.equal(p, weights[name]) for name, p in chunks[0].named_parameters())


def test_network_that_does_not_fit_is_refused_with_every_tensor(mesh, tmp_path):
    config = config_for(tiny_model())
    _, wrapped, optimizer = built(config, mesh)
    path = save(tmp_path, config, wrapped, optimizer, mesh)
    other = config_for(tiny_model(ffn_hidden_size=128))
    _, wrapped, optimizer = built(other, mesh)
    with pytest.raises(ProblemsError, match="another model"):
        checkpoint.load(path, other, wrapped, optimizer, mesh)
    text = (path / "run_config.yaml").read_text()
    (path / "run_config.yaml").write_text(text.replace("ffn_hidden_size: 96", "ffn_hidden_size: 128"))
    with pytest.raises(ProblemsError, match="does not fit this network") as caught:
        checkpoint.load(path, other, wrapped, optimizer, mesh)
    assert any("linear_fc1.weight: found (192, 64), expected (256, 64)" in p for p in caught.value.problems)


# ---------------------------------------------------------------- in the background


@pytest.fixture
def slow_writer(monkeypatch, tmp_path):
    """Writers wait for the file that is returned."""
    go, write = tmp_path / "go", checkpoint._write

    def waiting(*args, **kwargs):
        while not go.exists():
            time.sleep(0.01)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "_write", waiting)
    return go


def test_background_save_holds_the_moment_it_was_requested(slow_writer, mesh, tmp_path):
    """Weights move while the writer waits; the checkpoint has them as they were, and nothing showed before it was whole."""
    config = into(config_for(tiny_model()), tmp_path, async_save=True)
    chunks, wrapped, optimizer = built(config, mesh)
    steps(config, mesh, wrapped, optimizer, 0, 1)
    expected = digest(chunks, optimizer, State(step=1))
    said = Said()
    saver = checkpoint.Saver(config, mesh, said)
    saver.save(wrapped, optimizer, State(step=1))
    steps(config, mesh, wrapped, optimizer, 1, 1)
    saver.poll()
    assert saver.flying and store.latest(tmp_path) is None
    assert said.lines == [" checkpoint iter_0000001: requested"]
    slow_writer.touch()
    saver.close()
    assert [line.split(":")[1].split(",")[0].strip() for line in said.lines] == ["requested", "written", "verified"]
    assert store.latest(tmp_path) == saver.last_good and store.verify(saver.last_good) == []
    assert digest(chunks, optimizer, State(step=1)) != expected
    checkpoint.load(saver.last_good, config, wrapped, optimizer, mesh)
    assert digest(chunks, optimizer, State(step=1)) == expected
    [record] = said.records
    assert record["ok"] and 0 < record["waited_seconds"] < record["seconds"]


@pytest.mark.parametrize("how", ["killed", "full"])
def test_failed_background_save_changes_nothing_and_the_next_one_works(how, mesh, tmp_path, monkeypatch):
    config = into(config_for(tiny_model()), tmp_path, async_save=True)
    _, wrapped, optimizer = built(config, mesh)
    said = Said()
    saver = checkpoint.Saver(config, mesh, said)
    saver.save(wrapped, optimizer, State(step=1))
    saver.wait()
    good, write = saver.last_good, checkpoint._write

    def dying(write_shards, partial, *args):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        for shard in (Path(partial) / "__0_0.distcp",):
            shard.mkdir()  # what is in the way cannot be written
        write(write_shards, partial, *args)

    monkeypatch.setattr(checkpoint, "_write", dying)
    saver.save(wrapped, optimizer, State(step=2))
    with pytest.raises(BorealError, match=f"iter_0000002 was not saved: .*; the last verified checkpoint is {good}"):
        saver.close()
    assert said.records[-1]["ok"] is False and "was not saved" in said.lines[-1]
    assert store.latest(tmp_path) == good and store.verify(good) == [] and not (tmp_path / "iter_0000002").exists()
    monkeypatch.setattr(checkpoint, "_write", write)
    saver.save(wrapped, optimizer, State(step=3))
    saver.close()
    assert store.latest(tmp_path) == tmp_path / "iter_0000003"
    assert [p.name for p in sorted(tmp_path.glob("iter_*"))] == ["iter_0000001", "iter_0000003"]


# ---------------------------------------------------------------- going on


def test_damaged_checkpoint_stops_the_run_unless_it_may_fall_back(mesh, tmp_path):
    config = into(config_for(tiny_model()), tmp_path)
    _, wrapped, optimizer = built(config, mesh)
    paths = [save(tmp_path, config, wrapped, optimizer, mesh, step) for step in (1, 2, 3)]
    assert checkpoint.find(config.checkpoint, mesh) == (paths[2], [])
    for path in paths[1:]:
        shard = path / "__0_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ProblemsError, match="iter_0000003 is damaged; .*checkpoint.fall_back=true") as caught:
        checkpoint.find(config.checkpoint, mesh)
    changed = "__0_0.distcp: its contents changed (SHA-256 differs from the manifest's)"
    assert caught.value.problems == [f"iter_0000003: {changed}"]
    careless = into(config, tmp_path, fall_back=True).checkpoint
    assert checkpoint.find(careless, mesh) == (paths[0], [f"iter_000000{step}: {changed}" for step in (3, 2)])
    (paths[0] / "__0_0.distcp").unlink()
    with pytest.raises(ProblemsError, match="no checkpoint in .* is whole"):
        checkpoint.find(careless, mesh)
    assert checkpoint.find(into(config, tmp_path / "new").checkpoint, mesh) == (None, [])


def test_retention_follows_the_configuration(mesh, tmp_path):
    config = into(config_for(tiny_model()), tmp_path, keep_last=1, keep_every=4)
    _, wrapped, optimizer = built(config, mesh)
    saver = checkpoint.Saver(config, mesh, Said())
    for step in (2, 4, 6, 8, 10):
        saver.save(wrapped, optimizer, State(step=step))
    assert [store.step_of(p) for p in store.checkpoints(tmp_path)] == [4, 8, 10]


def test_no_room_is_noticed_before_writing(tmp_path, monkeypatch, mesh):
    import shutil

    config = into(config_for(tiny_model()), tmp_path)
    _, wrapped, optimizer = built(config, mesh)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    saver = checkpoint.Saver(config, mesh, Said())
    saver.save(wrapped, optimizer, State())
    with pytest.raises(BorealError, match="0.0 GB free, a checkpoint needs about .*; there is no verified checkpoint"):
        saver.close()
    assert store.latest(tmp_path) is None


def test_generators_of_a_gpu_change_nothing_on_a_cpu(mesh):
    """A GPU's generators have 16 bytes, a CPU's 5,056: a run that goes on elsewhere keeps what it was seeded with."""
    here = platform.current()
    before = here.rng_state()
    here.set_rng_state({name: torch.zeros(16, dtype=torch.uint8) for name in (*before, "cuda")})
    after = here.rng_state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    drawn = torch.rand(1)
    here.set_rng_state(before)
    assert torch.equal(torch.rand(1), drawn)
