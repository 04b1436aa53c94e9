"""The data of a whole run as one value: what each phase reads of each source, planned before anything starts.

`describe` gives it as a plain dict for programs, `render` as a tree for people. Index files and lengths suffice; no
token is read. A plan is what the sampler will do but for the odd window: no source gets ahead of its share by more than
one, and a phase ends with a whole step.

A step of W windows of L bags of k reads W * L * k raw tokens where bags are full; `fill` is the share of a bag's slots
that are. An epoch gives whole windows only.
"""

import hashlib
import json
from math import ceil

from boreal_megatron.data import sampler
from boreal_megatron.data.indexed import IndexedReader
from boreal_megatron.data.prepared import bags_name, starts_name
from boreal_megatron.data.source import MEMORY_ITEMS, Source, bin_names
from boreal_megatron.errors import BorealError

# Up to 4 epochs of repeated data are nearly as good as new data (Muennighoff et al. 2023, arXiv 2305.16264).
NEARLY_FREE = 4
SLACK = 1e-9  # of an epoch: rounding of the plan
NEAR = 0.01  # of an epoch: what the sampler may read beyond it


def open_sources(config, tokens=True):
    """Opens what the run may read.

    Args:
        config: schema.Config.
        tokens: False opens index files only.

    Returns:
        (stream -> Source, names of curriculum bins that no phase reads). A source with bins is one stream a bin.
    """
    data, sources, unread = config.data, {}, []
    for name, spec in data.sources.items():
        streams = {name: None}
        if spec.bins is not None:
            found = bin_names(spec.bins, IndexedReader(spec.prefix, index_only=True))
            streams = {f"{name}/{each}": (spec.bins, each) for each in found}
            for stream in [] if any(reads(phase, name) for phase in config.phases) else list(streams):
                if not any(reads(phase, stream) for phase in config.phases):
                    unread.append(stream)
                    del streams[stream]
        for stream, bins in streams.items():
            sources[stream] = Source(
                stream, spec.prefix, config.seed, data.boundaries, vocab_size=config.model.vocab_size,
                piece_tokens=data.piece_tokens, epochs=spec.epochs, weights=spec.weights, bins=bins, tokens=tokens,
            )  # fmt: skip
    return sources, unread


def reads(phase, name):
    return phase.blend is None or name in phase.blend


def describe(config, sources, unread=(), prepared=True):
    """Plans the run's data.

    Args:
        config: schema.Config.
        sources, unread: what `open_sources` returns.
        prepared: False leaves out the problem that an index is not prepared.

    Returns:
        dict, JSON-able:
            fingerprint: sha256 of all below but warnings and problems.
            phases: name, bag_size, sequence, steps, raw_tokens, sources (name -> weight, share, raw_tokens, epochs,
                epochs_so_far), data_path (Megatron's --data-path; None where curriculum bins are read).
            sources: name -> prefix, documents, raw_tokens, epochs (planned), begins (epochs, whole), bag_sizes, limit,
                weights, fingerprint.
            unread: curriculum bins that no phase names.
            warnings, problems: lines. A run with problems cannot end.

    Raises:
        BorealError: a blend names a source or a bin that there is not.
    """
    phases, problems, step, raw = [], {}, 0, 0
    planned = dict.fromkeys(sources, 0.0)
    parts = {name: [] for name in sources}
    bag_sizes = {name: set() for name in sources}
    for phase in config.phases:
        weights = sampler.blend(phase, sources)
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for name in shares:
            try:
                sources[name].check_window(phase.bag_size, phase.sequence)
            except BorealError as error:
                problems[str(error)] = None
        per_step = phase.raw_tokens_per_step() / sum(
            share / _fill(sources[name], phase.bag_size) for name, share in shares.items()
        )
        if phase.until_steps is not None:
            steps = max(0, phase.until_steps - step)
        else:
            steps = max(0, ceil((phase.until_raw_tokens - raw) / per_step))
        step, raw = step + steps, raw + round(steps * per_step)
        rows = {}
        for name, share in shares.items():
            tokens = round(steps * per_step * share)
            epoch = _readable(sources[name], phase.bag_size, phase.sequence)
            epochs = tokens / epoch if epoch else 0.0
            planned[name] += epochs
            bag_sizes[name].add(phase.bag_size)
            parts[name].append(f"{phase.name} {epochs:.3g} ({tokens:,} raw tokens)")
            rows[name] = {
                "weight": weights[name], "share": share, "raw_tokens": tokens, "epochs": epochs,
                "epochs_so_far": planned[name],
            }  # fmt: skip
        phases.append(
            {
                "name": phase.name, "bag_size": phase.bag_size, "sequence": phase.sequence, "steps": steps,
                "raw_tokens": round(steps * per_step), "sources": rows, "data_path": _data_path(shares, sources),
            }
        )  # fmt: skip
    value = {
        "phases": phases,
        "sources": {
            name: {
                "prefix": str(source.prefix), "documents": source.documents, "raw_tokens": source.total_tokens,
                "epochs": planned[name], "begins": _begins(source, planned[name]) if parts[name] else 0,
                "bag_sizes": sorted(bag_sizes[name]), "limit": source.epochs, "weights": config.data.sources[
                    config.data.source_of(name)].weights, "fingerprint": source.fingerprint,
            }
            for name, source in sources.items()
        },
        "unread": list(unread),
    }  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    warnings = [
        f"{name} is read {epochs:.3g} times; more than {NEARLY_FREE} repetitions of the same data are worth little "
        "(arXiv 2305.16264)"
        for name, epochs in planned.items()
        if epochs > NEARLY_FREE
    ]
    for name, source in sources.items():
        at = f"data.sources.{config.data.source_of(name)}"
        if source.epochs is not None and planned[name] > source.epochs + SLACK:
            line = (
                f"{at}.epochs={source.epochs}: the run reads '{name}' {planned[name]:.4g} times: "
                f"{', '.join(parts[name])}; raise epochs, lower its weight, end phases earlier, or add data"
            )
            problems[line] = None
        missing = _unprepared(source, value["sources"][name]) if prepared else []
        if missing:
            line = (
                f"{at}: '{name}' has {source.items:,} items, more than {MEMORY_ITEMS:,}, and no prepared "
                f"{', '.join(missing)}; run `boreal data prepare CONFIG`"
            )
            problems[line] = None
    return {"fingerprint": fingerprint, **value, "warnings": warnings, "problems": list(problems)}


