"""The gated delta rule by other people's kernels.  Shapes: q, k [B, T, H, K], v, o [B, T, HV, V], N sequences.

Written after the source of flash-linear-attention 0.6.0 and flash-qla 0.1.2. NEITHER ADAPTER HAS BEEN RUN ON A GPU:
what is tested is the translation between their calling convention and ours, against a stand-in for the libraries.

What they share with ours: HV > H without repeating keys, key head j // (HV/H); the L2 norm of q and k with 1e-6 under
the root; documents by cu_seqlens; the state [N, HV, K, V] in FP32. What differs: they take the decay's natural
logarithm and the write strength instead of a, b, A_log and dt_bias, so both are computed here, in FP32; q, k and v
must be of one dtype; they know no transition. Normalised q and k and the states between chunks are rounded to that
dtype, and FP32 matrix products are TF32 by default: they are less exact than backend torch.

Both derive a list of chunks from cu_seqlens on the host, which waits for the device once for each new tensor and is
then remembered by the tensor's identity. So cu_seqlens is handed on as it comes, not converted, and must not be
overwritten in place with another batch's.
"""

import importlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from boreal_kernels.shapes import expect_kernel_dtypes

OP = "gated_delta_rule"


@torch.compiler.disable
def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    output_transition: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By flash-linear-attention's chunked Triton kernels; not run on a GPU yet. Arguments: the package's docstring.

    The transition rides along as K more value columns, which about doubles the work. Raises ValueError if the package
    is missing, for K above 256 and for float64.
    """
    chunked = _import("fla.ops.gated_delta_rule", "fla", "flash-linear-attention").chunk_gated_delta_rule
    K, V = q.shape[-1], v.shape[-1]
    if K > 256:
        raise ValueError(f"{OP}: backend 'fla': found K = {K}, expected at most 256; use backend torch")
    q, k, wide, g, beta, initial = _translate(q, k, v, a, b, A_log, dt_bias, initial_state)
    if output_transition:
        # It obeys the state's recurrence, with zero values and the identity as the entering state.
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        eye = torch.eye(K, device=q.device).expand(N, v.shape[2], K, K)
        initial = eye.new_zeros(*eye.shape[:-1], V) if initial is None else initial
        initial, wide = torch.cat([initial, eye], dim=-1), F.pad(wide, (0, K))
    # As exported, the function hands the call to flash-qla where that is installed and fits. It is unwrapped because
    # the name of a backend is a promise.
    o, state = inspect.unwrap(chunked)(
        q, k, wide, g, beta, scale=scale, initial_state=initial,
        output_final_state=output_final_state or output_transition, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    transition = state[..., V:] if output_transition else None
    return o[..., :V].to(v.dtype), state[..., :V] if output_final_state else None, transition


@torch.compiler.disable
def flash_qla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    output_transition: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By flash-qla's TileLang kernels, through flash-linear-attention; not run on a GPU yet. Arguments as in `fla`.

    flash-linear-attention says which calls fit (bf16 or fp16, K = V = 128, compute capability 9.0 or newer); what it
    refuses raises ValueError with its reason, where its own dispatch would quietly fall back to Triton. So does a
    missing package, and the transition: its K more value columns do not fit into V = 128.
    """
    module = _import("fla.ops.gated_delta_rule.backends.flash_qla", "flash_qla", "flash-linear-attention")
    if output_transition:
        raise ValueError(
            f"{OP}: backend 'flash_qla' has no transition: its values are 128 wide, and that takes V + K; "
            "use backend triton or torch"
        )
    out_dtype = v.dtype
    q, k, v, g, beta, initial = _translate(q, k, v, a, b, A_log, dt_bias, initial_state)
    options = dict(
        scale=scale, initial_state=initial, output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    implementation = module.FlashQLABackend()
    fits, reason = implementation.verify("chunk_gated_delta_rule", q, k, v, g, beta, **options)
    if not fits:
        raise ValueError(f"{OP}: backend 'flash_qla' refuses this call: {reason}; use backend triton, fla or torch")
    _import("flash_qla", "flash_qla", "flash-qla")
    o, state = implementation.chunk_gated_delta_rule(q, k, v, g, beta, **options)
    return o.to(out_dtype), state if output_final_state else None, None


def _import(module: str, backend: str, package: str):
    """The module, or ValueError naming what to install. Imported on use: it costs seconds, and most runs do without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{OP}: backend {backend!r} needs the package {package} ({error}): pip install {package}, or use backend "
            "triton or torch"
        ) from error


def _translate(q, k, v, a, b, A_log, dt_bias, initial_state):
    """q, k, v in one dtype; in FP32 the log decay g <= 0 and the write strength beta [B, T, HV], and the state."""
    expect_kernel_dtypes(OP, q=q, k=k, v=v, a=a, b=b, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    initial = None if initial_state is None else initial_state.float()
    return q.to(dtype), k.to(dtype), v.to(dtype), g, b.float().sigmoid(), initial
