"""Engines that turn texts into ids: the reference, and a fast one that is held to it.

The reference is what the model's users will run: Hugging Face `tokenizers`, or SentencePiece for a folder that has only
a `tokenizer.model`. gigatoken is an order of magnitude faster. It is used only where it gives the same ids:

    text in which special or other added tokens are written out    the reference
    text that is not in the tokenizer's Unicode form, NFC          the reference
    text with a character that only one of them takes for a letter the reference
    every other text                                               gigatoken, which then normalises nothing

Two Unicode tables of different age disagree about what NFC is; a text that is in NFC already is one that neither
changes. They disagree about characters that are younger than one of them, too: each character that is not ASCII is tried
when it is first seen. Beyond that the two agree on random text (tests/unit/test_engines.py has a sample of it), and each
run compares a sample of its own documents.

What special tokens written out in a text become is the same for all engines (`special`):
    encode   they are text, so no document can end in the middle of another
    split    they become special tokens, as in Megatron's own preprocessing
    error    such a document is bad
"""

import ctypes
import importlib.metadata
import itertools
import json
import re
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np

from boreal_megatron.errors import USAGE, BorealError

ENGINES = ("auto", "hf", "gigatoken", "sentencepiece")
SPECIAL = ("encode", "split", "error")
GIGATOKEN = "0.10."  # the versions that this was found with
CACHE_BYTES = 40 << 20  # gigatoken's cache of words never shrinks; it is loaded anew when it has grown so much
# A text longer than this is encoded in pieces: the reference takes up to some 200 bytes for each character.
PIECE_CHARACTERS = 1 << 16
AROUND = 500  # characters on either side of a cut that are encoded both ways
# A word ends and the next begins, or a line begins with one: every pattern in use splits here.
CUT = re.compile(r"[a-z](?= [a-z])|\n(?=[A-Za-z0-9])")
PROBE = 'a{0}{0}1 {0}",\n{0}a'  # a character beside one of each kind that split patterns tell apart
PROBED = 256  # characters that are tried at once
UNTRIED, ALIKE, UNLIKE = range(3)  # what is known of a character
COMPARED_CHARACTERS = 1000  # of a document that is compared
# What tokenizers have been seen to disagree about.
TRICKY = (
    "", " ", "\n", "\t\t  x", "a  b   c    d", "  \n\n  \r\n\r\r\n x\n", "x \n\n\n y",
    "don't DON'T we'LL I'm they'Ve 'ſ 'S", "1234567890 3.14159 1,000,000", "a\u00a0b\u2003c\u3000d\u200b\u200de",
    "\0\x01\x1f\x7f\x85\ufeff\uffff", "🙂🏽👩‍👩‍👧‍👦🇨🇦", "a" * 500, "=" * 300 + "\n" + "-" * 30, "ab " * 200,
    "\n" * 200 + "x", " " * 200 + "x", "naïve Ελλάδα 漢字かな 한국어 ไทย العربية हिन्दी",
    "e\u0301 a\u0327\u0301 \u1100\u1161\u11a8 \u07f3\u07fd", "...!!!???;;;::: --> <== /* */ // ##",
    "l'été d'Été L'ÉTÉ", "x²³ ½ Ⅷ ٣",
    "e\u1add\u0301 \U0001611e\U0001611e \U00016d67\U00016d67 \U00011382\U000113c9",
)  # fmt: skip


class Reference:
    """Encodes with the tokenizer's own library.

    Args:
        tokenizer: Tokenizer.
        special: how special tokens in the text are taken.
    """

    def __init__(self, tokenizer, special):
        self.tokenizer = tokenizer
        self.tokenizer.specials_are_text = special != "split"
        self.name = "hf" if tokenizer.library == "tokenizers" else "sentencepiece"
        self.version = importlib.metadata.version(tokenizer.library)

    def encode(self, texts):
        """Returns a list of id arrays, one for each text."""
        # One text a call keeps a worker on one core, and its memory to one text's encoding.
        return [np.asarray(self.tokenizer.encode(text), dtype=np.uint32) for text in texts]

    def compare(self, text):
        """Nothing to compare the reference with."""


