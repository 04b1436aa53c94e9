"""Networks of other people, as our description puts them; our schema would refuse some of the values.

A `gate` of None is attention without an output gate; shapes are those of the models' published configurations, speeds those of Megatron-Bridge's
performance summaries and verification cards, its pull requests 5098 and 5123, Megatron-LM's 5728, and nanotron.
"""

from typing import NamedTuple

from boreal_megatron.config.schema import GDN, Attention, Config, Model, MoE, Optimizer, Parallel, Phase, Precision
from boreal_megatron.plan import time
from boreal_megatron.plan.work import Software


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


# ---------------------------------------------------------------- published speeds


class System(NamedTuple):
    """A published run on H100s of 8 a node: what it ran, and the tokens a second of one GPU that it reports.

    `derived` names the rate of `hardware.yaml` that was derived from it; all others are predictions. `agrees` says
    whether the time model comes within 20 %, `missing` which term it lacks if not.
    """

    name: str
    model: Model
    parallel: dict
    precision: str
    gpus: int
    windows: int
    sequence: int
    rate: float
    software: Software
    derived: str = ""
    agrees: bool = True
    missing: str = ""


def dense(layers, hidden, ffn, heads, kv_heads, head_dim=128, tied=False):
    shape = attention(heads, kv_heads, head_dim)
    return network(
        pattern=f"{layers}x(*-)", vocab_size=128_256, hidden_size=hidden, ffn_hidden_size=ffn, attention=shape, gdn=None,
        moe=None, tie_embeddings=tied,
    )  # fmt: skip


def experts(layers, hidden, heads, expert_hidden):
    """Qwen3's: 128 experts, 8 of them for a token, none shared."""
    moe = MoE.model_construct(experts=128, top_k=8, expert_hidden_size=expert_hidden, shared_hidden_size=0)
    return network(
        pattern=f"{layers}x(*E)", vocab_size=151_936, hidden_size=hidden, ffn_hidden_size=0,
        attention=attention(heads, 4, 128), gdn=None, moe=moe, tie_embeddings=False,
    )  # fmt: skip


LLAMA3_70B = dense(80, 8192, 28_672, 64, 8)
QWEN3_30B_A3B = experts(48, 2048, 32, 768)
# Megatron-Bridge on Transformer Engine: gradients are reduced under the backward pass (share assumed), weights'
# gradients are added by the product itself, logits are written.
BRIDGE = Software(
    dispatcher="hybrid", grouped=True, delta_rule="flash_qla", hidden_data=0.9, hidden_context=0.5, accumulation_bytes=8,
    fused_head=False,
)  # fmt: skip
USER_BUFFERS = BRIDGE._replace(hidden_tensor=0.7)  # exchanges in slices under products (share assumed)
OVERLAPPED_EXPERTS = BRIDGE._replace(hidden_expert=0.366)  # 36.6 % published for Qwen3-30B-A3B
TP = {"sequence_parallel": True}
SYSTEMS = [
    System("Qwen3-8B", QWEN3_8B, {}, "bf16", 16, 1024, 4096, 10_456, BRIDGE, derived="gemm"),
    System("Llama-3 8B, FP8", dense(32, 4096, 14_336, 32, 8), {}, "fp8", 8, 128, 8192, 14_451, BRIDGE, derived="gemm_fp8"),
    System("Llama-3 70B, FP8", LLAMA3_70B, TP | {"tensor": 4, "pipeline": 8, "virtual_pipeline": 5}, "fp8", 64, 256, 8192, 1621, USER_BUFFERS),
    System("Llama-3.1 405B, FP8", dense(126, 16_384, 53_248, 128, 8), TP | {"tensor": 8, "pipeline": 8, "virtual_pipeline": 8, "context": 2}, "fp8", 1024, 1536, 8192, 311, USER_BUFFERS),
    System("Qwen3.5-35B-A3B", QWEN35_35B_A3B, {"expert": 8}, "bf16", 16, 1024, 4096, 12_503, BRIDGE._replace(hidden_data=0.0, gradient_bytes=2)),
    System("Qwen3-30B-A3B", QWEN3_30B_A3B, {"expert": 16}, "bf16", 16, 1024, 4096, 13_011, OVERLAPPED_EXPERTS),
    System("Qwen3-235B-A22B", experts(94, 4096, 64, 1536), TP | {"tensor": 2, "pipeline": 8, "virtual_pipeline": 4, "expert": 32}, "bf16", 256, 2048, 4096, 2038, OVERLAPPED_EXPERTS),
    System("Qwen3-30B-A3B, all-to-all", QWEN3_30B_A3B, {"expert": 16}, "bf16", 16, 1024, 4096, 5775, BRIDGE._replace(dispatcher="alltoall"), agrees=False, missing="the host's waits for split sizes"),
    System("Qwen3-30B-A3B, natural routing", QWEN3_30B_A3B, {"expert": 16}, "bf16", 16, 1024, 4096, 8655, OVERLAPPED_EXPERTS, agrees=False, missing="unequal experts"),
    System("Llama 1B, nanotron", dense(16, 2048, 8192, 32, 8, 64, tied=True), TP | {"tensor": 2}, "bf16", 8, 512, 4096, 33_200, BRIDGE, agrees=False, missing="launches of small kernels"),
]  # fmt: skip


def estimate(system, gpu):
    """`plan.time.step` of a published run."""
    precision = Precision(fp8="tensorwise" if system.precision == "fp8" else None)
    config = Config.model_construct(
        model=system.model, parallel=Parallel(**system.parallel), micro_batch=1, precision=precision,
        recompute="none", optimizer=Optimizer(),
    )  # fmt: skip
    phase = Phase(
        name="run", until_steps=1, sequence=system.sequence, positions_per_step=system.windows * system.sequence
    )
    return time.step(config, phase, system.gpus, gpu, system.software)
