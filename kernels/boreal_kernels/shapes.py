"""What every operation asks of its arguments, and where a position stands among packed documents.

cu_seqlens [N+1] int32 holds 0 and the end of every document, as in flash-attention: document n is the positions
cu_seqlens[n] .. cu_seqlens[n+1]-1 of the single row. Its values are never read on the host, so a device is not stalled;
that the last one equals T is the caller's promise.
"""

import torch
from torch import Tensor


def expect_shape(op: str, name: str, tensor: Tensor, legend: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; `legend` is the same shape in letters."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name}: found shape {list(tensor.shape)}, expected {legend} = {list(shape)}")


def expect_dims(op: str, name: str, tensor: Tensor, legend: str, dims: int) -> None:
    """Raise ValueError unless `tensor` has `dims` dims, none of them empty."""
    if tensor.dim() != dims or 0 in tensor.shape:
        raise ValueError(f"{op}: {name}: found shape {list(tensor.shape)}, expected {legend}, no dim empty")


def expect_one_of(op: str, name: str, found, expected: tuple) -> None:
    if found not in expected:
        raise ValueError(f"{op}: {name}: found {found!r}, expected one of {', '.join(map(repr, expected))}")


def expect_integers(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name}: found {tensor.dtype}, expected int32 or int64")


def sequences(op: str, rows: int, cu_seqlens: Tensor | None) -> int:
    """N: the number of documents, or of rows when nothing is packed. Raises ValueError for a bad cu_seqlens."""
    if cu_seqlens is None:
        return rows
    expect_integers(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: cu_seqlens: found shape {list(cu_seqlens.shape)}, expected [N+1] with N >= 1")
    if rows != 1:
        raise ValueError(f"{op}: found B = {rows} with cu_seqlens, expected B = 1: pack the documents into one row")
    return cu_seqlens.numel() - 1


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """FP32, or float64 when any input is float64 (so that gradients can be checked numerically)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def document_of(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Document index of every position, same shape, int64; positions past the last document get N."""
    return torch.searchsorted(cu_seqlens[1:].to(positions.dtype), positions, right=True)


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect_kernel_dtypes(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every floating tensor is of a dtype that the kernels read; they compute in FP32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{op}: {name}: found {tensor.dtype}, expected one of {', '.join(map(str, KERNEL_DTYPES))}; "
                "backend='torch' takes any"
            )


def strided_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """How a kernel walks the rows of x [.., D]: (x, group, outer, inner), where row r begins at element

        (r // group) * outer + (r % group) * inner

    A view of a wider tensor is walked where it lies, if two strides are enough and its last dim is dense; else x is a
    contiguous copy.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    levels = []  # (size, stride), outermost first, neighbours merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return strided_rows(x.contiguous())
    if len(levels) == 2:
        return x, levels[1][0], levels[0][1], levels[1][1]
    return x, 1, levels[0][1] if levels else x.shape[-1], 0
