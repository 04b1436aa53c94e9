"""What is in an indexed dataset, and what is wrong with it: one reading finds both, in bounded memory.

`inspect` describes a dataset; `check` says what is wrong with any number of them. The `.meta.json` that preprocessing
writes beside the dataset adds the vocabulary, the end-of-document id and the checksums; without it those are left out.

D documents of a data set; d documents of a block of its index.
"""

import hashlib

import numpy as np

from boreal_megatron.data.blocks import SIDECARS, Part, bags_of, read_meta, read_sidecar, sidecar_path
from boreal_megatron.data.indexed import MAX_DOCUMENT_TOKENS, IndexedReader, idx_path
from boreal_megatron.data.progress import Bar
from boreal_megatron.errors import BorealError

QUANTILES = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
FIRST_IDS = 20
ROWS = 1 << 20  # of a side-car, looked at together
LARGEST_VOCABULARY = 1 << 20  # ids from here on are not counted one by one


def inspect(prefix, progress=False):
    """Reads a whole dataset once and returns what it holds.

    Returns:
        prefix, documents, tokens, dtype, empty_documents, duplicate_documents (those equal to another one before
        them), length_quantiles, smallest_id, largest_id, sidecars; with a description also vocab_size,
        tokenizer_sha256, eod, eod_share, documents_ending_in_eod, out_of_range_ids, meta_agrees, skipped.
        `problems` lists what is wrong, in words; an empty list is a sound dataset. `notes` lists what is worth
        knowing and does no harm.

    Raises:
        BorealError: the files are missing, damaged, or do not belong together.
    """
    part = Part(prefix)
    with Bar("inspect", part.tokens * part.dtype.itemsize, silent=not progress) as shown:
        return Scan(part, shown).report()


def check(prefixes, progress=True):
    """Reads datasets once and returns everything that is wrong with them, together.

    Returns:
        {"datasets": {prefix: what `inspect` returns, or {"prefix", "problems"} where it cannot be read},
        "documents", "tokens", "duplicate_documents" (within and between the datasets), "problems", "notes" (of all,
        each beginning with the prefix)}.
    """
    return scan_all(prefixes, "check", progress)[0]


def scan_all(prefixes, what, progress, frequencies=False):
    """Returns what `check` does, and {prefix: Scan} of those that can be read; `what` names the bar."""
    datasets, parts, scans = {}, [], {}
    for prefix in dict.fromkeys(map(str, prefixes)):
        datasets[prefix] = {"prefix": prefix, "problems": [], "notes": []}
        try:
            parts.append(Part(prefix))
        except BorealError as error:
            datasets[prefix]["problems"].append(str(error))
    duplicates = Duplicates()
    with Bar(what, sum(part.tokens * part.dtype.itemsize for part in parts), silent=not progress) as shown:
        for part in parts:
            try:
                scanned = Scan(part, shown, duplicates, frequencies)
                datasets[str(part.prefix)], scans[str(part.prefix)] = scanned.report(), scanned
            except BorealError as error:  # changed or removed since it was opened
                datasets[str(part.prefix)]["problems"].append(str(error))
    sound = [found for found in datasets.values() if "tokens" in found]
    of_all = {
        kind: [f"{prefix}: {line}" for prefix, found in datasets.items() for line in found[kind]]
        for kind in ("problems", "notes")
    }
    if len(makers := {found["tokenizer_sha256"] for found in sound if "tokenizer_sha256" in found}) > 1:
        of_all["notes"].append(f"made by {len(makers)} different tokenizers: no model can be trained on all of them")
    result = {
        "datasets": datasets,
        "documents": sum(found["documents"] for found in sound),
        "tokens": sum(found["tokens"] for found in sound),
        "duplicate_documents": duplicates.count(),
        **of_all,
    }
    return result, scans


class Duplicates:
    """Counts documents equal to another one before them, byte for byte, by 64-bit hashes.

    Exact as long as LIMIT hashes hold all documents; beyond, an estimate from those whose hash ends in `bits` zeros,
    so that memory stays bounded.
    """

    LIMIT = 1 << 25

    def __init__(self):
        self.bits, self.kept, self.size = 0, [], 0

    def add(self, hashes):
        """`hashes`: int64 `[d]`."""
        kept = hashes[hashes & ((1 << self.bits) - 1) == 0]
        self.kept.append(kept)
        self.size += kept.size
        while self.size > self.LIMIT:
            self.bits += 1
            self.kept = [a[a & ((1 << self.bits) - 1) == 0] for a in self.kept]
            self.size = sum(a.size for a in self.kept)

    def count(self):
        self.kept = [np.sort(np.concatenate([np.empty(0, np.int64), *self.kept]))]
        return int(np.count_nonzero(np.diff(self.kept[0]) == 0)) << self.bits


