"""The bag embedding: a position's vector is the FP32 mean of its tokens' rows (TST, arXiv 2605.06546).

k tokens a bag, b rows, s positions, h hidden, v vocabulary.
"""

from boreal_kernels import bag_embedding
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class BagEmbedding(VocabParallelEmbedding):
    """ids [k, b, s] -> [b, s, h], or [s/tp, b, h] under sequence parallelism.

    The mean is taken over this rank's rows before the one tensor-parallel reduction, so a bag costs no more traffic
    than a token. A negative id is an empty slot: the mean is over the others. Where the weight has a gradient buffer of
    megatron-core's (`main_grad`), its gradient is added there, in FP32, and nowhere else.
    """

    @classmethod
    def adopt(cls, embedding, backend):
        """Turn a built VocabParallelEmbedding into this class; the weight and its checkpoint name stay."""
        embedding.__class__ = cls
        embedding.backend = backend
        return embedding

    def forward(self, ids):
        k, b, s = ids.shape
        flat = ids.reshape(k, b * s)
        out = bag_embedding(
            flat,
            self.weight,
            vocab_start=self.vocab_start_index,
            valid=flat >= 0,
            main_grad=getattr(self.weight, "main_grad", None),
            backend=self.backend,
        )
        out = out.view(b, s, -1)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(out.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
