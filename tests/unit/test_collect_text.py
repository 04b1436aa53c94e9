"""Collecting text for the quickstart: repeatable, without doubles, mixed evenly, and honest about too little."""

import importlib.util
import json
from pathlib import Path

import pytest

from boreal_megatron.errors import BorealError

PATH = Path(__file__).parents[2] / "examples" / "quickstart" / "collect_text.py"
SPEC = importlib.util.spec_from_file_location("collect_text", PATH)
collect_text = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(collect_text)
collect = collect_text.collect


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def both(folder):
    return [(folder / name).read_bytes() for name in ("train.jsonl", "valid.jsonl")]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A small machine: its own standard library, packages and documentation."""
    root = tmp_path / "machine"
    for n in range(120):
        for name in (f"lib/mod{n}.py", f"lib/site-packages/p{n % 7}/m{n}.py", f"lib/site-packages/p{n % 7}/doc{n}.md"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"# {name}\n" + "words and more words é\n" * (20 + n % 9))
    same = "the same licence\n" * 40
    for name in ("lib/site-packages/p1/LICENSE", "lib/site-packages/p2/LICENSE.txt", "lib/site-packages/p3/METADATA"):
        (root / name).write_text(same)
    (root / "lib/short.py").write_text("x = 1\n")
    (root / "lib/long.py").write_text("x = 1\n" * 100_000)
    (root / "lib/binary.py").write_bytes(b"\xff" * 1000)
    (root / "lib/table.py").write_text("a row of numbers: 314159, 271828,\n" * 20)
    (root / "lib/__pycache__").mkdir()
    (root / "lib/__pycache__" / "cached.py").write_text("cached = 1\n" * 50)
    walk = collect_text._walk
    inside = lambda path, skip=(): walk(path, skip) if path.startswith(str(root)) else iter(())  # noqa: E731
    monkeypatch.setattr(collect_text, "_walk", inside)
    installed = str(root / "lib/site-packages")
    paths = {"stdlib": str(root / "lib"), "purelib": installed, "platlib": installed}
    monkeypatch.setattr(collect_text.sysconfig, "get_paths", lambda: paths)
    return root


def test_the_machines_own_text(tmp_path, machine):
    report = collect(tmp_path / "a", target_bytes=100_000)
    train, valid = rows(tmp_path / "a" / "train.jsonl"), rows(tmp_path / "a" / "valid.jsonl")
    assert report["train"]["documents"] == len(train) and report["valid"]["documents"] == len(valid)
    assert len(valid) == (len(train) + len(valid)) // 50 >= 1
    texts = [row["text"] for row in train + valid]
    assert len(set(texts)) == len(texts)
    total = sum(len(text.encode()) for text in texts)
    assert total == report["train"]["bytes"] + report["valid"]["bytes"] and 100_000 <= total < 101_000
    for row in train + valid:
        kind, name = row["source"].split("/", 1)
        home = machine / "lib" if kind == "stdlib" else machine / "lib/site-packages"
        assert (home / name).read_text() == row["text"]
        assert name.endswith(".py") == (kind != "docs") and "site-packages" not in name
        assert Path(name).name not in ("short.py", "long.py", "binary.py", "cached.py", "table.py")
    shares = report["kinds"].values()
    assert len(shares) == 3 and max(shares) - min(shares) < 2_000

    collect(tmp_path / "b", target_bytes=100_000)
    assert both(tmp_path / "a") == both(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["train.jsonl", "valid.jsonl"]


def test_a_kind_that_runs_dry_is_made_up_for_and_doubles_are_dropped(tmp_path, machine):
    report = collect(tmp_path / "a", target_bytes=190_000)
    texts = [row["text"] for row in rows(tmp_path / "a" / "train.jsonl") + rows(tmp_path / "a" / "valid.jsonl")]
    assert report["train"]["bytes"] + report["valid"]["bytes"] >= 190_000
    assert sum(text.startswith("the same licence") for text in texts) <= 1
    assert not any("314159" in text for text in texts)


def test_too_little_text_on_the_machine(tmp_path, machine):
    with pytest.raises(BorealError, match=r"MB of text. Expected: at least 15.0 MB. .*--text"):
        collect(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_this_machine(tmp_path):
    report = collect(tmp_path, target_bytes=1_500_000)
    assert report["train"]["bytes"] + report["valid"]["bytes"] >= 1_500_000
    assert set(report["kinds"]) == {"docs", "packages", "stdlib"}


BOOK = "\n\n".join(f"Paragraph {n}. " + "It was a dark and stormy night; naïve. " * (5 + n % 20) for n in range(700))


def test_one_long_text_file_is_split_and_held_out(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    report = collect(tmp_path / "out", text=tmp_path / "book.txt")
    train, valid = rows(tmp_path / "out" / "train.jsonl"), rows(tmp_path / "out" / "valid.jsonl")
    assert len(valid) >= 1 and report["kinds"] == {}
    assert sum(len(row["text"]) for row in train + valid) == len(BOOK)
    assert all(row["source"] == "book.txt" and row["text"] in BOOK for row in train + valid)
    assert all(4_000 <= len(row["text"]) <= 8_000 for row in train[:-1])
    held_out = {row["text"] for row in valid}
    collect(tmp_path / "again", text=tmp_path / "book.txt")
    assert both(tmp_path / "out") == both(tmp_path / "again")
    (tmp_path / "more.txt").write_text(BOOK + "\n\nOne more paragraph.")
    collect(tmp_path / "more", text=tmp_path / "more.txt")
    assert len({row["text"] for row in rows(tmp_path / "more" / "valid.jsonl")} & held_out) >= len(held_out) - 1


@pytest.mark.parametrize("text", ["", "a", "x" * 50_000, "word " * 9_000, "line\n" * 9_000, "p\n\n" * 20_000, BOOK])
def test_split_loses_nothing_and_ends(text):
    pieces = list(collect_text.split(text))
    assert "".join(pieces) == text and all(pieces)
    assert max(map(len, pieces), default=0) <= 16_001


def test_jsonl_and_folders(tmp_path):
    documents = [BOOK[i : i + 9_500] for i in range(0, 380_000, 9_500)]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    (tmp_path / "in" / "sub" / "b.txt").write_text("short but fine\n" * 20)
    collect(tmp_path / "out", text=tmp_path / "in")
    found = rows(tmp_path / "out" / "train.jsonl") + rows(tmp_path / "out" / "valid.jsonl")
    assert {row["source"] for row in found} == {"a.jsonl", "sub/b.txt"}
    assert sorted(row["text"] for row in found) == sorted([*documents, "short but fine\n" * 20])


def test_too_little_or_missing_own_text(tmp_path):
    (tmp_path / "few.txt").write_text("too few words\n" * 100)
    with pytest.raises(BorealError, match="few.txt: 0.00 MB of text. Expected: at least 0.3 MB"):
        collect(tmp_path / "out", text=tmp_path / "few.txt")
    with pytest.raises(BorealError, match="no such file"):
        collect(tmp_path / "out", text=tmp_path / "missing.txt")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "z" * 400_000}))
    with pytest.raises(BorealError, match="one document"):
        collect(tmp_path / "out", text=tmp_path / "one.jsonl")
    assert not (tmp_path / "out").exists()
