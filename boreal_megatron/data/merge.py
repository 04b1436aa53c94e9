"""Joins data sets into one: tokens, index, side-cars and description, in bounded memory.

The result is what tokenizing everything in one run writes, byte for byte: `.bin` one after another, the index
renumbered, provenance pointing into one list of files.
"""

import json
import re
from collections import Counter
from pathlib import Path

from boreal_megatron.data.blocks import Part, read_meta
from boreal_megatron.data.output import Output, write_outputs
from boreal_megatron.errors import INPUT, USAGE, BorealError, ProblemsError

# Of the description: what all parts must share, what is added up, what is listed once; `made_of` says the rest.
SAME = ("tokenizer_sha256", "vocab_size", "eod", "append_eod")
SUMS = ("text_bytes", "input_bytes", "input_files", "special_documents")
LISTS = ("inputs", "files")
OF_ONE = ("documents", "tokens", "skipped", "skipped_first", "bin_sha256", "idx_sha256", "made_of", "shard", "tst")
FIRST_SKIPPED = 20
# What the shards of one job have in common besides SAME.
JOB = ("job", "inputs", "json_key")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(_.*)?")


def merge(prefixes, out, progress=True):
    """Joins data sets in the given order into `out.bin`, `out.idx`, their side-cars and description.

    Args:
        prefixes: data sets, without `.bin`/`.idx`.
        out: prefix of the output; files of an earlier run are replaced once the new ones are whole.
        progress: a bar on stderr.

    Returns:
        {"prefix", "parts": [{"prefix", "documents", "tokens"}], "documents", "tokens", "dtype", "sidecars"}.

    Raises:
        BorealError: parts that do not belong together (everything wrong is listed), a part that is damaged, too many
            documents, no space. The final names then hold what they held before.
    """
    names = [str(prefix) for prefix in prefixes]
    same = {Path(name).resolve(): name for name in names}
    if not names:
        raise BorealError("merge: no data sets. Expected: two or more prefixes.", USAGE)
    if len(same) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise BorealError(
            f"merge: named twice: {', '.join(twice) or 'one data set by two paths'}. Expected: each once; its "
            "documents would be in the result twice. To see a source more often, give it a larger weight in the blend."
        )
    if Path(out).resolve() in same:
        raise BorealError(f"{out}: both an input and the output. Expected: another prefix for the output.")
    parts, problems = [], []
    for name in names:
        try:
            parts.append(Part(name))
        except BorealError as error:
            problems.append(str(error))
    problems += _mismatches(parts)
    if problems:
        raise ProblemsError("merge", problems, INPUT)
    output = Output(out, [(part, None) for part in parts], _joined(parts))
    write_outputs([output], "merge", progress)
    return {
        "prefix": str(out),
        "parts": [{"prefix": str(part.prefix), "documents": part.documents, "tokens": part.tokens} for part in parts],
        "documents": output.documents,
        "tokens": output.tokens,
        "dtype": output.dtype.name,
        "sidecars": sorted(output.sidecars),
    }


def merge_shards(out, progress=True):
    """Joins what a job array wrote, `OUT-00000-of-00004_text_document` and so on, into `OUT_text_document`.

    Returns:
        What `merge` does, one for each ending (`_text_document`).

    Raises:
        BorealError: there are none, one is missing, or they are not of one job.
    """
    return [merge(shards, merged, progress) for merged, shards in find_shards(out).items()]


