"""Saving and building networks in this one process, for tests of checkpoints."""

from boreal_megatron.log import Reporter
from boreal_megatron.model import boreal
from boreal_megatron.train import checkpoint, optim
from boreal_megatron.train.state import State


class Said(Reporter):
    """Keeps what a run would print and record."""

    def __init__(self):
        self.lines, self.records = [], []

    def say(self, text):
        self.lines.append(text)

    def record(self, kind, step, **values):
        self.records.append({"kind": kind, "step": step, **values})


def built(config, mesh):
    """chunks, wrapped, optimizer of a new network."""
    chunks = boreal.build(config, mesh)
    wrapped = optim.wrap(config, chunks)
    return chunks, wrapped, optim.build(config, wrapped)


def into(config, folder, **options):
    """The config with its checkpoints in another folder."""
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"folder": str(folder), **options})})


def save(folder, config, wrapped, optimizer, mesh, step=0):
    """One checkpoint; its path."""
    saver = checkpoint.Saver(into(config, folder), mesh, Said())
    saver.save(wrapped, optimizer, State(step=step))
    saver.close()
    return saver.last_good
