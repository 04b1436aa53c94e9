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
from pathlib import Path

from boreal_megatron.data import engines
from boreal_megatron.data import inputs as files
from boreal_megatron.data.crew import in_order
from boreal_megatron.data.indexed import best_dtype, write_errors
from boreal_megatron.data.parts import STDIN_FILE, Parts
from boreal_megatron.data.progress import Bar
from boreal_megatron.data.refused import Refused
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.data.work import BATCH_BYTES, Job, Options
from boreal_megatron.errors import INPUT, USAGE, BorealError, ProblemsError

FAST_SHARE = 256 << 20  # bytes for each worker of the fast engine, where their number is not given
ON_BAD = ("fail", "skip", "quarantine")
EMPTY = ("skip", "keep")
BOUNDARIES = ("flat", "align", "drop_tail")


def preprocess(
    inputs, tokenizer_dir, out, *, workers=None, on_bad="fail", max_bad=0.001, compare=100, tst_bag=None,
    tst_boundaries="flat", dry_run=False, progress=True, **options,
):  # fmt: skip
    """Tokenizes files into `{out}_{json_key}_document.bin`, `.idx` and what lies beside them; see the module.

    Args:
        inputs: files, folders and globs: `.jsonl` (one object a line), `.parquet`, other text (one document a file);
            the first and the last also `.gz`, `.zst`, `.bz2` and `.xz`. "-" alone: JSON lines from standard input.
        tokenizer_dir: folder with a `tokenizer.json` or a `tokenizer.model`.
        out: beginning of the output's name; files of an earlier run are replaced once the new ones are whole.
        workers: processes; by default as many as there are cores and work for. The output does not depend on it.
        on_bad: "fail" stops at the first bad document, "skip" counts and lists them, "quarantine" also keeps them.
        max_bad: share of bad documents from which on "skip" and "quarantine" fail too; up to 20 are always allowed.
        compare: about how many documents are encoded by the reference too, where a faster engine is used.
        tst_bag, tst_boundaries: also note the bags of this size; see `config.schema.Data.boundaries`.
        dry_run: only say what would be done.
        progress: show it on stderr.
        options: fields of `Options`.

    Returns:
        The content of the `.meta.json`, and `prefix`, `seconds`, `megabytes_per_second` of input, `resumed_parts`.

    Raises:
        BorealError: wrong inputs or options, a bad document under "fail" or too many, a full disk, a worker that died,
            an interrupt. The final names then hold what they held before, and the same call goes on where this one was.
    """
    given, options = [str(i) for i in inputs], Options(**options)
    _check_arguments(given, str(out), options, workers, on_bad, max_bad, tst_bag, tst_boundaries)
    tokenizer = Tokenizer.load(tokenizer_dir)
    engine, reason = engines.choose(options.engine, tokenizer, options.special)
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
                f"shard {index} of {shards}: the inputs make {len(every)} parts. Expected: at most so many shards.",
                USAGE,
            )
        total = sum(part.size for part in mine)
        # A process takes seconds to load a large tokenizer, in which the fast engine does its share by itself.
        useful = len(mine) if engine.name != "gigatoken" else -(-total // FAST_SHARE)
        workers = min(workers or min(_cores(), useful), len(mine))
        job = {
            "tokenizer_sha256": tokenizer.fingerprint,
            "engine": {"name": engine.name, "version": engine.version},
            "dtype": parts.dtype.name,
            "part_bytes": size,
            **{key: value for key, value in options._asdict().items() if key not in ("engine", "shard")},
            "inputs": [list(entry) for entry in found],
        }
        if dry_run:
            about = {key: value for key, value in job.items() if key != "inputs"} | {
                "engine": {**job["engine"], "reason": reason}
            }
            return {
                **about, "prefix": str(prefix), "input_files": len(found), "input_bytes": total, "parts": len(mine),
                "workers": workers,
            }  # fmt: skip
        done = parts.resume({**job, "shard": [index, shards]})
        resumed = len(mine) if done else len(parts.records)
        if not done:
            command = _skip_command(map(str, inputs), tokenizer_dir, out, workers, options)
            refused = Refused(found, parts, mine, on_bad, max_bad, command)
            work = Job(
                found, str(tokenizer_dir), options, engine.name, engine if workers == 1 else None, parts.dtype.name,
                -(-compare * BATCH_BYTES // max(total, 1)) if compare else 0, on_bad == "fail", str(parts.folder),
            )  # fmt: skip
            _run(mine, work, workers, parts, refused, total, progress)
            if options.id_key:
                refused.repeats()
            if not parts.documents():
                why = "; ".join(f"{count:,} x {reason}" for reason, count in sorted(refused.reasons.items()))
                parts.forget()
                raise BorealError(
                    f"{', '.join(map(str, inputs))}: no documents: {why or 'blank lines only'}. Expected: at least one. "
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
                "tool": {
                    "boreal_megatron": _version(),
                    tokenizer.library: importlib.metadata.version(tokenizer.library),
                },
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
                        f"{files.beginning(document.raw)}\nExpected: text in UTF-8. Correct it or leave it out, and "
                        "run again.",
                        INPUT,
                    )
                if document.text is not None:
                    yield document.text
