"""Launching the decoding kernels: which calls they serve, how many splits, which tiles."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..inputs import SHORT_QUERY, AttentionInputs
from . import tiles
from .decode import attention_decode, attention_decode_combine
from .launch import _NO_STRIDES, Call, Launch, Plan, Structure, _cdiv, _reusable, _strides, prepare

#: Programs per multiprocessor that the splits aim at: enough loads in flight to fill the memory's bandwidth.
PROGRAMS_PER_CORE = 2
MAX_SPLITS = 128
_COMBINE_SPLITS = 16
_WARPS = 4
STAGES = 3


def serves(inputs: AttentionInputs) -> bool:
    """Whether a call is decoding: at most 16 query rows, no dropout."""
    return inputs.seqlen_q <= SHORT_QUERY and inputs.dropout_p == 0.0


def _block_n(s: Structure) -> int:
    """Keys of a tile: about 16 KiB of keys, the values as many, so that three stages fit shared memory."""
    if s.device.arch == "interpreter":
        return 32  # small tiles, so that small tests have several
    row = tiles.padded(max(s.head_dim, s.v_head_dim)) * s.dtype.itemsize
    return max(16, min(128, 16384 // row))


@cache
def _decode_plan(s: Structure, block_m: int, page_size: int) -> Plan:
    stages = STAGES if s.device.arch.startswith("sm") else 1
    options = {
        "HEAD_DIM": s.head_dim,
        "V_HEAD_DIM": s.v_head_dim,
        "PAGE_SIZE": page_size,
        "HAS_LEFT": s.has_left,
        "HAS_RIGHT": s.has_right,
        "HAS_INTERVALS": s.has_intervals,
        "HAS_KEY_MASK": s.has_key_mask,
        "BIAS": s.bias,
        "HAS_ALIBI": s.has_alibi,
        "HAS_POSITIONS": s.has_positions,
        "HAS_SINKS": s.sinks,
        "HAS_SOFTCAP": s.softcap,
        "INPUT_PRECISION": s.device.fp32_precision if s.dtype == torch.float32 else "ieee",
        "BLOCK_M": block_m,
        "BLOCK_N": _block_n(s),
        "BLOCK_D": tiles.padded(s.head_dim),
        "BLOCK_DV": tiles.padded(s.v_head_dim),
        "num_warps": _WARPS,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    tile = tiles.Tile(block_m, _block_n(s), _WARPS, stages)
    return Plan(attention_decode, tile, options, _reusable(s, attention_decode))


@cache
def _combine_plan(s: Structure, block_splits: int) -> Plan:
    block_dv = tiles.padded(s.v_head_dim)
    options = {"V_HEAD_DIM": s.v_head_dim, "BLOCK_SPLITS": block_splits, "BLOCK_DV": block_dv, "num_warps": 2}
    tile = tiles.Tile(1, block_splits, 2, 1)
    return Plan(attention_decode_combine, tile, options, _reusable(s, attention_decode_combine))


def _row_block(pairs: int) -> int:
    """Rows of a tile: a power of two from 16 (the least of a matrix product) to 64."""
    return min(64, max(16, 1 << (pairs - 1).bit_length()))


def n_splits(programs: int, seqlen_k: int, block_n: int, n_cores: int) -> int:
    """Into how many parts the keys are split: until the device is full, at least two tiles of keys each."""
    wanted = _cdiv(PROGRAMS_PER_CORE * n_cores, max(programs, 1))
    return max(1, min(wanted, _cdiv(seqlen_k, 2 * block_n), MAX_SPLITS))


def forward(inputs: AttentionInputs, block_table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``out`` (batch, seqlen_q, nheads, v_head_dim) and ``lse`` (batch, nheads, seqlen_q) of one decoding call.

    Args:
        inputs: the call, with at most 16 query rows and no dropout. With ``block_table`` its keys and values are
            pages ``(num_blocks, page_size, nheads_k, dim)``, and its mask has row intervals.
        block_table: int32 ``(batch, pages of a row)``.
    """
    q = inputs.query
    page_size = 0
    if block_table is not None:
        page_size = inputs.key.shape[1]
    call = prepare(inputs)
    batch, seqlen_q, nheads, _ = q.shape
    nheads_k = inputs.key.shape[2]
    seqlen_k = inputs.key.shape[1] if block_table is None else block_table.shape[1] * page_size
    out = torch.empty((batch, seqlen_q, nheads, inputs.v_head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    group = nheads // nheads_k
    block_m = _row_block(group * seqlen_q)
    plan = _decode_plan(call.structure, block_m, page_size)
    row_tiles = _cdiv(group * seqlen_q, block_m)
    cores = call.structure.device.n_cores
    splits = n_splits(batch * nheads_k * row_tiles, seqlen_k, plan.tile.block_n, cores)
    if splits == 1:
        decode_launch(call, plan, out[None], lse[None], seqlen_k, row_tiles, block_table).run()
        return out, lse
    # Not kept between calls: an allocation costs 2 us, and a kept one would be shared by streams and CUDA graphs.
    parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    decode_launch(call, plan, parts, part_lse, seqlen_k, row_tiles, block_table).run()
    combine_launch(call.structure, parts, part_lse, out, lse).run()
    return out, lse


def decode_launch(
    call: Call, plan: Plan, out: Tensor, lse: Tensor, seqlen_k: int, row_tiles: int, block_table: Tensor | None
) -> Launch:
    """The launch of the split kernel; ``out`` and ``lse`` have a leading dimension of splits."""
    inputs = call.inputs
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, seqlen_q, nheads, _ = q.shape
    nheads_k, splits = k.shape[2], out.shape[0]
    if sinks is None:
        sinks_strides: tuple[int | None, ...] = _NO_STRIDES[:3]
    else:
        sinks_strides = (0, *_strides(sinks), 0) if sinks.dim() == 1 else _strides(sinks)
    intervals, key_mask, _, bias, positions, slopes = call.pointers
    tensors = (q, k, v, out, lse, intervals, key_mask, bias, positions, slopes, sinks, block_table)
    strides = (
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:4],
        lse.stride(0),
        *call.strides[:5],  # intervals 3, key mask 2
        *call.strides[6:],  # bias 4, positions 2, slopes 2
        *sinks_strides,
        None if block_table is None else block_table.stride(0),
    )
    sizes = (nheads_k, nheads // nheads_k, seqlen_q, seqlen_k, splits, row_tiles, *call.window)
    arguments = (*tensors, *strides, *sizes, float(inputs.softmax_scale), float(inputs.softcap))
    key = (q.device.index, *strides, *call.dtypes, out.dtype, None if sinks is None else sinks.dtype)
    return Launch(plan, batch * nheads_k * row_tiles * splits, arguments, len(tensors), key)


def combine_launch(s: Structure, parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch that combines the splits."""
    batch, seqlen_q, nheads, _ = out.shape
    tensors = (parts, part_lse, out, lse)
    strides = (parts.stride(0), part_lse.stride(0))
    arguments = (*tensors, *strides, nheads, seqlen_q, parts.shape[0])
    key = (out.device.index, *strides, out.dtype)
    return Launch(_combine_plan(s, _COMBINE_SPLITS), batch * nheads * seqlen_q, arguments, len(tensors), key)
