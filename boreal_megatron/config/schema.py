"""The one description of a run: frozen pydantic models, no torch, no megatron.

Units live in names: `positions` are what the network sees, `raw_tokens` are what the data set loses; with bags of
k tokens one position is k raw tokens. Derived values are methods, never stored fields.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Gate = Literal["silu", "sigmoid"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# ---------------------------------------------------------------- the network


class Attention(Frozen):
    """Gated grouped-query softmax attention: per-head q/k RMSNorm, partial RoPE, elementwise output gate."""

    heads: Positive
    kv_heads: Positive
    head_dim: Positive = 256
    gate: Gate = "silu"
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    rope_theta: Annotated[float, Field(gt=0.0)] = 1e7

    def rope_dim(self):
        """Rotated dimensions of each head (even)."""
        return int(self.head_dim * self.rope_fraction)


class GDN(Frozen):
    """Gated DeltaNet mixer (arXiv 2412.06464): key heads, value heads grouped over them, one head_dim for both."""

    key_heads: Positive
    value_heads: Positive
    head_dim: Positive = 128
    conv_width: Annotated[int, Field(ge=2)] = 4
    gate: Gate = "silu"


class MoE(Frozen):
    """Fine-grained experts, sigmoid router with the noaux_tc balancing bias, one ungated shared expert."""

    experts: Positive
    top_k: Positive
    expert_hidden_size: Positive
    shared_hidden_size: Positive
    route_scale: float = 2.5


class Model(Frozen):
    """The network. `pattern` has one letter a half-block: `*` attention, `G` Gated DeltaNet, `-` dense SwiGLU,
    `E` MoE; spaces are ignored, `8x(...)` repeats, and what follows `/` is the MTP head's block. `vocab_size` is what
    the softmax is over; the matrices have `layout.padded_vocab` rows."""

    pattern: str
    vocab_size: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    attention: Attention
    gdn: GDN
    moe: MoE | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_positions: Positive


# ---------------------------------------------------------------- the run


class Parallel(Frozen):
    """How the network and its rows are cut. Data parallelism is what remains: world / (tensor * pipeline * context).

    `virtual_pipeline` chunks of the network on each pipeline rank make the interleaved schedule. `pipeline_layers`
    gives the card layers of every stage, pipeline * virtual_pipeline of them in the network's order; without it they
    are as even as can be. `context_deltanet` is how Gated DeltaNet crosses context-parallel ranks: `state` hands one
    (state, transition) pair from chunk to chunk, `heads` exchanges positions for heads by all-to-all. `dispatcher` is
    how positions reach their experts: `alltoall` and `allgather` by collectives, `deepep` and `hybridep` by the kernels
    of DeepEP. `overlap` reduces gradients under the backward pass and, with the distributed optimizer, gathers weights
    under the next forward pass.
    """

    tensor: Positive = 1
    sequence_parallel: bool = False
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    pipeline_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, strict=False)
    context: Positive = 1
    context_deltanet: Literal["state", "heads"] = "state"
    expert: Positive = 1
    expert_tensor: Positive = 1
    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    overlap: bool = False


class Precision(Frozen):
    """What activations and weights are computed in; master weights and moments are FP32, gradients as
    `optimizer.gradients` says.

    `fp8` is how Transformer Engine scales the operands of the linear layers that `config/fp8.py` lists. `tensorwise`:
    one scale a tensor, of its present values; `delayed`: of its last 1,024 steps; `blockwise`: 1 x 128 values of an
    activation, 128 x 128 of a weight. A name alone is `compute`.
    """

    compute: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["tensorwise", "delayed", "blockwise"] | None = None

    def __str__(self):
        return f"{self.compute} with FP8 ({self.fp8})" if self.fp8 else self.compute


class Piece(Frozen):
    """Learning rate over one phase, replacing the run's schedule there (annealing, context extension)."""

    shape: Literal["constant", "linear", "cosine"]
    start: Annotated[float, Field(ge=0.0)]
    end: Annotated[float, Field(ge=0.0)]


class Phase(Frozen):
    """One stretch of the run, with what holds during it.

    It ends when the run has consumed `until_raw_tokens`, or taken `until_steps` steps, both counted from the
    start of the run; exactly one of the two is written. `blend` weighs sources (NAME) and their curriculum bins
    (NAME/BIN); without it every source counts by its size, and so do the bins of a source that is named as a whole.
    """

    name: str
    until_raw_tokens: Positive | None = None
    until_steps: Positive | None = None
    bag_size: Positive = 1
    sequence: Positive
    positions_per_step: Positive
    blend: dict[str, Annotated[float, Field(gt=0.0)]] | None = None
    learning_rate: Piece | None = None
    mtp_weight: Annotated[float, Field(ge=0.0)] = 0.1
    router_bias_rate: Annotated[float, Field(ge=0.0)] = 1e-3

    @model_validator(mode="after")
    def _one_end(self):
        if (self.until_raw_tokens is None) == (self.until_steps is None):
            raise ValueError("write exactly one of until_raw_tokens and until_steps")
        return self

    def windows_per_step(self):
        return self.positions_per_step // self.sequence

    def raw_tokens_per_step(self):
        """Raw tokens of a step with full bags; padded bags read a little less."""
        return self.positions_per_step * self.bag_size


