"""Public functions through the provider triton: what reaches its kernels in another form than it expects."""

from __future__ import annotations

import pytest
import torch

from hf_flash_plus import flash_attn_varlen_func, flash_attn_with_kvcache


def _cache() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 16, 2, 16), torch.randn(8, 16, 2, 16)


@pytest.mark.parametrize("rows", (1, 3))
def test_a_block_table_of_any_strides(rows: int) -> None:
    cache = _cache()
    q, lengths = torch.randn(2, rows, 4, 16), torch.tensor([40, 33], dtype=torch.int32)
    table = torch.tensor([[0, 2, 4], [5, 1, 3]], dtype=torch.int32)
    other = torch.full((2, 6), 10**6, dtype=torch.int32)
    other[:, ::2] = table
    expected = flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, block_table=table)
    for strided in (other[:, ::2], table.t().contiguous().t()):
        assert strided.stride(-1) != 1
        out = flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, block_table=strided)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", (1, 17))
def test_autocast_over_pages(rows: int) -> None:
    q, lengths = torch.randn(2, rows, 4, 16), torch.tensor([40, 33], dtype=torch.int32)
    table = torch.tensor([[0, 2, 4], [5, 1, 3]], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.float16):
        out = flash_attn_with_kvcache(q, *_cache(), cache_seqlens=lengths, block_table=table)
    assert out.dtype == torch.float16


def test_compiled_bounds_that_are_tensors() -> None:
    torch.manual_seed(0)
    q, cu = torch.randn(6, 4, 16), torch.tensor([0, 2, 5], dtype=torch.int32)

    def call(q: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        longest = (cu[1:] - cu[:-1]).max()
        return flash_attn_varlen_func(q, q, q, cu, cu, longest, longest, causal=True)

    torch.testing.assert_close(torch.compile(call, backend="eager")(q, cu), call(q, cu))
