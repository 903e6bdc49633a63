"""The forward kernel: a persistent program on each multiprocessor, whose warps have different jobs.

``claim_and_load_k`` (one warp) takes tiles of query rows from a counter, publishes each on a card, and streams K;
``load_q`` and ``load_v`` (one warp each) load Q and stream V; ``_consume`` (two or three warpgroups of 64 rows each)
computes; ``store_out`` (one warp) sends O, which consumers leave where the tile's Q lay. They meet at mbarriers in
shared memory (``forward_shared``). Tiles of row intervals that see nothing are left out: ``store_out`` writes the
program's share of them. Here is what computes, and the kernel; the other warps are in ``forward_feed``.

Calls without a mask whose last wave of tiles would leave programs idle (``Config.parts``) cut its tiles along the keys:
of each one part is computed by the program that adds up all of them, the others are left in global memory.

A consumer's slot overlaps the softmax of one block of keys with the product of the previous one's weights and V::

    slot i:   S(i) = Q K(i)^T  |  O += P(i-1) V(i-1)        both started
              P(i) = softmax(S(i))                          while the second is running
              wait for O, scale it if some row's maximum has grown by much, free K(i) and V(i-1)

With more than one Q buffer the first S of the next tile shares a slot with the last P V of this one; otherwise a tile
is finished first. ``count`` counts slots through all tiles: blocks of keys and their barriers are numbered by it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .forward_feed import claim_and_load_k, load_q, load_v, store_out
from .forward_shared import Shared, card, slots, wait_tile, wait_use
from .primitives import (
    LN2,
    LOG2E,
    await_flag,
    give_turn,
    lower_flag,
    pack,
    raise_flag,
    rescale,
    retire,
    softmax_step,
    take_turn,
    tanh,
    tanh_approx,
    unpack,
)
from .schedule import (
    CARD,
    CAUSAL,
    CHUNK,
    FULL,
    GIVEN,
    INTERVALS,
    RING,
    SOME_EMPTY,
    WINDOW,
    Problem,
    block_key,
    hide,
    hide_early,
    hide_late,
    hide_outside,
    leading_hidden,
    needs_hiding,
    read,
    row_bounds,
    window_bounds,
)


@gluon.jit
def _free_k(sm, count, skipped, C: gl.constexpr):
    """K is not needed any more, ``skipped`` blocks from ``count`` on and the next one, if that is told apart."""
    if C.free_k_first:
        mbarrier.arrive(sm.k_done.index((count + skipped) % C.k_stages), count=1)
        if C.mode == CAUSAL and C.consumers * 64 > C.block_n and skipped > 0:
            mbarrier.arrive(sm.k_done.index(count % C.k_stages), count=1)


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
    """The end of a tile, or of a part of one."""
    if C.parts:
        given = read(sm.tiles, (t % RING) * CARD + GIVEN, 4)
        chunk = read(sm.tiles, (t % RING) * CARD + CHUNK, 4)
        if given < 0:
            _leave(acc, top, total, chunk, p, W, LAYOUT, C)
            mbarrier.arrive(sm.out_full.index((t % C.q_buffers) * C.consumers + W), count=1)
        else:
            for i in range(given):
                acc, top, total = _add(acc, top, total, chunk + 1 + i, p, W, LAYOUT, C)
            _send(acc, top, total, sm, t, p, W, LAYOUT, C)
    else:
        _send(acc, top, total, sm, t, p, W, LAYOUT, C)


@gluon.jit
def _left(chunk, p, W: gl.constexpr, LAYOUT: gl.constexpr, ROWS: gl.constexpr, C: gl.constexpr):
    """Where W's part of a chunk is left: its O, its maxima (sums follow 64 numbers on), and whether it is there."""
    which = chunk * C.consumers + W
    base = p.bounds_ptr + which * (64 * (C.v_dim + 2))
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT.parent)
    columns = gl.arange(0, C.v_dim, COLUMNS)
    out = gl.arange(0, 64, LAYOUT)[:, None] * C.v_dim + columns[None, :]
    return base + out, base + (64 * C.v_dim + gl.arange(0, 64, ROWS)), p.summary_ptr + which


