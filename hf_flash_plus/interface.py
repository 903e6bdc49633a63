"""The flash-attn compatible functions: flash-attn 2.8's names, parameters, order, defaults and return values.

Tensors are ``(batch, seqlen, nheads, headdim)``, or ``(total, nheads, headdim)`` for the ``varlen`` functions.
Source of the interface: ``flash_attn/flash_attn_interface.py`` of flash-attn 2.8; ``s_aux`` (attention sinks) is as
in flash-attn 3. Beyond flash-attn: fp32 and fp64 inputs, head dims of values that differ from the queries', CPU
tensors, and masks of any kind through :func:`attention`.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, settings
from .dispatch import NoProviderError
from .inputs import (
    AttentionInputs,
    _require,
    _require_values,
    describe,
    integer,
    readable,
    real,
    require_strided,
    require_window,
    validate,
)
from .masks import TO_LAST_KEY, AttentionMask, PackedSequences, varlen_mask
from .paged import gather_pages, require_pages, validate_pages


def _last_contiguous(x: Any) -> Any:
    """flash-attn copies a tensor whose last dimension is not contiguous; so do we. Other strides are free."""
    return x.contiguous() if isinstance(x, Tensor) and x.dim() and x.stride(-1) != 1 else x


def _window(window_size: Any) -> tuple[int, int]:
    try:
        left, right = (-1 if w is None else operator.index(w) for w in window_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"window_size must be a pair of integers (left, right), -1 meaning unlimited, got {window_size!r}."
        ) from None
    require_window((left, right))
    return _bounded(left, right)


def _bounded(left: int, right: int) -> tuple[int, int]:
    """The same window with sides that a key's number can be added to in int64."""
    return min(left, TO_LAST_KEY), min(right, TO_LAST_KEY)


def _plain_window(mask: AttentionMask) -> AttentionMask:
    """The same mask, with integers of other libraries in its window as ints."""
    window = mask.window
    if not isinstance(window, tuple) or len(window) != 2:
        return mask
    left, right = integer(window[0]), integer(window[1])
    if not (isinstance(left, int) and isinstance(right, int)):
        return mask  # which is refused
    left, right = _bounded(left, right)
    return mask if left is window[0] and right is window[1] else replace(mask, window=(left, right))


