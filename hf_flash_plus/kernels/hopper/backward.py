"""The Hopper backward kernel in Gluon: a program walks over the query tiles that see one tile of keys.

Its warps have roles. One producer warp keeps tiles of q, dout and two numbers a row flowing into shared memory, by the
tensor memory accelerator. Two warpgroups, 64 keys each, compute transposed (keys by rows)::

    p  = exp(scale * k q^T - lse)       dp = v dout^T - delta        ds = p * dp
    dv = p dout                         dk = scale * ds q            dq = scale * ds^T k

``-lse / scale`` and ``-delta`` are the start values of the first two products, so that they cost no addition. p and ds
go from registers into the products for dv and dk, which stay in registers over all query tiles (and, with grouped
heads, over the query heads of the group). dq needs ds of all keys, through shared memory. Its parts go through shared
memory too, to a storer warp that has the tensor memory accelerator add them to sums in fp32. The sums of all key tiles'
parts come in any order: the last bits of dq differ from run to run. Without dq (WITH_DQ false; ``backward_dq`` computes
it) the rest is bitwise repeatable.

Both warpgroups are one partition of 8 warps, since only the kernel's first partition gets uniform registers from ptxas;
in one of their own, the addresses of the products' operands would take so many of the others that it spills. They meet
once a step, at ds. All else is said by barriers at which they only arrive (Gluon's own arrival would make them wait).

A step: dv is started as soon as p is there, so that ds is computed beside it; dq is started before dk, so that dq goes
to shared memory beside dk; the next step's scores are started at the end. The order of waits is what keeps ptxas from
serialising the products: change it only with its warnings C7510 to C7519 in view, which tests/kernels/aot checks. This
is the loop for 128 columns, and for 64 under windows; else ``backward_halves`` has that for 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .backward_common import (
    BLOCK_N,
    BOUNDS,
    COUNT_COVERED,
    COUNT_ENTRIES,
    DQ_BARRIER,
    ENTRY_DIRTY,
    ENTRY_MASKED,
    ENTRY_TILE,
    MASK_ANY,
    MASK_LEADING,
    STAGE_BARRIER,
    _hand_over,
    _read,
    _store_rows,
    _zero_not_finite,
    meet,
    reduce_add,
    scores_layout,
)
from .backward_halves import _consumer_of_halves
from .primitives import retire

RUNTIME = [
    "list_stride", "nheads", "nheads_k", "heads_per_split", "n_splits", "seqlen_k", "dkv_stride_b", "dkv_stride_split",
    "n_tiles_q", "n_heads_total", "section", "right", "left",
]  # fmt: skip


@gluon.jit
def _schedule(pid, n_tiles, n_heads, section):
    """(tile, head) of a program, as ``primitives.schedule``: sections of heads, in each the tile varies slowest."""
    first = pid // (section * n_tiles) * section
    size = min(section, n_heads - first)
    within = pid - first * n_tiles
    return within // size, first + within % size


@gluon.jit
def _phase(phase: gl.constexpr, n, n_before, PHASES: gl.constexpr):
    """The query tiles of a phase: with grouped heads and a causal mask, those of all heads that mask come first."""
    begin = 0
    end = n
    if PHASES == 2:
        if phase == 0:
            end = n_before
        else:
            begin = n_before
    return begin, end


@gluon.jit
def _load_tile(desc, coordinates, barrier, buffer, BLOCK: gl.constexpr, BLOCK_D: gl.constexpr):
    """Start the copy of (BLOCK, BLOCK_D) elements of a (batch, seqlen, heads, head dim) tensor; beyond its end: 0."""
    view = buffer._reinterpret(buffer.dtype, [1, BLOCK, 1, BLOCK_D], desc.layout)
    tma.async_copy_global_to_shared(desc, coordinates, barrier, view)


@gluon.jit
def _load_bounds(desc, at, n_rows, barrier, buffer, stage):
    """Start the copies of a tile's row bounds: the first key of each row, and one past the last."""
    tma.async_copy_global_to_shared(desc, [at], barrier, buffer.index(2 * stage))
    tma.async_copy_global_to_shared(desc, [at + n_rows], barrier, buffer.index(2 * stage + 1))


