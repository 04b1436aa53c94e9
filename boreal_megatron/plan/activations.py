"""What one micro-batch keeps on a rank for its backward pass, and what the fullest moment needs besides: by half-block,
from shapes alone.

`kept` gives {tensor: bytes} of the tensors that autograd keeps; `passing` what is alive besides them at the worst moment
of the half-block's own backward pass (or forward pass, where that is more). Both follow the code of `model/`,
`kernels/boreal_kernels` and megatron-core 0.19.2 tensor by tensor. No constant is fitted: tests compare them with the
storages that are alive while the built network trains.

Where Triton kernels keep something else than their plain torch twins, both are here (`triton`); so is RMSNorm, whose
CUDA kernel keeps one tensor less than torch's composite form on a CPU (`cuda`).

Shapes: T positions of this context-parallel rank, S = T/tp of the residual stream under sequence parallelism (else T),
h hidden, e bytes of an element of the network's dtype; heads and widths are those of one tensor-parallel rank.
"""

from dataclasses import dataclass

from boreal_megatron.config.layout import padded_vocab

CHUNK = 64  # positions of the Triton delta rule's chunks
TORCH_CHUNK = 32  # of its twin's
LOSS_ROWS = 1024  # rows of logits that the plain torch loss has at a time
LOSS_BLOCK = 1 << 19  # logits that it exponentiates at a time
LOSS_BUDGET = 750_000_000  # bytes of logits that the Triton loss has at a time, at most
FLOAT, INDEX = 4, 8  # bytes
CUDA, CPU = (True, True), (False, False)  # (triton, cuda)


@dataclass(frozen=True)
class Row:
    """One micro-batch on one rank: what `kept` and `passing` are functions of.

    `documents` are the stretches of the row, `imbalance` what the busiest rank's experts get over the mean, `grouped`
    says whether its experts are one product.
    """

    model: object
    cut: object
    T: int
    bag: int
    documents: int
    e: int
    recompute: str
    triton: bool
    cuda: bool
    grouped: bool
    imbalance: float

    @classmethod
    def of(cls, config, phase, kernels=CUDA, imbalance=1.0):
        rule, others, experts = config.kernels.delta_rule, config.kernels.others, config.kernels.experts
        compute = config.precision.compute
        return cls(
            model=config.model,
            cut=config.parallel,
            T=phase.sequence * config.micro_batch // config.parallel.context,
            bag=phase.bag_size,
            documents=config.micro_batch,
            e={"fp32": 4, "bf16": 2}[compute],
            recompute=config.recompute,
            triton=kernels[0] and "torch" not in (rule, others),
            cuda=kernels[1],
            grouped=experts == "grouped_mm" or (kernels[1] and experts == "auto" and compute == "bf16"),
            imbalance=imbalance if config.parallel.expert > 1 else 1.0,
        )

    @property
    def S(self):
        return self.T // self.cut.tensor if self.cut.sequence_parallel else self.T

    @property
    def stream(self):
        """Bytes of the residual stream, [S, 1, h]."""
        return self.e * self.S * self.model.hidden_size

    @property
    def whole(self):
        """Bytes of [T, 1, h]."""
        return self.e * self.T * self.model.hidden_size

    @property
    def routed(self):
        """Copies of positions that this rank's experts get."""
        return int(self.S * self.model.moe.top_k * self.cut.expert_tensor * self.imbalance)

    def gdn(self):
        """(H, HV, K): key heads, value heads, head dim."""
        g = self.model.gdn
        return g.key_heads // self.cut.tensor, g.value_heads // self.cut.tensor, g.head_dim

    def attention(self):
        """(elements of all queries, of all keys, query heads, key heads)."""
        a, tp = self.model.attention, self.cut.tensor
        n, g = a.heads // tp, a.kv_heads // tp
        return self.T * n * a.head_dim, self.T * g * a.head_dim, n, g

    def low(self, elements):
        """Bytes of a copy in FP32, which there is only of a tensor in half precision."""
        return FLOAT * elements if self.e < FLOAT else 0


# ---------------------------------------------------------------- kept


def kept(row, letter):
    """{tensor: bytes} that one half-block keeps under the run's `recompute`."""
    if row.recompute == "full":
        return {"input": row.stream}
    return outside(row, letter) | (inputs(row, letter) if row.recompute == "selective" else inside(row, letter))


def everything(row, letter):
    """{tensor: bytes} of one half-block without recomputation."""
    return outside(row, letter) | inside(row, letter)


