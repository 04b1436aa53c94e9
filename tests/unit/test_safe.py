"""A checkpoint from elsewhere runs none of its code."""

import io
import os
import pickle
import pickletools

import pytest
import torch
from boreal_megatron import safe
from boreal_megatron.errors import BorealError
from boreal_megatron.train import checkpoint, store
from tests.support.checkpoints import built, save
from tests.support.configs import config_for, tiny_model


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    config = config_for(tiny_model())
    _, wrapped, optimizer = built(config, mesh)
    return config, wrapped, optimizer, save(tmp_path_factory.mktemp("safe"), config, wrapped, optimizer, mesh)


def copied(path, folder):
    import shutil

    return shutil.copytree(path, folder / path.name)


def test_description_with_code_is_refused_by_name(saved, mesh, tmp_path):
    config, wrapped, optimizer, good = saved
    path, mark = copied(good, tmp_path), tmp_path / "attacked"
    (path / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(BorealError, match=r"\.metadata is refused: it names posix.mkdir.*Nothing of it was run"):
        safe.read_metadata(path)
    for load in (
        lambda: checkpoint.load(path, config, wrapped, optimizer, mesh),
        lambda: torch.distributed.checkpoint.FileSystemReader(path).read_metadata(),
    ):
        with pytest.raises(BorealError, match="posix.mkdir"):
            load()
    assert not mark.exists()
    pickle.loads((path / ".metadata").read_bytes())  # the attack is one
    assert mark.exists()


def test_object_with_code_is_refused(saved, mesh, tmp_path):
    """The generators' state, an object in a shard, replaced in place by an attack."""
    config, wrapped, optimizer, good = saved
    path, mark = copied(good, tmp_path), tmp_path / "attacked"
    metadata = safe.read_metadata(path)
    index = next(i for i in metadata.storage_data if i.fqn.startswith("rng/"))
    where = metadata.storage_data[index]
    attack = io.BytesIO()
    torch.save(Attack(mark), attack)
    assert len(attack.getvalue()) <= where.length
    with (path / where.relative_path).open("r+b") as file:
        file.seek(where.offset)
        file.write(attack.getvalue())
    where.length = len(attack.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(BorealError, match="(?s)cannot be loaded: .*posix.mkdir"):
        checkpoint.load(path, config, wrapped, optimizer, mesh)
    assert not mark.exists()
    attack.seek(0)
    torch.load(attack, weights_only=False)
    assert mark.exists()


def test_cut_or_altered_description_is_an_error_of_ours(saved, tmp_path):
    path = copied(saved[3], tmp_path)
    good = (path / ".metadata").read_bytes()
    for data in (b"", good[:1000], good[:-1], b"\x80\x04" + good[40:]):
        (path / ".metadata").write_bytes(data)
        with pytest.raises(BorealError, match=r"\.metadata is (damaged|refused)"):
            safe.read_metadata(path)
    (path / ".metadata").unlink()
    with pytest.raises(BorealError, match="cannot be read as a checkpoint.*name an iter_"):
        safe.read_metadata(path)


def test_list_of_names_has_no_more_than_checkpoints_need(saved):
    """Each name is in the description of this checkpoint, except the prefix of a plan that torch writes in other ways."""
    words = {arg for _, arg, _ in pickletools.genops((saved[3] / ".metadata").read_bytes()) if isinstance(arg, str)}
    needless = {name for names in safe.METADATA_NAMES.values() for name in names} - words
    assert needless <= {"_StoragePrefix", "_get_layout"}, needless
    assert store.verify(saved[3]) == []
