"""Checkpoints of given weights, written without a network, megatron-core or processes."""

import torch
from boreal_megatron.config.schema import Config
from boreal_megatron.convert import writer
from boreal_megatron.train import store


def config_of(model, tokenizer, folder):
    return Config(
        model=model,
        phases=[{"name": "only", "until_steps": 4, "sequence": 64, "positions_per_step": 64}],
        schedule={"peak": 1e-3},
        data={"tokenizer": str(tokenizer), "sources": {"none": "none"}},
        checkpoint={"folder": str(folder)},
    )


def checkpoint(folder, model, tokenizer, tensors, step=7):
    """FOLDER/iter_0000007; `tensors`: pairs of training name and full tensor, or a dict."""
    pairs = tensors.items() if isinstance(tensors, dict) else tensors
    partial = store.begin(folder, step, 0)
    writer.write_tensors(partial, ((name, None, tensor) for name, tensor in pairs))
    record = {"state": {"step": step}, "layout": None, "contents": "weights"}
    return store.finish(partial, config_of(model, tokenizer, folder), record)


def constant(shapes):
    """(name, tensor) of every shape, made when asked for: large ones that cost no time."""
    for name, shape in shapes.items():
        yield name, torch.full(shape, 0.01)
