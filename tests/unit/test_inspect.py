"""`check`: everything that is wrong with any number of data sets in one reading; `inspect` of foreign ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boreal_megatron.data import blocks, inspect
from boreal_megatron.data.inspect import Duplicates, Lengths, check, render, render_check
from boreal_megatron.errors import BorealError
from tests.support.finished import EOD, documents, make, provenance
from tests.unit.test_indexed import DAMAGE, edit, write

ROOT = Path(__file__).parents[2]
DOCS = [[[1, 2, EOD]], [[3], [4, EOD]], [[5, EOD]]]
SOUND = {"append_eod": True}


def quiet(*prefixes):
    return check(prefixes, progress=False)


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
def test_a_sound_dataset(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(blocks, "PIECE_TOKENS", piece)
    monkeypatch.setattr(blocks, "BLOCK", 2)
    rows = provenance([0, 0, 0], [0, 10, 20])
    a = make(tmp_path / "a", DOCS, meta={**SOUND, "tst": {"bag": 2, "boundaries": "align", "bags": 5}}, provenance=rows,
             weights=np.ones(3, np.float32), bins=np.arange(3), bags=np.array([0, 2, 4, 5]))  # fmt: skip
    result = quiet(a)
    assert result["problems"] == [] and result["notes"] == []
    assert result["datasets"][str(a)]["sidecars"] == ["bags", "bins", "provenance", "weights"]
    assert "nothing is wrong" in render_check(result)


@pytest.mark.parametrize("piece", [1, 2, 5, 1 << 20])
def test_every_problem_of_every_dataset_in_one_call(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(blocks, "PIECE_TOKENS", piece)
    monkeypatch.setattr(blocks, "BLOCK", 2)
    docs = [[[1, EOD, 2, EOD]], [[3]], [[7, EOD]], [], [[60, EOD]], [[7], [EOD]], [[EOD, EOD]]]
    a = make(tmp_path / "a", docs, meta={**SOUND, "documents": 9, "dtype": "int32", "bin_sha256": "0" * 64})
    b = make(tmp_path / "b", DOCS, meta={"tokenizer_sha256": "b" * 64})
    c = make(tmp_path / "c", DOCS)
    os.truncate(f"{c}.bin", 4)
    d = make(tmp_path / "d", [[[7, EOD]]])
    result = quiet(a, b, c, d, tmp_path / "e")
    assert result["problems"] == [
        f"{a}: 1 ids outside 0 to 49: another tokenizer made this, or it is damaged",
        f"{a}: the bin disagrees with {a}.meta.json: changed since it was written",
        f"{a}: the documents disagrees with {a}.meta.json: changed since it was written",
        f"{a}: ids of uint16; int32 in the .meta.json",
        f"{a}: 2 end-of-document ids that are not at the end of a document",
        f"{a}: 2 documents do not end with the end-of-document id",
        f"{b}: 3 end-of-document ids that are not at the end of a document",
        f"{c}: {c}.bin: 4 bytes. Expected: 16 bytes: 8 tokens of uint16, as the .idx says. "
        "Make the data set again, or copy both files again.",
        f"{tmp_path / 'e'}: {tmp_path / 'e'}.bin: no such file. Expected: a .bin and an .idx of the same name. "
        "Name the prefix, without an ending; copy both files again, or make them again.",
    ]
    assert result["notes"] == [
        f"{a}: 1 empty documents",
        f"{a}: 1 documents equal to one before them",
        f"{d}: no .meta.json beside it: vocabulary, document ends and checksums are not checked",
        "made by 2 different tokenizers: no model can be trained on all of them",
    ]
    assert result["duplicate_documents"] == 2  # one in a, one in d
    assert (result["documents"], result["tokens"]) == (7 + 3 + 1, 13 + 8 + 2)
    assert "PROBLEM" in render_check(result) and "9 problems" in render_check(result)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_problems(tmp_path, name):
    ending, change, expected = DAMAGE[name]
    edit(Path(f"{write(tmp_path / 'd')}{ending}"), change)
    [problem] = quiet(tmp_path / "d")["problems"]
    assert expected in problem and "Expected:" in problem


TST = {"tst": {"bag": 2, "boundaries": "align", "bags": 5}}
WRONG_SIDECARS = {
    "short weights": ({}, {"weights": np.ones(2, np.float32)}, "a.weights.npy: shape (2,) of float32"),
    "weights of another kind": ({}, {"weights": np.ones(3)}, "float64. Expected: 3 rows of float32"),
    "NaN weight": ({}, {"weights": np.array([1, np.nan, -1], np.float32)}, "2 rows that are not finite and not neg"),
    "negative bin": ({}, {"bins": np.array([1, -1, 0])}, "1 rows that are not 0 or more"),
    "bins of floats": ({}, {"bins": np.ones(3)}, "an integer dtype"),
    "file without a name": ({}, {"provenance": provenance([0, 1, -1], [0, 1, 2])}, "2 rows that are not a file"),
    "negative offset": ({}, {"provenance": provenance([0, 0, 0], [0, 1, -2])}, "1 rows that are not a file"),
    "other provenance": ({}, {"provenance": np.zeros((3, 2))}, "rows of file int32, offset int64"),
    "no bags": (TST, {}, "no a.bags.npy"),
    "bags without a word": ({}, {"bags": np.array([0, 2, 4, 5])}, "says nothing"),
    "wrong bag": (TST, {"bags": np.array([0, 2, 3, 5])}, "1 bags of 2 for the 3 tokens of document 1 under align"),
    "other bag count": ({"tst": TST["tst"] | {"bags": 6}}, {"bags": np.array([0, 2, 4, 5])}, "5 bags, 6 in the"),
    "bags from 1": (TST, {"bags": np.array([1, 3, 5, 6])}, "begins with 1"),
    "short bags": (TST, {"bags": np.array([0, 2, 4])}, "a.bags.npy: shape (3,)"),
    "objects": ({}, {"weights": np.array([{}, 1, 2], object)}, "a.weights.npy: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_SIDECARS)
def test_wrong_sidecars_are_problems(tmp_path, name):
    meta, sidecars, expected = WRONG_SIDECARS[name]
    [problem] = quiet(make(tmp_path / "a", DOCS, meta={**SOUND, **meta}, **sidecars))["problems"]
    assert expected in problem


def test_documents_too_long_for_the_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "MAX_DOCUMENT_TOKENS", 2)
    [problem] = quiet(make(tmp_path / "a", DOCS, meta=SOUND))["problems"]
    assert "2 documents of more than 2 tokens" in problem


def test_files_that_go_or_shrink_while_they_are_read(tmp_path):
    part = blocks.Part(make(tmp_path / "a", DOCS))
    [block] = part.blocks()
    os.truncate(tmp_path / "a.bin", 6)
    with pytest.raises(BorealError, match="a.bin: cut short while it was read"):
        list(part.pieces(block))
    os.remove(tmp_path / "a.bin")
    with pytest.raises(BorealError, match="a.bin: cannot be read: No such file"):
        list(part.pieces(block))
    os.remove(tmp_path / "a.idx")
    with pytest.raises(BorealError, match="a.idx: cannot be read: No such file"):
        list(part.blocks())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(docs=documents, piece=st.integers(1, 9))
def test_counts_are_those_of_the_documents(tmp_path_factory, docs, piece):
    prefix = make(tmp_path_factory.mktemp("inspect") / "d", docs, meta={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 3)
        patch.setattr(blocks, "PIECE_TOKENS", piece)
        report = inspect.inspect(prefix)
    flat = [sum(doc, []) for doc in docs]
    full = [tuple(doc) for doc in flat if doc]
    assert report["documents"] == len(docs) and report["tokens"] == sum(map(len, flat))
    assert report["empty_documents"] == len(docs) - len(full)
    assert report["duplicate_documents"] == len(full) - len(set(full))
    assert (report["smallest_id"], report["largest_id"]) == (min(map(min, full)), max(map(max, full)))
    wanted = np.quantile([len(doc) for doc in flat], list(inspect.QUANTILES.values()), method="inverted_cdf")
    assert list(report["length_quantiles"].values()) == wanted.tolist()
    assert report["problems"] == [] and str(prefix) in render(report)


def test_lengths_beyond_the_table():
    lengths = Lengths()
    lengths.SHORT, lengths.short = 4, np.zeros(4, np.int64)
    values = np.array([3, 9, 0, 4, 9, 1, 7])
    lengths.add(values[:3])
    lengths.add(values[3:])
    assert [a.tolist() for a in lengths.counted()] == [[0, 1, 3, 4, 7, 9], [1, 1, 1, 1, 1, 2]]


def test_duplicates_beyond_what_memory_holds_are_estimated(monkeypatch):
    monkeypatch.setattr(Duplicates, "LIMIT", 5000)
    rng, duplicates = np.random.default_rng(1), Duplicates()
    hashes = rng.integers(-(2**63), 2**63 - 1, size=50_000)
    for part in np.split(np.concatenate([hashes, hashes[:20_000]]), 10):
        duplicates.add(part)
    assert duplicates.bits == 4 and duplicates.size <= 5000
    assert duplicates.count() == pytest.approx(20_000, rel=0.1)  # 1,250 counted: 4 standard deviations are 11%


def test_progress_and_no_torch(tmp_path):
    a = make(tmp_path / "a", DOCS, meta=SOUND)
    code = (
        "import sys\nfrom boreal_megatron.data import inspect, merge\n"
        f"inspect.check([{str(a)!r}]); merge.merge([{str(a)!r}], {str(tmp_path / 'b')!r})\n"
        "assert not {'torch', 'megatron', 'tokenizers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "" and "check: 100%" in done.stderr and "merge: 100%" in done.stderr
