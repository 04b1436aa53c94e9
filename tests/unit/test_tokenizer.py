"""Tokenizers: training is exact and repeatable, any text comes back, and no text can end a document."""

import fnmatch
import inspect
import json
import shlex
import subprocess
import sys
import textwrap

import pytest

from boreal_megatron.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from boreal_megatron.errors import BorealError

TEXTS = [inspect.getsource(module) for module in (textwrap, shlex, fnmatch)]
VOCAB = 400


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(TEXTS), VOCAB, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer.load(folder)


def test_exact_size_and_end_of_document(tokenizer, folder):
    assert tokenizer.vocab_size == VOCAB
    assert (tokenizer.eod, tokenizer.eod_token) == (0, END_OF_DOCUMENT)
    assert sorted(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values()) == list(range(VOCAB))


def test_training_is_repeatable_in_another_process(folder, tmp_path):
    code = (
        "import sys, json; from boreal_megatron.data.tokenizer import train_bpe;"
        f"train_bpe(json.load(sys.stdin), {VOCAB}, {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(TEXTS), text=True, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "  two  spaces \t\r\n\n end ",
        "naïve Ελλάδα 漢字 🙂🏽 \u200d e\u0301",
        "\0\x01\x7f\uffff",
        "'S 'll don'T 2026",
        END_OF_DOCUMENT,
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode("2026202620262026")) == 16


@pytest.mark.parametrize("text", [END_OF_DOCUMENT, f"before{END_OF_DOCUMENT}after", f"{END_OF_DOCUMENT}\n" * 3])
def test_a_written_out_marker_is_text(tokenizer, text):
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, "x", text])):
        assert tokenizer.eod not in ids
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)


def test_decoding_shows_the_end_of_document(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod]) == "a" + END_OF_DOCUMENT


def test_transformers_loads_it_and_agrees(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast and theirs.eos_token == END_OF_DOCUMENT and theirs.eos_token_id == tokenizer.eod
    assert len(theirs) == VOCAB
    text = "the quick brown fox can't 12 漢字\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


def test_fingerprint_follows_the_file(tokenizer, folder, tmp_path):
    other = tmp_path / "other"
    train_bpe(TEXTS, VOCAB - 1, other)
    assert Tokenizer.load(other).fingerprint != tokenizer.fingerprint == Tokenizer.load(folder).fingerprint


def test_too_little_text_and_too_small_vocabulary(tmp_path):
    with pytest.raises(BorealError, match=r"gives only \d+ vocabulary entries. Expected: vocab_size=5000"):
        train_bpe(["abc abc"], 5000, tmp_path)
    with pytest.raises(BorealError, match="at least 257"):
        train_bpe(TEXTS, 256, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(BorealError, match="tokenizer.json: cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:-100])
    with pytest.raises(BorealError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def copied(folder, to, *, config=None, change=lambda text: text):
    (to / "tokenizer.json").write_text(change((folder / "tokenizer.json").read_text()))
    if config is not None:
        (to / "tokenizer_config.json").write_text(config)
    return to


def test_end_of_document_from_config_else_known_else_error(folder, tmp_path):
    assert Tokenizer.load(copied(folder, tmp_path)).eod == 0
    copied(folder, tmp_path, config=json.dumps({"eos_token": {"content": "in", "special": True}}))
    assert Tokenizer.load(tmp_path).eod_token == "in"
    copied(folder, tmp_path, config=json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(BorealError, match="<nope>"):
        Tokenizer.load(tmp_path)
    copied(folder, tmp_path, config="[")
    with pytest.raises(BorealError, match="tokenizer_config.json"):
        Tokenizer.load(tmp_path)
    copied(folder, tmp_path, config="{}", change=lambda text: text.replace(END_OF_DOCUMENT, "<|unheard-of|>"))
    with pytest.raises(BorealError, match="no end-of-document token"):
        Tokenizer.load(tmp_path)


def test_truncation_padding_and_template_of_published_files_are_ignored(tokenizer, folder, tmp_path):
    from tokenizers import Tokenizer as Raw
    from tokenizers.processors import TemplateProcessing

    raw = Raw.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.post_processor = TemplateProcessing(single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    raw.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox and more"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


def test_added_tokens_count(folder, tmp_path):
    from tokenizers import Tokenizer as Raw

    raw = Raw.from_file(str(folder / "tokenizer.json"))
    raw.add_special_tokens(["<extra>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).vocab_size == VOCAB + 1
