"""One HTML page about data sets: what each holds, what all hold together, and what is wrong, in plots and tables.

Needs matplotlib, of the `plot` extra.
"""

import html
from pathlib import Path

import numpy as np

from boreal_megatron import page
from boreal_megatron.data.indexed import write_errors
from boreal_megatron.data.inspect import ROWS, Lengths, render_check, scan_all
from boreal_megatron.durable import write_atomically
from boreal_megatron.errors import BorealError, ProblemsError

CURVES = 6  # in one plot; the largest sources
TOP_TOKENS = 30
FILES_LISTED = 50
MARKERS = ("o", "s", "^", "D", "v", "x")


def report(prefixes, out_html, tokenizer=None, progress=True):
    """Reads datasets once and writes a page about them.

    Args:
        prefixes: the datasets.
        out_html: the file to write; an earlier one is replaced.
        tokenizer: a `Tokenizer`, to show tokens as text; it must be the one that made them.
        progress: a bar on stderr.

    Returns:
        What `check` returns, and "html", and "unused_vocabulary" {prefix: share of its ids that never occur}.

    Raises:
        BorealError: no matplotlib, another tokenizer, nothing that can be read, the page cannot be written.
    """
    page.need_matplotlib("report")
    result, scans = scan_all(prefixes, "report", progress, frequencies=True)
    if not scans:
        raise ProblemsError("report: no dataset can be read", result["problems"] or ["none given"])
    for prefix, scanned in scans.items():
        made_by = (scanned.part.meta or {}).get("tokenizer_sha256")
        if tokenizer and made_by and made_by != tokenizer.fingerprint:
            raise BorealError(
                f"{tokenizer.folder}: tokenizer sha256 {tokenizer.fingerprint[:16]}. Expected: {made_by[:16]}, which "
                f"made {prefix}. Name that tokenizer's folder, or go without."
            )
    write(Path(out_html), "".join(_page(result, scans, tokenizer)))
    sizes = {prefix: _vocabulary(scanned, tokenizer) for prefix, scanned in scans.items()}
    unused = {prefix: _unused(scans[prefix].frequencies, size) for prefix, size in sizes.items() if size}
    return {**result, "html": str(out_html), "unused_vocabulary": unused}


def render(result):
    """Returns a `report` result as text for people."""
    return f"{render_check(result)}\n{result['html']}: open it in a browser"


