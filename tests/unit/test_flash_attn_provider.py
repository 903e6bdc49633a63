"""The provider flash_attn before it calls a package: what must not reach the kernels. The package is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers import PROVIDERS, flash_attn


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches a stand-in for flash-attn 4, which gives zeros."""
    seen: list[tuple[Any, ...]] = []

    def function(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((q.shape, k.shape))
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    module = SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=function)
    monkeypatch.setattr(flash_attn, "_find", lambda: (flash_attn.GENERATIONS[0], module, "4.0"))
    return seen


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_calls_are_answered_here(seqlen_q: int, seqlen_k: int, calls: list[tuple[Any, ...]]) -> None:
    q = torch.full((2, seqlen_q, 4, 8), float("inf"), requires_grad=True)
    k, v = (torch.randn(2, seqlen_k, 2, dim, requires_grad=True) for dim in (8, 16))
    output = PROVIDERS["flash_attn"].forward(AttentionInputs(q, k, v, 0.3, AttentionMask(causal=True), needs_lse=True))
    assert not calls
    assert output.out.shape == (2, seqlen_q, 4, 16) and (output.out == 0).all() and output.out.is_contiguous()
    assert output.softmax_lse is not None and output.softmax_lse.shape == (2, 4, seqlen_q)
    assert (output.softmax_lse == float("-inf")).all()
    grads = torch.autograd.grad(output.out.sum(), (q, k, v))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("batch, heads, served", [(3, 4, True), (65536, 1, False), (1, 65536, False)])
def test_what_no_grid_holds_is_refused(batch: int, heads: int, served: bool, calls: list[tuple[Any, ...]]) -> None:
    q = torch.zeros(batch, 1, heads, 8)
    inputs = AttentionInputs(q, q, q, 0.3, AttentionMask())
    if served:
        PROVIDERS["flash_attn"].forward(inputs)
    else:
        with pytest.raises(NotImplementedError, match="a CUDA grid holds 65535"):
            PROVIDERS["flash_attn"].forward(inputs)
    assert bool(calls) == served
