"""The Hopper backward kernel with its loop turned: the exponentials of a tile beside the products of the tile before.

Roles of the warps, tiles and operands are those of :mod:`.backward`, which says what is computed. What differs is where
an iteration begins: between two tiles, with ds of the one in shared memory. Its dq, the scores of the next and its dk
are started together. While they are computed dq goes to shared memory, and the next tile's weights are made; those are
in turn what its dp and dv are started with, beside which its ds is made.

dk, too, takes ds from shared memory, since its share of it in registers would be held for too long. q is needed for
longer than dout, so they have buffers of their own number, freed one by one.

The order of waits is what keeps ptxas from serialising the products: change it only with its warnings C7510 to C7519 in
view, which tests/kernels/aot checks. Something has to need the weights before dk is waited for: else ptxas computes
them behind that wait.
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

from .backward import (
    BLOCK_N,
    ENTRY_DIRTY,
    ENTRY_MASKED,
    ENTRY_TILE,
    MASK_ANY,
    MASK_LEADING,
    MASK_NONE,
    RUNTIME,
    _hand_over,
    _load_bounds,
    _load_tile,
    _next_start,
    _phase,
    _query_tiles,
    _read,
    _schedule,
    _storer,
    _visible,
    _weights,
    _zero_hidden_rows,
    _zero_not_finite,
    meet,
    scores_layout,
)
from .primitives import retire

#: Named barriers, see ``backward.DQ_BARRIER``: a buffer of q, of dout is free (one for each buffer, at most three).
Q_BARRIER = gl.constexpr(9)
DOUT_BARRIER = gl.constexpr(12)


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
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    ROTATE: gl.constexpr,
    LISTED: gl.constexpr,
    PHASES: gl.constexpr,
):
    """One warp: k and v of the program, then q and dout of every step."""
    q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc = descs
    q_smem, k_smem, v_smem, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem = shared
    q_blocks, dout_blocks = blocks
    kv_full, q_full, dout_full, dirty_full = bars
    batch, k_head, first_head, n_heads, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q = where
    entries_ptr, bounds_ptr, n_rows, bounds_at = pointers
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    N: gl.constexpr = k_smem.shape[0]
    HEAD_BYTES: gl.constexpr = BLOCK_D * 2
    ROW_BYTES: gl.constexpr = BLOCK_M * 4
    BOUND_BYTES: gl.constexpr = 2 * ROW_BYTES if LISTED else 0

    mbarrier.expect(kv_full.index(0), N * HEAD_BYTES)
    _load_tile(k_desc, [batch, first_key, k_head, 0], kv_full.index(0), k_smem, N, BLOCK_D)
    if LISTED:  # v is waited for before the first step
        mbarrier.expect(kv_full.index(1), N * HEAD_BYTES)
        _load_tile(v_desc, [batch, first_key, k_head, 0], kv_full.index(1), v_smem, N, BLOCK_D)
    it = 0
    dirty_phase = 0
    for phase in gl.static_range(PHASES):
        begin, end = _phase(phase, n, n_before, PHASES)
        for local_head in range(n_heads):
            head = first_head + local_head
            rows_at = (batch * nheads + head) * (n_tiles_q * BLOCK_M)
            for i in range(begin, end):
                stage, dout_stage = it % Q_STAGES, it % DOUT_STAGES
                tile = first_tile + i
                dirty = False
                if ROTATE:
                    tile = i + rotation
                    tile = first_tile + gl.where(tile >= n, tile - n, tile)
                if LISTED:
                    entry = gl.load(entries_ptr + i)
                    tile = entry & ENTRY_TILE
                    dirty = (entry & ENTRY_DIRTY) != 0
                row = tile * BLOCK_M
                if it >= Q_STAGES:
                    meet("sync", Q_BARRIER + stage)
                if LISTED:  # read by the consumers once they have waited for q
                    entry_smem.index(stage).store(gl.full([1], entry, gl.int32, ONE))
                    gl.thread_barrier()  # an `expect`, unlike an `arrive`, publishes only what its own thread wrote
                if LISTED and dirty:
                    if it >= DOUT_STAGES:
                        meet("sync", DOUT_BARRIER + dout_stage)
                    mbarrier.expect(dirty_full, 2 * (BLOCK_M * HEAD_BYTES + ROW_BYTES) + BOUND_BYTES)
                    _load_bounds(bounds_desc, bounds_at + row, n_rows, dirty_full, bounds_smem, stage)
                    _load_tile(q_desc, [batch, row, head, 0], dirty_full, q_smem.index(stage), BLOCK_M, BLOCK_D)
                    tma.async_copy_global_to_shared(start_desc, [rows_at + row], dirty_full, start_smem.index(stage))
                    dout_buffer = dout_smem.index(dout_stage)
                    _load_tile(dout_desc, [batch, row, head, 0], dirty_full, dout_buffer, BLOCK_M, BLOCK_D)
                    delta_buffer = delta_smem.index(dout_stage)
                    tma.async_copy_global_to_shared(delta_desc, [rows_at + row], dirty_full, delta_buffer)
                    mbarrier.wait(dirty_full, dirty_phase)
                    dirty_phase = dirty_phase ^ 1
                    _zero_hidden_rows(q_blocks, stage, row, bounds_ptr, n_rows, BLOCK_M, BLOCK_D)
                    mbarrier.arrive(q_full.index(stage), count=1)
                    _zero_hidden_rows(dout_blocks, dout_stage, row, bounds_ptr, n_rows, BLOCK_M, BLOCK_D)
                    mbarrier.arrive(dout_full.index(dout_stage), count=1)
                else:
                    full = q_full.index(stage)
                    mbarrier.expect(full, BLOCK_M * HEAD_BYTES + ROW_BYTES + BOUND_BYTES)
                    if LISTED:
                        _load_bounds(bounds_desc, bounds_at + row, n_rows, full, bounds_smem, stage)
                    _load_tile(q_desc, [batch, row, head, 0], full, q_smem.index(stage), BLOCK_M, BLOCK_D)
                    tma.async_copy_global_to_shared(start_desc, [rows_at + row], full, start_smem.index(stage))
                    if not LISTED:  # noqa: SIM102  (one condition is known at compile time, the other is not)
                        if it == 0:  # behind the first q: the first product needs k and q only
                            mbarrier.expect(kv_full.index(1), N * HEAD_BYTES)
                            _load_tile(v_desc, [batch, first_key, k_head, 0], kv_full.index(1), v_smem, N, BLOCK_D)
                    if it >= DOUT_STAGES:
                        meet("sync", DOUT_BARRIER + dout_stage)
                    full = dout_full.index(dout_stage)
                    mbarrier.expect(full, BLOCK_M * HEAD_BYTES + ROW_BYTES)
                    dout_buffer = dout_smem.index(dout_stage)
                    _load_tile(dout_desc, [batch, row, head, 0], full, dout_buffer, BLOCK_M, BLOCK_D)
                    tma.async_copy_global_to_shared(delta_desc, [rows_at + row], full, delta_smem.index(dout_stage))
                it += 1
    # Leave no barrier half full.
    for last in range(max(it, Q_STAGES), it + Q_STAGES):
        meet("sync", Q_BARRIER + last % Q_STAGES)
    for last in range(max(it, DOUT_STAGES), it + DOUT_STAGES):
        meet("sync", DOUT_BARRIER + last % DOUT_STAGES)


@gluon.jit
def _start_dp(it, v_smem, dout_smem, delta_smem, dout_full, zeros, DOUT_STAGES: gl.constexpr):
    """Start the product for a tile's dp."""
    stage = it % DOUT_STAGES
    mbarrier.wait(dout_full.index(stage), (it // DOUT_STAGES) & 1)
    _, delta = gl.broadcast(zeros, delta_smem.index(stage).load(gl.SliceLayout(0, zeros.type.layout))[None, :])
    return warpgroup_mma(v_smem, dout_smem.index(stage).permute((1, 0)), delta, is_async=True)


@gluon.jit
def _first_half(
    it,
    tile,
    masked,
    DK_PENDING: gl.constexpr,
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
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    DS_SHARED: gl.constexpr,
    DK_SHARED: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
):
    """A query tile's weights, dv and ds. Beside the weights, dk of the tile before is computed, if one is pending.

    Args:
        DK_PENDING: whether a product for dk was started after the one for the scores.
        MASK: MASK_NONE, MASK_LEADING (mask) or MASK_ANY (mask where ``masked`` says so).
        DS_SHARED: ds is needed in shared memory.
        DP_EARLY: dp is started before the weights are made, not with dv: 0 never, 1 in tiles without masks, 2 always.
        DV_LATE: dv is still being computed at the end.
    """
    _, _, v_smem, dout_smem, ds_smem, start_smem, delta_smem, _ = shared
    _, dout_full, _ = bars
    right, left, scale2, cap_in, cap_out = numbers
    DTYPE: gl.constexpr = v_smem.dtype
    L: gl.constexpr = scores_layout(BLOCK_M)
    P_L: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, L)
    stage, dout_stage = it % Q_STAGES, it % DOUT_STAGES
    # The first tile has nothing beside which dp would be early, and there ptxas would have it wait.
    EARLY: gl.constexpr = DK_PENDING and (DP_EARLY == 2 or (DP_EARLY == 1 and MASK == MASK_NONE))
    if EARLY:
        dp_async = _start_dp(it, v_smem, dout_smem, delta_smem, dout_full, zeros, DOUT_STAGES)
    s = warpgroup_mma_wait((1 if DK_PENDING else 0) + (1 if EARLY else 0), deps=[scores])
    if HAS_SOFTCAP:
        row_start = start_smem.index(stage).load(gl.SliceLayout(0, L))
    else:
        row_start = key_start
    p, g = _weights(s, key_start, row_start, (scale2, cap_in, cap_out), HAS_SOFTCAP, TAIL)
    bounds = (bounds_smem, stage)
    if MASK == MASK_LEADING:
        visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
        p = gl.where(visible, p, 0.0)
        if HAS_SOFTCAP:
            g = gl.where(visible, g, 0.0)
    if MASK == MASK_ANY:  # noqa: SIM102  (one condition is known at compile time, the other is not)
        if masked:
            visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
            p = gl.where(visible, p, 0.0)
            if HAS_SOFTCAP:
                g = gl.where(visible, g, 0.0)
    if not HAS_SOFTCAP:
        g = p
    # What dk's product holds of ds is needed for the weights.
    DK_FIRST: gl.constexpr = EARLY and not DK_SHARED
    if DK_FIRST:
        if HAS_SOFTCAP:
            dk, p, g = warpgroup_mma_wait(1, deps=[dk, p, g])
        else:
            dk, p = warpgroup_mma_wait(1, deps=[dk, p])
            g = p
        meet("arrive", Q_BARRIER + (it - 1) % Q_STAGES)
    if not EARLY:
        dp_async = _start_dp(it, v_smem, dout_smem, delta_smem, dout_full, zeros, DOUT_STAGES)
    dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_L), dout_smem.index(dout_stage), dv, is_async=True)
    if DK_PENDING and not DK_FIRST:
        dk = warpgroup_mma_wait(2, deps=[dk])
        meet("arrive", Q_BARRIER + (it - 1) % Q_STAGES)
    dp = warpgroup_mma_wait(1, deps=[dp_async])
    ds = (g * dp).to(DTYPE)
    if DS_SHARED:
        # Two buffers: the other warpgroup may still be at the last step's dq, but not at the one before.
        ds_smem.index(it % 2).store(ds)
        fence_async_shared()
        gl.thread_barrier()
    if not DV_LATE:
        dv = warpgroup_mma_wait(0, deps=[dv])
        meet("arrive", DOUT_BARRIER + dout_stage)
    return gl.convert_layout(ds, P_L), dk, dv


