"""Gated delta rule, backward: P again, two scans side by side, then everything else chunk by chunk.

Shapes: as in `forward`; VV = V, or V + K with the transition's columns; S0 and dS, the state that enters a chunk and
the gradient of the one that leaves it, [chunks, HV, VV, K]; V^ [chunks, HV, C, VV]; dV [B, T, HV, VV].

From dO and the gradients of the last state and of the transition, chunks in reverse (B is what K^T B sends to dS0):

    dV^ = P^T dO + r (K dS)        dV = F^T dV^        B = -e dV        dS0 = e_C dS + (c e Q)^T dO + K^T B

and with them, per chunk,

    X = tril(dO V^^T) * Gam        E = strict_tril(dV V^^T) * Gam
    dQ = c e (dO S0^T) + c X K     dK = c X^T Q + r (V^ dS^T) + B S0^T - (E + E^T) K
    db = rowsum(dV * V^) (1 - beta) / beta

The gradient of a solve is an outer product, so neither T nor its gradient is formed. Gates: a log decay g_t scales
all that passes position t. With Y = c X * Q K^T - E * K K^T below the diagonal,

    dg_t = sum of Y_ij over j < t <= i  +  sum over i >= t of (Q * c e dO S0^T + K * B S0^T)_i
         + sum over j < t of (K * r V^ dS^T)_j  +  e_C <dS, S0>

Each sum holds only terms that pass t, so a gate that forgets everything gets exactly nothing. (Shorter forms, from dO
* O, subtract what cancels only without rounding: in bf16 they lose every digit at strong decay.)

The grouped heads of a key head are summed in registers by one program; A_log and dt_bias get one partial sum a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from boreal_kernels import launch
from boreal_kernels.gated_delta_rule.chunks import CHUNK, walk, walk_gates
from boreal_kernels.gated_delta_rule.forward import LOG2E, decays, precision, scan_up, sigmoid, softplus


@triton.jit(do_not_specialize=["H"])
def gated_delta_rule_scores(
    qn, kn, gamma, chunks, P, scale, H, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """P of one chunk and value head."""
    HV = H * R
    chunk = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    length = tl.load(chunks + chunk * 4 + 3)
    if length == 0:
        return
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    at = (chunk.to(tl.int64) * H + head // R) * (C * K) + row[:, None] * K + column[None, :]
    q_tile = tl.load(qn + at)
    k_tile = tl.load(kn + at)
    at = (chunk.to(tl.int64) * HV + head) * C
    g = tl.load(gamma + at + row)
    decay = decays(g[:, None], g[None, :], row[:, None] >= row[None, :])
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    tl.store(P + at * C + row[:, None] * C + row[None, :], (qk * decay * scale).to(P.dtype.element_ty))


@triton.jit
def scan_down(
    n, head, tile, qn, kn, do, gamma, F, P, d_state, d_transition, spans, d_initial, ds, dv,
    do_batch, do_time, do_head, scale, T, H,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, TRANSITION: tl.constexpr, D_OUT: tl.constexpr, D_STATE: tl.constexpr,
    D_TRANSITION: tl.constexpr,
):  # fmt: skip
    """Columns tile*BV .. of one sequence and value head, last chunk to first: dS and dV."""
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

    at_state = (n * HV + head).to(tl.int64) * (K * V) + column[None, :] * V + value[:, None]
    S = tl.zeros([BV, K], tl.float32)  # dS
    if D_STATE:
        S += tl.load(d_state + at_state, mask=(value < V)[:, None] & (column < K)[None, :], other=0.0)
    if D_TRANSITION:
        at_phi = (n * HV + head).to(tl.int64) * (K * K) + column[None, :] * K + (value - V)[:, None]
        S += tl.load(d_transition + at_phi, mask=(value >= V)[:, None] & (column < K)[None, :], other=0.0)

    do += batch * do_batch + head * do_head
    at_k = row[:, None] * K + column[None, :]  # within tiles 32 bits do, and half of the registers
    at_o = row[None, :] * do_time + value[:, None]
    at_w = row[None, :] * (HV * VV) + value[:, None]
    at_square = row[:, None] * C + row[None, :]
    count = (length + C - 1) // C
    for step in range(0, count):
        c = count - 1 - step
        at = (first + c) * HV + head
        start = begin + c * C
        inside = row < length - c * C
        tl.store(ds + at * (VV * K) + value[:, None] * K + column[None, :], S.to(dtype))
        at_key = ((first + c) * H + head // R) * (C * K)
        k_tile = tl.load(kn + at_key + at_k)
        g = tl.load(gamma + at * C + row)
        last = tl.load(gamma + at * C + C - 1)
        new = tl.dot(S.to(dtype), tl.trans(k_tile), input_precision=PRECISION)  # dV^, [BV, C]
        new = new * tl.exp2(last - g)[None, :]
        e = tl.exp2(g)
        S = S * tl.exp2(last)
        if D_OUT:
            if TRANSITION:
                inside_v = inside[None, :] & (value < V)[:, None]
            else:
                inside_v = inside[None, :]
            d_out = tl.load(do + start * do_time + at_o, mask=inside_v, other=0.0).to(tl.float32)
            p_tile = tl.load(P + at * (C * C) + at_square)
            new = tl.dot(d_out.to(dtype), p_tile, new, input_precision=PRECISION)
            q_tile = tl.load(qn + at_key + at_k)
            S = tl.dot((d_out * (scale * e)[None, :]).to(dtype), q_tile, S, input_precision=PRECISION)
        f_tile = tl.load(F + at * (C * C) + at_square)
        d_value = tl.dot(new.to(dtype), f_tile, input_precision=PRECISION)
        at_dv = ((batch * T + start) * HV + head) * VV
        tl.store(dv + at_dv + at_w, d_value.to(dv.dtype.element_ty), mask=inside[None, :])
        S = tl.dot((d_value * -e[None, :]).to(dtype), k_tile, S, input_precision=PRECISION)

    if INITIAL:
        tl.store(d_initial + at_state, S, mask=(value < V)[:, None] & (column < K)[None, :])


@triton.jit(do_not_specialize=["T", "H", "TILES"])
def gated_delta_rule_scans(
    qn, kn, v, do, gamma, F, P, initial, d_state, d_transition, spans, d_initial, h, vn, ds, dv,
    v_batch, v_time, v_head, do_batch, do_time, do_head, scale, T, H, TILES,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
    INITIAL: tl.constexpr, TRANSITION: tl.constexpr, D_OUT: tl.constexpr, D_STATE: tl.constexpr,
    D_TRANSITION: tl.constexpr,
):  # fmt: skip
    """Both scans in one launch, programs of one direction after those of the other: alone, neither fills the device."""
    HV = H * R
    pid = tl.program_id(0)
    tile = pid // 2 % TILES
    head = pid // 2 // TILES % HV
    n = pid // 2 // TILES // HV
    if pid % 2 == 0:
        scan_up(
            n, head, tile, qn, kn, v, gamma, F, P, initial, spans, v, h, h, h, vn, v_batch, v_time, v_head, scale, T, H,
            R, K, V, BV, C, PRECISION, INITIAL, False, TRANSITION, False, True,
        )  # fmt: skip
    else:
        scan_down(
            n, head, tile, qn, kn, do, gamma, F, P, d_state, d_transition, spans, d_initial, ds, dv,
            do_batch, do_time, do_head, scale, T, H,
            R, K, V, BV, C, PRECISION, INITIAL, TRANSITION, D_OUT, D_STATE, D_TRANSITION,
        )  # fmt: skip


@triton.jit
def through_norm(x, y, rho):
    """Gradient of x / |x| where the result is y and 1/|x| is rho: rho (x - y (y.x)); x is the gradient of y."""
    return rho[:, None] * (x - y * tl.sum(x * y, axis=1)[:, None])


@triton.jit
def query_gradient(
    chunk, key, batch, begin, length, qn, kn, norms, do, gamma, h, vn, dq, do_batch, do_time, do_head, scale, T, H,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of one key head."""
    HV = H * R
    dtype: tl.constexpr = kn.dtype.element_ty
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    value = tl.arange(0, BV)
    i = row[:, None]
    j = row[None, :]
    inside = (row < length)[:, None]
    position = batch * T + begin
    first = position * H + key
    qn += (chunk * H + key) * (C * K)
    kn += (chunk * H + key) * (C * K)
    dq += first * K
    vn += chunk * HV * (C * VV)
    do += batch * do_batch + begin * do_time
    h += chunk * HV * (VV * K)
    at_k = i * K + column[None, :]
    at_w = i * VV + value[None, :]
    at_o = i * do_time + value[None, :]
    at_h = value[:, None] * K + column[None, :]
    total = tl.zeros([C, K], tl.float32)
    for r in range(R):
        head = key * R + r
        at = chunk * HV + head
        g = tl.load(gamma + at * C + row)
        X = tl.zeros([C, C], tl.float32)
        for tile in range(V // BV):
            d_out = tl.load(do + head * do_head + tile * BV + at_o, mask=inside, other=0.0).to(tl.float32)
            new = tl.load(vn + head * (C * VV) + tile * BV + at_w)
            X = tl.dot(d_out.to(dtype), tl.trans(new), X, input_precision=PRECISION)
            entered = (d_out * (scale * tl.exp2(g))[:, None]).to(dtype)
            total = tl.dot(entered, tl.load(h + head * (VV * K) + tile * (BV * K) + at_h), total,
            input_precision=PRECISION)
        X = X * decays(g[:, None], g[None, :], i >= j) * scale
        k_tile = tl.load(kn + at_k)
        total = tl.dot(X.to(dtype), k_tile, total, input_precision=PRECISION)
    rho = tl.load(norms + first + row * H, mask=row < length, other=0.0)
    out = through_norm(total, tl.load(qn + at_k).to(tl.float32), rho)
    tl.store(dq + i * (H * K) + column[None, :], out.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def key_gradient(
    chunk, key, batch, begin, length, qn, kn, norms, do, gamma, h, vn, ds, dv, dk, do_batch, do_time, do_head, scale,
    T, H, rows, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, D_OUT: tl.constexpr,
):  # fmt: skip
    """dk of one chunk of one key head. X stands transposed, [j, i], as dk needs it."""
    HV = H * R
    dtype: tl.constexpr = kn.dtype.element_ty
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    value = tl.arange(0, BV)
    j = row[:, None]
    i = row[None, :]
    inside = (row < length)[:, None]
    position = batch * T + begin
    first = position * H + key
    qn += (chunk * H + key) * (C * K)
    kn += (chunk * H + key) * (C * K)
    dk += first * K
    vn += chunk * HV * (C * VV)
    dv += position * HV * VV
    do += batch * do_batch + begin * do_time
    h += chunk * HV * (VV * K)
    ds += chunk * HV * (VV * K)
    at_k = j * K + column[None, :]
    at_w = j * VV + value[None, :]
    at_dv = j * (HV * VV) + value[None, :]
    at_o = j * do_time + value[None, :]
    at_h = value[:, None] * K + column[None, :]
    total = tl.zeros([C, K], tl.float32)
    for r in range(R):
        head = key * R + r
        at = chunk * HV + head
        g = tl.load(gamma + at * C + row)
        last = tl.load(gamma + at * C + C - 1)
        for tile in range(VV // BV):
            dS = tl.load(ds + head * (VV * K) + tile * (BV * K) + at_h)
            new = tl.load(vn + head * (C * VV) + tile * BV + at_w)
            leaving = (new.to(tl.float32) * tl.exp2(last - g)[:, None]).to(dtype)
            total = tl.dot(leaving, dS, total, input_precision=PRECISION)
        for tile in range(VV // BV):  # loops of their own: fewer tiles in registers at a time
            S = tl.load(h + head * (VV * K) + tile * (BV * K) + at_h)
            d_value = tl.load(dv + head * VV + tile * BV + at_dv, mask=inside, other=0.0).to(tl.float32)
            d_read = (d_value * -tl.exp2(g)[:, None]).to(dtype)
            total = tl.dot(d_read, S, total, input_precision=PRECISION)
        # E and its transpose, which is made anew: one after the other, and each in a loop of its own.
        k_tile = tl.load(kn + at_k)
        E = tl.zeros([C, C], tl.float32)
        for tile in range(VV // BV):
            new = tl.load(vn + head * (C * VV) + tile * BV + at_w)
            d_value = tl.load(dv + head * VV + tile * BV + at_dv, mask=inside, other=0.0).to(dtype)
            E = tl.dot(d_value, tl.trans(new), E, input_precision=PRECISION)
        E = E * decays(g[:, None], g[None, :], j > i)
        total = tl.dot((-E).to(dtype), k_tile, total, input_precision=PRECISION)
        E = tl.zeros([C, C], tl.float32)
        for tile in range(VV // BV):
            new = tl.load(vn + head * (C * VV) + tile * BV + at_w)
            d_value = tl.load(dv + head * VV + tile * BV + at_dv, mask=inside, other=0.0).to(dtype)
            E = tl.dot(new, tl.trans(d_value), E, input_precision=PRECISION)
        E = E * decays(g[None, :], g[:, None], i > j)
        total = tl.dot((-E).to(dtype), k_tile, total, input_precision=PRECISION)
        if D_OUT:
            X_T = tl.zeros([C, C], tl.float32)
            for tile in range(V // BV):
                new = tl.load(vn + head * (C * VV) + tile * BV + at_w)
                d_out = tl.load(do + head * do_head + tile * BV + at_o, mask=inside, other=0.0).to(dtype)
                X_T = tl.dot(new, tl.trans(d_out), X_T, input_precision=PRECISION)
            X_T = X_T * decays(g[None, :], g[:, None], i >= j) * scale
            q_tile = tl.load(qn + at_k)
            total = tl.dot(X_T.to(dtype), q_tile, total, input_precision=PRECISION)
    rho = tl.load(norms + rows.to(tl.int64) * H + first + row * H, mask=row < length, other=0.0)
    out = through_norm(total, tl.load(kn + at_k).to(tl.float32), rho)
    tl.store(dk + j * (H * K) + column[None, :], out.to(dk.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradients(
    chunk, head, batch, begin, length, qn, kn, do, gamma, a, b, A_log, dt_bias, h, vn, ds, dv, da, db, partial,
    do_batch, do_time, do_head, a_batch, a_time, a_head, b_batch, b_time, b_head, scale, T, H, bound,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, D_OUT: tl.constexpr,
):  # fmt: skip
    """da and db of one chunk of one value head, and its share of A_log's and dt_bias's gradients.

    `sent` is what a position sends to the state, times the gradient of that, `read` what it reads from it. They and
    <dS, S0> are diagonals of products: no tile has to be in registers to be multiplied element by element.
    """
    HV = H * R
    dtype: tl.constexpr = kn.dtype.element_ty
    row = tl.arange(0, C)
    column = tl.arange(0, K)
    value = tl.arange(0, BV)
    i = row[:, None]
    j = row[None, :]
    inside = (row < length)[:, None]
    position = batch * T + begin
    qn += (chunk * H + head // R) * (C * K)
    kn += (chunk * H + head // R) * (C * K)
    dv += (position * HV + head) * VV
    do += batch * do_batch + begin * do_time + head * do_head
    at = chunk * HV + head
    vn += at * (C * VV)
    h += at * (VV * K)
    ds += at * (VV * K)
    at_k = i * K + column[None, :]
    at_w = i * VV + value[None, :]
    at_dv = i * (HV * VV) + value[None, :]
    at_o = i * do_time + value[None, :]
    at_h = value[:, None] * K + column[None, :]
    g = tl.load(gamma + at * C + row)
    last = tl.load(gamma + at * C + C - 1)
    k_tile = tl.load(kn + at_k)

    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(VV // BV):  # loops of their own: fewer tiles in registers at a time
        dS = tl.load(ds + tile * (BV * K) + at_h)
        new = tl.load(vn + tile * BV + at_w)
        part = tl.dot(k_tile, tl.trans(dS), input_precision=PRECISION)
        pairs = tl.dot(part.to(dtype), tl.trans(new), pairs, input_precision=PRECISION)
    sent = tl.sum(tl.where(i == j, pairs, 0.0), axis=1)
    pairs = tl.zeros([BV, BV], tl.float32)
    for tile in range(VV // BV):
        dS = tl.load(ds + tile * (BV * K) + at_h)
        S = tl.load(h + tile * (BV * K) + at_h)
        pairs = tl.dot(S, tl.trans(dS), pairs, input_precision=PRECISION)
    through = tl.sum(tl.where(value[:, None] == value[None, :], pairs, 0.0))
    pairs = tl.zeros([C, C], tl.float32)
    for tile in range(VV // BV):
        S = tl.load(h + tile * (BV * K) + at_h)
        d_value = tl.load(dv + tile * BV + at_dv, mask=inside, other=0.0).to(dtype)
        part = -tl.dot(k_tile, tl.trans(S), input_precision=PRECISION)
        pairs = tl.dot(part.to(dtype), tl.trans(d_value), pairs, input_precision=PRECISION)
    if D_OUT:
        q_tile = tl.load(qn + at_k)
        for tile in range(V // BV):
            S = tl.load(h + tile * (BV * K) + at_h)
            d_out = tl.load(do + tile * BV + at_o, mask=inside, other=0.0).to(dtype)
            part = tl.dot(q_tile, tl.trans(S), input_precision=PRECISION) * scale
            pairs = tl.dot(part.to(dtype), tl.trans(d_out), pairs, input_precision=PRECISION)
    read = tl.sum(tl.where(i == j, pairs, 0.0), axis=1)
    E = tl.zeros([C, C], tl.float32)
    for tile in range(VV // BV):
        new = tl.load(vn + tile * BV + at_w)
        d_value = tl.load(dv + tile * BV + at_dv, mask=inside, other=0.0).to(dtype)
        E = tl.dot(d_value, tl.trans(new), E, input_precision=PRECISION)
    write = tl.sum(tl.where(i == j, E, 0.0), axis=1)
    crossing = -E * tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    if D_OUT:
        X = tl.zeros([C, C], tl.float32)
        for tile in range(V // BV):
            new = tl.load(vn + tile * BV + at_w)
            d_out = tl.load(do + tile * BV + at_o, mask=inside, other=0.0).to(dtype)
            X = tl.dot(d_out, tl.trans(new), X, input_precision=PRECISION)
        crossing += X * scale * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    sent *= tl.exp2(last - g)
    read *= tl.exp2(g)
    crossing *= decays(g[:, None], g[None, :], i > j)
    # Summed over i >= t for every t, which takes the rows' place: [t, j].
    crossing = tl.dot(tl.where(j >= i, 1.0, 0.0).to(dtype), crossing.to(dtype), input_precision=PRECISION)
    dg = tl.sum(tl.where(i > j, crossing + sent[None, :], 0.0), axis=1)
    dg += tl.sum(tl.where(j >= i, read[None, :], 0.0), axis=1) + through * tl.exp2(last)

    valid = row < length
    at_a = batch * a_batch + begin * a_time + head * a_head + row * a_time
    raw = tl.load(a + at_a, mask=valid, other=0.0).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    strength = tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)
    d_a = tl.where(valid, -dg * strength * sigmoid(raw), 0.0)
    at_b = batch * b_batch + begin * b_time + head * b_head + row * b_time
    gate = tl.load(b + at_b, mask=valid, other=0.0).to(tl.float32)
    d_b = tl.where(gate > -41.0, write * tl.exp2(-tl.maximum(gate, -41.0) * LOG2E), 0.0)  # (1 - beta) / beta = e^-b
    at_g = position * HV + head + row * HV
    tl.store(da + at_g, d_a.to(da.dtype.element_ty), mask=valid)
    tl.store(db + at_g, d_b.to(db.dtype.element_ty), mask=valid)
    tl.store(partial + at, -tl.sum(tl.where(valid, dg * strength * softplus(raw), 0.0)))
    tl.store(partial + bound.to(tl.int64) * HV + at, tl.sum(d_a))


@triton.jit(do_not_specialize=["T", "H", "rows", "bound"])
def gated_delta_rule_gradients(
    qn, kn, norms, do, gamma, a, b, A_log, dt_bias, chunks, h, vn, ds, dv, dq, dk, da, db, partial,
    do_batch, do_time, do_head, a_batch, a_time, a_head, b_batch, b_time, b_head, scale, T, H, rows, bound,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, D_OUT: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one key head, in 2 + R neighbouring programs: dk, dq, every value head's gates.

    Together they do not fit in registers. What one of them has read, the others find in the L2 cache.
    """
    HV = H * R
    kind = tl.program_id(0) % (2 + R)
    chunk = (tl.program_id(0) // (2 + R) // H).to(tl.int64)
    key = tl.program_id(0) // (2 + R) % H
    batch = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    begin = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
    length = tl.load(chunks + chunk * 4 + 3)
    if length == 0:
        if kind >= 2:
            tl.store(partial + chunk * HV + key * R + kind - 2, 0.0)
            tl.store(partial + (bound + chunk) * HV + key * R + kind - 2, 0.0)
        return
    if kind >= 2:
        gate_gradients(
            chunk, key * R + kind - 2, batch, begin, length, qn, kn, do, gamma, a, b, A_log, dt_bias, h, vn, ds, dv,
            da, db, partial, do_batch, do_time, do_head, a_batch, a_time, a_head, b_batch, b_time, b_head, scale, T, H,
            bound, R, K, V, VV, BV, C, PRECISION, D_OUT,
        )  # fmt: skip
    elif kind == 0:
        key_gradient(
            chunk, key, batch, begin, length, qn, kn, norms, do, gamma, h, vn, ds, dv, dk, do_batch, do_time, do_head,
            scale, T, H, rows, R, K, V, VV, BV, C, PRECISION, D_OUT,
        )  # fmt: skip
    elif D_OUT:
        query_gradient(
            chunk, key, batch, begin, length, qn, kn, norms, do, gamma, h, vn, dq, do_batch, do_time, do_head, scale,
            T, H, R, K, V, VV, BV, C, PRECISION,
        )  # fmt: skip


def backward(
    do: Tensor | None,
    d_state: Tensor | None,
    d_transition: Tensor | None,
    qn: Tensor,
    kn: Tensor,
    norms: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None,
    F: Tensor,
    gamma: Tensor,
    spans: Tensor,
    chunks: Tensor,
    scale: float,
    qk_dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, da, db, dA_log, d_dt_bias, d_initial), each in its tensor's dtype; d_initial is empty without one.

    do [B, T, HV, V], d_state [N, HV, K, V], d_transition [N, HV, K, K]: None where nothing depends on that result.
    """
    (bound, H, _, K), (B, T, HV, V), device = qn.shape, v.shape, qn.device
    R, dtype, N = HV // H, qn.dtype, spans.shape[0]
    VV = V if d_transition is None else V + K
    new = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
    h, ds, vn = new(bound, HV, VV, K), new(bound, HV, VV, K), new(bound, HV, CHUNK, VV)
    dv = new(B, T, HV, VV, dtype=v.dtype)
    dq, dk = (new(B, T, H, K, dtype=x) for x in qk_dtypes)
    da, db = new(B, T, HV, dtype=a.dtype), new(B, T, HV, dtype=b.dtype)
    d_initial = new(0) if initial_state is None else torch.empty_like(initial_state,
    memory_format=torch.contiguous_format)
    partial = new(2, bound, HV, dtype=torch.float32)
    P = F
    v, *v_walk = walk(v)
    do, *do_walk = (None, 0, 0, 0) if do is None else walk(do)
    facts = dict(K=K, V=V, bits=8 * dtype.itemsize)
    common = dict(R=R, K=K, V=V, C=CHUNK, PRECISION=precision(dtype), D_OUT=do is not None, enable_fp_fusion=True)
    if do is not None:
        P = torch.empty_like(F)
        gated_delta_rule_scores[(bound * HV,)](
            qn, kn, gamma, chunks, P, scale, H,
            R=R, K=K, C=CHUNK, PRECISION=precision(dtype), enable_fp_fusion=True,
            **launch.config("gated_delta_rule.scores", **facts),
        )  # fmt: skip
    else:
        dq.zero_()
    use = launch.config("gated_delta_rule.scans", **facts)
    tiles = VV // use["BV"]
    contiguous = lambda x: F if x is None else x.contiguous()  # noqa: E731
    gated_delta_rule_scans[(2 * tiles * HV * N,)](
        qn, kn, v, F if do is None else do, gamma, F, P, contiguous(initial_state), contiguous(d_state),
        contiguous(d_transition), spans, d_initial, h, vn, ds, dv, *v_walk, *do_walk, scale, T, H, tiles,
        INITIAL=initial_state is not None, TRANSITION=d_transition is not None, D_STATE=d_state is not None,
        D_TRANSITION=d_transition is not None, **common, **use,
    )  # fmt: skip
    use = launch.config("gated_delta_rule.gradients", **facts, transition=int(VV > V))
    gated_delta_rule_gradients[(bound * H * (2 + R),)](
        qn, kn, norms, F if do is None else do, gamma, a, b, A_log.contiguous(), dt_bias.contiguous(), chunks,
        h, vn, ds, dv, dq, dk, da, db, partial, *do_walk, *walk_gates(a)[1:], *walk_gates(b)[1:], scale, T, H, B * T,
        bound, VV=VV, **common, **use,
    )  # fmt: skip
    dA_log, d_dt_bias = partial[0].sum(0), partial[1].sum(0)
    if VV > V:
        dv = dv[..., :V].contiguous()
    return dq, dk, dv, da, db, dA_log.to(A_log.dtype), d_dt_bias.to(dt_bias.dtype), d_initial
