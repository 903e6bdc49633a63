"""Removing and restoring padding: flash-attn's ``bert_padding`` (``flash_attn/bert_padding.py`` of 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import _require, describe


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]`` along the first axis, differentiable: ``(total, ...)`` and ``(n,)`` to ``(n, ...)``."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding of a batch.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask: ``(batch, seqlen)``, bool or int, nonzero for real tokens.
        unused_mask: ``(batch, seqlen)``: tokens allocated but not used; they are kept, but not counted as used.

    Returns:
        ``(tokens (total, ...), indices int64 (total,), cu_seqlens int32 (batch + 1,), max_seqlen,
        seqused int32 (batch,))``; ``max_seqlen`` is read from the device.

    Raises:
        ValueError: the shapes do not fit.
    """
    _require(
        hidden_states.dim() >= 2 and attention_mask.shape == hidden_states.shape[:2],
        f"attention_mask must be (batch, seqlen) of hidden_states {describe(hidden_states)}, "
        f"got {describe(attention_mask)}.",
    )
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, used.sum(dim=-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put tokens back into a padded batch, zeros elsewhere: the inverse of :func:`unpad_input`.

    Args:
        hidden_states: ``(total, ...)``; indices: int64 ``(total,)`` as :func:`unpad_input` returned them.

    Returns:
        ``(batch, seqlen, ...)``.
    """
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
