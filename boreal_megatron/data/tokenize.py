"""Text files to a Megatron indexed dataset: find the inputs, cut them into chunks, tokenize in order, write.

    inputs -> find_files -> cut -> chunks -> workers (read_chunk, encode) -> in input order -> IndexedWriter

A chunk is a byte range of whole JSONL lines, or one whole plain text file. Workers read and encode; the parent
alone writes, in input order. The output is therefore the same for any number of workers, and memory is a few chunks
whatever the size of the corpus. A bad line is an error or is counted and listed; it is never dropped silently.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
import traceback
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boreal_megatron.data.indexed import IndexedWriter, best_dtype, meta_path, write_errors
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.durable import flush
from boreal_megatron.errors import BorealError, ProblemsError

CHUNK_BYTES = 4 << 20
BAD_LISTED = 20
JSON_LINES = (".jsonl", ".json")
NOT_TEXT = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow")
BOM = b"\xef\xbb\xbf"


class Chunk(NamedTuple):
    path: str
    start: int
    end: int

    @property
    def is_json(self):
        return self.path.lower().endswith(JSON_LINES)


class Document(NamedTuple):
    """A document; or a line (of JSONL) or file (of plain text) that gives none, `text` being None for a `reason`."""

    path: str
    line: int  # from 1
    offset: int  # byte in the file
    text: str | None
    reason: str | None
    beginning: str  # for messages, only where there is a reason

    def __str__(self):
        return f"{self.path}:{self.line}: byte {self.offset:,}: {self.reason}: {self.beginning}"


class Tokenized(NamedTuple):
    """What one chunk gives: `ids [sum(lengths)]` of its documents, and what gave none."""

    chunk: Chunk
    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    lines: int
    bad: list  # Documents without text, at most BAD_LISTED, lines counted within the chunk
    bad_by_reason: Counter


# --- inputs -----------------------------------------------------------------------------------------------------------


def find_files(inputs):
    """Returns (path, size) of every input file; folders give their files, sorted, without hidden ones.

    Raises:
        ProblemsError: inputs that are missing, empty or not text; all are listed.
    """
    files, problems = [], []
    for given in map(str, inputs):
        path = Path(given)
        if path.is_dir():
            inside = [
                file
                for file in sorted(path.rglob("*"))
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not inside:
                problems.append(f"{given}: a folder without files; expected text or .jsonl files in it")
        elif path.is_file():
            inside = [path]
            if not path.stat().st_size:
                problems.append(f"{given}: empty, 0 bytes; expected text; leave it out or write it again")
        else:
            inside = []
            problems.append(f"{given}: no such file or folder; check the spelling and the working folder")
        for file in inside:
            if file.suffix.lower() in NOT_TEXT:
                problems.append(f"{file}: {file.suffix} is not read; expected .jsonl or plain text; unpack it first")
            elif not os.access(file, os.R_OK):
                problems.append(f"{file}: may not be read; change its permissions or leave it out")
        files += [(str(file), file.stat().st_size) for file in inside]
    if not files and not problems:
        problems.append("no inputs given; expected files or folders")
    if problems:
        raise ProblemsError("inputs", problems)
    return files


def cut(files):
    """Yields the chunks of files: plain text whole, JSONL in ranges of whole lines of about CHUNK_BYTES."""
    for path, size in files:
        if not Chunk(path, 0, size).is_json:
            yield Chunk(path, 0, size)
            continue
        start = 0
        with open(path, "rb") as file:
            while True:
                end = min(start + CHUNK_BYTES, size)
                if end < size:
                    file.seek(end - 1)
                    while (piece := file.readline(1 << 16)) and not piece.endswith(b"\n"):
                        pass
                    end = min(file.tell(), size)
                yield Chunk(path, start, end)
                start = end
                if start >= size:
                    break


def read_chunk(chunk):
    """Returns the bytes of a chunk."""
    try:
        with open(chunk.path, "rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.end - chunk.start)
    except OSError as error:
        raise BorealError(f"{chunk.path}: cannot be read: {error.strerror}. Check the disk, and run again.") from error
    if len(data) != chunk.end - chunk.start:
        raise BorealError(
            f"{chunk.path}: {chunk.start + len(data):,} bytes. Expected: {chunk.end:,}, as at the start of this run. "
            "The file is changing: let its writer end, and run again."
        )
    return data


def documents(chunk, data, json_key):
    """Yields every `Document` of a chunk, good and bad; lines count from the start of the chunk."""
    if not data:
        yield Document(chunk.path, 1, 0, None, "empty file", "")
    elif chunk.is_json:
        offset = chunk.start
        for number, line in enumerate(data.split(b"\n"), 1):
            raw = line.removeprefix(BOM) if offset == 0 else line
            if raw.strip():  # a blank line holds nothing
                text, reason = _text_of(raw, json_key)
                yield Document(chunk.path, number, offset, text, reason, _beginning(raw) if reason else "")
            offset += len(line) + 1
    else:
        try:
            text = data.removeprefix(BOM).decode("utf-8")
            yield Document(chunk.path, 1, 0, text or None, None if text else "empty text", "")
        except UnicodeDecodeError as error:
            at = error.start + (len(BOM) if data.startswith(BOM) else 0)
            line = data.count(b"\n", 0, at) + 1
            yield Document(chunk.path, line, at, None, "invalid UTF-8", _beginning(data[at : at + 320]))


def _text_of(raw, json_key):
    """Returns (text, None) of a JSONL line, or (None, why there is no text)."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "malformed JSON"
    if not isinstance(row, dict):
        return None, "not a JSON object"
    if json_key not in row:
        return None, f"missing key {json_key!r}"
    text = row[json_key]
    if not isinstance(text, str):
        return None, f"key {json_key!r} is not a string"
    if not text:
        return None, "empty text"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "lone surrogate"
    return text, None


