"""Indexes that `boreal data prepare` made: where they lie, what they hold, and that they are what was written.

    PREFIX.index/digests.json                bytes and SHA-256 of PREFIX.idx and the side-cars, by path from its folder
    PREFIX.index/<fingerprint[:16]>/         one folder for each source and curriculum bin
        index.json                           its sizes; bytes and SHA-256 of each file beside it; written last
        epoch-E.starts                       int64 [n + 1], stream offset of each item in reading order, then the total
        epoch-E.align-K, epoch-E.drop_tail-K int64 [n + 1], bags of K before each item when each is folded on its own
        members                              int32 [M], the documents of a curriculum bin
        pieces                               int64 [M + 1], pieces before each document, where data.piece_tokens cuts

All are memory-mapped, so the ranks of a node share one copy, and nobody writes or waits during training. The first rank
of each node (LOCAL_RANK 0) reads every file once and compares its hash; the others look at names and sizes.

Shapes: n items (documents or pieces), M documents of a source. NumPy only.
"""

import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np

from boreal_megatron.errors import BorealError

INDEX = "index.json"
DIGESTS = "digests.json"


def home(prefix):
    """The folder of all indexes of a data set."""
    return Path(f"{prefix}.index")


def verifies():
    """Whether this process is the one of its node that reads files to hash them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def digest(path):
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(prefix, path):
    """SHA-256 of the index file or a side-car of a data set; read only where `verifies()`, if it was noted before.

    Raises:
        BorealError: the file is not the one that the indexes were prepared from.
    """
    path, notes = Path(path), home(prefix) / DIGESTS
    name = os.path.relpath(path, Path(prefix).parent)
    noted = json.loads(notes.read_text()).get(name) if notes.exists() else None
    if noted is None:
        return digest(path)
    if path.stat().st_size != noted["bytes"] or (verifies() and digest(path) != noted["sha256"]):
        raise BorealError(
            f"{path}: not the file that {home(prefix)} was prepared from. Expected: {noted['bytes']:,} bytes with "
            f"SHA-256 {noted['sha256'][:16]}... Restore the file, or remove that folder and run `boreal data prepare`."
        )
    return noted["sha256"]


class Prepared:
    """The prepared index of one source.

    Args:
        prefix, fingerprint: of the source.

    Attributes:
        sizes: dict: documents, items, tokens.
        files: name -> {bytes, sha256}.

    Raises:
        BorealError: a file is missing or not what was written.
    """

    def __init__(self, prefix, fingerprint):
        self.folder = home(prefix) / fingerprint[:16]
        found = json.loads((self.folder / INDEX).read_text())
        if found["fingerprint"] != fingerprint:
            raise self._refuse(INDEX, f"fingerprint {found['fingerprint'][:24]}", fingerprint[:24])
        self.sizes, self.files = found["sizes"], found["files"]
        self._maps = {}
        for name, noted in self.files.items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else None
            if size != noted["bytes"]:
                raise self._refuse(name, "missing" if size is None else f"{size:,} bytes", f"{noted['bytes']:,} bytes")
            if verifies() and (sha := digest(path)) != noted["sha256"]:
                raise self._refuse(name, f"SHA-256 {sha[:16]}...", f"{noted['sha256'][:16]}...")

    @classmethod
    def find(cls, prefix, fingerprint):
        """The index, or None where none was prepared."""
        return cls(prefix, fingerprint) if (home(prefix) / fingerprint[:16] / INDEX).exists() else None

    def _refuse(self, name, found, expected):
        return BorealError(
            f"{self.folder / name}: {found}. Expected: {expected}. Remove {self.folder} and run `boreal data prepare` "
            "again, or copy it again."
        )

    def array(self, name, dtype=np.int64):
        """Returns a file as a read-only array [n], or None where it was not prepared."""
        if name not in self.files:
            return None
        if name not in self._maps:
            with open(self.folder / name, "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[name], dtype=dtype)


def starts_name(epoch):
    return f"epoch-{epoch}.starts"


def bags_name(epoch, boundaries, bag_size):
    return f"epoch-{epoch}.{boundaries}-{bag_size}"
