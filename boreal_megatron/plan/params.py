"""Exact parameter counts from the description alone; the built model has the same (tests compare them).

Counts follow the model cards' convention: the MTP head is listed apart, tied embeddings count once, and the router's
balancing bias, which no gradient moves, is a buffer and not counted. Nor are the rows that pad the vocabulary.
"""

from boreal_megatron.config.layout import padded_vocab
from boreal_megatron.config.pattern import expand
from boreal_megatron.config.presets import CARDS

EXPLAIN = """\
Parameters from the shapes alone, weights and vectors; the built network has the same, element for element.
  active      what one position meets: top_k of the experts, everything else whole
  tied        embedding and head are one matrix, counted once
  MTP head    its half-blocks, their norms, the 2h x h projection and three norms; listed apart, as the cards do
  not counted rows that pad the vocabulary to a multiple of 128, and the router's balancing bias (a buffer)"""


def count(model):
    """Count a network.

    Args:
        model: `config.schema.Model`.

    Returns:
        dict: `components` (name -> {"blocks", "each", "total", "active"}), `mtp`, and the totals `total` (embedding and
        head as tied or not, without MTP), `non_embedding`, `active`, `active_non_embedding`, `with_mtp`. Held besides:
        `padding_rows` of each vocabulary matrix, `padding` elements in all.
    """
    main, mtp = expand(model.pattern)
    h, vocab = model.hidden_size, model.vocab_size
    kinds = {"attention": "*", "gated_deltanet": "G", "dense_ffn": "-", "moe": "E"}
    components = {}
    for name, letter in kinds.items():
        blocks = main.count(letter)
        if blocks:
            each, active = block(model, letter)
            components[name] = {"blocks": blocks, "each": each, "total": blocks * each, "active": blocks * active}
    components["block_norms"] = _flat(len(main), h)
    components["final_norm"] = _flat(1, h)
    body = {key: sum(c[key] for c in components.values()) for key in ("total", "active")}
    components["embedding"] = _flat(1, vocab * h)
    if not model.tie_embeddings:
        components["head"] = _flat(1, vocab * h)
    matrices = 1 if model.tie_embeddings else 2
    outside = vocab * h * matrices
    padding_rows = padded_vocab(model) - vocab
    mtp_total = 0
    if mtp:
        mtp_total = sum(block(model, letter)[0] + h for letter in mtp) + 2 * h * h + 3 * h
    return {
        "components": components,
        "tied": model.tie_embeddings,
        "total": body["total"] + outside,
        "non_embedding": body["total"],
        "active": body["active"] + outside,
        "active_non_embedding": body["active"],
        "mtp": mtp_total,
        "with_mtp": body["total"] + outside + mtp_total,
        "padding_rows": padding_rows,
        "padding": padding_rows * h * matrices,
    }


def block(model, letter):
    """(parameters, parameters a position uses) of one half-block, without its input norm."""
    h = model.hidden_size
    if letter == "*":
        a = model.attention
        n = h * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + a.heads * a.head_dim * h + 2 * a.head_dim
        return n, n
    if letter == "G":
        g = model.gdn
        keys, values = g.key_heads * g.head_dim, g.value_heads * g.head_dim
        projections = h * (2 * keys + 2 * values + 2 * g.value_heads) + values * h
        n = projections + (2 * keys + values) * g.conv_width + 2 * g.value_heads + g.head_dim
        return n, n
    if letter == "-":
        n = 3 * h * model.ffn_hidden_size
        return n, n
    m = model.moe
    expert, shared, router = 3 * h * m.expert_hidden_size, 3 * h * m.shared_hidden_size, h * m.experts
    return m.experts * expert + shared + router, m.top_k * expert + shared + router


def card_claims(preset, counts):
    """Lines that put a card's round numbers beside the exact ones."""
    claims = CARDS.get(preset, {})
    exact = {"total": counts["total"], "active": counts["active"]}
    return [
        f"the card says {text} {what} parameters; the shapes it prints give {exact[what]:,}"
        for what, text in claims.items()
    ]


def table(counts):
    """The counts for people."""
    rows = [f"{'component':<16}{'blocks':>8}{'each':>18}{'total':>18}{'active':>18}"]
    for name, c in counts["components"].items():
        rows.append(f"{name:<16}{c['blocks']:>8}{c['each']:>18,}{c['total']:>18,}{c['active']:>18,}")
    tied = "tied" if counts["tied"] else "untied"
    names = {
        "total": f"total ({tied}, without MTP)",
        "non_embedding": "non-embedding",
        "active": f"active ({tied})",
        "active_non_embedding": "active non-embedding",
        "mtp": "MTP head",
        "with_mtp": "total with MTP head",
    }
    if counts["padding_rows"]:
        names["padding"] = f"not counted: {counts['padding_rows']} zero rows"
    return "\n".join(rows + [""] + [f"{text:<32}{counts[key]:>18,}" for key, text in names.items()])


def _flat(blocks, each):
    return {"blocks": blocks, "each": each, "total": blocks * each, "active": blocks * each}
