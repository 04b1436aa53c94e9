"""Finished data sets in blocks: read and verified in bounded memory.

    PREFIX.idx -> Part.blocks() -> pieces() -> the ids of whole documents, or of a part of one longer than a piece

Memory is a block of the index and a piece of the tokens, whatever the size of the data set. Documents may consist of
several sequences or of none, as other tools write them. What is written out of them: `output.py`.

D documents and S sequences of a data set; d documents and s sequences of a block.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boreal_megatron.data.indexed import (
    DTYPE_OF_CODE,
    HEADER,
    ID_DTYPES,
    MAGIC,
    VERSION,
    bin_path,
    idx_path,
    meta_path,
)
from boreal_megatron.errors import BorealError

BLOCK = 1 << 16  # documents, and sequences, of the index read at once
PIECE_TOKENS = 1 << 21
META_KEYS = (
    "documents", "tokens", "vocab_size", "tokenizer_sha256", "eod", "append_eod", "skipped", "bin_sha256", "idx_sha256",
)  # fmt: skip
PROVENANCE = np.dtype([("file", np.int32), ("offset", np.int64)])
SIDECARS = ("provenance", "weights", "bins")  # one row a document; what each holds says `read_sidecar`


def read_meta(prefix):
    """Returns the content of `prefix.meta.json`, or None where there is none."""
    path = meta_path(prefix)
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))  # file names
        if not isinstance(meta, dict):
            raise ValueError(f"a {type(meta).__name__}")
        if missing := [key for key in META_KEYS if key not in meta]:
            raise ValueError(f"without {', '.join(missing)}")
        return meta
    except (OSError, ValueError) as error:
        raise BorealError(
            f"{path}: cannot be read: {error}. Expected: the JSON object that `boreal data preprocess` writes. "
            "Copy it again, or remove it to go without."
        ) from None


@contextlib.contextmanager
def read_errors(path):
    """Turns an OSError while reading `path` into a message: what failed, and what to do."""
    try:
        yield
    except OSError as error:
        raise BorealError(
            f"{path}: cannot be read: {error.strerror or error}. Expected: a file that may be read, and stays. "
            "Check the disk and the permissions, and run again."
        ) from error


def sidecar_path(prefix, name):
    """`name` is one of SIDECARS, or "bags"."""
    return Path(f"{prefix}.{name}.npy")


def read_sidecar(prefix, name, rows):
    """Returns a side-car as a read-only memory map of `rows` rows, or None where there is none.

    provenance: file (number in the metadata's `files`) and offset (byte, or row of a Parquet file) of each document;
    weights: loss weight of each; bins: curriculum bin of each; bags: cumulative bags, D + 1 rows.

    Raises:
        BorealError: it is not an array of that kind and length.
    """
    path = sidecar_path(prefix, name)
    if not path.exists():
        return None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BorealError(f"{path}: cannot be read: {error}. Expected: a .npy array. Copy or make it again.") from None
    right, kind = {
        "provenance": (array.dtype == PROVENANCE, "file int32, offset int64"),
        "weights": (array.dtype == np.float32, "float32"),
        "bins": (array.dtype.kind in "iu", "an integer dtype"),
        "bags": (array.dtype == np.int64, "int64"),
    }[name]
    if array.shape != (rows,) or not right:
        raise BorealError(
            f"{path}: shape {array.shape} of {array.dtype}. Expected: {rows:,} rows of {kind}: it belongs to another "
            "data set, or is from before this one was made. Make it again, or remove it to go without."
        )
    return array


def bags_of(tokens, bag, boundaries):
    """Bags of documents of `tokens [d]` tokens under `align` or `drop_tail`; int64 `[d]`."""
    return -(-tokens // bag) if boundaries == "align" else tokens // bag


class Block(NamedTuple):
    """Some documents of an index, one after another."""

    first: int  # document
    start: int  # token
    sequences: np.ndarray  # [d] int64, sequences of each document
    lengths: np.ndarray  # [s] int32, tokens of each sequence
    tokens: np.ndarray  # [d] int64, tokens of each document


class Part:
    """A data set that is read in blocks, after checking that its two files are whole and agree.

    Attributes:
        dtype, documents, sequences, tokens: of the data set.
        meta: content of the `.meta.json`, or None.

    Raises:
        BorealError: a file is missing, empty, cut short or damaged, or the two do not belong together.
    """

    def __init__(self, prefix):
        self.prefix = Path(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                hint = " Name the prefix, without an ending; copy both files again, or make them again."
                if path.with_name(path.name + ".partial").exists():
                    hint = " There is an unfinished .partial file: what wrote it was stopped; run it again."
                raise self._refuse(path, "no such file", "a .bin and an .idx of the same name", hint)
        path = idx_path(prefix)
        size = path.stat().st_size
        if size < HEADER.size:
            raise self._refuse(path, f"{size} bytes", f"an index with a header of {HEADER.size} bytes")
        with read_errors(path), open(path, "rb") as file:
            magic, version, code, self.sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        self.documents = boundaries - 1
        if magic != MAGIC:
            raise self._refuse(path, f"starts with {magic!r}", f"{MAGIC!r}, a Megatron index")
        if version != VERSION:
            raise self._refuse(path, f"index version {version}", f"version {VERSION}")
        if np.dtype(DTYPE_OF_CODE.get(code, np.float64)) not in ID_DTYPES:
            raise self._refuse(path, f"dtype code {code}", "an integer dtype, 4 (int32) or 8 (uint16)")
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        whole = HEADER.size + 12 * self.sequences + 8 * boundaries
        if size != whole:
            more = "" if size != whole + self.sequences else " It looks like a multimodal dataset: not supported."
            raise self._refuse(path, f"{size:,} bytes", f"{whole:,} bytes for {self.sequences:,} sequences", more)
        if not self.sequences or boundaries < 2:
            raise self._refuse(path, "no documents", "at least one")
        self.tokens = sum(int(block.tokens.sum()) for block in self.blocks())
        found, whole = bin_path(prefix).stat().st_size, self.tokens * self.dtype.itemsize
        if found != whole or not found:
            says = f"{whole:,} bytes: {self.tokens:,} tokens of {self.dtype}, as the .idx says" if whole else "tokens"
            raise self._refuse(bin_path(prefix), f"{found:,} bytes", says)
        self.meta = read_meta(prefix)

    def _refuse(self, path, found, expected, hint=""):
        hint = hint or " Make the data set again, or copy both files again."
        return BorealError(f"{path}: {found}. Expected: {expected}.{hint}")

    def blocks(self):
        """Yields the whole index as verified `Block`s."""
        path, itemsize = idx_path(self.prefix), self.dtype.itemsize
        first = sequence = start = 0

        def take(dtype, count, before):
            with read_errors(path):
                return np.fromfile(path, dtype, count, offset=HEADER.size + before)

        while first < self.documents:
            count = min(BLOCK, self.documents - first)
            index = take(np.int64, count + 1, 12 * self.sequences + 8 * first)
            last = self.sequences if first + count == self.documents else index[-1]
            if index[0] != sequence or index[-1] != last or (np.diff(index) < 0).any() or last > self.sequences:
                found = f"document boundaries from {index[0]} to {index[-1]}, document {first} on"
                raise self._refuse(path, found, f"rising from {sequence} to {self.sequences}, the sequences")
            count = max(1, min(count, int(np.searchsorted(index, sequence + BLOCK, "right")) - 1))
            index = index[: count + 1] - sequence
            lengths = take(np.int32, int(index[-1]), 4 * sequence)
            if lengths.size and lengths.min() < 0:
                raise self._refuse(path, f"a sequence of {lengths.min()} tokens", "lengths of 0 or more")
            ends = np.zeros(lengths.size + 1, np.int64)
            np.cumsum(lengths, dtype=np.int64, out=ends[1:])
            pointers = take(np.int64, lengths.size, 4 * self.sequences + 8 * sequence)
            wrong = np.flatnonzero(pointers != (start + ends[:-1]) * itemsize)
            if wrong.size:
                at = int(wrong[0])
                says = f"byte {(start + ends[at]) * itemsize:,}, the sum of the lengths before it"
                raise self._refuse(path, f"sequence {sequence + at} points to byte {pointers[at]:,}", says)
            yield Block(first, start, np.diff(index), lengths, np.diff(ends[index]))
            first, sequence, start = first + count, sequence + lengths.size, start + int(ends[-1])

    def pieces(self, block, wanted=None):
        """Yields (i, j, data): the bytes of the ids of documents i to j of a block, in order.

        They are whole documents of together at most PIECE_TOKENS, or i + 1 = j and one part of a longer document,
        whose parts follow each other. Pieces without any of the documents `wanted`, bool `[d]`, are passed over.
        """
        path, itemsize = bin_path(self.prefix), self.dtype.itemsize
        with contextlib.ExitStack() as stack:
            with read_errors(path):
                file = stack.enter_context(open(path, "rb"))
            for i, j, start, end in _cut(block.tokens):
                if wanted is not None and not wanted[i:j].any():
                    continue
                with read_errors(path):
                    file.seek((block.start + start) * itemsize)
                    data = file.read((end - start) * itemsize)
                if len(data) != (end - start) * itemsize:
                    raise self._refuse(path, "cut short while it was read", "no writer of it now")
                yield i, j, data


def _cut(tokens):
    """Yields (i, j, start, end): documents i to j and their tokens, counted from the first document."""
    ends = np.cumsum(tokens)
    i = start = 0
    while i < len(ends):
        j = int(np.searchsorted(ends, start + PIECE_TOKENS, "right"))
        if j > i:
            end = int(ends[j - 1])
            yield i, j, start, end
        else:
            j, end = i + 1, int(ends[i])
            for at in range(start, end, PIECE_TOKENS):
                yield i, j, at, min(at + PIECE_TOKENS, end)
        i, start = j, end
