"""The forward kernel: a persistent program on each multiprocessor, whose warps have different jobs.

``_claim_and_load_qk`` (one warp) takes tiles of query rows from a counter, publishes them, loads Q and streams K;
``_load_v`` (one warp) streams V; ``_consume`` (two or three warpgroups of 64 rows each) computes; ``_store`` (one warp)
sends O, which consumers leave where the tile's Q lay. They meet at mbarriers in shared memory (:class:`Shared`).

A consumer's slot overlaps the softmax of one block of keys with the product of the previous one's weights and V::

    slot i:   S(i) = Q K(i)^T  |  O += P(i-1) V(i-1)        both started
              P(i) = softmax(S(i))                          while the second is running
              wait for O, scale it, free K(i) and V(i-1)

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

from .primitives import LN2, LOG2E, give_turn, pack, softmax_step, take_turn, tanh, unpack
from .schedule import (
    CAUSAL,
    FULL,
    GAPS,
    INTERVALS,
    LAST,
    N_FIELDS,
    WINDOW,
    Problem,
    block_key,
    describe,
    fields,
    hide,
    leading_hidden,
    look_up,
    n_row_tiles,
    needs_hiding,
    place,
    read,
    row_bounds,
    write,
)

#: The copies through tensor descriptors, under the names that Triton 3.6 and later versions give them.
tma_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
tma_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


class Shared(NamedTuple):
    """Shared memory: buffers and barriers. A barrier's phase is told from how often its buffer was used before."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    out: gl.tensor
    tiles: gl.tensor  # descriptions of tiles, by Q buffer
    q_empty: gl.tensor
    q_full: gl.tensor
    out_full: gl.tensor
    k_full: gl.tensor
    v_full: gl.tensor
    v_raw: gl.tensor  # a V that has to be cleaned has arrived
    slot_done: gl.tensor  # by K stage: no warpgroup needs K(i) and V(i-1) any more


