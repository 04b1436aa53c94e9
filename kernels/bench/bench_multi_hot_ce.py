"""linear_multi_hot_cross_entropy at the sizes of BOREAL's heads: 8,192 positions, 151,936 vocabulary rows.

"promised" is what training does: gradients in the forward, the weight's into main_grad. Its "forward" is all three
matrix products, and its "backward" only the check. "any" recomputes the logits: its "forward" is the loss alone.
"""

import torch
from boreal_kernels import linear_multi_hot_cross_entropy, multi_hot_cross_entropy, testing

ROWS_OF_VOCABULARY, TOKENS = 151_936, 151_669
SHAPES = {
    f"{name} 8K k={k} {mode}": {"T": 8192, "h": h, "v": ROWS_OF_VOCABULARY, "k": k, "mode": mode}
    for name, h, k in (("10b", 2560, 1), ("10b", 2560, 4), ("250m", 1024, 1), ("250m", 1024, 4))
    for mode in ("promised", "any")
}
# What the ahead-of-time table compiles: the presets' bags and a large one. The head's width does not reach a kernel, so
# it is small here.
VARIANTS = {f"k={k}": {"T": 4, "h": 16, "v": ROWS_OF_VOCABULARY, "k": k, "mode": "promised"} for k in (1, 4, 16)}
DTYPES = (torch.bfloat16, torch.float32)


def operation(hidden, weight, targets, target_weight, vocab_size, main_grad, mode, backend):
    """The loss for the objective's gradient 1; a promised one is differentiated at once, whatever the caller's mode."""
    if mode == "any":
        return linear_multi_hot_cross_entropy(
            hidden, weight, targets, target_weight, vocab_size=vocab_size, backend=backend
        )[0]
    with torch.enable_grad():
        return linear_multi_hot_cross_entropy(
            hidden, weight, targets, target_weight, vocab_size=vocab_size, backend=backend, upstream=1.0,
            main_grad=main_grad,
        )[0]  # fmt: skip


# What `tune.py` tries: kernel -> (the direction it belongs to, launch configurations).
CANDIDATES = {
    "multi_hot_ce.stats": (
        "forward",
        [{"LANES": lanes, "DEPTH": depth, "num_warps": 8} for lanes in (1024, 2048, 4096) for depth in (4, 8)],
    ),
    "multi_hot_ce.grad": (  # with a promise it runs in the forward
        "forward",
        [{"TILE": tile, "TILES": tiles, "num_warps": 8} for tile in (4096, 8192) for tiles in (2, 5, 10)],
    ),
}  # fmt: skip


def inputs(T, h, v, k, mode, *, dtype, device, seed=1):
    """The operation's arguments; one position in sixteen has no target."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    tokens = min(v, TOKENS)
    target_weight = torch.full((k, T), 1.0 / k, device=device)
    target_weight[:, ::16] = 0
    return {
        "hidden": draw(T, h),
        "weight": 2 * h**-0.5 * draw(v, h),
        "targets": torch.randint(tokens, (k, T), generator=generator, device=device),
        "target_weight": target_weight,
        "vocab_size": tokens,
        "main_grad": torch.zeros(v, h, device=device) if mode == "promised" else None,
        "mode": mode,
    }


def cost(T, h, v, k, mode):
    """{direction: (bytes that must move, flops)} in bf16: the head's operands once, main_grad read and written once."""
    product, operands = 2 * T * h * v, 2 * (T * h + v * h)
    if mode == "any":
        return {"forward": (operands, product), "backward": (operands + 2 * (T * h + v * h), 3 * product)}
    return {"forward": (operands + 2 * T * h + 8 * v * h, 3 * product), "backward": (4 * T * h, 0)}


def proof(device):
    """Raise unless outputs and gradients agree with float64, in both modes and without the head."""
    for dtype, allowed in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        for k in (1, 4):
            made = inputs(T=19, h=32, v=1016, k=k, mode="any", dtype=dtype, device=device)
            testing.assert_within(testing.errors(operation, made, "triton"), allowed)
            hidden, weight, targets, w = (made[n] for n in ("hidden", "weight", "targets", "target_weight"))
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            made |= {"hidden": leaves[0], "weight": leaves[1]}
            again = torch.autograd.grad(operation(**made, backend="triton"), leaves)
            made |= {"mode": "promised", "main_grad": torch.zeros_like(weight, dtype=torch.float32)}
            (at_once,) = torch.autograd.grad(operation(**made, backend="triton"), leaves[:1])
            assert torch.equal(at_once, again[0]) and torch.equal(made["main_grad"].to(dtype), again[1])
            logits = {"logits": hidden @ weight.t(), "targets": targets, "target_weight": w}
            testing.assert_within(testing.errors(multi_hot_cross_entropy, logits, "triton"), allowed)


def rivals():
    """{name: function of the same arguments}; the gradient of the weight is returned by all of them."""

    def mean_over_the_bag(cross_entropy):
        def loss(logits, targets, target_weight):
            each = [cross_entropy(logits, y) * w for y, w in zip(targets, target_weight, strict=True)]
            return torch.stack(each).sum()

        return loss

    def head(loss):
        def call(hidden, weight, targets, target_weight, vocab_size, main_grad, mode):
            return loss(torch.nn.functional.linear(hidden, weight)[:, :vocab_size], targets, target_weight)

        return call

    def usual(logits, y):
        return torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")

    found = {"torch": head(mean_over_the_bag(usual)), "torch.compile": torch.compile(head(mean_over_the_bag(usual)))}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        pass
    else:

        def liger(hidden, weight, targets, target_weight, vocab_size, main_grad, mode):
            """Positions without a target are ignored; its bag is one target, so k = 1."""
            if targets.shape[0] != 1:
                raise ValueError("one target a position")
            labels = targets[0].masked_fill(target_weight[0] == 0, -100)
            with torch.enable_grad():  # its gradients are computed in the forward too
                out = LigerFusedLinearCrossEntropyFunction.apply(
                    hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum"
                )
            return out[0] if isinstance(out, tuple) else out

        found["liger"] = liger
    try:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    except ImportError:
        return found
    if torch.cuda.is_available():
        found["megatron-core"] = head(mean_over_the_bag(_megatron(vocab_parallel_cross_entropy)))
    return found


def _megatron(vocab_parallel_cross_entropy):
    """megatron-core's function of (logits, targets) in a group of one rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def usual(logits, y):
        # A copy: it overwrites FP32 logits in place.
        return vocab_parallel_cross_entropy(logits.float()[:, None], y[:, None], tp_group=dist.group.WORLD)[:, 0]

    return usual
