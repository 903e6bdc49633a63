"""Attention from its definition, one query row at a time, in float64: what the unit tests compare with.

Written from flash-attn's documentation, without looking at ``hf_flash_plus``: no mask tensors, no softmax, no
broadcasting; a row asks of every key whether it sees it. Differentiable by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Sees = Callable[[int, int, int, int], bool]


class Result(NamedTuple):
    out: Tensor  # (batch, seqlen_q, nheads, v_headdim)
    lse: Tensor  # (batch, nheads, seqlen_q)
    weights: Tensor  # (batch, nheads, seqlen_q, seqlen_k), detached


def sees_flags(i: int, j: int, seqlen_q: int, seqlen_k: int, causal: bool, window: Sequence[int]) -> bool:
    """flash-attn: the last query stands at the last key; window sizes are inclusive, -1 is unlimited."""
    place = i + (seqlen_k - seqlen_q)
    left, right = window
    if causal and j > place:
        return False
    if left >= 0 and j < place - left:
        return False
    return not (right >= 0 and j > place + right)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    sees: Sees | None = None,
    places: Callable[[int, int], int] | None = None,
) -> Result:
    """Dense attention; ``sees(b, h, i, j)`` restricts further, ``places(b, i)`` is the row's key for ALiBi."""
    q, k, v = q.double(), k.double(), v.double()
    batch, seqlen_q, nheads, head_dim = q.shape
    seqlen_k, nheads_k, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    outs, lses = [], []
    weights = torch.zeros(batch, nheads, seqlen_q, seqlen_k, dtype=torch.float64)
    for b in range(batch):
        for i in range(seqlen_q):
            for h in range(nheads):
                kv_head = h // (nheads // nheads_k)
                keys = [
                    j
                    for j in range(seqlen_k)
                    if sees_flags(i, j, seqlen_q, seqlen_k, causal, window) and (sees is None or sees(b, h, i, j))
                ]
                if bias is not None:
                    full_bias = bias.double().expand(batch, nheads, seqlen_q, seqlen_k)
                    keys = [j for j in keys if float(full_bias[b, h, i, j].detach()) != -math.inf]
                logits = [torch.zeros(0, dtype=torch.float64)]
                for j in keys:
                    score = torch.dot(q[b, i, h], k[b, j, kv_head]) * scale
                    if softcap > 0:
                        score = softcap * torch.tanh(score / softcap)
                    if alibi is not None:
                        slope = float(alibi[h] if alibi.dim() == 1 else alibi[b, h])
                        place = i + seqlen_k - seqlen_q if places is None else places(b, i)
                        score = score - slope * abs(place - j)
                    if bias is not None:
                        score = score + full_bias[b, h, i, j]
                    logits.append(score[None])
                if sinks is not None:
                    sink = sinks[h] if sinks.dim() == 1 else sinks[b, h, i]
                    logits.append(sink.double()[None])
                row = torch.cat(logits)
                if row.numel() == 0:
                    outs.append(torch.zeros(v_head_dim, dtype=torch.float64))
                    lses.append(torch.tensor(-math.inf, dtype=torch.float64))
                    continue
                lse = torch.logsumexp(row, 0)
                share = torch.exp(row[: len(keys)] - lse)
                out = torch.zeros(v_head_dim, dtype=torch.float64)
                for n, j in enumerate(keys):
                    out = out + share[n] * v[b, j, kv_head]
                    weights[b, h, i, j] = share[n].detach()
                outs.append(out)
                lses.append(lse)
    if not outs:
        return Result(
            torch.zeros(batch, seqlen_q, nheads, v_head_dim, dtype=torch.float64),
            torch.zeros(batch, nheads, seqlen_q, dtype=torch.float64),
            weights,
        )
    out = torch.stack(outs).reshape(batch, seqlen_q, nheads, v_head_dim)
    lse = torch.stack(lses).reshape(batch, seqlen_q, nheads).transpose(1, 2)
    return Result(out, lse, weights)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], **options: object) -> Result:
    """Packed sequences, each computed alone; ``weights`` is empty."""
    nheads = q.shape[1]
    outs, lses = [], []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        one = attention(q[None, rows], k[None, keys], v[None, keys], **options)  # type: ignore[arg-type]
        outs.append(one.out[0])
        lses.append(one.lse[0])
    rest = q.shape[0] - cu_q[-1]
    outs.append(torch.zeros(rest, nheads, v.shape[2], dtype=torch.float64))
    lses.append(torch.full((nheads, rest), -math.inf, dtype=torch.float64))
    return Result(torch.cat(outs), torch.cat(lses, dim=1), torch.zeros(0))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, places: Sequence[Sequence[int]], interleaved: bool) -> Tensor:
    """Rotary embedding, one pair of numbers at a time; ``places[b][i]`` is the row of ``cos`` of token i."""
    out = x.double().clone()
    half = cos.shape[1]
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for d in range(half):
                first, second = (2 * d, 2 * d + 1) if interleaved else (d, half + d)
                c, s = float(cos[places[b][i], d]), float(sin[places[b][i], d])
                one, two = x[b, i, :, first].double(), x[b, i, :, second].double()
                out[b, i, :, first] = one * c - two * s
                out[b, i, :, second] = one * s + two * c
    return out


#: How far a result may be from the float64 one, by dtype: absolute, on outputs of order one.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """``actual`` equals the float64 ``expected`` to the precision of ``dtype``; NaN never equals anything."""
    assert tuple(actual.shape) == tuple(expected.shape), (tuple(actual.shape), tuple(expected.shape))
    limit = factor * TOLERANCE[dtype]
    torch.testing.assert_close(actual.detach().double(), expected.detach(), atol=limit, rtol=limit, equal_nan=False)
