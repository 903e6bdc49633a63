"""The forward kernel: a persistent program on each multiprocessor, whose warps have different jobs.

``_claim_and_load_k`` (one warp) takes tiles of query rows from a counter, publishes each on a card, and streams K;
``_load_q`` and ``_load_v`` (one warp each) load Q and stream V; ``_consume`` (two or three warpgroups of 64 rows each)
computes; ``_store`` (one warp) sends O, which consumers leave where the tile's Q lay. They meet at mbarriers in shared
memory (:class:`Shared`). Tiles of row intervals that see nothing are left out: ``_store`` writes the program's share of
them.

A consumer's slot overlaps the softmax of one block of keys with the product of the previous one's weights and V::

    slot i:   S(i) = Q K(i)^T  |  O += P(i-1) V(i-1)        both started
              P(i) = softmax(S(i))                          while the second is running
              wait for O, scale it if some row's maximum has grown by much, free K(i) and V(i-1)

With more than one Q buffer the first S of the next tile shares a slot with the last P V of this one; otherwise a tile
is finished first. ``count`` counts slots through all tiles: blocks of keys and their barriers are numbered by it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .primitives import (
    LN2,
    LOG2E,
    finish_claim,
    give_turn,
    opaque,
    pack,
    rescale,
    retire,
    softmax_step,
    start_claim,
    take_turn,
    tanh,
    tanh_approx,
    unpack,
    write_zeros,
)
from .schedule import (
    CARD,
    CAUSAL,
    FULL,
    GAPS,
    INTERVALS,
    LAST,
    N_BLOCKS,
    RING,
    SOME_EMPTY,
    WINDOW,
    Problem,
    block_key,
    empty_tile,
    find_group,
    find_section,
    hide,
    hide_outside,
    last_seen,
    leading_hidden,
    listed_heads,
    n_row_tiles,
    needs_hiding,
    publish,
    publish_listed,
    publish_seen,
    read,
    row_bounds,
    take_card,
    window_bounds,
    write,
)

#: A tile is claimed when so many blocks of K of the one before are still to be loaded: who claims early takes a tile
#: from those who finish before. The answer takes 1900 to 4300 cycles, a block about 2500; one to three are as good.
LATE = gl.constexpr(2)

#: The copies through tensor descriptors, under the names that Triton 3.6 and later versions give them.
tma_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
tma_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


class Shared(NamedTuple):
    """Shared memory: buffers and barriers. A barrier's phase is told from how often its buffer was used before."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    out: gl.tensor
    tiles: gl.tensor  # cards
    bounds: gl.tensor  # by Q's buffer and warpgroup, rows' first keys, then their ends; with ``listed``
    tile_full: gl.tensor  # by card; they are not waited for to be empty (see schedule.RING)
    q_empty: gl.tensor
    q_full: gl.tensor
    out_full: gl.tensor
    k_full: gl.tensor
    v_full: gl.tensor
    v_raw: gl.tensor  # a V that has to be cleaned has arrived
    k_done: gl.tensor  # no warpgroup needs K(i) any more
    slot_done: gl.tensor  # nor V(i-1); the same barriers as k_done unless K is freed first