def _beginning(raw):
    """The first 80 characters, for a message; what a terminal would act on is shown escaped."""
    start = raw[:320].decode("utf-8", "backslashreplace").rstrip("\r\n")[:80]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)


def iter_texts(inputs, json_key="text"):
    """Yields the text of every document, in order; the first bad line is an error."""
    lines_before = 0
    for chunk in cut(find_files(inputs)):
        if chunk.start == 0:
            lines_before = 0
        data = read_chunk(chunk)
        for document in documents(chunk, data, json_key):
            if document.reason:
                bad = document._replace(line=lines_before + document.line)
                raise BorealError(f"{bad}\nExpected: text in UTF-8. Correct it or leave it out, and run again.")
            yield document.text
        lines_before += data.count(b"\n")


# --- workers ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a worker needs to know; small, since it is sent to each."""

    tokenizer_dir: str
    json_key: str
    append_eod: bool
    stop_at_bad: bool
    dtype: str

    def start(self):
        tokenizer = Tokenizer.load(self.tokenizer_dir)
        return lambda chunk: self._tokenize(tokenizer, chunk)

    def _tokenize(self, tokenizer, chunk):
        data = read_chunk(chunk)
        end = np.array([tokenizer.eod] if self.append_eod else [], dtype=self.dtype)
        pieces, lengths, text_bytes = [], [], 0
        bad, bad_by_reason = [], Counter()
        for document in documents(chunk, data, self.json_key):
            reason = document.reason
            if not reason:
                # One document per call keeps a worker on one core, and its memory to one document's encoding.
                ids = np.array(tokenizer.encode(document.text), dtype=self.dtype)
                if not ids.size:
                    reason = "no tokens"
                elif (ids == tokenizer.eod).any():
                    # Only where the tokenizer does not flag its marker as special: the text would end documents.
                    reason = f"the text {tokenizer.eod_token!r} encodes to the end of a document"
            if reason:
                bad_by_reason[reason] += 1
                if len(bad) < BAD_LISTED:
                    text = document.text
                    beginning = document.beginning if text is None else _beginning(text[:80].encode("utf-8"))
                    bad.append(document._replace(text=None, reason=reason, beginning=beginning))
                if self.stop_at_bad:
                    break
                continue
            pieces += [ids, end]
            lengths.append(ids.size + end.size)
            text_bytes += len(document.text) if document.text.isascii() else len(document.text.encode("utf-8"))
        ids = np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        return Tokenized(chunk, ids, np.array(lengths, np.int64), text_bytes, data.count(b"\n"), bad, bad_by_reason)


