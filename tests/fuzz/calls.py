"""A random attention call: as the code that makes it, and told densely for the oracle.

The code is not a description of the call, it *is* the call: the tests execute it. So what a failing test prints
reproduces the failure, on any machine that has torch and hf_flash_plus.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_flash_plus.checks.oracle import Dense

#: A tensor of logical shape (b, s, h, d) in different memory: the expression of the memory, and the view of it.
LAYOUTS = {
    "contiguous": ("({b}, {s}, {h}, {d})", ""),
    "heads first": ("({b}, {h}, {s}, {d})", ".transpose(1, 2)"),
    "sequence first": ("({s}, {b}, {h}, {d})", ".transpose(0, 1)"),
    "slice": ("({b}, {s} + 3, {h} + 1, {d} + 8)", "[:, 1 : {s} + 1, :{h}, :{d}]"),
    "of qkv": ("({b}, {s}, 3, {h}, {d})", "[:, :, 1]"),
    "every other row": ("({b}, 2 * {s}, {h}, {d})", "[:, ::2]"),
    "last dimension strided": ("({b}, {s}, {d}, {h})", ".transpose(2, 3)"),
    "expanded batch": ("(1, {s}, {h}, {d})", ".expand({b}, {s}, {h}, {d})"),
    "expanded heads": ("({b}, {s}, 1, {d})", ".expand({b}, {s}, {h}, {d})"),
}
#: The same of (total, h, d).
PACKED_LAYOUTS = {
    "contiguous": ("({s}, {h}, {d})", ""),
    "heads first": ("({h}, {s}, {d})", ".transpose(0, 1)"),
    "slice": ("({s} + 3, {h} + 1, {d} + 8)", "[1 : {s} + 1, :{h}, :{d}]"),
    "of qkv": ("({s}, 3, {h}, {d})", "[:, 1]"),
}


@dataclass(frozen=True)
class Structure:
    """What kernels are compiled for, and numbers that go with it."""

    dtype: str = "float32"
    dim: int = 16
    v_dim: int = 16
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    alibi: str = ""  # "", "heads" or "batch and heads"
    sinks: str = ""  # "", "heads" or "rows"
    lse: bool = False
    gradients: bool = True


@dataclass(frozen=True)
class Call:
    """What every kind of call has; the kinds are below."""

    structure: Structure
    seed: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_k: int
    group: int
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")

    @property
    def heads(self) -> int:
        return self.heads_k * self.group

    # --- the code ---

    def code(self, provider: str, device: str) -> str:
        """The call as a script: defines the tensors, and ``result``."""
        lines = ["import torch", "import hf_flash_plus", "", f"torch.manual_seed({self.seed})"]
        lines += self._tensors(device)
        lines += [f'with hf_flash_plus.use_provider("{provider}"):']
        lines += [f"    {line}" for line in self._call()]
        return "\n".join(lines) + "\n"

    def _random(
        self, name: str, shape: tuple[int, int, int, int], layout: str, device: str, packed: bool = False
    ) -> str:
        memory, view = (PACKED_LAYOUTS if packed else LAYOUTS)[layout]
        sizes = dict(zip("bshd", shape))
        where = "" if device == "cpu" else f"{device!r}, "
        dtype = f"torch.{self.structure.dtype}"
        grad = ".requires_grad_()" if self.structure.gradients else ""
        return f"{name} = torch.randn{memory.format(**sizes)}.to({where}{dtype}){view.format(**sizes)}{grad}"

    def _tensors(self, device: str) -> list[str]:
        s = self.structure
        lines = [
            self._random("q", (self.batch, self.seqlen_q, self.heads, s.dim), self.layouts[0], device),
            self._random("k", (self.batch, self.seqlen_k, self.heads_k, s.dim), self.layouts[1], device),
            self._random("v", (self.batch, self.seqlen_k, self.heads_k, s.v_dim), self.layouts[2], device),
        ]
        return lines + self._extras(device)

    def _extras(self, device: str) -> list[str]:
        s, to = self.structure, "" if device == "cpu" else f".to({device!r})"
        lines = []
        if s.alibi:
            shape = f"{self.heads}" if s.alibi == "heads" else f"{self.batch}, {self.heads}"
            lines.append(f"slopes = torch.rand({shape}){to}")
        if s.sinks:
            shape = f"{self.heads}" if s.sinks == "heads" else f"{self.batch}, {self.heads}, {self.seqlen_q}"
            grad = ".requires_grad_()" if s.gradients else ""
            lines.append(f"sinks = torch.randn({shape}){to}{grad}")
        return lines

    def _options(self, mask: bool = True) -> str:
        """The keyword arguments that every function takes, those with other values than the default."""
        s = self.structure
        parts = []
        if s.scale is not None:
            parts.append(f"softmax_scale={s.scale!r}")
        if mask and s.causal:
            parts.append("causal=True")
        if mask and s.window != (-1, -1):
            parts.append(f"window_size={s.window!r}")
        if s.softcap:
            parts.append(f"softcap={s.softcap!r}")
        if s.alibi:
            parts.append("alibi_slopes=slopes")
        if s.sinks:
            parts.append("s_aux=sinks")
        return "".join(f", {part}" for part in parts)

    def _call(self) -> list[str]:
        raise NotImplementedError

    # --- the same, densely ---

    def dense(self, names: dict[str, Any]) -> Dense:
        """The call for the oracle, made of the tensors that the code defined, on the CPU."""
        q, k, v = (names[name].detach().cpu() for name in "qkv")
        s = self.structure
        call = Dense(q, k, v, softcap=s.softcap, scale=s.scale)
        call = replace(call, seen=self._flags(q.shape[1], k.shape[1]))
        if s.alibi:
            place = torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1])
            distance = (place - torch.arange(k.shape[1])[None]).abs()[None, None]
            call = replace(call, slopes=names["slopes"].cpu(), distance=distance)
        if s.sinks:
            call = replace(call, sinks=names["sinks"].detach().cpu())
        return call

    def _flags(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        """What ``causal`` and ``window_size`` show: (1, 1, seqlen_q, seqlen_k)."""
        return seen_by_flags(seqlen_q, seqlen_k, self.structure.causal, self.structure.window)[None, None]

    def sources(self) -> tuple[str, ...]:
        """Names, in the code, of the tensors with gradients."""
        if not self.structure.gradients:
            return ()
        return ("q", "k", "v", "sinks") if self.structure.sinks else ("q", "k", "v")

    def taken_apart(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        """The gradient of one of :meth:`sources` as gradients of the tensors of :class:`Dense`."""
        return {name: gradient}


def seen_by_flags(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """flash-attn's definition: bottom-right aligned, window sizes inclusive, -1 unlimited."""
    place = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k)[None]
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    left, right = window
    if causal:
        seen &= key <= place
    if left >= 0:
        seen &= key >= place - left
    if right >= 0:
        seen &= key <= place + right
    return seen


