"""What the backward pass of one micro-batch needs: the tensors that autograd keeps, by half-block, from shapes alone.

Each function returns {tensor: bytes} for one rank. `Row` has the shapes: T positions of this context-parallel rank,
S = T/tp of the residual stream under sequence parallelism, h hidden, e bytes of an element of the network's dtype.
Where the Triton operations keep something else than their plain torch twins, both are here; so is the RMSNorm of
torch, whose CUDA kernel keeps less than its CPU form. Tests compare all of it with what the built network keeps.
"""

from dataclasses import dataclass

from boreal_megatron.config.layout import padded_vocab

CHUNK = 64  # positions of the Triton delta rule's chunks
TORCH_CHUNK = 32  # of its twin's
INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Row:
    """One micro-batch on one rank.

    Attributes:
        positions: T. tensor: T / S, 1 without sequence parallelism. documents: in the row.
        cut: `schema.Parallel`. e: bytes of an element.
        triton: whose operations run. cuda: whose RMSNorm.
        imbalance: tokens of the busiest rank's experts, over the mean.
    """

    model: object
    cut: object
    positions: int
    tensor: int
    documents: int
    e: int
    triton: bool
    cuda: bool
    imbalance: float

    @classmethod
    def of(cls, config, phase, device, imbalance):
        cut = config.parallel
        return cls(
            model=config.model,
            cut=cut,
            positions=phase.sequence * config.micro_batch // cut.context,
            tensor=cut.tensor if cut.sequence_parallel else 1,
            documents=config.micro_batch,
            e={"fp32": 4, "bf16": 2}[config.precision],
            triton=device == "cuda" and config.kernels.others != "torch",
            cuda=device == "cuda",
            imbalance=imbalance,
        )

    @property
    def stream(self):
        """Bytes of a residual stream, [S, 1, h]."""
        return self.e * self.positions // self.tensor * self.model.hidden_size


def norm(row, name, positions, width):
    """RMSNorm in FP32: its input and 1/rms; torch's CPU form also keeps the normalised input."""
    elements = positions * width
    found = {f"{name} input": 4 * elements, f"{name} 1/rms": 4 * positions, f"{name} weight": 4 * width}
    if not row.cuda:
        found[f"{name} normalised"] = 4 * elements
    return found


def half_block(row, letter):
    """{tensor: bytes} of one half-block."""
    kinds = {"*": attention, "G": deltanet, "-": dense, "E": moe}
    S = row.positions // row.tensor
    return norm(row, "norm", S, row.model.hidden_size) | {"normed": row.stream} | kinds[letter](row)


def attention(row):
    a, T, e, tp = row.model.attention, row.positions, row.e, row.cut.tensor
    queries, keys = T * a.heads * a.head_dim // tp, T * a.kv_heads * a.head_dim // tp
    return {
        "q, k, v, gate": e * 2 * (queries + keys),
        **norm(row, "q norm", T * a.heads // tp, a.head_dim),
        **norm(row, "k norm", T * a.kv_heads // tp, a.head_dim),
        "rotated q": e * queries,
        "rotated k": e * keys,
        "attention output": e * queries,
        "logsumexp": 4 * T * a.heads // tp,
        "output FP32": 4 * queries,
        "gate FP32": 4 * queries,
        "activated gate": 4 * queries,
        "gated output": e * queries,
    }


def deltanet(row):
    g, T, e, tp = row.model.gdn, row.positions, row.e, row.cut.tensor
    H, HV, K = g.key_heads // tp, g.value_heads // tp, g.head_dim
    chunks = T // CHUNK + row.documents
    return {
        "q, k, v, z, b, a": e * T * (2 * H * K + 2 * HV * K + 2 * HV),
        "normalised q, k": 2 * e * chunks * CHUNK * H * K,
        "q, k norms": 4 * 2 * T * H,
        "v": e * T * HV * K,
        "a, b": 2 * e * T * HV,
        "inverse of each chunk": e * chunks * CHUNK * CHUNK * HV,
        "decays": 4 * chunks * CHUNK * HV,
        "rule output": e * T * HV * K,
        "gated output": e * T * HV * K,
    }


def dense(row):
    return mlp(row, row.positions, row.model.ffn_hidden_size // row.cut.tensor)


def mlp(row, positions, width):
    """SwiGLU: both halves of fc1, silu of one, a copy of the other (megatron-core adds an offset to it), the product."""
    return {"fc1": 2 * row.e * positions * width, "silu": row.e * positions * width} | {
        name: row.e * positions * width for name in ("linear half", "product")
    }


def moe(row):
    m, T, e = row.model.moe, row.positions, row.e
    S = T // row.tensor
    routed = int(S * row.tensor * m.top_k * row.imbalance)
    width = m.expert_hidden_size // row.cut.expert_tensor
    return {
        "router": S * m.experts * (4 + 4 + 1 + INDEX) + S * m.top_k * (INDEX + 4),
        "dispatched": e * routed * row.model.hidden_size,
        **{f"expert {name}": n for name, n in mlp(row, routed, width).items()},
        "weighted product": e * routed * width,
        **{f"shared {name}": n for name, n in mlp(row, T, m.shared_hidden_size // row.cut.tensor).items()},
    }


def head(row):
    """One loss: the gathered hidden states' gradient, and what exists of the logits at a time."""
    columns = padded_vocab(row.model) // row.cut.tensor
    return {"gradient of hidden": row.e * row.positions * row.model.hidden_size}, min(
        row.positions * columns * row.e, 750_000_000
    )
