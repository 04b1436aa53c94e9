"""New data sets made of documents of finished ones, in bounded memory.

    [(part, which of its documents)] -> Output -> .bin, .idx, side-cars, lists, .meta.json, under their names together

Side-cars have a row for each document and follow it. Lists are lines about some documents (special tokens written out
in their text) or about what became none (the quarantine); they exist only where they have lines.

d documents, s sequences of a block.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np

from boreal_megatron.data.blocks import PROVENANCE, SIDECARS, bags_of, read_sidecar, sidecar_path
from boreal_megatron.data.indexed import (
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    MAX_DOCUMENTS,
    VERSION,
    _HashedFile,
    bin_path,
    idx_path,
    meta_path,
    write_errors,
)
from boreal_megatron.data.progress import Bar
from boreal_megatron.durable import flush
from boreal_megatron.errors import INPUT, STORAGE, BorealError, ProblemsError

SPECIAL, QUARANTINE, RAW = LISTS = (".special.jsonl", ".quarantine.jsonl", ".quarantine.raw")
COPY_BYTES = 8 << 20


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
            raise BorealError(f"{prefix}: no tokens fall to it. Expected: at least one document; raise its share.")
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
                problems.append(f"{part.prefix}.provenance.npy: no file names ('files') in .meta.json; move it away")
            if sidecar_path(part.prefix, "bags").exists() and not self._bags():
                problems.append(f"{part.prefix}.bags.npy: no such bags in the .meta.json ('tst'); move it away")
        if problems:
            raise ProblemsError(f"{self.prefix}: side-cars", problems, INPUT)
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
        for ending, parts in ((SPECIAL, self._special()), (QUARANTINE, self._quarantine()), (RAW, self._raw())):
            first = next(parts, None)
            if first is not None:
                self._write(list_path(self.prefix, ending), itertools.chain([first], parts))
        if self.meta is not None:
            meta = {"documents": self.documents, "tokens": self.tokens, **self.meta}
            if tst := meta.get("tst"):
                count = self.tokens // tst["bag"] if tst["boundaries"] == "flat" else self.bag_count
                meta["tst"] = {"bag": tst["bag"], "boundaries": tst["boundaries"], "bags": count}
            for name, path in (("bin_sha256", bin_path(self.prefix)), ("idx_sha256", idx_path(self.prefix))):
                meta[name] = self.files[path].sha256.hexdigest()
            text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
            self._write(meta_path(self.prefix), [text.encode("utf-8", "surrogateescape")])
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

    def _special(self):
        """Its lines are in the order of the documents, whose numbers change."""
        before = 0
        for part, keep in self.sources:
            rows = _rows(list_path(part.prefix, SPECIAL))
            row = next(rows, None)
            for block in part.blocks():
                kept = np.ones(len(block.tokens), bool) if keep is None else keep(block)
                while row is not None and block.first <= row["document"] < block.first + len(kept):
                    at = row["document"] - block.first
                    if kept[at]:
                        yield _line(row | {"document": before + int(np.count_nonzero(kept[:at]))})
                    row = next(rows, None)
                before += int(np.count_nonzero(kept))
            if row is not None:
                raise BorealError(
                    f"{list_path(part.prefix, SPECIAL)}: document {row['document']} after later ones, or none of "
                    "the data set. Expected: the lines that preprocessing writes. Copy it again, or move it away."
                )

    def _quarantine(self):
        """Of parts wholly taken: what became no document belongs to no document."""
        before = 0
        for part, keep in self.sources:
            for row in _rows(list_path(part.prefix, QUARANTINE)) if keep is None else ():
                yield _line(row | ({"raw_start": before + row["raw_start"]} if "raw_start" in row else {}))
            raw = list_path(part.prefix, RAW)
            before += raw.stat().st_size if raw.exists() else 0

    def _raw(self):
        for part, keep in self.sources:
            path = list_path(part.prefix, RAW)
            if keep is None and path.exists():
                with open(path, "rb") as file:
                    while data := file.read(COPY_BYTES):
                        yield data

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
    sidecars = [sidecar_path(prefix, name) for name in (*SIDECARS, "bags")]
    return [bin_path(prefix), idx_path(prefix), meta_path(prefix), *sidecars] + [list_path(prefix, e) for e in LISTS]


def list_path(prefix, ending):
    """`ending` is one of LISTS."""
    return Path(f"{prefix}{ending}")


def _rows(path):
    """Yields the objects of a list, nothing where there is none."""
    if path.exists():
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise BorealError(
                        f"{path}:{number}: not a line of JSON. Expected: as preprocessing wrote it. Copy it again, or "
                        "move it away."
                    ) from None


def _line(row):
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


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
        raise ProblemsError("disk space", short, STORAGE)
    total = sum(output.tokens * output.dtype.itemsize for output in outputs)
    with contextlib.ExitStack() as stack:
        for output in outputs:
            stack.enter_context(output)
        with Bar(what, total, silent=not progress) as shown:
            for output in outputs:
                output.write(shown)
        for output in outputs:
            output.commit()
