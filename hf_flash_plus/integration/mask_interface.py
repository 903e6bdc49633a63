"""Transformers' mask functions as row intervals: the function registered in ``AttentionMaskInterface``.

Transformers describes a mask as a composed Python function of (batch, head, query, key) indices. The compositions that
it builds itself are recognised by their closures and turned into one interval per row, once per forward, on the device,
without reading a value back. A function that is not recognised (a user's own) is evaluated into a dense mask: slower,
never approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from ..masks import CAUSAL, FULL, TO_LAST_KEY, AttentionMask, intersect_intervals, key_mask_intervals, run_bounds
from . import carrier
from .models import wants_dense_mask


@dataclass(frozen=True)
class Rows:
    """Where the rows of a mask stand: absolute query indices, and the positions that distances are counted in."""

    index: Tensor  # (1, seqlen_q)
    position: Tensor  # (batch or 1, seqlen_q)


@dataclass(frozen=True)
class Spans:
    """Per row, the absolute keys ``[start, end)`` it may see; None is unlimited."""

    start: Tensor | None = None
    end: Tensor | None = None


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """The qualified names of Transformers' inner mask functions, by the factory that makes them."""
    factories = (
        "and_masks",
        "or_masks",
        "sliding_window_overlay",
        "chunked_overlay",
        "blockwise_overlay",
        "sliding_window_bidirectional_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
    )
    inner = {"and_masks": "and_mask", "or_masks": "or_mask"}
    return {f"{name}.<locals>.{inner.get(name, 'inner_mask')}": name for name in factories}


