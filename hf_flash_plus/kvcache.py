"""``flash_attn_with_kvcache``: attention of new tokens over a cache, which it can extend in place (flash-attn 2.8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops
from .inputs import (
    AttentionInputs,
    _require,
    _require_tensor,
    _require_values,
    describe,
    integer,
    readable,
    real,
    require_strided,
    validate,
)
from .interface import _last_contiguous, _softmax_scale, _window
from .masks import AttentionMask, window_intervals
from .paged import require_pages, validate_pages


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention of ``q`` over a KV cache; new keys and values, when given, are written into the cache first.

    Forward only, as in flash-attn. The mask is aligned to the bottom right of the keys in use, as in
    :func:`~hf_flash_plus.interface.flash_attn_func`.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k_cache: ``(batch_cache, seqlen_cache, nheads_k, headdim)``, or with ``block_table``
            ``(num_blocks, page_block_size, nheads_k, headdim)``. Updated in place when ``k`` is given.
        v_cache: as ``k_cache``, with its own headdim.
        k, v: ``(batch, seqlen_new, nheads_k, headdim)``, written behind the ``cache_seqlens`` keys in use.
        rotary_cos, rotary_sin: ``(seqlen_ro, rotary_dim / 2)``; rotates ``k`` (at its place in the cache) and ``q``
            (with ``causal`` or a window each row at its own place, otherwise all rows at ``cache_seqlens``) before use.
            ``rotary_dim`` may be smaller than headdim. Only together with ``k``.
        cache_seqlens: int or int32 ``(batch,)``: keys in use before ``k``; None is the whole cache (without ``k``).
        cache_batch_idx: integer ``(batch,)``: the cache row of each batch element; not with ``block_table``.
        cache_leftpad: int32 ``(batch,)``: each row's first key in use; not with ``block_table``.
        block_table: int32 ``(batch, max_num_blocks_per_seq)``: the pages of each row's cache.
        softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux: as in ``flash_attn_func``.
        rotary_interleaved: rotate dimensions (0, 1), (2, 3), ... (GPT-J);
            False: (0, d/2), (1, d/2 + 1), ... (GPT-NeoX).
        num_splits: how many parts to split the keys into, 0 to choose; a hint that does not change the result.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        ``out`` ``(batch, seqlen_q, nheads, v_headdim)``; or ``(out, softmax_lse)``, fp32 ``(batch, nheads, seqlen_q)``.

    Raises:
        TypeError, ValueError: malformed arguments; values of index tensors (``cache_seqlens``, ``cache_batch_idx``,
            ``cache_leftpad``, ``block_table``) are checked on the CPU only, where that costs no waiting.
        NoProviderError: no provider can serve the call.
    """
    cache_seqlens, num_splits = integer(cache_seqlens), integer(num_splits)
    _validate(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table, num_splits
    )
    window, softcap = _window(window_size), real(softcap)
    batch, seqlen_q = q.shape[0], q.shape[1]
    # How many keys a row's cache can hold.
    slots = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    _require(
        rotary_cos is None or rotary_cos.shape[0] >= slots,
        f"rotary_cos and rotary_sin must have a row for each of the {slots} keys that the cache can hold, "
        f"got {describe(rotary_cos) if rotary_cos is not None else None}.",
    )
    used = _lengths(cache_seqlens, k, batch, slots, q.device)
    flags = AttentionMask(causal=bool(causal), window=window)
    if rotary_cos is not None and k is not None and (flags.causal or flags.windowed):
        # Row i of q is rotated as key cache_seqlens + i; with more rows than new keys that can lie beyond the cache.
        most = cache_seqlens if isinstance(cache_seqlens, int) else slots - k.shape[1]
        if isinstance(cache_seqlens, Tensor) and readable(cache_seqlens) and batch:
            most = int(cache_seqlens.max())
        last = most + seqlen_q
        _require(
            rotary_cos.shape[0] >= last,
            lambda: (
                f"rotary_cos and rotary_sin must have {last} rows to rotate q (seqlen {seqlen_q}) behind the keys in "
                f"use, got {describe(rotary_cos)}; precompute more rows."
            ),
        )
    scale = _softmax_scale(q, softmax_scale)
    # What autocast computes in brings different dtypes together; where it is off, they are refused.
    joined = None if q.dtype == k_cache.dtype == v_cache.dtype else ops.autocast_dtype(q)
    q = q if joined is None else q.to(joined)
    if k is not None:
        # A call that is refused must not have written into the cache.
        keys, values = _stand_ins(k_cache, v_cache, batch, slots, joined)
        stand_in = AttentionInputs(
            q, keys, values, scale, flags, softcap, alibi_slopes, s_aux, needs_lse=return_softmax_lse
        )
        validate(stand_in)
        if not torch.compiler.is_compiling():
            with torch.no_grad():  # as the call itself
                dispatch.select_provider(stand_in.signature())
    if block_table is not None:
        require_pages(block_table, used + (0 if k is None else k.shape[1]), k_cache)
    with torch.no_grad():
        total = used
        if k is not None:
            assert v is not None
            places = used[:, None] + torch.arange(k.shape[1], device=q.device)
            if rotary_cos is not None:
                assert rotary_sin is not None
                steps = torch.arange(seqlen_q, device=q.device)
                by_row = flags.causal or flags.windowed
                q_places = used[:, None] + (steps if by_row else torch.zeros_like(steps))
                q = apply_rotary(q, rotary_cos, rotary_sin, q_places, rotary_interleaved)
                k = apply_rotary(k, rotary_cos, rotary_sin, places, rotary_interleaved)
            _append(k_cache, k, places, cache_batch_idx, block_table)
            _append(v_cache, v, places, cache_batch_idx, block_table)
            total = used + k.shape[1]
        known = cache_leftpad is None and not isinstance(cache_seqlens, Tensor)
        if known and block_table is None:
            # One length for all, known here: the flags say it all, and nothing beyond it is read.
            length = slots if cache_seqlens is None else cache_seqlens + (0 if k is None else k.shape[1])
            mask = flags
        else:
            length = slots
            first = torch.zeros_like(total) if cache_leftpad is None else cache_leftpad.to(total.dtype)
            diagonal = torch.arange(seqlen_q, device=q.device)[None] + (total - seqlen_q)[:, None]
            intervals = window_intervals(flags, diagonal, first[:, None], total[:, None])
            positions = None if alibi_slopes is None else diagonal.to(torch.int32)
            mask = AttentionMask(row_intervals=intervals, row_positions=positions)
        if block_table is not None:
            keys, values = _stand_ins(k_cache, v_cache, batch, slots, joined)
        elif cache_batch_idx is not None:
            keys, values = k_cache[cache_batch_idx.long(), :length], v_cache[cache_batch_idx.long(), :length]
        else:
            keys, values = k_cache[:batch, :length], v_cache[:batch, :length]
        inputs = AttentionInputs(
            _last_contiguous(q), keys, values, scale, mask, softcap, alibi_slopes, s_aux, needs_lse=return_softmax_lse
        )
        if block_table is None:
            if joined is not None:
                keys, values = keys.to(joined), values.to(joined)
            inputs = replace(inputs, key=_last_contiguous(keys), value=_last_contiguous(values))
        validate(inputs)
        if block_table is not None:
            output = ops.paged_attention(inputs, k_cache, v_cache, block_table, "flash_attn_with_kvcache")
        else:
            output = ops.attention(inputs, "flash_attn_with_kvcache", unwritten=not known)
    return (output.out, output.softmax_lse) if return_softmax_lse else output.out


