"""The data of a run as a whole: bins, weights, epochs, the plan before it starts, and the ledger under any change.

The property tests draw lengths, shapes, blends and switches at random and count every token.
"""

import json
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boreal_megatron.config.check import problems
from boreal_megatron.config.load import load
from boreal_megatron.config.schema import Data, Phase
from boreal_megatron.data import batch, blend, prepare, sampler, source as source_file
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.indexed import bin_path
from boreal_megatron.data.sampler import Cursor, Ledger
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError, ProblemsError
from tests.unit.test_batch import config
from tests.unit.test_source import contents, random_lengths, write

BOUNDARIES = ["flat", "align", "drop_tail"]


def phase(name="p", steps=9, bag_size=1, sequence=8, windows=12, blend=None, tokens=None):
    return Phase(
        name=name, until_steps=None if tokens else steps, until_raw_tokens=tokens, bag_size=bag_size, sequence=sequence,
        positions_per_step=windows * sequence, blend=blend,
    )  # fmt: skip


# ---------------------------------------------------------------- the ledger, whatever happens to a run

SHAPES = st.tuples(st.sampled_from([1, 2, 3, 4, 7]), st.integers(1, 6), st.sampled_from([1, 2, 4]))
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=25)
STEPS = st.lists(
    st.tuples(
        SHAPES,
        st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1),
        st.integers(1, 3),  # steps before the next change
        st.sampled_from([1, 2, 4]),  # data-parallel ranks
        st.booleans(),  # killed, and resumed from what was saved
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("piece_tokens", [None, 9])
@pytest.mark.parametrize("boundaries", BOUNDARIES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), changes=STEPS)
def test_every_token_is_read_once_or_counted_dropped(tmp_path_factory, boundaries, piece_tokens, lengths, changes):
    folder = tmp_path_factory.mktemp("d")
    # 60 one-window tails: every shape drawn fits into an epoch.
    prefixes = {name: write(folder / name, [*each, *[7] * 60]) for name, each in zip("abc", lengths, strict=True)}

    def opened():
        return {n: Source(n, p, 5, boundaries, piece_tokens=piece_tokens) for n, p in prefixes.items()}

    sources, ledger, windows, counted = opened(), Ledger(), [], Counter()
    for number, ((bag_size, sequence, per_rank), mix, steps, ranks, killed) in enumerate(changes):
        each = phase(f"p{number}", bag_size=bag_size, sequence=sequence, windows=per_rank * ranks, blend=mix)
        for _ in range(steps):
            picks, ledger = sampler.plan(each, ledger, sources, each.windows_per_step())
            dealt = [sampler.for_rank(picks, rank, ranks, per_rank) for rank in range(ranks)]
            assert [pick for rows in zip(*dealt, strict=True) for row in rows for pick in row] == picks
            windows += [(name, start, bag_size, sequence) for name, start in picks]
            counted["windows"] += len(picks)
        if killed:
            ledger = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
            sources = opened()
    assert ledger.windows == counted["windows"]
    for name, source in sources.items():
        cursor = ledger.sources.get(name, Cursor())
        assert cursor.raw_tokens + cursor.dropped == cursor.epoch * source.total_tokens + cursor.offset
        mine = [(start, k, length) for n, start, k, length in windows if n == name]
        read, after, last = 0, (0, 0), None
        streams = {epoch: sum(contents(source, epoch), []) for epoch in range(cursor.epoch + 1)}
        for (epoch, offset), bag_size, length in mine:
            assert (epoch, offset) >= after, "nothing is read twice"
            window = source.read_window((epoch, offset), bag_size, length)
            if last is not None and last[1] == (epoch, offset, bag_size):  # the target bag is the next input bag
                np.testing.assert_array_equal(last[0]["ids"][:, -1], window["ids"][:, 0])
            inputs = window["ids"][:, :-1].T[window["valid"][:, :-1].T].tolist()
            step = next(source.walk(epoch, offset, bag_size, length, 1))
            assert step.read == len(inputs) and step.start == offset
            if boundaries == "drop_tail":
                assert window["valid"].all() and len(inputs) == bag_size * length
                at = np.array([streams[epoch].index(i) for i in inputs])
                assert at[0] == offset and (np.diff(at) >= 1).all()
                assert (np.diff(at.reshape(length, bag_size), axis=1) == 1).all()
            else:
                assert inputs == streams[epoch][offset : offset + len(inputs)], "the inputs are the stream"
                if epoch == after[0]:
                    assert offset == after[1], "nothing is skipped inside of an epoch"
            read, after = read + len(inputs), (epoch, step.end)
            last = (window, (epoch, step.end, bag_size))
        assert cursor.raw_tokens == read
        assert not mine or after == (cursor.epoch, cursor.offset)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=LENGTHS, bag_size=st.integers(1, 5), later=st.integers(1, 5), offset=st.integers(0, 200))
