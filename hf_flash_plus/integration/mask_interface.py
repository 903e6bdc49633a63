"""Transformers' mask functions as row intervals: the function registered in ``AttentionMaskInterface``.

Transformers describes a mask as a composed Python function of (batch, head, query, key) indices. The compositions that
it builds itself are recognised by their closures and turned into one interval per row, once per forward, on the device,
without reading a value back. A function that is not recognised (a user's own) is evaluated into a dense mask: slower,
never approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from .. import ops
from ..masks import CAUSAL, FULL, TO_LAST_KEY, AttentionMask, intersect_intervals, key_mask_intervals, run_bounds
from ..providers import PROVIDERS
from . import carrier
from .models import dense_mask_kind, skips_padded_rows

#: Device types on which the mask of a single row stays dense.
DENSE_ONE_ROW = frozenset({"cpu"})


@dataclass(frozen=True)
class Rows:
    """Where the rows of a mask stand: absolute query indices, and the positions that distances are counted in."""

    index: Tensor  # (1, seqlen_q)
    position: Tensor  # (batch or 1, seqlen_q)
    padding: Tensor | None = None  # bool (batch, length): the real keys, by absolute index


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
        first, end = run_bounds(_begins(cells["packed_sequence_mask"]))
        return Spans(first[:, rows.index[0]], end[:, rows.index[0]])
    if kind == "remap_positions_for_packed_sequence":
        # Inside a document positions go up by one, so distances in positions are distances in indices.
        positions = cells["position_ids"][:, rows.index[0]]
        return _spans(cells["mask_function"], Rows(rows.index, positions, rows.padding))
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
    begins = _block_begins(ids, rows.padding)
    _assert_contiguous(ids, begins, rows.padding)
    block_start, block_end = (bound[:, rows.index[0]] for bound in run_bounds(begins))
    in_block = ids[:, rows.index[0]] >= 0
    start = None if base.start is None else torch.where(in_block, torch.minimum(base.start, block_start), base.start)
    end = None if base.end is None else torch.where(in_block, torch.maximum(base.end, block_end), base.end)
    return Spans(start, end)


def _block_begins(ids: Tensor, padding: Tensor | None) -> Tensor:
    """True where a block begins among the real tokens: padding neither begins nor interrupts one."""
    if padding is None:
        return _begins(ids)
    real = _fit(padding, ids.shape[-1])
    index = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    last_real = torch.where(real, index, -1).cummax(dim=-1).values
    previous = torch.cat((torch.full_like(last_real[:, :1], -1), last_real[:, :-1]), dim=-1)
    changed = (previous < 0) | (ids != ids.gather(-1, previous.clamp(min=0)))
    return (real & changed) | (index == 0)


def _fit(padding: Tensor, length: int) -> Tensor:
    """A padding mask cut or extended (by padding) to a length."""
    return torch.nn.functional.pad(padding.bool(), (0, max(0, length - padding.shape[-1])))[:, :length]


def _assert_contiguous(ids: Tensor, begins: Tensor, padding: Tensor | None) -> None:
    """Check on the device that no block comes back after another: one interval could not say so."""
    counted = ids >= 0 if padding is None else (ids >= 0) & _fit(padding, ids.shape[-1])
    order = torch.where(counted, ids, -1).sort(dim=-1, stable=True)
    run = begins.cumsum(-1).gather(-1, order.indices)
    comes_back = (
        (order.values[:, 1:] >= 0) & (order.values[:, 1:] == order.values[:, :-1]) & (run[:, 1:] != run[:, :-1])
    )
    torch._assert_async(
        ~comes_back.any(),
        "flash_plus: a block of block_sequence_ids is not contiguous; use attn_implementation='sdpa' or 'eager'",
    )


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
    watched = ops.watched()  # by FakeTensorMode or its like: what is made there is of no use outside, nor the reverse
    found = None if watched else _one_token_carriers.get(device)
    if found is None or getattr(found, "_version", 0) != 0:
        with torch.inference_mode(False):
            intervals = torch.tensor([[[0, TO_LAST_KEY]]], dtype=torch.int32, device=device)
            found = carrier.encode(intervals, None, None, carrier.Carried(CAUSAL))
        if not watched:
            _one_token_carriers[device] = found
    return found


def _launches_on(device: torch.device) -> bool:
    """Whether a kernel can be launched there: launches go to the current device."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()


