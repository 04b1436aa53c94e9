"""`boreal profile` on a CPU: real steps, its files and figures, what got slower, what it refuses."""

import copy
import gzip
import json
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from boreal_megatron import cli
from boreal_megatron.config.load import load
from boreal_megatron.errors import BorealError
from boreal_megatron.model.gated_deltanet import GatedDeltaNet
from boreal_megatron.plan import flops
from boreal_megatron.profile import rates, trace, traffic
from boreal_megatron.profile.compare import compare, render
from boreal_megatron.profile.run import profile
from boreal_megatron.profile.timers import KINDS
from tests.support.launch import ROOT, command, environment, write_config

pytest.importorskip("matplotlib")
MICRO_BATCHES, SLEEP = 2, 0.2  # 8 windows, 4 a micro-batch; seconds, more than what a busy machine adds to a kind


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return load([write_config(folder / "config.yaml", corpus, folder / "run", micro_batch=4)], [])


@pytest.fixture(scope="module")
def profiled(config, mesh, tmp_path_factory):
    """(its folder, its summary, every (done, all) that was told)."""
    out, told = tmp_path_factory.mktemp("profiled") / "new" / "out", []
    summary = profile(config, world=1, out=out, steps=2, warmup=1, progress=lambda *step: told.append(step))
    return out, summary, told