@gluon.jit
def _wait(barriers, n, STAGES: gl.constexpr):
    """Wait for use ``n`` of a ring of barriers."""
    mbarrier.wait(barriers.index(n % STAGES), (n // STAGES) & 1)


@gluon.jit
def _wait_tile(sm, t, W: gl.constexpr, C: gl.constexpr):
    """Wait until the program's t-th tile is published, with its Q for warpgroup W."""
    mbarrier.wait(sm.q_full.index((t % C.q_buffers) * C.consumers + W), (t // C.q_buffers) & 1)


@gluon.jit
def _number(sm, t, WARPS: gl.constexpr, C: gl.constexpr):
    """The number of the program's t-th tile, or -1 after the last."""
    return read(sm.tiles, (t % C.q_buffers) * fields(C.mode), WARPS)


@gluon.jit
def _await_q_buffer(sm, t, C: gl.constexpr):
    CONSUMERS: gl.constexpr = C.consumers
    for w in gl.static_range(CONSUMERS):
        mbarrier.wait(sm.q_empty.index((t % C.q_buffers) * C.consumers + w), ((t // C.q_buffers) & 1) ^ 1)


@gluon.jit
def _claim_and_load_qk(q_desc, k_desc, counter_ptr, sm, p, C: gl.constexpr):
    """One warp: claims tiles, publishes them with their Q, streams K."""
    BYTES: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8 * C.chunk_dim
    CONSUMERS: gl.constexpr = C.consumers
    CHUNKS: gl.constexpr = C.chunks
    total = n_row_tiles(p, C) * p.n_heads_total
    n_programs = gl.num_programs(0)
    count = 0
    t = 0
    number = gl.program_id(0)
    while number < total:
        buffer = t % C.q_buffers
        _await_q_buffer(sm, t, C)
        describe(number, sm.tiles, buffer, p, C)
        # What this warp wrote itself, in all its threads.
        tile = look_up(number, sm.tiles, buffer, p, 1, C)
        for w in gl.static_range(CONSUMERS):
            full = sm.q_full.index(buffer * C.consumers + w)
            mbarrier.expect(full, 64 * BYTES * C.chunks)
            for c in gl.static_range(CHUNKS):
                at = (buffer * C.consumers + w) * C.chunks + c
                row = tile.first_row + w * 64
                tma_load(q_desc, [tile.batch, row, tile.head, c * C.chunk_dim], full, sm.q.index(at))
        for i in range(tile.n_blocks):
            mbarrier.wait(sm.slot_done.index(count % C.k_stages), ((count // C.k_stages) & 1) ^ 1)
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
        t += 1
        number = gl.atomic_add(counter_ptr, 1) + n_programs
    buffer = t % C.q_buffers
    _await_q_buffer(sm, t, C)
    write(sm.tiles, buffer * fields(C.mode), -1)
    for w in gl.static_range(CONSUMERS):
        mbarrier.arrive(sm.q_full.index(buffer * C.consumers + w), count=1)
    if C.q_buffers > 1:
        # Every slot waits for the K of the next one; this stands for the K after the last.
        mbarrier.wait(sm.slot_done.index(count % C.k_stages), ((count // C.k_stages) & 1) ^ 1)
        mbarrier.arrive(sm.k_full.index(count % C.k_stages), count=1)
    # The last program leaves both counters at zero for the next launch.
    done = gl.atomic_add(counter_ptr + 1, 1)
    if done == n_programs - 1:
        gl.atomic_xchg(counter_ptr, 0)
        gl.atomic_xchg(counter_ptr + 1, 0)


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
    _wait_tile(sm, 0, 0, C)
    number = _number(sm, 0, 1, C)
    while number >= 0:
        slot = t % C.q_buffers
        tile = look_up(number, sm.tiles, slot, p, 1, C)
        if C.mode == INTERVALS:
            last = read(sm.tiles, slot * N_FIELDS + LAST, 1)
            gaps = read(sm.tiles, slot * N_FIELDS + GAPS, 1)
        for i in range(tile.n_blocks):
            freed = count - C.v_stages + 1
            if freed >= 0:
                _wait(sm.slot_done, freed, C.k_stages)
            stage = count % C.v_stages
            full = sm.v_full.index(stage)
            key = block_key(i, tile, C)
            where = [tile.batch, key, tile.head // p.group, 0]
            if C.mode == INTERVALS:
                hidden = (key + C.block_n > last) | ((gaps > 0) & (i < tile.n_end + tile.n_begin))
                seen = last > 0
                if C.sinks:  # rows that see nothing still have a total, so that their 0 * NaN would show
                    seen = last >= 0
                if hidden & seen:
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
        _wait_tile(sm, t, 0, C)
        number = _number(sm, t, 1, C)


@gluon.jit
def _store(out_desc, sm, p, C: gl.constexpr):
    """One warp: sends each finished O, then frees the buffer for the next Q."""
    CONSUMERS: gl.constexpr = C.consumers
    t = 0
    _wait_tile(sm, 0, 0, C)
    number = _number(sm, 0, 1, C)
    while number >= 0:
        buffer = t % C.q_buffers
        first_row, batch, head = place(number, p, C)
        for w in gl.static_range(CONSUMERS):
            at = buffer * C.consumers + w
            mbarrier.wait(sm.out_full.index(at), (t // C.q_buffers) & 1)
            row = first_row + w * 64
            if row < p.seqlen_q:
                tma_store(out_desc, [batch, row, head, 0], sm.out.index(at * C.out_step))
        tma.store_wait(0)
        for w in gl.static_range(CONSUMERS):
            mbarrier.arrive(sm.q_empty.index(buffer * C.consumers + w), count=1)
        t += 1
        _wait_tile(sm, t, 0, C)
        number = _number(sm, t, 1, C)


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
def _capped(scores, p, C: gl.constexpr):
    if C.softcap:
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
def _finish(acc, top, total, sm, t, tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """O to shared memory, for the warp that stores, and the log-sum-exp to global memory."""
    out_total = gl.convert_layout(total, LAYOUT)[:, None]
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
        rows = row + gl.arange(0, 64, top.type.layout)
        lse = (top + gl.log2(total)) * LN2
        base = p.lse_ptr + (tile.batch * p.nheads + tile.head).to(gl.int64) * p.seqlen_q
        gl.store(base + rows, lse, mask=rows < p.seqlen_q)


@gluon.jit
def _slots(
    acc, pairs, top, total, sm, t, count, begin, end, tile, row_start, row_end, zeros, p,
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
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        scores = _capped(scores, p, C)
        if HIDE:
            first_key = block_key(step, tile, C)
            if needs_hiding(first_key, tile, p, W, False, C):
                scores = hide(scores, first_key, tile, row_start, row_end, p, W, S_LAYOUT, C)
        top, decay, weights = softmax_step(scores, top, p.factor, HIDE)
        total = total * decay + gl.sum(weights, 1)
        # A wait with a branch must stand here: ptxas otherwise hoists warpgroup_mma_wait over the exponentials.
        if C.early_free or C.q_buffers == 1:
            _wait(sm.k_full, count, C.k_stages)  # long over
        else:
            _wait(sm.k_full, count + 1, C.k_stages)
            _wait(sm.v_full, count, C.v_stages)
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(sm.slot_done.index(count % C.k_stages), count=1)
        pairs = pack(weights, C.block_n, sm.v.dtype)
        acc = acc * gl.convert_layout(decay, O_ROWS)[:, None]
        count += 1
        if C.early_free and C.q_buffers > 1:
            _wait(sm.k_full, count, C.k_stages)
            _wait(sm.v_full, count - 1, C.v_stages)
    return acc, pairs, top, total, count


@gluon.jit
def _all_slots(
    acc, pairs, top, total, sm, t, count, begin, tile, row_start, row_end, zeros, p,
    W: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, O_ROWS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile from ``begin`` on; those that need masking come first."""
    if C.mode >= WINDOW:
        n_hidden = tile.n_end + tile.n_begin
        acc, pairs, top, total, count = _slots(
            acc, pairs, top, total, sm, t, count, begin, n_hidden, tile, row_start, row_end, zeros, p,
            True, W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
        )  # fmt: skip
        begin = max(begin, n_hidden)
    return _slots(
        acc, pairs, top, total, sm, t, count, begin, tile.n_blocks, tile, row_start, row_end, zeros, p,
        False, W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
    )  # fmt: skip


@gluon.jit
def _consume(sm, p, W: gl.constexpr, C: gl.constexpr):
    """Four warps: 64 rows of each tile."""
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
    row_start = 0
    row_end = 0
    if C.mode == INTERVALS:
        row_start = gl.full([64], 0, gl.int32, S_ROWS)
        row_end = row_start
    count = 0
    t = 0
    _wait_tile(sm, 0, W, C)
    number = _number(sm, 0, 4, C)
    if C.q_buffers == 1:
        while number >= 0:
            tile = look_up(number, sm.tiles, 0, p, 4, C)
            if C.mode == INTERVALS:
                row_start, row_end = row_bounds(tile, p, W, S_ROWS, C)
            _wait(sm.k_full, count, C.k_stages)
            skipped = 0
            if SKIP:
                skipped = leading_hidden(tile, p, W, C)
                if skipped > 0:
                    _wait(sm.v_full, count, C.v_stages)
                    _wait(sm.k_full, count + 1, C.k_stages)
            scores = _start_scores(sm, t, count + skipped, zeros, W, C)
            top, total = _start_softmax(tile, p, S_ROWS, C)
            scores = _capped(warpgroup_mma_wait(0, deps=[scores]), p, C)
            if C.mode != FULL:
                first_key = block_key(skipped, tile, C)
                if needs_hiding(first_key, tile, p, W, True, C):
                    scores = hide(scores, first_key, tile, row_start, row_end, p, W, S_LAYOUT, C)
            top, decay, weights = softmax_step(scores, top, p.factor, MAY_BE_EMPTY)
            total = _first_total(weights, total, decay, C)
            pairs = pack(weights, BLOCK_N, sm.v.dtype)
            mbarrier.arrive(sm.slot_done.index(count % C.k_stages), count=1)
            if SKIP and skipped > 0:
                mbarrier.arrive(sm.slot_done.index((count + 1) % C.k_stages), count=1)
            acc, pairs, top, total, count = _all_slots(
                acc, pairs, top, total, sm, t, count + skipped + 1, skipped + 1, tile, row_start, row_end, zeros, p,
                W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
            )  # fmt: skip
            _wait(sm.v_full, count - 1, C.v_stages)
            acc = warpgroup_mma_wait(0, deps=[_start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)])
            _finish(acc, top, total, sm, t, tile, p, W, O_ROWS, C)
            acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
            t += 1
            _wait_tile(sm, t, W, C)
            number = _number(sm, t, 4, C)
    else:
        # The first block of the first tile.
        tile = look_up(number, sm.tiles, 0, p, 4, C)
        if C.mode == INTERVALS:
            row_start, row_end = row_bounds(tile, p, W, S_ROWS, C)
        _wait(sm.k_full, 0, C.k_stages)
        skipped = 0
        if SKIP:
            skipped = leading_hidden(tile, p, W, C)
            if skipped > 0:
                _wait(sm.v_full, 0, C.v_stages)
                _wait(sm.k_full, 1, C.k_stages)
        if C.turns and W == 0:
            give_turn(1, C)
        take_turn(W, C)
        scores = _start_scores(sm, 0, skipped, zeros, W, C)
        give_turn(W, C)
        top, total = _start_softmax(tile, p, S_ROWS, C)
        scores = _capped(warpgroup_mma_wait(0, deps=[scores]), p, C)
        if C.mode != FULL:
            first_key = block_key(skipped, tile, C)
            if needs_hiding(first_key, tile, p, W, True, C):
                scores = hide(scores, first_key, tile, row_start, row_end, p, W, S_LAYOUT, C)
        top, decay, weights = softmax_step(scores, top, p.factor, MAY_BE_EMPTY)
        total = _first_total(weights, total, decay, C)
        pairs = pack(weights, BLOCK_N, sm.v.dtype)
        count = skipped + 1
        _wait(sm.k_full, count, C.k_stages)
        _wait(sm.v_full, count - 1, C.v_stages)
        mbarrier.arrive(sm.slot_done.index(0), count=1)
        if SKIP and skipped > 0:
            mbarrier.arrive(sm.slot_done.index(1 % C.k_stages), count=1)
        begin = count
        more = 1
        while more > 0:
            acc, pairs, top, total, count = _all_slots(
                acc, pairs, top, total, sm, t, count, begin, tile, row_start, row_end, zeros, p,
                W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
            )  # fmt: skip
            _wait_tile(sm, t + 1, W, C)
            number = _number(sm, t + 1, 4, C)
            if number >= 0:
                # A slot for two tiles: the first S of the next, the last P V of this one, then this one's end.
                next_tile = look_up(number, sm.tiles, (t + 1) % C.q_buffers, p, 4, C)
                if C.mode == INTERVALS:
                    row_start, row_end = row_bounds(next_tile, p, W, S_ROWS, C)
                skipped = 0
                if SKIP:
                    skipped = leading_hidden(next_tile, p, W, C)
                    if skipped > 0:
                        _wait(sm.v_full, count, C.v_stages)
                        _wait(sm.k_full, count + 1, C.k_stages)
                take_turn(W, C)
                next_scores = _start_scores(sm, t + 1, count + skipped, zeros, W, C)
                next_acc = _start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)
                give_turn(W, C)
                next_top, next_total = _start_softmax(next_tile, p, S_ROWS, C)
                scores = _capped(warpgroup_mma_wait(1, deps=[next_scores]), p, C)
                if C.mode != FULL:
                    first_key = block_key(skipped, next_tile, C)
                    if needs_hiding(first_key, next_tile, p, W, True, C):
                        scores = hide(scores, first_key, next_tile, row_start, row_end, p, W, S_LAYOUT, C)
                next_top, decay, weights = softmax_step(scores, next_top, p.factor, MAY_BE_EMPTY)
                next_total = _first_total(weights, next_total, decay, C)
                _wait_tile(sm, t + 1, W, C)  # long over; keeps warpgroup_mma_wait behind the exponentials
                acc = warpgroup_mma_wait(0, deps=[next_acc])
                if C.early_free:
                    mbarrier.arrive(sm.slot_done.index(count % C.k_stages), count=1)
                pairs = pack(weights, BLOCK_N, sm.v.dtype)
                # Before the wait for the next K, which may need this tile's buffer.
                _finish(acc, top, total, sm, t, tile, p, W, O_ROWS, C)
                _wait(sm.k_full, count + skipped + 1, C.k_stages)
                _wait(sm.v_full, count + skipped, C.v_stages)
                if not C.early_free:
                    mbarrier.arrive(sm.slot_done.index(count % C.k_stages), count=1)
                if SKIP and skipped > 0:
                    mbarrier.arrive(sm.slot_done.index((count + 1) % C.k_stages), count=1)
                acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
                top, total, tile = next_top, next_total, next_tile
                count += skipped + 1
                begin = skipped + 1
            else:
                acc = warpgroup_mma_wait(0, deps=[_start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)])
                _finish(acc, top, total, sm, t, tile, p, W, O_ROWS, C)
                acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
                more = 0
            t += 1


#: Nothing may be compiled anew for another length, stride or address.
RUNTIME = (
    "lse_ptr", "counter_ptr", "bounds_ptr", "summary_ptr", "sinks_ptr", "seqlen_q", "seqlen_k", "nheads", "group",
    "n_heads_total", "section", "window_left", "window_right", "intervals_batch", "sinks_stride",
)  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME)
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
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
    zero and are not written. ``PIECE`` is the layout of 8 rows by 64 columns in shared memory.
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
    tiles = gl.allocate_shared_memory(gl.int32, [QB * fields(C.mode), 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_empty = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    out_full = gl.allocate_shared_memory(gl.int64, [QB * NW, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [C.k_stages, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [C.v_stages, 1], barrier)
    v_raw = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    slot_done = gl.allocate_shared_memory(gl.int64, [C.k_stages, 1], barrier)
    for i in gl.static_range(QB * NW):
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(out_full.index(i), count=1)
    for i in gl.static_range(KST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(slot_done.index(i), count=NW)
    for i in gl.static_range(VST):
        mbarrier.init(v_full.index(i), count=1)
    mbarrier.init(v_raw.index(0), count=1)
    fence_async_shared()

    sm = Shared(q, k, v, out, tiles, q_empty, q_full, out_full, k_full, v_full, v_raw, slot_done)
    p = Problem(
        seqlen_q, seqlen_k, seqlen_k - seqlen_q, nheads, group, n_heads_total, section, window_left, window_right,
        bounds_ptr, summary_ptr, intervals_batch, sinks_ptr, sinks_stride, lse_ptr, factor, cap_factor,
    )  # fmt: skip
    if NW == 2:
        gl.warp_specialize(
            [
                (_consume, (sm, p, 0, C)),
                (_consume, (sm, p, 1, C)),
                (_claim_and_load_qk, (q_desc, k_desc, counter_ptr, sm, p, C)),
                (_load_v, (v_desc, sm, p, C, PIECE)),
                (_store, (out_desc, sm, p, C)),
            ],
            [4, 1, 1, 1],
            [C.consumer_registers, C.other_registers, C.other_registers, C.other_registers],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sm, p, 0, C)),
                (_consume, (sm, p, 1, C)),
                (_consume, (sm, p, 2, C)),
                (_claim_and_load_qk, (q_desc, k_desc, counter_ptr, sm, p, C)),
                (_load_v, (v_desc, sm, p, C, PIECE)),
                (_store, (out_desc, sm, p, C)),
            ],
            [4, 4, 1, 1, 1],
            [C.consumer_registers, C.consumer_registers, C.other_registers, C.other_registers, C.other_registers],
        )
