"""Small runs over data whose every id tells where it lies: two sources, bags of 4, then of 1, then of 4 again."""

import hashlib

import numpy as np

from boreal_megatron.config.schema import Phase
from boreal_megatron.data.indexed import IndexedWriter
from tests.support.configs import config_for, tiny_model

BLEND = {"a": 1.0, "b": 3.0}
PHASES = (
    Phase(name="tst", until_steps=3, bag_size=4, sequence=8, positions_per_step=64, blend=BLEND),
    Phase(name="ntp", until_raw_tokens=1000, sequence=16, positions_per_step=128),
    Phase(name="again", until_steps=9, bag_size=4, sequence=8, positions_per_step=64, blend={"b": 1.0}),
)
STEPS = 9


def write_sources(folder):
    """Two data sets: the ids of `a` count from 0 in file order, those of `b` from 10,000. Returns name -> prefix."""
    sources = {}
    for seed, (name, documents, first) in enumerate((("a", 12, 0), ("b", 200, 10_000))):
        lengths = np.random.default_rng(seed).integers(0, 25, documents)
        with IndexedWriter(folder / name, np.int32) as writer:
            writer.append_many(first + np.arange(lengths.sum()), lengths)
        sources[name] = str(folder / name)
    return sources


def run_config(sources, *, phases=PHASES, vocab_size=20_000, folder="none", seed=1234, **data):
    return config_for(
        tiny_model(vocab_size=vocab_size),
        phases=[each.model_dump(exclude_none=True) for each in phases],
        data=dict(tokenizer="none", sources=sources, **data),
        checkpoint=dict(folder=str(folder)),
        seed=seed,
    )


def fingerprint(batch):
    """SHA-256 over every field of a Batch: name, type, shape and content."""
    digest = hashlib.sha256()
    for name, value in sorted(vars(batch).items()):
        if hasattr(value, "numpy"):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()
