"""The mask of a decoding step with padding, in one launch: the torch operations it replaces are fifty, once a token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
WORD = tl.constexpr(16)


class Padding(NamedTuple):
    """``carrier`` int32 ``(batch, 1, 1, 3 + words)``: start, end, holes, and the key mask, 16 keys a word, as
    ``integration/carrier.py`` describes it; ``holes`` int32 ``(batch,)`` once more by itself."""

    carrier: Tensor
    holes: Tensor


@triton.jit(do_not_specialize=("mask_stride_b", "length", "offset", "seqlen_k", "row_start", "columns"))
def padding_carrier(
    mask_ptr,
    carrier_ptr,
    holes_ptr,
    mask_stride_b,
    length,
    offset,
    seqlen_k,
    row_start,
    columns,
    BLOCK: tl.constexpr,
):
    """One batch element: the span of real keys in ``[row_start, seqlen_k)``, whether it has holes, and all the bits.

    Key j of the call is column ``offset + j`` of the mask; columns it does not have (``length`` and on) are padding.
    """
    batch = tl.program_id(0).to(tl.int64)
    mask_ptr += batch * mask_stride_b + offset
    carrier_ptr += batch * columns
    words = tl.arange(0, BLOCK // WORD)
    bits = tl.arange(0, WORD)
    first, last, count = seqlen_k + 0, 0, 0
    for base in range(0, seqlen_k, BLOCK):
        keys = base + words[:, None] * WORD + bits[None, :]
        inside = (keys < seqlen_k) & (keys + offset < length)
        real = tl.load(mask_ptr + keys, mask=inside, other=0).to(tl.int32)
        real = tl.where(real != 0, 1, 0)
        word_at = base // WORD + words
        tl.store(carrier_ptr + 3 + word_at, tl.sum(real << bits[None, :], axis=1), mask=word_at < columns - 3)
        seen = tl.where(keys >= row_start, real, 0)
        first = tl.minimum(first, tl.min(tl.min(tl.where(seen != 0, keys, seqlen_k), axis=1), axis=0))
        last = tl.maximum(last, tl.max(tl.max(tl.where(seen != 0, keys + 1, 0), axis=1), axis=0))
        count += tl.sum(tl.sum(seen, axis=1), axis=0)
    first = tl.minimum(first, last)
    holes = tl.where(last - first == count, 0, 1)
    tl.store(carrier_ptr, first)
    tl.store(carrier_ptr + 1, last)
    tl.store(carrier_ptr + 2, holes)
    tl.store(holes_ptr + batch, holes)


def padding(attention_mask: Tensor, seqlen_k: int, offset: int, row_start: int) -> Padding:
    """The mask of one query row over keys ``[row_start, seqlen_k)`` of which ``attention_mask`` leaves some.

    Args:
        attention_mask: bool ``(batch, length)`` on a GPU, True for real keys, by absolute index.
        seqlen_k: number of keys of the call; offset: absolute index of its first.
        row_start: first key that the row may see.
    """
    batch, length = attention_mask.shape
    columns = 3 + -(-seqlen_k // WORD.value)
    device = attention_mask.device
    carrier = torch.empty((batch, 1, 1, columns), dtype=torch.int32, device=device)
    holes = torch.empty(batch, dtype=torch.int32, device=device)
    if attention_mask.stride(1) != 1:
        attention_mask = attention_mask.contiguous()
    padding_carrier[(batch,)](
        attention_mask, carrier, holes, attention_mask.stride(0), length, offset, seqlen_k, row_start, columns, _BLOCK
    )
    return Padding(carrier, holes)
