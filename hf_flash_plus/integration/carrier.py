"""How an :class:`AttentionMask` travels through a Transformers model: as one int32 tensor of four dimensions.

Transformers hands whatever the mask function returned from the model to each layer's attention call. Only a 4-D tensor
passes unchanged everywhere (2-D ones are cast to bool, objects crash in several models), so the mask is encoded in an
int32 tensor ``(batch or 1, 1, seqlen_q, columns)``::

    column 0, 1      row interval [start, end)
    column 2         1 where the batch element's key padding has holes, else 0      (only with a key mask)
    column 3 ...     the key mask, 16 keys a word, row after row                    (only with a key mask)

The tensor alone says everything, so it survives ``.to()``, indexing of the batch, graph breaks and compilation. In
eager mode the mask itself also rides along as an attribute of the tensor object, which saves decoding it in every layer
and keeps flags (plain causal, full, window) that are faster than intervals; where the attribute is lost, the data
serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interval_cache import capturing, share
from ..masks import AttentionMask, intersect_intervals, own, window_intervals, with_intervals
from ..providers.base import DecodingTicket

ATTRIBUTE = "_hf_flash_plus_mask"
#: The dtype of dense masks that are made inside of a graph for all keys of a row: other than a mask of the user's own,
#: which is bool (and refused in bytes), they do not tell packed documents apart yet (``packing.dense_documents``).
IN_GRAPH = torch.int8
_WORD = 16


@dataclass(frozen=True, eq=False)
class Carried:
    """What a carrier holds.

    Attributes:
        mask: the decoded mask.
        one_document: the mask takes each row for one document (it is causal, perhaps windowed or chunked, over the
            keys of an empty cache); packed documents may still have to be told apart (see ``packing.py``).
        repack: makes the same mask for packed ``position_ids``; None where only an intersection is left to do.
        row_ends: ``(batch,)``: rows from here on are padding that sees nothing; None where there are none such.
        n_rows: the sum of ``row_ends``, where it is known on the host.
        tickets: of decoding steps with this mask (see ``decoding.py``).
        documents: tensors that tell packed documents apart, their versions, and this mask with them (``packing.py``).
    """

    mask: AttentionMask
    one_document: bool = False
    repack: Callable[[Tensor], AttentionMask] | None = None
    row_ends: Tensor | None = None
    n_rows: int | None = None
    tickets: dict[tuple[object, ...], DecodingTicket] = field(default_factory=dict)
    documents: list[tuple[tuple[Tensor, ...], tuple[int | None, ...], AttentionMask]] = field(default_factory=list)


def _columns(seqlen_q: int, seqlen_k: int) -> int:
    """Words of key mask in each row, so that all rows together hold every key."""
    words = -(-seqlen_k // _WORD)
    return -(-words // max(seqlen_q, 1))


def fits(seqlen_q: int, seqlen_k: int, has_key_mask: bool) -> bool:
    """Whether a carrier is narrower than a dense mask: models may slice masks ``[..., :seqlen_k]`` on the way."""
    return seqlen_k >= (3 + _columns(seqlen_q, seqlen_k) if has_key_mask else 2)


def encode(intervals: Tensor, key_mask: Tensor | None, key_holes: Tensor | None, carried: Carried) -> Tensor:
    """The carrier of a mask.

    Args:
        intervals: int32 ``(batch or 1, seqlen_q, 2)``: the whole mask but for the key mask.
        key_mask: bool ``(batch, seqlen_k)`` or None; key_holes: int32 ``(batch,)`` beside it.
        carried: what to hand over directly while the tensor object survives.

    Returns:
        int32 ``(batch or 1, 1, seqlen_q, columns)``.
    """
    if key_mask is None:
        carrier = intervals[:, None]
    else:
        assert key_holes is not None
        batch, seqlen_k = key_mask.shape
        seqlen_q = intervals.shape[1]
        columns = _columns(seqlen_q, seqlen_k)
        bits = F.pad(key_mask.to(torch.int32), (0, seqlen_q * columns * _WORD - seqlen_k))
        weights = 2 ** torch.arange(_WORD, dtype=torch.int32, device=key_mask.device)
        words = (bits.view(batch, seqlen_q, columns, _WORD) * weights).sum(-1, dtype=torch.int32)
        holes = key_holes[:, None, None].expand(batch, seqlen_q, 1)
        carrier = torch.cat((intervals.expand(batch, -1, -1), holes, words), dim=-1)[:, None]
    return carrier if torch.compiler.is_compiling() else attach(carrier, carried)


def attach(carrier: Tensor, carried: Carried) -> Tensor:
    """The carrier itself, with what it holds riding along."""
    own(carried.mask)
    if carried.mask.row_intervals is not None:
        share(carried.mask.row_intervals)
    setattr(carrier, ATTRIBUTE, (carried, version(carrier)))
    return carrier


def version(tensor: Tensor) -> int | None:
    """Counts the in-place changes of a tensor; None where torch does not (``torch.inference_mode``)."""
    return None if tensor.is_inference() else tensor._version


def is_carrier(attention_mask: Tensor) -> bool:
    """Whether a mask that reached an attention call is one of ours (no other kind is 4-D int32)."""
    return attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def attached(carrier: Tensor, seqlen_q: int) -> Carried | None:
    """What rides along with the tensor object; None where it was lost (a copy, a slice).

    Raises:
        ValueError: the tensor was changed since.
    """
    found = getattr(carrier, ATTRIBUTE, None)
    if found is None or carrier.shape[2] != seqlen_q:
        return None
    carried: Carried = found[0]
    if version(carrier) != found[1]:
        raise ValueError(
            "the attention mask made for attn_implementation='flash_plus' was changed in place by the model; "
            "use attn_implementation='sdpa' or 'eager' for it and report the model."
        )
    return carried


def decode(carrier: Tensor, seqlen_q: int, seqlen_k: int) -> Carried:
    """The mask a carrier holds, for an attention call of these lengths.

    Raises:
        ValueError: the model changed the tensor's shape or content on the way, so it no longer describes the call.
    """
    if not torch.compiler.is_compiling():
        carried = attached(carrier, seqlen_q)
        if carried is not None:
            return carried
    # One row stands for all, as a dense mask of one row does (models that make a mask from a single embedding).
    n_rows, columns = carrier.shape[2], carrier.shape[-1]
    expected = 3 + _columns(n_rows, seqlen_k)
    # (No `in`: torch.compile does not trace it with symbolic lengths.)
    describes = (n_rows == 1 or n_rows == seqlen_q) and (columns == 2 or columns == expected)
    if carrier.shape[1] != 1 or not describes or _is_foreign(carrier):
        raise ValueError(
            f"an int32 attention mask of shape {tuple(carrier.shape)} came for {seqlen_q} queries and {seqlen_k} keys. "
            "A mask of your own has to be boolean (True is visible) or floating (added to the scores). If none is your "
            "own, the model has reshaped the one made for attn_implementation='flash_plus': use "
            "attn_implementation='sdpa' or 'eager' for it and report the model."
        )
    rows = carrier[:, 0]
    intervals = rows[..., :2].expand(-1, seqlen_q, -1)
    if columns == 2:
        return Carried(AttentionMask(row_intervals=intervals), one_document=n_rows == seqlen_q == seqlen_k > 1)
    shifts = torch.arange(_WORD, dtype=torch.int32, device=carrier.device)
    bits = (rows[..., 3:, None] >> shifts) & 1
    key_mask = bits.flatten(1)[:, :seqlen_k].bool()
    mask = AttentionMask(row_intervals=intervals, key_mask=key_mask, key_holes=rows[:, 0, 2].contiguous())
    return Carried(mask)


def _is_foreign(carrier: Tensor) -> bool:
    """Whether an int32 mask that nothing rides along with is somebody's zeros and ones: where there are several keys, a
    carrier has rows that see more than the first. (Not asked of carriers that cannot be mistaken, nor in compiled
    code.)"""
    if torch.compiler.is_compiling() or carrier.shape[-1] == 2 or type(carrier) is not Tensor or carrier.is_meta:
        return False
    if capturing(carrier):  # into a CUDA graph: nothing can be looked at
        return False
    return bool(((carrier == 0) | (carrier == 1)).all())


def restricted(
    carried: Carried, original: Tensor, seqlen_q: int, seqlen_k: int, causal: bool, window: int | None
) -> Tensor:
    """A carrier narrowed to a causal and/or local pattern that the model keeps outside its mask (Bark, GPT-Neo).

    Args:
        carried: what ``original`` holds.
        causal: rows see no key after their diagonal ``i + seqlen_k - seqlen_q``.
        window: rows see at most this many keys, the last they may see included; None is unlimited.
    """
    if not causal and not window:
        return original
    mask = carried.mask
    flags_only = mask.row_intervals is None and mask.key_mask is None
    if flags_only and not window and mask.causal:
        return original
    device = original.device
    mask = with_intervals(mask, seqlen_q, seqlen_k, device)
    intervals = mask.row_intervals
    if intervals is None:
        intervals = torch.tensor([[[0, seqlen_k]]], dtype=torch.int32, device=device).expand(1, seqlen_q, 2)
    if causal and not carried.mask.causal:
        # The diagonal of rows whose interval already ends there is the interval's end; others get the bottom right.
        diagonal = torch.arange(seqlen_q, device=device)[None] + (seqlen_k - seqlen_q)
        ends = torch.minimum(intervals[..., 1].long(), diagonal + 1)
        intervals = torch.stack((intervals[..., 0].long(), ends), dim=-1).to(torch.int32)
    if window:
        diagonal = intervals[..., 1].long() - 1
        local = window_intervals(AttentionMask(causal=True, window=(window - 1, -1)), diagonal)
        intervals = intersect_intervals(intervals, local)
    mask = replace(mask, row_intervals=intervals)
    return encode(intervals, mask.key_mask, mask.key_holes, Carried(mask))
