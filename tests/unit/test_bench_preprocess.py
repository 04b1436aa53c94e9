"""The preprocessing bench, run whole on a small corpus: what it measures, compares, and how it shows a failure."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boreal_megatron.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_preprocess.py"
SPEC = importlib.util.spec_from_file_location("bench_preprocess", TOOL)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_engines_agree_on_the_hard_documents(tmp_path):
    """The tool itself: both engines, on real text and on every hard document, write the same bytes."""
    pytest.importorskip("gigatoken")
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "boreal_megatron" / "data").glob("*.py"))]
    corpus = write(tmp_path / "corpus.jsonl", sources + bench.HARD)
    command = [sys.executable, str(TOOL), "--corpus", str(corpus), "--vocabulary", "600", "--workers", "1"]
    command += ["--rounds", "1", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "found.json"), "--table"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["corpus"]["documents"] == len(sources) + len(bench.HARD)
    assert found["agrees"] and found["reference"] == "boreal hf, 1 w"
    for name in ("boreal hf, 1 w", "boreal gigatoken, 1 w"):
        run = found["runs"][name]["measured"][0]
        assert run["error"] is None and 0 < run["cpu_s"] and run["tokens"] > 1000
        assert 10 < run["peak_pss_mb"] < 1000
        assert f"| {name} |" in done.stdout


def test_measure_counts_the_children_of_a_command(tmp_path):
    """CPU time and memory are those of the whole tree: here all of both is in a child."""
    with IndexedWriter(tmp_path / "out_text_document", "int32") as writer:
        writer.append([1, 2, 3])
    work = "import time; x = bytearray(b'1') * 150_000_000\nwhile time.process_time() < 0.7: pass"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"]
    run = bench.measure(command, {}, 60, tmp_path / "out_text_document")
    assert run["error"] is None and run["tokens"] == 3
    assert run["cpu_s"] >= 0.5 and run["wall_s"] >= 0.5
    assert run["peak_pss_mb"] > 150


def test_a_hanging_tool_is_ended_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(marker)!r}, 'w').close(); time.sleep(0.05)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    run = bench.measure(command, {}, 1.5, tmp_path / "out_text_document")
    assert run["error"].startswith("hung")
    assert marker.exists()  # the child had started
    marker.unlink()
    time.sleep(0.3)
    assert not marker.exists()


def test_a_failing_tool_is_shown(tmp_path):
    prefix = tmp_path / "out_text_document"
    run = bench.measure([sys.executable, "-c", "raise SystemExit('no such option')"], {}, 60, prefix)
    assert run["error"] == "exit code 1: no such option"
    nothing = bench.measure([sys.executable, "-c", "pass"], {}, 60, prefix)
    assert "no such file" in nothing["error"]


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ([[1, 2], [3, 9]], "1 of 2 documents differ"),
        ([[1, 2]], "1 documents where there should be 2"),
        ([[1, 2], [3, 4]], None),
    ],
)
def test_compare_names_what_differs(tmp_path, written, why):
    corpus = write(tmp_path / "corpus.jsonl", ["first", "sec\u00f6nd"])
    for name, documents in (("reference", [[1, 2], [3, 4]]), ("run", written)):
        with IndexedWriter(tmp_path / name, "int32") as writer:
            for ids in documents:
                writer.append(ids)
    found = bench.compare(*({"prefix": tmp_path / name, "error": None} for name in ("reference", "run")), corpus)
    assert found["equal"] == (why is None) and found.get("why") == why
    if why and "differ" in why:
        assert found["first"] == [{"document": 1, "text": "'sec\\xf6nd'"}]


def test_the_corpus_is_never_repeated(tmp_path, monkeypatch):
    """Copies and near copies stay out, and too little text gives a smaller corpus, not the same text again."""
    line = "a line of the licence that stands in many files, number {}\n"
    licence = "".join(line.format(n) for n in range(40))
    for name, text in (("a", licence), ("b", licence), ("c", "Copyright of somebody else entirely, 2001\n" + licence)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "d.py").write_text("".join(f"this one is a program of its own, in line {n}\n" for n in range(40)))
    monkeypatch.setattr(bench, "_files", lambda: {"python": sorted(map(str, tmp_path.glob("*.py")))})
    rows = [json.loads(row) for row in bench.build_corpus(tmp_path, 1).read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["python"] * 2 + ["hard"] * len(bench.HARD)
    assert rows[0]["text"] == licence
