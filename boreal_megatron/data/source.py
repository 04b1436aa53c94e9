"""One indexed data set read as an endless flat stream, and the windows of bags that are cut from it.

An epoch of the stream is all non-empty documents, in that epoch's own order, one after another with their
end-of-document tokens. Where reading stands is a cursor: (epoch, raw-token offset inside that epoch's stream).
Nothing else decides what comes next, so the bag size and the window length may change at any cursor without a token
being repeated or skipped.

A window of L positions with bags of k is L + 1 neighbouring bags: bags 0..L-1 are inputs, bags 1..L targets. The
cursor moves by L bags: the next window starts at this one's last target, and a raw token is in one input bag only.
Where an epoch has fewer than L + 1 bags left, its tail is dropped and the next epoch begins.

What a bag is (`boundaries`):
    flat    the next k tokens of the stream, across documents too. A bag counts to the document of its first token.
    align   the next k tokens of one document; a document's last bag may hold fewer. A cursor inside a document folds
            what is left of it.

Shapes: k bag size, L positions, D non-empty documents of an epoch. NumPy only.
"""

import hashlib
import threading
from collections import OrderedDict
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.errors import BorealError

# A step may end one epoch and begin the next, and its windows are read after the step is planned.
EPOCHS_KEPT = 2


class Step(NamedTuple):
    """One window of the walk: it covers raw tokens [start, end) of `epoch` with its input bags, after `dropped` tokens
    of the epoch before were given up."""

    epoch: int
    start: int
    end: int
    dropped: int


