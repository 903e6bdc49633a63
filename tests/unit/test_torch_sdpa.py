"""The provider torch_sdpa: what it must not promise on GPUs, and batches that its kernels cannot count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, dispatch, use_provider
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.providers import PROVIDERS, torch_sdpa


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
    dispatch.clear_cache()


def test_deterministic_gradients_are_promised_where_torch_was_told() -> None:
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    on_cpu = AttentionInputs(q, q, q, 0.25, deterministic=True).signature()
    on_gpu = on_cpu._replace(device_type="cuda")
    provider = PROVIDERS["torch_sdpa"]
    assert not provider.not_supported_reasons(on_cpu)
    assert any("any order" in reason for reason in provider.not_supported_reasons(on_gpu))
    assert not provider.not_supported_reasons(on_gpu._replace(needs_grad=False))
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert provider.not_supported_reasons(on_gpu), "it warns, and uses the others"
    torch.use_deterministic_algorithms(True)
    assert not provider.not_supported_reasons(on_gpu)


def test_the_choice_follows_what_torch_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PATHS", dict.fromkeys((True, False), ("torch_sdpa", "reference")))
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    signature = AttentionInputs(q, q, q, 0.25, deterministic=True).signature()._replace(device_type="cuda")
    assert dispatch.select_provider(signature).provider.name == "reference"
    torch.use_deterministic_algorithms(True)
    assert dispatch.select_provider(signature).provider.name == "torch_sdpa"
    torch.use_deterministic_algorithms(False)
    assert dispatch.select_provider(signature).provider.name == "reference"


ODD_ROWS = torch.tensor([[True] * 6, [False] * 6] * 3)
EMPTY = {
    "key mask": AttentionMask(key_mask=torch.tensor([[True] * 3 + [False] * 3, [False] * 6])),
    "boolean": AttentionMask(bias=torch.tensor([[True] * 6, [False] * 6] * 3)[None, None]),
    "additive": AttentionMask(
        bias=torch.where(torch.tensor([[True] * 6, [False] * 6] * 3), 0.5, -torch.inf)[None, None]
    ),
    "fewer keys than queries": AttentionMask(causal=True),
}


@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("name", EMPTY)
def test_rows_that_see_nothing(name: str, seqlen_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SDPA gives whatever it likes to such rows: 0, no gradients, and nothing else changes."""
    mask = EMPTY[name]
    if seqlen_q == 1 and mask.bias is not None:
        mask = AttentionMask(bias=mask.bias[:, :, 1:2])
    seqlen_k = 4 if name.startswith("fewer") and seqlen_q > 1 else 6
    leaves = [
        torch.randn(2, length, n, 8, requires_grad=True) for length, n in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
    ]
    real = torch.nn.functional.scaled_dot_product_attention

    def run() -> list[torch.Tensor]:
        with use_provider("torch_sdpa"):
            out = hfp.attention(*leaves, mask)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    def mean_instead_of_zero(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: object, **options: object):  # type: ignore[no-untyped-def]
        out = real(q, k, v, attn_mask=attn_mask, **options)
        nothing = torch.zeros(1) == 1
        if isinstance(attn_mask, torch.Tensor):
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
            nothing = ~seen.any(-1, keepdim=True)
        return torch.where(nothing, 7.0 * q[..., :8], out)

    expected = run()
    assert (expected[0] == 0).flatten(2).all(-1).any() or (name in ("fewer keys than queries",) and seqlen_q == 1)
    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", mean_instead_of_zero)
    monkeypatch.setattr(torch_sdpa, "_zero_where_nothing_is_seen", lambda device: False)
    for _ in range(2):  # the second time from what was remembered
        for got, want in zip(run(), expected, strict=True):
            torch.testing.assert_close(got, want)


MASKS = {
    "causal": AttentionMask(causal=True),
    "full": AttentionMask(),
    "one for all": AttentionMask(bias=torch.rand(1, 1, 6, 6) > 0.3),
    "one each": AttentionMask(bias=torch.rand(5, 4, 6, 6) > 0.3),
}