def _begins(source, epochs):
    """Whole epochs that may begin where so many are planned; one more than planned where that is a near thing."""
    return min(max(1, ceil(epochs + NEAR)), source.epochs or 2**63)


def _unprepared(source, row):
    """Names of the index files that the run needs and does not find."""
    if source.items <= MEMORY_ITEMS:
        return []
    names = [starts_name(epoch) for epoch in range(row["begins"])]
    if source.boundaries != "flat":
        names += [bags_name(e, source.boundaries, k) for e in range(row["begins"]) for k in row["bag_sizes"]]
    return [name for name in names if not source.prepared or name not in source.prepared.files]


def _fill(source, bag_size):
    """Share of a bag's slots that hold a token."""
    bags = source.bags(bag_size)
    return source.total_tokens / (bags * bag_size) if source.boundaries == "align" else 1.0


def _readable(source, bag_size, positions):
    """Raw tokens of an epoch that are read in whole windows."""
    windows = max(0, source.bags(bag_size) - 1) // positions
    return windows * positions * bag_size * _fill(source, bag_size)


def _data_path(shares, sources):
    if any("/" in name for name in shares):
        return None
    return " ".join(f"{share:.10g} {sources[name].prefix}" for name, share in shares.items())


def render(value):
    """The blend as a tree: phases and what they read, then the sources with their fingerprints."""
    lines = [f"blend {value['fingerprint'][:16]}"]
    for phase in value["phases"]:
        lines.append(
            f"  phase {phase['name']}: {phase['steps']:,} steps, {phase['raw_tokens']:,} raw tokens, bags of "
            f"{phase['bag_size']}, {phase['sequence']:,} positions"
        )
        width = max(map(len, phase["sources"]))
        for name, row in phase["sources"].items():
            lines.append(
                f"    {name:{width}} {row['share']:7.2%} {row['raw_tokens']:>20,} raw tokens {row['epochs']:9.3f} "
                f"epochs, {row['epochs_so_far']:.3f} so far"
            )
        lines.append(f"    --data-path {phase['data_path'] or 'none: Megatron has no curriculum bins'}")
    lines.append("  sources")
    for name, source in value["sources"].items():
        limit = f" of at most {source['limit']}" if source["limit"] else ""
        weights = f", weights {source['weights']}" if source["weights"] else ""
        lines.append(
            f"    {name} {source['fingerprint'][:16]} {source['prefix']}: {source['documents']:,} documents, "
            f"{source['raw_tokens']:,} raw tokens, {source['epochs']:.3f} epochs{limit}{weights}"
        )
    lines += [f"    {name}: no phase names this bin; not read" for name in value["unread"]]
    for kind in ("warning", "problem"):
        lines += [f"  {kind}: {line}" for line in value[kind + "s"]]
    return "\n".join(lines)
