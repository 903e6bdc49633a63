"""The backward kernels: preprocess, then dq (one program per query tile); dk and dv are in ``backward_dkdv``.

Every output element is written by exactly one program that adds in a fixed order: gradients are bitwise repeatable
without atomics. With ``p`` a weight, ``dp = dout . v`` and ``delta = sum(dout * out)`` of its row::

    ds = p * (dp - delta)        dq = scale * ds k        dk = scale * ds^T q        dv = p^T dout

and with dropout ``dp`` and the ``p`` of ``dv`` are replaced by what was kept, divided by the keep probability.
As in the forward kernel, loops over tiles are written once and run twice: wholly visible tiles, then masked ones.

Memory that the mask hides from everyone may hold NaN or inf, and ``0 * NaN`` is NaN. Where that is possible such
values are read as 0 here. Nothing is lost: one that is visible has made ``lse`` or ``delta`` NaN already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import RUNTIME_SIZES
from .primitives import (
    BIAS_BOOL,
    BIAS_FLOAT,
    BIAS_NONE,
    LOG2E,
    add_score_terms,
    apply_softcap,
    dropout_keep,
    empty_to_infinity,
    kv_tile_range,
    load_bias,
    load_tile,
    row_bounds,
    schedule,
    store_tile,
    tile_bounds,
    tile_index,
    visible_keys,
    zero_if_not_finite,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_backward_preprocess(
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    summary_ptr,
    intervals_ptr,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    intervals_stride_b,
    intervals_stride_s,
    intervals_stride_c,
    nheads,
    seqlen_q,
    seqlen_k,
    n_heads_total,
    window_left,
    window_right,
    V_HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``delta = sum(dout * out)`` of each row, and what each query tile sees, for the key-stationary kernel.

    ``delta`` is fp32 (batch, nheads, seqlen_q), 0 on rows that see nothing. ``summary`` (only with row intervals) is
    int32 (batch, 4, query tiles): first and one past the last key that some row of the tile sees, and the same of
    the keys that all its rows see.
    """
    n_tiles_q = tl.num_programs(0) // n_heads_total
    tile = tl.program_id(0) % n_tiles_q
    batch_head = (tl.program_id(0) // n_tiles_q).to(tl.int64)
    batch, head = batch_head // nheads, batch_head % nheads
    first_row = tile * BLOCK_M
    local_rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    rows = first_row + local_rows
    row_ok = rows < seqlen_q

    if HAS_INTERVALS:
        intervals_ptr += batch * intervals_stride_b
    start, end = row_bounds(
        rows, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k, window_left, window_right,
        HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    lse = tl.load(lse_ptr + batch_head * seqlen_q + rows, mask=row_ok, other=0.0)
    seen = row_ok & (end > start) & (tl.abs(lse) < float("inf"))
    out_base = out_ptr + ((batch * seqlen_q + first_row) * nheads + head) * V_HEAD_DIM
    out_offsets = local_rows[:, None] * (nheads * V_HEAD_DIM) + dims[None, :]
    dout_base = dout_ptr + batch * dout_stride_b + head * dout_stride_h + first_row.to(tl.int64) * dout_stride_s
    out = load_tile(out_base, out_offsets, seen, V_HEAD_DIM, True).to(tl.float32)
    dout = load_tile(dout_base, local_rows[:, None] * dout_stride_s + dims[None, :], seen, V_HEAD_DIM, True)
    delta = tl.sum(out * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + batch_head * seqlen_q + rows, delta, mask=row_ok)

    if HAS_INTERVALS:  # noqa: SIM102  (one condition is known at compile time, the other is not)
        if head == 0:
            first, last, full_first, full_last = tile_bounds(
                start, end, first_row, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k,
                window_left, window_right, HAS_INTERVALS, HAS_LEFT, HAS_RIGHT, BLOCK_M,
            )  # fmt: skip
            at = summary_ptr + batch * 4 * n_tiles_q + tile
            tl.store(at, first)
            tl.store(at + n_tiles_q, last)
            tl.store(at + 2 * n_tiles_q, full_first)
            tl.store(at + 3 * n_tiles_q, full_last)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_backward_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dbias_ptr,
    intervals_ptr,
    key_mask_ptr,
    key_holes_ptr,
    bias_ptr,
    positions_ptr,
    slopes_ptr,
    seed_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    intervals_stride_b,
    intervals_stride_s,
    intervals_stride_c,
    key_mask_stride_b,
    key_mask_stride_s,
    key_holes_stride_b,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    positions_stride_b,
    positions_stride_s,
    slopes_stride_b,
    slopes_stride_h,
    nheads,
    group,
    seqlen_q,
    seqlen_k,
    n_heads_total,
    section,
    window_left,
    window_right,
    dropout_threshold,
    scale,
    softcap,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_KEY_HOLES: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``dq`` of BLOCK_M rows of one head, contiguous (batch, seqlen_q, nheads, HEAD_DIM).

    With BIAS_GRAD also ``ds`` into ``dbias``, contiguous (batch, nheads, seqlen_q, seqlen_k), zero before: tiles that
    no row sees are not written.
    """
    FLOAT_BIAS: tl.constexpr = BIAS == BIAS_FLOAT
    BOOL_BIAS: tl.constexpr = BIAS == BIAS_BOOL
    ADDED: tl.constexpr = HAS_ALIBI or HAS_SOFTCAP or FLOAT_BIAS
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32

    n_tiles_q = tl.num_programs(0) // n_heads_total
    tile, batch_head = schedule(tl.program_id(0), n_tiles_q, n_heads_total, section)
    first_row = (n_tiles_q - 1 - tile) * BLOCK_M  # longest first
    batch = (batch_head // nheads).to(tl.int64)
    head = (batch_head % nheads).to(tl.int64)
    k_head = head // group

    local_rows, local_keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = first_row + local_rows
    row_ok = rows < seqlen_q
    wide_row = first_row.to(tl.int64)
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + wide_row * q_stride_s
    q = load_tile(q_base, local_rows[:, None] * q_stride_s + dims[None, :], row_ok, HEAD_DIM, True)
    if HAS_SOFTCAP:
        q = zero_if_not_finite(q)
    dout_base = dout_ptr + batch * dout_stride_b + head * dout_stride_h + wide_row * dout_stride_s
    dout = load_tile(dout_base, local_rows[:, None] * dout_stride_s + v_dims[None, :], row_ok, V_HEAD_DIM, True)
    row_at = batch_head.to(tl.int64) * seqlen_q + rows
    lse = empty_to_infinity(tl.load(lse_ptr + row_at, mask=row_ok, other=float("inf"))) * LOG2E
    delta = tl.load(delta_ptr + row_at, mask=row_ok, other=0.0)
    k_base = k_ptr + batch * k_stride_b + k_head * k_stride_h
    v_base = v_ptr + batch * v_stride_b + k_head * v_stride_h
    k_offsets = local_keys[:, None] * k_stride_s + dims[None, :]
    v_offsets = local_keys[:, None] * v_stride_s + v_dims[None, :]

    if HAS_INTERVALS:
        intervals_ptr += batch * intervals_stride_b
    start, end = row_bounds(
        rows, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k, window_left, window_right,
        HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    first, last, full_first, full_last = tile_bounds(
        start, end, first_row, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k,
        window_left, window_right, HAS_INTERVALS, HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    if HAS_KEY_MASK:
        key_mask_ptr += batch * key_mask_stride_b
        if HAS_KEY_HOLES:
            holes = tl.load(key_holes_ptr + batch * key_holes_stride_b)
            full_last = tl.where(holes == 0, full_last, 0)
        else:
            full_last = 0
    if BOOL_BIAS:
        full_last = 0
    key_begin, n_before, n_full, n_tiles = kv_tile_range(first, last, full_first, full_last, BLOCK_N)

    if BIAS != BIAS_NONE:
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h + wide_row * bias_stride_q
        bias_rows = local_rows[:, None] * bias_stride_q
        bias_keys = local_keys[None, :] * bias_stride_k
    if BIAS_GRAD:
        dbias_base = dbias_ptr + (batch_head.to(tl.int64) * seqlen_q + first_row) * seqlen_k
        dbias_offsets = local_rows[:, None].to(tl.int64) * seqlen_k + local_keys[None, :]
    diagonal = rows + (seqlen_k - seqlen_q)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h) * LOG2E
        if HAS_POSITIONS:
            at = positions_ptr + batch * positions_stride_b + rows.to(tl.int64) * positions_stride_s
            diagonal = tl.load(at, mask=row_ok, other=0)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    factor = scale * LOG2E
    if ADDED:
        factor = 1.0

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(0, 2):
        if phase == 0:
            steps = n_full
        else:
            steps = n_tiles - n_full
        for step in tl.range(0, steps):
            first_key = key_begin + tile_index(step, n_before, n_full, phase) * BLOCK_N
            first_key = tl.multiple_of(first_key, 16)
            keys = first_key + local_keys
            in_range = (keys >= first) & (keys < last)
            wide_key = first_key.to(tl.int64)
            k = load_tile(k_base + wide_key * k_stride_s, k_offsets, in_range, HEAD_DIM, phase == 1)
            v = load_tile(v_base + wide_key * v_stride_s, v_offsets, in_range, V_HEAD_DIM, phase == 1)
            if phase == 1 and (HAS_INTERVALS or HAS_KEY_MASK or BOOL_BIAS):
                k = zero_if_not_finite(k)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            scores, capped = apply_softcap(scores, scale, softcap, HAS_SOFTCAP, PRECISE)
            bias = 0.0
            if BIAS != BIAS_NONE:
                bias = load_bias(
                    bias_base + wide_key * bias_stride_k, bias_rows, bias_keys, rows[:, None], keys[None, :],
                    seqlen_q, seqlen_k, phase == 1,
                )  # fmt: skip
            scores = add_score_terms(
                scores, scale, slope, diagonal[:, None], keys[None, :], bias, HAS_SOFTCAP, HAS_ALIBI, FLOAT_BIAS
            )
            weights = tl.math.exp2(scores * factor - lse[:, None])
            dweights = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
            if HAS_DROPOUT:
                keep = dropout_keep(seed, batch_head, first_row, first_key, dropout_threshold, BLOCK_M, BLOCK_N)
                dweights = tl.where(keep, dweights * keep_scale, 0.0)
            dscores = weights * (dweights - delta[:, None])
            if phase == 1:
                visible = visible_keys(keys[None, :], start[:, None], end[:, None], HAS_INTERVALS or HAS_LEFT)
                if HAS_KEY_MASK:
                    kept = tl.load(key_mask_ptr + keys.to(tl.int64) * key_mask_stride_s, mask=in_range, other=0) != 0
                    visible = visible & kept[None, :]
                if BOOL_BIAS:
                    visible = visible & (bias != 0)
                dscores = tl.where(visible, dscores, 0.0)
            if BIAS_GRAD:
                written = row_ok[:, None] & (keys < seqlen_k)[None, :]
                tl.store(dbias_base + first_key + dbias_offsets, dscores.to(dbias_ptr.dtype.element_ty), mask=written)
            if HAS_SOFTCAP:
                dscores = dscores * (1.0 - capped * capped)
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)

    dq_base = dq_ptr + ((batch * seqlen_q + first_row) * nheads + head) * HEAD_DIM
    store_tile(dq_base, local_rows[:, None] * (nheads * HEAD_DIM) + dims[None, :], dq * scale, row_ok, HEAD_DIM)
