"""The provider ``flaggems`` on a GPU: right on every call it accepts (against float64), and refusing the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_flash_plus
from hf_flash_plus.dispatch import NoProviderError, use_provider
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask, PackedSequences, varlen_mask
from hf_flash_plus.providers import PROVIDERS

pytestmark = pytest.mark.gpu

FLAGGEMS: Any = PROVIDERS["flaggems"]


@pytest.fixture(autouse=True)
def _needs_flag_gems() -> None:
    reason = FLAGGEMS.unavailable_reason()
    if reason:
        pytest.skip(reason)


def draw(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, seqlen_q, heads, dim, device="cuda").to(dtype)
    k, v = (torch.randn(batch, seqlen_k, kv_heads, dim, device="cuda").to(dtype) for _ in range(2))
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The oracle: float64, with its log-sum-exp."""
    with use_provider("reference"):
        out, lse, _ = hf_flash_plus.flash_attn_func(
            q.double(), k.double(), v.double(), return_attn_probs=True, **options
        )
    return out, lse


def eager_error(q: Tensor, k: Tensor, v: Tensor, want: Tensor, **options: Any) -> float:
    """The error that eager attention in the tensors' own precision makes: the budget of flash-attn's own tests."""
    with use_provider("reference"):
        return (hf_flash_plus.flash_attn_func(q, k, v, **options).double() - want).abs().max().item()


def check(q: Tensor, k: Tensor, v: Tensor, lse_too: bool = True, **options: Any) -> None:
    want, want_lse = exact(q, k, v, **options)
    with use_provider("flaggems"):
        if lse_too:
            out, lse, _ = hf_flash_plus.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        else:
            out = hf_flash_plus.flash_attn_func(q, k, v, **options)
    assert out.is_contiguous() and out.dtype == q.dtype and out.shape == want.shape
    assert not out.isnan().any()
    unit = 2.0**-8 if q.dtype == torch.bfloat16 else 2.0**-11
    limit = 2 * eager_error(q, k, v, want, **options) + unit * want.abs().max().item()
    assert (out.double() - want).abs().max().item() <= limit
    if lse_too:
        assert lse.shape == want_lse.shape and lse.dtype == torch.float32
        assert torch.equal(lse == -math.inf, want_lse == -math.inf) and not lse.isnan().any()
        seen = want_lse > -math.inf
        assert not seen.any() or (lse[seen] - want_lse[seen]).abs().max().item() <= 2e-3


# FlagGems compiles anew for every head count, batch, window and scale, so the cases are chosen, not multiplied.
@pytest.mark.parametrize("dim", [32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_head_dims(dim: int, causal: bool) -> None:
    check(*draw(2, 256, 256, 4, 4, dim), causal=causal)


def test_fp16() -> None:
    check(*draw(2, 256, 256, 4, 4, 64, torch.float16), causal=True)
    check(*draw(2, 385, 385, 4, 4, 128, torch.float16), causal=True)


@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (6, 6)])
@pytest.mark.parametrize(
    "seqlen_q,seqlen_k",
    # 129, 200, 385: rows for which FlagGems' dense kernel leaves out keys, so that they must not reach it.
    [
        (1, 2000),
        (4, 513),
        (128, 500),
        (129, 129),
        (200, 260),
        (256, 700),
        (385, 385),
        (385, 445),
        (500, 100),
        (512, 100),
    ],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths(heads: int, kv_heads: int, seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    check(*draw(2, seqlen_q, seqlen_k, heads, kv_heads, 64), causal=causal)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(100, 385), (256, 256), (385, 385), (300, 100)])
@pytest.mark.parametrize("window", [(64, 64), (64, -1), (-1, 64), (1000, 5), (0, 0)])
def test_windows(window: tuple[int, int], seqlen_q: int, seqlen_k: int) -> None:
    check(*draw(2, seqlen_q, seqlen_k, 4, 2, 64), window_size=window)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 385), (256, 256), (385, 385), (300, 100)])
@pytest.mark.parametrize("window", [(64, 0), (64, -1)])
def test_causal_windows(window: tuple[int, int], seqlen_q: int, seqlen_k: int) -> None:
    check(*draw(2, seqlen_q, seqlen_k, 4, 2, 64), causal=True, window_size=window)


@pytest.mark.parametrize("seqlen", [256, 385])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_softcap_and_scale(seqlen: int, causal: bool) -> None:
    q, k, v = draw(2, seqlen, seqlen, 8, 2, 64)
    check(q, k, v, causal=causal, softcap=30.0)
    for scale in (0.03, 0.0, -0.1):
        check(q, k, v, causal=causal, softmax_scale=scale)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(256, 256), (385, 385), (1, 300)])