class Gigatoken:
    """Encodes with gigatoken where its ids are the reference's, else with the reference.

    Args:
        tokenizer: Tokenizer.
        special: how special tokens in the text are taken.

    Raises:
        Exception: gigatoken does not know this kind of tokenizer; it has no class of its own for that.
    """

    def __init__(self, tokenizer, special):
        self.name, self.version = "gigatoken", importlib.metadata.version("gigatoken")
        self.tokenizer = tokenizer
        self.reference = Reference(tokenizer, special)
        self.added = Marks(tokenizer.added_tokens)
        content, self.is_nfc = self._without_normalizer(special)
        self.content = zlib.compress(content, 1)  # for the next time: parsing the file takes ten times as much memory
        del content
        self.known = np.full(sys.maxunicode + 1, UNTRIED, np.uint8)  # by character
        self.known[:128] = ALIKE
        self._load()

    def _without_normalizer(self, special):
        """Returns (the tokenizer.json for gigatoken, whether the tokenizer brings text into NFC)."""
        content = json.loads((self.tokenizer.folder / "tokenizer.json").read_bytes())
        is_nfc = _is_nfc(content["normalizer"])
        content["normalizer"] = None
        if special != "split":  # a token it does not know of is text
            content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        return json.dumps(content).encode(), is_nfc

    def _load(self):
        import gigatoken

        self.fast = None  # before there is another one
        give_back()
        self.fast = gigatoken.Tokenizer.from_json(zlib.decompress(self.content)).backend
        give_back()
        self.memory = _resident_bytes()

    def encode(self, texts):
        """Returns a list of id arrays, one for each text."""
        if _resident_bytes() > self.memory + CACHE_BYTES:
            give_back()  # what the reference left
            if _resident_bytes() > self.memory + CACHE_BYTES * 3 // 4:
                self._load()
        return [self.reference.encode([text])[0] if self._at_risk(text) else self.fast.encode(text) for text in texts]

    def _at_risk(self, text):
        if self.added.found(text):
            return True
        if text.isascii():
            return False
        return (self.is_nfc and not unicodedata.is_normalized("NFC", text)) or self._is_split_otherwise(text)

    def _is_split_otherwise(self, text):
        """Whether the two take a character of the text for something else: a letter, a number, neither."""
        for start in range(0, len(text), PIECE_CHARACTERS):
            part = text[start : start + PIECE_CHARACTERS].encode("utf-32-le", "surrogatepass")
            codes = np.frombuffer(part, np.uint32)
            known = self.known[codes]
            if not known.all():  # UNTRIED is 0
                self._try(np.unique(codes[known == UNTRIED]))
                known = self.known[codes]
            if (known == UNLIKE).any():
                return True
        return False

    def _try(self, codes):
        for batch in itertools.batched(codes, PROBED):
            probes = [PROBE.format(chr(code)) for code in batch]
            alike = not self._differs("\n".join(probes))
            self.known[list(batch)] = [ALIKE if alike or not self._differs(probe) else UNLIKE for probe in probes]

    def _differs(self, text):
        return not np.array_equal(self.fast.encode(text), self.reference.encode([text])[0])

    def compare(self, text):
        """Raises BorealError if the reference encodes the beginning of a text otherwise."""
        text = text[:COMPARED_CHARACTERS]
        fast, slow = self.encode([text])[0], self.reference.encode([text])[0]
        if not np.array_equal(fast, slow):
            at = next((i for i, (f, s) in enumerate(zip(fast, slow)) if f != s), min(len(fast), len(slow)))
            around = self.reference.tokenizer.decode(slow[max(0, at - 8) : at + 8])
            raise BorealError(
                f"gigatoken and the tokenizer's own library differ at token {at} of a document, near {around!r}. "
                "Expected: the same ids. Run again with --engine hf, which is slower and exact; nothing wrong was kept."
            )


