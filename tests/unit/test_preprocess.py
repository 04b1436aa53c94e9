"""Preprocessing: the same bytes for any number of workers, every kind of bad input named, no half-written output."""

import argparse
import inspect as python_inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from boreal_megatron.data import cli, inputs
from boreal_megatron.data.crew import in_order
from boreal_megatron.data.indexed import IndexedReader, IndexedWriter
from boreal_megatron.data.inputs import cut, find_inputs
from boreal_megatron.data.inspect import document, inspect, render
from boreal_megatron.data.tokenize import iter_texts, preprocess
from boreal_megatron.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from boreal_megatron.errors import BorealError, ProblemsError

ROOT = Path(__file__).parents[2]
SOURCE = python_inspect.getsource(textwrap)
DOCUMENTS = [SOURCE[i : i + 700] for i in range(0, 14_000, 700)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SOURCE], 400, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer.load(folder)


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(inputs, folder, out, **more):
    return preprocess(inputs, folder, out, **({"progress": False, "workers": 1} | more))


def outputs(out):
    return {end: Path(f"{out}_text_document{end}").read_bytes() for end in (".bin", ".idx", ".provenance.npy", ".meta.json")}


def differing(a, b):
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_are_their_ids_and_the_end(tmp_path, folder, tokenizer, append_eod):
    result = run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out", append_eod=append_eod)
    data = IndexedReader(tmp_path / "out_text_document")
    end = [tokenizer.eod] if append_eod else []
    assert [list(data.document(i)) for i in range(len(data))] == [tokenizer.encode(t) + end for t in DOCUMENTS]
    assert data.dtype == np.uint16
    assert (result["documents"], result["tokens"]) == (len(DOCUMENTS), data.total_tokens)
    assert result["text_bytes"] == sum(len(t.encode()) for t in DOCUMENTS)
    assert result["tokenizer_sha256"] == tokenizer.fingerprint


def test_same_files_as_megatron_core_makes_of_the_same_documents(tmp_path, folder, tokenizer):
    import torch
    from megatron.core.datasets import indexed_dataset as theirs
    run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out")
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for text in DOCUMENTS:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    ours = outputs(tmp_path / "out")
    assert (ours[".bin"], ours[".idx"]) == ((tmp_path / "m.bin").read_bytes(), (tmp_path / "m.idx").read_bytes())


def test_workers_and_chunks_do_not_change_a_byte(tmp_path, folder, monkeypatch):
    texts = [*DOCUMENTS, "漢字 🙂 naïve", SOURCE, "x"]  # SOURCE is longer than a chunk
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", texts)
    body = b"\r\n".join(json.dumps({"text": t}).encode() for t in reversed(texts))
    (tmp_path / "in" / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + body + b"\n\n{]\n\n" + b'{"text": "no line end"}')
    (tmp_path / "in" / "c.txt").write_bytes(b"\xef\xbb\xbf" + SOURCE.encode())
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "readme").write_text("last\n")
    (tmp_path / "in" / ".hidden").write_text("not taken")
    want = run([tmp_path / "in"], folder, tmp_path / "whole", on_bad="skip")
    assert want["documents"] == 2 * len(texts) + 3 and want["input_files"] == 4
    bad = f"{tmp_path}/in/b.jsonl:{len(texts) + 2}: byte {len(body) + 5:,}: malformed JSON: {{]"
    assert want["skipped_first"] == [bad]
    for workers, part in ((1, 3000), (2, 3000), (3, 1000)):
        monkeypatch.setattr(inputs, "SMALLEST_PART", part)
        made = run([tmp_path / "in"], folder, tmp_path / f"out{workers}", on_bad="skip", workers=workers)
        assert made["parts"] > 10
        ours, whole = outputs(tmp_path / f"out{workers}"), outputs(tmp_path / "whole")
        metas = [json.loads(files.pop(".meta.json")) for files in (ours, whole)]
        assert ours == whole and differing(*metas) == {"job"}  # which says how the inputs were cut
    data = IndexedReader(tmp_path / "whole_text_document")
    decoded = [Tokenizer.load(folder).decode(data.document(i)[:-1]) for i in range(len(data))]
    assert decoded == [*texts, *reversed(texts), "no line end", SOURCE, "last\n"]


