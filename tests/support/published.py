"""Networks of other people, as our description puts them; our schema would refuse some of the values.

A `gate` of None is attention without an output gate; shapes are those of the models' published configurations.
"""

from boreal_megatron.config.schema import GDN, Attention, Model, MoE


def network(**values):
    return Model.model_construct(**values)


def attention(heads, kv_heads, head_dim, gate=None):
    return Attention.model_construct(heads=heads, kv_heads=kv_heads, head_dim=head_dim, gate=gate)


QWEN3_8B = network(
    pattern="36x(*-)",
    vocab_size=151_936,
    hidden_size=4096,
    ffn_hidden_size=12_288,
    attention=attention(32, 8, 128),
    gdn=None,
    moe=None,
    tie_embeddings=False,
)
QWEN35_35B_A3B = network(
    pattern="10x(GEGEGE*E) / *E",
    vocab_size=248_320,
    hidden_size=2048,
    ffn_hidden_size=512,
    attention=attention(16, 2, 256, "sigmoid"),
    gdn=GDN(key_heads=16, value_heads=32),
    moe=MoE(experts=256, top_k=8, expert_hidden_size=512, shared_hidden_size=512),
    tie_embeddings=False,
)
