"""What gives no document in preprocessing: counted, listed, kept on request, and an error when it is too much."""

import json
from collections import Counter

import numpy as np

from boreal_megatron.data import inputs as files
from boreal_megatron.errors import INPUT, BorealError

LISTED = 20  # shown, and never too many


class Refused:
    """What gave no document: counted, the first ones listed, too many an error.

    Attributes:
        reasons: reason -> how many.
        first: the first LISTED, as text.
    """

    def __init__(self, inputs, parts, mine, on_bad, max_bad, skip_command):
        self.inputs, self.parts, self.on_bad, self.max_bad, self.skip_command = (
            inputs,
            parts,
            on_bad,
            max_bad,
            skip_command,
        )
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
            if len(self.first) < LISTED:
                self.first.append(self._text(number, bad))
        self.reasons.update(record["bad"])
        self._limit()

    def _limit(self):
        total, seen = self.reasons.total(), self.documents + self.reasons.total()
        if total > max(LISTED, self.max_bad * seen):
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
            "json": "a JSON object with a text under the key, in UTF-8",
            "parquet": "a text in every row",
            "text": "text in UTF-8",
        }  # fmt: skip
        raise BorealError(
            f"{self._text(number, bad)}\nExpected: {expected[entry.kind]}. Correct it, or pass over such input (counted "
            f"and listed; --on-bad quarantine also keeps it) with:\n  {self.skip_command}",
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
            for place, earlier in self.dropped[:LISTED]
        ]
        if self.on_bad == "fail":
            raise BorealError(
                f"{texts[0]}; {len(self.dropped):,} such documents. Expected: ids that do not repeat. Correct them, or "
                f"keep the first of each with:\n  {self.skip_command}",
                INPUT,
            )
        self.first += texts[: LISTED - len(self.first)]
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
                file=self.inputs[bad["file"]].path, line=self._line(number, bad), offset=bad["offset"],
                reason=bad["reason"], raw_start=start, raw_bytes=bad["bytes"],
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
