"""The folder of an unfinished data set, PREFIX.parts/: what is done so far, and how it becomes the data set.

    job.json            what is being made, of what; a run that makes something else is refused
    journal.jsonl       a record of each finished part
    00000007.bin .npy   ids of a part; a TABLE row for each of its documents
    00000007.bad.jsonl .bad.raw .special.jsonl    what gave no document and its bytes; special tokens in the text
    joined.bin          the parts in order; a part's .bin is deleted only after its bytes are safely in here
    final.*             finished side-cars and index
    publish             all of the above is whole: what is left is renaming

So a run may be killed anywhere and goes on, nothing under a final name is ever unfinished, and the disk holds little
more than one copy of the ids.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from boreal_megatron.data.blocks import PROVENANCE, bags_of
from boreal_megatron.data.indexed import bin_path, idx_path, index_pieces, write_errors
from boreal_megatron.durable import flush, write_atomically
from boreal_megatron.errors import INTERRUPTED, USAGE, BorealError

TABLE = np.dtype([("length", "<i4"), ("file", "<i4"), ("offset", "<i8"), ("id", "S16")])
# In the order in which they get their names: with the .idx everything else is there.
ENDINGS = (
    ".bin", ".provenance.npy", ".bags.npy", ".special.jsonl", ".quarantine.jsonl", ".quarantine.raw", ".meta.json",
    ".idx",
)  # fmt: skip
SELECTED = (".weights.npy", ".bins.npy")  # made by data selection, of the documents that were here before
STDIN_FILE = "stdin.jsonl"  # what came in, so that it can be cut and read again
COPY_BYTES = 8 << 20
FLUSH_BYTES = 256 << 20


class PartWriter:
    """What a worker writes of one part; under its names only when all of it is on the disk.

    Args:
        folder: PREFIX.parts.
        number: of the part.
    """

    def __init__(self, folder, number):
        self.stem = os.path.join(folder, f"{number:08d}")
        with write_errors(f"{self.stem}.bin"):
            self.ids = open(f"{self.stem}.bin.tmp", "wb")

    def write(self, ids):
        with write_errors(f"{self.stem}.bin"):
            self.ids.write(ids.tobytes())

    def finish(self, rows, bad, special):
        """rows: TABLE tuples of the documents; bad: (record, raw bytes) pairs; special: records."""
        with write_errors(f"{self.stem}.bin"):
            self.ids.close()
            with open(f"{self.stem}.npy.tmp", "wb") as table:
                np.save(table, np.array(rows, TABLE))
            for ending, content in (
                (".bad.jsonl", _lines(record for record, _ in bad)),
                (".bad.raw", b"".join(raw for _, raw in bad)),
                (".special.jsonl", _lines(special)),
            ):
                Path(f"{self.stem}{ending}.tmp").write_bytes(content)
            for ending in (".bin", ".npy", ".bad.jsonl", ".bad.raw", ".special.jsonl"):
                flush(f"{self.stem}{ending}.tmp")
                os.replace(f"{self.stem}{ending}.tmp", f"{self.stem}{ending}")

    def discard(self):
        self.ids.close()
        Path(f"{self.stem}.bin.tmp").unlink(missing_ok=True)


class Parts:
    """The parent's side of the folder.

    Args:
        prefix: of the data set to be made.
        dtype: of its ids.

    Attributes:
        folder: PREFIX.parts.
        records: part number -> record, of the parts that are finished.
    """

    def __init__(self, prefix, dtype):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype)
        self.folder = Path(f"{prefix}.parts")
        self.records = {}
        self.sha256 = hashlib.sha256()  # of the joined ids
        self._waiting = []  # files of parts that are joined and not flushed yet
        self._dropped = None  # places of documents that were left out, an array
        self._out = None  # joined.bin

    # ------------------------------------------------------------ begin, or go on

    def __enter__(self):
        """Makes and locks the folder.

        Raises:
            BorealError: another process has it; it cannot be made; an earlier data set's selection side-cars are there.
        """
        stale = [f"{self.prefix}{ending}" for ending in SELECTED if Path(f"{self.prefix}{ending}").exists()]
        if stale:
            raise BorealError(
                f"{', '.join(stale)}: belong to the documents that are there now, and would not fit new ones. "
                "Expected: none. Move them away, or choose another --out.",
                USAGE,
            )
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise BorealError(
                f"{self.folder}: another process is making this data set. Expected: one for each output. "
                "Wait for it to end, or choose another --out.",
                USAGE,
            ) from None
        except OSError:
            pass  # a file system without locks
        return self

    def __exit__(self, kind, error, trace):
        """Lets go of the folder; one in which nothing was finished is removed."""
        if self._out is not None:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._out.close()
        if not any((self.folder / name).exists() for name in ("journal.jsonl", "publish")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        if kind is KeyboardInterrupt:
            raise BorealError(
                f"interrupted. What is done lies in {self.folder}: the same command goes on from there.", INTERRUPTED
            ) from None

    def forget(self):
        """Begins anew, whatever is there."""
        self.records = {}
        for path in self.folder.iterdir():
            if path.name not in ("lock", STDIN_FILE):  # the latter is written again, or was just now
                path.unlink()

    def resume(self, job):
        """Reads what an earlier run of the same job finished.

        Args:
            job: a dict that says what is made of what.

        Returns:
            The meta of the whole data set if only renaming was left, and is done now; else None.

        Raises:
            BorealError: the folder belongs to another job; what differs is named.
        """
        path = self.folder / "job.json"
        if not path.exists():
            self.forget()
            with write_errors(path):
                write_atomically(path, json.dumps(job, indent=1))
            return None
        found = json.loads(path.read_text())
        if found != (job := json.loads(json.dumps(job))):
            raise BorealError(
                f"{self.folder}: holds an unfinished run of another job: {_difference(found, job)}. Expected: the same "
                f"inputs and options, to go on. Give those, or begin anew: rm -r {self.folder}",
                USAGE,
            )
        if (self.folder / "publish").exists():
            return self._rename()
        journal = self.folder / "journal.jsonl"
        if journal.exists():
            for line in filter(None, journal.read_text(errors="replace").splitlines()):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # half of one
                self.records[record["part"]] = record
        return None

    def note(self, record):
        """Adds a finished part to the journal."""
        path = self.folder / "journal.jsonl"
        with write_errors(path):
            with open(path, "ab") as journal:
                # A run that was killed while it wrote has left half a line.
                journal.write(b"\n" + json.dumps(record).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.records[record["part"]] = record

    # ------------------------------------------------------------ join

    def start_joining(self, first):
        """Opens joined.bin behind the parts, counted from `first`, that an earlier run has joined and deleted."""
        self._joined, size = first, 0
        while self._joined in self.records and not self._part(self._joined, ".bin").exists():
            size += self._bytes(self._joined)
            self._joined += 1
        for number in [n for n in self.records if n >= self._joined and not self._part(n, ".bin").exists()]:
            del self.records[number]  # is made again
        path = self.folder / "joined.bin"
        with write_errors(bin_path(self.prefix)):
            self._out = open(path, "r+b" if path.exists() else "w+b")
        found = os.fstat(self._out.fileno()).st_size
        if found < size:
            raise BorealError(
                f"{path}: {found:,} bytes. Expected: at least {size:,}, as the journal says. "
                f"Begin anew: rm -r {self.folder}"
            )
        self._out.truncate(size)
        while block := self._out.read(COPY_BYTES):
            self.sha256.update(block)

    def join(self, number):
        """Appends a finished part's ids to joined.bin; parts come in order."""
        if number < self._joined:
            return
        path = self._part(number, ".bin")
        with write_errors(bin_path(self.prefix)), open(path, "rb") as part:
            size = 0
            while block := part.read(COPY_BYTES):
                self._out.write(block)
                self.sha256.update(block)
                size += len(block)
            if size != self._bytes(number):
                raise BorealError(
                    f"{path}: {size:,} bytes. Expected: {self._bytes(number):,}, as the journal says. "
                    f"Begin anew: rm -r {self.folder}"
                )
            self._waiting.append(path)
            if sum(self._bytes(int(waiting.stem)) for waiting in self._waiting) >= FLUSH_BYTES:
                self._settle()
        self._joined = number + 1

    def _settle(self):
        """Makes joined.bin safe, and then deletes the parts that are in it."""
        self._out.flush()
        os.fsync(self._out.fileno())
        for path in self._waiting:
            path.unlink()
        self._waiting = []

    def _bytes(self, number):
        return self.records[number]["tokens"] * self.dtype.itemsize

    def _part(self, number, ending):
        return self.folder / f"{number:08d}{ending}"

    # ------------------------------------------------------------ finish

    def tables(self):
        """Yields the TABLE rows of each part's documents, in order, without those that were dropped."""
        place = 0
        for number in sorted(self.records):
            table = np.load(self._part(number, ".npy"))
            places, place = np.arange(place, place + len(table)), place + len(table)
            yield table if self._dropped is None else table[~np.isin(places, self._dropped)]

    def documents(self):
        """Returns how many there are."""
        return sum(map(len, self.tables()))

    def where(self, places):
        """Returns place -> (file, offset) of documents, given by their places among all."""
        found, wanted, first = {}, np.unique(np.asarray(places, np.int64)), 0
        for number in sorted(self.records):
            table = np.load(self._part(number, ".npy"))
            for place in wanted[(wanted >= first) & (wanted < first + len(table))].tolist():
                found[place] = int(table["file"][place - first]), int(table["offset"][place - first])
            first += len(table)
        return found

    def listed(self, ending, numbers=None):
        """Yields (part number, record) of .bad.jsonl or .special.jsonl, in order; of all parts, or of some."""
        for number in sorted(self.records) if numbers is None else numbers:
            with open(self._part(number, ending), encoding="utf-8") as file:
                yield from ((number, json.loads(line)) for line in file)

    def raw(self, number):
        """Returns the bytes of what gave no document in a part, in the order of `listed`."""
        return self._part(number, ".bad.raw").read_bytes()

    def repeated(self):
        """Returns (place of a document, place of an earlier one with the same id) of each repeat, in order."""
        ids = np.concatenate([table["id"] for table in self.tables()])
        order = np.argsort(ids, kind="stable")
        same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
        return sorted(zip(order[same + 1].tolist(), order[same].tolist(), strict=True))

    def drop(self, places):
        """Leaves documents out, given by their places: copies the ids of all others."""
        self._settle()
        lengths = np.concatenate([table["length"] for table in self.tables()])
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        self.sha256 = hashlib.sha256()
        with write_errors(bin_path(self.prefix)):
            kept = open(self.folder / "kept.bin", "w+b")
            at = 0
            for place in [*places, len(lengths)]:
                self._out.seek(at)
                left = int(ends[place - 1] if place else 0) - at
                while left > 0 and (block := self._out.read(min(left, COPY_BYTES))):
                    kept.write(block)
                    self.sha256.update(block)
                    left -= len(block)
                at = int(ends[place]) if place < len(lengths) else 0
        self._out.close()
        self._out, self._dropped = kept, np.asarray(places)

    def finish(self, meta, sidecars, bag_size=None, boundaries="flat"):
        """Writes index and side-cars and gives everything its name.

        Args:
            meta: dict; documents, tokens and checksums are added to it.
            sidecars: ending -> function that returns an iterator over bytes; an empty one makes no file.
            bag_size, boundaries: with a bag size and boundaries inside documents, their cumulative bags are written.

        Returns:
            meta.
        """
        self._settle()
        with write_errors(self.prefix):
            self._out.close()
            documents = self.documents()
            tokens = sum(int(table["length"].sum(dtype=np.int64)) for table in self.tables())
            sha256 = {".bin": self.sha256.hexdigest()}
            files = {
                ".provenance.npy": lambda: _npy(PROVENANCE, documents, (_provenance(table) for table in self.tables())),
                ".idx": lambda: index_pieces(
                    self.dtype, lambda: (table["length"] for table in self.tables()), empty_has_sequence=False
                ),
                **sidecars,
            }
            if bag_size:
                meta["tst"] = {"bag": bag_size, "boundaries": boundaries, "bags": tokens // bag_size}
            if bag_size and boundaries != "flat":
                bags = [bags_of(table["length"].astype(np.int64), bag_size, boundaries) for table in self.tables()]
                meta["tst"]["bags"] = sum(int(part.sum()) for part in bags)
                files[".bags.npy"] = lambda: _npy(np.dtype("<i8"), documents + 1, _running(bags))
            for ending, pieces in files.items():
                sha256[ending] = self._write(f"final{ending}", pieces())
            meta |= {
                "documents": documents, "tokens": tokens, "bin_sha256": sha256[".bin"], "idx_sha256": sha256[".idx"]
            }  # fmt: skip
            self._write("final.meta.json", [(json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode()])
            flush(self.folder)
            # The joined ids keep their name until this is on the disk: a stop before it joins nothing anew.
            staged = {".bin": Path(self._out.name).name}
            staged |= {e: f"final{e}" for e in ENDINGS if (self.folder / f"final{e}").exists()}
            write_atomically(self.folder / "publish", json.dumps(staged))
        return self._rename()

    def _write(self, name, pieces):
        """Writes a file, if there is anything to write, and returns its sha256."""
        digest, path = hashlib.sha256(), self.folder / name
        with open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
            empty = not file.tell()
        if empty:
            path.unlink()
        return digest.hexdigest()

    def _rename(self):
        """Gives the finished files their names, the index last; may be done again after a stop in between."""
        staged = json.loads((self.folder / "publish").read_text())
        with write_errors(self.prefix):
            if (self.folder / staged[".idx"]).exists():
                # An old index must not meet the new tokens, not even for a moment.
                idx_path(self.prefix).unlink(missing_ok=True)
                for ending in ENDINGS:
                    if ending not in staged:
                        Path(f"{self.prefix}{ending}").unlink(missing_ok=True)
                flush(self.prefix.parent)
            for ending in (ending for ending in ENDINGS if ending in staged):
                if (path := self.folder / staged[ending]).exists():
                    if ending == ".idx":
                        flush(self.prefix.parent)
                    os.replace(path, f"{self.prefix}{ending}")
            flush(self.prefix.parent)
        meta = json.loads(Path(f"{self.prefix}.meta.json").read_text(encoding="utf-8"))
        self.records = {}
        shutil.rmtree(self.folder)
        return meta


def _provenance(table):
    rows = np.empty(len(table), PROVENANCE)
    rows["file"], rows["offset"] = table["file"], table["offset"]
    return rows


def _running(parts):
    """Yields int64 arrays that are together the sum before each value and the total."""
    total = 0
    for part in parts:
        ends = total + np.cumsum(part)
        yield np.concatenate([[total], ends[:-1]]).astype("<i8")[: len(part)]
        total = int(ends[-1]) if len(part) else total
    yield np.array([total], "<i8")


def _npy(dtype, count, arrays):
    """Yields the bytes of a .npy file of one dimension."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )
    yield header.getvalue()
    for array in arrays:
        yield array.tobytes()


def _lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8", "surrogatepass")


def _difference(found, wanted):
    """Returns what differs between two descriptions of a job, in words."""
    differs = [key for key in wanted if found.get(key) != wanted[key]]
    words = []
    for key in differs:
        if key != "inputs":
            words.append(f"{key} was {found.get(key)!r}, is {wanted[key]!r}")
            continue
        before, now = {i[0]: i for i in found[key]}, {i[0]: i for i in wanted[key]}
        changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
        words.append(
            f"{len(changed):,} inputs came, went or changed, such as {sorted(changed)[0]}"
            if changed
            else "the order of the inputs"
        )
    return "; ".join(words) or "its format"
