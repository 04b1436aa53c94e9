"""bag_embedding at the presets' sizes: bags of 4 and of 1, as the model calls it, with `valid` for empty slots."""

import torch
from boreal_kernels import bag_embedding, testing

V = 151936
SHAPES = {
    "250m 8K k=4": {"k": 4, "T": 8192, "v": V, "h": 1024},
    "10b 8K k=4": {"k": 4, "T": 8192, "v": V, "h": 2560},
    "10b 8K k=1": {"k": 1, "T": 8192, "v": V, "h": 2560},
}
# What the ahead-of-time table compiles, in bf16 and FP32: every combination of constants that the presets launch.
VARIANTS = {
    f"h={h} k={k}{' main_grad' if add else ''}": {"k": k, "T": 32, "v": 64, "h": h, "add": add}
    for h in (1024, 2560)
    for k in (1, 4)
    for add in (False, True)
}
DTYPES = (torch.bfloat16, torch.float32)


def operation(ids, weight, vocab_start, valid, add=False, backend="auto"):
    """The public function; with `add` the gradient goes into an FP32 buffer made here."""
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if add else None
    return bag_embedding(ids, weight, vocab_start=vocab_start, valid=valid, main_grad=main_grad, backend=backend)


# What `tune.py` tries: kernel -> (the direction it belongs to, launch configurations).
CANDIDATES = {
    "bag_embedding.forward": (
        "forward", [{"WIDTH": width, "num_warps": warps} for width in (512, 1024, 2048) for warps in (2, 4)],
    ),
    "bag_embedding.backward": (
        "backward", [{"WIDTH": width, "BLOCK": 64, "num_warps": warps} for width in (256, 512, 1024) for warps in (1, 2, 4)],
    ),
}  # fmt: skip


def inputs(k, T, v, h, add=False, *, dtype, device, seed=1):
    """The operation's arguments; ids as in text: the n-th most frequent one in proportion to 1/n."""
    generator = torch.Generator(device).manual_seed(seed)
    ids = (v ** torch.rand(k, T, generator=generator, device=device, dtype=torch.float64)).long() - 1
    weight = torch.randn(v, h, generator=generator, device=device, dtype=dtype)
    made = {"ids": ids, "weight": weight, "vocab_start": 0, "valid": torch.ones_like(ids, dtype=torch.bool)}
    return made | ({"add": True} if add else {})


def cost(k, T, v, h):
    """{direction: (bytes that must move, flops)} in bf16.

    Forward reads k rows a bag; backward reads the bags' gradients and writes the weight's, rows of zeros too.
    """
    return {"forward": (2 * T * h * (k + 1), k * T * h), "backward": (2 * h * (T + v), k * T * h)}


def proof(device):
    """Raise unless outputs and gradients agree with float64."""
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        made = inputs(k=4, T=257, v=100, h=200, dtype=dtype, device=device)
        testing.assert_within(testing.errors(operation, made, "triton"), allowed)


def rivals():
    """{name: function of the same arguments}."""

    def eager(ids, weight, vocab_start, valid):
        return operation(ids, weight, vocab_start, valid, backend="torch")

    def bag(ids, weight, vocab_start, valid):  # knows neither shards nor empty slots, and its backward uses atomics
        return torch.nn.functional.embedding_bag(ids.t(), weight, mode="mean")

    return {"torch": eager, "torch.embedding_bag": bag}
