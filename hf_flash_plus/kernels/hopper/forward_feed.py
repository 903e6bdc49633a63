"""The warps of the forward kernel that do not compute: one claims tiles and loads K, one loads Q, one loads V, one
sends O and writes the tiles of row intervals that see nothing."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .forward_shared import await_card, card, slots, tma_load, tma_store, wait_use
from .primitives import finish_claim, opaque, start_claim, write_zeros
from .schedule import (
    CARD,
    GAPS,
    GIVEN,
    INTERVALS,
    LAST,
    N_BLOCKS,
    RING,
    Problem,
    all_blocks,
    block_key,
    empty_tile,
    find_group,
    find_section,
    last_seen,
    listed_heads,
    n_row_tiles,
    publish,
    publish_listed,
    publish_part,
    publish_seen,
    read,
    row_bounds,
    write,
)

#: A tile is claimed when so many blocks of K of the one before are still to be loaded: who claims early takes a tile
#: from those who finish before. The answer takes 1900 to 4300 cycles, a block about 2500; one to three are as good.
LATE = gl.constexpr(2)


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
    _write_no_sum(first_row, batch, head, p, C)


@gluon.jit
def _write_no_sum(first_row, batch, head, p, C: gl.constexpr):
    """The log-sum-exp of a tile whose rows see no keys: minus infinity, or the head's sink."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    value = float("-inf")
    if C.sinks:
        value = gl.load(p.sinks_ptr + head * p.sinks_stride).to(gl.float32)
    base = p.lse_ptr + (batch * p.nheads + head).to(gl.int64) * p.seqlen_q
    for part in range(C.consumers * 2):
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
def _send_empty_tiles(out_desc, sm, at, number, end, n_units, heads, p, C: gl.constexpr):
    """Write every n-th of the tiles that see nothing, from ``number`` to ``end``; there are n programs. Returns the
    number of the next.

    Their O is sent from zeros in the buffer ``at``, whose own O is sent and whose next Q is not yet asked for: stores
    of this warp's own, 64 for each of its threads, take it longer.
    """
    CONSUMERS: gl.constexpr = C.consumers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C.v_dim, C.v_dim // 8], [1, 1], [1, 0])
    nothing = sm.out.index(at * C.out_step)
    memory = nothing.reshape([64, C.v_dim])
    for group in gl.static_range(8):
        memory.slice(group * 8, 8, dim=0).store(gl.full([8, C.v_dim], 0.0, out_desc.dtype, layout))
    fence_async_shared()
    while number < end:
        first_row, batch, head = empty_tile(number, n_units, heads, p)
        for w in gl.static_range(CONSUMERS):
            row = first_row + w * 64
            if row < p.seqlen_q:
                tma_store(out_desc, [batch, row, head, 0], nothing)
        _write_no_sum(first_row, batch, head, p, C)
        number += gl.num_programs(0)
    tma.store_wait(0)
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
def _claim_parts(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """The same; behind the tiles that are computed whole chunks of blocks are numbered, the last first. A chunk holds
    parts of at most two tiles: first the end (or middle) of one, then the beginning of the next, whose program adds
    up its parts. It waits for chunks with smaller numbers only, which were claimed before."""
    n_blocks = all_blocks(p, C)
    whole = p.window_left
    size = p.window_right
    rest = (n_row_tiles(p, C) * p.n_heads_total - whole) * n_blocks
    n_chunks = (rest + size - 1) // size
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    while number < whole + n_chunks:
        tile_number = number
        first, blocks, more, given, chunk = number * 0, n_blocks, number * 0, number * 0, number * 0
        if number >= whole:
            chunk = n_chunks - 1 - (number - whole)
            begin = chunk * size
            blocks = min(size, rest - begin)
            tile_number = begin // n_blocks
            first = begin - tile_number * n_blocks
            tile_number += whole
            more = max(first + blocks - n_blocks, 0)
            blocks -= more
            given = (n_blocks - blocks + size - 1) // size
            if first > 0:
                given = -1
        tile = publish_part(tile_number, first, blocks, given, chunk, sm.tiles, t % RING, p, C)
        mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
        t += 1
        if more > 0:
            count = _stream_k(k_desc, sm, tile, 0, blocks, count, p, C)
            given = (n_blocks - more + size - 1) // size
            tile = publish_part(tile_number + 1, 0, more, given, chunk, sm.tiles, t % RING, p, C)
            mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
            t += 1
        count, claimed = _stream_and_claim(k_desc, counter_ptr, sm, tile, count, p, C)
        number = finish_claim(claimed) + n_programs
    write(sm.tiles, (t % RING) * CARD + N_BLOCKS, -1)
    mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
    return count


@gluon.jit
def _claim_seen(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """The same for row intervals, but for tiles that see nothing, which ``store_out`` writes. Of a section, those
    behind the last one that sees something come last, and all programs leave them out together."""
    total = n_row_tiles(p, C) * p.n_heads_total
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    known = -1
    top = 0
    while number < total:
        section = find_section(number, p, C)
        if section.batch * p.intervals_batch != known:
            known = section.batch * p.intervals_batch
            top = last_seen(known, p, C)
        row_tile = top - section.rest // section.size
        if row_tile < 0:
            gl.atomic_max(counter_ptr, section.end - n_programs)
            claimed = start_claim(counter_ptr)
        else:
            tile = publish_seen(row_tile, section, sm.tiles, t % RING, p, C)
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
    """The same, where tiles that see something are listed, and numbered by their places in the list."""
    heads = listed_heads(p)
    total = gl.load(p.summary_ptr) * heads
    group = find_group(gl.program_id(0), heads, p)  # at once, not when the total has come
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    while number < total:
        if number >= group.end:
            group = find_group(number, heads, p)
        publish_listed(number, group, heads, sm.tiles, t % RING, p)
        mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
        tile = card(sm, t, 0, 1, C)
        t += 1
        count, claimed = _stream_and_claim(k_desc, counter_ptr, sm, tile, count, p, C)
        number = finish_claim(claimed) + n_programs
    write(sm.tiles, (t % RING) * CARD + N_BLOCKS, -1)
    mbarrier.arrive(sm.tile_full.index(t % RING), count=1)
    return count


@gluon.jit
def _claim_listed_early(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """The same; each is published when the first K of the one before is under way."""
    heads = listed_heads(p)
    total = gl.load(p.summary_ptr) * heads
    group = find_group(gl.program_id(0), heads, p)  # at once, not when the total has come
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    group = _publish_listed(gl.program_id(0), total, group, heads, sm, 0, p)
    tile = card(sm, 0, 0, 1, C)
    while tile.n_blocks >= 0:
        claimed = start_claim(counter_ptr)  # the answer comes while K is loaded
        count = _stream_k(k_desc, sm, tile, 0, 1, count, p, C)
        t += 1
        group = _publish_listed(finish_claim(claimed) + n_programs, total, group, heads, sm, t, p)
        count = _stream_k(k_desc, sm, tile, 1, tile.n_blocks, count, p, C)
        tile = card(sm, t, 0, 1, C)
    return count


@gluon.jit
def claim_and_load_k(k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """One warp: claims tiles, publishes them, streams K."""
    if C.copied:
        count = _claim_listed_early(k_desc, counter_ptr, sm, p, C)
    elif C.mode == INTERVALS:
        # Numbers of its own: what LLVM sees computed in several roles it computes before they part, and keeps in
        # registers that the warps which compute then lack.
        own = Problem(
            opaque(p.seqlen_q), p.seqlen_k, p.offset, opaque(p.nheads), p.group, opaque(p.n_heads_total),
            opaque(p.section), p.window_left, p.window_right, p.bounds_ptr, p.summary_ptr, opaque(p.intervals_batch),
            p.sinks_ptr, p.sinks_stride, p.out_ptr, opaque(p.v_head_dim), p.lse_ptr, p.factor, p.cap_factor,
        )  # fmt: skip
        if C.listed:
            count = _claim_listed(k_desc, counter_ptr, sm, own, C)
        else:
            count = _claim_seen(k_desc, counter_ptr, sm, own, C)
    elif C.parts:
        count = _claim_parts(k_desc, counter_ptr, sm, p, C)
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
def load_q(q_desc, sm, p, C: gl.constexpr):
    """One warp: loads the Q of each tile, for each warpgroup as soon as the O in its place is sent."""
    BYTES: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8 * C.chunk_dim
    CONSUMERS: gl.constexpr = C.consumers
    CHUNKS: gl.constexpr = C.chunks
    BOUNDS: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    t = 0
    tile = await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        for w in gl.static_range(CONSUMERS):
            buffer = (t % C.q_buffers) * C.consumers + w
            mbarrier.wait(sm.q_empty.index(buffer), ((t // C.q_buffers) & 1) ^ 1)
            full = sm.q_full.index(buffer)
            mbarrier.expect(full, 64 * BYTES * C.chunks)
            for c in gl.static_range(CHUNKS):
                row = tile.first_row + w * 64
                tma_load(q_desc, [tile.batch, row, tile.head, c * C.chunk_dim], full, sm.q.index(buffer * C.chunks + c))
        if C.copied:
            for w in gl.static_range(CONSUMERS):
                buffer = (t % C.q_buffers) * C.consumers + w
                start, end = row_bounds(tile, p, w, BOUNDS, C)
                sm.bounds.index(2 * buffer).store(start)
                sm.bounds.index(2 * buffer + 1).store(end)
                mbarrier.arrive(sm.q_full.index(buffer), count=1)
        t += 1
        tile = await_card(sm, t, C)
    # Consumers wait for a Q, then look at the card: also at the one that says there are no more.
    for w in gl.static_range(CONSUMERS):
        buffer = (t % C.q_buffers) * C.consumers + w
        mbarrier.wait(sm.q_empty.index(buffer), ((t // C.q_buffers) & 1) ^ 1)
        mbarrier.arrive(sm.q_full.index(buffer), count=1)
        if C.copied:
            mbarrier.arrive(sm.q_full.index(buffer), count=1)


@gluon.jit
def clean_v(v_rows, stage, first_key, last, tile, gaps, p, C: gl.constexpr):
    """Zero the rows of a V block that no row of the tile, or of the next one, sees: their memory may hold NaN, and
    0 * NaN is NaN.

    ``v_rows`` is V's memory in pieces of 8 rows by 64 columns, which are contiguous; in a block, pieces of the same
    columns follow one another. Without gaps keys before ``last`` are seen (by the tile, or a row after it); with gaps
    every row is asked. What lies behind is overwritten without being read: this warp waits long for shared memory.
    """
    GROUPS: gl.constexpr = C.block_n // 8
    PANELS: gl.constexpr = C.v_dim // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    asking: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    BLOCK_M: gl.constexpr = C.consumers * 64
    bounds = p.bounds_ptr + (tile.batch * p.intervals_batch * n_row_tiles(p, C) * BLOCK_M + tile.first_row) * 2
    begin = max(last - first_key, 0) // 8  # the first group of 8 keys that is not seen whole
    behind = begin + 1
    if gaps > 0:
        begin = 0
        behind = begin + GROUPS
    for group in range(begin, behind):
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
    nothing = gl.full([8, 64], 0.0, v_rows.dtype, layout)
    for group in range(behind, GROUPS):
        for panel in gl.static_range(PANELS):
            v_rows.index((stage * PANELS + panel) * GROUPS + group).store(nothing)
    fence_async_shared()


@gluon.jit
def load_v(v_desc, sm, p, C: gl.constexpr, PIECE: gl.constexpr):
    """One warp: streams V. V(i) may go in once slot i - v_stages + 1 is over, which read V(i - v_stages)."""
    BYTES: gl.constexpr = v_desc.dtype.primitive_bitwidth // 8 * C.block_n * C.v_dim
    if C.mode == INTERVALS:
        v_rows = sm.v._reinterpret(v_desc.dtype, [C.v_stages * C.block_n * C.v_dim // 512, 8, 64], PIECE)
    count = 0
    cleaned = 0
    t = 0
    tile = await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        if C.mode == INTERVALS:
            last = read(sm.tiles, (t % RING) * CARD + LAST, 1)
            gaps = read(sm.tiles, (t % RING) * CARD + GAPS, 1)
        for i in range(tile.n_blocks):
            freed = count - C.v_stages + 1
            if freed >= 0:
                wait_use(sm.slot_done, freed, slots(C))
            stage = count % C.v_stages
            full = sm.v_full.index(stage)
            key = block_key(i, tile, C)
            where = [tile.batch, key, tile.head // p.group, 0]
            if C.mode == INTERVALS:
                if (key + C.block_n > last) | ((gaps > 0) & (i < tile.n_end + tile.n_begin)):
                    mbarrier.expect(sm.v_raw.index(0), BYTES)
                    tma_load(v_desc, where, sm.v_raw.index(0), sm.v.index(stage))
                    mbarrier.wait(sm.v_raw.index(0), cleaned & 1)
                    clean_v(v_rows, stage, key, last, tile, gaps, p, C)
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
        tile = await_card(sm, t, C)


@gluon.jit
def store_out(out_desc, sm, p, C: gl.constexpr):
    """One warp: sends each finished O, then frees the buffer for the next Q. With row intervals it also writes tiles
    that see nothing, some beside each tile that is computed; those of a list behind its O, from the same buffer."""
    CONSUMERS: gl.constexpr = C.consumers
    own = p
    if C.mode == INTERVALS and not C.copied:
        # (See claim_and_load_k.)
        own = Problem(
            opaque(p.seqlen_q), p.seqlen_k, p.offset, opaque(p.nheads), p.group, opaque(p.n_heads_total),
            opaque(p.section), p.window_left, p.window_right, p.bounds_ptr, p.summary_ptr, opaque(p.intervals_batch),
            p.sinks_ptr, p.sinks_stride, p.out_ptr, opaque(p.v_head_dim), p.lse_ptr, p.factor, p.cap_factor,
        )  # fmt: skip
    if C.listed:
        heads = listed_heads(own)
        n_units = n_row_tiles(own, C) * (own.n_heads_total // heads)
        n_seen = gl.load(p.summary_ptr)
        n_empty = (n_units - n_seen) * heads
        share = (n_units - 1) // max(n_seen, 1) * gl.num_programs(0)  # beside a tile: not fewer than there are to one
        empty = gl.program_id(0)
    elif C.mode == INTERVALS:
        total = n_row_tiles(own, C) * own.n_heads_total
        empty = gl.program_id(0)
    t = 0
    tile = await_card(sm, 0, C)
    while tile.n_blocks >= 0:
        buffer = t % C.q_buffers
        if C.mode == INTERVALS and not C.listed:  # noqa: SIM102 (one condition is the compiler's)
            if empty < total:
                empty = _write_unseen(empty, own, 8, C)
        for w in gl.static_range(CONSUMERS):
            at = buffer * C.consumers + w
            mbarrier.wait(sm.out_full.index(at), (t // C.q_buffers) & 1)
            row = tile.first_row + w * 64
            if C.parts:  # noqa: SIM102
                if read(sm.tiles, (t % RING) * CARD + GIVEN, 1) < 0:  # a part, left in global memory
                    row = p.seqlen_q
            if row < p.seqlen_q:
                tma_store(out_desc, [tile.batch, row, tile.head, 0], sm.out.index(at * C.out_step))
        tma.store_wait(0)
        if C.listed:
            end = min(empty + share, n_empty)
            if empty < end:
                empty = _send_empty_tiles(out_desc, sm, buffer * C.consumers, empty, end, n_units, heads, own, C)
        for w in gl.static_range(CONSUMERS):
            mbarrier.arrive(sm.q_empty.index(buffer * C.consumers + w), count=1)
        t += 1
        tile = await_card(sm, t, C)
    if C.listed:
        if empty < n_empty:  # nothing is loaded any more
            buffer = (t + C.q_buffers - 1) % C.q_buffers
            _send_empty_tiles(out_desc, sm, buffer * C.consumers, empty, n_empty, n_units, heads, own, C)
    elif C.mode == INTERVALS:
        while empty < total:
            empty = _write_unseen(empty, own, 32, C)
