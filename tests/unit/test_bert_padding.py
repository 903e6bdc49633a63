"""Removing and restoring padding, against loops."""

from __future__ import annotations

import inspect

import pytest
import torch

from hf_flash_plus import bert_padding
from hf_flash_plus.bert_padding import index_first_axis, pad_input, unpad_input

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1]],
    "none": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "one row empty": [[0, 0, 0, 0], [0, 1, 1, 0]],
    "all": [[0, 0, 0, 0], [0, 0, 0, 0]],
}


def test_signatures_are_flash_attns() -> None:
    names = {name: list(inspect.signature(getattr(bert_padding, name)).parameters) for name in
             ("unpad_input", "pad_input")}  # fmt: skip
    assert names == {
        "unpad_input": ["hidden_states", "attention_mask", "unused_mask"],
        "pad_input": ["hidden_states", "indices", "batch", "seqlen"],
    }
    assert inspect.signature(unpad_input).parameters["unused_mask"].default is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_unpad(name: str, dtype: torch.dtype) -> None:
    mask = torch.tensor(MASKS[name], dtype=dtype)
    hidden = torch.randn(2, 4, 3, 5)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask)
    places = [(b, i) for b in range(2) for i in range(4) if MASKS[name][b][i]]
    lengths = [sum(row) for row in MASKS[name]]
    assert tokens.shape == (len(places), 3, 5)
    assert all(torch.equal(tokens[n], hidden[b, i]) for n, (b, i) in enumerate(places))
    assert indices.tolist() == [b * 4 + i for b, i in places] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, lengths[0], sum(lengths)] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == max(lengths) and isinstance(max_seqlen, int)
    assert seqused.tolist() == lengths and seqused.dtype == torch.int32


@pytest.mark.parametrize("name", MASKS)
def test_pad_is_the_inverse(name: str) -> None:
    mask = torch.tensor(MASKS[name])
    hidden = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens, indices, *_ = unpad_input(hidden, mask)
    padded = pad_input(tokens, indices, 2, 4)
    assert torch.equal(padded, hidden * mask[..., None, None])
    weight = torch.randn_like(padded)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), hidden)
    assert torch.equal(gradient, weight * mask[..., None, None])


def test_unused_tokens_are_kept_but_not_counted_as_used() -> None:
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7] and tokens.flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 3, 7] and max_seqlen == 4 and seqused.tolist() == [2, 1]


def test_index_first_axis() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(index_first_axis(x, indices), torch.stack([x[4], x[0], x[4]]))
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    assert index_first_axis(x, indices[:0]).shape == (0, 2, 3)


def test_empty_batch() -> None:
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.zeros(0, 4, 2), torch.zeros(0, 4))
    assert (tokens.shape, indices.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 2), (0,), [0], 0)
    assert seqused.shape == (0,) and pad_input(tokens, indices, 0, 4).shape == (0, 4, 2)


def test_round_trip_through_varlen_attention_is_padded_attention() -> None:
    import hf_flash_plus as hfp

    mask = torch.tensor(MASKS["right"])
    qkv = torch.randn(2, 4, 3, 2, 8, dtype=torch.float64)
    tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, mask)
    out = pad_input(hfp.flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, max_seqlen, causal=True), indices, 2, 4)
    dense = hfp.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(out, dense * mask[..., None, None])