def test_drop_tail_drops_what_a_plain_loop_drops(tmp_path_factory, lengths, bag_size, later, offset):
    source = Source("d", write(tmp_path_factory.mktemp("d") / "d", [*lengths, 9, 9, 9, 9, 9, 9]), 1, "drop_tail")
    offset, documents = min(offset, source.total_tokens), contents(source)
    bags, at = [], 0
    for document in documents:
        left = document[max(0, offset - at) :]
        bags += [left[i : i + bag_size] for i in range(0, len(left) - bag_size + 1, bag_size)]
        at += len(document)
    edges = source.edges(0, offset, bag_size, 2, 10_000)
    assert len(edges) - 1 == max(0, len(bags) - 1) // 2
    for i, start in enumerate(edges[:-1].tolist()):
        window = source.read_window((0, start), bag_size, 2)
        assert window["ids"].T.tolist() == bags[2 * i : 2 * i + 3]
        places = [next(p for p, d in enumerate(documents) if bag[0] in d) for bag in bags[2 * i : 2 * i + 3]]
        assert window["document"].tolist() == places
    if not offset:
        assert source.bags(bag_size) == len(bags)


@pytest.mark.parametrize("weights", [{"a": 1e-9, "b": 1.0}, {"a": 1.0, "b": 1e-300}, {"a": 1e-300, "b": 1e300}])
def test_extreme_weights(tmp_path, weights):
    sources = {name: Source(name, write(tmp_path / name, random_lengths(3)), 1, "align") for name in "ab"}
    each, ledger = phase("mix", bag_size=2, windows=40, blend=weights), Ledger()
    rare, often = sorted(weights, key=weights.get)
    for _ in range(5):
        picks, ledger = sampler.plan(each, ledger, sources, 40)
    assert ledger.phase_raw_tokens[rare] <= 2 * 8
    assert ledger.phase_raw_tokens[often] >= 198 * 8


def test_three_hundred_sources_and_the_time_to_plan(tmp_path):
    prefix = write(tmp_path / "d", [*random_lengths(3), *range(1, 60)])
    weights = {f"s{n:03}": float(n + 1) for n in range(300)}
    sources = {name: Source(name, prefix, 1, "flat") for name in weights}
    each, ledger = phase("mix", windows=5000, blend=weights), Ledger()
    _, ledger = sampler.plan(each, ledger, sources, 5000)
    total = sum(ledger.phase_raw_tokens.values())
    for name, weight in weights.items():
        assert ledger.phase_raw_tokens[name] - weight / sum(weights.values()) * total <= 8 + 1e-6
    ten = {name: weights[name] for name in list(weights)[:10]}
    each = phase("ten", windows=512, blend=ten)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        _, ledger = sampler.plan(each, ledger, sources, 512)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.25, seconds  # 9 ms on two busy cores; 50 ms would do


# ---------------------------------------------------------------- bins


@pytest.fixture
def binned(tmp_path):
    """A data set of 90 documents in bins 0, 2 and 5, beside a plain one."""
    lengths = np.random.default_rng(1).integers(1, 40, 90)
    bins = np.random.default_rng(2).choice([0, 2, 5], 90).astype(np.int16)
    np.save(tmp_path / "bins.npy", bins)
    prefixes = {"web": write(tmp_path / "web", lengths.tolist()), "code": write(tmp_path / "code", [500, 30, 9])}
    sources = {"web": {"prefix": prefixes["web"], "bins": str(tmp_path / "bins.npy")}, "code": prefixes["code"]}
    return sources, lengths, bins


