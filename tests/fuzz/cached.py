"""A random call of ``flash_attn_with_kvcache``: contiguous or paged, appending or not, with everything it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_flash_plus.checks.oracle import Dense
from tests.unit.oracle import rotary

from .calls import Call, seen_by_flags


@dataclass(frozen=True)
class Cached(Call):
    """``seqlen_k`` is the number of slots of a row; forward only.

    Attributes:
        used: keys in use of each row before the call; one int stands for all rows, None for the whole cache.
        new: keys appended by the call.
        rows: the cache row of each batch element (not with pages).
        leftpad: the first key in use of each row (not with pages).
        page: keys of a page; 0 is a contiguous cache.
        rotary_half: pairs of dimensions that are rotated; 0 is none.
    """

    used: tuple[int, ...] | int | None = None
    new: int = 0
    rows: tuple[int, ...] = ()
    leftpad: tuple[int, ...] = ()
    page: int = 0
    rotary_half: int = 0
    interleaved: bool = True

    @property
    def pages(self) -> int:
        return self.seqlen_k // self.page if self.page else 0

    def _table(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(self.batch * self.pages + 1, generator=generator)[: self.batch * self.pages]

    def _tensors(self, device: str) -> list[str]:
        s, where = self.structure, "" if device == "cpu" else f"{device!r}, "
        at = "" if device == "cpu" else f", device={device!r}"
        to = f".to({where}torch.{s.dtype})"
        if self.page:
            head = f"{self.batch * self.pages + 1}, {self.page}"
        else:
            head = f"{max((self.batch, *(row + 1 for row in self.rows)))}, {self.seqlen_k}"
        lines = [
            self._random("q", (self.batch, self.seqlen_q, self.heads, s.dim), self.layouts[0], device),
            f"k_cache = torch.randn({head}, {self.heads_k}, {s.dim}){to}",
            f"v_cache = torch.randn({head}, {self.heads_k}, {s.v_dim}){to}",
            "before = (k_cache.clone(), v_cache.clone())",
        ]
        if self.new:
            lines += [
                self._random("k", (self.batch, self.new, self.heads_k, s.dim), self.layouts[1], device),
                self._random("v", (self.batch, self.new, self.heads_k, s.v_dim), self.layouts[2], device),
            ]
        for name, values in (("used", self.used), ("rows", self.rows), ("leftpad", self.leftpad)):
            if isinstance(values, tuple) and values:
                lines.append(f"{name} = torch.tensor({list(values)}, dtype=torch.int32{at})")
        if self.page:
            table = self._table().view(self.batch, self.pages).tolist()
            lines.append(f"table = torch.tensor({table}, dtype=torch.int32{at}).view({self.batch}, {self.pages})")
        if self.rotary_half:
            lines.append(f"angles = torch.randn({self.seqlen_k + self.seqlen_q}, {self.rotary_half})")
            lines.append(f"cos, sin = angles.cos(){to}, angles.sin(){to}")
        return lines + self._extras(device)

    def _call(self) -> list[str]:
        parts = ["q", "k_cache", "v_cache"] + (["k", "v"] if self.new else [])
        if self.rotary_half:
            parts += ["rotary_cos=cos", "rotary_sin=sin", f"rotary_interleaved={self.interleaved}"]
        if self.used is not None:
            parts.append(f"cache_seqlens={self.used if isinstance(self.used, int) else 'used'}")
        if self.rows:
            parts.append("cache_batch_idx=rows")
        if self.leftpad:
            parts.append("cache_leftpad=leftpad")
        if self.page:
            parts.append("block_table=table")
        lse = ", return_softmax_lse=True" if self.structure.lse else ""
        return [f"result = hf_flash_plus.flash_attn_with_kvcache({', '.join(parts)}{self._options()}{lse})"]

    # --- the same, slot by slot ---

    def _lengths(self) -> list[int]:
        if self.used is None:
            return [self.seqlen_k] * self.batch
        return [self.used] * self.batch if isinstance(self.used, int) else list(self.used)

    def _slot(self, b: int, place: int) -> tuple[int, int]:
        if self.page:
            return int(self._table()[b * self.pages + place // self.page]), place % self.page
        return (self.rows[b] if self.rows else b), place

    def after(self, names: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the caches must hold after the call, on the CPU, in float64."""
        caches = tuple(t.detach().cpu().double().clone() for t in names["before"])
        if not self.new:
            return caches
        lengths = self._lengths()
        k, v = (names[name].detach().cpu().double() for name in "kv")
        if self.rotary_half:
            places = [[n + i for i in range(self.new)] for n in lengths]
            k = rotary(k, names["cos"].cpu().double(), names["sin"].cpu().double(), places, self.interleaved)
        for b in range(self.batch):
            for i in range(self.new):
                slot = self._slot(b, lengths[b] + i)
                caches[0][slot], caches[1][slot] = k[b, i], v[b, i]
        return caches

    def dense(self, names: dict[str, Any]) -> Dense:
        s, lengths = self.structure, self._lengths()
        keys, values = (t.detach().cpu() for t in (names["k_cache"], names["v_cache"]))  # after the call
        q = names["q"].detach().cpu()
        if self.rotary_half and self.new:
            by_row = s.causal or s.window != (-1, -1)
            places = [[n + (i if by_row else 0) for i in range(self.seqlen_q)] for n in lengths]
            turned = rotary(q, names["cos"].cpu(), names["sin"].cpu(), places, self.interleaved)
            q = turned.to(q.dtype)
        k = torch.zeros(self.batch, self.seqlen_k, self.heads_k, s.dim, dtype=q.dtype)
        v = torch.zeros(self.batch, self.seqlen_k, self.heads_k, s.v_dim, dtype=q.dtype)
        seen = torch.zeros(self.batch, self.seqlen_q, self.seqlen_k, dtype=torch.bool)
        distance = torch.zeros(self.batch, self.seqlen_q, self.seqlen_k, dtype=torch.int64)
        for b in range(self.batch):
            total = lengths[b] + self.new
            for place in range(total):
                k[b, place], v[b, place] = keys[self._slot(b, place)], values[self._slot(b, place)]
            seen[b, :, :total] = seen_by_flags(self.seqlen_q, total, s.causal, s.window)
            if self.leftpad:
                seen[b, :, : self.leftpad[b]] = False
            place = torch.arange(self.seqlen_q)[:, None] + (total - self.seqlen_q)
            distance[b] = (place - torch.arange(self.seqlen_k)[None]).abs()
        call = Dense(q, k, v, seen=seen[:, None], softcap=s.softcap, scale=s.scale)
        if s.alibi:
            call = replace(call, slopes=names["slopes"].cpu(), distance=distance[:, None])
        return replace(call, sinks=names["sinks"].detach().cpu()) if s.sinks else call
