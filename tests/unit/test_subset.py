"""Splitting and sampling: every document in one part, in order, whatever the blocks; nothing half-written."""

import itertools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boreal_megatron.data import blocks
from boreal_megatron.data.inspect import check
from boreal_megatron.data.merge import merge
from boreal_megatron.data.subset import hashes_of, render, sample, split
from boreal_megatron.errors import BorealError, ProblemsError
from tests.support.finished import contents, documents, make, provenance, read, sha256


def quiet(prefix, outs, seed=None):
    return split(prefix, outs, seed=seed, progress=False)


def small(patch, block, piece):
    patch.setattr(blocks, "BLOCK", block)
    patch.setattr(blocks, "PIECE_TOKENS", piece)


def numbered(prefix, docs):
    """Side-cars that tell which document each row belongs to."""
    n = np.arange(len(docs))
    return make(prefix, docs, meta={"files": ["a", "b"], "tst": {"bag": 3, "boundaries": "drop_tail"}},
                provenance=provenance(n % 2, 7 * n), weights=n.astype(np.float32), bins=n.astype(np.int16))  # fmt: skip


def numbers(prefix, docs):
    """Which documents a part holds, by its side-cars; all of it must tell the same."""
    got = np.load(f"{prefix}.bins.npy").tolist()
    assert np.load(f"{prefix}.weights.npy").tolist() == got
    assert np.load(f"{prefix}.provenance.npy").tolist() == [(n % 2, 7 * n) for n in got]
    assert read(prefix) == [docs[n] for n in got]
    bags = [sum(map(len, docs[n])) // 3 for n in got]
    assert np.load(f"{prefix}.bags.npy").tolist() == np.cumsum([0, *bags]).tolist()
    meta = json.loads(open(f"{prefix}.meta.json").read())
    assert meta["tst"] == {"bag": 3, "boundaries": "drop_tail", "bags": sum(bags)}
    assert meta["documents"] == len(got) and meta["tokens"] == sum(len(s) for n in got for s in docs[n])
    return got


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    docs=documents.map(lambda docs: docs + [[[5]]] * 9),
    seed=st.none() | st.integers(0, 2**40),
    shares=st.sampled_from([(1, 2), (None, 3), (2, None, 1), (0.5, 0.5), (0.6, None), (0.4, 0.3, 0.3)]),
    block=st.integers(1, 7),
    piece=st.integers(1, 20),
)
def test_parts_partition_the_documents(tmp_path_factory, docs, seed, shares, block, piece):
    folder = tmp_path_factory.mktemp("split")
    if None not in shares and isinstance(shares[0], int):
        shares = (*shares[:-1], len(docs) - sum(shares[:-1]))
    prefix = numbered(folder / "all", docs)
    outs = {folder / f"part{n}": share for n, share in enumerate(shares)}
    with pytest.MonkeyPatch.context() as patch:
        small(patch, block, piece)
        try:
            result = quiet(prefix, outs, seed)
        except BorealError as error:  # chance left a part without documents, or with empty ones only
            assert "no tokens fall to it" in str(error) and not list(folder.glob("part*"))
            return
    parts = [numbers(out, docs) for out in outs]
    assert sorted(itertools.chain(*parts)) == list(range(len(docs)))
    assert all(part == sorted(part) for part in parts)
    assert [p["documents"] for p in result["parts"]] == [len(part) for part in parts]
    for part, share in zip(parts, shares):
        if isinstance(share, int):
            assert len(part) == share
        elif share and seed is None:
            assert abs(len(part) - share * len(docs)) <= 1
    if seed is None:
        assert list(itertools.chain(*parts)) == list(range(len(docs)))
    assert check(outs, progress=False)["problems"] == []


@pytest.fixture
def thousand(tmp_path):
    rng = np.random.default_rng(3)
    docs = [[rng.integers(1, 50, rng.integers(0, 30)).tolist()] for _ in range(1000)]
    return numbered(tmp_path / "all", docs), docs


