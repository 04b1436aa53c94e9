"""A checkpoint's folder: whole or not there, and whatever changes in it is found and named."""

import json
import os

import pytest
from boreal_megatron.checkpoint_tools import _indexed
from boreal_megatron.cli import main
from boreal_megatron.errors import BorealError
from boreal_megatron.train import store
from tests.support.configs import config_for, tiny_model

RECORD = {"state": {"step": 0}, "layout": None, "contents": "weights"}


def write(folder, step, shards=2):
    """A finished checkpoint with invented shards; the writers' hashes come as from ranks."""
    partial = store.begin(folder, step, 1)
    for rank in range(shards):
        (partial / f"__{rank}_0.distcp").write_bytes(os.urandom(5000 + rank))
        store.read_back(partial, rank, [partial / f"__{rank}_0.distcp"])
    (partial / ".metadata").write_bytes(os.urandom(100))
    return store.finish(partial, config_for(tiny_model()), RECORD, range(shards))


def test_finished_checkpoint_verifies_and_describes_itself(tmp_path):
    path = write(tmp_path, 7)
    assert path == tmp_path / "iter_0000007" == store.latest(tmp_path) == store.resolve(tmp_path) == store.resolve(path)
    assert store.verify(path) == []
    listed = json.loads((path / store.MANIFEST).read_text())["files"]
    assert listed.keys() == {
        "__0_0.distcp", "__1_0.distcp", ".metadata", "run_config.yaml", "train_state.json", "environment.json"
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000007", store.TRACKER]
    assert store.saved_config(path) == config_for(tiny_model())
    assert json.loads((path / "environment.json").read_text())["packages"]["megatron-core"]


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "train_state.json", "run_config.yaml", store.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found_and_named(file, damage, tmp_path, capsys):
    """Every 97th bit of a file, its last byte, the file itself."""
    path = write(tmp_path, 7)
    good = (path / file).read_bytes()
    if damage == "flip":
        versions = [good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :] for n in range(0, len(good), 97)]
    else:
        versions = [good[:-1] if damage == "cut" else None]
    for version in versions:
        (path / file).unlink() if version is None else (path / file).write_bytes(version)
        problems = store.verify(path)
        # A flipped digit of a hash accuses the file that it is the hash of.
        assert problems and (file == store.MANIFEST or problems == [p for p in problems if p.startswith(f"{file}: ")])
        # However many ranks share the work, they find the same.
        assert sorted(p for rank in range(3) for p in store.verify(path, (rank, 3))) == sorted(problems)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert problems[0] in capsys.readouterr().out


def test_foreign_file_is_found(tmp_path):
    path = write(tmp_path, 7)
    (path / "__2_0.distcp").write_bytes(b"x")
    assert store.verify(path) == ["__2_0.distcp: not in the manifest; remove it"]


def test_what_a_writer_says_decides(tmp_path, monkeypatch):
    """A writer that died, and storage that gives back other bytes than were written: no checkpoint, no tracker."""
    partial = store.begin(tmp_path, 3, 1)
    (partial / "__0_0.distcp").write_bytes(b"1234")
    with pytest.raises(BorealError, match="writer 0 died or had no space"):
        store.finish(partial, config_for(tiny_model()), RECORD, [0])
    answers = iter(["one", "another"])
    monkeypatch.setattr(store, "sha256", lambda path: next(answers))
    store.read_back(partial, 0, [partial / "__0_0.distcp"])
    with pytest.raises(BorealError, match="__0_0.distcp reads back other bytes than were written"):
        store.finish(partial, config_for(tiny_model()), RECORD, [0])
    assert store.latest(tmp_path) is None and store.checkpoints(tmp_path) == []


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    paths = {step: write(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    assert store.retire(tmp_path, paths[40], None, 20) == []
    gone = store.retire(tmp_path, paths[40], 1, 20)
    assert [p.name for p in gone] == ["iter_0000010", "iter_0000030"]
    # 50 is of a future that the run went back from: not this run's to delete.
    assert [store.step_of(p) for p in store.checkpoints(tmp_path)] == [20, 40, 50]
    assert [p.name for p in store.retire(tmp_path, paths[40], 1, None)] == ["iter_0000020"]


def test_same_step_again_replaces_it(tmp_path):
    first = write(tmp_path, 4)
    before = store.sha256(first / "__0_0.distcp")
    assert store.sha256(write(tmp_path, 4) / "__0_0.distcp") != before
    assert store.verify(first) == [] and sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000004"]


def test_killed_between_two_renames_the_old_one_comes_back(tmp_path):
    path = write(tmp_path, 4)
    path.rename(path.with_suffix(".replaced"))
    (tmp_path / "iter_0000004.partial").mkdir()
    (tmp_path / "iter_0000002.deleting").mkdir()
    store.recover(tmp_path)
    assert store.latest(tmp_path) == path and store.verify(path) == []
    assert [p.name for p in tmp_path.glob("iter_*")] == ["iter_0000004"]
    # Killed after them: the new one stays.
    write(tmp_path, 4).with_suffix(".replaced").mkdir()
    store.recover(tmp_path)
    assert [p.name for p in tmp_path.glob("iter_*")] == ["iter_0000004"]


def test_no_room_and_no_right_are_said_before_writing(tmp_path):
    with pytest.raises(BorealError, match="GB free, a checkpoint needs about 1000000000.0 GB; free some space"):
        store.begin(tmp_path, 1, 10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(BorealError, match="iter_0000001.partial cannot be made: .*Not a directory|File exists"):
        store.begin(tmp_path / "file", 1, 1)


def test_leaves_have_dotted_names():
    assert store.flat(_indexed({"a": [{"b": 1}, 2], "c": None})) == {"a.0.b": 1, "a.1": 2, "c": None}