@gluon.jit
def _wait(barriers, n, STAGES: gl.constexpr):
    """Wait for use ``n`` of a ring of barriers."""
    mbarrier.wait(barriers.index(n % STAGES), (n // STAGES) & 1)


@gluon.constexpr_function
def slots(C):
    """The length of the ring ``slot_done``."""
    return C.v_stages if C.free_k_first else C.k_stages


@gluon.jit
def _free_k(sm, count, skipped, C: gl.constexpr):
    """K is not needed any more, ``skipped`` blocks from ``count`` on and the next one, if that is told apart."""
    if C.free_k_first:
        mbarrier.arrive(sm.k_done.index((count + skipped) % C.k_stages), count=1)
        if C.mode == CAUSAL and C.consumers * 64 > C.block_n and skipped > 0:
            mbarrier.arrive(sm.k_done.index(count % C.k_stages), count=1)


@gluon.jit
def _wait_tile(sm, t, W: gl.constexpr, C: gl.constexpr):
    """Wait for the Q of the program's t-th tile for warpgroup W, and with it for the card."""
    mbarrier.wait(sm.q_full.index((t % C.q_buffers) * C.consumers + W), (t // C.q_buffers) & 1)


@gluon.jit
def _card(sm, t, W: gl.constexpr, WARPS: gl.constexpr, C: gl.constexpr):
    """The program's t-th tile, which is published."""
    return take_card(sm.tiles, t % RING, W, WARPS, C)


@gluon.jit
def _await_card(sm, t, C: gl.constexpr):
    """The program's t-th tile once it is published, for one of the warps that load and store."""
    _wait(sm.tile_full, t, RING)
    return _card(sm, t, 0, 1, C)


@gluon.jit
def _write_nothing(first_row, batch, head, p, C: gl.constexpr):
    """O and log-sum-exp of a tile whose rows see no keys, written by one warp."""
    BLOCK_M: gl.constexpr = C.consumers * 64
    PIECES: gl.constexpr = C.v_dim // 8  # of a row, 16 bytes each
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # A piece for each thread at a time, from few numbers: the warp that stores O does this on the side.
    ROWS: gl.constexpr = 32 // PIECES
    piece = gl.arange(0, 32, flat)
    column = piece % PIECES * 8
    row = first_row + piece // PIECES
    at = ((batch.to(gl.int64) * p.seqlen_q + row) * p.nheads + head) * p.v_head_dim + column
    step = (p.nheads * p.v_head_dim).to(gl.int64) * ROWS
    end = gl.where(column < p.v_head_dim, p.seqlen_q, 0)
    for _ in range(BLOCK_M // ROWS // 8):
        for _ in gl.static_range(8):
            write_zeros(p.out_ptr + at, row < end)
            at += step
            row += ROWS
    value = float("-inf")
    if C.sinks:
        value = gl.load(p.sinks_ptr + head * p.sinks_stride).to(gl.float32)
    base = p.lse_ptr + (batch * p.nheads + head).to(gl.int64) * p.seqlen_q
    for part in range(BLOCK_M // 32):
        row = first_row + part * 32 + gl.arange(0, 32, flat)
        gl.store(base + row, gl.full([32], value, gl.float32, flat), mask=row < p.seqlen_q)


@gluon.jit
def _write_unseen(number, p, COUNT: gl.constexpr, C: gl.constexpr):
    """Of the tiles ``number``, ``number + n``, ... (COUNT, up to 32; there are n programs) write those that see
    nothing. Returns the number that comes next."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n_tiles = n_row_tiles(p, C)
    n_programs = gl.num_programs(0)
    lane = gl.arange(0, 32, LANES)
    mine = number + lane * n_programs
    units = mine // p.nheads
    summary = (units // n_tiles * p.intervals_batch * n_tiles + units % n_tiles) * CARD
    inside = (lane < COUNT) & (mine < n_tiles * p.n_heads_total)
    unseen = gl.load(p.summary_ptr + (summary + LAST), mask=inside, other=1) == 0
    bits = gl.sum(gl.where(unseen, 1 << lane, 0), 0)
    for _ in range(COUNT):
        if bits & 1 != 0:
            unit = number // p.nheads  # a row tile, counted through all batch elements
            _write_nothing(unit % n_tiles * (C.consumers * 64), unit // n_tiles, number % p.nheads, p, C)
        bits = bits >> 1
        number += n_programs
    return number


@gluon.jit
def _write_empty_tiles(number, end, n_units, heads, p, C: gl.constexpr):
    """Write every n-th of the tiles that see nothing, from ``number`` to ``end``; there are n programs. Returns the
    number of the next."""
    while number < end:
        first_row, batch, head = empty_tile(number, n_units, heads, p)
        _write_nothing(first_row, batch, head, p, C)
        number += gl.num_programs(0)
    return number


@gluon.jit
def _stream_k(k_desc, sm, tile, begin, end, count, p, C: gl.constexpr):
    """Load the K of a tile's blocks ``begin`` to ``end``; the first is ``count`` of the program's."""
    BYTES: gl.constexpr = k_desc.dtype.primitive_bitwidth // 8 * C.chunk_dim
    CHUNKS: gl.constexpr = C.chunks
    for i in range(begin, end):
        mbarrier.wait(sm.k_done.index(count % C.k_stages), ((count // C.k_stages) & 1) ^ 1)
        full = sm.k_full.index(count % C.k_stages)
        mbarrier.expect(full, C.block_n * BYTES * C.chunks)
        key = block_key(i, tile, C)
        for c in gl.static_range(CHUNKS):
            tma_load(
                k_desc,
                [tile.batch, key, tile.head // p.group, c * C.chunk_dim],
                full,
                sm.k.index(count % C.k_stages * C.chunks + c),
            )
        count += 1
    return count


@gluon.jit
def _stream_and_claim(k_desc, counter_ptr, sm, tile, count, p, C: gl.constexpr):
    """Load the K of a tile, and claim the next one when all but LATE blocks are under way. Returns how many K, and
    the claim."""
    early = max(tile.n_blocks - LATE, 0)
    count = _stream_k(k_desc, sm, tile, 0, early, count, p, C)
    claimed = start_claim(counter_ptr)
    return _stream_k(k_desc, sm, tile, early, tile.n_blocks, count, p, C), claimed


@gluon.jit
def _claim_numbered(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """Claim tiles, publish them, stream K. Returns how many K."""
    total = n_row_tiles(p, C) * p.n_heads_total
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    while number < total:
        tile = publish(number, sm.tiles, t % RING, p, C)
        mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
        t += 1
        count, claimed = _stream_and_claim(k_desc, counter_ptr, sm, tile, count, p, C)
        number = finish_claim(claimed) + n_programs
    write(sm.tiles, (t % RING) * CARD + N_BLOCKS, -1)
    mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
    return count


@gluon.jit
def _claim_seen(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """The same for row intervals, but for tiles that see nothing, which ``_store`` writes. Of a section, those behind
    the last one that sees something come last, and all programs leave them out together."""
    # Numbers of its own: what LLVM sees computed in several roles it computes before they part, and keeps in registers
    # that the warps which compute then lack.
    own = Problem(
        opaque(p.seqlen_q), p.seqlen_k, p.offset, opaque(p.nheads), p.group, opaque(p.n_heads_total), opaque(p.section),
        p.window_left, p.window_right, p.bounds_ptr, p.summary_ptr, opaque(p.intervals_batch), p.sinks_ptr,
        p.sinks_stride, p.out_ptr, opaque(p.v_head_dim), p.lse_ptr, p.factor, p.cap_factor,
    )  # fmt: skip
    total = n_row_tiles(own, C) * own.n_heads_total
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    known = -1
    top = 0
    while number < total:
        section = find_section(number, own, C)
        if section.batch * own.intervals_batch != known:
            known = section.batch * own.intervals_batch
            top = last_seen(known, own, C)
        row_tile = top - section.rest // section.size
        if row_tile < 0:
            gl.atomic_max(counter_ptr, section.end - n_programs)
            claimed = start_claim(counter_ptr)
        else:
            tile = publish_seen(row_tile, section, sm.tiles, t % RING, own, C)
            if tile.n_blocks > 0:
                mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
                t += 1
            count, claimed = _stream_and_claim(k_desc, counter_ptr, sm, tile, count, p, C)
        number = finish_claim(claimed) + n_programs
    write(sm.tiles, (t % RING) * CARD + N_BLOCKS, -1)
    mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
    return count


@gluon.jit
def _publish_listed(number, total, group, heads, sm, t, p):
    """Publish tile ``number`` as the program's t-th, or that there are no more. Returns its group."""
    if number < total:
        if number >= group.end:
            group = find_group(number, heads, p)
        publish_listed(number, group, heads, sm.tiles, t % RING, p)
    else:
        write(sm.tiles, (t % RING) * CARD + N_BLOCKS, -1)
    mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
    return group


@gluon.jit
def _claim_listed(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """The same among those that see something. Each is published when the first K of the one before is under way."""
    heads = listed_heads(p)
    total = gl.load(p.summary_ptr) * heads
    group = find_group(gl.program_id(0), heads, p)  # at once, not when the total has come
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    group = _publish_listed(gl.program_id(0), total, group, heads, sm, 0, p)
    tile = _card(sm, 0, 0, 1, C)
    while tile.n_blocks >= 0:
        claimed = start_claim(counter_ptr)  # the answer comes while K is loaded
        count = _stream_k(k_desc, sm, tile, 0, 1, count, p, C)
        t += 1
        group = _publish_listed(finish_claim(claimed) + n_programs, total, group, heads, sm, t, p)
        count = _stream_k(k_desc, sm, tile, 1, tile.n_blocks, count, p, C)
        tile = _card(sm, t, 0, 1, C)
    return count


@gluon.jit
def _claim_and_load_k(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """One warp: claims tiles, publishes them, streams K."""
    if C.listed:
        count = _claim_listed(k_desc, counter_ptr, sm, p, C)
    elif C.mode == INTERVALS:
        count = _claim_seen(k_desc, counter_ptr, sm, p, C)
    else:
        count = _claim_numbered(k_desc, counter_ptr, sm, p, C)
    if C.q_buffers > 1:
        # Every slot waits for the K of the next one; this stands for the K after the last.
        mbarrier.wait(sm.k_done.index(count % C.k_stages), ((count // C.k_stages) & 1) ^ 1)
        mbarrier.arrive(sm.k_full.index(count % C.k_stages), count=1)
    # The last program leaves both counters at zero for the next launch.
    done = gl.atomic_add(counter_ptr + 1, 1)
    if done == gl.num_programs(0) - 1:
        gl.atomic_xchg(counter_ptr, 0)
        gl.atomic_xchg(counter_ptr + 1, 0)


@gluon.jit
def _load_q(q_desc, sm, p, C: gl.constexpr):
    """One warp: loads the Q of each tile, for each warpgroup as soon as the O in its place is sent."""
    BYTES: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8 * C.chunk_dim
    CONSUMERS: gl.constexpr = C.consumers
    CHUNKS: gl.constexpr = C.chunks
    BOUNDS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    t = 0
    tile = _await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        for w in gl.static_range(CONSUMERS):
            buffer = (t % C.q_buffers) * C.consumers + w
            mbarrier.wait(sm.q_empty.index(buffer), ((t // C.q_buffers) & 1) ^ 1)
            full = sm.q_full.index(buffer)
            mbarrier.expect(full, 64 * BYTES * C.chunks)
            for c in gl.static_range(CHUNKS):
                row = tile.first_row + w * 64
                tma_load(q_desc, [tile.batch, row, tile.head, c * C.chunk_dim], full, sm.q.index(buffer * C.chunks + c))
        if C.listed:
            for w in gl.static_range(CONSUMERS):
                buffer = (t % C.q_buffers) * C.consumers + w
                start, end = row_bounds(tile, p, w, BOUNDS, C)
                sm.bounds.index(2 * buffer).store(start)
                sm.bounds.index(2 * buffer + 1).store(end)
                mbarrier.arrive(sm.q_full.index(buffer), count=1)
        t += 1
        tile = _await_card(sm, t, C)
    # Consumers wait for a Q, then look at the card: also at the one that says there are no more.
    for w in gl.static_range(CONSUMERS):
        buffer = (t % C.q_buffers) * C.consumers + w
        mbarrier.wait(sm.q_empty.index(buffer), ((t // C.q_buffers) & 1) ^ 1)
        mbarrier.arrive(sm.q_full.index(buffer), count=1)
        if C.listed:
            mbarrier.arrive(sm.q_full.index(buffer), count=1)


@gluon.jit
def _clean_v(v_rows, stage, first_key, last, tile, gaps, p, C: gl.constexpr):
    """Zero the rows of a V block that no row of the tile sees: their memory may hold NaN, and 0 * NaN is NaN.

    ``v_rows`` is V's memory in pieces of 8 rows by 64 columns, which are contiguous; in a block, pieces of the same
    columns follow one another. Without gaps the tile sees all keys before ``last``; with gaps every row is asked.
    """
    GROUPS: gl.constexpr = C.block_n // 8
    PANELS: gl.constexpr = C.v_dim // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    asking: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    BLOCK_M: gl.constexpr = C.consumers * 64
    bounds = p.bounds_ptr + (tile.batch * p.intervals_batch * n_row_tiles(p, C) * BLOCK_M + tile.first_row) * 2
    begin = max(last - first_key, 0) // 8  # the first group of 8 keys that is not seen whole
    if gaps > 0:
        begin = 0
    for group in range(begin, GROUPS):
        key = first_key + group * 8
        if gaps > 0:
            keys = key + gl.arange(0, 8, gl.SliceLayout(0, asking))
            seen = gl.full([8], 0, gl.int32, gl.SliceLayout(0, asking))
            for part in range(BLOCK_M // 32):
                at = bounds + (part * 32 + gl.arange(0, 32, gl.SliceLayout(1, asking))) * 2
                start, end = gl.load(at), gl.load(at + 1)
                inside = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
                seen = gl.maximum(seen, gl.max(inside.to(gl.int32), 0))
            keep = gl.convert_layout(seen, gl.SliceLayout(1, layout)) > 0
        else:
            keep = key + gl.arange(0, 8, gl.SliceLayout(1, layout)) < last
        for panel in gl.static_range(PANELS):
            piece = v_rows.index((stage * PANELS + panel) * GROUPS + group)
            old = piece.load(layout)
            piece.store(gl.where(keep[:, None], old, 0.0))
    fence_async_shared()


@gluon.jit
def _load_v(v_desc, sm, p, C: gl.constexpr, PIECE: gl.constexpr):
    """One warp: streams V. V(i) may go in once slot i - v_stages + 1 is over, which read V(i - v_stages)."""
    BYTES: gl.constexpr = v_desc.dtype.primitive_bitwidth // 8 * C.block_n * C.v_dim
    if C.mode == INTERVALS:
        v_rows = sm.v._reinterpret(v_desc.dtype, [C.v_stages * C.block_n * C.v_dim // 512, 8, 64], PIECE)
    count = 0
    cleaned = 0
    t = 0
    tile = _await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        if C.mode == INTERVALS:
            last = read(sm.tiles, (t % RING) * CARD + LAST, 1)
            gaps = read(sm.tiles, (t % RING) * CARD + GAPS, 1)
        for i in range(tile.n_blocks):
            freed = count - C.v_stages + 1
            if freed >= 0:
                _wait(sm.slot_done, freed, slots(C))
            stage = count % C.v_stages
            full = sm.v_full.index(stage)
            key = block_key(i, tile, C)
            where = [tile.batch, key, tile.head // p.group, 0]
            if C.mode == INTERVALS:
                if (key + C.block_n > last) | ((gaps > 0) & (i < tile.n_end + tile.n_begin)):
                    mbarrier.expect(sm.v_raw.index(0), BYTES)
                    tma_load(v_desc, where, sm.v_raw.index(0), sm.v.index(stage))
                    mbarrier.wait(sm.v_raw.index(0), cleaned & 1)
                    _clean_v(v_rows, stage, key, last, tile, gaps, p, C)
                    mbarrier.arrive(full, count=1)
                    cleaned += 1
                else:
                    mbarrier.expect(full, BYTES)
                    tma_load(v_desc, where, full, sm.v.index(stage))
            else:
                mbarrier.expect(full, BYTES)
                tma_load(v_desc, where, full, sm.v.index(stage))
            count += 1
        t += 1
        tile = _await_card(sm, t, C)


@gluon.jit
def _store(out_desc, sm, p, C: gl.constexpr):
    """One warp: sends each finished O, then frees the buffer for the next Q. With row intervals it looks for tiles that
    see nothing, some while each tile is computed, so that their bytes go out beside all products, and writes them."""
    CONSUMERS: gl.constexpr = C.consumers
    if C.listed:
        heads = listed_heads(p)
        n_units = n_row_tiles(p, C) * (p.n_heads_total // heads)
        n_seen = gl.load(p.summary_ptr)
        n_empty = (n_units - n_seen) * heads
        share = (n_units - 1) // max(n_seen, 1) * gl.num_programs(0)  # beside a tile: not fewer than there are to one
        empty = gl.program_id(0)
    elif C.mode == INTERVALS:
        own = Problem(  # see _claim_seen
            opaque(p.seqlen_q), p.seqlen_k, p.offset, opaque(p.nheads), p.group, opaque(p.n_heads_total),
            opaque(p.section), p.window_left, p.window_right, p.bounds_ptr, p.summary_ptr, opaque(p.intervals_batch),
            p.sinks_ptr, p.sinks_stride, p.out_ptr, opaque(p.v_head_dim), p.lse_ptr, p.factor, p.cap_factor,
        )  # fmt: skip
        total = n_row_tiles(own, C) * own.n_heads_total
        empty = gl.program_id(0)
    t = 0
    tile = _await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        buffer = t % C.q_buffers
        if C.listed:
            empty = _write_empty_tiles(empty, min(empty + share, n_empty), n_units, heads, p, C)
        elif C.mode == INTERVALS:  # noqa: SIM102 (one condition is the compiler's)
            if empty < total:
                empty = _write_unseen(empty, own, 8, C)
        for w in gl.static_range(CONSUMERS):
            at = buffer * C.consumers + w
            mbarrier.wait(sm.out_full.index(at), (t // C.q_buffers) & 1)
            row = tile.first_row + w * 64
            if row < p.seqlen_q:
                tma_store(out_desc, [tile.batch, row, tile.head, 0], sm.out.index(at * C.out_step))
        tma.store_wait(0)
        for w in gl.static_range(CONSUMERS):
            mbarrier.arrive(sm.q_empty.index(buffer * C.consumers + w), count=1)
        t += 1
        tile = _await_card(sm, t, C)
    if C.listed:
        _write_empty_tiles(empty, n_empty, n_units, heads, p, C)
    elif C.mode == INTERVALS:
        while empty < total:
            empty = _write_unseen(empty, own, 32, C)


@gluon.jit
def _start_scores(sm, t, count, zeros, W: gl.constexpr, C: gl.constexpr):
    """Start ``Q K(count)^T`` of the program's t-th tile."""
    CHUNKS: gl.constexpr = C.chunks
    q_at = ((t % C.q_buffers) * C.consumers + W) * C.chunks
    k_at = count % C.k_stages * C.chunks
    q = sm.q.index(q_at).reshape([64, C.chunk_dim])
    k = sm.k.index(k_at).reshape([C.block_n, C.chunk_dim])
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    for c in gl.static_range(1, CHUNKS):
        q = sm.q.index(q_at + c).reshape([64, C.chunk_dim])
        k = sm.k.index(k_at + c).reshape([C.block_n, C.chunk_dim])
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _start_values(acc, pairs, sm, count, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Start ``acc += P V(count)``."""
    weights = unpack(pairs, C.block_n, sm.v.dtype, LAYOUT)
    v = sm.v.index(count % C.v_stages).reshape([C.block_n, C.v_dim])
    return warpgroup_mma(weights, v, acc, is_async=True)


@gluon.jit
def _capped(scores, p, DTYPE: gl.constexpr, C: gl.constexpr):
    if C.softcap:
        # Three instructions of the special function unit a score (this tanh, and the weight) take longer than the
        # products do; two do not. Not for float16, whose own rounding is finer than the approximation.
        if DTYPE.is_bf16():
            scores = tanh_approx(scores * p.cap_factor)
        else:
            scores = tanh(scores * p.cap_factor)
    return scores


@gluon.jit
def _start_softmax(tile, p, LAYOUT: gl.constexpr, C: gl.constexpr):
    """``(top, total)`` of a tile's rows before the first key: nothing, or the head's sink."""
    if C.sinks:
        sink = gl.load(p.sinks_ptr + tile.head * p.sinks_stride).to(gl.float32) * LOG2E
        weight = gl.where(sink == float("-inf"), 0.0, 1.0)
        return gl.full([64], sink, gl.float32, LAYOUT), gl.full([64], weight, gl.float32, LAYOUT)
    else:
        return gl.full([64], float("-inf"), gl.float32, LAYOUT), gl.full([64], 0.0, gl.float32, LAYOUT)


@gluon.jit
def _first_total(weights, total, decay, C: gl.constexpr):
    sums = gl.sum(weights, 1)
    if C.sinks:
        sums += total * decay
    return sums


@gluon.jit
def _bounds_at(t, W: gl.constexpr, C: gl.constexpr):
    """Where the first keys of W's rows lie, of the program's t-th tile; their ends follow."""
    return ((t % C.q_buffers) * C.consumers + W) * 2


@gluon.jit
def _finish(acc, top, total, sm, t, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """O to shared memory, for the warp that stores, and the log-sum-exp to global memory.

    Rows that see nothing, in tiles where others do, have taken part unmasked (one of them would else make its tile mask
    all blocks): what they came to is replaced here, NaN and all.
    """
    tile = _card(sm, t, W, 4, C)  # once more, instead of registers that live through the loop
    ROWS: gl.constexpr = top.type.layout
    weight = total
    if C.mode == INTERVALS:
        some_empty = read(sm.tiles, (t % RING) * CARD + SOME_EMPTY, 4)
        if some_empty > 0:
            if C.listed:
                at = _bounds_at(t, W, C)
                row_start, row_end = sm.bounds.index(at).load(ROWS), sm.bounds.index(at + 1).load(ROWS)
            else:
                row_start, row_end = row_bounds(tile, p, W, ROWS, C)
            empty = row_end <= row_start
            no_top, no_total = _start_softmax(tile, p, ROWS, C)
            top, total = gl.where(empty, no_top, top), gl.where(empty, no_total, total)
            weight = gl.where(empty, 0.0, weight)
    out_total = gl.convert_layout(weight, LAYOUT)[:, None]
    if C.mode >= WINDOW:
        out = gl.where(out_total == 0.0, 0.0, acc * (1.0 / out_total))
    else:
        out = acc * (1.0 / out_total)
    at = (t % C.q_buffers) * C.consumers + W
    sm.out.index(at * C.out_step).reshape([64, C.v_dim]).store(out.to(sm.v.dtype))
    fence_async_shared()
    mbarrier.arrive(sm.out_full.index(at), count=1)
    row = tile.first_row + W * 64
    if row < p.seqlen_q:
        rows = row + gl.arange(0, 64, ROWS)
        lse = (top + gl.log2(total)) * LN2
        base = p.lse_ptr + (tile.batch * p.nheads + tile.head).to(gl.int64) * p.seqlen_q
        gl.store(base + rows, lse, mask=rows < p.seqlen_q)


@gluon.jit
def _bounds(tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """The bounds of W's rows, for WINDOW and INTERVALS. Found while S is computed, for each block that may need
    masking: carried along they cost registers in the blocks that do not. With ``listed`` they are read where they are
    needed (``schedule.hide_outside``)."""
    if C.mode == INTERVALS and not C.listed:
        return row_bounds(tile, p, W, LAYOUT, C)
    elif C.mode == WINDOW:
        return window_bounds(tile, p, W, LAYOUT, C)
    else:
        return 0, 0


@gluon.jit
def _hidden(
    scores, step, sm, t, tile, row_start, row_end, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """The scores of the block at ``step``, those of hidden keys -inf."""
    first_key = block_key(step, tile, C)
    if C.mode >= WINDOW:
        at = _bounds_at(t, W, C)
        scores = hide_outside(scores, first_key, row_start, row_end, sm.bounds, at, tile, p, W, LAYOUT, C)
    else:
        if needs_hiding(first_key, tile, p, W, C):
            scores = hide(scores, first_key, tile, row_start, row_end, p, W, LAYOUT, C)
    return scores


@gluon.jit
def _slots(
    acc, pairs, top, total, sm, t, count, begin, end, tile, zeros, p,
    HIDE: gl.constexpr, W: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, O_ROWS: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """The blocks ``begin`` to ``end`` of a tile, a slot each; HIDE: some rows do not see all of them."""
    for step in range(begin, end):
        if C.q_buffers == 1:
            _wait(sm.k_full, count, C.k_stages)
            _wait(sm.v_full, count - 1, C.v_stages)
        take_turn(W, C)
        next_scores = _start_scores(sm, t, count, zeros, W, C)
        next_acc = _start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)
        give_turn(W, C)
        if HIDE:
            row_start, row_end = _bounds(tile, p, W, gl.SliceLayout(1, S_LAYOUT), C)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        _free_k(sm, count, 0, C)
        scores = _capped(scores, p, sm.v.dtype, C)
        if HIDE:
            scores = _hidden(scores, step, sm, t, tile, row_start, row_end, p, W, S_LAYOUT, C)
        top, decay, weights = softmax_step(scores, top, p.factor, HIDE)
        total = total * decay + gl.sum(weights, 1)
        # A wait with a branch must stand here: ptxas otherwise hoists warpgroup_mma_wait over the exponentials.
        if C.early_free or C.q_buffers == 1:
            _wait(sm.k_full, count, C.k_stages)  # long over
        else:
            _wait(sm.k_full, count + 1, C.k_stages)
            _wait(sm.v_full, count, C.v_stages)
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
        pairs = pack(weights, C.block_n, sm.v.dtype)
        acc = rescale(acc, gl.convert_layout(decay, O_ROWS)[:, None])
        count += 1
        if C.early_free and C.q_buffers > 1:
            _wait(sm.k_full, count, C.k_stages)
            _wait(sm.v_full, count - 1, C.v_stages)
    return acc, pairs, top, total, count


@gluon.jit
def _all_slots(
    acc, pairs, top, total, sm, t, count, begin, tile, zeros, p,
    W: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, O_ROWS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile from ``begin`` on; those that need masking come first."""
    if C.mode >= WINDOW:
        n_hidden = tile.n_end + tile.n_begin
        acc, pairs, top, total, count = _slots(
            acc, pairs, top, total, sm, t, count, begin, n_hidden, tile, zeros, p,
            True, W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
        )  # fmt: skip
        begin = max(begin, n_hidden)
    return _slots(
        acc, pairs, top, total, sm, t, count, begin, tile.n_blocks, tile, zeros, p,
        False, W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
    )  # fmt: skip


@gluon.jit
def _consume_one_by_one(tile, sm, p, W: gl.constexpr, C: gl.constexpr):
    """The tiles of a program with one Q buffer: each is finished before the next begins."""
    BLOCK_N: gl.constexpr = C.block_n
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.v_dim, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    MAY_BE_EMPTY: gl.constexpr = C.mode >= WINDOW
    SKIP: gl.constexpr = C.mode == CAUSAL and C.consumers * 64 > BLOCK_N
    zeros = gl.full([64, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
    acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
    count = 0
    t = 0
    while tile.n_blocks >= 0:
        row_start, row_end = _bounds(tile, p, W, S_ROWS, C)
        _wait(sm.k_full, count, C.k_stages)
        skipped = 0
        if SKIP:
            skipped = leading_hidden(tile, p, W, C)
            if skipped > 0:
                _wait(sm.v_full, count, C.v_stages)
                _wait(sm.k_full, count + 1, C.k_stages)
        scores = _start_scores(sm, t, count + skipped, zeros, W, C)
        top, total = _start_softmax(tile, p, S_ROWS, C)
        scores = warpgroup_mma_wait(0, deps=[scores])
        _free_k(sm, count, skipped, C)
        scores = _capped(scores, p, sm.v.dtype, C)
        if C.mode != FULL:
            scores = _hidden(scores, skipped, sm, t, tile, row_start, row_end, p, W, S_LAYOUT, C)
        top, decay, weights = softmax_step(scores, top, p.factor, MAY_BE_EMPTY)
        total = _first_total(weights, total, decay, C)
        pairs = pack(weights, BLOCK_N, sm.v.dtype)
        mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
        if SKIP and skipped > 0:
            mbarrier.arrive(sm.slot_done.index((count + 1) % slots(C)), count=1)
        acc, pairs, top, total, count = _all_slots(
            acc, pairs, top, total, sm, t, count + skipped + 1, skipped + 1, tile, zeros, p,
            W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
        )  # fmt: skip
        _wait(sm.v_full, count - 1, C.v_stages)
        acc = warpgroup_mma_wait(0, deps=[_start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)])
        _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
        acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
        t += 1
        _wait_tile(sm, t, W, C)
        tile = _card(sm, t, W, 4, C)


@gluon.jit
def _consume_overlapped(tile, sm, p, W: gl.constexpr, C: gl.constexpr):
    """The tiles of a program with several Q buffers, at least one: the end of each overlaps the start of the next."""
    BLOCK_N: gl.constexpr = C.block_n
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.v_dim, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    MAY_BE_EMPTY: gl.constexpr = C.mode >= WINDOW
    SKIP: gl.constexpr = C.mode == CAUSAL and C.consumers * 64 > BLOCK_N
    zeros = gl.full([64, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
    acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
    # Before the first tile one is made up, of which no block is left: it ends in a slot with the first block of the
    # next, like any other, but that its O goes nowhere. A slot of its own for the first block was a fifth of the code.
    t = -1
    count = 0
    _wait(sm.k_full, 0, C.k_stages)
    if C.turns and W == 0:
        give_turn(1, C)
    top, total = gl.full([64], 0.0, gl.float32, S_ROWS), gl.full([64], 0.0, gl.float32, S_ROWS)
    pairs = pack(zeros, BLOCK_N, sm.v.dtype)
    begin = tile.n_blocks
    more = 1
    while more > 0:
        acc, pairs, top, total, count = _all_slots(
            acc, pairs, top, total, sm, t, count, begin, tile, zeros, p,
            W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
        )  # fmt: skip
        _wait_tile(sm, t + 1, W, C)
        next_tile = _card(sm, t + 1, W, 4, C)
        if next_tile.n_blocks >= 0:
            # A slot for two tiles: the first S of the next, the last P V of this one, then this one's end.
            row_start, row_end = _bounds(next_tile, p, W, S_ROWS, C)
            skipped = 0
            if SKIP:
                skipped = leading_hidden(next_tile, p, W, C)
                if skipped > 0:
                    _wait(sm.v_full, count, C.v_stages)
                    _wait(sm.k_full, count + 1, C.k_stages)
            take_turn(W, C)
            next_scores = _start_scores(sm, t + 1, count + skipped, zeros, W, C)
            # (The block before the first is none: any V does, and what comes of it is dropped.)
            next_acc = _start_values(acc, pairs, sm, count + (C.v_stages - 1), P_LAYOUT, C)
            give_turn(W, C)
            next_top, next_total = _start_softmax(next_tile, p, S_ROWS, C)
            scores = warpgroup_mma_wait(1, deps=[next_scores])
            _free_k(sm, count, skipped, C)
            scores = _capped(scores, p, sm.v.dtype, C)
            if C.mode != FULL:
                scores = _hidden(scores, skipped, sm, t + 1, next_tile, row_start, row_end, p, W, S_LAYOUT, C)
            next_top, decay, weights = softmax_step(scores, next_top, p.factor, MAY_BE_EMPTY)
            next_total = _first_total(weights, next_total, decay, C)
            _wait_tile(sm, t + 1, W, C)  # long over; keeps warpgroup_mma_wait behind the exponentials
            acc = warpgroup_mma_wait(0, deps=[next_acc])
            if C.early_free:
                mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
            pairs = pack(weights, BLOCK_N, sm.v.dtype)
            if t >= 0:
                _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
            _wait(sm.k_full, count + skipped + 1, C.k_stages)
            _wait(sm.v_full, count + skipped, C.v_stages)
            if not C.early_free:
                mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
            if SKIP and skipped > 0:
                mbarrier.arrive(sm.slot_done.index((count + 1) % slots(C)), count=1)
            acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
            count += skipped + 1
            begin = skipped + 1
            top, total, tile = next_top, next_total, next_tile
        else:
            acc = warpgroup_mma_wait(0, deps=[_start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)])
            _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
            acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
            more = 0
        t += 1


@gluon.jit
def _consume(sm, p, W: gl.constexpr, C: gl.constexpr):
    """Four warps: 64 rows of each tile."""
    _wait_tile(sm, 0, W, C)
    tile = _card(sm, 0, W, 4, C)
    if C.q_buffers == 1:
        _consume_one_by_one(tile, sm, p, W, C)
    elif C.mode == INTERVALS:
        if tile.n_blocks >= 0:  # else no tile of this program sees anything
            _consume_overlapped(tile, sm, p, W, C)
    else:
        _consume_overlapped(tile, sm, p, W, C)


#: Nothing may be compiled anew for another length, stride or address.
RUNTIME = (
    "out_ptr", "lse_ptr", "counter_ptr", "bounds_ptr", "summary_ptr", "sinks_ptr", "seqlen_q", "seqlen_k", "nheads",
    "group", "n_heads_total", "section", "window_left", "window_right", "intervals_batch", "sinks_stride",
)  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME)
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    out_ptr,
    lse_ptr,
    counter_ptr,
    bounds_ptr,
    summary_ptr,
    sinks_ptr,
    seqlen_q,
    seqlen_k,
    nheads,
    group,
    n_heads_total,
    section,
    window_left,
    window_right,
    intervals_batch,
    sinks_stride,
    factor,
    cap_factor,
    C: gl.constexpr,
    PIECE: gl.constexpr,
):
    """``out = softmax(scores) v`` and its log-sum-exp.

    Descriptors are of (batch, seqlen, heads, head_dim) tensors, so that rows beyond a batch element's length read as
    zero and are not written. ``out_ptr`` is the contiguous out again, for row intervals. ``PIECE`` is the layout of 8
    rows by 64 columns in shared memory.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    NW: gl.constexpr = C.consumers
    QB: gl.constexpr = C.q_buffers
    KST: gl.constexpr = C.k_stages
    VST: gl.constexpr = C.v_stages
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(DTYPE, [QB * NW * C.chunks, 1, 64, 1, C.chunk_dim], q_desc.layout)
    k = gl.allocate_shared_memory(DTYPE, [C.k_stages * C.chunks, 1, C.block_n, 1, C.chunk_dim], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [C.v_stages, 1, C.block_n, 1, C.v_dim], v_desc.layout)
    out = q
    if C.chunks > 1:
        n_out: gl.constexpr = QB * NW * C.chunks * C.chunk_dim // C.v_dim
        out = q._reinterpret(DTYPE, [n_out, 1, 64, 1, C.v_dim], out_desc.layout)
    CARDS: gl.constexpr = RING
    tiles = gl.allocate_shared_memory(gl.int32, [CARDS * CARD, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bounds = tiles
    if C.listed:
        bounds = gl.allocate_shared_memory(gl.int32, [2 * QB * NW, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [CARDS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    out_full = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [C.k_stages, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [C.v_stages, 1], barrier)
    v_raw = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    SLOTS: gl.constexpr = slots(C)
    slot_done = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    k_done = slot_done
    if C.free_k_first:
        k_done = gl.allocate_shared_memory(gl.int64, [C.k_stages, 1], barrier)
        for i in gl.static_range(KST):
            mbarrier.init(k_done.index(i), count=NW)
    for i in gl.static_range(CARDS):
        mbarrier.init(tile_full.index(i), count=1)
    for i in gl.static_range(QB * NW):
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(q_full.index(i), count=1 + C.listed)
        mbarrier.init(out_full.index(i), count=1)
    for i in gl.static_range(KST):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(slot_done.index(i), count=NW)
    for i in gl.static_range(VST):
        mbarrier.init(v_full.index(i), count=1)
    mbarrier.init(v_raw.index(0), count=1)
    fence_async_shared()

    sm = Shared(
        q, k, v, out, tiles, bounds, tile_full, q_empty, q_full, out_full, k_full, v_full, v_raw, k_done, slot_done
    )
    p = Problem(
        seqlen_q, seqlen_k, seqlen_k - seqlen_q, nheads, group, n_heads_total, section, window_left, window_right,
        bounds_ptr, summary_ptr, intervals_batch, sinks_ptr, sinks_stride, out_ptr, out_desc.shape[3], lse_ptr, factor,
        cap_factor,
    )  # fmt: skip
    if NW == 2:
        gl.warp_specialize(
            [
                (_consume, (sm, p, 0, C)),
                (_consume, (sm, p, 1, C)),
                (_claim_and_load_k, (k_desc, counter_ptr, sm, p, C)),
                (_load_q, (q_desc, sm, p, C)),
                (_load_v, (v_desc, sm, p, C, PIECE)),
                (_store, (out_desc, sm, p, C)),
            ],
            [4, 1, 1, 1, 1],
            [C.consumer_registers, C.other_registers, C.other_registers, C.other_registers, C.other_registers],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sm, p, 0, C)),
                (_consume, (sm, p, 1, C)),
                (_consume, (sm, p, 2, C)),
                (_claim_and_load_k, (k_desc, counter_ptr, sm, p, C)),
                (_load_q, (q_desc, sm, p, C)),
                (_load_v, (v_desc, sm, p, C, PIECE)),
                (_store, (out_desc, sm, p, C)),
            ],
            [4, 4, 1, 1, 1, 1],
            [
                C.consumer_registers,
                C.consumer_registers,
                C.other_registers,
                C.other_registers,
                C.other_registers,
                C.other_registers,
            ],
        )
    retire(tile_full)
    retire(q_empty)
    retire(q_full)
    retire(out_full)
    retire(k_full)
    retire(v_full)
    retire(v_raw)
    retire(slot_done)
    if C.free_k_first:
        retire(k_done)
