"""The .bin/.idx files: the same bytes as megatron-core's own builder, and no damaged file is ever read."""

import fcntl
import os
import resource
import struct
import subprocess
import sys

import numpy as np
import pytest

from boreal_megatron.data import indexed
from boreal_megatron.data.indexed import IndexedReader, IndexedWriter, best_dtype
from boreal_megatron.errors import BorealError

DOCUMENTS = [[5, 6, 7], [1], [], [40000 % 60000, 0, 3, 3], list(range(300))]


def write(prefix, documents=DOCUMENTS, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.append(ids)
    return prefix


def test_known_bytes(tmp_path):
    write(tmp_path / "d", [[1, 2], [3]], np.int32)
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<3i", 1, 2, 3)
    assert (tmp_path / "d.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 8, 0, 1, 2)
    )
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatron_core_and_read_by_it(tmp_path, dtype):
    import torch
    from megatron.core.datasets import indexed_dataset as theirs
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "mcore.bin"), dtype=dtype)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(str(tmp_path / "mcore.idx"))
    write(tmp_path / "ours", dtype=dtype)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"mcore{ending}").read_bytes()

    read_by_them = theirs.IndexedDataset(str(tmp_path / "ours"))
    assert [list(read_by_them[i]) for i in range(len(DOCUMENTS))] == DOCUMENTS


def test_reads_documents_of_several_sequences_as_megatron_core_writes_them(tmp_path):
    import torch
    from megatron.core.datasets import indexed_dataset as theirs
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(tmp_path / "m.idx"))
    data = IndexedReader(tmp_path / "m")
    assert len(data) == 2
    assert list(data.lengths) == [2, 3, 1]
    assert list(data.document_index) == [0, 2, 3]
    assert list(data.document_lengths) == [5, 1]
    assert list(data.document(0)) == [1, 2, 3, 4, 5]
    assert list(data.read(0, 1, 3)) == [2, 3, 4]


def test_reader(tmp_path):
    data = IndexedReader(write(tmp_path / "d"))
    assert len(data) == len(DOCUMENTS)
    assert [list(data.document(i)) for i in range(len(data))] == DOCUMENTS
    assert data.lengths.dtype == np.int32 and list(data.lengths) == [3, 1, 0, 4, 300]
    assert data.total_tokens == 308 == len(data.tokens)
    assert list(data.read(4, 298, 2)) == [298, 299]
    assert list(data.read(4, 300, 0)) == []
    for wrong in ((4, 299, 2), (4, -1, 1), (0, 0, -1)):
        with pytest.raises(BorealError, match="Expected: within"):
            data.read(*wrong)
    for wrong in (-1, 5):
        with pytest.raises(BorealError, match="0 to 4"):
            data.document(wrong)


def test_best_dtype():
    assert [best_dtype(v).name for v in (300, 65499, 65500, 151936)] == ["uint16", "uint16", "int32", "int32"]


def test_ids_that_do_not_fit_leave_nothing(tmp_path):
    for ids in ([1, 65536], [-1], [0.5]):
        with pytest.raises(BorealError, match="do not fit uint16"):
            write(tmp_path / "d", [[1], ids])
        assert os.listdir(tmp_path) == []


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(BorealError, match="no tokens"):
        write(tmp_path / "d", [[]])
    assert os.listdir(tmp_path) == []


def test_old_files_stay_until_the_new_ones_are_whole(tmp_path):
    write(tmp_path / "d", [[1, 2]])
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.append([9])
        raise KeyboardInterrupt
    assert list(IndexedReader(tmp_path / "d").document(0)) == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]
    write(tmp_path / "d", [[9]])
    assert list(IndexedReader(tmp_path / "d").document(0)) == [9]


def test_a_stop_between_the_two_renames_leaves_no_index(tmp_path, monkeypatch):
    write(tmp_path / "d", [[1, 2]])
    (tmp_path / "d.meta.json").write_text("{}")
    replace = os.replace

    def stop_at_the_index(old, new):
        if str(new).endswith(".idx"):
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stop_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", [[3, 4]])
    assert os.listdir(tmp_path) == ["d.bin"]
    with pytest.raises(BorealError, match="d.idx: no such file"):
        IndexedReader(tmp_path / "d")