@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("name", MASKS)
def test_a_batch_in_parts(name: str, seqlen_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same output and gradients as at once; the last part is smaller."""
    mask = MASKS[name]
    if seqlen_q == 1 and mask.bias is not None:
        mask = AttentionMask(bias=mask.bias[:, :, :1])
    leaves = [torch.randn(5, length, heads, 8, requires_grad=True) for length, heads in ((seqlen_q, 4), (6, 2), (6, 2))]

    def run() -> list[torch.Tensor]:
        with use_provider("torch_sdpa"):
            out = hfp.attention(*leaves, mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    whole = run()
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch_sdpa, "_batch_at_a_time", lambda q: 2)
    monkeypatch.setattr(
        torch_sdpa.F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    for got, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(got, want)
    assert len(calls) == 3


@pytest.mark.parametrize("at_a_time", [2, 5], ids=["parts", "whole"])
def test_gradients_reach_sdpa_in_one_layout(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs: cuDNN's backward takes the layout of its first call for that of all others like it."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
            return out.transpose(1, 2).contiguous().transpose(1, 2)  # as the fused kernels lay it out

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(gradient.shape), gradient.stride()))
            return gradient

    monkeypatch.setattr(torch_sdpa, "CUDNN", frozenset({"cpu"}))
    monkeypatch.setattr(torch_sdpa, "_batch_at_a_time", lambda q: at_a_time)
    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", lambda *a, **k: Watched.apply(real(*a, **k)))
    leaves = [torch.randn(5, 6, 4, 8, requires_grad=True) for _ in "qkv"]
    dense = torch.randn(5, 4, 6, 8).transpose(1, 2)  # heads before rows
    expected = None
    for dout in (dense, dense.contiguous(), dense[:, :1].expand(-1, 6, -1, -1), torch.ones(()).expand(5, 6, 4, 8)):
        with use_provider("torch_sdpa"):
            out = hfp.attention(*leaves, AttentionMask())
        assert out.is_contiguous(), "rows before heads, in parts, too"
        grads = torch.autograd.grad(out, leaves, dout)
        if dout.shape == dense.shape and torch.equal(dout, dense):
            expected = expected or grads
            assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    assert len(seen) == 4 * (3 if at_a_time == 2 else 1)
    assert {strides[1:] for _, strides in seen} == {(8, 32, 1)}


@pytest.mark.parametrize(
    "shape, size",
    [
        ((70000, 1, 3, 16), 65535),
        ((1024, 80, 3, 16), 6553),
        ((400, 4, 10496, 128), 399),  # 4 * 10496 * 128 * 400 is beyond 2^31
        ((1, 64, 2**20, 128), 1),  # one is the least
        ((0, 4, 0, 64), 65535),
    ],
)
def test_how_much_at_a_time(shape: tuple[int, ...], size: int) -> None:
    q = torch.empty(shape, device="meta")

    class OnGpu:
        device = torch.device("cuda")

        def __init__(self) -> None:
            self.shape = q.shape

    assert torch_sdpa._batch_at_a_time(OnGpu()) == size  # type: ignore[arg-type]
    assert torch_sdpa._batch_at_a_time(torch.empty(3, 1, 1, 1)) == 3


@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_of_zero_weighs_all_visible_keys_alike(causal: bool) -> None:
    """torch's own fused causal kernel gives NaN: 0 times the -inf of its mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    with use_provider("torch_sdpa"):
        out = hfp.flash_attn_func(q, k, v, softmax_scale=0.0, causal=causal)
    means = v.cumsum(1) / torch.arange(1, 6)[:, None, None] if causal else v.mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(out, means)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq.any() and not dk.any() and dv.isfinite().all()


def test_a_negative_scale_hides_what_the_mask_hides() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with use_provider("torch_sdpa"):
        out = hfp.flash_attn_func(q, k, v, softmax_scale=-0.3, causal=True)
    with use_provider("reference"):
        torch.testing.assert_close(out, hfp.flash_attn_func(q, k, v, softmax_scale=-0.3, causal=True))


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_calls_do_not_ask_sdpa(batch: int, seqlen_q: int, seqlen_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 answers None on GPUs where cuDNN would compute gradients of an empty batch."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **options: None)
    q = torch.full((batch, seqlen_q, 4, 8), float("nan"), requires_grad=True)
    k, v = (torch.full((batch, seqlen_k, 2, dim), float("nan"), requires_grad=True) for dim in (8, 16))
    with use_provider("torch_sdpa"):
        out = hfp.attention(q, k, v, AttentionMask(causal=True))
    assert out.shape == (batch, seqlen_q, 4, 16) and (out == 0).all()
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 5, 1, 64).to(torch.bfloat16).transpose(1, 2).as_strided((2, 1, 5, 64), (320, 1, 64, 1)),
        lambda: torch.randn(2, 3, 5, 65).to(torch.bfloat16)[..., :64],
        lambda: torch.randn(2 * 3 * 5 * 64 + 1).to(torch.bfloat16)[1:].view(2, 3, 5, 64),
    ],
    ids=["one head, any stride", "rows of 65", "begins at two bytes"],
)
def test_half_precision_comes_at_multiples_of_16_bytes(
    make: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's memory-efficient backend is chosen for other tensors, too, and then has no kernel for bf16."""
    monkeypatch.setattr(torch_sdpa, "CUDNN", frozenset({"cpu"}))
    tensor = make().requires_grad_()
    aligned = torch_sdpa._aligned(tensor)
    assert not any(stride % 8 for stride in aligned.stride()[:-1]) and aligned.data_ptr() % 16 == 0
    assert torch.equal(aligned, tensor)
    aligned.sum().backward()
    assert tensor.grad is not None and bool((tensor.grad == 1).all())


def test_what_sdpa_gets_is_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(tensor.stride() for tensor in tensors)
        return real(*tensors, **options)

    monkeypatch.setattr(torch_sdpa, "CUDNN", frozenset({"cpu"}))
    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(2, 5, 1, 64).to(torch.bfloat16).as_strided((2, 5, 1, 64), (320, 64, 1, 1)) for _ in "qkv")
    with use_provider("torch_sdpa"):
        hfp.attention(q, k, v, AttentionMask(causal=True))
    assert len(seen) == 3 and not any(stride % 8 for strides in seen for stride in strides[:-1])


