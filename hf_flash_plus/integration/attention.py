"""The attention function registered with Transformers as ``"flash_plus"``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, settings
from ..inputs import AttentionInputs, describe, validate
from ..interval_cache import capturing, share
from ..masks import (
    AttentionMask,
    document_intervals,
    intersect_intervals,
    key_mask_intervals,
    varlen_mask,
    visible,
    with_intervals,
)
from . import carrier, continuous, decoding

NAME = "flash_plus"
_MEMO = "_hf_flash_plus_memo"


def flash_plus_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention call, in the convention of Transformers' ``AttentionInterface``.

    Args:
        module: the attention module; ``module.is_causal`` decides only where no mask and no ``is_causal`` came.
        query: ``(batch, nheads, seqlen_q, head_dim)``.
        key, value: ``(batch, nheads_k, seqlen_k, head_dim)``; value's head_dim may differ.
        attention_mask: a carrier made by ``flash_plus_mask``; or anyone's 4-D boolean (True is visible) or additive
            mask; or a 2-D padding mask. When one is given it is the whole truth: ``is_causal`` and
            ``sliding_window`` are then already part of it.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; None is ``head_dim ** -0.5``.
        sliding_window: keys a row may look back over, itself included; used where no mask came.
        softcap: as in Gemma 2.
        is_causal: overrides ``module.is_causal`` where no mask came.
        s_aux: attention sinks ``(nheads,)`` (gpt_oss); sinks: ``(batch, nheads, seqlen_q, 1)`` (inkling2).
        cache: a ``PagedAttentionCache``, in continuous batching.
        position_bias: added to the scores, broadcastable to ``(batch, nheads, seqlen_q, seqlen_k)`` (T5).
        indices: ``(batch, seqlen_q, topk)``, the keys that sparse attention (DSA) chose; the others are hidden.
        kwargs: of these ``position_ids``, ``cu_seq_lens_q/k``, ``max_length_q/k`` (packed batches) and
            ``output_attentions`` are read.

    Returns:
        ``(output (batch, seqlen_q, nheads, head_dim), weights)``; the weights are None unless
        ``output_attentions``, which computes them eagerly.

    Raises:
        NotImplementedError: ``block_indices`` (block-sparse attention), or a call that no provider serves.
        ValueError: a mask that cannot be understood.
    """
    short = (
        query.shape[2] == 1
        and block_indices is cache is position_bias is indices is sinks is s_aux is None
        and not dropout
        and not torch.compiler.is_compiling()
        and decoding.plain(kwargs)
    )
    if short:
        found = decoding.short_way(query, key, value, attention_mask, scaling, softcap)
        if found is not None:
            return found, None
    if block_indices is not None:
        raise NotImplementedError(
            "attn_implementation='flash_plus' does not compute block-sparse attention (block_indices); "
            "load this model with attn_implementation='eager' or 'sdpa'."
        )
    if cache is not None and continuous.is_paged(cache):
        return continuous.paged_attention(
            module, query, key, value, cache, dropout, scaling, sliding_window, softcap, s_aux, kwargs
        )
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    known = None
    if short:
        known = decoding.candidate(
            module, query, key, value, attention_mask, scaling, sliding_window, softcap, is_causal
        )
        if known is not None:
            out = decoding.serve(known, query, key, value)
            if out is not None:
                return out, None
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        mask = _flags(bool(causal), sliding_window)
        if kwargs.get("cu_seq_lens_q") is not None:
            mask = _packed(mask, query, key, kwargs)
        elif causal:
            mask = _by_positions(mask, query, key, kwargs.get("position_ids"))
    else:
        mask = _understand(attention_mask, module, query, key, is_causal, sliding_window, kwargs)
    if position_bias is not None:
        mask = _with_bias(mask, position_bias, seqlen_q, seqlen_k)
    if indices is not None:
        mask = _with_selected_keys(mask, indices, seqlen_q, seqlen_k)
    if sinks is not None:
        s_aux = sinks.squeeze(-1)
    if not (query.dtype == key.dtype == value.dtype):
        # PEFT keeps norms in fp32, so queries and keys may come in fp32 beside half-precision values.
        query, key = query.to(value.dtype), key.to(value.dtype)
    wants_weights = bool(kwargs.get("output_attentions"))
    inputs = AttentionInputs(
        _last_contiguous(query.transpose(1, 2)),
        _last_contiguous(key.transpose(1, 2)),
        _last_contiguous(value.transpose(1, 2)),
        float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        mask,
        float(softcap) if softcap else 0.0,
        None,
        s_aux,
        float(dropout),
        deterministic=torch.is_grad_enabled() and settings.deterministic(),
        needs_lse=wants_weights,
    )
    validate(inputs)
    if wants_weights:
        with settings.provider_override("reference"):
            output = ops.attention(inputs, NAME)
        assert output.probabilities is not None
        return output.out, output.probabilities.to(query.dtype)
    if known is not None:
        decoding.remember(known, inputs)
    return ops.attention(inputs, NAME).out, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flags(causal: bool, sliding_window: int | None) -> AttentionMask:
    """The mask that Transformers' flash attention would use where no mask came: without causal, symmetric."""
    if sliding_window is None or sliding_window <= 0:
        return AttentionMask(causal=causal)
    return AttentionMask(causal=causal, window=(sliding_window - 1, -1 if causal else sliding_window - 1))


