"""Numbered safetensors files, written in place and read one tensor at a time.

All shapes are known before any tensor is, so files, headers and the index are settled first, and every tensor goes
straight to its bytes.

A file is the header's length (8 bytes), the header (JSON, padded with spaces to a multiple of 8), then the tensors back
to back, FP32 before BF16 and by name within each: byte for byte what the safetensors library writes.
"""

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

from boreal_megatron.errors import BorealError
from boreal_megatron.train import store

INDEX = "model.safetensors.index.json"
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
BLOCK = 1 << 24  # numbers that are converted, looked at and written at a time
START_WRITING = 1 << 28  # bytes that may wait in the system's memory


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file name, first byte in the file, shape, dtype."""

    file: str
    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Plan:
    """Which tensor lies where.

    Args:
        entries: (name, shape, dtype) in the order in which they will be written.
        max_shard_bytes: upper bound of one file's tensors, unless a single tensor exceeds it.

    Attributes:
        places: name -> `Place`.
        headers: file name -> its first bytes.
        sizes: file name -> bytes.
        index: what goes into `model.safetensors.index.json`.
    """

    def __init__(self, entries, max_shard_bytes):
        shards, filled = [[]], 0
        for name, shape, dtype in entries:
            size = prod(shape) * dtype.itemsize
            if filled and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((name, tuple(shape), dtype, size))
            filled += size
        self.places, self.headers, self.sizes = {}, {}, {}
        for number, members in enumerate(shards, 1):
            self._lay_out(f"model-{number:05}-of-{len(shards):05}.safetensors", members)
        total = sum(size for members in shards for *_, size in members)
        order = [name for members in shards for name, *_ in members]
        self.index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self.places[name].file for name in order},
        }

    def _lay_out(self, file, members):
        described, end, firsts = {"__metadata__": {"format": "pt"}}, 0, {}
        for name, shape, dtype, size in sorted(members, key=lambda m: (-m[2].itemsize, m[0])):
            described[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [end, end + size]}
            firsts[name] = end
            end += size
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.headers[file] = len(text).to_bytes(8, "little") + text
        start = len(self.headers[file])
        self.sizes[file] = start + end
        for name, shape, dtype, _ in members:
            self.places[name] = Place(file, start + firsts[name], shape, dtype)


def write(folder, plan, tensors, progress=None):
    """Write all files of a plan and make them durable.

    Args:
        folder: an existing one.
        plan: `Plan`.
        tensors: iterable of (name, tensor), each name of the plan once; any dtype, any strides.
        progress: called with (tensors written, tensors in all), or None.

    Returns:
        dict: name -> how many of its written numbers are NaN or infinite, where there are any.
    """
    left = {file: 0 for file in plan.headers}
    for place in plan.places.values():
        left[place.file] += 1
    handles, strange, count, unwritten = {}, {}, 0, 0
    with ThreadPoolExecutor(1) as flusher:  # a finished file goes to the disk while the next one is filled
        flushed = []
        try:
            for name, tensor in tensors:
                place = plan.places[name]
                assert tuple(tensor.shape) == place.shape, name
                with errors_of_writing(folder):
                    if place.file not in handles:
                        handles[place.file] = os.open(folder / place.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                        _write_all(handles[place.file], plan.headers[place.file], 0)
                    bad = _write_tensor(handles[place.file], tensor, place)
                if bad:
                    strange[name] = bad
                unwritten += prod(place.shape) * place.dtype.itemsize
                if unwritten > START_WRITING:
                    _start_writing(handles[place.file])
                    unwritten = 0
                del tensor  # or it would be held while the next one is read
                count += 1
                left[place.file] -= 1
                if not left[place.file]:
                    flushed.append(flusher.submit(_flush_and_close, handles.pop(place.file)))
                if progress:
                    progress(count, len(plan.places))
            with errors_of_writing(folder):
                for done in flushed:
                    done.result()
        finally:
            for handle in handles.values():
                os.close(handle)
    assert not any(left.values()), left
    return strange


class Reader:
    """`reader(name)` is one tensor of a folder's safetensors files, read from its place.

    Args:
        folder: with an index or without.

    Attributes:
        shapes, dtypes: name -> shape, name -> dtype (in the words of safetensors where it is another than FP32 or BF16).
        bytes: of all files.

    Raises:
        BorealError: no such files, files that the index names are missing, or damaged ones.
    """

    def __init__(self, folder):
        index = folder / INDEX
        try:
            listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BorealError(f"{index} cannot be read: {type(error).__name__}: {error}; fetch it again") from None
        files = sorted(listed if listed is not None else (f.name for f in folder.glob("*.safetensors")))
        if missing := [f for f in files if not (folder / f).is_file()]:
            raise BorealError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}; fetch them")
        if not files:
            raise BorealError(f"{folder} has no .safetensors files; expected the weights of a Hugging Face model")
        self._places, self.shapes, self.dtypes, self.bytes = {}, {}, {}, 0
        for file in files:
            self._describe(folder / file)

    def _describe(self, file):
        try:
            size = file.stat().st_size
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                described = json.loads(opened.read(length)) if 8 + length <= size else {}
            described.pop("__metadata__", None)
            end = max(entry["data_offsets"][1] for entry in described.values())
            if 8 + length + end != size:
                raise ValueError(f"{size:,} bytes, its header announces {8 + length + end:,}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BorealError(f"{file} is no whole safetensors file: {error}; fetch it again") from None
        self.bytes += size
        for name, entry in described.items():
            if name in self._places:
                raise BorealError(f"{name} is in {self._places[name][0].name} and {file.name}; remove the one that does not belong")
            self._places[name] = file, 8 + length + entry["data_offsets"][0]
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = next((dtype for dtype, code in CODES.items() if code == entry["dtype"]), entry["dtype"])

    def __call__(self, name):
        file, first = self._places[name]
        out = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with file.open("rb") as opened:
            read_into(opened.fileno(), out, first)
        return out


def large_pages():
    """Have torch take memory in large pages, which a system hands out twice as fast; nothing changes once a tensor is
    there."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def not_finite(tensor):
    """How many numbers are NaN or infinite."""
    low, high = torch.aminmax(tensor)  # one pass, without a copy; NaN comes through
    return 0 if low.isfinite() and high.isfinite() else tensor.numel() - int(tensor.isfinite().sum())


def read_into(handle, tensor, position):
    """Fill a contiguous tensor with the bytes of a file from `position` on."""
    data, done = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), 0
    while done < len(data):
        count = os.preadv(handle, [data[done:]], position + done)
        if not count:
            raise EOFError(f"the file ends {len(data) - done:,} bytes too early")
        done += count


@contextlib.contextmanager
def errors_of_writing(folder):
    """Turns what the system says of a full or missing disk into words."""
    try:
        yield
    except OSError as error:
        raise BorealError(f"the export cannot be written to {folder}: {store.why(error)}") from error


def _write_tensor(handle, tensor, place):
    """Write it block by block; returns how many of the written numbers are NaN or infinite."""
    at, bad = place.first, 0
    for part in tensor.detach().reshape(-1).split(BLOCK):
        part = part.to("cpu", place.dtype).contiguous()
        bad += not_finite(part)
        at += _write_all(handle, part.view(torch.uint8).numpy().data, at)
    return bad


def _write_all(handle, data, at):
    data, done = memoryview(data), 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)
    return done


def _start_writing(handle):
    """Have the system write what it holds of a file and forget what it has written, instead of doing both at the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _flush_and_close(handle):
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
