"""Windows of bags to one micro-batch of tensors, flattened into a single packed row.

Packing keeps one layout for everything downstream: what must not see each other is told by cu_seqlens, never by a
batch dim. Bags lead, and k = 1 takes the same path.

Under context parallelism each rank holds one contiguous chunk of the row, cut after bags are folded; it knows where the
whole row's documents lie.

Shapes: k bag size, b windows, L positions of a window, T = b * L positions of the row, t = T / context ranks positions
of this rank's chunk, N stretches of one document in the row, n in the chunk.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch. A target that counts weighs 1/k, so a full bag of them weighs 1, times its document's weight;
    any other weighs 0.

    Attributes:
        ids: int64 [k, 1, t]; -1 is an empty slot of a padded bag.
        labels: int64 [k, 1, t], the bag after each position's.
        label_weight: fp32 [k, 1, t].
        positions: int64 [1, t], 0..L-1 in each window.
        edges: N + 1 numbers from 0 to T; a stretch ends with its window or its document. On the host, so that control
            flow never waits for the device.
        cu_seqlens: int32 [N + 1], the same on the device.
        chunk_cu_seqlens: int32 [n + 1], from 0 to t: the stretches inside this rank's chunk.
        max_seqlen: positions of the row's longest stretch.
        mtp_ids: int64 [k, 1, t], what the multi-token head sees besides the hidden state: the next bag, as in ids.
        mtp_labels: int64 [k, 1, t], two bags ahead; 0 at a window's last position, which has none.
        mtp_label_weight: fp32 [k, 1, t].
        raw_tokens: valid input ids of the whole row.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    label_weight: torch.Tensor
    positions: torch.Tensor
    edges: tuple[int, ...]
    cu_seqlens: torch.Tensor
    chunk_cu_seqlens: torch.Tensor
    max_seqlen: int
    mtp_ids: torch.Tensor
    mtp_labels: torch.Tensor
    mtp_label_weight: torch.Tensor
    raw_tokens: int


def make(windows, *, boundaries, device, fillers=0, context=(0, 1)):
    """Packs windows of one shape.

    Args:
        windows: what `Source.read_window` returns, b of them.
        boundaries: "flat" (every label counts), "align" or "drop_tail" (a label in another document than its input
            weighs 0).
        device: where the tensors go.
        fillers: the last so many windows weigh 0 and count no raw tokens; they only give a rank its row to run.
        context: (rank, size) of context parallelism; size divides T.
    """
    ids = np.stack([w["ids"] for w in windows], axis=1)  # [k, b, L + 1]
    valid = np.stack([w["valid"] for w in windows], axis=1)
    target = np.stack([w["weight"] for w in windows], axis=1)  # [k, b, L + 1]
    document = np.stack([w["document"] for w in windows])  # [b, L + 1]
    k, b, bags = ids.shape
    length = bags - 1
    check_row(b, length)
    counted = np.arange(b) < b - fillers

    def ahead(distance):
        """Labels and their weights `distance` bags after each input, [k, b, L]; 0 beyond the window."""
        reach = bags - distance  # inputs that have such a label in their window
        labels, weight = np.zeros((k, b, length), np.int64), np.zeros((k, b, length), np.float32)
        labels[..., :reach] = ids[..., distance:]
        weight[..., :reach] = target[..., distance:] * np.float32(1 / k)
        if boundaries != "flat":
            weight[..., :reach] *= document[:, :reach] == document[:, distance:]
        return labels, weight * counted[:, None]

    # A stretch begins with each window and wherever an input bag's document is not the one before.
    begins = np.ones((b, length), bool)
    begins[:, 1:] = document[:, 1:length] != document[:, : length - 1]
    cu_seqlens = np.append(np.flatnonzero(begins), b * length).astype(np.int32)
    mine = chunk(b * length, *context)
    inside = cu_seqlens[(cu_seqlens > mine.start) & (cu_seqlens < mine.stop)]
    chunk_cu_seqlens = np.concatenate([[mine.start], inside, [mine.stop]]) - mine.start

    def row(values):  # [k, b, L] -> [k, 1, t]
        return to_device(values.reshape(k, 1, b * length)[..., mine])

    def to_device(values):
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    labels, label_weight = ahead(1)
    mtp_labels, mtp_label_weight = ahead(2)
    bag_ids = np.where(valid, ids, -1)
    return Batch(
        ids=row(bag_ids[..., :-1]),
        labels=row(labels),
        label_weight=row(label_weight),
        positions=to_device(np.tile(np.arange(length), b)[None, mine]),
        edges=tuple(cu_seqlens.tolist()),
        cu_seqlens=to_device(cu_seqlens),
        chunk_cu_seqlens=to_device(chunk_cu_seqlens.astype(np.int32)),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        mtp_ids=row(bag_ids[..., 1:]),
        mtp_labels=row(mtp_labels),
        mtp_label_weight=row(mtp_label_weight),
        raw_tokens=int((valid[..., :-1] & counted[:, None]).sum()),
    )


def check_row(windows, length):
    assert windows * length < 2**31, f"a row of {windows * length} positions: cu_seqlens are int32"


def chunk(length, rank, size):
    """The positions of a row that one context-parallel rank holds: contiguous, in rank order."""
    assert length % size == 0, f"{length} positions do not divide over {size} context-parallel ranks"
    width = length // size
    return slice(rank * width, (rank + 1) * width)


def of_tokens(ids, device):
    """One document of plain tokens as a batch without labels, for looking at logits. ids: int64 [T]."""
    valid = np.ones((1, len(ids) + 1), bool)
    window = {
        "ids": np.append(ids.numpy(), 0)[None].astype(np.int64),
        "valid": valid,
        "weight": valid.astype(np.float32),
        "document": np.zeros(len(ids) + 1, np.int64),
    }
    return make([window], boundaries="align", device=device, fillers=1)
