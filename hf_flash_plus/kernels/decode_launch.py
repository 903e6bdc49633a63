"""Launching the decoding kernels: which calls they serve, how many splits, which tiles."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import SHORT_QUERY, AttentionInputs
from . import tiles
from .decode import attention_decode, attention_decode_combine
from .launch import (
    _NO_STRIDES,
    Call,
    Launch,
    Plan,
    Structure,
    _cdiv,
    _reusable,
    _strides,
    be_careful,
    prepare,
    raw_stream,
)
from .machine_code import MiscompiledError, doubtful
from .primitives import BIAS_BOOL

MAX_SPLITS = 128
_WARPS = 4
#: Shared memory of a multiprocessor that the loads of its programs may fill.
_SHARED = {"sm80": 160 * 1024, "sm86": 96 * 1024, "sm90": 224 * 1024, "sm100": 224 * 1024}


def serves(inputs: AttentionInputs) -> bool:
    """Whether a call is decoding: at most 16 query rows, no dropout."""
    return inputs.seqlen_q <= SHORT_QUERY and inputs.dropout_p == 0.0


def _row_bytes(s: Structure) -> int:
    return tiles.padded(max(s.head_dim, s.v_head_dim)) * s.dtype.itemsize


class Way(NamedTuple):
    """How a class of calls is computed.

    Attributes:
        tile: rows and keys of a tile, warps, stages.
        prefetch: keys of a split that are asked for before anything else (one row, on NVIDIA); 0 or a power of two.
        least_keys: keys that a split has at least.
        per_core: programs that splitting aims at, for each multiprocessor.
    """

    tile: tiles.Tile
    prefetch: int
    least_keys: int
    per_core: int = 1


#: Calls that are told apart by what was measured: keys in one piece that all rows see, a padding mask (rows of several
#: lengths, which more and shorter splits balance), and pages.
WHOLE, PADDED, PAGED = 0, 1, 2
#: What was measured to be best on sm90 for a few rows, by bytes of a head's row (128, 256), number of programs without
#: splits (see :func:`programs_class`), of keys (:func:`keys_class`), and kind (where one is missing, that of WHOLE
#: serves): keys of a tile, warps, stages, keys to prefetch, keys of a split at least, programs for each multiprocessor.
#: ``python -m hf_flash_plus.kernels.tune_decode`` measures them (these: one H200, Triton 3.6, 2026-11-28; whole keys of
#: the classes (256, 2, 1 to 3) and (128, 3, 2), and most of those of pages, by calls in a row, a day later); a class
#: that is not here is computed by the rule in :func:`_way`.
_SM90_WAYS: dict[tuple[int, int, int, int], tuple[int, int, int, int, int, int]] = {
    (128, 0, 0, 0): (64, 4, 3, 128, 64, 1),
    (128, 0, 0, 2): (64, 4, 3, 0, 64, 1),
    (128, 0, 1, 0): (128, 4, 3, 0, 128, 1),
    (128, 0, 1, 2): (64, 4, 3, 0, 64, 1),
    (128, 0, 2, 0): (128, 4, 3, 0, 128, 1),
    (128, 0, 2, 2): (64, 4, 3, 0, 256, 2),
    (128, 0, 3, 0): (64, 4, 4, 0, 1024, 2),
    (128, 0, 3, 2): (128, 4, 3, 0, 1024, 2),
    (128, 1, 0, 0): (64, 4, 3, 0, 64, 2),
    (128, 1, 1, 0): (64, 4, 3, 0, 64, 2),
    (128, 1, 1, 1): (64, 4, 3, 0, 64, 2),
    (128, 1, 1, 2): (64, 4, 3, 0, 64, 2),
    (128, 1, 2, 0): (64, 4, 4, 0, 64, 2),
    (128, 1, 2, 1): (64, 4, 3, 0, 64, 4),
    (128, 1, 2, 2): (64, 4, 3, 0, 64, 2),
    (128, 1, 3, 0): (64, 4, 4, 0, 64, 2),
    (128, 2, 0, 0): (128, 4, 3, 128, 128, 1),
    (128, 2, 1, 0): (128, 4, 3, 0, 128, 1),
    (128, 2, 1, 1): (64, 4, 3, 0, 64, 4),
    (128, 2, 1, 2): (128, 4, 3, 0, 128, 1),
    (128, 2, 2, 0): (128, 4, 3, 0, 128, 1),
    (128, 2, 2, 1): (64, 4, 3, 0, 64, 8),
    (128, 2, 2, 2): (64, 4, 3, 0, 64, 4),
    (128, 2, 3, 0): (64, 4, 4, 0, 64, 2),
    (128, 2, 3, 2): (64, 4, 3, 0, 64, 4),
    (128, 3, 0, 0): (64, 4, 3, 0, 64, 1),
    (128, 3, 1, 0): (64, 4, 3, 0, 64, 1),
    (128, 3, 2, 0): (64, 4, 3, 0, 64, 1),
    (128, 3, 2, 1): (64, 4, 4, 0, 64, 1),
    (128, 3, 2, 2): (64, 4, 4, 0, 64, 1),
    (128, 3, 3, 0): (64, 4, 3, 0, 64, 1),
    (256, 0, 0, 0): (64, 4, 3, 0, 64, 1),
    (256, 0, 0, 2): (64, 4, 2, 0, 64, 1),
    (256, 0, 1, 0): (64, 4, 3, 0, 256, 1),
    (256, 0, 1, 2): (64, 4, 3, 0, 64, 1),
    (256, 0, 2, 0): (64, 4, 3, 0, 64, 1),
    (256, 0, 2, 2): (32, 4, 4, 0, 256, 2),
    (256, 0, 3, 0): (64, 4, 3, 0, 1024, 2),
    (256, 0, 3, 2): (32, 4, 4, 0, 1024, 2),
    (256, 1, 0, 0): (64, 4, 3, 0, 64, 1),
    (256, 1, 1, 0): (64, 4, 3, 0, 64, 1),
    (256, 1, 1, 1): (64, 4, 3, 0, 64, 2),
    (256, 1, 1, 2): (32, 4, 4, 0, 64, 2),
    (256, 1, 2, 0): (64, 4, 3, 0, 64, 2),
    (256, 1, 2, 1): (64, 4, 3, 0, 64, 2),
    (256, 1, 2, 2): (32, 4, 4, 0, 64, 2),
    (256, 1, 3, 0): (64, 4, 3, 0, 64, 2),
    (256, 2, 0, 0): (64, 4, 3, 0, 64, 1),
    (256, 2, 1, 0): (128, 4, 3, 0, 128, 1),
    (256, 2, 1, 1): (64, 4, 3, 0, 64, 2),
    (256, 2, 1, 2): (128, 4, 3, 0, 128, 1),
    (256, 2, 2, 0): (128, 4, 3, 0, 128, 1),
    (256, 2, 2, 1): (64, 4, 3, 0, 64, 4),
    (256, 2, 2, 2): (128, 4, 3, 0, 128, 1),
    (256, 2, 3, 0): (64, 4, 4, 0, 64, 1),
    (256, 2, 3, 1): (64, 4, 3, 0, 64, 2),
    (256, 2, 3, 2): (128, 4, 3, 0, 128, 1),
    (256, 3, 0, 0): (32, 4, 4, 0, 32, 1),
    (256, 3, 1, 0): (64, 4, 4, 0, 64, 1),
    (256, 3, 2, 0): (128, 4, 3, 0, 128, 1),
    (256, 3, 3, 0): (128, 8, 2, 0, 128, 8),
}


def keys_class(seqlen_k: int) -> int:
    """0 for less than 1024 keys, 1 for less than 4096, 2 for less than 16384, 3 for more."""
    return 0 if seqlen_k < 1024 else 1 if seqlen_k < 4096 else 2 if seqlen_k < 16384 else 3


def programs_class(programs: int, cores: int) -> int:
    """By how many splits there are multiprocessors for: 0 for eight and more, 1 for two and more, 2 for one, 3 where
    there are more programs than multiprocessors."""
    return 0 if 8 * programs <= cores else 1 if 2 * programs <= cores else 2 if programs <= cores else 3


@cache
def _way(s: Structure, block_m: int, programs: int, keys: int, kind: int) -> Way:
    """The way of a call with that many (key head, tile of rows) pairs, that class of keys, and of a kind.

    The rule is 16 KiB of keys in three stages. Timed on an H100 in CUDA graphs, 32 query and 8 key heads, 1 to 64 rows
    over 512 to 32768 keys. A multiprocessor is busy with one program of such tiles, and 64 programs get all that the
    memory gives. Four stages are 2 percent slower at head dim 128 (and 8 warps, and tiles of 32 or 128 keys), but 6
    percent faster than three for the tiles of head dim 64 where there is a program for each multiprocessor; beyond
    that, 128 keys in two stages leave room for three.
    """
    row_bytes, cores = _row_bytes(s), s.device.n_cores
    if s.device.arch == "interpreter":
        return _plain_way(tiles.Tile(block_m, 32, _WARPS, 1))  # small tiles, so that small tests have several
    shared = _SHARED.get(s.device.arch)
    if shared is None:  # AMD's compiler pipelines in registers
        return _plain_way(tiles.Tile(block_m, max(16, min(64, 16384 // row_bytes)), _WARPS, 1))
    if s.device.arch == "sm90" and block_m == 16 and s.dtype.itemsize == 2:
        group = (row_bytes, programs_class(programs, cores), keys)
        found = _SM90_WAYS.get((*group, kind)) or _SM90_WAYS.get((*group, WHOLE))
        if found is not None:
            block_n, warps, stages, *splitting = found
            return Way(tiles.Tile(block_m, block_n, warps, stages), *splitting)
    block_n, stages = max(16, min(64, 16384 // row_bytes)), 3
    if row_bytes <= 128 and block_m == 16:
        block_n, stages = (128, 3) if 2 * programs <= cores else (64, 4) if programs <= cores else (128, 2)
    stages = min(stages, max(1, shared // (2 * block_n * row_bytes) - 1))
    return _plain_way(tiles.Tile(block_m, block_n, _WARPS, stages))


def _plain_way(tile: tiles.Tile) -> Way:
    return Way(tile, 0, tile.block_n)


@cache
def _decode_plan(s: Structure, way: Way, page_size: int, one_row: bool, one_tile: bool) -> Plan:
    tile = way.tile
    # Where the kernel looks pages up itself (LOOK_AHEAD), they need no stages.
    hidden = s.has_key_mask or s.bias == BIAS_BOOL.value
    looks_ahead = one_row and not hidden and page_size > 0 and 0 in (page_size % tile.block_n, tile.block_n % page_size)
    stages = 2 * tile.num_stages - 1 if page_size and not looks_ahead else tile.num_stages
    options = {
        "HEAD_DIM": s.head_dim,
        "V_HEAD_DIM": s.v_head_dim,
        "PAGE_SIZE": page_size,
        "HAS_LEFT": s.has_left,
        "HAS_RIGHT": s.has_right,
        "HAS_INTERVALS": s.has_intervals,
        "HAS_KEY_MASK": s.has_key_mask,
        "HAS_KEY_HOLES": s.has_key_holes,
        "BIAS": s.bias,
        "HAS_ALIBI": s.has_alibi,
        "HAS_POSITIONS": s.has_positions,
        "HAS_SINKS": s.sinks,
        "HAS_SOFTCAP": s.softcap,
        "INPUT_PRECISION": s.device.fp32_precision if s.dtype == torch.float32 else "ieee",
        "EARLY": _starts_early(s),
        "ONE_ROW": one_row,
        "ONE_TILE": one_tile,
        "PREFETCH": way.prefetch if one_row and s.device.arch.startswith("sm") else 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tiles.padded(s.head_dim),
        "BLOCK_DV": tiles.padded(s.v_head_dim),
        "num_warps": tile.num_warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    return Plan(attention_decode, tile, options, _reusable(s, attention_decode), doubtful(s.device.arch))


def _row_block(pairs: int) -> int:
    """Rows of a tile: a power of two from 16 (the least of a matrix product) to 64."""
    return min(64, max(16, 1 << (pairs - 1).bit_length()))


def _starts_early(s: Structure) -> bool:
    """Whether the launch that combines may start while splits are still computed (programmatic dependent launch)."""
    return s.device.arch in ("sm90", "sm100")


@cache
def n_splits(programs: int, seqlen_k: int, least_keys: int, cores: int) -> int:
    """Into how many parts the keys are split: as many as there are multiprocessors for, a program each (``cores`` times
    what the :class:`Way` says), with so many keys at least. Beyond that the parts only cost."""
    return max(1, min(cores // max(programs, 1), seqlen_k // least_keys, MAX_SPLITS))


class Workspace(NamedTuple):
    """Room for the splits' results, and the counters of finished splits, which every launch leaves at zero; None where
    a second launch combines them."""

    parts: Tensor
    counters: Tensor | None


_workspaces: dict[tuple[int | None, int], Workspace] = {}


def stream_workspace(device: torch.device, n_floats: int, n_counters: int) -> Workspace:
    """The workspace of a device and its current stream: launches in one stream follow one another and can share it.

    Not inside CUDA graphs, whose replays may run on any stream, nor where their memory is in use (while torch warms
    compiled code up for them).
    """
    key = (device.index, raw_stream(device.index) if device.type == "cuda" else 0)
    found = _workspaces.get(key)
    if found is None or found.parts.numel() < n_floats or _n_counters(found) < n_counters:
        if len(_workspaces) > 64:  # streams come and go
            _workspaces.clear()
        parts = torch.empty(max(n_floats, 2**20), dtype=torch.float32, device=device)
        counters = torch.zeros(max(n_counters, 4096), dtype=torch.int32, device=device)
        found = _workspaces[key] = Workspace(parts, counters)
    return found


def _n_counters(space: Workspace) -> int:
    return 0 if space.counters is None else space.counters.numel()


def forward(inputs: AttentionInputs, block_table: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``out`` (batch, seqlen_q, nheads, v_head_dim) and, where ``inputs.needs_lse``, ``lse`` (batch, nheads, seqlen_q)
    of one decoding call.

    Args:
        inputs: the call, with at most 16 query rows and no dropout. With ``block_table`` its keys and values are
            pages ``(num_blocks, page_size, nheads_k, dim)``, and its mask has row intervals.
        block_table: int32 ``(batch, pages of a row)``.
    """
    q, key = inputs.query, inputs.key
    device = q.device
    call = prepare(inputs)
    batch, seqlen_q, nheads, _ = q.shape
    out = torch.empty((batch, seqlen_q, nheads, inputs.v_head_dim), dtype=q.dtype, device=device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=device) if inputs.needs_lse else None
    if batch * seqlen_q * nheads == 0:
        return out, lse
    page_size = 0 if block_table is None else key.shape[1]
    seqlen_k = key.shape[1] if block_table is None else block_table.shape[1] * page_size
    nheads_k = key.shape[2]
    group = nheads // nheads_k
    recipe = find_recipe(call.structure, group, seqlen_q, batch * nheads_k, page_size, keys_class(seqlen_k))
    programs = batch * nheads_k * recipe.row_tiles
    splits = n_splits(programs, seqlen_k, recipe.least_keys, recipe.cores)
    space = None
    if splits > 1:
        # Nothing that outlives the call: it may be part of a CUDA graph, or of compiled code that is to become one.
        space = Workspace(torch.empty(programs * splits * recipe.floats, dtype=torch.float32, device=device), None)
    try:
        decode_launch(call, recipe, out, lse, seqlen_k, splits, space, block_table).run()
    except MiscompiledError as fault:
        be_careful(call.structure, fault)
        return forward(inputs, block_table)
    if space is not None:
        combine_launch(call.structure, recipe, out, lse, nheads_k, splits, space).run()
    return out, lse


