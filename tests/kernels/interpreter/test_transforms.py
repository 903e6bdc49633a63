"""Transforms of ``torch.func`` over the kernels themselves: they launch on plain tensors, or the call is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms() -> None:
    q, k, v, tangent = torch.randn(4, 2, 5, 2, 16, generator=torch.Generator().manual_seed(5)).unbind(0)

    def one(q: Tensor) -> Tensor:
        out: Tensor = hfp.flash_attn_func(q[None], k[:1], v[:1], causal=True)
        return out.square().sum()

    gradients = []
    for provider in ("triton", "reference"):
        with hfp.use_provider(provider):
            gradients.append(
                (
                    torch.func.grad(one)(q[0]),
                    torch.func.vmap(torch.func.grad(one))(q),
                    torch.func.grad(lambda q: torch.func.vmap(one)(q).sum())(q),
                )
            )
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    with hfp.use_provider("triton"), pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(one, (q[0],), (tangent[0],))
