"""The loop of ``backward`` for 64 columns: the warpgroups that compute, whose steps work on columns in two halves.

A step: scores and dp are started together. Their columns (query rows) are worked on in two halves, so that the tensor
cores have dv and dk of the first while the weights of the second are made; dq is started before the second half of dk,
so that dq goes to shared memory beside that. Every product ends in the step that starts it. The order of waits is what
keeps ptxas from serialising the products: change it only with its warnings C7510 to C7519 in view, which
tests/kernels/aot checks. Products that start at numbers of rows (-lse, -delta) would save additions; but then ptxas
lets dp wait for the scores.

Triton sees that ds of the step before may still be read where ds is stored, and makes all threads meet once more,
unless it is in another allocation: with dq, two steps are computed in an iteration, each with an allocation of its own.

This kernel beside that with the loop of ``backward``, on one H200 (2026-11-28, bf16, 32 heads), TFLOP/s: 4096 rows 470
-> 534, causal 454 -> 497; 16384 rows 490 -> 541, causal 501 -> 546; 2048 rows 449 -> 498, causal 414 -> 439; 512 rows
362 -> 372, causal 220 -> 228. Split, as whole calls, and with numbers of rows read 16 bytes at a time: causal 4096 rows
348 -> 361, 2048 308 -> 318, 512 166 -> 174. Not faster: numbers of rows read 16 bytes at a time, or earlier, or
shuffled from other threads, and dq of a step in the next one. At 128 columns, 128 keys by 64 rows a step, it was 11 to
14 % slower than the loop of ``backward``.

Only the first steps of a program mask. With a branch in each step that asked whether to mask, row intervals gained
nothing (0.99 of the other loop); so their lists of query tiles begin with those that mask, and the loop over the others
is that of calls without row intervals (530 instructions a step; the other loop has 840). Several key heads to a program
(UNITS) are to save most of the 5.3 us that a program costs beside its steps.
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

from .backward_common import (
    BLOCK_N,
    MASK_ANY,
    MASK_LEADING,
    STAGE_BARRIER,
    _hand_over,
    _store_rows,
    _zero_not_finite,
    meet,
    scores_layout,
)
from .primitives import opaque


@gluon.jit
def _halves(x, L: gl.constexpr):
    """The first and the last half of the columns, as they lie in registers."""
    first, last = x.reshape([BLOCK_N, 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(first, L, assert_trivial=True), gl.convert_layout(last, L, assert_trivial=True)


@gluon.jit
def _half(buffer, HALF: gl.constexpr, L: gl.constexpr):
    """(1, rows): a number of each query row of a half; ``L``: the layout of half the scores."""
    ROWS: gl.constexpr = L.instr_shape[1]
    return buffer.slice(HALF * ROWS, ROWS).load(gl.SliceLayout(0, L))[None, :]


@gluon.jit
def _half_weights(
    s, tile, first_key, key_start, start_smem, bounds_smem, stage, numbers, HALF: gl.constexpr, BLOCK_M: gl.constexpr,
    MASKED: gl.constexpr, LISTED: gl.constexpr, HAS_SOFTCAP: gl.constexpr, TAIL: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """``(p, p with the derivative of softcap)`` of half a tile's scores, 0 where a row does not see a key.

    ``start_smem``: -lse of rows in base 2; ``key_start`` is -inf beyond the last key, else 0; ``L``: the layout
    of half the scores. MASKED: row i sees keys up to ``i + right``, or (LISTED) those between its bounds.
    """
    right, _, scale2, cap_in, cap_out = numbers
    row_start = _half(start_smem.index(stage), HALF, L)
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + gl.exp2(s * cap_in))
        x = t * cap_out + row_start
    else:
        x = s * scale2 + row_start
    if TAIL:
        x = x + key_start[:, None]
    p = gl.exp2(x)
    if MASKED:
        keys = (first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, L)))[:, None]
        if LISTED:
            p = gl.where(keys >= _half(bounds_smem.index(2 * stage), HALF, L), p, 0.0)
            p = gl.where(keys < _half(bounds_smem.index(2 * stage + 1), HALF, L), p, 0.0)
        else:
            rows = HALF * L.instr_shape[1] + gl.arange(0, L.instr_shape[1], gl.SliceLayout(0, L))
            p = gl.where(keys <= (tile * BLOCK_M + right + rows)[None, :], p, 0.0)
    if HAS_SOFTCAP:
        g = p * (1.0 - t * t)
    else:
        g = p
    return p, g


@gluon.jit
def _step(
    it,
    tile,
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
    MASKED: gl.constexpr,
    LISTED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    TAIL: gl.constexpr,
    WITH_DQ: gl.constexpr,
    BUFFER: gl.constexpr,
):
    """One query tile.

    Args:
        MASKED: row i sees keys up to ``i + right``, or (LISTED) those between its bounds; else all.
        BUFFER: which allocation ds goes to.
    """
    q_smem, k_smem, v_smem, dout_smem, ds_smem, start_smem, delta_smem, dq_smem = shared
    q_full, dout_full, dq_free = bars
    DTYPE: gl.constexpr = q_smem.dtype
    ROWS: gl.constexpr = BLOCK_M // 2  # of a half
    L: gl.constexpr = scores_layout(BLOCK_M)
    HALF_L: gl.constexpr = scores_layout(ROWS)
    OUT_L: gl.constexpr = scores_layout(BLOCK_D)
    P_L: gl.constexpr = gl.DotOperandLayout(0, OUT_L, 2)
    zeros = gl.full([BLOCK_N, BLOCK_M], 0.0, gl.float32, L)
    it = opaque(it)  # of two steps in an iteration, ptxas would keep all addresses in registers
    stage, phase = it % STAGES, (it // STAGES) & 1
    q, dout = q_smem.index(stage), dout_smem.index(stage)
    deltas = delta_smem.index(stage)

    mbarrier.wait(q_full.index(stage), phase)
    s_async = warpgroup_mma(k_smem, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(stage), phase)
    dp_async = warpgroup_mma(v_smem, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s1, s2 = _halves(warpgroup_mma_wait(1, deps=[s_async]), HALF_L)
    p1, g1 = _half_weights(
        s1, tile, first_key, key_start, start_smem, bounds_smem, stage, numbers, 0, BLOCK_M, MASKED, LISTED,
        HAS_SOFTCAP, TAIL, HALF_L,
    )  # fmt: skip
    dv = warpgroup_mma(gl.convert_layout(p1.to(DTYPE), P_L), dout.slice(0, ROWS), dv, is_async=True)
    dp1, dp2 = _halves(warpgroup_mma_wait(1, deps=[dp_async]), HALF_L)
    ds1 = (g1 * (dp1 + _half(deltas, 0, HALF_L))).to(DTYPE)
    dk = warpgroup_mma(gl.convert_layout(ds1, P_L), q.slice(0, ROWS), dk, is_async=True)
    p2, g2 = _half_weights(
        s2, tile, first_key, key_start, start_smem, bounds_smem, stage, numbers, 1, BLOCK_M, MASKED, LISTED,
        HAS_SOFTCAP, TAIL, HALF_L,
    )  # fmt: skip
    dv = warpgroup_mma(gl.convert_layout(p2.to(DTYPE), P_L), dout.slice(ROWS, ROWS), dv, is_async=True)
    ds2 = (g2 * (dp2 + _half(deltas, 1, HALF_L))).to(DTYPE)
    if WITH_DQ:
        # In one piece: between two, Triton would have all threads meet.
        ds = gl.join(ds1, ds2).permute((0, 2, 1)).reshape([BLOCK_N, BLOCK_M])
        ds_smem[BUFFER].store(gl.convert_layout(ds, L, assert_trivial=True))
        fence_async_shared()
        gl.thread_barrier()
        DQ_WARPS: gl.constexpr = [4, 2] if BLOCK_M == 64 else [8, 1]
        DQ_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], DQ_WARPS, [16, 64, 16])
        dq = gl.full([BLOCK_M, BLOCK_D], 0.0, gl.float32, DQ_L)
        dq_async = warpgroup_mma(ds_smem[BUFFER].permute((1, 0)), k_smem, dq, use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds2, P_L), q.slice(ROWS, ROWS), dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=[dv, dq_async])
        _hand_over(dq, it, dq_smem, dq_free)
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dk = warpgroup_mma(gl.convert_layout(ds2, P_L), q.slice(ROWS, ROWS), dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    meet("arrive", STAGE_BARRIER + stage)
    return dk, dv


@gluon.jit
def _consumer_of_halves(
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
    """Two warpgroups: dk and dv of 64 keys each, and each step's dq together. Called like ``backward._consumer``."""
    gl.static_assert(MASK != MASK_ANY, "masks only the first steps")
    kv_full, q_full, dout_full, dq_free = bars
    dk_ptr, dv_ptr, dk_stride, dv_stride, scale = dkv
    first_key, seqlen_k, n_heads, first_tile = work
    _, k_smem, v_smem, _, _, _, _, _ = shared
    n, n_before, _ = steps
    bounds_smem, _, covered = lists
    HALF_L: gl.constexpr = scores_layout(BLOCK_M // 2)
    OUT_L: gl.constexpr = scores_layout(BLOCK_D)
    keys = first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(1, HALF_L))
    key_start = gl.where(keys < seqlen_k, 0.0, float("-inf"))
    total = n * n_heads
    step_bars = (q_full, dout_full, dq_free)

    for unit in range(UNITS):
        dk = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
        dv = gl.full([BLOCK_N, BLOCK_D], 0.0, gl.float32, OUT_L)
        at = unit * total  # steps before
        if LISTED:  # without entries nothing is loaded or computed
            mbarrier.wait(kv_full.index(0), unit & 1, pred=total > 0)
            mbarrier.wait(kv_full.index(1), unit & 1, pred=total > 0)
            if (total > 0) & (covered == 0):
                _zero_not_finite(k_smem)
                _zero_not_finite(v_smem)
                gl.thread_barrier()
        else:
            mbarrier.wait(kv_full.index(0), unit & 1)
            mbarrier.wait(kv_full.index(1), unit & 1)

        begin = n * 0
        if MASK == MASK_LEADING:
            if ALIGNED:
                before: gl.constexpr = BLOCK_N // BLOCK_M
            else:
                before = n_before
            for it in range(before * n_heads):
                tile = first_tile + it
                if GROUPED:
                    tile = first_tile + it % before
                dk, dv = _step(
                    at + it, tile, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem, BLOCK_M,
                    BLOCK_D, STAGES, True, LISTED, HAS_SOFTCAP, TAIL, WITH_DQ, 0,
                )  # fmt: skip
            begin = before * n_heads
        NEXT: gl.constexpr = 1 if MASK == MASK_LEADING else 0  # the other allocation than the one before's
        if WITH_DQ:
            n_pairs = (total - begin) // 2
            for pair in range(n_pairs):
                for half in gl.static_range(2):
                    dk, dv = _step(
                        at + begin + 2 * pair + half, 0, dk, dv, first_key, key_start, shared, step_bars, numbers,
                        bounds_smem, BLOCK_M, BLOCK_D, STAGES, False, False, HAS_SOFTCAP, TAIL, WITH_DQ,
                        (NEXT + half) % 2,
                    )  # fmt: skip
            begin += 2 * n_pairs
        for it in range(begin, total):
            dk, dv = _step(
                at + it, 0, dk, dv, first_key, key_start, shared, step_bars, numbers, bounds_smem, BLOCK_M, BLOCK_D,
                STAGES, False, False, HAS_SOFTCAP, TAIL, WITH_DQ, NEXT,
            )  # fmt: skip
        _store_rows(dv_ptr + unit * V_HEAD_DIM, dv_stride, seqlen_k - first_key, dv, V_HEAD_DIM)
        _store_rows(dk_ptr + unit * HEAD_DIM, dk_stride, seqlen_k - first_key, dk * scale, HEAD_DIM)
