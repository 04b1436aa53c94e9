"""Indexes made beforehand: the same windows as without, bounded memory, hashes, and what a stopped prepare leaves."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from boreal_megatron.data import prepare, source as source_file
from boreal_megatron.data.indexed import HEADER, MAGIC, IndexedReader, bin_path, idx_path
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError
from tests.support.launch import ROOT
from tests.unit.test_source import ODD_LENGTHS, order, random_lengths, write

SHAPES = [
    dict(boundaries="flat"),
    dict(boundaries="align"),
    dict(boundaries="drop_tail"),
    dict(boundaries="align", piece_tokens=7),
    dict(boundaries="drop_tail", piece_tokens=5),
    dict(boundaries="align", bins=2),
    dict(boundaries="drop_tail", bins=2, piece_tokens=4),
]


def sparse(path, documents, seed=0):
    """An .idx of random lengths over a .bin without content; returns the prefix. In chunks, like what it tests."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 2000, documents).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    with open(idx_path(path), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        lengths.tofile(file)
        (starts * 2).tofile(file)
        np.arange(documents + 1, dtype=np.int64).tofile(file)
    with open(bin_path(path), "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))
    return str(path)


def open_source(tmp_path, prefix, shape, bins="bins.npy", **more):
    shape = dict(shape)
    if "bins" in shape:
        path = tmp_path / bins
        if not path.exists():
            np.save(path, np.random.default_rng(0).integers(0, 4, len(IndexedReader(prefix))).astype(np.int8))
        shape["bins"] = (str(path), shape["bins"])
    return Source("d", prefix, 3, shape.pop("boundaries"), **shape, **more)


@pytest.mark.parametrize("block", [4, 64, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prepared_index_changes_no_window(tmp_path, monkeypatch, shape, block):
    monkeypatch.setattr(prepare, "BLOCK", block)
    monkeypatch.setattr(source_file, "CHUNK", 16)
    monkeypatch.setattr(prepare, "CHUNK", 16)
    prefix = write(tmp_path / "d", random_lengths(2) + ODD_LENGTHS + [90, 0, 31])
    plain = open_source(tmp_path, prefix, shape)
    expected = [plain.epoch(e) for e in range(2)]
    folds = plain.boundaries != "flat"
    starts, bags = [e.starts for e in expected], [folds and e.bag_starts(3) for e in expected]
    orders = [order(plain, e) for e in range(2)]
    steps = list(itertools.takewhile(lambda step: step.epoch < 2, plain.walk(0, 0, 3, 4, 5)))
    windows = [plain.read_window((s.epoch, s.start), 3, 4) for s in steps]
    assert {step.epoch for step in steps} == {0, 1}

    made = prepare.write(open_source(tmp_path, prefix, shape, tokens=False), 2, [3])
    monkeypatch.setattr(source_file, "MEMORY_ITEMS", 0)  # nothing more may be made in memory
    ready = open_source(tmp_path, prefix, shape)
    assert (made["items"], ready.items, ready.total_tokens) == (plain.items, plain.items, plain.total_tokens)
    assert ready.bags(3) == plain.bags(3)
    for epoch in range(2):
        np.testing.assert_array_equal(ready.epoch(epoch).starts, starts[epoch])
        np.testing.assert_array_equal(folds and ready.epoch(epoch).bag_starts(3), bags[epoch])
        assert order(ready, epoch) == orders[epoch]
    walk = ready.walk(0, 0, 3, 4, 7)
    for step, window in zip(steps, windows, strict=True):
        assert next(walk) == step
        again = ready.read_window((step.epoch, step.start), 3, 4)
        assert all(np.array_equal(again[key], window[key]) for key in window)
    with pytest.raises(BorealError, match=r"(?s)epoch 2 has no prepared index.*boreal data prepare"):
        ready.epoch(2)


def test_above_the_limit_an_index_is_demanded(tmp_path, monkeypatch):
    prefix = write(tmp_path / "d", ODD_LENGTHS)
    monkeypatch.setattr(source_file, "MEMORY_ITEMS", len(ODD_LENGTHS))
    Source("d", prefix, 0, "align").epoch(0).bag_starts(2)
    monkeypatch.setattr(source_file, "MEMORY_ITEMS", len(ODD_LENGTHS) - 1)
    with pytest.raises(BorealError, match="has 20 documents; epoch 0 has no prepared index.*`boreal data prepare"):
        Source("d", prefix, 0, "align").epoch(0)
    with pytest.raises(BorealError, match=f"has {sum(ODD_LENGTHS)} pieces"):
        Source("d", prefix, 0, "align", piece_tokens=1).epoch(0)


@pytest.mark.parametrize("harm", ["byte", "cut", "gone", "fingerprint"])
def test_a_damaged_index_is_refused_by_the_first_rank_of_a_node(tmp_path, monkeypatch, harm):
    prefix = write(tmp_path / "d", random_lengths(1))
    made = prepare.write(Source("d", prefix, 3, "align"), 1, [2])
    folder = tmp_path / "d.index" / os.path.basename(made["folder"])
    path = folder / "epoch-0.align-2"
    data = bytearray(path.read_bytes())
    if harm == "byte":
        data[100] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-8])
    elif harm == "gone":
        path.unlink()
    else:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "fingerprint": "0" * 64}))
    with pytest.raises(BorealError, match="Expected: .*boreal data prepare"):
        Source("d", prefix, 3, "align")
    monkeypatch.setenv("LOCAL_RANK", "1")
    if harm == "byte":  # only reading all of it would tell, and that one rank of the node does
        assert Source("d", prefix, 3, "align").prepared
    else:
        with pytest.raises(BorealError, match="Expected: "):
            Source("d", prefix, 3, "align")


