"""One indexed data set read as an endless flat stream, and the windows of bags that are cut from it.

An epoch of the stream is all documents, in that epoch's own order, one after another with their end-of-document tokens.
Where reading stands is a cursor: (epoch, raw-token offset inside that epoch's stream). Nothing else decides what comes
next, so the bag size and the window length may change at any cursor without a token being repeated or skipped.

A window of L positions with bags of k is L + 1 neighbouring bags: bags 0..L-1 are inputs, bags 1..L targets. The cursor
moves by L bags: the next window starts at this one's last target, and a raw token is in one input bag only. Where an
epoch has fewer than L + 1 bags left, its tail is dropped and the next epoch begins.

What a bag is (`boundaries`):
    flat       the next k tokens of the stream, across documents too. A bag counts to the document of its first token.
    align      the next k tokens of one document; a document's last bag may hold fewer. A cursor inside a document folds
               what is left of it.
    drop_tail  the next k tokens of one document; what is left of it after its last full bag is dropped.

What is shuffled are items: documents, or pieces of them. The order is arithmetic (`shuffle.py`); where each item begins
in the stream is an array, made beforehand by `boreal data prepare` (`prepared.py`) and memory-mapped, or made here in
memory while there are at most MEMORY_ITEMS of them.

How far the numbers go, for 15e12 tokens of int32 ids:
    samples           1.83e9 windows of 8,192: 85% of int32, and 3.7e9 of 4,096 are beyond it. Here a window is a
                      cursor, and windows are counted in Python's integers: no limit.
    offsets           tokens and bytes (6e13) in int64: 9.2e18.
    one document      below 2^31 tokens: lengths in the .idx are int32. Refused by `indexed.py` where sequences add up.
    one data set      below 2^31 documents, which megatron-core numbers in int32: 3.4e9 documents of 4,400 tokens are
                      two data sets. Refused by `indexed.py`.
    items             below 2^62 (`shuffle.py`); an item and its place in a block are packed in 32 bits each
                      (`prepare.py`).
    blend             raw tokens of a phase as float64: exact below 2^53 = 9.0e15. Asserted by `sampler.plan`.
    one packed row    positions in int32: below 2^31. Asserted by `batch.make`.

Shapes: k bag size, L positions, D documents of the file, n items of an epoch. NumPy only.
"""

import hashlib
import threading
from collections import OrderedDict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boreal_megatron.data import remote
from boreal_megatron.data.indexed import IndexedReader, idx_path
from boreal_megatron.data.prepared import Prepared, bags_name, digest, home, known_digest, starts_name, verifies
from boreal_megatron.data.shuffle import Permutation
from boreal_megatron.errors import BorealError

# A step may end one epoch and begin the next, and its windows are read after the step is planned.
EPOCHS_KEPT = 2
MEMORY_ITEMS = 20_000_000  # 160 MB for each epoch on every rank; beyond it the index is prepared
CHUNK = 1 << 16  # items looked at at a time


class Step(NamedTuple):
    """One window of the walk: it covers raw tokens [start, end) of `epoch` and reads `read` of them into input bags.
    `dropped` tokens since the window before were given up, in this epoch or at the end of the one before."""

    epoch: int
    start: int
    end: int
    read: int
    dropped: int


class Epoch:
    """The order of one epoch and where its items lie in the stream.

    Attributes:
        starts: int64 [n + 1], stream offset of each item, then the total.
    """

    def __init__(self, source, number):
        self._source, self._number = source, number
        self._order = source.permutation(number)
        self._folded = None
        prepared = source.prepared and source.prepared.array(starts_name(number))
        if prepared is not None:
            self.starts = prepared
        else:
            source.need(f"epoch {number}")
            self.starts = _running_sum(source.lengths(self.items(np.arange(source.items))))

    def items(self, places):
        """Returns int64 [..]: the items that are read at these places."""
        return places if self._order is None else self._order(places)

    def bag_starts(self, bag_size):
        """Returns int64 [n + 1]: bags before each item when each is folded on its own, then their total."""
        folded = self._folded
        if folded is None or folded[0] != bag_size:
            source = self._source
            name = bags_name(self._number, source.boundaries, bag_size)
            bags = source.prepared and source.prepared.array(name)
            if bags is None:
                source.need(f"epoch {self._number} in bags of {bag_size}")
                bags = _running_sum(fold(np.diff(self.starts), bag_size, source.boundaries))
            folded = self._folded = bag_size, bags
        return folded[1]