def test_leftovers_of_a_killed_run_are_overwritten_and_a_second_writer_is_refused(tmp_path):
    (tmp_path / "d.bin.partial").write_bytes(b"left over, longer than the new content")
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.append([1])
        with pytest.raises(BorealError, match="another process"):
            IndexedWriter(tmp_path / "d", np.uint16)
    assert (tmp_path / "d.bin").read_bytes() == b"\1\0"
    with open(tmp_path / "d.bin.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BorealError, match="another process"):
            write(tmp_path / "d")


def test_full_disk(tmp_path):
    code = f"""
import resource, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from boreal_megatron.data.indexed import IndexedWriter
from boreal_megatron.errors import BorealError
try:
    with IndexedWriter({str(tmp_path / "d")!r}, np.int32) as writer:
        for _ in range(1000):
            writer.append(np.zeros(10_000, np.int32))
except BorealError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "d.bin: cannot be written" in done.stdout and "free some space" in done.stdout
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) != (50_000, 50_000)


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def patch(at, new):
    return lambda raw: raw[:at] + new + raw[at + len(new) :]


S = len(DOCUMENTS)
DAMAGE = {
    "empty bin": (".bin", lambda raw: b"", "0 bytes"),
    "bin cut short": (".bin", lambda raw: raw[:-1], "615 bytes"),
    "bin too long": (".bin", lambda raw: raw + b"\0\0", "618 bytes"),
    "empty idx": (".idx", lambda raw: b"", "0 bytes"),
    "idx cut in the header": (".idx", lambda raw: raw[:20], "20 bytes"),
    "idx cut short": (".idx", lambda raw: raw[:-8], "sequences"),
    "wrong magic": (".idx", patch(0, b"PK"), "Megatron index"),
    "wrong version": (".idx", patch(9, b"\2"), "version 2"),
    "unknown dtype": (".idx", patch(17, b"\x63"), "dtype code 99"),
    "float dtype": (".idx", patch(17, b"\7"), "dtype code 7"),
    "other dtype": (".idx", patch(17, b"\4"), "points to byte"),
    "impossible count": (".idx", patch(18, struct.pack("<Q", 2**60)), "sequences"),
    "negative length": (".idx", patch(34, struct.pack("<i", -3)), "-3 tokens"),
    "other length": (".idx", patch(34, struct.pack("<i", 4)), "sequence 1 points to byte 6"),
    "other pointer": (".idx", patch(34 + 4 * S, struct.pack("<q", 2)), "sequence 0 points to byte 2"),
    "last pointer": (".idx", patch(34 + 4 * S + 8 * (S - 1), struct.pack("<q", 2)), "sequence 4 points to byte 2"),
    "last length": (".idx", patch(34 + 4 * (S - 1), struct.pack("<i", 7)), "616 bytes"),
    "falling boundary": (".idx", patch(34 + 12 * S + 16, struct.pack("<q", 0)), "boundaries"),
    "first boundary": (".idx", patch(34 + 12 * S, struct.pack("<q", 1)), "boundaries from 1"),
    "last boundary": (".idx", patch(34 + 20 * S, struct.pack("<q", S - 1)), "boundaries from 0 to 4"),
    "other boundary": (".idx", patch(34 + 12 * S + 8, struct.pack("<q", 9)), "boundaries"),
    "multimodal": (".idx", lambda raw: raw + b"\0" * S, "multimodal"),
}


@pytest.mark.parametrize("piece", [indexed.INDEX_PIECE, 1, 2])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(indexed, "INDEX_PIECE", piece)
    ending, change, expected = DAMAGE[name]
    write(tmp_path / "d")
    edit(tmp_path / f"d{ending}", change)
    with pytest.raises(BorealError, match=expected) as error:
        IndexedReader(tmp_path / "d")
    assert f"d{ending}" in str(error.value) or name == "last length"
    assert "Expected:" in str(error.value)


def test_opening_takes_no_memory_that_grows_with_the_dataset(tmp_path):
    """Two million documents: their index of 40 MB is checked and one of them read with less than 16 MB more."""
    documents = 2_000_000
    write(tmp_path / "d", [[7] * 3])
    sizes = np.full(documents, 3, np.int32)
    header = indexed.HEADER.pack(indexed.MAGIC, 1, 8, documents, documents + 1)
    parts = [header, sizes, np.arange(documents) * 6, np.arange(documents + 1)]
    (tmp_path / "d.idx").write_bytes(b"".join(bytes(part) for part in parts))
    os.truncate(tmp_path / "d.bin", documents * 6)
    code = f"""
from boreal_megatron.data.indexed import IndexedReader
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
data = IndexedReader({str(tmp_path / "d")!r})
assert data.read(0, 0, 3).tolist() == [7] * 3 and data.read({documents - 1}, 1, 2).tolist() == [0, 0]
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16_000


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_missing_files_are_named(tmp_path, ending):
    write(tmp_path / "d")
    (tmp_path / f"d{ending}").unlink()
    with pytest.raises(BorealError, match=rf"d\{ending}: no such file"):
        IndexedReader(tmp_path / "d")
    with pytest.raises(BorealError, match="without the ending"):
        IndexedReader(tmp_path / "d.bin")