def test_what_lies_well_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_sdpa, "CUDNN", frozenset({"cpu"}))
    for tensor in (torch.randn(2, 5, 3, 64).to(torch.bfloat16).transpose(1, 2), torch.randn(2, 3, 5, 65)[..., :64]):
        assert torch_sdpa._aligned(tensor) is tensor
    one = torch.randn(2, 5, 1, 64).to(torch.bfloat16).as_strided((2, 1, 5, 64), (320, 1, 64, 1))
    assert torch_sdpa._aligned(one).data_ptr() == one.data_ptr()


@pytest.mark.parametrize(
    "keys, v_dim, causal, gradients, asked",
    [
        (192, 8, True, True, False),
        (192, 8, False, True, True),  # no mask
        (192, 8, True, False, True),
        (191, 8, True, True, True),
        (128, 8, True, True, True),
        (6, 16, True, False, False),
        (6, 16, False, True, True),
    ],
)
def test_where_cudnn_is_not_asked(
    keys: int, v_dim: int, causal: bool, gradients: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And may be asked afterwards as before, also when the call fails."""
    seen: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if len(seen) > 1:
            raise RuntimeError("no kernel")
        return real(*args, **options)

    monkeypatch.setattr(torch_sdpa, "CUDNN", frozenset({"cpu"}))
    monkeypatch.setattr(torch_sdpa.F, "scaled_dot_product_attention", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q, k = (torch.randn(1, n, 2, 8, requires_grad=gradients) for n in (5, keys))
    v = torch.randn(1, keys, 2, v_dim)
    with use_provider("torch_sdpa"):
        hfp.attention(q, k, v, AttentionMask(causal=causal))
        with pytest.raises(RuntimeError, match="no kernel"):
            hfp.attention(q, k, v, AttentionMask(causal=causal))
    assert seen == [asked and before] * 2
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_sinks_are_not_rounded_to_the_queries_dtype() -> None:
    """A score of 20 beside a sink of 20.2: bf16 has 20.25 for it."""
    k = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    k[..., 0] = 1
    with hfp.use_provider("torch_sdpa"):
        out = hfp.flash_attn_func(k * 20, k, torch.ones_like(k), softmax_scale=1.0, s_aux=torch.tensor([20.2]))
    assert abs(out[0, 0, 0, 0].item() - 1 / (1 + math.exp(0.2))) < 2e-3


@pytest.mark.parametrize("empty", ("batch", "rows"))
def test_sinks_of_empty_calls_stay_in_the_graph(empty: str) -> None:
    sinks = torch.zeros(4, requires_grad=True)
    q = torch.randn(0, 3, 4, 16) if empty == "batch" else torch.randn(2, 0, 4, 16)
    k = torch.randn(q.shape[0], 3, 4, 16)
    with hfp.use_provider("torch_sdpa"):
        hfp.flash_attn_func(q, k, k, s_aux=sinks).sum().backward()
    assert sinks.grad is not None and (sinks.grad == 0).all()
