"""``flash_attn_with_kvcache`` against the oracle: the cache it leaves behind, and what it computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp
from hf_flash_plus import NoProviderError, dispatch, flash_attn_with_kvcache, use_provider

from . import oracle
from .oracle import assert_close

BATCH, ROWS, SLOTS, HEADS, HEADS_K, DIM = 2, 4, 10, 4, 2, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """One call on a cache with room: the arguments, and what the definition says about it."""

    def __init__(self, seqlen_q: int = 2, new: int = 2, v_dim: int = DIM, paged: bool = False) -> None:
        self.paged, self.new, self.seqlen_q = paged, new, seqlen_q
        self.q = randn(BATCH, seqlen_q, HEADS, DIM, seed=1)
        self.k = randn(BATCH, new, HEADS_K, DIM, seed=2) if new else None
        self.v = randn(BATCH, new, HEADS_K, v_dim, seed=3) if new else None
        if paged:
            self.table: Tensor | None = torch.tensor([[4, 1, 6], [0, 5, 2]], dtype=torch.int32)
            self.k_cache, self.v_cache = randn(7, 4, HEADS_K, DIM, seed=4), randn(7, 4, HEADS_K, v_dim, seed=5)
        else:
            self.table = None
            self.k_cache, self.v_cache = (
                randn(ROWS, SLOTS, HEADS_K, DIM, seed=4),
                randn(ROWS, SLOTS, HEADS_K, v_dim, seed=5),
            )

    def slot(self, b: int, place: int, batch_idx: list[int]) -> tuple[int, int]:
        """Where key ``place`` of batch element b lives in the cache."""
        if self.table is not None:
            size = self.k_cache.shape[1]
            return int(self.table[b, place // size]), place % size
        return batch_idx[b], place

    def run(
        self,
        used: list[int] | int | None,
        batch_idx: list[int] | None = None,
        leftpad: list[int] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = True,
        provider: str | None = None,
        **options: Any,
    ) -> None:
        """Call, then compare the caches, the output and the log-sum-exp with the definition."""
        slots = SLOTS if self.table is None else self.table.shape[1] * self.k_cache.shape[1]
        rows = batch_idx or list(range(BATCH))
        lengths = [slots] * BATCH if used is None else [used] * BATCH if isinstance(used, int) else used
        causal, window = options.get("causal", False), options.get("window_size", (-1, -1))
        # What must be in the caches afterwards.
        k_after, v_after = self.k_cache.clone(), self.v_cache.clone()
        q, new_k = self.q, self.k
        if rotary is not None and new_k is not None:
            by_row = causal or window != (-1, -1)
            q_places = [[n + (i if by_row else 0) for i in range(self.seqlen_q)] for n in lengths]
            q = oracle.rotary(q, *rotary, q_places, interleaved)
            new_k = oracle.rotary(new_k, *rotary, [[n + i for i in range(self.new)] for n in lengths], interleaved)
        for b in range(BATCH):
            for i in range(self.new):
                page, place = self.slot(b, lengths[b] + i, rows)
                k_after[page, place] = new_k[b, i]
                v_after[page, place] = self.v[b, i]
        wants_lse = provider != "torch_sdpa"
        kwargs = dict(
            rotary_cos=rotary and rotary[0],
            rotary_sin=rotary and rotary[1],
            cache_seqlens=torch.tensor(used, dtype=torch.int32) if isinstance(used, list) else used,
            cache_batch_idx=None if batch_idx is None else torch.tensor(batch_idx, dtype=torch.int32),
            cache_leftpad=None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32),
            block_table=self.table,
            rotary_interleaved=interleaved,
            return_softmax_lse=wants_lse,
            **options,
        )
        call_k, call_v = (None if t is None else t.clone() for t in (self.k, self.v))
        with use_provider(provider or "reference"):
            result = hfp.flash_attn_with_kvcache(self.q, self.k_cache, self.v_cache, call_k, call_v, **kwargs)
        out, lse = result if wants_lse else (result, None)
        torch.testing.assert_close(self.k_cache, k_after, atol=1e-12, rtol=0)
        assert torch.equal(self.v_cache, v_after), "values are written as they came, and nothing else changes"
        for tensor, before in ((self.k, call_k), (self.v, call_v)):
            assert tensor is None or torch.equal(tensor, before), "the new keys and values are the caller's"
        outs, lses = [], []
        alibi = options.get("alibi_slopes")
        for b in range(BATCH):
            total = lengths[b] + self.new
            where = [self.slot(b, place, rows) for place in range(total)]
            keys = torch.stack([k_after[page, place] for page, place in where])[None] if where else k_after[:1, :0]
            values = torch.stack([v_after[page, place] for page, place in where])[None] if where else v_after[:1, :0]
            first = leftpad[b] if leftpad else 0
            one = oracle.attention(
                q[b : b + 1], keys, values, causal=causal, window=window, scale=options.get("softmax_scale"),
                softcap=options.get("softcap", 0.0), sinks=options.get("s_aux"),
                alibi=None if alibi is None else alibi if alibi.dim() == 1 else alibi[b],
                sees=lambda _b, _h, _i, j, first=first: j >= first,
            )  # fmt: skip
            outs.append(one.out)
            lses.append(one.lse)
        assert_close(out, torch.cat(outs), torch.float64)
        if lse is not None:
            assert lse.dtype == torch.float32
            assert_close(lse, torch.cat(lses), torch.float32)


PROVIDERS = ("reference", "torch_sdpa")
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (3, -1)},
    "two_sided_window": {"window_size": (2, 1)},
    "scale": {"softmax_scale": 0.2},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 1.0, 0.0625]), "causal": True},
    "alibi_by_batch": {"alibi_slopes": torch.tensor([[0.5, 0.25, 1.0, 0.0625], [2.0, 0.125, 0.75, 1.5]])},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64), "causal": True},
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("used", [None, 5, [3, 8]], ids=["whole cache", "int", "tensor"])
def test_reading_a_cache(used: Any, feature: str, provider: str) -> None:
    Case(new=0).run(used, provider=provider, **FEATURES[feature])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("used", [5, [3, 8], [0, 0]], ids=["int", "tensor", "empty"])
def test_appending(used: Any, feature: str, provider: str) -> None:
    Case().run(used, provider=provider, **FEATURES[feature])


@pytest.mark.parametrize("feature", FEATURES)
def test_softcap_with_all_else(feature: str) -> None:
    Case().run([3, 8], softcap=1.2, **FEATURES[feature])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("new", [0, 2])
def test_cache_batch_idx(new: int, provider: str) -> None:
    for rows in ([3, 1], [0, 2]):
        Case(new=new).run([3, 8], batch_idx=rows, causal=True, provider=provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("new", [0, 2])
@pytest.mark.parametrize("feature", ["full", "causal", "window", "alibi", "sinks"])
def test_cache_leftpad(feature: str, new: int, provider: str) -> None:
    Case(new=new).run([3, 8], leftpad=[2, 5], provider=provider, **FEATURES[feature])
    Case(new=new).run([3, 8], batch_idx=[2, 0], leftpad=[0, 8], provider=provider, **FEATURES[feature])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_block_table(feature: str, new: int, provider: str) -> None:
    # New keys cross from one page into the next.
    Case(new=new, paged=True).run([3, 7], provider=provider, **FEATURES[feature])
    Case(new=new, paged=True).run([0, 9], provider=provider, **FEATURES[feature])
    if not new:
        Case(new=0, paged=True).run(None, provider=provider, **FEATURES[feature])


ROTARY = {
    # rotary_dim / 2 of a head of 8
    "whole": 4,
    "partial": 2,
}


@pytest.mark.parametrize("feature", ["full", "causal", "window", "two_sided_window"])
@pytest.mark.parametrize("half", ROTARY.values(), ids=ROTARY)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("paged", [False, True])
def test_rotary(paged: bool, interleaved: bool, half: int, feature: str) -> None:
    angles = randn(16, half, seed=9)
    rotary = (angles.cos(), angles.sin())
    Case(paged=paged, new=2).run([3, 7], rotary=rotary, interleaved=interleaved, **FEATURES[feature])
    Case(paged=paged, seqlen_q=1, new=1).run(4, rotary=rotary, interleaved=interleaved, **FEATURES[feature])


def test_rotary_is_interleaved_by_default() -> None:
    angles = randn(16, 4, seed=9)
    results = []
    for kwargs in ({}, {"rotary_interleaved": True}, {"rotary_interleaved": False}):
        case = Case()
        results.append(
            hfp.flash_attn_with_kvcache(
                case.q, case.k_cache, case.v_cache, case.k, case.v, angles.cos(), angles.sin(), 3, **kwargs
            )
        )
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotary_in_low_precision(dtype: torch.dtype) -> None:
    angles = randn(16, 4, seed=9)
    case = Case()
    q, k, v = (t.to(dtype) for t in (case.q, case.k, case.v))
    k_cache, v_cache = case.k_cache.to(dtype), case.v_cache.to(dtype)
    out = hfp.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, angles.cos().to(dtype), angles.sin().to(dtype), 3, causal=True
    )
    assert out.dtype == dtype and k_cache.dtype == dtype
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rotated = oracle.rotary(k, cos, sin, [[3, 4]] * BATCH, True)
    assert_close(k_cache[:BATCH, 3:5], rotated, dtype)
    turned = oracle.rotary(q, cos, sin, [[3, 4]] * BATCH, True)
    assert_close(out, oracle.attention(turned, k_cache[:BATCH, :5], v_cache[:BATCH, :5], causal=True).out, dtype, 2)


@pytest.mark.parametrize(("seqlen_q", "new"), [(1, 1), (1, 3), (3, 1), (4, 2)])
def test_more_queries_than_new_keys_and_fewer(seqlen_q: int, new: int) -> None:
    Case(seqlen_q, new).run([2, 6], causal=True)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_v_head_dim(provider: str) -> None:
    Case(v_dim=4).run([2, 6], causal=True, provider=provider)
    Case(v_dim=4, paged=True, new=0).run([2, 6], causal=True, provider=provider)


@pytest.mark.parametrize("splits", [0, 1, 4])
def test_num_splits_is_a_hint(splits: int) -> None:
    Case().run([3, 8], causal=True, num_splits=splits)


def test_rows_that_see_nothing() -> None:
    case = Case(seqlen_q=3, new=0)
    out, lse = hfp.flash_attn_with_kvcache(
        case.q, case.k_cache, case.v_cache, cache_seqlens=torch.tensor([0, 2], dtype=torch.int32), causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert (out[1, 0] == 0).all() and (lse[1, :, 0] == -math.inf).all()
    assert (out[1, 1:] != 0).all() and torch.isfinite(lse[1, :, 1:]).all()


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("lengths", [4, [4, 7]], ids=["int", "tensor"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_slots_beyond_the_lengths_may_hold_anything(provider: str, lengths: int | list[int], paged: bool) -> None:
    # A cache made by torch.empty() may hold NaN where nothing was written yet.
    case = Case(new=0, paged=paged)
    used = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths

    def call() -> Tensor:
        with use_provider(provider):
            out: Tensor = hfp.flash_attn_with_kvcache(
                case.q, case.k_cache, case.v_cache, cache_seqlens=used, block_table=case.table, causal=True
            )
        return out

    want = call()
    for b, length in enumerate(lengths if isinstance(lengths, list) else [lengths] * BATCH):
        for place in range(length, 12 if paged else SLOTS):
            case.k_cache[case.slot(b, place, [0, 1])] = math.nan
            case.v_cache[case.slot(b, place, [0, 1])] = math.nan
    torch.testing.assert_close(call(), want)


def test_decoding_step_by_step_is_one_causal_call() -> None:
    length = 6
    q, k, v = randn(BATCH, length, HEADS, DIM), randn(BATCH, length, HEADS_K, DIM), randn(BATCH, length, HEADS_K, DIM)
    k_cache, v_cache = torch.zeros(BATCH, 8, HEADS_K, DIM).double(), torch.zeros(BATCH, 8, HEADS_K, DIM).double()
    outs = [
        hfp.flash_attn_with_kvcache(
            q[:, n : n + 1], k_cache, v_cache, k[:, n : n + 1], v[:, n : n + 1], cache_seqlens=n, causal=True
        )
        for n in range(length)
    ]
    assert_close(torch.cat(outs, 1), oracle.attention(q, k, v, causal=True).out, torch.float64)
    assert torch.equal(k_cache[:, :length], k)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize(("of_q", "of_cache"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_autocast_joins_dtypes_as_the_error_message_promises(
    of_q: str, of_cache: str, appends: bool, paged: bool
) -> None:
    q = randn(BATCH, 2, HEADS, DIM).to(getattr(torch, of_q))
    cache = randn(6, 4, HEADS_K, DIM, seed=4) if paged else randn(BATCH, 8, HEADS_K, DIM, seed=4)
    cache = cache.to(getattr(torch, of_cache))
    new = randn(BATCH, 2, HEADS_K, DIM, seed=2).to(cache.dtype) if appends else None
    table = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32) if paged else None

    def call(q: Tensor, cache: Tensor, new: Tensor | None) -> Tensor:
        out: Tensor = hfp.flash_attn_with_kvcache(
            q, cache, cache.clone(), new, new, cache_seqlens=5, block_table=table, causal=True
        )
        return out

    before = cache.clone()
    with pytest.raises(ValueError, match=r"or run under torch\.autocast"):
        call(q, cache, new)
    assert torch.equal(cache, before)
    want = call(q.double(), cache.double(), None if new is None else new.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = call(q, cache, new)
    assert out.dtype == torch.bfloat16
    assert_close(out, want, torch.bfloat16)
    assert cache.dtype == before.dtype and torch.equal(cache, before) == (not appends)


def test_forward_only() -> None:
    case = Case(new=0)
    out = hfp.flash_attn_with_kvcache(case.q.requires_grad_(), case.k_cache, case.v_cache)
    assert not out.requires_grad


def test_cache_that_is_a_view_of_a_larger_one_is_updated_in_place() -> None:
    storage = randn(2, ROWS, SLOTS, HEADS_K, DIM)
    case = Case()
    hfp.flash_attn_with_kvcache(case.q, storage[0], storage[1], case.k, case.v, cache_seqlens=3)
    assert torch.equal(storage[0, :BATCH, 3:5], case.k) and torch.equal(storage[1, :BATCH, 3:5], case.v)


def test_new_keys_that_require_gradients_can_be_appended() -> None:
    # generate() outside no_grad: weights require gradients, the cache does not.
    case = Case()
    out = hfp.flash_attn_with_kvcache(
        case.q, case.k_cache, case.v_cache, case.k.requires_grad_(), case.v.requires_grad_(), cache_seqlens=3
    )
    assert not out.requires_grad and not case.k_cache.requires_grad


REFUSED: dict[str, dict[str, Any]] = {
    "q in another dtype": {"q": randn(BATCH, 2, HEADS, DIM).half()},
    "softcap": {"softcap": -1.0},
    "softmax_scale": {"softmax_scale": math.nan},
    "alibi_slopes": {"alibi_slopes": torch.zeros(3)},
    "s_aux": {"s_aux": torch.zeros(3)},
    "headdim of q": {"q": randn(BATCH, 2, HEADS, 4)},
    "heads of q": {"q": randn(BATCH, 2, 3, DIM)},
    "window_size": {"window_size": (-2, 0)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_call_leaves_the_cache_alone(what: str) -> None:
    case = Case()
    arguments = {"q": case.q, "cache_seqlens": 3, "k": case.k, "v": case.v, **REFUSED[what]}
    k_before, v_before = case.k_cache.clone(), case.v_cache.clone()
    with pytest.raises(ValueError):
        hfp.flash_attn_with_kvcache(k_cache=case.k_cache, v_cache=case.v_cache, **arguments)
    assert torch.equal(case.k_cache, k_before) and torch.equal(case.v_cache, v_before)


def test_a_call_that_nobody_serves_writes_nothing() -> None:
    q, new, cache = torch.randn(2, 1, 2, 16), torch.ones(2, 1, 2, 16), torch.zeros(2, 8, 2, 16)
    with use_provider("torch_sdpa"), pytest.raises(NoProviderError, match="softcap"):
        flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=2, softcap=3.0)
    assert (cache == 0).all()


def test_rotary_rows_for_lengths_that_can_be_read() -> None:
    """As many rows as the lengths need, not as many as they could."""
    q, new, cos = torch.randn(1, 3, 2, 16), torch.randn(1, 1, 2, 16), torch.rand(8, 8)
    outs = []
    for lengths in (3, torch.tensor([3], dtype=torch.int32)):
        k, v = torch.ones(1, 8, 2, 16), torch.ones(1, 8, 2, 16)
        outs.append(flash_attn_with_kvcache(q, k, v, new, new, cos, cos, cache_seqlens=lengths, causal=True))
    torch.testing.assert_close(*outs)


def test_no_pages_and_no_keys() -> None:
    pages, table = torch.randn(0, 4, 2, 16), torch.zeros(2, 2, dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    out = flash_attn_with_kvcache(torch.randn(2, 1, 2, 16), pages, pages, cache_seqlens=lengths, block_table=table)
    assert (out == 0).all()


@pytest.mark.parametrize("lengths", (6, torch.tensor([6, 4], dtype=torch.int32)), ids=("number", "tensor"))
def test_the_widest_window_hides_nothing(lengths: int | Tensor) -> None:
    q, k = torch.randn(2, 1, 2, 16), torch.randn(2, 8, 2, 16)
    wide, none = (
        flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths, window_size=(side, side)) for side in (2**63 - 1, -1)
    )
    torch.testing.assert_close(wide, none)


def test_the_look_for_a_provider_asks_for_what_the_call_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, which some provider might not have: the function is forward only; and the log-sum-exp if wanted."""
    asked: list[Any] = []
    select = dispatch.select_provider
    monkeypatch.setattr(dispatch, "select_provider", lambda signature: asked.append(signature) or select(signature))
    q, new, cache = torch.randn(2, 1, 2, 16, requires_grad=True), torch.ones(2, 1, 2, 16), torch.zeros(2, 8, 2, 16)
    flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=2, return_softmax_lse=True)
    assert len(asked) == 2 and not any(signature.needs_grad for signature in asked)
    assert asked[0] == asked[1]