@gluon.jit
def _zero_hidden_rows(buffer, stage, bounds, bounds_stage, hidden, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """Zero the rows of a tile that see no key: they may hold NaN, and a product would spread it. One warp does it, for
    which the others wait: it reads bounds where they have been copied to, and only those blocks that ``hidden`` names.

    ``buffer`` is all stages as blocks of 8 rows by 64 columns, the way that a tile with 128-byte swizzling lies there;
    ``bounds`` those of all stages (:func:`_load_bounds`).
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    GROUPS: gl.constexpr = BLOCK_M // 8
    by_groups = bounds._reinterpret(gl.int32, [bounds.shape[0] * GROUPS, 8], BOUNDS)
    for group in range(hidden & 255, hidden >> 8):
        at = 2 * bounds_stage * GROUPS + group
        seen = by_groups.index(at).load(ROWS) < by_groups.index(at + GROUPS).load(ROWS)
        for column in gl.static_range(BLOCK_D // 64):
            block = buffer.index((stage * (BLOCK_D // 64) + column) * GROUPS + group)
            block.store(gl.where(seen[:, None], block.load(LAYOUT), 0.0).to(buffer.dtype))
    fence_async_shared()


@gluon.jit
def _load_values(descs, shared, kv_full, at, unit, freed, it, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy of v; and, but for the program's first key head, of k, once steps before ``it`` need neither."""
    _, k_desc, v_desc, _, _, _, _ = descs
    _, k_smem, v_smem, _, _, _, _, _ = shared
    batch, k_head, first_key = at
    N: gl.constexpr = k_smem.shape[0]
    if unit > 0:
        for step in range(freed, it):
            meet("sync", STAGE_BARRIER + step % STAGES)
        mbarrier.expect(kv_full.index(0), N * BLOCK_D * 2)
        _load_tile(k_desc, [batch, first_key, k_head + unit, 0], kv_full.index(0), k_smem, N, BLOCK_D)
    mbarrier.expect(kv_full.index(1), N * BLOCK_D * 2)
    _load_tile(v_desc, [batch, first_key, k_head + unit, 0], kv_full.index(1), v_smem, N, BLOCK_D)


@gluon.jit
def _producer(
    descs,
    shared,
    blocks,
    bars,
    where,
    pointers,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    ROTATE: gl.constexpr,
    LISTED: gl.constexpr,
    MASKED_FIRST: gl.constexpr,
    PHASES: gl.constexpr,
    UNITS: gl.constexpr,
):
    """One warp: k and v of each key head, then q and dout of every step.

    MASKED_FIRST: the list begins with the tiles that mask, and the consumers know which those are: only they read
    bounds, and nobody reads entries.
    """
    q_desc, k_desc, _, dout_desc, start_desc, delta_desc, bounds_desc = descs
    q_smem, k_smem, _, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem = shared
    q_blocks, dout_blocks = blocks
    kv_full, q_full, dout_full, dirty_full = bars
    batch, k_head, first_head, n_heads, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q = where
    entries_ptr, hidden_ptr, n_rows, bounds_at = pointers
    at = (batch, k_head, first_key)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    N: gl.constexpr = k_smem.shape[0]
    HEAD_BYTES: gl.constexpr = BLOCK_D * 2
    ROW_BYTES: gl.constexpr = BLOCK_M * 4
    BOUND_BYTES: gl.constexpr = 2 * ROW_BYTES if LISTED else 0

    if LISTED:
        entry = gl.load(entries_ptr)  # each is asked for a step ahead
        if n > 0:
            mbarrier.expect(kv_full.index(0), N * HEAD_BYTES)
            _load_tile(k_desc, [batch, first_key, k_head, 0], kv_full.index(0), k_smem, N, BLOCK_D)
    else:
        mbarrier.expect(kv_full.index(0), N * HEAD_BYTES)
        _load_tile(k_desc, [batch, first_key, k_head, 0], kv_full.index(0), k_smem, N, BLOCK_D)
    it = 0
    freed = 0  # steps whose stage has been waited for
    dirty_phase = 0
    for unit in range(UNITS):
        unit_at = it
        for phase in gl.static_range(PHASES):
            begin, end = _phase(phase, n, n_before, PHASES)
            for local_head in range(n_heads):
                head = first_head + unit * n_heads + local_head
                rows_at = (batch * nheads + head) * (n_tiles_q * BLOCK_M)
                for i in range(begin, end):
                    stage = it % STAGES
                    tile = first_tile + i
                    dirty = False
                    if ROTATE:
                        tile = i + rotation
                        tile = first_tile + gl.where(tile >= n, tile - n, tile)
                    if LISTED:
                        tile = entry & ENTRY_TILE
                        dirty = (entry & ENTRY_DIRTY) != 0
                    row = tile * BLOCK_M
                    if it >= freed + STAGES:
                        meet("sync", STAGE_BARRIER + stage)
                        freed += 1
                    if LISTED and not MASKED_FIRST:  # read by the consumers once they have waited for q
                        entry_smem.index(stage).store(gl.full([1], entry, gl.int32, ONE))
                        gl.thread_barrier()  # an `expect`, unlike an `arrive`, publishes only what its own thread wrote
                    q, dout, full = q_smem.index(stage), dout_smem.index(stage), q_full.index(stage)
                    starts, deltas = start_smem.index(stage), delta_smem.index(stage)
                    if LISTED and dirty:
                        hidden = gl.load(hidden_ptr + tile)
                        mbarrier.expect(dirty_full, 2 * (BLOCK_M * HEAD_BYTES + ROW_BYTES) + BOUND_BYTES)
                        _load_bounds(bounds_desc, bounds_at + row, n_rows, dirty_full, bounds_smem, stage)
                        _load_tile(q_desc, [batch, row, head, 0], dirty_full, q, BLOCK_M, BLOCK_D)
                        tma.async_copy_global_to_shared(start_desc, [rows_at + row], dirty_full, starts)
                        _load_tile(dout_desc, [batch, row, head, 0], dirty_full, dout, BLOCK_M, BLOCK_D)
                        tma.async_copy_global_to_shared(delta_desc, [rows_at + row], dirty_full, deltas)
                        if it == unit_at:
                            _load_values(descs, shared, kv_full, at, unit, freed, it, BLOCK_D, STAGES)
                        mbarrier.wait(dirty_full, dirty_phase)
                        dirty_phase = dirty_phase ^ 1
                        _zero_hidden_rows(q_blocks, stage, bounds_smem, stage, hidden, BLOCK_M, BLOCK_D)
                        mbarrier.arrive(full, count=1)
                        _zero_hidden_rows(dout_blocks, stage, bounds_smem, stage, hidden, BLOCK_M, BLOCK_D)
                        mbarrier.arrive(dout_full.index(stage), count=1)
                    else:
                        if MASKED_FIRST:
                            if (entry & ENTRY_MASKED) != 0:
                                mbarrier.expect(full, BLOCK_M * HEAD_BYTES + ROW_BYTES + BOUND_BYTES)
                                _load_bounds(bounds_desc, bounds_at + row, n_rows, full, bounds_smem, stage)
                            else:
                                mbarrier.expect(full, BLOCK_M * HEAD_BYTES + ROW_BYTES)
                        else:
                            mbarrier.expect(full, BLOCK_M * HEAD_BYTES + ROW_BYTES + BOUND_BYTES)
                            if LISTED:
                                _load_bounds(bounds_desc, bounds_at + row, n_rows, full, bounds_smem, stage)
                        _load_tile(q_desc, [batch, row, head, 0], full, q, BLOCK_M, BLOCK_D)
                        tma.async_copy_global_to_shared(start_desc, [rows_at + row], full, starts)
                        if it == unit_at:  # behind the first q: the first product needs k and q only
                            _load_values(descs, shared, kv_full, at, unit, freed, it, BLOCK_D, STAGES)
                        mbarrier.expect(dout_full.index(stage), BLOCK_M * HEAD_BYTES + ROW_BYTES)
                        _load_tile(dout_desc, [batch, row, head, 0], dout_full.index(stage), dout, BLOCK_M, BLOCK_D)
                        tma.async_copy_global_to_shared(delta_desc, [rows_at + row], dout_full.index(stage), deltas)
                    if it == unit_at:
                        freed = it
                    if LISTED:
                        after = i + 1
                        if PHASES == 2:  # the first of this phase for the next head, or of the next phase
                            after = gl.where(i + 1 < end, after, gl.where(local_head + 1 < n_heads, begin, end))
                        entry = gl.load(entries_ptr + gl.where(after < n, after, 0))
                    it += 1
    for step in range(freed, it):  # leave no barrier half full
        meet("sync", STAGE_BARRIER + step % STAGES)


@gluon.jit
def _storer(
    dq_desc,
    dq_smem,
    dq_free,
    where,
    entries_ptr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    ROTATE: gl.constexpr,
    LISTED: gl.constexpr,
    PHASES: gl.constexpr,
    UNITS: gl.constexpr,
):
    """One warp: adds each step's dq, which the warpgroups leave in shared memory, to the sums in global memory."""
    batch, _, first_head, n_heads, nheads, _, first_tile, n, n_before, rotation, n_tiles_q = where
    ROWS: gl.constexpr = BLOCK_M * BLOCK_D // 128
    for unit in range(UNITS):
        for phase in gl.static_range(PHASES):
            begin, end = _phase(phase, n, n_before, PHASES)
            for local_head in range(n_heads):
                head_tiles = (batch * nheads + first_head + unit * n_heads + local_head) * n_tiles_q
                for i in range(begin, end):
                    tile = first_tile + i
                    if ROTATE:
                        tile = i + rotation
                        tile = first_tile + gl.where(tile >= n, tile - n, tile)
                    if LISTED:
                        tile = gl.load(entries_ptr + i) & ENTRY_TILE
                    meet("sync", DQ_BARRIER)
                    reduce_add(dq_desc, [(head_tiles + tile) * ROWS, 0], dq_smem)
                    tma.store_wait(0)
                    mbarrier.arrive(dq_free, count=1)


@gluon.jit
def _visible(first_key, first_row, right, left, bounds, HAS_LEFT: gl.constexpr, LISTED: gl.constexpr, L: gl.constexpr):
    """Which keys (rows of the tile) each query row (its columns) sees; ``L``: the layout of scores."""
    bounds_smem, stage = bounds
    keys = (first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, L)))[:, None]
    rows = gl.arange(0, L.instr_shape[1], gl.SliceLayout(0, L))
    if LISTED:
        start = bounds_smem.index(2 * stage).load(gl.SliceLayout(0, L))
        visible = keys >= start[None, :]
        end = bounds_smem.index(2 * stage + 1).load(gl.SliceLayout(0, L))
        visible = visible & (keys < end[None, :])
    else:
        visible = keys <= (first_row + right + rows)[None, :]
        if HAS_LEFT:
            visible = visible & (keys >= (first_row + left + rows)[None, :])
    return visible


