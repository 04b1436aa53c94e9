"""`boreal data prepare`: writes the indexes of a run's sources, so that training builds and waits for nothing.

Memory does not grow with the number of items. Items are visited as they lie in the file, which is the only order in
which lengths are read; each is written, with its place, to the block of places that it belongs to; then each block is
brought into order, summed up and written back, one after another. Both passes work inside of the final file.

A file gets its name when it is whole and on the disk, and `index.json` lists it after that: a prepare that was stopped
goes on with the first file that is missing. Layout of the folder: `prepared.py`.

Shapes: n items of an epoch. NumPy only.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from boreal_megatron.data import blend
from boreal_megatron.data.indexed import write_errors
from boreal_megatron.data.prepared import DIGESTS, INDEX, bags_name, digest, home, starts_name
from boreal_megatron.data.source import CHUNK, fold
from boreal_megatron.durable import flush, write_atomically
from boreal_megatron.errors import BorealError, ProblemsError

BLOCK = 1 << 21  # places brought into order at a time; 16 MB
LENGTH_BITS = 32  # of an item and its place in a block, packed into 64; lengths are below 2^31
SPARE = 64 << 20  # bytes of disk left free


def quiet(what, done, total):
    """Shows no progress."""


def prepare(config, epochs=None, progress=quiet):
    """Writes the indexes of all that a run reads.

    Args:
        config: schema.Config.
        epochs: of each source; None: as many as the run begins by its plan.
        progress: called with (what, items done, items in all).

    Returns:
        dict, JSON-able: stream -> folder, items, files, bytes.

    Raises:
        ProblemsError: the run's data cannot be read as planned.
        BorealError: a source is damaged; another prepare is writing; the disk is full.
    """
    sources, unread = blend.open_sources(config, tokens=False)
    plan = blend.describe(config, sources, unread, prepared=False)
    if plan["problems"]:
        raise ProblemsError("data", plan["problems"])
    return {
        name: write(source, epochs or plan["sources"][name]["begins"], plan["sources"][name]["bag_sizes"], progress)
        for name, source in sources.items()
        if plan["sources"][name]["begins"]
    }


def write(source, epochs, bag_sizes, progress=quiet):
    """Writes the index of one source: its first `epochs` epochs, folded into bags of each of `bag_sizes`.

    Returns:
        dict: folder, items, files, bytes.
    """
    folder = home(source.prefix) / source.fingerprint[:16]
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(home(source.prefix)):
            _note_digests(source)
            index = _Index(folder, source)
            files = list(_files(source, epochs, bag_sizes))
            _check_space(folder, [size for name, size, _ in files if name not in index.files])
            for name, _, make in files:
                if name not in index.files:
                    index.add(name, make, progress)
    source.__dict__.pop("prepared", None)
    return {
        "folder": str(folder),
        "items": source.items,
        "files": len(index.files),
        "bytes": sum(noted["bytes"] for noted in index.files.values()),
    }


def _files(source, epochs, bag_sizes):
    """(name, bytes, function(path of the unfinished file, progress) -> its arrays) of all that an index consists of."""
    if source.binned:
        yield "members", 4 * source.documents, _members(source)
    if source.piece_tokens is not None:
        counts = (source.pieces(lengths) for _, lengths in source.document_chunks())
        yield "pieces", 8 * (source.documents + 1), lambda path, progress: _sums(counts)
    size = 8 * (source.items + 1)
    for epoch in range(epochs):
        yield starts_name(epoch), size, _starts(source, epoch)
        for bag_size in [] if source.boundaries == "flat" else bag_sizes:
            yield bags_name(epoch, source.boundaries, bag_size), size, _bags(source, epoch, bag_size)


def _members(source):
    def make(path, progress):
        for numbers, _ in source.document_chunks():
            yield numbers.astype(np.int32)

    return make


def _bags(source, epoch, bag_size):
    """int64 [n + 1] from the epoch's starts."""

    def make(path, progress):
        with open(path.with_name(starts_name(epoch)), "rb") as file:

            def folded():
                last = np.fromfile(file, np.int64, 1)
                while (part := np.fromfile(file, np.int64, CHUNK)).size:
                    lengths = np.diff(part, prepend=last)
                    last = part[-1:]
                    yield fold(lengths, bag_size, source.boundaries)

            yield from _sums(folded())

    return make


