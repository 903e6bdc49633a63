"""The Hopper backward kernel for wide heads: q and k up to 256 columns with v as wide, or 192 with v up to 128.

What is computed, and the roles of the warps, are those of :mod:`.backward`; the loop is turned: its step begins with
the products that need the last ds. The widths are WIDE + MORE columns of q and k (MORE: 64, or 0 where there are none:
shapes are powers of two) and V_WIDE of v. Two ways to deal the work to the two warpgroups, by the keys of a tile:

KEYS 128 (q and k 192, v 128): 64 keys each, as at smaller widths. Accumulators of dk (96 registers), dv (64) and dq
(48) leave little: the next scores are started when dq has been handed over, between the two products for dk; and what
is kept of the weights is 16 bits wide, two to a register.

KEYS 64 (256): every product's columns are halved, for accumulators of dk and dv of 64 keys are half of all registers.
Weights and ds cross warpgroups through shared memory, where they are first operands as they lie. dq is handed over in
two halves through one buffer: one half before the weights are made, one after.

A step lies between two query tiles, with ds of the first in shared memory::

    start dq            [KEYS 64: start the next scores]            start dk (first WIDE columns)
    hand over dq        [KEYS 128: start the next scores, then the rest of dk]
    [DP_EARLY: start the next dp]   the next weights   start dp, dv   ds   wait for dv

The order of waits is what keeps ptxas from serialising the products: change it only with its warnings C7510 to C7519 in
view, which tests/kernels/aot checks.
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
    RUNTIME,
    _load_bounds,
    _next_start,
    _phase,
    _query_tiles,
    _schedule,
    _weights,
    _zero_hidden_rows,
)
from .backward_common import (
    COUNT_COVERED,
    COUNT_ENTRIES,
    DQ_BARRIER,
    ENTRY_DIRTY,
    ENTRY_MASKED,
    ENTRY_TILE,
    MASK_ANY,
    MASK_LEADING,
    MASK_NONE,
    _read,
    _store_rows_through,
    meet,
    reduce_add,
)
from .primitives import _pack_asm, opaque, retire

#: Named barriers, see ``backward.DQ_BARRIER``: a buffer of q, of dout is free (one for each buffer, at most three).
Q_BARRIER = gl.constexpr(9)
DOUT_BARRIER = gl.constexpr(12)


@gluon.constexpr_function
def key_layout(keys, columns):
    """How a tile of ``keys`` by ``columns`` lies in registers: warpgroups share the 128 keys, or the columns."""
    if keys == 128:
        return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, columns, 16])
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, columns // 2, 16])


@gluon.jit
def _load_columns(
    desc, batch, row, head, first: gl.constexpr, barrier, blocks, at, BLOCK: gl.constexpr, WIDTH: gl.constexpr
):
    """Start the copies of (BLOCK, WIDTH) elements of a (batch, seqlen, heads, head dim) tensor; beyond its end: 0.

    ``blocks`` is a buffer of such tiles as blocks of 64 columns, of which the tile's first is number ``at``.
    """
    for piece in gl.static_range(WIDTH // 64):
        block = blocks.index(at + piece)
        view = block._reinterpret(block.dtype, [1, BLOCK, 1, 64], desc.layout)
        tma.async_copy_global_to_shared(desc, [batch, row, head, first + 64 * piece], barrier, view)


@gluon.jit
def _producer(
    descs,
    shared,
    small,
    bars,
    where,
    pointers,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MORE: gl.constexpr,
    V_WIDE: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    ROTATE: gl.constexpr,
    LISTED: gl.constexpr,
    PHASES: gl.constexpr,
):
    """One warp: k and v of the program, then q and dout of every step. All tiles as blocks of 64 columns."""
    q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc = descs
    q_smem, q2_smem, k_smem, k2_smem, v_smem, dout_smem = shared
    start_smem, delta_smem, bounds_smem, entry_smem = small
    kv_full, q_full, dout_full, dirty_full = bars
    batch, k_head, first_head, n_heads, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q = where
    entries_ptr, hidden_ptr, n_rows, bounds_at = pointers
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    QK_BYTES: gl.constexpr = (WIDE + MORE) * 2
    V_BYTES: gl.constexpr = V_WIDE * 2
    ROW_BYTES: gl.constexpr = BLOCK_M * 4
    BOUND_BYTES: gl.constexpr = 2 * ROW_BYTES if LISTED else 0
    N_Q: gl.constexpr = WIDE // 64
    N_V: gl.constexpr = V_WIDE // 64
    Q_SWIZZLED: gl.constexpr = q_smem.layout

    if LISTED:
        entry = gl.load(entries_ptr)  # each is asked for a step ahead
        if n > 0:  # v may have to be cleaned before the first step
            mbarrier.expect(kv_full.index(0), KEYS * QK_BYTES)
            _load_columns(k_desc, batch, first_key, k_head, 0, kv_full.index(0), k_smem, 0, KEYS, WIDE)
            if MORE > 0:
                _load_columns(k_desc, batch, first_key, k_head, WIDE, kv_full.index(0), k2_smem, 0, KEYS, MORE)
            mbarrier.expect(kv_full.index(1), KEYS * V_BYTES)
            _load_columns(v_desc, batch, first_key, k_head, 0, kv_full.index(1), v_smem, 0, KEYS, V_WIDE)
    else:
        mbarrier.expect(kv_full.index(0), KEYS * QK_BYTES)
        _load_columns(k_desc, batch, first_key, k_head, 0, kv_full.index(0), k_smem, 0, KEYS, WIDE)
        if MORE > 0:
            _load_columns(k_desc, batch, first_key, k_head, WIDE, kv_full.index(0), k2_smem, 0, KEYS, MORE)
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
                    tile = entry & ENTRY_TILE
                    dirty = (entry & ENTRY_DIRTY) != 0
                row = tile * BLOCK_M
                if it >= Q_STAGES:
                    meet("sync", Q_BARRIER + stage)
                if LISTED:  # read by the consumers once they have waited for q
                    entry_smem.index(stage).store(gl.full([1], entry, gl.int32, ONE))
                    gl.thread_barrier()  # an `expect`, unlike an `arrive`, publishes only what its own thread wrote
                if LISTED and dirty:
                    hidden = gl.load(hidden_ptr + tile)
                    if it >= DOUT_STAGES:
                        meet("sync", DOUT_BARRIER + dout_stage)
                    mbarrier.expect(dirty_full, BLOCK_M * (QK_BYTES + V_BYTES) + 2 * ROW_BYTES + BOUND_BYTES)
                    _load_bounds(bounds_desc, bounds_at + row, n_rows, dirty_full, bounds_smem, stage)
                    _load_columns(q_desc, batch, row, head, 0, dirty_full, q_smem, stage * N_Q, BLOCK_M, WIDE)
                    if MORE > 0:
                        _load_columns(q_desc, batch, row, head, WIDE, dirty_full, q2_smem, stage, BLOCK_M, MORE)
                    tma.async_copy_global_to_shared(start_desc, [rows_at + row], dirty_full, start_smem.index(stage))
                    _load_columns(
                        dout_desc, batch, row, head, 0, dirty_full, dout_smem, dout_stage * N_V, BLOCK_M, V_WIDE
                    )
                    delta_buffer = delta_smem.index(dout_stage)
                    tma.async_copy_global_to_shared(delta_desc, [rows_at + row], dirty_full, delta_buffer)
                    mbarrier.wait(dirty_full, dirty_phase)
                    dirty_phase = dirty_phase ^ 1
                    q_blocks = q_smem._reinterpret(q_smem.dtype, [Q_STAGES * N_Q * BLOCK_M // 8, 8, 64], Q_SWIZZLED)
                    _zero_hidden_rows(q_blocks, stage, bounds_smem, stage, hidden, BLOCK_M, WIDE)
                    if MORE > 0:
                        more_blocks = q2_smem._reinterpret(q_smem.dtype, [Q_STAGES * BLOCK_M // 8, 8, 64], Q_SWIZZLED)
                        _zero_hidden_rows(more_blocks, stage, bounds_smem, stage, hidden, BLOCK_M, MORE)
                    mbarrier.arrive(q_full.index(stage), count=1)
                    dout_blocks = dout_smem._reinterpret(
                        q_smem.dtype, [DOUT_STAGES * N_V * BLOCK_M // 8, 8, 64], Q_SWIZZLED
                    )
                    _zero_hidden_rows(dout_blocks, dout_stage, bounds_smem, stage, hidden, BLOCK_M, V_WIDE)
                    mbarrier.arrive(dout_full.index(dout_stage), count=1)
                else:
                    full = q_full.index(stage)
                    mbarrier.expect(full, BLOCK_M * QK_BYTES + ROW_BYTES + BOUND_BYTES)
                    if LISTED:
                        _load_bounds(bounds_desc, bounds_at + row, n_rows, full, bounds_smem, stage)
                    _load_columns(q_desc, batch, row, head, 0, full, q_smem, stage * N_Q, BLOCK_M, WIDE)
                    if MORE > 0:
                        _load_columns(q_desc, batch, row, head, WIDE, full, q2_smem, stage, BLOCK_M, MORE)
                    tma.async_copy_global_to_shared(start_desc, [rows_at + row], full, start_smem.index(stage))
                    if not LISTED:  # noqa: SIM102  (one condition is known at compile time, the other is not)
                        if it == 0:  # behind the first q: the first product needs k and q only
                            mbarrier.expect(kv_full.index(1), KEYS * V_BYTES)
                            _load_columns(
                                v_desc, batch, first_key, k_head, 0, kv_full.index(1), v_smem, 0, KEYS, V_WIDE
                            )
                    if it >= DOUT_STAGES:
                        meet("sync", DOUT_BARRIER + dout_stage)
                    full = dout_full.index(dout_stage)
                    mbarrier.expect(full, BLOCK_M * V_BYTES + ROW_BYTES)
                    _load_columns(dout_desc, batch, row, head, 0, full, dout_smem, dout_stage * N_V, BLOCK_M, V_WIDE)
                    tma.async_copy_global_to_shared(delta_desc, [rows_at + row], full, delta_smem.index(dout_stage))
                if LISTED:
                    entry = gl.load(entries_ptr + gl.where(i + 1 < n, i + 1, 0))
                it += 1
    # Leave no barrier half full.
    for last in range(max(it, Q_STAGES), it + Q_STAGES):
        meet("sync", Q_BARRIER + last % Q_STAGES)
    for last in range(max(it, DOUT_STAGES), it + DOUT_STAGES):
        meet("sync", DOUT_BARRIER + last % DOUT_STAGES)


@gluon.jit
def _storer(
    dq_desc,
    more_desc,
    dq_smem,
    more_smem,
    dq_free,
    where,
    entries_ptr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MORE: gl.constexpr,
    ROTATE: gl.constexpr,
    LISTED: gl.constexpr,
    PHASES: gl.constexpr,
):
    """One warp: adds each step's dq, which the warpgroups leave in shared memory, to the sums in global memory."""
    batch, _, first_head, n_heads, nheads, _, first_tile, n, n_before, rotation, n_tiles_q = where
    ROWS: gl.constexpr = BLOCK_M * (WIDE + MORE) // 128
    for phase in gl.static_range(PHASES):
        begin, end = _phase(phase, n, n_before, PHASES)
        for local_head in range(n_heads):
            head_tiles = (batch * nheads + first_head + local_head) * n_tiles_q
            for i in range(begin, end):
                tile = first_tile + i
                if ROTATE:
                    tile = i + rotation
                    tile = first_tile + gl.where(tile >= n, tile - n, tile)
                if LISTED:
                    tile = gl.load(entries_ptr + i) & ENTRY_TILE
                at = (head_tiles + tile) * ROWS
                # In one turn or two: two halves through one buffer, or both parts.
                for turn in gl.static_range(2 if MORE == 0 else 1):
                    meet("sync", DQ_BARRIER)
                    reduce_add(dq_desc, [at + 64 * turn, 0], dq_smem)
                    if MORE > 0:
                        reduce_add(more_desc, [at + 64, 0], more_smem)
                    tma.store_wait(0)
                    mbarrier.arrive(dq_free, count=1)


