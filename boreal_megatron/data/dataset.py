"""The loader: opens a run's sources, checks them, and hands each data-parallel rank its micro-batches.

It keeps no state between calls but what it has read ahead, which changes no result. The caller holds the ledger and
saves it with the checkpoint; every rank plans the whole step, which is cheap, and reads its own windows only. torch is
imported with the first Loader: `trace.py` opens the same sources without it.
"""

import dataclasses
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from boreal_megatron.data import blend, remote, sampler
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.prefetch import Prefetcher, Work
from boreal_megatron.data.source import Source
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError, ProblemsError

VALIDATION = "validation"
SPARE_ROWS = 1024  # Qwen's table has 267 more rows than its tokenizer has ids


class Loader:
    """Training steps and validation rows as packed batches. To be closed: it may have threads
    (`data.prefetch_workers`).

    Args:
        config: schema.Config.
        dp_rank, dp_size: this rank's place in data parallelism.
        device: where the tensors go.
        context: (rank, size) of context parallelism.

    Attributes:
        sources: stream, NAME or NAME/BIN -> Source.
        blend: what is read of them, planned for the whole run (`blend.describe`).
        validation_source: Source in file order, or None.

    Raises:
        BorealError: a data set is missing or damaged, too small for a phase's windows or for the run, or made with
            another tokenizer.
    """

    def __init__(self, config, dp_rank, dp_size, device, context=(0, 1)):
        from boreal_megatron.data import batch

        self.config, self.dp_rank, self.dp_size, self.device = config, dp_rank, dp_size, device
        self.make = partial(batch.make, boundaries=config.data.boundaries, device="cpu", context=context)
        _check_tokenizers(config)
        self.sources, unread = blend.open_sources(config)
        self.blend = blend.describe(config, self.sources, unread)
        if self.blend["problems"]:
            raise ProblemsError("data", self.blend["problems"])
        self.validation_source = _open_validation(config)
        self._prefetcher = Prefetcher(self._work, config.data.prefetch_workers)

    def close(self):
        """Ends the threads, whatever they are at; waits for the micro-batches being read, and for no other."""
        self._prefetcher.close()

    def fingerprints(self):
        """Returns name -> fingerprint: what the cursors of a ledger refer to."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    def step(self, phase, ledger):
        """Plans one training step.

        Returns:
            an iterator over this rank's Batches, which waits for the threads or reads as it goes, and the Ledger after
            the step.
        """
        (_, after), read = self._prefetcher.take((phase, ledger))
        return (self._on_device(each) for each in read), after

    def prefetch(self, phase, ledger):
        """Starts reading the step that will probably be asked for next; another one may be asked for all the same."""
        self._prefetcher.ahead((phase, ledger))

    def _work(self, request):
        phase, ledger = request
        windows = phase.windows_per_step()

        def plan():
            picks, after = sampler.plan(phase, ledger, self.sources, windows)
            return sampler.for_rank(picks, self.dp_rank, self.dp_size, self.config.micro_batch), after

        def read(planned, number):
            row = planned[0][number]
            return self.make([self.sources[name].read_window(at, phase.bag_size, phase.sequence) for name, at in row])

        return Work(plan, read, windows // (self.dp_size * self.config.micro_batch))

    def _on_device(self, packed):
        """A Batch with its tensors on the device. The thread that asks does this: the stream is a thread's own, and a
        copy in another one's would need an event to wait for."""
        values = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
        return dataclasses.replace(
            packed, **{name: value.to(self.device) for name, value in values.items() if hasattr(value, "to")}
        )

    def validation(self, bag_size, sequence, windows):
        """Iterates over this rank's Batches of `windows` windows, spread evenly over the validation set in file order.

        The set's tail that fills no window is left out. Every rank gets the same number of Batches; windows that are only
        there to fill the last ones weigh 0, so neither dp_size nor micro_batch changes the loss.

        Raises:
            BorealError: the validation set is smaller than one window.
        """
        source, micro_batch = self.validation_source, self.config.micro_batch
        assert source is not None, "data.validation is not set"
        source.check_window(bag_size, sequence)
        every = source.edges(0, 0, bag_size, sequence, source.bags(bag_size))[:-1]
        offsets = every[np.linspace(0, len(every) - 1, min(windows, len(every))).astype(int)].tolist()
        cut = self.config.parallel
        row = self.dp_size * micro_batch
        # The interleaved schedule takes micro-batches in groups of the pipeline's size.
        group = row * (cut.pipeline if cut.virtual_pipeline > 1 else 1)
        for first in range(self.dp_rank * micro_batch, -(-len(offsets) // group) * group, row):
            mine = offsets[first : first + micro_batch]
            fillers = micro_batch - len(mine)
            mine += offsets[:1] * fillers
            read = [source.read_window((0, offset), bag_size, sequence) for offset in mine]
            yield self._on_device(self.make(read, fillers=fillers))


def _open_validation(config):
    data = config.data
    if data.validation is None:
        return None
    in_file_order = np.arange(len(IndexedReader(data.validation)))
    common = {"boundaries": data.boundaries, "vocab_size": config.model.vocab_size}
    source = Source(VALIDATION, data.validation, 0, order=in_file_order, **common)
    for phase in config.phases:
        source.check_window(phase.bag_size, phase.sequence)
    return source


def check_tokenizer(config):
    """Refuse a tokenizer that is not there, or whose size is not the network's.

    Rows beyond the tokenizer's ids are allowed where they only round the table up.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    rows, size = config.model.vocab_size, tokenizer.vocab_size
    if not size <= rows <= size + SPARE_ROWS:
        raise BorealError(
            f"data.tokenizer={config.data.tokenizer} has {size} entries, model.vocab_size is {rows}; expected {size} "
            f"to {size + SPARE_ROWS}: set model.vocab_size={size}, or name the tokenizer that the network is for"
        )


def _check_tokenizers(config):
    """Raises ProblemsError if what `preprocess` noted beside the data does not fit the run or the other data sets."""
    prefixes = {name: source.prefix for name, source in config.data.sources.items()}
    if config.data.validation is not None:
        prefixes[VALIDATION] = config.data.validation
    used = defaultdict(list)  # tokenizer fingerprint -> what has it
    problems = []
    for name, prefix in prefixes.items():
        sidecar = remote.read_if_there(f"{prefix}.meta.json")
        if sidecar is None:
            continue
        meta = json.loads(sidecar)
        used[meta["tokenizer_sha256"]].append(f"'{name}'")
        if meta["vocab_size"] > config.model.vocab_size:
            problems.append(
                f"'{name}' ({prefix}) has a vocabulary of {meta['vocab_size']}; expected at most "
                f"{config.model.vocab_size} (model.vocab_size): raise it, or tokenize again"
            )
    if used and Path(config.data.tokenizer).is_dir():
        used[Tokenizer.load(config.data.tokenizer).fingerprint].append("data.tokenizer")
    if len(used) > 1:
        groups = "; ".join(f"{sha[:12]} by {', '.join(names)}" for sha, names in used.items())
        problems.append(f"different tokenizers are used: {groups}; expected one: tokenize the odd ones again")
    if problems:
        raise ProblemsError("data", problems)
