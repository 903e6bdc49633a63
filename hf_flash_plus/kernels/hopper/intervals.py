"""Row intervals, prepared for the Hopper kernels: bounds of every row, a summary of every tile of rows, and for some of
the forward kernels a list of the tiles that see something."""

from __future__ import annotations

import triton
import triton.language as tl

from ..primitives import NO_KEY, row_bounds, tile_bounds
from . import config

CARD = tl.constexpr(config.CARD)
LISTED = tl.constexpr(config.LISTED)

RUNTIME = (
    "intervals_ptr", "bounds_ptr", "summary_ptr", "stride_b", "stride_s", "stride_c", "seqlen_q", "seqlen_k",
    "window_left", "window_right",
)  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def summarize_intervals(
    intervals_ptr,
    bounds_ptr,
    summary_ptr,
    stride_b,
    stride_s,
    stride_c,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMPTY_ROWS_HIDE: tl.constexpr,
):
    """One program per (tile of ROWS rows, batch element). BLOCK_M is ROWS rounded up to a power of 2.

    Bounds are the intervals met with the window and clamped to the keys there are; rows beyond ``seqlen_q`` are empty.
    A window without a side is wider than both lengths. The summary's fields are named in ``schedule``; the last ones
    are, by 64 rows, the keys that all of these see. EMPTY_ROWS_HIDE: where a row sees nothing there are no keys that
    all rows see. Otherwise such rows do not count, and the first field says whether there are any.
    """
    row_tile, batch = tl.program_id(0), tl.program_id(1)
    n_tiles = tl.num_programs(0)
    local = tl.arange(0, BLOCK_M)
    first_row = row_tile * ROWS
    rows = first_row + local
    mine = local < ROWS
    intervals_ptr += batch.to(tl.int64) * stride_b
    start, end = row_bounds(
        tl.where(mine, rows, seqlen_q), intervals_ptr, stride_s, stride_c, seqlen_q, seqlen_k, window_left,
        window_right, True, True, True,
    )  # fmt: skip
    inside = mine & (rows < seqlen_q)
    start = tl.where(inside, tl.maximum(start, 0), 0)
    end = tl.where(inside, end, 0)
    bounds = bounds_ptr + (batch * n_tiles * ROWS + rows) * 2
    tl.store(bounds, start, mask=mine)
    tl.store(bounds + 1, end, mask=mine)

    seen = end > start
    counted = first_row + ROWS
    first, last, full_first, full_last = tile_bounds(
        start, end, first_row, intervals_ptr, stride_s, stride_c, tl.minimum(seqlen_q, counted), seqlen_k, window_left,
        window_right, True, True, True, BLOCK_M,
    )  # fmt: skip
    if not EMPTY_ROWS_HIDE:
        full_first = tl.max(tl.where(seen, start, 0), axis=0)
        full_last = tl.min(tl.where(seen, end, NO_KEY), axis=0)
    # A tile that sees nothing gets one block, wholly masked.
    first = tl.minimum(first, last)
    n_blocks = tl.maximum((last - first + (BLOCK_N - 1)) // BLOCK_N, 1)
    n_begin = tl.minimum(tl.maximum(full_first - first + (BLOCK_N - 1), 0) // BLOCK_N, n_blocks)
    n_full = tl.maximum(tl.maximum(tl.minimum(full_last, last) - first, 0) // BLOCK_N - n_begin, 0)

    # The keys of a tile have no gaps if its rows that see anything follow one another and each meets the one before.
    before = tl.maximum(rows - 1, 0)
    start_before, end_before = row_bounds(
        tl.where(mine, before, seqlen_q), intervals_ptr, stride_s, stride_c, seqlen_q, seqlen_k, window_left,
        window_right, True, True, True,
    )  # fmt: skip
    start_before = tl.maximum(start_before, 0)
    seen_before = (end_before > start_before) & (local > 0)
    apart = seen & seen_before & ((start > end_before) | (start_before > end))
    n_runs = tl.sum((seen & (seen_before == 0)).to(tl.int32), axis=0)
    gaps = (tl.max(apart.to(tl.int32), axis=0) > 0) | (n_runs > 1)

    summary = summary_ptr + (batch * n_tiles + row_tile) * CARD
    if not EMPTY_ROWS_HIDE:
        tl.store(summary, tl.max((inside & (seen == 0)).to(tl.int32), axis=0))
    tl.store(summary + 1, n_blocks)
    tl.store(summary + 2, n_blocks - n_begin - n_full)
    tl.store(summary + 3, n_begin)
    tl.store(summary + 4, first)
    tl.store(summary + 5, last)
    tl.store(summary + 6, gaps.to(tl.int32))
    for group in tl.static_range(ROWS // 64):
        here = inside & (local // 64 == group)
        whole_first, whole_last = tl.where(seen, start, NO_KEY), tl.where(seen, end, 0)
        if not EMPTY_ROWS_HIDE:
            here = here & seen
        tl.store(summary + 10 + 2 * group, tl.max(tl.where(here, whole_first, 0), axis=0))
        tl.store(summary + 11 + 2 * group, tl.min(tl.where(here, whole_last, NO_KEY), axis=0))


@triton.jit
def _blocks(summary, inside):
    """How many blocks of keys tiles have: 0 where no row sees anything (their summaries say 1)."""
    last = tl.load(summary + 5, mask=inside, other=0)
    return tl.where(last > 0, tl.load(summary + 1, mask=inside, other=0), 0)


@triton.jit
def _known_end(summary_ptr, tile, n_tiles, inside):
    """The end of the keys of which every one is seen by some row of a tile or of the next one, from the tile's first on
    (if it has no gaps): V of these need not be cleaned, they are no padding. Causal tiles end within a block."""
    last = tl.load(summary_ptr + tile * CARD + 5, mask=inside, other=0)
    after = summary_ptr + (tile + 1) * CARD
    inside = inside & (tile + 1 < n_tiles)
    first, end = tl.load(after + 4, mask=inside, other=0), tl.load(after + 5, mask=inside, other=0)
    gaps = tl.load(after + 6, mask=inside, other=1)
    return tl.where((last > 0) & (gaps == 0) & (first <= last), tl.maximum(last, end), last)


@triton.jit(do_not_specialize=("summary_ptr", "listed_ptr", "n_tiles"))
def list_tiles(summary_ptr, listed_ptr, n_tiles, ROWS: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr):
    """List the tiles of row intervals in the order in which the forward kernel computes them. One program for each
    batch element of the intervals, whose tiles follow one another, from the last rows to the first.

    The list's head says how many tiles see something; these come first, the others fill it from its end. An entry is
    the tile's summary (the end of its keys is that of ``_known_end``) with its place: its first row, its batch element
    (of the intervals), and of the tiles of that element that see something, where the first one stands, how many there
    are, and how many blocks of keys one of them has at most. CHUNK tiles are listed at a time, COUNTED summaries of
    earlier batch elements asked.
    """
    batch, n_lists = tl.program_id(0), tl.num_programs(0)
    n_before = batch * n_tiles
    before = 0  # tiles of earlier batch elements that see something
    for begin in range(0, n_before, COUNTED):
        others = begin + tl.arange(0, COUNTED)
        n_blocks = _blocks(summary_ptr + others * CARD, others < n_before)
        before += tl.sum((n_blocks > 0).to(tl.int32), axis=0)
    summary_ptr += n_before * CARD
    local = tl.arange(0, CHUNK)
    size, most = 0, 0
    for begin in range(0, n_tiles, CHUNK):
        n_blocks = _blocks(summary_ptr + (begin + local) * CARD, begin + local < n_tiles)
        size += tl.sum((n_blocks > 0).to(tl.int32), axis=0)
        most = tl.maximum(most, tl.max(n_blocks, axis=0))
    if batch == n_lists - 1:
        tl.store(listed_ptr, before + size)
    listed_ptr += LISTED
    end = n_lists * n_tiles - 1  # where the first tile goes that sees nothing
    field = tl.arange(0, CARD)[None, :]
    done = 0
    for begin in range(0, n_tiles, CHUNK):
        place = begin + local
        tile = n_tiles - 1 - place
        inside = tile >= 0
        n_blocks = _blocks(summary_ptr + tile * CARD, inside)
        seen = (n_blocks > 0).to(tl.int32)
        rank = done + tl.cumsum(seen, axis=0) - seen
        done += tl.sum(seen, axis=0)
        at = tl.where(seen > 0, before + rank, end - (n_before - before) - (place - rank))
        entry = listed_ptr + at * LISTED
        known = inside[:, None] & ((field < 7) | (field > 9))
        numbers = tl.load(summary_ptr + tile[:, None] * CARD + field, mask=known, other=0)
        numbers = tl.where(field == 5, _known_end(summary_ptr, tile, n_tiles, inside)[:, None], numbers)
        numbers = tl.where(field == 7, tile[:, None] * ROWS, numbers)
        numbers = tl.where(field == 8, batch, numbers)
        tl.store(entry[:, None] + field, numbers, mask=inside[:, None])
        tl.store(entry + CARD, before, mask=inside)
        tl.store(entry + CARD + 1, size, mask=inside)
        tl.store(entry + CARD + 2, most, mask=inside)
