"""Row regroupings between training tensors and Hugging Face tensors: pure, exact, each with its inverse.

Shapes: h hidden, d attention head, Hq query heads, Hkv key/value heads, r = Hq / Hkv; for DeltaNet Hk key heads,
HV value heads, r = HV / Hk, dk and dv head sizes, C = 2 Hk dk + HV dv channels, W conv width; f FFN width.
Rows move, values never change, so a round trip is equal to the bit. On meta tensors every function tells its shapes.
"""

import torch

from boreal_megatron.errors import BorealError


def split_groups(rows, groups, sizes):
    """[groups * sum(sizes), ...], each group holding its parts in turn -> one [groups * size, ...] for each part."""
    grouped = rows.reshape(groups, sum(sizes), *rows.shape[1:])
    return tuple(part.reshape(-1, *rows.shape[1:]) for part in grouped.split(list(sizes), dim=1))


def join_groups(parts, groups):
    """The inverse of `split_groups`: [groups * size_i, ...] each -> [groups * sum(sizes), ...]."""
    grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def split_attention(qkv, heads, kv_heads, d):
    """Per kv head [q r*d | gate r*d | k d | v d] -> q_proj [Hq*2*d, h] per head [q d | gate d], k and v [Hkv*d, h]."""
    r = heads // kv_heads
    q, gate, k, v = split_groups(qkv, kv_heads, (r * d, r * d, d, d))
    return join_groups((q, gate), heads), k, v


def join_attention(q_and_gate, k, v, heads, kv_heads, d):
    q, gate = split_groups(q_and_gate, heads, (d, d))
    return (join_groups((q, gate, k, v), kv_heads),)


def split_gdn_projection(projection, key_heads, qkvz_rows, ba_rows):
    """Per key head [q dk | k dk | v r*dv | z r*dv | b r | a r] -> in_proj_qkvz and in_proj_ba, both per key head."""
    return split_groups(projection, key_heads, (qkvz_rows, ba_rows))


def join_gdn_projection(qkvz, ba, key_heads):
    return (join_groups((qkvz, ba), key_heads),)


def split_conv(weight, key_heads, sizes):
    """[C, W] with channels per key head [q dk | k dk | v r*dv] -> [C, 1, W] in flat order [all q | all k | all v]."""
    return (torch.cat(split_groups(weight, key_heads, sizes)).unsqueeze(1),)


def join_conv(weight, key_heads, sizes):
    flat = weight.squeeze(1).split([key_heads * size for size in sizes])
    return (join_groups(flat, key_heads),)


def split_gate_up(fc1):
    """[2f, h] = [gate; up] -> gate [f, h], up [f, h]."""
    return fc1.chunk(2)


def join_gate_up(gate, up):
    return (torch.cat((gate, up)),)


def drop_rows(padded, rows):
    """[padded, h] -> [rows, h]. The rows that go belong to no token; they have to be zero, or numbers would be lost."""
    extra = padded[rows:]
    if not extra.is_meta and bool(extra.any()):  # any() counts a NaN
        raise BorealError(
            f"rows {rows}..{len(padded) - 1} pad the vocabulary, and {int(extra.count_nonzero())} of their numbers are "
            "not zero; expected zeros. Something trained on tokens that do not exist: check model.vocab_size"
        )
    return (padded[:rows],)


def pad_rows(weight, rows):
    """The inverse of `drop_rows`: [v, h] -> [rows, h], with zeros below."""
    return (torch.cat((weight, weight.new_zeros(rows - len(weight), *weight.shape[1:]))),)


def same(tensor):
    """A tensor that only changes its name."""
    return (tensor,)
