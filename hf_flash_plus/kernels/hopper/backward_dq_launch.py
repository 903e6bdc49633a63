"""From the parts of a backward call to a launch of the Hopper kernel for dq (``backward_dq``)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...inputs import AttentionInputs
from . import backward_config, forward_launch
from .backward_config import DqConfig
from .config import CAUSAL, FULL, INTERVALS, TAIL, WINDOW
from .forward_launch import L2_BUDGET, SummaryLaunch
from .launching import Launch, Plan, descriptor

if TYPE_CHECKING:
    from .backward_launch import Buffers, Parts

LOG2E = 1.4426950408889634


class _DqPlan(Plan):
    """What calls of one structure share; also how tiles of 64 rows and of keys are described."""

    def __init__(self, config: DqConfig, dtype: torch.dtype) -> None:
        from triton.experimental.gluon import language as gl

        from .backward_dq import attention_backward_dq

        self.blocks = [1, 64, 1, config.v_dim], [1, config.block_n, 1, config.v_dim]
        self.layout = gl.NVMMASharedLayout(128, 16, rank=4)
        piece: Any = gl.NVMMASharedLayout(128, 16, rank=2)
        super().__init__(attention_backward_dq, {"C": config, "PIECE": piece, **forward_launch.OPTIONS})


_plan = cache(_DqPlan)


def _mode(parts: Parts) -> int:
    bounds, (_, _, _, rows, keys) = parts.bounds, parts.sizes
    if parts.intervals is not None:
        return INTERVALS
    if not (bounds.has_left or bounds.has_right):
        return FULL if keys % 128 == 0 else TAIL
    # The diagonal runs through the corners of blocks, and no row reaches beyond the last key.
    corners = bounds.right >= 0 and bounds.right % 128 == 0 and rows + bounds.right <= keys
    return CAUSAL if corners and not bounds.has_left else WINDOW


def prepare(
    inputs: AttentionInputs, parts: Parts, buffers: Buffers, dq: Tensor, config: DqConfig | None = None
) -> tuple[SummaryLaunch | None, Launch]:
    """The launches that compute dq, which begins at the first row that takes part, from the numbers of rows."""
    batch, nheads, nheads_k, rows, keys = parts.sizes
    bounds, q = parts.bounds, parts.q
    mode = _mode(parts)
    if config is None:
        config = backward_config.select_dq(parts.block_d, mode, parts.softcap > 0.0, q.shape[3], parts.config)
    plan = _plan(config, q.dtype)
    summary = summary_bounds = tiles = None
    if mode == INTERVALS:
        window = forward_launch._window(inputs, rows, keys)
        summary = SummaryLaunch(inputs, window, 64 * config.consumers, config.block_n, True)
        summary_bounds, tiles = summary.bounds, summary.summary
    n_heads = batch * nheads
    # Heads in flight together: those of the key heads whose keys and values fit the cache.
    per_head = keys * (q.shape[3] + parts.v.shape[3]) * q.itemsize
    section = min(max(1, L2_BUDGET // per_head) * (nheads // nheads_k), n_heads)
    factor, cap_factor = parts.scale * LOG2E, 0.0
    if parts.softcap:
        factor, cap_factor = parts.softcap * LOG2E, 2.0 * LOG2E * parts.scale / parts.softcap
    row_block, key_block = plan.blocks
    arguments = (
        descriptor(q, row_block, plan.layout), descriptor(parts.k, key_block, plan.layout),
        descriptor(parts.v, key_block, plan.layout), descriptor(parts.dout, row_block, plan.layout), dq,
        forward_launch._counter(q.device), summary_bounds, tiles, buffers.start, buffers.minus_delta,
        dq.stride(0) // (nheads * q.shape[3]), rows, keys, bounds.right if mode == CAUSAL else 0, nheads,
        nheads // nheads_k, n_heads, section, -bounds.left, bounds.right,
        0 if parts.intervals is None or parts.intervals.shape[0] == 1 else 1, factor, cap_factor, parts.scale,
    )  # fmt: skip
    n_tiles = n_heads * -(-rows // (64 * config.consumers))
    n_programs = min(forward_launch._n_programs(q.device.index), n_tiles)
    return summary, Launch(plan, n_programs, arguments, (q.device.index,))
