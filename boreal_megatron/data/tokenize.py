"""Text to a Megatron indexed dataset: parts of the inputs to ids by many workers, joined in order.

    inputs -> cut -> Part -> worker: documents, engine -> PREFIX.parts/ -> journal, joined -> PREFIX.*

A worker writes what a part gives to `PREFIX.parts/` and answers with a record of it; the parent notes the record in a
journal and joins finished parts in the order of the input. So the result does not depend on the number of workers,
memory does not grow with the corpus, and a run that was stopped anywhere goes on where it was. What gives no document
is an error, or is counted, listed and on request kept; nothing is dropped silently.

Beside `.bin` and `.idx`, which are plain Megatron, lie
    PREFIX.meta.json          counts, tokenizer, engine, inputs, checksums
    PREFIX.provenance.npy     [documents] of (file int32, offset int64): where each came from; the meta lists the files
    PREFIX.bags.npy           int64 [documents + 1], bags before each document, where bags end with their document
    PREFIX.special.jsonl      documents with special tokens written out in their text, if there are any
    PREFIX.quarantine.jsonl   what gave no document, and why; its bytes are in PREFIX.quarantine.raw
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boreal_megatron.data import engines, inputs as files
from boreal_megatron.data.crew import in_order
from boreal_megatron.data.indexed import best_dtype, write_errors
from boreal_megatron.data.parts import STDIN_FILE, Parts, PartWriter
from boreal_megatron.data.progress import Bar
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import INPUT, USAGE, BorealError, ProblemsError

BATCH_BYTES = 4 << 20  # of text that is encoded at a time
BAD_LISTED = 20  # shown, and never too many
ON_BAD = ("fail", "skip", "quarantine")
EMPTY = ("skip", "keep")
BOUNDARIES = ("flat", "align", "drop_tail")


class Options(NamedTuple):
    """What decides the ids, besides inputs and tokenizer.

    Attributes:
        json_key: key of the text in a JSON object; column of a Parquet file.
        id_key: key or column of an id that must not repeat, or None.
        append_eod: end each document with the end-of-document token.
        special: special tokens written out in a text are text (`encode`), become tokens (`split`, as in Megatron's own
            preprocessing), or make the document a bad one (`error`).
        empty: no text is bad (`skip`), or a document of no tokens, as in Megatron (`keep`).
        engine: one of `engines.ENGINES`.
        shard: (i, n): only the i-th of n stretches of the inputs, from 0.
    """

    json_key: str = "text"
    id_key: str | None = None
    append_eod: bool = True
    special: str = "encode"
    empty: str = "skip"
    engine: str = "auto"
    shard: tuple[int, int] = (0, 1)


# --- a worker ---------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a worker needs to know; sent once.

    Attributes:
        compared: about how many documents of a batch are compared with the reference.
        stop_at_bad: whether the first bad document ends a part.
    """

    inputs: list
    tokenizer_dir: str
    options: Options
    engine: str
    compared: int
    stop_at_bad: bool
    folder: str

    def start(self, say):
        tokenizer = Tokenizer.load(self.tokenizer_dir)
        engine = engines.make(self.engine, tokenizer, self.options.special)
        return lambda part: _Work(self, tokenizer, engine, say).run(part)


