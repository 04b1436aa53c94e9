"""Some documents of a data set as data sets of their own: `split` into several, `sample` one.

Without a seed documents are taken in file order. With one, document i is placed by a 64-bit hash of (seed, i), and a
part is an interval of hashes: where a document falls depends on no other document, a smaller sample lies within a
larger one, and nothing is kept in memory. The documents of a part keep their order.

d documents of a block of the index.
"""

import functools
import itertools
import os

import numpy as np

from boreal_megatron.data.blocks import Part
from boreal_megatron.data.merge import OF_ONE, SUMS, bagging
from boreal_megatron.data.output import Output, write_outputs
from boreal_megatron.errors import USAGE, BorealError, ProblemsError

SPACE = 1 << 64  # hashes
COARSE = 16  # leading bits of a hash that are counted first


def split(prefix, outs, seed=None, progress=True):
    """Divides a data set; each of its documents is in exactly one part, side-cars follow.

    Args:
        prefix: the data set.
        outs: {prefix of a part: its share}, all fractions or all numbers of documents; None once, for the rest.
        seed: of the hash that places the documents; None for parts in file order.
        progress: a bar on stderr.

    Returns:
        {"prefix", "seed", "documents", "tokens", "parts": [{"prefix", "documents", "tokens"}]}. Numbers of documents
        are exact; fractions under a seed are of the hashes, so that the counts differ from them by chance.

    Raises:
        BorealError: shares that do not make up the whole, a part without tokens, side-cars of another length, no
            space. The final names then hold what they held before.
    """
    part = Part(prefix)
    _refuse_same([prefix, *outs])
    by_documents, ends = _ends(prefix, list(outs.values()), part.documents)
    if seed is None:
        place, ends = _in_order, ends if by_documents else [round(end * part.documents) for end in ends]
    else:
        place = functools.partial(_hashed, seed)
        if by_documents:
            ends = [_hash_of(part, seed, end) + 1 for end in ends[:-1]] + [SPACE]
        else:
            ends = [round(end * SPACE) for end in ends]
    keeps = {str(name): place(begin, end) for name, (begin, end) in zip(outs, itertools.pairwise([0, *ends]))}
    return _write(part, seed, keeps, {str(name): share for name, share in outs.items()}, "split", progress)


def sample(prefix, out, *, documents=None, tokens=None, fraction=None, seed=0, progress=True):
    """Takes a reproducible subset of the documents, in their order; side-cars follow.

    Args:
        prefix: the data set.
        out: prefix of the subset.
        documents, tokens, fraction: its size, one of the three: exactly so many documents, as few documents as reach
            so many tokens, or each document with this chance. A smaller sample of a seed lies within a larger one.
        seed: of the hash that places the documents.
        progress: a bar on stderr.

    Returns:
        As `split`, with one part.

    Raises:
        BorealError: a size that the data set does not have; as `split`.
    """
    sizes = {"documents": documents, "tokens": tokens, "fraction": fraction}
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise BorealError(f"sample: sizes given: {found}. Expected: one of documents, tokens, fraction.", USAGE)
    [(name, size)] = given.items()
    part = Part(prefix)
    whole = {"documents": part.documents, "tokens": part.tokens, "fraction": 1.0}[name]
    if not 0 < size <= whole or name != "fraction" and size != int(size):
        kind = "a number" if name == "fraction" else "a whole number"
        raise BorealError(f"{prefix}: a sample of {name}={size}. Expected: {kind} above 0, at most {whole:,}.")
    _refuse_same([prefix, out])
    end = round(size * SPACE) if name == "fraction" else _hash_of(part, seed, int(size), of_tokens=name == "tokens") + 1
    return _write(part, seed, {str(out): _hashed(seed, 0, end)}, {str(out): {name: size}}, "sample", progress)


def _write(part, seed, keeps, shares, what, progress):
    outputs = []
    for name, keep in keeps.items():
        meta = part.meta and {key: value for key, value in part.meta.items() if key not in OF_ONE}
        if meta:
            of = {"prefix": str(part.prefix), "bin_sha256": part.meta["bin_sha256"]}
            # Bytes of text and lines passed over are known of the whole only.
            meta = {key: value for key, value in meta.items() if key not in (*SUMS, "job")}
            meta |= {"skipped": {}, "made_of": [of | {what: shares[name], "seed": seed}]}
            meta |= {"tst": bagging(part.meta)} if bagging(part.meta) else {}
        outputs.append(Output(name, [(part, keep)], meta))
    write_outputs(outputs, what, progress)
    return {
        "prefix": str(part.prefix),
        "seed": seed,
        "documents": part.documents,
        "tokens": part.tokens,
        "parts": [{"prefix": str(o.prefix), "documents": o.documents, "tokens": o.tokens} for o in outputs],
    }


