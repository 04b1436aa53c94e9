"""Gated delta rule, forward: all of a chunk that does not need the state, then the scan over chunks.

Shapes: q, k [B, T, H, K], v, o [B, T, HV, V]; R = HV/H; C = 64 positions a chunk; state [N, HV, K, V] FP32. A chunk's
64x64 matrices F, P are [chunks, HV, C, C], its gamma [chunks, HV, C], its normalised keys and queries
[chunks, H, C, K], see `chunks`.

Per chunk and value head, with c = scale, gamma the sum of log2 decays since the chunk's first position, and

    Gam_ij = 2^(gamma_i - gamma_j) for j <= i, else 0        e_i = 2^gamma_i        r_i = 2^(gamma_C - gamma_i)
    F = ((I + strict_tril(diag(beta) K K^T))^-1 * Gam) diag(beta)                   P = c tril(Q K^T) * Gam

the state S0 that enters makes (arXiv 2412.06464, section 3; no W or U, because one product with F serves both)

    V^ = F (V - e K S0)        O = c e (Q S0) + P V^        S = e_C S0 + K^T (r V^)

The state stays in registers, transposed, [columns of V, K]: every product on the serial path takes its left operand
from registers. Never is a product's result transposed into another product: Triton 3.4-3.7 miscompiles it on Hopper.

What a short chunk lacks is zero in its keys, queries, F and P, and gamma goes on with its last value. What lies there
in the inputs belongs to another document and may be NaN: those loads are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.gated_delta_rule.chunks import CHUNK, counts, table, walk, walk_gates

L2_EPS = tl.constexpr(1e-6)
LOG2E = tl.constexpr(1.4426950408889634)
# log2 of a decay that forgets everything: 2^-160 is 0 in FP32. What lies below is cut off, so that one such gate leaves
# digits for the mild ones beside it.
FORGET = tl.constexpr(-160.0)


@triton.jit
def softplus(x):
    """log(1 + e^x), good to FP32's last digits for every x."""
    u = tl.exp2(-tl.abs(x) * LOG2E)
    s = tl.div_rn(u, 2.0 + u)  # log(1 + u) = 2 atanh(u / (2 + u)), s <= 1/3
    z = s * s
    tail = 1.0 / 11 + z * (1.0 / 13 + z * (1.0 / 15))
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * tail))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    u = tl.exp2(-tl.abs(x) * LOG2E)  # at most 1: nothing overflows
    return tl.div_rn(tl.where(x < 0.0, u, 1.0), 1.0 + u)


@triton.jit
def normalised(x):
    """x / sqrt(|x|^2 + eps) and 1 / sqrt(|x|^2 + eps), x [C, K] FP32. Correctly rounded: exact norms stay exact."""
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1) + L2_EPS)
    rho = tl.div_rn(tl.zeros_like(norm) + 1.0, norm)
    return x * rho[:, None], rho