def test_a_profile_and_nothing_else_is_written(profiled, config):
    out, summary, told = profiled
    assert sorted(p.name for p in out.iterdir()) == ["memory.json", "report.html", "summary.json", "trace.json.gz"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert told == [(n, 5) for n in range(1, 6)]
    assert not (out.parent / config.checkpoint.folder).exists()


def test_figures_add_up_and_are_those_of_the_plan(profiled, config):
    _, summary, _ = profiled
    kinds, phase = summary["kinds"], config.phases[0]
    assert list(kinds) == list(KINDS)
    assert sum(row["seconds"] for row in kinds.values()) == pytest.approx(summary["step_seconds"])
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    planned = flops.by_kind(flops.training(config.model, phase.sequence))
    assert {kind: row["flops"] for kind, row in kinds.items() if row["flops"]} == {
        k: n * 768 for k, n in planned.items()
    }
    whole = sum(planned.values()) * 768
    assert summary["teraflops"] == pytest.approx(whole / summary["step_seconds"] / 1e12)
    assert kinds["gdn"]["teraflops"] == pytest.approx(planned["gdn"] * 768 / kinds["gdn"]["seconds"] / 1e12)
    assert summary["mfu"] is None and all(row["roofline"] is None for row in kinds.values())
    assert summary["raw_tokens_per_second"] == pytest.approx(4 * summary["positions_per_second"])
    # The parts are the spans themselves; what Python did around them is idle.
    assert sum(summary["parts"].values()) == pytest.approx(summary["step_seconds"], rel=0.05)
    assert summary["slowest_rank"]["rank"] == 0 and summary["ranks"][0]["kinds"]["gdn"] == kinds["gdn"]["seconds"]
    text = render(summary)
    assert all(re.search(rf"^  {kind} .*%", text, re.M) for kind in KINDS)


def test_the_trace_has_every_stretch_on_a_track_of_its_own(profiled):
    out, summary, _ = profiled
    events = json.loads(gzip.open(out / "trace.json.gz").read())["traceEvents"]
    spans = sorted((e for e in events if e.get("tid") == trace.TRACK and e["ph"] == "X"), key=lambda e: e["ts"])
    names = [span["name"] for span in spans]
    for name in ("forward gdn 3", "backward gdn 3", "forward attention 1", "forward mtp", "backward mtp"):
        assert names.count(name) == MICRO_BATCHES, name
    assert names.count("optimizer") == 2 and set(names) <= set(summary["parts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-2 for a, b in zip(spans, spans[1:]))  # microseconds, rounded
    assert any(e.get("name") == "aten::mm" and e["tid"] != trace.TRACK for e in events)


def test_operators_and_memory_have_the_kind_that_they_are_for(profiled):
    out, summary, _ = profiled
    found = {(each["name"], each["kind"]): each for each in summary["operators"]}
    # SwiGLU: 2 products forward, 4 backward, for 2 half-blocks and each micro-batch.
    assert found["aten::mm", "dense"]["calls"] == 6 * 2 * MICRO_BATCHES
    assert {kind for name, kind in found if name == "RouterGatingLinearFunction"} == {"moe"}
    assert {kind for name, kind in found if name == "_BagEmbedding"} == {"heads", "mtp"}
    assert all(each["seconds"] > 0 for each in found.values())
    peaks = summary["memory"]["peak_bytes"]
    timeline = json.loads((out / "memory.json").read_text())["timeline"]
    assert max(peaks.values()) == max(bytes_ for _, bytes_, _ in timeline) > 1e6
    assert peaks["heads"] > peaks["attention"]  # activations pile up from the first half-block to the last


def test_the_page_is_whole_and_fetches_nothing(profiled):
    text = (profiled[0] / "report.html").read_text(encoding="ascii")
    assert text.count("<img") == 3 == text.count('src="data:image/png;base64,')
    assert "http" not in text and text.endswith("</html>\n")
    assert all(f"<td>{kind}</td>" in text for kind in KINDS)


def test_a_mixer_that_got_slow_is_named_first(profiled, config, mesh, monkeypatch, capsys):
    out, before, _ = profiled
    original = GatedDeltaNet.forward

    def slow(self, *args, **kwargs):
        time.sleep(SLEEP)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GatedDeltaNet, "forward", slow)
    summary = profile(config, world=1, out=out.parent / "slow", steps=1, warmup=1, baseline=out)
    found = summary["comparison"]
    # Two of the network's own; the MTP block has none.
    assert found["kinds"][0]["name"] == "gdn"
    assert found["kinds"][0]["now"] >= 2 * MICRO_BATCHES * SLEEP
    assert {row["name"] for row in found["parts"][:2]} == {"forward gdn 3", "forward gdn 5"}
    assert found["lost_seconds"] == summary["step_seconds"] - before["step_seconds"]
    assert found["differs"] == ["timed_steps: 2, now 1"]
    text = render(summary)
    assert re.search(r"what got slower, kinds:\n.*\n  gdn ", text) and "not the same: timed_steps: 2, now 1" in text
    assert cli.main(["profile", str(out.parent / "slow"), "--compare", str(out)]) == 0
    assert capsys.readouterr().out == text + "\n"  # of the two folders, without a run
    page = (out.parent / "slow" / "report.html").read_text()
    assert "What got slower" in page and page.count("<img") == 4


def test_all_differences_of_two_runs_are_told(profiled):
    _, now, _ = profiled
    before = copy.deepcopy(now)
    before["config"]["parallel"]["tensor"] = 2
    before["config"]["checkpoint"]["folder"] = "elsewhere"
    before["versions"]["torch"] = "0.0.1"
    before["kinds"]["moe"]["seconds"] -= 1.0
    before["operators"] = before["operators"][1:]
    found = compare(now, before)
    assert found["differs"] == [f"versions.torch: 0.0.1, now {now['versions']['torch']}", "parallel.tensor: 2, now 1"]
    assert found["kinds"][0]["name"] == "moe" and found["kinds"][0]["lost"] == pytest.approx(1.0)
    assert all(row["lost"] == 0 for row in found["kinds"][1:])
    first = now["operators"][0]
    assert found["operators"][0] == {
        "name": f"{first['name']} ({first['kind']})", "before": 0.0, "now": first["seconds"], "lost": first["seconds"],
    }  # fmt: skip


def test_wrong_requests_are_refused_all_at_once(config, mesh, tmp_path):
    with pytest.raises(BorealError) as refused:
        profile(config, world=1, out=tmp_path / "out", steps=0, warmup=-1, phase="annealing")
    said = str(refused.value)
    assert "3 problems" in said and "steps=0" in said and "warmup=-1" in said
    assert "the configuration has superposition, recovery" in said
    with pytest.raises(BorealError, match="is no profile"):
        profile(config, world=1, out=tmp_path / "out", baseline=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_kept(config, mesh, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BorealError, match="exists and is no profile; expected a new folder"):
        profile(config, world=1, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"] and not tmp_path.with_name(
        tmp_path.name + ".partial"
    ).exists()


def test_a_full_disk_is_said_and_leaves_nothing(config, mesh, tmp_path):
    """A limit on the size of files, as a quota would; the trace is larger."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BorealError, match="cannot be written by torch.profiler; expected room"):
            profile(config, world=1, out=tmp_path / "out", steps=1, warmup=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_kernels_have_the_kind_of_the_operator_that_launched_them(tmp_path):
    """Events as the profiler writes them on a GPU, where kernels run later than the host is at."""
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "forward gdn 1", "ts": 0.0, "dur": 500.0, "tid": 1},
        {"ph": "X", "cat": "user_annotation", "name": "optimizer", "ts": 500.0, "dur": 500.0, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 10.0, "dur": 5.0, "tid": 1, "args": {"External id": 7}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 900.0, "dur": 40.0, "tid": 9, "args": {"External id": 7}},
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel", "ts": 940.0, "dur": 9.0, "args": {"External id": 7}},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 960.0, "dur": 2.0, "tid": 9, "args": {}},
    ]
    (tmp_path / "raw").write_text(json.dumps({"traceEvents": events}))
    found = trace.Trace(tmp_path / "raw", {"forward gdn 1": "gdn", "optimizer": "optimizer"})
    assert found.collectives() == {"gdn": pytest.approx(9e-6)}
    assert found.operators() == [
        {"name": "gemm", "kind": "gdn", "calls": 1, "seconds": pytest.approx(40e-6)},
        {"name": "ncclDevKernel", "kind": "gdn", "calls": 1, "seconds": pytest.approx(9e-6)},
        {"name": "Memset", "kind": "optimizer", "calls": 1, "seconds": pytest.approx(2e-6)},
    ]


def test_rooflines_take_the_tighter_of_both_limits():
    rows = rates.table(
        {"dense": 2.0, "heads": 1.0, "idle": 1.0}, {"dense": 4e12, "heads": 1e12}, {"dense": 1e9, "heads": 1e12},
        {"dense": 0.25}, world=2, limits=(4e12, 1e12),
    )  # fmt: skip
    assert rows["dense"]["roofline"] == pytest.approx(0.5 / 2)  # 4e12 FLOPs over 2 devices
    assert rows["heads"]["roofline"] == pytest.approx(0.5 / 1)  # 1e12 bytes over 2 devices
    assert rows["dense"]["teraflops"] == 1.0 and rows["heads"]["gigabytes_per_second"] == 500.0
    assert rows["idle"] == {**dict.fromkeys(rows["idle"]), "seconds": 1.0, "share": 0.25, "collectives": 0.0}
    assert rows["dense"]["collectives"] == 0.25


def test_bytes_of_a_step_by_hand(config):
    """Dense SwiGLU of 64 x 96 in fp32, 2 half-blocks: hidden in, gate and up out, their product in, hidden out; three
    products of each weight; 2 micro-batches read 3 * 64 * 96 weights each."""
    phase = config.phases[0]
    one = traffic.step_bytes(config, phase, 1)
    assert one["dense"] == 2 * 3 * 4 * (768 * (64 + 2 * 96 + 96 + 64) + 2 * 3 * 64 * 96)
    assert one["heads"] == 2 * 3 * 4 * (768 * 64 + 2 * 64 * 640)
    assert set(one) == {"gdn", "attention", "dense", "moe", "heads", "mtp", "optimizer"}
    # Data-parallel ranks have half the micro-batches each: all together read weights as often.
    assert traffic.step_bytes(config, phase, 2)["dense"] == one["dense"]
    cut = config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert": 2})})
    # Experts over both: each is read by one of the two.
    experts = config.model.moe.experts * 3 * 64 * 32
    assert traffic.step_bytes(config, phase, 2)["moe"] - traffic.step_bytes(cut, phase, 2)["moe"] == 3 * 4 * experts


def profiled_by_two(folder, corpus, script, *words):
    """The summary of two processes under torchrun."""
    file = write_config(folder / "config.yaml", corpus, folder / "run")
    torchrun = command(2)[: -len(["-m", "boreal_megatron"])]
    words = [*torchrun, script, file, *words, "--phase", "recovery", "--out", folder / "out", "--json"]
    done = subprocess.run(words, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert json.loads(done.stdout) == summary and "slowest rank" in render(summary)
    assert sorted(p.name for p in folder.iterdir() if p != Path(script)) == ["config.yaml", "out"]
    return summary


@pytest.mark.slow
def test_two_pipeline_stages_under_torchrun(corpus, tmp_path):
    """Every rank is measured, the waiting shows, rank 0 writes."""
    summary = profiled_by_two(tmp_path, corpus, "tools/profile_throughput.py", "parallel.pipeline=2")
    first, last = summary["ranks"]
    assert first["kinds"]["mtp"] == 0 < last["kinds"]["mtp"]
    assert "forward attention 1" in first["parts"] and "forward attention 1" not in last["parts"]
    for rank in summary["ranks"]:
        assert rank["kinds"]["communication"] > 0
        assert sum(rank["kinds"].values()) == pytest.approx(sum(rank["step_seconds"]) / 3)


@pytest.mark.slow
def test_a_rank_that_holds_the_other_up_is_named(corpus, tmp_path):
    """The other waits for it within its experts' exchange, which must not count as its own work."""
    script = tmp_path / "slow_rank.py"
    script.write_text(SLOW_RANK)
    summary = profiled_by_two(tmp_path, corpus, script, "parallel.expert=2")
    waiting, slow = summary["ranks"]
    assert summary["slowest_rank"]["rank"] == 1
    assert slow["kinds"]["gdn"] - waiting["kinds"]["gdn"] > 2.0 < waiting["kinds"]["moe"] - slow["kinds"]["moe"]
    assert waiting["traced"]["collectives"]["moe"] > 0.5 and summary["kinds"]["moe"]["collectives"] > 0.2


SLOW_RANK = """
import os, sys, time
from boreal_megatron import cli
from boreal_megatron.model.gated_deltanet import GatedDeltaNet

original = GatedDeltaNet.forward

def slow(self, *args, **kwargs):
    time.sleep(0.8 if os.environ["RANK"] == "1" else 0)
    return original(self, *args, **kwargs)

GatedDeltaNet.forward = slow
sys.exit(cli.main(["profile", *sys.argv[1:]]))
"""
