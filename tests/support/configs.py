"""Configurations built in memory, for tests that need no files."""

from boreal_megatron.config import schema

TINY = dict(
    pattern="*-GEG- / *-",
    vocab_size=256,
    hidden_size=64,
    ffn_hidden_size=96,
    attention=dict(heads=4, kv_heads=2, head_dim=16, rope_theta=10000.0),
    gdn=dict(key_heads=2, value_heads=4, head_dim=16),
    moe=dict(experts=4, top_k=2, expert_hidden_size=32, shared_hidden_size=32),
    max_positions=512,
)


def tiny_model(**changes):
    return schema.Model(**{**TINY, **changes})


def config_for(model, **changes):
    """A Config around a network; its data does not exist."""
    values = dict(
        model=model.model_dump(exclude_none=True),
        precision="fp32",
        phases=[dict(name="only", until_steps=4, sequence=64, positions_per_step=128)],
        schedule=dict(peak=1e-2, warmup_steps=0, shape="constant"),
        data=dict(tokenizer="none", sources={"text": "none"}),
        checkpoint=dict(folder="none"),
    )
    return schema.Config.model_validate({**values, **changes})
