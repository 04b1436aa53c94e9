"""A preprocessing run that is stopped anywhere goes on where it was and ends with the bytes of one that was not."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tests.unit.test_preprocess import alive, children, jsonl, needs_proc, outputs, wait_until

from boreal_megatron.data import inputs, parts
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.tokenize import preprocess
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.errors import INTERRUPTED, STORAGE, USAGE, BorealError

ROOT = Path(__file__).parents[2]
SOURCE = inspect.getsource(textwrap)
OPTIONS = {"on_bad": "quarantine", "id_key": "id", "tst_bag": 4, "tst_boundaries": "align", "engine": "hf"}
# Kills itself before the n-th change to a file under the folder, if n is not 0; says how many there were.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from boreal_megatron.data import inputs, parts, tokenize
from boreal_megatron.errors import BorealError
inputs.SMALLEST_PART, parts.FLUSH_BYTES = {part}, 20_000
if {limit}:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
changes = 0
def hook(event, args):
    global changes
    changing = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate") or (
        event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+")
    )
    if changing and str(args[0]).startswith({folder!r}):
        changes += 1
        if changes == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    sys.addaudithook(hook)
    try:
        tokenize.preprocess([{source!r}], {tokenizer!r}, {out!r}, workers={workers}, progress=False, **{options!r})
    except BorealError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
    print(changes)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SOURCE], 400, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Documents with ids, two of them repeated; three bad lines; a special token written out."""
    rows = [{"id": n, "text": f"{n} {SOURCE[n * 100 : n * 100 + 700]}"} for n in range(90)]
    rows[40]["text"] += " <|endoftext|> "
    lines = [json.dumps(row) for row in [*rows, rows[3] | {"text": "again"}, rows[80] | {"text": "again too"}]]
    for at in (0, 33, 70):
        lines.insert(at, '{"id": 1000, "txt": "no text"}')
    path = tmp_path_factory.mktemp("source") / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def launch(source, tokenizer, out, *, kill_at=0, workers=1, limit=0, part=3_000, options=OPTIONS):
    code = SCRIPT.format(
        root=str(ROOT), part=part, limit=limit, folder=str(Path(out).parent), kill_at=kill_at, source=str(source),
        tokenizer=str(tokenizer), out=str(out), workers=workers, options=options,
    )  # fmt: skip
    script = Path(out).parent.parent / f"{Path(out).parent.name}.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def everything(folder):
    """name -> bytes of a folder's files."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source, tokenizer):
    """What an uninterrupted run makes, and how often it changes a file."""
    folder = tmp_path_factory.mktemp("whole")
    process = launch(source, tokenizer, folder / "out")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return everything(folder), int(said)


def test_the_uninterrupted_run_has_everything(whole, tmp_path_factory):
    files, changes = whole
    assert set(files) == {f"out_text_document{ending}" for ending in parts.ENDINGS} and changes > 200
    meta = json.loads(files["out_text_document.meta.json"])
    assert meta["documents"] == 90 and meta["special_documents"] == 1
    assert meta["skipped"] == {"missing key 'text'": 3, "repeated id": 2}


def kill_and_go_on(tmp_path, source, tokenizer, whole, moments):
    files, _ = whole
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = launch(source, tokenizer, folder / "out", kill_at=moment)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        if (folder / "out_text_document.idx").exists():  # then all is there
            assert {name: content for name, content in everything(folder).items()} == files
        process = launch(source, tokenizer, folder / "out")
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert everything(folder) == files, moment
        assert not list(folder.glob("*.parts"))


def test_three_kills(tmp_path, source, tokenizer, whole):
    kill_and_go_on(tmp_path, source, tokenizer, whole, random.Random(5).sample(range(2, whole[1]), 3))


@pytest.mark.slow
def test_twenty_kills(tmp_path, source, tokenizer, whole):
    kill_and_go_on(tmp_path, source, tokenizer, whole, random.Random(6).sample(range(2, whole[1] + 1), 20))


def test_kills_among_the_last_renames(tmp_path, source, tokenizer, whole):
    kill_and_go_on(tmp_path, source, tokenizer, whole, [whole[1] - 70, whole[1] - 40])


@pytest.fixture(scope="module")
def long_input(tmp_path_factory):
    """Seconds of work, so that no run is over before a busy machine gets round to stopping it."""
    return jsonl(tmp_path_factory.mktemp("long") / "in.jsonl", [f"{n} {SOURCE}" for n in range(800)])


@needs_proc
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_a_stopped_run_and_their_parts_are_kept(tmp_path, tokenizer, long_input, sig):
    out = tmp_path / "run" / "out"
    out.parent.mkdir()
    process = launch(long_input, tokenizer, out, workers=2, part=300_000, options={"engine": "hf"})
    journal = Path(f"{out}_text_document.parts/journal.jsonl")
    wait_until(lambda: (journal.exists() and journal.stat().st_size) or process.poll() is not None, 60)
    assert process.poll() is None, process.stderr.read()
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(sig)
    _, said = process.communicate(timeout=20)
    wait_until(lambda: not any(map(alive, workers)))
    if sig == signal.SIGINT:
        assert process.returncode == INTERRUPTED and "the same command goes on" in said
    assert [path.name for path in out.parent.iterdir()] == ["out_text_document.parts"]
    with pytest.raises(BorealError, match="preprocessing was stopped"):
        IndexedReader(f"{out}_text_document")
    process = launch(long_input, tokenizer, out, workers=2, part=300_000, options={"engine": "hf"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(IndexedReader(f"{out}_text_document")) == 800 and not list(out.parent.glob("*.parts"))


def test_only_what_is_missing_is_done_again(tmp_path, source, tokenizer, monkeypatch):
    monkeypatch.setattr(inputs, "SMALLEST_PART", 3_000)
    with pytest.raises(BorealError, match="missing key 'text'"):
        preprocess([source], tokenizer, tmp_path / "out", workers=1, progress=False, engine="hf")
    assert not list(tmp_path.iterdir())  # the very first line is bad: nothing to go on from
    lines = source.read_text().splitlines(keepends=True)[1:]
    second = tmp_path / "in.jsonl"
    second.write_text("".join(lines))
    with pytest.raises(BorealError, match=r"in.jsonl:33: byte"):
        preprocess([second], tokenizer, tmp_path / "out", workers=1, progress=False, engine="hf")
    made = preprocess([second], tokenizer, tmp_path / "out", workers=1, progress=False, engine="hf", on_bad="skip")
    assert 3 < made["resumed_parts"] < made["parts"] and made["skipped"] == {"missing key 'text'": 2}
    fresh = preprocess([second], tokenizer, tmp_path / "fresh", workers=1, progress=False, engine="hf", on_bad="skip")
    assert fresh["resumed_parts"] == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "fresh")


@pytest.mark.parametrize("options", [{}, {"id_key": "id"}])
def test_a_stop_just_before_or_among_the_last_renames(tmp_path, source, tokenizer, monkeypatch, options):
    """With and without documents left out, for which the ids are copied once more."""
    common = {"workers": 1, "progress": False, "on_bad": "skip", "engine": "hf", **options}
    preprocess([source], tokenizer, tmp_path / "whole", **common)
    monkeypatch.setattr(inputs, "SMALLEST_PART", 3_000)
    monkeypatch.setattr(parts, "FLUSH_BYTES", 20_000)
    write, rename = parts.write_atomically, os.replace

    def stop_at_publish(path, text):
        if path.name == "publish":
            raise KeyboardInterrupt
        write(path, text)

    def stop_at_the_index(old, new):
        if str(new).endswith("document.idx"):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(parts, "write_atomically", stop_at_publish)
    with pytest.raises(BorealError, match="interrupted"):
        preprocess([source], tokenizer, tmp_path / "out", **common)
    monkeypatch.setattr(parts, "write_atomically", write)
    monkeypatch.setattr(os, "replace", stop_at_the_index)
    with pytest.raises(BorealError, match="interrupted"):
        preprocess([source], tokenizer, tmp_path / "out", **common)
    monkeypatch.setattr(os, "replace", rename)
    made = preprocess([source], tokenizer, tmp_path / "out", **common)
    assert made["resumed_parts"] == made["parts"] > 5
    ours, theirs = outputs(tmp_path / "out"), outputs(tmp_path / "whole")
    assert all(ours[ending] == theirs[ending] for ending in (".bin", ".idx", ".provenance.npy"))


def test_another_job_does_not_go_on_with_it(tmp_path, source, tokenizer):
    process = launch(source, tokenizer, tmp_path / "run" / "out", kill_at=200) if (tmp_path / "run").mkdir() is None else None
    process.communicate(timeout=60)
    out = tmp_path / "run" / "out"
    for change, named in (
        ({"append_eod": False}, "append_eod was True, is False"),
        ({"special": "split"}, "special was 'encode', is 'split'"),
        ({}, "part_bytes was 3000, is 16777216"),
    ):
        with pytest.raises(BorealError, match=named) as error:
            preprocess([source], tokenizer, out, workers=1, progress=False, **OPTIONS | change)
        assert error.value.code == USAGE and f"rm -r {out}_text_document.parts" in str(error.value)
    changed = source.with_name("changed.jsonl")
    changed.write_bytes(source.read_bytes())
    with pytest.raises(BorealError, match=r"2 inputs came, went or changed, such as .*\.jsonl"):
        preprocess([changed], tokenizer, out, workers=1, progress=False, **OPTIONS)


def test_an_input_that_changes_under_the_run_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(inputs, "SMALLEST_PART", 3_000)
    path = jsonl(tmp_path / "in.jsonl", [SOURCE[:900]] * 20)
    genuine = parts.Parts.note

    def note(self, record):
        genuine(self, record)
        with open(path, "a") as file:
            file.write("\n")

    monkeypatch.setattr(parts.Parts, "note", note)
    with pytest.raises(BorealError, match="changed since this run began"):
        preprocess([path], tokenizer, tmp_path / "out", workers=1, progress=False)


def test_two_runs_of_one_output_do_not_mix(tmp_path, source, tokenizer):
    with parts.Parts(tmp_path / "out_text_document", np.uint16):
        with pytest.raises(BorealError, match="another process is making"):
            preprocess([source], tokenizer, tmp_path / "out", workers=1, progress=False, **OPTIONS)


def test_a_damaged_folder_is_refused(tmp_path, source, tokenizer):
    (tmp_path / "run").mkdir()
    launch(source, tokenizer, tmp_path / "run" / "out", kill_at=200).communicate(timeout=60)
    folder = tmp_path / "run" / "out_text_document.parts"
    (folder / "joined.bin").write_bytes(b"")
    process = launch(source, tokenizer, tmp_path / "run" / "out")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and f"Begin anew: rm -r {folder}" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_what_is_done_stays(tmp_path, tokenizer, source, workers):
    (tmp_path / "run").mkdir()
    out = tmp_path / "run" / "out"
    preprocess([source], tokenizer, out, workers=1, progress=False, **OPTIONS)
    earlier = everything(out.parent)
    process = launch(source, tokenizer, out, limit=12_000, workers=workers)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STORAGE and "cannot be written" in said and "free some space" in said
    assert everything(out.parent) == earlier and IndexedReader(f"{out}_text_document").total_tokens
    process = launch(source, tokenizer, out)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert everything(out.parent)["out_text_document.bin"] == earlier["out_text_document.bin"]
    assert os.listdir(out.parent).count("out_text_document.parts") == 0


def test_selection_of_earlier_documents_is_not_left_beside_new_ones(tmp_path, source, tokenizer):
    np.save(tmp_path / "out_text_document.weights.npy", np.ones(3, np.float32))
    with pytest.raises(BorealError, match="weights.npy: belong to the documents"):
        preprocess([source], tokenizer, tmp_path / "out", workers=1, progress=False, **OPTIONS)
