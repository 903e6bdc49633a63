"""Which shapes of tile the forward kernel uses, by head dimension and length, with the measured reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: How the keys of a row are found.
#: FULL: all of them, and they fill their blocks.
#: TAIL: all of them, the last block is not full (a mode of its own: FULL has no registers to spare for masking).
#: CAUSAL: up to the diagonal, where that begins at a multiple of the block and no row is empty.
#: WINDOW: between two diagonals; also causal calls whose diagonal lies anywhere.
#: INTERVALS: from a tensor.
FULL, TAIL, CAUSAL, WINDOW, INTERVALS = range(5)

#: Numbers in the description of a tile of row intervals (see ``schedule``), and how many tiles are described at a time.
CARD, RING = 16, 8

#: Numbers of an entry in the list of tiles of row intervals (see ``intervals.list_tiles``), and of the list's head: 128
#: bytes, of which some are not used.
LISTED = 32

#: Causal calls of up to this many keys spend so much of their time between tiles that other tiles and buffers pay.
SHORT_CAUSAL = 1024

#: Head dimension 64, tiles of two and of three warpgroups: rows, and what a tile takes for each block of 128 keys and
#: for its ends. Fitted to twelve causal calls of 1152 to 4096 tokens on one H200, whose ratios it meets within 1.6
#: percent: three warpgroups take 12 percent longer at 1375 tokens, and 7 percent less at 3072.
TILE_COSTS = {2: (128, 1.0, 0.5), 3: (192, 1.29, 1.29)}


@dataclass(frozen=True)
class Config:
    """Everything that the forward kernel is compiled for, beside the dtype. Passed as one constexpr: no properties
    here, since Triton's cache does not see their code.

    Attributes:
        consumers: warpgroups that compute, 64 query rows each.
        block_n: keys of a tile.
        chunks, chunk_dim: the head dimension of q and k, cut into chunks that are powers of 2.
        v_dim: the head dimension of v, a power of 2.
        q_buffers, k_stages, v_stages: tiles of each in shared memory. With one Q buffer a tile is finished before the
            next begins, with more the two overlap. ``v_stages <= k_stages``, but with ``free_k_first``.
        early_free: K is freed as soon as it was used, and the next is waited for last.
        free_k_first: K is freed as soon as its scores are there; else together with V of the block before.
        out_step: O lies in Q's memory; the distance of two warpgroups' O in units of O.
        turns: two warpgroups start their matrix products in turn.
        listed: for INTERVALS: only tiles that see something are numbered (they are listed by a launch of its own). Else
            all tiles are numbered, as in other modes, and those that see nothing left out.
        copied: with ``listed``: each tile is published as soon as the first K of the one before is under way, and rows'
            bounds come with Q, into shared memory.
        parts: for FULL: what does not fill a wave of programs is cut along the keys, so that each gets as many blocks;
            who has a tile's first keys adds up what the others leave in global memory.
        halves: for WINDOW, where ``regular_window``: blocks lie so that of each warpgroup's keys only the first and the
            last block are masked, and one of these is computed half.
        mode: FULL, TAIL, CAUSAL, WINDOW or INTERVALS.
        softcap, sinks: the call has them.
        consumer_registers, other_registers: per thread of the warps that compute and of the others.
    """

    consumers: int
    block_n: int
    chunks: int
    chunk_dim: int
    v_dim: int
    q_buffers: int
    k_stages: int
    v_stages: int
    early_free: bool
    free_k_first: bool
    out_step: int
    turns: bool
    listed: bool
    copied: bool
    parts: bool
    halves: bool
    mode: int
    softcap: bool
    sinks: bool
    consumer_registers: int
    other_registers: int


def head_dim_class(head_dim: int, v_head_dim: int) -> tuple[int, int] | None:
    """The (q and k, v) head dimensions of the kernel that serves these, padded with zeros as they are loaded."""
    both = max(head_dim, v_head_dim)
    for limit in (64, 128):
        if both <= limit:
            return limit, limit
    if 128 < head_dim <= 192 and v_head_dim <= 128:
        return 192, 128
    return (256, 256) if both <= 256 else None


#: Warpgroups of ``Config.halves`` by head dimensions; others do without.
HALVES = {(64, 64): 3, (128, 128): 2}


def regular_window(dims: tuple[int, int], left: int, right: int, offset: int) -> bool:
    """Whether a window can be served by ``Config.halves``: causal, of a width that is a multiple of 128 (or one more),
    every row sees its diagonal, and the first key lies so that the blocks before it can be left out."""
    if dims not in HALVES or right != 0 or left < 127 or (left + 1) % 128 > 1 or offset < 0:
        return False
    span = (left + 1) // 128 * 128
    phases = offset % 128 <= 64 if HALVES[dims] == 2 else offset % 64 == 0
    return phases or offset >= span


def _cost(consumers: int, seqlen_q: int, seqlen_k: int, causal: bool) -> float:
    """What a head takes in tiles of so many warpgroups, by ``TILE_COSTS``."""
    rows, block, ends = TILE_COSTS[consumers]
    starts = range(0, seqlen_q, rows)
    seen = (min(start + rows + seqlen_k - seqlen_q, seqlen_k) if causal else seqlen_k for start in starts)
    return sum(-(-keys // 128) for keys in seen) * block + len(starts) * ends


def is_short(dims: tuple[int, int], mode: int, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether a call without a window and row intervals is ``short`` to :func:`select`. Tiles of 192 rows may hold many
    rows that are not there, and keys that most rows do not see: 256 rows take as many of them as tiles of 128."""
    if mode not in (FULL, TAIL, CAUSAL):
        return False
    if mode == CAUSAL and seqlen_k <= SHORT_CAUSAL:
        return True
    if dims != (64, 64) or seqlen_q > 4096:
        return False
    two, three = (_cost(consumers, seqlen_q, seqlen_k, mode == CAUSAL) for consumers in (2, 3))
    return two * 1.01 < three


