"""From windows to packed rows, and the loader that makes them: weights, boundaries, MTP, ranks, wrong data."""

import json

import numpy as np
import pytest
import torch

from boreal_megatron.config.schema import Attention, Checkpoint, Config, Data, GDN, Model, Phase, Schedule
from boreal_megatron.data import batch
from boreal_megatron.data.dataset import Loader
from boreal_megatron.data.indexed import IndexedWriter
from boreal_megatron.data.tokenizer import train_bpe
from boreal_megatron.data.sampler import Ledger
from boreal_megatron.data.source import Source
from boreal_megatron.errors import BorealError

LENGTHS = [5, 0, 1, 13, 2, 1, 1, 0, 7, 1, 0, 23, 4, 3, 1, 9, 0, 2, 31, 6]


def write(path, lengths):
    with IndexedWriter(path, np.int32) as writer:
        writer.append_many(np.arange(sum(lengths)), lengths)
    return str(path)


def in_order(path, lengths, boundaries):
    return Source("d", write(path, lengths), 0, boundaries, order=np.arange(len(lengths)))


def read(source, bag_size, positions, count):
    edges = source.edges(0, 0, bag_size, positions, count)
    return [source.read_window((0, start), bag_size, positions) for start in edges[:-1].tolist()]


def config(sources, **changes):
    data = {key: changes.pop(key) for key in ("validation", "boundaries", "tokenizer") if key in changes}
    model = Model(
        pattern="*-", vocab_size=changes.pop("vocab_size", 1000), hidden_size=8, ffn_hidden_size=8, max_positions=64,
        attention=Attention(heads=1, kv_heads=1), gdn=GDN(key_heads=1, value_heads=1),
    )  # fmt: skip
    phases = changes.pop("phases", (Phase(name="p", until_steps=9, bag_size=3, sequence=4, positions_per_step=48),))
    return Config(
        model=model, phases=phases, schedule=Schedule(peak=1e-3), checkpoint=Checkpoint(folder="none"),
        data=Data(**{"tokenizer": "none", "sources": sources, **data}), **changes,
    )  # fmt: skip


def test_one_align_row_by_hand(tmp_path):
    # Bags of 2: [0 1] [2 -] | [3 -] | [4 5] [6 7] [8 -] ...
    source = in_order(tmp_path / "d", [3, 1, 5, 9], "align")
    row = batch.make(read(source, 2, 4, 1), boundaries="align", device="cpu")
    assert row.ids[:, 0].T.tolist() == [[0, 1], [2, -1], [3, -1], [4, 5]]
    assert row.labels[:, 0].T.tolist() == [[2, 0], [3, 0], [4, 5], [6, 7]]
    assert row.label_weight[:, 0].T.tolist() == [[0.5, 0], [0, 0], [0, 0], [0.5, 0.5]]
    assert row.mtp_ids[:, 0].T.tolist() == [[2, -1], [3, -1], [4, 5], [6, 7]]
    assert row.mtp_labels[:, 0].T.tolist() == [[3, 0], [4, 5], [6, 7], [0, 0]]
    assert row.mtp_label_weight[:, 0].sum() == 0
    assert row.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert (row.max_seqlen, row.raw_tokens) == (2, 6)


def test_one_flat_row_by_hand(tmp_path):
    # Bags of 2: [0 1] [2 | 3] | [4 5] [6 7] [8 | 9] ...: every label counts; [2 | 3] is the first document's.
    source = in_order(tmp_path / "d", [3, 1, 5, 9], "flat")
    row = batch.make(read(source, 2, 4, 1), boundaries="flat", device="cpu")
    assert row.ids[:, 0].T.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert row.labels[:, 0].T.tolist() == [[2, 3], [4, 5], [6, 7], [8, 9]]
    assert (row.label_weight == 0.5).all()
    assert row.mtp_labels[:, 0].T.tolist() == [[4, 5], [6, 7], [8, 9], [0, 0]]
    assert row.mtp_label_weight[:, 0].T.tolist() == [[0.5, 0.5]] * 3 + [[0, 0]]
    assert row.cu_seqlens.tolist() == [0, 2, 4]
    assert (row.max_seqlen, row.raw_tokens) == (2, 8)


