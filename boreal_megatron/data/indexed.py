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
import mmap
import os
import struct
from array import array
from pathlib import Path

import numpy as np

from boreal_megatron.durable import flush
from boreal_megatron.errors import BorealError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
ID_DTYPES = tuple(np.dtype(d) for d in (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16))
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
MAX_DOCUMENTS = 2**31 - 1  # megatron-core numbers them in int32
CHUNK = 1 << 16  # entries of an index looked at at a time
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
            f"No unfinished file is left under the final name; {advice}."
        ) from error


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
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        starts = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
        yield HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], len(lengths), len(lengths) + 1)
        yield lengths.tobytes()
        yield (starts * self.dtype.itemsize).tobytes()
        yield np.arange(len(lengths) + 1, dtype=np.int64).tobytes()

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
    """Reads an indexed dataset through memory maps, after checking that its two files are whole and agree.

    Args:
        prefix: path without `.bin`/`.idx`.

    Attributes:
        dtype: dtype of the ids.
        lengths: int32 `[S]`, tokens of each sequence.
        document_index: int64 `[D+1]`, the first sequence of each document, then S.
        document_lengths: int32 or int64 `[D]`, tokens of each document; a view of the file where each document is one
            sequence, as preprocessing writes them. Then nothing here grows with D but the memory maps.
        total_tokens: tokens of the whole dataset.

    Raises:
        BorealError: a file is missing, empty, cut short or damaged, or the two do not belong together.
    """

    def __init__(self, prefix):
        self.prefix = Path(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                hint = ""
                if str(prefix).endswith((".bin", ".idx")):
                    hint = f" The prefix is written without the ending: {str(prefix)[:-4]}."
                elif path.with_name(path.name + ".partial").exists():
                    hint = " There is an unfinished .partial file: preprocessing was stopped; run it again."
                raise self._refuse(path, "no such file", "a .bin and an .idx of the same name", hint)
        self._read_index()
        self._map_tokens()

    @classmethod
    def index_only(cls, prefix):
        """A reader of the .idx alone: lengths and counts, no tokens; the .bin need not be there."""
        reader = cls.__new__(cls)
        reader.prefix = Path(prefix)
        if not idx_path(prefix).is_file():
            raise reader._refuse(idx_path(prefix), "no such file", "an index")
        reader._read_index()
        return reader

    def _refuse(self, path, found, expected, hint=""):
        hint = hint or " Run `boreal data preprocess` again, or copy both files again."
        return BorealError(f"{path}: {found}. Expected: {expected}.{hint}")

    def _read_index(self):
        path = idx_path(self.prefix)
        size = path.stat().st_size
        if size < HEADER.size:
            raise self._refuse(path, f"{size} bytes", f"an index with a header of {HEADER.size} bytes")
        with open(path, "rb") as file:
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

        if boundaries > MAX_DOCUMENTS:
            more = " Split the data set."
            raise self._refuse(path, f"{boundaries - 1:,} documents", f"fewer than {MAX_DOCUMENTS:,}, an int32", more)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        def take(dtype, count, offset):
            return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

        self.lengths = take(np.int32, sequences, HEADER.size)
        self._pointers = take(np.int64, sequences, HEADER.size + 4 * sequences)
        self.document_index = take(np.int64, boundaries, HEADER.size + 12 * sequences)
        self._check_sequences(path)
        self._check_documents(path)
        self.release()

    def _check_sequences(self, path):
        total, width = 0, self.dtype.itemsize
        for first in range(0, len(self.lengths), CHUNK):
            lengths, pointers = self.lengths[first : first + CHUNK], self._pointers[first : first + CHUNK]
            if lengths.min() < 0:
                raise self._refuse(path, f"a sequence of {lengths.min()} tokens", "lengths of 0 or more")
            starts = total + np.cumsum(lengths, dtype=np.int64) - lengths
            wrong = np.flatnonzero(pointers != starts * width)
            if wrong.size:
                at = int(wrong[0])
                raise self._refuse(
                    path,
                    f"sequence {first + at} points to byte {pointers[at]:,}",
                    f"byte {starts[at] * width:,}, the sum of the lengths before it",
                )
            total = int(starts[-1]) + int(lengths[-1])
            self.release()
        self.total_tokens = total

    def _check_documents(self, path):
        index, sequences = self.document_index, len(self.lengths)
        rising, single = True, len(index) == sequences + 1
        for first in range(0, len(index), CHUNK):
            part = index[first : first + CHUNK + 1]
            rising = rising and bool((part[1:] >= part[:-1]).all())
            single = single and bool((part == np.arange(first, first + len(part))).all())
            self.release()
        if index[0] != 0 or index[-1] != sequences or not rising:
            found = f"document boundaries from {index[0]} to {index[-1]}"
            raise self._refuse(path, found, f"rising from 0 to {sequences}, the sequences")
        self.document_lengths = self.lengths if single else np.diff(self._token(index))
        longest = max(int(part.max()) for part in self._parts(self.document_lengths))
        if longest > MAX_DOCUMENT_TOKENS:
            more = " Split it."
            raise self._refuse(path, f"a document of {longest:,} tokens", f"at most {MAX_DOCUMENT_TOKENS:,}", more)

    def _parts(self, values):
        for first in range(0, len(values), CHUNK):
            yield values[first : first + CHUNK]
            self.release()

    def release(self):
        """Gives the pages of the index that this process touched back; they stay in the system's cache."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _token(self, sequences):
        """First token of each sequence, the total for S."""
        sequences = np.asarray(sequences)
        inside = np.minimum(sequences, len(self.lengths) - 1)
        return np.where(sequences < len(self.lengths), self._pointers[inside] // self.dtype.itemsize, self.total_tokens)

    def _map_tokens(self):
        path = bin_path(self.prefix)
        size, whole = path.stat().st_size, self.total_tokens * self.dtype.itemsize
        if size != whole:
            says = f"{whole:,} bytes: {self.total_tokens:,} tokens of {self.dtype}, as the .idx says"
            raise self._refuse(path, f"{size:,} bytes", says)
        if not size:
            raise self._refuse(path, "no tokens", "at least one")
        self._tokens = np.memmap(path, mode="r", dtype=self.dtype)

    def __len__(self):
        """Returns the number of documents."""
        return len(self.document_index) - 1

    @property
    def tokens(self):
        """All ids one after another, as a read-only memory map."""
        return self._tokens

    def document(self, i):
        """Returns the ids of document i, a read-only view of the file."""
        return self.read(i, 0, self._length(i))

    def read(self, i, offset, length):
        """Returns `length` ids of document i from `offset` on."""
        size = self._length(i)
        if offset < 0 or length < 0 or offset + length > size:
            raise BorealError(
                f"{self.prefix}: tokens {offset} to {offset + length} of document {i}. "
                f"Expected: within its {size} tokens."
            )
        start = int(self._token(self.document_index[i])) + offset
        return np.asarray(self._tokens[start : start + length])

    def _length(self, i):
        if not 0 <= i < len(self):
            raise BorealError(f"{self.prefix}: document {i}. Expected: 0 to {len(self) - 1}.")
        return int(self.document_lengths[i])
