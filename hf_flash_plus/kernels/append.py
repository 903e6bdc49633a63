"""One token per request into the pages of a cache, and what each request's row sees then, in one launch.

Continuous batching asks for this in every layer; the torch operations it replaces are thirty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: A window that hides nothing; far from overflow.
NO_WINDOW = 2**30


@triton.jit(do_not_specialize=("table_stride", "nheads_k", "page_size", "window"))
def append_tokens(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    cu_ptr,
    intervals_ptr,
    k_stride_token,
    k_stride_h,
    v_stride_token,
    v_stride_h,
    k_cache_stride_page,
    k_cache_stride_slot,
    k_cache_stride_h,
    v_cache_stride_page,
    v_cache_stride_slot,
    v_cache_stride_h,
    table_stride,
    nheads_k,
    page_size,
    window,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One request: its new key and value go to its last slot; a request without keys (one that only fills up a CUDA
    graph) has no pages and writes nothing."""
    request = tl.program_id(0).to(tl.int64)
    total = (tl.load(cu_ptr + request + 1) - tl.load(cu_ptr + request)).to(tl.int32)
    tl.store(intervals_ptr + 2 * request, tl.maximum(total - window, 0))
    tl.store(intervals_ptr + 2 * request + 1, total)
    if total > 0:
        place = total - 1
        page = tl.load(table_ptr + request * table_stride + place // page_size).to(tl.int64)
        slot = place % page_size
        heads, dims = tl.arange(0, BLOCK_H).to(tl.int64), tl.arange(0, BLOCK_D)
        for first in range(0, nheads_k, BLOCK_H):
            head = first + heads
            k_ok = (head < nheads_k)[:, None] & (dims < HEAD_DIM)[None, :]
            v_ok = (head < nheads_k)[:, None] & (dims < V_HEAD_DIM)[None, :]
            k_from = k_ptr + request * k_stride_token + head[:, None] * k_stride_h + dims[None, :]
            v_from = v_ptr + request * v_stride_token + head[:, None] * v_stride_h + dims[None, :]
            k_to = k_cache_ptr + page * k_cache_stride_page + slot * k_cache_stride_slot
            v_to = v_cache_ptr + page * v_cache_stride_page + slot * v_cache_stride_slot
            k, v = tl.load(k_from, mask=k_ok), tl.load(v_from, mask=v_ok)
            tl.store(k_to + head[:, None] * k_cache_stride_h + dims[None, :], k, mask=k_ok)
            tl.store(v_to + head[:, None] * v_cache_stride_h + dims[None, :], v, mask=v_ok)


def append(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, cu_seqlens_k: Tensor, window: int
) -> Tensor:
    """Write one token per request, in place.

    Args:
        key, value: ``(requests, nheads_k, head_dim)``, the last dimension contiguous.
        k_cache, v_cache: ``(pages, page_size, nheads_k, head_dim)``, the last dimension contiguous.
        table: int32 ``(requests, pages of a request)``, rows contiguous; entries that no key lies in may hold anything.
        cu_seqlens_k: integer ``(requests + 1 or more,)``: its differences are the numbers of keys, the new one
            included; 0 for a request that is none.
        window: how many keys a row may see, its own included.

    Returns:
        The row intervals, int32 ``(requests, 1, 2)``.
    """
    requests, nheads_k, head_dim = key.shape
    intervals = torch.empty((requests, 1, 2), dtype=torch.int32, device=key.device)
    block_d = triton.next_power_of_2(max(head_dim, value.shape[2]))
    block_h = min(triton.next_power_of_2(nheads_k), max(1, 2048 // block_d))
    append_tokens[(requests,)](
        key, value, k_cache, v_cache, table, cu_seqlens_k, intervals,
        *key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], table.stride(0),
        nheads_k, k_cache.shape[1], window,
        HEAD_DIM=head_dim, V_HEAD_DIM=value.shape[2], BLOCK_D=block_d, BLOCK_H=block_h,
    )  # fmt: skip
    return intervals