@pytest.mark.parametrize("boundaries", ["flat", "align"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_rows_against_plain_loops(tmp_path, boundaries, k):
    length = 5
    windows = read(in_order(tmp_path / "d", LENGTHS, boundaries), k, length, 4)
    b = len(windows)
    assert b >= 3
    row = batch.make(windows, boundaries=boundaries, device="cpu")
    total = b * length
    for name in ("ids", "labels", "label_weight", "mtp_ids", "mtp_labels", "mtp_label_weight"):
        tensor = getattr(row, name)
        assert tensor.shape == (k, 1, total)
        assert tensor.dtype == (torch.float32 if "weight" in name else torch.int64)
    assert (row.positions.dtype, row.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert row.positions.tolist() == [list(range(length)) * b]

    starts = []
    for t in range(total):
        w, p = windows[t // length], t % length
        for bags, at in ((row.ids, p), (row.mtp_ids, p + 1)):
            assert bags[:, 0, t].tolist() == np.where(w["valid"][:, at], w["ids"][:, at], -1).tolist()
        for distance, labels, weight in (
            (1, row.labels, row.label_weight),
            (2, row.mtp_labels, row.mtp_label_weight),
        ):
            if p + distance > length:
                assert weight[:, 0, t].sum() == 0
                continue
            same = boundaries == "flat" or w["document"][p + distance] == w["document"][p]
            assert labels[:, 0, t].tolist() == w["ids"][:, p + distance].tolist()
            expected = [np.float32(1 / k) if ok and same else 0.0 for ok in w["valid"][:, p + distance]]
            assert weight[:, 0, t].tolist() == expected
        if p == 0 or w["document"][p] != w["document"][p - 1]:
            starts.append(t)
    assert row.cu_seqlens.tolist() == [*starts, total]
    assert row.max_seqlen == max(np.diff([*starts, total]))
    assert row.raw_tokens == sum(int(w["valid"][:, :-1].sum()) for w in windows)


def test_full_bags_weigh_one_in_fp32(tmp_path):
    for k in (1, 2, 4, 8):
        windows = read(in_order(tmp_path / "d", [400], "flat"), k, 6, 2)
        row = batch.make(windows, boundaries="flat", device="cpu")
        assert (row.label_weight.sum(0) == 1).all()


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_ranks_together_read_the_step(tmp_path, boundaries):
    sources = {"a": write(tmp_path / "a", LENGTHS * 3), "b": write(tmp_path / "b", LENGTHS * 9)}
    reference = None
    for dp_size, micro_batch in [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3), (1, 12)]:
        run = config(sources, micro_batch=micro_batch, boundaries=boundaries)
        seen, ledger, ledgers = [], Ledger(), []
        loaders = [Loader(run, rank, dp_size, "cpu") for rank in range(dp_size)]
        for _ in range(6):
            outcomes = [loader.step(run.phases[0], ledger) for loader in loaders]
            assert len({json.dumps(after.to_dict()) for _, after in outcomes}) == 1
            before, ledger = ledger, outcomes[0][1]
            rows = [row for batches, _ in outcomes for row in batches]
            assert len(rows) * micro_batch == 12
            assert sum(row.raw_tokens for row in rows) == ledger.raw_tokens - before.raw_tokens
            columns = [row.ids[:, 0].reshape(3, micro_batch, 4).transpose(0, 1) for row in rows]
            seen.append(sorted(window.tolist() for window in torch.cat(columns)))
            ledgers.append(ledger)
        reference = reference or (seen, ledgers)
        assert (seen, ledgers) == reference


@pytest.mark.parametrize("boundaries", ["flat", "align"])
def test_validation_is_in_file_order_and_the_same_on_any_layout(tmp_path, boundaries):
    prefix = write(tmp_path / "v", LENGTHS)
    expected = read(in_order(tmp_path / "v", LENGTHS, boundaries), 3, 4, 100)
    assert len(expected) > 5
    for windows in (5, 1000):
        count = min(windows, len(expected))
        spread = np.linspace(0, len(expected) - 1, count).astype(int)
        assert len(set(spread)) == count and spread[-1] == len(expected) - 1
        whole = batch.make([expected[i] for i in spread], boundaries=boundaries, device="cpu")
        for dp_size, micro_batch in [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (3, 2)]:
            run = config({"v": prefix}, validation=prefix, micro_batch=micro_batch, boundaries=boundaries)
            ranks = [list(Loader(run, r, dp_size, "cpu").validation(3, 4, windows)) for r in range(dp_size)]
            assert len({len(rows) for rows in ranks}) == 1  # every rank runs as often
            rows = [row for turn in zip(*ranks, strict=True) for row in turn]
            assert {row.ids.shape[-1] for row in rows} == {4 * micro_batch}
            for name in ("ids", "labels", "label_weight", "mtp_label_weight"):
                together = torch.cat([getattr(row, name) for row in rows], dim=-1)
                assert torch.equal(together[..., : count * 4], getattr(whole, name))
                if "weight" in name:
                    assert together[..., count * 4 :].sum() == 0
            assert sum(row.raw_tokens for row in rows) == whole.raw_tokens


def test_the_loader_refuses_wrong_data(tmp_path):
    good = write(tmp_path / "good", LENGTHS)
    with pytest.raises(BorealError, match="nowhere.bin: no such file"):
        Loader(config({"a": str(tmp_path / "nowhere")}), 0, 1, "cpu")
    with pytest.raises(BorealError, match="source 'a' .* Expected: at least 41 bags"):
        wide = Phase(name="wide", until_steps=9, bag_size=4, sequence=40, positions_per_step=40)
        Loader(config({"a": good}, phases=(wide,)), 0, 1, "cpu")
    with pytest.raises(BorealError, match="blends b"):
        mixed = Phase(name="m", until_steps=9, sequence=4, positions_per_step=4, blend={"b": 1.0})
        Loader(config({"a": good}, phases=(mixed,)), 0, 1, "cpu")
    loader = Loader(config({"a": good}, vocab_size=10), 0, 1, "cpu")
    batches, _ = loader.step(loader.config.phases[0], Ledger())
    with pytest.raises(BorealError, match="source 'a' .* document .* has id .* Expected: 0 to 9"):
        list(batches)
    loader = Loader(config({"a": good}), 0, 1, "cpu")
    assert loader.fingerprints() == {"a": loader.sources["a"].fingerprint}
    assert loader.validation_source is None


def test_sidecars_must_agree(tmp_path):
    prefixes = {name: write(tmp_path / name, LENGTHS) for name in ("a", "b")}

    def note(name, sha, vocab_size):
        meta = {"tokenizer_sha256": sha, "vocab_size": vocab_size}
        (tmp_path / f"{name}.meta.json").write_text(json.dumps(meta))

    note("a", "1" * 64, 1000)
    Loader(config(prefixes), 0, 1, "cpu")  # b has no sidecar
    note("b", "1" * 64, 1000)
    Loader(config(prefixes), 0, 1, "cpu")
    note("b", "2" * 64, 1001)
    with pytest.raises(BorealError, match=r"(?s)2 problems.*'b' .* vocabulary of 1001.*1{12} by 'a'; 2{12} by 'b'"):
        Loader(config(prefixes), 0, 1, "cpu")
    note("b", "1" * 64, 1000)
    train_bpe(["a few words"], 257, tmp_path)
    with pytest.raises(BorealError, match="by data.tokenizer"):
        Loader(config(prefixes, tokenizer=str(tmp_path)), 0, 1, "cpu")