@triton.jit
def inverse(kk, beta, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict_tril(diag(beta) kk))^-1 of a symmetric kk [C, C], FP32.

    A power series over the whole matrix overflows for keys that repeat (entries of N^32 pass 1e10). Instead: the four
    16x16 blocks X of the diagonal by substitution, row by row; then with N = X M below those blocks, N^4 = 0 and the
    inverse is (I - N)(I + N^2) X, a product of contractions.
    """
    B: tl.constexpr = 16
    G: tl.constexpr = C // B
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    across = tl.where(i < j, kk * beta[None, :], 0.0)  # M^T, without a transpose
    same = tl.arange(0, G)[:, None, None, None] == tl.arange(0, G)[None, None, :, None]  # [G, 1, G, 1]
    across = tl.sum(tl.where(same, tl.reshape(across, [G, B, G, B]), 0.0), axis=2)  # [G, B, B], its diagonal blocks
    row = tl.arange(0, B)[None, :, None]
    column = tl.arange(0, B)[None, None, :]
    X = tl.where(row == column, 1.0, 0.0) + tl.zeros([G, B, B], tl.float32)
    for step in range(1, B):
        weights = tl.sum(tl.where(column == step, across, 0.0), axis=2)  # [G, B] row `step` of M
        found = tl.sum(weights[:, :, None] * X, axis=1)  # [G, B]
        X = tl.where(row == step, X - found[:, None, :], X)
    X = tl.reshape(tl.where(same, X[:, :, None, :], 0.0), [C, C])
    N = tl.dot(X, tl.where(i // B > j // B, kk * beta[:, None], 0.0), input_precision=PRECISION)
    X = X + tl.dot(tl.dot(N, N, input_precision=PRECISION), X, input_precision=PRECISION)
    return X - tl.dot(N, X, input_precision=PRECISION)


@triton.jit
def decays(gamma_i, gamma_j, seen):
    """2^(gamma_i - gamma_j) where `seen`, else 0; what is not seen cannot overflow."""
    return tl.where(seen, tl.exp2(tl.minimum(gamma_i - gamma_j, 0.0)), 0.0)


@triton.jit(do_not_specialize=["T", "H", "rows"])
def gated_delta_rule_intra(
    q, k, a, b, A_log, dt_bias, chunks, qn, kn, norms, gamma, F, P,
    q_batch, q_time, q_head, k_batch, k_time, k_head, a_batch, a_time, a_head, b_batch, b_time, b_head,
    scale, T, H, rows,
    R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: normalised q and k (of the first head of a group), gamma, F and P."""
    HV = H * R
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    key = head // R
    batch = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    begin = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 3)
    if length == 0:
        return
    dtype: tl.constexpr = kn.dtype.element_ty
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    inside = row < length

    k += batch * k_batch + begin * k_time + key * k_head
    k_tile = tl.load(k + row[:, None] * k_time + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    k_tile, k_rho = normalised(k_tile)
    k_tile = k_tile.to(dtype)
    q += batch * q_batch + begin * q_time + key * q_head
    q_tile = tl.load(q + row[:, None] * q_time + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    q_tile, q_rho = normalised(q_tile)
    q_tile = q_tile.to(dtype)
    if head % R == 0:
        at = (chunk.to(tl.int64) * H + key) * (C * K)
        tl.store(kn + at + row[:, None] * K + column[None, :], k_tile)
        tl.store(qn + at + row[:, None] * K + column[None, :], q_tile)
        at = (batch * T + begin) * H + key
        tl.store(norms + at + row * H, q_rho, mask=inside)
        tl.store(norms + rows.to(tl.int64) * H + at + row * H, k_rho, mask=inside)

    raw = tl.load(a + batch * a_batch + begin * a_time + head * a_head + row * a_time, mask=inside, other=0.0)
    raw = raw.to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    g = -tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E) * softplus(raw) * LOG2E
    g = tl.cumsum(tl.where(inside, tl.maximum(g, FORGET), 0.0))
    beta = tl.load(b + batch * b_batch + begin * b_time + head * b_head + row * b_time, mask=inside, other=0.0)
    beta = tl.where(inside, sigmoid(beta.to(tl.float32)), 0.0)
    at = (chunk.to(tl.int64) * HV + head) * C
    tl.store(gamma + at + row, g)

    i = row[:, None]
    j = row[None, :]
    decay = decays(g[:, None], g[None, :], i >= j)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    tl.store(P + at * C + i * C + j, (qk * decay * scale).to(dtype))
    kk = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    tl.store(F + at * C + i * C + j, (inverse(kk, beta, C, MERGE) * decay * beta[None, :]).to(dtype))


@triton.jit
def scan_up(
    n, head, tile, qn, kn, v, gamma, F, P, initial, spans, o, state, transition, h, vn,
    v_batch, v_time, v_head, scale, T, H,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, STATE: tl.constexpr, TRANSITION: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Columns tile*BV .. of one sequence and value head, first chunk to last.

    With TRANSITION, K more columns follow the V: zero values, entered by the identity; their last state is the matrix
    through which a state passes the sequence. OUTPUT writes results; KEEP writes what the backward needs, S0 and V^.
    """
    HV = H * R
    VV: tl.constexpr = V + K if TRANSITION else V
    first = tl.load(spans + n * 4).to(tl.int64)
    batch = tl.load(spans + n * 4 + 1).to(tl.int64)
    begin = tl.load(spans + n * 4 + 2).to(tl.int64)
    length = tl.load(spans + n * 4 + 3)
    dtype: tl.constexpr = kn.dtype.element_ty
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    value = tile * BV + tl.arange(0, BV)
    real = tile * BV < V  # of the values, not of the transition

    # [BV, K]; `initial` and `state` hold it the other way round
    at_state = (n * HV + head).to(tl.int64) * (K * V) + column[None, :] * V + value[:, None]
    S = tl.zeros([BV, K], tl.float32)
    if INITIAL:
        S = tl.load(initial + at_state, mask=(value < V)[:, None] & (column < K)[None, :], other=0.0).to(tl.float32)
    if TRANSITION:
        S = tl.where(value[:, None] - V == column[None, :], 1.0, S)

    v += batch * v_batch + head * v_head
    at_k = row[:, None] * K + column[None, :]
    at_v = row[None, :] * v_time + value[:, None]
    at_o = row[None, :] * (HV * V) + value[:, None]
    at_w = row[None, :] * VV + value[:, None]
    at_square = row[:, None] * C + row[None, :]
    for c in range(0, (length + C - 1) // C):
        at = (first + c) * HV + head
        start = begin + c * C
        position = batch * T + start
        inside = row < length - c * C
        if KEEP:
            tl.store(h + at * (VV * K) + value[:, None] * K + column[None, :], S.to(dtype))
        at_key = ((first + c) * H + head // R) * (C * K)
        k_tile = tl.load(kn + at_key + at_k)
        g = tl.load(gamma + at * C + row)
        last = tl.load(gamma + at * C + C - 1)
        e = tl.exp2(g)
        read = tl.dot(S.to(dtype), tl.trans(k_tile), input_precision=PRECISION)  # [BV, C]
        if TRANSITION:
            inside_v = inside[None, :] & (value < V)[:, None]
        else:
            inside_v = inside[None, :]
        Z = tl.load(v + start * v_time + at_v, mask=inside_v, other=0.0).to(tl.float32) - e[None, :] * read
        f_tile = tl.load(F + at * (C * C) + at_square)
        new = tl.dot(Z.to(dtype), tl.trans(f_tile), input_precision=PRECISION)  # V^, [BV, C]
        if OUTPUT:
            q_tile = tl.load(qn + at_key + at_k)
            out = tl.dot(S.to(dtype), tl.trans(q_tile), input_precision=PRECISION) * (scale * e)[None, :]
            p_tile = tl.load(P + at * (C * C) + at_square)
            out = tl.dot(new.to(dtype), tl.trans(p_tile), out, input_precision=PRECISION)
            tl.store(o + (position * HV + head) * V + at_o, out.to(o.dtype.element_ty), mask=inside_v)
        if KEEP:
            tl.store(vn + at * (C * VV) + at_w, new.to(dtype))
        leave = tl.exp2(last - g)
        S = tl.dot((new * leave[None, :]).to(dtype), k_tile, S * tl.exp2(last), input_precision=PRECISION)

    if STATE:
        if real:
            tl.store(state + at_state, S)
    if TRANSITION and OUTPUT:
        if not real:
            at_phi = (n * HV + head).to(tl.int64) * (K * K) + column[None, :] * K + (value - V)[:, None]
            tl.store(transition + at_phi, S)


@triton.jit(do_not_specialize=["T", "H", "TILES"])
def gated_delta_rule_scan(
    qn, kn, v, gamma, F, P, initial, spans, o, state, transition,
    v_batch, v_time, v_head, scale, T, H, TILES,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, STATE: tl.constexpr, TRANSITION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    scan_up(
        pid // TILES // (H * R), pid // TILES % (H * R), pid % TILES,
        qn, kn, v, gamma, F, P, initial, spans, o, state, transition, o, o, v_batch, v_time, v_head, scale, T, H,
        R, K, V, BV, C, PRECISION, INITIAL, STATE, TRANSITION, True, False,
    )  # fmt: skip


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What matrix products read: bf16 where q, k and v are all bf16, else FP32."""
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in tensors) else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How a product reads FP32 operands; bf16 operands are read as they are."""
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    output_final_state: bool,
    output_transition: bool,
) -> tuple[Tensor, ...]:
    """(o, state, transition, qn, kn, norms, F, gamma, spans, chunks): results, and what the backward reads.

    qn, kn [chunks, H, C, K] normalised, norms [2, B, T, H] FP32 their 1/norm; F, gamma as above. `state` and
    `transition`
    are empty where not asked for.
    """
    (B, T, H, K), (HV, V), device = q.shape, v.shape[2:], q.device
    R, dtype = HV // H, compute_dtype(q, k, v)
    N, bound = counts(B, T, cu_seqlens)
    spans, chunks = table(B, T, cu_seqlens, device)
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    o = new(B, T, HV, V, dtype=v.dtype)
    state = new(N, HV, K, V) if output_final_state else new(0)
    transition = new(N, HV, K, K) if output_transition else new(0)
    qn, kn = (new(bound, H, CHUNK, K, dtype=dtype) for _ in range(2))
    norms = new(2, B, T, H)
    F, P = (new(bound, HV, CHUNK, CHUNK, dtype=dtype) for _ in range(2))
    gamma = new(bound, HV, CHUNK)

    q, *q_walk = walk(q)
    k, *k_walk = walk(k)
    v, *v_walk = walk(v)
    _, *a_walk = walk_gates(a)
    _, *b_walk = walk_gates(b)
    facts = dict(K=K, V=V, bits=8 * dtype.itemsize)
    use = launch.config("gated_delta_rule.intra", **facts)
    gated_delta_rule_intra[(bound * HV,)](
        q, k, a, b, A_log.contiguous(), dt_bias.contiguous(), chunks, qn, kn, norms, gamma, F, P,
        *q_walk, *k_walk, *a_walk, *b_walk, scale, T, H, B * T,
        R=R, K=K, C=CHUNK, PRECISION=precision(dtype), enable_fp_fusion=True, **use,
    )  # fmt: skip
    use = launch.config("gated_delta_rule.scan", **facts)
    tiles = (V + K * output_transition) // use["BV"]
    gated_delta_rule_scan[(tiles * HV * N,)](
        qn, kn, v, gamma, F, P, qn if initial_state is None else initial_state.contiguous(), spans, o, state,
        transition,
        *v_walk, scale, T, H, tiles,
        R=R, K=K, V=V, C=CHUNK, PRECISION=precision(dtype), INITIAL=initial_state is not None, STATE=output_final_state,
        TRANSITION=output_transition, enable_fp_fusion=True, **use,
    )  # fmt: skip
    return o, state, transition, qn, kn, norms, F, gamma, spans, chunks
