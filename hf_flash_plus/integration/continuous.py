"""Continuous batching: attention calls that come with Transformers' ``PagedAttentionCache``.

The requests of a step arrive as one flattened row. Either the cache writes the new keys and returns, for every request,
all of its keys, which cumulative lengths tell apart (``read_index``, ``write_index``); or, where every request brings
one token, the pages are read and written in place by a ``block_table``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import kvcache, ops
from ..inputs import AttentionInputs, validate
from ..interval_cache import capturing
from ..masks import AttentionMask, PackedSequences, varlen_mask
from ..providers import PROVIDERS
from . import carrier

_MEMO = "_hf_flash_plus_masks"
#: The module of Transformers that decides whether block tables are used; imported with the first model that generates.
_INITIALIZATION = "transformers.generation.continuous_batching.initialization"


def allow_block_tables(names: tuple[str, ...], undo: list[Callable[[], None]]) -> None:
    """Let continuous batching use block tables with implementations of these names on a GPU.

    Transformers asks whether the name ends in 2 or 3. The answer for ours is yes where it asks for a version; where it
    asks whether a mask is needed, the name itself already says no.
    """
    module = sys.modules.get(_INITIALIZATION)
    original: Any = getattr(module, "is_flash_attention_requested", None)
    if original is None or hasattr(original, "_hf_flash_plus"):
        return

    @functools.wraps(original)
    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if kwargs.get("version") is not None and getattr(config, "_attn_implementation", None) in names:
            return True
        return bool(original(config, *args, **kwargs))

    is_flash_attention_requested._hf_flash_plus = True  # type: ignore[attr-defined]
    undo.append(lambda: setattr(module, "is_flash_attention_requested", original))
    setattr(module, "is_flash_attention_requested", is_flash_attention_requested)  # noqa: B010


def is_paged(cache: Any) -> bool:
    """Whether a ``cache`` argument is a ``PagedAttentionCache`` (told by name: importing it costs every start)."""
    return any(cls.__name__ == "PagedAttentionCache" for cls in type(cache).__mro__)


@lru_cache(maxsize=8)
def _update_takes_kwargs(cache_type: Any) -> bool:
    """Transformers 5.23 resolves per-layer arguments inside ``update(kwargs=...)``; 5.17 leaves that to the caller."""
    return "kwargs" in inspect.signature(cache_type.update).parameters


def _update(
    cache: Any, module: Any, key: Tensor, value: Tensor, window: int | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Write the new keys and values; return all of them, ``(total_k, nheads_k, head_dim)``, and resolve ``kwargs``."""
    cache_type: Any = type(cache)
    if _update_takes_kwargs(cache_type):
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        return key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer_type = "sliding_attention" if window else "full_attention"
    for name in ("cu_seq_lens_k", "max_seqlen_k"):
        if isinstance(kwargs.get(name), dict):
            kwargs[name] = kwargs[name][layer_type]
    updated: tuple[Tensor, Tensor] = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    return updated


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """One layer of one continuous-batching step.

    Args:
        query: ``(1, nheads, total_q, head_dim)``; key, value: ``(1, nheads_k, total_q, head_dim)``: the new tokens of
            all requests, one after another.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k`` (a tensor, or one by layer type), read and write indices, or
            ``block_table``.

    Returns:
        ``(output (1, total_q, nheads, head_dim), None)``.
    """
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    window = window or None
    if kwargs.get("block_table") is not None:
        out = _by_block_table(module, query, key, value, cache, dropout, scaling, window, softcap, s_aux, kwargs)
        return out, None
    keys, values = _update(cache, module, key, value, window, kwargs)
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    causal = bool(getattr(module, "is_causal", True))
    if getattr(module, "layer_idx", 0) == 0:
        _forget_masks(cu_q)
    mask = _mask(cu_q.to(torch.int32), cu_k.to(torch.int32), query.shape[2], keys.shape[0], causal, window)
    inputs = AttentionInputs(
        _last_contiguous(query.transpose(1, 2)),
        _last_contiguous(keys[None]),
        _last_contiguous(values[None]),
        float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        mask,
        float(softcap or 0.0),
        None,
        s_aux,
        float(dropout),
    )
    validate(inputs)
    return ops.attention(inputs, "continuous batching").out, None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask(cu_q: Tensor, cu_k: Tensor, total_q: int, total_k: int, causal: bool, window: int | None) -> AttentionMask:
    """The mask of a step, made by the first layer and kept with ``cu_q`` for the others: the torch operations that make
    it would be more than all the rest of a layer's.

    Transformers runs a step once and then captures it into a CUDA graph with the same tensors: what was made before the
    capture is not part of the graph, and must not serve in it.
    """
    versions = carrier.version(cu_q), carrier.version(cu_k)
    key = (*versions, total_q, total_k, causal, window, capturing(cu_q))
    compiling = torch.compiler.is_compiling()
    known: list[tuple[tuple[object, ...], Tensor, AttentionMask]] = [] if compiling else getattr(cu_q, _MEMO, [])
    for made_for, lengths, mask in known:
        if made_for == key and lengths is cu_k:
            return mask
    bounds = (window - 1, 0) if window else (-1, -1)
    mask = varlen_mask(cu_q, cu_k, total_q, causal=causal, window=bounds)
    # Detached: other objects, so that ``cu_q``, which keeps the mask, is not kept by it.
    packed = PackedSequences(cu_q.detach(), cu_k.detach(), total_q, total_k, causal, bounds)
    mask = replace(mask, packed=packed, row_positions=None)
    if None not in versions and not compiling:  # else nobody would see that they changed
        setattr(cu_q, _MEMO, [*known[-3:], (key, cu_k, mask)])
    return mask