def test_where_a_document_falls_depends_on_no_other(thousand, tmp_path):
    prefix, docs = thousand
    quiet(prefix, {tmp_path / "t": 0.7, tmp_path / "v": None}, seed=5)
    fewer = numbered(tmp_path / "fewer", docs[:500])
    quiet(fewer, {tmp_path / "t2": 0.7, tmp_path / "v2": None}, seed=5)
    valid = numbers(tmp_path / "v", docs)
    assert numbers(tmp_path / "v2", docs) == [n for n in valid if n < 500]
    assert abs(len(valid) - 300) < 60  # 4 standard deviations of 1000 draws
    quiet(prefix, {tmp_path / "t3": 0.7, tmp_path / "v3": None}, seed=6)
    assert numbers(tmp_path / "v3", docs) != valid


def test_samples_have_their_size_and_lie_within_each_other(thousand, tmp_path):
    prefix, docs = thousand
    lengths = [len(doc[0]) for doc in docs]

    def taken(name, **size):
        result = sample(prefix, tmp_path / name, **size, seed=8, progress=False)
        got = numbers(tmp_path / name, docs)
        assert result["parts"][0]["documents"] == len(got) and got == sorted(got)
        return got

    ten, hundred = taken("a", documents=10), taken("b", documents=100)
    assert len(ten) == 10 and len(hundred) == 100 and set(ten) < set(hundred)
    some = taken("c", tokens=4321)
    order = np.argsort(hashes_of(8, 0, 1000))
    reached = np.searchsorted(np.cumsum(np.array(lengths)[order]), 4321) + 1
    assert sorted(order[:reached]) == some and sum(lengths[n] for n in some) >= 4321
    fifth, half = taken("d", fraction=0.2), taken("e", fraction=0.5)
    assert set(fifth) < set(half) and abs(len(half) - 500) < 64  # 4 standard deviations
    assert taken("f", documents=1000) == taken("g", fraction=1.0) == taken("h", tokens=sum(lengths)) == [*range(1000)]
    assert contents(tmp_path / "f")[".bin"] == contents(prefix)[".bin"]
    assert taken("i", documents=100) == hundred


