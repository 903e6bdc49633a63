"""The provider ``reference``: eager attention in plain PyTorch, the oracle of the tests.

It forms the whole matrix of scores, so memory grows with ``seqlen_q * seqlen_k``. It serves everything, on every
device, in every dtype (float64 too: ``torch.autograd.gradcheck`` passes), and comes last in every path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import DTYPES, AttentionInputs
from ..masks import additive, visible
from .base import ALL_FEATURES, AttentionOutput, Provider


def alibi_bias(inputs: AttentionInputs) -> Tensor:
    """``-slope * |diagonal - j|``, fp32 ``(batch or 1, nheads, seqlen_q, seqlen_k)`` (flash-attn's)."""
    device = inputs.query.device
    slopes = inputs.alibi_slopes
    assert slopes is not None
    if inputs.mask.row_positions is not None:
        diagonal = inputs.mask.row_positions.long()
    else:
        diagonal = torch.arange(inputs.seqlen_q, device=device)[None] + (inputs.seqlen_k - inputs.seqlen_q)
    distance = (diagonal[:, None, :, None] - torch.arange(inputs.seqlen_k, device=device)).abs()
    slopes = slopes[None] if slopes.dim() == 1 else slopes
    return -slopes[:, :, None, None] * distance


def row_sinks(sinks: Tensor) -> Tensor:
    """Sinks as ``(batch or 1, nheads, seqlen_q or 1, 1)``, ready to stand beside the scores."""
    return sinks[None, :, None, None] if sinks.dim() == 1 else sinks[..., None]


class ReferenceProvider(Provider):
    name = "reference"
    summary = "eager PyTorch: serves everything, slowly, with memory quadratic in the sequence length"
    differentiable = True
    reads_hidden_keys = True
    dtypes = frozenset(DTYPES)
    max_head_dim = 2**31
    features = ALL_FEATURES

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        q, k, v = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
        compute = torch.promote_types(q.dtype, torch.float32)
        if inputs.nheads != inputs.nheads_k:
            groups = inputs.nheads // inputs.nheads_k
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q.to(compute) @ k.to(compute).transpose(-1, -2)) * inputs.softmax_scale
        if inputs.softcap:
            scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
        if inputs.alibi_slopes is not None:
            scores = scores + alibi_bias(inputs)
        bias = additive(inputs.mask)
        if bias is not None:
            scores = scores + bias.to(compute)
        seen = visible(inputs.mask, inputs.seqlen_q, inputs.seqlen_k, q.device)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        sinks = inputs.sinks
        # log-sum-exp by hand: with no visible key and no sink the row is empty, and its weights are 0, not NaN.
        top = (
            scores.detach().amax(dim=-1, keepdim=True)
            if inputs.seqlen_k
            else scores.new_full((*scores.shape[:-1], 1), float("-inf"))
        )
        if sinks is not None:
            top = torch.maximum(top, row_sinks(sinks.detach()).to(compute))
        top = top.masked_fill(top == float("-inf"), 0.0)
        weights = torch.exp(scores - top)
        total = weights.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(row_sinks(sinks).to(compute) - top)
        empty = total == 0
        probabilities = weights / total.masked_fill(empty, 1.0)
        lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, float("-inf")).squeeze(-1)
        dropped = torch.nn.functional.dropout(probabilities, inputs.dropout_p) if inputs.dropout_p else probabilities
        if seen is not None:
            # A weight of 0 must hide its value even where memory there holds NaN or inf.
            v = v.to(compute).masked_fill(~seen.any(dim=(1, 2))[:, None, :, None], 0.0)
        out = dropped @ v.to(compute)
        return AttentionOutput(out.transpose(1, 2).to(q.dtype).contiguous(), lse.float(), dropped)
