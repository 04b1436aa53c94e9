"""What is in an indexed dataset: counts, document lengths, ids that should not be there, and any document as text.

The `.meta.json` that preprocessing writes beside the dataset adds the vocabulary, the end-of-document id and the
checksums; without it those lines are left out.
"""

import hashlib
import json

import numpy as np

from boreal_megatron.data.indexed import IndexedReader, bin_path, idx_path, meta_path
from boreal_megatron.errors import BorealError

QUANTILES = {"min": 0, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
BLOCK_TOKENS = 1 << 22
FIRST_IDS = 20
META_KEYS = (
    "documents", "tokens", "vocab_size", "tokenizer_sha256", "eod", "append_eod", "skipped", "bin_sha256", "idx_sha256",
)  # fmt: skip


def read_meta(prefix):
    """Returns the content of `prefix.meta.json`, or None where there is none."""
    path = meta_path(prefix)
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"a {type(meta).__name__}")
        if missing := [key for key in META_KEYS if key not in meta]:
            raise ValueError(f"without {', '.join(missing)}")
        return meta
    except (OSError, ValueError) as error:
        raise BorealError(
            f"{path}: cannot be read: {error}. Expected: the JSON object that `boreal data preprocess` writes. "
            "Copy it again, or remove it to go without."
        ) from None


def inspect(prefix):
    """Reads a whole dataset and returns what it holds.

    Returns:
        documents, tokens, dtype, empty_documents, length_quantiles, smallest_id, largest_id; with a sidecar also
        vocab_size, tokenizer_sha256, eod, eod_share, documents_ending_in_eod, out_of_range_ids, meta_agrees, skipped.
        `problems` lists what is wrong, in words; an empty list is a sound dataset.

    Raises:
        BorealError: the files are missing, damaged, or do not belong together.
    """
    data, meta = IndexedReader(prefix), read_meta(prefix)
    lengths = data.document_lengths
    smallest, largest, ends, out_of_range = None, None, 0, 0
    for start in range(0, data.total_tokens, BLOCK_TOKENS):
        block = data.tokens[start : start + BLOCK_TOKENS]
        low, high = int(block.min()), int(block.max())
        smallest = low if smallest is None else min(smallest, low)
        largest = high if largest is None else max(largest, high)
        if meta:
            ends += int(np.count_nonzero(block == meta["eod"]))
            if low < 0 or high >= meta["vocab_size"]:
                out_of_range += int(np.count_nonzero((block < 0) | (block >= meta["vocab_size"])))
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    report = {
        "prefix": str(prefix),
        "documents": len(data),
        "tokens": data.total_tokens,
        "dtype": data.dtype.name,
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "length_quantiles": {name: int(value) for name, value in zip(QUANTILES, quantiles)},
        "smallest_id": smallest,
        "largest_id": largest,
        "problems": [],
    }
    if meta is None:
        return report
    last = np.cumsum(lengths)[lengths > 0] - 1
    agrees = {
        "bin": _sha256(bin_path(prefix)) == meta["bin_sha256"],
        "idx": _sha256(idx_path(prefix)) == meta["idx_sha256"],
        "documents": len(data) == meta["documents"],
        "tokens": data.total_tokens == meta["tokens"],
    }
    report |= {
        "vocab_size": meta["vocab_size"],
        "tokenizer_sha256": meta["tokenizer_sha256"],
        "eod": meta["eod"],
        "eod_share": ends / data.total_tokens,
        "documents_ending_in_eod": int(np.count_nonzero(data.tokens[last] == meta["eod"])),
        "out_of_range_ids": out_of_range,
        "meta_agrees": agrees,
        "skipped": meta["skipped"],
    }
    if out_of_range:
        report["problems"].append(
            f"{out_of_range:,} ids outside 0 to {meta['vocab_size'] - 1}: another tokenizer made this, or it is damaged"
        )
    for what, same in agrees.items():
        if not same:
            report["problems"].append(f"the {what} disagrees with {prefix}.meta.json: changed since it was written")
    expected_ends = report["documents_ending_in_eod"] if meta["append_eod"] else 0
    if ends != expected_ends:
        report["problems"].append(f"{ends - expected_ends:,} end-of-document ids that are not at the end of a document")
    if meta["append_eod"] and expected_ends != len(data):
        report["problems"].append(f"{len(data) - expected_ends:,} documents do not end with the end-of-document id")
    return report


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
    else:
        lines.append("  no .meta.json beside it: vocabulary, document ends and checksums are not checked")
    lines += [f"  PROBLEM: {problem}" for problem in report["problems"]]
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