def _softmax_scale(q: Any, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return float(q.shape[-1] ** -0.5) if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0
    scale: float = real(softmax_scale)
    return scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
    caller: str = "attention",
) -> Any:
    """Attention under any :class:`~hf_flash_plus.masks.AttentionMask`; the function the others are made of.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``, fp16, bf16, fp32 or fp64.
        k: ``(batch, seqlen_k, nheads_k, headdim)``, the dtype and device of ``q``.
        v: ``(batch, seqlen_k, nheads_k, v_headdim)``.
        mask: what each row sees.
        softmax_scale: factor on the scores; None is ``headdim ** -0.5``.
        softcap: ``softcap * tanh(scores / softcap)``; 0 is off.
        alibi_slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``.
        s_aux: attention sinks, ``(nheads,)`` or ``(batch, nheads, seqlen_q)``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        deterministic: only bitwise repeatable gradients.
        return_lse: also return ``softmax_lse``, fp32 ``(batch, nheads, seqlen_q)``; it has no gradient.

    Returns:
        ``out`` ``(batch, seqlen_q, nheads, v_headdim)``, or ``(out, softmax_lse)``.

    Raises:
        TypeError, ValueError: malformed arguments.
        NoProviderError: no provider can serve the call.
    """
    inputs = _inputs(
        q,
        k,
        v,
        _plain_window(mask),
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        s_aux=s_aux,
        dropout_p=dropout_p,
        deterministic=deterministic,
        needs_lse=return_lse,
    )
    output = ops.attention(inputs, caller)
    return (output.out, output.softmax_lse) if return_lse else output.out


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    s_aux: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    needs_lse: bool,
) -> AttentionInputs:
    """The call as validated data."""
    try:
        q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    except RuntimeError:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require_strided(name, tensor)
        raise
    inputs = AttentionInputs(
        q,
        k,
        v,
        _softmax_scale(q, softmax_scale),
        mask,
        real(softcap),
        alibi_slopes,
        s_aux,
        real(dropout_p),
        deterministic=bool(deterministic) or settings.deterministic(),
        needs_lse=needs_lse,
    )
    if all(isinstance(t, Tensor) for t in (q, k, v)) and not q.dtype == k.dtype == v.dtype:
        inputs = ops._autocast(inputs)  # brings different dtypes together, where it is enabled
    validate(inputs)
    return inputs


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention of dense batches (flash-attn 2.8's ``flash_attn_func``).

    With ``causal=True`` the mask is aligned to the bottom right. For seqlen_q = 2 and seqlen_k = 5 it keeps (1)::

        1 1 1 1 0
        1 1 1 1 1

    and for seqlen_q = 5 and seqlen_k = 2 (rows that see nothing give 0)::

        0 0
        0 0
        0 0
        1 0
        1 1

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k: ``(batch, seqlen_k, nheads_k, headdim)``; ``nheads`` must be a multiple of ``nheads_k`` (GQA, MQA).
        v: ``(batch, seqlen_k, nheads_k, v_headdim)``.
        dropout_p: probability of dropping an attention weight; pass 0.0 when evaluating.
        softmax_scale: factor on the scores; None is ``headdim ** -0.5``.
        causal: hide the future.
        window_size: ``(left, right)``, -1 unlimited: row i sees keys within
            ``[i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q + right]``.
        softcap: ``softcap * tanh(scores / softcap)``; 0 is off.
        alibi_slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``: adds ``-slope * |i + seqlen_k - seqlen_q - j|``.
        deterministic: only bitwise repeatable gradients.
        return_attn_probs: for tests: also return the log-sum-exp and, with dropout, the weights.
        s_aux: attention sinks ``(nheads,)`` (flash-attn 3): one more logit in each row's softmax.

    Returns:
        ``out`` ``(batch, seqlen_q, nheads, v_headdim)``; or, with ``return_attn_probs``,
        ``(out, softmax_lse, S_dmask)``: ``softmax_lse`` fp32 ``(batch, nheads, seqlen_q)``, which has no gradient
        (as in flash-attn), and ``S_dmask`` the weights after dropout ``(batch, nheads, seqlen_q, seqlen_k)``, dropped
        ones 0, empty without dropout.

    Raises:
        TypeError, ValueError: malformed arguments (which one, what came, what is allowed).
        NoProviderError: no provider can serve the call (all reasons).
        NotImplementedError: through a kernel, forward-mode differentiation, a second derivative (when it is computed),
            or a transform of ``torch.func`` in ``torch.compile(fullgraph=True)``; ``use_provider("reference")`` has
            them.

    Example:
        >>> import torch
        >>> from hf_flash_plus import flash_attn_func
        >>> q, k, v = torch.randn(3, 2, 8, 4, 16).unbind(0)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 8, 4, 16])
    """
    return _dense_call(
        "flash_attn_func",
        q,
        k,
        v,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
    )


class _Options(NamedTuple):
    """The arguments that all functions share, as the caller gave them, in flash-attn's order."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    s_aux: Tensor | None


