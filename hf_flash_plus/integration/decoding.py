"""The short ways of a decoding step: one query row, no gradient, a mask of flags, row intervals and padding.

Generation asks the same thing of every layer at every token, and in eager mode the host's time per call decides its
speed. A call that was understood, validated and served once is remembered by everything but its data and its number of
keys; later ones go straight to the provider (:func:`serve`). The first layer of a token leaves a ticket with the mask,
and the other layers, whose calls look exactly the same, only launch (:func:`short_way`). Whatever is unusual about a
call takes the ordinary way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, settings
from ..inputs import AttentionInputs
from ..masks import FULL, AttentionMask
from ..providers.base import DecodingStep
from . import carrier

_Key = tuple[object, ...]
_steps: dict[_Key, DecodingStep | None] = {}
#: Tickets kept with one mask: a model needs one per kind of layer, but the mask that sees everything lives on.
_MAX_TICKETS = 32


class Candidate(NamedTuple):
    """A call that may take the short way: under which key it is known, its mask, and what the mask came in."""

    key: _Key
    mask: AttentionMask
    carried: carrier.Carried | None


def short_way(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor | None:
    """``out (batch, 1, nheads, v_head_dim)`` of a call that looks exactly like one served before with the same mask;
    None where there was none, or where somebody wants to see each call."""
    found = getattr(attention_mask, carrier.ATTRIBUTE, None)
    if found is None or not found[0].tickets:
        return None
    if carrier.version(attention_mask) != found[1]:
        return None  # changed since: the ordinary way says so
    if not ops.undisturbed(query, key, value):
        return None
    ticket = found[0].tickets.get(_signature(query, key, value, scaling, softcap))
    return None if ticket is None else ticket(query, key, value)


def _signature(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None) -> _Key:
    """All of a call but its data and its mask, and who is asked to serve."""
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        scaling, softcap, settings.selection(),
    )  # fmt: skip


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
    if not ops.undisturbed(query, key, value):
        return None
    mask, carried = FULL, None
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
    return Candidate((head, value.shape[3], scaling, softcap, kind, settings.selection()), mask, carried)


def serve(known: Candidate, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """``out (batch, 1, nheads, v_head_dim)`` of a candidate that is known; None where it is not, or cannot be."""
    step = _steps.get(known.key)
    served = None if step is None else step(query, key, value, known.mask)
    if served is None:
        return None
    out, ticket = served
    if ticket is not None and known.carried is not None:
        tickets = known.carried.tickets
        if len(tickets) >= _MAX_TICKETS:
            tickets.clear()
        _, _, scaling, softcap, *_ = known.key
        tickets[_signature(query, key, value, scaling, softcap)] = ticket  # type: ignore[arg-type]
    return out


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