@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_alibi(seqlen_q: int, seqlen_k: int, per_batch: bool, causal: bool) -> None:
    slopes = torch.rand(*((2, 8) if per_batch else (8,)), device="cuda") * 0.3
    check(*draw(2, seqlen_q, seqlen_k, 8, 8, 64), lse_too=not causal, causal=causal, alibi_slopes=slopes)


def test_strides() -> None:
    q, k, v = draw(2, 256, 256, 8, 2, 64)
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    check(*by_head, causal=True)
    check(by_head[0], k, by_head[2], causal=True)  # values with other strides than the keys
    wide = torch.randn(2, 256, 8 * 64 + 24, device="cuda", dtype=torch.bfloat16)[..., : 8 * 64].unflatten(-1, (8, 64))
    check(wide, wide, wide, causal=True)
    check(*torch.randn(2, 256, 3, 8, 64, device="cuda", dtype=torch.bfloat16).unbind(2), causal=True)


def test_nothing_to_see() -> None:
    q, k, v = draw(2, 64, 0, 4, 4, 64)
    check(q, k, v)
    q, k, v = draw(2, 0, 64, 4, 4, 64)
    with use_provider("flaggems"):
        assert hf_flash_plus.flash_attn_func(q, k, v).shape == (2, 0, 4, 64)


@pytest.mark.parametrize("window", [(-1, -1), (20, -1)])
@pytest.mark.parametrize(
    "lengths_q,lengths_k",
    [
        ([5, 300, 128, 77], [5, 300, 128, 77]),
        ([5, 30, 128], [50, 300, 12]),
        ([1, 1, 1], [50, 300, 1200]),
        ([1, 0, 1], [50, 7, 60]),
        ([7, 0, 128], [5, 30, 0]),
    ],
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed(lengths_q: list[int], lengths_k: list[int], window: tuple[int, int], causal: bool) -> None:
    """The varlen call, straight to the provider; three rows more than the sequences have belong to nobody."""
    q, k, v = draw(1, sum(lengths_q) + 3, sum(lengths_k) + 3, 8, 2, 64)
    cu_q, cu_k = (
        torch.tensor([0, *n], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    mask = varlen_mask(cu_q, cu_k, q.shape[1], causal=causal, window=window)
    packed = PackedSequences(cu_q, cu_k, max(lengths_q), max(lengths_k), causal, window)
    mask = AttentionMask(row_intervals=mask.row_intervals, packed=packed)
    got = FLAGGEMS.forward(AttentionInputs(q, k, v, 0.125, mask, needs_lse=True))
    want = PROVIDERS["reference"].forward(AttentionInputs(q.double(), k.double(), v.double(), 0.125, mask))
    assert (got.out.double() - want.out).abs().max().item() <= 2e-2
    assert torch.equal(got.softmax_lse == -math.inf, want.softmax_lse == -math.inf)
    seen = want.softmax_lse > -math.inf
    assert (got.softmax_lse[seen] - want.softmax_lse[seen]).abs().max().item() <= 2e-3


@pytest.mark.parametrize("seqlen", [256, 385])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (64, 0)}, {"softcap": 20.0}], ids=str)
def test_gradients(seqlen: int, options: dict[str, Any]) -> None:
    """FlagGems' forward with our backward, against float64; skipped where our kernels cannot be used."""
    if PROVIDERS.get("triton") is None or PROVIDERS["triton"].unavailable_reason():
        pytest.skip("the provider triton, which does the backward, is not usable")
    q, k, v = draw(2, seqlen, seqlen, 8, 2, 64)
    dout = torch.randn_like(q)

    def grads(provider: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        with use_provider(provider):
            out = hf_flash_plus.flash_attn_func(*leaves, **options)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    want, eager = grads("reference", torch.float64), grads("reference", torch.bfloat16)
    for name, got, exactly, budget in zip("qkv", grads("flaggems", torch.bfloat16), want, eager):
        limit = 3 * (budget.double() - exactly).abs().max().item() + 2.0**-8 * exactly.abs().max().item()
        assert (got.double() - exactly).abs().max().item() <= limit, f"d{name}"


@pytest.mark.parametrize(
    "change,word",
    [
        ({"s_aux": "sinks"}, "sinks"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"dtype": torch.float32}, "float32"),
        ({"dim": 512}, "512"),
        ({"dim": 24}, "from 32"),
        ({"alibi": True, "causal": True, "return_attn_probs": True}, "ALiBi"),
    ],
    ids=str,
)
def test_declines(change: dict[str, Any], word: str) -> None:
    options = dict(change)
    q, k, v = draw(1, 64, 64, 4, 4, options.pop("dim", 64), options.pop("dtype", torch.bfloat16))
    if options.get("s_aux"):
        options["s_aux"] = torch.zeros(4, device="cuda")
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.ones(4, device="cuda")
    with use_provider("flaggems"), pytest.raises(NoProviderError, match=word):
        hf_flash_plus.flash_attn_func(q, k, v, **options)


