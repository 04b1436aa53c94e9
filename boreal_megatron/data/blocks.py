"""Finished data sets in blocks: read and verified in bounded memory, and new ones written out of their documents.

    PREFIX.idx -> Part.blocks() -> pieces() -> the ids of whole documents, or of a part of one longer than a piece
    [(part, which of its documents)] -> Output -> .bin, .idx, side-cars and .meta.json, all under their names at once

Memory is a block of the index and a piece of the tokens, whatever the size of the data set. Documents may consist of
several sequences or of none, as other tools write them.

D documents and S sequences of a data set; d documents and s sequences of a block.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boreal_megatron.data.indexed import (
    CODE_OF_DTYPE,
    DTYPE_OF_CODE,
    HEADER,
    ID_DTYPES,
    MAGIC,
    VERSION,
    _HashedFile,
    bin_path,
    idx_path,
    meta_path,
    write_errors,
)
from boreal_megatron.durable import flush
from boreal_megatron.errors import BorealError, ProblemsError

BLOCK = 1 << 16  # documents, and sequences, of the index read at once
PIECE_TOKENS = 1 << 21
MAX_DOCUMENTS = 2**31 - 1  # Megatron's sample index numbers them in int32
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
        meta = json.loads(path.read_text(encoding="utf-8"))
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
        with open(path, "rb") as file:
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
        with open(bin_path(self.prefix), "rb") as file:
            for i, j, start, end in _cut(block.tokens):
                if wanted is not None and not wanted[i:j].any():
                    continue
                file.seek((block.start + start) * self.dtype.itemsize)
                data = file.read((end - start) * self.dtype.itemsize)
                if len(data) != (end - start) * self.dtype.itemsize:
                    raise self._refuse(bin_path(self.prefix), "cut short while it was read", "no writer of it now")
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


class Output:
    """A new data set made of documents of finished ones; nothing is under its final names before `commit`.

    Use as a context manager: what was not committed is discarded.

    Args:
        prefix: path without `.bin`/`.idx`; missing folders are made.
        sources: pairs of a `Part` and which of its documents: a function from a `Block` to bool `[d]`, or None for
            all. Of a part wholly taken the checksum is compared with its metadata.
        meta: what the `.meta.json` says besides counts and checksums, or None for no such file. `files` are the
            input files of all parts; `tst` names bag and boundaries.

    Attributes:
        documents, sequences, tokens: what it will hold, known before anything is written.

    Raises:
        BorealError: no documents, too many documents, side-cars that only some parts have, not enough space.
    """

    def __init__(self, prefix, sources, meta):
        self.prefix, self.sources, self.meta = Path(prefix), sources, meta
        self.dtype = sources[0][0].dtype
        self.sidecars = self._find_sidecars()
        self.files = {}  # final path -> _HashedFile
        self.documents = self.sequences = self.tokens = 0
        for _, block, kept in self._blocks():
            self.documents += int(np.count_nonzero(kept))
            self.sequences += int(block.sequences[kept].sum())
            self.tokens += int(block.tokens[kept].sum())
        if not self.tokens:
            raise BorealError(f"{prefix}: no tokens fall to it. Expected: at least one document; give it a larger share.")
        if self.documents > MAX_DOCUMENTS:
            raise BorealError(
                f"{prefix}: {self.documents:,} documents. Expected: at most {MAX_DOCUMENTS:,}, which int32 can number. "
                "Make several data sets, and name them all as sources of the blend."
            )

    def _find_sidecars(self):
        """{name: one array for each source}"""
        found, problems = {}, []
        for name in SIDECARS:
            arrays = [read_sidecar(part.prefix, name, part.documents) for part, _ in self.sources]
            lacking = [str(part.prefix) for (part, _), array in zip(self.sources, arrays) if array is None]
            if not lacking:
                found[name] = arrays
            elif len(lacking) < len(arrays):
                problems.append(
                    f"{name}: without .{name}.npy: {', '.join(lacking)}. Expected: beside all or none; "
                    "make it there too, or move those of the others away"
                )
        for part, _ in self.sources:
            if "provenance" in found and not (part.meta and "files" in part.meta):
                problems.append(f"{part.prefix}.provenance.npy: no file names ('files') in the .meta.json; move it away")
        if problems:
            raise ProblemsError(f"{self.prefix}: side-cars", problems)
        return found

    def _blocks(self):
        for source, (part, keep) in enumerate(self.sources):
            for block in part.blocks():
                yield source, block, np.ones(len(block.tokens), bool) if keep is None else keep(block)

    @property
    def bytes(self):
        """Bytes of all its files but the description."""
        rows = sum(arrays[0].itemsize for arrays in self.sidecars.values()) + 8 * bool(self._bags())
        index = HEADER.size + 12 * self.sequences + 8 * (self.documents + 1)
        return self.tokens * self.dtype.itemsize + index + rows * self.documents

    def _bags(self):
        """(bag, boundaries) where bags are counted by document, else None."""
        tst = (self.meta or {}).get("tst")
        return (tst["bag"], tst["boundaries"]) if tst and tst["boundaries"] != "flat" else None

    def write(self, bar):
        """Writes everything under temporary names, and flushes it to the disk; `bar` counts bytes of tokens."""
        self._write(bin_path(self.prefix), self._token_parts(bar))
        self._write(idx_path(self.prefix), self._index_parts())
        for name, arrays in self.sidecars.items():
            self._write(sidecar_path(self.prefix, name), self._sidecar_parts(name, arrays))
        if self._bags():
            self._write(sidecar_path(self.prefix, "bags"), self._bag_parts(*self._bags()))
        if self.meta is not None:
            meta = {"documents": self.documents, "tokens": self.tokens, **self.meta}
            if tst := meta.get("tst"):
                count = self.tokens // tst["bag"] if tst["boundaries"] == "flat" else self.bag_count
                meta["tst"] = {"bag": tst["bag"], "boundaries": tst["boundaries"], "bags": count}
            for name, path in (("bin_sha256", bin_path(self.prefix)), ("idx_sha256", idx_path(self.prefix))):
                meta[name] = self.files[path].sha256.hexdigest()
            text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
            self._write(meta_path(self.prefix), [text.encode()])
            self.meta = meta

    def _write(self, path, parts):
        with write_errors(path):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            file = self.files[path] = _HashedFile(Path(f"{path}.partial"))
        for part in parts:
            with write_errors(path):
                file.write(part)
        with write_errors(path):
            file.finish()

    def _token_parts(self, bar):
        for part, keep in self.sources:
            sha256 = hashlib.sha256() if keep is None and part.meta else None
            for block in part.blocks():
                kept = None if keep is None else keep(block)
                for i, j, data in part.pieces(block, kept):
                    if sha256:
                        sha256.update(data)
                    if kept is not None and not kept[i:j].all():
                        data = np.frombuffer(data, part.dtype)[np.repeat(kept[i:j], block.tokens[i:j])]
                    yield data
                    bar.update(memoryview(data).nbytes)
            if sha256 and sha256.hexdigest() != part.meta["bin_sha256"]:
                raise BorealError(
                    f"{bin_path(part.prefix)}: sha256 {sha256.hexdigest()[:16]}. Expected: "
                    f"{part.meta['bin_sha256'][:16]}, as its .meta.json says: changed since it was made. "
                    "Copy it again, or make it again."
                )

    def _index_parts(self):
        yield HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], self.sequences, self.documents + 1)
        for _, block, kept in self._blocks():
            yield block.lengths[np.repeat(kept, block.sequences)]
        start = 0
        for _, block, kept in self._blocks():
            ends = start + np.cumsum(block.lengths[np.repeat(kept, block.sequences)], dtype=np.int64)
            if ends.size:
                yield np.concatenate([[start], ends[:-1]]) * self.dtype.itemsize
                start = int(ends[-1])
        yield from _cumulative(block.sequences[kept] for _, block, kept in self._blocks())

    def _bag_parts(self, bag, boundaries):
        yield _npy_header(np.dtype(np.int64), self.documents + 1)
        for part in _cumulative(bags_of(block.tokens[kept], bag, boundaries) for _, block, kept in self._blocks()):
            yield part
        self.bag_count = int(part[-1])

    def _sidecar_parts(self, name, arrays):
        dtype = np.result_type(*arrays) if name != "provenance" else PROVENANCE
        yield _npy_header(dtype, self.documents)
        number = {file: n for n, file in enumerate((self.meta or {}).get("files", []))}
        for source, block, kept in self._blocks():
            rows = arrays[source][block.first : block.first + len(kept)][kept].astype(dtype)
            if name == "provenance" and rows.size:
                files = self.sources[source][0].meta["files"]
                if rows["file"].min() < 0 or rows["file"].max() >= len(files):
                    raise BorealError(
                        f"{sidecar_path(self.sources[source][0].prefix, name)}: file numbers {rows['file'].min()} to "
                        f"{rows['file'].max()}. Expected: 0 to {len(files) - 1}, of the .meta.json's files. "
                        "Make the data set again."
                    )
                rows["file"] = np.array([number[file] for file in files], np.int32)[rows["file"]]
            yield rows.tobytes()

    def commit(self):
        """Puts all files under their final names, the `.idx` last: one that exists has all that belongs to it."""
        with write_errors(bin_path(self.prefix)):
            for path in files_of(self.prefix):
                if path != bin_path(self.prefix):
                    path.unlink(missing_ok=True)  # an old file must not meet a new one, not even for a moment
            index = idx_path(self.prefix)
            for path in [path for path in self.files if path != index] + [index]:
                if path == index:
                    flush(self.prefix.parent)
                os.replace(self.files[path].path, path)
            flush(self.prefix.parent)
        self.files = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.discard()


def files_of(prefix):
    """Every file that may belong to a data set."""
    return [bin_path(prefix), idx_path(prefix), meta_path(prefix)] + [
        sidecar_path(prefix, name) for name in (*SIDECARS, "bags")
    ]


def _cumulative(counts):
    """Yields int64 arrays which, one after another, are 0 and the running sums of all arrays of `counts`."""
    yield np.zeros(1, np.int64)
    total = 0
    for array in counts:
        sums = total + np.cumsum(array, dtype=np.int64)
        if sums.size:
            yield sums
            total = int(sums[-1])


def _npy_header(dtype, rows):
    """What `numpy.save` writes before the rows."""

    class Kept(list):
        write = list.append

    kept, header = Kept(), np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
    np.lib.format.write_array_header_1_0(kept, header | {"shape": (rows,)})
    return b"".join(kept)


def write_outputs(outputs, what, progress):
    """Writes and commits outputs together, after checking that their disks have room for all.

    Args:
        outputs: `Output`s.
        what: name of the progress bar.
        progress: whether to show it.
    """
    need = {}  # device -> [bytes needed, bytes free, folder]
    for output in outputs:
        folder = output.prefix.parent.absolute()
        while not folder.exists():
            folder = folder.parent
        entry = need.setdefault(os.stat(folder).st_dev, [0, shutil.disk_usage(folder).free, folder])
        entry[0] += output.bytes
    short = [
        f"{folder}: {free:,} bytes free. Expected: {bytes_:,}, which the new files need; free some space, or write to "
        "another disk"
        for bytes_, free, folder in need.values()
        if bytes_ > free
    ]
    if short:
        raise ProblemsError("disk space", short)
    total = sum(output.tokens * output.dtype.itemsize for output in outputs)
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output)
        with bar(total, what, progress) as shown:
            for output in outputs:
                output.write(shown)
        for output in outputs:
            output.commit()


def bar(total, what, progress):
    """A bar of bytes on stderr; where that is not a terminal a line every ten seconds."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=what,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not progress,
    )
