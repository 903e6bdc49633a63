"""The backward kernel of keys and values: one program computes dk and dv of one tile of keys of one key head.

It walks over the query tiles that can see its keys, for each query head of the group in turn, and so needs no atomics.
See ``backward`` for the formulas and for how hidden memory is kept out.
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
    apply_mask,
    apply_softcap,
    dot_from,
    dropout_keep,
    empty_to_infinity,
    load_bias,
    load_tile,
    query_tile_range,
    row_bounds,
    schedule,
    store_tile,
    tile_index,
    visible_keys,
    zero_if_not_finite,
)


@triton.jit(do_not_specialize=(*RUNTIME_SIZES, "heads_per_split", "n_splits"))
def attention_backward_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    summary_ptr,
    intervals_ptr,
    key_mask_ptr,
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
    heads_per_split,
    n_splits,
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
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SUMMARY: tl.constexpr,
):
    """``dk`` and ``dv`` of BLOCK_N keys of one key head, summed over ``heads_per_split`` query heads of its group.

    ``dk`` and ``dv`` are contiguous (splits, batch, seqlen_k, nheads_k, head dim). Tiles of scores are transposed
    here (keys by rows), so that the weights enter ``dv = p^T dout`` as they are.
    """
    FLOAT_BIAS: tl.constexpr = BIAS == BIAS_FLOAT
    BOOL_BIAS: tl.constexpr = BIAS == BIAS_BOOL
    ADDED: tl.constexpr = HAS_ALIBI or HAS_SOFTCAP or FLOAT_BIAS
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32

    # n_heads_total counts (split, batch, key head) here; tile 0, whose keys the most causal rows see, comes first.
    n_tiles_k = tl.num_programs(0) // n_heads_total
    tile, split_batch_head = schedule(tl.program_id(0), n_tiles_k, n_heads_total, section)
    first_key = tile * BLOCK_N
    nheads_k = nheads // group
    n_batch_heads = n_heads_total // n_splits
    split = split_batch_head // n_batch_heads
    k_batch_head = split_batch_head % n_batch_heads
    batch = (k_batch_head // nheads_k).to(tl.int64)
    k_head = (k_batch_head % nheads_k).to(tl.int64)

    local_rows, local_keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = first_key + local_keys
    key_ok = keys < seqlen_k
    wide_key = first_key.to(tl.int64)
    k_base = k_ptr + batch * k_stride_b + k_head * k_stride_h + wide_key * k_stride_s
    v_base = v_ptr + batch * v_stride_b + k_head * v_stride_h + wide_key * v_stride_s
    k = load_tile(k_base, local_keys[:, None] * k_stride_s + dims[None, :], key_ok, HEAD_DIM, True)
    v = load_tile(v_base, local_keys[:, None] * v_stride_s + v_dims[None, :], key_ok, V_HEAD_DIM, True)
    if HAS_LEFT or HAS_INTERVALS or HAS_KEY_MASK or BOOL_BIAS:  # these can hide a key from every row
        k, v = zero_if_not_finite(k), zero_if_not_finite(v)

    if HAS_INTERVALS:
        intervals_ptr += batch * intervals_stride_b
        summary_ptr += batch * 4 * ((seqlen_q + BLOCK_M - 1) // BLOCK_M)
    first_row_seen, tile_begin, n_before, n_full, n_tiles = query_tile_range(
        first_key, tl.minimum(first_key + BLOCK_N, seqlen_k), summary_ptr, seqlen_q, seqlen_k, window_left,
        window_right, HAS_INTERVALS, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_SUMMARY,
    )  # fmt: skip
    if HAS_KEY_MASK:
        key_mask_at = key_mask_ptr + batch * key_mask_stride_b + keys.to(tl.int64) * key_mask_stride_s
        key_ok = tl.load(key_mask_at, mask=key_ok, other=0) != 0
        # All keys there are kept: nothing to mask. None kept: nothing to do.
        n_kept = tl.sum(key_ok.to(tl.int32), axis=0)
        n_full = tl.where(n_kept == tl.minimum(BLOCK_N, seqlen_k - first_key), n_full, 0)
        n_tiles = tl.where(n_kept == 0, 0, n_tiles)
    if BOOL_BIAS:
        n_full = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    factor = scale * LOG2E
    if ADDED:
        factor = 1.0

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    q_offsets = local_rows[:, None] * q_stride_s + dims[None, :]
    dout_offsets = local_rows[:, None] * dout_stride_s + v_dims[None, :]
    for head_in_split in range(0, heads_per_split):
        head = k_head * group + split * heads_per_split + head_in_split
        batch_head = batch * nheads + head
        q_base = q_ptr + batch * q_stride_b + head * q_stride_h
        dout_base = dout_ptr + batch * dout_stride_b + head * dout_stride_h
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + batch * slopes_stride_b + head * slopes_stride_h) * LOG2E
        if BIAS != BIAS_NONE:
            bias_base = bias_ptr + batch * bias_stride_b + head * bias_stride_h + wide_key * bias_stride_k
            bias_keys = local_keys[:, None] * bias_stride_k
            bias_rows = local_rows[None, :] * bias_stride_q
        for phase in tl.static_range(0, 2):
            if phase == 0:
                steps = n_full
            else:
                steps = n_tiles - n_full
            for step in tl.range(0, steps):
                first_row = (tile_begin + tile_index(step, n_before, n_full, phase)) * BLOCK_M
                wide_row = first_row.to(tl.int64)
                rows = first_row + local_rows
                row_ok = rows < seqlen_q
                loaded = row_ok & (rows >= first_row_seen)
                if phase == 1:
                    start, end = row_bounds(
                        rows, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k, window_left,
                        window_right, HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
                    )  # fmt: skip
                    if HAS_INTERVALS:
                        loaded = end > start  # rows that see nothing may hold NaN
                q = load_tile(q_base + wide_row * q_stride_s, q_offsets, loaded, HEAD_DIM, phase == 1)
                dout = load_tile(dout_base + wide_row * dout_stride_s, dout_offsets, loaded, V_HEAD_DIM, phase == 1)
                row_at = batch_head * seqlen_q + rows
                lse = tl.load(lse_ptr + row_at, mask=row_ok, other=float("inf"))
                lse = empty_to_infinity(lse)
                delta = tl.load(delta_ptr + row_at, mask=row_ok, other=0.0)
                bias = 0.0
                if BIAS != BIAS_NONE:
                    bias = load_bias(
                        bias_base + wide_row * bias_stride_q, bias_rows, bias_keys, rows[None, :], keys[:, None],
                        seqlen_q, seqlen_k, True,
                    )  # fmt: skip
                if phase == 1:
                    visible = visible_keys(keys[:, None], start[None, :], end[None, :], HAS_INTERVALS or HAS_LEFT)
                    if HAS_KEY_MASK:
                        visible = visible & key_ok[:, None]
                    if BOOL_BIAS:
                        visible = visible & (bias != 0)
                    if HAS_KEY_MASK or BOOL_BIAS:  # these can hide every key of a row whose interval shows some
                        q, dout = zero_if_not_finite(q), zero_if_not_finite(dout)
                diagonal = rows + (seqlen_k - seqlen_q)
                if HAS_POSITIONS:
                    positions_at = positions_ptr + batch * positions_stride_b + rows.to(tl.int64) * positions_stride_s
                    diagonal = tl.load(positions_at, mask=row_ok, other=0)

                # Products that start at -lse (hidden: -inf) and -delta need no registers for these later. q and k are
                # finite here, so that -inf stays.
                if ADDED:
                    scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
                else:
                    start_scores = (-lse / scale)[None, :]
                    if phase == 1:
                        start_scores = apply_mask(start_scores, visible)
                    scores = dot_from(start_scores, k, tl.trans(q), INPUT_PRECISION)
                scores, capped = apply_softcap(scores, scale, softcap, HAS_SOFTCAP, PRECISE)
                scores = add_score_terms(
                    scores, scale, slope, diagonal[None, :], keys[:, None], bias, HAS_SOFTCAP, HAS_ALIBI, FLOAT_BIAS
                )
                if ADDED:
                    scores = scores - lse[None, :] * LOG2E
                    if phase == 1:
                        scores = apply_mask(scores, visible)
                weights = tl.math.exp2(scores * factor)
                if HAS_DROPOUT:
                    dweights = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
                else:
                    dweights = dot_from(-delta[None, :], v, tl.trans(dout), INPUT_PRECISION)
                kept = weights
                if HAS_DROPOUT:
                    counter = batch_head.to(tl.int32)
                    keep = dropout_keep(seed, counter, first_row, first_key, dropout_threshold, BLOCK_M, BLOCK_N)
                    keep = tl.trans(keep)
                    kept = tl.where(keep, weights, 0.0)
                    dweights = tl.where(keep, dweights * keep_scale, 0.0) - delta[None, :]
                dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=INPUT_PRECISION)
                dscores = weights * dweights
                if HAS_SOFTCAP:
                    dscores = dscores * (1.0 - capped * capped)
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)

    dk = dk * scale
    if HAS_DROPOUT:
        dv = dv * keep_scale
    written = keys < seqlen_k
    n_batch = n_batch_heads // nheads_k
    key_at = ((split.to(tl.int64) * n_batch + batch) * seqlen_k + first_key) * nheads_k + k_head
    dk_offsets = local_keys[:, None] * (nheads_k * HEAD_DIM) + dims[None, :]
    store_tile(dk_ptr + key_at * HEAD_DIM, dk_offsets, dk, written, HEAD_DIM)
    dv_offsets = local_keys[:, None] * (nheads_k * V_HEAD_DIM) + v_dims[None, :]
    store_tile(dv_ptr + key_at * V_HEAD_DIM, dv_offsets, dv, written, V_HEAD_DIM)