@dataclass(frozen=True)
class Flash(Call):
    """``flash_attn_func``."""

    def _call(self) -> list[str]:
        lse = ", return_attn_probs=True" if self.structure.lse else ""
        return [f"result = hf_flash_plus.flash_attn_func(q, k, v{self._options()}{lse})"]


@dataclass(frozen=True)
class FlashPacked(Call):
    """``flash_attn_qkvpacked_func`` or ``flash_attn_kvpacked_func``: gradients reach the packed tensor."""

    kv_only: bool = False

    def _tensors(self, device: str) -> list[str]:
        s, where = self.structure, "" if device == "cpu" else f"{device!r}, "
        grad = ".requires_grad_()" if s.gradients else ""
        to = f".to({where}torch.{s.dtype}){grad}"
        if self.kv_only:
            lines = [
                self._random("q", (self.batch, self.seqlen_q, self.heads, s.dim), self.layouts[0], device),
                f"kv = torch.randn({self.batch}, {self.seqlen_k}, 2, {self.heads_k}, {s.dim}){to}",
                "k, v = kv.unbind(2)",
            ]
        else:
            lines = [
                f"qkv = torch.randn({self.batch}, {self.seqlen_q}, 3, {self.heads}, {s.dim}){to}",
                "q, k, v = qkv.unbind(2)",
            ]
        return lines + self._extras(device)

    def _call(self) -> list[str]:
        first = "flash_attn_kvpacked_func(q, kv" if self.kv_only else "flash_attn_qkvpacked_func(qkv"
        lse = ", return_attn_probs=True" if self.structure.lse else ""
        return [f"result = hf_flash_plus.{first}{self._options()}{lse})"]

    def sources(self) -> tuple[str, ...]:
        packed = ("q", "kv") if self.kv_only else ("qkv",)
        return tuple(name for name in super().sources() if name not in "qkv") + packed if super().sources() else ()

    def taken_apart(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        return dict(zip(name, gradient.unbind(2))) if name in ("kv", "qkv") else {name: gradient}


@dataclass(frozen=True)
class Masked(Call):
    """``attention`` under an :class:`AttentionMask` of several parts."""

    intervals: int = 0  # 0 none, 1 one for all batch elements, 2 one each
    key_mask: int = 0  # likewise
    key_holes: bool = False
    bias: str = ""  # "", "bool" or "float"
    bias_shape: tuple[bool, bool, bool] = (False, False, False)  # broadcast over batch, heads, rows
    positions: bool = False

    def _tensors(self, device: str) -> list[str]:
        s, to = self.structure, "" if device == "cpu" else f".to({device!r})"
        lines, parts = super()._tensors(device), []
        if s.causal:
            parts.append("causal=True")
        if s.window != (-1, -1):
            parts.append(f"window={s.window!r}")
        if self.intervals:
            size = f"{1 if self.intervals == 1 else self.batch}, {self.seqlen_q}, 2"
            lines.append(f"intervals = torch.randint(-3, {self.seqlen_k + 4}, ({size}), dtype=torch.int32){to}")
            parts.append("row_intervals=intervals")
        if self.key_mask:
            rows = 1 if self.key_mask == 1 else self.batch
            lines.append(f"key_mask = (torch.rand({rows}, {self.seqlen_k}) < 0.6){to}")
            parts.append("key_mask=key_mask")
            if self.key_holes:
                lines.append(f"key_holes = torch.ones({rows}, dtype=torch.int32){to}")
                parts.append("key_holes=key_holes")
        if self.bias:
            full = (self.batch, self.heads, self.seqlen_q)
            shape = tuple(1 if one else n for n, one in zip(full, self.bias_shape))
            size = ", ".join(map(str, (*shape, self.seqlen_k)))
            if self.bias == "bool":
                lines.append(f"bias = (torch.rand({size}) < 0.6){to}")
            else:
                grad = ".requires_grad_()" if s.gradients else ""
                lines.append(f"bias = torch.randn({size}).to(torch.{s.dtype}){to}{grad}")
            parts.append("bias=bias")
        if self.positions and s.alibi:
            lines.append(
                f"positions = torch.randint(0, {self.seqlen_k + 1}, ({self.batch}, {self.seqlen_q}), "
                f"dtype=torch.int32){to}"
            )
            parts.append("row_positions=positions")
        return [*lines, f"mask = hf_flash_plus.AttentionMask({', '.join(parts)})"]

    def _call(self) -> list[str]:
        lse = ", return_lse=True" if self.structure.lse else ""
        return [f"result = hf_flash_plus.attention(q, k, v, mask{self._options(mask=False)}{lse})"]

    def dense(self, names: dict[str, Any]) -> Dense:
        call = super().dense(names)
        assert call.seen is not None
        seen = call.seen
        key = torch.arange(self.seqlen_k)
        if self.intervals:
            intervals = names["intervals"].cpu()[:, None, :, None]
            seen = seen & (key >= intervals[..., 0]) & (key < intervals[..., 1])
        if self.key_mask:
            seen = seen & names["key_mask"].cpu()[:, None, None]
        if self.bias == "bool":
            seen = seen & names["bias"].cpu()
        elif self.bias:
            call = replace(call, bias=names["bias"].detach().cpu())
        if self.positions and self.structure.alibi:
            call = replace(call, distance=(names["positions"].cpu()[:, None, :, None] - key).abs())
        return replace(call, seen=seen)

    def sources(self) -> tuple[str, ...]:
        sources = super().sources()
        return (*sources, "bias") if sources and self.bias == "float" else sources


@dataclass(frozen=True)
class Varlen(Call):
    """``flash_attn_varlen_func``; ``batch`` is 1 and the lengths are sums, with rows behind that belong to nobody."""

    lengths_q: tuple[int, ...] = (1,)
    lengths_k: tuple[int, ...] = (1,)
    spare: int = 0  # added to max_seqlen_q and max_seqlen_k, which are bounds

    def _tensors(self, device: str) -> list[str]:
        s, where = self.structure, "" if device == "cpu" else f", device={device!r}"
        sizes = ((self.seqlen_q, self.heads, s.dim), (self.seqlen_k, self.heads_k, s.dim))
        sizes += ((self.seqlen_k, self.heads_k, s.v_dim),)
        lines = [
            self._random(name, (0, *size), layout, device, packed=True)
            for name, size, layout in zip("qkv", sizes, self.layouts)
        ]
        for name, lengths in (("cu_q", self.lengths_q), ("cu_k", self.lengths_k)):
            ends = [0]
            for length in lengths:
                ends.append(ends[-1] + length)
            lines.append(f"{name} = torch.tensor({ends}, dtype=torch.int32{where})")
        return lines + self._extras(device)

    def _call(self) -> list[str]:
        lse = ", return_attn_probs=True" if self.structure.lse else ""
        longest_q, longest_k = (max(n, default=0) + self.spare for n in (self.lengths_q, self.lengths_k))
        return [
            f"result = hf_flash_plus.flash_attn_varlen_func(q, k, v, cu_q, cu_k, {longest_q}, {longest_k}"
            f"{self._options()}{lse})"
        ]

    def dense(self, names: dict[str, Any]) -> Dense:
        q, k, v = (names[name].detach().cpu()[None] for name in "qkv")
        s = self.structure
        seen = torch.zeros(self.seqlen_q, self.seqlen_k, dtype=torch.bool)
        distance = torch.zeros(self.seqlen_q, self.seqlen_k, dtype=torch.int64)
        row = key = 0
        for rows, keys in zip(self.lengths_q, self.lengths_k):
            block = (slice(row, row + rows), slice(key, key + keys))
            seen[block] = seen_by_flags(rows, keys, s.causal, s.window)
            place = torch.arange(rows)[:, None] + (keys - rows)
            distance[block] = (place - torch.arange(keys)[None]).abs()
            row, key = row + rows, key + keys
        call = Dense(q, k, v, seen=seen[None, None], softcap=s.softcap, scale=s.scale)
        if s.alibi:
            call = replace(call, slopes=names["slopes"].cpu(), distance=distance[None, None])
        return replace(call, sinks=names["sinks"].detach().cpu()) if s.sinks else call

    def taken_apart(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        return {name: gradient[None] if name in "qkv" else gradient}