def test_parts_are_whole_lines_and_cover_the_files(tmp_path):
    lines = [b"x" * (n * n % 97) + b"\n" for n in range(60)] + [b"y" * 200_000 + b"\n", b"last"]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(lines))
    (tmp_path / "z.txt").write_bytes(b"one piece\n" * 50)
    found = find_inputs([path, tmp_path / "z.txt"], ["text"])
    for size in (1, 2, 50, 1000, 1 << 20):
        parts = list(cut(found, size))
        assert [part.number for part in parts] == list(range(len(parts)))
        ranges = [piece for part in parts for piece in part.ranges]
        *json_ranges, text = ranges
        assert (text.file, text.start, text.end) == (1, 0, 500)
        assert [r.start for r in json_ranges] == [0] + [r.end for r in json_ranges[:-1]]
        assert json_ranges[-1].end == path.stat().st_size
        assert all(path.read_bytes()[r.end - 1 : r.end] == b"\n" for r in json_ranges[:-1])
        assert all(part.size <= size or len(part.ranges) == 1 for part in parts)


def test_a_written_out_marker_ends_no_document(tmp_path, folder, tokenizer):
    texts = [f"one {END_OF_DOCUMENT} two", END_OF_DOCUMENT, "three"]
    run([jsonl(tmp_path / "in.jsonl", texts)], folder, tmp_path / "out")
    data = IndexedReader(tmp_path / "out_text_document")
    assert len(data) == 3 and np.count_nonzero(data.tokens == tokenizer.eod) == 3
    assert [tokenizer.decode(data.document(i)[:-1]) for i in range(3)] == texts


def test_a_marker_the_tokenizer_does_not_flag_is_refused(tmp_path, folder):
    text = (folder / "tokenizer.json").read_text()
    assert '"special": true' in text
    (tmp_path / "tokenizer.json").write_text(text.replace('"special": true', '"special": false'))
    source = jsonl(tmp_path / "in.jsonl", ["good", f"one {END_OF_DOCUMENT} two"])
    with pytest.raises(BorealError, match="in.jsonl:2: .*encodes to the end of a document"):
        run([source], tmp_path, tmp_path / "out")


def test_large_vocabularies_use_int32(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 151_936)
    assert run([jsonl(tmp_path / "in.jsonl", ["a b"])], folder, tmp_path / "out")["dtype"] == "int32"
    assert IndexedReader(tmp_path / "out_text_document").dtype == np.int32


def test_another_key_names_another_file(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text('{"content": "a b", "text": 7}\n')
    result = run([tmp_path / "in.jsonl"], folder, tmp_path / "deep" / "out", json_key="content")
    assert result["prefix"] == str(tmp_path / "deep" / "out_content_document")
    assert len(IndexedReader(result["prefix"])) == 1


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "malformed JSON": b'{"text": "cut',
    "missing key 'text'": b'{"txt": "a"}',
    "key 'text' is not a string": b'{"text": ["a"]}',
    "not a JSON object": b'["a"]',
    "invalid UTF-8": b'{"text": "caf\xe9"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
    "empty text": b'{"text": ""}',
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_named_or_counted(tmp_path, folder, reason, place):
    lines = [b'{"text": "good one"}', b'{"text": "good two"}']
    lines.insert(place, BAD[reason])
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    at = f"{source}:{place + 1}: byte {21 * place}: {reason}: {BAD[reason].decode('utf-8', 'backslashreplace')}"
    with pytest.raises(BorealError) as error:
        run([source], folder, tmp_path / "out")
    assert str(error.value).startswith(at + "\nExpected: a JSON object")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]

    result = run([source], folder, tmp_path / "out", on_bad="skip")
    assert result["documents"] == 2 and result["skipped"] == {reason: 1} and result["skipped_first"] == [at]
    assert len(IndexedReader(tmp_path / "out_text_document")) == 2
    with pytest.raises(BorealError, match="in.jsonl"):
        list(iter_texts([source]))


