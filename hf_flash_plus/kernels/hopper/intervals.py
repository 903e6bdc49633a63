"""Row intervals, prepared for the Hopper kernels: bounds of every row, a summary of every tile of rows, and for the
forward kernel a list of these tiles in the order in which they are computed."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from ..primitives import NO_KEY, row_bounds, tile_bounds
from . import config

CARD = tl.constexpr(config.CARD)
ENTRY = tl.constexpr(config.ENTRY)

RUNTIME = (
    "intervals_ptr", "bounds_ptr", "summary_ptr", "counter_ptr", "n_grouped", "stride_b", "stride_s", "stride_c",
    "seqlen_q", "seqlen_k", "window_left", "window_right",
)  # fmt: skip


@triton.jit
def _sizes(summary_ptr, units, n_units):
    """How many blocks of keys tiles have; 0 where no row sees anything. As other programs have just written it."""
    summary = summary_ptr + units * CARD
    n_blocks = tl.load(summary + 1, mask=units < n_units, other=0, cache_modifier=".cg")
    last = tl.load(summary + 5, mask=units < n_units, other=0, cache_modifier=".cg")
    return tl.where(last > 0, n_blocks, 0)


@triton.jit
def list_tiles(summary_ptr, n_units, n_grouped, CHUNK: tl.constexpr):
    """Write the list of ``n_units`` tiles behind their summaries, in one program.

    ``n_grouped`` tiles after one another make a group: of batch elements whose keys are in the cache together. In the
    list groups follow one another, each with its longest tiles first; tiles that see nothing come last. An entry says
    which tile it is, where the entries of its group begin and how many there are; the first one, how many tiles of all
    see something. CHUNK is at most 128.

    A tile's place is counted: how many others come before it.
    """
    entries = summary_ptr + n_units * CARD
    lane = tl.arange(0, CHUNK)
    counted, before = 0, 0  # tiles that see something among the first ``counted``
    for begin in range(0, n_units, CHUNK):
        first = begin // n_grouped * n_grouped
        while counted < first:
            units = counted + lane
            before += tl.sum((_sizes(summary_ptr, units, first) > 0).to(tl.int32), axis=0)
            counted = tl.minimum(counted + CHUNK, first)
        last = tl.minimum(((tl.minimum(begin + CHUNK, n_units) - 1) // n_grouped + 1) * n_grouped, n_units)
        mine = begin + lane
        my_size = _sizes(summary_ptr, mine, n_units)
        my_group = mine // n_grouped
        earlier = lane * 0  # of those from ``first`` on that see something: in earlier groups,
        together = lane * 0  # in the same group,
        ahead = lane * 0  # and of these longer, or as long and earlier
        preceding = lane * 0  # with a lower number
        for other_begin in range(first, last, CHUNK):
            others = other_begin + lane
            size = _sizes(summary_ptr, others, last)
            group = others // n_grouped
            some = (size > 0)[None, :]
            same = some & (group[None, :] == my_group[:, None])
            low = others[None, :] < mine[:, None]
            longer = (size[None, :] > my_size[:, None]) | ((size[None, :] == my_size[:, None]) & low)
            # Four numbers of up to 128 in one sum.
            counts = (some & (group[None, :] < my_group[:, None])).to(tl.int32)
            counts += same.to(tl.int32) << 8
            counts += (same & longer).to(tl.int32) << 16
            counts += (some & low).to(tl.int32) << 24
            found = tl.sum(counts, axis=1)
            earlier += found & 255
            together += (found >> 8) & 255
            ahead += (found >> 16) & 255
            preceding += (found >> 24) & 255
        seen = my_size > 0
        group_begin = before + earlier
        n_empty = mine - before - preceding  # before this one
        at = tl.where(seen, group_begin + ahead, n_units - 1 - n_empty)
        entry = entries + (at + 1) * ENTRY
        inside = mine < n_units
        tl.store(entry, mine, mask=inside)
        tl.store(entry + 1, tl.where(seen, group_begin, 0), mask=inside)
        tl.store(entry + 2, tl.where(seen, together, 1), mask=inside)
    while counted < n_units:
        before += tl.sum((_sizes(summary_ptr, counted + lane, n_units) > 0).to(tl.int32), axis=0)
        counted += CHUNK
    tl.store(entries, before)


@triton.jit(do_not_specialize=RUNTIME)
def summarize_intervals(
    intervals_ptr,
    bounds_ptr,
    summary_ptr,
    counter_ptr,
    n_grouped,
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
    LIST: tl.constexpr,
):
    """One program per (tile of ROWS rows, batch element). BLOCK_M is ROWS rounded up to a power of 2.

    Bounds are the intervals met with the window and clamped to the keys there are; rows beyond ``seqlen_q`` are empty.
    A window without a side is wider than both lengths. The summary's fields are named in ``schedule``; the last ones
    are, by 64 rows, the keys that all of these see. EMPTY_ROWS_HIDE: where a row sees nothing there are no keys that
    all rows see. Otherwise such rows do not count, and the first field says whether there are any.

    LIST: the last program to finish writes the list (:func:`list_tiles`), ``counter_ptr`` is zero before and after, and
    the next launch may begin early.
    """
    if LIST:
        gdc_launch_dependents()  # it waits for all of this one, but its own start is then behind it
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
    if LIST:
        n_units = n_tiles * tl.num_programs(1)
        tl.debug_barrier()  # what all threads have written is before the count
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_units - 1:
            tl.atomic_xchg(counter_ptr, 0)
            list_tiles(summary_ptr, n_units, n_grouped, 128)