def _refuse_same(names):
    paths = [os.path.realpath(name) for name in names]
    twice = [str(name) for name, path in zip(names, paths) if paths.count(path) > 1]
    if twice:
        raise BorealError(f"{', '.join(twice)}: the same data set. Expected: other prefixes for what is written.")


def _ends(prefix, shares, documents):
    """Whether shares are numbers of documents, not fractions; and where each ends, one after another."""
    known = [share for share in shares if share is not None]
    by_documents = all(isinstance(share, int) for share in known)
    whole, kind = (documents, "documents") if by_documents else (1.0, "of the whole")
    problems = [f"a share of {share}; expected more than 0" for share in known if not share > 0]
    if not by_documents and any(isinstance(share, int) for share in known):
        problems.append("fractions and numbers of documents; expected one kind: 0.01, or 1000")
    elif not known or len(known) < len(shares) - 1:
        problems.append("the rest given to several parts; expected to one at most, and a share for the others")
    else:
        rest = whole - sum(known)
        rest = 0 if abs(rest) < 1e-9 else rest
        if len(known) < len(shares) and rest <= 0:
            problems.append(f"{sum(known):,} {kind}, and the rest; expected less than {whole:,}, to leave a rest")
        elif len(known) == len(shares) and rest:
            problems.append(f"{sum(known):,} {kind} together; expected {whole:,}, or one part that takes the rest")
    if problems:
        raise ProblemsError(f"{prefix}: split", problems, USAGE)
    ends = list(itertools.accumulate(rest if share is None else share for share in shares))
    return by_documents, [*ends[:-1], whole]


def _in_order(begin, end):
    """Which documents of a block are numbers `begin` to `end`."""

    def keep(block):
        number = block.first + np.arange(len(block.tokens))
        return (number >= begin) & (number < end)

    return keep


def _hashed(seed, begin, end):
    """Which documents of a block have hashes from `begin` to `end`, in 0..SPACE."""

    def keep(block):
        hashes = hashes_of(seed, block.first, len(block.tokens))
        return (hashes >= np.uint64(begin)) & (hashes <= np.uint64(end - 1)) if end > begin else hashes != hashes

    return keep


def hashes_of(seed, first, count):
    """Hashes of documents `first` to `first + count`: uint64 `[count]`, no two alike under one seed.

    SplitMix64 (Steele, Lea, Flood 2014) of the document's number, shifted by that of the seed.
    """
    shift = _mix(np.array([seed % SPACE], np.uint64))
    return _mix(np.arange(first, first + count, dtype=np.uint64) + shift)


def _mix(x):
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_of(part, seed, amount, of_tokens=False):
    """The hash up to which the documents reach `amount` documents, or tokens: two passes, the second over few."""

    def hashed():
        for block in part.blocks():
            hashes = hashes_of(seed, block.first, len(block.tokens))
            yield hashes, hashes >> np.uint64(64 - COARSE), block.tokens if of_tokens else np.ones_like(block.tokens)

    sums = np.zeros(1 << COARSE, np.int64)
    for _, coarse, sizes in hashed():
        np.add.at(sums, coarse, sizes)
    sums = np.cumsum(sums)
    at = int(np.searchsorted(sums, amount))
    inside = [(hashes[coarse == at], sizes[coarse == at]) for hashes, coarse, sizes in hashed()]
    hashes, sizes = (np.concatenate(arrays) for arrays in zip(*inside))
    order = np.argsort(hashes)
    before = int(sums[at - 1]) if at else 0
    return int(hashes[order][np.searchsorted(before + np.cumsum(sizes[order]), amount)])


def render(result):
    """Returns a `split` or `sample` result as text for people."""
    lines = [f"{result['prefix']}: {result['documents']:,} documents, {result['tokens']:,} tokens"]
    for p in result["parts"]:
        lines.append(
            f"  {p['documents']:>14,} documents ({p['documents'] / result['documents']:.3%}) "
            f"{p['tokens']:>18,} tokens ({p['tokens'] / result['tokens']:.3%})  {p['prefix']}"
        )
    return "\n".join(lines)
