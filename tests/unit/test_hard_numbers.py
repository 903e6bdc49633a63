"""Numbers that hurt, on the CPU: infinities, NaN where nobody may look, huge logits, fp16's end, nothing to see."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, use_provider
from hf_flash_plus.checks import oracle
from hf_flash_plus.checks.compare import judge

HALF_AND_SINGLE = [torch.float16, torch.bfloat16, torch.float32]
PROVIDERS = ("reference", "torch_sdpa")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(batch: int = 2, seqlen: int = 9, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32):
    return [draw(batch, seqlen, heads, dim, dtype=dtype, seed=i).requires_grad_() for i in range(3)]


def compare(provider: str, call: oracle.Dense, mask: AttentionMask, **options: object) -> Tensor:
    """Output and gradients of a call against float64; returns the output."""
    with use_provider(provider):
        out = hfp.attention(call.q, call.k, call.v, mask, **options)
    assert not out.isnan().any()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    grads = torch.autograd.grad(out, (call.q, call.k, call.v), dout)
    assert not any(g.isnan().any() for g in grads)
    judge(out, call, dout, dict(zip("qkv", grads)))
    return out


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype, provider: str) -> None:
    """exp() of such a number is infinite in every dtype; softmax is a choice of one key."""
    q, k, v = qkv(dtype=dtype)
    call = oracle.Dense(q, k, v, scale=3000.0)
    out = compare(provider, call, AttentionMask(), softmax_scale=3000.0)
    best = (q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT).argmax(-1)  # (batch, heads, rows)
    chosen = v.transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, 8)).transpose(1, 2)
    clear = (out - chosen).abs().amax(-1) < 0.02  # two keys may be nearly equal
    assert clear.float().mean() > 0.8


@pytest.mark.parametrize("provider", PROVIDERS)
def test_scores_that_overflow_fp16(provider: str) -> None:
    """q . k is 120000, more than fp16 holds, before the scale brings it back."""
    q, k, v = (t.detach() for t in qkv(dtype=torch.float16, dim=64))
    q, k = (q.sign() * 43.0).requires_grad_(), (q.sign() * 43.0).requires_grad_()
    v = v.requires_grad_()
    assert torch.isinf((q[0, :, 0] @ k[0, :, 0].T).half()).any()
    with use_provider(provider):
        out = hfp.attention(q, k, v, AttentionMask(causal=True))
    assert out.isfinite().all()
    exact = oracle.attention(
        oracle.Dense(q.double(), k.double(), v.double(), seen=torch.ones(9, 9).tril().bool()[None, None])
    )
    assert (out.double() - exact.out).abs().max() < 4e-3


BAD_NUMBERS = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
HIDDEN = torch.arange(9) >= 6
MASKS = {
    "key_mask": AttentionMask(key_mask=~HIDDEN[None]),
    "intervals": AttentionMask(row_intervals=torch.tensor([[[0, 6]]], dtype=torch.int32).expand(1, 9, 2)),
    "boolean mask": AttentionMask(bias=(~HIDDEN)[None, None, None].expand(1, 1, 9, 9)),
}


@BAD_NUMBERS
@pytest.mark.parametrize("kind", MASKS)
def test_keys_that_no_row_sees_may_hold_anything(kind: str, bad: float) -> None:
    q, k, v = (t.detach() for t in qkv())
    with use_provider("reference"):
        expected = hfp.attention(q, k, v, MASKS[kind])
        k[:, 6:], v[:, 6:] = bad, bad
        assert torch.equal(hfp.attention(q, k, v, MASKS[kind]), expected)


@BAD_NUMBERS
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("causal", [False, True])
def test_slots_of_a_cache_that_nobody_wrote_may_hold_anything(causal: bool, provider: str, bad: float) -> None:
    q, k, v = (t.detach() for t in qkv())
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    with use_provider(provider):
        expected = hfp.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=causal)
        for b, length in enumerate(lengths.tolist()):
            k[b, length:], v[b, length:] = bad, bad
        got = hfp.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=causal)
    torch.testing.assert_close(got, expected)


@BAD_NUMBERS
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_bad_query_spoils_its_own_row_only(provider: str, bad: float) -> None:
    q, k, v = (t.detach() for t in qkv())
    with use_provider(provider):
        expected = hfp.flash_attn_func(q, k, v, causal=True)
        q[1, 4, 0] = bad
        got = hfp.flash_attn_func(q, k, v, causal=True)
    spoiled = torch.zeros(2, 9, 2, dtype=torch.bool)
    spoiled[1, 4, 0] = True
    if provider == "reference":  # torch's CPU kernel answers 0 to a row of NaN (2.13)
        assert got[spoiled].isnan().all(), "an answer made of NaN must not look like one"
    torch.testing.assert_close(got[~spoiled], expected[~spoiled])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_infinite_bias_chooses(provider: str) -> None:
    """-inf hides a key, finfo.min nearly does, and a row of nothing but -inf gives 0 and no gradient."""
    q, k, v = qkv()
    bias = torch.zeros(1, 1, 9, 9)
    bias[..., 0, :] = -math.inf
    bias[..., 1, 3:] = -math.inf
    bias[..., 2, 3:] = torch.finfo(torch.float32).min
    call = oracle.Dense(q, k, v, bias=bias)
    out = compare(provider, call, AttentionMask(bias=bias))
    assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_no_row_sees_anything(dtype: torch.dtype, provider: str) -> None:
    q, k, v = qkv(dtype=dtype)
    for mask in (
        AttentionMask(row_intervals=torch.zeros(1, 9, 2, dtype=torch.int32)),
        AttentionMask(key_mask=torch.zeros(1, 9, dtype=torch.bool)),
        AttentionMask(bias=torch.zeros(1, 1, 9, 9, dtype=torch.bool)),
        AttentionMask(causal=True, key_mask=torch.zeros(2, 9, dtype=torch.bool)),
    ):
        with use_provider(provider):
            out = hfp.attention(q, k, v, mask)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "batch, seqlen_q, seqlen_k", [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0), (1, 1, 1), (2, 1, 5)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_0_and_1(batch: int, seqlen_q: int, seqlen_k: int, causal: bool, provider: str) -> None:
    q = draw(batch, seqlen_q, 4, 8).requires_grad_()
    k, v = (draw(batch, seqlen_k, 2, 8, seed=i).requires_grad_() for i in (1, 2))
    place = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    seen = (torch.arange(seqlen_k)[None] <= place)[None, None] if causal else None
    compare(provider, oracle.Dense(q, k, v, seen=seen), AttentionMask(causal=causal))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_dim_512(provider: str) -> None:
    q, k, v = qkv(batch=1, seqlen=5, dim=512)
    compare(provider, oracle.Dense(q, k, v), AttentionMask())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_many_tiny_sequences(provider: str) -> None:
    """1024 sequences of 0 to 3 tokens, in one packed row and in a padded batch: the same answers."""
    lengths = torch.randint(0, 4, (1024,), generator=torch.Generator().manual_seed(0))
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total = int(cu[-1])
    q, k, v = (draw(total, 2, 8, seed=i) for i in range(3))
    with use_provider(provider):
        packed = hfp.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, causal=True)
        padded = [torch.zeros(1024, 3, 2, 8) for _ in range(3)]
        real = torch.arange(3) < lengths[:, None]
        for full, flat in zip(padded, (q, k, v)):
            full[real] = flat
        mask = AttentionMask(causal=True, key_mask=real)
        batch = hfp.attention(*padded, mask)[real]
    torch.testing.assert_close(packed, batch)


def test_softcap_of_huge_scores() -> None:
    q, k, v = qkv()
    call = oracle.Dense(q, k, v, softcap=2.0, scale=1e6)
    with use_provider("reference"):
        out = hfp.flash_attn_func(q, k, v, softcap=2.0, softmax_scale=1e6)
    judge(out, replace(call), None, None)


@pytest.mark.parametrize("sink", [1e30, -1e30, -math.inf])
def test_sinks_at_the_end_of_the_numbers(sink: float) -> None:
    """A sink that outweighs everything leaves 0; one that weighs nothing changes nothing."""
    q, k, v = qkv()
    sinks = torch.full((2,), sink)
    with use_provider("reference"):
        out = hfp.flash_attn_func(q, k, v, s_aux=sinks)
        plain = hfp.flash_attn_func(q, k, v)
    if sink > 0:
        assert (out == 0).all()
    else:
        torch.testing.assert_close(out, plain)
