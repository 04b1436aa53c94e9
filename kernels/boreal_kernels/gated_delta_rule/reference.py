"""The gated delta rule in plain torch, twice: token by token (the obvious twin) and chunk by chunk (fast).

Shapes: B rows, T positions, N sequences, H key heads, HV value heads, G = HV/H, K key width, V value width,
NC chunks of C positions. Inside `chunked` the chunk dim leads, [NC, B*H, G, C, ..]: key-head tensors have G = 1 and
broadcast, so K K^T and Q K^T are computed once per key head.

Everything is FP32 (float64 for float64 inputs): decays are products of many factors, and the state is a sum over the
whole sequence. Equations: arXiv 2412.06464, section 3; the WY / UT form is that paper's chunkwise algorithm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from boreal_kernels.shapes import accumulate_dtype, document_of

# Forward + backward, chunk 16 / 32 / 64, CPU ms (best of 15, good to about 20 %) of one thread on a shared Xeon with
# AVX-512, torch 2.15, T = 1024:  H=2 HV=4 K=V=64: 37 / 34 / 41,  H=4 HV=8 K=V=32: 47 / 41 / 59  with half-lives around
# 10 positions. With decays that forget within a position 64 takes twice that (far corners of a chunk become denormal
# numbers, which torch.set_flush_denormal(True) avoids); 32 does not.
CHUNK = 32
L2_EPS = 1e-6


def _prepare(q, k, v, a, b, A_log, dt_bias, initial_state, scale, output_transition, N):
    """Accumulate dtype, normalised q and k, gates, and the entering state.

    Returns q, k [B, T, H, K], v [B, T, HV, V'], beta, g [B, T, HV], initial [N, HV, K, V'] or None.
    With the transition V' = V + K: its matrix obeys the state's recurrence with zero values and the identity as the
    entering state, so it rides along as K more value columns.
    """
    dtype = accumulate_dtype(q, k, v, a, b, A_log, dt_bias)
    q, k, v, a, b, A_log, dt_bias = (x.to(dtype) for x in (q, k, v, a, b, A_log, dt_bias))
    B, T, HV, V = v.shape
    K = q.shape[-1]
    q = q * (((q * q).sum(-1, keepdim=True) + L2_EPS).rsqrt() * (K**-0.5 if scale is None else scale))
    k = k * ((k * k).sum(-1, keepdim=True) + L2_EPS).rsqrt()
    beta = b.sigmoid()
    g = -A_log.exp() * F.softplus(a + dt_bias)  # log of the decay alpha, <= 0
    initial = None if initial_state is None else initial_state.to(dtype)
    if output_transition:
        if initial is None:
            initial = v.new_zeros(N, HV, K, V)
        eye = torch.eye(K, dtype=dtype, device=v.device).expand(N, HV, K, K)
        initial = torch.cat([initial, eye], dim=-1)
        v = F.pad(v, (0, K))
    return q, k, v, beta, g, initial


def _split(o, state, V, dtype, output_final_state, output_transition):
    """Undo the extra columns of `_prepare`: o, state or None, transition or None."""
    transition = state[..., V:] if output_transition else None
    return o[..., :V].to(dtype), state[..., :V] if output_final_state else None, transition


def recurrent(
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
    """Token by token, as the equations read. Slow but for single steps. Arguments: the package's docstring."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    out_dtype = v.dtype
    q, k, v, beta, g, initial = _prepare(q, k, v, a, b, A_log, dt_bias, initial_state, scale, output_transition, N)
    q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))  # [B, T, HV, K]
    if initial is None:
        initial = v.new_zeros(N, HV, K, v.shape[-1])

    def scan(span: slice, S: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = []
        for t in range(span.start, span.stop):
            S = S * g[:, t, :, None, None].exp()  # [B, HV, K, V]: decay first,
            read = (S * k[:, t, :, :, None]).sum(-2)  # [B, HV, V]: then read the decayed state,
            write = beta[:, t, :, None] * (v[:, t] - read)
            S = S + k[:, t, :, :, None] * write[:, :, None, :]  # then write
            outputs.append((S * q[:, t, :, :, None]).sum(-2))
        return outputs, S

    if cu_seqlens is None:
        outputs, state = scan(slice(0, T), initial)
    else:
        outputs, states = [], []
        bounds = cu_seqlens.tolist()
        for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            document, S = scan(slice(start, end), initial[n : n + 1])
            outputs += document
            states.append(S)
        state = torch.cat(states)
    return _split(torch.stack(outputs, dim=1), state, V, out_dtype, output_final_state, output_transition)


def chunked(
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
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The WY / UT form: all parallel over chunks but one small state update. Arguments: the package's docstring.

    Within a chunk entered with state S0, gamma_i the log decay since the later of chunk start and document start,
    Gam_ij = exp(gamma_i - gamma_j) for j <= i in the same document (else 0), e_i = exp(gamma_i) where the document was
    already open at the chunk start (else 0), r_i = Gam_Ci:

        T  = (I + strict_tril(diag(beta) K K^T * Gam))^-1
        V^ = T diag(beta) (V - diag(e) K S0)
        O  = diag(e) Q S0 + (Q K^T * Gam) V^          (scale already in Q)
        S_C = e_C S0 + (diag(r) K)^T V^

    Documents share one uniform grid of chunks: the masks keep them apart, nothing is padded per document and nothing
    is read on the host.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    G = HV // H
    C = chunk
    NC = -(-T // C)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    out_dtype = v.dtype
    q, k, v, beta, g, initial = _prepare(q, k, v, a, b, A_log, dt_bias, initial_state, scale, output_transition, N)
    acc, VV = v.dtype, v.shape[-1]  # VV = V, or V + K with the transition's columns

    def grid(x: Tensor, G: int, width: int) -> Tensor:  # [B, T, H*G, width] -> [NC, B*H, G, C, width]
        x = x.reshape(B, T, -1)
        if NC * C > T:  # Padding is inert: beta = 0 writes nothing, g = 0 decays nothing.
            x = F.pad(x, (0, 0, 0, NC * C - T))
        x = x.view(B, NC, C, H, G, width).permute(1, 0, 3, 4, 2, 5)
        return x.reshape(NC, B * H, G, C, width)

    q, k = grid(q, 1, K), grid(k, 1, K)  # [NC, B*H, 1, C, K]
    v = grid(v, G, VV)  # [NC, B*H, G, C, VV]
    beta, g = grid(beta, G, 1), grid(g, G, 1)  # [NC, B*H, G, C, 1]

    # gamma is summed from the document's start, not the chunk's, so that one document's gates cannot round another's;
    # in float64, because next to a gate that forgets at once (gamma = -1000) FP32 has no digits left for mild ones.
    causal = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    if cu_seqlens is None:
        same = causal[None, None, None]  # [1, 1, 1, C, C]
        gamma = g.double().cumsum(-2)  # [NC, B*H, G, C, 1]
    else:
        document = document_of(torch.arange(NC * C, device=v.device), cu_seqlens).view(NC, C)  # N on the padding
        same = (causal & (document[:, :, None] == document[:, None, :]))[:, None, None]  # [NC, 1, 1, C, C]
        gamma = (g.double().view(NC, H * G, C) @ same[:, 0, 0].double().mT).view(NC, H, G, C, 1)

    decay = _Decay.apply(gamma, gamma, same, acc)  # Gam [NC, B*H, G, C, C]
    leave = _Decay.apply(gamma[..., -1:, :], gamma, same[..., -1:, :], acc).mT  # r [NC, B*H, G, C, 1]
    enter = from_start = gamma.exp().to(acc)  # e [NC, B*H, G, C, 1]
    if cu_seqlens is not None:
        before = F.pad(document[:-1, -1:], (0, 0, 1, 0), value=-1)  # [NC, 1] document of the position before the chunk
        enter = from_start.masked_fill((document != before)[:, None, None, :, None], 0.0)

    # A row's entering state enters at chunk 0. A document's enters where it starts, in the middle of a chunk: what S0
    # is to the others, `initial` is to its positions.
    S = v.new_zeros(B * HV, K, VV)
    inject = cu_seqlens is not None and initial is not None
    if inject:
        initial = initial.view(N, H, G, K, VV)
        first = (cu_seqlens[:-1].long() // C).clamp_max(NC - 1)  # [N] chunk of its first position
        own = document[first] == torch.arange(N, device=v.device)[:, None]  # [N, C]
        own = from_start[first].masked_fill(~own[:, None, None, :, None], 0.0)  # [N, H, G, C, 1]
        v = v.index_add(0, first, -(own * (k[first] @ initial)))
        o_injected = torch.zeros_like(v).index_add(0, first, own * (q[first] @ initial))
        S_injected = v.new_zeros(NC, H, G, K, VV).index_add(0, first, own[..., -1:, :] * initial).view(NC, HV, K, VV)
    elif initial is not None:
        S = initial.reshape(B * HV, K, VV)

    # V^ = U + W S0 with U = T diag(beta) V and W = -T diag(beta e) K; the value heads of a key head share a product.
    Tb = _UnitLowerInverse.apply(beta * ((k @ k.mT) * decay)) * beta.mT  # [NC, B*H, G, C, C]
    U = (Tb @ v).view(NC, B * HV, C, VV)
    W = ((Tb * -enter.mT).reshape(NC, B * H, 1, G * C, C) @ k).view(NC, B * HV, C, K)
    keys = (leave * k).view(NC, B * HV, C, K)
    through = enter[..., -1:, :].reshape(NC, B * HV, 1, 1)  # e_C

    # The only loop. unbind, not indexing: the gradient of an index is a zero tensor of the whole size, per chunk.
    starts, news = [], []
    for n, (u, w, key, e) in enumerate(zip(U.unbind(), W.unbind(), keys.unbind(), through.unbind(), strict=True)):
        starts.append(S)
        news.append(torch.baddbmm(u, w, S))
        S = torch.baddbmm(e * S, key.mT, news[-1])
        if inject:
            S = S + S_injected[n]
    starts, new = torch.cat(starts), torch.cat(news)  # [NC*B*HV, K, VV], V^ [NC*B*HV, C, VV]

    P = ((q @ k.mT) * decay).view(-1, C, C)
    o = torch.baddbmm(P @ new, (enter * q).view(-1, C, K), starts)  # [NC*B*HV, C, VV]
    if inject:
        o = o + o_injected.view_as(o)
    o = o.view(NC, B, HV, C, VV).permute(1, 0, 3, 2, 4).reshape(B, NC * C, HV, VV)[:, :T]

    state = None
    if output_final_state or output_transition:
        if cu_seqlens is None:
            state = S.view(N, HV, K, VV)
        else:
            new, starts = new.view(NC, H, G, C, VV), starts.view(NC, H, G, K, VV)
            state = _document_ends(cu_seqlens, initial, k, new, gamma, same, starts).view(N, HV, K, VV)
    return _split(o, state, V, out_dtype, output_final_state, output_transition)


def _document_ends(cu_seqlens, initial, k, new, gamma, same, starts) -> Tensor:
    """Every document's last state [N, H, G, K, VV]: the chunk's update, stopped at the document's last position."""
    C = k.shape[3]
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = (end - 1).clamp_min(0)
    at, row = last // C, last % C  # [N]
    gamma_last = gamma[at, :, :, row][..., None]  # [N, H, G, 1, 1]
    leave = _Decay.apply(gamma_last, gamma[at], same[at, :, :, row][..., None, :], k.dtype).mT  # [N, H, G, C, 1]
    entered = starts[at]
    if initial is None:
        initial = torch.zeros_like(entered)
    entered = torch.where((begin // C == at)[:, None, None, None, None], initial, entered)
    state = gamma_last.exp().to(k.dtype) * entered + (leave * k[at]).mT @ new[at]
    # An empty document keeps its entering state.
    return torch.where((begin == end)[:, None, None, None, None], initial, state)


class _Decay(torch.autograd.Function):
    """exp(row_i - column_j) where `seen`, else 0; rows [.., R, 1], columns [.., C, 1] float64 -> [.., R, C] dtype.

    Written out for speed (the float64 difference is gone after the forward) and for safety: masked before exp, so an
    unseen pair cannot overflow.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
        decay = (rows - columns.mT).to(dtype).masked_fill_(~seen, -torch.inf).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx, grad: Tensor):
        (decay,) = ctx.saved_tensors
        grad = grad * decay
        return grad.sum(-1, True, dtype=torch.float64), -grad.sum(-2, True, dtype=torch.float64).mT, None, None


class _UnitLowerInverse(torch.autograd.Function):
    """T = (I + strict_tril(M))^-1 [.., C, C]; what M holds on and above the diagonal is not read. dM = -T^T dT T^T."""

    @staticmethod
    def forward(ctx, M: Tensor) -> Tensor:
        eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)
        # Transposed, because the solver works in column-major order: nothing is copied on the way in or out.
        inverse = torch.linalg.solve_triangular(M.mT, eye, upper=True, unitriangular=True).mT
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()
