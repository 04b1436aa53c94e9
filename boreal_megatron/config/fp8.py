"""Which products FP8 training computes in FP8, and which modules keep what precision. No torch.

`precision.fp8` quantises the operands of Transformer Engine's linear layers, forward and backward; everything else is as
without it. The first and the last layer stay in bf16, as the literature recommends, except with delayed scaling, whose
amax histories span one context around all layers.
"""

from typing import NamedTuple

from boreal_megatron.config.pattern import expand

ALIGNMENT = 16  # what tensor cores want of every dim of an FP8 product
HALF_BLOCKS = 2  # of a layer: a mixer and a feed-forward network, which megatron-core counts as two layers
FP8, BF16, FP32 = "FP8", "bf16", "FP32"


class Row(NamedTuple):
    """`parameters` are ends of names in the network; a name belongs to the first row that has its end."""

    what: str
    parameters: tuple
    precision: str
    why: str


TABLE = (
    Row("embedding", ("word_embeddings.weight",), BF16, "a look-up, no product"),
    Row(
        "output head, main and MTP",
        ("output_layer.weight",),
        BF16,
        "its loss is a sum over the whole vocabulary",
    ),
    Row("router", ("router.weight",), FP32, "top-k flips on rounding of the scores"),
    Row("decay of Gated DeltaNet", ("A_log", "dt_bias"), FP32, "the recurrence amplifies rounding"),
    Row(
        "convolution of Gated DeltaNet", ("conv1d.weight",), BF16, "4 taps a channel, no product of matrices"
    ),
    Row("norms", ("norm.weight", "layer_norm_weight"), BF16, "vectors; statistics are FP32"),
    Row(
        "routed experts",
        (".experts.linear_fc1.weight", ".experts.linear_fc2.weight"),
        BF16,
        "kernels.experts=te has them in FP8",
    ),
    Row("attention projections", ("linear_qkv.weight", "linear_proj.weight"), FP8, ""),
    Row("Gated DeltaNet projections", ("in_proj.weight", "out_proj.weight"), FP8, ""),
    Row("dense and shared-expert SwiGLU", ("linear_fc1.weight", "linear_fc2.weight"), FP8, ""),
    Row("projection into the MTP block", ("eh_proj.weight",), FP8, ""),
)


def rows(config):
    """TABLE as it is for one configuration (`config.schema.Config`): experts are in FP8 where TE's modules run them."""
    experts_too = config.kernels.experts == "te"
    return [
        row._replace(precision=FP8, why="kernels.experts=te")
        if row.what == "routed experts" and experts_too
        else row
        for row in TABLE
    ]


def row_of(config, name):
    """The row that a parameter, by its name in checkpoints, belongs to."""
    return next(row for row in rows(config) if name.endswith(row.parameters))


def half_blocks(config):
    """range of the half-blocks of the main network that are in FP8; the MTP block is in FP8 whenever one of them is."""
    count = len(expand(config.model.pattern)[0])
    if config.precision.fp8 is None:
        return range(0)
    kept = 0 if config.precision.fp8 == "delayed" else HALF_BLOCKS
    return range(kept, count - kept)


def lines(config):
    """What to tell people; nothing without FP8."""
    if config.precision.fp8 is None:
        return []
    inside, count = half_blocks(config), len(expand(config.model.pattern)[0])
    kept = "" if len(inside) == count else f"; layers 0 and {count // HALF_BLOCKS - 1} in bf16"
    products = ", ".join(row.what for row in rows(config) if row.precision == FP8)
    others = [f"{row.what} in {row.precision} ({row.why})" for row in rows(config) if row.precision != FP8]
    return [f"FP8 ({config.precision.fp8}): {products}{kept}", *others]
