"""Which window comes next, from which source: a pure function of the phase and a small ledger.

The ledger is saved with every checkpoint. Per source it holds one cursor and what was read; no permutation, no rank,
no bag size. So a run may change its data-parallel size, blend, sequence or bag size and still goes on where it was.

The blend gives each window to the source that is furthest behind its share of the raw tokens read since the phase
began. No source gets ahead of its share by more than one window.
"""

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from boreal_megatron.errors import BorealError


@dataclass(frozen=True)
class Cursor:
    """Where reading stands in one source, and what it gave so far.

    Attributes:
        epoch, offset: the next raw token of the stream.
        raw_tokens: ids read into input bags, over all epochs.
        dropped: ids given up at the ends of epochs; raw_tokens + dropped = epoch * total + offset.
    """

    epoch: int = 0
    offset: int = 0
    raw_tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Ledger:
    """What a run has read. A value: the functions here return new ones.

    Attributes:
        phase: the phase that `phase_raw_tokens` counts.
        windows, positions: consumed by the whole run.
        sources: name -> Cursor; a source that the config no longer names keeps its place.
        phase_raw_tokens: name -> raw tokens read since the phase began, what the blend looks at.
    """

    phase: str = ""
    windows: int = 0
    positions: int = 0
    sources: dict[str, Cursor] = field(default_factory=dict)
    phase_raw_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def raw_tokens(self):
        """Raw tokens that the run has read, over all sources."""
        return sum(cursor.raw_tokens for cursor in self.sources.values())

    def enter(self, phase_name):
        """Returns the ledger at the start of a phase: the cursors stay, the blend counts from nothing."""
        return replace(self, phase=phase_name, phase_raw_tokens={})

    def to_dict(self):
        """Returns plain dicts, strings and ints, for JSON and checkpoints."""
        return {
            "phase": self.phase,
            "windows": self.windows,
            "positions": self.positions,
            "sources": {name: asdict(cursor) for name, cursor in sorted(self.sources.items())},
            "phase_raw_tokens": dict(sorted(self.phase_raw_tokens.items())),
        }

    @classmethod
    def from_dict(cls, state):
        """The inverse of `to_dict`."""
        return cls(**{**state, "sources": {name: Cursor(**cursor) for name, cursor in state["sources"].items()}})


def blend(phase, sources):
    """What a phase reads: stream -> weight, sorted by name.

    A source with curriculum bins is the streams NAME/BIN; named as a whole, they share its weight by their size.
    Without `phase.blend`, each stream counts by its size.

    Raises:
        BorealError: the blend names a source or a bin that there is not.
    """
    if phase.blend is None:
        return {name: source.total_tokens for name, source in sorted(sources.items())}
    weights, unknown = {}, []
    for name, weight in phase.blend.items():
        bins = {each: source.total_tokens for each, source in sources.items() if each.startswith(name + "/")}
        if name in sources:
            weights[name] = weight
        elif bins:
            weights |= {each: weight * tokens / sum(bins.values()) for each, tokens in bins.items()}
        else:
            unknown.append(name)
    if unknown:
        raise BorealError(
            f"phase '{phase.name}' blends {', '.join(sorted(unknown))}. Expected: names from data.sources, which are "
            f"{', '.join(sorted(sources))}. Add the missing source, or take it out of the blend."
        )
    return dict(sorted(weights.items()))


def plan(phase, ledger, sources, windows):
    """Plans the next `windows` windows of the whole run. Pure: the same arguments give the same answer on every rank.

    Args:
        phase: schema.Phase. A name other than the ledger's enters that phase.
        ledger: Ledger.
        sources: name -> Source.
        windows: how many, over all ranks.

    Returns:
        list of (source name, (epoch, offset)) in global sample order, and the Ledger after them.

    Raises:
        BorealError: a source would have to begin an epoch more than it may.
    """
    if ledger.phase != phase.name:
        ledger = ledger.enter(phase.name)
    weights = blend(phase, sources)
    names, weight = list(weights), np.array(list(weights.values()), dtype=np.float64)
    weight_sum = weight.sum()
    cursors = [ledger.sources.get(name, Cursor()) for name in names]
    consumed = np.array([ledger.phase_raw_tokens.get(name, 0) for name in names], dtype=np.float64)
    full_window = phase.bag_size * phase.sequence
    assert consumed.sum() + windows * full_window < 2**53, "raw tokens of a phase are compared as float64"

    # Each walk looks up about as many windows at a time as its source will give.
    chunks = np.maximum(1, np.ceil(windows * (weight / weight_sum))).astype(int).tolist()
    walks = [
        sources[name].walk(cursor.epoch, cursor.offset, phase.bag_size, phase.sequence, chunk)
        for name, cursor, chunk in zip(names, cursors, chunks, strict=True)
    ]
    picks = []
    for done in range(windows):
        # Weights stay undivided, so equal ones tie exactly, and argmax takes the first name of a tie.
        pick = int(np.argmax(weight * (consumed.sum() + full_window) - consumed * weight_sum))
        step = next(walks[pick])
        if not may_begin(sources[names[pick]], step.epoch):
            share = weight[pick] / weight_sum
            raise _exhausted(phase, names[pick], sources[names[pick]], cursors[pick], share, windows - done)
        picks.append((names[pick], (step.epoch, step.start)))
        cursor = cursors[pick]
        cursors[pick] = Cursor(step.epoch, step.end, cursor.raw_tokens + step.read, cursor.dropped + step.dropped)
        consumed[pick] += step.read

    return picks, replace(
        ledger,
        windows=ledger.windows + windows,
        positions=ledger.positions + windows * phase.sequence,
        sources={**ledger.sources, **dict(zip(names, cursors, strict=True))},
        phase_raw_tokens={name: int(count) for name, count in zip(names, consumed, strict=True)},
    )


def may_begin(source, epoch):
    return source.epochs is None or epoch < source.epochs


def _exhausted(phase, name, source, cursor, share, windows):
    left = source.total_tokens - cursor.offset
    field = f"data.sources.{name.rpartition('/')[0] or name}.epochs"
    return BorealError(
        f"source '{name}' has begun all its {source.epochs} epochs ({field}) and has {left:,} raw tokens left, too few "
        f"for a window; phase '{phase.name}' needs {share:.3g} of its tokens from it, and this step another {windows} "
        f"windows of {phase.bag_size * phase.sequence:,} raw tokens, blended. Raise or remove epochs, lower its weight "
        "in the blend, end the phase earlier, or add data; then resume from the last checkpoint."
    )


def for_rank(picks, dp_rank, dp_size, micro_batch):
    """Returns this rank's micro-batches, each a list of `micro_batch` picks.

    Micro-batch m of the step is the m-th run of dp_size * micro_batch picks, dealt to the ranks in order: together
    the ranks read exactly the step's picks, whatever dp_size is.

    Raises:
        BorealError: the step does not divide into whole micro-batches.
    """
    row = dp_size * micro_batch
    if len(picks) % row:
        raise BorealError(
            f"a step of {len(picks)} windows does not divide into micro-batches of {micro_batch} on {dp_size} "
            f"data-parallel ranks. Expected: a multiple of {row} windows. Change positions_per_step or micro_batch."
        )
    first = dp_rank * micro_batch
    return [picks[at + first : at + first + micro_batch] for at in range(0, len(picks), row)]