@gluon.jit
def _leave(acc, top, total, chunk, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """A part of a tile for the program that adds up its parts."""
    ROWS: gl.constexpr = top.type.layout
    out, numbers, there = _left(chunk, p, W, LAYOUT, ROWS, C)
    gl.store(out, acc)
    gl.store(numbers, top)
    gl.store(numbers + 64, total)
    raise_flag(there)


@gluon.jit
def _add(acc, top, total, chunk, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Add what was left by a chunk that was claimed earlier, so that some program is at it, or this one was."""
    ROWS: gl.constexpr = top.type.layout
    out, numbers, there = _left(chunk, p, W, LAYOUT, ROWS, C)
    await_flag(there)
    other_top, other_total = gl.load(numbers), gl.load(numbers + 64)
    new_top = gl.maximum(top, other_top)
    mine, its = gl.exp2(top - new_top), gl.exp2(other_top - new_top)
    total = total * mine + other_total * its
    acc = acc * gl.convert_layout(mine, LAYOUT)[:, None] + gl.load(out) * gl.convert_layout(its, LAYOUT)[:, None]
    lower_flag(there)
    return acc, new_top, total


@gluon.jit
def _send(acc, top, total, sm, t, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """O to shared memory, for the warp that stores, and the log-sum-exp to global memory.

    Rows that see nothing, in tiles where others do, have taken part unmasked (one of them would else make its tile mask
    all blocks): what they came to is replaced here, NaN and all.
    """
    tile = card(sm, t, W, 4, C)  # once more, instead of registers that live through the loop
    ROWS: gl.constexpr = top.type.layout
    weight = total
    if C.mode == INTERVALS:
        some_empty = read(sm.tiles, (t % RING) * CARD + SOME_EMPTY, 4)
        if some_empty > 0:
            if C.copied:
                at = _bounds_at(t, W, C)
                row_start, row_end = sm.bounds.index(at).load(ROWS), sm.bounds.index(at + 1).load(ROWS)
            else:
                row_start, row_end = row_bounds(tile, p, W, ROWS, C)
            empty = row_end <= row_start
            no_top, no_total = _start_softmax(tile, p, ROWS, C)
            top, total = gl.where(empty, no_top, top), gl.where(empty, no_total, total)
            weight = gl.where(empty, 0.0, weight)
            if C.v_dim == 128:
                acc = gl.where((gl.convert_layout(weight, LAYOUT) == 0.0)[:, None], 0.0, acc)
    out_total = gl.convert_layout(weight, LAYOUT)[:, None]
    if C.mode == INTERVALS and C.v_dim == 128:
        # A choice for each row, not for each number: this is in every tile's way. (At 64 it is 0.3 percent slower.)
        out = acc * gl.where(out_total == 0.0, 0.0, 1.0 / out_total)
    elif C.mode >= WINDOW and not C.halves:
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
    masking: carried along they cost registers in the blocks that do not. With ``copied`` they are read where they are
    needed (``schedule.hide_outside``)."""
    if C.mode == INTERVALS and not C.copied:
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
            wait_use(sm.k_full, count, C.k_stages)
            wait_use(sm.v_full, count - 1, C.v_stages)
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
            wait_use(sm.k_full, count, C.k_stages)  # long over
        else:
            wait_use(sm.k_full, count + 1, C.k_stages)
            wait_use(sm.v_full, count, C.v_stages)
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
        pairs = pack(weights, C.block_n, sm.v.dtype)
        acc = rescale(acc, gl.convert_layout(decay, O_ROWS)[:, None])
        count += 1
        if C.early_free and C.q_buffers > 1:
            wait_use(sm.k_full, count, C.k_stages)
            wait_use(sm.v_full, count - 1, C.v_stages)
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
        wait_use(sm.k_full, count, C.k_stages)
        skipped = 0
        if SKIP:
            skipped = leading_hidden(tile, p, W, C)
            if skipped > 0:
                wait_use(sm.v_full, count, C.v_stages)
                wait_use(sm.k_full, count + 1, C.k_stages)
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
        wait_use(sm.v_full, count - 1, C.v_stages)
        acc = warpgroup_mma_wait(0, deps=[_start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)])
        _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
        acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
        t += 1
        wait_tile(sm, t, W, C)
        tile = card(sm, t, W, 4, C)


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
    wait_use(sm.k_full, 0, C.k_stages)
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
        wait_tile(sm, t + 1, W, C)
        next_tile = card(sm, t + 1, W, 4, C)
        if next_tile.n_blocks >= 0:
            # A slot for two tiles: the first S of the next, the last P V of this one, then this one's end.
            row_start, row_end = _bounds(next_tile, p, W, S_ROWS, C)
            skipped = 0
            if SKIP:
                skipped = leading_hidden(next_tile, p, W, C)
                if skipped > 0:
                    wait_use(sm.v_full, count, C.v_stages)
                    wait_use(sm.k_full, count + 1, C.k_stages)
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
            wait_tile(sm, t + 1, W, C)  # long over; keeps warpgroup_mma_wait behind the exponentials
            acc = warpgroup_mma_wait(0, deps=[next_acc])
            if C.early_free:
                mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
            pairs = pack(weights, BLOCK_N, sm.v.dtype)
            if t >= 0:
                _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
            wait_use(sm.k_full, count + skipped + 1, C.k_stages)
            wait_use(sm.v_full, count + skipped, C.v_stages)
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
def _start_part(sm, t, count, AT: gl.constexpr, N: gl.constexpr, W: gl.constexpr, C: gl.constexpr):
    """:func:`_start_scores` of N keys of a block, from AT on."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    q = sm.q.index((t % C.q_buffers) * C.consumers + W).reshape([64, C.chunk_dim])
    k = sm.k.index(count % C.k_stages).reshape([C.block_n, C.chunk_dim])
    if C.block_n > N:
        k = k.slice(AT, N, dim=0)
    zeros = gl.full([64, N], 0.0, gl.float32, LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_values_part(
    acc, pairs, sm, count, LAYOUT: gl.constexpr, AT: gl.constexpr, N: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """:func:`_start_values` of N keys of a block, from AT on."""
    v = sm.v.index(count % C.v_stages).reshape([C.block_n, C.v_dim])
    if C.block_n > N:
        v = v.slice(AT, N, dim=0)
    return warpgroup_mma(unpack(pairs, N, sm.v.dtype, LAYOUT), v, acc, is_async=True)


@gluon.jit
def _widen(pairs, like, N: gl.constexpr):
    """The weights of the lower half of a block, N keys, as those of a whole block, whose others are 0."""
    if like.shape[1] * 2 == N:
        return pairs
    else:
        both = gl.join(pairs, gl.zeros_like(pairs)).permute((0, 2, 1)).reshape([64, like.shape[1]])
        return gl.convert_layout(both, like.type.layout)


@gluon.jit
def _begin_slot(
    acc, pairs, top, total, sm, t, count, key, tile, p,
    AT: gl.constexpr, N: gl.constexpr, W: gl.constexpr, S_ROWS: gl.constexpr, P_LAYOUT: gl.constexpr,
    O_ROWS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """A slot with the first block that warpgroup W sees, which begins at ``key`` (N keys of it, from AT on)."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    take_turn(W, C)
    next_scores = _start_part(sm, t, count, AT, N, W, C)
    next_acc = _start_values(acc, pairs, sm, count - 1, P_LAYOUT, C)
    give_turn(W, C)
    scores = warpgroup_mma_wait(1, deps=[next_scores])
    _free_k(sm, count, 0, C)
    scores = _capped(scores, p, sm.v.dtype, C)
    scores = hide_early(scores, key + AT, tile, p, W, LAYOUT, N)
    new_top, decay, weights = softmax_step(scores, gl.convert_layout(top, ROWS), p.factor, False)
    total = total * gl.convert_layout(decay, S_ROWS) + gl.convert_layout(gl.sum(weights, 1), S_ROWS)
    wait_use(sm.k_full, count + 1, C.k_stages)
    wait_use(sm.v_full, count, C.v_stages)
    acc = warpgroup_mma_wait(0, deps=[next_acc])
    mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
    pairs = pack(weights, N, sm.v.dtype)
    acc = rescale(acc, gl.convert_layout(decay, O_ROWS)[:, None])
    return acc, pairs, gl.convert_layout(new_top, S_ROWS), total, count + 1


@gluon.jit
def _consume_window(tile, sm, p, W: gl.constexpr, C: gl.constexpr):
    """The tiles of a program with ``halves``, at least one. Keys are taken downwards. A warpgroup sees ``span + 63``
    keys, which begin (W even) or end (W odd) with a block: half of the last or of the first one it leaves out. Of three
    warpgroups the first two leave out the tile's last block, the third one the first, but where blocks were left out
    before it and it holds keys.

    The last block shares a slot with the end of the tile before, as in :func:`_consume_overlapped`.
    """
    BLOCK_N: gl.constexpr = C.block_n
    HALF: gl.constexpr = BLOCK_N // 2
    N_LATE: gl.constexpr = HALF if W % 2 == 0 else BLOCK_N
    N_EARLY: gl.constexpr = BLOCK_N if W % 2 == 0 else HALF
    AT_EARLY: gl.constexpr = BLOCK_N - N_EARLY
    THREE: gl.constexpr = C.consumers == 3
    SKIP_LAST: gl.constexpr = THREE and W < 2
    SKIP_FIRST: gl.constexpr = THREE and W == 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    L_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N_LATE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.v_dim, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    L_ROWS: gl.constexpr = gl.SliceLayout(1, L_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    E_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N_EARLY, 16])
    zeros = gl.full([64, BLOCK_N], 0.0, gl.float32, S_LAYOUT)
    like = pack(zeros, BLOCK_N, sm.v.dtype)
    acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
    # Before the first tile one is made up, as in _consume_overlapped.
    t = -1
    count = 0
    skipped = 0
    if SKIP_LAST:
        skipped = 1
    wait_use(sm.k_full, 0, C.k_stages)
    if C.turns and W == 0:
        give_turn(1, C)
    top, total = gl.full([64], 0.0, gl.float32, S_ROWS), gl.full([64], 0.0, gl.float32, S_ROWS)
    pairs = pack(gl.full([64, N_EARLY], 0.0, gl.float32, E_LAYOUT), N_EARLY, sm.v.dtype)
    while tile.n_blocks >= 0:
        if THREE:  # noqa: SIM102 (one condition is the compiler's)
            if skipped > 0:
                wait_use(sm.v_full, count, C.v_stages)
                wait_use(sm.k_full, count + 1, C.k_stages)
        take_turn(W, C)
        next_scores = _start_part(sm, t + 1, count + skipped, 0, N_LATE, W, C)
        # (The block before the first is none: any V does, and what comes of it is dropped.)
        next_acc = _start_values_part(acc, pairs, sm, count + (C.v_stages - 1), P_LAYOUT, AT_EARLY, N_EARLY, C)
        give_turn(W, C)
        next_top, next_total = _start_softmax(tile, p, L_ROWS, C)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        if C.free_k_first:
            mbarrier.arrive(sm.k_done.index((count + skipped) % C.k_stages), count=1)
        scores = _capped(scores, p, sm.v.dtype, C)
        scores = hide_late(scores, W, L_LAYOUT, N_LATE)
        next_top, decay, weights = softmax_step(scores, next_top, p.factor, False)
        next_total = _first_total(weights, next_total, decay, C)
        wait_tile(sm, t + 1, W, C)  # long over; keeps warpgroup_mma_wait behind the exponentials
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        pairs = _widen(pack(weights, N_LATE, sm.v.dtype), like, N_LATE)
        if t >= 0:
            _finish(acc, top, total, sm, t, p, W, O_ROWS, C)
        wait_use(sm.k_full, count + skipped + 1, C.k_stages)
        wait_use(sm.v_full, count + skipped, C.v_stages)
        mbarrier.arrive(sm.slot_done.index(count % slots(C)), count=1)
        if THREE:  # noqa: SIM102
            if skipped > 0:
                mbarrier.arrive(sm.slot_done.index((count + 1) % slots(C)), count=1)
        acc = gl.full([64, C.v_dim], 0.0, gl.float32, O_LAYOUT)
        count += skipped + 1
        top, total = gl.convert_layout(next_top, S_ROWS), gl.convert_layout(next_total, S_ROWS)
        t += 1
        acc, pairs, top, total, count = _slots(
            acc, pairs, top, total, sm, t, count, C.consumers - 1, tile.n_blocks - 1, tile, zeros, p,
            False, W, S_LAYOUT, P_LAYOUT, O_ROWS, C,
        )  # fmt: skip
        if SKIP_FIRST:
            skipped = 1
            if (tile.first_key < 0) & (tile.first_key > -BLOCK_N):
                skipped = 0
            for i in range(2 - skipped):
                acc, pairs, top, total, count = _begin_slot(
                    acc, pairs, top, total, sm, t, count, tile.first_key + (1 - i) * BLOCK_N, tile, p,
                    AT_EARLY, N_EARLY, W, S_ROWS, P_LAYOUT, O_ROWS, C,
                )  # fmt: skip
        else:
            acc, pairs, top, total, count = _begin_slot(
                acc, pairs, top, total, sm, t, count, tile.first_key, tile, p,
                AT_EARLY, N_EARLY, W, S_ROWS, P_LAYOUT, O_ROWS, C,
            )  # fmt: skip
        wait_tile(sm, t + 1, W, C)
        tile = card(sm, t + 1, W, 4, C)
    next_acc = _start_values_part(acc, pairs, sm, count - 1, P_LAYOUT, AT_EARLY, N_EARLY, C)
    acc = warpgroup_mma_wait(0, deps=[next_acc])
    _finish(acc, top, total, sm, t, p, W, O_ROWS, C)


@gluon.jit
def _consume(sm, p, W: gl.constexpr, C: gl.constexpr):
    """Four warps: 64 rows of each tile."""
    wait_tile(sm, 0, W, C)
    tile = card(sm, 0, W, 4, C)
    if C.q_buffers == 1:
        _consume_one_by_one(tile, sm, p, W, C)
    elif C.halves:
        _consume_window(tile, sm, p, W, C)
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
    if C.copied:
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
        mbarrier.init(q_full.index(i), count=1 + C.copied)
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
                (claim_and_load_k, (k_desc, counter_ptr, sm, p, C)),
                (load_q, (q_desc, sm, p, C)),
                (load_v, (v_desc, sm, p, C, PIECE)),
                (store_out, (out_desc, sm, p, C)),
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
                (claim_and_load_k, (k_desc, counter_ptr, sm, p, C)),
                (load_q, (q_desc, sm, p, C)),
                (load_v, (v_desc, sm, p, C, PIECE)),
                (store_out, (out_desc, sm, p, C)),
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
