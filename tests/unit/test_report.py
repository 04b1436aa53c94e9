"""The report: one page with nothing outside it, its numbers those of the data, damaged data sets on top."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from boreal_megatron.data.report import render, report
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.errors import BorealError
from tests.support.finished import EOD, make, provenance

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
VOID = ("meta", "img")


class Page(html.parser.HTMLParser):
    """Fails where tags do not match; collects tags, their attributes and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif "style" not in self.open:
            self.text += data


def page_of(prefixes, out, tokenizer=None):
    result = report(prefixes, out, tokenizer, progress=False)
    json.dumps(result)
    return result, Page(out.read_text(encoding="ascii"))


@pytest.fixture
def sources(tmp_path):
    docs = [[[5, 5, 6, EOD]], [[7, EOD]], [[5, EOD]], [[5, EOD]]]
    meta = {"append_eod": True, "text_bytes": 25, "skipped": {"malformed <JSON>": 4}}
    meta["files"] = ["x.jsonl", "y & z.jsonl"]
    a = make(tmp_path / "a", docs, meta=meta, provenance=provenance([0, 1, 1, 1], [0] * 4),
             weights=np.array([0, 1, 2, 5], np.float32), bins=np.array([0, 1, 1, 3]))  # fmt: skip
    b = make(tmp_path / "b", [[[8, EOD]]], meta={"append_eod": True, "text_bytes": 7})
    return [a, b]


def test_numbers_are_those_of_the_data(sources, tmp_path):
    result, page = page_of(sources, tmp_path / "new" / "report.html")
    assert result["problems"] == [] and "Nothing is wrong" in page.text
    # 10 + 2 tokens; 5 ends in 12; ids 0, 5, 6, 7 and 0, 8 of 50.
    assert ["a", "4", "10", "1", "0", "2.50", "40.000%", "50", "92.0%"] in page.rows
    assert ["b", "1", "2", "0", "0", "3.50", "50.000%", "50", "96.0%"] in page.rows
    assert ["together", "5", "12", "1", "0", "2.67", "41.667%", "50", "90.0%"] in page.rows
    assert ["a", "2", "2", "2", "4", "4", "4"] in page.rows and ["together", "2", "2", "2", "4", "4", "4"] in page.rows
    assert ["1", "0", "5", "41.667%"] in page.rows and ["2", "5", "4", "33.333%"] in page.rows
    assert ["a", "0", "2", "5"] in page.rows and ["a", "0", "1.25", "3"] in page.rows  # weights, bins: min, mean, max
    assert ["a", "malformed <JSON>", "4"] in page.rows
    assert ["a", "x.jsonl", "1"] in page.rows and ["a", "y & z.jsonl", "3"] in page.rows
    assert ["b", "b.jsonl", "?"] in page.rows
    assert result["unused_vocabulary"] == {str(sources[0]): 0.92, str(sources[1]): 0.96}
    assert "report.html" in render(result)


def test_the_page_is_alone_and_its_plots_are_plots(sources, tmp_path):
    from matplotlib.image import imread

    _, page = page_of(sources, tmp_path / "report.html")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert len({image["alt"] for image in images}) == 4 and all(len(image["alt"]) > 20 for image in images)
    for image in images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        pixels = imread(io.BytesIO(base64.b64decode(data)))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600 and np.unique(pixels.sum(-1)).size > 20
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<link|https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    again = tmp_path / "again.html"
    report(sources, again, progress=False)
    assert again.read_text() == text


def test_tokens_as_text(tmp_path):
    tokenizer = train_bpe(["some words and\nsome <b>more</b> words"] * 9, 270, tmp_path / "t")
    ids = [*tokenizer.encode("some words\n\n<b>"), tokenizer.eod]
    meta = {"append_eod": True, "eod": tokenizer.eod, "vocab_size": 270, "tokenizer_sha256": tokenizer.fingerprint}
    a = make(tmp_path / "a", [[ids]] * 5, meta=meta)
    _, page = page_of([a], tmp_path / "report.html", tokenizer)
    texts = {row[2] for row in page.rows if len(row) == 5 and row[3] == "5"}
    assert {"␣words", "<|endoftext|>"} <= texts and not any("\n" in text for text in texts)
    other = make(tmp_path / "b", [[ids]], meta=meta | {"tokenizer_sha256": "b" * 64})
    with pytest.raises(BorealError, match=f"made {other}"):
        report([a, other], tmp_path / "other.html", tokenizer, progress=False)
    assert not (tmp_path / "other.html").exists()


def test_problems_are_on_top_and_every_kind_of_dataset_is_shown(sources, tmp_path):
    broken = make(tmp_path / "broken", [[[1]]])
    (tmp_path / "broken.bin").write_bytes(b"1")
    foreign = make(tmp_path / "f", [[[1, 2], [3]], [], [[2**31 - 1, -5]]], np.int32)
    odd = make(tmp_path / "o", [[[49, EOD]]] * 2, meta={"append_eod": True, "tokenizer_sha256": "b" * 64},
               weights=np.array([np.nan, np.inf], np.float32))  # fmt: skip
    many = [make(tmp_path / f"m{n}", [[[n + 1, EOD]]], meta={"append_eod": True}) for n in range(5)]
    result, page = page_of([*sources, broken, foreign, odd, *many, tmp_path / "x<y"], tmp_path / "report.html")
    assert len(result["problems"]) == 3
    listed = page.text.index("Problems (3)")
    assert listed < page.text.index("Sources") and all(problem in page.text for problem in result["problems"])
    assert ("div", {"class": "problems"}) in page.tags
    assert ["f", "3", "5", "0", "1", "?", "?", "?", "?"] in page.rows
    assert ["together", "15", "31", "3", "1", "?", "?", "?", "?"] in page.rows
    assert "6 largest of the 9 sources" in page.text


def test_nothing_to_show(tmp_path):
    with pytest.raises(BorealError, match="no such file"):
        report([tmp_path / "x"], tmp_path / "r.html", progress=False)
    with pytest.raises(BorealError, match="none given"):
        report([], tmp_path / "r.html", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device without space")
def test_a_full_disk_keeps_the_earlier_page(sources, tmp_path):
    report(sources, tmp_path / "r.html", progress=False)
    before = (tmp_path / "r.html").read_text()
    (tmp_path / "r.html.tmp").symlink_to("/dev/full")
    with pytest.raises(BorealError, match="r.html: cannot be written: No space left.*free some space"):
        report(sources, tmp_path / "r.html", progress=False)
    assert (tmp_path / "r.html").read_text() == before and not list(tmp_path.glob("*.tmp"))


def test_without_matplotlib_it_is_named(sources, tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom boreal_megatron.data.report import report\n"
        f"report([{str(sources[0])!r}], {str(tmp_path / 'r.html')!r}, progress=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "BorealError: report: plots need matplotlib" in done.stderr and "[plot]" in done.stderr
