"""Data sets behind a URL: the same reads as from local files, and failures that say what is wrong."""

import contextlib
import json
import os
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.data_runs import PHASES, fingerprint, run_config, write_sources
from tests.support.launch import ROOT

from boreal_megatron.data import remote
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.indexed import IndexedReader, IndexedWriter
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError

LENGTHS = [3, 0, 1, 17, 40, 0, 0, 2, 9, 25]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One data set at three places: a local prefix, and two URLs."""
    folder = tmp_path_factory.mktemp("remote")
    with IndexedWriter(folder / "d", np.uint16) as writer:
        writer.append_many(np.arange(sum(LENGTHS)) * 7 % 1000, LENGTHS)
    storage = fsspec.filesystem("memory")
    for ending in (".bin", ".idx"):
        storage.pipe_file(f"/bucket/d{ending}", (folder / f"d{ending}").read_bytes())
    yield {"local": str(folder / "d"), "memory": "memory://bucket/d", "file": f"file://{folder}/d"}
    storage.rm("/bucket", recursive=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,) * len(remote.PAUSES))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_range_is_the_local_one(places, data):
    document = data.draw(st.integers(0, len(LENGTHS) - 1))
    offset = data.draw(st.integers(0, LENGTHS[document]))
    length = data.draw(st.integers(0, LENGTHS[document] - offset))
    local = IndexedReader(places["local"])
    expected = local.read(document, offset, length)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, local.total_tokens)] * 2)))
    for place in ("memory", "file"):
        there = IndexedReader(places[place])
        found = there.read(document, offset, length)
        assert found.dtype == expected.dtype and found.tolist() == expected.tolist()
        assert there.document(document).tolist() == local.document(document).tolist()
        assert there.tokens[start:stop].tolist() == local.tokens[start:stop].tolist()


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_a_source_is_the_same_wherever_it_lies(places, place, boundaries):
    local, there = (Source("s", places[where], 5, boundaries, piece_tokens=6) for where in ("local", place))
    assert there.fingerprint == local.fingerprint
    assert (there.total_tokens, there.bags(4)) == (local.total_tokens, local.bags(4))
    for offset in (0, 20, 41):
        a, b = (source.read_window((1, offset), 3, 5) for source in (local, there))
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_the_loader_reads_urls_and_their_sidecars(tmp_path):
    prefixes = write_sources(tmp_path)
    storage = fsspec.filesystem("memory")
    for name in prefixes:
        for ending in (".bin", ".idx"):
            storage.pipe_file(f"/run/{name}{ending}", (tmp_path / f"{name}{ending}").read_bytes())
    urls = {name: f"memory://run/{name}" for name in prefixes}
    read = {}
    for where, places in (("local", prefixes), ("memory", urls)):
        config = run_config(places, validation=places["b"], prefetch_workers=4)
        with contextlib.closing(Loader(config, 0, 1, "cpu")) as loader:
            ledger, found = Ledger(), [fingerprint(batch) for batch in loader.validation(4, 8, 5)]
            for phase in (PHASES[0], PHASES[0], PHASES[1]):
                batches, ledger = loader.step(phase, ledger)
                found += [fingerprint(batch) for batch in batches]
            read[where] = found, ledger, loader.fingerprints()
    assert read["memory"] == read["local"]
    storage.pipe_file("/run/a.meta.json", json.dumps({"tokenizer_sha256": "1" * 64, "vocab_size": 20_001}).encode())
    with pytest.raises(BorealError, match=r"'a' \(memory://run/a\) has a vocabulary of 20001"):
        Loader(config, 0, 1, "cpu")
    storage.rm("/run", recursive=True)


class Counting:
    """A storage that passes everything on and notes what was read."""

    def __init__(self, storage, fail=()):
        self.storage, self.read, self.fail = storage, [], list(fail)

    def size(self, path):
        return self.storage.size(path)

    def cat_file(self, path, start=None, end=None):
        self.read.append((os.path.basename(path), start, end))
        if self.fail:
            error = self.fail.pop(0)
            if isinstance(error, Exception):
                raise error
            end -= error
        return self.storage.cat_file(path, start=start, end=end)


def counted(monkeypatch, fail=()):
    """Makes every new Object read through one Counting, which is returned."""
    counting = Counting(fsspec.filesystem("memory"), fail)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (counting, url.removeprefix("memory:/")))
    return counting


def test_the_index_is_read_once_and_tokens_by_their_range(places, monkeypatch):
    counting = counted(monkeypatch)
    source = Source("s", places["memory"], 5, "flat")
    assert source.fingerprint
    assert counting.read == [("d.idx", None, None)]
    source.reader.read(3, 2, 5)
    assert counting.read[1:] == [("d.bin", 2 * (4 + 2), 2 * (4 + 7))]


def test_what_passes_is_tried_again_up_to_a_bound(places, monkeypatch, impatient):
    reader_of = IndexedReader(places["local"])
    flaky = [ConnectionResetError("reset"), 1, TimeoutError()]  # an error, one byte too few, another error
    counting = counted(monkeypatch)
    reader = IndexedReader(places["memory"])
    counting.read.clear()
    counting.fail = list(flaky)
    assert reader.read(3, 0, 5).tolist() == reader_of.read(3, 0, 5).tolist()
    assert len(counting.read) == 4 == remote.ATTEMPTS
    counting.fail = [ConnectionResetError("reset")] * 9
    with pytest.raises(BorealError, match=r"d.bin: asked for 10 bytes from 8 on, 4 times .*ConnectionResetError: reset"):
        reader.read(3, 0, 5)
    assert len(counting.read) == 8
    counting.fail = [3] * 9
    with pytest.raises(BorealError, match=r"asked for 10 bytes .* 7 bytes came back"):
        reader.read(3, 0, 5)
    counting.fail = [PermissionError("forbidden")]
    counting.read.clear()
    with pytest.raises(BorealError, match="forbidden. Check the URL and the rights"):
        reader.read(3, 0, 5)
    assert len(counting.read) == 1


def test_wrong_urls_say_what_is_missing(places, monkeypatch):
    storage = fsspec.filesystem("memory")
    with pytest.raises(BorealError, match="memory://bucket/none.idx: no such object"):
        IndexedReader("memory://bucket/none")
    storage.pipe_file("/bucket/only.idx", storage.cat_file("/bucket/d.idx"))
    with pytest.raises(BorealError, match="memory://bucket/only.bin: no such object"):
        IndexedReader("memory://bucket/only")
    storage.pipe_file("/bucket/only.bin", storage.cat_file("/bucket/d.bin")[:-2])
    with pytest.raises(BorealError, match=r"only.bin: 192 bytes. Expected: 194 bytes: 97 tokens of uint16"):
        IndexedReader("memory://bucket/only")
    storage.pipe_file("/bucket/only.idx", storage.cat_file("/bucket/d.idx")[:-8])
    with pytest.raises(BorealError, match="memory://bucket/only.idx: .* bytes. Expected: .* bytes for 10 sequences"):
        IndexedReader("memory://bucket/only")
    with pytest.raises(BorealError, match="nothing://a.idx: .*nothing.* Expected: a scheme"):
        IndexedReader("nothing://a")
    # Whatever is installed here, the package of this scheme is not.
    entry = {"class": "no_such_package.Storage", "err": "Install no_such_package to access bare metal"}
    monkeypatch.setitem(known_implementations, "bare", entry)
    with pytest.raises(BorealError, match="bare://a.idx: Install .*: pip install no_such_package"):
        IndexedReader("bare://a")


def test_local_data_needs_no_fsspec(places):
    code = """
import sys
from boreal_megatron.data.indexed import IndexedReader
IndexedReader(sys.argv[1])
print("fsspec" in sys.modules)
"""
    for place, needed in (("local", "False\n"), ("file", "True\n")):
        words = [sys.executable, "-c", code, places[place]]
        assert subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout == needed
