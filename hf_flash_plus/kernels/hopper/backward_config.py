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
        rotate: programs start at different query tiles, so that their additions to dq do not collide (no mask).
        other_registers: a thread's in the warps that load and store; those that compute get the rest.
        turned: the kernel of ``backward_turned``, for which ``stages`` are those of q.
        dout_stages: those of dout, for the turned kernel.
        dk_shared: its product for dk takes ds from shared memory, not from registers.
        dp_early: its product for dp is started before the weights are made: 0 never, 1 where nothing masks, 2 always.
        dv_late: its product for dv is waited for when those that follow have been started.
    """

    block_m: int
    stages: int = 2
    rotate: bool = True
    other_registers: int = 24
    turned: bool = False
    dout_stages: int = 2
    dk_shared: bool = True
    dp_early: int = 1
    dv_late: bool = False


def block_d(head_dim: int, v_head_dim: int) -> int:
    """The head dimension that the kernel computes with: descriptors fill what is missing with zeros."""
    return 64 if max(head_dim, v_head_dim) <= 64 else 128


def select(dim: int, with_dq: bool) -> Config:
    """The configuration for a padded head dimension, with or without dq (whose buffers take a third stage's memory)."""
    if dim == 64:
        return Config(128)
    return Config(64, stages=2 if with_dq else 3)


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
