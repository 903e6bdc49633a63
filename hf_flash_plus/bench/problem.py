"""The tensors of one case, shared by all peers: inputs, the mask in the forms that peers want, the gradient."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..interval_cache import share
from ..masks import AttentionMask, PackedSequences, varlen_mask
from .config import Case

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Problem:
    """One case on one device, with random data (never zeros: they would run cooler, hence faster).

    Attributes:
        q, k, v: ``(batch, seqlen, heads, head_dim)``, drawn from a normal distribution.
        dout: gradient of the output; 0 on padded rows.
        layer_0: the problem of the first layer, whose block table and row intervals all layers of a decoding step
            share; None for the first one itself.
    """

    def __init__(
        self, case: Case, dtype: str, device: torch.device, seed: int = 0, layer_0: Problem | None = None
    ) -> None:
        self.layer_0 = layer_0
        self.case, self.device, self.dtype = case, device, TORCH_DTYPES[dtype]
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(rows: int, heads: int) -> Tensor:
            shape = (case.batch, rows, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.dtype)

        self.q = draw(case.rows, case.heads)
        self.k, self.v = draw(case.seqlen, case.kv_heads), draw(case.seqlen, case.kv_heads)
        self.dout = draw(case.rows, case.heads)
        if case.mask == "padded":
            self.dout.masked_fill_(~self.real[:, :, None, None], 0.0)
        self.scale = case.head_dim**-0.5

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves of q, k, v that require gradients and share their memory."""
        q, k, v = (t.detach().requires_grad_() for t in (self.q, self.k, self.v))
        return q, k, v

    @cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the layers of a model have them: contiguous ``(batch, heads, seqlen, head_dim)``; copies."""
        q, k, v = (t.transpose(1, 2).contiguous() for t in (self.q, self.k, self.v))
        return q, k, v

    @property
    def causal(self) -> bool:
        """Whether flags say all of the mask, and it is causal."""
        return self.case.mask == "causal"

    @property
    def plain(self) -> bool:
        """Whether the mask is full or causal."""
        return self.case.mask in ("full", "causal")

    @cached_property
    def lengths(self) -> Tensor:
        return torch.tensor(self.case.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def real(self) -> Tensor:
        """bool ``(batch, rows)``: the query rows that are no padding."""
        if self.case.mask != "padded" or self.case.decoding:
            return torch.ones(self.case.batch, self.case.rows, dtype=torch.bool, device=self.device)
        return torch.arange(self.case.seqlen, device=self.device)[None] < self.lengths[:, None]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 ``(sequences + 1,)`` of a padded (then unpadded) or packed case."""
        zero = torch.zeros(1, dtype=torch.int32, device=self.device)
        return torch.cat((zero, self.lengths.cumsum(0, dtype=torch.int32)))

    @cached_property
    def real_index(self) -> Tensor:
        """Positions in the flattened batch that are no padding."""
        return self.real.flatten().nonzero().flatten()

    @cached_property
    def intervals(self) -> Tensor:
        """The mask, whatever its kind, as row intervals: int32 ``(batch or 1, rows, 2)``."""
        case = self.case
        row = torch.arange(case.rows, device=self.device)[None]
        diagonal = row + (case.seqlen - case.rows)
        start, end = torch.zeros_like(row), torch.full_like(row, case.seqlen)
        if case.mask != "full":
            end = diagonal + 1
        if case.mask == "window":
            start = (diagonal - case.window).clamp(min=0)
        elif case.mask == "packed":
            start = row // case.lengths[0] * case.lengths[0]
        elif case.mask == "padded" and case.decoding:
            start, end = case.seqlen - self.lengths[:, None], end.expand(case.batch, -1)
        elif case.mask == "padded":
            end = torch.where(self.real, end, 0)
            start = start.expand_as(end)
        return torch.stack((start, end), dim=-1).to(torch.int32)

    @cached_property
    def mask(self) -> AttentionMask:
        """The mask as hf_flash_plus takes it, made once as a model does: what kernels work out from its row intervals
        alone is not in the times of a repeated call, as it is in those of one layer only of a model's."""
        case = self.case
        if case.mask == "window":
            return AttentionMask(causal=True, window=(case.window, 0))
        if case.mask == "padded":
            return AttentionMask(row_intervals=share(self.intervals))
        if case.mask == "packed":
            mask = varlen_mask(self.cu_seqlens, self.cu_seqlens, case.rows, causal=True)
            longest = max(case.lengths)
            packed = PackedSequences(self.cu_seqlens, self.cu_seqlens, longest, longest, True, (-1, -1))
            assert mask.row_intervals is not None
            return AttentionMask(row_intervals=share(mask.row_intervals), packed=packed)
        return AttentionMask(causal=self.causal)

    @cached_property
    def pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in pages ``(pages, page_size, kv_heads, head_dim)`` in random order, and the block table."""
        case = self.case
        if self.layer_0 is not None:
            table = self.layer_0.pages[2]
        else:
            table = self._draw_block_table()
        order = table.flatten().long()
        shape = (-1, case.page_size, case.kv_heads, case.head_dim)
        k_pages, v_pages = (
            torch.empty_like(t).view(shape).index_copy_(0, order, t.view(shape)) for t in (self.k, self.v)
        )
        return k_pages, v_pages, table

    def _draw_block_table(self) -> Tensor:
        per_row = self.case.seqlen // self.case.page_size
        order = torch.randperm(self.case.batch * per_row, generator=torch.Generator().manual_seed(0))
        return order.view(self.case.batch, per_row).to(self.device, torch.int32)

    @cached_property
    def page_intervals(self) -> Tensor:
        """The row intervals of the keys in pages, int32 ``(batch, rows, 2)``."""
        return self.intervals.clone() if self.layer_0 is None else self.layer_0.page_intervals

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """bool ``(batch or 1, 1, rows, seqlen)`` for torch's SDPA; None where flags suffice.

        Padded rows see the keys before them, as in Transformers: a row that sees nothing gives NaN in some backends.
        """
        if self.plain and (self.case.rows == self.case.seqlen or not self.causal or self.case.decoding):
            return None
        keys = torch.arange(self.case.seqlen, device=self.device)
        if self.case.mask == "padded" and not self.case.decoding:
            return ((keys[None] <= keys[:, None])[None] & self.real[:, None, :])[:, None]
        start, end = self.intervals[..., :1], self.intervals[..., 1:]
        return ((keys >= start) & (keys < end))[:, None]
