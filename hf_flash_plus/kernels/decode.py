"""The decoding kernels: few query rows over a long cache, whose keys are split among programs ("split-KV").

One program computes one split of one key head for one tile of rows. A tile holds the rows of all query heads that share
the key head, ``(query head of the group, query row)`` with the row varying fastest, so that each key is read once. The
splits divide the keys that the rows of the batch element really see (from flags or row intervals, read on the device),
not the slots of the cache: a static cache that is mostly empty, a window or left padding leave no program idle. The
program of a tile of rows that finishes last combines its splits by their log-sum-exps, always in the same order: no
second launch, and the same bits every time. That needs counters that are zero before; where nobody can keep them (CUDA
graphs), :func:`attention_decode_combine` does it in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import (
    BIAS_BOOL,
    BIAS_FLOAT,
    BIAS_NONE,
    KEY_ALIGNMENT,
    LN2,
    LOG2E,
    NO_KEY,
    add_score_terms,
    any_visible,
    apply_mask,
    apply_softcap,
    kv_tile_range,
    load_tile,
    raise_top,
    row_bounds,
    store_tile,
    tile_index,
)

#: Arguments that change from call to call: Triton must not compile anew where one becomes 1 or divisible by 16.
RUNTIME_SIZES = (
    "nheads_k", "group", "seqlen_q", "seqlen_k", "n_splits", "n_row_tiles", "window_left", "window_right",
    "intervals_stride_b", "intervals_stride_s", "key_mask_stride_b", "key_holes_stride_b", "table_stride_b",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attention_decode(
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
    table_ptr,
    parts_ptr,
    part_lse_ptr,
    counters_ptr,
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
    table_stride_b,
    nheads_k,
    group,
    seqlen_q,
    seqlen_k,
    n_splits,
    n_row_tiles,
    window_left,
    window_right,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
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
    INPUT_PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """``out`` and (where ``lse_ptr`` is given) its log-sum-exp, for BLOCK_M (head, row) pairs of one key head.

    ``out`` is contiguous ``(batch, seqlen_q, nheads, V_HEAD_DIM)``, ``lse`` contiguous ``(batch, nheads, seqlen_q)``.
    With PAGE_SIZE > 0, ``k`` and ``v`` are ``(pages, PAGE_SIZE, nheads_k, dim)``, their ``stride_b`` is a page's, and
    ``table`` ``(batch, pages of a row)`` says which page holds which keys. With more than one split, ``parts`` fp32
    ``(row tiles, n_splits, BLOCK_M, BLOCK_DV)`` and ``part_lse`` fp32 ``(row tiles, n_splits, BLOCK_M)`` are room for
    the splits' results; else they are None. ``counters`` int32 ``(row tiles,)`` is zero before and after; without them
    the splits are left for :func:`attention_decode_combine`.

    ONE_ROW says that ``seqlen_q`` is 1: all pairs of a tile then see the same keys, whose bounds are scalars. Every
    tile of keys takes the same loop (one at an edge loads zeros for what is hidden), unless keys inside the bounds are
    hidden. A second loop would begin only when the first has ended, and wait for memory once more. ONE_TILE says that
    ``n_row_tiles`` is 1. With ONE_ROW, the first PREFETCH keys of a split are asked for at once, ahead of the loop,
    whose loads wait for the queries and have no more than its stages under way.
    """
    FLOAT_BIAS: tl.constexpr = BIAS == BIAS_FLOAT
    BOOL_BIAS: tl.constexpr = BIAS == BIAS_BOOL
    ADDED: tl.constexpr = HAS_ALIBI or HAS_SOFTCAP or FLOAT_BIAS
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    # A tile of keys lies in one page: its place is looked up once, not for each key.
    ONE_PAGE: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0
    # A tile of keys is several whole pages: where a key lies in its page is the same in every tile.
    WHOLE_PAGES: tl.constexpr = PAGE_SIZE > 0 and not ONE_PAGE and BLOCK_N % PAGE_SIZE == 0
    # Keys between the bounds of all rows that are hidden all the same: with a key mask, if its holes say so.
    HIDDEN: tl.constexpr = HAS_KEY_MASK or BOOL_BIAS
    PHASES: tl.constexpr = 1 if ONE_ROW and not HIDDEN else 2
    # The pages of a tile are looked up a tile ahead, by us: left to the compiler, the block table has copies and waits
    # of its own in the pipeline (which then needs more stages, see `decode_launch`).
    LOOK_AHEAD: tl.constexpr = (ONE_PAGE or WHOLE_PAGES) and PHASES == 1
    # Splits take tiles in turn, so that all of them read neighbouring keys at a time; else each has keys in one piece.
    IN_TURN: tl.constexpr = PHASES == 1 and PREFETCH == 0 and parts_ptr is not None
    # The place of a split's first tile then depends on the first key that is seen alone.
    GUESSED: tl.constexpr = LOOK_AHEAD and PREFETCH == 0

    if EARLY and parts_ptr is not None and counters_ptr is None:
        gdc_launch_dependents()  # the combination waits for all of this launch, but its own start is then behind it
    pid = tl.program_id(0)
    split = pid % n_splits
    unit = pid // n_splits
    if ONE_TILE:
        batch_head, row_tile = unit, unit * 0
    else:
        batch_head, row_tile = unit // n_row_tiles, unit % n_row_tiles
    batch = (batch_head // nheads_k).to(tl.int64)
    k_head = (batch_head % nheads_k).to(tl.int64)

    pairs = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pair_ok = pairs < group * seqlen_q
    if ONE_ROW:
        rows, heads = pairs * 0, k_head * group + pairs
    else:
        rows, heads = pairs % seqlen_q, k_head * group + pairs // seqlen_q
    local_keys = tl.arange(0, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_offsets = rows.to(tl.int64) * q_stride_s + heads * q_stride_h
    q_ptr += batch * q_stride_b
    if PREFETCH > 0:
        # The queries are stored to shared memory as soon as they are loaded, and everything after the load waits for
        # that: they come last.
        prefetch_rows(q_ptr + tl.where(pair_ok, q_offsets, 0), HEAD_DIM, BLOCK_D)
    else:
        q = load_tile(q_ptr, q_offsets[:, None] + dims[None, :], pair_ok, HEAD_DIM, True)
    k_base = k_ptr + k_head * k_stride_h
    v_base = v_ptr + k_head * v_stride_h
    if PAGE_SIZE == 0:
        k_base += batch * k_stride_b
        v_base += batch * v_stride_b
    else:
        table_ptr += batch * table_stride_b

    if WHOLE_PAGES:
        local_pages = local_keys // PAGE_SIZE
    else:
        local_pages = 0
    if GUESSED:
        # On its way with the row intervals: right where they begin with the first page.
        guess = split * BLOCK_N // PAGE_SIZE + local_pages
        next_page = tl.load(table_ptr + guess, mask=guess * PAGE_SIZE < seqlen_k, other=0)
    if HAS_INTERVALS:
        intervals_ptr += batch * intervals_stride_b
    start, end = row_bounds(
        unit * 0 if ONE_ROW else rows, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k,
        window_left, window_right, HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    if ONE_ROW:
        start = tl.maximum(start, 0)
        first, last = start, tl.where(end > start, end, 0)
        full_first, full_last = 0, last
    else:
        seen = pair_ok & (end > start)
        first = tl.min(tl.where(seen, tl.maximum(start, 0), NO_KEY), axis=0)
        last = tl.max(tl.where(seen, end, 0), axis=0)
        full_first = tl.max(tl.where(pair_ok, tl.where(seen, start, NO_KEY), 0), axis=0)
        full_last = tl.min(tl.where(pair_ok, tl.where(seen, end, 0), NO_KEY), axis=0)
    if HAS_KEY_MASK:
        if HAS_KEY_HOLES:
            holes = tl.load(key_holes_ptr + batch * key_holes_stride_b)
            full_last = tl.where(holes == 0, full_last, 0)
        else:
            full_last = 0
    if BOOL_BIAS:
        full_last = 0
    if ONE_PAGE:
        first = tl.minimum(first, last) // BLOCK_N * BLOCK_N
    elif WHOLE_PAGES:
        first = tl.minimum(first, last) // PAGE_SIZE * PAGE_SIZE
    else:
        first = tl.minimum(first, last) // KEY_ALIGNMENT * KEY_ALIGNMENT
    # Splits are whole tiles, so that only the last one of the row is cut. They may be empty.
    if IN_TURN:
        stride = n_splits * BLOCK_N
        split_first = first + split * BLOCK_N
        split_last = tl.maximum(split_first, last)
    else:
        stride = BLOCK_N
        tiles_per_split = tl.cdiv(tl.cdiv(last - first, BLOCK_N), n_splits)
        split_first = first + split * tiles_per_split * BLOCK_N
        split_last = tl.maximum(split_first, tl.minimum(split_first + tiles_per_split * BLOCK_N, last))
    if PREFETCH > 0:
        if split_first < split_last:
            # Keys that are seen: the block table may hold anything for others.
            early = tl.minimum(tl.maximum(split_first + tl.arange(0, PREFETCH), start), split_last - 1)
            if PAGE_SIZE == 0:
                early_k, early_v = early.to(tl.int64) * k_stride_s, early.to(tl.int64) * v_stride_s
            else:
                page = tl.load(table_ptr + early // PAGE_SIZE).to(tl.int64)
                early_k = page * k_stride_b + (early % PAGE_SIZE) * k_stride_s
                early_v = page * v_stride_b + (early % PAGE_SIZE) * v_stride_s
            prefetch_rows(k_base + early_k, HEAD_DIM, BLOCK_D)
            prefetch_rows(v_base + early_v, V_HEAD_DIM, BLOCK_DV)
        q = load_tile(q_ptr, q_offsets[:, None] + dims[None, :], pair_ok, HEAD_DIM, True)

    diagonal = rows + (seqlen_k - seqlen_q)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_at = slopes_ptr + batch * slopes_stride_b + heads * slopes_stride_h
        slope = tl.load(slope_at, mask=pair_ok, other=0.0) * LOG2E
        if HAS_POSITIONS:
            position_at = positions_ptr + batch * positions_stride_b + rows.to(tl.int64) * positions_stride_s
            diagonal = tl.load(position_at, mask=pair_ok, other=0)
    factor = scale * LOG2E
    if ADDED:
        factor = 1.0
    if BIAS != BIAS_NONE:
        bias_rows = bias_ptr + batch * bias_stride_b + heads * bias_stride_h + rows.to(tl.int64) * bias_stride_q
    if HAS_KEY_MASK:
        key_mask_ptr += batch * key_mask_stride_b

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # For a few rows, a sum for each key of the tile, and their sum after the last tile: to sum over a tile all warps
    # have to meet.
    totals = tl.zeros([BLOCK_M, BLOCK_N if ONE_ROW else 1], tl.float32)
    if HAS_SINKS:
        # A sink is one logit of the whole row: the first split's.
        sink_at = sinks_ptr + batch * sinks_stride_b + heads * sinks_stride_h + rows.to(tl.int64) * sinks_stride_s
        sink = tl.load(sink_at, mask=pair_ok, other=0.0).to(tl.float32)
        sink = tl.where(split == 0, sink, float("-inf"))
        top = sink * LOG2E
        first_sum = tl.arange(0, totals.shape[1]) == 0
        totals = tl.where(first_sum[None, :] & (sink[:, None] != float("-inf")), 1.0, totals)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if ONE_ROW:
        key_begin, n_before, n_tiles = split_first, 0, tl.cdiv(split_last - split_first, stride)
        n_full = tl.where(full_last == last, n_tiles, 0) if HIDDEN else n_tiles
    else:
        key_begin, n_before, n_full, n_tiles = kv_tile_range(split_first, split_last, full_first, full_last, BLOCK_N)
    if WHOLE_PAGES:
        slots = (local_keys % PAGE_SIZE)[:, None]
        k_slots, v_slots = k_base + slots * k_stride_s + dims[None, :], v_base + slots * v_stride_s + v_dims[None, :]
    if LOOK_AHEAD:
        # Behind the last key that is seen the table may hold anything, or end.
        last_page = tl.where(n_tiles > 0, (split_last - 1) // PAGE_SIZE, -1)
        begin_page = key_begin // PAGE_SIZE + local_pages
        inside = begin_page <= last_page
        if GUESSED:
            if first > 0:
                next_page = tl.load(table_ptr + begin_page, mask=inside, other=0)
        else:
            next_page = tl.load(table_ptr + begin_page, mask=inside, other=0)
    for phase in tl.static_range(0, PHASES):
        if phase == 0:
            steps = n_full
        else:
            steps = n_tiles - n_full
        for step in tl.range(0, steps):
            first_key = key_begin + tile_index(step, n_before, n_full, phase) * stride
            keys = first_key + local_keys
            if ONE_ROW:
                in_range = (keys >= start) & (keys < split_last)
            else:
                in_range = keys < split_last
            if LOOK_AHEAD:
                page = next_page.to(tl.int64)
                next_page = tl.load(table_ptr + tl.minimum((first_key + stride) // PAGE_SIZE + local_pages, last_page))
            elif ONE_PAGE:
                page = tl.load(table_ptr + first_key // PAGE_SIZE).to(tl.int64)
            elif PAGE_SIZE > 0:
                page = tl.load(table_ptr + keys // PAGE_SIZE, mask=in_range, other=0).to(tl.int64)
            if WHOLE_PAGES:
                k_tile, k_offsets = k_slots, (page * k_stride_b)[:, None]
                v_tile, v_offsets = v_slots, (page * v_stride_b)[:, None]
            else:
                if PAGE_SIZE == 0:
                    wide_key = first_key.to(tl.int64)
                    k_rows, v_rows = local_keys * k_stride_s, local_keys * v_stride_s
                    k_tile, v_tile = k_base + wide_key * k_stride_s, v_base + wide_key * v_stride_s
                elif ONE_PAGE:
                    slot = (first_key % PAGE_SIZE).to(tl.int64)
                    k_rows, v_rows = local_keys * k_stride_s, local_keys * v_stride_s
                    k_tile = k_base + page * k_stride_b + slot * k_stride_s
                    v_tile = v_base + page * v_stride_b + slot * v_stride_s
                else:
                    k_rows = page * k_stride_b + (keys % PAGE_SIZE) * k_stride_s
                    v_rows = page * v_stride_b + (keys % PAGE_SIZE) * v_stride_s
                    k_tile, v_tile = k_base, v_base
                k_offsets, v_offsets = k_rows[:, None] + dims[None, :], v_rows[:, None] + v_dims[None, :]
            k = load_tile(k_tile, k_offsets, in_range, HEAD_DIM, ONE_ROW or phase == 1)
            v = load_tile(v_tile, v_offsets, in_range, V_HEAD_DIM, ONE_ROW or phase == 1)
            bias = 0.0
            if BIAS != BIAS_NONE:
                bias_at = bias_rows[:, None] + keys[None, :].to(tl.int64) * bias_stride_k
                bias = tl.load(bias_at, mask=pair_ok[:, None] & in_range[None, :], other=0)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            scores, _ = apply_softcap(scores, scale, softcap, HAS_SOFTCAP, PRECISE)
            scores = add_score_terms(
                scores, scale, slope[:, None], diagonal[:, None], keys[None, :], bias, HAS_SOFTCAP, HAS_ALIBI,
                FLOAT_BIAS,
            )  # fmt: skip
            if ONE_ROW and phase == 0:
                # Hidden keys were not loaded, so that V is 0 there, and a tile has one that is seen.
                scores = apply_mask(scores, in_range[None, :])
            if phase == 1:
                visible = in_range[None, :] & pair_ok[:, None]
                if not ONE_ROW:
                    visible = visible & (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
                if HAS_KEY_MASK:
                    kept = tl.load(key_mask_ptr + keys.to(tl.int64) * key_mask_stride_s, mask=in_range, other=0) != 0
                    visible = visible & kept[None, :]
                if BOOL_BIAS:
                    visible = visible & (bias != 0)
                scores = apply_mask(scores, visible)
                # The memory of hidden keys may hold NaN, and 0 * NaN is NaN.
                v = tl.where(any_visible(visible, 0)[:, None], v, 0.0)
            top, shift, decay = raise_top(scores, top, factor, phase == 1 or FLOAT_BIAS)
            weights = tl.math.exp2(scores * factor - shift[:, None])
            if ONE_ROW:
                totals = totals * decay[:, None] + weights
            else:
                totals = totals * decay[:, None] + tl.sum(weights, axis=1)[:, None]
            acc = acc * decay[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)

    total = tl.sum(totals, axis=1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(total))
    nheads = nheads_k * group
    out_rows = ((batch * seqlen_q + rows) * nheads + heads) * V_HEAD_DIM
    lse_rows = (batch * nheads + heads) * seqlen_q + rows
    if parts_ptr is None:
        _store_rows(out_ptr, lse_ptr, out_rows, lse_rows, acc, lse, pair_ok, V_HEAD_DIM)
    else:
        local = tl.arange(0, BLOCK_M)
        tile_offsets = local[:, None] * BLOCK_DV + v_dims[None, :]
        slot = pid.to(tl.int64)
        tl.store(parts_ptr + slot * (BLOCK_M * BLOCK_DV) + tile_offsets, acc, mask=pair_ok[:, None])
        tl.store(part_lse_ptr + slot * BLOCK_M + local, lse)
        if counters_ptr is not None:
            # All threads' stores first, then one thread's release: whoever counts last acquires everybody's.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel")
            if arrived == n_splits - 1:
                first_slot = unit.to(tl.int64) * n_splits
                acc, lse = _combine(
                    parts_ptr + first_slot * (BLOCK_M * BLOCK_DV) + tile_offsets,
                    part_lse_ptr + first_slot * BLOCK_M + local, n_splits, pair_ok, BLOCK_M, BLOCK_DV,
                )  # fmt: skip
                _store_rows(out_ptr, lse_ptr, out_rows, lse_rows, acc, lse, pair_ok, V_HEAD_DIM)
                tl.store(counters_ptr + unit, 0)


@triton.jit
def prefetch_rows(rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Ask for rows of HEAD_DIM elements, given by pointers to their first, to be brought into the L2 cache (NVIDIA)."""
    WIDTH: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth  # elements in a line of 128 bytes
    LINES: tl.constexpr = (BLOCK_D + WIDTH - 1) // WIDTH
    inside = tl.minimum(tl.arange(0, LINES) * WIDTH, HEAD_DIM - 1)
    at = (rows[:, None] + inside[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store_rows(out_ptr, lse_ptr, out_rows, lse_rows, acc, lse, pair_ok, V_HEAD_DIM: tl.constexpr):
    v_dims = tl.arange(0, acc.shape[1])
    store_tile(out_ptr, out_rows[:, None] + v_dims[None, :], acc, pair_ok, V_HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + lse_rows, lse, mask=pair_ok)


@triton.jit
def _combine(parts, part_lse, n_splits, pair_ok, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The splits of a tile of rows, each normalised, joined by their log-sum-exps; ``(acc, lse)``.

    ``parts`` and ``part_lse`` are pointers to the first split's. They are loaded past the L1 cache, several splits at
    a time: one round trip to memory for each would cost more than the splits saved.
    """
    TOGETHER: tl.constexpr = 8 if BLOCK_M * BLOCK_DV <= 2048 else (4 if BLOCK_M * BLOCK_DV <= 4096 else 1)
    some = tl.arange(0, TOGETHER)
    none = tl.zeros([BLOCK_M], tl.int32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for base in range(0, n_splits, TOGETHER):
        inside = (base + some < n_splits)[:, None] & pair_ok[None, :]
        lses = tl.load(
            part_lse[None, :] + (base + some)[:, None] * BLOCK_M, mask=inside, other=float("-inf"), cache_modifier=".cg"
        )
        new_top = tl.maximum(top, tl.max(lses, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.math.exp2((top - shift) * LOG2E)
        total = total * decay + tl.sum(tl.math.exp2((lses - shift[None, :]) * LOG2E), axis=0)
        top = new_top
        acc = acc * decay[:, None]
        for more in tl.static_range(TOGETHER):
            split = base + more
            ok = pair_ok & (none + split < n_splits)
            part = tl.load(parts + split * (BLOCK_M * BLOCK_DV), mask=ok[:, None], other=0.0, cache_modifier=".cg")
            lse = tl.load(part_lse + split * BLOCK_M, mask=ok, other=float("-inf"), cache_modifier=".cg")
            acc += part * tl.math.exp2((lse - shift) * LOG2E)[:, None]
    safe_total = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total))
    return acc / safe_total[:, None], lse


@triton.jit(do_not_specialize=("nheads_k", "group", "seqlen_q", "n_splits", "n_row_tiles"))
def attention_decode_combine(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    nheads_k,
    group,
    seqlen_q,
    n_splits,
    n_row_tiles,
    V_HEAD_DIM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row of ``out`` (and ``lse``) from its splits, where :func:`attention_decode` had no counters."""
    pair = tl.program_id(0)
    pairs = group * seqlen_q
    batch_head, in_group = pair // pairs, pair % pairs
    unit = batch_head * n_row_tiles + in_group // BLOCK_M
    local = in_group % BLOCK_M
    batch, k_head = (batch_head // nheads_k).to(tl.int64), batch_head % nheads_k
    row, head = in_group % seqlen_q, k_head * group + in_group // seqlen_q
    v_dims, some = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_SPLITS)
    first_slot = unit.to(tl.int64) * n_splits
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if EARLY:
        gdc_wait()
    for base in range(0, n_splits, BLOCK_SPLITS):
        inside = base + some < n_splits
        slots = (first_slot + base + some) * BLOCK_M + local
        lses = tl.load(part_lse_ptr + slots, mask=inside, other=float("-inf"))
        parts = tl.load(parts_ptr + slots[:, None] * BLOCK_DV + v_dims[None, :], mask=inside[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lses, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.math.exp2((top - shift) * LOG2E)
        weights = tl.math.exp2((lses - shift) * LOG2E)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(parts * weights[:, None], axis=0)
        top = new_top
    nheads = nheads_k * group
    safe_total = tl.where(total == 0.0, 1.0, total)
    out_row = ((batch * seqlen_q + row) * nheads + head) * V_HEAD_DIM
    tl.store(out_ptr + out_row + v_dims, acc / safe_total, mask=v_dims < V_HEAD_DIM)
    if lse_ptr is not None:
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total))
        tl.store(lse_ptr + (batch * nheads + head) * seqlen_q + row, lse)