def write(path, text):
    """Writes the page, whole or not at all."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(path, page.ascii_only(text))
        except BaseException:
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
            raise


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(result, scans, tokenizer):
    yield page.head("Data report")
    if result["problems"]:
        lines = "".join(f"<li>{html.escape(problem)}</li>" for problem in result["problems"])
        yield f'<div class="problems"><h2>Problems ({len(result["problems"]):,})</h2><ul>{lines}</ul></div>\n'
    else:
        yield "<p>Nothing is wrong with these datasets.</p>\n"
    names = _short_names(scans)
    lengths = Lengths()
    for scanned in scans.values():
        lengths.add_all(scanned.lengths)
    yield _summary(result, scans, names, tokenizer)
    if result["notes"]:
        yield "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in result["notes"]) + "</ul>\n"
    if len(scans) > CURVES:
        yield f"<p>Plots show the {CURVES} largest of the {len(scans)} sources.</p>\n"
    yield _lengths_section(scans, names, lengths)
    yield _tokens_section(scans, names, tokenizer)
    yield _sidecar_section("weights", "Loss weights", "loss weight of the document", scans, names)
    yield _sidecar_section("bins", "Curriculum bins", "curriculum bin of the document", scans, names)
    yield _skipped_section(scans, names)
    yield _provenance_section(scans, names)
    yield page.END


def _summary(result, scans, names, tokenizer):
    rows = []
    for prefix, scanned in scans.items():
        found, meta = result["datasets"][prefix], scanned.part.meta or {}
        size = _vocabulary(scanned, tokenizer)
        rows.append([
            names[prefix], _count(found["documents"]), _count(found["tokens"]), _count(found["duplicate_documents"]),
            _count(found["empty_documents"]),
            f"{meta['text_bytes'] / found['tokens']:.2f}" if "text_bytes" in meta else "?",
            f"{found['eod_share']:.3%}" if "eod_share" in found else "?",
            _count(size) if size else "?", f"{_unused(scanned.frequencies, size):.1%}" if size else "?",
        ])  # fmt: skip
    if len(scans) > 1:
        metas = [scanned.part.meta or {} for scanned in scans.values()]
        known = all("text_bytes" in meta for meta in metas)
        bytes_a_token = f"{sum(meta['text_bytes'] for meta in metas) / result['tokens']:.2f}" if known else "?"
        ends = [scanned.ends if scanned.part.meta else None for scanned in scans.values()]
        empty = sum(scanned.empty for scanned in scans.values())
        rows.append([
            "together", _count(result["documents"]), _count(result["tokens"]), _count(result["duplicate_documents"]),
            _count(empty), bytes_a_token, f"{sum(ends) / result['tokens']:.3%}" if None not in ends else "?",
            *_together(scans, tokenizer),
        ])  # fmt: skip
    head = (
        "source", "documents", "tokens", "duplicates", "empty", "text bytes a token", "end-of-document share",
        "vocabulary", "of it unused",
    )  # fmt: skip
    paths = "".join(f"<li>{html.escape(name)}: <code>{html.escape(p)}</code></li>" for p, name in names.items())
    return f"<h2>Sources</h2>{page.table(head, rows)}<ul>{paths}</ul>\n"


def _lengths_section(scans, names, lengths):
    quantiles = lengths.quantiles()
    counted = {names[prefix]: scanned.lengths.counted() for prefix, scanned in scans.items()}
    longest = max(quantiles["max"], 2)
    edges = np.unique(np.round(2 ** np.arange(0, np.log2(longest) + 1, 0.5)).astype(np.int64))

    def draw(axes):
        for n, (name, (values, counts)) in enumerate(_largest(counted, lambda pair: pair[1].sum())):
            shares = np.histogram(values, edges, weights=counts)[0] / counts.sum()
            axes.stairs(shares, edges, label=name, linestyle=page.LINES[n % len(page.LINES)], linewidth=1.5 + n % 2)
        for name, style in (("median", "-"), ("p99", ":")):
            label = f"{name} of all, {quantiles[name]:,}"
            axes.axvline(max(quantiles[name], 1), color="0.4", linewidth=1, linestyle=style, label=label)
        axes.set(xscale="log", title="Lengths of documents")
        axes.set(xlabel="tokens in the document", ylabel="share of documents")
        axes.legend()

    alt = f"Histogram of document lengths: median {quantiles['median']:,}, 99% up to {quantiles['p99']:,} tokens."
    rows = [[names[p], *map(_count, scanned.lengths.quantiles().values())] for p, scanned in scans.items()]
    if len(scans) > 1:
        rows.append(["together", *map(_count, quantiles.values())])
    table = page.table(("tokens a document", *quantiles), rows)
    return f"<h2>Document lengths</h2>{page.plot(draw, alt)}<p>Empty documents are left out of the plot.</p>{table}\n"


def _tokens_section(scans, names, tokenizer):
    """Rank and frequency; ids of different tokenizers have nothing to do with each other, and are not added up."""
    by_maker = {}
    for prefix, scanned in scans.items():
        by_maker.setdefault((scanned.part.meta or {}).get("tokenizer_sha256"), []).append(prefix)
    groups = {
        ", ".join(names[p] for p in prefixes) + (f" (tokenizer {maker[:8]})" if maker else " (tokenizer not known)"): [
            scans[p].frequencies for p in prefixes
        ]
        for maker, prefixes in by_maker.items()
    }
    groups = {name: _sum(frequencies) for name, frequencies in groups.items()}

    def draw(axes):
        for n, (name, counts) in enumerate(_largest(groups, np.sum)):
            used = np.sort(counts[counts > 0])[::-1]
            ranks = np.unique(np.geomspace(1, used.size, 300).astype(np.int64))
            axes.plot(
                ranks, used[ranks - 1] / used.sum(), page.LINES[n % len(page.LINES)], marker=MARKERS[n % len(MARKERS)],
                markevery=25, markersize=4, label=name if len(name) < 60 else name[:57] + "...",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title="How often tokens occur", ylabel="share of all tokens")
        axes.set(xlabel="rank of the token, the most frequent is 1")
        axes.legend()

    tables = []
    for name, counts in groups.items():
        top = np.argsort(counts, kind="stable")[::-1][:TOP_TOKENS]
        rows = [
            [str(n), str(i), *([_visible(tokenizer.decode([i]))] if tokenizer else []), _count(counts[i]),
             f"{counts[i] / counts.sum():.3%}"]
            for n, i in enumerate(top, 1) if counts[i]
        ]  # fmt: skip
        head = ("rank", "id", *(["text"] if tokenizer else []), "times", "share")
        tables.append(f"<h3>Most frequent tokens: {html.escape(name)}</h3>{page.table(head, rows)}")
    used = "; ".join(f"{name}: {np.count_nonzero(counts):,} different tokens" for name, counts in groups.items())
    return f"<h2>Tokens</h2>{page.plot(draw, f'Frequency of tokens by rank, both logarithmic. {used}.')}{''.join(tables)}\n"


def _sidecar_section(name, title, label, scans, names):
    found = {names[p]: scanned.sidecars[name] for p, scanned in scans.items() if name in scanned.sidecars}
    spans = {source: span for source, rows in found.items() if (span := _span(rows))}
    if not spans:
        return ""
    low, high = min(s[0] for s in spans.values()), max(s[2] for s in spans.values())
    whole = name == "bins" and high - low < 200
    edges = np.arange(low - 0.5, high + 1) if whole else np.linspace(low, high if high > low else low + 1, 41)

    def draw(axes):
        shown = _largest({source: found[source] for source in spans}, len)
        width = 0.8 * (edges[1:] - edges[:-1]) / len(shown)
        for n, (source, rows) in enumerate(shown):
            counts = sum(np.histogram(some, edges)[0] for some in _finite(rows))
            axes.bar(
                edges[:-1] + 0.1 * (edges[1] - edges[0]) + n * width, counts / len(rows), width, align="edge",
                label=source, hatch=page.HATCHES[n % len(page.HATCHES)], edgecolor="black", linewidth=0.5,
            )  # fmt: skip
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel=label, ylabel="share of documents")
        axes.legend()

    rows = [[source, *(f"{value:g}" for value in span)] for source, span in spans.items()]
    table = page.table(("source", "min", "mean", "max"), rows)
    return f"<h2>{title}</h2>{page.plot(draw, f'Histogram of {name} from {low:g} to {high:g}.')}{table}\n"


def _finite(rows):
    """Yields the numbers of a side-car, those that are wrong (and among the problems) left out."""
    for start in range(0, len(rows), ROWS):
        some = np.asarray(rows[start : start + ROWS], np.float64)
        yield some[np.isfinite(some)]


def _span(rows):
    """Smallest, mean and largest, or None where no number is finite."""
    parts = [(some.min(), some.sum(), some.max(), some.size) for some in _finite(rows) if some.size]
    if not parts:
        return None
    low, total, high, count = zip(*parts)
    return float(min(low)), float(sum(total) / sum(count)), float(max(high))


def _skipped_section(scans, names):
    rows = [
        [names[prefix], reason, _count(count)]
        for prefix, scanned in scans.items()
        for reason, count in (scanned.part.meta or {}).get("skipped", {}).items()
    ]
    return f"<h2>Passed over</h2>{page.table(('source', 'reason', 'times'), rows)}\n" if rows else ""


def _provenance_section(scans, names):
    rows, more = [], 0
    for prefix, scanned in scans.items():
        files = (scanned.part.meta or {}).get("files", [])
        counts = None
        if "provenance" in scanned.sidecars and files:
            counts = np.zeros(len(files), np.int64)
            for start in range(0, scanned.part.documents, ROWS):
                numbers = scanned.sidecars["provenance"]["file"][start : start + ROWS]
                inside = numbers[(numbers >= 0) & (numbers < len(files))]
                counts += np.bincount(inside, minlength=len(files))
        more += max(0, len(files) - FILES_LISTED)
        for n, file in enumerate(files[:FILES_LISTED]):
            rows.append([names[prefix], str(file), "?" if counts is None else _count(counts[n])])
    note = f"<p>and {more:,} more files</p>" if more else ""
    return f"<h2>Where they come from</h2>{page.table(('source', 'file', 'documents'), rows)}{note}\n" if rows else ""


# --- parts of the page ------------------------------------------------------------------------------------------------


def _count(value):
    return f"{int(value):,}"


def _visible(text):
    """A token's text so that its spaces and line ends can be seen."""
    return repr(text)[1:-1].replace(" ", "\u2423")


