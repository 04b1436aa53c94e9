"""Full tensors out of a training checkpoint, by name, without starting the layout that wrote it."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from boreal_megatron.errors import BorealError


class TensorReader:
    """`reader(name)` is one full tensor of a `torch_dist` checkpoint, on the CPU.

    Args:
        path: an `iter_*` folder.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            metadata = torch_checkpoint.FileSystemReader(self.path).read_metadata()
        except (OSError, EOFError) as error:
            raise BorealError(f"{path} cannot be read as a checkpoint: {error}; name an iter_* folder") from None
        self.tensors = {
            key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }

    def __call__(self, name):
        if name not in self.tensors:
            raise BorealError(f"{self.path} has no tensor {name!r}; it is a checkpoint of another model")
        entry = self.tensors[name]
        out = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        torch_checkpoint.load(out, storage_reader=torch_checkpoint.FileSystemReader(self.path), no_dist=True)
        return out[name]
