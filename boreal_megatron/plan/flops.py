"""Model FLOPs of a position, by component and kind of layer.

What is counted: the multiplications and additions of matrix products, two for each pair. The backward pass costs twice
the forward pass; nothing is counted twice for recomputation. Attention is causal: half of the square. A head is counted
over the whole vocabulary for every position, and again for the MTP head. The delta rule is counted in its chunkwise
form with chunks of 64 (`gdn_intra`, `gdn_inter`), squares in full as the kernels compute them. Not counted, as they are
no matrix products: norms, gates, rotary embedding, the convolution, softmax, the embedding's look-up, the optimizer.

A position is what the network sees: with bags of k it stands for k raw tokens, whose FLOPs are a kth of it.
"""

from boreal_megatron.config.pattern import expand

CHUNK = 64  # positions that the delta rule's kernels take at once
BACKWARD = 2  # forward passes' worth
KINDS = ("gdn", "attention", "dense", "moe", "heads", "mtp")
KIND = {
    "gdn_projections": "gdn",
    "gdn_intra": "gdn",
    "gdn_inter": "gdn",
    "attention_projections": "attention",
    "attention_core": "attention",
    "dense": "dense",
    "routed_experts": "moe",
    "shared_expert": "moe",
    "router": "moe",
    "head": "heads",
    "mtp_head": "heads",
    "mtp_layer": "mtp",
}
EXPLAIN = """\
FLOPs of one position, forward; x 3 with the backward pass. h hidden, d head size, C chunk of 64, T sequence.
  projections, dense, experts, router, head   2 x weights that the position meets (top_k of the experts)
  attention_core    2 T heads d             Q K^T and P V, each 2 T heads d, causal half
  gdn_inter         6 d^2 value_heads       W S, Q S and K^T V of the chunkwise form
  gdn_intra         (10 C d + C^2/3) value_heads   K K^T, Q K^T, T K, T V, P V within a chunk; the triangular inverse
  mtp_layer         its half-blocks, and the projection of [hidden, embedding], 2 x 2 h^2
  mtp_head          the head once more, over the same vocabulary
Only matrix products count; recomputation does not. With bags of k a raw token costs 1/k of a position."""


def forward(model, sequence):
    """FLOPs of one position's forward pass.

    Args:
        model: `config.schema.Model`. An attention `gate` of None, an expert layer without shared expert (size 0) and
            patterns without MTP count as such, for comparisons with other networks.
        sequence: positions of a window; documents in it are counted as one.

    Returns:
        dict: component (the keys of `KIND`) -> FLOPs, those that the network has.
    """
    main, mtp = expand(model.pattern)
    found = dict.fromkeys(KIND, 0)
    for letter in main:
        for component, flops in half_block(model, letter, sequence).items():
            found[component] += flops
    head = 2 * model.hidden_size * model.vocab_size
    found["head"] = head
    if mtp:
        join = 2 * 2 * model.hidden_size**2
        found["mtp_layer"] = join + sum(sum(half_block(model, letter, sequence).values()) for letter in mtp)
        found["mtp_head"] = head
    return {component: flops for component, flops in found.items() if flops}


def half_block(model, letter, sequence):
    """`forward` of one half-block of the pattern."""
    h = model.hidden_size
    if letter == "*":
        a = model.attention
        gate = a.gate is not None
        projections = h * a.head_dim * ((2 + gate) * a.heads + 2 * a.kv_heads)
        return {"attention_projections": 2 * projections, "attention_core": 2 * sequence * a.heads * a.head_dim}
    if letter == "G":
        g = model.gdn
        keys, values = g.key_heads * g.head_dim, g.value_heads * g.head_dim
        projections = h * (2 * keys + 3 * values + 2 * g.value_heads)
        return {
            "gdn_projections": 2 * projections,
            "gdn_intra": g.value_heads * (10 * CHUNK * g.head_dim + CHUNK**2 // 3),
            "gdn_inter": g.value_heads * 6 * g.head_dim**2,
        }
    if letter == "-":
        return {"dense": 2 * 3 * h * model.ffn_hidden_size}
    m = model.moe
    return {
        "routed_experts": 2 * 3 * h * m.expert_hidden_size * m.top_k,
        "shared_expert": 2 * 3 * h * m.shared_hidden_size,
        "router": 2 * h * m.experts,
    }


def training(model, sequence):
    """FLOPs of one position, forward and backward: component -> FLOPs, as `forward`."""
    return {component: (1 + BACKWARD) * flops for component, flops in forward(model, sequence).items()}


def by_kind(components):
    """Sums over the components of each kind of layer that is there."""
    sums = {kind: sum(n for c, n in components.items() if KIND[c] == kind) for kind in KINDS}
    return {kind: flops for kind, flops in sums.items() if flops}


def report(model, sequences, bag=1):
    """What `boreal plan flops` prints, for programs.

    Returns:
        list of dicts, one for each sequence: `sequence`, `bag_size`, `components` and `kinds` (training FLOPs of a
        position), `position` (their sum), `raw_token` (its share of one raw token).
    """
    rows = []
    for sequence in sequences:
        components = training(model, sequence)
        total = sum(components.values())
        rows.append(
            {
                "sequence": sequence,
                "bag_size": bag,
                "components": components,
                "kinds": by_kind(components),
                "position": total,
                "raw_token": total / bag,
            }
        )
    return rows


def table(rows):
    """The same for people: each component's FLOPs and its share of the position's."""
    unit, scale = ("GFLOP", 1e9) if rows[0]["position"] >= 1e9 else ("MFLOP", 1e6)
    name_width, column = max(map(len, KIND)) + 2, 18

    def line(name, cells):
        return f"{name:<{name_width}}" + "".join(f"{cell:>{column}}" for cell in cells)

    def amount(flops, share=""):
        return f"{flops / scale:,.3f}{share:>6}"

    lines = [f"{unit} of a position, forward + backward", line("window of", (f"{r['sequence']:,}{'':6}" for r in rows))]
    for component in rows[0]["components"]:
        mine = [(r["components"][component], r["position"]) for r in rows]
        lines.append(line(component, (amount(flops, f"{flops / whole:.0%}") for flops, whole in mine)))
    lines += ["", line("a position", (amount(r["position"]) for r in rows))]
    if (bag := rows[0]["bag_size"]) > 1:
        lines.append(line(f"raw token, bags {bag}", (amount(r["raw_token"]) for r in rows)))
    return "\n".join(text.rstrip() for text in lines)
