"""Packed documents in a layer's attention call: which keys belong to a row's own document.

Transformers looks for packed ``position_ids`` only without a cache object and without a padding mask; with either
(``use_cache=True`` is the default), and in models that do not hand them to the mask function (gpt_oss), its eager
attention lets the documents of a row see each other. Nobody who packs documents wants that, Transformers' own flash
path does not do it, and the output of a model must not depend on whether it also returns a cache. So the reference here
is each document alone. ``cu_seq_lens_q`` says the same in flattened batches, whatever the mask beside it says.

What is worked out is kept with the mask, which a model makes once a forward: the other layers find it, and it goes when
the mask goes. (Kept with the tensors of the batch it would grow with every step that uses them again.)
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import describe
from ..interval_cache import capturing, share
from ..masks import (
    AttentionMask,
    document_intervals,
    intersect_intervals,
    own,
    varlen_mask,
    visible,
    with_intervals,
)
from . import carrier

_INTEGERS = (torch.int32, torch.int64)


def documents(
    carried: carrier.Carried, query: Tensor, key: Tensor, kwargs: dict[str, Any], chunk: int | None = None
) -> AttentionMask:
    """The mask of a carrier, with the packed documents kept apart that ``cu_seq_lens_q`` or (where the mask takes each
    row for one document) ``position_ids`` tell.

    Args:
        carried: what the carrier holds.
        query, key: ``(batch, nheads, seqlen, head_dim)``.
        kwargs: of the attention call.
        chunk: keys of a chunk, which the mask counts from the row's beginning, and documents from their own.

    Raises:
        ValueError: ``cu_seq_lens_q/k`` that do not describe the call.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        return by_lengths(carried.mask, query, key, kwargs, carried, chunk)
    mask, position_ids = carried.mask, kwargs.get("position_ids")
    # In a graph nobody can say that a mask beside the tokens is one of ones.
    beside_mask = mask.key_mask is not None and torch.compiler.is_compiling() and query.shape[2] == key.shape[2]
    if not (carried.one_document or beside_mask):
        return mask
    if not isinstance(position_ids, Tensor) or not _of_rows(position_ids, query):
        return mask
    if carried.repack is None or not _readable(position_ids):
        # Nobody looks at values: the intervals are kept, which say nothing new for a single document.
        return _apart(mask, position_ids, query, key, chunk)
    found = _remembered(carried, (position_ids,))
    if found is not None:
        return found
    if not _restarts(position_ids):
        made = mask
    else:
        made = own(carried.repack(position_ids))
        if made.row_intervals is not None:
            share(made.row_intervals)
    carried.documents.append(((position_ids,), (carrier.version(position_ids),), made))
    return made


def _apart(mask: AttentionMask, position_ids: Tensor, query: Tensor, key: Tensor, chunk: int | None) -> AttentionMask:
    """The mask with documents kept apart, where values cannot be looked at: if every row sees itself and no later key.
    Then the mask is causal, and nothing is padding, beside which positions restart for other reasons."""
    seqlen, device = query.shape[2], query.device
    mask = with_intervals(mask, seqlen, key.shape[2], device)
    assert mask.row_intervals is not None
    whole = document_intervals(position_ids).to(device)
    complete = (mask.row_intervals[..., 1] == torch.arange(1, seqlen + 1, device=device)).all()
    if mask.key_mask is not None:
        complete = complete & mask.key_mask.all()
    apart = intersect_intervals(mask.row_intervals, whole) if chunk is None else _chunks(whole, chunk)
    return replace(mask, row_intervals=torch.where(complete, apart, mask.row_intervals))


