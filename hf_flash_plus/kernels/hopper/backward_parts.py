"""The Hopper backward for 256 columns in two kernels, of 128 keys a program: dv alone, and dk with dq.

Accumulators of dk and dv of 128 keys by 256 columns would be all registers there are; of either, half. So one kernel
computes the scores and dv, the other the scores, dp, dk and dq: six products instead of five. But shared memory moves
less than with 64 keys, whose columns are split between the warpgroups (``backward_wide``): each warpgroup reads 64 rows
of q or dout for 64 keys instead of 32, and weights and ds are first operands from registers. And dq's sums get a part
for 128 keys instead of 64. By arithmetic, for 64 keys by 64 rows, in cycles (hopper.md):

======================= ======== =============
..                      products shared memory
======================= ======== =============
``backward_wide``       2560     4350
dv                      1024     1024
dk and dq               2048     2620
======================= ======== =============

Roles of warps, formulas and barriers are those of ``backward`` and ``backward_wide``. What differs: there is room for
one tile of q and one of dout beside k and v in the kernel for dk, so its step is ordered by when these are free::

    ds to shared memory    start half of dq, dk    hand over that half, by quarters    start the rest of dq, the next dp
    wait for dk: q is free    hand over a quarter    start the next scores    and the last quarter    the next ds

So the next q is loaded beside half of dq and dp. dq is handed over by quarters since 16 KiB are left for it, and its
product is two, since there are no registers for it at once. No row intervals (yet).
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

from .backward import RUNTIME, _next_start, _phase, _query_tiles, _schedule, _weights
from .backward_common import DQ_BARRIER, MASK_ANY, MASK_LEADING, MASK_NONE, _store_rows_through, meet, reduce_add
from .backward_wide import (
    DOUT_BARRIER,
    Q_BARRIER,
    _halves,
    _hand_over,
    _here,
    _load_columns,
    _operand,
    _packed,
    _start_dp,
    _visible,
    key_layout,
)
from .primitives import opaque, retire

#: Keys and rows of a step.
KEYS = gl.constexpr(128)
ROWS = gl.constexpr(64)


@gluon.jit
def _producer(
    descs,
    shared,
    bars,
    where,
    WIDTH: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    ROTATE: gl.constexpr,
    WITH_DK: gl.constexpr,
    PHASES: gl.constexpr,
):
    """One warp: k (and v) of the program, then dout and q of every step, by blocks of 64 columns.

    What is free first comes first: dout for dk, q for dv.
    """
    q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc = descs
    q_blocks, k_blocks, v_blocks, dout_blocks, start_smem, delta_smem = shared
    kv_full, q_full, dout_full = bars
    batch, k_head, first_head, n_heads, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q = where
    BLOCKS: gl.constexpr = WIDTH // 64
    ROW_BYTES: gl.constexpr = ROWS * 4
    BYTES: gl.constexpr = ROWS * (WIDTH * 2)

    mbarrier.expect(kv_full.index(0), KEYS * WIDTH * 2)
    _load_columns(k_desc, batch, first_key, k_head, 0, kv_full.index(0), k_blocks, 0, KEYS, WIDTH)
    if WITH_DK:
        mbarrier.expect(kv_full.index(1), KEYS * WIDTH * 2)
        _load_columns(v_desc, batch, first_key, k_head, 0, kv_full.index(1), v_blocks, 0, KEYS, WIDTH)
    it = 0
    for phase in gl.static_range(PHASES):
        begin, end = _phase(phase, n, n_before, PHASES)
        for local_head in range(n_heads):
            head = first_head + local_head
            rows_at = (batch * nheads + head) * (n_tiles_q * ROWS)
            for i in range(begin, end):
                tile = first_tile + i
                if ROTATE:
                    tile = i + rotation
                    tile = first_tile + gl.where(tile >= n, tile - n, tile)
                row = tile * ROWS
                for turn in gl.static_range(2):
                    if (turn == 0) == WITH_DK:
                        stage = it % DOUT_STAGES
                        if it >= DOUT_STAGES:
                            meet("sync", DOUT_BARRIER + stage)
                        full = dout_full.index(stage)
                        if WITH_DK:
                            mbarrier.expect(full, BYTES + ROW_BYTES)
                            at = delta_smem.index(stage)
                            tma.async_copy_global_to_shared(delta_desc, [rows_at + row], full, at)
                        else:
                            mbarrier.expect(full, BYTES)
                        _load_columns(dout_desc, batch, row, head, 0, full, dout_blocks, stage * BLOCKS, ROWS, WIDTH)
                    else:
                        stage = it % Q_STAGES
                        if it >= Q_STAGES:
                            meet("sync", Q_BARRIER + stage)
                        full = q_full.index(stage)
                        mbarrier.expect(full, BYTES + ROW_BYTES)
                        tma.async_copy_global_to_shared(start_desc, [rows_at + row], full, start_smem.index(stage))
                        _load_columns(q_desc, batch, row, head, 0, full, q_blocks, stage * BLOCKS, ROWS, WIDTH)
                it += 1
    # Leave no barrier half full.
    for last in range(max(it, Q_STAGES), it + Q_STAGES):
        meet("sync", Q_BARRIER + last % Q_STAGES)
    for last in range(max(it, DOUT_STAGES), it + DOUT_STAGES):
        meet("sync", DOUT_BARRIER + last % DOUT_STAGES)


@gluon.jit
def _storer(dq_desc, dq_smem, dq_free, where, WIDTH: gl.constexpr, ROTATE: gl.constexpr, PHASES: gl.constexpr):
    """One warp: adds each step's dq, of which the warpgroups leave a quarter at a time in shared memory, to the sums.

    A quarter is half of a 64 by 64 part of each warpgroup; of 256 columns the parts lie in the order 0, 2, 1, 3 (see
    ``dq_rows``), and a product makes two neighbours.
    """
    batch, _, first_head, n_heads, nheads, _, first_tile, n, n_before, rotation, n_tiles_q = where
    LINES: gl.constexpr = ROWS * WIDTH // 128
    for phase in gl.static_range(PHASES):
        begin, end = _phase(phase, n, n_before, PHASES)
        for local_head in range(n_heads):
            head_tiles = (batch * nheads + first_head + local_head) * n_tiles_q
            for i in range(begin, end):
                tile = first_tile + i
                if ROTATE:
                    tile = i + rotation
                    tile = first_tile + gl.where(tile >= n, tile - n, tile)
                at = (head_tiles + tile) * LINES
                for turn in gl.static_range(4):
                    here = at + 32 * (turn // 2) + 16 * (turn % 2)
                    meet("sync", DQ_BARRIER)
                    reduce_add(dq_desc, [here, 0], dq_smem.index(0))
                    reduce_add(dq_desc, [here + 64, 0], dq_smem.index(1))
                    tma.store_wait(0)
                    mbarrier.arrive(dq_free, count=1)


@gluon.jit
def _start_scores(it, tiles, start_smem, q_full, zeros, Q_STAGES: gl.constexpr, HAS_SOFTCAP: gl.constexpr):
    """Start the product for a tile's scores."""
    q_smem, k_smem, _, _, _ = tiles
    L: gl.constexpr = zeros.type.layout
    stage = it % Q_STAGES
    mbarrier.wait(q_full.index(stage), (it // Q_STAGES) & 1)
    start = _next_start(start_smem, stage, zeros, HAS_SOFTCAP, L)
    return warpgroup_mma(_here(k_smem, stage), _here(q_smem, stage).permute((1, 0)), start, is_async=True)


@gluon.jit
def _weights_of(
    s,
    tile,
    masked,
    first_key,
    key_start,
    row_start,
    numbers,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    DERIVED: gl.constexpr,
):
    """A tile's weights from its scores; DERIVED: with the derivative of softcap.

    MASK: MASK_NONE, MASK_LEADING (mask) or MASK_ANY (mask where ``masked`` says so).
    """
    right, left, scale2, cap_in, cap_out = numbers
    p, g = _weights(s, key_start, row_start, (scale2, cap_in, cap_out), HAS_SOFTCAP, TAIL)
    if DERIVED:
        p = g
    if MASK == MASK_LEADING:
        visible = _visible(first_key, tile * ROWS, right, left, (0, 0), HAS_LEFT, False, KEYS, ROWS)
        p = gl.where(visible, p, 0.0)
    if MASK == MASK_ANY:  # noqa: SIM102  (one condition is known at compile time, the other is not)
        if masked:
            visible = _visible(first_key, tile * ROWS, right, left, (0, 0), HAS_LEFT, False, KEYS, ROWS)
            p = gl.where(visible, p, 0.0)
    return p


@gluon.jit
def _row_start(start_smem, stage, key_start, HAS_SOFTCAP: gl.constexpr):
    if HAS_SOFTCAP:
        return start_smem.index(stage).load(gl.SliceLayout(0, key_layout(KEYS, ROWS)))
    else:
        return key_start


@gluon.jit
def _dv_step(
    it,
    tile,
    masked,
    weights,
    dv,
    first_key,
    key_start,
    tiles,
    rows,
    _dq,
    bars,
    numbers,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Tile number ``it``'s part of dv, from its ``weights``, and the weights of the next, ``tile``."""
    q_smem, _, _, dout_smem, _ = tiles
    start_smem, _ = rows
    q_full, dout_full = bars
    zeros = gl.full([KEYS, ROWS], 0.0, gl.float32, key_layout(KEYS, ROWS))
    next_stage, dout_stage = (it + 1) % Q_STAGES, it % DOUT_STAGES
    P_L: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    scores = _start_scores(it + 1, tiles, start_smem, q_full, zeros, Q_STAGES, HAS_SOFTCAP)
    mbarrier.wait(dout_full.index(dout_stage), (it // DOUT_STAGES) & 1)
    dv = warpgroup_mma(_operand(weights, q_smem.dtype, P_L), _here(dout_smem, dout_stage), dv, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scores])
    row_start = _row_start(start_smem, next_stage, key_start, HAS_SOFTCAP)
    p = _weights_of(s, tile, masked, first_key, key_start, row_start, numbers, MASK, HAS_LEFT, HAS_SOFTCAP, TAIL, False)
    meet("arrive", Q_BARRIER + next_stage)
    dv = warpgroup_mma_wait(0, deps=[dv])
    meet("arrive", DOUT_BARRIER + dout_stage)
    return _packed(p, q_smem.dtype), dv


@gluon.jit
def _start_dq(tiles, half: gl.constexpr):
    """Start the product for half of a tile's dq, 128 columns."""
    _, k_smem, _, _, ds_smem = tiles
    WIDTH: gl.constexpr = k_smem.shape[2]
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, WIDTH // 4, 16])
    k = k_smem._reinterpret(k_smem.dtype, [2, KEYS, WIDTH // 2], k_smem.layout)
    none = gl.to_tensor(0)
    dq = gl.full([ROWS, WIDTH // 2], 0.0, gl.float32, DQ_L)
    ds = ds_smem.index(opaque(none)).permute((1, 0))
    return warpgroup_mma(ds, k.index(opaque(none + half)), dq, use_acc=False, is_async=True)


@gluon.jit
def _leave_ds(ds, tiles):
    """Bring ds to shared memory; what is kept of it in registers, 16 bits wide, for dk."""
    DTYPE: gl.constexpr = tiles[0].dtype
    ds_smem = tiles[4]
    gl.thread_barrier()  # the other warpgroup, too, has done with the last step's dq
    _here(ds_smem, gl.to_tensor(0)).store(ds.to(DTYPE))
    fence_async_shared()
    gl.thread_barrier()
    return _packed(ds, DTYPE)


@gluon.jit
def _start_dq_and_dk(it, kept, dk, tiles, Q_STAGES: gl.constexpr):
    """Start the products of ds with k for half of dq, and with q for dk."""
    q_smem, _, _, _, _ = tiles
    dq_async = _start_dq(tiles, 0)
    q = _here(q_smem, it % Q_STAGES)
    DS_L: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    dk = warpgroup_mma(_operand(kept, q_smem.dtype, DS_L), q, dk, is_async=True)
    return dq_async, dk


@gluon.jit
def _dk_step(
    it,
    tile,
    masked,
    kept,
    dk,
    first_key,
    key_start,
    tiles,
    rows,
    dq_to,
    bars,
    numbers,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Tile number ``it``'s parts of dk and dq, from what is ``kept`` of its ds, and ds of the next, ``tile``."""
    _, _, v_smem, dout_smem, _ = tiles
    start_smem, delta_smem = rows
    dq_smem, dq_free = dq_to
    q_full, dout_full = bars
    zeros = gl.full([KEYS, ROWS], 0.0, gl.float32, key_layout(KEYS, ROWS))
    next_stage = (it + 1) % Q_STAGES
    dq_async, dk = _start_dq_and_dk(it, kept, dk, tiles, Q_STAGES)
    dq = warpgroup_mma_wait(1, deps=[dq_async])
    first, second = _halves(dq)
    _hand_over(first, dq_smem, 1, dq_free)
    _hand_over(second, dq_smem, 0, dq_free)
    dq_async = _start_dq(tiles, 1)
    all_tiles = (0, 0, 0, 0, v_smem, dout_smem, 0, 0)
    dp_async = _start_dp(it + 1, all_tiles, (0, delta_smem, 0, 0), dout_full, zeros, DOUT_STAGES)
    dk = warpgroup_mma_wait(2, deps=[dk])
    meet("arrive", Q_BARRIER + it % Q_STAGES)
    dq = warpgroup_mma_wait(1, deps=[dq_async])
    third, fourth = _halves(dq)
    _hand_over(third, dq_smem, 1, dq_free)
    _hand_over(fourth, dq_smem, 0, dq_free)
    scores = _start_scores(it + 1, tiles, start_smem, q_full, zeros, Q_STAGES, HAS_SOFTCAP)
    dp = warpgroup_mma_wait(1, deps=[dp_async])
    meet("arrive", DOUT_BARRIER + (it + 1) % DOUT_STAGES)
    s = warpgroup_mma_wait(0, deps=[scores])
    row_start = _row_start(start_smem, next_stage, key_start, HAS_SOFTCAP)
    g = _weights_of(
        s, tile, masked, first_key, key_start, row_start, numbers, MASK, HAS_LEFT, HAS_SOFTCAP, TAIL, HAS_SOFTCAP
    )
    return _leave_ds(g * dp, tiles), dk


@gluon.jit
def _consumer(
    tiles,
    rows,
    dq_to,
    bars,
    out,
    work,
    steps,
    numbers,
    HEAD_DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DK: gl.constexpr,
):
    """Two warpgroups: dv, or dk, of 64 keys each; with dk each step's dq together."""
    q_smem, k_smem, v_smem, dout_smem, _ = tiles
    start_smem, delta_smem = rows
    dq_smem, dq_free = dq_to
    kv_full, q_full, dout_full = bars
    out_ptr, out_stride, scale = out
    first_key, seqlen_k, n_heads, first_tile = work
    n, n_before, n_full = steps
    zeros = gl.full([KEYS, ROWS], 0.0, gl.float32, key_layout(KEYS, ROWS))
    keys = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, key_layout(KEYS, ROWS)))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    sums = gl.full([KEYS, WIDTH], 0.0, gl.float32, key_layout(KEYS, WIDTH))
    total = n * n_heads
    step_bars = (q_full, dout_full)
    step: gl.constexpr = _dk_step if WITH_DK else _dv_step
    mbarrier.wait(kv_full.index(0), 0)
    if WITH_DK:
        mbarrier.wait(kv_full.index(1), 0)
    if total > 0:
        if WITH_DK:
            all_tiles = (0, 0, 0, 0, v_smem, dout_smem, 0, 0)
            dp_async = _start_dp(0, all_tiles, (0, delta_smem, 0, 0), dout_full, zeros, DOUT_STAGES)
            dp = warpgroup_mma_wait(0, deps=[dp_async])
            meet("arrive", DOUT_BARRIER)
        scores = _start_scores(0, tiles, start_smem, q_full, zeros, Q_STAGES, HAS_SOFTCAP)
        s = warpgroup_mma_wait(0, deps=[scores])
        masked = False
        if MASK == MASK_ANY:
            masked = (n_before > 0) | (n_full == 0)
        row_start = _row_start(start_smem, 0, key_start, HAS_SOFTCAP)
        p = _weights_of(
            s, first_tile, masked, first_key, key_start, row_start, numbers, MASK, HAS_LEFT, HAS_SOFTCAP, TAIL,
            WITH_DK and HAS_SOFTCAP,
        )  # fmt: skip
        if WITH_DK:
            x = _leave_ds(p * dp, tiles)
        else:
            meet("arrive", Q_BARRIER)
            x = _packed(p, q_smem.dtype)
        if MASK == MASK_LEADING:
            BEFORE: gl.constexpr = KEYS // ROWS
            for it in range(BEFORE * n_heads - 1):
                x, sums = step(
                    it, first_tile + (it + 1) % BEFORE, True, x, sums, first_key, key_start, tiles, rows, dq_to,
                    step_bars, numbers, Q_STAGES, DOUT_STAGES, MASK, False, HAS_SOFTCAP, TAIL,
                )  # fmt: skip
            for it in range(BEFORE * n_heads - 1, total - 1):
                x, sums = step(
                    it, 0, False, x, sums, first_key, key_start, tiles, rows, dq_to, step_bars, numbers, Q_STAGES,
                    DOUT_STAGES, MASK_NONE, False, HAS_SOFTCAP, TAIL,
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
                x, sums = step(
                    it, first_tile + i, masked, x, sums, first_key, key_start, tiles, rows, dq_to, step_bars, numbers,
                    Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, HAS_SOFTCAP, TAIL,
                )  # fmt: skip
        last = total - 1
        if WITH_DK:
            dq_async, sums = _start_dq_and_dk(last, x, sums, tiles, Q_STAGES)
            dq = warpgroup_mma_wait(1, deps=[dq_async])
            first, second = _halves(dq)
            _hand_over(first, dq_smem, 1, dq_free)
            _hand_over(second, dq_smem, 0, dq_free)
            dq_async = _start_dq(tiles, 1)
            sums = warpgroup_mma_wait(1, deps=[sums])
            dq = warpgroup_mma_wait(0, deps=[dq_async])
            third, fourth = _halves(dq)
            _hand_over(third, dq_smem, 1, dq_free)
            _hand_over(fourth, dq_smem, 0, dq_free)
            meet("arrive", Q_BARRIER + last % Q_STAGES)
        else:
            stage = last % DOUT_STAGES
            P_L: gl.constexpr = gl.DotOperandLayout(0, sums.type.layout, 2)
            mbarrier.wait(dout_full.index(stage), (last // DOUT_STAGES) & 1)
            sums = warpgroup_mma(_operand(x, q_smem.dtype, P_L), _here(dout_smem, stage), sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            meet("arrive", DOUT_BARRIER + stage)
    gl.thread_barrier()  # the other warpgroup, too, has done with k
    if WITH_DK:
        sums = sums * scale
    _store_rows_through(out_ptr, out_stride, seqlen_k - first_key, sums, k_smem.index(0), HEAD_DIM)


@gluon.jit(do_not_specialize=RUNTIME)
def attention_backward_part(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    start_desc,
    delta_desc,
    bounds_desc,
    dq_desc,
    more_desc,
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
    WIDTH: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    ROTATE: gl.constexpr,
    WITH_DK: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """dv (or with WITH_DK dk, and their part of dq) of 128 keys of one key head, summed over ``heads_per_split`` heads.

    As ``backward_wide.attention_backward_wide``, but: ``dq_desc`` is in blocks of 16 by 128 numbers. WIDTH is that of
    q, k, v and dout.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    n_tiles_k = (seqlen_k + KEYS - 1) // KEYS
    tile_n, split_batch_head = _schedule(gl.program_id(0), n_tiles_k, n_heads_total, section)
    n_batch_heads = n_heads_total // n_splits
    split = split_batch_head // n_batch_heads
    batch_head = split_batch_head % n_batch_heads
    batch, k_head = batch_head // nheads_k, batch_head % nheads_k
    first_head = k_head * (nheads // nheads_k) + split * heads_per_split
    first_key = tile_n * KEYS
    first_tile, n, n_before, n_full = _query_tiles(first_key, n_tiles_q, right, left, ROWS, KEYS, HAS_LEFT, HAS_RIGHT)
    rotation = 0
    if ROTATE:
        rotation = tile_n * (KEYS // ROWS) % n

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, WIDTH], SWIZZLED)
    q_smem = gl.allocate_shared_memory(DTYPE, [Q_STAGES, ROWS, WIDTH], SWIZZLED)
    dout_smem = gl.allocate_shared_memory(DTYPE, [DOUT_STAGES, ROWS, WIDTH], SWIZZLED)
    start_smem = gl.allocate_shared_memory(gl.float32, [Q_STAGES, ROWS], start_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    dout_full = gl.allocate_shared_memory(gl.int64, [DOUT_STAGES, 1], BARRIER)
    for b in gl.static_range(2):
        mbarrier.init(kv_full.index(b), count=1)
    for b in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(b), count=1)
    for b in gl.static_range(DOUT_STAGES):
        mbarrier.init(dout_full.index(b), count=1)
    v_smem = k_smem
    ds_smem = k_smem
    dq_smem = start_smem
    delta_smem = start_smem
    dq_free = kv_full
    if WITH_DK:
        v_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, WIDTH], SWIZZLED)
        ds_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, ROWS], SWIZZLED)
        dq_smem = gl.allocate_shared_memory(gl.float32, [32, 128], dq_desc.layout)
        delta_smem = gl.allocate_shared_memory(gl.float32, [DOUT_STAGES, ROWS], delta_desc.layout)
        dq_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        mbarrier.init(dq_free, count=1)
    fence_async_shared()

    BLOCKS: gl.constexpr = WIDTH // 64
    q_blocks = q_smem._reinterpret(DTYPE, [Q_STAGES * BLOCKS, ROWS, 64], SWIZZLED)
    k_blocks = k_smem._reinterpret(DTYPE, [BLOCKS, KEYS, 64], SWIZZLED)
    v_blocks = v_smem._reinterpret(DTYPE, [BLOCKS, KEYS, 64], SWIZZLED)
    dout_blocks = dout_smem._reinterpret(DTYPE, [DOUT_STAGES * BLOCKS, ROWS, 64], SWIZZLED)
    key_at = split.to(gl.int64) * dkv_stride_split + batch.to(gl.int64) * dkv_stride_b + first_key
    row_at = key_at * nheads_k + k_head
    if WITH_DK:
        out = (dk_ptr + row_at * HEAD_DIM, nheads_k * HEAD_DIM, scale)
    else:
        out = (dv_ptr + row_at * V_HEAD_DIM, nheads_k * V_HEAD_DIM, scale)
    tiles = (q_smem, k_smem, v_smem, dout_smem, ds_smem)
    rows = (start_smem, delta_smem)
    bars = (kv_full, q_full, dout_full)
    work = (first_key, seqlen_k, heads_per_split, first_tile)
    numbers = (right, left, scale2, cap_in, cap_out)
    where = (
        batch, k_head, first_head, heads_per_split, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc)
    blocks = (q_blocks, k_blocks, v_blocks, dout_blocks, start_smem, delta_smem)
    PHASES: gl.constexpr = 2 if MASK == MASK_LEADING and GROUPED else 1
    steps = (n, n_before, n_full)
    if WITH_DK:
        quarters = dq_smem._reinterpret(gl.float32, [2, 16, 128], dq_desc.layout)
        gl.warp_specialize(
            [
                (_consumer, (tiles, rows, (dq_smem, dq_free), bars, out, work, steps, numbers, HEAD_DIM, WIDTH,
                             Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, GROUPED, HAS_SOFTCAP, TAIL, True)),
                (_producer, (descs, blocks, bars, where, WIDTH, Q_STAGES, DOUT_STAGES, ROTATE, True, PHASES)),
                (_storer, (dq_desc, quarters, dq_free, where, WIDTH, ROTATE, PHASES)),
            ],
            [1, 1],
            [OTHER_REGISTERS, OTHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (tiles, rows, (dq_smem, dq_free), bars, out, work, steps, numbers, V_HEAD_DIM, WIDTH,
                             Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, GROUPED, HAS_SOFTCAP, TAIL, False)),
                (_producer, (descs, blocks, bars, where, WIDTH, Q_STAGES, DOUT_STAGES, ROTATE, False, PHASES)),
            ],
            [1],
            [OTHER_REGISTERS],
        )  # fmt: skip
    retire(kv_full)
    retire(q_full)
    retire(dout_full)
    if WITH_DK:
        mbarrier.invalidate(dq_free)
