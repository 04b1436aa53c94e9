"""Routed experts as one grouped product of matrices, with the checkpoint of one expert after another.

E experts of this rank, T rows sorted by expert, h hidden, f width of an expert on this expert-tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule


class GroupedExperts(MegatronModule):
    """SwiGLU experts over torch.nn.functional.grouped_mm. Fills megatron-core's `experts` slot.

    How many rows each expert has stays on the device, so no expert waits for the host. Weights of all experts are one
    parameter; in checkpoints they are megatron-core's SequentialMLP's, tensor by tensor.
    """

    def __init__(self, num_local_experts, config, pg_collection, name=None):
        super().__init__(config=config)
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        # Gate rows, then up rows.
        self.linear_fc1 = self._weights(num_local_experts, 2 * width, config.hidden_size, cut=1)
        self.linear_fc2 = self._weights(num_local_experts, config.hidden_size, width, cut=2)

    def _weights(self, experts, rows, columns, cut):
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(
            torch.empty(
                experts, rows, columns, dtype=self.config.params_dtype, device=torch.cuda.current_device()
            )
        )
        set_tensor_model_parallel_attributes(holder.weight, is_parallel=True, dim=cut, stride=1)
        return holder

    def forward(self, hidden, tokens_per_expert, probabilities):
        """[T, h], [E] integers that sum to T, [T] -> ([T, h], no bias)."""
        first, second = self.linear_fc1.weight, self.linear_fc2.weight
        if not hidden.shape[0]:  # no product of nothing; gradients are there, and zero
            return hidden * probabilities.unsqueeze(-1) * (first.sum() + second.sum()), None
        ends = tokens_per_expert.to(hidden.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        mixed = F.grouped_mm(hidden, first.mT, offs=ends)  # [T, 2f]
        return F.grouped_mm(self._swiglu(mixed, probabilities.unsqueeze(-1)), second.mT, offs=ends), None

    def _swiglu(self, mixed, probabilities):
        """[T, 2f] -> [T, f], times the router's weight of the row."""
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(mixed, None, probabilities)
        gate, up = mixed.chunk(2, dim=-1)
        return (F.silu(gate) * up * probabilities).to(mixed.dtype)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {
            f"{prefix}{name}.weight": ShardedTensorFactory(
                f"{prefix}experts.{name}.weight",
                getattr(self, name).weight,
                lambda key, weights, replica, _, halves=halves: self._pieces(
                    key, weights, replica, sharded_offsets, halves
                ),
                lambda experts: torch.stack([torch.cat(parts) for parts in experts]),
                replica_id=(0, 0, self.dp_group.rank()),
            )
            for name, halves in (("linear_fc1", True), ("linear_fc2", False))
        }

    def _pieces(self, key, weights, replica, offsets, halves):
        """A list for each expert: its gate and its up rows, each cut by rows; or its weight, cut by columns."""
        axis, count = len(offsets), weights.shape[0]
        first, total = self.ep_group.rank() * count, self.ep_group.size() * count
        rank, size = self.tp_group.rank(), self.tp_group.size()
        places = (
            [(axis + 1, rank, 2 * size), (axis + 1, size + rank, 2 * size)]
            if halves
            else [(axis + 2, rank, size)]
        )
        return [
            [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    (axis, first + number, total),
                    place,
                    replica_id=replica,
                    prepend_axis_num=axis + 1,
                )
                for part, place in zip(weight.detach().chunk(len(places)), places, strict=True)
            ]
            for number, weight in enumerate(weights)
        ]