class Recipe(NamedTuple):
    """What all calls of one structure, number of rows and class of keys share.

    ``cores`` is the number of programs that splitting aims at, ``least_keys`` that of a split's keys; ``floats`` is
    what one split of one tile of rows needs of the workspace.
    """

    plan: Plan
    row_tiles: int
    cores: int
    floats: int
    least_keys: int


@cache
def find_recipe(s: Structure, group: int, seqlen_q: int, key_heads: int, page_size: int, keys: int) -> Recipe:
    """The recipe for ``group`` query heads per key head, ``seqlen_q`` rows, ``key_heads`` over the batch, and a class
    of keys."""
    pairs = group * seqlen_q
    block_m = min(_row_block(pairs), 32 if s.careful else 64)
    row_tiles = _cdiv(pairs, block_m)
    kind = PAGED if page_size else PADDED if s.has_key_mask else WHOLE
    return make_recipe(s, _way(s, block_m, key_heads * row_tiles, keys, kind), pairs, page_size, seqlen_q == 1)


def make_recipe(s: Structure, way: Way, pairs: int, page_size: int, one_row: bool) -> Recipe:
    """The recipe of a way, for ``pairs`` (query head, row) pairs per key head."""
    block_m = way.tile.block_m
    row_tiles = _cdiv(pairs, block_m)
    plan = _decode_plan(s, way, page_size, one_row, row_tiles == 1)
    floats = block_m * (tiles.padded(s.v_head_dim) + 1)
    return Recipe(plan, row_tiles, s.device.n_cores * way.per_core, floats, way.least_keys)


