"""Which query rows and keys belong to a tile, in what order: what all warps of a program agree on.

The keys of a tile are cut into blocks of BLOCK_N. FULL, TAIL and CAUSAL compute everything from the tile's number.
WINDOW and INTERVALS need more: the warp that claims a tile describes it in shared memory (the fields below), the
others read that. The forward kernel publishes all of every tile so, on a card: divisions cost a tile of few blocks.
Blocks that need masking come first: those at the end of the tile's keys, downwards, then those at the beginning,
upwards; then the blocks that all rows see, downwards. The online softmax does not mind.
With ``Config.halves`` no block is told to need masking: see ``forward._consume_window``.

Row intervals leave tiles that see nothing. The forward kernel numbers tiles batch element by batch element, as many
heads at a time as find their keys in the L2 cache together (a section), and for these the tiles from the last rows that
see something to the first: most of those that see nothing come last in their section, and programs skip to its end.
With ``Config.listed`` it gets a list of the others (``intervals.list_tiles``) and numbers only these.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import config
from .primitives import opaque

FULL = gl.constexpr(config.FULL)
TAIL = gl.constexpr(config.TAIL)
CAUSAL = gl.constexpr(config.CAUSAL)
WINDOW = gl.constexpr(config.WINDOW)
INTERVALS = gl.constexpr(config.INTERVALS)

#: Fields of a tile's description in shared memory: the tile's number, its blocks (all, those masked at the end, those
#: masked at the beginning), its first key, the end of its keys, and whether there are keys between that no row sees.
N_FIELDS = gl.constexpr(8)
TILE, N_BLOCKS, N_END, N_BEGIN, FIRST, LAST, GAPS = (gl.constexpr(i) for i in range(7))

#: A card has these fields (N_BLOCKS is -1 after the last tile; for TILE, with row intervals, whether some rows see
#: nothing), the tile's place, and from WHOLE on, by warpgroup, the keys [first, last) that all of its rows see that see
#: anything. Summaries of row intervals leave the place out; in a list BATCH is that of the intervals, HEAD is not used,
#: and LAST may be the next tile's (``intervals.list_tiles``).
CARD = gl.constexpr(config.CARD)
SOME_EMPTY = gl.constexpr(0)
ROW, BATCH, HEAD, WHOLE = (gl.constexpr(i) for i in range(7, 11))

#: With ``Config.parts``, in fields that calls without a mask do not use: what ``publish_part`` says.
GIVEN, CHUNK = N_END, N_BEGIN

#: How many cards there are. The slowest warp may be q_buffers + k_stages tiles behind the one that publishes them.
RING = gl.constexpr(config.RING)

#: The distance of entries in a list of tiles, and what they say beside the numbers of a card: where the first tile of
#: the same batch element stands, how many tiles of it are listed, and the most blocks that one of them has.
LISTED = gl.constexpr(config.LISTED)
GROUP_FIRST, GROUP_SIZE, GROUP_MOST = (gl.constexpr(config.CARD + i) for i in range(3))


class Problem(NamedTuple):
    """The sizes and pointers of a call, as the kernel passes them to its roles."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    offset: gl.tensor  # seqlen_k - seqlen_q: the key on the diagonal of row 0
    nheads: gl.tensor
    group: gl.tensor  # query heads to a key head
    n_heads_total: gl.tensor  # batch * nheads
    section: gl.tensor  # heads in flight together (INTERVALS: of a batch element); with ``listed`` blocks of keys
    window_left: gl.tensor  # with ``parts`` how many tiles are computed whole
    window_right: gl.tensor  # with ``parts`` how many blocks of the others make a chunk
    bounds_ptr: gl.tensor  # (batch or 1, row tiles * BLOCK_M, 2): rows' keys [start, end)
    summary_ptr: gl.tensor  # (batch or 1, row tiles, CARD); with ``listed`` the list, (1 + tiles, LISTED)
    # With ``parts``: bounds_ptr (chunks, consumers, 64 * (v_dim + 2)), fp32: O, maxima and sums of the part that a
    # chunk leaves; summary_ptr (chunks, consumers): whether it is there. The kernel finds and leaves zeros in these.
    intervals_batch: gl.tensor  # 0 where all batch elements share their row intervals, else 1
    sinks_ptr: gl.tensor
    sinks_stride: gl.tensor
    out_ptr: gl.tensor  # contiguous, for INTERVALS
    v_head_dim: gl.tensor
    lse_ptr: gl.tensor
    factor: gl.tensor  # turns scores to base 2
    cap_factor: gl.tensor  # 2 * log2(e) * scale / softcap


