"""Input files of preprocessing: which there are, how they are cut into parts, and the documents in them.

    names, folders, globs -> find_inputs -> [Input] -> cut -> Part, Part, ... -> documents -> Document, Document, ...

A part is what one worker does at a time and what a stopped run need not repeat: neighbouring ranges of the inputs, of
about the same size whatever the files' are. What can be sought in is cut: JSON lines between lines, Parquet between
row groups. A packed file is a stream and stays in one piece, as does a plain text file, which is one document.

Nothing here depends on how many processes there are, so the parts of a job are the same everywhere.
"""

import bz2
import glob
import json
import lzma
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from boreal_megatron.errors import INPUT, USAGE, BorealError, ProblemsError

try:
    from orjson import loads as fast_loads  # twice as fast; what it does not take is looked at again
except ImportError:
    fast_loads = json.loads

BLOCK_BYTES = 4 << 20
SMALLEST_PART, LARGEST_PART = 16 << 20, 512 << 20
MOST_PARTS = 1024  # where the largest part allows
STDIN = "-"
JSON_LINES = (".jsonl", ".json", ".ndjson")
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
NOT_TEXT = (".zip", ".tar", ".tgz", ".7z", ".arrow", ".lz4", ".bin", ".idx", ".npy", ".pt", ".safetensors")
BOM = b"\xef\xbb\xbf"
SHOWN = 80  # characters of a bad document in a message


class Input(NamedTuple):
    """A file: `kind` is json, text or parquet; `packing` is the ending of how it is packed, or empty."""

    path: str
    size: int
    modified: int  # ns
    kind: str
    packing: str

    @property
    def can_be_cut(self):
        return self.kind != "text" and not self.packing


class Range(NamedTuple):
    """A stretch of one input: bytes [start, end), or row groups of Parquet. `size` is its share of the file's bytes."""

    file: int
    start: int
    end: int
    size: int


class Part(NamedTuple):
    number: int
    ranges: tuple[Range, ...]
    name: str  # for messages

    def __str__(self):
        return self.name

    @property
    def size(self):
        return sum(r.size for r in self.ranges)


class Document(NamedTuple):
    """A document, or what stands in its place and gives none: then `text` is None and `reason` says why.

    `offset` is the byte of its first character in the (unpacked) file, the number of its row in Parquet; `line` counts
    from 1 at the start of the range; `raw` is what the file holds there, kept only for a bad one; `key` is the value
    under the id key, if one was asked for. With neither text nor reason it only tells the line that a range ends with,
    a blank one.
    """

    file: int
    line: int
    offset: int
    text: str | None
    reason: str | None = None
    raw: bytes = b""
    key: str | None = None


# --- which files ------------------------------------------------------------------------------------------------------


def find_inputs(given, keys):
    """Returns every Input that the names stand for: files, folders (sorted, without hidden files) and globs.

    Args:
        given: the names.
        keys: the keys or columns that will be read.

    Raises:
        ProblemsError: what is missing, empty, unreadable, not text, or lacks the Parquet column; all are listed.
    """
    inputs, problems = [], []
    for name in map(str, given):
        found, problem = _expand(name)
        problems += [problem] if problem else []
        for path in found:
            try:
                inputs.append(_input(path))
                problem = _unfit(inputs[-1], keys)
                if (
                    path == name and not inputs[-1].size
                ):  # among others, an empty file is merely a bad document, or no line
                    problem = f"{name}: empty, 0 bytes; expected text; leave it out or write it again"
            except OSError as error:
                problem = f"{path}: cannot be looked at: {error.strerror}; leave it out or mend it"
            problems += [problem] if problem else []
    if not given:
        problems.append("no inputs given; expected files, folders, globs, or - for standard input")
    if problems:
        raise ProblemsError("inputs", problems, USAGE)
    return inputs


