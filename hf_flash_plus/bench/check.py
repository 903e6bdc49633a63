"""A float reference on a slice of a problem, and the relative error of a peer against it."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem

#: Largest relative error (Frobenius norm) that still counts as right, by dtype of the inputs.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}

_ROWS = 1024


class Reference:
    """Output and gradients of the last batch element and the last key head with its query heads.

    Computed by hand, rows in chunks: in float64 up to 2048 keys, else in float32 (no TF32).
    """

    def __init__(self, problem: Problem, backward: bool) -> None:
        case = problem.case
        self.problem, self.batch, self.kv_head = problem, case.batch - 1, case.kv_heads - 1
        groups = case.heads // case.kv_heads
        self.heads = slice(case.heads - groups, case.heads)
        compute = torch.float64 if case.seqlen <= 2048 else torch.float32
        q, dout = (t[self.batch, :, self.heads].transpose(0, 1).to(compute) for t in (problem.q, problem.dout))
        k, v = (t[self.batch, :, self.kv_head].to(compute) for t in (problem.k, problem.v))
        intervals = problem.intervals[min(self.batch, problem.intervals.shape[0] - 1)]
        keys = torch.arange(case.seqlen, device=problem.device)
        outs, dqs = [], []
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for begin in range(0, case.rows, _ROWS):
            rows = slice(begin, min(begin + _ROWS, case.rows))
            start, end = intervals[rows, :1], intervals[rows, 1:]
            scores = (q[:, rows] @ k.T) * problem.scale
            scores = scores.masked_fill(~((keys >= start) & (keys < end)), float("-inf"))
            weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
            out = weights @ v
            outs.append(out)
            if backward:
                g = dout[:, rows]
                dv += (weights.mT @ g).sum(0)
                ds = weights * (g @ v.T - (g * out).sum(-1, keepdim=True)) * problem.scale
                dqs.append(ds @ k)
                dk += (ds.mT @ q[:, rows]).sum(0)
        self.values = {"out": torch.cat(outs, dim=1)}
        if backward:
            self.values |= {"dq": torch.cat(dqs, dim=1), "dk": dk, "dv": dv}

    def error(self, name: str, tensor: Tensor) -> float:
        """Relative error of ``out``, ``dq``, ``dk`` or ``dv``, given as ``(batch, seqlen, heads, head_dim)``."""
        want = self.values[name]
        if name in ("out", "dq"):
            got = tensor[self.batch, :, self.heads].transpose(0, 1)
            real = self.problem.real[self.batch]
            got, want = got[:, real], want[:, real]
        else:
            got = tensor[self.batch, :, self.kv_head]
        got = got.to(want.dtype)
        return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