class _Work:
    """One part: its documents a batch at a time to ids, to files, to a record for the journal."""

    def __init__(self, job, tokenizer, engine, say):
        self.job, self.options, self.engine, self.say = job, job.options, engine, say
        self.dtype = best_dtype(tokenizer.vocab_size)
        self.eod, self.eod_token = tokenizer.eod, tokenizer.eod_token
        self.specials = engines.Marks(token for token, special in tokenizer.added_tokens.items() if special)
        self.rows, self.bad, self.special = [], [], []
        self.tokens = self.text_bytes = 0

    def run(self, part):
        """Returns the journal's record; under stop_at_bad, {"stopped": record of a bad document} if there is one."""
        out, said, lines = PartWriter(self.job.folder, part.number), 0, []
        try:
            for place, piece in enumerate(part.ranges):
                found = files.documents(self.job.inputs, piece, self.options.json_key, self.options.id_key)
                lines.append(0)
                for batch in _batches(found):
                    lines[-1] = batch[-1].line
                    before = self.tokens, len(self.bad)
                    out.write(self.encode(batch, place))
                    done = min(self.text_bytes, part.size)
                    self.say((done - said, self.tokens - before[0], len(self.bad) - before[1]))
                    said = done
                    if self.bad and self.job.stop_at_bad:
                        out.discard()
                        return {"part": part.number, "lines": lines, "stopped": self.bad[0][0]}
            out.finish(self.rows, self.bad, self.special)
        except BaseException:
            out.discard()
            raise
        self.say((part.size - said, 0, 0))
        return {
            "part": part.number,
            "documents": len(self.rows),
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "lines": lines,
            "bad": dict(Counter(record["reason"] for record, _ in self.bad)),
            "special": len(self.special),
        }

    def encode(self, batch, place):
        """Returns the ids of a batch of Documents and adds their rows; `place` is that of the range in its part."""
        good, seen = [], len(self.bad)
        for document in batch:
            reason = document.reason
            if document.text is None and reason is None:
                continue
            if reason in ("empty text", "empty file") and self.options.empty == "keep":
                document, reason = document._replace(text="", reason=None), None
            marks = self.specials.found(document.text) if reason is None else []
            if marks and self.options.special == "error":
                reason = f"special tokens in the text: {', '.join(marks)}"
            if reason is None:
                good.append((document, marks))
            else:
                self.refuse(document, place, reason)
        texts = [engines.pieces(document.text, self.engine.encode) for document, _ in good]
        ids = iter(self.engine.encode([piece for pieces in texts for piece in pieces]))
        if self.job.compared:
            for document, _ in good[:: max(1, -(-len(good) // self.job.compared))]:
                self.engine.compare(document.text)
        joined = []
        for (document, marks), pieces in zip(good, texts, strict=True):
            own = [np.asarray(part, dtype=self.dtype) for part in islice(ids, len(pieces))]
            length = sum(map(len, own))
            reason = None
            if not length and (document.text or self.options.empty == "skip"):
                reason = "no tokens"
            elif self.options.special != "split" and any((part == self.eod).any() for part in own):
                # Only where the tokenizer does not flag its marker as special: the text would end documents.
                reason = f"the text {self.eod_token!r} encodes to the end of a document"
            if reason is not None:
                self.refuse(document, place, reason)
                continue
            if self.options.append_eod and length:
                own.append(np.array([self.eod], dtype=self.dtype))
                length += 1
            if marks:
                self.special.append(
                    {"document": len(self.rows), "file": document.file, "line": document.line, "range": place,
                     "offset": document.offset, "tokens": marks}
                )  # fmt: skip
            self.rows.append((length, document.file, document.offset, _id(document.key)))
            self.tokens += length
            self.text_bytes += len(document.text) if document.text.isascii() else len(document.text.encode("utf-8"))
            joined += own
        self.bad[seen:] = sorted(self.bad[seen:], key=lambda bad: bad[0]["line"])
        return np.concatenate(joined) if joined else np.empty(0, self.dtype)

    def refuse(self, document, place, reason):
        raw = document.raw if document.text is None else document.text.encode("utf-8", "surrogatepass")
        record = {
            "file": document.file, "line": document.line, "range": place, "offset": document.offset, "reason": reason,
            "bytes": len(raw), "beginning": files.beginning(raw),
        }  # fmt: skip
        self.bad.append((record, raw))


def _batches(found):
    """Yields lists of Documents of about BATCH_BYTES."""
    batch, size = [], 0
    for document in found:
        batch.append(document)
        size += len(document.text or document.raw)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _id(key):
    return b"" if key is None else hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- the whole job ----------------------------------------------------------------------------------------------------


def preprocess(
    inputs, tokenizer_dir, out, *, workers=None, on_bad="fail", max_bad=0.001, compare=100, tst_bag=None,
    tst_boundaries="flat", dry_run=False, progress=True, **options,
):  # fmt: skip
    """Tokenizes files into `{out}_{json_key}_document.bin`, `.idx` and what lies beside them; see the module.

    Args:
        inputs: files, folders and globs: `.jsonl` (one object a line), `.parquet`, other text (one document a file); the
            first and the last also `.gz`, `.zst`, `.bz2` and `.xz`. "-" alone: JSON lines from standard input.
        tokenizer_dir: folder with a `tokenizer.json` or a `tokenizer.model`.
        out: beginning of the output's name; files of an earlier run are replaced once the new ones are whole.
        workers: processes; all cores by default. The output does not depend on it.
        on_bad: "fail" stops at the first bad document, "skip" counts and lists them, "quarantine" also keeps their bytes.
        max_bad: share of bad documents from which on "skip" and "quarantine" fail too; up to 20 are always allowed.
        compare: about how many documents are encoded by the reference too, where a faster engine is used.
        tst_bag, tst_boundaries: also note the bags of this size; see `config.schema.Data.boundaries`.
        dry_run: only say what would be done.
        progress: show it on stderr.
        options: fields of `Options`.

    Returns:
        The content of the `.meta.json`, and `prefix`, `seconds`, `megabytes_per_second` of input, `resumed_parts`.

    Raises:
        BorealError: wrong inputs or options, a bad document under "fail" or too many, a full disk, a worker that died, an
            interrupt. The final names then hold what they held before, and the same call goes on where this one was.
    """
    given, options = [str(i) for i in inputs], Options(**options)
    _check_arguments(given, str(out), options, workers, on_bad, max_bad, tst_bag, tst_boundaries)
    tokenizer = Tokenizer.load(tokenizer_dir)
    engine, version, reason = engines.choose(options.engine, tokenizer, options.special)
    index, shards = options.shard
    shard = f"-{index:05d}-of-{shards:05d}" if shards > 1 else ""
    prefix = Path(f"{out}{shard}_{options.json_key}_document")
    parts = Parts(prefix, best_dtype(tokenizer.vocab_size))
    began = time.monotonic()
    with contextlib.nullcontext() if dry_run else parts:
        if given == [files.STDIN]:
            # What came in another time cannot be told from this, so nothing of it is gone on with.
            given = [] if dry_run else [_keep_stdin(parts)]
        found = files.find_inputs(given, [options.json_key, *([options.id_key] if options.id_key else [])])
        size = files.part_bytes(found)
        every = list(files.cut(found, size))
        mine = every[len(every) * index // shards : len(every) * (index + 1) // shards]
        if not mine:
            raise BorealError(
                f"shard {index} of {shards}: the inputs make {len(every)} parts. Expected: at most so many shards.", USAGE
            )
        total = sum(part.size for part in mine)
        workers = min(workers or _cores(), len(mine))
        job = {
            "tokenizer_sha256": tokenizer.fingerprint,
            "engine": {"name": engine, "version": version},
            "dtype": parts.dtype.name,
            "part_bytes": size,
            **{key: value for key, value in options._asdict().items() if key not in ("engine", "shard")},
            "inputs": [list(entry) for entry in found],
        }
        if dry_run:
            about = {key: value for key, value in job.items() if key != "inputs"} | {"engine": {**job["engine"], "reason": reason}}
            return {**about, "prefix": str(prefix), "input_files": len(found), "input_bytes": total, "parts": len(mine), "workers": workers}  # fmt: skip
        done = parts.resume({**job, "shard": [index, shards]})
        resumed = len(mine) if done else len(parts.records)
        if not done:
            refused = Refused(found, parts, mine, on_bad, max_bad, _skip_command(given, tokenizer_dir, out, workers, options))
            work = Job(
                found, str(tokenizer_dir), options, engine, -(-compare * BATCH_BYTES // max(total, 1)) if compare else 0,
                on_bad == "fail", str(parts.folder),
            )  # fmt: skip
            _run(mine, work, workers, parts, refused, total, progress)
            if options.id_key:
                refused.repeats()
            if not parts.documents():
                why = "; ".join(f"{count:,} x {reason}" for reason, count in sorted(refused.reasons.items()))
                parts.forget()
                raise BorealError(
                    f"{', '.join(given)}: no documents: {why or 'blank lines only'}. Expected: at least one. "
                    "Nothing is written; check the inputs and --json-key.",
                    INPUT,
                )
            identity = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
            meta = {
                "text_bytes": sum(record["text_bytes"] for record in parts.records.values()),
                "dtype": parts.dtype.name,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer_sha256": tokenizer.fingerprint,
                "eod": tokenizer.eod,
                **{key: getattr(options, key) for key in ("append_eod", "json_key", "id_key", "special", "empty")},
                "engine": {**job["engine"], "reason": reason},
                "special_documents": sum(record["special"] for record in parts.records.values()),
                "inputs": [str(i) for i in inputs],
                "input_files": len(found),
                "input_bytes": total,
                "files": [files.STDIN if entry.path.endswith(STDIN_FILE) else entry.path for entry in found],
                "shard": [index, shards],
                "job": identity,
                "skipped": dict(sorted(refused.reasons.items())),
                "skipped_first": refused.first,
                "tool": {"boreal_megatron": _version(), tokenizer.library: importlib.metadata.version(tokenizer.library)},
            }
            done = parts.finish(meta, refused.sidecars(), tst_bag, tst_boundaries)
    seconds = time.monotonic() - began
    return {
        **done,
        "prefix": str(prefix),
        "parts": len(mine),
        "resumed_parts": resumed,
        "seconds": round(seconds, 3),
        "megabytes_per_second": round(total / 1e6 / max(seconds, 1e-9), 3),
    }


def _run(mine, job, workers, parts, refused, total, progress):
    """Does the parts that are not done, and joins all in order."""
    with Bar("tokenize", total, silent=not progress) as bar:
        began, counts = time.monotonic(), {"tokens": 0, "bad": 0}

        def hear(note):
            size, tokens, bad = note
            counts["tokens"] += tokens
            counts["bad"] += bad
            rate = counts["tokens"] / 1e6 / max(time.monotonic() - began, 1e-9)
            bar.update(size, f"{rate:.2f} Mtokens/s" + (f", {counts['bad']:,} bad" if counts["bad"] else ""))

        def arrived(record):
            if "stopped" not in record:
                parts.note(record)

        parts.start_joining(mine[0].number)
        bar.update(sum(part.size for part in mine if part.number in parts.records))
        before = dict(parts.records)  # of an earlier run
        todo = [part for part in mine if part.number not in before]
        with contextlib.closing(in_order(todo, job, workers, hear, arrived)) as answers:
            for part in mine:
                refused.count(part, before.get(part.number) or next(answers))
                parts.join(part.number)


class Refused:
    """What gave no document: counted, the first ones listed, too many an error.

    Attributes:
        reasons: reason -> how many.
        first: the first BAD_LISTED, as text.
    """

    def __init__(self, inputs, parts, mine, on_bad, max_bad, skip_command):
        self.inputs, self.parts, self.on_bad, self.max_bad, self.skip_command = inputs, parts, on_bad, max_bad, skip_command
        self.reasons, self.first, self.documents = Counter(), [], 0
        self.lines = {}  # (part, place of a range in it) -> lines of its file before it
        self.file, self.read = None, 0  # the file that the last range was of, and its lines so far
        self.dropped = []  # (place, place of the earlier one) of documents with a repeated id

    def count(self, part, record):
        """Takes in a part's record; parts come in order.

        Raises:
            BorealError: a bad document under "fail", or too many.
        """
        for place, lines in enumerate(record["lines"]):
            piece = part.ranges[place]
            if piece.file != self.file:
                # A shard may begin inside a file; only for a message are the lines before it worth counting.
                self.file, self.read = piece.file, None if piece.start else 0
            self.lines[part.number, place] = self.read
            self.read = None if self.read is None else self.read + lines
        if stopped := record.get("stopped"):
            self._fail(part.number, stopped)
        self.documents += record["documents"]
        if not record["bad"]:
            return
        for number, bad in self.parts.listed(".bad.jsonl", [part.number]):
            if self.on_bad == "fail":
                self._fail(number, bad)
            if len(self.first) < BAD_LISTED:
                self.first.append(self._text(number, bad))
        self.reasons.update(record["bad"])
        self._limit()

    def _limit(self):
        total, seen = self.reasons.total(), self.documents + self.reasons.total()
        if total > max(BAD_LISTED, self.max_bad * seen):
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in self.reasons.most_common())
            listed = "\n".join(f"  {bad}" for bad in self.first[:5])
            raise BorealError(
                f"{total:,} of the first {seen:,} documents are bad: {reasons}\n{listed}\nExpected: at most "
                f"{self.max_bad:.3%} (--max-bad). Mend the inputs, or allow more.",
                INPUT,
            )

    def _line(self, number, bad):
        before = self.lines[number, bad["range"]]
        if before is None:
            entry = self.inputs[bad["file"]]
            return files.lines_before(entry.path, bad["offset"]) + 1 if entry.kind == "json" else bad["offset"] + 1
        return before + bad["line"]

    def _text(self, number, bad):
        path = self.inputs[bad["file"]].path
        return f"{path}:{self._line(number, bad)}: byte {bad['offset']:,}: {bad['reason']}: {bad['beginning']}"

    def _fail(self, number, bad):
        entry = self.inputs[bad["file"]]
        expected = {
            "json": "a JSON object with a text under the key, in UTF-8", "parquet": "a text in every row", "text": "text in UTF-8"
        }  # fmt: skip
        raise BorealError(
            f"{self._text(number, bad)}\nExpected: {expected[entry.kind]}. Correct it, or pass over such input (counted and "
            f"listed; --on-bad quarantine also keeps it) with:\n  {self.skip_command}",
            INPUT,
        )

    def repeats(self):
        """Leaves out documents whose id an earlier one has."""
        self.dropped = self.parts.repeated()
        if not self.dropped:
            return
        where = self.parts.where([place for pair in self.dropped for place in pair])
        texts = [
            f"{self.inputs[where[place][0]].path}: byte {where[place][1]:,}: the id of "
            f"{self.inputs[where[earlier][0]].path}, byte {where[earlier][1]:,}"
            for place, earlier in self.dropped[:BAD_LISTED]
        ]
        if self.on_bad == "fail":
            raise BorealError(
                f"{texts[0]}; {len(self.dropped):,} such documents. Expected: ids that do not repeat. Correct them, or keep "
                f"the first of each with:\n  {self.skip_command}",
                INPUT,
            )
        self.first += texts[: BAD_LISTED - len(self.first)]
        self.reasons["repeated id"] = len(self.dropped)
        self.documents -= len(self.dropped)
        self._limit()
        self.parts.drop([place for place, _ in self.dropped])

    def sidecars(self):
        """Returns ending -> function that yields the bytes of the lists that lie beside the data set."""
        lists = {".special.jsonl": self._special}
        if self.on_bad == "quarantine":
            lists |= {".quarantine.jsonl": self._quarantine, ".quarantine.raw": self._raw}
        return lists

    def _special(self):
        gone, first, places = np.array([place for place, _ in self.dropped], np.int64), {}, 0
        for number in sorted(self.parts.records):
            first[number], places = places, places + self.parts.records[number]["documents"]
        for number, record in self.parts.listed(".special.jsonl"):
            place = first[number] + record["document"]
            before = int(np.searchsorted(gone, place))
            if before == len(gone) or gone[before] != place:
                yield _json_line(
                    document=place - before, file=self.inputs[record["file"]].path, line=self._line(number, record),
                    offset=record["offset"], tokens=record["tokens"],
                )  # fmt: skip

    def _quarantine(self):
        start = 0
        for number, bad in self.parts.listed(".bad.jsonl"):
            yield _json_line(
                file=self.inputs[bad["file"]].path, line=self._line(number, bad), offset=bad["offset"], reason=bad["reason"],
                raw_start=start, raw_bytes=bad["bytes"],
            )  # fmt: skip
            start += bad["bytes"] + 1
        for place, (file, offset) in self.parts.where([place for place, _ in self.dropped]).items():
            yield _json_line(file=self.inputs[file].path, offset=offset, reason="repeated id")

    def _raw(self):
        """The bytes of each, with a line end after it, so that mended lines can be given to preprocessing again."""
        for number in sorted(self.parts.records):
            raw, start = self.parts.raw(number), 0
            for _, bad in self.parts.listed(".bad.jsonl", [number]):
                yield raw[start : start + bad["bytes"]] + b"\n"
                start += bad["bytes"]


def _json_line(**record):
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def _keep_stdin(parts):
    """Copies standard input to a file, which can be cut and read again, and returns its name."""
    parts.forget()
    path = parts.folder / STDIN_FILE
    with write_errors(path), open(path, "wb") as file:
        while block := sys.stdin.buffer.read(1 << 20):
            file.write(block)
    return str(path)


def _check_arguments(given, out, options, workers, on_bad, max_bad, tst_bag, tst_boundaries):
    problems = [
        f"{name}={value!r}; expected one of {', '.join(map(repr, known))}"
        for name, value, known in (
            ("on_bad", on_bad, ON_BAD),
            ("special", options.special, engines.SPECIAL),
            ("empty", options.empty, EMPTY),
            ("engine", options.engine, engines.ENGINES),
            ("tst_boundaries", tst_boundaries, BOUNDARIES),
        )
        if value not in known
    ]
    if workers is not None and workers < 1:
        problems.append(f"workers={workers}; expected 1 or more")
    if tst_bag is not None and tst_bag < 1:
        problems.append(f"tst_bag={tst_bag}; expected 1 or more")
    if not 0 <= max_bad <= 1:
        problems.append(f"max_bad={max_bad}; expected a share, 0 to 1")
    if not 0 <= options.shard[0] < options.shard[1]:
        problems.append(f"shard={options.shard[0]}/{options.shard[1]}; expected i/n with 0 <= i < n")
    if files.STDIN in given and (len(given) > 1 or options.shard[1] > 1):
        problems.append("- (standard input) goes alone: without other inputs and without shards")
    if Path(out).is_dir() or out.endswith("/"):
        problems.append(f"{out}: a folder; expected the beginning of a file name, {os.path.join(out, 'train')}")
    if problems:
        raise ProblemsError("arguments", problems, USAGE)


def _cores():
    """The cores this process may use: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _skip_command(given, tokenizer_dir, out, workers, options):
    words = ["boreal", "data", "preprocess", *given, "--tokenizer", str(tokenizer_dir), "--out", str(out)]
    for flag, value, default in (
        ("--json-key", options.json_key, "text"),
        ("--id-key", options.id_key, None),
        ("--special-in-text", options.special, "encode"),
        ("--empty", options.empty, "skip"),
        ("--engine", options.engine, "auto"),
        ("--shard", "/".join(map(str, options.shard)), "0/1"),
    ):
        words += [flag, value] if value != default else []
    words += [] if options.append_eod else ["--no-append-eod"]
    return shlex.join([*words, "--workers", str(workers), "--on-bad", "skip"])


def _version():
    try:
        return importlib.metadata.version("boreal_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def iter_texts(given, json_key="text"):
    """Yields the text of every document of files, folders and globs, in order; the first bad one is an error."""
    found = files.find_inputs(given, [json_key])
    for part in files.cut(found, files.part_bytes(found)):
        for piece in part.ranges:
            for document in files.documents(found, piece, json_key):
                if document.reason:
                    entry = found[document.file]
                    before = files.lines_before(entry.path, piece.start) if entry.kind == "json" and piece.start else 0
                    raise BorealError(
                        f"{entry.path}:{before + document.line}: byte {document.offset:,}: {document.reason}: "
                        f"{files.beginning(document.raw)}\nExpected: text in UTF-8. Correct it or leave it out, and run again.",
                        INPUT,
                    )
                if document.text is not None:
                    yield document.text