def _expand(name):
    """Returns (files, None), or ([], what is wrong)."""
    path = Path(name)
    if path.is_dir():
        inside = [
            str(file)
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        return inside, None if inside else f"{name}: a folder without files; expected text, .jsonl or .parquet in it"
    if path.is_file():
        return [name], None
    if any(c in name for c in "*?["):
        inside = sorted(file for file in glob.glob(name, recursive=True) if os.path.isfile(file))
        return inside, None if inside else f"{name}: matches no file; check the pattern and the working folder"
    return [], f"{name}: no such file or folder; check the spelling and the working folder"


def _input(path):
    stat = os.stat(path)
    name, packing = path.lower(), ""
    for ending in PACKINGS:
        if name.endswith(ending):
            name, packing = name[: -len(ending)], ending
    kind = "json" if name.endswith(JSON_LINES) else "parquet" if name.endswith(".parquet") else "text"
    return Input(path, stat.st_size, stat.st_mtime_ns, kind, packing)


def _unfit(file, keys):
    """Returns why an Input cannot be read, or None."""
    ending = Path(file.path.lower().removesuffix(file.packing)).suffix
    if ending in NOT_TEXT:
        return f"{file.path}: {ending} is not read; expected text, .jsonl or .parquet, plain or {', '.join(PACKINGS)}"
    if not os.access(file.path, os.R_OK):
        return f"{file.path}: may not be read; change its permissions or leave it out"
    if file.packing == ".zst" and not _installed("zstandard"):
        return f"{file.path}: zstandard is not installed; pip install 'boreal-megatron[data]', or unpack the file"
    if file.kind == "parquet":
        if file.packing:
            return f"{file.path}: packed Parquet is not read; unpack it (Parquet packs by itself)"
        if not _installed("pyarrow"):
            return f"{file.path}: pyarrow is not installed; pip install 'boreal-megatron[data]', or write .jsonl"
        return _unfit_columns(file.path, keys)
    return None


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def _unfit_columns(path, keys):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            schema = table.schema_arrow
    except (OSError, pyarrow.ArrowException) as error:
        return f"{path}: not a whole Parquet file: {error}; copy or write it again"
    types = pyarrow.types
    for column in keys:
        if column not in schema.names:
            names = ", ".join(schema.names)
            return f"{path}: no column {column!r}; it has {names}; name another with --json-key or --id-key"
    kind = schema.field(keys[0]).type
    if not any(
        is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    ):
        return f"{path}: column {keys[0]!r} holds {kind}; expected text; name another with --json-key"
    return None


# --- parts ------------------------------------------------------------------------------------------------------------


def part_bytes(inputs):
    """Returns about how large a part is to be: it depends on the inputs only."""
    return min(max(sum(i.size for i in inputs) // MOST_PARTS, SMALLEST_PART), LARGEST_PART)


def cut(inputs, size):
    """Yields the Parts of the inputs, each of about `size` bytes or one range that cannot be cut."""
    ranges, filled, groups = [], 0, []
    for file, entry in enumerate(inputs):
        for piece in _ranges(file, entry, size):
            if ranges and filled + piece.size > size:
                groups.append(ranges)
                ranges, filled = [], 0
            ranges.append(piece)
            filled += piece.size
    for number, ranges in enumerate([*groups, ranges] if ranges else groups):
        first, last = ranges[0], ranges[-1]
        unit = "row groups" if inputs[first.file].kind == "parquet" else "bytes"
        name = f"{inputs[first.file].path}, {unit} {first.start:,} to {first.end:,}"
        yield Part(number, tuple(ranges), name if len(ranges) == 1 else f"{name}, up to {inputs[last.file].path}")


def _ranges(file, entry, size):
    if not entry.can_be_cut:
        yield Range(file, 0, entry.size, entry.size)
    elif entry.kind == "parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(entry.path) as table:
            rows = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
        done = 0
        for group, count in enumerate(rows):
            share = entry.size * (done + count) // max(sum(rows), 1) - entry.size * done // max(sum(rows), 1)
            yield Range(file, group, group + 1, share)
            done += count
    else:
        start = 0
        with open(entry.path, "rb") as lines:
            while start < entry.size:
                end = _line_end(lines, min(start + size, entry.size), entry.size)
                yield Range(file, start, end, end - start)
                start = end


def _line_end(file, at, size):
    """Returns the first line's end at or after byte `at`."""
    if at < size:
        file.seek(at - 1)
        while (piece := file.readline(1 << 16)) and not piece.endswith(b"\n"):
            pass
        at = min(file.tell(), size)
    return at


def lines_before(path, offset):
    """Returns how many lines of a file end before a byte."""
    return sum(block.count(b"\n") for block in _bytes(path, "", 0, offset))


# --- documents --------------------------------------------------------------------------------------------------------


def documents(inputs, piece, json_key, id_key=None):
    """Yields every Document of a Range, good and bad, holding a block and one document at a time.

    Raises:
        BorealError: the file changed since the job began, or cannot be read.
    """
    entry = inputs[piece.file]
    try:
        now = os.stat(entry.path)
        if (now.st_size, now.st_mtime_ns) != (entry.size, entry.modified):
            raise BorealError(
                f"{entry.path}: changed since this run began: {now.st_size:,} bytes. Expected: {entry.size:,} bytes of "
                "the same time. Let its writer end, and begin anew.",
                INPUT,
            )
        read = {"json": _json_documents, "text": _text_documents, "parquet": _parquet_documents}[entry.kind]
        yield from read(entry, piece, json_key, id_key)
    except OSError as error:
        raise BorealError(
            f"{entry.path}: cannot be read: {error.strerror}. Check the disk, and run again.", INPUT
        ) from error


def _json_documents(entry, piece, json_key, id_key):
    line, offset, blank = 0, piece.start, False
    for raw in _lines(entry, piece):
        line += 1
        if isinstance(raw, Damaged):
            yield Document(piece.file, line, offset, None, str(raw), raw.last)
            return
        body = raw.removeprefix(BOM) if offset == 0 else raw
        blank = not body.strip()  # holds nothing
        if not blank:
            text, reason, key = text_of(body, json_key, id_key)
            yield Document(piece.file, line, offset, text, reason, raw if reason else b"", key)
        offset += len(raw) + 1
    if blank:
        yield Document(piece.file, line, offset, None)


def _lines(entry, piece):
    """Yields the lines of a Range without their ends; a packed stream that breaks off yields Damaged last."""
    parts = []
    try:
        for block in _bytes(entry.path, entry.packing, piece.start, piece.end):
            first, *rest = block.split(b"\n")
            parts.append(first)
            if rest:
                yield b"".join(parts)
                yield from rest[:-1]
                parts = [rest[-1]]
        if last := b"".join(parts):
            yield last
    except Damaged as damaged:
        damaged.last = b"".join(parts)
        yield damaged


def _text_documents(entry, piece, json_key, id_key):
    parts = []
    try:
        parts += _bytes(entry.path, entry.packing, 0, piece.end)
        data = b"".join(parts)
        body = data.removeprefix(BOM)
        text = body.decode("utf-8")
        yield Document(piece.file, 1, 0, text or None, None if text else "empty text" if data else "empty file")
    except Damaged as damaged:
        yield Document(piece.file, 1, 0, None, str(damaged), b"".join(parts))
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(body)
        yield Document(piece.file, data.count(b"\n", 0, at) + 1, at, None, "invalid UTF-8", data)


def _parquet_documents(entry, piece, json_key, id_key):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    columns = [json_key] + ([id_key] if id_key else [])
    with ParquetFile(entry.path, buffer_size=1 << 20) as table:  # pages as they are needed, not whole row groups
        row = sum(table.metadata.row_group(g).num_rows for g in range(piece.start))
        line = 0
        try:
            for batch in table.iter_batches(32, row_groups=range(piece.start, piece.end), columns=columns):
                keys = batch.column(id_key) if id_key in batch.schema.names else [None] * len(batch)
                for value, key in zip(batch.column(json_key), keys, strict=True):
                    line += 1
                    text, reason, raw = _parquet_text(value)
                    yield Document(piece.file, line, row, text, reason, raw, None if key is None else str(key))
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            yield Document(piece.file, line + 1, row, None, "damaged Parquet", str(error).encode())


def _parquet_text(value):
    raw = b""
    try:
        text = value.as_py()
        if isinstance(text, bytes):
            raw, text = text, text.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, "invalid UTF-8", raw or bytes(error.object)
    if text is None:
        return None, "no text (null)", b""
    return (text, None, b"") if text else (None, "empty text", b"")


class Damaged(Exception):
    """A packed stream that breaks off or is not what its name says; `last` is the line it broke off in."""

    last = b""


def _bytes(path, packing, start, end):
    """Yields blocks of a file from byte `start` to `end` (None: the end), or of the whole file unpacked."""
    with open(path, "rb") as file:
        if packing:
            yield from _unpacked(file, packing)
            return
        file.seek(start)
        left = None if end is None else end - start
        while block := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
            left = None if left is None else left - len(block)
            yield block


def _unpacked(file, packing):
    """Yields the content of a packed file; members one after another are one stream, as their tools make of them."""
    name = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}[packing]
    unpacker, fed = None, False
    while packed := file.read(1 << 18):
        while packed:
            if unpacker is None:
                packed = packed.lstrip(b"\0") if fed and packing == ".gz" else packed  # gzip pads with zeros
                if not packed:
                    break
                unpacker, fed = _unpacker(packing), True
            try:
                if block := unpacker.decompress(packed):
                    yield block
            except Exception as error:  # each library has its own
                raise Damaged(f"damaged {name}") from error
            packed, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
    if unpacker is not None:
        raise Damaged(f"truncated {name}")


def _unpacker(packing):
    if packing == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
    if packing == ".gz":
        return zlib.decompressobj(31)
    return bz2.BZ2Decompressor() if packing == ".bz2" else lzma.LZMADecompressor()


def text_of(raw, json_key, id_key=None):
    """Returns (text, None, id) of a JSON line, or (None, why there is no text, None)."""
    try:
        row, exact = fast_loads(raw), fast_loads is not json.loads
    except ValueError:
        exact = False
        try:
            row = json.loads(raw.decode("utf-8"))  # takes NaN, and tells the reasons apart
        except UnicodeDecodeError:
            return None, "invalid UTF-8", None
        except (ValueError, RecursionError):
            return None, "malformed JSON", None
    if not isinstance(row, dict):
        return None, "not a JSON object", None
    if json_key not in row:
        return None, f"missing key {json_key!r}", None
    text = row[json_key]
    if not isinstance(text, str):
        return None, f"key {json_key!r} is not a string", None
    if not text:
        return None, "empty text", None
    if not exact and not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "lone surrogate", None
    if id_key is None:
        return text, None, None
    if row.get(id_key) is None:
        return None, f"missing key {id_key!r}", None
    return text, None, str(row[id_key])


def beginning(raw):
    """The first 80 characters, for a message; what a terminal would act on is shown escaped."""
    start = raw[: 4 * SHOWN].decode("utf-8", "backslashreplace").rstrip("\r\n")[:SHOWN]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)
