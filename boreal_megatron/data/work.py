"""One part of a preprocessing job: its documents to ids, in a worker process.

Documents are encoded a batch at a time; what they give goes to `PREFIX.parts/` (`parts.py`), counts go to the parent.
"""

import hashlib
from collections import Counter
from itertools import islice
from typing import NamedTuple

import numpy as np

from boreal_megatron.data import engines
from boreal_megatron.data import inputs as files
from boreal_megatron.data.parts import PartWriter
from boreal_megatron.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20  # of text that is encoded at a time


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


class Job(NamedTuple):
    """What a worker needs to know; sent once.

    Attributes:
        engine: name of the chosen one.
        ready: that engine itself, where the work is done in the process that chose it.
        dtype: of the ids on disk.
        compared: about how many documents of a batch are compared with the reference.
        stop_at_bad: whether the first bad document ends a part.
    """

    inputs: list
    tokenizer_dir: str
    options: Options
    engine: str
    ready: object
    dtype: str
    compared: int
    stop_at_bad: bool
    folder: str

    def start(self, say):
        engine = self.ready or engines.make(self.engine, Tokenizer.load(self.tokenizer_dir), self.options.special)
        engines.give_back()
        return lambda part: _Work(self, engine, say).run(part)


class _Work:
    """One part: its documents a batch at a time to ids, to files, to a record for the journal."""

    def __init__(self, job, engine, say):
        self.job, self.options, self.engine, self.say = job, job.options, engine, say
        self.dtype = np.dtype(job.dtype)
        tokenizer = engine.tokenizer
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