def test_what_is_wrong_beside_the_text_does_not_matter(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "score": NaN, "note": "\\ud800"}\n')
    assert run([tmp_path / "in.jsonl"], folder, tmp_path / "out")["documents"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_line_numbers_count_over_chunks_and_the_list_is_short(tmp_path, folder, monkeypatch, workers):
    monkeypatch.setattr(inputs, "SMALLEST_PART", 500)
    lines = [json.dumps({"text": f"line {n}"}) if n % 3 else "{bad" for n in range(1, 100)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(BorealError, match=r"in.jsonl:3: byte 38: malformed JSON"):
        run([source], folder, tmp_path / "out", workers=workers)
    with pytest.raises(BorealError, match=r"(?s)2\d of the first .* are bad: 2\d x malformed JSON.*:3: byte 38:.*--max-bad") as error:
        run([source], folder, tmp_path / "out", workers=workers, on_bad="skip", max_bad=0.3)
    assert error.value.code == 3
    result = run([source], folder, tmp_path / "out", workers=workers, on_bad="skip", max_bad=0.4)
    assert result["skipped"] == {"malformed JSON": 33} and result["documents"] == 66
    assert [int(bad.split(":")[1]) for bad in result["skipped_first"]] == list(range(3, 63, 3))
    assert "passed over 33: 33 x malformed JSON" in cli.summary(result) and "and 13 more" in cli.summary(result)
    offset = source.read_bytes().index(b"\n".join([b'"line 59"}', b"{bad"])) + 11
    assert f":60: byte {offset:,}: " in result["skipped_first"][19]


def test_training_a_tokenizer_names_a_bad_line(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n{"text": 7}\n')
    with pytest.raises(BorealError, match="in.jsonl:2: byte 16: key 'text' is not a string"):
        train_bpe(iter_texts([tmp_path / "in.jsonl"]), 260, tmp_path / "t")


def test_training_counts_lines_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SMALLEST_PART", 500)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n\n' * 100 + "{bad\n")
    with pytest.raises(BorealError, match=r"in.jsonl:201: byte 1,500: malformed JSON"):
        list(iter_texts([tmp_path / "in.jsonl"]))


def test_what_a_terminal_would_act_on_is_escaped(tmp_path, folder):
    (tmp_path / "in.jsonl").write_bytes(b"\x1b[2J\t\xc3\xa9 bad\r\n")
    with pytest.raises(BorealError, match=r"malformed JSON: \\x1b\[2J\\té bad\n"):
        run([tmp_path / "in.jsonl"], folder, tmp_path / "out")


def test_long_lines_are_shown_by_their_beginning(tmp_path, folder):
    (tmp_path / "in.jsonl").write_text('{"txt": "' + "z" * 100_000 + '"}\n')
    with pytest.raises(BorealError) as error:
        run([tmp_path / "in.jsonl"], folder, tmp_path / "out")
    assert str(error.value).splitlines()[0].endswith("missing key 'text': " + '{"txt": "' + "z" * 71)


def test_the_command_to_skip_works(tmp_path, folder):
    source = tmp_path / "with space.jsonl"
    source.write_text('{"body": "a b"}\n{}\n')
    with pytest.raises(BorealError) as error:
        run([source], folder, tmp_path / "out", json_key="body", append_eod=False, workers=2)
    words = shlex.split(str(error.value).splitlines()[-1])
    assert words[0] == "boreal" and run_cli(words[1:]) == 0
    assert IndexedReader(tmp_path / "out_body_document").total_tokens == len(Tokenizer.load(folder).encode("a b"))


def test_bad_text_files(tmp_path, folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"one\ntwo \xff three")
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    (tmp_path / "in" / "c.txt").write_bytes(b"good")
    with pytest.raises(BorealError, match=r"a.txt:2: byte 8: invalid UTF-8"):
        run([tmp_path / "in"], folder, tmp_path / "out")
    result = run([tmp_path / "in"], folder, tmp_path / "out", on_bad="skip")
    assert result["skipped"] == {"empty file": 1, "invalid UTF-8": 1} and result["documents"] == 1


def test_wrong_inputs_are_all_named_before_the_start(tmp_path, folder):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "packed.zip").write_bytes(b"x")
    (tmp_path / "hollow").mkdir()
    jsonl(tmp_path / "good.jsonl", ["a"])
    names = ["missing.jsonl", "empty.jsonl", "packed.zip", "none*.txt", "hollow", "good.jsonl"]
    with pytest.raises(ProblemsError) as error:
        run([tmp_path / name for name in names], folder, tmp_path / "out")
    assert [any(name in p for p in error.value.problems) for name in names] == [True] * 5 + [False]
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ProblemsError, match="no inputs"):
        run([], folder, tmp_path / "out")


def test_wrong_arguments(tmp_path, folder):
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    for more, message in (
        ({"workers": 0}, "workers=0"), ({"on_bad": "ignore"}, "'fail', 'skip', 'quarantine'"), ({"tst_bag": 0}, "tst_bag=0"),
        ({"special": "x"}, "'encode', 'split', 'error'"), ({"shard": (2, 2)}, "shard=2/2"), ({"max_bad": 1.5}, "max_bad"),
        ({"engine": "fast"}, "'auto'"), ({"engine": "sentencepiece"}, "auto or hf"), ({"shard": (0, 2)}, "make 1 parts"),
    ):  # fmt: skip
        with pytest.raises(BorealError, match=message):
            run([source], folder, tmp_path / "out", **more)
    with pytest.raises(BorealError, match="a folder"):
        run([source], folder, tmp_path)
    with pytest.raises(BorealError, match="tokenizer.json"):
        run([source], tmp_path, tmp_path / "out")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(BorealError, match="no documents: blank lines only"):
        run([tmp_path / "blank.jsonl"], folder, tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    with pytest.raises(BorealError, match="no documents: 2 x malformed JSON"):
        run([tmp_path / "bad.jsonl"], folder, tmp_path / "out", on_bad="skip")
    assert not list(tmp_path.glob("out*"))


def test_a_failed_run_leaves_the_earlier_output_alone(tmp_path, folder):
    source = jsonl(tmp_path / "in.jsonl", ["first"])
    run([source], folder, tmp_path / "out")
    before = outputs(tmp_path / "out")
    source.write_text('{"text": "second"}\n{\n')
    with pytest.raises(BorealError):
        run([source], folder, tmp_path / "out")
    assert outputs(tmp_path / "out") == before
    run([source], folder, tmp_path / "out", on_bad="skip")
    assert outputs(tmp_path / "out") != before and inspect(tmp_path / "out_text_document")["problems"] == []


# --- processes --------------------------------------------------------------------------------------------------------


class Act(NamedTuple):
    """A job that does, with the piece 3, something a worker should not."""

    what: str

    def start(self, say):
        return lambda piece: self.work(piece, say)

    def work(self, piece, say):
        if self.what == "say":
            say(piece)
        if piece == 3:
            if self.what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "exit":
                os._exit(3)
            if self.what == "raise":
                raise ZeroDivisionError("not foreseen")
            if self.what == "refuse":
                raise BorealError("foreseen", 3)
            if self.what == "dawdle":
                time.sleep(0.5)
        return piece


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes under /proc")


@needs_proc
@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("die", BorealError, "exit code -9 .*fewer --workers"),
        ("exit", BorealError, "^3: a worker process ended with exit code 3"),
        ("raise", RuntimeError, "^3:[^$]*ZeroDivisionError: not foreseen"),
        ("refuse", BorealError, "^foreseen$"),
    ],
)
def test_a_failing_worker_is_an_error_and_no_process_stays(what, kind, message):
    before = children(os.getpid())  # other tests may have left some
    with pytest.raises(kind, match=message):
        list(in_order(range(50), Act(what), 2))
    assert children(os.getpid()) == before


def test_results_keep_their_order_and_few_are_under_way():
    given, came = [], []

    def pieces():
        for n in range(60):
            given.append(n)
            yield n

    results = in_order(pieces(), Act("dawdle"), 2, arrived=came.append)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    assert len(given) <= 4 + 4 * 2 + 1
    assert list(results) == list(range(4, 60))
    assert sorted(came) == list(range(60)) != came  # an answer is heard of before its turn


@pytest.mark.parametrize("workers", [1, 2])
def test_what_workers_say_is_heard(workers):
    heard = []
    assert list(in_order(range(9), Act("say"), workers, hear=heard.append)) == sorted(heard) == list(range(9))


def children(pid):
    """Returns the processes of a parent, multiprocessing's own resource tracker aside."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


# --- inspect and the command line -------------------------------------------------------------------------------------


@pytest.fixture
def prefix(tmp_path, folder):
    return Path(run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "out")["prefix"])


def test_inspect_of_a_sound_dataset(prefix, tokenizer, folder):
    report = inspect(prefix)
    lengths = sorted(len(tokenizer.encode(t)) + 1 for t in DOCUMENTS)
    assert report["problems"] == [] and report["out_of_range_ids"] == 0
    assert (report["documents"], report["tokens"]) == (len(DOCUMENTS), sum(lengths))
    assert report["length_quantiles"]["min"] == lengths[0] and report["length_quantiles"]["max"] == lengths[-1]
    assert report["length_quantiles"]["median"] == lengths[len(lengths) // 2 - 1]
    assert report["eod_share"] == len(DOCUMENTS) / sum(lengths)
    assert "checksums      agree" in render(report)
    assert document(prefix, 3, tokenizer)["text"] == DOCUMENTS[3] + END_OF_DOCUMENT


def test_inspect_finds_what_is_wrong(prefix):
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    tokens[5] = 400  # the first id outside the vocabulary
    tokens[7] = 0  # a document end in the middle
    tokens[-1] = 1
    tokens.flush()
    report = inspect(prefix)
    assert report["out_of_range_ids"] == 1 and report["largest_id"] == 400
    assert report["meta_agrees"] == {"bin": False, "idx": True, "documents": True, "tokens": True}
    problems = "\n".join(report["problems"])
    assert "1 ids outside 0 to 399" in problems and "the bin disagrees" in problems
    assert "1 end-of-document ids that are not" in problems and "1 documents do not end" in problems
    assert "PROBLEM" in render(report) and run_cli(["data", "inspect", str(prefix)]) == 3


def test_inspect_without_meta(tmp_path):
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.append([3, 4])
        writer.append([])
    report = inspect(tmp_path / "d")
    assert (report["documents"], report["empty_documents"], report["smallest_id"]) == (2, 1, 3)
    assert "eod_share" not in report and "no .meta.json" in render(report)
    for content in ("[1]", "{", '{"documents": 2}'):
        (tmp_path / "d.meta.json").write_text(content)
        with pytest.raises(BorealError, match="d.meta.json"):
            inspect(tmp_path / "d")


def test_another_tokenizer_is_refused(prefix, tmp_path):
    other = train_bpe([SOURCE], 401, tmp_path / "other")
    with pytest.raises(BorealError, match="which made"):
        document(prefix, 0, other)


def run_cli(words):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args) or 0


def test_command_line(tmp_path, capsys):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    assert run_cli(["data", "train-tokenizer", str(source), "--vocab-size", "300", "--out", str(tmp_path / "t")]) == 0
    assert "300 entries, <|endoftext|> is id 0" in capsys.readouterr().out
    words = ["data", "preprocess", str(source), "--tokenizer", str(tmp_path / "t"), "--out", str(tmp_path / "o")]
    assert run_cli([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["documents"] == len(DOCUMENTS) and "tokenize" in err
    assert run_cli(words) == 0 and f"{len(DOCUMENTS)} documents" in capsys.readouterr().out
    made = str(tmp_path / "o_text_document")
    assert run_cli(["data", "inspect", made, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 300
    assert run_cli(["data", "inspect", made, "--document", "1", "--tokenizer", str(tmp_path / "t")]) == 0
    assert DOCUMENTS[1] in capsys.readouterr().out


def test_megatron_flag_names_and_no_torch(tmp_path, folder):
    jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    tool = str(ROOT / "tools" / "preprocess_data.py")
    code = (
        "import runpy, sys; sys.argv = ['preprocess_data.py', '--input', 'in.jsonl', '--json-keys', 'text',"
        " '--output-prefix', 'out', '--tokenizer-type', 'HuggingFaceTokenizer',"
        f" '--tokenizer-model', {str(folder)!r}, '--append-eod', '--workers', '1'];"
        f"runpy.run_path({tool!r}, run_name='__main__');"
        "import boreal_megatron.data.inspect, boreal_megatron.data.cli;"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    run([jsonl(tmp_path / "in.jsonl", DOCUMENTS)], folder, tmp_path / "ours")
    assert outputs(tmp_path / "out")[".bin"] == outputs(tmp_path / "ours")[".bin"]
    assert outputs(tmp_path / "out")[".idx"] == outputs(tmp_path / "ours")[".idx"]