def test_bins_are_streams_of_their_own(binned):
    sources, lengths, bins = binned
    run = config(sources, phases=(phase(blend={"web": 1.0}), phase("q", 12, blend={"web/2": 1.0, "code": 3.0})))
    loader = Loader(run, 0, 1, "cpu")
    assert sorted(loader.sources) == ["code", "web/0", "web/2", "web/5"]
    edges = np.cumsum([0, *lengths])
    for number in (0, 2, 5):
        stream = loader.sources[f"web/{number}"]
        own = [list(range(edges[d], edges[d + 1])) for d in np.flatnonzero(bins == number)]
        assert sorted(contents(stream)) == own
        assert stream.total_tokens == lengths[bins == number].sum() and stream.documents == len(own)
    weights = sampler.blend(run.phases[0], loader.sources)
    assert weights == {f"web/{n}": pytest.approx(lengths[bins == n].sum() / lengths.sum()) for n in (0, 2, 5)}
    _, ledger = loader.step(run.phases[0], Ledger())
    assert set(ledger.sources) == {"web/0", "web/2", "web/5"}
    _, after = loader.step(run.phases[1], ledger)
    assert after.sources["web/2"].raw_tokens > ledger.sources["web/2"].raw_tokens
    assert after.sources["web/0"] == ledger.sources["web/0"]
    assert len(set(loader.fingerprints().values())) == 4


def test_a_bin_that_no_phase_names_is_not_read_and_said_so(binned):
    sources, _, _ = binned
    run = config(sources, phases=(phase(blend={"web/0": 1.0}), phase("q", 12, blend={"web/5": 1.0, "code": 1.0})))
    loader = Loader(run, 0, 1, "cpu")
    assert sorted(loader.sources) == ["code", "web/0", "web/5"]
    assert loader.blend["unread"] == ["web/2"]
    assert "web/2: no phase names this bin; not read" in blend.render(loader.blend)
    with pytest.raises(BorealError, match="phase 'p' blends web/7. Expected: names .* code, web/0"):
        Loader(config(sources, phases=(phase(blend={"web/0": 1.0, "web/7": 1.0}),)), 0, 1, "cpu")


def test_what_a_blend_may_name_is_checked_before_any_file_is_read(binned):
    sources, _, _ = binned
    run = config(sources, phases=(phase(blend={"web": 1.0, "web/2": 1.0, "code/1": 1.0, "books/3": 1.0}),))
    found = "\n".join(problems(run))
    assert "names 'web/2' and all of 'web'" in found
    assert "names 'code/1', a curriculum bin; data.sources.code has no bins" in found
    assert "names 'books/3'; data.sources has: web, code" in found
    with pytest.raises(ValueError, match="a name has no '/'"):
        Data(tokenizer="t", sources={"a/b": "x"})


