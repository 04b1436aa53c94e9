"""The plan of a run: blend, ledger, phases and ranks decide what comes next, and never what was read."""

import json
from collections import Counter

import numpy as np
import pytest

from boreal_megatron.config.schema import Phase
from boreal_megatron.data import sampler
from boreal_megatron.data.indexed import IndexedWriter
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError
from tests.unit.test_source import contents


def open_sources(folder, sizes, boundaries="flat"):
    """Returns sources of about the given sizes; their ids are 0, 1, 2, ... in file order."""
    sources = {}
    for seed, (name, size) in enumerate(sizes.items()):
        random = np.random.default_rng(seed)
        lengths = random.integers(0, 30, max(2, size // 15))
        lengths[-1] = max(1, size - lengths[:-1].sum())
        with IndexedWriter(folder / name, np.int32) as writer:
            writer.append_many(np.arange(lengths.sum()), lengths)
        sources[name] = Source(name, str(folder / name), 1, boundaries)
    return sources


def phase(name="p", bag_size=1, sequence=8, windows=12, blend=None):
    return Phase(
        name=name, until_steps=100, bag_size=bag_size, sequence=sequence,
        positions_per_step=windows * sequence, blend=blend,
    )  # fmt: skip


def run(phases, sources, ledger=None):
    """Plans one step for each entry of `phases`; returns the picks of each step and the ledgers after it."""
    ledger = ledger or Ledger()
    steps, ledgers = [], []
    for each in phases:
        picks, ledger = sampler.plan(each, ledger, sources, each.windows_per_step())
        steps.append(picks)
        ledgers.append(ledger)
    return steps, ledgers


def input_ids(sources, each, picks):
    """Returns (source, epoch, id) for all valid input ids of planned windows."""
    found = []
    for name, start in picks:
        window = sources[name].read_window(start, each.bag_size, each.sequence)
        found += [(name, start[0], token) for token in window["ids"][:, :-1].T[window["valid"][:, :-1].T].tolist()]
    return found


HALVES = {"a": 1.0, "b": 1.0}
TST = (
    [phase("tst", 4, 8, blend=HALVES)] * 3
    + [phase("ntp", 1, 8, blend=HALVES)] * 4
    + [phase("long", 1, 24, 5)] * 2
    + [phase("tst again", 4, 8, blend=HALVES)] * 3
)


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_phase_switches_repeat_and_skip_nothing(tmp_path, boundaries):
    sources = open_sources(tmp_path, {"a": 700, "b": 5000}, boundaries)
    steps, ledgers = run(TST, sources)
    read = [token for each, picks in zip(TST, steps, strict=True) for token in input_ids(sources, each, picks)]
    assert max(Counter(read).values()) == 1  # within an epoch, no token twice
    last = ledgers[-1]
    assert last.raw_tokens == len(read)
    assert last.windows == sum(map(len, steps))
    assert last.positions == sum(each.positions_per_step for each in TST)
    again = [token for picks in steps[-3:] for token in input_ids(sources, TST[-1], picks)]
    assert last.phase_raw_tokens == Counter(name for name, _, _ in again)
    for name, source in sources.items():
        cursor = last.sources[name]
        mine = [(epoch, token) for n, epoch, token in read if n == name]
        assert cursor.raw_tokens == len(mine)
        assert cursor.raw_tokens + cursor.dropped == cursor.epoch * source.total_tokens + cursor.offset
        for epoch in range(cursor.epoch + 1):  # each epoch is read from its first token on, in its own order
            stream = sum(contents(source, epoch), [])
            seen = [token for e, token in mine if e == epoch]
            assert seen == stream[: len(seen)]
    assert last.sources["a"].epoch > 0
    assert last.sources["b"].epoch == 0


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_killing_at_every_step_changes_nothing(tmp_path, boundaries):
    sources = open_sources(tmp_path, {"a": 400, "b": 900}, boundaries)
    steps, ledgers = run(TST, sources)
    for done, ledger in enumerate(ledgers):
        saved = json.loads(json.dumps(ledger.to_dict()))
        assert Ledger.from_dict(saved) == ledger
        fresh = {name: Source(name, s.prefix, 1, boundaries) for name, s in sources.items()}
        after, final = run(TST[done + 1 :], fresh, Ledger.from_dict(saved))
        assert after == steps[done + 1 :]
        assert not final or final[-1] == ledgers[-1]


def test_the_ledger_is_plain(tmp_path):
    sources = open_sources(tmp_path, {"a": 400, "b": 900})
    _, ledgers = run(TST, sources)
    leaves = json.loads(json.dumps(ledgers[-1].to_dict()), parse_float=pytest.fail)
    assert leaves == ledgers[-1].to_dict()
    assert set(leaves) == {"phase", "windows", "positions", "sources", "phase_raw_tokens"}


def test_ranks_and_micro_batches_read_the_same_set(tmp_path):
    sources = open_sources(tmp_path, {"a": 700, "b": 300})
    picks, _ = sampler.plan(phase(windows=24), Ledger(), sources, 24)
    for dp_size in (1, 2, 4):
        for micro_batch in (1, 2, 3):
            ranks = [sampler.for_rank(picks, rank, dp_size, micro_batch) for rank in range(dp_size)]
            assert {len(row) for rank in ranks for row in rank} == {micro_batch}
            dealt = [pick for rows in zip(*ranks, strict=True) for row in rows for pick in row]
            assert dealt == picks
    with pytest.raises(BorealError, match="step of 24 windows .* multiple of 20"):
        sampler.for_rank(picks, 0, 4, 5)


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 97.0, "c": 3.0}])
@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_the_blend_holds_within_one_window(tmp_path, weights, boundaries):
    sources = open_sources(tmp_path, {"a": 3000, "b": 700, "c": 90}, boundaries)
    each = phase("mix", bag_size=3, sequence=4, windows=1, blend=weights)
    ledger = Ledger()
    for _ in range(200):
        _, ledger = sampler.plan(each, ledger, sources, 1)
        total = sum(ledger.phase_raw_tokens.values())
        for name, weight in weights.items():
            share = weight / sum(weights.values()) * total
            assert abs(ledger.phase_raw_tokens[name] - share) <= 3 * 4 + 1e-6
    assert set(ledger.sources) == set(weights)