@gluon.jit
def _zero_not_finite(part):
    """Zero the NaN and inf in k or v: keys that no row sees may hold them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    for piece in gl.static_range(part.shape[0] // 32):
        rows = part.slice(32 * piece, 32, dim=0)
        x = rows.load(LAYOUT)
        rows.store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0).to(part.dtype))
    fence_async_shared()


@gluon.constexpr_function
def _handed_layout(columns):
    blocks = [[4 << i, 0] for i in range((columns // 16).bit_length() - 1)]
    rows = columns // 2
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *blocks],
        [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        [[1, 0], [2, 0], [rows // 2, 0]],
        [],
        [rows, 128],
    )


@gluon.jit
def _handed(dq, buffer):
    """Store 64 rows by 64 or 128 columns of dq, half of the columns each warpgroup's, in the order of threads.

    As ``backward._hand_over``: every 64 by 64 numbers are one part for ``backward_prepare.dq_rows``.
    """
    COLUMNS: gl.constexpr = dq.shape[1]
    LAYOUT: gl.constexpr = _handed_layout(COLUMNS)
    x = dq.reshape([4, 2, 8, 2, COLUMNS // 16, 4, 2]).permute((3, 4, 0, 2, 5, 1, 6)).reshape([COLUMNS // 2, 128])
    buffer.store(gl.convert_layout(x, LAYOUT, assert_trivial=True))


@gluon.jit
def _halves(dq):
    """The first and the second half of the columns that each warpgroup holds."""
    HALF: gl.constexpr = dq.shape[1] // 4
    first, second = dq.reshape([64, 2, 2, HALF]).permute((0, 1, 3, 2)).split()
    return first.reshape([64, 2 * HALF]), second.reshape([64, 2 * HALF])


@gluon.jit
def _hand_over(dq, dq_smem, parity: gl.constexpr, dq_free):
    """Leave a part of a step's dq in shared memory for the storer, once what was handed over before is gone."""
    mbarrier.wait(dq_free, parity)
    _handed(dq, dq_smem)
    fence_async_shared()
    meet("arrive", DQ_BARRIER)