def test_declines_dense_masks() -> None:
    q, k, v = draw(2, 64, 64, 4, 4, 64)
    masks = {
        "boolean": AttentionMask(bias=torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")),
        "additive": AttentionMask(bias=torch.zeros(1, 1, 64, 64, dtype=q.dtype, device="cuda")),
    }
    for word, mask in masks.items():
        with use_provider("flaggems"), pytest.raises(NoProviderError, match=word):
            hf_flash_plus.attention(q, k, v, mask)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 300), (70, 130)])
@pytest.mark.parametrize("part", ["intervals", "holes", "both"])
@pytest.mark.parametrize("flags", [{}, {"causal": True}, {"window": (20, -1)}], ids=str)
def test_row_intervals_and_key_masks(seqlen_q: int, seqlen_k: int, part: str, flags: dict[str, Any]) -> None:
    """Whatever a padded batch needs, row by row through the page table; hidden keys hold NaN."""
    q, k, v = draw(3, seqlen_q, seqlen_k, 8, 2, 64)
    start = torch.randint(0, seqlen_k // 2, (3, seqlen_q), device="cuda")
    intervals = torch.stack((start, start + torch.randint(-3, seqlen_k, start.shape, device="cuda")), dim=-1).int()
    holes = torch.rand(3, seqlen_k, device="cuda") > 0.3
    mask = AttentionMask(
        row_intervals=None if part == "holes" else intervals, key_mask=None if part == "intervals" else holes, **flags
    )
    with use_provider("reference"):
        want, want_lse = hf_flash_plus.attention(q.double(), k.double(), v.double(), mask, return_lse=True)
    if mask.key_mask is not None:
        k, v = (t.masked_fill(~holes[:, :, None, None], float("nan")) for t in (k, v))
    with use_provider("flaggems"):
        out, lse = hf_flash_plus.attention(q, k, v, mask, return_lse=True)
    assert (out.double() - want).abs().max().item() <= 2e-2
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    seen = want_lse > -math.inf
    assert (lse[seen] - want_lse[seen]).abs().max().item() <= 2e-3


def test_varlen_function() -> None:
    """The public varlen function: right whether or not the cumulative lengths reach the provider."""
    lengths = [5, 130, 77]
    q, k, v = (t[0] for t in draw(1, sum(lengths), sum(lengths), 8, 2, 64))
    cu = torch.tensor([0, *lengths], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def call(provider: str, *tensors: Tensor) -> Tensor:
        with use_provider(provider):
            return hf_flash_plus.flash_attn_varlen_func(*tensors, cu, cu, 130, 130, causal=True)

    want = call("reference", q.double(), k.double(), v.double())
    assert (call("flaggems", q, k, v).double() - want).abs().max().item() <= 2e-2


def test_automatic_selection_prefers_our_kernels() -> None:
    """On hardware our kernels are tuned for, FlagGems steps aside with the measured reason."""
    from hf_flash_plus.dispatch import explain, select_provider
    from hf_flash_plus.providers.flaggems import tuned_architecture

    if PROVIDERS.get("triton") is None or tuned_architecture() is None:
        pytest.skip("our kernels are not tuned for this device")
    inputs = AttentionInputs(*draw(1, 64, 64, 4, 4, 64), 0.125)
    assert select_provider(inputs.signature()).provider.name == "triton"
    verdict = next(v for v in explain(inputs) if v.provider == "flaggems")
    assert not verdict.reasons and verdict.steps_aside


@pytest.mark.parametrize("padded", [False, True])
def test_llama_forward_and_generation(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """``HF_FLASH_PLUS_PROVIDER=flaggems`` runs a LLaMA through FlagGems' kernels, with eager's results."""
    transformers = pytest.importorskip("transformers")
    calls = []
    forward = FLAGGEMS.forward
    monkeypatch.setattr(FLAGGEMS, "forward", lambda inputs: (calls.append(1), forward(inputs))[1])
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(1, 1000, (2, 77), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :20] = 0
    given = {"attention_mask": mask} if padded else {}
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "flaggems")
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    with torch.no_grad():
        # Not float64: eager's softmax is fp32, where the lowest float64, its mask, becomes -inf, and padded rows NaN.
        exactly = model.float()(ids, **given).logits.double()
        eager = model.bfloat16()(ids, **given).logits
        eager_tokens = model.generate(ids, attention_mask=mask, **options)
        model.set_attn_implementation("flash_plus")
        logits = model(ids, **given).logits
        assert len(calls) == 3
        tokens = model.generate(ids, attention_mask=mask, **options)
    assert len(calls) == 3 + 16 * 3
    real = mask.bool()
    error, budget = ((x.double() - exactly)[real] for x in (logits, eager))
    assert error.norm() <= 1.5 * budget.norm()
    # bf16 ties may fall either way; from there on the texts differ.
    assert (tokens[:, :80] == eager_tokens[:, :80]).float().mean() > 0.98