@gluon.jit
def _start_dq(it, k_smem, ds_smem, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """Start the product for a tile's dq."""
    DQ_WARPS: gl.constexpr = [4, 2] if BLOCK_M == 64 else [8, 1]
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], DQ_WARPS, [16, 64, 16])
    dq = gl.full([BLOCK_M, BLOCK_D], 0.0, gl.float32, DQ_L)
    return warpgroup_mma(ds_smem.index(it % 2).permute((1, 0)), k_smem, dq, use_acc=False, is_async=True)


@gluon.jit
def _start_dk(it, ds, dk, q_smem, ds_smem, Q_STAGES: gl.constexpr, DK_SHARED: gl.constexpr):
    """Start the product for a tile's dk, with ds from shared memory or from registers."""
    q = q_smem.index(it % Q_STAGES)
    if DK_SHARED:
        dk = warpgroup_mma(ds_smem.index(it % 2), q, dk, is_async=True)
    else:
        dk = warpgroup_mma(ds, q, dk, is_async=True)
    return dk


@gluon.jit
def _step(
    it,
    tile,
    masked,
    ds,
    dk,
    dv,
    first_key,
    key_start,
    shared,
    bars,
    numbers,
    lists,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
    DK_SHARED: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
):
    """What is left of tile number ``it``, and the first half of the next, ``tile``."""
    q_smem, k_smem, _, _, ds_smem, start_smem, _, dq_smem = shared
    q_full, _, dq_free = bars
    bounds_smem, entry_smem = lists
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, scores_layout(BLOCK_M))
    next_stage = (it + 1) % Q_STAGES
    if WITH_DQ:
        dq_async = _start_dq(it, k_smem, ds_smem, BLOCK_M, BLOCK_D)
    mbarrier.wait(q_full.index(next_stage), ((it + 1) // Q_STAGES) & 1)
    start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, scores_layout(BLOCK_M))
    scores = warpgroup_mma(k_smem, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
    dk = _start_dk(it, ds, dk, q_smem, ds_smem, Q_STAGES, DK_SHARED)
    if DV_LATE and not WITH_DQ:
        dv = warpgroup_mma_wait(2, deps=[dv])
    if WITH_DQ:
        if DV_LATE:
            dv, dq = warpgroup_mma_wait(2, deps=[dv, dq_async])
        else:
            dq = warpgroup_mma_wait(2, deps=[dq_async])
    if DV_LATE:
        meet("arrive", DOUT_BARRIER + it % DOUT_STAGES)
    if WITH_DQ:
        _hand_over(dq, it, dq_smem, dq_free)
    if LISTED:
        masked = (_read(entry_smem.index(next_stage)) & ENTRY_MASKED) != 0
    return _first_half(
        it + 1, tile, masked, True, scores, dk, dv, first_key, key_start, shared, bars, numbers, bounds_smem,
        BLOCK_M, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL, WITH_DQ or DK_SHARED, DK_SHARED,
        DP_EARLY, DV_LATE,
    )  # fmt: skip


@gluon.jit
def _store_rows(ptr, stride, n_keys, x, buffer, DIM: gl.constexpr):
    """Store the first ``n_keys`` rows of dk or dv; ``ptr`` points at the tile's first row.

    ``buffer`` is shared memory of the tile's shape that nobody needs any more, through which threads get whole rows.
    """
    BLOCK_D: gl.constexpr = x.shape[1]
    PIECES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [8, 1], [1, 0])
    # fp32 is stored as it lies in registers, which fills sectors of 32 bytes.
    DIRECT: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 32
    LAYOUT: gl.constexpr = x.type.layout if DIRECT else PIECES
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    inside = (rows < n_keys)[:, None]
    if DIM != BLOCK_D:
        inside = inside & (columns < DIM)[None, :]
    at = ptr + rows[:, None] * stride + columns[None, :]
    if DIRECT:
        gl.store(at, x, mask=inside)
    else:
        buffer.store(x.to(buffer.dtype))
        gl.thread_barrier()
        gl.store(at, buffer.load(LAYOUT), mask=inside)


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
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
    DK_SHARED: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
):
    """Two warpgroups: dk and dv of 64 keys each, and each step's dq together."""
    q_smem, k_smem, v_smem, _, ds_smem, start_smem, _, dq_smem = shared
    kv_full, q_full, dout_full, dq_free = bars
    dk_ptr, dv_ptr, dk_stride, dv_stride, scale = dkv
    first_key, seqlen_k, n_heads, first_tile = work
    n, n_before, n_full = steps
    bounds_smem, entry_smem = lists
    L: gl.constexpr = scores_layout(BLOCK_M)
    OUT_L: gl.constexpr = scores_layout(BLOCK_D)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, L)
    keys = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, L))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    dk = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
    dv = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
    DS_SHARED: gl.constexpr = WITH_DQ or DK_SHARED
    total = n * n_heads
    step_bars = (q_full, dout_full, dq_free)

    mbarrier.wait(kv_full.index(0), 0)
    if LISTED:
        mbarrier.wait(kv_full.index(1), 0)
        _zero_not_finite(k_smem)
        _zero_not_finite(v_smem)
        gl.thread_barrier()
    if total > 0:
        mbarrier.wait(q_full.index(0), 0)
        start = _next_start(start_smem, 0, zeros, HAS_SOFTCAP, L)
        scores = warpgroup_mma(k_smem, q_smem.index(0).permute((1, 0)), start, is_async=True)
        if not LISTED:
            mbarrier.wait(kv_full.index(1), 0)
        masked = False
        if LISTED:
            masked = (_read(entry_smem.index(0)) & ENTRY_MASKED) != 0
        elif MASK == MASK_ANY:
            masked = (n_before > 0) | (n_full == 0)
        ds, dk, dv = _first_half(
            0, first_tile, masked, False, scores, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem,
            BLOCK_M, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL, DS_SHARED, DK_SHARED, DP_EARLY,
            DV_LATE,
        )  # fmt: skip
        if MASK == MASK_LEADING:
            BEFORE: gl.constexpr = BLOCK_N // BLOCK_M
            if BEFORE > 1 or GROUPED:
                for it in range(BEFORE * n_heads - 1):
                    ds, dk, dv = _step(
                        it, first_tile + (it + 1) % BEFORE, True, ds, dk, dv, first_key, key_start, shared, step_bars,
                        numbers, lists, BLOCK_M, BLOCK_D, Q_STAGES, DOUT_STAGES, MASK, False, False, HAS_SOFTCAP,
                        TAIL, WITH_DQ, DK_SHARED, DP_EARLY, DV_LATE,
                    )  # fmt: skip
            for it in range(BEFORE * n_heads - 1, total - 1):
                ds, dk, dv = _step(
                    it, 0, False, ds, dk, dv, first_key, key_start, shared, step_bars, numbers, lists,
                    BLOCK_M, BLOCK_D, Q_STAGES, DOUT_STAGES, MASK_NONE, False, False, HAS_SOFTCAP, TAIL, WITH_DQ,
                    DK_SHARED, DP_EARLY, DV_LATE,
                )  # fmt: skip
        else:
            i = n * 0
            for it in range(total - 1):  # over the tiles of all heads
                i += 1
                if GROUPED:
                    i = gl.where(i >= n, 0, i)
                masked = False
                if MASK == MASK_ANY:
                    masked = (i < n_before) | (i >= n_before + n_full)
                ds, dk, dv = _step(
                    it, first_tile + i, masked, ds, dk, dv, first_key, key_start, shared, step_bars, numbers, lists,
                    BLOCK_M, BLOCK_D, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL, WITH_DQ,
                    DK_SHARED, DP_EARLY, DV_LATE,
                )  # fmt: skip
        last = total - 1
        if WITH_DQ:
            dq_async = _start_dq(last, k_smem, ds_smem, BLOCK_M, BLOCK_D)
            dk = _start_dk(last, ds, dk, q_smem, ds_smem, Q_STAGES, DK_SHARED)
            dq = warpgroup_mma_wait(1, deps=[dq_async])
            _hand_over(dq, last, dq_smem, dq_free)
        else:
            dk = _start_dk(last, ds, dk, q_smem, ds_smem, Q_STAGES, DK_SHARED)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        meet("arrive", Q_BARRIER + last % Q_STAGES)
        if DV_LATE:
            meet("arrive", DOUT_BARRIER + last % DOUT_STAGES)
    gl.thread_barrier()  # the other warpgroup, too, has done with k and v
    _store_rows(dv_ptr, dv_stride, seqlen_k - first_key, dv, v_smem, V_HEAD_DIM)
    _store_rows(dk_ptr, dk_stride, seqlen_k - first_key, dk * scale, k_smem, HEAD_DIM)


