"""Megatron's indexed dataset: token ids in `PREFIX.bin`, where each document lies in `PREFIX.idx`.

The files are byte for byte what `megatron.core.datasets.indexed_dataset` writes, with one sequence per document,
so stock Megatron reads ours and we read its. NumPy only: no torch, so that the data tools start quickly.

    .idx   9 bytes   b"MMIDIDX\\0\\0"
           u64       version, 1
           u8        dtype code (4 = int32, 8 = uint16)
           u64       S, number of sequences
           u64       D + 1, number of documents plus one
           int32[S]  tokens in each sequence
           int64[S]  byte at which each sequence starts in .bin
           int64[D+1]  document d is made of sequences [index[d], index[d+1])
    .bin   the ids, little-endian, nothing between them
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
import struct
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np

from boreal_megatron.data import remote
from boreal_megatron.durable import flush
from boreal_megatron.errors import STORAGE, BorealError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
ID_DTYPES = tuple(np.dtype(d) for d in (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16))
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
MAX_DOCUMENTS = 2**31 - 2  # megatron-core numbers documents in int32, and their boundaries are one more
INDEX_PIECE = 1 << 16  # entries of the .idx that are checked at a time
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def best_dtype(vocab_size):
    """Returns the dtype Megatron picks: uint16 below 65,500 entries, int32 from there on."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix):
    return Path(f"{prefix}.bin")


def idx_path(prefix):
    return Path(f"{prefix}.idx")


def meta_path(prefix):
    """The description that preprocessing writes beside the two files."""
    return Path(f"{prefix}.meta.json")


