"""The stream, its windows and its bags: against megatron-core, against a slow plain twin, and at the odd lengths."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from boreal_megatron.data.indexed import IndexedWriter
from boreal_megatron.data.shuffle import Permutation
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError

ODD_LENGTHS = [5, 0, 1, 13, 2, 1, 1, 0, 7, 1, 0, 23, 4, 3, 1, 9, 0, 2, 31, 6]
KNOWN_LENGTHS = [9, 1, 9, 1, 2, 9, 1, 1, 9]


def write(path, lengths):
    """Writes documents whose ids are 0, 1, 2, ... over the whole file, so that an id says where it came from."""
    with IndexedWriter(path, np.int32) as writer:
        writer.append_many(np.arange(sum(lengths)), lengths)
    return str(path)


def order(source, epoch=0):
    """The items of an epoch in reading order."""
    return source.epoch(epoch).items(np.arange(source.items)).tolist()


def contents(source, epoch=0):
    """The ids of each item of an epoch in reading order."""
    items = source.epoch(epoch).items(np.arange(source.items))
    parts = zip(*source.locate(items), source.lengths(items), strict=True)
    return [source.reader.read(int(d), int(offset), int(length)).tolist() for d, offset, length in parts]


def epoch_windows(source, bag_size, positions, offset=0, epoch=0):
    """Returns the steps of the walk that lie in one epoch."""
    walk = source.walk(epoch, offset, bag_size, positions, chunk=3)
    return list(itertools.takewhile(lambda step: step.epoch == epoch, walk))


def plain_bags(source, bag_size, offset=0, epoch=0):
    """The obvious twin: the bags of an epoch from a cursor on, as (ids, document place) by Python lists."""
    documents = contents(source, epoch)
    labelled = [(token, place) for place, document in enumerate(documents) for token in document][offset:]
    if source.boundaries == "flat":
        return [labelled[i : i + bag_size] for i in range(0, len(labelled) - bag_size + 1, bag_size)]
    bags = []
    for _, document in itertools.groupby(labelled, key=lambda item: item[1]):
        document = list(document)
        bags += [document[i : i + bag_size] for i in range(0, len(document), bag_size)]
    return bags


def input_ids(source, step, bag_size, positions):
    window = source.read_window((step.epoch, step.start), bag_size, positions)
    return window["ids"][:, :-1].T[window["valid"][:, :-1].T].tolist()


def random_lengths(seed):
    random = np.random.default_rng(seed)
    return (random.integers(0, 20, 60) * random.integers(0, 2, 60) + random.integers(0, 3, 60)).tolist()


def test_window_starts_match_the_known_answer(tmp_path):
    prefix = write(tmp_path / "d", KNOWN_LENGTHS)
    source = Source("d", prefix, 0, "flat", order=np.arange(9))
    edges = source.edges(0, 0, 1, 8, 100)
    starts = source.epoch(0).starts
    places = np.searchsorted(starts, edges, side="right") - 1
    assert [[p, e - starts[p]] for p, e in zip(places, edges, strict=True)] == [
        [0, 0], [0, 8], [2, 6], [5, 2], [7, 0], [8, 7],
    ]  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 3])
def test_one_token_bags_equal_megatron(tmp_path, epochs):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    lengths, positions = random_lengths(3), 16
    prefix = write(tmp_path / "d", lengths)
    tokenizer = SimpleNamespace(vocab_size=70000, eod=69999, pad=-1, unique_identifiers={"class": "test"})
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=positions, blend=([prefix], None), split="1,0,0", tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False,
    )  # fmt: skip
    samples = epochs * sum(lengths) // positions - 1
    theirs = GPTDataset(
        IndexedDataset(prefix), prefix, np.arange(len(lengths), dtype=np.int32), samples, Split.train, config
    )
    assert len(theirs.document_index) == epochs * len(lengths)

    ours = Source("d", prefix, 0, "flat", order=np.asarray(theirs.document_index))
    steps = epoch_windows(ours, 1, positions)
    assert len(steps) == len(theirs) == len(theirs.shuffle_index)
    for i, j in enumerate(theirs.shuffle_index):
        sample = theirs[i]
        window = ours.read_window((0, steps[j].start), 1, positions)
        np.testing.assert_array_equal(window["ids"][0, :-1], sample["tokens"])
        np.testing.assert_array_equal(window["ids"][0, 1:], sample["labels"])


@pytest.mark.parametrize("boundaries", ["flat", "align"])
@pytest.mark.parametrize("bag_size", [1, 3, 4])
def test_every_token_is_in_one_input_bag(tmp_path, boundaries, bag_size):
    for trial, lengths in enumerate([ODD_LENGTHS, random_lengths(1), random_lengths(2), [1] * 40, [0, 90, 0]]):
        source = Source("d", write(tmp_path / f"d{trial}", lengths), trial, boundaries)
        stream = sum(contents(source), [])
        steps = epoch_windows(source, bag_size, 5)
        read = [i for step in steps for i in input_ids(source, step, bag_size, 5)]
        assert read == stream[: steps[-1].end]
        assert len(read) == sum(step.end - step.start for step in steps)
        after = next(source.walk(0, steps[-1].end, bag_size, 5, chunk=3))
        assert (after.epoch, after.start, after.dropped) == (1, 0, len(stream) - len(read))
        assert len(plain_bags(source, bag_size, steps[-1].end)) <= 5  # no window more was possible


@pytest.mark.parametrize("boundaries", ["flat", "align"])
@pytest.mark.parametrize("bag_size", [1, 2, 3, 4, 7])
def test_windows_equal_the_plain_twin_from_any_cursor(tmp_path, boundaries, bag_size):
    positions = 4
    for trial, lengths in enumerate([ODD_LENGTHS, random_lengths(5)]):
        source = Source("d", write(tmp_path / f"d{trial}", lengths), trial, boundaries)
        for offset in [*range(0, source.total_tokens, 3), source.total_tokens - 1, source.total_tokens]:
            bags = plain_bags(source, bag_size, offset)
            edges = source.edges(0, offset, bag_size, positions, 1000)
            assert len(edges) - 1 == max(0, (len(bags) - 1) // positions)
            for i, start in enumerate(edges[:-1].tolist()):
                window = source.read_window((0, start), bag_size, positions)
                expected = bags[i * positions : (i + 1) * positions + 1]
                ids = [[token for token, _ in bag] + [0] * (bag_size - len(bag)) for bag in expected]
                assert window["ids"].T.tolist() == ids
                assert window["valid"].T.tolist() == [[slot < len(bag) for slot in range(bag_size)] for bag in expected]
                assert window["document"].tolist() == [bag[0][1] for bag in expected]


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_target_bag_is_the_next_input_bag_across_windows(tmp_path, boundaries):
    source = Source("d", write(tmp_path / "d", random_lengths(4)), 0, boundaries)
    windows = [source.read_window((0, step.start), 3, 6) for step in epoch_windows(source, 3, 6)]
    for one, two in itertools.pairwise(windows):
        for key in ("ids", "valid", "document"):
            np.testing.assert_array_equal(one[key][..., -1], two[key][..., 0])


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_bag_and_window_size_may_change_at_any_window(tmp_path, boundaries):
    random = np.random.default_rng(0)
    for trial in range(20):
        source = Source("d", write(tmp_path / f"d{trial}", random_lengths(trial) + [40]), trial, boundaries)
        stream = sum(contents(source), [])
        offset, read = 0, []
        while True:
            bag_size, positions = [4, 1, 4, 3][random.integers(4)], int(random.integers(1, 9))
            step = next(source.walk(0, offset, bag_size, positions, chunk=1))
            if step.epoch:
                break
            read += input_ids(source, step, bag_size, positions)
            offset = step.end
        assert read == stream[:offset]
        assert len(stream) - offset <= 4 * 9


def test_a_cursor_inside_a_document_folds_what_is_left(tmp_path):
    source = Source("d", write(tmp_path / "d", [10, 6, 20]), 0, "align", order=np.arange(3))
    window = source.read_window((0, 3), 4, 4)  # tokens 3..9 of document 0: bags of 4 and 3
    assert window["ids"].T.tolist() == [[3, 4, 5, 6], [7, 8, 9, 0], [10, 11, 12, 13], [14, 15, 0, 0], [16, 17, 18, 19]]
    assert window["valid"].sum(axis=0).tolist() == [4, 3, 4, 2, 4]
    assert window["document"].tolist() == [0, 0, 1, 1, 2]


def test_a_straddling_bag_belongs_to_the_earlier_document(tmp_path):
    source = Source("d", write(tmp_path / "d", [6, 1, 0, 30]), 0, "flat", order=np.arange(4))
    window = source.read_window((0, 0), 4, 4)
    assert window["document"].tolist() == [0, 0, 3, 3, 3]  # the one-token document lies inside bag 1, the empty one nowhere
    assert window["valid"].all()


def test_epochs_reshuffle_and_repeat_exactly(tmp_path):
    prefix = write(tmp_path / "d", ODD_LENGTHS)
    source, again = Source("d", prefix, 1, "flat"), Source("d", prefix, 1, "flat")
    orders = [order(source, e) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert [order(again, e) for e in (3, 0, 2, 1)] == [orders[e] for e in (3, 0, 2, 1)]
    assert all(sorted(each) == list(range(len(ODD_LENGTHS))) for each in orders)
    assert order(Source("e", prefix, 1, "flat")) != orders[0]
    assert order(Source("d", prefix, 2, "flat")) != orders[0]


def test_permutation_never_changes():
    # A resumed run depends on these very numbers: whoever changes them breaks every checkpoint.
    assert Permutation(8, "1234/web/0")(np.arange(8)).tolist() == [2, 3, 4, 0, 5, 1, 6, 7]


def test_the_walk_does_not_depend_on_its_chunk(tmp_path):
    source = Source("d", write(tmp_path / "d", random_lengths(8)), 0, "align")
    walks = [list(itertools.islice(source.walk(0, 5, 3, 4, chunk), 100)) for chunk in (1, 2, 7, 1000)]
    assert walks[0][-1].epoch > 2
    assert all(walk == walks[0] for walk in walks)


def test_too_small_a_data_set_is_refused(tmp_path):
    for boundaries, lengths in [("flat", [16]), ("flat", [3, 12]), ("align", [1, 1, 1]), ("align", [7, 5])]:
        source = Source("tiny", write(tmp_path / "d", lengths), 0, boundaries)
        with pytest.raises(BorealError, match=r"source 'tiny' .* Expected: at least 5 bags"):
            next(source.walk(0, 0, 4, 4, chunk=1))
    source = Source("tiny", write(tmp_path / "d", [20]), 0, "flat")
    steps = list(itertools.islice(source.walk(0, 0, 4, 4, chunk=9), 3))
    assert [(s.epoch, s.start, s.end, s.dropped) for s in steps] == [(0, 0, 16, 0), (1, 0, 16, 4), (2, 0, 16, 4)]
    with pytest.raises(BorealError, match="no tokens"):
        Source("tiny", write(tmp_path / "d", [20, 0]), 0, "flat", order=np.array([1]))


def test_a_cursor_of_other_files_is_refused(tmp_path):
    source = Source("d", write(tmp_path / "d", [20]), 0, "flat")
    with pytest.raises(BorealError, match="from token 21 of an epoch, but has only 20"):
        next(source.walk(3, 21, 1, 4, chunk=1))


def test_an_id_beyond_the_vocabulary_names_its_place(tmp_path):
    prefix = write(tmp_path / "d", [5, 0, 4, 30])
    source = Source("web", prefix, 0, "flat", order=np.arange(4), vocab_size=7)
    with pytest.raises(BorealError, match=r"source 'web' .*document 2 has id 7 at token 2\. Expected: 0 to 6"):
        source.read_window((0, 3), 2, 4)


def test_the_fingerprint_follows_name_index_and_seed(tmp_path):
    one, two = write(tmp_path / "a", [5, 6]), write(tmp_path / "b", [6, 5])
    prints = {Source(name, prefix, 0, "flat").fingerprint for name in "xy" for prefix in (one, two)}
    assert len(prints) == 4
    assert Source("x", one, 0, "align").fingerprint in prints
    assert Source("x", one, 5, "align").fingerprint not in prints, "another seed is another order"


def test_pieces_cut_documents_before_they_are_shuffled(tmp_path):
    """Every token once an epoch, in runs that stay inside a document and are at most so long; the tail of each too."""
    lengths = [0, 10, 3, 25, 1, 8]
    prefix = write(tmp_path / "d", lengths)
    source = Source("d", prefix, 3, "align", piece_tokens=8)
    edges = np.cumsum([0, *lengths])
    in_order = order(source)
    pieces = [piece for _, piece in sorted(zip(in_order, contents(source), strict=True))]
    assert sorted(i for piece in pieces for i in piece) == list(range(sum(lengths)))
    assert [len(p) for p in pieces] == [8, 2, 3, 8, 8, 8, 1, 1, 8]
    assert all(p == list(range(p[0], p[0] + len(p))) for p in pieces)
    assert all(np.searchsorted(edges, p[0], "right") == np.searchsorted(edges, p[-1], "right") for p in pieces)
    assert sorted(in_order) == list(range(len(pieces))) and in_order != sorted(in_order)
    assert source.fingerprint != Source("d", prefix, 3, "align").fingerprint
