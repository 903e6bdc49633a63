"""Memory that belongs to no sequence may hold anything: NaN there reaches no result and no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_flash_plus import flash_attn_varlen_func, use_provider

PROVIDERS = ("reference", "torch_sdpa")


def _ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _nan_from(tensor: Tensor, row: int) -> Tensor:
    tensor = tensor.clone()
    tensor[row:] = float("nan")
    return tensor


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_behind_the_last_sequence(provider: str, compiled: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, 2, 16) for _ in range(3))
    cu_q, cu_k = _ints(0, 3, 8), _ints(0, 4, 7)
    tensors = [_nan_from(q, 8), _nan_from(k, 7), _nan_from(v, 7)]
    call = torch.compile(flash_attn_varlen_func, backend="eager") if compiled else flash_attn_varlen_func
    results = []
    for given in ([q[:8], k[:7], v[:7]], tensors):
        given = [t.detach().requires_grad_() for t in given]
        with use_provider(provider):
            out = call(*given, cu_q, cu_k, 5, 4, causal=True)
        out[:8].square().sum().backward()
        results.append((out, *(t.grad for t in given)))
    (out, *grads), (out_tails, *grads_tails) = results
    torch.testing.assert_close(out_tails[:8], out)
    assert (out_tails[8:] == 0).all()
    for used, grad, grad_tails in zip((8, 7, 7), grads, grads_tails):
        assert grad_tails is not None
        torch.testing.assert_close(grad_tails[:used], grad)
        assert (grad_tails[used:] == 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_slots_of_pages_that_nobody_wrote(provider: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 16), torch.randn(2, 4, 2, 16), torch.randn(2, 4, 2, 16)
    table = _ints(1, 0)[None]
    written = [t.clone() for t in (k, v)]
    for t in written:
        t[0, 1:] = float("nan")  # 5 of 8 slots are in use
    with use_provider(provider):
        out, expected = (
            flash_attn_varlen_func(q, *cache, _ints(0, 2), _ints(0, 5), 2, 5, causal=True, block_table=table)
            for cache in (written, (k, v))
        )
    torch.testing.assert_close(out, expected)


def test_pages_of_keys_and_values_must_be_as_many() -> None:
    q, k, v = torch.randn(6, 4, 16), torch.randn(4, 6, 2, 16), torch.randn(3, 6, 2, 16)
    with pytest.raises(ValueError, match="k and v must have the same pages"):
        flash_attn_varlen_func(q, k, v, _ints(0, 2, 6), _ints(0, 2, 6), 4, 4, block_table=_ints(1, 3)[:, None])
