"""How the Hopper backward kernel is configured: tiles, pipeline and registers by head dimension and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import config


class Config(NamedTuple):
    """Compile-time choices.

    Attributes:
        block_m: query rows of a step.
        stages: tiles of q and dout in flight.
        halves: the loop is that of ``backward_halves``, which knows no bound at the left, and under row intervals takes
            the tiles that mask first.
        units: key heads of a program at most, one after the other (with ``halves``).
        rotate: programs start at different query tiles, so that their additions to dq do not collide (no mask).
        other_registers: a thread's in the warps that load and store; those that compute get the rest.
        keys: of a tile. Widths beyond 128 have a kernel of their own, ``backward_wide``, which reads this, and what
            follows; ``stages`` are those of q there.
        dout_stages: those of dout.
        dp_early: the product for dp is started before the weights are made: 0 never, 1 where nothing masks, 2 always.
        dv_late: the product for dv is waited for when those that follow have been started (with 64 keys only: with 128
            ptxas serialises).
        narrow_first: with 128 keys, which of the two products for dk is started before the next scores.
        parts: dv has a kernel of its own, dk and dq another (``backward_parts``, of which ``keys`` and ``stages`` are
            those of the one for dk).
        dv_stages: those of q and of dout in the kernel for dv.
    """

    block_m: int
    stages: int = 2
    halves: bool = False
    units: int = 1
    rotate: bool = True
    other_registers: int = 24
    keys: int = 128
    dout_stages: int = 2
    dp_early: int = 1
    dv_late: bool = False
    narrow_first: bool = False
    parts: bool = False
    dv_stages: tuple[int, int] = (2, 2)


#: ``backward_wide`` by the width of q and k: 128 keys where those have 192 columns and v 128; 64 where all have 256.
#: On an H200 7 and 4 times as fast as the portable kernels (hopper.md).
WIDE = {
    192: Config(64, 2, keys=128, dout_stages=2, dp_early=0),
    256: Config(64, 2, keys=64, dout_stages=1, dp_early=1, dv_late=True),
}
#: 256 columns without row intervals.
PARTS = Config(64, 1, keys=128, dout_stages=1, parts=True)


#: Key heads of a program one after the other, at most, at 64 columns.
UNITS = 4


def widths(head_dim: int, v_head_dim: int) -> tuple[int, int]:
    """The head dimensions of q and k, and of v, that the kernels compute with: descriptors fill what is missing with
    zeros."""
    widest = max(head_dim, v_head_dim)
    if widest <= 128:
        return (64, 64) if widest <= 64 else (128, 128)
    return (192, 128) if head_dim <= 192 and v_head_dim <= 128 else (256, 256)


def mask_of(listed: bool, has_left: bool, has_right: bool) -> int:
    """Which steps of a program mask: 0 none, 1 the first ones, 2 any (``backward_common.MASK_ANY``), by whether there
    are row intervals and by the flags' bounds."""
    return 2 if listed or has_left else int(has_right)


def select(dim: int, with_dq: bool, mask: int, listed: bool, keys: int) -> Config:
    """The configuration for q's and k's width, with or without dq (whose buffers take a third stage's memory).

    ``mask``: which steps of a program mask, see :func:`mask_of`; ``listed``: by row intervals; ``keys``: how many.
    """
    if dim > 128:
        # Two kernels repeat what a program begins and ends with: at 512 keys a causal call loses 4 percent by them.
        return PARTS if dim == 256 and not listed and (mask == 0 or keys >= 1024) else WIDE[dim]
    if dim == 64:
        halves = mask < 2 or listed
        return Config(128, halves=halves, units=UNITS if halves else 1)
    return Config(64, stages=2 if with_dq else 3)


@dataclass(frozen=True)
class DqConfig:
    """Everything that the kernel for dq is compiled for, beside the dtype; names as in ``config.Config``, whose reader
    ``schedule`` also reads this. Passed as one constexpr: no properties here.

    Attributes:
        v_dim: the padded head dimension, of all tensors.
        head_dim: that of dq.
        base2: whether the rows' numbers are -lse in base 2, see :func:`base2`.
        halves, parts: as in ``config.Config``; never here.
    """

    mode: int
    softcap: bool
    v_dim: int
    head_dim: int
    block_n: int
    k_stages: int
    v_stages: int
    consumer_registers: int
    other_registers: int
    consumers: int = 2
    base2: bool = False
    halves: bool = False
    parts: bool = False


def base2(config: Config, softcap: bool) -> bool:
    """Whether the rows' numbers are -lse in base 2, to be added to scaled scores; else -lse / scale."""
    return softcap or config.halves


def select_dq(dim: int, mode: int, softcap: bool, head_dim: int, main: Config) -> DqConfig:
    """The configuration for a padded head dimension; ``mode`` as in ``config``, ``main`` that of the kernel for dk."""
    block_n, k_stages, v_stages = (128, 3, 2) if dim == 128 else (128, 4, 4)
    if dim == 128 and softcap:  # whose derivative takes registers of its own: 1200 bytes would be spilled with 128 keys
        block_n, k_stages, v_stages = 64, 5, 4
    described = mode in (config.WINDOW, config.INTERVALS)  # the loading warps do more
    registers = (232, 40) if described else (240, 24)
    base_2 = base2(main, softcap)
    return DqConfig(mode, softcap, dim, head_dim, block_n, k_stages, v_stages, *registers, base2=base_2)