def test_no_source_of_many_gets_a_window_ahead(tmp_path):
    names = [f"s{i:02}" for i in range(20)]
    sources = open_sources(tmp_path, dict.fromkeys(names, 200))
    weights = {name: float(w) for name, w in zip(names, np.random.default_rng(0).pareto(1, 20) + 0.01, strict=True)}
    each, ledger = phase("mix", windows=50, blend=weights), Ledger()
    for _ in range(10):
        _, ledger = sampler.plan(each, ledger, sources, 50)
        total = sum(ledger.phase_raw_tokens.values())
        ahead = [ledger.phase_raw_tokens[n] - w / sum(weights.values()) * total for n, w in weights.items()]
        assert max(ahead) <= 8 + 1e-6


def test_ties_go_by_name_and_sizes_are_the_default_blend(tmp_path):
    sources = open_sources(tmp_path, {"b": 500, "a": 500, "c": 4000})
    picks, _ = sampler.plan(phase(blend={"b": 2.0, "a": 2.0}), Ledger(), sources, 4)
    assert [name for name, _ in picks] == ["a", "b", "a", "b"]
    picks, _ = sampler.plan(phase(), Ledger(), sources, 500)
    sizes = {name: source.total_tokens for name, source in sources.items()}
    for name, count in Counter(name for name, _ in picks).items():
        assert abs(count - 500 * sizes[name] / sum(sizes.values())) <= 1


def test_a_new_phase_counts_its_blend_from_nothing(tmp_path):
    sources = open_sources(tmp_path, {"a": 5000, "b": 5000})
    _, (first,) = run([phase("one", blend={"a": 1.0})], sources)
    picks, second = sampler.plan(phase("two", blend={"a": 1.0, "b": 1.0}), first, sources, 4)
    assert [name for name, _ in picks] == ["a", "b", "a", "b"]  # b need not catch up with phase one
    assert second.sources["a"].raw_tokens == first.sources["a"].raw_tokens + 16
    assert second.phase_raw_tokens == {"a": 16, "b": 16}
    _, third = sampler.plan(phase("three", blend={"b": 1.0}), second, sources, 1)
    assert third.sources["a"] == second.sources["a"]  # a source left out keeps its place
    assert second.enter("four").sources == second.sources


def test_planning_in_pieces_is_the_same_plan(tmp_path):
    sources = open_sources(tmp_path, {"a": 400, "b": 900}, "align")
    each = phase("p", bag_size=3, sequence=4)
    whole, end = sampler.plan(each, Ledger(), sources, 200)
    pieces, ledger = [], Ledger()
    for count in (1, 2, 3, 94, 100):
        part, ledger = sampler.plan(each, ledger, sources, count)
        pieces += part
    assert pieces == whole
    assert ledger == end
    assert end.sources["a"].epoch > 0
    assert end.sources["a"].dropped > 0


def test_an_unknown_source_in_a_blend_is_refused(tmp_path):
    sources = open_sources(tmp_path, {"web": 400, "code": 400})
    with pytest.raises(BorealError, match="phase 'p' blends books. Expected: names .* are code, web"):
        sampler.plan(phase(blend={"books": 1.0, "web": 1.0}), Ledger(), sources, 1)