def decode_launch(
    call: Call,
    recipe: Recipe,
    out: Tensor,
    lse: Tensor | None,
    seqlen_k: int,
    splits: int,
    space: Workspace | None,
    block_table: Tensor | None,
) -> Launch:
    """The launch; ``space`` is None for a single split."""
    inputs = call.inputs
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, seqlen_q, nheads, _ = q.shape
    nheads_k = k.shape[2]
    if sinks is None:
        sinks_strides: tuple[int | None, ...] = _NO_STRIDES[:3]
    else:
        sinks_strides = (0, *_strides(sinks), 0) if sinks.dim() == 1 else _strides(sinks)
    return _launch(
        recipe,
        batch * nheads_k * recipe.row_tiles,
        splits,
        (q, k, v, out, lse, *call.pointers, sinks, block_table),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *call.strides,
            *sinks_strides,
            None if block_table is None else block_table.stride(0),
        ),
        (nheads_k, nheads // nheads_k, seqlen_q, seqlen_k, splits, recipe.row_tiles, *call.window),
        (float(inputs.softmax_scale), float(inputs.softcap)),
        (*call.dtypes, None if sinks is None else sinks.dtype),
        space,
    )


def _launch(
    recipe: Recipe,
    programs: int,
    splits: int,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int | None, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, ...],
    dtypes: tuple[torch.dtype | None, ...],
    space: Workspace | None,
) -> Launch:
    if space is None:
        work: tuple[Tensor | None, ...] = (None, None, None)
    else:
        # The log-sum-exps lie behind the outputs, at a multiple of 16 floats: both pointers are aligned.
        work = (space.parts, space.parts[_n_outputs(recipe, programs, splits) :], space.counters)
    arguments = (*tensors, *work, *strides, *sizes, *numbers)
    kind = (tensors[4] is None, work[0] is None, work[2] is None)
    key = (tensors[0].device.index, *strides, *dtypes, *kind)  # type: ignore[union-attr]
    return Launch(recipe.plan, programs * splits, arguments, len(tensors) + 3, key)