def outside(row, letter):
    """Of `everything`, what no recomputation but `full` drops."""
    return norm(row, "norm", row.S, row.model.hidden_size) | {"normed": row.stream} | OUTSIDE[letter](row)


def inside(row, letter):
    """Of `everything`, what `selective` recomputation makes again."""
    return INSIDE[letter](row)


def inputs(row, letter):
    """What `selective` recomputation keeps in the place of `inside`."""
    if letter == "G":
        return {"q, k, v, z, b, a": projected(row)}
    return {}


def norm(row, name, positions, width, copied=None):
    """RMSNorm in FP32. In an FP32 network its input is the tensor itself, `copied` says whether that is counted here."""
    elements = positions * width
    size = FLOAT * elements if row.e == FLOAT and copied is not False else row.low(elements)
    found = {f"{name} input": size, f"{name} 1/rms": FLOAT * positions, f"{name} weight": row.low(width)}
    if not row.cuda:
        found[f"{name} normalised"] = FLOAT * elements
    return found


def attention_outside(row):
    """Across context-parallel ranks the core's queries have come from other ranks, and its keys and values are those of
    the whole row; then only an FP32 network (its key norm), or a core that is made again, still needs the projection."""
    a = row.model.attention
    queries, keys, n, g = row.attention()
    across, selective, half = row.cut.context > 1, row.recompute == "selective", row.e < FLOAT
    one = row.documents == 1 and not across and not selective  # an FP32 core's output is its only document's
    return {
        "q, k, v, gate": 0 if across and half and not selective else row.e * 2 * (queries + keys),
        **norm(row, "q norm", row.T * n, a.head_dim),
        **norm(row, "k norm", row.T * g, a.head_dim, copied=False),
        "rotated q": row.e * queries,
        "rotated k": row.e * keys if not across or selective else 0,
        "output, FP32": FLOAT * queries if half or not one else 0,
        "gate, FP32": FLOAT * queries,
        "activated gate": FLOAT * queries,
        "gated output": row.e * queries,
    }


def attention_inside(row):
    """What scaled_dot_product_attention keeps besides its inputs; across ranks its keys and values are copies."""
    queries, keys, n, _ = row.attention()
    row_of_keys = row.e * 2 * keys * row.cut.context if row.cut.context > 1 else 0
    return {"core output": row.e * queries, "logsumexp": FLOAT * row.T * n, "keys and values of the row": row_of_keys}


def projected(row):
    """Bytes of Gated DeltaNet's input projection."""
    H, HV, K = row.gdn()
    return row.e * row.T * (2 * H * K + 2 * HV * K + 2 * HV)


def deltanet_outside(row):
    """The output projection's input."""
    _, HV, K = row.gdn()
    return {"gated output": row.e * row.T * HV * K}


def deltanet_inside(row):
    """Convolution, delta rule and output norm."""
    return deltanet_triton(row) if row.triton else deltanet_torch(row)


def rule(row):
    """(positions, H, HV, K) of the delta rule: across context-parallel ranks by heads, the whole row and fewer heads."""
    H, HV, K = row.gdn()
    cp = row.cut.context if row.cut.context_deltanet == "heads" else 1
    return row.T * cp, H // cp, HV // cp, K