def _stand_ins(
    k_cache: Tensor, v_cache: Tensor, batch: int, slots: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of the right shape for checks, of one element of memory each."""
    keys, values = (c.new_empty((), dtype=dtype).expand(batch, slots, *c.shape[2:]) for c in (k_cache, v_cache))
    return keys, values


def _validate(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    num_splits: int,
) -> None:
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _require_tensor(name, tensor)
        require_strided(name, tensor)
        _require(tensor.dim() == 4, f"{name} must have 4 dimensions, got {describe(tensor)}.")
    batch = q.shape[0]
    _require(
        k_cache.shape[:2] == v_cache.shape[:2],
        f"k_cache and v_cache must have the same {'batch and seqlen' if block_table is None else 'pages'}, "
        f"got {describe(k_cache)} and {describe(v_cache)}.",
    )
    _require((k is None) == (v is None), "k and v must be given together.")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is not None:
            _require_tensor(name, new)
            _require(
                new.dim() == 4 and new.shape[0] == batch and new.shape[2:] == cache.shape[2:],
                f"{name} must be ({batch}, seqlen_new, {cache.shape[2]}, {cache.shape[3]}) to fit its cache, "
                f"got {describe(new)}.",
            )
            _require(
                new.dtype == cache.dtype, f"{name} is {new.dtype}, but its cache is {cache.dtype}; cast one of them."
            )
            _require(new.device == cache.device, f"{name} is on {new.device}, but its cache is on {cache.device}.")
    if k is not None and v is not None:
        _require(k.shape[1] == v.shape[1], f"k and v must have one seqlen, got k: {describe(k)}, v: {describe(v)}.")
    _require((rotary_cos is None) == (rotary_sin is None), "rotary_cos and rotary_sin must be given together.")
    if rotary_cos is not None:
        _require_tensor("rotary_cos", rotary_cos)
        _require_tensor("rotary_sin", rotary_sin)
        assert rotary_sin is not None
        _require(k is not None, "rotary_cos and rotary_sin need new keys k to rotate.")
        for name, table in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
            _require(table.is_floating_point(), f"{name} must have a floating dtype, got {describe(table)}.")
        _require(
            rotary_cos.dim() == 2 and rotary_cos.shape == rotary_sin.shape and 2 * rotary_cos.shape[1] <= q.shape[3],
            f"rotary_cos and rotary_sin must be (seqlen_ro, rotary_dim / 2) with rotary_dim <= {q.shape[3]}, "
            f"got {describe(rotary_cos)} and {describe(rotary_sin)}.",
        )
    if block_table is not None:
        validate_pages("k_cache", k_cache, block_table)
        validate_pages("v_cache", v_cache, block_table)
        _require(
            block_table.shape[0] == batch, f"block_table has {block_table.shape[0]} rows, but q has batch {batch}."
        )
        _require(cache_batch_idx is None, "cache_batch_idx cannot be combined with block_table.")
        _require(cache_leftpad is None, "cache_leftpad cannot be combined with block_table.")
    elif cache_batch_idx is None:
        _require(
            k_cache.shape[0] >= batch,
            f"k_cache holds {k_cache.shape[0]} rows, but q has batch {batch}; pass cache_batch_idx or a larger cache.",
        )
    for name, index in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if index is not None:
            _require(
                isinstance(index, Tensor)
                and index.shape == (batch,)
                and index.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
                f"{name} must be an integer tensor of shape ({batch},), "
                f"got {describe(index) if isinstance(index, Tensor) else index!r}.",
            )
    if cache_batch_idx is not None:
        _require_values("cache_batch_idx", cache_batch_idx, 0, k_cache.shape[0] - 1, "rows of k_cache")
    if cache_leftpad is not None:
        _require_values("cache_leftpad", cache_leftpad, 0, k_cache.shape[1], "slots of k_cache")
    _require(
        isinstance(num_splits, int) and num_splits >= 0, f"num_splits must be an integer >= 0, got {num_splits!r}."
    )


def _lengths(
    cache_seqlens: int | Tensor | None, k: Tensor | None, batch: int, slots: int, device: torch.device
) -> Tensor:
    """Keys in use before this call, int64 ``(batch,)``."""
    new = 0 if k is None else k.shape[1]
    if cache_seqlens is None:
        _require(k is None, "cache_seqlens is needed with k: it says where the new keys go.")
        return torch.full((batch,), slots, dtype=torch.int64, device=device)
    if isinstance(cache_seqlens, int):
        _require(
            0 <= cache_seqlens <= slots - new,
            # Made only for the error: torch.compile puts no symbolic number into a text.
            lambda: f"cache_seqlens is {cache_seqlens}, but the cache holds {slots} keys, {new} of them needed for k.",
        )
        return torch.full((batch,), cache_seqlens, dtype=torch.int64, device=device)
    _require(
        isinstance(cache_seqlens, Tensor)
        and cache_seqlens.shape == (batch,)
        and cache_seqlens.dtype in (torch.int32, torch.int64),
        f"cache_seqlens must be an int or an int32 tensor of shape ({batch},), "
        f"got {describe(cache_seqlens) if isinstance(cache_seqlens, Tensor) else cache_seqlens!r}.",
    )
    _require_values(
        "cache_seqlens", cache_seqlens, 0, slots - new, f"the cache holds {slots} keys, {new} of them for k"
    )
    return cache_seqlens.to(device, torch.int64)


def _append(
    cache: Tensor, new: Tensor, places: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> None:
    """Write ``new`` into the cache at ``places`` ``(batch, seqlen_new)``, in place."""
    if block_table is not None:
        page_size = cache.shape[1]
        pages = block_table.long().gather(1, places // page_size)
        cache[pages, places % page_size] = new
        return
    rows = torch.arange(new.shape[0], device=cache.device) if cache_batch_idx is None else cache_batch_idx.long()
    cache[rows[:, None].expand_as(places), places] = new


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864) of the first ``2 * cos.shape[1]`` dimensions.

    Args:
        x: ``(batch, seqlen, nheads, headdim)``; cos, sin: ``(seqlen_ro, rotary_dim / 2)``.
        places: int64 ``(batch, seqlen)``: the row of ``cos`` for each token.
        interleaved: pairs are neighbours (GPT-J), else halves (GPT-NeoX).
    """
    half = cos.shape[1]
    c, s = (t[places][:, :, None, :].to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)