def _kind(function: Callable[..., Any]) -> str | None:
    """Which of Transformers' own mask functions this is; None for a foreign one."""
    if function is masking_utils.causal_mask_function:
        return "causal"
    if function is masking_utils.bidirectional_mask_function:
        return "bidirectional"
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    return _names().get(getattr(function, "__qualname__", ""))


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _later(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.maximum(a, b)


def _earlier(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else torch.minimum(a, b)


def _spans(function: Callable[..., Any], rows: Rows) -> Spans | None:
    """One span of keys per row, equal to the mask function; None where it is not recognised as such."""
    kind = _kind(function)
    if kind == "causal":
        return Spans(end=rows.index + 1)
    if kind == "bidirectional":
        return Spans()
    if kind is None:
        return None
    cells = _closure(function)
    if kind == "sliding_window_overlay":
        return Spans(start=rows.index - cells["sliding_window"] + 1)
    if kind == "sliding_window_bidirectional_overlay":
        window = cells["sliding_window"]
        return Spans(rows.index - window, rows.index + window + 1)
    if kind == "chunked_overlay":
        # Chunks are counted in positions after the left padding; index - position is 0 but for packed documents.
        size, padding = cells["chunk_size"], cells["left_padding"][:, None]
        first = padding + torch.div(rows.position - padding, size, rounding_mode="floor") * size
        first = first + (rows.index - rows.position)
        return Spans(first, first + size)
    if kind == "packed_sequence_mask_function":
        return _runs(cells["packed_sequence_mask"], rows)
    if kind == "remap_positions_for_packed_sequence":
        # Inside a document positions go up by one, so distances in positions are distances in indices.
        positions = cells["position_ids"][:, rows.index[0]]
        return _spans(cells["mask_function"], Rows(rows.index, positions))
    if kind == "and_masks":
        result = Spans()
        for part in cells["mask_functions"]:
            spans = _spans(part, rows)
            if spans is None:
                return None
            result = Spans(_later(result.start, spans.start), _earlier(result.end, spans.end))
        return result
    if kind == "or_masks":
        return _union(cells["mask_functions"], rows)
    return None


def _runs(ids: Tensor, rows: Rows) -> Spans:
    """The run of equal, neighbouring ids that each row stands in."""
    begins = _begins(ids)
    first, end = run_bounds(begins)
    return Spans(first[:, rows.index[0]], end[:, rows.index[0]])


def _begins(ids: Tensor) -> Tensor:
    """True where an id differs from its left neighbour's."""
    return torch.cat((torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]), dim=-1)


def _union(functions: tuple[Callable[..., Any], ...], rows: Rows) -> Spans | None:
    """A causal-like mask joined with blocks that see themselves whole (image tokens): still one span per row.

    Both parts contain the row's own index, so their union has no gap.
    """
    blocks = [f for f in functions if _kind(f) == "blockwise_overlay"]
    others = [f for f in functions if _kind(f) != "blockwise_overlay"]
    if len(blocks) != 1 or len(others) != 1:
        return None
    base = _spans(others[0], rows)
    if base is None or not _contains_diagonal(others[0]):
        return None
    ids = _closure(blocks[0])["block_sequence_ids"]
    runs = _runs(ids, rows)
    assert runs.start is not None and runs.end is not None
    # A block is one run of neighbours in every model; an id that comes back later would need more than an interval.
    # The assertion runs on the device: ids sorted by value must not change run without changing value.
    run = torch.where(ids >= 0, _begins(ids).cumsum(-1), 0)
    order = torch.where(ids >= 0, ids, -1).sort(dim=-1, stable=True)
    run = run.gather(-1, order.indices)
    same_id = order.values[:, 1:] == order.values[:, :-1]
    torch._assert_async(
        (~same_id | (run[:, 1:] == run[:, :-1])).all(),
        "flash_plus: a block of block_sequence_ids is not contiguous; use attn_implementation='sdpa' or 'eager'",
    )
    in_block = ids[:, rows.index[0]] >= 0
    start = None if base.start is None else torch.where(in_block, torch.minimum(base.start, runs.start), base.start)
    end = None if base.end is None else torch.where(in_block, torch.maximum(base.end, runs.end), base.end)
    return Spans(start, end)


def _contains_diagonal(function: Callable[..., Any]) -> bool:
    """Whether every row of a recognised mask function sees the key of its own index."""
    kind = _kind(function)
    if kind == "and_masks":
        return all(_contains_diagonal(part) for part in _closure(function)["mask_functions"])
    if kind in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return bool(_closure(function)["sliding_window"] > 0) or kind == "sliding_window_bidirectional_overlay"
    return kind in ("causal", "bidirectional", "chunked_overlay", "packed_sequence_mask_function")


def _flags(function: Callable[..., Any]) -> AttentionMask | None:
    """The mask as flags alone, where it is plain causal, full, or one of them with a window; else None."""
    kind = _kind(function)
    if kind == "causal":
        return CAUSAL
    if kind == "bidirectional":
        return FULL
    if kind != "and_masks":
        return None
    parts = _closure(function)["mask_functions"]
    kinds = {_kind(part): part for part in parts}
    if len(parts) == 2 and set(kinds) == {"causal", "sliding_window_overlay"}:
        window = _closure(kinds["sliding_window_overlay"])["sliding_window"]
        return AttentionMask(causal=True, window=(window - 1, -1)) if window > 0 else None
    if len(parts) == 2 and set(kinds) == {"bidirectional", "sliding_window_bidirectional_overlay"}:
        window = _closure(kinds["sliding_window_bidirectional_overlay"])["sliding_window"]
        return AttentionMask(window=(window, window))
    return None


def _dense(arguments: dict[str, Any]) -> Tensor | None:
    """The mask as booleans ``(batch, 1, seqlen_q, seqlen_k)``, exactly as ``sdpa`` would get it, never skipped."""
    arguments = {**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = masking_utils.sdpa_mask(**arguments)
    return mask


def _one_token(device: torch.device) -> Tensor:
    """The carrier of one query row that sees every key, made once per device: the mask of most decoding steps."""
    found = _one_token_carriers.get(device)
    if found is None or getattr(found, "_version", 0) != 0:
        with torch.inference_mode(False):
            intervals = torch.tensor([[[0, TO_LAST_KEY]]], dtype=torch.int32, device=device)
            found = carrier.encode(intervals, None, None, carrier.Carried(CAUSAL, plain_causal=False))
        _one_token_carriers[device] = found
    return found


_one_token_carriers: dict[torch.device, Tensor] = {}


def flash_plus_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward, as a carrier of row intervals where it can be, else dense.

    Never None: a missing mask would leave the attention call to guess from ``module.is_causal``, which is wrong in
    several models. The signature is that of Transformers' ``sdpa_mask``.

    Args:
        q_length, kv_length: numbers of query rows and key slots of the attention calls.
        q_offset, kv_offset: absolute index of the first row and key; ``q_offset`` is a 0-d tensor with static caches.
        mask_function: which keys a row sees, by absolute indices.
        attention_mask: bool ``(batch, length)`` padding mask over absolute key indices, or None.

    Returns:
        int32 ``(batch or 1, 1, q_length, columns)`` (see ``carrier.py``) or bool ``(batch, 1, q_length, kv_length)``.
    """
    arguments = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    compiling = torch.compiler.is_compiling()
    if wants_dense_mask(config) or not carrier.fits(q_length, kv_length, attention_mask is not None):
        return _dense(arguments)
    # Dynamo can compare functions but not read their closures: only the two plain kinds are recognised there.
    plain = mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if compiling and not plain:
        return _dense(arguments)
    aligned = not isinstance(q_offset, Tensor) and q_offset - kv_offset + q_length == kv_length
    flags = _flags(mask_function) if aligned and attention_mask is None and not compiling else None
    device = torch.device(device)
    if flags is not None and q_length == 1 and not flags.windowed:
        return _one_token(device)

    index = torch.arange(q_length, device=device)[None] + q_offset
    spans = _spans(mask_function, Rows(index, index))
    if spans is None:
        return _dense(arguments)
    start = torch.zeros_like(index) if spans.start is None else spans.start - kv_offset
    end = torch.full_like(index, kv_length) if spans.end is None else spans.end - kv_offset
    start, end = torch.broadcast_tensors(start, end)
    intervals = torch.stack((start.clamp(min=0), end.clamp(max=kv_length)), dim=-1).to(torch.int32)

    plain_causal = attention_mask is None and q_length == kv_length and q_length > 1 and flags is not None
    if attention_mask is None:
        mask = flags if flags is not None else AttentionMask(row_intervals=intervals)
        return carrier.encode(intervals, None, None, carrier.Carried(mask, plain_causal and flags.causal))
    key_mask = _local_padding(attention_mask, kv_length, kv_offset)
    first, last, holes = key_mask_intervals(key_mask)
    padding = torch.stack((first, last), dim=-1)[:, None, :]
    intervals = intersect_intervals(intervals, padding)
    mask = AttentionMask(row_intervals=intervals, key_mask=key_mask, key_holes=holes)
    return carrier.encode(intervals, key_mask, holes, carrier.Carried(mask, plain_causal=False))


def _local_padding(attention_mask: Tensor, kv_length: int, kv_offset: int | Tensor) -> Tensor:
    """The padding mask of the keys of this call: ``[kv_offset, kv_offset + kv_length)``, absent ones False."""
    if isinstance(kv_offset, Tensor):
        padded = torch.nn.functional.pad(attention_mask, (0, kv_length))
        local = torch.arange(kv_length, device=attention_mask.device) + kv_offset
        return padded[:, local.clamp(max=padded.shape[-1] - 1)].bool()
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()
