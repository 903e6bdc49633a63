"""The mask of a decoding step with padding or a static cache in one launch; it replaces fifty torch operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import addresses, start

_BLOCK = 1024
WORD = tl.constexpr(16)
#: A window that hides nothing; far from overflow when added to an index.
NO_WINDOW = 2**30


class Padding(NamedTuple):
    """``carrier`` int32 ``(batch, 1, 1, 3 + words)``: start, end, holes, and the key mask, 16 keys a word, as
    ``integration/carrier.py`` describes it; ``intervals`` ``(batch, 1, 2)``, the same memory; ``holes`` int32
    ``(batch,)`` once more by itself. Without padding the carrier is ``(1, 1, 1, 2)`` and ``holes`` None."""

    carrier: Tensor
    intervals: Tensor
    holes: Tensor | None


@triton.jit(do_not_specialize=("mask_stride_b", "length", "offset", "seqlen_k", "row", "window", "columns"))
def padding_carrier(
    mask_ptr,
    row_ptr,
    carrier_ptr,
    holes_ptr,
    mask_stride_b,
    length,
    offset,
    seqlen_k,
    row,
    window,
    columns,
    BLOCK: tl.constexpr,
):
    """One batch element: the span of real keys that the row sees, whether it has holes, and all the bits.

    The row sees the last ``window`` of the keys up to and with its own, which is key ``row`` (the value at ``row_ptr``
    counts absolutely, where that is given). Key j of the call is column ``offset + j`` of the mask; columns it does not
    have (``length`` and on) are padding.
    """
    batch = tl.program_id(0).to(tl.int64)
    carrier_ptr += batch * columns
    if row_ptr is not None:
        row = tl.load(row_ptr).to(tl.int32) - offset
    row_end = tl.minimum(row + 1, seqlen_k)
    row_start = tl.maximum(row + 1 - window, 0)
    if mask_ptr is None:
        tl.store(carrier_ptr, row_start)
        tl.store(carrier_ptr + 1, row_end)
    else:
        mask_ptr += batch * mask_stride_b + offset
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
            seen = tl.where((keys >= row_start) & (keys < row_end), real, 0)
            first = tl.minimum(first, tl.min(tl.min(tl.where(seen != 0, keys, seqlen_k), axis=1), axis=0))
            last = tl.maximum(last, tl.max(tl.max(tl.where(seen != 0, keys + 1, 0), axis=1), axis=0))
            count += tl.sum(tl.sum(seen, axis=1), axis=0)
        first = tl.minimum(first, last)
        holes = tl.where(last - first == count, 0, 1)
        tl.store(carrier_ptr, first)
        tl.store(carrier_ptr + 1, last)
        tl.store(carrier_ptr + 2, holes)
        tl.store(holes_ptr + batch, holes)


def padding(
    attention_mask: Tensor | None,
    seqlen_k: int,
    offset: int,
    row: int | Tensor,
    window: int = NO_WINDOW,
    device: torch.device | None = None,
) -> Padding:
    """The mask of one query row over keys of which ``attention_mask`` leaves some.

    Args:
        attention_mask: bool ``(batch, length)`` on a GPU, True for real keys, by absolute index; None without padding.
        seqlen_k: number of keys of the call; offset: absolute index of its first.
        row: absolute index of the key that is the row's own, the last it may see; or an integer tensor with one element
            that holds it, on the GPU.
        window: how many keys the row may see, its own included.
        device: where the mask is made; needed where neither ``attention_mask`` nor ``row`` is a tensor that says it.
    """
    at, row = (row, 0) if isinstance(row, Tensor) else (None, row - offset)
    if device is None:
        device = (attention_mask if at is None else at).device  # type: ignore[union-attr]
    if attention_mask is None:
        batch, length, columns, stride = 1, 0, 2, 0
        holes = None
    else:
        batch, length = attention_mask.shape
        columns = 3 + -(-seqlen_k // WORD.value)
        if attention_mask.stride(1) != 1:
            attention_mask = attention_mask.contiguous()
        stride = attention_mask.stride(0)
        holes = torch.empty(batch, dtype=torch.int32, device=device)
    carrier = torch.empty((batch, 1, 1, columns), dtype=torch.int32, device=device)
    sizes = (stride, length, offset, seqlen_k, row, window, columns, _BLOCK)
    _launch(batch, (attention_mask, at, carrier, holes), sizes)
    # Detached, because a view keeps its base alive: the base will hold the mask, and so the view, a circle that the
    # garbage collector does not see.
    intervals = carrier.as_strided((batch, 1, 2), (columns, columns, 1)).detach()
    return Padding(carrier, intervals, holes)


def _launch(n_programs: int, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Launch :func:`padding_carrier`, past Triton's look-up where it was compiled before."""
    at, carrier = tensors[1:3]
    assert carrier is not None
    pointers, misaligned = addresses(tensors)
    # No size is specialised by its value; what is left of Triton's choice is the width of integers and of loads, and
    # what is None.
    reusable = _REUSABLE and min(sizes) >= -(2**31) and max(sizes) < 2**31
    key = (carrier.device.index, tensors[0] is None, None if at is None else at.dtype, misaligned)
    compiled = _compiled.get(key) if reusable else None
    if compiled is not None:
        start(compiled, n_programs, key[0], (*pointers, *sizes))
        return
    compiled = padding_carrier[(n_programs,)](*tensors, *sizes)
    if reusable:
        _compiled[key] = compiled


#: By index of the device, presence of a mask, type of the row, alignment. Not for AMD, for whose compiler the size of a
#: tensor's memory matters, nor in the interpreter, which compiles nothing.
_compiled: dict[tuple[Any, ...], Any] = {}
_REUSABLE = torch.version.cuda is not None and hasattr(padding_carrier, "warmup")
