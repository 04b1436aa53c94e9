"""Reading a checkpoint's pickles without running what is in them.

A `torch_dist` checkpoint has two kinds: `.metadata`, which says where each tensor lies, and the few objects that are
not tensors (generators, the optimizer's step). Pickle calls whatever a file names; here only the names below exist.
"""

import io
import pickle
from pathlib import Path

import torch

from boreal_megatron.errors import BorealError

# What torch 2.15 and megatron-core 0.19.2 write into `.metadata`: plain records.
METADATA_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip


class _Records(pickle.Unpickler):
    def find_class(self, module, name):
        if name in METADATA_NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's description contains")


def read_metadata(path):
    """The `.metadata` of a checkpoint folder.

    Returns:
        torch.distributed.checkpoint.metadata.Metadata.

    Raises:
        BorealError: it is missing or damaged, or asks for code that a description has no use for.
    """
    path = Path(path) / ".metadata"
    try:
        with path.open("rb") as file:
            return _Records(file).load()
    except pickle.UnpicklingError as error:
        raise BorealError(f"{path} is refused: {error}. Nothing of it was run; do not use this checkpoint") from None
    except OSError as error:
        raise BorealError(f"{path.parent} cannot be read as a checkpoint: {error}; name an iter_* folder") from None
    except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a pickle cut or altered
        raise BorealError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def load_object(data):
    """A stored object that is not a tensor: numbers, strings, containers, tensors.

    Raises:
        pickle.UnpicklingError: it contains anything else.
    """
    with torch.serialization.safe_globals([io.BytesIO]):  # Transformer Engine keeps its FP8 scales in one
        return torch.load(data, map_location="cpu", weights_only=True)