def chunks(row):
    """Chunks of the Triton kernels at most: each document has a short one."""
    positions = rule(row)[0]
    return min(positions, positions // CHUNK + row.documents)


def deltanet_triton(row):
    """What `boreal_kernels`' Triton operations save; they compute the states of chunks again."""
    T, H, HV, K = rule(row)
    e, n = row.e, chunks(row)
    cp, mode = row.cut.context, row.cut.context_deltanet
    # From zero, for what the chunk does to a state; and again, from the state that enters.
    passes = 2 if cp > 1 and mode == "state" else 1
    return {
        "q, k, v, z, b, a": projected(row),
        "v": e * T * HV * K,
        "normalised q, k": passes * 2 * e * n * CHUNK * H * K,
        "norms of q, k": passes * FLOAT * 2 * T * H,
        "a, b": 2 * e * T * HV,
        "inverses of chunks": passes * e * n * CHUNK * CHUNK * HV,
        "decays": passes * FLOAT * n * CHUNK * HV,
        "rule output": e * T * HV * K,
        "states across ranks": FLOAT * HV * K * K * (cp + 1) if passes == 2 else 0,
        "q, k, v, b, a of the row": e * T * ((2 * H + HV) * K + 2 * HV) if cp > 1 and mode == "heads" else 0,
    }


def deltanet_torch(row):
    """What autograd saves in `boreal_kernels`' plain torch, all in FP32."""
    T, H, HV, K = rule(row)
    C = TORCH_CHUNK
    n = -(-T // C)
    L, taps = n * C, row.model.gdn.conv_width
    keys, values, channels = H * K, HV * K, (2 * H + HV) * K
    half = row.e < FLOAT
    found = {
        "q, k, v, z, b, a": 0 if half else projected(row),
        "convolution": FLOAT * channels * ((T + taps - 1) + taps * T + taps) + (taps - 1) * T,
        "q, k before norms": 2 * FLOAT * T * keys,
        "q, k": (7 if H > 1 else 2) * FLOAT * L * keys,  # with one head its rearrangements are views
        "v": FLOAT * L * values,
        "chunk matrices of value heads": 6 * FLOAT * L * C * HV,
        "chunk matrices of key heads": 2 * FLOAT * L * C * H,
        "masks of chunks": 8 * L * C,
        "decayed q and k, W, new values": (2 + 1 + 2) * FLOAT * L * values - FLOAT * C * values,
        "chunk states": 2 * n * FLOAT * HV * K * K,
        "gates": T * HV * 3 * FLOAT + L * HV * (8 + 3 * FLOAT) + FLOAT * T * 3 * H + L,
        "rule output": FLOAT * T * values,
        "z": row.low(T * values),
        "output norm": 3 * FLOAT * T * values + FLOAT * T * HV,
    }
    if row.cut.context > 1 and row.cut.context_deltanet == "state":
        found |= {
            # No queries, and the transition as K more columns of the values.
            "matrices of the pass from zero": FLOAT * L * C * (5 * HV + H),
            "inputs of the pass from zero": FLOAT * L * (6 * values + (5 if H > 1 else 3) * keys),
            "states of the pass from zero": FLOAT * 2 * n * HV * K * K,
            "gates of the pass from zero": T * HV * 3 * FLOAT + L * HV * (8 + 3 * FLOAT),
            "entering state": FLOAT * (6 * C * HV * K + HV * K * K * (2 + row.cut.context)),
        }
    return found


def mlp(row, positions, width, name=""):
    """SwiGLU: fc1, silu of one half, a copy of the other (megatron-core adds an offset to it), the product."""
    one = row.e * positions * width
    return {f"{name}fc1": 2 * one, f"{name}silu": one, f"{name}linear half": one, f"{name}product": one}


def dense(row):
    """The dense SwiGLU."""
    return mlp(row, row.T, row.model.ffn_hidden_size // row.cut.tensor)


def moe(row):
    """Router, the positions that came to this rank's experts, their SwiGLUs, the shared expert's."""
    m, routed = row.model.moe, row.routed
    width = m.expert_hidden_size // row.cut.expert_tensor
    experts = mlp(row, routed, width, "expert ")
    if row.grouped:
        del experts["expert linear half"]  # only megatron-core's own SwiGLU copies it
    return {
        "router": row.S * (m.experts * (2 * FLOAT + 1 + INDEX) + m.top_k * (2 * INDEX + 2 * FLOAT) + FLOAT),
        "dispatched": row.e * routed * row.model.hidden_size,
        **experts,
        "expert product, weighted": row.e * routed * width,
        **mlp(row, row.T, m.shared_hidden_size // row.cut.tensor, "shared "),
    }


OUTSIDE = {"*": attention_outside, "G": deltanet_outside, "-": dense, "E": lambda row: {}}
INSIDE = {"*": attention_inside, "G": deltanet_inside, "-": lambda row: {}, "E": moe}


# ---------------------------------------------------------------- passing


def passing(row, letter):
    """Bytes alive besides everything kept so far, at the worst moment of one half-block's passes: gradients on their
    way and what is made again.

    Three moments of a backward pass can be the worst: the output projection, whose weight's gradient exists before it is
    added to the FP32 buffer; the gate behind it; the kernel. `full` and `selective` recomputation come on top.
    """
    again = 0
    if row.recompute == "full":
        made = sum(everything(row, letter).values()) + row.stream
        again = made - (row.stream if row.e == FLOAT else 0)  # the norm's input there is what was kept
    elif row.recompute == "selective":
        made, there = inside(row, letter), inputs(row, letter)
        again = sum(size for name, size in made.items() if name not in there) + MADE_AGAIN[letter](row)
    gathered = row.whole if row.cut.sequence_parallel else 0
    return again + row.stream + gathered + PASSING[letter](row)


def gate(row, elements, h):
    """An output gate in FP32: three gradients while the gated output is no longer needed; or the projection before."""
    return max((3 * FLOAT - row.e) * elements, row.e * elements + row.e * elements // row.T * h)


def attention_passing(row):
    """The gate's gradients; the core's are fewer."""
    return gate(row, row.attention()[0], row.model.hidden_size)


def deltanet_passing(row):
    """The gate's gradients in plain torch; with Triton those of its one operation, or what the rule's backward makes."""
    T, H, HV, K = rule(row)
    e, h, n = row.e, row.model.hidden_size, chunks(row)
    values = T * HV * K
    if not row.triton:
        return gate(row, values, h)
    states = 2 * e * n * HV * K * K  # entering each chunk, and their gradients
    kernel = states + e * n * CHUNK * HV * (K + CHUNK) + e * values + 2 * e * T * H * K + 2 * e * T * HV
    return max(2 * e * values, e * values + e * values // row.T * h, kernel)


def dense_passing(row):
    """The gradients of both halves, besides that of their product, which takes its place."""
    width = row.model.ffn_hidden_size // row.cut.tensor
    one = row.e * row.T * width
    return max(2 * one, one + row.e * width * row.model.hidden_size)


def moe_passing(row):
    """The forward pass: positions as permuted, the experts' output (one by one, and together), the shared expert's."""
    return (3 - row.grouped) * row.e * row.routed * row.model.hidden_size + row.whole


MADE_AGAIN = {  # by `selective`: the output a second time, and its gradient, which is held meanwhile
    "*": lambda row: 0,  # the gate behind it needs more
    "G": lambda row: 2 * row.e * row.T * row.gdn()[1] * row.gdn()[2],
    "-": lambda row: 0,
    "E": lambda row: 2 * row.stream,
}
PASSING = {"*": attention_passing, "G": deltanet_passing, "-": dense_passing, "E": moe_passing}


# ---------------------------------------------------------------- ends of the network


def embedding(row):
    """{tensor: bytes} of one look-up: ids, which of them are here, how many each bag has."""
    ids = row.bag * row.T
    return {"ids": ids * (INDEX if not row.triton else 0), "valid": ids, "bag sizes": INDEX * row.T * (not row.triton)}


def mtp(row, letters):
    """{tensor: bytes} that the multi-token head keeps, without its loss."""
    look_up = {f"embedding {name}": size for name, size in embedding(row).items()}
    if row.recompute == "full":
        return look_up | {"embedding and hidden": 2 * row.stream}
    return look_up | mtp_inside(row, letters)


def mtp_inside(row, letters):
    """`mtp` from the two norms to the last one, without recomputation of the whole."""
    h = row.model.hidden_size
    return {
        **norm(row, "embedding norm", row.S, h),
        **norm(row, "hidden norm", row.S, h),
        "embedding and hidden": 2 * row.stream,
        **{f"{letter} {name}": size for letter in letters for name, size in kept(row, letter).items()},
        **norm(row, "final norm", row.S, h),
    }


def mtp_passing(row, letters):
    """`passing` of the multi-token head."""
    again = sum(mtp_inside(row, letters).values()) if row.recompute == "full" else 0
    return again + max(passing(row, letter) for letter in letters)


def logits(row):
    """Bytes of what exists of the logits at a time."""
    columns, e, h = padded_vocab(row.model) // row.cut.tensor, row.e, row.model.hidden_size
    if row.triton:
        rows = -(-row.T // 128) * 128
        return min(LOSS_BUDGET, rows * columns * e)
    rows = min(row.T, LOSS_ROWS)
    whole, block = rows * columns, min(rows * columns, LOSS_BLOCK)
    masked = padded_vocab(row.model) > row.model.vocab_size
    grown = e * whole + FLOAT * whole + row.low(block)
    return max(grown, e * whole * (1 + masked) + FLOAT * whole, 2 * e * whole + e * columns * h) + e * rows * h


def losses(row, mtp):
    """{tensor: bytes} of the losses: gradients of the hidden states, which the forward pass computes."""
    return {"gradients of hidden": row.whole * (2 if mtp else 1)}


def loss_passing(row, mtp):
    """While the main loss is computed: the network's last hidden states, gathered for the head, and its logits."""
    gathered = row.whole if row.cut.sequence_parallel else 0
    return row.stream * (2 if mtp else 1) + gathered + logits(row)


def embedding_passing(row):
    """The end of the backward pass: plain torch has a gradient of every id, and of the whole embedding, in FP32."""
    if row.triton:
        return row.stream
    h = row.model.hidden_size
    return row.stream + FLOAT * ((1 + row.bag) * row.T * h + padded_vocab(row.model) // row.cut.tensor * h)
