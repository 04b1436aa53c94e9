"""Which documents a training step reads: per data-parallel rank, micro-batch and window, down to the original file.

Planning is a pure function of the ledger, so any step can be looked up, past or to come, with neither a GPU nor a
network: from the ledger of the last checkpoint before it, or from the beginning, step by step. torch is not imported.
"""

import io
import json
from pathlib import Path

import numpy as np

from boreal_megatron.config import phases
from boreal_megatron.data import remote, sampler
from boreal_megatron.data.blend import open_sources
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.errors import BorealError, ProblemsError

TEXT_TOKENS, TEXT_CHARACTERS = 40, 60


def trace(config, step, dp_size, *, tokenizer=None, progress=None):
    """Looks up what a step reads.

    Args:
        config: schema.Config, the run's.
        step: counted from 1, as in the log and in `metrics.jsonl`.
        dp_size: data-parallel ranks, world / (tensor * pipeline * context).
        tokenizer: Tokenizer, to show how each stretch of a document begins; or None.
        progress: called with (steps planned, steps to plan), or None.

    Returns:
        step, phase, bag_size, sequence, dp_size; `start`, what the planning started from. `ranks`: for each rank its
        micro-batches, each a list of windows: source, epoch, offset (raw tokens of the epoch before it), raw_tokens,
        and `documents`, what its input bags are made of: document (its number in the data set), first (token), tokens;
        with a provenance side-car also file and byte (where the original document begins), with a tokenizer text. What
        the last position learns to predict is one bag further: it is the next window's first.

    Raises:
        BorealError: as `Loader`; the run has no such step; the data is not what the checkpoint's ledger was kept for.
    """
    if step < 1:
        raise BorealError(f"step {step}. Expected: 1 or more; the first step of a run is 1.")
    sources, _ = open_sources(config)
    start, done, ledger = _start(config.checkpoint.folder, step, sources)
    first = done
    while True:
        index = phases.at(config.phases, done, ledger.raw_tokens)
        if index is None:
            raise BorealError(f"step {step}: the run ends with step {done}. Expected: 1 to {done}.")
        phase = config.phases[index]
        picks, ledger = sampler.plan(phase, ledger, sources, phase.windows_per_step())
        done += 1
        if progress:
            progress(done - first, step - first)
        if done == step:
            break
    origins = {name: _Origins(sources[name]) for name in sorted({name for name, _ in picks})}

    def window(name, place):
        source = sources[name]
        begin, end = source.edges(*place, phase.bag_size, phase.sequence, 1).tolist()
        return {
            "source": name,
            "epoch": place[0],
            "offset": begin,
            "raw_tokens": end - begin,
            "documents": [
                {"document": number, "first": first, "tokens": tokens}
                | origins[name].of(number)
                | _text(origins[name].reader, number, first, tokens, tokenizer)
                for number, first, tokens in stretches(source, place[0], begin, end)
            ],
        }

    return {
        "step": step,
        "phase": phase.name,
        "bag_size": phase.bag_size,
        "sequence": phase.sequence,
        "dp_size": dp_size,
        "start": start,
        "ranks": [
            [[window(*pick) for pick in row] for row in sampler.for_rank(picks, rank, dp_size, config.micro_batch)]
            for rank in range(dp_size)
        ],
    }


def stretches(source, epoch, begin, end):
    """What raw tokens [begin, end) of an epoch's stream are.

    Returns:
        list of (document in the file, its first token, tokens), in reading order.
    """
    documents, offsets, tokens, _, _ = source.spans(epoch, begin, end)
    stretch = zip(documents.tolist(), offsets.tolist(), tokens.tolist(), strict=True)
    return [(document, first, count) for document, first, count in stretch if count]


def render(report, rank=None):
    """Returns a `trace` report, or one rank of it, as text for people."""
    lines = [
        f"step {report['step']}: phase {report['phase']}, bags of {report['bag_size']}, windows of "
        f"{report['sequence']} positions, {report['dp_size']} data-parallel ranks; planned from {report['start']}"
    ]
    for number, rows in enumerate(report["ranks"]):
        if rank not in (None, number):
            continue
        for micro_batch, windows in enumerate(rows):
            lines.append(f"rank {number}, micro-batch {micro_batch}")
            for window in windows:
                end = window["offset"] + window["raw_tokens"]
                place = f"epoch {window['epoch']}, raw tokens {window['offset']:,} to {end:,}"
                lines.append(f"  {window['source']}, {place}")
                for part in window["documents"]:
                    where = f", {part['file']} from byte {part['byte']:,}" if "file" in part else ""
                    text = f"  {part['text']!r}" if "text" in part else ""
                    lines.append(
                        f"    document {part['document']:,}, tokens {part['first']:,} to "
                        f"{part['first'] + part['tokens']:,}{where}{text}"
                    )
    return "\n".join(lines)


def _start(folder, step, sources):
    """(in words, steps taken, Ledger) of the newest finished checkpoint before a step; a folder counts as finished with
    its manifest (`train/store.py`)."""
    numbered = [path.parent for path in Path(folder).glob("iter_*/manifest.json") if path.parent.name[5:].isdigit()]
    path = max((p for p in numbered if int(p.name[5:]) < step), key=lambda p: int(p.name[5:]), default=None)
    if path is None:
        return "the beginning", 0, Ledger()
    try:
        state = json.loads((path / "train_state.json").read_text())["state"]
        done, kept, ledger = state["step"], state["sources"], Ledger.from_dict(state["ledger"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BorealError(
            f"{path}/train_state.json cannot be read: {type(error).__name__}: {error}. Expected: a run's state. Say "
            "checkpoint.folder= another folder (an empty one: from the beginning)."
        ) from None
    changed = [
        f"data.sources.{name}: its files, data.piece_tokens or the seed are not those that the run read; restore them, "
        "or name the configuration of that run"
        for name, source in sources.items()
        if kept.get(name, source.fingerprint) != source.fingerprint
    ]
    if changed:
        raise ProblemsError(f"tracing from {path}", changed)
    return f"{path}, step {done}", done, ledger


class _Origins:
    """Where a source's documents come from, as far as preprocessing noted it beside the data."""

    def __init__(self, source):
        self.reader = source.reader
        path = f"{source.prefix}.provenance.npy"
        self._rows = None
        if remote.is_url(path):
            found = remote.read_if_there(path)
            stored = None if found is None else io.BytesIO(found)
        else:
            stored = Path(path) if Path(path).exists() else None
        if stored is None:
            return
        try:
            self._rows = np.load(stored, mmap_mode=None if remote.is_url(path) else "r")
            self._files = json.loads(remote.read_if_there(f"{source.prefix}.meta.json") or "{}")["files"]
            if self._rows.shape != (len(self.reader),) or not {"file", "offset"} <= set(self._rows.dtype.names or ()):
                raise ValueError(f"{self._rows.shape} rows of {self._rows.dtype} for {len(self.reader)} documents")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise BorealError(
                f"{path} cannot be used: {type(error).__name__}: {error}. Expected: a row of file and offset for each "
                "document, and the files' names in the .meta.json, as `boreal data preprocess` writes them. Copy both "
                "again, or remove this one to go without."
            ) from None

    def of(self, document):
        if self._rows is None:
            return {}
        row = self._rows[document]
        return {"file": self._files[int(row["file"])], "byte": int(row["offset"])}


def _text(reader, document, first, tokens, tokenizer):
    if tokenizer is None:
        return {}
    return {"text": tokenizer.decode(reader.read(document, first, min(tokens, TEXT_TOKENS)))[:TEXT_CHARACTERS]}