class Tile(NamedTuple):
    """One tile of query rows: its first row, batch element, head, and its blocks of keys; for INTERVALS also the keys
    that all rows of one warpgroup see (none where that is not known)."""

    first_row: gl.tensor
    batch: gl.tensor
    head: gl.tensor
    n_blocks: gl.tensor
    n_end: gl.tensor
    n_begin: gl.tensor
    first_key: gl.tensor
    whole_first: gl.tensor
    whole_last: gl.tensor


class Section(NamedTuple):
    """Tiles of heads of one batch element that are in flight together, and where one of them stands."""

    batch: gl.tensor
    head: gl.tensor  # the first
    size: gl.tensor  # how many heads
    rest: gl.tensor  # the tile's number in the section
    end: gl.tensor  # the number of the first tile of the next section


class Group(NamedTuple):
    """The tiles of one batch element in a list."""

    first: gl.tensor  # where they begin
    size: gl.tensor  # how many they are
    section: gl.tensor  # how many heads are in flight together
    end: gl.tensor  # the number of the first tile of the next group


@gluon.jit
def n_row_tiles(p, C: gl.constexpr):
    return (p.seqlen_q + (C.consumers * 64 - 1)) // (C.consumers * 64)


@gluon.jit
def place(number, p, C: gl.constexpr):
    """``(first row, batch, head)`` of tile ``number``; the longest first, within a section of heads that share L2."""
    n_tiles = n_row_tiles(p, C)
    if C.mode == FULL or C.mode == TAIL:
        row_tile = number % n_tiles
        head = number // n_tiles
    else:
        section = number // (n_tiles * p.section)
        rest = number % (n_tiles * p.section)
        size = min(p.section, p.n_heads_total - section * p.section)
        row_tile = n_tiles - 1 - rest // size
        head = section * p.section + rest % size
    return row_tile * (C.consumers * 64), head // p.nheads, head % p.nheads


@gluon.jit
def read(tiles, index, WARPS: gl.constexpr):
    """One number from shared memory, in all threads."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(tiles.index(index).load(layout), 0)


@gluon.jit
def write(tiles, index, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tiles.index(index).store(gl.full([1], value, gl.int32, layout))


@gluon.constexpr_function
def fields(mode):
    """How many numbers describe a tile."""
    return 8 if mode >= config.WINDOW else 1


@gluon.jit
def _regular_blocks(first_row, p, C: gl.constexpr):
    """``(n_blocks, first key)`` of a tile with ``halves``. From ``first`` on, a row r of the tile sees the keys r (or
    r + 1) to r + span. Blocks before key 0 are left out, but ``first`` stays at -64 or before: the half block that the
    second warpgroup leaves out must hold no keys then. Memory before key 0 reads as zero, and is masked."""
    span = (p.window_left + 1) // 128 * 128
    first = first_row + p.offset - span
    left_out = max(-64 - first, 0) // 128
    return (span + C.consumers * 64 + 127) // 128 - left_out, first + left_out * 128


@gluon.jit
def _groups(limit, LAYOUT: gl.constexpr, N: gl.constexpr):
    """What to compare instead of ``arange(N)`` and rows' ``limit``, a column: groups of 8 keys, constants in a thread,
    and four numbers. (A thread holds two keys of each group, in two rows; with a register for each key it spills.)"""
    keys = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))
    return (keys & -8)[None, :], limit - (keys & 7)[None, :]


@gluon.jit
def hide_late(scores, W: gl.constexpr, LAYOUT: gl.constexpr, N: gl.constexpr):
    """Scores behind the diagonal to -inf, of warpgroup W's last block of keys (or its lower half: N keys), with
    ``halves``: the diagonal lies in the same place in all tiles."""
    limit = opaque(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) + W % 2 * 64)
    group, rest = _groups(limit[:, None], LAYOUT, N)
    return gl.where(group <= rest, scores, float("-inf"))


@gluon.jit
def hide_early(scores, first_key, tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, N: gl.constexpr):
    """The same for keys before rows' windows or before key 0, of N keys from ``first_key`` on."""
    diagonal = tile.first_row + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) + p.offset
    limit = opaque(gl.maximum(diagonal - p.window_left, 0) - first_key)
    group, rest = _groups(limit[:, None], LAYOUT, N)
    return gl.where(group >= rest, scores, float("-inf"))


