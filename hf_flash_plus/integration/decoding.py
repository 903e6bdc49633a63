"""The short way of a decoding step: one query row, no gradient, a mask of flags, row intervals and padding.

Generation asks the same thing of every layer at every token, and in eager mode the host's time per call decides its
speed. A call that was understood, validated and served once is remembered by everything but its data and its number of
keys; later ones go straight to the provider. Whatever is unusual about a call takes the ordinary way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..inputs import AttentionInputs
from ..masks import FULL, AttentionMask
from ..providers.base import DecodingStep
from . import carrier

_Key = tuple[object, ...]
_steps: dict[_Key, DecodingStep | None] = {}


class Candidate(NamedTuple):
    """A call that may take the short way: under which key it is known, and its mask."""

    key: _Key
    mask: AttentionMask


def candidate(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
) -> Candidate | None:
    """The call as a candidate; None where it must take the ordinary way."""
    state = ops.decoding_state(query)
    if state is None:
        return None
    mask = FULL
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        kind: object = (causal, sliding_window)
    elif carrier.is_carrier(attention_mask):
        carried = carrier.attached(attention_mask, 1)
        if carried is None or carried.one_document:
            return None
        mask = carried.mask
        kind = (mask.causal, mask.window, mask.row_intervals is None, mask.key_mask is None, mask.key_holes is None)
    else:
        return None
    head = (query.shape, query.dtype, key.dtype, value.dtype, query.device, key.device, value.device, key.shape[1])
    return Candidate((head, value.shape[3], scaling, softcap, kind, state), mask)


def serve(known: Candidate, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """``out (batch, 1, nheads, v_head_dim)`` of a candidate that is known; None where it is not, or cannot be."""
    step = _steps.get(known.key)
    return None if step is None else step(query, key, value, known.mask)


def remember(new: Candidate, inputs: AttentionInputs) -> None:
    """Prepare the short way for calls like this one, which was just validated."""
    if new.key in _steps:
        return
    if len(_steps) > 1024:
        _steps.clear()
    _steps[new.key] = ops.prepare_decoding(inputs)


def forget() -> None:
    """Drop everything prepared; for tests."""
    _steps.clear()


def plain(kwargs: dict[str, Any]) -> bool:
    """Whether the remaining keyword arguments say nothing that the short way does not know."""
    return not kwargs.get("output_attentions") and kwargs.get("cu_seq_lens_q") is None
