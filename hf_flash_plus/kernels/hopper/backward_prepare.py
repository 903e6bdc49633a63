"""What surrounds the Hopper backward kernel, in plain Triton: row numbers and lists before it, dq's rows after it.

Rows are padded to whole tiles of 128 here (``padded``); what is added weighs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives import NO_KEY, load_tile, row_bounds

#: Flags in an entry of the lists of query tiles, and in their counts; ``backward`` has the same numbers.
MASKED = tl.constexpr(1 << 29)
DIRTY = tl.constexpr(1 << 30)
COVERED = tl.constexpr(1 << 30)

RUNTIME_SIZES = ("nheads", "seqlen_q", "seqlen_k", "n_tiles_q", "n_tiles_k", "n_lists", "window_left", "window_right")
#: Also those whose alignment and divisibility nothing is gained from: one number is loaded at a time.
RUNTIME_ROWS = (
    *RUNTIME_SIZES, "lse_ptr", "delta_ptr", "intervals_ptr", "lse_stride", "intervals_stride_b", "intervals_stride_s",
    "intervals_stride_c",
)  # fmt: skip


@triton.jit
def _numbers(
    out_base,
    dout_base,
    lse_ptr,
    delta_ptr,
    start_ptr,
    minus_delta_ptr,
    dq_ptr,
    tile_at,
    rows_at,
    row_ok,
    sees,
    out_stride_s,
    dout_stride_s,
    factor,
    V_HEAD_DIM: tl.constexpr,
    ZERO_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The numbers of one tile of rows, of which ``sees`` see some key, and zeros for its dq."""
    local_rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    # No load waits for another; what rows that weigh nothing hold is dropped afterwards.
    lse = tl.load(lse_ptr + rows_at, mask=row_ok, other=float("inf"))
    seen = sees & (tl.abs(lse) != float("inf"))
    out = load_tile(out_base, local_rows[:, None] * out_stride_s + dims[None, :], row_ok, V_HEAD_DIM, True)
    dout = load_tile(dout_base, local_rows[:, None] * dout_stride_s + dims[None, :], row_ok, V_HEAD_DIM, True)
    delta = tl.where(seen, tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1), 0.0)
    tl.store(delta_ptr + rows_at, delta, mask=row_ok)
    at = tile_at * BLOCK_M + local_rows
    tl.store(minus_delta_ptr + at, -delta)
    tl.store(start_ptr + at, tl.where(seen, lse * factor, float("-inf")))
    if ZERO_DQ:
        # 192 columns: in pieces, for shapes are powers of two.
        PIECE: tl.constexpr = 64 if BLOCK_D == 192 else BLOCK_D
        for piece in tl.static_range(BLOCK_D // PIECE):
            numbers = (piece * BLOCK_M + local_rows)[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
            tl.store(dq_ptr + tile_at * (BLOCK_M * BLOCK_D) + numbers, tl.zeros([BLOCK_M, PIECE], tl.float32))


@triton.jit(do_not_specialize=RUNTIME_ROWS)
def row_numbers(
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    start_ptr,
    minus_delta_ptr,
    dq_ptr,
    bounds_ptr,
    summary_ptr,
    intervals_ptr,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    lse_stride,
    intervals_stride_b,
    intervals_stride_s,
    intervals_stride_c,
    nheads,
    seqlen_q,
    seqlen_k,
    n_tiles_q,
    n_lists,
    window_left,
    window_right,
    factor,
    V_HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
    ZERO_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Of each query row ``delta = sum(dout * out)``, and the start values of the kernel's products; of each query tile
    what it sees.

    Args:
        lse_ptr, delta_ptr: fp32, the first row that takes part; heads lie ``lse_stride`` rows apart.
        start_ptr, minus_delta_ptr: fp32 (batch * nheads, padded): ``lse * factor`` (-inf where a row weighs nothing)
            and ``-delta``.
        dq_ptr: with ZERO_DQ, fp32 (batch * nheads * padded * BLOCK_D,) to be zeroed.
        bounds_ptr: with HAS_INTERVALS, int32 (n_lists, 2, padded): the first and one past the last key of each row.
        summary_ptr: with HAS_INTERVALS, int32 (n_lists, 5, n_tiles_q): first and one past the last key that some row
            of the tile sees (0 for the last: none sees any); the same of the keys that all rows see which see any;
            where rows see nothing, 0 or, counted by 8 rows, the first + 256 * one past the last of them.

    With row intervals, of tiles in which no row sees anything neither ``out`` nor ``dout`` is read, nor is dq zeroed.
    """
    tile = tl.program_id(0) % n_tiles_q
    batch_head = (tl.program_id(0) // n_tiles_q).to(tl.int64)
    batch, head = batch_head // nheads, batch_head % nheads
    first_row = tile * BLOCK_M
    local_rows = tl.arange(0, BLOCK_M)
    rows = first_row + local_rows
    row_ok = rows < seqlen_q
    if HAS_INTERVALS:
        intervals_ptr += batch * intervals_stride_b
    start, end = row_bounds(
        rows, intervals_ptr, intervals_stride_s, intervals_stride_c, seqlen_q, seqlen_k, window_left, window_right,
        HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    sees = row_ok & (end > start)
    out_base = out_ptr + batch * out_stride_b + head * out_stride_h + first_row.to(tl.int64) * out_stride_s
    dout_base = dout_ptr + batch * dout_stride_b + head * dout_stride_h + first_row.to(tl.int64) * dout_stride_s
    rows_at = batch_head * lse_stride + rows
    tile_at = batch_head * n_tiles_q + tile
    if HAS_INTERVALS:
        if tl.max(sees.to(tl.int32), axis=0) > 0:
            _numbers(
                out_base, dout_base, lse_ptr, delta_ptr, start_ptr, minus_delta_ptr, dq_ptr, tile_at, rows_at, row_ok,
                sees, out_stride_s, dout_stride_s, factor, V_HEAD_DIM, ZERO_DQ, BLOCK_M, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        else:  # in no list, so that nothing is added to its sums, which dq_rows does not read either
            zeros = tl.zeros([BLOCK_M], tl.float32)
            tl.store(delta_ptr + rows_at, zeros, mask=row_ok)
            at = tile_at * BLOCK_M + local_rows
            tl.store(minus_delta_ptr + at, zeros)
            tl.store(start_ptr + at, zeros + float("-inf"))
    else:
        _numbers(
            out_base, dout_base, lse_ptr, delta_ptr, start_ptr, minus_delta_ptr, dq_ptr, tile_at, rows_at, row_ok,
            sees, out_stride_s, dout_stride_s, factor, V_HEAD_DIM, ZERO_DQ, BLOCK_M, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if HAS_INTERVALS:  # noqa: SIM102  (one condition is known at compile time, the other is not)
        if (head == 0) & (batch < n_lists):
            # Rows that see nothing hide no keys: they weigh nothing, and what they hold is zeroed where they are DIRTY.
            first = tl.min(tl.where(sees, start, NO_KEY), axis=0)
            last = tl.max(tl.where(sees, end, 0), axis=0)
            full_first = tl.max(tl.where(sees, start, 0), axis=0)
            full_last = tl.min(tl.where(sees, end, NO_KEY), axis=0)
            summary_at = summary_ptr + batch * 5 * n_tiles_q + tile
            tl.store(summary_at, first)
            tl.store(summary_at + n_tiles_q, last)
            tl.store(summary_at + 2 * n_tiles_q, full_first)
            tl.store(summary_at + 3 * n_tiles_q, full_last)
            hides = row_ok & (end <= start)
            first_hidden = tl.min(tl.where(hides, local_rows // 8, BLOCK_M // 8), axis=0)
            end_hidden = tl.max(tl.where(hides, local_rows // 8 + 1, 0), axis=0)
            tl.store(summary_at + 4 * n_tiles_q, tl.where(end_hidden > 0, first_hidden + 256 * end_hidden, 0))
            n_rows = n_tiles_q * BLOCK_M
            bounds_at = bounds_ptr + batch * 2 * n_rows + rows
            tl.store(bounds_at, tl.where(row_ok, start, 0))
            tl.store(bounds_at + n_rows, tl.where(row_ok, end, 0))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def query_tile_lists(
    summary_ptr,
    entries_ptr,
    counts_ptr,
    seqlen_k,
    n_tiles_q,
    n_tiles_k,
    MASKED_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one tile of keys, the query tiles that see some of it, in rising order.

    ``entries`` is int32 (lists, n_tiles_k, n_tiles_q + 2): a query tile, plus MASKED where not all of its rows see all
    of the keys, plus DIRTY where a row sees nothing. ``counts`` (lists, n_tiles_k) says how many entries there are (one
    more is valid to read), plus COVERED where each of the keys is known to be seen by some row.

    MASKED_FIRST: those that are MASKED come before the others, each kind in rising order, the first entry always counts
    as one (the loop over them always runs), and the last number of the list says how many they are.
    """
    tile_n = tl.program_id(0) % n_tiles_k
    which = tl.program_id(0) // n_tiles_k
    first_key = tile_n * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, seqlen_k)
    summary_ptr += which * 5 * n_tiles_q
    list_at = (which * n_tiles_k + tile_n).to(tl.int64) * (n_tiles_q + 2)
    count = 0
    covered = 0
    n_masked = 0
    if MASKED_FIRST:
        for base in range(0, n_tiles_q, BLOCK):
            tiles = base + tl.arange(0, BLOCK)
            inside = tiles < n_tiles_q
            at = summary_ptr + tiles
            first = tl.load(at, mask=inside, other=2**30)
            last = tl.load(at + n_tiles_q, mask=inside, other=0)
            full_first = tl.load(at + 2 * n_tiles_q, mask=inside, other=2**30)
            full_last = tl.load(at + 3 * n_tiles_q, mask=inside, other=0)
            sees = (first < last_key) & (last > first_key)
            masked = sees & ((full_first > first_key) | (full_last < last_key))
            n_masked += tl.sum(masked.to(tl.int32), axis=0)
    masked_so_far = 0
    for base in range(0, n_tiles_q, BLOCK):
        tiles = base + tl.arange(0, BLOCK)
        inside = tiles < n_tiles_q
        at = summary_ptr + tiles
        first = tl.load(at, mask=inside, other=2**30)
        last = tl.load(at + n_tiles_q, mask=inside, other=0)
        full_first = tl.load(at + 2 * n_tiles_q, mask=inside, other=2**30)
        full_last = tl.load(at + 3 * n_tiles_q, mask=inside, other=0)
        dirty = tl.load(at + 4 * n_tiles_q, mask=inside, other=0)
        sees = (first < last_key) & (last > first_key)
        masked = (full_first > first_key) | (full_last < last_key)
        seen = sees.to(tl.int32)
        before = count + tl.cumsum(seen, axis=0) - seen
        flagged = masked
        to = list_at + before
        if MASKED_FIRST:
            kept = (sees & masked).to(tl.int32)
            masked_before = masked_so_far + tl.cumsum(kept, axis=0) - kept
            to = list_at + tl.where(masked, masked_before, n_masked + before - masked_before)
            masked_so_far += tl.sum(kept, axis=0)
            flagged = masked | (to == list_at)
        entry = tiles + tl.where(flagged, MASKED, 0) + tl.where(dirty > 0, DIRTY, 0)
        tl.store(entries_ptr + to, entry, mask=sees)
        count += tl.sum(seen, axis=0)
        covered = tl.maximum(covered, tl.max((sees & (masked == 0)).to(tl.int32), axis=0))
    tl.store(entries_ptr + list_at + count, 0)
    if MASKED_FIRST:
        tl.store(entries_ptr + list_at + n_tiles_q + 1, tl.maximum(n_masked, tl.minimum(count, 1)))
    tl.store(counts_ptr + which * n_tiles_k + tile_n, count + tl.where(covered > 0, COVERED, 0))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def dq_rows(
    sums_ptr,
    start_ptr,
    summary_ptr,
    dq_ptr,
    dq_stride_b,
    dq_stride_s,
    dq_stride_h,
    nheads,
    seqlen_q,
    n_tiles_q,
    n_lists,
    scale,
    HEAD_DIM: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
    LAST_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A 64 by 64 part of dq from the sums, which lie in the order in which the kernel's threads hold them.

    With row intervals, rows that weigh nothing get 0: nothing may have been written for them. ``summary_ptr`` as of
    ``row_numbers``.
    """
    PARTS: tl.constexpr = BLOCK_M * BLOCK_D // 4096
    program = tl.program_id(0)
    if LAST_FIRST:  # what was added to last is still in the L2 cache
        program = tl.num_programs(0) - 1 - program
    part = program % PARTS
    tile_at = (program // PARTS).to(tl.int64)
    batch_head, tile = tile_at // n_tiles_q, tile_at % n_tiles_q
    batch, head = batch_head // nheads, batch_head % nheads
    numbers = tl.arange(0, 4096)
    at = sums_ptr + tile_at * (BLOCK_M * BLOCK_D) + part * 4096 + numbers
    if HAS_INTERVALS:  # no sums where no row of the tile sees anything
        last = tl.load(summary_ptr + (tl.minimum(batch, n_lists - 1) * 5 + 1) * n_tiles_q + tile)
        x = tl.load(at, mask=numbers < tl.where(last > 0, 4096, 0), other=0.0)
    else:
        x = tl.load(at)
    # Register, quarter of a warp, row in it, ...: see backward._hand_over.
    x = tl.reshape(x, (8, 4, 8, 4, 2, 2))
    x = tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), (64, 64)) * scale
    # One part beside the other where rows have more than 64 columns, else one below the other. Of 256 columns the
    # halves of each warpgroup's 128 come one after the other (backward_wide).
    local_row = part // (BLOCK_D // 64) * 64 + tl.arange(0, 64)
    at_column = part % (BLOCK_D // 64)
    if BLOCK_D == 256:
        at_column = at_column % 2 * 2 + at_column // 2
    columns = at_column * 64 + tl.arange(0, 64)
    if HAS_INTERVALS:
        start = tl.load(start_ptr + tile_at * BLOCK_M + local_row)
        x = tl.where((start == float("-inf"))[:, None], 0.0, x)
    row = tile * BLOCK_M + local_row
    inside = (row < seqlen_q)[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns < HEAD_DIM)[None, :]
    at = dq_ptr + batch * dq_stride_b + head * dq_stride_h + row[:, None] * dq_stride_s + columns[None, :]
    tl.store(at, x.to(dq_ptr.dtype.element_ty), mask=inside)