class Lengths:
    """How many documents have which length: exact quantiles in bounded memory, whatever the number of documents."""

    SHORT = 1 << 17  # longer ones are few: a list holds them

    def __init__(self):
        self.short, self.long = np.zeros(self.SHORT, np.int64), []

    def add(self, tokens):
        """`tokens`: int64 `[d]`."""
        counts = np.bincount(tokens[tokens < self.SHORT])
        self.short[: counts.size] += counts
        self.long.append(tokens[tokens >= self.SHORT])

    def add_all(self, other):
        """`other`: Lengths of other documents."""
        self.short += other.short
        self.long += other.long

    def counted(self):
        """(lengths, documents of each), both rising int64."""
        short = np.flatnonzero(self.short)
        long, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self.long]), return_counts=True)
        return np.concatenate([short, long]), np.concatenate([self.short[short], counts])

    def quantiles(self):
        lengths, counts = self.counted()
        ends = np.cumsum(counts)
        at = [np.searchsorted(ends, max(1, int(np.ceil(q * ends[-1])))) for q in QUANTILES.values()]
        return {name: int(lengths[i]) for name, i in zip(QUANTILES, at)}


class Scan:
    """Reads all of a `Part` once; `report()` puts it into words, other uses take the attributes.

    Attributes:
        lengths: `Lengths` of the documents.
        sidecars: {name: its rows, a memory map}.
        frequencies: int64, how often each id occurs, up to the largest or LARGEST_VOCABULARY; only if asked for.
    """

    def __init__(self, part, shown, also=None, frequencies=False):
        """`shown`: a bar to move by bytes; `also`: `Duplicates` that count these documents too."""
        self.part, meta = part, part.meta
        self.lengths, duplicates = Lengths(), Duplicates()
        self.frequencies = np.zeros(0, np.int64) if frequencies else None
        self.smallest, self.largest = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self.ends = self.ends_at_end = self.out_of_range = self.empty = self.too_long = 0
        self.problems, self.notes, self.sidecars = [], [], {}
        sha256 = hashlib.sha256()
        for block in part.blocks():
            self.lengths.add(block.tokens)
            self.empty += int(np.count_nonzero(block.tokens == 0))
            self.too_long += int(np.count_nonzero(block.tokens > MAX_DOCUMENT_TOKENS))
            hashes = _Hashes(block.tokens * part.dtype.itemsize)
            for i, j, data in part.pieces(block):
                if meta:
                    sha256.update(data)
                self._look_at(np.frombuffer(data, part.dtype), block.tokens[i:j], hashes.add(i, j, data))
                shown.update(len(data))
            for counter in (duplicates, also) if also else (duplicates,):
                counter.add(hashes.of_all())
        self.duplicates, self.estimated = duplicates.count(), duplicates.bits > 0
        self.agrees = meta and {
            "bin": sha256.hexdigest() == meta["bin_sha256"],
            "idx": _sha256(idx_path(part.prefix)) == meta["idx_sha256"],
            "documents": part.documents == meta["documents"],
            "tokens": part.tokens == meta["tokens"],
        }
        for name in (*SIDECARS, "bags"):
            self._look_beside(name)

    def _look_at(self, ids, tokens, ended):
        """`ids` of a piece with documents of `tokens [d]` tokens; `ended`: whether the last one ends with it."""
        if not ids.size:
            return
        low, high, meta = int(ids.min()), int(ids.max()), self.part.meta
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        if meta:
            self.ends += int(np.count_nonzero(ids == meta["eod"]))
            if low < 0 or high >= meta["vocab_size"]:
                self.out_of_range += int(np.count_nonzero((ids < 0) | (ids >= meta["vocab_size"])))
            last = np.array([ids.size]) if len(tokens) == 1 else np.cumsum(tokens)[tokens > 0]
            if ended:
                self.ends_at_end += int(np.count_nonzero(ids[last - 1] == meta["eod"]))
        if self.frequencies is not None:
            if low < 0 or high >= LARGEST_VOCABULARY:
                ids = ids[(ids >= 0) & (ids < LARGEST_VOCABULARY)]
            counts = np.bincount(ids, minlength=len(self.frequencies))
            counts[: len(self.frequencies)] += self.frequencies
            self.frequencies = counts

    def _look_beside(self, name):
        part, meta = self.part, self.part.meta or {}
        try:
            rows = read_sidecar(part.prefix, name, part.documents + (name == "bags"))
        except BorealError as error:
            self.problems.append(str(error))
            return
        if rows is None:
            if name == "bags" and (meta.get("tst") or {}).get("boundaries", "flat") != "flat":
                self.problems.append(f"no {sidecar_path(part.prefix, 'bags').name}, which its tst bags need")
            return
        self.sidecars[name] = rows
        wrong = self._wrong_rows(name, rows, meta)
        if wrong:
            self.problems.append(f"{sidecar_path(part.prefix, name).name}: {wrong}")

    def _wrong_rows(self, name, rows, meta):
        """What is wrong with the content of a side-car, in words, or None."""
        if name == "bags":
            return self._wrong_bags(rows, meta.get("tst"))
        if name == "provenance" and "files" not in meta:
            return "no file names ('files') in the .meta.json"
        bad = 0
        for at in range(0, len(rows), ROWS):
            some = rows[at : at + ROWS]
            if name == "weights":
                bad += int(np.count_nonzero(~(np.isfinite(some) & (some >= 0))))
            elif name == "bins":
                bad += int(np.count_nonzero(some < 0))
            else:
                inside = (some["file"] >= 0) & (some["file"] < len(meta["files"])) & (some["offset"] >= 0)
                bad += int(np.count_nonzero(~inside))
        says = {"weights": "finite and not negative", "bins": "0 or more", "provenance": "a file of the .meta.json"}
        return f"{bad:,} rows that are not {says[name]}" if bad else None

    def _wrong_bags(self, rows, tst):
        if not tst or tst["boundaries"] == "flat":
            return "counts bags of documents, of which the .meta.json's tst says nothing"
        if rows[0] != 0:
            return f"begins with {rows[0]}; expected 0"
        for block in self.part.blocks():
            counts = np.diff(rows[block.first : block.first + len(block.tokens) + 1])
            wrong = np.flatnonzero(counts != bags_of(block.tokens, tst["bag"], tst["boundaries"]))
            if wrong.size:
                at = int(wrong[0])
                return (
                    f"{counts[at]} bags of {tst['bag']} for the {block.tokens[at]:,} tokens of document "
                    f"{block.first + at} under {tst['boundaries']}"
                )
        return f"{rows[-1]:,} bags, {tst['bags']:,} in the .meta.json" if rows[-1] != tst["bags"] else None

    def report(self):
        """What `inspect` returns."""
        part, meta, problems, notes = self.part, self.part.meta, list(self.problems), list(self.notes)
        found = {
            "prefix": str(part.prefix),
            "documents": part.documents,
            "tokens": part.tokens,
            "dtype": part.dtype.name,
            "empty_documents": self.empty,
            "duplicate_documents": self.duplicates,
            "length_quantiles": self.lengths.quantiles(),
            "smallest_id": self.smallest,
            "largest_id": self.largest,
            "sidecars": sorted(self.sidecars),
            "problems": problems,
            "notes": notes,
        }
        if self.too_long:
            problems.append(
                f"{self.too_long:,} documents of more than {MAX_DOCUMENT_TOKENS:,} tokens, beyond int32 offsets"
            )
        if self.empty:
            notes.append(f"{self.empty:,} empty documents")
        if self.duplicates:
            about = "about " if self.estimated else ""
            notes.append(f"{about}{self.duplicates:,} documents equal to one before them")
        if meta is None:
            notes.append("no .meta.json beside it: vocabulary, document ends and checksums are not checked")
            return found
        found |= {
            "vocab_size": meta["vocab_size"],
            "tokenizer_sha256": meta["tokenizer_sha256"],
            "eod": meta["eod"],
            "eod_share": self.ends / part.tokens,
            "documents_ending_in_eod": self.ends_at_end,
            "out_of_range_ids": self.out_of_range,
            "meta_agrees": self.agrees,
            "skipped": meta["skipped"],
        }
        if self.out_of_range:
            problems.append(
                f"{self.out_of_range:,} ids outside 0 to {meta['vocab_size'] - 1}: another tokenizer made this, or it "
                "is damaged"
            )
        for what, same in self.agrees.items():
            if not same:
                problems.append(f"the {what} disagrees with {part.prefix}.meta.json: changed since it was written")
        if meta.get("dtype", part.dtype.name) != part.dtype.name:
            problems.append(f"ids of {part.dtype}; {meta['dtype']} in the .meta.json")
        inside = self.ends - (self.ends_at_end if meta["append_eod"] else 0)
        if inside:
            problems.append(f"{inside:,} end-of-document ids that are not at the end of a document")
        if meta["append_eod"] and self.ends_at_end != part.documents:
            problems.append(f"{part.documents - self.ends_at_end:,} documents do not end with the end-of-document id")
        return found