@gluon.jit
def _weights(s, key_start, row_start, numbers, HAS_SOFTCAP: gl.constexpr, TAIL: gl.constexpr):
    """``(p, p with the derivative of softcap)`` from the scores. ``key_start`` is -inf beyond the last key, else 0."""
    scale2, cap_in, cap_out = numbers
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + gl.exp2(s * cap_in))
        x = t * cap_out + row_start[None, :]
        if TAIL:
            x = x + key_start[:, None]
        p = gl.exp2(x)
        g = p * (1.0 - t * t)
    else:
        if TAIL:
            p = gl.exp2(s * scale2 + key_start[:, None])
        else:
            p = gl.exp2(s * scale2)
        g = p
    return p, g


@gluon.jit
def _next_start(start_smem, stage, zeros, HAS_SOFTCAP: gl.constexpr, L: gl.constexpr):
    """What the product of scores starts at: -lse / scale of each row, or (with softcap) nothing."""
    if HAS_SOFTCAP:
        start = zeros
    else:
        _, start = gl.broadcast(zeros, start_smem.index(stage).load(gl.SliceLayout(0, L))[None, :])
    return start


@gluon.jit
def _step(
    it,
    total,
    tile,
    masked,
    scores,
    dk,
    dv,
    first_key,
    key_start,
    shared,
    bars,
    numbers,
    bounds_smem,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
):
    """One query tile. ``scores`` was started at the end of the step before; this one starts those of the next.

    Args:
        MASK: 0: nothing to mask; 1: mask; 2: mask where ``masked`` says so.
    """
    q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem, dq_smem = shared
    q_full, dout_full, dq_free = bars
    right, left, scale2, cap_in, cap_out = numbers
    DTYPE: gl.constexpr = q_smem.dtype
    L: gl.constexpr = scores_layout(BLOCK_M)
    OUT_L: gl.constexpr = scores_layout(BLOCK_D)
    P_L: gl.constexpr = gl.DotOperandLayout(0, OUT_L, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, L)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, L)
    stage, phase, buffer = it % STAGES, (it // STAGES) & 1, it % 2
    bounds = (bounds_smem, stage)
    next_stage, next_phase = (it + 1) % STAGES, ((it + 1) // STAGES) & 1

    mbarrier.wait(dout_full.index(stage), phase)
    _, delta = gl.broadcast(zeros, delta_smem.index(stage).load(COLUMNS)[None, :])
    s = warpgroup_mma_wait(0, deps=[scores])
    dp_async = warpgroup_mma(v_smem, dout_smem.index(stage).permute((1, 0)), delta, is_async=True)
    if HAS_SOFTCAP:
        row_start = start_smem.index(stage).load(COLUMNS)
    else:
        row_start = key_start
    p, g = _weights(s, key_start, row_start, (scale2, cap_in, cap_out), HAS_SOFTCAP, TAIL)
    if MASK == 1:
        visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
        p = gl.where(visible, p, 0.0)
        if HAS_SOFTCAP:
            g = gl.where(visible, g, 0.0)
        else:
            g = p
    if MASK == 2:
        if masked:
            visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
            p = gl.where(visible, p, 0.0)
            if HAS_SOFTCAP:
                g = gl.where(visible, g, 0.0)
        if not HAS_SOFTCAP:
            g = p
    dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_L), dout_smem.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_async])
    ds = (g * dp).to(DTYPE)
    if WITH_DQ:
        # Two buffers: the other warpgroup may still be at the last step's dq, but not at the one before.
        ds_smem.index(buffer).store(ds)
        fence_async_shared()
        gl.thread_barrier()
        DQ_WARPS: gl.constexpr = [4, 2] if BLOCK_M == 64 else [8, 1]
        DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], DQ_WARPS, [16, 64, 16])
        dq = gl.full([BLOCK_M, BLOCK_D], 0.0, gl.float32, DQ_L)
        ds_t = ds_smem.index(buffer).permute((1, 0))
        dq_async = warpgroup_mma(ds_t, k_smem, dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, P_L), q_smem.index(stage), dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq_async])
        _hand_over(dq, it, dq_smem, dq_free)
    else:
        dk = warpgroup_mma(gl.convert_layout(ds, P_L), q_smem.index(stage), dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
    mbarrier.wait(q_full.index(next_stage), next_phase, pred=it + 1 < total)
    start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, L)
    dk = warpgroup_mma_wait(0, deps=[dk])
    meet("arrive", STAGE_BARRIER + stage)
    scores = warpgroup_mma(k_smem, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
    return scores, dk, dv


@gluon.jit
def _consumer(
    shared,
    bars,
    dkv,
    work,
    steps,
    lists,
    numbers,
    HEAD_DIM: gl.constexpr,
    V_HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
    ALIGNED: gl.constexpr,
    UNITS: gl.constexpr,
):
    """Two warpgroups: dk and dv of 64 keys each, and each step's dq together."""
    gl.static_assert(UNITS == 1, "one key head a program")
    q_smem, k_smem, v_smem, _, _, start_smem, _, _ = shared
    kv_full, q_full, dout_full, dq_free = bars
    dk_ptr, dv_ptr, dk_stride, dv_stride, scale = dkv
    first_key, seqlen_k, n_heads, first_tile = work
    n, n_before, n_full = steps
    bounds_smem, entry_smem, covered = lists
    L: gl.constexpr = scores_layout(BLOCK_M)
    OUT_L: gl.constexpr = scores_layout(BLOCK_D)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, L)
    keys = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, L))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    dk = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
    dv = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
    total = n * n_heads
    step_bars = (q_full, dout_full, dq_free)

    if LISTED:  # without entries nothing is loaded, and what is computed here is not used
        mbarrier.wait(kv_full.index(0), 0, pred=total > 0)
        if (total > 0) & (covered == 0):
            mbarrier.wait(kv_full.index(1), 0)
            _zero_not_finite(k_smem)
            _zero_not_finite(v_smem)
            gl.thread_barrier()
    else:
        mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    start = _next_start(start_smem, 0, zeros, HAS_SOFTCAP, L)
    scores = warpgroup_mma(k_smem, q_smem.index(0).permute((1, 0)), start, is_async=True)
    if LISTED:
        mbarrier.wait(kv_full.index(1), 0, pred=total > 0)
    else:
        mbarrier.wait(kv_full.index(1), 0)

    if MASK == MASK_LEADING:
        if ALIGNED:
            before: gl.constexpr = BLOCK_N // BLOCK_M
        else:
            before = n_before
        for it in range(before * n_heads):
            tile = first_tile + it
            if GROUPED:
                tile = first_tile + it % before
            scores, dk, dv = _step(
                it, total, tile, True, scores, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem,
                BLOCK_M, BLOCK_D, STAGES, 1, False, False, HAS_SOFTCAP, TAIL, WITH_DQ,
            )  # fmt: skip
        for it in range(before * n_heads, total):
            scores, dk, dv = _step(
                it, total, 0, False, scores, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem,
                BLOCK_M, BLOCK_D, STAGES, 0, False, False, HAS_SOFTCAP, TAIL, WITH_DQ,
            )  # fmt: skip
    else:
        i = n * 0
        for it in range(total):  # over the tiles of all heads
            masked = False
            tile = first_tile + i
            if LISTED:
                entry = _read(entry_smem.index(it % STAGES))
                masked = (entry & ENTRY_MASKED) != 0
            elif MASK == MASK_ANY:
                masked = (i < n_before) | (i >= n_before + n_full)
            i += 1
            if GROUPED:
                i = gl.where(i >= n, 0, i)
            scores, dk, dv = _step(
                it, total, tile, masked, scores, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem,
                BLOCK_M, BLOCK_D, STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL, WITH_DQ,
            )  # fmt: skip
    warpgroup_mma_wait(0, deps=[scores])  # started for a step that does not follow
    _store_rows(dv_ptr, dv_stride, seqlen_k - first_key, dv, V_HEAD_DIM)
    _store_rows(dk_ptr, dk_stride, seqlen_k - first_key, dk * scale, HEAD_DIM)


