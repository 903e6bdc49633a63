"""Continuous batching: attention calls that come with Transformers' ``PagedAttentionCache``.

The requests of a step arrive as one flattened row; the cache writes the new keys and returns, for every request, all of
its keys, which cumulative lengths tell apart.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import interface


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
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k`` (a tensor, or one by layer type), read and write indices.

    Returns:
        ``(output (1, total_q, nheads, head_dim), None)``.
    """
    if kwargs.get("block_table") is not None:
        raise NotImplementedError(
            "attn_implementation='flash_plus' reads the paged cache by index; set max_blocks_per_request=0 in the "
            "continuous batching config (its default for this implementation)."
        )
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    window = window or None
    keys, values = _update(cache, module, key, value, window, kwargs)
    cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    out = interface.flash_attn_varlen_func(
        query[0].transpose(0, 1),
        keys,
        values,
        cu_q.to(torch.int32),
        cu_k.to(torch.int32),
        query.shape[2],
        keys.shape[0],
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=bool(getattr(module, "is_causal", True)),
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=softcap or 0.0,
        s_aux=s_aux,
    )
    return out[None], None
