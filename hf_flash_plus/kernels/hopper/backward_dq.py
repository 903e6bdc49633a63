"""The Hopper kernel for dq in Gluon: persistent programs like the forward kernel's, each tile of rows in one of them.

Three warps keep shared memory filled: ``_load_k`` claims tiles of query rows from a counter, publishes them and
streams K; ``_load_v`` streams V; ``_load_rows`` loads Q and dout of each tile. Two warpgroups (``_consume``) compute
for 64 rows each, and for each block of keys::

    p = exp(scale * q k^T - lse)        ds = p * (dout v^T - delta)        dq += ds k

K serves two products. The next block's scores are started together with this block's product for dq, also where the
next block belongs to the next tile: Q's memory is free again once the tile's last scores are there. dq is summed in
registers in a fixed order and stored from there: bitwise repeatable.

``count`` counts blocks through all tiles: their barriers are numbered by it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .forward_feed import clean_v as clean_rows
from .forward_shared import tma_load, wait_use
from .primitives import retire, tanh
from .schedule import (
    CAUSAL,
    FULL,
    GAPS,
    INTERVALS,
    LAST,
    N_FIELDS,
    WINDOW,
    block_key,
    describe,
    fields,
    hide,
    look_up,
    n_row_tiles,
    needs_hiding,
    place,
    read,
    row_bounds,
    write,
)

#: Published tiles: the one that is computed, and the next.
SLOTS = gl.constexpr(2)


class Shared(NamedTuple):
    """Shared memory: buffers and barriers. A barrier's phase is told from how often its buffer was used before."""

    q: gl.tensor  # by warpgroup, as dout
    dout: gl.tensor
    k: gl.tensor
    v: gl.tensor
    tiles: gl.tensor
    tile_full: gl.tensor
    tile_empty: gl.tensor
    q_full: gl.tensor
    q_empty: gl.tensor
    dout_full: gl.tensor
    dout_empty: gl.tensor
    k_full: gl.tensor
    v_full: gl.tensor
    raw: gl.tensor  # a K, a V that has to be cleaned has arrived
    block_done: gl.tensor  # by K stage: no warpgroup needs the block's K and V any more


class Problem(NamedTuple):
    """The sizes and pointers of a call; the fields that ``schedule`` reads are named as in ``schedule.Problem``."""

    seqlen_q: gl.tensor
    seqlen_k: gl.tensor
    offset: gl.tensor
    nheads: gl.tensor
    group: gl.tensor
    n_heads_total: gl.tensor
    section: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    bounds_ptr: gl.tensor
    summary_ptr: gl.tensor
    intervals_batch: gl.tensor
    start_ptr: gl.tensor  # (batch * nheads, rows padded to tiles): -lse / scale, or (base2) -lse * log2(e)
    minus_delta_ptr: gl.tensor  # of the same shape
    dq_ptr: gl.tensor
    dq_rows: gl.tensor  # rows between two batch elements of dq
    factor: gl.tensor  # turns scores to base 2
    cap_factor: gl.tensor
    scale: gl.tensor


@gluon.jit
def _tile_number(sm, t, WARPS: gl.constexpr, C: gl.constexpr):
    """Wait for the program's t-th tile to be published. Its number, or -1 after the last."""
    wait_use(sm.tile_full, t, SLOTS)
    return read(sm.tiles, (t % SLOTS) * fields(C.mode), WARPS)


