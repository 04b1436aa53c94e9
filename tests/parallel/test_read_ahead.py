"""Reading ahead in real runs: nothing but the waiting changes. What a run's records say of its speed."""

import re

import pytest
import yaml
from boreal_megatron.config.schema import Model
from boreal_megatron.plan import flops
from boreal_megatron.profile.timers import KINDS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.launch import boreal, digests, metrics, write_config


def test_a_run_is_the_same_read_ahead_from_a_url_and_rehearsed(corpus, tmp_path):
    """`boreal train` twice: local files in line; the same files as URLs, with threads, and a resume drill before."""
    plain = write_config(tmp_path / "plain.yaml", corpus, tmp_path / "plain")
    expected = boreal(1, "train", plain, "data.prefetch_workers=0")
    urls = [f"data.sources.text=file://{corpus['train']}", f"data.validation=file://{corpus['valid']}"]
    found = boreal(1, "train", plain, f"checkpoint.folder={tmp_path / 'ahead'}", *urls, "--resume-drill", "2")
    assert "resume drill passed" in found
    assert digests(found) == digests(expected)
    for folder in ("plain", "ahead"):
        recorded = metrics(tmp_path / folder)
        assert list(recorded) == [1, 2, 3, 4, 5]
        assert all(0 < r["data_seconds"] < r["seconds"] for r in recorded.values())
    assert_speeds(yaml.safe_load(plain.read_text()), recorded, tmp_path / "ahead", found)


def assert_speeds(values, records, folder, text):
    """Time and FLOPs of every record; the log line has Megatron's own field. No peak is known of a CPU."""
    work = sum(flops.training(Model.model_validate(values["model"]), 96).values()) * 768
    for record in records.values():
        kinds = record["kind_seconds"]
        assert list(kinds) == list(KINDS) and sum(kinds.values()) == pytest.approx(record["seconds"])
        assert all(kinds[kind] > 0 for kind in KINDS)
        assert record["teraflops"] == pytest.approx(work / record["seconds"] / 1e12)
        assert "mfu" not in record and "kind_mfu" not in record
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars("train/kind_seconds/gdn")] == pytest.approx(
        [record["kind_seconds"]["gdn"] for record in records.values()]
    )
    shown = re.findall(r"\| throughput per GPU \(TFLOP/s/GPU\): ([0-9.]+) \|", text)
    assert shown == [f"{record['teraflops']:.3f}" for record in records.values()]