def _starts(source, epoch):
    """int64 [n + 1], stream offset of each item in reading order: see the module."""

    def make(path, progress):
        total, what = source.items, f"{source.name} epoch {epoch}"
        with open(path, "r+b") as file:
            file.truncate(8 * (total + 1))
            _scatter(file.fileno(), source, epoch, lambda done: progress(what, done, 2 * total))
            offset = 0
            for first in range(0, total, BLOCK):
                count = min(BLOCK, total - first)
                packed = np.frombuffer(os.pread(file.fileno(), 8 * count, 8 * first), np.uint64)
                lengths = np.empty(count, np.int64)
                lengths[packed >> np.uint64(LENGTH_BITS)] = packed & np.uint64((1 << LENGTH_BITS) - 1)
                del packed
                sums = np.cumsum(lengths)
                sums += offset
                last = int(sums[-1])
                sums -= lengths
                yield sums
                offset = last
                progress(what, total + first + count, 2 * total)
            assert offset == source.total_tokens, (offset, source.total_tokens)
            yield np.array([offset], np.int64)

    return make


def _scatter(handle, source, epoch, progress):
    """Writes each item's (place in its block, length) somewhere into the block of places where it belongs."""
    permutation, first = source.permutation(epoch), 0
    filled = np.zeros(-(-source.items // BLOCK), np.int64)
    for lengths in _item_lengths(source):
        if not len(lengths):  # empty documents make no pieces
            continue
        places = permutation.inverse(np.arange(first, first + len(lengths)))
        block, place = np.divmod(places, BLOCK)
        by_block = np.argsort(block, kind="stable")
        packed = (place.astype(np.uint64) << np.uint64(LENGTH_BITS) | lengths.astype(np.uint64))[by_block]
        numbers, starts = np.unique(block[by_block], return_index=True)
        for number, part in zip(numbers.tolist(), np.split(packed, starts[1:]), strict=True):
            os.pwrite(handle, part.tobytes(), 8 * (number * BLOCK + int(filled[number])))
            filled[number] += len(part)
        first += len(lengths)
        progress(first)


def _item_lengths(source):
    """Yields the lengths of all items in their own order, in bounded memory."""
    for _, lengths in source.document_chunks():
        counts = source.pieces(lengths)
        ends, first = np.cumsum(counts), 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
            if source.piece_tokens is None:
                yield lengths[first:last]
            else:
                part, count = lengths[first:last], counts[first:last]
                number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
                yield np.minimum(np.repeat(part, count) - number * source.piece_tokens, source.piece_tokens)
            first = last


def _sums(chunks):
    """Yields the running sum before each value, then the total."""
    total = 0
    for values in chunks:
        sums = np.cumsum(values)
        yield sums - values + total
        total += int(sums[-1]) if len(sums) else 0
    yield np.array([total], np.int64)


class _Index:
    """The growing `index.json` of one folder."""

    def __init__(self, folder, source):
        self.folder = folder
        sizes = {"documents": source.documents, "items": source.items, "tokens": source.total_tokens}
        self.value = {"fingerprint": source.fingerprint, "source": source.name, "sizes": sizes, "files": {}}
        if (folder / INDEX).exists():
            self.value["files"] = json.loads((folder / INDEX).read_text())["files"]
        self.files = self.value["files"]

    def add(self, name, make, progress):
        """Writes one file and lists it."""
        path = self.folder / f"{name}.partial"
        sha = hashlib.sha256()
        try:
            path.touch()
            with open(path, "r+b") as file:
                for chunk in make(path, progress):
                    data = chunk.tobytes()
                    sha.update(data)
                    file.write(data)
                file.truncate()
            flush(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        os.replace(path, self.folder / name)
        flush(self.folder)
        self.files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": sha.hexdigest()}
        write_atomically(self.folder / INDEX, json.dumps(self.value, indent=1))


@contextlib.contextmanager
def _alone(folder):
    """Refuses a second writer; the lock dies with its process."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BorealError(f"{folder}: another prepare is writing. Expected: one. Wait for it to end.") from None
        yield


def _note_digests(source):
    """Writes down what the index file and the side-cars hash to, so that later one rank of a node hashes them."""
    path = home(source.prefix) / DIGESTS
    notes = json.loads(path.read_text()) if path.exists() else {}
    for each in source.files:
        name = os.path.relpath(each, Path(source.prefix).parent)
        if name not in notes:
            notes[name] = {"bytes": Path(each).stat().st_size, "sha256": digest(each)}
    write_atomically(path, json.dumps(notes, indent=1))


def _check_space(folder, sizes):
    free = shutil.disk_usage(folder).free
    if sizes and sum(sizes) + SPARE > free:
        raise BorealError(
            f"{folder}: the index takes {sum(sizes):,} bytes, {free:,} are free. Expected: {SPARE:,} more than it "
            "takes. Free some space and run again."
        )
