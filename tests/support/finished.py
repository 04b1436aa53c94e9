"""Finished data sets for tests of the tools on them: random ones, foreign ones, with and without side-cars."""

import hashlib
import json

import numpy as np
from hypothesis import strategies as st

from boreal_megatron.data.blocks import PROVENANCE, sidecar_path
from boreal_megatron.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, bin_path, idx_path, meta_path
from boreal_megatron.data.output import files_of

EOD, VOCABULARY = 0, 50

# Documents as lists of sequences of ids: of one sequence, of several, of none, and empty ones.
documents = st.lists(
    st.lists(st.lists(st.integers(1, VOCABULARY - 1), max_size=9), max_size=3), min_size=1, max_size=12
).filter(lambda docs: any(ids for doc in docs for ids in doc))


def make(prefix, docs, dtype=np.uint16, meta=None, **sidecars):
    """Writes a data set the plain way, all in memory; `docs` as `documents` gives them; `meta` is added to its own."""
    sequences = [ids for doc in docs for ids in doc]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    index = np.cumsum([0] + [len(doc) for doc in docs], dtype=np.int64)
    tokens = np.array([t for ids in sequences for t in ids], dtype)
    bin_path(prefix).write_bytes(tokens.tobytes())
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[np.dtype(dtype)], len(sequences), len(docs) + 1)
    starts = (ends - lengths) * np.dtype(dtype).itemsize
    idx_path(prefix).write_bytes(header + lengths.tobytes() + starts.tobytes() + index.tobytes())
    for name, rows in sidecars.items():
        np.save(sidecar_path(prefix, name), rows)
    if meta is not None:
        own = {
            "documents": len(docs), "tokens": len(tokens), "text_bytes": 4 * len(tokens), "dtype": np.dtype(dtype).name,
            "vocab_size": VOCABULARY, "tokenizer_sha256": "a" * 64, "eod": EOD, "append_eod": False,
            "json_key": "text", "inputs": [f"{prefix.name}.jsonl"], "files": [f"{prefix.name}.jsonl"], "skipped": {},
            "bin_sha256": sha256(bin_path(prefix)), "idx_sha256": sha256(idx_path(prefix)),
        }  # fmt: skip
        meta_path(prefix).write_text(json.dumps(own | meta))
    return prefix


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(files, offsets):
    rows = np.zeros(len(files), PROVENANCE)
    rows["file"], rows["offset"] = files, offsets
    return rows


def read(prefix):
    """The documents of a data set as lists of sequences, read the plain way."""
    raw = idx_path(prefix).read_bytes()
    _, _, code, sequences, boundaries = HEADER.unpack(raw[: HEADER.size])
    dtype = {code: dtype for dtype, code in CODE_OF_DTYPE.items()}[code]
    lengths = np.frombuffer(raw, np.int32, sequences, HEADER.size)
    index = np.frombuffer(raw, np.int64, boundaries, HEADER.size + 12 * sequences)
    tokens = np.fromfile(bin_path(prefix), dtype)
    parts = [ids.tolist() for ids in np.split(tokens, np.cumsum(lengths)[:-1])] if sequences else []
    return [parts[a:b] for a, b in zip(index[:-1], index[1:])]


def contents(prefix):
    """{ending: bytes} of all files of a data set."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in files_of(prefix) if path.exists()}
