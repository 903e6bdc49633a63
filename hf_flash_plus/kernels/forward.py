"""The forward kernel: one program computes one tile of query rows of one head.

The loop over key tiles is written once. It runs twice: phase 0 over the tiles that every row of the program sees
whole, without any masking; phase 1 over the tiles at the edges (see ``primitives.kv_tile_range``). The online
softmax does not mind the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    BIAS_BOOL,
    BIAS_FLOAT,
    BIAS_NONE,
    LN2,
    LOG2E,
    add_score_terms,
    any_visible,
    apply_mask,
    apply_softcap,
    dropout_keep,
    initial_softmax,
    kv_tile_range,
    load_bias,
    load_tile,
    online_softmax_update,
    row_bounds,
    schedule,
    store_tile,
    tile_bounds,
    tile_index,
    visible_keys,
)

#: Arguments that change from call to call, and strides that no wide load depends on: Triton must not compile anew
#: where one becomes 1 or divisible by 16.
RUNTIME_SIZES = (
    "nheads", "group", "seqlen_q", "seqlen_k", "n_heads_total", "section", "window_left", "window_right",
    "dropout_threshold", "intervals_stride_b", "intervals_stride_s", "key_mask_stride_b", "key_holes_stride_b",
    "positions_stride_b", "slopes_stride_b", "slopes_stride_h", "sinks_stride_b", "sinks_stride_h",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    intervals_ptr,
    key_mask_ptr,
    key_holes_ptr,
    bias_ptr,
    positions_ptr,
    slopes_ptr,
    sinks_ptr,
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
    sinks_stride_b,
    sinks_stride_h,
    sinks_stride_s,
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
    HAS_ALIBI: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``out = softmax(scores) v`` and its log-sum-exp, for BLOCK_M rows of one head.

    ``out`` is contiguous (batch, seqlen_q, nheads, V_HEAD_DIM), ``lse`` contiguous (batch, nheads, seqlen_q).
    """
    FLOAT_BIAS: tl.constexpr = BIAS == BIAS_FLOAT
    BOOL_BIAS: tl.constexpr = BIAS == BIAS_BOOL
    ADDED: tl.constexpr = HAS_ALIBI or HAS_SOFTCAP or FLOAT_BIAS
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32

    n_tiles_q = tl.num_programs(0) // n_heads_total
    tile, batch_head = schedule(tl.program_id(0), n_tiles_q, n_heads_total, section)
    first_row = (n_tiles_q - 1 - tile) * BLOCK_M  # the last rows see the most keys: longest first
    batch = (batch_head // nheads).to(tl.int64)
    head = (batch_head % nheads).to(tl.int64)
    k_head = head // group

    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < seqlen_q
    local_rows, local_keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)

    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    q = load_tile(q_base, local_rows[:, None] * q_stride_s + dims[None, :], row_ok, HEAD_DIM, True)
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
        bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h + first_row.to(tl.int64) * bias_stride_q
        bias_rows = local_rows[:, None] * bias_stride_q
        bias_keys = local_keys[None, :] * bias_stride_k
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

    sinks_row = sinks_ptr
    if HAS_SINKS:
        sinks_row = sinks_ptr + batch * sinks_stride_b + head * sinks_stride_h
    top, total = initial_softmax(sinks_row, rows, sinks_stride_s, seqlen_q, HAS_SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

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
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            scores, _ = apply_softcap(scores, scale, softcap, HAS_SOFTCAP, PRECISE)
            bias = 0.0
            if BIAS != BIAS_NONE:
                bias = load_bias(
                    bias_base + wide_key * bias_stride_k, bias_rows, bias_keys, rows[:, None], keys[None, :],
                    seqlen_q, seqlen_k, phase == 1,
                )  # fmt: skip
            scores = add_score_terms(
                scores, scale, slope, diagonal[:, None], keys[None, :], bias, HAS_SOFTCAP, HAS_ALIBI, FLOAT_BIAS
            )
            if phase == 1:
                visible = visible_keys(keys[None, :], start[:, None], end[:, None], HAS_INTERVALS or HAS_LEFT)
                if HAS_KEY_MASK:
                    kept = tl.load(key_mask_ptr + keys.to(tl.int64) * key_mask_stride_s, mask=in_range, other=0) != 0
                    visible = visible & kept[None, :]
                if BOOL_BIAS:
                    visible = visible & (bias != 0)
                scores = apply_mask(scores, visible)
            weights, decay, top, total = online_softmax_update(scores, top, total, factor, phase == 1 or FLOAT_BIAS)
            acc = acc * decay[:, None]
            v = load_tile(v_base + wide_key * v_stride_s, v_offsets, in_range, V_HEAD_DIM, phase == 1)
            if phase == 1:
                # The memory of keys that nothing sees may hold NaN, and 0 * NaN is NaN.
                if HAS_INTERVALS or BOOL_BIAS:
                    v = tl.where(any_visible(visible, 0)[:, None], v, 0.0)
                elif HAS_KEY_MASK:
                    v = tl.where(kept[:, None], v, 0.0)
            if HAS_DROPOUT:
                keep = dropout_keep(seed, batch_head, first_row, first_key, dropout_threshold, BLOCK_M, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)

    empty = total == 0.0
    if HAS_DROPOUT:
        acc = acc * keep_scale
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(total))
    tl.store(lse_ptr + batch_head.to(tl.int64) * seqlen_q + rows, lse, mask=row_ok)
    out_base = out_ptr + ((batch * seqlen_q + first_row) * nheads + head) * V_HEAD_DIM
    store_tile(out_base, local_rows[:, None] * (nheads * V_HEAD_DIM) + v_dims[None, :], acc, row_ok, V_HEAD_DIM)