class Marks:
    """Finds any of a few strings in texts, quickly where there are none.

    Args:
        marks: the strings.
    """

    def __init__(self, marks):
        self.marks = tuple(marks)
        self.beginnings = tuple({mark[:2] for mark in self.marks})

    def found(self, text):
        """Returns the marks that a text holds, a list."""
        if not any(beginning in text for beginning in self.beginnings):
            return []
        return [mark for mark in self.marks if mark in text]


def choose(name, tokenizer, special):
    """Returns (engine, why it was chosen).

    Args:
        name: one of ENGINES.

    Raises:
        BorealError: an engine asked for by name is missing, or cannot encode for this tokenizer.
    """
    reference = Reference(tokenizer, special)
    if name in ("hf", "sentencepiece") and name != reference.name:
        raise BorealError(
            f"--engine {name}: {tokenizer.folder} is read by {tokenizer.library}. Expected: auto or {reference.name}. "
            f"{name} needs a {'tokenizer.json' if name == 'hf' else 'tokenizer.model and no tokenizer.json'}.",
            USAGE,
        )
    if name == reference.name:
        return reference, "asked for"
    fast, why_not = _gigatoken(tokenizer, special)
    if fast is not None:
        return fast, "asked for" if name == "gigatoken" else "installed, and agrees with the tokenizer's own library"
    if name == "gigatoken":
        raise BorealError(f"--engine gigatoken: {why_not}. Expected: auto or {reference.name}.", USAGE)
    return reference, why_not


def make(name, tokenizer, special):
    """Returns the engine of a name that `choose` chose."""
    return Gigatoken(tokenizer, special) if name == "gigatoken" else Reference(tokenizer, special)


def _gigatoken(tokenizer, special):
    """Returns (engine, None) if it can stand in for the reference, else (None, why not)."""
    if tokenizer.library != "tokenizers":
        return None, "gigatoken is used for a tokenizer.json only"
    try:
        version = importlib.metadata.version("gigatoken")
    except importlib.metadata.PackageNotFoundError:
        return None, "gigatoken is not installed (pip install 'boreal-megatron[data]')"
    if not version.startswith(GIGATOKEN):
        return None, f"gigatoken {version} is not known; {GIGATOKEN}* is"
    try:
        engine = Gigatoken(tokenizer, special)
    except Exception as error:  # it raises RuntimeError, ValueError and others for what it does not know
        return None, f"gigatoken cannot read this tokenizer: {str(error).splitlines()[0]}"
    for text in TRICKY:
        if not np.array_equal(engine.encode([text])[0], engine.reference.encode([text])[0]):
            return None, f"gigatoken encodes {text[:40]!r} otherwise than the tokenizer's own library"
    return engine, None


def _is_nfc(normalizer):
    """Whether a tokenizer.json's normaliser brings text into NFC, and does nothing else."""
    if normalizer is None:
        return False
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if other := [part["type"] for part in parts if part["type"] != "NFC"]:
        raise ValueError(f"it normalises by {', '.join(other)}")
    return True


def give_back():
    """Gives freed memory back to the system: loading a tokenizer leaves as much with the allocator as it needs to stay.
    glibc only; elsewhere nothing changes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_bytes():
    """Memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


# --- long texts -------------------------------------------------------------------------------------------------------


def pieces(text, encode):
    """Returns a text cut where its ids are those of the pieces one after another; short texts are one piece.

    A cut lies before a space between two words or after the end of a line, and is taken only if encoding what is around
    it in one and in two gives the same ids. A text without such places stays whole.
    """
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    found, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        places = itertools.islice(CUT.finditer(text, start + PIECE_CHARACTERS // 2), 8)
        cut = next((p.end() for p in places if _clean(text, start, p.end(), encode)), None)
        if cut is None:
            break
        found.append(text[start:cut])
        start = cut
    return [*found, text[start:]]


def _clean(text, start, cut, encode):
    left, right = text[max(start, cut - AROUND) : cut], text[cut : cut + AROUND]
    one, two, both = encode([left, right, left + right])
    return np.array_equal(np.concatenate([one, two]), both)