@gluon.jit(do_not_specialize=RUNTIME)
def attention_backward_turned(
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
    bounds_ptr,
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
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LISTED: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    ROTATE: gl.constexpr,
    WITH_DQ: gl.constexpr,
    DK_SHARED: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """As ``backward.attention_backward``, with Q_STAGES buffers of q and DOUT_STAGES of dout, at most three each."""
    DTYPE: gl.constexpr = q_desc.dtype
    n_tiles_k = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    tile_n, split_batch_head = _schedule(gl.program_id(0), n_tiles_k, n_heads_total, section)
    n_batch_heads = n_heads_total // n_splits
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
    if LISTED:
        list_at = batch * list_stride
        n = gl.load(counts_ptr + list_at + tile_n)
        entries_ptr += (list_at + tile_n).to(gl.int64) * (n_tiles_q + 1)
        bounds_at = gl.where(list_stride > 0, batch, 0) * 2 * n_rows
        bounds_ptr += bounds_at
    rotation = 0
    if ROTATE:
        rotation = tile_n * (BLOCK_N // BLOCK_M) % n

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_D], SWIZZLED)
    v_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, BLOCK_D], SWIZZLED)
    q_smem = gl.allocate_shared_memory(DTYPE, [Q_STAGES, BLOCK_M, BLOCK_D], SWIZZLED)
    dout_smem = gl.allocate_shared_memory(DTYPE, [DOUT_STAGES, BLOCK_M, BLOCK_D], SWIZZLED)
    start_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], start_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [DOUT_STAGES, BLOCK_M], delta_desc.layout)
    bounds_smem = start_smem
    entry_smem = start_smem
    if LISTED:
        entry_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bounds_smem = gl.allocate_shared_memory(gl.int32, [2 * Q_STAGES, BLOCK_M], bounds_desc.layout)
    # Barriers: k and v are there; q, dout of a stage are there; q and dout that have to be cleaned are there.
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [DOUT_STAGES, 1], BARRIER)
    dirty_full = kv_full
    if LISTED:
        dirty_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        mbarrier.init(dirty_full, count=1)
    for b in gl.static_range(2):
        mbarrier.init(kv_full.index(b), count=1)
    for b in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(b), count=1)
    for b in gl.static_range(DOUT_STAGES):
        mbarrier.init(dout_full.index(b), count=1)
    dq_smem = q_smem
    dq_free = kv_full
    ds_smem = q_smem
    if WITH_DQ or DK_SHARED:
        ds_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, BLOCK_M], SWIZZLED)
    if WITH_DQ:
        dq_smem = gl.allocate_shared_memory(gl.float32, [64, 128], dq_desc.layout)
        dq_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        mbarrier.init(dq_free, count=1)
    fence_async_shared()

    q_blocks = q_smem
    dout_blocks = dout_smem
    if LISTED:
        BLOCKS: gl.constexpr = BLOCK_M * BLOCK_D // 512
        q_blocks = q_smem._reinterpret(DTYPE, [Q_STAGES * BLOCKS, 8, 64], SWIZZLED)
        dout_blocks = dout_smem._reinterpret(DTYPE, [DOUT_STAGES * BLOCKS, 8, 64], SWIZZLED)
    key_at = split.to(gl.int64) * dkv_stride_split + batch.to(gl.int64) * dkv_stride_b + first_key
    row_at = key_at * nheads_k + k_head
    shared = (q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem, dq_smem)
    dkv = (dk_ptr + row_at * HEAD_DIM, dv_ptr + row_at * V_HEAD_DIM, nheads_k * HEAD_DIM, nheads_k * V_HEAD_DIM, scale)
    work = (first_key, seqlen_k, heads_per_split, first_tile)
    lists = (bounds_smem, entry_smem)
    numbers = (right, left, scale2, cap_in, cap_out)
    where = (
        batch, k_head, first_head, heads_per_split, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc)
    buffers = (q_smem, k_smem, v_smem, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem)
    pointers = (entries_ptr, bounds_ptr, n_rows, bounds_at)
    PHASES: gl.constexpr = 2 if MASK == MASK_LEADING and GROUPED else 1
    bars = (kv_full, q_full, dout_full, dq_free)
    steps = (n, n_before, n_full)
    fill_bars = (kv_full, q_full, dout_full, dirty_full)
    if WITH_DQ:
        gl.warp_specialize(
            [
                (_consumer, (shared, bars, dkv, work, steps, lists, numbers, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_D,
                             Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, True,
                             DK_SHARED, DP_EARLY, DV_LATE)),
                (_producer, (descs, buffers, (q_blocks, dout_blocks), fill_bars, where, pointers, BLOCK_M, BLOCK_D,
                             Q_STAGES, DOUT_STAGES, ROTATE, LISTED, PHASES)),
                (_storer, (dq_desc, dq_smem, dq_free, where, entries_ptr, BLOCK_M, BLOCK_D, ROTATE, LISTED, PHASES)),
            ],
            [1, 1],
            [OTHER_REGISTERS, OTHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (shared, bars, dkv, work, steps, lists, numbers, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_D,
                             Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, False,
                             DK_SHARED, DP_EARLY, DV_LATE)),
                (_producer, (descs, buffers, (q_blocks, dout_blocks), fill_bars, where, pointers, BLOCK_M, BLOCK_D,
                             Q_STAGES, DOUT_STAGES, ROTATE, LISTED, PHASES)),
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