def _understand(
    attention_mask: Tensor,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> AttentionMask:
    """Any mask that can reach an attention call, as an :class:`AttentionMask`."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if carrier.is_carrier(attention_mask):
        carried = carrier.decode(attention_mask, seqlen_q, seqlen_k)
        return _split_documents(carried, query, key, kwargs) if carried.one_document else carried.mask
    if attention_mask.dim() == 4 and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        bias = attention_mask[..., :seqlen_k]
        if bias.dtype == torch.bool and seqlen_q == 1 and bias.shape[1] == 1 and bias.shape[2] == 1:
            return AttentionMask(key_mask=bias[:, 0, 0, :])  # one row: a dense mask is a key mask
        return AttentionMask(bias=bias)
    if attention_mask.dim() == 2:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        return _padding(attention_mask, _flags(bool(causal), sliding_window), seqlen_q, seqlen_k)
    raise ValueError(
        f"attn_implementation='flash_plus' got an attention_mask of {describe(attention_mask)}; it takes 4-D boolean "
        "masks (True is visible), 4-D floating masks (added to the scores), and 2-D padding masks (batch, seqlen_k)."
    )


def _padding(attention_mask: Tensor, flags: AttentionMask, seqlen_q: int, seqlen_k: int) -> AttentionMask:
    """A 2-D padding mask ``(batch, seqlen_k)`` (nonzero is real) joined with flags."""
    key_mask = attention_mask[:, -seqlen_k:].bool() if attention_mask.shape[1] > seqlen_k else attention_mask.bool()
    if key_mask.shape[1] < seqlen_k:  # a static cache: slots beyond the mask are not written yet
        key_mask = torch.nn.functional.pad(key_mask, (0, seqlen_k - key_mask.shape[1]))
    first, last, holes = key_mask_intervals(key_mask)
    intervals = torch.stack((first, last), dim=-1)[:, None, :].expand(-1, seqlen_q, -1)
    mask = AttentionMask(flags.causal, flags.window, intervals, key_mask, holes)
    return with_intervals(mask, seqlen_q, seqlen_k, attention_mask.device)


def _split_documents(carried: carrier.Carried, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> AttentionMask:
    """Keep packed documents apart where the mask function could not.

    Transformers looks for packed ``position_ids`` only without a cache object; with one (``use_cache=True``, the
    default), and in models that do not hand them to the mask function (gpt_oss), its eager attention lets the
    documents of a row see each other. Nobody who packs documents wants that, Transformers' own flash path does not do
    it, and the output of a model must not depend on whether it also returns a cache. So the reference here is each
    document alone. ``cu_seq_lens_q`` says the same in flattened batches.
    """
    mask = carried.mask
    if kwargs.get("cu_seq_lens_q") is not None:
        return _packed(mask, query, key, kwargs)
    position_ids = kwargs.get("position_ids")
    if (
        not isinstance(position_ids, Tensor)
        or position_ids.dim() != 2
        or position_ids.shape[1] != query.shape[2]
        or position_ids.shape[0] not in (1, query.shape[0])
    ):
        return mask
    if torch.compiler.is_compiling() or carried.repack is None:
        # Compiled code never looks at values: it keeps the intervals, which say nothing new for a single document.
        mask = with_intervals(mask, query.shape[2], key.shape[2], query.device)
        assert mask.row_intervals is not None
        documents = document_intervals(position_ids).to(query.device)
        return replace(mask, row_intervals=intersect_intervals(mask.row_intervals, documents))
    repacked = _repacked(carried, position_ids)
    return mask if repacked is None else repacked


def _by_positions(mask: AttentionMask, query: Tensor, key: Tensor, position_ids: Any) -> AttentionMask:
    """A causal mask that came as flags alone, with the documents that ``position_ids`` tell apart.

    Models always bring a mask. What drops it are engines that gather sequences between the model and attention
    (DeepSpeed's Ulysses), with ``position_ids`` as their only word on documents; they bring new ones to each layer, so
    that looking whether there is more than one document would wait for the device each time.
    """
    seqlen = query.shape[2]
    if not isinstance(position_ids, Tensor) or seqlen == 1 or seqlen != key.shape[2]:
        return mask
    if position_ids.dim() != 2 or position_ids.shape[1] != seqlen or position_ids.shape[0] not in (1, query.shape[0]):
        return mask
    mask = with_intervals(mask, seqlen, seqlen, query.device)
    assert mask.row_intervals is not None
    documents = document_intervals(position_ids).to(query.device)
    return replace(mask, row_intervals=intersect_intervals(mask.row_intervals, documents))


def _repacked(carried: carrier.Carried, position_ids: Tensor) -> AttentionMask | None:
    """The mask of packed documents; None where each row is one document.

    Asked once per forward and mask (every layer gets the same tensors), with one look at the device, as Transformers
    itself looks without a cache.
    """
    made_at = carrier.version(position_ids)
    memo: _Documents | None = getattr(position_ids, _MEMO, None)
    if memo is None or memo.made_at != made_at:
        packed = bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())
        memo = _Documents(made_at, packed, [])
        setattr(position_ids, _MEMO, memo)
    if not memo.packed:
        return None
    for known, mask in memo.masks:
        if known is carried:
            return mask
    assert carried.repack is not None
    mask = carried.repack(position_ids)
    if mask.row_intervals is not None:
        share(mask.row_intervals)
    memo.masks.append((carried, mask))
    return mask


class _Documents(NamedTuple):
    """What is remembered with a ``position_ids`` tensor, valid while the tensor is not changed in place."""

    made_at: int | None
    packed: bool
    masks: list[tuple[carrier.Carried, AttentionMask]]


def _packed(mask: AttentionMask, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> AttentionMask:
    """The mask of a flattened batch of 1, whose sequences ``cu_seq_lens_q`` and ``cu_seq_lens_k`` tell."""
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
    if not isinstance(cu_q, Tensor):
        raise ValueError(f"cu_seq_lens_q must be a tensor, got {type(cu_q).__name__}.")
    cu_k = cu_k if isinstance(cu_k, Tensor) else cu_q
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one flattened row, but the batch is {query.shape[0]}; flatten the batch "
            "(DataCollatorWithFlattening), or pass position_ids that restart at every document."
        )
    memo_key: tuple[object, ...] = (mask.causal, mask.window, query.shape[2], carrier.version(cu_q))
    memo = None
    if not torch.compiler.is_compiling():
        memo_key += (capturing(cu_q),)
        memo = getattr(cu_q, _MEMO, None)
    if memo is not None and memo[0] == memo_key:
        result: AttentionMask = memo[1]
        return result
    result = varlen_mask(
        cu_q.to(query.device, torch.int32),
        cu_k.to(query.device, torch.int32),
        query.shape[2],
        causal=mask.causal,
        window=mask.window,
    )
    result = replace(result, row_positions=None)
    if not torch.compiler.is_compiling():
        if result.row_intervals is not None:
            share(result.row_intervals)
        setattr(cu_q, _MEMO, (memo_key, result))
    return result


def _with_bias(mask: AttentionMask, position_bias: Tensor, seqlen_q: int, seqlen_k: int) -> AttentionMask:
    """The mask with a position bias added to the scores."""
    bias = position_bias[..., :seqlen_k]
    if bias.dim() == 3:
        bias = bias[None]
    if mask.bias is None:
        return replace(mask, bias=bias)
    if mask.bias.dtype == torch.bool:
        return replace(mask, bias=torch.where(mask.bias, bias, float("-inf")))
    return replace(mask, bias=mask.bias + bias)


def _with_selected_keys(mask: AttentionMask, indices: Tensor, seqlen_q: int, seqlen_k: int) -> AttentionMask:
    """The mask with all keys hidden but those that sparse attention selected for each row."""
    selected = torch.zeros(*indices.shape[:2], seqlen_k, dtype=torch.bool, device=indices.device)
    selected = selected.scatter(-1, indices.long(), True)[:, None]
    seen = visible(mask, seqlen_q, seqlen_k, indices.device)
    if seen is not None:
        selected = selected & seen
    if mask.bias is not None and mask.bias.dtype != torch.bool:
        return AttentionMask(bias=mask.bias.masked_fill(~selected, float("-inf")))
    return AttentionMask(bias=selected)