@gluon.jit
def _load_block(desc, buffers, full, raw, cleaned, stage, i, t, tile, sm, p, C: gl.constexpr, PIECE: gl.constexpr):
    """Start the load of the i-th block of keys of K or V. Returns how many blocks were cleaned so far.

    With row intervals, keys that no row of the tile sees are zeroed: they may hold NaN, and 0 * NaN is NaN.
    """
    BYTES: gl.constexpr = desc.dtype.primitive_bitwidth // 8 * C.block_n * C.v_dim
    key = block_key(i, tile, C)
    where = [tile.batch, key, tile.head // p.group, 0]
    if C.mode == INTERVALS:
        at = (t % SLOTS) * N_FIELDS
        last, gaps = read(sm.tiles, at + LAST, 1), read(sm.tiles, at + GAPS, 1)
        hidden = (key + C.block_n > last) | ((gaps > 0) & (i < tile.n_end + tile.n_begin))
        if hidden & (last > 0):
            mbarrier.expect(raw, BYTES)
            tma_load(desc, where, raw, buffers.index(stage))
            mbarrier.wait(raw, cleaned & 1)
            STAGES: gl.constexpr = buffers.shape[0]
            rows = buffers._reinterpret(desc.dtype, [STAGES * C.block_n * C.v_dim // 512, 8, 64], PIECE)
            clean_rows(rows, stage, key, last, tile, gaps, p, C)
            mbarrier.arrive(full, count=1)
            cleaned += 1
        else:
            mbarrier.expect(full, BYTES)
            tma_load(desc, where, full, buffers.index(stage))
    else:
        mbarrier.expect(full, BYTES)
        tma_load(desc, where, full, buffers.index(stage))
    return cleaned


@gluon.jit
def _load_k(k_desc, counter_ptr, sm, p, C: gl.constexpr, PIECE: gl.constexpr):
    """One warp: claims tiles, publishes them, streams K."""
    total = n_row_tiles(p, C) * p.n_heads_total
    n_programs = gl.num_programs(0)
    count = 0
    cleaned = 0
    t = 0
    number = gl.program_id(0)
    while number < total:
        mbarrier.wait(sm.tile_empty.index(t % SLOTS), ((t // SLOTS) & 1) ^ 1)
        describe(number, sm.tiles, t % SLOTS, p, C)
        mbarrier.arrive(sm.tile_full.index(t % SLOTS), count=1)
        # What this warp wrote itself, in all its threads.
        tile = look_up(number, sm.tiles, t % SLOTS, p, 1, C)
        for i in range(tile.n_blocks):
            stage = count % C.k_stages
            mbarrier.wait(sm.block_done.index(stage), ((count // C.k_stages) & 1) ^ 1)
            cleaned = _load_block(
                k_desc, sm.k, sm.k_full.index(stage), sm.raw.index(0), cleaned, stage, i, t, tile, sm, p, C, PIECE
            )
            count += 1
        t += 1
        number = gl.atomic_add(counter_ptr, 1) + n_programs
    mbarrier.wait(sm.tile_empty.index(t % SLOTS), ((t // SLOTS) & 1) ^ 1)
    write(sm.tiles, (t % SLOTS) * fields(C.mode), -1)
    mbarrier.arrive(sm.tile_full.index(t % SLOTS), count=1)
    # Every block waits for the K of the next one; this stands for the K after the last.
    mbarrier.wait(sm.block_done.index(count % C.k_stages), ((count // C.k_stages) & 1) ^ 1)
    mbarrier.arrive(sm.k_full.index(count % C.k_stages), count=1)
    # The last program leaves both counters at zero for the next launch.
    done = gl.atomic_add(counter_ptr + 1, 1)
    if done == n_programs - 1:
        gl.atomic_xchg(counter_ptr, 0)
        gl.atomic_xchg(counter_ptr + 1, 0)


@gluon.jit
def _load_v(v_desc, sm, p, C: gl.constexpr, PIECE: gl.constexpr):
    """One warp: streams V."""
    count = 0
    cleaned = 0
    t = 0
    number = _tile_number(sm, 0, 1, C)
    while number >= 0:
        tile = look_up(number, sm.tiles, t % SLOTS, p, 1, C)
        for i in range(tile.n_blocks):
            freed = count - C.v_stages
            if freed >= 0:
                wait_use(sm.block_done, freed, C.k_stages)
            stage = count % C.v_stages
            cleaned = _load_block(
                v_desc, sm.v, sm.v_full.index(stage), sm.raw.index(1), cleaned, stage, i, t, tile, sm, p, C, PIECE
            )
            count += 1
        mbarrier.arrive(sm.tile_empty.index(t % SLOTS), count=1)
        t += 1
        number = _tile_number(sm, t, 1, C)


@gluon.jit
def _load_rows(q_desc, dout_desc, sm, p, C: gl.constexpr):
    """One warp: loads Q and dout of each tile, for each warpgroup as soon as it has done with the last ones."""
    BYTES: gl.constexpr = q_desc.dtype.primitive_bitwidth // 8 * 64 * C.v_dim
    CONSUMERS: gl.constexpr = C.consumers
    t = 0
    number = _tile_number(sm, 0, 1, C)
    while number >= 0:
        first_row, batch, head = place(number, p, C)
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(sm.q_empty.index(w), (t & 1) ^ 1)
            mbarrier.expect(sm.q_full.index(w), BYTES)
            tma_load(q_desc, [batch, first_row + w * 64, head, 0], sm.q_full.index(w), sm.q.index(w))
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(sm.dout_empty.index(w), (t & 1) ^ 1)
            mbarrier.expect(sm.dout_full.index(w), BYTES)
            tma_load(dout_desc, [batch, first_row + w * 64, head, 0], sm.dout_full.index(w), sm.dout.index(w))
        mbarrier.arrive(sm.tile_empty.index(t % SLOTS), count=1)
        t += 1
        number = _tile_number(sm, t, 1, C)
    # Every tile waits for the Q of the next one; this stands for the Q after the last.
    for w in gl.static_range(CONSUMERS):
        mbarrier.wait(sm.q_empty.index(w), (t & 1) ^ 1)
        mbarrier.arrive(sm.q_full.index(w), count=1)


@gluon.jit
def _start_scores(sm, count, zeros, W: gl.constexpr, C: gl.constexpr):
    """Start ``Q K(count)^T`` of the tile whose Q has arrived."""
    q = sm.q.index(W).reshape([64, C.v_dim])
    k = sm.k.index(count % C.k_stages).reshape([C.block_n, C.v_dim])
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weights(
    s, start, step, tile, row_start, row_end, p, HIDE: gl.constexpr, W: gl.constexpr, LAYOUT: gl.constexpr,
    C: gl.constexpr,
):  # fmt: skip
    """The weights of a block, times the derivative of softcap."""
    if C.softcap:
        t = tanh(s * p.cap_factor)
        x = t * p.factor + start[:, None]
    else:
        t = s
        x = s
    if HIDE:
        first_key = block_key(step, tile, C)
        if needs_hiding(first_key, tile, p, W, C):
            x = hide(x, first_key, tile, row_start, row_end, p, W, LAYOUT, C)
    if C.softcap:
        return gl.exp2(x) * (1.0 - t * t)
    else:
        return gl.exp2(x * p.factor + start[:, None])


@gluon.jit
def _blocks(
    acc, scores, sm, t, count, begin, end, tile, start, minus_delta, row_start, row_end, zeros, p,
    HIDE: gl.constexpr, W: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The blocks ``begin`` to ``end`` of a tile; HIDE: some rows do not see all of them.

    ``scores`` were started at the end of the block before; each block starts those of the next.
    """
    DTYPE: gl.constexpr = sm.k.dtype
    for step in range(begin, end):
        last = step + 1 == tile.n_blocks
        wait_use(sm.v_full, count, C.v_stages)
        dout = sm.dout.index(W).reshape([64, C.v_dim])
        v = sm.v.index(count % C.v_stages).reshape([C.block_n, C.v_dim])
        # The next product cannot start before this wait: ptxas then serialises all of them.
        s = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(sm.q_empty.index(W), count=1, pred=last)
        dp_async = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        weights = _weights(s, start, step, tile, row_start, row_end, p, HIDE, W, S_LAYOUT, C)
        # A wait with a branch must stand here: ptxas otherwise hoists warpgroup_mma_wait over the exponentials.
        wait_use(sm.k_full, count, C.k_stages)  # long over
        dp = warpgroup_mma_wait(0, deps=[dp_async])
        mbarrier.arrive(sm.dout_empty.index(W), count=1, pred=last)
        ds = gl.convert_layout((weights * (dp + minus_delta[:, None])).to(DTYPE), P_LAYOUT)
        k = sm.k.index(count % C.k_stages).reshape([C.block_n, C.v_dim])
        acc_async = warpgroup_mma(ds, k, acc, is_async=True)
        mbarrier.wait(sm.q_full.index(W), (t + 1) & 1, pred=last)
        wait_use(sm.k_full, count + 1, C.k_stages)
        scores = _start_scores(sm, count + 1, zeros, W, C)
        acc = warpgroup_mma_wait(1, deps=[acc_async])
        mbarrier.arrive(sm.block_done.index(count % C.k_stages), count=1)
        count += 1
    return acc, scores, count


@gluon.jit
def _store(acc, start, tile, p, W: gl.constexpr, LAYOUT: gl.constexpr, C: gl.constexpr):
    """dq from registers to global memory; rows that weigh nothing get 0, whatever NaN their q holds."""
    rows = tile.first_row + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, C.v_dim, gl.SliceLayout(0, LAYOUT))
    empty = gl.convert_layout(start, gl.SliceLayout(1, LAYOUT)) == float("-inf")
    dq = gl.where(empty[:, None], 0.0, acc * p.scale).to(p.dq_ptr.dtype.element_ty)
    at = ((tile.batch.to(gl.int64) * p.dq_rows + rows) * p.nheads + tile.head) * C.head_dim
    inside = (rows < p.seqlen_q)[:, None]
    if C.head_dim != C.v_dim:
        inside = inside & (columns < C.head_dim)[None, :]
    gl.store(p.dq_ptr + at[:, None] + columns[None, :], dq, mask=inside)


@gluon.jit
def _consume(sm, p, W: gl.constexpr, C: gl.constexpr):
    """Four warps: 64 rows of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.v_dim, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DQ_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    zeros = gl.full([64, C.block_n], 0.0, gl.float32, S_LAYOUT)
    row_start = 0
    row_end = 0
    if C.mode == INTERVALS:
        row_start = gl.full([64], 0, gl.int32, S_ROWS)
        row_end = row_start
    count = 0
    t = 0
    number = _tile_number(sm, 0, 4, C)
    mbarrier.wait(sm.q_full.index(W), 0)
    wait_use(sm.k_full, 0, C.k_stages)
    scores = _start_scores(sm, 0, zeros, W, C)
    while number >= 0:
        tile = look_up(number, sm.tiles, t % SLOTS, p, 4, C)
        if C.mode == INTERVALS:
            row_start, row_end = row_bounds(tile, p, W, S_ROWS, C)
        first = (tile.batch * p.nheads + tile.head) * n_row_tiles(p, C) * (C.consumers * 64) + tile.first_row + W * 64
        at = first + gl.arange(0, 64, S_ROWS)
        start, minus_delta = gl.load(p.start_ptr + at), gl.load(p.minus_delta_ptr + at)
        if not C.base2:
            start = start * p.factor
        acc = gl.full([64, C.v_dim], 0.0, gl.float32, DQ_LAYOUT)
        mbarrier.wait(sm.dout_full.index(W), t & 1)
        begin = 0
        if C.mode != FULL:
            if C.mode >= WINDOW:  # at least one: see backward._query_tiles for what a loop left out can do
                begin = max(tile.n_end + tile.n_begin, 1)
            elif C.mode == CAUSAL:  # those on the diagonal
                begin = min(tile.n_blocks, C.consumers * 64 // C.block_n)
            else:
                begin = 1
            acc, scores, count = _blocks(
                acc, scores, sm, t, count, 0, begin, tile, start, minus_delta, row_start, row_end, zeros, p,
                True, W, S_LAYOUT, P_LAYOUT, C,
            )  # fmt: skip
        acc, scores, count = _blocks(
            acc, scores, sm, t, count, begin, tile.n_blocks, tile, start, minus_delta, row_start, row_end, zeros, p,
            False, W, S_LAYOUT, P_LAYOUT, C,
        )  # fmt: skip
        mbarrier.arrive(sm.tile_empty.index(t % SLOTS), count=1)
        _store(acc, start, tile, p, W, DQ_LAYOUT, C)
        t += 1
        number = _tile_number(sm, t, 4, C)
    warpgroup_mma_wait(0, deps=[scores])  # started for a tile that does not follow


#: Nothing may be compiled anew for another length, stride or address.
RUNTIME = (
    "counter_ptr", "bounds_ptr", "summary_ptr", "start_ptr", "minus_delta_ptr", "dq_rows", "seqlen_q", "seqlen_k",
    "offset", "nheads", "group", "n_heads_total", "section", "window_left", "window_right", "intervals_batch",
)  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME)
def attention_backward_dq(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    dq_ptr,
    counter_ptr,
    bounds_ptr,
    summary_ptr,
    start_ptr,
    minus_delta_ptr,
    dq_rows,
    seqlen_q,
    seqlen_k,
    offset,
    nheads,
    group,
    n_heads_total,
    section,
    window_left,
    window_right,
    intervals_batch,
    factor,
    cap_factor,
    scale,
    C: gl.constexpr,
    PIECE: gl.constexpr,
):
    """dq of all query rows, contiguous (batch, dq_rows, nheads, head dim).

    Descriptors are of (batch, seqlen, heads, head dim) tensors; ``bounds_ptr`` and ``summary_ptr`` as in the forward
    kernel. ``PIECE`` is the layout of 8 rows by 64 columns in shared memory.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    NW: gl.constexpr = C.consumers
    KST: gl.constexpr = C.k_stages
    VST: gl.constexpr = C.v_stages
    N_SLOTS: gl.constexpr = SLOTS
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(DTYPE, [NW, 1, 64, 1, C.v_dim], q_desc.layout)
    dout = gl.allocate_shared_memory(DTYPE, [NW, 1, 64, 1, C.v_dim], dout_desc.layout)
    k = gl.allocate_shared_memory(DTYPE, [KST, 1, C.block_n, 1, C.v_dim], k_desc.layout)
    v = gl.allocate_shared_memory(DTYPE, [VST, 1, C.block_n, 1, C.v_dim], v_desc.layout)
    tiles = gl.allocate_shared_memory(gl.int32, [N_SLOTS * fields(C.mode), 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [N_SLOTS, 1], barrier)
    tile_empty = gl.allocate_shared_memory(gl.int64, [N_SLOTS, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [NW, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [NW, 1], barrier)
    dout_full = gl.allocate_shared_memory(gl.int64, [NW, 1], barrier)
    dout_empty = gl.allocate_shared_memory(gl.int64, [NW, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [KST, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [VST, 1], barrier)
    raw = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    block_done = gl.allocate_shared_memory(gl.int64, [KST, 1], barrier)
    for i in gl.static_range(N_SLOTS):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=NW + 2)  # those who compute, and two who load
        mbarrier.init(raw.index(i), count=1)
    for i in gl.static_range(NW):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(dout_empty.index(i), count=1)
    for i in gl.static_range(KST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(block_done.index(i), count=NW)
    for i in gl.static_range(VST):
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()

    sm = Shared(
        q, dout, k, v, tiles, tile_full, tile_empty, q_full, q_empty, dout_full, dout_empty, k_full, v_full, raw,
        block_done,
    )  # fmt: skip
    p = Problem(
        seqlen_q, seqlen_k, offset, nheads, group, n_heads_total, section, window_left, window_right, bounds_ptr,
        summary_ptr, intervals_batch, start_ptr, minus_delta_ptr, dq_ptr, dq_rows, factor, cap_factor, scale,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (sm, p, 0, C)),
            (_consume, (sm, p, 1, C)),
            (_load_k, (k_desc, counter_ptr, sm, p, C, PIECE)),
            (_load_v, (v_desc, sm, p, C, PIECE)),
            (_load_rows, (q_desc, dout_desc, sm, p, C)),
        ],
        [4, 1, 1, 1],
        [C.consumer_registers, C.other_registers, C.other_registers, C.other_registers],
    )
    retire(tile_full)
    retire(tile_empty)
    retire(q_full)
    retire(q_empty)
    retire(dout_full)
    retire(dout_empty)
    retire(k_full)
    retire(v_full)
    retire(raw)
    retire(block_done)