def _short_names(scans):
    """{prefix: its last part, or all of it where two have the same}"""
    last = [Path(prefix).name for prefix in scans]
    return {prefix: name if last.count(name) == 1 else prefix for prefix, name in zip(scans, last)}


def _largest(named, size):
    """The (name, value) pairs that a plot has room for, by size."""
    return sorted(named.items(), key=lambda pair: -size(pair[1]))[:CURVES]


def _sum(frequencies):
    total = np.zeros(max(map(len, frequencies)), np.int64)
    for counts in frequencies:
        total[: len(counts)] += counts
    return total


def _vocabulary(scanned, tokenizer):
    """Number of ids there are, or None."""
    return scanned.part.meta["vocab_size"] if scanned.part.meta else tokenizer and tokenizer.vocab_size


def _together(scans, tokenizer):
    """The last two cells of the summary: vocabulary and what no source uses of it, where it is one."""
    makers = {(scanned.part.meta or {}).get("tokenizer_sha256") for scanned in scans.values()}
    sizes = {_vocabulary(scanned, tokenizer) for scanned in scans.values()}
    if len(makers) > 1 or len(sizes) > 1 or None in sizes:
        return "?", "?"
    [size] = sizes
    return _count(size), f"{_unused(_sum([scanned.frequencies for scanned in scans.values()]), size):.1%}"


def _unused(frequencies, size):
    return 1 - np.count_nonzero(frequencies[:size]) / size