def _one_row(
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device,
) -> Tensor | None:
    """The carrier of one query row over padded keys or the slots of a static cache, made by one kernel; None where that
    does not apply."""
    flags = _flags(mask_function)
    if flags is None or flags.window[1] >= 0 or kv_length == 0:
        return None
    if isinstance(q_offset, Tensor):
        if not flags.causal or q_offset.numel() != 1 or q_offset.is_floating_point() or q_offset.device != device:
            return None
    elif not flags.causal:
        q_offset = kv_offset + kv_length - 1
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.device != device):
        return None
    if not _launches_on(device):
        return None
    if device not in _one_row_devices:
        if PROVIDERS["triton"].unavailable_reason() is not None:
            return None
        _one_row_devices.add(device)  # that Triton can compile is looked for on the disk: not at every token
    from ..kernels.padding import NO_WINDOW, padding

    window = flags.window[0] + 1 if flags.windowed else NO_WINDOW
    made = padding(attention_mask, kv_length, kv_offset, q_offset, window, device)
    if attention_mask is None:
        return carrier.attach(made.carrier, carrier.Carried(AttentionMask(row_intervals=made.intervals)))
    whole = kv_offset == 0 and attention_mask.shape[-1] == kv_length
    key_mask = attention_mask if whole else _local_padding(attention_mask, kv_length, kv_offset)
    mask = AttentionMask(row_intervals=made.intervals, key_mask=key_mask, key_holes=made.holes)
    return carrier.attach(made.carrier, carrier.Carried(mask))


_one_token_carriers: dict[torch.device, Tensor] = {}
_one_row_devices: set[torch.device] = set()


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
        int32 ``(batch or 1, 1, q_length, columns)`` (see ``carrier.py``) or bool ``(batch, 1, q_length, kv_length)``
        (inside a graph that of ``carrier.IN_GRAPH``).
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
    dense_kind = dense_mask_kind(config)
    if dense_kind == "additive":
        additive: Tensor = masking_utils.eager_mask(**arguments)
        return additive
    must_be_dense = dense_kind == "bool" or (dense_kind == "one row" and q_length == 1)
    if must_be_dense or not carrier.fits(q_length, kv_length, attention_mask is not None):
        return _dense(arguments)
    # Dynamo can compare functions but not read their closures: only the two plain kinds are recognised there.
    plain = mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    if compiling and not plain:
        dense = _dense(arguments)
        rows_are_keys = not isinstance(q_offset, Tensor) and q_length == kv_length and q_length > 1
        return dense.to(carrier.IN_GRAPH) if dense is not None and rows_are_keys else dense
    aligned = not isinstance(q_offset, Tensor) and q_offset - kv_offset + q_length == kv_length
    device = torch.device(device)
    if q_length == 1 and not compiling:
        flags = _flags(mask_function) if aligned and attention_mask is None else None
        if flags is not None and (not flags.windowed or (flags.causal and kv_length <= flags.window[0] + 1)):
            return _one_token(device)  # the whole window is there to be seen: a sliding cache keeps no more
        if device.type in DENSE_ONE_ROW:
            return _dense(arguments)  # one row: as small as a carrier, and what torch's SDPA takes as it is
        if not isinstance(kv_offset, Tensor):
            found = _one_row(mask_function, attention_mask, kv_length, q_offset, kv_offset, device)
            if found is not None:
                return found

    index = torch.arange(q_length, device=device)[None] + q_offset
    spans = _spans(mask_function, Rows(index, index, attention_mask))
    if spans is None:
        return _dense(arguments)
    intervals = _intervals(spans, index, kv_length, kv_offset)
    if attention_mask is None:
        if aligned and not compiling:
            return _unpadded(mask_function, intervals, kv_length)
        one_document = aligned and q_length == kv_length > 1 and _one_document(mask_function)
        carried = carrier.Carried(AttentionMask(row_intervals=intervals), one_document)
        return carrier.encode(intervals, None, None, carried)
    key_mask = _local_padding(attention_mask, kv_length, kv_offset)
    first, last, holes = key_mask_intervals(key_mask)
    has_holes, n_rows, row_ends = True, None, None
    if not compiling and q_length > 1 and _may_look(attention_mask, device):
        has_holes, has_padding, n_rows = _look(first, last, holes, kv_length)
        if not has_padding and aligned:
            return _unpadded(mask_function, intervals, kv_length)
    padding = torch.stack((first, last), dim=-1)[:, None, :]
    intervals = intersect_intervals(intervals, padding)
    if aligned and q_length == kv_length and skips_padded_rows(config):
        # Only rows after the last real token: a first token that is padding may still be what a model pools by.
        starts, ends = intervals.unbind(-1)
        rows = torch.arange(q_length, device=device)
        intervals = torch.stack((starts, torch.where(rows < last[:, None], ends, starts)), dim=-1)
        row_ends = last
    if not has_holes:
        mask = AttentionMask(row_intervals=intervals)
        return carrier.encode(intervals, None, None, carrier.Carried(mask, row_ends=row_ends, n_rows=n_rows))
    mask = AttentionMask(row_intervals=intervals, key_mask=key_mask, key_holes=holes)
    return carrier.encode(intervals, key_mask, holes, carrier.Carried(mask, row_ends=row_ends))


