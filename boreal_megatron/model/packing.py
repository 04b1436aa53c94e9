"""What every layer of a stage knows of the packed row it sees a part of."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Packing(PackedSeqParams):
    """megatron-core's description of packed documents (cu_seqlens_q [N + 1] of the whole row, on the device), and what
    context parallelism needs besides.

    Attributes:
        edges: N + 1 numbers, the whole row's cu_seqlens on the host.
        chunk_cu_seqlens: int32 [n + 1], the stretches inside this context-parallel rank's chunk, from 0.
    """

    edges: tuple[int, ...] = ()
    chunk_cu_seqlens: torch.Tensor = None

    @classmethod
    def of(cls, batch):
        """From `data.batch.Batch`."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            edges=batch.edges,
            chunk_cu_seqlens=batch.chunk_cu_seqlens,
        )