def find_shards(out):
    """{merged prefix: its shards, in order}; raises as `merge_shards` does."""
    out = Path(out)
    found = {}  # ending -> {count: {number}}
    for path in sorted(out.parent.glob("*.idx")) if out.parent.is_dir() else []:
        match = SHARD.fullmatch(path.name.removesuffix(".idx").removeprefix(out.name))
        if path.name.startswith(out.name) and match:
            found.setdefault(match[3] or "", {}).setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        raise BorealError(
            f"{out}-*: no shards. Expected: data sets named like {out}-00000-of-00004_text_document, as "
            "`boreal data preprocess --shard` writes them. Give the --out of the array."
        )
    problems, shards = [], {}
    for ending, by_count in sorted(found.items()):
        if len(by_count) > 1:
            counts = ", ".join(str(count) for count in sorted(by_count))
            problems.append(f"{out}-*{ending}: shards of {counts}: different jobs; move away those that do not count")
            continue
        [(count, numbers)] = by_count.items()
        names = [f"{out}-{number:05}-of-{count:05}{ending}" for number in range(count)]
        problems += [
            f"{name}: no such shard, it failed or still runs; run it again, only it"
            for number, name in enumerate(names)
            if number not in numbers
        ]
        shards[f"{out}{ending}"] = names
    if not problems:
        for names in shards.values():
            metas = [(name, read_meta(name) or {}) for name in names]
            for key in JOB:
                values = [(name, meta.get(key)) for name, meta in metas]
                problems += _different(key, values, "one job: run it again whole")
    if problems:
        raise ProblemsError(f"{out}: shards", problems, INPUT)
    return shards


def _mismatches(parts):
    """What keeps parts from being one data set, one line each."""
    remedy = "one tokenizer and one way of tokenizing for all: make them again alike"
    problems = _different("dtype", [(part.prefix, part.dtype.name) for part in parts], remedy)
    described = [part for part in parts if part.meta]
    if len(described) < len(parts) and described:
        without = ", ".join(str(part.prefix) for part in parts if not part.meta)
        problems.append(
            f"without .meta.json: {without}. Expected: beside all or none, to know that one tokenizer made them; "
            "copy it there too"
        )
    for key in SAME:
        problems += _different(key, [(part.prefix, part.meta[key]) for part in described], remedy)
    return problems + _different("tst", [(part.prefix, bagging(part.meta)) for part in described], remedy)


def _different(what, values, expected):
    """[] or one line: which of the data sets have which of the different values."""
    by_value = {}
    for prefix, value in values:
        by_value.setdefault(json.dumps(value, sort_keys=True), []).append(str(prefix))
    if len(by_value) < 2:
        return []
    found = "; ".join(
        f"{value if len(value) < 80 else value[:77] + '...'} in {', '.join(names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for value, names in by_value.items()
    )
    return [f"{what}: {found}. Expected: {expected}"]


def bagging(meta):
    """The declaration of bags, without their count, which is counted anew."""
    tst = (meta or {}).get("tst")
    return {key: tst[key] for key in ("bag", "boundaries")} if tst else None


def _joined(parts):
    """The description of all parts together, without counts and checksums; None where they have none."""
    metas = [part.meta for part in parts if part.meta]
    if not metas:
        return None
    joined = {}
    for key in dict.fromkeys(key for meta in metas for key in meta):
        values = [meta[key] for meta in metas if key in meta]
        if key in SUMS:
            joined[key] = sum(values)
        elif key in LISTS:
            joined[key] = list(dict.fromkeys(value for each in values for value in each))
        elif key not in OF_ONE and all(meta.get(key) == values[0] for meta in metas):
            joined[key] = values[0]
    differing = [key for meta in metas for key in meta if key not in joined and key not in OF_ONE]
    joined["skipped"] = dict(sorted(sum((Counter(meta["skipped"]) for meta in metas), Counter()).items()))
    joined["skipped_first"] = [line for meta in metas for line in meta.get("skipped_first", [])][:FIRST_SKIPPED]
    if bagging(metas[0]):
        joined["tst"] = bagging(metas[0])
    if "job" in joined and all("shard" in meta for meta in metas):
        joined["shard"] = [0, 1]  # the job is whole again
    if "files" in joined:
        joined["input_files"] = len(joined["files"])
    joined["made_of"] = [
        {"prefix": str(part.prefix), "documents": part.documents, "tokens": part.tokens}
        | {key: part.meta[key] for key in ("bin_sha256", *differing) if key in part.meta}
        for part in parts
    ]
    return joined


def render(result):
    """Returns a `merge` result as text for people."""
    lines = [
        f"{result['prefix']}.bin: {result['documents']:,} documents, {result['tokens']:,} tokens of {result['dtype']}"
        + (f", with {', '.join(result['sidecars'])}" if result["sidecars"] else "")
    ]
    lines += [f"  {p['documents']:>14,} documents {p['tokens']:>18,} tokens  {p['prefix']}" for p in result["parts"]]
    return "\n".join(lines)
