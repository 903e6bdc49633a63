"""The mask language: which keys each query row may see.

Almost every attention mask is, per query row, one contiguous interval of keys. :class:`AttentionMask` says so
with flags (``causal``, ``window``) where plain flags suffice, with ``row_intervals`` otherwise, and keeps what an
interval cannot say (holes in the key padding, arbitrary masks, position biases) in ``key_mask`` and ``bias``.
A key is visible to a row when *all* the parts that are present agree.

The published idea nearest to row intervals is FlashMask's column intervals (https://arxiv.org/abs/2410.01359).

Everything here runs on the device of its inputs without waiting for it (no host synchronisation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

#: An interval end that means "to the last key": consumers clamp ends to the number of keys.
TO_LAST_KEY = 2**31 - 1


class PackedSequences(NamedTuple):
    """Row intervals told a second way, for providers that take cumulative lengths (flash-attn's varlen functions).

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are int32 ``(nseqs + 1,)``; ``max_seqlen_q`` and ``max_seqlen_k`` bound the
    lengths; ``causal`` and ``window`` apply within each sequence, aligned to its bottom right.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    window: tuple[int, int]


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """What the rows of one attention call may see; the default sees everything.

    Attributes:
        causal: row i sees keys ``j <= i + seqlen_k - seqlen_q`` (bottom-right aligned, as flash-attn >= 2.1).
        window: ``(left, right)``: row i sees keys within ``left`` before and ``right`` after its diagonal
            ``i + seqlen_k - seqlen_q``, both inclusive; -1 is unlimited (flash-attn's ``window_size``).
        row_intervals: int32 ``(batch or 1, seqlen_q, 2)``: row i sees keys ``start <= j < end``. Ends beyond
            ``seqlen_k`` and starts below 0 are clamped; an empty interval (end <= start) sees nothing.
        key_mask: bool ``(batch or 1, seqlen_k)``: False hides the key from every row (holes in the padding).
        key_holes: int32 ``(batch or 1,)`` beside ``key_mask``: 0 where ``key_mask`` hides no key that the row
            intervals show, so that kernels may skip reading it; None where that is not known.
        bias: ``(batch or 1, nheads or 1, seqlen_q or 1, seqlen_k)``: bool (False hides) or floating (added to the
            scaled scores; -inf hides).
        row_positions: int32 ``(batch or 1, seqlen_q)``: the key index on each row's diagonal, from which ALiBi
            distances are counted; None means ``i + seqlen_k - seqlen_q``.
        packed: the same mask as ``row_intervals``, as cumulative lengths; only beside ``row_intervals``.
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    row_intervals: Tensor | None = None
    key_mask: Tensor | None = None
    key_holes: Tensor | None = None
    bias: Tensor | None = None
    row_positions: Tensor | None = None
    packed: PackedSequences | None = None

    @property
    def windowed(self) -> bool:
        return self.window[0] >= 0 or self.window[1] >= 0

    @property
    def kind(self) -> str:
        """A short name for logs: ``"causal+window+intervals"``, ``"full"``, ..."""
        parts = [
            ("causal", self.causal),
            ("window", self.windowed),
            ("packed", self.packed is not None),
            ("intervals", self.row_intervals is not None and self.packed is None),
            ("key_mask", self.key_mask is not None),
            ("bias", self.bias is not None),
        ]
        return "+".join(name for name, present in parts if present) or "full"


FULL = AttentionMask()
CAUSAL = AttentionMask(causal=True)

_OWN = "_hf_flash_plus_own"


def own(mask: AttentionMask) -> AttentionMask:
    """Say of a mask that its tensors are this package's, whom nobody else writes to; returns it."""
    object.__setattr__(mask, _OWN, True)
    return mask


def is_own(mask: AttentionMask) -> bool:
    """Whether that was said."""
    return _OWN in mask.__dict__


def visible(mask: AttentionMask, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor | None:
    """The mask as booleans ``(batch or 1, nheads or 1, seqlen_q, seqlen_k)``, True where a row sees a key.

    None stands for all True. A floating ``bias`` is not included (see :func:`additive`).
    """
    parts: list[Tensor] = []
    left, right = mask.window
    if mask.causal:
        right = 0
    if left >= 0 or right >= 0 or mask.row_intervals is not None:
        keys = torch.arange(seqlen_k, device=device)[None, :]
        if left >= 0 or right >= 0:
            diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
            if right >= 0:
                parts.append((keys <= diagonal + right)[None, None])
            if left >= 0:
                parts.append((keys >= diagonal - left)[None, None])
        if mask.row_intervals is not None:
            start, end = mask.row_intervals[:, None, :, None, 0], mask.row_intervals[:, None, :, None, 1]
            parts.append((keys >= start) & (keys < end))
    if mask.key_mask is not None:
        parts.append(mask.key_mask[:, None, None, :])
    if mask.bias is not None and mask.bias.dtype == torch.bool:
        parts.append(mask.bias)
    if not parts:
        return None
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out.expand(-1, -1, seqlen_q, -1)


def additive(mask: AttentionMask) -> Tensor | None:
    """The floating part of the mask, to be added to the scaled scores; None where there is none."""
    return mask.bias if mask.bias is not None and mask.bias.dtype != torch.bool else None


def window_intervals(
    mask: AttentionMask, diagonal: Tensor, key_start: Tensor | int = 0, key_end: Tensor | int = TO_LAST_KEY
) -> Tensor:
    """Row intervals of a causal and/or windowed mask about a given diagonal.

    Args:
        mask: supplies ``causal`` and ``window``; its other parts are ignored.
        diagonal: integer ``(batch or 1, seqlen_q)``: the key index on each row's diagonal.
        key_start, key_end: bounds of the keys any row may see, broadcastable to ``diagonal``.

    Returns:
        int32 ``(batch or 1, seqlen_q, 2)``.
    """
    start = torch.as_tensor(key_start, device=diagonal.device).expand_as(diagonal)
    end = torch.as_tensor(key_end, device=diagonal.device).expand_as(diagonal)
    left, right = mask.window
    if mask.causal:
        right = 0
    if left >= 0:
        start = torch.maximum(start, diagonal - left)
    if right >= 0:
        end = torch.minimum(end, diagonal + (right + 1))
    return torch.stack((start, end), dim=-1).to(torch.int32)


def with_intervals(mask: AttentionMask, seqlen_q: int, seqlen_k: int, device: torch.device) -> AttentionMask:
    """The same mask with ``causal`` and ``window`` turned into (or intersected with) row intervals."""
    if not (mask.causal or mask.windowed):
        return mask
    diagonal = torch.arange(seqlen_q, device=device)[None] + (seqlen_k - seqlen_q)
    intervals = window_intervals(mask, diagonal)
    if mask.row_intervals is not None:
        intervals = intersect_intervals(mask.row_intervals, intervals)
    return replace(mask, causal=False, window=(-1, -1), row_intervals=intervals, packed=None)


def intersect_intervals(a: Tensor, b: Tensor) -> Tensor:
    """The common part of two sets of row intervals, ``(batch or 1, seqlen_q, 2)`` each."""
    return torch.stack((torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])), dim=-1)


