"""What decoding keeps of a context: keys and values, recurrent states, the convolutions' last inputs. Exact.

A network of softmax attention keeps keys and values of every position in every layer. Gated DeltaNet keeps one state a
value head, [head_dim, head_dim] in FP32, and the conv_width - 1 last inputs of its convolution, whatever the context.
Beside it stands the same network with attention in the place of every Gated DeltaNet.
"""

from boreal_megatron.config.pattern import expand
from boreal_megatron.errors import BorealError

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
STATE = 4  # bytes an element of the recurrent state: it is a sum over the whole context
EXPLAIN = """\
Bytes of one sequence while it is decoded; the MTP head, which only drafts, is not counted.
  keys and values    2 x attention layers x kv_heads x head_dim x context, of --dtype
  states             DeltaNet layers x value_heads x head_dim^2, FP32: a sum over the whole context
  convolutions       DeltaNet layers x (2 key_heads + value_heads) x head_dim x (conv_width - 1), of --dtype
  pure attention     the same network with its own attention in the place of every DeltaNet"""


def count(model, context, batch=1, dtype="bf16"):
    """Bytes that `batch` sequences of `context` positions keep.

    Args:
        model: `config.schema.Model`.
        dtype: of keys, values and convolution inputs, a key of `BYTES`.

    Returns:
        dict: `context`, `batch`, `dtype`, `attention_layers`, `gdn_layers`, `keys_values`, `states`, `convolutions`,
        `total`, `pure_attention` (the same network without DeltaNet), `ratio` of that to the total.

    Raises:
        BorealError: a context that the network does not take, an unknown dtype.
    """
    if not 1 <= context <= model.max_positions:
        raise BorealError(
            f"context {context:,}: the network takes 1 to {model.max_positions:,} positions; "
            f"nearest: {min(max(context, 1), model.max_positions):,}"
        )
    if dtype not in BYTES:
        raise BorealError(f"dtype {dtype!r}; expected one of {', '.join(BYTES)}")
    main, _ = expand(model.pattern)
    a, g, size = model.attention, model.gdn, BYTES[dtype]
    attention, gdn = main.count("*"), main.count("G")
    layer = batch * 2 * a.kv_heads * a.head_dim * context * size
    parts = {"keys_values": attention * layer, "states": 0, "convolutions": 0}
    if gdn:
        channels = (2 * g.key_heads + g.value_heads) * g.head_dim
        parts["states"] = batch * gdn * g.value_heads * g.head_dim**2 * STATE
        parts["convolutions"] = batch * gdn * channels * (g.conv_width - 1) * size
    total, pure = sum(parts.values()), (attention + gdn) * layer
    shape = {"context": context, "batch": batch, "dtype": dtype, "attention_layers": attention, "gdn_layers": gdn}
    return {**shape, **parts, "total": total, "pure_attention": pure, "ratio": pure / total}


def table(rows):
    """What `count` returns, for several contexts, for people; MB of 10^6 bytes."""
    names = {
        "keys_values": "keys and values",
        "states": "states",
        "convolutions": "convolutions",
        "total": "total",
        "pure_attention": "pure attention",
    }
    first = rows[0]
    lines = [f"MB of {first['batch']} x a context of{'':<2}" + "".join(f"{r['context']:>14,}" for r in rows)]
    lines += [f"{text:<24}" + "".join(f"{r[key] / 1e6:>14,.2f}" for r in rows) for key, text in names.items()]
    lines.append(f"{'of pure attention':<24}" + "".join(f"{1 / r['ratio']:>14.1%}" for r in rows))
    layers = f"{first['attention_layers']} attention and {first['gdn_layers']} DeltaNet layers"
    return "\n".join([*lines, f"({layers}; keys, values and convolutions in {first['dtype']}, states in FP32)"])
