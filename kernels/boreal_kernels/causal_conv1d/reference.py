"""Causal depthwise convolution in plain torch: W shifted products.  Shapes: x [B, T, C] or [B, T, G, c], weight [C, W].

A tap that reaches before its document reads that document's history instead, picked with `where` rather than a
multiplication by zero, so that even a NaN in one document cannot reach the next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype, document_of


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    split: tuple[int, ...] | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
    """See the package's docstring."""
    shape = x.shape
    x = x.flatten(2)
    B, T, C = x.shape
    W = weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    dtype = accumulate_dtype(x, weight)
    taps_weight = weight.to(dtype).t().contiguous()  # [W, C]
    if initial_state is None:
        history = x.new_zeros(N, W - 1, C, dtype=dtype)
    else:
        history = initial_state.transpose(1, 2).to(dtype)  # [N, W-1, C]

    if cu_seqlens is None:
        before = history
    else:
        before = x.new_zeros(1, W - 1, C, dtype=dtype)
        position = torch.arange(T, device=x.device)
        document = document_of(position, cu_seqlens).clamp_max(N - 1)  # [T]
        age = position - cu_seqlens[document]  # [T] positions since the document's start
    padded = torch.cat([before, x.to(dtype)], dim=1)  # [B, W-1+T, C]

    y = padded[:, W - 1 :] * taps_weight[W - 1]
    for back in range(1, W):  # the tap that looks `back` positions back
        tap = padded[:, W - 1 - back : W - 1 - back + T]
        if cu_seqlens is not None:
            inside = (age >= back)[:, None]  # [T, 1]
            if initial_state is None:
                tap = tap.masked_fill(~inside, 0.0)
            else:
                earlier = history[document, (W - 1 + age - back).clamp(0, W - 2)]  # [T, C]
                tap = torch.where(inside, tap, earlier)
        y = torch.addcmul(y, tap, taps_weight[W - 1 - back])
    if activation == "silu":
        y = F.silu(y)

    state = None
    if output_final_state:
        if cu_seqlens is None:
            last = padded[:, T:]  # [N, W-1, C]
        else:
            start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
            wanted = end - (W - 1) + torch.arange(W - 1, device=x.device)  # [N, W-1] positions
            age = wanted - start  # negative: before the document
            earlier = history.gather(1, (W - 1 + age).clamp(0, max(W - 2, 0)).long()[..., None].expand(N, W - 1, C))
            last = torch.where((age >= 0)[..., None], x[0, wanted.clamp_min(0).long()].to(dtype), earlier)
        state = last.transpose(1, 2).to(x.dtype).contiguous()  # [N, C, W-1]
    y = y.to(x.dtype).view(shape)
    if split is not None:
        y = tuple(part.contiguous() for part in y.split(split, dim=-1))
    return y, state
