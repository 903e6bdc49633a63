"""How the Hopper backward kernel is configured: tiles, pipeline and registers by head dimension and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import config


class Config(NamedTuple):
    """Compile-time choices; see ``backward._step`` for what ``ds_shared`` and ``early`` mean.

    Attributes:
        block_m: query rows of a step.
        stages: tiles of q and dout in flight.
        skip: leave out the half tile above the diagonal (causal masks, 64 rows a step).
        rotate: programs start at different query tiles, so that their additions to dq do not collide (no mask).
        any_mask: one loop with a branch around the mask also for causal masks, instead of two loops.
        consumer_registers, producer_registers: a thread's; twice the first and once the second are at most 512.
    """

    block_m: int
    stages: int = 2
    ds_shared: bool = True
    early: int = 1
    skip: bool = True
    rotate: bool = True
    any_mask: bool = False
    consumer_registers: int = 240
    producer_registers: int = 24


def block_d(head_dim: int, v_head_dim: int) -> int:
    """The head dimension that the kernel computes with: descriptors fill what is missing with zeros."""
    return 64 if max(head_dim, v_head_dim) <= 64 else 128


# The order of waits (`early`) was measured on an H200: at 128 columns 1 is the fastest with a causal mask and 2
# without, at 64 columns 0. Beside a mask with a branch, 2 leaves too few registers at 128 columns. Without dq, ds from
# registers does not fit at 64 columns.
def select(dim: int, masked: bool, with_dq: bool) -> Config:
    """The configuration for a padded head dimension, with or without any mask, with or without dq."""
    if dim == 64:
        return Config(128, ds_shared=not with_dq, early=0)
    return Config(64, early=1 if masked else 2)


@dataclass(frozen=True)
class DqConfig:
    """Everything that the kernel for dq is compiled for, beside the dtype; names as in ``config.Config``, whose reader
    ``schedule`` also reads this. Passed as one constexpr: no properties here.

    Attributes:
        v_dim: the padded head dimension, of all tensors.
        head_dim: that of dq.
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


def select_dq(dim: int, mode: int, softcap: bool, head_dim: int) -> DqConfig:
    """The configuration for a padded head dimension; ``mode`` as in ``config``."""
    block_n, k_stages, v_stages = (128, 3, 2) if dim == 128 else (128, 4, 4)
    if dim == 128 and softcap:  # whose derivative takes registers of its own: 1200 bytes would be spilled with 128 keys
        block_n, k_stages, v_stages = 64, 5, 4
    described = mode in (config.WINDOW, config.INTERVALS)  # the loading warps do more
    registers = (232, 40) if described else (240, 24)
    return DqConfig(mode, softcap, dim, head_dim, block_n, k_stages, v_stages, *registers)