@contextlib.contextmanager
def write_errors(path):
    """Turns an OSError while writing `path` into a message: what failed, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            advice = "free some space (or raise the quota or file-size limit), or write to another disk, and run again"
        else:
            advice = "check that the folder exists and may be written, and run again"
        raise BorealError(
            f"{path}: cannot be written: {os.strerror(error.errno) if error.errno else error}. "
            f"No unfinished file is left under the final name; {advice}.",
            STORAGE,
        ) from error


def index_pieces(dtype, lengths, empty_has_sequence=True):
    """Yields the content of an `.idx` piece by piece, in memory that does not grow with the documents.

    Args:
        dtype: of the ids.
        lengths: a function without arguments that returns an iterator over int arrays, the tokens of the documents in
            order; it is called four times.
        empty_has_sequence: whether a document without tokens has one; in Megatron's preprocessing it has none.
    """

    def has_sequence(part):
        return np.ones(len(part), bool) if empty_has_sequence else part > 0

    sequences = documents = 0
    for part in lengths():
        if part.size and part.max() > MAX_DOCUMENT_TOKENS:
            raise BorealError(
                f"a document of {part.max():,} tokens; the format holds at most {MAX_DOCUMENT_TOKENS:,} in one. "
                "Split it."
            )
        sequences, documents = sequences + int(has_sequence(part).sum()), documents + len(part)
    if documents > MAX_DOCUMENTS:
        raise BorealError(
            f"{documents:,} documents in one data set. Expected: at most {MAX_DOCUMENTS:,}, which Megatron's readers "
            "count in 32 bits. Write several data sets, and blend them."
        )
    yield HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[np.dtype(dtype)], sequences, documents + 1)
    for part in lengths():
        yield part[has_sequence(part)].astype("<i4").tobytes()
    byte = 0
    for part in lengths():
        ends = np.cumsum(part[has_sequence(part)], dtype=np.int64) * np.dtype(dtype).itemsize
        yield (np.concatenate([[0], ends[:-1]]) + byte).astype("<i8")[: len(ends)].tobytes()
        byte += int(ends[-1]) if len(ends) else 0
    yield np.zeros(1, "<i8").tobytes()
    sequence = 0
    for part in lengths():
        ends = np.cumsum(has_sequence(part), dtype=np.int64) + sequence
        yield ends.astype("<i8").tobytes()
        sequence = int(ends[-1]) if len(ends) else sequence


class _HashedFile:
    """A new file that is hashed as it is written, so that its checksum costs no second reading."""

    def __init__(self, path):
        self.path = path
        self.sha256 = hashlib.sha256()
        self._file = open(path, "ab", buffering=1 << 20)
        try:
            # Two writers of one prefix would mix their bytes: the second is refused. The lock dies with its process,
            # so what a killed run left behind is simply overwritten.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file.fileno()).st_ino != os.stat(path).st_ino:
                raise BlockingIOError  # renamed by its writer between our open and our lock
        except (BlockingIOError, FileNotFoundError):
            self._file.close()
            raise BorealError(
                f"{path}: another process is writing this file. Expected: one writer for each output prefix. "
                "Wait for it to end, or choose another prefix."
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.truncate(0)

    def write(self, data):
        self._file.write(data)
        self.sha256.update(data)

    def finish(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self):
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class IndexedWriter:
    """Writes documents to `prefix.bin` and `prefix.idx`; neither name exists before all is safely on disk.

    Use as a context manager: leaving it normally finishes the files, leaving it by an exception discards them, and
    files of that name from an earlier run stay untouched until then.

    Args:
        prefix: path without `.bin`/`.idx`; missing folders are made.
        dtype: dtype of the ids on disk, see `best_dtype`.

    Raises:
        BorealError: the disk is full, the folder is not writable, an id does not fit the dtype.
    """

    def __init__(self, prefix, dtype):
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in ID_DTYPES, self.dtype
        self._lengths = array("i")
        self.tokens = 0
        self._closed = False
        self._range = np.iinfo(self.dtype)
        with write_errors(bin_path(prefix)):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = _HashedFile(Path(f"{prefix}.bin.partial"))

    def append(self, ids):
        """Adds one document, a sequence of ids."""
        ids = np.asarray(ids)
        self.append_many(ids, [ids.size])

    def append_many(self, ids, lengths):
        """Adds several documents, given as their ids one after another and their lengths."""
        ids = np.asarray(ids)
        lengths = np.asarray(lengths, dtype=np.int64)
        assert ids.ndim == 1 and lengths.sum() == ids.size, (ids.shape, lengths.sum())
        if ids.size and ids.dtype != self.dtype:
            low, high = int(ids.min()), int(ids.max())
            if low < self._range.min or high > self._range.max or ids.dtype.kind not in "iu":
                raise BorealError(
                    f"{self.prefix}: ids from {low} to {high} do not fit {self.dtype}. Expected: "
                    f"{self._range.min} to {self._range.max}. Choose the dtype with best_dtype(vocab_size)."
                )
        if lengths.size and lengths.max() > MAX_DOCUMENT_TOKENS:
            raise BorealError(
                f"{self.prefix}: a document of {lengths.max():,} tokens; the format holds at most "
                f"{MAX_DOCUMENT_TOKENS:,} in one. Split it."
            )
        with write_errors(bin_path(self.prefix)):
            self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += ids.size

    def close(self):
        """Finishes both files, the .idx last, and returns documents, tokens and both checksums.

        An .idx therefore always has its whole .bin beside it, also after a crash at any point.
        """
        if self._closed:
            raise BorealError(f"{self.prefix}: the writer is closed already. Open a new one for more documents.")
        idx = None
        try:
            if not self.tokens:
                raise BorealError(f"{self.prefix}: nothing to write: no tokens. Expected: at least one document.")
            with write_errors(idx_path(self.prefix)):
                idx = _HashedFile(Path(f"{self.prefix}.idx.partial"))
                for part in self._index():
                    idx.write(part)
                idx.finish()
            with write_errors(bin_path(self.prefix)):
                self._bin.finish()
                # An old index or description must not meet the new tokens, not even for a moment.
                idx_path(self.prefix).unlink(missing_ok=True)
                meta_path(self.prefix).unlink(missing_ok=True)
                os.replace(self._bin.path, bin_path(self.prefix))
                flush(self.prefix.parent)
                os.replace(idx.path, idx_path(self.prefix))
                flush(self.prefix.parent)
        except BaseException:
            if idx is not None:
                idx.discard()
            self.discard()
            raise
        self._closed = True
        return {
            "documents": len(self._lengths),
            "tokens": self.tokens,
            "bin_sha256": self._bin.sha256.hexdigest(),
            "idx_sha256": idx.sha256.hexdigest(),
        }

    def _index(self):
        return index_pieces(self.dtype, lambda: iter([np.frombuffer(self._lengths, dtype=np.int32)]))

    def discard(self):
        """Gives up: removes what was written. Nothing under the final names is touched."""
        self._closed = True
        self._bin.discard()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._closed:
            return
        if kind is None:
            self.close()
        else:
            self.discard()


class IndexedReader:
    """Reads an indexed dataset, after checking that its two files are whole and agree.

    Local files are memory-mapped, and checked piece by piece: opening takes no memory that grows with the dataset. Of
    a URL (`remote.py`) the .idx is read once and kept; of the .bin only the tokens that are asked for, at that moment.
    Any number of threads may read.

    Args:
        prefix: path or URL without `.bin`/`.idx`.
        index_only: lengths and counts without tokens; the .bin need not be there.

    Attributes:
        dtype: dtype of the ids.
        lengths: int32 `[S]`, tokens of each sequence.
        document_index: int64 `[D+1]`, the first sequence of each document, then S.
        document_lengths: int32 `[D]`, tokens of each document; int64 where documents have several sequences.
        total_tokens: tokens of the whole dataset.
        tokens: all ids one after another, read-only: a memory map, or a `RemoteTokens`, which knows slices only.

    Raises:
        BorealError: a file is missing, empty, cut short or damaged, or the two do not belong together.
    """

    def __init__(self, prefix, index_only=False):
        self.prefix = str(prefix)
        self._bin, self._idx = f"{prefix}.bin", f"{prefix}.idx"
        if remote.is_url(prefix):
            self._raw = remote.Object(self._idx).read()
        else:
            for path in map(Path, [self._idx] if index_only else [self._bin, self._idx]):
                if not path.is_file():
                    hint = ""
                    if self.prefix.endswith((".bin", ".idx")):
                        hint = f" The prefix is written without the ending: {self.prefix[:-4]}."
                    elif Path(f"{prefix}.parts").exists() or path.with_name(path.name + ".partial").exists():
                        hint = " There is an unfinished one: preprocessing was stopped; run the same command again."
                    raise self._refuse(path, "no such file", "a .bin and an .idx of the same name", hint)
            self._raw = None
        with self.open_index() as file:
            self._read_header(file)
            self._check_sequences(file)
            self._check_documents(file)
        if not index_only:
            self._open_tokens()

    def open_index(self):
        """The whole .idx as a binary file."""
        return open(self._idx, "rb") if self._raw is None else io.BytesIO(self._raw)

    def _refuse(self, path, found, expected, hint=""):
        hint = hint or " Run `boreal data preprocess` again, or copy both files again."
        return BorealError(f"{path}: {found}. Expected: {expected}.{hint}")

    def _read_header(self, file):
        path, size = self._idx, file.seek(0, os.SEEK_END)
        if size < HEADER.size:
            raise self._refuse(path, f"{size} bytes", f"an index with a header of {HEADER.size} bytes")
        file.seek(0)
        magic, version, code, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise self._refuse(path, f"starts with {magic!r}", f"{MAGIC!r}, a Megatron index")
        if version != VERSION:
            raise self._refuse(path, f"index version {version}", f"version {VERSION}")
        if np.dtype(DTYPE_OF_CODE.get(code, np.float64)) not in ID_DTYPES:
            raise self._refuse(path, f"dtype code {code}", "an integer dtype, 4 (int32) or 8 (uint16)")
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        whole = HEADER.size + 12 * sequences + 8 * boundaries
        if size != whole:
            more = "" if size != whole + sequences else " It looks like a multimodal dataset, which is not supported."
            raise self._refuse(path, f"{size:,} bytes", f"{whole:,} bytes for {sequences:,} sequences", more)
        if not sequences or boundaries < 2:
            raise self._refuse(path, "no documents", "at least one")
        if boundaries - 1 > MAX_DOCUMENTS:
            more = " Split the data set."
            raise self._refuse(path, f"{boundaries - 1:,} documents", f"at most {MAX_DOCUMENTS:,}, an int32", more)

        raw = np.memmap(path, mode="r", dtype=np.uint8) if self._raw is None else self._raw
        self._map = raw
        self.lengths = np.frombuffer(raw, np.int32, sequences, HEADER.size)
        self._pointers = np.frombuffer(raw, np.int64, sequences, HEADER.size + 4 * sequences)
        self.document_index = np.frombuffer(raw, np.int64, boundaries, HEADER.size + 12 * sequences)

    def _pieces(self, file, array, offset):
        """Yields (first entry, the next entries) of an array of the .idx. They are read and not looked up in the map:
        what a process has seen of a map counts as its memory."""
        for first in range(0, len(array), INDEX_PIECE):
            count = min(INDEX_PIECE, len(array) - first)
            file.seek(offset + first * array.itemsize)
            yield first, np.frombuffer(file.read(count * array.itemsize), array.dtype)

    def _check_sequences(self, file):
        path, total = self._idx, 0
        lengths = self._pieces(file, self.lengths, HEADER.size)
        pointers = self._pieces(file, self._pointers, HEADER.size + self.lengths.nbytes)
        for (first, length), (_, pointer) in zip(lengths, pointers, strict=True):
            if length.min() < 0:
                raise self._refuse(path, f"a sequence of {length.min()} tokens", "lengths of 0 or more")
            ends = total + np.cumsum(length, dtype=np.int64)
            starts = (ends - length) * self.dtype.itemsize
            wrong = np.flatnonzero(pointer != starts)
            if wrong.size:
                at = int(wrong[0])
                raise self._refuse(
                    path,
                    f"sequence {first + at} points to byte {pointer[at]:,}",
                    f"byte {starts[at]:,}, the sum of the lengths before it",
                )
            total = int(ends[-1])
        self.total_tokens = total

    def _check_documents(self, file):
        sequences, last = len(self.lengths), 0
        sound, self._one_sequence_each = self.document_index[0] == 0, len(self) == sequences
        for first, index in self._pieces(file, self.document_index, HEADER.size + 12 * sequences):
            sound = sound and index[0] >= last and (index[1:] >= index[:-1]).all()
            self._one_sequence_each &= bool((index == np.arange(first, first + len(index))).all())
            last = index[-1]
        if not sound or last != sequences:
            found = f"document boundaries from {self.document_index[0]} to {self.document_index[-1]}"
            raise self._refuse(self._idx, found, f"rising from 0 to {sequences}, the sequences")
        if not self._one_sequence_each and (longest := int(self.document_lengths.max())) > MAX_DOCUMENT_TOKENS:
            raise self._refuse(
                self._idx, f"a document of {longest:,} tokens", f"at most {MAX_DOCUMENT_TOKENS:,}", " Split it."
            )

    def _open_tokens(self):
        whole = self.total_tokens * self.dtype.itemsize
        size = Path(self._bin).stat().st_size if self._raw is None else remote.Object(self._bin).size()
        if size != whole:
            says = f"{whole:,} bytes: {self.total_tokens:,} tokens of {self.dtype}, as the .idx says"
            raise self._refuse(self._bin, f"{size:,} bytes", says)
        if not size:
            raise self._refuse(self._bin, "no tokens", "at least one")
        if self._raw is None:
            self.tokens = np.memmap(self._bin, mode="r", dtype=self.dtype)
        else:
            self.tokens = RemoteTokens(self._bin, self.dtype, self.total_tokens)

    @cached_property
    def document_lengths(self):
        if self._one_sequence_each:
            return self.lengths
        starts = np.append(self._pointers, self.total_tokens * self.dtype.itemsize)[self.document_index]
        return np.diff(starts) // self.dtype.itemsize

    def release(self):
        """Gives the pages of the index that this process touched back; they stay in the system's cache."""
        if self._raw is None:
            self._map._mmap.madvise(mmap.MADV_DONTNEED)

    def __len__(self):
        """Returns the number of documents."""
        return len(self.document_index) - 1

    def document(self, i):
        """Returns the ids of document i, read-only; a view where the file is local."""
        start, stop = self._span(i)
        return np.asarray(self.tokens[start:stop])

    def read(self, i, offset, length):
        """Returns `length` ids of document i from `offset` on."""
        start, stop = self._span(i)
        if offset < 0 or length < 0 or offset + length > stop - start:
            raise BorealError(
                f"{self.prefix}: tokens {offset} to {offset + length} of document {i}. "
                f"Expected: within its {stop - start} tokens."
            )
        return np.asarray(self.tokens[start + offset : start + offset + length])

    def _span(self, i):
        """Where document i begins and ends among the tokens."""
        if not 0 <= i < len(self):
            raise BorealError(f"{self.prefix}: document {i}. Expected: 0 to {len(self) - 1}.")
        return tuple(
            int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self.lengths) else self.total_tokens
            for sequence in self.document_index[i : i + 2].tolist()
        )


class RemoteTokens:
    """The ids of a .bin behind a URL: a slice is one read of that range. A slice of neither end reads them all."""

    def __init__(self, url, dtype, count):
        self.dtype, self.count = dtype, count
        self._object = remote.Object(url)

    def __len__(self):
        return self.count

    def __getitem__(self, wanted):
        start, stop, step = wanted.indices(self.count)
        assert step == 1, wanted
        size = self.dtype.itemsize
        return np.frombuffer(self._object.read(start * size, max(start, stop) * size), self.dtype)
