"""Seconds of a half-block on one rank: its matrix products, kernels, memory traffic and exchanges over achieved rates.

A product [m, k] x [k, n] is made of tiles of 128 x 256 outputs, each of which costs k + `gemm_start` columns, on all
multiprocessors at once; what they leave idle in the last round is lost, and no product is faster than memory. Other
work is FLOPs or bytes over a rate. An exchange counts the bytes that a rank receives.

t positions of a micro-batch on a rank, h hidden size; tp, cp, ep, etp sizes of the parallel groups.
"""

from math import ceil, comb
from typing import NamedTuple

from boreal_megatron.plan import params

TILE = 128, 256
DTYPE = {"bf16": 2, "fp32": 4}  # bytes of an activation
OVERLAPPED = 0.9  # of the gradients' and weights' exchange with parallel.overlap (assumed)
FP32_SLOWER = 16  # than bf16: no tensor cores, 67 of 989 TFLOP/s by the data sheets
# Elements read and written, forward and backward, for each element of the width they go with.
NORM_AND_RESIDUAL = 5, 7  # a half-block's norm and sum, of h
SWIGLU = 3, 5  # of the width of the hidden layer
PERMUTE = 4, 4  # of h, for each expert of a token
ATTENTION_SIDE = 7, 10  # q/k norms, RoPE, gate; of heads x d
GDN_SIDE = 7, 11  # convolution, gated norm, layout; of key and value channels together with z


class Software(NamedTuple):
    """What a training system's code does: facts, no rates.

    `dispatcher` is `alltoall` (every copy of a token crosses a link) or `hybrid` (one copy for each rank, and over the
    network one for each node); `grouped` runs a rank's experts as one product; `delta_rule` names a pair of rates.
    `hidden_*` is the share of an exchange that runs under computation. `gradient_bytes` of each parameter are reduced
    once a step, `accumulation_bytes` are moved to add a micro-batch's gradient. `fused_head` never writes the logits.
    `fp8_experts` has the routed experts in FP8 where the run has FP8.
    """

    dispatcher: str = "alltoall"
    grouped: bool = False
    fp8_experts: bool = False
    delta_rule: str = "fla"
    hidden_tensor: float = 0.4  # of five exchanges a half-block, megatron-core puts two under products
    hidden_expert: float = 0.0
    hidden_context: float = 0.0
    hidden_data: float = 0.0
    gradient_bytes: int = 4
    accumulation_bytes: int = 12
    fused_head: bool = True


def software_of(config):
    """What this code does with a configuration on GPUs where everything that it can use is installed."""
    cut, kernels = config.parallel, config.kernels
    narrow = config.optimizer.gradients == "bf16"
    return Software(
        dispatcher="hybrid" if cut.dispatcher in ("deepep", "hybridep") else "alltoall",
        grouped=kernels.experts != "sequential",
        delta_rule=kernels.delta_rule if kernels.delta_rule == "flash_qla" else "fla",
        fp8_experts=kernels.experts == "te",
        hidden_data=OVERLAPPED if cut.overlap else 0.0,
        gradient_bytes=2 if narrow else 4,
        accumulation_bytes=(12 if kernels.linears == "local" else 8) - 4 * narrow,
    )


class Piece(NamedTuple):
    """Seconds of one micro-batch, `forward` and `backward`; selective recomputation repeats the forward part of those
    that are `selective`, full recomputation of all."""

    name: str
    kind: str
    forward: float
    backward: float
    selective: bool = False