def _n_outputs(recipe: Recipe, programs: int, splits: int) -> int:
    """Floats of all splits' outputs in the workspace."""
    return programs * splits * (recipe.floats - recipe.plan.tile.block_m)


@cache
def _combine_plan(s: Structure, block_m: int, block_splits: int) -> Plan:
    """For few splits, one warp: it needs no barrier, and all that it loads is under way at once."""
    block_dv = tiles.padded(s.v_head_dim)
    tile = tiles.Tile(block_m, block_splits, max(1, min(4, block_splits * block_dv // 1024)), 1)
    options = {
        "V_HEAD_DIM": s.v_head_dim,
        "BLOCK_M": block_m,
        "BLOCK_DV": block_dv,
        "BLOCK_SPLITS": tile.block_n,
        "EARLY": _starts_early(s),
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,
    }
    if _starts_early(s):
        options["launch_pdl"] = True
    return Plan(attention_decode_combine, tile, options, _reusable(s, attention_decode_combine))


def combine_launch(
    s: Structure, recipe: Recipe, out: Tensor, lse: Tensor | None, nheads_k: int, splits: int, space: Workspace
) -> Launch:
    """The launch that combines the splits, after one of :func:`decode_launch` without counters; a program per row."""
    batch, seqlen_q, nheads, _ = out.shape
    parts = space.parts
    part_lse = parts[_n_outputs(recipe, batch * nheads_k * recipe.row_tiles, splits) :]
    sizes = (nheads_k, nheads // nheads_k, seqlen_q, splits, recipe.row_tiles)
    most = max(4, min(32, 8192 // tiles.padded(s.v_head_dim)))
    plan = _combine_plan(s, recipe.plan.tile.block_m, max(4, min(most, 1 << (splits - 1).bit_length())))
    return Launch(
        plan, batch * seqlen_q * nheads, (parts, part_lse, out, lse, *sizes), 4, (out.device.index, lse is None)
    )
