"""The attention function registered with Transformers as ``"flash_plus"``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops, settings
from ..inputs import AttentionInputs, describe, validate
from ..masks import AttentionMask, key_mask_intervals, visible, with_intervals
from . import carrier, continuous, decoding, packing

NAME = "flash_plus"


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
        kwargs: of these ``position_ids`` and ``cu_seq_lens_q/k`` (packed batches, see ``packing.py``) and
            ``output_attentions`` are read; ``max_length_q/k`` say nothing that the lengths do not.

    Returns:
        ``(output (batch, seqlen_q, nheads, head_dim), weights)``; the weights are None unless
        ``output_attentions``, which computes them eagerly.

    Raises:
        NotImplementedError: ``block_indices`` (block-sparse attention), or a call that no provider serves.
        ValueError: a mask that cannot be understood, or ``cu_seq_lens_q/k`` that do not describe the call.
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
            mask = packing.by_lengths(mask, query, key, kwargs)
        elif causal:
            mask = packing.by_positions(mask, query, key, kwargs.get("position_ids"))
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


def _chunk(module: torch.nn.Module) -> int | None:
    """The chunks of a layer whose rows see the keys of their chunk (Llama 4), whose mask says so, too."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or index is None or index >= len(kinds) or kinds[index] != "chunked_attention":
        return None
    return getattr(config, "attention_chunk_size", None)


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
    seqlen_q, seqlen_k, chunk = query.shape[2], key.shape[2], _chunk(module)
    if carrier.is_carrier(attention_mask):
        return packing.documents(carrier.decode(attention_mask, seqlen_q, seqlen_k), query, key, kwargs, chunk)
    if attention_mask.dim() == 4 and attention_mask.dtype == carrier.IN_GRAPH:
        attention_mask = packing.dense_documents(attention_mask.bool(), query, key, kwargs, chunk)
    if attention_mask.dim() == 4 and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        bias = attention_mask[..., :seqlen_k]
        if bias.shape[-1] == 1 and seqlen_k > 1:  # stands for all keys, as it does when it is added to scores
            bias = bias.expand(*bias.shape[:-1], seqlen_k)
        if bias.dtype == torch.bool and seqlen_q == 1 and bias.shape[1] == 1 and bias.shape[2] == 1:
            mask = AttentionMask(key_mask=bias[:, 0, 0, :])  # one row: a dense mask is a key mask
        else:
            mask = AttentionMask(bias=bias)
        return packing.by_lengths(mask, query, key, kwargs, chunk=chunk)
    if attention_mask.dim() == 2:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        padded = _padding(attention_mask, _flags(bool(causal), sliding_window), seqlen_q, seqlen_k)
        return packing.by_lengths(padded, query, key, kwargs)
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
