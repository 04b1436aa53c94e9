"""The loader: opens a run's sources, checks them, and hands each data-parallel rank its micro-batches.

It keeps no state between calls. The caller holds the ledger and saves it with the checkpoint; every rank plans the
whole step, which is cheap, and reads its own windows only.
"""

import hashlib
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from boreal_megatron.data import batch, blend, sampler
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.source import Source
from boreal_megatron.data.tokenizer import Tokenizer
from boreal_megatron.errors import BorealError, ProblemsError

VALIDATION = "validation"
SPARE_ROWS = 1024  # Qwen's table has 267 more rows than its tokenizer has ids


class Loader:
    """Training steps and validation rows as packed batches.

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
        self.config, self.dp_rank, self.dp_size = config, dp_rank, dp_size
        self.make = partial(batch.make, boundaries=config.data.boundaries, device=device, context=context)
        _check_tokenizers(config)
        self.sources, unread = blend.open_sources(config)
        self.blend = blend.describe(config, self.sources, unread)
        if self.blend["problems"]:
            raise ProblemsError("data", self.blend["problems"])
        self.validation_source = None
        if config.data.validation is not None:
            in_file_order = np.arange(len(IndexedReader(config.data.validation)))
            self.validation_source = Source(
                VALIDATION, config.data.validation, 0, config.data.boundaries, order=in_file_order,
                vocab_size=config.model.vocab_size,
            )  # fmt: skip
            for phase in config.phases:
                self.validation_source.check_window(phase.bag_size, phase.sequence)

    def fingerprints(self):
        """Returns name -> fingerprint: what the cursors of a ledger refer to."""
        return {name: source.fingerprint for name, source in self.sources.items()}

    def step(self, phase, ledger):
        """Plans one training step.

        Returns:
            an iterator over this rank's Batches, which reads as it goes, and the Ledger after the step.
        """
        picks, after = sampler.plan(phase, ledger, self.sources, phase.windows_per_step())
        mine = sampler.for_rank(picks, self.dp_rank, self.dp_size, self.config.micro_batch)
        return (self._training_batch(phase, row) for row in mine), after

    def _training_batch(self, phase, row):
        windows = [self.sources[name].read_window(start, phase.bag_size, phase.sequence) for name, start in row]
        return self.make(windows)

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
            yield self.make(read, fillers=fillers)


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
        sidecar = Path(f"{prefix}.meta.json")
        if not sidecar.exists():
            continue
        meta = json.loads(sidecar.read_text())
        used[meta["tokenizer_sha256"]].append(f"'{name}'")
        if meta["vocab_size"] > config.model.vocab_size:
            problems.append(
                f"'{name}' ({prefix}) has a vocabulary of {meta['vocab_size']}; expected at most "
                f"{config.model.vocab_size} (model.vocab_size): raise it, or tokenize again"
            )
    tokenizer = Path(config.data.tokenizer) / "tokenizer.json"
    if used and tokenizer.is_file():
        used[hashlib.sha256(tokenizer.read_bytes()).hexdigest()].append("data.tokenizer")
    if len(used) > 1:
        groups = "; ".join(f"{sha[:12]} by {', '.join(names)}" for sha, names in used.items())
        problems.append(f"different tokenizers are used: {groups}; expected one: tokenize the odd ones again")
    if problems:
        raise ProblemsError("data", problems)
