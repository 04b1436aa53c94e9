"""Merging: the bytes of megatron-core's own builder and of one run over everything, or no change at all."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boreal_megatron.data import blocks, inputs, output
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.merge import find_shards, merge, merge_shards, render
from boreal_megatron.data.tokenize import preprocess
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.errors import BorealError, ProblemsError
from tests.support.finished import contents, documents, make, provenance, read

ROOT = Path(__file__).parents[2]
PLAIN = [[[1, 2, 3]], [[4]], [[5, 6]]]
FOREIGN = [[[1, 2], [3]], [], [[]], [[4, 5, 6, 7], [], [8]], []]  # several sequences, none, an empty one


def quiet(prefixes, out):
    return merge(prefixes, out, progress=False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and pieces so small that every data set here has many."""
    monkeypatch.setattr(blocks, "BLOCK", 2)
    monkeypatch.setattr(blocks, "PIECE_TOKENS", 3)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatron_core(tmp_path, dtype, small_blocks):
    from megatron.core.datasets import indexed_dataset as theirs
    names = [make(tmp_path / n, docs, dtype) for n, docs in (("a", PLAIN), ("b", FOREIGN), ("c", PLAIN[::-1]))]
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "mcore.bin"), dtype=dtype)
    for name in names:
        builder.add_index(str(name))
    builder.finalize(str(tmp_path / "mcore.idx"))
    result = quiet(names, tmp_path / "ours")
    assert contents(tmp_path / "ours") == contents(tmp_path / "mcore")
    assert (result["documents"], result["tokens"]) == (11, 20)
    assert "11 documents, 20 tokens" in render(result)
    assert len(theirs.IndexedDataset(str(tmp_path / "ours"))) == len([s for d in PLAIN + FOREIGN + PLAIN for s in d])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sets=st.lists(documents, min_size=1, max_size=4),
    block=st.integers(1, 7),
    piece=st.integers(1, 9),
    data=st.data(),
)
def test_merging_is_concatenation(tmp_path_factory, sets, block, piece, data):
    folder = tmp_path_factory.mktemp("merge")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    names, all_docs, rows = [], [doc for docs in sets for doc in docs], []
    for n, docs in enumerate(sets):
        files = [f"{rng.integers(4)}.txt" for _ in range(3)]
        files = sorted(set(files))
        prov = provenance(rng.integers(len(files), size=len(docs)), rng.integers(2**40, size=len(docs)))
        rows += [(files[row["file"]], int(row["offset"])) for row in prov]
        weights, bins = rng.random(len(docs), np.float32), rng.integers(9, size=len(docs))
        names.append(make(folder / f"p{n}", docs, meta={"files": files, "tst": {"bag": 4, "boundaries": "align"}},
                          provenance=prov, weights=weights, bins=bins))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        patch.setattr(blocks, "PIECE_TOKENS", piece)
        quiet(names, folder / "out")
    assert read(folder / "out") == all_docs
    whole = make(folder / "whole", all_docs, meta={})
    assert contents(folder / "out")[".bin"] == contents(whole)[".bin"]
    assert contents(folder / "out")[".idx"] == contents(whole)[".idx"]
    for name in ("weights", "bins"):
        parts = [np.load(f"{prefix}.{name}.npy") for prefix in names]
        joined = np.load(folder / f"out.{name}.npy")
        assert joined.dtype == parts[0].dtype and (joined == np.concatenate(parts)).all()
    meta = json.loads((folder / "out.meta.json").read_text())
    merged = np.load(folder / "out.provenance.npy")
    assert [(meta["files"][row["file"]], int(row["offset"])) for row in merged] == rows
    assert len(set(meta["files"])) == len(meta["files"])
    bags = np.load(folder / "out.bags.npy")
    lengths = [sum(map(len, doc)) for doc in all_docs]
    assert bags.tolist() == np.cumsum([0] + [-(-n // 4) for n in lengths]).tolist()
    assert meta["tst"] == {"bag": 4, "boundaries": "align", "bags": int(bags[-1])}
    own = json.loads((folder / "whole.meta.json").read_text())
    assert {k: meta[k] for k in ("documents", "tokens", "bin_sha256", "idx_sha256")} == {
        k: own[k] for k in ("documents", "tokens", "bin_sha256", "idx_sha256")
    }


@pytest.fixture(scope="module")
def corpus_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = [p.read_text(encoding="utf-8") for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:12]]
    train_bpe(texts[:4], 400, folder / "tokenizer")
    for n in range(3):
        rows = [json.dumps({"text": text[i : i + 900]}) for text in texts[n::3] for i in range(0, 9000, 900)]
        (folder / f"{n}.jsonl").write_text("\n".join([*rows, *["{"] * n]) + "\n")
    return folder


def test_same_as_tokenizing_everything_in_one_run(corpus_files, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SMALLEST_PART", 5_000)
    files = [str(corpus_files / f"{n}.jsonl") for n in range(3)]

    def run(out, shard=(0, 1)):
        made = preprocess(
            files, corpus_files / "tokenizer", out, workers=1, on_bad="quarantine", max_bad=1, tst_bag=4, shard=shard,
            tst_boundaries="align", progress=False,
        )  # fmt: skip
        return Path(made["prefix"])

    whole = run(tmp_path / "whole")
    for shard in range(3):
        run(tmp_path / "out", (shard, 3))
    [result] = merge_shards(tmp_path / "out", progress=False)
    assert result["prefix"] == str(tmp_path / "out_text_document")
    ours, theirs = contents(tmp_path / "out_text_document"), contents(whole)
    assert ours.keys() == theirs.keys() >= {".bags.npy", ".provenance.npy", ".quarantine.raw"}
    assert all(ours[ending] == theirs[ending] for ending in ours if ending != ".meta.json")
    ours, theirs = json.loads(ours[".meta.json"]), json.loads(theirs[".meta.json"])
    assert {key: ours.get(key) for key in theirs} == theirs and ours["skipped"]["malformed JSON"] == 3


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().decode("utf-8", "surrogateescape").splitlines()]


def test_lists_follow_their_documents(tmp_path, small_blocks):
    a, b, c = (make(tmp_path / name, PLAIN, meta={}) for name in "abc")
    for prefix, documents_, raws in ((a, (0, 2), (b"{\n", b"bad\n")), (c, (1,), (b"\xff\n",))):
        rows = [{"document": n, "file": f"{prefix.name}\udcff", "tokens": ["<s>"]} for n in documents_]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(f"{prefix}.special.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
        starts = np.cumsum([0, *map(len, raws)])
        rows = [{"reason": "x", "raw_start": int(n), "raw_bytes": len(raw) - 1} for n, raw in zip(starts, raws)]
        rows.append({"reason": "y"})
        Path(f"{prefix}.quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(f"{prefix}.quarantine.raw").write_bytes(b"".join(raws))
    quiet([a, b, c], tmp_path / "out")
    rows = lines_of(tmp_path / "out.special.jsonl")
    assert [(row["document"], row["file"]) for row in rows] == [(0, "a\udcff"), (2, "a\udcff"), (7, "c\udcff")]
    raw = (tmp_path / "out.quarantine.raw").read_bytes()
    rows = lines_of(tmp_path / "out.quarantine.jsonl")
    cut = [raw[r["raw_start"] :][: r["raw_bytes"]] for r in rows if "raw_start" in r]
    assert cut == [b"{", b"bad", b"\xff"] and [r["reason"] for r in rows] == ["x", "x", "y", "x", "y"]
    quiet([b], tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {".bin", ".idx", ".meta.json"}
    for wrong in ('{"document": 3}', '{"document": 2}\n{"document": 0}', "{"):
        Path(f"{b}.special.jsonl").write_text(wrong)
        with pytest.raises(BorealError, match="b.special.jsonl"):
            quiet([b], tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {".bin", ".idx", ".meta.json"}


# --- shards -----------------------------------------------------------------------------------------------------------


def shards(folder, count=3, suffix="_text_document", **meta):
    return [make(folder / f"o-{n:05}-of-{count:05}{suffix}", PLAIN, meta={"inputs": ["x"], "files": ["x"], **meta})
            for n in range(count)]  # fmt: skip


def test_shards_are_found_in_order(tmp_path):
    made = shards(tmp_path, 12)
    shards(tmp_path, 2, "_title_document")
    make(tmp_path / "o-other", PLAIN)
    make(tmp_path / "other-00000-of-00002_text_document", PLAIN)
    found = find_shards(tmp_path / "o")
    assert list(found) == [str(tmp_path / "o_text_document"), str(tmp_path / "o_title_document")]
    assert found[str(tmp_path / "o_text_document")] == [str(path) for path in made]
    assert [r["documents"] for r in merge_shards(tmp_path / "o", progress=False)] == [36, 6]


def test_missing_and_foreign_shards_are_named(tmp_path):
    with pytest.raises(BorealError, match="no shards"):
        find_shards(tmp_path / "o")
    made = shards(tmp_path, 4)
    for n in (1, 3):
        os.remove(f"{made[n]}.idx")
    with pytest.raises(ProblemsError, match="no such shard") as error:
        merge_shards(tmp_path / "o", progress=False)
    assert len(error.value.problems) == 2
    assert all(f"o-0000{n}-of-00004_text" in error.value.problems[n // 2] for n in (1, 3))
    shards(tmp_path, 2)
    with pytest.raises(ProblemsError, match="shards of 2, 4: different jobs"):
        merge_shards(tmp_path / "o", progress=False)


def test_shards_of_different_jobs_are_refused(tmp_path):
    shards(tmp_path, 2)
    make(tmp_path / "o-00001-of-00002_text_document", PLAIN, meta={"inputs": ["x"], "files": ["x"], "job": "b"})
    with pytest.raises(ProblemsError, match="job: .*one job"):
        merge_shards(tmp_path / "o", progress=False)
    assert not (tmp_path / "o_text_document.idx").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_everything_that_does_not_match_is_listed(tmp_path):
    a = make(tmp_path / "a", PLAIN, meta={})
    other = {"tokenizer_sha256": "b" * 64, "vocab_size": 51, "eod": 1, "append_eod": True}
    b = make(tmp_path / "b", PLAIN, np.int32, meta={**other, "tst": {"bag": 4, "boundaries": "flat"}})
    c = make(tmp_path / "c", PLAIN)
    d = make(tmp_path / "d", PLAIN, meta={})
    os.truncate(f"{d}.bin", 3)
    with pytest.raises(ProblemsError) as error:
        quiet([a, b, c, d, tmp_path / "e"], tmp_path / "out")
    beginnings = [problem.split(":")[0] for problem in error.value.problems]
    assert beginnings == [
        f"{d}.bin", f"{tmp_path / 'e'}.bin", "dtype", "without .meta.json",
        "tokenizer_sha256", "vocab_size", "eod", "append_eod", "tst",
    ]  # fmt: skip
    assert not list(tmp_path.glob("out*"))


def test_outputs_and_repeated_inputs_are_refused(tmp_path):
    a, b = make(tmp_path / "a", PLAIN), make(tmp_path / "b", PLAIN)
    for prefixes, out, message in (
        ([a, b], tmp_path / "x/../a", "both an input and the output"),
        ([a, b, a], tmp_path / "out", "named twice"),
        ([], tmp_path / "out", "no data sets"),
    ):
        with pytest.raises(BorealError, match=message):
            quiet(prefixes, out)
    assert read(a) == PLAIN and len(list(tmp_path.iterdir())) == 4


def test_sidecars_of_some_parts_only_are_refused(tmp_path):
    a = make(tmp_path / "a", PLAIN, weights=np.ones(3, np.float32), bins=np.zeros(3, np.int32))
    b = make(tmp_path / "b", PLAIN, bins=np.zeros(3, np.int32))
    with pytest.raises(ProblemsError, match=f"weights: without .weights.npy: {b}"):
        quiet([a, b], tmp_path / "out")
    for wrong, message in ((np.ones(4, np.float32), "shape"), (np.ones(3), "float64"), (None, "cannot be read")):
        if wrong is None:
            (tmp_path / "b.weights.npy").write_bytes(b"\x93NUMPY")
        else:
            np.save(tmp_path / "b.weights.npy", wrong)
        with pytest.raises(BorealError, match=f"b.weights.npy: .*{message}"):
            quiet([a, b], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_provenance_that_points_nowhere_is_refused(tmp_path):
    a = make(tmp_path / "a", PLAIN, meta={}, provenance=provenance([0, 1, 0], [0, 1, 2]))
    with pytest.raises(BorealError, match="file numbers 0 to 1. Expected: 0 to 0"):
        quiet([a], tmp_path / "out")
    make(tmp_path / "a", PLAIN)
    os.remove(tmp_path / "a.meta.json")
    np.save(tmp_path / "a.bags.npy", np.arange(4))
    with pytest.raises(ProblemsError, match="no file names") as error:
        quiet([a], tmp_path / "out")
    assert "a.bags.npy: no such bags" in error.value.problems[1]


def test_a_changed_part_is_refused_and_the_earlier_output_stays(tmp_path):
    a, b = make(tmp_path / "a", PLAIN, meta={}), make(tmp_path / "b", PLAIN, meta={})
    quiet([a], tmp_path / "out")
    before = contents(tmp_path / "out")
    tokens = np.memmap(f"{b}.bin", np.uint16, "r+")
    tokens[2] ^= 1
    tokens.flush()
    with pytest.raises(BorealError, match="b.bin: sha256 .* changed since it was made"):
        quiet([a, b], tmp_path / "out")
    assert contents(tmp_path / "out") == before and not list(tmp_path.glob("*.partial"))


def test_files_of_an_earlier_output_do_not_stay_beside_the_new_one(tmp_path):
    a = make(tmp_path / "a", PLAIN, meta={"tst": {"bag": 2, "boundaries": "drop_tail"}}, weights=np.ones(3, np.float32))
    b = make(tmp_path / "b", PLAIN[1:])
    quiet([a], tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {".bin", ".idx", ".meta.json", ".weights.npy", ".bags.npy"}
    assert np.load(tmp_path / "out.bags.npy").tolist() == [0, 1, 1, 2]
    quiet([b], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(b)


def test_too_many_documents(tmp_path, monkeypatch):
    names = [make(tmp_path / name, PLAIN) for name in "ab"]
    monkeypatch.setattr(output, "MAX_DOCUMENTS", 5)
    with pytest.raises(BorealError, match="6 documents. Expected: at most 5.*sources of the blend"):
        quiet(names, tmp_path / "out")


def test_space_is_checked_before(tmp_path, monkeypatch):
    """The one thing replaced is how much space the disk says to have."""
    a = make(tmp_path / "a", PLAIN)
    need = sum(map(len, contents(a).values()))
    usage = output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(ProblemsError, match=f"{need - 1} bytes free. Expected: {need}"):
        quiet([a], tmp_path / "new/folder/out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=need))
    quiet([a], tmp_path / "new/folder/out")


SCRIPT = """
import resource, sys
import numpy as np
from boreal_megatron.data import blocks, inputs, output
from boreal_megatron.data.merge import merge
from boreal_megatron.errors import BorealError
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    merge({names!r}, {out!r}, progress=False)
except BorealError as error:
    sys.exit(str(error))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def start(names, out, setup=""):
    code = SCRIPT.format(names=[str(name) for name in names], out=str(out), setup=setup)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_full_disk_keeps_the_earlier_output(tmp_path):
    big = make(tmp_path / "big", [[[7] * 1000]] * 60)
    quiet([make(tmp_path / "a", PLAIN)], tmp_path / "out")
    before = contents(tmp_path / "out")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    process = start([big, tmp_path / "a"], tmp_path / "out", limit)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1 and "out.bin: cannot be written" in message and "free some space" in message
    assert contents(tmp_path / "out") == before and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_merge_leaves_no_index(tmp_path, sig):
    """Slowed down by tiny pieces, so that it is still at work when it is stopped."""
    big = make(tmp_path / "big", [[[7] * 20_000]] * 20)
    process = start([big], tmp_path / "out", "blocks.PIECE_TOKENS = 1")
    partial = tmp_path / "out.bin.partial"
    until = time.monotonic() + 30
    while not partial.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(sig)
    process.communicate(timeout=30)
    assert sorted(p.name for p in tmp_path.glob("out*")) == ([partial.name] if sig == signal.SIGKILL else [])
    with pytest.raises(BorealError, match="no such file"):
        IndexedReader(tmp_path / "out")
    quiet([big], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(big)


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """The index of the result is 80 MB; the process grows by less than half of that."""
    count, length = 2_000_000, 3
    names = []
    for name in "ab":
        with open(tmp_path / f"{name}.idx", "wb") as file:
            file.write(blocks.HEADER.pack(blocks.MAGIC, 1, 8, count, count + 1))
            np.full(count, length, np.int32).tofile(file)
            (np.arange(count, dtype=np.int64) * length * 2).tofile(file)
            np.arange(count + 1, dtype=np.int64).tofile(file)
        (tmp_path / f"{name}.bin").touch()
        os.truncate(tmp_path / f"{name}.bin", count * length * 2)
        names.append(tmp_path / name)
    process = start(names, tmp_path / "out")
    grown, message = process.communicate(timeout=120)
    assert process.returncode == 0, message
    assert os.path.getsize(tmp_path / "out.idx") > 80e6 and int(grown) < 40_000  # kB
    reader = IndexedReader(tmp_path / "out")
    assert len(reader) == 2 * count and reader.total_tokens == 2 * count * length
