"""The networks of the BOREAL family, as resolved from their cards; `plan params` says where a card claims otherwise.

Left open by the cards and settled here: plain RMSNorm weights, ungated shared expert, routed scale 2.5, tied
embeddings, silu gates on both mixers.
"""

VOCABULARY = 151_936

PRESETS = {
    "tiny": dict(
        pattern="*-G-GEGE / *-",
        vocab_size=8192,
        hidden_size=128,
        ffn_hidden_size=384,
        attention=dict(heads=4, kv_heads=2, head_dim=32),
        gdn=dict(key_heads=2, value_heads=4, head_dim=32),
        moe=dict(experts=8, top_k=2, expert_hidden_size=128, shared_hidden_size=128),
        max_positions=4096,
        init_std=0.08,  # about 1/sqrt(hidden_size), as 0.02 is for the large ones
    ),
    "boreal-250m": dict(
        pattern="3x(*-G-G-G-) / *-",
        vocab_size=VOCABULARY,
        hidden_size=1024,
        ffn_hidden_size=3072,
        attention=dict(heads=8, kv_heads=2),
        gdn=dict(key_heads=8, value_heads=16),
        max_positions=32_768,
    ),
    "boreal-2b": dict(
        pattern="6x(*-G-G-G-) / *-",
        vocab_size=VOCABULARY,
        hidden_size=2048,
        ffn_hidden_size=6144,
        attention=dict(heads=16, kv_heads=4),
        gdn=dict(key_heads=16, value_heads=32),
        max_positions=65_536,
    ),
    "boreal-10b-moe": dict(
        pattern="*-G-G-G- *-GEG-GE 8x(*-GEG-G-) / *-",
        vocab_size=VOCABULARY,
        hidden_size=2560,
        ffn_hidden_size=7680,
        attention=dict(heads=20, kv_heads=4),
        gdn=dict(key_heads=8, value_heads=32),
        moe=dict(experts=128, top_k=8, expert_hidden_size=768, shared_hidden_size=1536),
        max_positions=262_144,
    ),
}

# What the cards print, for comparison only.
CARDS = {
    "boreal-250m": {"total": "250M"},
    "boreal-10b-moe": {"total": "~10B", "active": "~2B"},
}
