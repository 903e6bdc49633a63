"""Launching the decoding kernels: which calls they serve, how many splits, which tiles."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..inputs import SHORT_QUERY, AttentionInputs
from . import tiles
from .decode import attention_decode, attention_decode_combine
from .launch import _NO_STRIDES, Call, Launch, Structure, _cdiv, _strides, prepare

#: Programs per multiprocessor that the splits aim at: enough loads in flight to fill the memory's bandwidth.
PROGRAMS_PER_CORE = 2
MAX_SPLITS = 128
_COMBINE_SPLITS = 16


def serves(inputs: AttentionInputs) -> bool:
    """Whether a call is decoding: at most 16 query rows, no dropout."""
    return inputs.seqlen_q <= SHORT_QUERY and inputs.dropout_p == 0.0


@cache
def _options(s: Structure, block_m: int, page_size: int) -> dict[str, Any]:
    """Constexprs of a structure. 4-byte elements and wide heads get fewer keys a tile, to fit shared memory."""
    wide = tiles.padded(max(s.head_dim, s.v_head_dim)) * s.dtype.itemsize
    block_n = 128 if wide <= 128 else 64 if wide <= 512 else 32 if wide <= 1024 else 16
    if s.device.arch == "interpreter":
        block_n = 32  # small tiles, so that small tests have several
    return {
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
        "BLOCK_N": block_n,
        "BLOCK_D": tiles.padded(s.head_dim),
        "BLOCK_DV": tiles.padded(s.v_head_dim),
        "num_warps": 4,
        "num_stages": 3 if s.device.arch.startswith("sm") and wide <= 512 else 1,
    }


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
    options = _options(call.structure, block_m, page_size)
    row_tiles = _cdiv(group * seqlen_q, block_m)
    cores = call.structure.device.n_cores
    splits = n_splits(batch * nheads_k * row_tiles, seqlen_k, options["BLOCK_N"], cores)
    if splits == 1:
        decode_launch(call, out[None], lse[None], options, seqlen_k, row_tiles, splits, block_table).run()
        return out, lse
    # Not kept between calls: an allocation costs 2 us, and a kept one would be shared by streams and CUDA graphs.
    parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    decode_launch(call, parts, part_lse, options, seqlen_k, row_tiles, splits, block_table).run()
    combine_launch(parts, part_lse, out, lse).run()
    return out, lse


def decode_launch(
    call: Call,
    out: Tensor,
    lse: Tensor,
    options: dict[str, Any],
    seqlen_k: int,
    row_tiles: int,
    splits: int,
    block_table: Tensor | None,
) -> Launch:
    """The launch of the split kernel; ``out`` and ``lse`` have a leading dimension of splits."""
    inputs = call.inputs
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, seqlen_q, nheads, _ = q.shape
    nheads_k = k.shape[2]
    if sinks is None:
        sinks_strides: tuple[int | None, ...] = _NO_STRIDES[:3]
    else:
        sinks_strides = (0, *_strides(sinks), 0) if sinks.dim() == 1 else _strides(sinks)
    intervals, key_mask, _, bias, positions, slopes = call.pointers
    strides = call.strides  # intervals 3, key_mask 2, holes 1, bias 4, positions 2, slopes 2
    arguments = (
        q, k, v, out, lse, intervals, key_mask, bias, positions, slopes, sinks, block_table,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:4], lse.stride(0),
        *strides[:5], *strides[6:], *sinks_strides, None if block_table is None else block_table.stride(0),
        nheads_k, nheads // nheads_k, seqlen_q, seqlen_k, splits, row_tiles, *call.window,
        inputs.softmax_scale, inputs.softcap,
    )  # fmt: skip
    return Launch(attention_decode, (batch * nheads_k * row_tiles * splits,), arguments, options)


def combine_launch(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """The launch that combines the splits."""
    batch, seqlen_q, nheads, v_head_dim = out.shape
    options = {
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_SPLITS": _COMBINE_SPLITS,
        "BLOCK_DV": tiles.padded(v_head_dim),
        "num_warps": 2,
    }
    arguments = (parts, part_lse, out, lse, parts.stride(0), part_lse.stride(0), nheads, seqlen_q, parts.shape[0])
    return Launch(attention_decode_combine, (batch * nheads * seqlen_q,), arguments, options)
