"""`trace` names the documents that the Loader reads: every id of every batch, whatever the layout and the start."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from tests.support.data_runs import STEPS, run_config, write_sources
from tests.support.launch import ROOT

from boreal_megatron.config import phases
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.trace import render, trace
from boreal_megatron.errors import BorealError, ProblemsError
from boreal_megatron.train import step as train_step, store
from boreal_megatron.train.state import State


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("trace"))


def walked(config, dp_rank=0, dp_size=1):
    """The run's batches of one rank, step by step, and the State before each."""
    with contextlib.closing(Loader(config, dp_rank, dp_size, "cpu")) as loader:
        state = State().continue_on(loader.fingerprints())
        while (index := phases.at(config.phases, *state.now)) is not None:
            batches, after, _ = train_step.read(config, loader, config.phases[index], state)
            yield config.phases[index], batches, state
            state = after


def named_ids(readers, window):
    """The ids that a traced window names, read from the files."""
    parts = [
        readers[window["source"]].read(each["document"], each["first"], each["tokens"]) for each in window["documents"]
    ]
    return np.concatenate(parts).tolist()


@pytest.mark.parametrize("data", [{}, {"boundaries": "align"}, {"piece_tokens": 7}])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_traced_documents_hold_the_ids_of_the_batches(sources, dp_size, micro_batch, data):
    config = run_config(sources, **data).model_copy(update={"micro_batch": micro_batch})
    readers = {name: IndexedReader(prefix) for name, prefix in sources.items()}
    traces = {step: trace(config, step, dp_size) for step in range(1, STEPS + 1)}
    seen = set()
    for rank in range(dp_size):
        for step, (phase, batches, state) in enumerate(walked(config, rank, dp_size), start=1):
            found = traces[step]
            assert [found[key] for key in ("phase", "bag_size")] == [phase.name, phase.bag_size]
            rows = found["ranks"][rank]
            assert len(rows) == len(batches) and len(found["ranks"]) == dp_size
            for row, batch in zip(rows, batches, strict=True):
                assert len(row) == micro_batch
                assert sum(window["raw_tokens"] for window in row) == batch.raw_tokens
                columns = batch.ids[:, 0].reshape(phase.bag_size, micro_batch, phase.sequence)
                for number, window in enumerate(row):
                    ids = columns[:, number].T.flatten()
                    assert named_ids(readers, window) == ids[ids >= 0].tolist()
                    seen.add((window["source"], found["phase"], window["epoch"]))
        assert step == STEPS
    assert {("a", "tst", 0), ("b", "ntp", 0), ("b", "again", 0)} < seen and len({epoch for _, _, epoch in seen}) > 1


def save(config, state):
    record = {"state": state.to_dict(), "layout": None, "contents": "training"}
    return store.finish(store.begin(config.checkpoint.folder, state.step, 1), config, record)


def test_from_a_checkpoint_as_from_the_beginning(sources, tmp_path):
    config = run_config(sources, folder=tmp_path / "run")
    expected = [trace(config, step, 2) for step in range(1, STEPS + 1)]
    assert {each["start"] for each in expected} == {"the beginning"}
    saved = [save(config, state) for _, _, state in walked(config) if state.step in (2, 5)]
    (saved[1] / "manifest.json").rename(saved[1] / "kept")  # an unfinished checkpoint is none
    assert trace(config, STEPS, 2)["start"] == f"{saved[0]}, step 2"
    (saved[1] / "kept").rename(saved[1] / "manifest.json")
    for step, before in enumerate(expected, start=1):
        found = trace(config, step, 2)
        start = "the beginning" if step <= 2 else f"{saved[0]}, step 2" if step <= 5 else f"{saved[1]}, step 5"
        assert found == before | {"start": start}


def test_only_steps_of_this_run(sources, tmp_path):
    config = run_config(sources, folder=tmp_path / "run")
    for step in (0, -3):
        with pytest.raises(BorealError, match="first step of a run is 1"):
            trace(config, step, 1)
    with pytest.raises(BorealError, match=f"step {STEPS + 1}: the run ends with step {STEPS}"):
        trace(config, STEPS + 1, 1)
    with pytest.raises(BorealError, match="does not divide"):
        trace(config, 1, 3)
    path = save(config, next(state for _, _, state in walked(config) if state.step == 2))
    with pytest.raises(ProblemsError, match=r"(?s)iter_0000002: 2 problems.*data.sources.a: .*data.sources.b: "):
        trace(config.model_copy(update={"seed": 9}), 3, 1)
    (path / "train_state.json").write_text("{")
    with pytest.raises(BorealError, match="train_state.json cannot be read"):
        trace(config, 3, 1)


def test_origins_and_text(corpus, tmp_path):
    """Two original files, of which each document of the data set knows its place."""
    from boreal_megatron.data.tokenizer import Tokenizer

    prefix = tmp_path / "d"
    for ending in (".bin", ".idx"):
        (tmp_path / f"d{ending}").symlink_to(f"{corpus['train']}{ending}")
    reader, tokenizer = IndexedReader(prefix), Tokenizer.load(corpus["tokenizer"])
    rows = np.zeros(len(reader), [("file", np.int32), ("offset", np.int64)])
    rows["file"] = np.arange(len(reader)) % 2
    rows["offset"] = np.arange(len(reader)) * 10**10
    config = run_config({"a": str(prefix), "b": f"file://{prefix}"}, vocab_size=640)
    assert "file" not in json.dumps(trace(config, 1, 1))
    np.save(tmp_path / "d.provenance.npy", rows)
    with pytest.raises(BorealError, match="d.provenance.npy cannot be used: .*files"):
        trace(config, 1, 1)
    (tmp_path / "d.meta.json").write_text(json.dumps({"files": ["x.jsonl", "y.jsonl"]}))
    found = trace(config, 1, 1, tokenizer=tokenizer)
    windows = [window for row in found["ranks"][0] for window in row]
    assert {window["source"] for window in windows} == {"a", "b"}
    for part in (part for window in windows for part in window["documents"]):
        assert part["file"] == "xy"[part["document"] % 2] + ".jsonl" and part["byte"] == part["document"] * 10**10
        ids = reader.read(part["document"], part["first"], part["tokens"])
        assert part["text"] and tokenizer.decode(ids).startswith(part["text"][:20])
    part = windows[0]["documents"][0]
    assert f"document {part['document']:,}, tokens {part['first']:,} to" in render(found)
    assert f"{part['file']} from byte {part['byte']:,}  {part['text']!r}" in render(found)
    np.save(tmp_path / "d.provenance.npy", rows[1:])
    with pytest.raises(BorealError, match=f"for {len(reader)} documents"):
        trace(config, 1, 1)


def test_for_people_one_rank_or_all(sources):
    found = trace(run_config(sources), 4, 2)
    text = render(found)
    assert text.splitlines()[0] == (
        "step 4: phase ntp, bags of 1, windows of 16 positions, 2 data-parallel ranks; planned from the beginning"
    )
    assert text.count("rank 0, micro-batch") == text.count("rank 1, micro-batch") == 4
    assert "rank 1" in render(found, rank=1) and "rank 0" not in render(found, rank=1)
    assert json.loads(json.dumps(found)) == found


def test_starts_without_torch(sources, tmp_path):
    config = run_config(sources)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = """
import sys
from boreal_megatron.config.schema import Config
from boreal_megatron.data.trace import trace
trace(Config.model_validate_json(open(sys.argv[1]).read()), 3, 2)
print([name for name in ("torch", "megatron", "fsspec") if name in sys.modules])
"""
    words = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    assert subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"