def _unpadded(mask_function: Callable[..., Any], intervals: Tensor, kv_length: int) -> Tensor:
    """The carrier of a mask without padding whose last row is that of the last key, made outside of compiled code."""
    flags = _flags(mask_function)
    mask = flags if flags is not None else AttentionMask(row_intervals=intervals)
    one_document = intervals.shape[1] == kv_length > 1 and _one_document(mask_function)
    repack = partial(_repacked, mask_function) if one_document else None
    return carrier.encode(intervals, None, None, carrier.Carried(mask, one_document, repack))


#: Where a look at the padding pays: it lets the fastest kernels serve, those without a mask over the keys, and tells a
#: mask of ones from padding, so that packed documents beside it are kept apart.
LOOK_AT_PADDING = frozenset({"cuda", "cpu"})


def _may_look(attention_mask: Tensor, device: torch.device) -> bool:
    if device.type not in LOOK_AT_PADDING or type(attention_mask) is not Tensor:  # a FakeTensor has no values
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _look(first: Tensor, last: Tensor, holes: Tensor, kv_length: int) -> tuple[bool, bool, int]:
    """Whether there are holes in the padding, whether there is any padding, and how many tokens there are up to the
    last real one of each row: one wait for the device in a forward (sdpa's mask waits as well), not in a decoding step.
    """
    padded = (first > 0) | (last < kv_length)
    has_holes, has_padding, count = torch.stack(((holes != 0).any(), padded.any(), last.sum())).tolist()
    return bool(has_holes), bool(has_holes or has_padding), int(count)


def _intervals(spans: Spans, index: Tensor, kv_length: int, kv_offset: int | Tensor) -> Tensor:
    """Spans of absolute keys as row intervals of the call's own keys."""
    start = torch.zeros_like(index) if spans.start is None else spans.start - kv_offset
    end = torch.full_like(index, kv_length) if spans.end is None else spans.end - kv_offset
    start, end = torch.broadcast_tensors(start, end)
    return torch.stack((start.clamp(min=0), end.clamp(max=kv_length)), dim=-1).to(torch.int32)


def _one_document(function: Callable[..., Any]) -> bool:
    """Whether a mask function is causal and takes the whole row for one document."""
    kind = _kind(function)
    if kind == "and_masks":
        parts = _closure(function)["mask_functions"]
        return any(_one_document(part) for part in parts) and all(
            _kind(part) in ("causal", "sliding_window_overlay", "chunked_overlay") or _one_document(part)
            for part in parts
        )
    return kind == "causal"


def _repacked(function: Callable[..., Any], position_ids: Tensor) -> AttentionMask:
    """The mask that Transformers makes of the same function when it finds packed ``position_ids``."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    documents = (steps != 1).cumsum(-1)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        packed = masking_utils.packed_sequence_compatibility_function(function, position_ids, documents)
    else:  # Transformers 5.17
        packed = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(documents))
    length = position_ids.shape[-1]
    index = torch.arange(length, device=position_ids.device)[None]
    spans = _spans(packed, Rows(index, index))
    assert spans is not None
    return AttentionMask(row_intervals=_intervals(spans, index, length, 0))


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