class Rank:
    """What one rank of a layout does with one micro-batch.

    Args:
        config: `config.schema.Config`.
        sequence: positions of a window.
        gpu: `hardware.GPU` with rates.
        software: Software.
    """

    def __init__(self, config, sequence, gpu, software):
        self.model, self.cut, self.gpu, self.software = config.model, config.parallel, gpu, software
        self.sequence, self.precision = sequence, config.precision
        self.dtype = DTYPE[config.precision.compute]
        self.t = config.micro_batch * sequence // self.cut.context
        self.local = self.t // self.cut.tensor if self.cut.sequence_parallel else self.t
        self.rate = {name: rate.value for name, rate in gpu.rates}

    def factor(self, kind):
        """Seconds of this kind of work, as a multiple of what the rates give."""
        return self.gpu.factors.get(kind, 1.0)

    # ------------------------------------------------------------ rates

    def product(self, m, k, n, count=1, grouped=False, fp8=False):
        """Seconds of `count` equal products, one after the other, or as one if `grouped`."""
        rate = self.rate["gemm_fp8" if fp8 and self.precision.fp8 else "gemm"] * 1e12
        rate /= FP32_SLOWER if self.precision.compute == "fp32" else 1
        tiles = ceil(m / TILE[0]) * ceil(n / TILE[1])
        if grouped:
            rate, tiles, launches = rate * self.rate["grouped"], tiles * count, 1
        else:
            launches = count
        processors = self.rate["multiprocessors"]
        tile = 2 * TILE[0] * TILE[1] * (k + self.rate["gemm_start"]) / (rate / processors)
        return max(
            launches * ceil(tiles / processors) * tile, count * self.memory((m * k + k * n + m * n) * self.dtype)
        )

    def linear(self, m, k, n, **how):
        """(forward, backward) of m positions through a weight [k, n]: the inputs' gradient and the weight's."""
        return self.product(m, k, n, **how), self.product(m, n, k, **how) + self.product(k, m, n, **how)

    def memory(self, nbytes):
        return nbytes / (self.gpu.hbm * 1e9 * self.rate["hbm"])

    def touch(self, elements, width):
        """(forward, backward) of element-wise work over `width` values of each local position."""
        forward, backward = elements
        return self.memory(self.dtype * width * forward), self.memory(self.dtype * width * backward)

    def exchange(self, nbytes, size, stride):
        """Seconds to receive so many bytes in a group of `size` ranks that are `stride` apart; all rails of a node
        share what leaves it."""
        if size == 1:
            return 0.0
        inside = self.inside(size, stride)
        rate = self.rate["nvlink"] if inside == size else min(self.rate["nvlink"], inside * self.rate["nic"])
        return nbytes / (rate * 1e9) + self.rate["collective"] * 1e-6

    def inside(self, size, stride):
        """Ranks of a group that a node has."""
        return max(1, min(size, self.gpu.gpus_per_node // stride))

    # ------------------------------------------------------------ half-blocks

    def half_block(self, letter):
        """Pieces of one half-block: `*` attention, `G` Gated DeltaNet, `-` dense, `E` experts."""
        kind = {"*": "attention", "G": "gdn", "-": "dense", "E": "moe"}[letter]
        own = {"*": self.attention, "G": self.gdn, "-": self.dense, "E": self.moe}[letter]
        yield Piece("elementwise", kind, *self.touch(NORM_AND_RESIDUAL, self.local * self.model.hidden_size))
        yield from own()
        if self.cut.tensor > 1:
            yield self.tensor_exchange(kind)
        yield Piece("gradient_accumulation", kind, 0.0, self.accumulation(sum(self.parameters(letter))))

    def parameters(self, letter):
        """(dense, experts') parameters of a half-block on this rank; norms count as if tensor parallelism cut them."""
        model, cut = self.model, self.cut
        whole = params.block(model, letter)[0]
        routed = 3 * model.hidden_size * model.moe.expert_hidden_size * model.moe.experts if letter == "E" else 0
        return (whole - routed) // cut.tensor, routed // (cut.expert * cut.expert_tensor)

    def accumulation(self, elements):
        """Seconds to add a micro-batch's gradient of so many parameters to the buffer."""
        return self.memory(self.software.accumulation_bytes * elements)

    def tensor_exchange(self, kind):
        """Sequence parallelism gathers before a half-block and scatters after it, forward and backward, and gathers the
        inputs again for the weights' gradient."""
        tp = self.cut.tensor
        one = self.exchange(self.t * self.model.hidden_size * self.dtype * (tp - 1) / tp, tp, 1)
        seen = 5 * one * (1 - self.software.hidden_tensor)
        return Piece("tensor_communication", kind, seen * 2 / 5, seen * 3 / 5)

    def attention(self):
        a, h, tp, cp = self.model.attention, self.model.hidden_size, self.cut.tensor, self.cut.context
        queries, keys = a.heads * a.head_dim // tp, a.kv_heads * a.head_dim // tp
        width = (1 + (a.gate is not None)) * queries + 2 * keys
        yield add(
            "gemm", "attention", self.linear(self.t, h, width, fp8=True), self.linear(self.t, queries, h, fp8=True)
        )
        work = 2 * self.sequence * queries * self.t / 1e12 * (FP32_SLOWER if self.precision.compute == "fp32" else 1)
        forward, backward = work / self.rate["attention_forward"], 2 * work / self.rate["attention_backward"]
        yield Piece("attention_core", "attention", forward, backward, selective=True)
        yield Piece("elementwise", "attention", *self.touch(ATTENTION_SIDE, self.t * queries))
        if cp > 1:
            moved = self.t * self.dtype * (2 * queries + 2 * keys * (cp - 1))
            yield self.context_exchange("attention", moved, moved, exchanges=3)

    def gdn(self):
        g, h, tp, cp = self.model.gdn, self.model.hidden_size, self.cut.tensor, self.cut.context
        keys, values, heads = g.key_heads * g.head_dim // tp, g.value_heads * g.head_dim // tp, g.value_heads // tp
        into = self.linear(self.t, h, 2 * keys + 2 * values + 2 * heads, fp8=True)
        yield add("gemm", "gdn", into, self.linear(self.t, values, h, fp8=True))
        by_state = cp > 1 and self.cut.context_deltanet == "state"
        passes = 2 if by_state else 1  # the state that enters is known only after a first pass
        rule = self.t * heads * (g.head_dim / 128) ** 2 * 1e-12 * passes
        forward, backward = (self.rate[f"{self.software.delta_rule}_{way}"] * rule for way in ("forward", "backward"))
        yield Piece("delta_rule", "gdn", forward, backward, selective=True)
        yield Piece("elementwise", "gdn", *self.touch(GDN_SIDE, self.t * (2 * keys + 2 * values)), selective=True)
        if by_state:
            state = heads * g.head_dim**2 * 4 * (cp - 1)
            yield self.context_exchange("gdn", 2 * state, state, exchanges=2)
        elif cp > 1:
            moved = self.t * self.dtype * (2 * keys + 2 * values + 2 * heads)
            yield self.context_exchange("gdn", moved, moved, exchanges=2)

    def context_exchange(self, kind, forward, backward, exchanges):
        cp, tp = self.cut.context, self.cut.tensor
        start = (exchanges - 1) * self.rate["collective"] * 1e-6
        seen = 1 - self.software.hidden_context
        seconds = ((self.exchange(moved, cp, tp) + start) * seen for moved in (forward, backward))
        return Piece("context_communication", kind, *seconds, selective=True)

    def dense(self):
        yield self.swiglu("gemm", "dense", self.t, self.model.ffn_hidden_size // self.cut.tensor)

    def swiglu(self, name, kind, m, width, **how):
        h = self.model.hidden_size
        how = {"fp8": True} | how
        products = self.linear(m, h, 2 * width, **how), self.linear(m, width, h, **how)
        rows = m * how.get("count", 1)
        return add(name, kind, *products, self.touch(SWIGLU, rows * width), selective=kind == "moe")

    def moe(self):
        """Experts are balanced: each gets the same share of the tokens."""
        m, h, cut = self.model.moe, self.model.hidden_size, self.cut
        copies = self.local * m.top_k * cut.expert_tensor  # rows of this rank's experts
        local = m.experts // cut.expert
        rows = ceil(copies / local)
        many = {"count": local, "grouped": self.software.grouped, "fp8": self.software.fp8_experts}
        yield self.swiglu("expert_gemm", "moe", rows, m.expert_hidden_size // cut.expert_tensor, **many)
        if m.shared_hidden_size:
            yield self.swiglu("gemm", "moe", self.t, m.shared_hidden_size // cut.tensor)
        yield add("elementwise", "moe", self.touch(PERMUTE, copies * h), selective=True)
        yield add("gemm", "moe", self.linear(self.local, h, m.experts), selective=True)
        if cut.expert * cut.expert_tensor > 1:
            one = self.dispatch() * (1 - self.software.hidden_expert)
            yield Piece("dispatch", "moe", 2 * one, 2 * one, selective=True)

    def dispatch(self):
        """Seconds to bring a micro-batch's tokens to their experts, or back."""
        m, cut = self.model.moe, self.cut
        ep, etp, token = cut.expert, cut.expert_tensor, self.model.hidden_size * self.dtype
        inside = self.inside(ep, etp)
        nodes = ep // inside
        if self.software.dispatcher == "hybrid":
            off_rank = ep * self.met(ep) * (ep - 1) / ep
            off_node = (nodes - 1) * self.met(nodes)
        else:
            off_rank, off_node = m.top_k * (inside - 1) / ep, m.top_k * (ep - inside) / ep
        start = (1 + (etp > 1)) * self.rate["collective"] * 1e-6
        gathered = self.local * m.top_k * (etp - 1) * token / (self.rate["nvlink"] * 1e9)
        links = off_rank / self.rate["dispatch"] + off_node / self.rate["nic"]
        return self.local * token * links / 1e9 + gathered + start

    def met(self, groups):
        """Share of `groups` equal parts of the experts in which a token has at least one of its own."""
        m = self.model.moe
        return 1 - comb(m.experts - m.experts // groups, m.top_k) / comb(m.experts, m.top_k)

    # ------------------------------------------------------------ ends of the network

    def head(self, rows):
        """The vocabulary's product and loss; all ranks of a tensor-parallel group see every position."""
        width = rows // self.cut.tensor
        forward, backward = self.linear(self.t, self.model.hidden_size, width)
        if not self.software.fused_head:
            logits = self.memory(self.t * width)  # a byte of each
            forward, backward = forward + 14 * logits, backward + 10 * logits
        return Piece("head", "heads", forward, backward + self.accumulation(width * self.model.hidden_size))

    def mtp_join(self):
        """The projection of [hidden, embedding] before the MTP head's half-blocks, and its norms."""
        h = self.model.hidden_size
        join = self.linear(self.t, 2 * h, h // self.cut.tensor)
        return add("gemm", "mtp", join, self.touch((6, 9), self.local * h))


def add(name, kind, *pairs, selective=False):
    """A Piece of several (forward, backward) seconds."""
    return Piece(name, kind, sum(f for f, _ in pairs), sum(b for _, b in pairs), selective)
