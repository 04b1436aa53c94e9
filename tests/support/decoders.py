"""Small exported decoders with random weights, and how far their logits are apart."""

import torch

from boreal_megatron.convert.hf import build_hf
from tests.support.networks import random_weights, tiny


def build(model):
    return build_hf(model, random_weights(model).__getitem__, eos_token_id=0)


def some_ids(length, batch=1, seed=1):
    """[batch, length] ids of the tiny networks, none of them 0."""
    return torch.randint(1, tiny().vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(decoder, ids, **kwargs):
    """Logits of one pass without a cache."""
    return decoder(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_pieces(decoder, ids, cuts, **kwargs):
    """Logits of several passes that go on from a cache, cut at the positions `cuts`."""
    cache, logits = None, []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        out = decoder(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def difference(found, expected):
    """Largest error of a position's logits, relative to their size; [..., vocab] each."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
