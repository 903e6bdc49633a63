"""What is right: attention from its definition, on a call told densely, in float64 or in any other dtype.

Nothing of what is being checked is used here: no mask language, no provider. A call is dense tensors, who sees whom
as booleans, and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """One attention call, told in full.

    Attributes:
        q: ``(batch, seqlen_q, nheads, head_dim)``.
        k, v: ``(batch, seqlen_k, nheads_k, head_dim or v_head_dim)``.
        seen: bool, broadcastable to ``(batch, nheads, seqlen_q, seqlen_k)``; None is everything.
        bias: floating, broadcastable to the same; added to the scaled scores.
        sinks: ``(nheads,)`` or ``(batch, nheads, seqlen_q)``: one more logit in each row's softmax.
        slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``; ``distance`` integer, broadcastable as ``seen``: ALiBi adds
            ``-slope * distance``.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off.
        scale: factor on the scores; None is ``head_dim ** -0.5``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    distance: Tensor | None = None
    softcap: float = 0.0
    scale: float | None = None

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have gradients, by name."""
        named = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "sinks": self.sinks}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, gradients: bool = False) -> Dense:
        """The same call elsewhere or in another dtype, as new leaves; slopes stay as they are."""
        moved: dict[str, Tensor] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                continue
            tensor = tensor.detach().to(device)
            if field.name in ("q", "k", "v", "bias", "sinks"):
                tensor = tensor.to(tensor.dtype if dtype is None else dtype).requires_grad_(gradients)
            moved[field.name] = tensor
        return replace(self, **moved)


class Answer(NamedTuple):
    """``out`` ``(batch, seqlen_q, nheads, v_head_dim)`` and the log-sum-exp ``(batch, nheads, seqlen_q)``."""

    out: Tensor
    lse: Tensor


def attention(call: Dense) -> Answer:
    """Attention by definition, in the dtype of the call's tensors; rows that see nothing give 0 and -inf.

    In half precision this is eager attention as models write it: products in the dtype, softmax in fp32. Its error
    against float64 is what any other half-precision attention may have, too.
    """
    dtype = call.q.dtype
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    shape = (*q.shape[:3], k.shape[2])
    if call.seen is not None:
        # A weight of 0 hides a key and its value even where nobody wrote that memory and it holds NaN.
        groups, shown = q.shape[1] // k.shape[1], call.seen.expand(shape).any(2)
        hidden = ~shown.unflatten(1, (k.shape[1], groups)).any(2)[..., None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = (q @ k.mT) * scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.slopes is not None and call.distance is not None:
        slopes = call.slopes if call.slopes.dim() == 2 else call.slopes[None]
        # Not rounded to half precision: no attention rounds distances of thousands.
        scores = scores.to(torch.promote_types(dtype, torch.float32)) - slopes[:, :, None, None] * call.distance
    if call.bias is not None:
        scores = scores + call.bias
    if call.seen is not None:
        scores = scores.masked_fill(~call.seen, float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks[None, :, None, None] if call.sinks.dim() == 1 else call.sinks[..., None]
        scores = torch.cat((scores, sinks.expand(*shape[:3], 1).to(scores.dtype)), dim=-1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    wide = scores.masked_fill(empty, 0.0).to(torch.promote_types(dtype, torch.float32))
    if wide.shape[-1] == 0:  # no key and no sink: softmax over nothing
        wide = wide.new_zeros(*shape[:3], 1)
    lse = torch.logsumexp(wide, -1, keepdim=True)
    weights = torch.exp(wide - lse).masked_fill(empty, 0.0)[..., : shape[3]].to(dtype)
    out = weights @ v if k.shape[2] else v.new_zeros(*shape[:3], v.shape[-1]) + 0 * q.sum()
    return Answer(out.transpose(1, 2), lse.masked_fill(empty, float("-inf")).squeeze(-1))