def _by_block_table(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """A step in which every request brings one token: keys and values are written into their pages and read there.

    Returns:
        ``(1, requests, nheads, head_dim)``.
    """
    if dropout:
        raise ValueError(f"decoding from pages drops nothing: dropout must be 0, got {dropout}.")
    k_cache, v_cache, table, cu_k = _pages(cache, module, key, value, window, kwargs)
    new_q, new_k, new_v = (x[0].transpose(0, 1)[:, None] for x in (query, key, value))
    requests = new_q.shape[0]
    if _appends_in_one_launch(new_k, new_v, k_cache, v_cache, table):
        from ..kernels.append import NO_WINDOW, append

        intervals = append(new_k[:, 0], new_v[:, 0], k_cache, v_cache, table, cu_k, window or NO_WINDOW)
        slots = table.shape[1] * k_cache.shape[1]
        keys, values = (c.new_empty(()).expand(requests, slots, *c.shape[2:]) for c in (k_cache, v_cache))
        scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
        mask = AttentionMask(row_intervals=intervals)
        inputs = AttentionInputs(new_q, keys, values, scale, mask, float(softcap or 0.0), None, s_aux)
        validate(inputs)
        with torch.no_grad():
            return ops.paged_attention(inputs, k_cache, v_cache, table, "continuous batching").out.transpose(0, 1)
    total = (cu_k[1 : requests + 1] - cu_k[:requests]).to(torch.int32)
    # Rows that only fill up a CUDA graph have no keys and no pages. They repeat the first request's write instead, so
    # that nothing depends on how many rows are real, which the host does not know.
    real = torch.where(total > 0, torch.arange(requests, device=total.device), 0)
    out = kvcache.flash_attn_with_kvcache(
        new_q,
        k_cache,
        v_cache,
        new_k[real],
        new_v[real],
        cache_seqlens=total[real] - 1,
        block_table=table[real],
        softmax_scale=scaling,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap or 0.0,
        s_aux=s_aux,
    )
    return out.transpose(0, 1)


def _forget_masks(cu_q: Tensor) -> None:
    if not torch.compiler.is_compiling() and hasattr(cu_q, _MEMO):
        delattr(cu_q, _MEMO)


def _appends_in_one_launch(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> bool:
    """Whether our kernel can write the new tokens: on the current CUDA device, with the layouts that caches have."""
    return (
        k.is_cuda
        and k.device.index == torch.cuda.current_device()
        and all(t.device == k.device and t.dtype == k.dtype and t.stride(-1) == 1 for t in (k, v, k_cache, v_cache))
        and table.dtype == torch.int32
        and table.device == k.device
        and table.stride(-1) == 1
        and PROVIDERS["triton"].unavailable_reason() is None
    )


def _pages(
    cache: Any, module: Any, key: Tensor, value: Tensor, window: int | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``k_cache``, ``v_cache`` ``(blocks, block size, nheads_k, dim)``, and the layer's block table and lengths."""
    cache_type: Any = type(cache)
    if _update_takes_kwargs(cache_type):
        cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        return kwargs["k_cache"], kwargs["v_cache"], kwargs["block_table"], kwargs["cu_seq_lens_k"]
    group, layer = cache.layer_index_to_group_indices[module.layer_idx]
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    cu_k = kwargs["cu_seq_lens_k"]
    if isinstance(cu_k, dict):
        cu_k = cu_k["sliding_attention" if window else "full_attention"]
    return cache.key_cache[layer].view(shape), cache.value_cache[layer].view(shape), kwargs["block_table"][group], cu_k
