"""boreal_kernels: the operations of a Gated-DeltaNet / MoE language model that are worth a kernel of their own.

Six public functions, one folder each (the two cross entropies share one). Every function takes `backend=`: "torch" is
plain torch and runs anywhere, "auto" takes the best one present. Nothing here imports anything but torch.

Shape letters, the same in every file:
    B rows   T positions   N sequences (documents when packed, else B)   C channels   D normalised width   W conv taps
    H key heads   HV value heads   G = HV/H value heads per key head   K key width   V value width
    k tokens per bag   h hidden width   v vocabulary   tp tensor-parallel ranks
"""

from boreal_kernels.bag_embedding import bag_embedding
from boreal_kernels.causal_conv1d import causal_conv1d
from boreal_kernels.gated_delta_rule import gated_delta_rule
from boreal_kernels.gated_rmsnorm import gated_rmsnorm
from boreal_kernels.multi_hot_ce import linear_multi_hot_cross_entropy, multi_hot_cross_entropy

__all__ = [
    "bag_embedding",
    "causal_conv1d",
    "gated_delta_rule",
    "gated_rmsnorm",
    "linear_multi_hot_cross_entropy",
    "multi_hot_cross_entropy",
]