def test_a_source_is_a_prefix_or_a_description(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {sources: {a: here/a, b: {prefix: here/b, epochs: 2, weight: w.npy}}}")
    with pytest.raises(ProblemsError) as caught:
        load([path])
    assert any("data.sources.b.weight: unknown key; did you mean 'weights'?" in line for line in caught.value.problems)
    data = Data(tokenizer="t", sources={"a": "here/a", "b": {"prefix": "here/b", "epochs": 2}})
    assert (data.sources["a"].prefix, data.sources["a"].epochs, data.sources["b"].epochs) == ("here/a", None, 2)


# ---------------------------------------------------------------- weights


def weighted(tmp_path, weights, name="d", **more):
    np.save(tmp_path / "w.npy", np.asarray(weights))
    return {name: {"prefix": str(tmp_path / name), "weights": str(tmp_path / "w.npy"), **more}}


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_a_target_weighs_what_its_document_does(tmp_path, boundaries):
    lengths = random_lengths(3) + [50]
    write(tmp_path / "d", lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)  # ids are places in the file
    weights = np.random.default_rng(0).choice([0, 0.25, 1, 3], len(lengths)).astype(np.float32)
    steps = (Phase(name="p", until_steps=2, bag_size=3, sequence=4, positions_per_step=48),)
    run = config(weighted(tmp_path, weights), boundaries=boundaries, phases=steps)
    plain = config({"d": str(tmp_path / "d")}, boundaries=boundaries, phases=steps)
    loaders = [Loader(each, 0, 1, "cpu") for each in (run, plain)]
    assert loaders[0].fingerprints() != loaders[1].fingerprints()
    read = [list(loader.step(steps[0], Ledger())[0]) for loader in loaders]
    nonzero = 0
    for with_weights, without in zip(*read, strict=True):
        assert (with_weights.ids == without.ids).all()
        for labels, weight in (("labels", "label_weight"), ("mtp_labels", "mtp_label_weight")):
            expected = getattr(without, weight).numpy() * weights[owner[getattr(without, labels).numpy()]]
            np.testing.assert_array_equal(getattr(with_weights, weight).numpy(), expected)
            nonzero += (expected > 1).sum() + (expected == 0.25 * np.float32(1 / 3)).sum()
    assert nonzero > 10


def test_weights_of_one_change_no_bit(tmp_path):
    lengths = random_lengths(3)
    write(tmp_path / "d", lengths)
    loaders = [
        Loader(config(sources), 0, 1, "cpu")
        for sources in (weighted(tmp_path, np.ones(len(lengths), np.float32)), {"d": str(tmp_path / "d")})
    ]
    one, two = (list(loader.step(loader.config.phases[0], Ledger())[0]) for loader in loaders)
    for a, b in zip(one, two, strict=True):
        for name in ("ids", "labels", "label_weight", "mtp_labels", "mtp_label_weight", "cu_seqlens"):
            assert getattr(a, name).equal(getattr(b, name))


@pytest.mark.parametrize(
    "weights, says",
    [
        (np.array([1, -0.5, 1], np.float32), r"document 1 has weight -0.5\. Expected: finite weights of 0 or more"),
        (np.array([1, 1, np.nan], np.float32), "document 2 has weight nan"),
        (np.array([1, np.inf, 1], np.float32), "document 1 has weight inf"),
        (np.zeros(3, np.float32), "all weights are 0"),
        (np.ones(4, np.float32), r"float32 \[4\]. Expected: float32 \[3\]"),
        (np.ones(3), r"float64 \[3\]. Expected: float32 \[3\]"),
    ],
)
def test_wrong_weights_are_refused(tmp_path, weights, says):
    write(tmp_path / "d", [30, 40, 50])
    with pytest.raises(BorealError, match=says):
        blend.open_sources(config(weighted(tmp_path, weights)))
    (tmp_path / "w.npy").write_bytes(b"text")
    with pytest.raises(BorealError, match="not a .npy file"):
        blend.open_sources(config({"d": {"prefix": str(tmp_path / "d"), "weights": str(tmp_path / "w.npy")}}))
    with pytest.raises(BorealError, match="no such file"):
        blend.open_sources(config({"d": {"prefix": str(tmp_path / "d"), "weights": str(tmp_path / "gone.npy")}}))
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(BorealError, match=r"float64 \[3\]. Expected: an integer dtype"):
        blend.open_sources(config({"d": {"prefix": str(tmp_path / "d"), "bins": str(tmp_path / "b.npy")}}))


# ---------------------------------------------------------------- epochs and the plan


def test_a_run_that_needs_more_epochs_is_refused_with_all_problems(tmp_path):
    sources = {n: {"prefix": write(tmp_path / n, [400] * 5), "epochs": e} for n, e in (("a", 2), ("b", 1), ("c", 9))}
    blends = {"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}
    steps = (phase("one", 20, windows=10, blend=blends[0]), phase("two", 40, windows=10, blend=blends[1]))
    run = config(sources, phases=steps)
    loader = Loader(run.model_copy(update={"phases": steps[:1]}), 0, 1, "cpu")  # 800 of 2,000 raw tokens each
    assert loader.blend["sources"]["a"]["epochs"] == pytest.approx(800 / 1992)
    steps = (steps[0].model_copy(update={"until_steps": 60}), steps[1].model_copy(update={"until_steps": 120}))
    with pytest.raises(ProblemsError) as caught:
        Loader(run.model_copy(update={"phases": steps}), 0, 1, "cpu")
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith("data.sources.a.epochs=2: the run reads 'a' 2.41 times: one 1.2 (2,400")
    assert caught.value.problems[1].startswith("data.sources.b.epochs=1: the run reads 'b' 1.205 times: one 1.2")


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_an_epoch_more_than_allowed_stops_the_run(tmp_path, boundaries):
    prefix = write(tmp_path / "a", random_lengths(1))
    free = {"a": Source("a", prefix, 1, boundaries)}
    bound = {"a": Source("a", prefix, 1, boundaries, epochs=2)}
    each, ledger, same = phase(bag_size=2, windows=1), Ledger(), Ledger()
    while True:
        picks, ledger = sampler.plan(each, ledger, free, 1)
        if picks[0][1][0] == 2:
            break
        again, same = sampler.plan(each, same, bound, 1)
        assert (again, same) == (picks, ledger)
    with pytest.raises(BorealError, match=r"source 'a' has begun all its 2 epochs .*phase 'p' needs .*Raise or remove"):
        sampler.plan(each, same, bound, 1)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_the_plan_is_what_the_sampler_does(tmp_path, boundaries):
    sources = {name: write(tmp_path / name, random_lengths(seed) + [80]) for seed, name in enumerate("ab")}
    steps = (
        phase("one", tokens=3000, bag_size=3, sequence=4, blend={"a": 2.0, "b": 1.0}),
        phase("two", 60, bag_size=1, sequence=6, blend={"b": 1.0, "a": 0.5}),
        phase("three", 80, bag_size=2, sequence=5),
    )
    loader = Loader(config(sources, phases=steps, boundaries=boundaries), 0, 1, "cpu")
    ledger, step = Ledger(), 0
    for planned, each in zip(loader.blend["phases"], steps, strict=True):
        before, first = ledger, step
        while step < each.until_steps if each.until_steps else ledger.raw_tokens < each.until_raw_tokens:
            _, ledger = loader.step(each, ledger)
            step += 1
        assert abs(planned["steps"] - (step - first)) <= 1
        for name, row in planned["sources"].items():
            read = ledger.sources[name].raw_tokens - before.sources.get(name, Cursor()).raw_tokens
            assert read == pytest.approx(row["raw_tokens"], rel=0.08, abs=3 * 15 + each.raw_tokens_per_step() / 2)
    for name, row in loader.blend["sources"].items():
        cursor, total = ledger.sources[name], loader.sources[name].total_tokens
        assert row["epochs"] == pytest.approx(cursor.epoch + cursor.offset / total, rel=0.1, abs=0.2)


def test_the_blend_prints_and_needs_index_files_only(tmp_path, binned):
    sources, _, _ = binned
    np.save(tmp_path / "w.npy", np.ones(3, np.float32))
    sources["code"] = {"prefix": sources["code"], "epochs": 50, "weights": str(tmp_path / "w.npy")}
    for source in sources.values():
        bin_path(source["prefix"]).unlink()
    steps = (phase("one", 50, blend={"code": 3.0, "web/0": 1.0}), phase("two", 250, blend={"code": 1.0}))
    opened, unread = blend.open_sources(config(sources, phases=steps), tokens=False)
    value = blend.describe(config(sources, phases=steps), opened, unread)
    assert json.loads(json.dumps(value)) == value and not value["problems"]
    assert value["unread"] == ["web/2", "web/5"]
    one, two = value["phases"]
    assert one["sources"]["code"] == {
        "weight": 3.0, "share": 0.75, "raw_tokens": 3600, "epochs": pytest.approx(3600 / 536),
        "epochs_so_far": pytest.approx(3600 / 536),
    }  # fmt: skip
    assert two["sources"]["code"]["epochs_so_far"] == pytest.approx((3600 + 19200) / 536)
    assert two["data_path"] == f"1 {sources['code']['prefix']}" and one["data_path"] is None
    assert [line.split(" is read")[0] for line in value["warnings"]] == ["code"]
    text = blend.render(value)
    for part in ("75.00%", "phase two: 200 steps, 19,200 raw tokens", "of at most 50", "arXiv 2305.16264",
                 opened["code"].fingerprint[:16], value["fingerprint"][:16]):  # fmt: skip
        assert part in text
    again = blend.describe(config(sources, phases=steps[:1] + (phase("two", 251),)), opened, unread)
    assert again["fingerprint"] != value["fingerprint"]


# ---------------------------------------------------------------- prepared for the whole run


def test_prepare_makes_what_the_plan_needs_and_training_needs_no_more(tmp_path, binned, monkeypatch):
    sources, _, _ = binned
    steps = (phase("one", 60, 3, 4, blend={"web/0": 1.0, "code": 1.0}), phase("two", 90, 1, 4, blend={"web/5": 1.0}))
    run = config(sources, phases=steps, boundaries="align", vocab_size=10_000)
    monkeypatch.setattr(source_file, "MEMORY_ITEMS", 2)
    monkeypatch.setattr(blend, "MEMORY_ITEMS", 2)
    with pytest.raises(ProblemsError, match="no prepared epoch-0.starts, .*; run `boreal data prepare") as caught:
        Loader(run, 0, 1, "cpu")
    assert len(caught.value.problems) == 3
    made = prepare.prepare(run)
    assert sorted(made) == ["code", "web/0", "web/5"]
    loader, ledger = Loader(run, 0, 1, "cpu"), Ledger()
    for step in range(90):
        batches, ledger = loader.step(steps[step >= 60], ledger)
        if step % 30 == 0:
            list(batches)
    assert ledger.sources["code"].epoch >= 2
    assert made["code"]["files"] == 2 * loader.blend["sources"]["code"]["begins"]


# ---------------------------------------------------------------- rows


def test_one_drop_tail_row_by_hand(tmp_path):
    # Bags of 2 of [0 1 2] [3] [4 5 6 7 8] [9 ..]: [0 1] | [4 5] [6 7] | [9 10] ...; 2, 3 and 8 are dropped.
    source = Source("d", write(tmp_path / "d", [3, 1, 5, 9]), 0, "drop_tail", order=np.arange(4))
    step = next(source.walk(0, 0, 2, 3, 1))
    assert step == (0, 0, 9, 6, 3)
    row = batch.make([source.read_window((0, 0), 2, 3)], boundaries="drop_tail", device="cpu")
    assert row.ids[:, 0].T.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert row.labels[:, 0].T.tolist() == [[4, 5], [6, 7], [9, 10]]
    assert row.label_weight[:, 0].T.tolist() == [[0, 0], [0.5, 0.5], [0, 0]]
    assert row.cu_seqlens.tolist() == [0, 1, 3]
    assert row.raw_tokens == 6
    # A switch to bags of 4 at a cursor inside of the third document: [5 6 7 8] and none of the tail before it.
    edges = source.edges(0, 5, 4, 1, 9)
    bags = [source.read_window((0, int(e)), 4, 1)["ids"][:, 0].tolist() for e in edges[:-1]]
    assert bags == [[5, 6, 7, 8], [9, 10, 11, 12]]


def test_a_row_and_a_phase_stay_within_their_numbers(tmp_path):
    with pytest.raises(AssertionError, match="a row of 2147483648 positions"):
        batch.check_row(2, 2**30)
    sources = {"a": Source("a", write(tmp_path / "a", [50]), 0, "flat")}
    with pytest.raises(AssertionError, match="as float64"):
        sampler.plan(phase(), Ledger("p", phase_raw_tokens={"a": 2**53}), sources, 1)


def test_edges_are_neighbours(tmp_path):
    """Windows of one walk join, or leave out a tail that is counted."""
    source = Source("d", write(tmp_path / "d", random_lengths(4)), 0, "drop_tail")
    walk = source.walk(0, 0, 3, 4, 5)
    for one, two in pairwise(next(walk) for _ in range(50)):
        assert one.end == two.start or two.epoch == one.epoch + 1
        assert one.end - one.start >= one.read == 12
