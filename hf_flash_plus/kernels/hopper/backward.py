"""The Hopper backward kernel in Gluon: a program walks over the query tiles that see one tile of keys.

Its warps have roles. One producer warp keeps tiles of q, dout and two numbers a row flowing into shared memory, by the
tensor memory accelerator. Two consumer warpgroups own half of the keys each and compute, transposed (keys by rows)::

    p  = exp(scale * k q^T - lse)       dp = v dout^T - delta        ds = p * dp
    dv = p dout                         dk = scale * ds q            dq = scale * ds^T k

``-lse / scale`` and ``-delta`` are the start values of the first two products, so that they cost nothing. dk and dv
stay in registers over all query tiles (and, with grouped heads, over the query heads of the group). dq is summed over
the programs of all key tiles by atomic additions in fp32, in any order: its last bits differ from run to run.
Both warpgroups need all of ds for it, so it goes through shared memory, and each computes a 64 by 64 half of the tile.
Without dq (WITH_DQ false; another kernel computes it) the rest is bitwise repeatable. Additions in a fixed order, each
program waiting for its turn, were slower than a kernel for dq of its own (345 against 454 TFLOP/s on an H200).

The products of a step overlap with the exponentials of the other warpgroup, and the next step's first product is issued
before this step's last ones are used. The order of waits below is what keeps the assembler (ptxas) from serialising
them: change it only with its warnings C7510 to C7519 in view, which tests/kernels/aot checks.
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

LOG2E = gl.constexpr(1.4426950408889634)

#: Which steps of a program mask: none; the first ones (a causal mask), which get a loop of their own; or any, by a
#: branch (windows, lists of query tiles; causal masks with grouped heads: nested loops spill registers).
MASK_NONE = gl.constexpr(0)
MASK_LEADING = gl.constexpr(1)
MASK_ANY = gl.constexpr(2)

#: An entry of the list of query tiles: the tile's index, and what needs doing.
ENTRY_MASKED = gl.constexpr(1 << 29)
ENTRY_DIRTY = gl.constexpr(1 << 30)
ENTRY_TILE = gl.constexpr((1 << 29) - 1)

RUNTIME = [
    "list_stride", "nheads", "nheads_k", "heads_per_split", "n_splits", "seqlen_k", "dkv_stride_b", "dkv_stride_split",
    "n_tiles_q", "n_heads_total", "section", "right", "left",
]  # fmt: skip

#: Keys of a tile; half of them belong to each consumer warpgroup.
BLOCK_N = 128


@gluon.jit
def _schedule(pid, n_tiles, n_heads, section):
    """(tile, head) of a program, as ``primitives.schedule``: sections of heads, in each the tile varies slowest."""
    first = pid // (section * n_tiles) * section
    size = min(section, n_heads - first)
    within = pid - first * n_tiles
    return within // size, first + within % size


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
def _zero_hidden_rows(buffer, stage, first_row, bounds_ptr, n_rows, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """Zero the rows of a tile that see no key: they may hold NaN, and a product would spread it. One warp does it.

    ``buffer`` is all stages as blocks of 8 rows by 64 columns, the way that a tile with 128-byte swizzling lies there.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    GROUPS: gl.constexpr = BLOCK_M // 8
    local = gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
    for group in range(GROUPS):
        at = bounds_ptr + first_row + group * 8 + local
        seen = gl.load(at) < gl.load(at + n_rows)
        for column in gl.static_range(BLOCK_D // 64):
            block = buffer.index((stage * (BLOCK_D // 64) + column) * GROUPS + group)
            block.store(gl.where(seen[:, None], block.load(LAYOUT), 0.0).to(buffer.dtype))
    fence_async_shared()


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
):
    """One warp: k and v of the program, then q and dout of every step."""
    q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc = descs
    q_smem, k_smem, v_smem, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem = shared
    q_blocks, dout_blocks = blocks
    kv_full, q_full, dout_full, free, dirty_full = bars
    batch, k_head, first_head, n_heads, nheads, first_key, first_tile, n, rotation, n_tiles_q = where
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
    for local_head in range(n_heads):
        head = first_head + local_head
        rows_at = (batch * nheads + head) * (n_tiles_q * BLOCK_M)
        for i in range(n):
            stage = it % STAGES
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
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            if LISTED:  # read by the consumers once they have waited for q
                entry_smem.index(stage).store(gl.full([1], entry, gl.int32, ONE))
                gl.thread_barrier()  # an `expect`, unlike an `arrive`, publishes only what its own thread wrote
            if LISTED and dirty:
                mbarrier.expect(dirty_full, 2 * (BLOCK_M * HEAD_BYTES + ROW_BYTES) + BOUND_BYTES)
                _load_bounds(bounds_desc, bounds_at + row, n_rows, dirty_full, bounds_smem, stage)
                _load_tile(q_desc, [batch, row, head, 0], dirty_full, q_smem.index(stage), BLOCK_M, BLOCK_D)
                tma.async_copy_global_to_shared(start_desc, [rows_at + row], dirty_full, start_smem.index(stage))
                _load_tile(dout_desc, [batch, row, head, 0], dirty_full, dout_smem.index(stage), BLOCK_M, BLOCK_D)
                tma.async_copy_global_to_shared(delta_desc, [rows_at + row], dirty_full, delta_smem.index(stage))
                mbarrier.wait(dirty_full, dirty_phase)
                dirty_phase = dirty_phase ^ 1
                _zero_hidden_rows(q_blocks, stage, row, bounds_ptr, n_rows, BLOCK_M, BLOCK_D)
                mbarrier.arrive(q_full.index(stage), count=1)
                _zero_hidden_rows(dout_blocks, stage, row, bounds_ptr, n_rows, BLOCK_M, BLOCK_D)
                mbarrier.arrive(dout_full.index(stage), count=1)
            else:
                mbarrier.expect(q_full.index(stage), BLOCK_M * HEAD_BYTES + ROW_BYTES + BOUND_BYTES)
                if LISTED:
                    _load_bounds(bounds_desc, bounds_at + row, n_rows, q_full.index(stage), bounds_smem, stage)
                _load_tile(q_desc, [batch, row, head, 0], q_full.index(stage), q_smem.index(stage), BLOCK_M, BLOCK_D)
                tma.async_copy_global_to_shared(
                    start_desc, [rows_at + row], q_full.index(stage), start_smem.index(stage)
                )
                if not LISTED:  # noqa: SIM102  (one condition is known at compile time, the other is not)
                    if it == 0:  # behind the first q: the first product needs k and q only
                        mbarrier.expect(kv_full.index(1), N * HEAD_BYTES)
                        _load_tile(v_desc, [batch, first_key, k_head, 0], kv_full.index(1), v_smem, N, BLOCK_D)
                mbarrier.expect(dout_full.index(stage), BLOCK_M * HEAD_BYTES + ROW_BYTES)
                _load_tile(
                    dout_desc, [batch, row, head, 0], dout_full.index(stage), dout_smem.index(stage), BLOCK_M, BLOCK_D
                )
                tma.async_copy_global_to_shared(
                    delta_desc, [rows_at + row], dout_full.index(stage), delta_smem.index(stage)
                )
            it += 1


@gluon.jit
def _zero_not_finite(half):
    """Zero the NaN and inf in a warpgroup's half of k or v: keys that no row sees may hold them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for piece in gl.static_range(4):
        rows = half.slice(16 * piece, 16, dim=0)
        x = rows.load(LAYOUT)
        rows.store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0).to(half.dtype))
    fence_async_shared()


@gluon.jit
def _add_dq(dq, tile, dq_ptr, W: gl.constexpr, TILE_SIZE: gl.constexpr):
    """Add a warpgroup's 64 by 64 part of dq to its place in global memory.

    Numbers lie there in the order in which threads hold them, four neighbours a thread: 16-byte additions, all
    coalesced (``backward_prepare`` brings them into rows).
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    x = dq.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([32, 128])
    x = gl.convert_layout(x, LAYOUT, assert_trivial=True)
    r, c = gl.arange(0, 32, gl.SliceLayout(1, LAYOUT)), gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    at = dq_ptr + tile.to(gl.int64) * TILE_SIZE + W * 4096
    gl.atomic_add(at + r[:, None] * 128 + c[None, :], x, sem="relaxed")


@gluon.jit
def _visible(first_key, first_row, right, left, bounds, HAS_LEFT: gl.constexpr, LISTED: gl.constexpr, L: gl.constexpr):
    """Which keys (rows of the tile) each query row (its columns) sees; ``L``: the layout of scores."""
    bounds_smem, stage = bounds
    keys = (first_key + gl.arange(0, 64, gl.SliceLayout(1, L)))[:, None]
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
    head_tiles,
    first_key,
    key_start,
    shared,
    bars,
    dq_ptr,
    numbers,
    bounds_smem,
    W: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
    DS_SHARED: gl.constexpr,
    EARLY: gl.constexpr,
    HALF: gl.constexpr,
):
    """One query tile. ``scores`` was issued at the end of the step before; this one issues those of the next.

    Args:
        MASK: 0: nothing to mask; 1: mask; 2: mask where ``masked`` says so.
        DS_SHARED: dk reads ds from shared memory, which saves 16 registers, instead of from registers.
        EARLY: the next scores are issued after dv, dk and dq are done (0); so too, with their start values loaded
            before (1); before dv, dk and dq are waited for (2).
        HALF: the second half of the keys sees nothing of this tile; dq comes from the first half alone.
    """
    q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem = shared
    q_full, dout_full, free, ds_full = bars
    right, left, scale2, cap_in, cap_out = numbers
    DTYPE: gl.constexpr = q_smem.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, OUT_L, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, L)
    zeros = gl.full([64, BLOCK_M], 0.0, gl.float32, L)
    k_half = k_smem.slice(W * 64, 64, dim=0)
    v_half = v_smem.slice(W * 64, 64, dim=0)
    stage, phase, buffer = it % STAGES, (it // STAGES) & 1, it % 2
    bounds = (bounds_smem, stage)
    next_stage, next_phase = (it + 1) % STAGES, ((it + 1) // STAGES) & 1

    mbarrier.wait(dout_full.index(stage), phase)
    _, delta = gl.broadcast(zeros, delta_smem.index(stage).load(COLUMNS)[None, :])
    s = warpgroup_mma_wait(0, deps=[scores])
    dp_async = warpgroup_mma(v_half, dout_smem.index(stage).permute((1, 0)), delta, is_async=True)
    if HAS_SOFTCAP:
        row_start = start_smem.index(stage).load(COLUMNS)
    else:
        row_start = key_start
    p, g = _weights(s, key_start, row_start, (scale2, cap_in, cap_out), HAS_SOFTCAP, TAIL)
    if MASK == 1:
        visible = _visible(first_key + W * 64, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
        p = gl.where(visible, p, 0.0)
        if HAS_SOFTCAP:
            g = gl.where(visible, g, 0.0)
        else:
            g = p
    if MASK == 2:
        if masked:
            visible = _visible(first_key + W * 64, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, L)
            p = gl.where(visible, p, 0.0)
            if HAS_SOFTCAP:
                g = gl.where(visible, g, 0.0)
        if not HAS_SOFTCAP:
            g = p
    p_half = gl.convert_layout(p.to(DTYPE), P_L)
    dp = warpgroup_mma_wait(0, deps=[dp_async])
    ds = (g * dp).to(DTYPE)
    if WITH_DQ or DS_SHARED:
        ds_smem.index(buffer).slice(W * 64, 64, dim=0).store(ds)
        fence_async_shared()
    if WITH_DQ:
        mbarrier.arrive(ds_full.index(buffer), count=1)
    elif DS_SHARED:
        gl.thread_barrier()
    dv = warpgroup_mma(p_half, dout_smem.index(stage), dv, is_async=True)
    if DS_SHARED:
        dk = warpgroup_mma(ds_smem.index(buffer).slice(W * 64, 64, dim=0), q_smem.index(stage), dk, is_async=True)
    else:
        dk = warpgroup_mma(gl.convert_layout(ds, P_L), q_smem.index(stage), dk, is_async=True)

    if not WITH_DQ:
        mbarrier.wait(q_full.index(next_stage), next_phase, pred=it + 1 < total)
        start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, L)
        if EARLY == 2:
            scores = warpgroup_mma(k_half, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
            dv, dk = warpgroup_mma_wait(1, deps=[dv, dk])
        else:
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            scores = warpgroup_mma(k_half, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
        mbarrier.arrive(free.index(stage), count=1)
    else:
        # The other half of ds is needed too. Of dq, this warpgroup's half: of the columns (64 rows), or of the rows.
        dq_zeros = gl.full([64, 64], 0.0, gl.float32, DQ_L)
        mbarrier.wait(ds_full.index(buffer), (it // 2) & 1)
        ds_all = ds_smem.index(buffer)
        if HALF:
            ds_t = ds_all.slice(0, 64, dim=0).permute((1, 0))
            k_part = k_smem.slice(0, 64, dim=0).slice(W * 64, 64, dim=1)
        elif BLOCK_D == 128:
            ds_t = ds_all.permute((1, 0))
            k_part = k_smem.slice(W * 64, 64, dim=1)
        else:
            ds_t = ds_all.slice(W * 64, 64, dim=1).permute((1, 0))
            k_part = k_smem
        dq_async = warpgroup_mma(ds_t, k_part, dq_zeros, use_acc=False, is_async=True)
        if EARLY == 0:
            dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq_async])
            mbarrier.arrive(free.index(stage), count=1)
            mbarrier.wait(q_full.index(next_stage), next_phase, pred=it + 1 < total)
            start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, L)
            scores = warpgroup_mma(k_half, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
        elif EARLY == 1:
            mbarrier.wait(q_full.index(next_stage), next_phase, pred=it + 1 < total)
            start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, L)
            dv, dk, dq = warpgroup_mma_wait(0, deps=[dv, dk, dq_async])
            scores = warpgroup_mma(k_half, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
            mbarrier.arrive(free.index(stage), count=1)
        else:
            mbarrier.wait(q_full.index(next_stage), next_phase, pred=it + 1 < total)
            start = _next_start(start_smem, next_stage, zeros, HAS_SOFTCAP, L)
            scores = warpgroup_mma(k_half, q_smem.index(next_stage).permute((1, 0)), start, is_async=True)
            dv, dk, dq = warpgroup_mma_wait(1, deps=[dv, dk, dq_async])
            mbarrier.arrive(free.index(stage), count=1)
        _add_dq(dq, head_tiles + tile, dq_ptr, W, BLOCK_M * BLOCK_D)
    return scores, dk, dv


@gluon.jit
def _read(buffer):
    """The number that the producer has put there."""
    return gl.max(buffer.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _store_rows(ptr, stride, first_key, seqlen_k, x, W: gl.constexpr, DIM: gl.constexpr):
    """Store a warpgroup's half of dk or dv in 16-byte pieces; ``ptr`` points at the tile's first row."""
    BLOCK_D: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = W * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    inside = (first_key + rows < seqlen_k)[:, None]
    if DIM != BLOCK_D:
        inside = inside & (columns < DIM)[None, :]
    at = ptr + rows[:, None] * stride + columns[None, :]
    gl.store(at, gl.convert_layout(x.to(ptr.dtype.element_ty), LAYOUT), mask=inside)


@gluon.jit
def _consumer(
    shared,
    bars,
    dq_ptr,
    dkv,
    work,
    steps,
    lists,
    numbers,
    W: gl.constexpr,
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
    ROTATE: gl.constexpr,
    WITH_DQ: gl.constexpr,
    DS_SHARED: gl.constexpr,
    EARLY: gl.constexpr,
    ALIGNED: gl.constexpr,
    SKIP: gl.constexpr,
):
    """One warpgroup: dk and dv of its 64 keys, and its half of each step's dq."""
    q_smem, k_smem, v_smem, _, ds_smem, start_smem, _ = shared
    kv_full, q_full, dout_full, free, ds_full, kv_clean = bars
    dk_ptr, dv_ptr, dk_stride, dv_stride, scale = dkv
    first_key, seqlen_k, n_heads, head_tiles, n_tiles_q, first_tile = work
    n, n_before, n_full, rotation = steps
    bounds_smem, entry_smem = lists
    N: gl.constexpr = k_smem.shape[0]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zeros = gl.full([64, BLOCK_M], 0.0, gl.float32, L)
    keys = first_key + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, L))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    dk = gl.full([64, BLOCK_D], 0.0, gl.float32, OUT_L)
    dv = gl.full([64, BLOCK_D], 0.0, gl.float32, OUT_L)
    total = n * n_heads
    step_bars = (q_full, dout_full, free, ds_full)
    # The second half of the keys sees nothing of the first tile on the diagonal: that warpgroup starts at the second.
    FIRST: gl.constexpr = 1 if SKIP and W == 1 else 0

    mbarrier.wait(kv_full.index(0), 0)
    if LISTED:
        mbarrier.wait(kv_full.index(1), 0)
        _zero_not_finite(k_smem.slice(W * 64, 64, dim=0))
        _zero_not_finite(v_smem.slice(W * 64, 64, dim=0))
        mbarrier.arrive(kv_clean, count=1)
        mbarrier.wait(kv_clean, 0)
    if FIRST == 1:
        mbarrier.arrive(free.index(0), count=1)
        if WITH_DQ:
            dq_zeros = gl.full([64, 64], 0.0, gl.float32, DQ_L)
            mbarrier.arrive(ds_full.index(0), count=1)
            mbarrier.wait(ds_full.index(0), 0)
            ds_t = ds_smem.index(0).slice(0, 64, dim=0).permute((1, 0))
            k_part = k_smem.slice(0, 64, dim=0).slice(64, 64, dim=1)
            dq = warpgroup_mma(ds_t, k_part, dq_zeros, use_acc=False)
            _add_dq(dq, head_tiles + first_tile, dq_ptr, W, BLOCK_M * BLOCK_D)
    mbarrier.wait(q_full.index(FIRST), 0, pred=total > FIRST)
    start = _next_start(start_smem, FIRST, zeros, HAS_SOFTCAP, L)
    scores = warpgroup_mma(k_smem.slice(W * 64, 64, dim=0), q_smem.index(FIRST).permute((1, 0)), start, is_async=True)
    if not LISTED:
        mbarrier.wait(kv_full.index(1), 0)

    if MASK == MASK_LEADING:
        if ALIGNED:
            before: gl.constexpr = N // BLOCK_M
        else:
            before = n_before
        if SKIP and W == 0:
            for i in gl.static_range(2):
                tile = first_tile + i
                scores, dk, dv = _step(
                    i, total, tile, False, scores, dk, dv, head_tiles, first_key, key_start,
                    shared, step_bars, dq_ptr, numbers, bounds_smem, W, BLOCK_M, BLOCK_D, STAGES, 1 - i, False,
                    False, HAS_SOFTCAP, TAIL, WITH_DQ, DS_SHARED, EARLY, i == 0,
                )  # fmt: skip
        else:
            for i in range(FIRST, before):
                tile = first_tile + i
                scores, dk, dv = _step(
                    i, total, tile, True, scores, dk, dv, head_tiles, first_key, key_start,
                    shared, step_bars, dq_ptr, numbers, bounds_smem, W, BLOCK_M, BLOCK_D, STAGES, 1, False,
                    False, HAS_SOFTCAP, TAIL, WITH_DQ, DS_SHARED, EARLY, False,
                )  # fmt: skip
        for i in range(before, n):
            tile = first_tile + i
            scores, dk, dv = _step(
                i, total, tile, False, scores, dk, dv, head_tiles, first_key, key_start,
                shared, step_bars, dq_ptr, numbers, bounds_smem, W, BLOCK_M, BLOCK_D, STAGES, 0, False, False,
                HAS_SOFTCAP, TAIL, WITH_DQ, DS_SHARED, EARLY, False,
            )  # fmt: skip
    else:
        i = n * 0
        for it in range(total):  # over the tiles of all heads
            masked = False
            if LISTED:
                entry = _read(entry_smem.index(it % STAGES))
                tile = entry & ENTRY_TILE
                masked = (entry & ENTRY_MASKED) != 0
            else:
                tile = first_tile + i
                if ROTATE:
                    tile = i + rotation
                    tile = first_tile + gl.where(tile >= n, tile - n, tile)
                if MASK == MASK_ANY:
                    masked = (i < n_before) | (i >= n_before + n_full)
            this_head = head_tiles
            i += 1
            if GROUPED:
                wrapped = i >= n
                i = gl.where(wrapped, 0, i)
                head_tiles = gl.where(wrapped, head_tiles + n_tiles_q, head_tiles)
            scores, dk, dv = _step(
                it, total, tile, masked, scores, dk, dv, this_head, first_key, key_start, shared,
                step_bars, dq_ptr, numbers, bounds_smem, W, BLOCK_M, BLOCK_D, STAGES, MASK, HAS_LEFT, LISTED,
                HAS_SOFTCAP, TAIL, WITH_DQ, DS_SHARED, EARLY, False,
            )  # fmt: skip
    warpgroup_mma_wait(0, deps=[scores])  # issued for a step that does not follow
    _store_rows(dv_ptr, dv_stride, first_key, seqlen_k, dv, W, V_HEAD_DIM)
    _store_rows(dk_ptr, dk_stride, first_key, seqlen_k, dk * scale, W, HEAD_DIM)


@gluon.jit
def _query_tiles(
    first_key,
    n_tiles_q,
    right,
    left,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
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
        full_first = max(first_key + BLOCK_N - 1 - right, 0)
        # At least one: the loop over those that mask is never left out where the one after it runs. From where it is
        # left out, ptxas (12.8) may let the second loop use descriptors that only the way into the first one computes.
        n_before = max((full_first + BLOCK_M - 1) // BLOCK_M - first, 1)
    if HAS_LEFT:
        end = min(end, (first_key + BLOCK_N - left + BLOCK_M - 1) // BLOCK_M)
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
    dk_ptr,
    dv_ptr,
    dq_ptr,
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
    DS_SHARED: gl.constexpr,
    EARLY: gl.constexpr,
    ALIGNED: gl.constexpr,
    SKIP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """dk and dv of 128 keys of one key head, summed over ``heads_per_split`` query heads, and their part of dq.

    Args:
        q_desc, k_desc, v_desc, dout_desc: (batch, seqlen, heads, head dim) descriptors; k's and v's blocks are 128
            keys, q's and dout's BLOCK_M rows.
        start_desc, delta_desc: fp32 (batch * nheads * n_tiles_q * BLOCK_M,): -lse / scale (softcap: -lse * log2(e)),
            -inf where a row weighs nothing, and -delta.
        dk_ptr, dv_ptr: (splits, batch, keys, nheads_k, head dim), rows contiguous; keys lie as far apart as
            ``nheads_k`` rows, batch elements and splits ``dkv_stride_b`` and ``dkv_stride_split`` keys.
        dq_ptr: fp32, tiles of BLOCK_M by BLOCK_D in the order of :func:`_add_dq`, zero before; only if WITH_DQ.
        entries_ptr, counts_ptr, bounds_ptr: only if LISTED, see ``backward_prepare``; batch elements lie
            ``list_stride`` key tiles apart (0: one list for all).
        right, left: the flags' bounds: row i sees keys ``i + left <= key <= i + right``.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    N: gl.constexpr = k_desc.block_shape[1]
    n_tiles_k = (seqlen_k + N - 1) // N
    tile_n, split_batch_head = _schedule(gl.program_id(0), n_tiles_k, n_heads_total, section)
    n_batch_heads = n_heads_total // n_splits
    split = split_batch_head // n_batch_heads
    batch_head = split_batch_head % n_batch_heads
    batch, k_head = batch_head // nheads_k, batch_head % nheads_k
    first_head = k_head * (nheads // nheads_k) + split * heads_per_split
    first_key = tile_n * N
    first_tile, n, n_before, n_full = _query_tiles(first_key, n_tiles_q, right, left, BLOCK_M, N, HAS_LEFT, HAS_RIGHT)
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
        rotation = tile_n * (N // BLOCK_M) % n

    k_smem = gl.allocate_shared_memory(DTYPE, [N, BLOCK_D], gl.NVMMASharedLayout(128, 16, rank=2))
    v_smem = gl.allocate_shared_memory(DTYPE, [N, BLOCK_D], gl.NVMMASharedLayout(128, 16, rank=2))
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_D], gl.NVMMASharedLayout(128, 16, rank=2))
    dout_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_D], gl.NVMMASharedLayout(128, 16, rank=2))
    DS_BUFFERS: gl.constexpr = 2 if WITH_DQ or DS_SHARED else 1
    DS_KEYS: gl.constexpr = N if WITH_DQ or DS_SHARED else 8
    ds_smem = gl.allocate_shared_memory(DTYPE, [DS_BUFFERS, DS_KEYS, BLOCK_M], gl.NVMMASharedLayout(128, 16, rank=2))
    start_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], start_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    bounds_smem = start_smem
    entry_smem = start_smem
    if LISTED:
        entry_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        bounds_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, BLOCK_M], bounds_desc.layout)
    # Barriers: k and v are there; q, dout of a stage are there; a stage is free; both halves of ds are there.
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kv_clean = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dirty_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for b in gl.static_range(2):
        mbarrier.init(kv_full.index(b), count=1)
        mbarrier.init(ds_full.index(b), count=2)
    for b in gl.static_range(STAGES):
        mbarrier.init(q_full.index(b), count=1)
        mbarrier.init(dout_full.index(b), count=1)
        mbarrier.init(free.index(b), count=2)
    mbarrier.init(kv_clean, count=2)
    mbarrier.init(dirty_full, count=1)
    fence_async_shared()

    q_blocks = q_smem
    dout_blocks = dout_smem
    if LISTED:
        BLOCKS: gl.constexpr = STAGES * BLOCK_M * BLOCK_D // 512
        q_blocks = q_smem._reinterpret(DTYPE, [BLOCKS, 8, 64], gl.NVMMASharedLayout(128, 16, rank=2))
        dout_blocks = dout_smem._reinterpret(DTYPE, [BLOCKS, 8, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    key_at = split.to(gl.int64) * dkv_stride_split + batch.to(gl.int64) * dkv_stride_b + first_key
    row_at = key_at * nheads_k + k_head
    shared = (q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem)
    dkv = (dk_ptr + row_at * HEAD_DIM, dv_ptr + row_at * V_HEAD_DIM, nheads_k * HEAD_DIM, nheads_k * V_HEAD_DIM, scale)
    head_tiles = (batch * nheads + first_head) * n_tiles_q
    work = (first_key, seqlen_k, heads_per_split, head_tiles, n_tiles_q, first_tile)
    steps = (n, n_before, n_full, rotation)
    lists = (bounds_smem, entry_smem)
    numbers = (right, left, scale2, cap_in, cap_out)
    where = (batch, k_head, first_head, heads_per_split, nheads, first_key, first_tile, n, rotation, n_tiles_q)
    bars = (kv_full, q_full, dout_full, free, ds_full, kv_clean)
    descs = (q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc)
    buffers = (q_smem, k_smem, v_smem, dout_smem, start_smem, delta_smem, bounds_smem, entry_smem)
    fill_bars = (kv_full, q_full, dout_full, free, dirty_full)
    pointers = (entries_ptr, bounds_ptr, n_rows, bounds_at)
    gl.warp_specialize(
        [
            (_consumer, (shared, bars, dq_ptr, dkv, work, steps, lists, numbers, 0, HEAD_DIM, V_HEAD_DIM, BLOCK_M,
                         BLOCK_D, STAGES, MASK, HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, ROTATE, WITH_DQ,
                         DS_SHARED, EARLY, ALIGNED, SKIP)),
            (_consumer, (shared, bars, dq_ptr, dkv, work, steps, lists, numbers, 1, HEAD_DIM, V_HEAD_DIM, BLOCK_M,
                         BLOCK_D, STAGES, MASK, HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL, ROTATE, WITH_DQ,
                         DS_SHARED, EARLY, ALIGNED, SKIP)),
            (_producer, (descs, buffers, (q_blocks, dout_blocks), fill_bars, where, pointers, BLOCK_M, BLOCK_D,
                         STAGES, ROTATE, LISTED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