@gluon.jit
def _hand_over_both(dq, more, parity, dq_smem, more_smem, dq_free):
    """The same for both parts at once."""
    mbarrier.wait(dq_free, parity)
    _handed(dq, dq_smem)
    _handed(more, more_smem)
    fence_async_shared()
    meet("arrive", DQ_BARRIER)


@gluon.jit
def _visible(
    first_key,
    first_row,
    right,
    left,
    bounds,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Which keys (rows of the tile) each query row (its columns) sees."""
    L: gl.constexpr = key_layout(KEYS, BLOCK_M)
    bounds_smem, stage = bounds
    keys = (first_key + gl.arange(0, KEYS, gl.SliceLayout(1, L)))[:, None]
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(0, L))
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
def _here(buffer, stage):
    """A tile of a buffer. Where there is one only, its number is hidden from the compiler, that otherwise computes the
    descriptors of all its products ahead of the loop and spills them."""
    if buffer.shape[0] == 1:
        stage = opaque(stage * 0)
    return buffer.index(stage)


@gluon.jit
def _ds(ds_smem, it):
    """Where a tile's ds lies: in the one buffer, or in one of two by turns.

    With two no barrier is needed before they are written: the one at the weights says of the other warpgroup that it
    has done with the products of the last tile but one.
    """
    return _here(ds_smem, it % ds_smem.shape[0])


@gluon.jit
def _start_scores(
    it, tiles, rows, q_full, zeros, Q_STAGES: gl.constexpr, HAS_SOFTCAP: gl.constexpr, MORE: gl.constexpr
):
    """Start the products for a tile's scores (one, or two with MORE)."""
    q_smem, q2_smem, k_smem, k2_smem, _, _, _, _ = tiles
    start_smem, _, _, _ = rows
    L: gl.constexpr = zeros.type.layout
    stage = it % Q_STAGES
    mbarrier.wait(q_full.index(stage), (it // Q_STAGES) & 1)
    start = _next_start(start_smem, stage, zeros, HAS_SOFTCAP, L)
    scores = warpgroup_mma(_here(k_smem, stage), q_smem.index(stage).permute((1, 0)), start, is_async=True)
    if MORE > 0:
        scores = warpgroup_mma(_here(k2_smem, stage), q2_smem.index(stage).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _start_dp(it, tiles, rows, dout_full, zeros, DOUT_STAGES: gl.constexpr):
    """Start the product for a tile's dp."""
    _, _, _, _, v_smem, dout_smem, _, _ = tiles
    _, delta_smem, _, _ = rows
    stage = it % DOUT_STAGES
    mbarrier.wait(dout_full.index(stage), (it // DOUT_STAGES) & 1)
    _, delta = gl.broadcast(zeros, delta_smem.index(stage).load(gl.SliceLayout(0, zeros.type.layout))[None, :])
    return warpgroup_mma(_here(v_smem, it), _here(dout_smem, stage).permute((1, 0)), delta, is_async=True)


@gluon.jit
def _start_dq(it, ds_smem, k, COLUMNS: gl.constexpr):
    """Start the product for some columns of a tile's dq."""
    DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, COLUMNS // 2, 16])
    dq = gl.full([64, COLUMNS], 0.0, gl.float32, DQ_L)
    return warpgroup_mma(_ds(ds_smem, it).permute((1, 0)), _here(k, it), dq, use_acc=False, is_async=True)


@gluon.jit
def _packed(x, DTYPE: gl.constexpr):
    """fp32 as int32 with half as many columns, pairs of DTYPE.

    Single 16-bit values ptxas would keep unpacked, in as many registers as fp32.
    """
    even, odd = x.reshape([x.shape[0], x.shape[1] // 2, 2]).split()
    asm: gl.constexpr = _pack_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _operand(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of :func:`_packed` in DTYPE, as the first operand of a matrix product."""
    even = (pairs & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(even, odd).reshape([pairs.shape[0], 2 * pairs.shape[1]]), LAYOUT)


@gluon.constexpr_function
def _unpack_asm(dtype):
    if dtype.is_bf16():
        return "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return "{ .reg .b16 even, odd; mov.b32 {even, odd}, $2; cvt.f32.f16 $0, even; cvt.f32.f16 $1, odd; }"


@gluon.jit
def _unpacked(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of :func:`_packed` in fp32."""
    asm: gl.constexpr = _unpack_asm(DTYPE)
    even, odd = gl.inline_asm_elementwise(asm, "=r,=r,r", [pairs], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)
    x = gl.join(even, odd).reshape([pairs.shape[0], 2 * pairs.shape[1]])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _first_half(
    it,
    tile,
    masked,
    PENDING: gl.constexpr,
    scores,
    dk,
    more,
    dv,
    held,
    first_key,
    key_start,
    tiles,
    rows,
    parts,
    bars,
    numbers,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    MORE: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
    NARROW_FIRST: gl.constexpr,
):
    """A query tile's weights, dv and ds, beside what is left of the products for dk of the tile before.

    Args:
        PENDING: whether there is such a tile before. Of its products for dk one was started after the scores.
        held: what is still to be handed over of the dq of the tile before.
        MASK: MASK_NONE, MASK_LEADING (mask) or MASK_ANY (mask where ``masked`` says so).
        DP_EARLY: dp is started before the weights are made: 0 never, 1 in tiles without masks, 2 always.
        DV_LATE: dv is still being computed at the end.
        NARROW_FIRST: with MORE, the product for dk's MORE columns is the one started before the scores.
    """
    _, _, _, _, v_smem, dout_smem, ds_smem, p_smem = tiles
    start_smem, _, bounds_smem, _ = rows
    dq_smem, _, dq_free = parts
    _, dout_full = bars
    right, left, scale2, cap_in, cap_out = numbers
    DTYPE: gl.constexpr = v_smem.dtype
    L: gl.constexpr = key_layout(KEYS, BLOCK_M)
    zeros = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, L)
    stage, dout_stage = it % Q_STAGES, it % DOUT_STAGES
    # The first tile has nothing beside which dp would be early, and there ptxas would have it wait.
    EARLY: gl.constexpr = PENDING and (DP_EARLY == 2 or (DP_EARLY == 1 and MASK == MASK_NONE))
    if EARLY:
        dp_async = _start_dp(it, tiles, rows, dout_full, zeros, DOUT_STAGES)
    LATER: gl.constexpr = (1 if PENDING else 0) + (1 if EARLY else 0)
    if PENDING and MORE > 0:
        if NARROW_FIRST:
            s, more = warpgroup_mma_wait(LATER, deps=[scores, more])
        else:
            s, dk = warpgroup_mma_wait(LATER, deps=[scores, dk])
    else:
        s = warpgroup_mma_wait(LATER, deps=[scores])
    if HAS_SOFTCAP:
        row_start = start_smem.index(stage).load(gl.SliceLayout(0, L))
    else:
        row_start = key_start
    p, g = _weights(s, key_start, row_start, (scale2, cap_in, cap_out), HAS_SOFTCAP, TAIL)
    bounds = (bounds_smem, stage)
    if MASK == MASK_LEADING:
        visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, KEYS, BLOCK_M)
        p = gl.where(visible, p, 0.0)
        if HAS_SOFTCAP:
            g = gl.where(visible, g, 0.0)
    if MASK == MASK_ANY:  # noqa: SIM102  (one condition is known at compile time, the other is not)
        if masked:
            visible = _visible(first_key, tile * BLOCK_M, right, left, bounds, HAS_LEFT, LISTED, KEYS, BLOCK_M)
            p = gl.where(visible, p, 0.0)
            if HAS_SOFTCAP:
                g = gl.where(visible, g, 0.0)
    if KEYS == 128:  # 16 bits are what there is room for
        weights = _packed(p, DTYPE)
        if HAS_SOFTCAP:
            kept = _packed(g, DTYPE)
        else:
            kept = weights
    else:
        weights = p.to(DTYPE)
        if not HAS_SOFTCAP:
            g = p
    if KEYS == 64:
        # Two buffers: the other warpgroup may still be at the last step's dv, but not at the one before.
        p_smem.index(it % 2).store(weights)
        fence_async_shared()
        gl.thread_barrier()
    if not EARLY:
        dp_async = _start_dp(it, tiles, rows, dout_full, zeros, DOUT_STAGES)
    if KEYS == 64:
        dv = warpgroup_mma(p_smem.index(it % 2), _here(dout_smem, dout_stage), dv, is_async=True)
    else:
        P_L: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
        dv = warpgroup_mma(_operand(weights, DTYPE, P_L), _here(dout_smem, dout_stage), dv, is_async=True)
    if PENDING and MORE == 0:
        _hand_over(held, dq_smem, 0, dq_free)
    if PENDING:
        if MORE > 0 and not NARROW_FIRST:
            more = warpgroup_mma_wait(2, deps=[more])
        else:
            dk = warpgroup_mma_wait(2, deps=[dk])
        meet("arrive", Q_BARRIER + (it - 1) % Q_STAGES)
    dp = warpgroup_mma_wait(1, deps=[dp_async])
    if KEYS == 128:
        gl.thread_barrier()  # the other warpgroup, too, has done with the last step's dk
        g = _unpacked(kept, DTYPE, L)
    _ds(ds_smem, it).store((g * dp).to(DTYPE))
    fence_async_shared()
    gl.thread_barrier()
    if not DV_LATE:
        dv = warpgroup_mma_wait(0, deps=[dv])
        meet("arrive", DOUT_BARRIER + dout_stage)
    return dk, more, dv


@gluon.jit
def _step(
    it,
    tile,
    masked,
    dk,
    more,
    dv,
    first_key,
    key_start,
    tiles,
    rows,
    parts,
    bars,
    numbers,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MORE: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
    NARROW_FIRST: gl.constexpr,
):
    """What is left of tile number ``it``, and the first half of the next, ``tile``."""
    q_smem, q2_smem, k_smem, k2_smem, _, _, ds_smem, _ = tiles
    _, _, _, entry_smem = rows
    dq_smem, more_smem, dq_free = parts
    q_full, _ = bars
    zeros = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, key_layout(KEYS, BLOCK_M))
    stage, next_stage = it % Q_STAGES, (it + 1) % Q_STAGES
    dq_async = _start_dq(it, ds_smem, k_smem, WIDE)
    if DV_LATE:
        dv = warpgroup_mma_wait(1, deps=[dv])
        meet("arrive", DOUT_BARRIER + it % DOUT_STAGES)
    if MORE > 0:
        dq2_async = _start_dq(it, ds_smem, k2_smem, MORE)
        if NARROW_FIRST:
            more = warpgroup_mma(_ds(ds_smem, it), q2_smem.index(stage), more, is_async=True)
        else:
            dk = warpgroup_mma(_ds(ds_smem, it), q_smem.index(stage), dk, is_async=True)
        dq, dq2 = warpgroup_mma_wait(1, deps=[dq_async, dq2_async])
        _hand_over_both(dq, dq2, (it & 1) ^ 1, dq_smem, more_smem, dq_free)
        scores = _start_scores(it + 1, tiles, rows, q_full, zeros, Q_STAGES, HAS_SOFTCAP, MORE)
        if NARROW_FIRST:
            dk = warpgroup_mma(_ds(ds_smem, it), q_smem.index(stage), dk, is_async=True)
        else:
            more = warpgroup_mma(_ds(ds_smem, it), q2_smem.index(stage), more, is_async=True)
        held = 0
    else:
        scores = _start_scores(it + 1, tiles, rows, q_full, zeros, Q_STAGES, HAS_SOFTCAP, MORE)
        dk = warpgroup_mma(_ds(ds_smem, it), q_smem.index(stage), dk, is_async=True)
        dq = warpgroup_mma_wait(2, deps=[dq_async])
        first, held = _halves(dq)
        _hand_over(first, dq_smem, 1, dq_free)
    if LISTED:
        masked = (_read(entry_smem.index(next_stage)) & ENTRY_MASKED) != 0
    return _first_half(
        it + 1, tile, masked, True, scores, dk, more, dv, held, first_key, key_start, tiles, rows, parts,
        bars, numbers, KEYS, BLOCK_M, MORE, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL, DP_EARLY,
        DV_LATE, NARROW_FIRST,
    )  # fmt: skip


@gluon.jit
def _consumer(
    tiles,
    rows,
    parts,
    bars,
    dkv,
    work,
    steps,
    numbers,
    HEAD_DIM: gl.constexpr,
    V_HEAD_DIM: gl.constexpr,
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MORE: gl.constexpr,
    V_WIDE: gl.constexpr,
    Q_STAGES: gl.constexpr,
    DOUT_STAGES: gl.constexpr,
    MASK: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    LISTED: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
    NARROW_FIRST: gl.constexpr,
):
    """Two warpgroups: dk and dv, of 64 keys each or of half of the columns each, and each step's dq together."""
    q_smem, q2_smem, k_smem, k2_smem, v_smem, _, ds_smem, _ = tiles
    _, _, _, entry_smem = rows
    dq_smem, more_smem, dq_free = parts
    kv_full, q_full, dout_full = bars
    dk_ptr, dv_ptr, dk_stride, dv_stride, scale = dkv
    first_key, seqlen_k, n_heads, first_tile = work
    n, n_before, n_full, covered = steps
    L: gl.constexpr = key_layout(KEYS, BLOCK_M)
    zeros = gl.full([KEYS, BLOCK_M], 0.0, gl.float32, L)
    keys = first_key + gl.arange(0, KEYS, gl.SliceLayout(1, L))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    dk = gl.full([KEYS, WIDE], 0.0, gl.float32, key_layout(KEYS, WIDE))
    dv = gl.full([KEYS, V_WIDE], 0.0, gl.float32, key_layout(KEYS, V_WIDE))
    if MORE > 0:
        more = gl.full([KEYS, MORE], 0.0, gl.float32, key_layout(KEYS, MORE))
    else:
        more = n * 0
    total = n * n_heads
    step_bars = (q_full, dout_full)

    if LISTED:
        mbarrier.wait(kv_full.index(0), 0, pred=total > 0)
        if (total > 0) & (covered == 0):
            mbarrier.wait(kv_full.index(1), 0)
            _zero_not_finite(k_smem.index(0))
            if MORE > 0:
                _zero_not_finite(k2_smem.index(0))
            _zero_not_finite(v_smem.index(0))
            gl.thread_barrier()
    else:
        mbarrier.wait(kv_full.index(0), 0)
    if total > 0:
        scores = _start_scores(0, tiles, rows, q_full, zeros, Q_STAGES, HAS_SOFTCAP, MORE)
        mbarrier.wait(kv_full.index(1), 0)
        masked = False
        if LISTED:
            masked = (_read(entry_smem.index(0)) & ENTRY_MASKED) != 0
        elif MASK == MASK_ANY:
            masked = (n_before > 0) | (n_full == 0)
        dk, more, dv = _first_half(
            0, first_tile, masked, False, scores, dk, more, dv, 0, first_key, key_start, tiles, rows, parts,
            step_bars, numbers, KEYS, BLOCK_M, MORE, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP, TAIL,
            DP_EARLY, DV_LATE, NARROW_FIRST,
        )  # fmt: skip
        if MASK == MASK_LEADING:
            BEFORE: gl.constexpr = KEYS // BLOCK_M
            if BEFORE > 1 or GROUPED:
                for it in range(BEFORE * n_heads - 1):
                    dk, more, dv = _step(
                        it, first_tile + (it + 1) % BEFORE, True, dk, more, dv, first_key, key_start, tiles, rows,
                        parts, step_bars, numbers, KEYS, BLOCK_M, WIDE, MORE, Q_STAGES, DOUT_STAGES, MASK, False, False,
                        HAS_SOFTCAP, TAIL, DP_EARLY, DV_LATE, NARROW_FIRST,
                    )  # fmt: skip
            for it in range(BEFORE * n_heads - 1, total - 1):
                dk, more, dv = _step(
                    it, 0, False, dk, more, dv, first_key, key_start, tiles, rows, parts, step_bars, numbers, KEYS,
                    BLOCK_M, WIDE, MORE, Q_STAGES, DOUT_STAGES, MASK_NONE, False, False, HAS_SOFTCAP, TAIL, DP_EARLY,
                    DV_LATE, NARROW_FIRST,
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
                dk, more, dv = _step(
                    it, first_tile + i, masked, dk, more, dv, first_key, key_start, tiles, rows, parts, step_bars,
                    numbers, KEYS, BLOCK_M, WIDE, MORE, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, HAS_SOFTCAP,
                    TAIL, DP_EARLY, DV_LATE, NARROW_FIRST,
                )  # fmt: skip
        last = total - 1
        stage = last % Q_STAGES
        dq_async = _start_dq(last, ds_smem, k_smem, WIDE)
        if DV_LATE:
            dv = warpgroup_mma_wait(1, deps=[dv])
            meet("arrive", DOUT_BARRIER + last % DOUT_STAGES)
        if MORE > 0:
            dq2_async = _start_dq(last, ds_smem, k2_smem, MORE)
            dk = warpgroup_mma(_ds(ds_smem, last), q_smem.index(stage), dk, is_async=True)
            more = warpgroup_mma(_ds(ds_smem, last), q2_smem.index(stage), more, is_async=True)
            dq, held = warpgroup_mma_wait(2, deps=[dq_async, dq2_async])
            _hand_over_both(dq, held, (last & 1) ^ 1, dq_smem, more_smem, dq_free)
            dk, more = warpgroup_mma_wait(0, deps=[dk, more])
        else:
            dk = warpgroup_mma(_ds(ds_smem, last), q_smem.index(stage), dk, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[dq_async])
            first, held = _halves(dq)
            _hand_over(first, dq_smem, 1, dq_free)
            dk = warpgroup_mma_wait(0, deps=[dk])
            _hand_over(held, dq_smem, 0, dq_free)
        meet("arrive", Q_BARRIER + stage)
    gl.thread_barrier()  # the other warpgroup, too, has done with k and v
    n_keys = seqlen_k - first_key
    _store_rows_through(dv_ptr, dv_stride, n_keys, dv, v_smem.index(0), V_HEAD_DIM)
    _store_rows_through(dk_ptr, dk_stride, n_keys, dk * scale, k_smem.index(0), HEAD_DIM)
    if MORE > 0:
        _store_rows_through(dk_ptr + WIDE, dk_stride, n_keys, more * scale, k2_smem.index(0), HEAD_DIM - WIDE)


@gluon.jit(do_not_specialize=RUNTIME)
def attention_backward_wide(
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
    KEYS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WIDE: gl.constexpr,
    MORE: gl.constexpr,
    V_WIDE: gl.constexpr,
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
    DP_EARLY: gl.constexpr,
    DV_LATE: gl.constexpr,
    NARROW_FIRST: gl.constexpr,
    OTHER_REGISTERS: gl.constexpr,
):
    """dk and dv of KEYS keys of one key head, summed over ``heads_per_split`` query heads, and their part of dq.

    As ``backward.attention_backward``, but: blocks of q, k, v and dout are 64 columns wide; ``dq_desc`` is of the first
    WIDE columns of dq's sums, in blocks of 64 by 128 numbers, ``more_desc`` of the others, in blocks of 32 by 128.
    There are Q_STAGES buffers of q and DOUT_STAGES of dout, at most three each. BLOCK_M is 64.
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
    first_tile, n, n_before, n_full = _query_tiles(
        first_key, n_tiles_q, right, left, BLOCK_M, KEYS, HAS_LEFT, HAS_RIGHT
    )
    n_rows = n_tiles_q * BLOCK_M
    bounds_at = 0
    covered = 0
    if LISTED:
        list_at = batch * list_stride
        count = gl.load(counts_ptr + list_at + tile_n)
        n = count & COUNT_ENTRIES
        covered = count & COUNT_COVERED
        entries_ptr += (list_at + tile_n).to(gl.int64) * (n_tiles_q + 2)
        which = gl.where(list_stride > 0, batch, 0)
        bounds_at = which * 2 * n_rows
        summary_ptr += (5 * which + 4) * n_tiles_q
    rotation = 0
    if ROTATE:
        rotation = tile_n * (KEYS // BLOCK_M) % n

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, WIDE], SWIZZLED)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, V_WIDE], SWIZZLED)
    q_smem = gl.allocate_shared_memory(DTYPE, [Q_STAGES, BLOCK_M, WIDE], SWIZZLED)
    dout_smem = gl.allocate_shared_memory(DTYPE, [DOUT_STAGES, BLOCK_M, V_WIDE], SWIZZLED)
    k2_smem = k_smem
    q2_smem = q_smem
    if MORE > 0:
        k2_smem = gl.allocate_shared_memory(DTYPE, [1, KEYS, MORE], SWIZZLED)
        q2_smem = gl.allocate_shared_memory(DTYPE, [Q_STAGES, BLOCK_M, MORE], SWIZZLED)
    ds_smem = gl.allocate_shared_memory(DTYPE, [128 // KEYS, KEYS, BLOCK_M], SWIZZLED)
    p_smem = ds_smem
    if KEYS == 64:
        p_smem = gl.allocate_shared_memory(DTYPE, [2, KEYS, BLOCK_M], SWIZZLED)
    dq_smem = gl.allocate_shared_memory(gl.float32, [64, 128], dq_desc.layout)
    more_smem = dq_smem
    if MORE > 0:
        more_smem = gl.allocate_shared_memory(gl.float32, [32, 128], dq_desc.layout)
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
    dq_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(dq_free, count=1)
    fence_async_shared()

    # For the producer: tiles as blocks of 64 columns.
    N_WIDE: gl.constexpr = WIDE // 64
    N_V: gl.constexpr = V_WIDE // 64
    q_blocks = q_smem._reinterpret(DTYPE, [Q_STAGES * N_WIDE, BLOCK_M, 64], SWIZZLED)
    k_blocks = k_smem._reinterpret(DTYPE, [N_WIDE, KEYS, 64], SWIZZLED)
    v_blocks = v_smem._reinterpret(DTYPE, [N_V, KEYS, 64], SWIZZLED)
    dout_blocks = dout_smem._reinterpret(DTYPE, [DOUT_STAGES * N_V, BLOCK_M, 64], SWIZZLED)
    k2_blocks = k_blocks
    q2_blocks = q_blocks
    if MORE > 0:
        k2_blocks = k2_smem
        q2_blocks = q2_smem
    key_at = split.to(gl.int64) * dkv_stride_split + batch.to(gl.int64) * dkv_stride_b + first_key
    row_at = key_at * nheads_k + k_head
    tiles = (q_smem, q2_smem, k_smem, k2_smem, v_smem, dout_smem, ds_smem, p_smem)
    rows = (start_smem, delta_smem, bounds_smem, entry_smem)
    parts = (dq_smem, more_smem, dq_free)
    dkv = (dk_ptr + row_at * HEAD_DIM, dv_ptr + row_at * V_HEAD_DIM, nheads_k * HEAD_DIM, nheads_k * V_HEAD_DIM, scale)
    work = (first_key, seqlen_k, heads_per_split, first_tile)
    numbers = (right, left, scale2, cap_in, cap_out)
    where = (
        batch, k_head, first_head, heads_per_split, nheads, first_key, first_tile, n, n_before, rotation, n_tiles_q,
    )  # fmt: skip
    descs = (q_desc, k_desc, v_desc, dout_desc, start_desc, delta_desc, bounds_desc)
    blocks = (q_blocks, q2_blocks, k_blocks, k2_blocks, v_blocks, dout_blocks)
    pointers = (entries_ptr, summary_ptr, n_rows, bounds_at)
    PHASES: gl.constexpr = 2 if MASK == MASK_LEADING and GROUPED else 1
    bars = (kv_full, q_full, dout_full)
    steps = (n, n_before, n_full, covered)
    fill_bars = (kv_full, q_full, dout_full, dirty_full)
    gl.warp_specialize(
        [
            (_consumer, (tiles, rows, parts, bars, dkv, work, steps, numbers, HEAD_DIM, V_HEAD_DIM, KEYS, BLOCK_M, WIDE,
                         MORE, V_WIDE, Q_STAGES, DOUT_STAGES, MASK, HAS_LEFT, LISTED, GROUPED, HAS_SOFTCAP, TAIL,
                         DP_EARLY, DV_LATE, NARROW_FIRST)),
            (_producer, (descs, blocks, rows, fill_bars, where, pointers, KEYS, BLOCK_M, WIDE, MORE, V_WIDE, Q_STAGES,
                         DOUT_STAGES, ROTATE, LISTED, PHASES)),
            (_storer, (dq_desc, more_desc, dq_smem, more_smem, dq_free, where, entries_ptr, BLOCK_M, WIDE, MORE, ROTATE,
                       LISTED, PHASES)),
        ],
        [1, 1],
        [OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
    retire(kv_full)
    retire(q_full)
    retire(dout_full)
    if LISTED:
        mbarrier.invalidate(dirty_full)
    mbarrier.invalidate(dq_free)