def select(
    dims: tuple[int, int],
    mode: int,
    short: bool,
    softcap: bool,
    sinks: bool,
    halves: bool = False,
    parts: bool = False,
) -> Config:
    """The configuration for a class of head dimensions; ``short``: as :func:`is_short`, never with a window or row
    intervals; ``halves``: the window is a ``regular_window``; ``parts``: as ``Config.parts``."""
    # The roles beside the consumers do more where tiles are described in shared memory and V is cleaned.
    described = mode in (WINDOW, INTERVALS)
    shape: dict[str, Any]
    two: dict[str, Any] = {
        "consumers": 2, "early_free": False, "free_k_first": False, "out_step": 1,
        "turns": False, "consumer_registers": 232, "other_registers": 40,
    }  # fmt: skip
    if dims == (64, 64):
        # Three warpgroups: 541 TFLOP/s against 449 with two (one H200, B4 S4096 H32, full).
        shape = {
            "consumers": 3, "block_n": 128, "chunks": 1, "chunk_dim": 64, "q_buffers": 2, "k_stages": 4, "v_stages": 4,
            "early_free": False, "free_k_first": False, "out_step": 1, "turns": False,
            "consumer_registers": 160, "other_registers": 32,
        }  # fmt: skip
        fewer = {"consumers": 2, "consumer_registers": 232, "other_registers": 40}
        if described and not (halves and HALVES[dims] == 3):
            # Three warpgroups lose where keys hide within blocks, and not by their spills alone: 8 documents in 16k
            # tokens 223 against 372 with two, and 376 with three Q buffers; padded B8 S2048 216, 297 and 301, windows
            # 313, 360 and 360 (one H100).
            shape |= fewer | {"q_buffers": 3}
        elif short:
            # Tiles of 192 rows do not fit lengths, and see more hidden keys (one H100, B32 S512: 250 against 211).
            shape |= fewer | {"q_buffers": 3}
    elif dims == (128, 128):
        # V comes a slot earlier than with three K and two V: one H100, B32 S512 full 542 against 495, B4 S4096 causal
        # 630 against 614.
        shape = two | {
            "block_n": 128, "chunks": 1, "chunk_dim": 128, "q_buffers": 2, "k_stages": 2, "v_stages": 3,
            "free_k_first": True,
            "turns": mode != WINDOW,  # 0 to 2 %, row intervals 0.4 to 2.9; costs 1 % at head dimension 64
        }  # fmt: skip
        if short:  # 304 against 294 at B32 S512; longer ones lose up to 3 %
            shape |= {"q_buffers": 3, "v_stages": 2, "free_k_first": False, "early_free": True}
    elif dims == (192, 128):
        # 192 is no power of 2: three chunks of 64. Shared memory has room for one Q.
        shape = two | {
            "block_n": 128, "chunks": 3, "chunk_dim": 64, "q_buffers": 1, "k_stages": 2, "v_stages": 2,
            "out_step": 2,
        }  # fmt: skip
    else:
        # O alone takes 128 registers a thread: 64 keys a tile.
        shape = two | {
            "block_n": 64, "chunks": 1, "chunk_dim": 256, "q_buffers": 1, "k_stages": 3, "v_stages": 2,
        }  # fmt: skip
    # One H200, us without / with the list, neither with the summary: padded B8 S2048 219 / 217, S4096 635 / 630, 16 odd
    # documents 173 / 153, packed 362 / 360 at head dimension 64. At 128 the list with early claims lost 3 to 8 percent;
    # with late ones it gains 1 to 4, odd documents 15 (hopper.md, seventh round).
    copied = mode == INTERVALS and dims == (64, 64)
    listed = copied or (mode == INTERVALS and dims == (128, 128))
    return Config(
        v_dim=dims[1], mode=mode, softcap=softcap, sinks=sinks, listed=listed, copied=copied, halves=halves,
        parts=parts, **shape
    )  # fmt: skip