def test_hashes_do_not_change():
    """Known answers: SplitMix64 from state 0 gives these, and a split of today must be that of tomorrow."""
    mask = 2**64 - 1

    def mix(x):
        x = (x + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    assert [mix(0), mix(1)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    for seed in (0, 7, -1, 2**63 + 5):
        assert hashes_of(seed, 10, 4).tolist() == [mix((n + mix(seed % 2**64)) & mask) for n in range(10, 14)]


def test_a_part_and_its_source(thousand, tmp_path):
    prefix, _ = thousand
    result = quiet(prefix, {tmp_path / "t": 0.9, tmp_path / "v": 0.1}, seed=1)
    meta = json.loads((tmp_path / "v.meta.json").read_text())
    source = {"prefix": str(prefix), "bin_sha256": sha256(tmp_path / "all.bin"), "split": 0.1, "seed": 1}
    assert meta["made_of"] == [source] and "text_bytes" not in meta
    assert "documents" in render(result) and str(tmp_path / "v") in render(result)
    merge([tmp_path / "t", tmp_path / "v"], tmp_path / "both", progress=False)
    assert check([tmp_path / "both"], progress=False)["problems"] == []


def test_lists_follow_the_documents_that_are_taken(thousand, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    prefix, docs = thousand
    text = "".join(f'{{"document": {n}, "was": {n}}}\n' for n in range(0, 1000, 3))
    (tmp_path / "all.special.jsonl").write_text(text)
    (tmp_path / "all.quarantine.raw").write_text("x\n")
    sample(prefix, tmp_path / "s", documents=300, progress=False)
    taken = numbers(tmp_path / "s", docs)
    rows = [json.loads(line) for line in open(tmp_path / "s.special.jsonl")]
    assert [row["was"] for row in rows] == [n for n in taken if n % 3 == 0]
    assert [row["document"] for row in rows] == [at for at, n in enumerate(taken) if n % 3 == 0]
    assert not (tmp_path / "s.quarantine.raw").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares, message",
    [
        ((0.9, 0.2), "1.1.* of the whole together; expected 1.0"),
        ((0.5, 0.4), "0.9 of the whole together"),
        ((100, 2), "102 documents together; expected 4"),
        ((1, 2), "3 documents together"),
        ((4, None), "4 documents, and the rest; expected less than 4"),
        ((0.5, 2), "one kind"),
        ((None, None), "the rest given to several"),
        ((), "the rest given to several"),
        ((0, None), "a share of 0"),
        ((-0.5, 1.5), "a share of -0.5"),
    ],
)
def test_shares_that_are_not_the_whole(tmp_path, shares, message):
    prefix = make(tmp_path / "a", [[[1]]] * 4)
    with pytest.raises(ProblemsError, match=message):
        quiet(prefix, {tmp_path / f"p{n}": share for n, share in enumerate(shares)})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "size, message",
    [
        ({}, "sizes given: none"),
        ({"documents": 1, "fraction": 0.5}, "documents, fraction"),
        ({"documents": 5}, "documents=5.*at most 4"),
        ({"tokens": 9}, "tokens=9.*at most 8"),
        ({"fraction": 1.5}, "fraction=1.5.*at most 1.0"),
        ({"documents": 0}, "above 0"),
        ({"documents": 1.5}, "a whole number"),
        ({"fraction": 1e-30}, "no tokens fall to it"),
    ],
)
def test_sizes_that_there_are_not(tmp_path, size, message):
    prefix = make(tmp_path / "a", [[[1, 2]]] * 4)
    with pytest.raises(BorealError, match=message):
        sample(prefix, tmp_path / "s", **size, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_source_is_never_written_over(tmp_path):
    prefix = make(tmp_path / "a", [[[1, 2]]] * 4)
    before = contents(prefix)
    with pytest.raises(BorealError, match="the same data set"):
        quiet(prefix, {tmp_path / "x" / ".." / "a": 0.5, tmp_path / "v": None})
    with pytest.raises(BorealError, match="the same data set"):
        quiet(prefix, {tmp_path / "v": 0.5, f"{tmp_path}//v": None})
    with pytest.raises(BorealError, match="the same data set"):
        sample(prefix, prefix, documents=1, progress=False)
    assert contents(prefix) == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("what", ["bin", "idx", "sidecar", "second part"])
def test_failure_keeps_every_earlier_output(tmp_path, what):
    prefix = numbered(tmp_path / "a", [[[1, 2]], [[3]], [[4]], []])
    outs = {tmp_path / "t": 2, tmp_path / "v": None}
    quiet(prefix, outs)
    before = [contents(out) for out in outs]
    if what == "bin":
        os.truncate(f"{prefix}.bin", 4)
    elif what == "idx":
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(-16, os.SEEK_END)
            file.write(b"\x09")
    elif what == "sidecar":
        np.save(f"{prefix}.weights.npy", np.ones(3, np.float32))
    else:
        outs = {tmp_path / "t": 3, tmp_path / "v": None}  # the empty document is all that is left
    with pytest.raises(BorealError):
        quiet(prefix, outs)
    assert [contents(out) for out in outs] == before and not list(tmp_path.glob("*.partial"))


def test_an_unwritable_folder_leaves_no_part_at_all(tmp_path):
    prefix = numbered(tmp_path / "a", [[[1, 2]], [[3]], [[4]]])
    (tmp_path / "file").write_text("")
    with pytest.raises(BorealError, match="cannot be written"):
        quiet(prefix, {tmp_path / "t": 2, tmp_path / "file" / "v": None})
    assert not list(tmp_path.glob("t.*"))