class Epoch:
    """The order of one epoch and where its documents lie in the stream.

    Attributes:
        order: [D] document numbers in the file, in reading order.
        starts: int64 [D + 1], stream offset of each document, then the total.
    """

    def __init__(self, order, lengths):
        self.order = order
        self.starts = _running_sum(lengths)
        self._folded = None

    def bag_starts(self, bag_size):
        """Returns int64 [D + 1]: bags before each document when each is folded on its own, then their total."""
        folded = self._folded
        if folded is None or folded[0] != bag_size:
            folded = self._folded = bag_size, _running_sum(-(-np.diff(self.starts) // bag_size))
        return folded[1]


class Source:
    """A named data set with its reading order.

    Args:
        name: the name in the config; it takes part in the order, so two sources on one file differ.
        prefix: path without `.bin`/`.idx`.
        seed: the run's seed.
        boundaries: "flat" or "align", see the module.
        order: int array, document numbers to read in every epoch instead of a shuffled order.
        vocab_size: ids from here on are refused when they are read.
        piece_tokens: read pieces of at most so many tokens instead of whole documents; None reads documents.

    Raises:
        BorealError: the files are missing or damaged; there are no tokens; an id does not fit the vocabulary.
    """

    def __init__(self, name, prefix, seed, boundaries, *, order=None, vocab_size=None, piece_tokens=None):
        assert boundaries in ("flat", "align"), boundaries
        self.name = name
        self.prefix = prefix
        self.seed = seed
        self.boundaries = boundaries
        self.vocab_size = vocab_size
        self.piece_tokens = piece_tokens
        self.reader = IndexedReader(prefix)
        self._open_index = self.reader.open_index
        if piece_tokens is not None:
            self.reader = Pieces(self.reader, piece_tokens)
        lengths = self.reader.document_lengths
        self._fixed_order = None if order is None else order[lengths[order] > 0]
        self._epochs = OrderedDict()  # epoch number -> Epoch, the latest EPOCHS_KEPT
        self._lock = threading.Lock()  # the loader's workers read at the same time
        self._lengths = lengths if order is None else lengths[order]  # of the documents of an epoch, in no order
        self.total_tokens = int(self._lengths.sum())
        if not self.total_tokens:
            raise BorealError(f"source '{name}' ({prefix}) has no tokens. Expected: a document with text.")

    @cached_property
    def fingerprint(self):
        """sha256 of seed, name, cut and index file: a cursor means something only together with them."""
        with self._open_index() as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(f"{self.seed}/{self.name}/{self.piece_tokens}".encode())
        return digest.hexdigest()

    # ------------------------------------------------------------ order

    def epoch(self, number):
        """Returns the Epoch, the same on every rank, machine and NumPy version."""
        with self._lock:
            if number not in self._epochs:
                lengths = self.reader.document_lengths
                order = self._fixed_order
                if order is None:
                    documents = np.flatnonzero(lengths > 0).astype(np.int32)
                    order = documents[permutation(len(documents), f"{self.seed}/{self.name}/{number}")]
                self._epochs[number] = Epoch(order, lengths[order])
                while len(self._epochs) > EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def bags(self, bag_size):
        """Returns the bags of one epoch; no order changes it."""
        if self.boundaries == "flat":
            return self.total_tokens // bag_size
        return int((-(-self._lengths // bag_size)).sum())

    def check_window(self, bag_size, positions):
        """Raises BorealError if an epoch cannot fill one window."""
        bags = self.bags(bag_size)
        if bags < positions + 1:
            raise BorealError(
                f"source '{self.name}' ({self.prefix}) has {self.total_tokens:,} raw tokens, {bags:,} bags of "
                f"{bag_size}. Expected: at least {positions + 1:,} bags, one window of {positions:,} positions and the "
                "bag after it. Use a larger data set, or a smaller sequence or bag_size."
            )

    # ------------------------------------------------------------ windows

    def edges(self, epoch, offset, bag_size, positions, count):
        """Returns int64 [n + 1], the starts of the next n <= count windows of this epoch and the cursor after them."""
        assert count > 0
        if self.boundaries == "flat":
            left = (self.total_tokens - offset) // bag_size
        else:
            view = self.epoch(epoch)
            document, first = _inside(view, offset, bag_size)
            bags = view.bag_starts(bag_size)
            left = first + int(bags[-1] - bags[document + 1]) if document < len(view.order) else 0
        windows = min(count, max(0, left - 1) // positions)
        return self._bag_offsets(epoch, offset, bag_size, np.arange(windows + 1) * positions)

    def walk(self, epoch, offset, bag_size, positions, chunk):
        """Yields a Step for each window from a cursor on, without end; `chunk` windows are looked up at a time."""
        if offset > self.total_tokens:
            raise BorealError(
                f"source '{self.name}' ({self.prefix}) is to be read from token {offset:,} of an epoch, but has only "
                f"{self.total_tokens:,}. Expected: the files that the run began with. Restore them, or give the new "
                "data a new source name."
            )
        while True:
            edges = self.edges(epoch, offset, bag_size, positions, chunk)
            dropped = 0
            if len(edges) == 1:
                self.check_window(bag_size, positions)
                epoch, offset, dropped = epoch + 1, 0, self.total_tokens - offset
                edges = self.edges(epoch, offset, bag_size, positions, chunk)
                assert len(edges) > 1, (self.name, bag_size, positions)
            for start, end in pairwise(edges.tolist()):
                yield Step(epoch, start, end, dropped)
                dropped = 0
            offset = int(edges[-1])

    def read_window(self, start, bag_size, positions):
        """Reads the L + 1 bags of one window.

        Args:
            start: (epoch, offset), as the walk gives it.

        Returns:
            ids: int64 [k, L + 1]; 0 where not valid.
            valid: bool [k, L + 1]; False pads a bag at the end of its document (align only).
            document: int64 [L + 1], the place of each bag's document in the epoch: neighbours differ.
        """
        epoch, offset = start
        bags = self._bag_offsets(epoch, offset, bag_size, np.arange(positions + 2))  # [L + 2]
        raw, first, inner = self._read(epoch, int(bags[0]), int(bags[-1]))
        slot = np.arange(bag_size)[:, None]
        valid = slot < np.diff(bags)  # [k, L + 1]
        ids = raw[np.where(valid, bags[:-1] - bags[0] + slot, 0)] * valid
        document = first + np.searchsorted(inner, bags[:-1], side="right")
        return {"ids": ids, "valid": valid, "document": document}

    def _bag_offsets(self, epoch, offset, bag_size, bags):
        """Returns the stream offsets of bags, counted from the cursor (vector in, vector out)."""
        if self.boundaries == "flat":
            return offset + bags * bag_size
        view = self.epoch(epoch)
        document, first = _inside(view, offset, bag_size)
        if document == len(view.order):  # the epoch's very end
            return offset + 0 * bags
        starts, folded = view.starts, view.bag_starts(bag_size)
        # Bags of the cursor's document are counted from the cursor, all others from their document's start.
        absolute = folded[document + 1] + bags - first
        home = np.searchsorted(folded, absolute, side="right") - 1
        return np.where(bags < first, offset + bags * bag_size, starts[home] + (absolute - folded[home]) * bag_size)

    def _read(self, epoch, start, end):
        """Returns raw ids [start, end) of the stream, the first document's place, and the starts of those after it."""
        view = self.epoch(epoch)
        first = int(np.searchsorted(view.starts, start, side="right")) - 1
        last = int(np.searchsorted(view.starts, end, side="left"))
        bounds = view.starts[first : last + 1].tolist()
        parts = [
            self.reader.read(int(document), max(start, low) - low, min(end, high) - max(start, low))
            for document, (low, high) in zip(view.order[first:last], pairwise(bounds), strict=True)
        ]
        ids = np.concatenate(parts).astype(np.int64)
        if self.vocab_size is not None and (ids.min() < 0 or ids.max() >= self.vocab_size):
            self._refuse_id(view, start, ids)
        return ids, first, view.starts[first + 1 : last]

    def _refuse_id(self, view, start, ids):
        at = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        place = int(np.searchsorted(view.starts, start + at, side="right")) - 1
        raise BorealError(
            f"source '{self.name}' ({self.prefix}): document {int(view.order[place])} has id {int(ids[at])} at token "
            f"{start + at - int(view.starts[place])}. Expected: 0 to {self.vocab_size - 1} (model.vocab_size). "
            "Tokenize the data with the run's tokenizer, or raise model.vocab_size."
        )


class Pieces:
    """A reader whose documents are pieces of another reader's documents, of at most `length` tokens each."""

    def __init__(self, reader, length):
        whole = reader.document_lengths.astype(np.int64)
        counts = -(-whole // length)
        self.reader = reader
        self.document = np.repeat(np.arange(len(whole)), counts)
        self.start = (np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
        self.document_lengths = np.minimum(length, whole[self.document] - self.start)

    def __len__(self):
        return len(self.document)

    def read(self, number, offset, length):
        return self.reader.read(int(self.document[number]), int(self.start[number]) + offset, length)


def permutation(count, key):
    """Returns a permutation of range(count), int64 [count], that depends on nothing but its arguments.

    It sorts raw 64-bit words of Philox keyed by sha256(key). NumPy promises that raw words stay the same in all later
    versions, which it does not promise for `Generator.permutation`: a resumed run must not depend on an upgrade.
    """
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(words, kind="stable")


def _running_sum(values):
    """Returns int64 [n + 1]: the sum before each value, then the total."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _inside(view, offset, bag_size):
    """Returns the place of the document at a stream offset, and the bags from there to that document's end."""
    document = int(np.searchsorted(view.starts, offset, side="right")) - 1
    if document == len(view.order):
        return document, 0
    return document, -(-(int(view.starts[document + 1]) - offset) // bag_size)