def _worker(pipe, job):
    """Answers each chunk that arrives with its result, or with the error as a string; ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone cleans up
    with contextlib.suppress(EOFError, ConnectionError):
        run = None
        while True:
            chunk = pipe.recv()
            try:
                run = run or job.start()
                answer = run(chunk)
            except BorealError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)


def in_order(chunks, job, workers):
    """Yields the result of every chunk, in the order of the chunks, from `workers` processes.

    At most a few chunks per worker are under way or waiting their turn. A worker that raises or dies is an error
    at once. With one worker the work is done in this process.
    """
    if workers == 1:
        run = job.start()
        yield from map(run, chunks)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    crew = {}  # our end of the pipe -> process
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            crew[ours] = context.Process(target=_worker, args=(theirs, job), daemon=True)
            crew[ours].start()
            theirs.close()  # so that the pipe ends when the worker does
        numbered = enumerate(chunks)
        idle, busy, done = list(crew), {}, {}  # busy: pipe -> (number, chunk); done: number -> result
        given = taken = 0
        while True:
            while idle and given < taken + 4 * workers and (item := next(numbered, None)):
                given += 1
                busy[idle[-1]] = item
                with _named_death(crew[idle[-1]], item[1]):
                    idle[-1].send(item[1])
                idle.pop()
            if taken in done:
                yield done.pop(taken)
                taken += 1
                continue
            if not busy:
                return
            for pipe in wait(list(busy)):
                number, chunk = busy.pop(pipe)
                with _named_death(crew[pipe], chunk):
                    answer = pipe.recv()
                if isinstance(answer, BorealError):
                    raise answer
                if isinstance(answer, str):
                    raise RuntimeError(f"{chunk.path}, bytes {chunk.start:,} to {chunk.end:,}:\n{answer}")
                done[number] = answer
                idle.append(pipe)
    finally:
        for process in crew.values():
            process.kill()
        for pipe, process in crew.items():
            process.join()
            pipe.close()


@contextlib.contextmanager
def _named_death(process, chunk):
    try:
        yield
    except (EOFError, ConnectionError):
        process.join(5)
        code = process.exitcode
        raise BorealError(
            f"{chunk.path}, bytes {chunk.start:,} to {chunk.end:,}: a worker process ended with exit code {code} "
            "before it answered. Expected: an answer. "
            + (
                "It was killed, most often for lack of memory: run again with fewer --workers."
                if code == -signal.SIGKILL
                else "Its own message is above; in a script of your own, call preprocess() under "
                'if __name__ == "__main__", or run again with --workers 1.'
            )
        ) from None


# --- the whole job ----------------------------------------------------------------------------------------------------


def preprocess(
    inputs, tokenizer_dir, out, *, json_key="text", append_eod=True, workers=None, on_bad="fail", progress=True
):
    """Tokenizes files into `{out}_{json_key}_document.bin` and `.idx`, with a `.meta.json` beside them.

    Args:
        inputs: files and folders. `.jsonl`/`.json`: one JSON object a line; anything else: one document a file.
        tokenizer_dir: folder with a `tokenizer.json`.
        out: prefix of the output; files of an earlier run are replaced once the new ones are whole.
        json_key: key of the text in a JSON object.
        append_eod: end each document with the end-of-document token.
        workers: processes; all cores by default. The output does not depend on it.
        on_bad: "fail" stops at the first bad line, "skip" counts and lists them.
        progress: a bar on stderr, or a line every ten seconds where stderr is not a terminal.

    Returns:
        The content of the `.meta.json`, and `prefix`, `seconds`, `megabytes_per_second` of input.

    Raises:
        BorealError: wrong inputs, a bad line under "fail", a full disk, a worker that died. The final names then
            hold what they held before.
    """
    inputs, tokenizer_dir, out = [str(i) for i in inputs], str(tokenizer_dir), str(out)
    if on_bad not in ("fail", "skip"):
        raise BorealError(f"on_bad={on_bad!r}. Expected: 'fail' or 'skip'.")
    if workers is not None and workers < 1:
        raise BorealError(f"workers={workers}. Expected: 1 or more.")
    if Path(out).is_dir() or out.endswith("/"):
        raise BorealError(f"{out}: a folder. Expected: the beginning of a file name: {os.path.join(out, 'train')}.")
    files = find_files(inputs)
    tokenizer = Tokenizer.load(tokenizer_dir)
    prefix = Path(f"{out}_{json_key}_document")
    dtype = best_dtype(tokenizer.vocab_size)
    input_bytes = sum(size for _, size in files)
    # A process takes longer to start than a small chunk to encode.
    asked_workers = workers
    workers = min(workers or _cores(), max(1, -(-input_bytes // CHUNK_BYTES)))
    job = Job(tokenizer_dir, json_key, append_eod, on_bad == "fail", dtype.name)

    text_bytes, lines_before, skipped, listed = 0, 0, Counter(), []
    began = time.monotonic()
    with (
        IndexedWriter(prefix, dtype) as writer,
        _bar(input_bytes, progress) as bar,
        contextlib.closing(in_order(cut(files), job, workers)) as results,
    ):
        for result in results:
            if result.chunk.start == 0:
                lines_before = 0
            bad = [b._replace(line=lines_before + b.line) for b in result.bad]
            if bad and on_bad == "fail":
                raise BorealError(
                    f"{bad[0]}\nExpected: {_expected(result.chunk, json_key)}. Correct it, or pass over such input "
                    f"(counted and listed) with:\n  {_skip_command(inputs, job, out, asked_workers)}"
                )
            writer.append_many(result.ids, result.lengths)
            text_bytes += result.text_bytes
            lines_before += result.lines
            skipped += result.bad_by_reason
            listed += bad[: BAD_LISTED - len(listed)]
            bar.update(result.chunk.end - result.chunk.start)
            bar.set_postfix_str(f"{writer.tokens / 1e6:.2f} Mtokens", refresh=False)
        if not writer.tokens:
            found = "; ".join(f"{count:,} x {reason}" for reason, count in sorted(skipped.items()))
            raise BorealError(
                f"{', '.join(inputs)}: no documents: {found or 'blank lines only'}. Expected: at least one. "
                "Nothing is written; check the inputs and --json-key."
            )
        totals = writer.close()
    seconds = time.monotonic() - began

    meta = {
        **{key: totals[key] for key in ("documents", "tokens")},
        "text_bytes": text_bytes,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        "eod": tokenizer.eod,
        "append_eod": append_eod,
        "json_key": json_key,
        "inputs": inputs,
        "input_files": len(files),
        "input_bytes": input_bytes,
        "skipped": dict(sorted(skipped.items())),
        "skipped_first": [str(bad) for bad in listed],
        "bin_sha256": totals["bin_sha256"],
        "idx_sha256": totals["idx_sha256"],
        "tool": {"boreal_megatron": _version(), "tokenizers": importlib.metadata.version("tokenizers")},
    }
    _write_meta(meta_path(prefix), meta)
    return {
        **meta,
        "prefix": str(prefix),
        "seconds": round(seconds, 3),
        "megabytes_per_second": round(input_bytes / 1e6 / max(seconds, 1e-9), 3),
    }


def _cores():
    """The cores this process may use: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _expected(chunk, json_key):
    return f"a JSON object with a text under {json_key!r}, in UTF-8" if chunk.is_json else "text in UTF-8"


def _skip_command(inputs, job, out, workers):
    words = ["boreal", "data", "preprocess", *inputs, "--tokenizer", job.tokenizer_dir, "--out", out]
    if job.json_key != "text":
        words += ["--json-key", job.json_key]
    if not job.append_eod:
        words += ["--no-append-eod"]
    if workers is not None:
        words += ["--workers", str(workers)]
    return shlex.join([*words, "--on-bad", "skip"])


def _bar(total, progress):
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="tokenize",
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not progress,
    )


def _version():
    try:
        return importlib.metadata.version("boreal_megatron")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def _write_meta(path, meta):
    partial = Path(f"{path}.partial")
    try:
        with write_errors(path):
            with open(partial, "w", encoding="utf-8") as file:
                json.dump(meta, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