@gluon.jit
def _query_tiles(
    first_key,
    n_tiles_q,
    right,
    left,
    BLOCK_M: gl.constexpr,
    KEYS: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """By the flags, ``(first tile, tiles, masked ones at the front, unmasked ones after them)`` of a tile of keys.

    Row ``i`` sees keys from ``i + left`` to ``i + right``; every key is seen by some row (the launch cuts off others).
    Rows beyond the last continue the pattern; they weigh nothing.
    """
    first = 0
    n_before = 0
    end = n_tiles_q
    full_end = n_tiles_q
    if HAS_RIGHT:
        first = max(first_key - right, 0) // BLOCK_M
        full_first = max(first_key + KEYS - 1 - right, 0)
        # At least one: the loop over those that mask is never left out where the one after it runs. From where it is
        # left out, ptxas (12.8) lets the second loop use descriptors that only the way into the first one computes.
        n_before = max((full_first + BLOCK_M - 1) // BLOCK_M - first, 1)
    if HAS_LEFT:
        end = min(end, (first_key + KEYS - left + BLOCK_M - 1) // BLOCK_M)
        full_end = max(first_key - left + 1, 0) // BLOCK_M
    n = max(end - first, 0)
    n_before = min(n_before, n)
    n_full = max(min(full_end, end) - first - n_before, 0)
    return first, n, n_before, n_full


@gluon.jit(do_not_specialize=RUNTIME)
def attention_backward(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    start_desc,
    delta_desc,
    bounds_desc,
    dq_desc,
    dk_ptr,
    dv_ptr,
    entries_ptr,
    counts_ptr,
    summary_ptr,
    list_stride,
    nheads,
    nheads_k,
    heads_per_split,
    n_splits,
    seqlen_k,
    dkv_stride_b,
    dkv_stride_split,
    n_tiles_q,
    n_heads_total,
    section,
    right,
    left,
    scale,
    scale2,
    cap_in,
    cap_out,
    HEAD_DIM: gl.constexpr,
    V_HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LISTED: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    ROTATE: gl.constexpr,
    WITH_DQ: gl.constexpr,
    ALIGNED: gl.constexpr,
    HALVES: gl.constexpr,
    UNITS: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """dk and dv of 128 keys of UNITS key heads, one after the other, each summed over ``heads_per_split`` query heads,
    and their part of dq.

    Args:
        q_desc, k_desc, v_desc, dout_desc: (batch, seqlen, heads, head dim) descriptors; k's and v's blocks are 128
            keys, q's and dout's BLOCK_M rows.
        start_desc, delta_desc: fp32 (batch * nheads * n_tiles_q * BLOCK_M,): -lse / scale (softcap, HALVES:
            -lse * log2(e)), -inf where a row weighs nothing, and -delta.
        dk_ptr, dv_ptr: (splits, batch, keys, nheads_k, head dim), rows contiguous; keys lie as far apart as
            ``nheads_k`` rows, batch elements and splits ``dkv_stride_b`` and ``dkv_stride_split`` keys.
        dq_desc: fp32 (rows, 128) in blocks of 64 rows: the sums of dq, in tiles of BLOCK_M by BLOCK_D whose numbers
            lie as :func:`_hand_over` says, zero before; only if WITH_DQ.
        entries_ptr, counts_ptr, summary_ptr: only if LISTED, see ``backward_prepare``; batch elements lie
            ``list_stride`` key tiles apart (0: one list for all). With MASK_LEADING the lists begin with what masks.
        n_heads_total, section: key heads (of all batch elements and splits), and those in flight together, both
            divided by UNITS, by which ``nheads_k`` is divisible, too.
        right, left: the flags' bounds: row i sees keys ``i + left <= key <= i + right``.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    n_tiles_k = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    tile_n, split_batch_head = _schedule(gl.program_id(0), n_tiles_k, n_heads_total, section)
    split_batch_head = split_batch_head * UNITS
    n_batch_heads = n_heads_total * UNITS // n_splits
    split = split_batch_head // n_batch_heads
    batch_head = split_batch_head % n_batch_heads
    batch, k_head = batch_head // nheads_k, batch_head % nheads_k
    first_head = k_head * (nheads // nheads_k) + split * heads_per_split
    first_key = tile_n * BLOCK_N
    first_tile, n, n_before, n_full = _query_tiles(
        first_key, n_tiles_q, right, left, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    n_rows = n_tiles_q * BLOCK_M
    bounds_at = 0
    covered = 0
    MASKED_FIRST: gl.constexpr = LISTED and MASK == MASK_LEADING
    if LISTED:
        list_at = batch * list_stride
        count = gl.load(counts_ptr + list_at + tile_n)
        n = count & COUNT_ENTRIES
        covered = count & COUNT_COVERED
        entries_ptr += (list_at + tile_n).to(gl.int64) * (n_tiles_q + 2)
        if MASKED_FIRST:
            n_before = gl.load(entries_ptr + n_tiles_q + 1)
        which = gl.where(list_stride > 0, batch, 0)
        bounds_at = which * 2 * n_rows
        summary_ptr += (5 * which + 4) * n_tiles_q
    rotation = 0
    if ROTATE:
        rotation = tile_n * (BLOCK_N // BLOCK_M) % n

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_D], SWIZZLED)
    v_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_D], SWIZZLED)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_D], SWIZZLED)
    dout_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_D], SWIZZLED)
    start_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], start_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    bounds_smem = start_smem
    entry_smem = start_smem
    if LISTED:
        if not MASKED_FIRST:
            entry_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bounds_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, BLOCK_M], bounds_desc.layout)
    # Barriers: k and v are there; q, dout of a stage are there; q and dout that have to be cleaned are there.
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    dirty_full = kv_full
    if LISTED:
        dirty_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        mbarrier.init(dirty_full, count=1)
    for b in gl.static_range(2):
        mbarrier.init(kv_full.index(b), count=1)
    for b in gl.static_range(STAGES):
        mbarrier.init(q_full.index(b), count=1)
        mbarrier.init(dout_full.index(b), count=1)
    ds_smem = q_smem
    dq_smem = q_smem
    dq_free = kv_full
    if WITH_DQ:
        if HALVES:
            first_ds = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], SWIZZLED)
            ds_smem = (first_ds, gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_M], SWIZZLED))
        else:
            ds_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, BLOCK_M], SWIZZLED)
        dq_smem = gl.allocate_shared_memory(gl.float32, [64, 128], dq_desc.layout)
        dq_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        mbarrier.init(dq_free, count=1)
    fence_async_shared()

    q_blocks = q_smem
    dout_blocks = dout_smem
    if LISTED:
        BLOCKS: gl.constexpr = STAGES * BLOCK_M * BLOCK_D // 512
        q_blocks = q_smem._reinterpret(DTYPE, [BLOCKS, 8, 64], SWIZZLED)
        dout_blocks = dout_smem._reinterpret(DTYPE, [BLOCKS, 8, 64], SWIZZLED)
    key_at = split.to(gl.int64) * dkv_stride_split + batch.to(gl.int64) * dkv_stride_b + first_key
    row_at = key_at * nheads_k + k_head
    shared = (q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem, dq_smem)
    dkv = (dk_ptr + row_at * HEAD_DIM, dv_ptr + row_at * V_HEAD_DIM, nheads_k * HEAD_DIM, nheads_k * V_HEAD_DIM, scale)
    work = (first_key, seqlen_k, heads_per_split, first_tile)
    lists = (bounds_smem, entry_smem, covered)
    numbers = (right, left, scale2, cap_in, cap_out)
    where = (
        batch, k_head, first_head, heads_per_split, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc)
    buffers = (q_smem, k_smem, v_smem, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem)
    pointers = (entries_ptr, summary_ptr, n_rows, bounds_at)
    PHASES: gl.constexpr = 2 if MASK == MASK_LEADING and GROUPED else 1
    bars = (kv_full, q_full, dout_full, dq_free)
    steps = (n, n_before, n_full)
    fill_bars = (kv_full, q_full, dout_full, dirty_full)
    if WITH_DQ:
        gl.warp_specialize(
            [
                (_consumer_of_halves if HALVES else _consumer,
                 (shared, bars, dkv, work, steps, lists, numbers, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_D, STAGES, MASK,
                  HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, True, ALIGNED, UNITS)),
                (_producer, (descs, buffers, (q_blocks, dout_blocks), fill_bars, where, pointers, BLOCK_M, BLOCK_D,
                             STAGES, ROTATE, LISTED, MASKED_FIRST, PHASES, UNITS)),
                (_storer, (dq_desc, dq_smem, dq_free, where, entries_ptr, BLOCK_M, BLOCK_D, ROTATE, LISTED, PHASES,
                           UNITS)),
            ],
            [1, 1],
            [OTHER_REGISTERS, OTHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer_of_halves if HALVES else _consumer,
                 (shared, bars, dkv, work, steps, lists, numbers, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_D, STAGES, MASK,
                  HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, False, ALIGNED, UNITS)),
                (_producer, (descs, buffers, (q_blocks, dout_blocks), fill_bars, where, pointers, BLOCK_M, BLOCK_D,
                             STAGES, ROTATE, LISTED, MASKED_FIRST, PHASES, UNITS)),
            ],
            [1],
            [OTHER_REGISTERS],
        )  # fmt: skip
    retire(kv_full)
    retire(q_full)
    retire(dout_full)
    if LISTED:
        mbarrier.invalidate(dirty_full)
    if WITH_DQ:
        mbarrier.invalidate(dq_free)
