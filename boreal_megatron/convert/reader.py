"""Full tensors out of a training checkpoint, by name, without starting the layout that wrote it.

A `torch_dist` checkpoint holds every tensor as one or more chunks, each a small `torch.save` archive inside a .distcp
file; `.metadata` says where. A chunk's numbers are read from the file straight to their place in the full tensor.
"""

import collections
import io
import os
import pickle
import threading
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from boreal_megatron import safe
from boreal_megatron.convert.shards import read_into
from boreal_megatron.errors import BorealError

NOT_WEIGHTS = ("optimizer.", "rng")  # beginnings of the names of what else a checkpoint keeps tensors of
BLOCK = 1 << 24  # bytes of a chunk that are read at a time when its rows are not together in the full tensor


class TensorReader:
    """`reader(name)` is one full tensor of a checkpoint, on the CPU, in the dtype on file.

    Args:
        path: an `iter_*` folder.
        leave_out: beginnings of names; by default only weights are left.

    Attributes:
        shapes: name -> shape, of every tensor that is a weight.
        dtypes: name -> dtype.
    """

    def __init__(self, path, leave_out=NOT_WEIGHTS):
        self.path = Path(path)
        metadata = safe.read_metadata(self.path)
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(leave_out)
        }
        self._stored = {name: {} for name in self._entries}  # name -> chunk's offsets -> where it lies
        for index, where in metadata.storage_data.items():
            if index.fqn in self._stored:
                self._stored[index.fqn][tuple(index.offset or ())] = where
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._entries.items()}

    def __call__(self, name):
        """Raises:
        BorealError: the checkpoint has no such tensor, or a file of it is missing, cut or damaged.
        """
        return self._window(name, None)

    def part(self, name, index):
        """`reader(name)[index]`, of which nothing else is read."""
        return self._window(name, index)[0]

    def _window(self, name, index):
        if name not in self._entries:
            raise BorealError(f"{self.path} has no tensor {name!r}; it is a checkpoint of another model")
        entry = self._entries[name]
        size = tuple(entry.size) or (1,)  # a number is read as a row of one
        begin, end = (0, size[0]) if index is None else (index, index + 1)  # rows of the first dim
        out = torch.empty((end - begin, *size[1:]), dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets) or (0,), tuple(chunk.sizes) or (1,)
            first, last = max(begin, offsets[0]), min(end, offsets[0] + sizes[0])
            if first >= last:
                continue
            rest = (slice(a, a + n) for a, n in zip(offsets[1:], sizes[1:], strict=True))
            target = out[(slice(first - begin, last - begin), *rest)]
            try:
                where = self._stored[name][tuple(chunk.offsets)]
                self._read(where, sizes, first - offsets[0], target)
            except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
                raise BorealError(
                    f"{self.path}: tensor {name!r} cannot be read: {type(error).__name__}: {error}; "
                    "`boreal checkpoint verify` says which files are damaged"
                ) from None
            covered += target.numel()
        if covered != out.numel():
            raise BorealError(f"{self.path}: {covered:,} of the {out.numel():,} numbers of {name!r} are there; a file is missing")
        return out if entry.size else out[0]

    def _read(self, where, sizes, row, target):
        """Fill `target`, a view of the full tensor, with rows `row`.. of a chunk."""
        handle = os.open(self.path / where.relative_path, os.O_RDONLY)
        try:
            archive = io.BufferedReader(_Part(handle, where.offset, where.length))
            # On the meta device an archive tells shape, strides and the position of its numbers without reading them.
            there = torch.load(archive, map_location="meta", weights_only=True)
            position = getattr(there.untyped_storage(), "_checkpoint_offset", None)
            there = there if there.dim() else there[None]
            if tuple(there.shape) != sizes or there.dtype != target.dtype:
                raise ValueError(f"found {there.dtype} {tuple(there.shape)}, {target.dtype} {sizes} was announced")
            if position is None or not there.is_contiguous():
                archive.seek(0)
                whole = torch.load(archive, map_location="cpu", weights_only=True)
                target.copy_(whole.reshape(sizes)[row : row + len(target)])
                return
            position += where.offset + (there.storage_offset() + row * there.stride(0)) * there.itemsize
            if target.is_contiguous():
                read_into(handle, target, position)
                return
            rows = max(1, BLOCK * len(target) // target.nbytes)
            for part in target.split(rows):
                scratch = torch.empty(part.shape, dtype=part.dtype)
                read_into(handle, scratch, position)
                part.copy_(scratch)
                position += scratch.nbytes
        finally:
            os.close(handle)


class _Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, handle, first, length):
        self.handle, self.first, self.length, self.at = handle, first, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        wanted = max(0, min(len(buffer), self.length - self.at))
        done = os.preadv(self.handle, [memoryview(buffer)[:wanted]], self.first + self.at) if wanted else 0
        self.at += done
        return done


def ahead(produce, sizes, limit):
    """Results of `produce(0)`, `produce(1)`, .. in order, made by another thread while the last one is in use.

    Args:
        produce: number -> result.
        sizes: bytes of each result; there are as many as sizes.
        limit: results that were made and are not yet done with take at most so many bytes together, or are only one.
    """
    made, state = collections.deque(), {"bytes": 0, "closed": False}
    change = threading.Condition()

    def work():
        for number, size in enumerate(sizes):
            with change:
                change.wait_for(lambda: state["closed"] or not state["bytes"] or state["bytes"] + size <= limit)
                if state["closed"]:
                    return
                state["bytes"] += size
            try:
                made.append((produce(number), None))
            except BaseException as error:
                made.append((None, error))
            with change:
                change.notify_all()

    threading.Thread(target=work, name="read ahead", daemon=True).start()
    try:
        for size in sizes:
            with change:
                change.wait_for(lambda: made)
            result, error = made.popleft()
            if error:
                raise error
            yield result
            del result
            with change:
                state["bytes"] -= size
                change.notify_all()
    finally:
        with change:
            state["closed"] = True
            change.notify_all()
