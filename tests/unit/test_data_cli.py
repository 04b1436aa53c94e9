"""The `boreal data` verbs as a user types them: output for people and for programs, exit codes, no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.support.corpus import make_corpus
from tests.support.data_runs import PHASES

from boreal_megatron import cli
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.errors import INPUT, INTERRUPTED, STORAGE, USAGE

ROOT = Path(__file__).parents[2]
STDLIB = Path(os.__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), STDLIB, documents=30)


@pytest.fixture
def config(tmp_path, corpus):
    """A run over two sources, one of them in curriculum bins."""
    bins = tmp_path / "bins.npy"
    np.save(bins, np.arange(len(IndexedReader(corpus["train"])), dtype=np.int8) % 2)
    phases = [phase.model_dump(exclude_none=True) for phase in PHASES]
    phases[0]["blend"] = {"web": 1.0, "code/1": 3.0}
    phases[1]["blend"] = {"web": 1.0, "code/1": 1.0}
    phases[2]["blend"] = {"web": 1.0}
    values = {
        "model": {"preset": "tiny", "vocab_size": 640},
        "precision": "fp32",
        "phases": phases,
        "schedule": {"peak": 1e-3},
        "data": {
            "tokenizer": str(corpus["tokenizer"]),
            "sources": {"web": str(corpus["valid"]), "code": {"prefix": str(corpus["train"]), "bins": str(bins)}},
        },
        "checkpoint": {"folder": str(tmp_path / "checkpoints")},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def boreal(*words):
    return cli.main(["data", *map(str, words)])


def test_blend(config, capsys):
    assert boreal("blend", config, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert [phase["name"] for phase in value["phases"]] == ["tst", "ntp", "again"]
    assert value["phases"][0]["sources"]["code/1"]["share"] == 0.75
    assert value["unread"] == ["code/0"] and value["phases"][0]["data_path"] is None
    assert boreal("blend", config) == 0
    shown = capsys.readouterr().out
    assert value["fingerprint"][:16] in shown and "code/0: no phase names this bin" in shown
    assert "--data-path 1 " in shown  # Megatron's line, of the last phase
    assert boreal("blend", config, "data.sources.web.epochs=1", "phases.2.until_steps=9000") in (1, INPUT)


def test_prepare_then_trace(config, corpus, capsys):
    assert boreal("prepare", config, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made) == {"web", "code/1"} and all(Path(found["folder"]).is_dir() for found in made.values())
    assert boreal("trace", 4, config, "--world", 2, "--tokenizer", corpus["tokenizer"], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phase"] == "ntp" and len(found["ranks"]) == found["dp_size"] == 2
    first = found["ranks"][0][0][0]
    assert first["source"] in ("web", "code/1") and first["documents"][0]["text"]
    assert boreal("trace", 4, config, "--world", 2, "--rank", 1) == 0
    shown = capsys.readouterr().out
    assert "rank 1, micro-batch 0" in shown and "rank 0" not in shown and "planned from the beginning" in shown
    assert boreal("trace", 10, config) == 1 and "the run ends with step 9" in capsys.readouterr().err


def test_merge_split_sample_check_report(corpus, tmp_path, capsys):
    parts = [f"{tmp_path}/{name}=" for name in ("a", "b")]
    assert boreal("split", corpus["train"], "--into", parts[0] + "0.5", parts[1] + "rest", "--seed", 1, "--json") == 0
    split = json.loads(capsys.readouterr().out)
    assert boreal("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "ab") == 0
    assert f"{split['documents']:,} documents" in capsys.readouterr().out
    (tmp_path / "parts").mkdir()
    for name in ("a", "b"):
        for ending in (".bin", ".idx"):
            os.link(tmp_path / f"{name}{ending}", tmp_path / "parts" / f"{name}{ending}")
    command = [sys.executable, ROOT / "tools/merge_datasets.py", "--input", tmp_path / "parts", "--output-prefix", tmp_path / "tool"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert (tmp_path / "tool.bin").read_bytes() == (tmp_path / "ab.bin").read_bytes()
    assert boreal("sample", tmp_path / "ab", "--out", tmp_path / "few", "--documents", 5, "--seed", 3) == 0
    assert boreal("check", tmp_path / "ab", tmp_path / "few", "--json") == 0
    capsys.readouterr()
    assert boreal("report", tmp_path / "few", "--out", tmp_path / "r.html", "--tokenizer", corpus["tokenizer"]) == 0
    assert "<html" in (tmp_path / "r.html").read_text()
    with open(tmp_path / "few.bin", "ab") as file:
        file.write(b"\0")
    assert boreal("check", tmp_path / "ab", tmp_path / "few") == INPUT
    assert "few.bin" in capsys.readouterr().out
    assert boreal("merge", tmp_path / "a") == boreal("split", tmp_path / "a", "--into", "x=many") == USAGE
    assert boreal("merge", "--shards", tmp_path / "none") != 0


def test_exit_codes_of_preprocess(tmp_path, corpus, capsys):
    text = tmp_path / "in.jsonl"
    text.write_text('{"text": "good"}\n{bad\n')
    words = ["preprocess", text, "--tokenizer", corpus["tokenizer"], "--out", tmp_path / "out"]
    assert boreal(*words) == INPUT and "--on-bad skip" in capsys.readouterr().err
    assert boreal(*words, "--on-bad", "quarantine") == 0
    assert boreal("preprocess", tmp_path / "none", *words[2:]) == USAGE
    assert boreal(*words, "--shard", "3/2") == USAGE
    with pytest.raises(SystemExit) as error:
        boreal(*words, "--engine", "quick")
    assert error.value.code == USAGE
    (tmp_path / "file").write_text("")
    assert boreal(*words[:-1], tmp_path / "file" / "out", "--on-bad", "skip") == STORAGE
    assert boreal(*words, "--dry-run", "--tst-bag", 4) == 0 and "parts" in capsys.readouterr().out


def test_sigterm_says_how_to_go_on(tmp_path, corpus):
    text = tmp_path / "in.jsonl"
    line = json.dumps({"text": (STDLIB / "argparse.py").read_text()}) + "\n"
    text.write_text(line * 400)
    command = [
        sys.executable, "-m", "boreal_megatron", "data", "preprocess", str(text), "--tokenizer", str(corpus["tokenizer"]),
        "--out", str(tmp_path / "out"), "--engine", "hf", "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "out_text_document.parts"
    end = time.monotonic() + 60
    while not list(folder.glob("*.bin.tmp")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and "the same command goes on from there" in said


def test_no_verb_imports_torch(config, corpus, tmp_path):
    code = (
        "import sys; from boreal_megatron import cli\n"
        f"for words in {[['blend', str(config)], ['prepare', str(config)], ['trace', '2', str(config)], ['check', str(corpus['train'])]]!r}:\n"
        "    assert cli.main(['data', *words]) == 0, words\n"
        "assert not {'torch', 'megatron', 'transformers', 'pandas'} & set(sys.modules), set(sys.modules) & {'torch', 'megatron'}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_job_array_and_its_merge_make_one_runs_bytes(tmp_path, corpus):
    """The Slurm example, with Slurm's variables set by hand; parts are 16 MB, so the inputs are three large files."""
    for name in "abc":
        line = json.dumps({"text": name + (STDLIB / "argparse.py").read_text()}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * (9_000_000 // len(line)))
    (tmp_path / "boreal").write_text(f"#!/bin/sh\nexec {sys.executable} -m boreal_megatron \"$@\"\n")
    (tmp_path / "boreal").chmod(0o755)
    given = [tmp_path / "out", corpus["tokenizer"], f"{tmp_path}/*.jsonl"]
    for task in range(2):
        env = {**os.environ, "BOREAL": str(tmp_path / "boreal"), "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "examples/slurm/preprocess.sbatch", "2", *map(str, given)], cwd=ROOT, env=env, check=True)
    assert boreal("merge", "--shards", tmp_path / "out") == 0
    assert boreal("preprocess", given[2], "--tokenizer", corpus["tokenizer"], "--out", tmp_path / "whole") == 0
    for ending in (".bin", ".idx", ".provenance.npy"):
        assert (tmp_path / f"out_text_document{ending}").read_bytes() == (tmp_path / f"whole_text_document{ending}").read_bytes()
