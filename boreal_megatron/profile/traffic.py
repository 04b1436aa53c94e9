"""Bytes that a training step cannot but move to and from the devices' memory, computed from shapes.

Counted: the operands and the result of every matrix product once, and two products more for the backward pass;
queries, keys, values and output of attention's and the delta rule's cores, and the delta rule's FP32 state after every
chunk, the same three times; the optimizer's gradients, FP32 weights and moments. A rank reads its share of the weights
anew for every micro-batch. Logits do not move: head and loss are one operation. Not counted: norms, gates, convolution,
routing and what recomputation moves again. The real traffic is higher.
"""

from boreal_megatron.config.pattern import expand
from boreal_megatron.plan import params
from boreal_megatron.plan.flops import CHUNK
from boreal_megatron.profile.rates import LETTERS

PASSES = 3  # forward, gradient of the input, gradient of the weight
FP32 = 4


def step_bytes(config, phase, world):
    """{kind: bytes of one training step, summed over all devices}: kinds of `plan.flops.KINDS`, and `optimizer`."""
    cut, size = config.parallel, {"bf16": 2, "fp32": FP32}[config.precision.compute]
    replicas = world // (cut.tensor * cut.pipeline)  # of a weight; those of an expert:
    expert_replicas = world // (cut.pipeline * cut.expert * cut.expert_tensor)
    micro_batches = phase.windows_per_step() * cut.context // (replicas * config.micro_batch)

    def moved(each):
        """(elements of activations a position, weights, of experts) -> bytes of a step."""
        activations, weights, experts = each
        read = micro_batches * (replicas * weights + expert_replicas * experts)
        return PASSES * size * (phase.positions_per_step * activations + read)

    main, mtp = expand(config.model.pattern)
    found = {}
    for letter in main:
        kind = LETTERS[letter]
        found[kind] = found.get(kind, 0) + moved(half_block(config, letter, size))
    h, t = config.model.hidden_size, cut.tensor
    head = (t * h, h * config.model.vocab_size, 0)
    found["heads"] = moved(head) * (2 if mtp else 1)
    if mtp:
        join = (t * 2 * h + h, 2 * h * h, 0)
        found["mtp"] = sum(map(moved, [join, *(half_block(config, letter, size) for letter in mtp)]))
    # Read: gradient, weight, two moments. Written: the last three, and the weight in the network's own precision.
    element = 7 * FP32 + (size if config.precision.compute == "bf16" else 0)
    copies = 1 if config.optimizer.distributed else replicas
    found["optimizer"] = params.count(config.model)["with_mtp"] * element * copies
    return found


def half_block(config, letter, size):
    """What one half-block moves.

    Args:
        size: bytes of an element.

    Returns:
        (elements of activations a position, elements of weights, elements of experts' weights).
    """
    model, t = config.model, config.parallel.tensor
    h = model.hidden_size
    if letter == "*":
        a = model.attention
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        projected = 2 * queries + 2 * keys  # with the gate
        return (t * h + projected) + 2 * (queries + keys) + (queries + t * h), h * (projected + queries), 0
    if letter == "G":
        g = model.gdn
        keys, values = g.key_heads * g.head_dim, g.value_heads * g.head_dim
        projected = 2 * keys + 2 * values + 2 * g.value_heads
        states = 2 * g.value_heads * g.head_dim**2 * FP32 // (size * CHUNK)
        core = 2 * keys + 2 * values + states
        return (t * h + projected) + core + (values + t * h), h * (projected + values), 0
    if letter == "-":
        inner = model.ffn_hidden_size
        return (t * h + 2 * inner) + (inner + t * h), 3 * h * inner, 0
    m, shards = model.moe, config.parallel.expert_tensor
    routed = m.top_k * (2 * shards * h + 3 * m.expert_hidden_size)
    shared = 2 * t * h + 3 * m.shared_hidden_size
    router = h + m.experts
    weights = h * (3 * m.shared_hidden_size + m.experts)
    return routed + shared + router, weights, 3 * h * m.expert_hidden_size * m.experts
