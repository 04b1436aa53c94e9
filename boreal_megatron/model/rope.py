"""Rotary position embedding of a part of each head (rotate-half convention), in FP32.

s positions, n heads, d head dim, r rotated dims (r <= d).
"""

import torch


def rotary(positions, rope_dim, theta):
    """Cosines and sines of every position.

    Args:
        positions: [s] int, the position of each row inside its window.
        rope_dim: r, even.
        theta: base of the geometric frequencies, theta^(-2i/r).

    Returns:
        [2, s, r/2] FP32: cos, sin.
    """
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32, device=positions.device) / rope_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)  # [s, r/2]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, table):
    """Rotate the first r dims of every head; pairs are (i, i + r/2).

    Args:
        x: [s, b, n, d].
        table: [2, s, r/2] of `rotary`.
    """
    cos, sin = table[:, :, None, None, :]  # [s, 1, 1, r/2]
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