def varlen_mask(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    *,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    seqused_k: Tensor | None = None,
) -> AttentionMask:
    """Packed sequences ("varlen") as row intervals over one flattened row of batch 1.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 ``(nseqs + 1,)``: where each sequence begins, and the total.
        total_q: number of query rows; rows at or beyond ``cu_seqlens_q[-1]`` see nothing.
        causal, window: as in flash-attn, aligned to the bottom right of each sequence's own rectangle.
        seqused_k: int32 ``(nseqs,)``: keys in use of each sequence, where fewer than its slots.

    Returns:
        A mask with ``row_intervals`` and ``row_positions`` of batch 1; computed on the device, no sync.
    """
    device = cu_seqlens_q.device
    rows = torch.arange(total_q, device=device)
    starts_q, starts_k = cu_seqlens_q[:-1].long(), cu_seqlens_k[:-1].long()
    nseqs = starts_q.shape[0]
    if nseqs == 0:
        empty = torch.zeros(1, total_q, 2, dtype=torch.int32, device=device)
        return AttentionMask(row_intervals=empty, row_positions=empty[..., 0])
    # A row belongs to the last sequence that starts at or before it; empty sequences are stepped over by right=True.
    owner = torch.bucketize(rows, cu_seqlens_q[1:].long(), right=True)
    beyond = owner >= nseqs
    owner = owner.clamp(max=nseqs - 1)
    lengths_q = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).long()
    lengths_k = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).long() if seqused_k is None else seqused_k.long()
    first_key = starts_k[owner]
    end_key = torch.where(beyond, first_key, first_key + lengths_k[owner])
    diagonal = first_key + (rows - starts_q[owner]) + (lengths_k - lengths_q)[owner]
    intervals = window_intervals(
        AttentionMask(causal=causal, window=window), diagonal[None], first_key[None], end_key[None]
    )
    return AttentionMask(row_intervals=intervals, row_positions=diagonal[None].to(torch.int32))


def document_intervals(position_ids: Tensor) -> Tensor:
    """Row intervals of the documents packed in each row, found where ``position_ids`` do not go up by one.

    Args:
        position_ids: integer ``(batch or 1, seqlen)``.

    Returns:
        int32 ``(batch or 1, seqlen, 2)``: first key of the row's document, and one past its last.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.stack(run_bounds(begins), dim=-1).to(torch.int32)


def run_bounds(begins: Tensor) -> tuple[Tensor, Tensor]:
    """The run each element stands in.

    Args:
        begins: bool ``(batch, length)``, True where a run begins; True in column 0.

    Returns:
        ``(first, end)``, int64 ``(batch, length)``: index of the run's first element, and one past its last.
    """
    length = begins.shape[-1]
    index = torch.arange(length, device=begins.device).expand_as(begins)
    first = torch.where(begins, index, 0).cummax(dim=-1).values
    # A run ends where the next one begins: the nearest beginning to the right.
    following = torch.full_like(index, length)
    following[:, :-1] = torch.where(begins[:, 1:], index[:, 1:], length)
    end = following.flip(-1).cummin(dim=-1).values.flip(-1)
    return first, end


def key_mask_intervals(key_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys a padding mask leaves, as one span per batch element and whether it has holes.

    Args:
        key_mask: bool ``(batch, seqlen_k)``, True for real keys.

    Returns:
        ``(start, end, holes)``, int32 ``(batch,)`` each: the span from the first to one past the last real key
        (0, 0 where there is none), and 1 where the span has padding inside, else 0.
    """
    seqlen_k = key_mask.shape[-1]
    if seqlen_k == 0:
        nothing = key_mask.new_zeros(key_mask.shape[0], dtype=torch.int32)
        return nothing, nothing, nothing
    index = torch.arange(seqlen_k, device=key_mask.device)
    start = torch.where(key_mask, index, seqlen_k).amin(dim=-1)
    end = torch.where(key_mask, index + 1, 0).amax(dim=-1)
    count = key_mask.sum(dim=-1)
    start = torch.minimum(start, end)
    return start.to(torch.int32), end.to(torch.int32), (end - start != count).to(torch.int32)