def _dense_call(
    caller: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: _Options,
    mask: AttentionMask | None = None,
    unwritten: bool = False,
) -> Any:
    """One call on 4-D tensors; the mask is made of ``causal`` and ``window_size`` unless it is given. ``unwritten``: as
    of :func:`~hf_flash_plus.ops.attention`."""
    if mask is None:
        mask = AttentionMask(causal=bool(options.causal), window=_window(options.window_size))
    needs_lse = bool(options.return_attn_probs)
    inputs = _inputs(
        q,
        k,
        v,
        mask,
        softmax_scale=options.softmax_scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        s_aux=options.s_aux,
        dropout_p=options.dropout_p,
        deterministic=options.deterministic,
        needs_lse=needs_lse,
    )
    if not needs_lse:
        return ops.attention(inputs, caller, unwritten).out
    if not options.dropout_p:
        output = ops.attention(inputs, caller, unwritten)
        return output.out, output.softmax_lse, output.out.new_empty(0)
    # Only the reference forms the weights; kernels that never do cannot return them.
    forced = settings.forced_provider()
    if forced not in (None, "reference"):
        raise NoProviderError(
            f"return_attn_probs with dropout needs the weights, which only provider 'reference' forms, but "
            f"{forced!r} is forced; drop return_attn_probs, or force 'reference'."
        )
    with settings.provider_override("reference"):
        output = ops.attention(inputs, caller, unwritten)
    return output.out, output.softmax_lse, output.probabilities


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_func` on ``qkv`` ``(batch, seqlen, 3, nheads, headdim)``; the other arguments are the same."""
    q, k, v = _unpack("qkv", qkv, 5, 2, 3)
    return _dense_call(
        "flash_attn_qkvpacked_func",
        q,
        k,
        v,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_func` on ``kv`` ``(batch, seqlen_k, 2, nheads_k, headdim)``; all else is the same."""
    k, v = _unpack("kv", kv, 5, 2, 2)
    return _dense_call(
        "flash_attn_kvpacked_func",
        q,
        k,
        v,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
    )


def _unpack(name: str, packed: Any, dims: int, dim: int, count: int) -> tuple[Tensor, ...]:
    """The views of a packed tensor along ``dim``."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(packed).__name__}.")
    _require(
        packed.dim() == dims and packed.shape[dim] == count,
        f"{name} must have {dims} dimensions with {count} in dimension {dim} "
        f"({'(batch, seqlen, ' if dims == 5 else '(total, '}{count}, nheads, headdim)), got {describe(packed)}.",
    )
    return packed.unbind(dim)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """Attention of sequences of different lengths, packed without padding (flash-attn 2.8's function of this name).

    Args:
        q: ``(total_q, nheads, headdim)``: the sequences one after another.
        k: ``(total_k, nheads_k, headdim)``; with ``block_table`` ``(num_blocks, page_block_size, nheads_k, headdim)``.
        v: as ``k``, with its own headdim.
        cu_seqlens_q, cu_seqlens_k: int32 ``(nseqs + 1,)``, on the device of ``q``: where each sequence begins.
        max_seqlen_q, max_seqlen_k: the longest lengths (bounds; not read by the Triton kernels).
        alibi_slopes: fp32 ``(nheads,)``; distances are counted within each sequence. (flash-attn's
            ``(nseqs, nheads)`` is refused: each packed sequence having slopes of its own is not supported.)
        block_table: int32 ``(nseqs, max_blocks)``: the pages of each sequence's keys, gathered into a copy.
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs, s_aux:
            as in :func:`flash_attn_func`, within each sequence.

    Returns:
        ``out`` ``(total_q, nheads, v_headdim)``; or, with ``return_attn_probs``, ``(out, softmax_lse, S_dmask)``
        with ``softmax_lse`` fp32 ``(nheads, total_q)``, without a gradient. Rows at or beyond ``cu_seqlens_q[-1]``
        give 0.

    Raises:
        TypeError, ValueError: malformed arguments.
        NoProviderError: no provider can serve the call.
    """
    return _varlen_call(
        "flash_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
        block_table,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_varlen_func` on ``qkv`` ``(total, 3, nheads, headdim)``; the other arguments are the same."""
    q, k, v = _unpack("qkv", qkv, 4, 1, 3)
    return _varlen_call(
        "flash_attn_varlen_qkvpacked_func",
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Any:
    """:func:`flash_attn_varlen_func` on ``kv`` ``(total_k, 2, nheads_k, headdim)``; all else is the same."""
    k, v = _unpack("kv", kv, 4, 1, 2)
    return _varlen_call(
        "flash_attn_varlen_kvpacked_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        _Options(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            s_aux,
        ),
    )


def _validate_cu_seqlens(name: str, cu: Any, device: torch.device, total: int | None, max_seqlen: Any) -> None:
    """Check cumulative lengths over ``total`` rows; their values on the CPU only, where that costs no waiting."""
    longest = "max_seqlen" + name.removeprefix("cu_seqlens")
    if not isinstance(cu, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu).__name__}.")
    _require(
        cu.dtype == torch.int32 and cu.dim() == 1 and cu.shape[0] >= 1,
        f"{name} must be torch.int32 of shape (nseqs + 1,), got {describe(cu)}.",
    )
    _require(cu.device == device, f"{name} is on {cu.device}, but q is on {device}.")
    if torch.compiler.is_compiling():
        return
    known = isinstance(max_seqlen, int) and not isinstance(max_seqlen, bool)
    _require(
        (known and max_seqlen >= 0)
        or (isinstance(max_seqlen, Tensor) and max_seqlen.numel() == 1 and not max_seqlen.dtype.is_floating_point),
        f"{longest} must be an integer >= 0 that no sequence exceeds, got {max_seqlen!r}.",
    )
    if not readable(cu):
        return
    ends = cu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    _require(
        ends[0] == 0 and min(lengths, default=0) >= 0,
        lambda: f"{name} must begin with 0 and never fall, got {ends if len(ends) < 20 else [*ends[:20], '...']}.",
    )
    _require(
        total is None or ends[-1] <= total, lambda: f"{name} ends at {ends[-1]}, but there are {total} rows to divide."
    )
    _require(
        not known or max(lengths, default=0) <= max_seqlen,
        lambda: f"{longest} is {max_seqlen}, but the longest sequence of {name} has {max(lengths)}.",
    )


def _may_have_tail(cu_seqlens: Tensor, rows: Tensor) -> bool:
    """Whether there may be rows behind the last sequence."""
    return not readable(cu_seqlens) or int(cu_seqlens[-1]) < rows.shape[0]


def _varlen_call(
    caller: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: _Options,
    block_table: Tensor | None = None,
) -> Any:
    max_seqlen_q, max_seqlen_k = integer(max_seqlen_q), integer(max_seqlen_k)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        require_strided(name, tensor)
        paged = block_table is not None and name != "q"
        _require(
            tensor.dim() == (4 if paged else 3),
            f"{name} must be "
            f"{'(num_blocks, page_block_size, nheads_k, headdim)' if paged else '(total, nheads, headdim)'}, "
            f"got {describe(tensor)}.",
        )
    _validate_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device, q.shape[0], max_seqlen_q)
    keys = None if block_table is not None else k.shape[0]
    _validate_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device, keys, max_seqlen_k)
    _require(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"cu_seqlens_q and cu_seqlens_k must have one length, got {tuple(cu_seqlens_q.shape)} and "
        f"{tuple(cu_seqlens_k.shape)}.",
    )
    nseqs = cu_seqlens_q.shape[0] - 1
    slopes, causal, window = options.alibi_slopes, bool(options.causal), _window(options.window_size)
    if isinstance(slopes, Tensor) and slopes.dim() == 2:
        _require(
            slopes.shape[0] == 1,
            f"alibi_slopes of shape {tuple(slopes.shape)}: slopes that differ between packed sequences are not "
            "supported; pass one (nheads,) tensor for all, or a padded batch to flash_attn_func.",
        )
    packed = None
    used = None
    if block_table is not None:
        validate_pages("k", k, block_table)
        validate_pages("v", v, block_table)
        _require(k.shape[:2] == v.shape[:2], f"k and v must have the same pages, got {describe(k)} and {describe(v)}.")
        _require(
            block_table.shape[0] == nseqs,
            f"block_table has {block_table.shape[0]} rows, but cu_seqlens_q describes {nseqs} sequences.",
        )
        used = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        slots = block_table.shape[1] * k.shape[1]
        _require_values("cu_seqlens_k", used, 0, slots, "keys that the pages of a sequence hold; the lengths are")
        require_pages(block_table, used, k)
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
        cu_seqlens_k = torch.arange(nseqs + 1, dtype=torch.int32, device=q.device) * k.shape[1]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    elif slopes is None:
        if torch.compiler.is_compiling():  # only bounds, and no op takes tensors for them
            max_seqlen_q = q.shape[0] if isinstance(max_seqlen_q, Tensor) else max_seqlen_q
            max_seqlen_k = k.shape[0] if isinstance(max_seqlen_k, Tensor) else max_seqlen_k
        packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window)
    mask = varlen_mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], causal=causal, window=window, seqused_k=used)
    mask = replace(mask, packed=packed, row_positions=None if slopes is None else mask.row_positions)
    unwritten = block_table is not None or _may_have_tail(cu_seqlens_q, q) or _may_have_tail(cu_seqlens_k, k)
    result = _dense_call(caller, q[None], k[None], v[None], options, mask, unwritten)
    if not options.return_attn_probs:
        return result[0]
    out, lse, weights = result
    return out[0], lse[0], weights[0] if weights.dim() == 4 else weights