def test_other_data_under_the_same_name_is_refused(tmp_path, monkeypatch):
    prefix = write(tmp_path / "d", [5, 6, 7, 8])
    prepare.write(Source("d", prefix, 3, "flat"), 1, [])
    Source("d", prefix, 3, "flat")
    write(tmp_path / "d", [6, 5, 7, 8])
    with pytest.raises(BorealError, match=r"d.idx: not the file that .*d.index was prepared from"):
        Source("d", prefix, 3, "flat")


def test_a_stopped_prepare_goes_on_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    prefix = write(tmp_path / "d", random_lengths(1))

    class Stopped(Exception):
        pass

    def stop(what, done, total):
        if what == "d epoch 1" and done == total:
            raise Stopped

    with pytest.raises(Stopped):
        prepare.write(Source("d", prefix, 3, "align"), 3, [2], progress=stop)
    (folder,) = [path for path in (tmp_path / "d.index").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0.align-2", "epoch-0.starts", "index.json"]
    # Killed outright, the unfinished file stays; it is overwritten.
    (folder / "epoch-1.starts.partial").write_bytes(b"x" * 10_000)
    before = (folder / "epoch-0.starts").stat().st_mtime_ns
    prepare.write(Source("d", prefix, 3, "align"), 3, [2])
    assert (folder / "epoch-0.starts").stat().st_mtime_ns == before
    whole = tmp_path / "again"
    whole.mkdir()
    os.link(f"{prefix}.bin", whole / "d.bin")
    os.link(f"{prefix}.idx", whole / "d.idx")
    prepare.write(Source("d", str(whole / "d"), 3, "align"), 3, [2])
    fresh = whole / "d.index" / folder.name
    assert {p.name: p.read_bytes() for p in fresh.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_second_writer_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    prefix = write(tmp_path / "d", ODD_LENGTHS)
    source = Source("d", prefix, 3, "flat")
    (tmp_path / "d.index").mkdir()
    with prepare._alone(tmp_path / "d.index"), pytest.raises(BorealError, match="another prepare is writing"):
        prepare.write(source, 1, [])
    monkeypatch.setattr(prepare, "SPARE", 1 << 60)
    with pytest.raises(BorealError, match="Free some space"):
        prepare.write(source, 1, [])


def test_limits_of_int32_are_refused(tmp_path):
    """Documents of a file and tokens of a document, in files that are nothing but holes."""
    many = tmp_path / "many"
    with open(idx_path(many), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, 2**31, 2**31 + 1))
        file.truncate(HEADER.size + 12 * 2**31 + 8 * (2**31 + 1))
    bin_path(many).touch()
    with pytest.raises(BorealError, match="2,147,483,648 documents. Expected: at most 2,147,483,646"):
        IndexedReader(many)
    long = tmp_path / "long"
    half = 2**30
    with open(idx_path(long), "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 1, 2, 2))
        for values, kind in (([half, half], "<i4"), ([0, half], "<i8"), ([0, 2], "<i8")):
            file.write(np.array(values, kind).tobytes())
    with open(bin_path(long), "wb") as file:
        file.truncate(2 * half)
    with pytest.raises(BorealError, match="a document of 2,147,483,648 tokens. Expected: at most 2,147,483,647"):
        IndexedReader(long)


CHILD = """
import sys, time
from boreal_megatron.data import prepare, source
from boreal_megatron.data.source import Source
prefix, block, chunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if block:
    prepare.BLOCK, prepare.CHUNK, source.CHUNK = block, chunk, chunk
def memory(kind):
    return int(next(l for l in open("/proc/self/status") if l.startswith(kind)).split()[1]) / 1024
before, began = memory("VmHWM"), time.perf_counter()
prepare.write(Source("d", prefix, 3, "align", tokens=False, piece_tokens=int(sys.argv[4]) or None), 1, [4])
made, seconds = memory("VmHWM"), time.perf_counter() - began
began = time.perf_counter()
ready = Source("d", prefix, 3, "align", piece_tokens=int(sys.argv[4]) or None)
walk = ready.walk(0, ready.total_tokens // 2, 4, 2048, 64)
steps = [next(walk) for _ in range(64)]
ready.read_window((steps[0].epoch, steps[0].start), 4, 2048)
print(before, made, seconds, memory("RssAnon"), time.perf_counter() - began)
"""


def measured(prefix, block=0, chunk=0, piece_tokens=0):
    """(peak MB before, peak MB after preparing, seconds, MB of its own while it reads, seconds) of a process that
    prepares and reads. What it maps while it reads is shared with all ranks of the node, and the system's to drop."""
    command = [sys.executable, "-c", CHILD, prefix, str(block), str(chunk), str(piece_tokens)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return list(map(float, done.stdout.split()))


@pytest.mark.parametrize("piece_tokens", [0, 1500])
def test_memory_does_not_grow_with_documents(tmp_path, piece_tokens):
    """With small blocks and chunks; one int64 array of 1,200,000 items would be 9.6 MB, of 200,000 1.6 MB. The maps of
    a few chunks, which the system makes larger for larger files, stop growing at about 5 MB."""
    small, large = (
        measured(sparse(tmp_path / f"d{n}", n), 1 << 14, 1 << 12, piece_tokens) for n in (200_000, 1_200_000)
    )
    assert large[1] - small[1] < 6, (small, large)
    assert large[3] - small[3] < 2, (small, large)


@pytest.mark.slow
def test_ten_million_documents(tmp_path):
    """Blocks as they are; the files it writes and reads are 360 MB."""
    prefix = sparse(tmp_path / "d", 10_000_000)
    before, made, seconds, read, opened = measured(prefix)
    print(f"10,000,000 documents: prepared in {seconds:.1f} s, {made:.0f} MB (of which {before:.0f} MB before)")
    print(f"opened and 64 windows planned in {opened:.1f} s, {read:.0f} MB of its own")
    assert made - before < 120
    assert read < 60