class _Hashes:
    """Hashes of the documents of a block from its pieces; `sizes [d]` in bytes."""

    def __init__(self, sizes):
        self.sizes, self.ends = sizes, np.cumsum(sizes)
        self.done, self.hashes, self.half = 0, np.zeros(len(sizes), np.int64), []

    def add(self, i, j, data):
        """Takes the next piece; returns whether its last document ends with it."""
        self.done += len(data)
        if len(data) != self.sizes[i:j].sum():  # one part of a long document
            self.half.append(hash(data))
            if self.done == self.ends[i]:
                self.hashes[i], self.half = hash(tuple(self.half)), []
            return self.done == self.ends[i]
        view, ends = memoryview(data), np.cumsum(self.sizes[i:j])
        starts = ends - self.sizes[i:j]
        self.hashes[i:j] = [hash(view[a:b]) for a, b in zip(starts.tolist(), ends.tolist())]
        return True

    def of_all(self):
        """int64, without the empty ones, which are counted as such."""
        return self.hashes[self.sizes > 0]


def render(report):
    """Returns an `inspect` report as text for people."""
    quantiles = "  ".join(f"{name} {value:,}" for name, value in report["length_quantiles"].items())
    lines = [
        report["prefix"],
        f"  documents      {report['documents']:,}, {report['empty_documents']:,} of them empty",
        f"  tokens         {report['tokens']:,} of {report['dtype']}",
        f"  tokens a document   {quantiles}",
        f"  ids            {report['smallest_id']:,} to {report['largest_id']:,}",
    ]
    if report["sidecars"]:
        lines.append(f"  beside it      {', '.join(report['sidecars'])}")
    if "eod" in report:
        lines += [
            f"  vocabulary     {report['vocab_size']:,}; {report['out_of_range_ids']:,} ids outside it",
            f"  document ends  id {report['eod']}, {report['eod_share']:.3%} of the tokens, "
            f"at the end of {report['documents_ending_in_eod']:,} documents",
            f"  tokenizer      sha256 {report['tokenizer_sha256'][:16]}",
            f"  checksums      {'agree' if all(report['meta_agrees'].values()) else 'DISAGREE'}",
        ]
        for reason, count in report["skipped"].items():
            lines.append(f"  passed over    {count:,} x {reason}")
    lines += [f"  note: {note}" for note in report["notes"]]
    lines += [f"  PROBLEM: {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def render_check(result):
    """Returns a `check` result as text for people."""
    count, wrong = len(result["datasets"]), len(result["problems"])
    lines = [
        f"{count:,} dataset{'s' if count != 1 else ''}: {result['documents']:,} documents, "
        f"{result['tokens']:,} tokens, {result['duplicate_documents']:,} documents equal to one before them"
    ]
    lines += [f"note: {note}" for note in result["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in result["problems"]]
    lines.append(f"{wrong:,} problem{'s' if wrong != 1 else ''}" if wrong else "nothing is wrong")
    return "\n".join(lines)


def document(prefix, i, tokenizer=None):
    """Returns document i: its number of tokens, its first ids, and with a `Tokenizer` its text.

    Raises:
        BorealError: there is no such document, or the tokenizer is not the one that made the dataset.
    """
    data, meta = IndexedReader(prefix), read_meta(prefix)
    ids = data.document(i)
    found = {"document": i, "tokens": int(ids.size), "ids": [int(t) for t in ids[:FIRST_IDS]]}
    if tokenizer is not None:
        if meta and meta["tokenizer_sha256"] != tokenizer.fingerprint:
            raise BorealError(
                f"{tokenizer.folder}: tokenizer sha256 {tokenizer.fingerprint[:16]}. Expected: "
                f"{meta['tokenizer_sha256'][:16]}, which made {prefix}. Name that tokenizer's folder."
            )
        found["text"] = tokenizer.decode(ids)
    return found


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