@gluon.jit
def _window_blocks(first_row, p, C: gl.constexpr):
    """``(n_blocks, n_end, n_begin, first key)`` of a tile, for WINDOW."""
    if C.halves:
        n_blocks, first = _regular_blocks(first_row, p, C)
        return n_blocks, 0, 0, first
    BLOCK_N: gl.constexpr = C.block_n
    last_row = min(first_row + C.consumers * 64, p.seqlen_q) - 1
    first = max(first_row + p.offset - p.window_left, 0)
    last = min(last_row + p.offset + p.window_right + 1, p.seqlen_k)
    full_first = max(last_row + p.offset - p.window_left, 0)
    full_last = min(first_row + p.offset + p.window_right + 1, p.seqlen_k)
    # A tile that sees nothing gets one block, wholly masked.
    first = min(first, max(last, 0))
    n_blocks = max((last - first + (BLOCK_N - 1)) // BLOCK_N, 1)
    n_begin = min(max(full_first - first + (BLOCK_N - 1), 0) // BLOCK_N, n_blocks)
    n_full = max(max(min(full_last, last) - first, 0) // BLOCK_N - n_begin, 0)
    return n_blocks, n_blocks - n_begin - n_full, n_begin, first


@gluon.jit
def describe(number, tiles, slot, p, C: gl.constexpr):
    """Write tile ``number`` into a slot of shared memory, for the other warps."""
    if C.mode < WINDOW:
        write(tiles, slot, number)
    else:
        BLOCK_M: gl.constexpr = C.consumers * 64
        first_row, batch, _ = place(number, p, C)
        at = slot * N_FIELDS
        write(tiles, at + TILE, number)
        if C.mode == WINDOW:
            n_blocks, n_end, n_begin, first = _window_blocks(first_row, p, C)
            write(tiles, at + N_BLOCKS, n_blocks)
            write(tiles, at + N_END, n_end)
            write(tiles, at + N_BEGIN, n_begin)
            write(tiles, at + FIRST, first)
        else:
            row_tile = batch * p.intervals_batch * n_row_tiles(p, C) + first_row // BLOCK_M
            summary = p.summary_ptr + row_tile * CARD
            for field in gl.static_range(1, 7):
                write(tiles, at + field, gl.load(summary + field))


@gluon.jit
def _all_keys(first_row, p, C: gl.constexpr):
    """How many blocks of keys a tile has, for FULL, TAIL and CAUSAL."""
    last = p.seqlen_k
    if C.mode == CAUSAL:
        last = min(first_row + C.consumers * 64 + p.offset, last)
    return (last + (C.block_n - 1)) // C.block_n


@gluon.jit
def look_up(number, tiles, slot, p, WARPS: gl.constexpr, C: gl.constexpr):
    """The tile ``number``, which lies in ``slot``."""
    first_row, batch, head = place(number, p, C)
    if C.mode < WINDOW:
        return Tile(first_row, batch, head, _all_keys(first_row, p, C), 0, 0, 0, 0, 0)
    else:
        at = slot * N_FIELDS
        n_blocks = read(tiles, at + N_BLOCKS, WARPS)
        n_end, n_begin = read(tiles, at + N_END, WARPS), read(tiles, at + N_BEGIN, WARPS)
        return Tile(first_row, batch, head, n_blocks, n_end, n_begin, read(tiles, at + FIRST, WARPS), 0, 0)


@gluon.jit
def publish(number, tiles, slot, p, C: gl.constexpr):
    """Fill a card with tile ``number``, and return the tile; not for INTERVALS."""
    first_row, batch, head = place(number, p, C)
    at = slot * CARD
    n_end, n_begin, first = 0, 0, 0
    if C.mode == WINDOW:
        n_blocks, n_end, n_begin, first = _window_blocks(first_row, p, C)
    else:
        n_blocks = _all_keys(first_row, p, C)
    write(tiles, at + N_BLOCKS, n_blocks)
    write(tiles, at + ROW, first_row)
    write(tiles, at + BATCH, batch)
    write(tiles, at + HEAD, head)
    if C.mode >= WINDOW:
        write(tiles, at + N_END, n_end)
        write(tiles, at + N_BEGIN, n_begin)
        write(tiles, at + FIRST, first)
    return Tile(first_row, batch, head, n_blocks, n_end, n_begin, first, 0, 0)


@gluon.jit
def publish_part(number, first, n_blocks, given, chunk, tiles, slot, p, C: gl.constexpr):
    """Fill a card with the blocks ``first`` to ``first + n_blocks`` of tile ``number``, and return that part.
    ``given``: from how many chunks more the tile's other parts are to be added, -1 where this one is left for that."""
    first_row, batch, head = place(number, p, C)
    at = slot * CARD
    write(tiles, at + N_BLOCKS, n_blocks)
    write(tiles, at + ROW, first_row)
    write(tiles, at + BATCH, batch)
    write(tiles, at + HEAD, head)
    write(tiles, at + FIRST, first * C.block_n)
    write(tiles, at + GIVEN, given)
    write(tiles, at + CHUNK, chunk)
    return Tile(first_row, batch, head, n_blocks, 0, 0, first * C.block_n, 0, 0)


@gluon.jit
def all_blocks(p, C: gl.constexpr):
    """How many blocks of keys there are."""
    return (p.seqlen_k + (C.block_n - 1)) // C.block_n


@gluon.jit
def find_section(number, p, C: gl.constexpr):
    """The section of tile ``number``, for INTERVALS: sections do not cross batch elements."""
    n_tiles = n_row_tiles(p, C)
    batch = number // (n_tiles * p.nheads)
    rest = number - batch * (n_tiles * p.nheads)
    first = rest // (n_tiles * p.section) * p.section
    size = min(p.section, p.nheads - first)
    rest -= first * n_tiles
    return Section(batch, first, size, rest, number - rest + size * n_tiles)


@gluon.jit
def last_seen(batch, p, C: gl.constexpr):
    """The last tile of rows that sees something, of a batch element of the row intervals; -1 where none does."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_tiles = n_row_tiles(p, C)
    summary = p.summary_ptr + batch * n_tiles * CARD
    found = -1
    end = n_tiles
    while (end > 0) & (found < 0):
        tile = end - 1 - gl.arange(0, 32, LANES)
        last = gl.load(summary + (tile * CARD + LAST), mask=tile >= 0, other=0)
        found = gl.max(gl.where(last > 0, tile, -1), 0)
        end -= 32
    return found


@gluon.jit
def publish_seen(row_tile, section, tiles, slot, p, C: gl.constexpr):
    """The same as :func:`publish` for INTERVALS; ``n_blocks`` of the tile that is returned is 0 where no row sees
    anything. All fields of the card are written at once: one by one, some would be loaded only when others are written,
    each at the latency of the L2 cache."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    head = section.head + section.rest % section.size
    first_row = row_tile * (C.consumers * 64)
    field = gl.arange(0, CARD, LANES)
    summary = p.summary_ptr + (section.batch * p.intervals_batch * n_row_tiles(p, C) + row_tile) * CARD
    numbers = gl.load(summary + field)
    numbers = gl.where(field == ROW, first_row, numbers)
    numbers = gl.where(field == BATCH, section.batch, numbers)
    numbers = gl.where(field == HEAD, head, numbers)
    cards = tiles._reinterpret(gl.int32, [RING, CARD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    cards.index(slot).store(numbers)
    at = slot * CARD
    n_blocks = gl.where(read(tiles, at + LAST, 1) > 0, read(tiles, at + N_BLOCKS, 1), 0)
    n_end, n_begin, first = read(tiles, at + N_END, 1), read(tiles, at + N_BEGIN, 1), read(tiles, at + FIRST, 1)
    return Tile(first_row, section.batch, head, n_blocks, n_end, n_begin, first, 0, 0)


@gluon.jit
def listed_heads(p):
    """To how many heads the tiles of one batch element of the row intervals belong."""
    heads = p.n_heads_total
    if p.intervals_batch > 0:
        heads = p.nheads
    return heads


@gluon.jit
def find_group(number, heads, p):
    """The group of tile ``number``, which there is."""
    entry = p.summary_ptr + (1 + number // heads) * LISTED  # of a tile of the group, not that of the number
    first, size, most = gl.load(entry + GROUP_FIRST), gl.load(entry + GROUP_SIZE), gl.load(entry + GROUP_MOST)
    # Key heads that share the cache, rounded so that sections are of even size.
    key_heads = heads // p.group
    fitting = max(p.section // max(most, 1), 1)
    n_sections = max((key_heads + fitting // 2) // fitting, 1)
    section = (key_heads + n_sections - 1) // n_sections * p.group
    return Group(first, size, section, (first + size) * heads)


@gluon.jit
def listed_place(number, group, heads, p):
    """``(entry, batch, head)`` of tile ``number``, which is one of ``group``: where it is listed, what is to be added
    to the entry's batch element, and its head."""
    rest = number - group.first * heads
    part = rest // (group.section * group.size)
    rest -= part * (group.section * group.size)
    head = part * group.section
    width = min(group.section, heads - head)
    head += rest % width
    return 1 + group.first + rest // width, head // p.nheads, head % p.nheads


@gluon.jit
def publish_listed(number, group, heads, tiles, slot, p):
    """Fill a card with tile ``number``, which is one of ``group``. All fields at once: one by one, some would be loaded
    only when others are written, each at the latency of the L2 cache."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    field = gl.arange(0, CARD, layout)
    entry, batch, head = listed_place(number, group, heads, p)
    numbers = gl.load(p.summary_ptr + entry * LISTED + field)
    numbers = gl.where(field == BATCH, numbers + batch, numbers)
    numbers = gl.where(field == HEAD, head, numbers)
    cards = tiles._reinterpret(gl.int32, [RING, CARD], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    cards.index(slot).store(numbers)


@gluon.jit
def empty_tile(number, n_units, heads, p):
    """``(first row, batch, head)`` of one of the tiles that see nothing. They stand at the end of the list."""
    entry = p.summary_ptr + (n_units - number // heads) * LISTED
    head = gl.load(entry + BATCH) * heads + number % heads  # counted through all batch elements
    return gl.load(entry + ROW), head // p.nheads, head % p.nheads


@gluon.jit
def take_card(tiles, slot, W: gl.constexpr, WARPS: gl.constexpr, C: gl.constexpr):
    """The tile on a card, with the keys that warpgroup W's rows all see. ``n_blocks`` is -1 after the last tile."""
    at = slot * CARD
    n_blocks, first_row = read(tiles, at + N_BLOCKS, WARPS), read(tiles, at + ROW, WARPS)
    batch, head = read(tiles, at + BATCH, WARPS), read(tiles, at + HEAD, WARPS)
    n_end, n_begin, first, whole_first, whole_last = 0, 0, 0, 0, 0
    if C.mode >= WINDOW:
        n_end, n_begin = read(tiles, at + N_END, WARPS), read(tiles, at + N_BEGIN, WARPS)
        first = read(tiles, at + FIRST, WARPS)
    if C.mode == INTERVALS:
        whole_first = read(tiles, at + (WHOLE + 2 * W), WARPS)
        whole_last = read(tiles, at + (WHOLE + 2 * W + 1), WARPS)
    if C.parts:
        first = read(tiles, at + FIRST, WARPS)
    return Tile(first_row, batch, head, n_blocks, n_end, n_begin, first, whole_first, whole_last)


@gluon.jit
def block_key(step, tile, C: gl.constexpr):
    """The first key of the block that comes at ``step``."""
    block = tile.n_blocks - 1 - step
    if C.mode >= WINDOW:
        if step >= tile.n_end:
            block += tile.n_begin
            if step < tile.n_end + tile.n_begin:
                block = step - tile.n_end
        return tile.first_key + block * C.block_n
    elif C.parts:
        return tile.first_key + block * C.block_n
    else:
        return block * C.block_n


@gluon.jit
def leading_hidden(tile, p, W: gl.constexpr, C: gl.constexpr):
    """How many leading blocks of a causal tile warpgroup W leaves out, since they are hidden from all its rows."""
    end = tile.first_row + (W * 64 + 64) + p.offset
    return max(tile.n_blocks - (end + (C.block_n - 1)) // C.block_n, 0)


@gluon.jit
def row_bounds(tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """The keys [start, end) of warpgroup W's rows, for INTERVALS."""
    rows = tile.first_row + W * 64 + gl.arange(0, 64, LAYOUT)
    n_rows = n_row_tiles(p, C) * (C.consumers * 64)
    at = p.bounds_ptr + (tile.batch * p.intervals_batch * n_rows + rows) * 2
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def window_bounds(tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """The same for WINDOW. Computed anew for each block: registers that need not live through the loop."""
    diagonal = tile.first_row + W * 64 + gl.arange(0, 64, LAYOUT) + p.offset
    return opaque(diagonal - p.window_left), opaque(gl.minimum(diagonal + (p.window_right + 1), p.seqlen_k))


@gluon.jit
def _column(bounds, copied, at, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Rows' ``bounds`` (their first keys, or ends) as a column; from shared memory at ``at`` if they were copied."""
    if C.copied:
        return copied.index(at).load(gl.SliceLayout(1, LAYOUT))[:, None]
    else:
        return bounds[:, None]


@gluon.jit
def hide_outside(
    scores, first_key, start, end, copied, at, tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """Scores of keys outside the rows' bounds to -inf, for WINDOW and INTERVALS. ``copied, at``: where these lie in
    shared memory, with ``copied``; else ``start, end``. Bounds computed before the scores are there spill a tenth of
    what :func:`hide` does; most blocks cross one side only, and are spared the other's test."""
    late, early = hidden_sides(first_key, tile, p, W, C)
    if late:
        group, rest = _groups(_column(end, copied, at + 1, LAYOUT, C) - first_key, LAYOUT, C.block_n)
        scores = gl.where(group < rest, scores, float("-inf"))
    if early:
        group, rest = _groups(_column(start, copied, at, LAYOUT, C) - first_key, LAYOUT, C.block_n)
        scores = gl.where(group >= rest, scores, float("-inf"))
    return scores


@gluon.jit
def hide(scores, first_key, tile, start, end, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Scores of hidden keys to -inf, whatever NaN the memory of those keys made of them. ``start, end`` are the rows'
    bounds, for INTERVALS."""
    keys = first_key + gl.arange(0, C.block_n, gl.SliceLayout(0, LAYOUT))
    if C.mode == TAIL:
        visible = (keys < p.seqlen_k)[None, :]
    elif C.mode == CAUSAL:
        diagonal = tile.first_row + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)) + p.offset
        group, rest = _groups(diagonal[:, None] - first_key, LAYOUT, C.block_n)
        visible = group <= rest
    else:
        if C.mode == WINDOW:
            start, end = window_bounds(tile, p, W, gl.SliceLayout(1, LAYOUT), C)
        visible = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def hidden_sides(first_key, tile, p, W: gl.constexpr, C: gl.constexpr):
    """Whether a block holds keys behind the end of some of W's rows, and keys before the start of some, for WINDOW and
    INTERVALS; see :func:`needs_hiding`."""
    if C.mode == WINDOW:
        low = tile.first_row + W * 64 + p.offset
        late = first_key + C.block_n > min(low + (p.window_right + 1), p.seqlen_k)
        return late, first_key < low + 63 - p.window_left
    else:
        return first_key + C.block_n > tile.whole_last, first_key < tile.whole_first


@gluon.jit
def needs_hiding(first_key, tile, p, W: gl.constexpr, C: gl.constexpr):
    """Whether a block holds keys hidden from some of W's rows.

    For row intervals "yes" may stand for "that is not known" (of a tile that was looked up), and rows that see nothing
    do not count: see :func:`forward._finish`.

    Worth a branch, and the branch keeps ptxas from turning the mask into bit sets ahead of the wait for the scores
    (390 instead of 165 instructions).
    """
    if C.mode == TAIL:
        return first_key + C.block_n > p.seqlen_k
    elif C.mode == CAUSAL:
        return first_key + C.block_n > tile.first_row + (W * 64 + 1) + p.offset
    else:
        late, early = hidden_sides(first_key, tile, p, W, C)
        return late | early