class Schedule(Frozen):
    """Learning rate over the phases that have no piece of their own. `wsd`: constant, then linear decay over the
    last `decay_fraction`. Every shape ends at `final_fraction` of the peak, except `constant`."""

    shape: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    peak: Annotated[float, Field(gt=0.0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    final_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.1


class Optimizer(Frozen):
    """AdamW. Weight decay touches matrices only; `train/optim.py` has the table.

    `gradients` is what a step's gradients are added up and exchanged in. bf16 halves the traffic, and the memory but for
    embedding and head, which add theirs up in FP32 either way; it keeps 8 bits of every other partial sum.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    distributed: bool = True
    gradients: Literal["fp32", "bf16"] = "fp32"


class DataSource(Frozen):
    """A Megatron data set, PREFIX.bin and PREFIX.idx; a prefix alone may be written for it.

    `epochs` is how many times it may be begun at most: a run that needs more is refused at the start, and stops where
    it would begin one more. Without it the next epoch begins by itself. `weights` is a .npy of float32, one for each
    document: what its tokens count in the loss, which is divided by the weights of all targets. `bins` is a .npy of
    integers, one for each document: each bin is a stream of its own, NAME/BIN, that a blend may name.
    """

    prefix: str
    epochs: Positive | None = None
    weights: str | None = None
    bins: str | None = None


class Data(Frozen):
    """`sources` maps a name to a DataSource.

    Documents are read in random order, each from end to end. `piece_tokens` cuts them into pieces of at most so many
    raw tokens first, so that the few rows of a small step come from many documents; nothing longer than a piece is
    then learned from. `prefetch_workers` threads on each rank read the next step while one trains; 0 reads each step
    when it is its turn. A prefix may be a URL (s3://, gs://, https://), where more threads hide more latency.
    `boundaries` is where bags may end, see `data/source.py`.
    """

    tokenizer: str
    sources: dict[str, DataSource]
    validation: str | None = None
    boundaries: Literal["flat", "align", "drop_tail"] = "flat"
    piece_tokens: Positive | None = None
    prefetch_workers: Annotated[int, Field(ge=0)] = 2

    @field_validator("sources", mode="before")
    @classmethod
    def _prefixes(cls, sources):
        if not isinstance(sources, dict):
            return sources
        return {name: {"prefix": value} if isinstance(value, str) else value for name, value in sources.items()}

    @model_validator(mode="after")
    def _some_source(self):
        if not self.sources:
            raise ValueError("sources is empty; name at least one data prefix")
        wrong = [name for name in self.sources if "/" in name]
        if wrong:
            raise ValueError(f"source {', '.join(wrong)}: a name has no '/', which names a curriculum bin; rename it")
        return self

    def source_of(self, stream):
        """The name of the source that a stream, NAME or NAME/BIN, belongs to."""
        return stream.rpartition("/")[0] or stream


class Checkpoint(Frozen):
    """`async_save` writes in the background; a step waits for the copy only. `keep_last` newest checkpoints stay (all
    of them without it), and those of steps that `keep_every` divides. `fall_back` goes on from an earlier checkpoint
    where the latest is damaged; without it a damaged one stops the run."""

    folder: str
    every_steps: Positive = 1000
    async_save: bool = False
    keep_last: Positive | None = None
    keep_every: Positive | None = None
    fall_back: bool = False

    @model_validator(mode="after")
    def _something_goes(self):
        if self.keep_every and not self.keep_last:
            raise ValueError("keep_every says what stays beside the keep_last newest; write keep_last as well")
        return self


class Evaluation(Frozen):
    """`windows` rows at intervals, `final_windows` at the end of the run (all there are, if fewer)."""

    every_steps: Positive = 500
    windows: Positive = 64
    final_windows: Positive = 256


class Log(Frozen):
    every_steps: Positive = 10


class Kernels(Frozen):
    """Implementations: of `boreal_kernels`' operations (`delta_rule`, `others`), and of the modules in megatron-core's
    slots (`model/provider.py`). `auto` takes the best one that the device and the installed versions allow, and the run
    says which and why; a name runs as named or stops the run.

    `linears`: Transformer Engine's, with norms inside, or megatron-core's. `attention`: Transformer Engine's,
    flash-attn's, or torch's. `experts`: torch's grouped product, Transformer Engine's, or one expert after another.
    """

    delta_rule: Literal["auto", "triton", "fla", "flash_qla", "torch"] = "auto"
    others: Literal["auto", "triton", "torch"] = "auto"
    linears: Literal["auto", "te", "local"] = "auto"
    attention: Literal["auto", "te", "flash", "sdpa"] = "auto"
    experts: Literal["auto", "grouped_mm", "te", "sequential"] = "auto"


class Config(Frozen):
    """A whole run. `check.py` says what is wrong with it beyond types.

    `recompute` trades time for memory in the backward pass: `selective` keeps no activations inside core attention,
    the Gated DeltaNet core and the MoE layers, `full` keeps only each half-block's input.
    """

    model: Model
    parallel: Parallel = Parallel()
    micro_batch: Positive = 1
    precision: Precision = Precision()
    recompute: Literal["none", "selective", "full"] = "none"
    phases: tuple[Phase, ...] = Field(strict=False, min_length=1)
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    data: Data
    checkpoint: Checkpoint
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    kernels: Kernels = Kernels()
    seed: int = 1234

    @field_validator("precision", mode="before")
    @classmethod
    def _a_name_alone(cls, precision):
        return {"compute": precision} if isinstance(precision, str) else precision

    def plain(self, **changes):
        """The same network of modules that run anywhere, without FP8; checkpoints have the same tensors."""
        return self.model_copy(
            update={
                "kernels": Kernels(linears="local", attention="sdpa", experts="sequential"),
                "precision": Precision(compute=self.precision.compute),
                "parallel": self.parallel.model_copy(update={"dispatcher": "alltoall"}),
                **changes,
            }
        )
