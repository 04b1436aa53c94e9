"""Every kind of input file gives the same documents, and no damaged one is passed over silently."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.test_preprocess import DOCUMENTS, ROOT, folder, jsonl, outputs, run, tokenizer  # noqa: F401

from boreal_megatron.data import inputs
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.errors import INPUT, BorealError, ProblemsError

LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACK = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}


def parquet(path, rows, row_group_size=4):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory, folder):  # noqa: F811
    out = tmp_path_factory.mktemp("plain")
    run([jsonl(out / "in.jsonl", DOCUMENTS)], folder, out / "out")
    return outputs(out / "out")


def ids(files):
    return files[".bin"], files[".idx"]


@pytest.mark.parametrize("ending", PACK)
def test_packed_files(tmp_path, folder, plain, ending):  # noqa: F811
    half = len(DOCUMENTS) // 2
    first = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:half]).encode()
    path = tmp_path / f"in.jsonl{ending}"
    path.write_bytes(PACK[ending](first) + PACK[ending](LINES[len(first) :]))  # two members are one stream
    run([path], folder, tmp_path / "out")
    assert ids(outputs(tmp_path / "out")) == ids(plain)
    provenance = np.load(tmp_path / "out_text_document.provenance.npy")
    assert provenance["offset"].tolist() == np.load(io.BytesIO(plain[".provenance.npy"]))["offset"].tolist()


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_packed_files_that_break_off(tmp_path, folder, ending, damage):  # noqa: F811
    packed = PACK[ending](LINES)
    broken = packed[: len(packed) // 2] if damage == "truncated" else b"no such thing" + packed
    (tmp_path / f"in.jsonl{ending}").write_bytes(broken)
    (tmp_path / "more.jsonl").write_text('{"text": "good"}\n')
    given = [tmp_path / f"in.jsonl{ending}", tmp_path / "more.jsonl"]
    with pytest.raises(BorealError, match=f"{damage} {NAMES[ending]}") as error:
        run(given, folder, tmp_path / "out")
    assert error.value.code == INPUT
    made = run(given, folder, tmp_path / "out", on_bad="skip")
    assert made["skipped"] == {f"{damage} {NAMES[ending]}": 1}
    data = IndexedReader(made["prefix"])
    kept = [i for i in range(len(data) - 1)]
    assert [data.document(i).tolist()[:-1] for i in kept] == [tokens(folder, DOCUMENTS[i]) for i in kept]


def tokens(folder, text):  # noqa: F811
    from boreal_megatron.data.tokenizer import Tokenizer

    return Tokenizer.load(folder).encode(text)


@pytest.mark.parametrize("part", [1, 1 << 20])
def test_parquet(tmp_path, folder, plain, monkeypatch, part):  # noqa: F811
    monkeypatch.setattr(inputs, "SMALLEST_PART", part)
    path = parquet(tmp_path / "in.parquet", [{"n": n, "text": text} for n, text in enumerate(DOCUMENTS)])
    made = run([path], folder, tmp_path / "out", workers=1)
    assert ids(outputs(tmp_path / "out")) == ids(plain) and made["parts"] == (5 if part == 1 else 1)
    assert np.load(tmp_path / "out_text_document.provenance.npy")["offset"].tolist() == list(range(len(DOCUMENTS)))


def test_bad_parquet(tmp_path, folder):  # noqa: F811
    path = parquet(tmp_path / "in.parquet", [{"text": "good"}, {"text": None}, {"text": ""}])
    made = run([path], folder, tmp_path / "out", on_bad="skip")
    assert made["documents"] == 1 and made["skipped"] == {"no text (null)": 1, "empty text": 1}
    assert made["skipped_first"][0].startswith(f"{path}:2: byte 1: no text (null)")
    path = parquet(tmp_path / "bytes.parquet", [{"text": b"good"}, {"text": b"caf\xe9"}])
    made = run([path], folder, tmp_path / "out", on_bad="quarantine")
    assert made["skipped"] == {"invalid UTF-8": 1}
    assert (tmp_path / "out_text_document.quarantine.raw").read_bytes() == b"caf\xe9\n"
    numbers = parquet(tmp_path / "numbers.parquet", [{"text": 7, "body": "a"}])
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ProblemsError) as error:
        run([numbers, tmp_path / "cut.parquet", path], folder, tmp_path / "out")
    assert [str(p) for p in error.value.problems] == [
        f"{numbers}: column 'text' holds int64; expected text; name another with --json-key",
        error.value.problems[1],
    ] and "not a whole Parquet file" in error.value.problems[1]
    with pytest.raises(ProblemsError, match="no column 'prose'; it has text, body"):
        run([numbers], folder, tmp_path / "out", json_key="prose")


def test_globs_and_packed_text(tmp_path, folder, plain):  # noqa: F811
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number:02d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    run([str(tmp_path / "*.txt.gz")], folder, tmp_path / "out")
    assert ids(outputs(tmp_path / "out")) == ids(plain)


def test_standard_input(tmp_path, folder, plain):  # noqa: F811
    command = [sys.executable, "-m", "boreal_megatron", "data", "preprocess", "-", "--tokenizer", str(folder), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, input=LINES, capture_output=True, cwd=ROOT, check=True)
    assert ids(outputs(tmp_path / "out")) == ids(plain) and json.loads(done.stdout)["files"] == ["-"]
    assert not list(tmp_path.glob("*.parts"))
    done = subprocess.run(command, input=b"{bad\n", capture_output=True, cwd=ROOT)
    assert done.returncode == INPUT and b"malformed JSON" in done.stderr


def test_without_orjson_it_is_the_same(tmp_path, folder, plain, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inputs, "fast_loads", json.loads)
    run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out")
    assert ids(outputs(tmp_path / "out")) == ids(plain)
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "good"}\n')
    assert run([tmp_path / "bad.jsonl"], folder, tmp_path / "out", on_bad="skip")["skipped"] == {"lone surrogate": 1}


# --- what gives no document -------------------------------------------------------------------------------------------


def test_quarantine_keeps_the_bytes_and_can_be_mended(tmp_path, folder):  # noqa: F811
    bad = [b'{"txt": 1}', b'{"text": "caf\xe9"}', b"{", b'{"text": "a\\ud800b"}', b'{"text": ""}']
    good = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(line for pair in zip(good, [*bad, b"", b""], strict=False) for line in pair) + b"\n")
    made = run([source], folder, tmp_path / "out", on_bad="quarantine")
    assert (tmp_path / "out_text_document.quarantine.raw").read_bytes() == b"".join(line + b"\n" for line in bad)
    listed = [json.loads(line) for line in (tmp_path / "out_text_document.quarantine.jsonl").open()]
    assert [row["line"] for row in listed] == [2, 4, 6, 8, 10] and sum(made["skipped"].values()) == 5
    raw = (tmp_path / "out_text_document.quarantine.raw").read_bytes()
    for row, line in zip(listed, bad, strict=True):
        assert raw[row["raw_start"] : row["raw_start"] + row["raw_bytes"]] == line
        assert source.read_bytes()[row["offset"] :].startswith(line)


def test_empty_documents_kept_as_megatron_keeps_them(tmp_path, folder):  # noqa: F811
    import torch
    from megatron.core.datasets import indexed_dataset as theirs
    texts = ["", DOCUMENTS[0], "", "", DOCUMENTS[1], ""]
    made = run([jsonl(tmp_path / "in.jsonl", texts)], folder, tmp_path / "out", empty="keep")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for text in texts:
        document = [*tokens(folder, text), 0] if text else []  # no end for a document without tokens
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)] if document else [])
    builder.finalize(str(tmp_path / "m.idx"))
    assert outputs(tmp_path / "out")[".idx"] == (tmp_path / "m.idx").read_bytes()
    assert made["documents"] == 6 and len(np.load(f"{made['prefix']}.provenance.npy")) == 6
    data = IndexedReader(made["prefix"])
    assert [len(data.document(i)) > 0 for i in range(6)] == [False, True, False, False, True, False]


def test_repeated_ids(tmp_path, folder):  # noqa: F811
    rows = [{"key": n % 7, "text": text} for n, text in enumerate(DOCUMENTS[:10])]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BorealError, match=r"the id of .*in.jsonl, byte 0; 3 such documents"):
        run([source], folder, tmp_path / "out", id_key="key")
    made = run([source], folder, tmp_path / "out", id_key="key", on_bad="skip")
    data = IndexedReader(made["prefix"])
    assert made["documents"] == len(data) == 7 and made["skipped"] == {"repeated id": 3}
    assert [data.document(i).tolist()[:-1] for i in range(7)] == [tokens(folder, row["text"]) for row in rows[:7]]
    with pytest.raises(BorealError, match="missing key 'id'"):
        run([source], folder, tmp_path / "out", id_key="id")


def test_nul_and_other_controls_are_text(tmp_path, folder, tokenizer):  # noqa: F811
    texts = ["a\0b", "\x01\x1f\x7f", "\ufeff x"]
    made = run([jsonl(tmp_path / "in.jsonl", texts)], folder, tmp_path / "out")
    data = IndexedReader(made["prefix"])
    assert [tokenizer.decode(data.document(i)[:-1]) for i in range(3)] == texts


def test_provenance_finds_the_line(tmp_path, folder):  # noqa: F811
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in DOCUMENTS])
    made = run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], folder, tmp_path / "out")
    rows = np.load(f"{made['prefix']}.provenance.npy", mmap_mode="r")
    for place in (0, 7, 25, 39):
        with open(made["files"][rows["file"][place]], "rb") as file:
            file.seek(int(rows["offset"][place]))
            text = json.loads(file.readline())["text"]
        assert text == f"{'ab'[place // 20]} {DOCUMENTS[place % 20]}"


@pytest.mark.parametrize("boundaries", ["flat", "align", "drop_tail"])
def test_bags_beside_the_data(tmp_path, folder, boundaries):  # noqa: F811
    made = run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out", tst_bag=4, tst_boundaries=boundaries)
    lengths = IndexedReader(made["prefix"]).document_lengths
    each = {"align": -(-lengths // 4), "drop_tail": lengths // 4}.get(boundaries)
    if each is None:
        assert made["tst"] == {"bag": 4, "boundaries": "flat", "bags": int(lengths.sum()) // 4}
        assert not (tmp_path / "out_text_document.bags.npy").exists()
    else:
        assert np.load(f"{made['prefix']}.bags.npy").tolist() == [0, *np.cumsum(each).tolist()]
        assert made["tst"]["bags"] == each.sum()


def test_shards_are_one_run_cut(tmp_path, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inputs, "SMALLEST_PART", 3000)
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    lines.insert(13, "{bad")
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    whole = run([tmp_path / "in.jsonl"], folder, tmp_path / "whole", on_bad="skip")
    made = [run([tmp_path / "in.jsonl"], folder, tmp_path / "s", on_bad="skip", shard=(i, 3)) for i in range(3)]
    assert [m["prefix"] for m in made] == [f"{tmp_path}/s-0000{i}-of-00003_text_document" for i in range(3)]
    assert all(m["documents"] for m in made) and len({m["job"] for m in made}) == 1
    joined = b"".join((tmp_path / f"s-0000{i}-of-00003_text_document.bin").read_bytes() for i in range(3))
    assert joined == (tmp_path / "whole_text_document.bin").read_bytes()
    # A line number counts from the start of the file, also in a shard that begins in its middle.
    assert [bad for m in made for bad in m["skipped_first"]] == whole["skipped_first"]


def test_a_dry_run_writes_nothing(tmp_path, folder):  # noqa: F811
    about = run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out", dry_run=True)
    assert about["parts"] == 1 and about["dtype"] == "uint16" and [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


LINES_OF_ALL_KINDS = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.sampled_from([b"", b"{}", b'{"text": 1}', b'{"text": "a"', b"[]", b'{"text": NaN}', b" \t", b'{"text": "\xff"}']),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(LINES_OF_ALL_KINDS, max_size=12))
@example([b"\xef\xbb\xbf", b'{"text": "after a mark alone"}'])
@example([b'\xef\xbb\xbf{"text": "after a mark"}', b'\xef\xbb\xbf{"text": "a mark within a file"}'])
@example([b"\xef\xbb\xbf{", b'{"text": "after a bad one"}'])
def test_every_line_becomes_a_document_or_is_named(folder, tokenizer, tmp_path_factory, lines):  # noqa: F811
    """Whatever the bytes: no line is lost, none is read twice, and what gave no document is kept byte for byte."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) or b"\n")
    texts, bad = [], []
    for number, line in enumerate(b"\n".join(lines).split(b"\n")):  # a line of random bytes may be several
        body = line if number else line.removeprefix(b"\xef\xbb\xbf")
        if not body.strip():
            continue
        try:
            text = json.loads(body.decode())["text"]
            assert text and text.encode()
            texts.append(text)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            bad.append(line)
    try:
        made = run([tmp_path / "in.jsonl"], folder, tmp_path / "out", on_bad="quarantine", max_bad=1, engine="hf")
    except BorealError as error:
        assert not texts and "no documents" in str(error)
        return
    data = IndexedReader(made["prefix"])
    assert [data.document(i).tolist() for i in range(len(data))] == [[*tokenizer.encode(t), tokenizer.eod] for t in texts]
    kept = tmp_path / "out_text_document.quarantine.raw"
    assert (kept.read_bytes() if kept.exists() else b"") == b"".join(line + b"\n" for line in bad)
    assert sum(made["skipped"].values()) == len(bad)


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_counted_over_parts_with_blank_lines(tmp_path, folder, monkeypatch, workers):  # noqa: F811
    monkeypatch.setattr(inputs, "SMALLEST_PART", 40)
    lines = [('{"text": "good"}' if n % 3 else "") if n % 10 else "{bad" for n in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    made = run([tmp_path / "in.jsonl"], folder, tmp_path / "out", on_bad="skip", workers=workers)
    assert made["parts"] > 10
    assert [int(bad.split(":")[1]) for bad in made["skipped_first"]] == [n + 1 for n in range(0, 60, 10)]


@pytest.mark.slow
def test_a_hundred_megabytes_in_one_document(tmp_path, folder):  # noqa: F811
    """Memory stays under 200 MB and eight times the document, with the reference, which takes ninety times in one go."""
    text = (DOCUMENTS[3] + "\n" + DOCUMENTS[7]) * (100_000_000 // 1401)
    jsonl(tmp_path / "in.jsonl", ["before", text, "after"])
    for engine in ("hf", "auto"):
        code = (
            "import resource; from boreal_megatron.data.tokenize import preprocess;"
            f"made = preprocess([{str(tmp_path / 'in.jsonl')!r}], {str(folder)!r}, {str(tmp_path / engine)!r}, workers=1, progress=False, engine={engine!r});"
            "print(made['documents'], made['tokens'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        documents, _, peak = map(int, done.stdout.split())
        assert documents == 3 and peak * 1024 < 200e6 + 8 * len(text)
    assert (tmp_path / "hf_text_document.bin").read_bytes() == (tmp_path / "auto_text_document.bin").read_bytes()