def _chunks(whole: Tensor, chunk: int) -> Tensor:
    """Row intervals of causal chunks, counted within documents: int32 as ``whole``, the documents' bounds."""
    rows = torch.arange(whole.shape[1], device=whole.device, dtype=torch.int32)[None]
    start = whole[..., 0]
    return torch.stack((start + (rows - start) // chunk * chunk, (rows + 1).expand_as(start)), dim=-1)


def dense_documents(
    mask: Tensor, query: Tensor, key: Tensor, kwargs: dict[str, Any], chunk: int | None = None
) -> Tensor:
    """A dense mask that was made inside of a graph (``carrier.IN_GRAPH``), bool ``(batch or 1, 1, seqlen,
    seqlen)``, without the keys of other documents that ``position_ids`` tell: where every row sees itself (there is no
    padding) and none sees a later key (the mask is causal). Values cannot be looked at there."""
    position_ids, seqlen_k = kwargs.get("position_ids"), key.shape[2]
    if kwargs.get("cu_seq_lens_q") is not None or not isinstance(position_ids, Tensor):
        return mask
    if query.shape[2] != seqlen_k or not _of_rows(position_ids, query):
        return mask
    whole = document_intervals(position_ids).to(query.device)
    if chunk is not None:
        whole = _chunks(whole, chunk)
    keys = torch.arange(seqlen_k, device=query.device)
    same = ((keys >= whole[..., :1]) & (keys < whole[..., 1:]))[:, None]
    causal = mask.diagonal(dim1=-2, dim2=-1).all() & ~mask.triu(1).any()
    if chunk is not None:
        return torch.where(causal, same, mask)
    return mask & (same | ~causal)


def by_positions(mask: AttentionMask, query: Tensor, key: Tensor, position_ids: Any) -> AttentionMask:
    """A causal mask that came as flags alone, with the documents that ``position_ids`` tell apart.

    Models always bring a mask. What drops it are engines that gather sequences between the model and attention
    (DeepSpeed's Ulysses), with ``position_ids`` as their only word on documents; they bring new ones to each layer, so
    that looking whether there is more than one document would wait for the device each time.
    """
    seqlen = query.shape[2]
    if not isinstance(position_ids, Tensor) or seqlen == 1 or seqlen != key.shape[2]:
        return mask
    if not _of_rows(position_ids, query):
        return mask
    return _intersected(mask, document_intervals(position_ids), query, key)


def by_lengths(
    mask: AttentionMask,
    query: Tensor,
    key: Tensor,
    kwargs: dict[str, Any],
    carried: carrier.Carried | None = None,
    chunk: int | None = None,
) -> AttentionMask:
    """The mask of a flattened batch of 1, whose documents ``cu_seq_lens_q`` and ``cu_seq_lens_k`` tell, if they came.

    Args:
        mask: what else is masked. Flags alone are counted within each document; of anything else the keys of other
            documents are taken away.
        carried: where the mask comes from, which keeps what is worked out.
        chunk: as of :func:`documents`.

    Raises:
        ValueError: lengths that do not describe the call.
    """
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is None:
        return mask
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    cu_k = cu_q if cu_k is None else cu_k
    _check_lengths(cu_q, cu_k, query.shape[0], seqlen_q, seqlen_k)
    if torch.compiler.is_compiling():
        return _make(mask, cu_q, cu_k, query, key, None, chunk)
    found = _recall(mask, cu_q, cu_k, seqlen_q) if carried is None else _remembered(carried, (cu_q, cu_k))
    if found is not None:
        return found
    made = _make(mask, cu_q, cu_k, query, key, None if carried is None else carried.repack, chunk)
    if made.row_intervals is not None:
        share(made.row_intervals)
    versions = carrier.version(cu_q), carrier.version(cu_k)
    if carried is not None:
        carried.documents.append(((cu_q, cu_k), versions, own(made)))
    elif None not in versions and _only_flags(mask):  # else nobody would see that they changed
        _recent.append(_Recent(cu_q, cu_k, _key(mask, cu_q, cu_k, seqlen_q), own(made)))
    return made


def _make(
    mask: AttentionMask,
    cu_q: Tensor,
    cu_k: Tensor,
    query: Tensor,
    key: Tensor,
    repack: Callable[[Tensor], AttentionMask] | None,
    chunk: int | None,
) -> AttentionMask:
    seqlen_q, seqlen_k, device = query.shape[2], key.shape[2], query.device
    starts_q, starts_k = cu_q.to(device, torch.int32), cu_k.to(device, torch.int32)
    if _only_flags(mask):
        made = varlen_mask(starts_q, starts_k, seqlen_q, causal=mask.causal, window=mask.window)
        return replace(made, row_positions=None)
    if seqlen_q != seqlen_k:
        raise ValueError(
            f"cu_seq_lens_q came beside an attention mask for {seqlen_q} queries and {seqlen_k} keys; documents can be "
            "kept apart in a mask only where a row's queries and keys are the same tokens. Pass one of the two."
        )
    whole = varlen_mask(starts_q, starts_q, seqlen_q, causal=False).row_intervals
    assert whole is not None
    if repack is not None:
        # A mask that counts positions (chunks) counts them within each document.
        return repack(torch.arange(seqlen_q, device=device)[None] - whole[..., 0])
    if chunk is not None:  # keys that the mask hides from every row are padding
        seen = visible(mask, seqlen_q, seqlen_k, device)
        key_mask = None if seen is None else seen.any(dim=(1, 2))
        return AttentionMask(row_intervals=_chunks(whole, chunk), key_mask=key_mask)
    return _intersected(mask, whole, query, key)


def _only_flags(mask: AttentionMask) -> bool:
    return mask.row_intervals is None and mask.key_mask is None and mask.bias is None


def _intersected(mask: AttentionMask, whole: Tensor, query: Tensor, key: Tensor) -> AttentionMask:
    """The mask without the keys outside each row's document, whose bounds are ``whole``."""
    seqlen_q, seqlen_k, device = query.shape[2], key.shape[2], query.device
    whole = whole.to(device)
    mask = with_intervals(mask, seqlen_q, seqlen_k, device)
    if mask.row_intervals is None:
        return replace(mask, row_intervals=whole)
    return replace(mask, row_intervals=intersect_intervals(mask.row_intervals, whole))


def _of_rows(position_ids: Tensor, query: Tensor) -> bool:
    """Whether positions are those of the call's rows."""
    if position_ids.dim() != 2 or position_ids.shape[1] != query.shape[2]:
        return False
    batch = position_ids.shape[0]
    return bool(batch == 1 or batch == query.shape[0])


def _readable(tensor: Tensor) -> bool:
    """Whether a value can be read: not in compiled code, nor of tensors without data."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and not tensor.is_meta


class _Looked(NamedTuple):
    """What a look at a ``position_ids`` tensor said, valid while it is not changed in place."""

    position_ids: weakref.ref[Tensor]
    version: int
    restarts: bool


_looked: deque[_Looked] = deque(maxlen=8)


def _restarts(position_ids: Tensor) -> bool:
    """Whether a row holds several documents: one look at the device, as Transformers itself looks without a cache. The
    masks of a forward (a model with windows has two) share it."""
    version = carrier.version(position_ids)
    if version is not None:
        for known in _looked:
            if known.position_ids() is position_ids and known.version == version:
                return known.restarts
    restarts = bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())
    if version is not None:
        _looked.append(_Looked(weakref.ref(position_ids), version, restarts))
    return restarts


def _remembered(carried: carrier.Carried, tensors: tuple[Tensor, ...]) -> AttentionMask | None:
    """What was worked out with these tensors for another layer of the same forward. (Where torch does not count
    changes, in ``torch.inference_mode``, nobody can change them between two layers but the model.)"""
    versions = tuple(map(carrier.version, tensors))
    for known, made_at, mask in carried.documents:
        if made_at == versions and len(known) == len(tensors) and all(a is b for a, b in zip(known, tensors)):
            return mask
    return None


class _Recent(NamedTuple):
    """A mask made from lengths alone, for the other layers of the forward."""

    cu_q: Tensor
    cu_k: Tensor
    key: tuple[object, ...]
    mask: AttentionMask


#: Few: each holds its mask.
_recent: deque[_Recent] = deque(maxlen=4)


def _key(mask: AttentionMask, cu_q: Tensor, cu_k: Tensor, seqlen_q: int) -> tuple[object, ...]:
    versions = carrier.version(cu_q), carrier.version(cu_k)
    return (mask.causal, mask.window, seqlen_q, *versions, capturing(cu_q))


def _recall(mask: AttentionMask, cu_q: Tensor, cu_k: Tensor, seqlen_q: int) -> AttentionMask | None:
    if not _only_flags(mask):
        return None
    key = _key(mask, cu_q, cu_k, seqlen_q)
    for known in _recent:
        if known.cu_q is cu_q and known.cu_k is cu_k and known.key == key:
            return known.mask
    return None


def _check_lengths(cu_q: Any, cu_k: Any, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    for name, cu, total in (("cu_seq_lens_q", cu_q, seqlen_q), ("cu_seq_lens_k", cu_k, seqlen_k)):
        if not isinstance(cu, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(cu).__name__}.")
        if cu.dim() != 1 or cu.dtype not in _INTEGERS or cu.shape[0] == 0:
            raise ValueError(f"{name} must be integers of shape (documents + 1,), got {describe(cu)}.")
        if cu.device.type != "cpu" or not _readable(cu):  # on a device looking would wait
            continue
        ends = cu.tolist()
        if ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"{name} must begin with 0 and never fall, got {ends[:20]}.")
        if ends[-1] > total:
            raise ValueError(f"{name} ends at {ends[-1]}, but the row has {total} tokens.")
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one flattened row, but the batch is {batch}; flatten the batch "
            "(DataCollatorWithFlattening), or pass position_ids that restart at every document."
        )
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k must have one length, got {len(cu_q)} and {len(cu_k)}.")
