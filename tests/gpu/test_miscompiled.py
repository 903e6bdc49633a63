"""Calls that ptxas 12.8 compiles wrong for Hopper, found by random calls (tests/gpu/test_fuzz.py) on an H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_flash_plus
from hf_flash_plus import AttentionMask

pytestmark = pytest.mark.gpu


def _close(got: Tensor, want: Tensor, half: Tensor) -> None:
    """At most twice as far from float64 as plain attention in the same half precision, as in all tests of kernels."""
    error, allowed = (got.double() - want).abs().max(), (half.double() - want).abs().max()
    assert error <= 2 * allowed + 1e-3, f"{error:.2e} from float64, plain attention is {allowed:.2e}"


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("v_strided", (False, True))
@pytest.mark.parametrize("v_dim", (16, 32, 40))
def test_packed_with_alibi(v_dim: int, v_strided: bool) -> None:
    torch.manual_seed(1)
    q, k = (torch.randn(1, 185, 40).to("cuda", torch.float16).transpose(0, 1) for _ in range(2))
    v = torch.randn(1, 185, v_dim).to("cuda", torch.float16).transpose(0, 1)
    if v_strided:
        v = torch.randn(185, 3, 1, v_dim).to("cuda", torch.float16)[:, 1]
    lengths = torch.tensor([0, 185], dtype=torch.int32, device="cuda")
    slopes = torch.rand(1, device="cuda")

    def call(q: Tensor, k: Tensor, v: Tensor, provider: str) -> Tensor:
        options: dict[str, Any] = {"causal": True, "window_size": (33, 7), "softcap": 20.0, "alibi_slopes": slopes}
        with hf_flash_plus.use_provider(provider):
            return hf_flash_plus.flash_attn_varlen_func(q, k, v, lengths, lengths, 185, 185, **options)

    want = call(q.double(), k.double(), v.double(), "reference")
    half = call(q, k, v, "reference")
    for _ in range(3):
        _close(call(q, k, v, "triton"), want, half)


@pytest.mark.parametrize("rows", (13, 257))
def test_every_mask_at_once(rows: int) -> None:
    torch.manual_seed(3394)
    q = torch.randn(1, 4, rows, 40).to("cuda", torch.float16).transpose(1, 2)
    k, v = torch.randn(1, 80, 1, 40).to("cuda", torch.float16), torch.randn(1, 80, 1, 16).to("cuda", torch.float16)
    slopes = torch.rand(1, 4).to("cuda")
    mask = AttentionMask(
        causal=True,
        window=(33, 7),
        key_mask=(torch.rand(1, 80) < 0.6).to("cuda"),
        key_holes=torch.ones(1, dtype=torch.int32).to("cuda"),
        bias=(torch.rand(1, 4, 1, 80) < 0.6).to("cuda"),
    )

    def call(q: Tensor, k: Tensor, v: Tensor, provider: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = _leaves(q, k, v)
        with hf_flash_plus.use_provider(provider):
            out = hf_flash_plus.attention(*leaves, mask, softcap=20.0, alibi_slopes=slopes)
        torch.manual_seed(0)
        dout = torch.randn(out.shape).to("cuda", torch.float16).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, leaves, dout)

    want, want_grads = call(q.double(), k.double(), v.double(), "reference")
    half, half_grads = call(q, k, v, "reference")
    out, grads = call(q, k, v, "triton")
    _close(out, want, half)
    for got, expected, plain in zip(grads, want_grads, half_grads):
        _close(got, expected, 1.5 * plain.double() - 0.5 * expected)  # three times, for gradients


@pytest.mark.parametrize("rows, head_dim, v_head_dim", [(15, 96, 16), (360, 40, 16), (204, 96, 24), (360, 16, 96)])
def test_heads_of_few_columns(rows: int, head_dim: int, v_head_dim: int) -> None:
    """Of which the look at the machine code does not find every fault; in decoding and in forward."""
    torch.manual_seed(129)
    q = torch.randn(2, 2 * rows, 16, head_dim).to("cuda", torch.float16)[:, ::2]
    k = torch.randn(2, 132 + 3, 5, head_dim + 8).to("cuda", torch.float16)[:, 1:133, :4, :head_dim]
    v = torch.randn(2, 132, 4, v_head_dim).to("cuda", torch.float16)
    slopes = torch.rand(16).to("cuda")

    def call(q: Tensor, k: Tensor, v: Tensor, provider: str) -> Tensor:
        with hf_flash_plus.use_provider(provider):
            return hf_flash_plus.flash_attn_func(q, k, v, window_size=(33, 7), alibi_slopes=slopes)

    want, half = call(q.double(), k.double(), v.double(), "reference"), call(q, k, v, "reference")
    for _ in range(3):
        _close(call(q, k, v, "triton"), want, half)
