"""The fast engine gives the reference's ids, on everything that tokenizers have been seen to disagree about."""

import inspect
import json
import random
import sys
import textwrap
import unicodedata

import numpy as np
import pytest
from tests.unit.test_preprocess import jsonl, outputs, run

from boreal_megatron.data import engines
from boreal_megatron.data.engines import Gigatoken, Marks, Reference, choose, pieces
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.tokenizer import Tokenizer, train_bpe
from boreal_megatron.errors import USAGE, BorealError

SOURCE = inspect.getsource(textwrap)
gigatoken = pytest.mark.skipif(engines.importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder: as trained here, and as Qwen's: NFC, with special and other added tokens."""
    plain, qwen = (tmp_path_factory.mktemp(name) for name in ("plain", "qwen"))
    train_bpe([SOURCE, "naïve Ελλάδα 漢字 🙂 " * 20], 500, plain)
    content = json.loads((plain / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    like = content["added_tokens"][0]
    for number, (token, special) in enumerate([("<|im_start|>", True), ("<think>", False), ("</think>", False)]):
        content["added_tokens"].append(like | {"id": 500 + number, "content": token, "special": special})
    (qwen / "tokenizer.json").write_text(json.dumps(content))
    return {"plain": plain, "qwen": qwen}


def both(folder, special="encode"):
    tokenizer = Tokenizer.load(folder)
    return Gigatoken(tokenizer, special), Reference(Tokenizer.load(folder), special)


def assert_same(fast, slow, texts):
    for text, a, b in zip(texts, fast.encode(texts), slow.encode(texts), strict=True):
        assert np.array_equal(a, b), text


@gigatoken
@pytest.mark.parametrize("name", ["plain", "qwen"])
@pytest.mark.parametrize("special", ["encode", "split"])
def test_hard_texts(folders, name, special):
    fast, slow = both(folders[name], special)
    marked = [f"{a}{mark}{b}" for mark in fast.added.marks for a in ("", "a ", "\n") for b in ("", "b", " c")]
    assert_same(fast, slow, [*engines.TRICKY, *marked, SOURCE, "<|im_start|", "<thin", "< |endoftext|>"])


@gigatoken
@pytest.mark.parametrize("name", ["plain", "qwen"])
def test_every_fiftieth_character_between_others(folders, name):
    fast, slow = both(folders[name])
    characters = [chr(c) for c in range(0, sys.maxunicode, 50) if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"a{c}b {c}1{c}\n'{c}e{c}\u0301" for c in characters[i : i + 200]) for i in range(0, len(characters), 200)]
    assert_same(fast, slow, texts)


@gigatoken
def test_random_marks_and_letters(folders):
    fast, slow = both(folders["qwen"])
    pick = random.Random(3)
    marks = [chr(c) for c in range(sys.maxunicode) if unicodedata.category(chr(c)) == "Mn"]
    new = ["\u1add", "\U0001611e", "\U00016d67", "\U00011382", "\U000113c9", "\U000113ce", "\u07fd"]
    texts = ["".join(pick.choice([*"ae 1\n'", pick.choice(marks), pick.choice(new), "\u0301"]) for _ in range(12)) for _ in range(3000)]
    assert_same(fast, slow, texts)
    decided = [fast._at_risk(text) for text in texts]
    assert any(decided) and not all(decided)


@gigatoken
def test_an_engine_that_differs_is_found_out(folders):
    fast, _ = both(folders["plain"])
    genuine, fast.fast = fast.fast, None

    class Off:
        def encode(self, text):
            return genuine.encode(text)[:-1]

    fast.fast = Off()
    with pytest.raises(BorealError, match="differ at token .* near .*--engine hf"):
        fast.compare(SOURCE)


@gigatoken
def test_letters_younger_than_one_of_the_unicode_tables(tmp_path):
    """U+A7CF (2025) is a letter for gigatoken and none for the reference, which splits around it otherwise."""
    young = '  "\ua7cf",\n  "\U00016ebb",\n'
    train_bpe([young * 50, SOURCE], 500, tmp_path)
    fast, slow = both(tmp_path)
    assert not np.array_equal(fast.fast.encode(young), slow.encode([young])[0])  # or this test shows nothing
    assert_same(fast, slow, [young, SOURCE + young, "naïve Ελλάδα 漢字"])
    assert [chr(code) for code in np.flatnonzero(fast.known == engines.UNLIKE)] == ["\ua7cf", "\U00016ebb"]
    assert fast.known[ord("ï")] == engines.ALIKE


@gigatoken
def test_the_cache_is_given_back(folders, monkeypatch):
    fast, slow = both(folders["plain"])
    first = fast.fast
    monkeypatch.setattr(engines, "_resident_bytes", lambda: fast.memory + engines.CACHE_BYTES + 1)
    assert_same(fast, slow, [SOURCE])
    assert fast.fast is not first


def test_choice_says_why(folders, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(folders["plain"])
    engine, why = choose("hf", tokenizer, "encode")
    assert (engine.name, why) == ("hf", "asked for")
    with pytest.raises(BorealError, match="needs a tokenizer.model") as error:
        choose("sentencepiece", tokenizer, "encode")
    assert error.value.code == USAGE
    content = json.loads((folders["plain"] / "tokenizer.json").read_text())
    for change, why in (
        ({"normalizer": {"type": "NFKC"}}, "normalises by NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "gigatoken cannot read this tokenizer"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        changed = Tokenizer.load(tmp_path)
        engine, reason = choose("auto", changed, "encode")
        assert engine.name == "hf" and (why in reason or "not installed" in reason)
        with pytest.raises(BorealError, match="--engine gigatoken: "):
            choose("gigatoken", changed, "encode")
    monkeypatch.setattr(engines, "GIGATOKEN", "0.9.")
    assert choose("auto", tokenizer, "encode")[0].name == "hf"


@gigatoken
def test_auto_takes_the_fast_engine_and_the_bytes_are_the_same(folders, tmp_path):
    texts = [t for t in engines.TRICKY if t] + [f"a {m} b" for m in ("<|im_start|>", "<think>", "<|endoftext|>")] + [SOURCE] * 3
    source = jsonl(tmp_path / "in.jsonl", texts)
    for name, folder in folders.items():
        for special in ("encode", "split"):
            made = [run([source], folder, tmp_path / f"{name}{engine}", engine=engine, special=special) for engine in ("auto", "hf")]
            assert [m["engine"]["name"] for m in made] == ["gigatoken", "hf"]
            fast, slow = (outputs(tmp_path / f"{name}{engine}") for engine in ("auto", "hf"))
            assert fast[".bin"] == slow[".bin"] and fast[".idx"] == slow[".idx"]


def test_marks():
    marks = Marks(["<|a|>", "<|b|>", "[END]"])
    assert marks.found("x <|b|> <|a|> [EN") == ["<|a|>", "<|b|>"]
    assert marks.found("<| a |>") == marks.found("") == Marks([]).found("x") == []


# --- special tokens in the text ---------------------------------------------------------------------------------------


def test_special_tokens_in_the_text(folders, tmp_path):
    texts = ["plain", "one <|endoftext|> two", "<think>", "<|im_start|>user <|endoftext|>"]
    source = jsonl(tmp_path / "in.jsonl", texts)
    tokenizer = Tokenizer.load(folders["qwen"])
    ends = {}
    for special in ("encode", "split"):
        made = run([source], folders["qwen"], tmp_path / special, special=special)
        data = IndexedReader(made["prefix"])
        ends[special] = [int(np.count_nonzero(data.document(i) == tokenizer.eod)) for i in range(len(data))]
        assert made["special_documents"] == 2
        listed = [json.loads(line) for line in open(f"{made['prefix']}.special.jsonl")]
        assert [(row["document"], row["line"], row["tokens"]) for row in listed] == [
            (1, 2, ["<|endoftext|>"]), (3, 4, ["<|endoftext|>", "<|im_start|>"]),
        ]  # fmt: skip
        assert all(source.read_bytes()[row["offset"] :].startswith(b'{"text"') for row in listed)
    assert ends == {"encode": [1, 1, 1, 1], "split": [1, 2, 1, 2]}
    with pytest.raises(BorealError, match=r"in.jsonl:2: .*special tokens in the text: <\|endoftext\|>"):
        run([source], folders["qwen"], tmp_path / "error", special="error")


# --- long texts -------------------------------------------------------------------------------------------------------


def test_pieces_give_the_ids_of_the_whole(folders, monkeypatch):
    monkeypatch.setattr(engines, "PIECE_CHARACTERS", 2_000)
    for folder in folders.values():
        encode = Reference(Tokenizer.load(folder), "encode").encode
        parts = pieces(SOURCE, encode)
        assert "".join(parts) == SOURCE and len(parts) > 5 and max(map(len, parts)) <= 3_000
        assert np.array_equal(np.concatenate(encode(parts)), encode([SOURCE])[0])
    assert pieces("x" * 9_000, encode) == ["x" * 9_000]  # nowhere to cut


def test_a_place_where_the_ids_would_change_is_not_cut(monkeypatch):
    monkeypatch.setattr(engines, "PIECE_CHARACTERS", 100)
    text = "word after word " * 100

    def never_splits(texts):
        return [np.array([len(t)]) for t in texts]

    assert pieces(text, never_splits) == [text]


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(SOURCE)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    texts = [SOURCE[:300], "naïve 漢字 🙂 </s> end", "\0 nul"]
    made = run([jsonl(tmp_path / "in.jsonl", texts)], folder, tmp_path / "out")
    assert made["engine"]["name"] == "sentencepiece" and made["vocab_size"] == 400
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    data = IndexedReader(made["prefix"])
    assert [data.document(i).tolist() for i in range(3)] == [[*reference.encode(t), reference.eos_id()] for t in texts]
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(data.document(1)[:-1]) == texts[1] and tokenizer.eod_token == "</s>"
    with pytest.raises(BorealError, match="auto or sentencepiece"):
        choose("hf", tokenizer, "encode")
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(BorealError, match="not a SentencePiece model"):
        Tokenizer.load(folder)
