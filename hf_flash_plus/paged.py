"""Paged KV caches (``block_table``), read by gathering the pages into a contiguous cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import _require, _require_values, describe, readable


def validate_pages(name: str, cache: Tensor, block_table: Tensor) -> None:
    """Check a paged cache ``(num_blocks, page_size, nheads_k, headdim)`` and its table ``(batch, max_blocks)``."""
    _require(
        cache.dim() == 4,
        f"with a block_table, {name} must be (num_blocks, page_block_size, nheads_k, headdim), got {describe(cache)}.",
    )
    _require(
        isinstance(block_table, Tensor) and block_table.dim() == 2 and block_table.dtype == torch.int32,
        "block_table must be torch.int32 of shape (batch, max_num_blocks_per_seq), "
        f"got {describe(block_table) if isinstance(block_table, Tensor) else type(block_table).__name__}.",
    )
    _require(
        block_table.device == cache.device, f"block_table is on {block_table.device}, but {name} is on {cache.device}."
    )


def require_pages(block_table: Tensor, lengths: Tensor, cache: Tensor) -> None:
    """Check that the pages which ``lengths`` keys ``(batch,)`` of each row take are pages of ``cache``; on the CPU."""
    if readable(block_table) and readable(lengths):
        columns = torch.arange(block_table.shape[1]) * cache.shape[1] < lengths[:, None]
        _require_values("block_table", block_table[columns], 0, cache.shape[0] - 1, "pages of the cache")


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """The pages of each sequence in order: ``(batch, max_blocks * page_size, nheads_k, headdim)``, a copy.

    Entries of ``block_table`` beyond a sequence's length may hold anything: they are clamped to valid pages, and the
    caller's mask hides what they bring.
    """
    pages = block_table.long().clamp(0, max(cache.shape[0] - 1, 0))
    batch, blocks = pages.shape
    if cache.shape[0] == 0:  # no row can have a key in it
        return cache.new_zeros(batch, blocks * cache.shape[1], *cache.shape[2:])
    return cache[pages].reshape(batch, blocks * cache.shape[1], *cache.shape[2:])
