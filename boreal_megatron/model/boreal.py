"""The network: megatron-core's HybridModel with bags in front and our losses behind.

k bag, b = 1 packed row, s positions of this context-parallel rank, h hidden; s/tp under sequence parallelism.
"""

from megatron.core.models.hybrid.hybrid_model import HybridModel

from boreal_megatron.config.layout import padded_vocab, stage_pattern
from boreal_megatron.model import head, provider, rope
from boreal_megatron.model.config import transformer_config
from boreal_megatron.model.embedding import BagEmbedding
from boreal_megatron.model.init import initialise
from boreal_megatron.model.kernels import chosen
from boreal_megatron.model.packing import Packing
from boreal_megatron.model.spec import stack_spec


class BorealModel(HybridModel):
    """One chunk of a BOREAL network: a pipeline stage, or one of a stage's virtual stages.

    Args:
        config: `config.schema.Config`. settings: megatron-core's TransformerConfig, one for all chunks of a rank.
        choices: `model.provider.chosen`.
        mesh: `parallel.Mesh`.
        number: which virtual stage of this pipeline rank.
    """

    def __init__(self, config, settings, choices, mesh, number):
        pipeline = mesh.groups.pp
        kernels = chosen(config.kernels, config.model.gdn.head_dim, mesh.device)
        modules = provider.modules(choices)
        super().__init__(
            config=settings,
            hybrid_stack_spec=stack_spec(config.model, kernels, modules, config.parallel.context_deltanet),
            vocab_size=padded_vocab(config.model),
            max_sequence_length=config.model.max_positions,
            hybrid_layer_pattern=stage_pattern(config.model.pattern, config.parallel),
            pre_process=pipeline.rank() == 0 and number == 0,
            post_process=pipeline.rank() == pipeline.size() - 1 and number == config.parallel.virtual_pipeline - 1,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="none",
            pg_collection=mesh.groups,
            vp_stage=number if config.parallel.virtual_pipeline > 1 else None,
        )
        self.description = config.model
        self.kernels, self.choices = kernels, choices
        self.expert_loads = None  # [MoE layers, experts] of the last global batch, see train/optim.py
        if self.post_process:
            self.output_layer.gradient_accumulation_fusion = False  # `logits` leaves gradients to autograd
        if hasattr(self, "embedding"):
            BagEmbedding.adopt(self.embedding.word_embeddings, kernels["bag_embedding"].backend)
            if self.share_embeddings_and_output_weights and self.post_process:
                # Where the MTP block has an embedding of its own, on a last stage that is not the first, the tied
                # head uses that one; HybridModel allocates a second weight there, and nothing reads it.
                self.output_layer.weight = None

    def forward(self, batch, mtp_weight=None):
        """A micro-batch through this chunk.

        Args:
            mtp_weight: in training, the weight of the MTP loss in what is differentiated (`head.loss_function`); None
                where anything else may be.

        Returns:
            The last chunk: the loss vector of `head.Losses`, [4] FP32. Others: hidden [s/tp, 1, h].
        """
        hidden, common = self._decode(batch)
        if not self.post_process:
            return hidden
        mtp = None
        if self.mtp_process:
            both = self.mtp(
                input_ids=batch.mtp_ids,
                position_ids=None,
                hidden_states=hidden,
                attention_mask=None,
                embedding=self.embedding,
                **common,
            )
            hidden, ahead = both.chunk(2, dim=0)
            mtp = self._loss(ahead, batch.mtp_labels, batch.mtp_label_weight, mtp_weight)
        main = self._loss(hidden, batch.labels, batch.label_weight, None if mtp_weight is None else 1.0)
        return head.Losses.pack(main, mtp)

    def own_gradients(self):
        """Weights whose gradients the embedding and the loss add to their buffers, unseen by autograd."""
        weights = []
        if hasattr(self, "embedding"):
            weights.append(self.embedding.word_embeddings.weight)
        if self.post_process and self.output_layer.weight is not None:
            weights.append(self.output_layer.weight)
        return weights

    def logits(self, batch):
        """Logits of a single-process model, [s, vocab_size]."""
        hidden, _ = self._decode(batch)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0][:, 0, : self.description.vocab_size]

    def _decode(self, batch):
        """Embedding and stack; also what the MTP block needs again."""
        attention = self.description.attention
        common = dict(
            rotary_pos_emb=rope.rotary(batch.positions[0], attention.rope_dim(), attention.rope_theta),
            packed_seq_params=Packing.of(batch),
        )
        hidden = self.embedding(input_ids=batch.ids, position_ids=None) if self.pre_process else None
        return self.decoder(hidden_states=hidden, attention_mask=None, **common), common

    def _loss(self, hidden, labels, label_weight, promise):
        tied = self.share_embeddings_and_output_weights
        return head.multi_hot_loss(
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            hidden,
            labels,
            label_weight,
            vocab_size=self.description.vocab_size,
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            promise=promise,
            backend=self.kernels["linear_multi_hot_cross_entropy"].backend,
        )


def build(config, mesh):
    """This rank's chunks of the network with their initial weights, on the mesh's device: a list of BorealModel, one
    per virtual pipeline stage."""
    choices = provider.chosen(config, mesh.device)
    settings, count = transformer_config(config, choices), config.parallel.virtual_pipeline
    chunks = [BorealModel(config, settings, choices, mesh, number) for number in range(count)]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                # Experts always reduce over the expert data-parallel group, so that the optimizer's structure, and
                # with it the checkpoint's, is the same in every layout.
                parameter.allreduce = False
        chunk.to(mesh.device)  # megatron-core makes router weights on the CPU, whatever the device
        if mesh.device.type != "meta":  # which stores no values (`dry_run.py`)
            initialise(chunk, config.seed, mesh)
    return chunks