def fold(lengths, bag_size, boundaries):
    """Bags of each item (`boundaries` "align" or "drop_tail"); an array, or a number."""
    return -(-lengths // bag_size) if boundaries == "align" else lengths // bag_size


class Source:
    """A named data set with its reading order.

    Args:
        name: the name in the config, NAME or NAME/BIN; it takes part in the order, so two sources on one file differ.
        prefix: path without `.bin`/`.idx`.
        seed: the run's seed.
        boundaries: "flat", "align" or "drop_tail", see the module.
        order: int array, document numbers to read in every epoch instead of a shuffled order.
        vocab_size: ids from here on are refused when they are read.
        piece_tokens: read pieces of at most so many tokens instead of whole documents; None reads documents.
        epochs: at most so many may begin; None: any number.
        weights: path of float32 [D] in .npy, what a target counts in the loss by its document; None: 1.
        bins: (path of an integer [D] in .npy, bin): only the documents of that bin are read.
        tokens: False opens the .idx only, for planning.

    Raises:
        BorealError: the files are missing or damaged; there are no tokens; an id does not fit the vocabulary.
    """

    def __init__(
        self, name, prefix, seed, boundaries, *, order=None, vocab_size=None, piece_tokens=None, epochs=None,
        weights=None, bins=None, tokens=True,
    ):  # fmt: skip
        assert boundaries in ("flat", "align", "drop_tail"), boundaries
        self.name = name
        self.prefix = prefix
        self.seed = seed
        self.boundaries = boundaries
        self.vocab_size = vocab_size
        self.piece_tokens = piece_tokens
        self.epochs = epochs
        self.reader = IndexedReader(prefix, index_only=not tokens)
        self._order = order
        self._sidecars = {"weights": weights, "bins": bins and bins[0]}
        self._bin = bins and bins[1]
        self._bins = bins and open_bins(bins[0], self.reader)
        self._weights = weights and open_weights(weights, self.reader)
        self._bags = {}  # bag size -> bags of an epoch
        self._epochs = OrderedDict()  # epoch number -> Epoch, the latest EPOCHS_KEPT
        self._lock = threading.Lock()  # the loader's workers read at the same time
        if not self.total_tokens:
            raise BorealError(f"source '{name}' ({prefix}) has no tokens. Expected: a document with text.")

    @cached_property
    def fingerprint(self):
        """sha256 of seed, name, cut, index file and side-cars: a cursor means something only together with them."""
        if remote.is_url(self.prefix):
            with self.reader.open_index() as file:
                digests = [hashlib.file_digest(file, "sha256").hexdigest(), *map(digest, self.files[1:])]
        else:
            digests = [known_digest(self.prefix, path) for path in self.files]
        index, *sidecars = digests
        kinds = [kind for kind, path in self._sidecars.items() if path is not None]
        key = f"{index}/{self.seed}/{self.name}/{self.piece_tokens}"
        key += "".join(f"/{kind} {sha}" for kind, sha in zip(kinds, sidecars, strict=True))
        return hashlib.sha256(key.encode()).hexdigest()

    @property
    def files(self):
        """What the fingerprint is of: the index file, and the side-cars that there are."""
        return [idx_path(self.prefix), *(path for path in self._sidecars.values() if path is not None)]

    @property
    def binned(self):
        return self._bins is not None

    @cached_property
    def prepared(self):
        """What `boreal data prepare` made for this source, or None."""
        if self._order is not None or remote.is_url(self.prefix) or not home(self.prefix).exists():
            return None
        return Prepared.find(self.prefix, self.fingerprint)

    def need(self, what):
        """Raises BorealError if so much may not be made in memory."""
        if self.items > MEMORY_ITEMS:
            kind = "pieces" if self.piece_tokens else "documents"
            raise BorealError(
                f"source '{self.name}' ({self.prefix}) has {self.items:,} {kind}; {what} has no prepared index. "
                f"Expected: one, for more than {MEMORY_ITEMS:,}. Run `boreal data prepare CONFIG`."
            )

    # ------------------------------------------------------------ items

    def document_chunks(self):
        """Yields (document numbers, lengths), int64 [..] each, of all documents in the file's or the fixed order, in
        bounded memory."""
        fixed = self._order
        for first in range(0, len(self.reader) if fixed is None else len(fixed), CHUNK):
            if fixed is not None:
                numbers = fixed[first : first + CHUNK]
            else:
                numbers = np.arange(first, min(first + CHUNK, len(self.reader)))
                if self._bins is not None:
                    numbers = numbers[self._bins[numbers] == self._bin]
            if len(numbers):
                yield numbers, self.reader.document_lengths[numbers].astype(np.int64)
            self.reader.release()

    def pieces(self, lengths):
        """Items that documents of these lengths make."""
        return np.ones_like(lengths) if self.piece_tokens is None else fold(lengths, self.piece_tokens, "align")

    @cached_property
    def _sizes(self):
        """Documents, items and tokens of one epoch."""
        if self.prepared:
            return self.prepared.sizes
        documents = items = tokens = 0
        for _, lengths in self.document_chunks():
            documents, items, tokens = (
                documents + len(lengths),
                items + int(self.pieces(lengths).sum()),
                tokens + int(lengths.sum()),
            )
        return {"documents": documents, "items": items, "tokens": tokens}

    @property
    def documents(self):
        return self._sizes["documents"]

    @property
    def items(self):
        return self._sizes["items"]

    @property
    def total_tokens(self):
        return self._sizes["tokens"]

    @cached_property
    def _members(self):
        """Document numbers in the file, [M], of a fixed order or a bin; None: all of the file."""
        if self._order is not None or self._bins is None:
            return self._order
        prepared = self.prepared and self.prepared.array("members", np.int32)
        if prepared is None:
            self.need("its bin")
            prepared = np.concatenate([numbers for numbers, _ in self.document_chunks()])
        return prepared

    @cached_property
    def _piece_starts(self):
        """int64 [M + 1], pieces before each document, then their total; None: items are documents."""
        if self.piece_tokens is None:
            return None
        prepared = self.prepared and self.prepared.array("pieces")
        if prepared is None:
            self.need("its cut into pieces")
            prepared = _running_sum(np.concatenate([self.pieces(lengths) for _, lengths in self.document_chunks()]))
        return prepared

    def locate(self, items):
        """Returns the documents of items and the tokens before them in their documents, int64 [..] each."""
        members, cuts = self._members, self._piece_starts
        place, offset = items, np.zeros_like(items)
        if cuts is not None:
            place = np.searchsorted(cuts, items, side="right") - 1
            offset = (items - cuts[place]) * self.piece_tokens
        return (place if members is None else members[place].astype(np.int64)), offset

    def lengths(self, items):
        """Returns int64 [..], tokens of items."""
        document, offset = self.locate(items)
        lengths = self.reader.document_lengths[document] - offset
        return lengths if self.piece_tokens is None else np.minimum(lengths, self.piece_tokens)

    # ------------------------------------------------------------ order

    def permutation(self, epoch):
        """The order of an epoch's items, the same on every rank, machine and NumPy version; None: as they lie."""
        return None if self._order is not None else Permutation(self.items, f"{self.seed}/{self.name}/{epoch}")

    def epoch(self, number):
        """Returns the Epoch."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = Epoch(self, number)
                while len(self._epochs) > EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def bags(self, bag_size):
        """Returns the bags of one epoch; no order changes it."""
        if self.boundaries == "flat":
            return self.total_tokens // bag_size
        folded = self.prepared and self.prepared.array(bags_name(0, self.boundaries, bag_size))
        if folded is not None:
            return int(folded[-1])
        if bag_size not in self._bags:
            chunks = self.document_chunks()
            self._bags[bag_size] = sum(int(self._fold(lengths, bag_size).sum()) for _, lengths in chunks)
        return self._bags[bag_size]

    def _fold(self, lengths, bag_size):
        """Bags of documents."""
        if self.piece_tokens is None:
            return fold(lengths, bag_size, self.boundaries)
        whole = lengths // self.piece_tokens * fold(self.piece_tokens, bag_size, self.boundaries)
        return whole + fold(lengths % self.piece_tokens, bag_size, self.boundaries)

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
            document, first = self._inside(view, offset, bag_size)
            bags = view.bag_starts(bag_size)
            left = first + int(bags[-1] - bags[document + 1]) if document < self.items else 0
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
        dropped = 0
        while True:
            edges = self.edges(epoch, offset, bag_size, positions, chunk)
            if len(edges) == 1:
                self.check_window(bag_size, positions)
                dropped += self.total_tokens - offset
                epoch, offset = epoch + 1, 0
                edges = self.edges(epoch, offset, bag_size, positions, chunk)
                assert len(edges) > 1, (self.name, bag_size, positions)
            for start, end in pairwise(edges.tolist()):
                # A document's tail that `drop_tail` leaves out lies before the first window or inside of a window.
                read = bag_size * positions if self.boundaries == "drop_tail" else end - start
                yield Step(epoch, start, end, read, dropped + end - offset - read)
                dropped, offset = 0, end

    def read_window(self, start, bag_size, positions):
        """Reads the L + 1 bags of one window.

        Args:
            start: (epoch, offset), as the walk gives it.

        Returns:
            ids: int64 [k, L + 1]; 0 where not valid.
            valid: bool [k, L + 1]; False pads a bag at the end of its document (align only).
            weight: fp32 [k, L + 1]; what each token counts as a target, 0 where not valid.
            document: int64 [L + 1], the place of each bag's document in the epoch: neighbours differ.
        """
        epoch, offset = start
        bags = self._bag_offsets(epoch, offset, bag_size, np.arange(positions + 2))  # [L + 2]
        end = int(bags[-2]) + bag_size if self.boundaries == "drop_tail" else int(bags[-1])
        raw, weight, first, inner = self._read(epoch, int(bags[0]), end)
        slot = np.arange(bag_size)[:, None]
        valid = slot < np.diff(bags)  # [k, L + 1]
        at = np.where(valid, bags[:-1] - bags[0] + slot, 0)
        document = first + np.searchsorted(inner, bags[:-1], side="right")
        return {"ids": raw[at] * valid, "valid": valid, "weight": weight[at] * valid, "document": document}

    def spans(self, epoch, start, end):
        """What raw tokens [start, end) of an epoch's stream are.

        Returns:
            documents, offsets, tokens: int64 [m] each; numbers in the file, where reading begins in each, how much.
            first: the place of the first of them in the epoch.
            inner: int64 [m - 1], the stream offsets at which the later ones begin.
        """
        view = self.epoch(epoch)
        first = int(np.searchsorted(view.starts, start, side="right")) - 1
        last = int(np.searchsorted(view.starts, end, side="left"))
        bounds = np.clip(view.starts[first : last + 1], start, end)
        documents, offsets = self.locate(view.items(np.arange(first, last)))
        offsets = offsets + bounds[:-1] - view.starts[first:last]
        return documents, offsets, np.diff(bounds), first, view.starts[first + 1 : last]

    def _bag_offsets(self, epoch, offset, bag_size, bags):
        """Returns the stream offsets of bags, counted from the cursor (vector in, vector out)."""
        if self.boundaries == "flat":
            return offset + bags * bag_size
        view = self.epoch(epoch)
        document, first = self._inside(view, offset, bag_size)
        if document == self.items:  # the epoch's very end
            return offset + 0 * bags
        starts, folded = view.starts, view.bag_starts(bag_size)
        # Bags of the cursor's document are counted from the cursor, all others from their document's start.
        absolute = folded[document + 1] + bags - first
        home = np.searchsorted(folded, absolute, side="right") - 1
        return np.where(bags < first, offset + bags * bag_size, starts[home] + (absolute - folded[home]) * bag_size)

    def _inside(self, view, offset, bag_size):
        """Returns the place of the item at a stream offset, and the bags from there to that item's end."""
        place = int(np.searchsorted(view.starts, offset, side="right")) - 1
        if place == self.items:
            return place, 0
        return place, fold(int(view.starts[place + 1]) - offset, bag_size, self.boundaries)

    def _read(self, epoch, start, end):
        """Returns raw ids [start, end) of the stream, their weights, the first item's place, and the starts of those
        after it."""
        documents, offsets, tokens, first, inner = self.spans(epoch, start, end)
        parts = zip(documents.tolist(), offsets.tolist(), tokens.tolist(), strict=True)
        ids = np.concatenate([self.reader.read(*part) for part in parts]).astype(np.int64)
        if self.vocab_size is not None and (ids.min() < 0 or ids.max() >= self.vocab_size):
            self._refuse_id(ids, documents, offsets, tokens)
        weight = np.ones(len(documents), np.float32) if self._weights is None else self._weights[documents]
        return ids, np.repeat(weight, tokens), first, inner

    def _refuse_id(self, ids, documents, offsets, tokens):
        at = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        part = int(np.searchsorted(np.cumsum(tokens), at, side="right"))
        token = int(offsets[part]) + at - int(tokens[:part].sum())
        raise BorealError(
            f"source '{self.name}' ({self.prefix}): document {int(documents[part])} has id {int(ids[at])} at token "
            f"{token}. Expected: 0 to {self.vocab_size - 1} (model.vocab_size). "
            "Tokenize the data with the run's tokenizer, or raise model.vocab_size."
        )


def open_weights(path, reader):
    """Returns float32 [D], memory-mapped; the first rank of each node looks at every weight."""
    weights = _sidecar(path, reader, "float32", lambda dtype: dtype == np.float32)
    total = 0.0
    for first in range(0, len(weights) if verifies() else 0, CHUNK):
        part = weights[first : first + CHUNK]
        wrong = np.flatnonzero(~(np.isfinite(part) & (part >= 0)))
        if wrong.size:
            at = int(wrong[0])
            raise BorealError(
                f"{path}: document {first + at} has weight {part[at]}. Expected: finite weights of 0 or more; 0 leaves "
                "a document out of the loss. Correct the file."
            )
        total += float(part.sum(dtype=np.float64))
    if verifies() and not total:
        raise BorealError(f"{path}: all weights are 0, so nothing would be learned. Expected: some above 0.")
    return weights


def open_bins(path, reader):
    """Returns an integer array [D], memory-mapped."""
    return _sidecar(path, reader, "an integer dtype", lambda dtype: dtype.kind in "iu")


def bin_names(path, reader):
    """Returns the bins that documents have, sorted ints."""
    bins, found = open_bins(path, reader), set()
    for first in range(0, len(bins), CHUNK):
        found.update(np.unique(bins[first : first + CHUNK]).tolist())
    return sorted(found)


def _sidecar(path, reader, kind, fits):
    if not Path(path).is_file():
        raise BorealError(f"{path}: no such file. Expected: a .npy of {kind}, one entry for each document.")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise BorealError(f"{path}: not a .npy file ({error}). Expected: {kind}, one for each document.") from None
    if values.shape != (len(reader),) or not fits(values.dtype):
        raise BorealError(
            f"{path}: {values.dtype} {list(values.shape)}. Expected: {kind} [{len(reader)}], one for each document "
            f"of {reader.prefix}. Make it for this data set."
        )
    return values


def _running_sum(values):
    """Returns int64 [n + 1]: the sum before each value, then the total."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums
