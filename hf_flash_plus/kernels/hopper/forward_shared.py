"""What the warps of the forward kernel share: buffers, barriers, and the cards that tell them their tiles."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .schedule import RING, take_card

#: The copies through tensor descriptors, under the names that Triton 3.6 and later versions give them.
tma_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
tma_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


class Shared(NamedTuple):
    """Shared memory: buffers and barriers. A barrier's phase is told from how often its buffer was used before."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    out: gl.tensor
    tiles: gl.tensor  # cards
    bounds: gl.tensor  # by Q's buffer and warpgroup, rows' first keys, then their ends; with ``copied``
    tile_full: gl.tensor  # by card; they are not waited for to be empty (see schedule.RING)
    q_empty: gl.tensor
    q_full: gl.tensor
    out_full: gl.tensor
    k_full: gl.tensor
    v_full: gl.tensor
    v_raw: gl.tensor  # a V that has to be cleaned has arrived
    k_done: gl.tensor  # no warpgroup needs K(i) any more
    slot_done: gl.tensor  # nor V(i-1); the same barriers as k_done unless K is freed first


@gluon.jit
def wait_use(barriers, n, STAGES: gl.constexpr):
    """Wait for use ``n`` of a ring of barriers."""
    mbarrier.wait(barriers.index(n % STAGES), (n // STAGES) & 1)


@gluon.constexpr_function
def slots(C):
    """The length of the ring ``slot_done``."""
    return C.v_stages if C.free_k_first else C.k_stages


@gluon.jit
def wait_tile(sm, t, W: gl.constexpr, C: gl.constexpr):
    """Wait for the Q of the program's t-th tile for warpgroup W, and with it for the card."""
    mbarrier.wait(sm.q_full.index((t % C.q_buffers) * C.consumers + W), (t // C.q_buffers) & 1)


@gluon.jit
def card(sm, t, W: gl.constexpr, WARPS: gl.constexpr, C: gl.constexpr):
    """The program's t-th tile, which is published."""
    return take_card(sm.tiles, t % RING, W, WARPS, C)


@gluon.jit
def await_card(sm, t, C: gl.constexpr):
    """The program's t-th tile once it is published, for one of the warps that load and store."""
    wait_use(sm.tile_full, t, RING)
    return card(sm, t, 0, 1, C)
