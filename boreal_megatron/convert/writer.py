"""A `torch_dist` checkpoint of given tensors, written as they come: no process group, one tensor in memory at a time.

megatron-core's own save wants all tensors at once. What it would leave is this: chunks as `torch.save` archives in
.distcp files, `.metadata` that says where, and `metadata.json` that names the format.
"""

import json
import pickle

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_BYTES = 2_000_000_000  # a file is closed once it has so many: ranks share the files when they verify them
COMMON = "common_state/shard_0_1"  # megatron-core's list of what is neither tensor nor sharded: one empty dict


def write_tensors(folder, tensors, pieces=1):
    """Write all files of a checkpoint but those of `store.finish`.

    Args:
        folder: what `store.begin` gave.
        tensors: iterable of (training name, index, tensor): a full tensor where index is None, else `full[index]` of
            one stacked along its first dim.
        pieces: write as many series of files as that many ranks would; matrices are cut over them along their first
            dim, stacked tensors dealt out.
    """
    chunks, sizes, kinds, stored, files = {}, {}, {}, {}, {}
    try:
        stored[MetadataIndex(COMMON)] = files.setdefault(0, _Series(folder, 0)).put([{}])
        for name, index, tensor in tensors:
            cut = pieces if index is None and tensor.dim() > 1 and len(tensor) % pieces == 0 else 1
            kinds[name] = TensorProperties(dtype=tensor.dtype)
            sizes[name] = tensor.shape if index is None else torch.Size([index + 1, *tensor.shape])
            first = 0
            for rank, part in enumerate(tensor.chunk(cut)):
                offsets = [first] + [0] * (tensor.dim() - 1)
                first += len(part)
                if index is not None:
                    offsets, part, rank = [index, *offsets], part[None], index % pieces
                offsets = torch.Size(offsets)
                where = files.setdefault(rank, _Series(folder, rank))
                stored[MetadataIndex(name, offsets)] = where.put(_alone(part))
                chunks.setdefault(name, []).append(ChunkStorageMetadata(offsets, part.shape))
            del tensor, part  # or they would be held while the next one is made
    finally:
        for series in files.values():
            series.close()
    described = {name: TensorStorageMetadata(kinds[name], sizes[name], chunks[name]) for name in chunks}
    described[COMMON] = BytesStorageMetadata()
    metadata = Metadata(described, planner_data=None, storage_data=stored, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def _alone(tensor):
    """`torch.save` writes a tensor's whole storage; a view gets one of its own."""
    shared = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared or not tensor.is_contiguous() else tensor


class _Series:
    """The files of one writer, `__R_0.distcp`, `__R_1.distcp` and so on."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.number, self.file = folder, rank, 0, None

    def put(self, value):
        """Append one archive; returns where it lies."""
        if self.file is not None and self.file.tell() >= FILE_BYTES:
            self.close()
            self.number += 1
        name = f"__{self.rank}_{self.number}.distcp"
        if self.file is None:
            self.file = (self.folder / name).open("wb")
        first = self.file.tell()
        torch.save(value, self.file)
        return _StorageInfo(name, first, self.file.tell() - first)

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None
