"""The small device functions that the attention kernels are made of.

Conventions, everywhere in this package:

* A *tile* is BLOCK_M query rows by BLOCK_N keys. Positions (``rows``, ``keys``) are absolute int32 indices. Functions
  that work on a whole tile of scores take them already broadcast: ``rows[:, None], keys[None, :]``, or transposed
  ``rows[None, :], keys[:, None]``, so that the key-stationary kernel shares them.
* Offsets of batch, head and tile start are int64 and scalar; offsets inside a tile are int32.
* Scores that no option changes stay as the matrix product made them and are scaled inside the exponent ("raw");
  once softcap, ALiBi or a bias touch them they are in base-2 units (natural scores times ``log2(e)``).
* A row's keys are the interval ``start <= key < end``; it is empty where ``end <= start``.

Bottom-right causal mask of 3 rows over 5 keys, as row intervals (x is visible)::

    row 0   x x x . .    [0, 3)
    row 1   x x x x .    [0, 4)
    row 2   x x x x x    [0, 5)
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY = tl.constexpr(2**30)  # stands above every sequence length: the start of a row that sees nothing
KEY_ALIGNMENT = tl.constexpr(16)  # first keys of tiles are multiples of this: wide loads, and whole Philox blocks
#: Finite scores (base 2) are raised to this where a bias can push them down to finfo.min. Its weight is 0 beside any
#: ordinary score, and a row that has nothing else keeps even weights and a finite, accurate enough log-sum-exp.
LOWEST_SCORE = tl.constexpr(-32768.0)

BIAS_NONE = tl.constexpr(0)
BIAS_BOOL = tl.constexpr(1)
BIAS_FLOAT = tl.constexpr(2)


@triton.jit
def schedule(pid, n_tiles, n_heads, section):
    """Which (tile, head) program ``pid`` computes, both counted over all batch elements' heads.

    Heads are taken in sections small enough for their keys and values to stay in the L2 cache. Inside a section the
    tile varies slowest, so that with tiles ordered longest first the long ones of all its heads start first.
    """
    first = pid // (section * n_tiles) * section
    size = tl.minimum(section, n_heads - first)
    within = pid - first * n_tiles
    return within // size, first + within % size


@triton.jit
def load_tile(base, offsets, row_ok, HEAD_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A (rows, BLOCK_D) tile at ``base + offsets``; what lies beyond ``HEAD_DIM`` or outside ``row_ok`` reads as 0.

    No mask is formed where the head dimension fills its block and rows need no check: those loads stay widest.
    """
    pointers = base + offsets
    BLOCK_D: tl.constexpr = pointers.shape[1]
    if HEAD_DIM == BLOCK_D:
        if CHECK_ROWS:
            tile = tl.load(pointers, mask=row_ok[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    else:
        inside = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if CHECK_ROWS:
            tile = tl.load(pointers, mask=row_ok[:, None] & inside, other=0.0)
        else:
            tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(base, offsets, tile, row_ok, HEAD_DIM: tl.constexpr):
    """Store a (rows, BLOCK_D) tile, converted to the pointer's type; only ``row_ok`` rows and real columns."""
    BLOCK_D: tl.constexpr = offsets.shape[1]
    inside = row_ok[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def row_bounds(
    rows,
    intervals_ptr,
    stride_s,
    stride_c,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_INTERVALS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """The keys ``[start, end)`` that rows may see: row intervals and flags intersected, clamped to the keys there are.

    ``rows`` is a scalar or a block; ``intervals_ptr`` points at this batch element. Rows at or beyond ``seqlen_q``
    are empty where there are row intervals; with flags alone they continue the pattern.
    """
    start = rows * 0
    end = rows * 0 + seqlen_k
    if HAS_INTERVALS:
        here = intervals_ptr + rows.to(tl.int64) * stride_s
        inside = rows < seqlen_q
        start = tl.maximum(tl.load(here, mask=inside, other=0), 0)
        end = tl.minimum(tl.load(here + stride_c, mask=inside, other=0), seqlen_k)
    diagonal = rows + (seqlen_k - seqlen_q)
    if HAS_LEFT:
        start = tl.maximum(start, diagonal - window_left)
    if HAS_RIGHT:
        end = tl.minimum(end, diagonal + window_right + 1)
    return start, end


@triton.jit
def tile_bounds(
    start,
    end,
    first_row,
    intervals_ptr,
    stride_s,
    stride_c,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_INTERVALS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of one query tile: the keys ``[first, last)`` that some row sees and ``[full_first, full_last)`` that all see.

    ``start, end`` are its rows' bounds. Flags move both bounds up from row to row, so that the first and the last
    row say it all; row intervals are reduced. A tile with an empty row has no key that all rows see.
    """
    if HAS_INTERVALS:
        inside = first_row + tl.arange(0, BLOCK_M) < seqlen_q
        seen = inside & (end > start)
        first = tl.min(tl.where(seen, start, NO_KEY), axis=0)
        last = tl.max(tl.where(seen, end, 0), axis=0)
        full_first = tl.max(tl.where(inside, tl.where(seen, start, NO_KEY), 0), axis=0)
        full_last = tl.min(tl.where(inside, tl.where(seen, end, 0), NO_KEY), axis=0)
    else:
        last_row = tl.minimum(first_row + BLOCK_M, seqlen_q) - 1
        first, full_last = row_bounds(
            first_row, intervals_ptr, stride_s, stride_c, seqlen_q, seqlen_k, window_left, window_right,
            HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        full_first, last = row_bounds(
            last_row, intervals_ptr, stride_s, stride_c, seqlen_q, seqlen_k, window_left, window_right,
            HAS_INTERVALS, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        first = tl.maximum(first, 0)
    return first, last, full_first, full_last


@triton.jit
def tile_counts(first, last, full_first, full_last, BLOCK: tl.constexpr):
    """Cut ``[first, last)`` into tiles of BLOCK from ``first`` on: ``(n_before, n_full, n_tiles)``.

    ``n_before`` tiles need masking, then ``n_full`` lie wholly inside ``[full_first, full_last)``, then the rest need
    masking again.
    """
    n_tiles = tl.maximum(last - first + (BLOCK - 1), 0) // BLOCK
    n_before = tl.minimum(tl.maximum(full_first - first + (BLOCK - 1), 0) // BLOCK, n_tiles)
    n_full = tl.maximum(tl.minimum(full_last - first, last - first) // BLOCK - n_before, 0)
    return n_before, n_full, n_tiles


@triton.jit
def kv_tile_range(first, last, full_first, full_last, BLOCK_N: tl.constexpr):
    """The key tiles of one query tile: ``(first key, n_before, n_full, n_tiles)``, see :func:`tile_counts`.

    Tiles begin at the first key any row sees (rounded down to KEY_ALIGNMENT), not at a multiple of BLOCK_N: a left
    padded batch starts its unmasked tiles right behind the padding.
    """
    first = tl.minimum(first, tl.maximum(last, 0)) // KEY_ALIGNMENT * KEY_ALIGNMENT
    n_before, n_full, n_tiles = tile_counts(first, last, full_first, full_last, BLOCK_N)
    return first, n_before, n_full, n_tiles


@triton.jit
def query_tile_range(
    first_key,
    last_key,
    summary_ptr,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    HAS_INTERVALS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SUMMARY: tl.constexpr,
):
    """The query tiles that see keys ``[first_key, last_key)``: ``(first row, first tile, n_before, n_full, n_tiles)``.

    From the flags by arithmetic; from row intervals by a scan over the summaries that the preprocess kernel wrote,
    (4, query tiles) of this batch element. Tiles between the first and the last that see nothing are masked away;
    the wholly visible ones count only where they follow one another. The first row is the first that sees a key
    (by the flags; 0 with row intervals).
    """
    n_query_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    if HAS_INTERVALS:
        first_row = 0
        first, last, full_first, full_last, full_count = NO_KEY + 0, 0, NO_KEY + 0, 0, 0
        for base in range(0, n_query_tiles, BLOCK_SUMMARY):
            tiles = base + tl.arange(0, BLOCK_SUMMARY)
            inside = tiles < n_query_tiles
            at = summary_ptr + tiles
            begins = tl.load(at, mask=inside, other=NO_KEY)
            ends = tl.load(at + n_query_tiles, mask=inside, other=0)
            full_begins = tl.load(at + 2 * n_query_tiles, mask=inside, other=NO_KEY)
            full_ends = tl.load(at + 3 * n_query_tiles, mask=inside, other=0)
            sees = (begins < last_key) & (ends > first_key)
            full = (full_begins <= first_key) & (full_ends >= last_key) & ((tiles + 1) * BLOCK_M <= seqlen_q)
            first = tl.minimum(first, tl.min(tl.where(sees, tiles, NO_KEY), axis=0))
            last = tl.maximum(last, tl.max(tl.where(sees, tiles + 1, 0), axis=0))
            full_first = tl.minimum(full_first, tl.min(tl.where(full, tiles, NO_KEY), axis=0))
            full_last = tl.maximum(full_last, tl.max(tl.where(full, tiles + 1, 0), axis=0))
            full_count += tl.sum(full.to(tl.int32), axis=0)
        n_tiles = tl.maximum(last - first, 0)
        n_full = tl.where(full_count == full_last - full_first, full_count, 0)
        n_before = tl.where(n_full > 0, full_first - first, 0)
    else:
        offset = seqlen_k - seqlen_q
        first_row = 0
        last_row, full_first, full_last = seqlen_q, 0, seqlen_q
        if HAS_RIGHT:  # row i sees keys up to i + offset + window_right
            first_row = tl.maximum(first_key - offset - window_right, 0)
            full_first = tl.maximum(last_key - 1 - offset - window_right, 0)
        if HAS_LEFT:  # row i sees keys from i + offset - window_left on
            last_row = tl.minimum(last_key - offset + window_left, seqlen_q)
            full_last = tl.minimum(first_key - offset + window_left + 1, seqlen_q)
        first = first_row // BLOCK_M
        n_tiles = tl.maximum((last_row + (BLOCK_M - 1)) // BLOCK_M - first, 0)
        full_tile = (full_first + (BLOCK_M - 1)) // BLOCK_M
        n_before = tl.minimum(full_tile - first, n_tiles)
        n_full = tl.maximum(full_last // BLOCK_M - full_tile, 0)
    return first_row, first, n_before, n_full, n_tiles


@triton.jit
def tile_index(step, n_before, n_full, PHASE: tl.constexpr):
    """Which tile a loop step is: phase 0 walks the tiles that need no mask, phase 1 those before and after them."""
    if PHASE == 0:
        index = n_before + step
    else:
        index = tl.where(step < n_before, step, step + n_full)
    return index


@triton.jit
def load_bias(base, row_offsets, key_offsets, rows, keys, seqlen_q, seqlen_k, CHECK_KEYS: tl.constexpr):
    """A tile of the dense bias; ``base`` points at its first element. Keys are checked only where they can run out."""
    if CHECK_KEYS:
        tile = tl.load(base + row_offsets + key_offsets, mask=(rows < seqlen_q) & (keys < seqlen_k), other=0)
    else:
        tile = tl.load(base + row_offsets + key_offsets, mask=rows < seqlen_q, other=0)
    return tile


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh from exp2: absolute error 1e-7; PRECISE also keeps the relative error of small arguments at fp32's."""
    ratio = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    big = (1.0 - ratio) / (1.0 + ratio)
    if PRECISE:
        s = x * x
        series = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
        magnitude = tl.where(s < 0.04, tl.abs(x) * series, big)
    else:
        magnitude = big
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def apply_softcap(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISE: tl.constexpr):
    """``(scores, t)``: raw scores to ``softcap * tanh(scale * raw / softcap)`` in base 2, and that tanh, which the
    derivative ``1 - t * t`` needs. Without softcap both are the raw scores."""
    if HAS_SOFTCAP:
        capped = tanh(scores * (scale / softcap), PRECISE)
        scores = capped * (softcap * LOG2E)
    else:
        capped = scores
    return scores, capped


@triton.jit
def add_score_terms(
    scores,
    scale,
    slope,
    diagonal,
    keys,
    bias,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_FLOAT_BIAS: tl.constexpr,
):
    """Add ALiBi and the dense bias. Scores come raw (or in base 2 after softcap) and leave raw where nothing is added,
    else in base 2. ``slope`` is in base 2, ``bias`` in natural units."""
    if (HAS_ALIBI or HAS_FLOAT_BIAS) and not HAS_SOFTCAP:
        scores = scores * (scale * LOG2E)
    if HAS_ALIBI:
        scores = scores - slope * tl.abs(diagonal - keys).to(tl.float32)
    if HAS_FLOAT_BIAS:
        bias = bias.to(tl.float32)
        scores = tl.where(bias == float("-inf"), bias, tl.maximum(scores + bias * LOG2E, LOWEST_SCORE))
    return scores


@triton.jit
def visible_keys(keys, start, end, HAS_START: tl.constexpr):
    """Where a key lies in its row's interval; all three broadcast to the tile. HAS_START: starts may be above 0."""
    if HAS_START:
        visible = (keys >= start) & (keys < end)
    else:
        visible = keys < end
    return visible


@triton.jit
def apply_mask(scores, visible):
    """Scores with the hidden ones at -inf, whatever NaN the memory of hidden keys made of them."""
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def any_visible(visible, AXIS: tl.constexpr):
    """Which keys (or rows) of a tile anything sees: the reduction of ``visible`` over the other axis."""
    return tl.max(visible.to(tl.int32), axis=AXIS) > 0


@triton.jit
def raise_top(scores, top, factor, MAY_BE_EMPTY: tl.constexpr):
    """The running maximum after a tile's scores: ``(top, shift, decay)``, see :func:`online_softmax_update`; ``shift``
    is what is taken from the scores, which is 0 for a row that has seen nothing."""
    new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
    if MAY_BE_EMPTY:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    return new_top, shift, tl.math.exp2(top - shift)


@triton.jit
def online_softmax_update(scores, top, total, factor, MAY_BE_EMPTY: tl.constexpr):
    """One step of the online softmax over rows.

    Args:
        scores: the tile's scores; ``factor`` turns them to base 2 (inside the exponent: one fused multiply-add).
        top, total: running maximum (base 2) and sum of the weights so far.
        MAY_BE_EMPTY: a row may have seen nothing yet, with ``top`` at -inf; its weights must be 0, not NaN.

    Returns:
        ``(weights, decay, top, total)``; ``decay`` scales what was accumulated before.
    """
    new_top, shift, decay = raise_top(scores, top, factor, MAY_BE_EMPTY)
    weights = tl.math.exp2(scores * factor - shift[:, None])
    return weights, decay, new_top, total * decay + tl.sum(weights, axis=1)


@triton.jit
def initial_softmax(sinks_ptr, rows, stride_s, seqlen_q, HAS_SINKS: tl.constexpr):
    """``(top, total)`` before the first key: nothing, or the row's sink, a logit that has no value."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + rows.to(tl.int64) * stride_s, mask=rows < seqlen_q, other=0.0).to(tl.float32)
        top = sink * LOG2E
        total = tl.where(sink == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full(rows.shape, float("-inf"), tl.float32)
        total = tl.full(rows.shape, 0.0, tl.float32)
    return top, total


@triton.jit
def dropout_keep(seed, head, first_row, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a (BLOCK_M, BLOCK_N) tile dropout keeps; the same for every kernel and every tile size.

    Philox4x32 with 7 rounds, keyed by ``seed``, counts (key // 8, row, batch * heads + head): its 128 bits serve 8
    neighbouring keys with 16 each, and a weight is kept where they are at least ``threshold`` (65536 * p).
    ``first_key`` is a multiple of 8.
    """
    blocks = first_key // 8 + tl.arange(0, BLOCK_N // 8)
    rows = first_row + tl.arange(0, BLOCK_M)
    zeros = rows[:, None] * 0 + blocks[None, :] * 0
    a, b, c, d = tl.philox(seed, zeros + blocks[None, :], zeros + rows[:, None], zeros + head, zeros, 7)
    low = tl.join(tl.join(a & 0xFFFF, b & 0xFFFF), tl.join(c & 0xFFFF, d & 0xFFFF))
    high = tl.join(tl.join(a >> 16, b >> 16), tl.join(c >> 16, d >> 16))
    bits = tl.join(low, high).to(tl.int32)
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) >= threshold


@triton.jit
def empty_to_infinity(lse):
    """The lse of rows that see nothing as +inf instead of -inf, so that their weights ``exp(score - lse)`` are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def dot_from(start, a, b, INPUT_PRECISION: tl.constexpr):
    """``start + a b``; ``start`` is broadcast to the product's shape."""
    start = tl.broadcast_to(start, (a.shape[0], b.shape[1]))
    return tl.dot(a, b, start, input_precision=INPUT_PRECISION)


@triton.jit
def zero_if_not_finite(tile):
    """A tile with NaN and inf replaced by 0."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0).to(tile.dtype)
