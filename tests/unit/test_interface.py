"""The flash-attn compatible functions against a float64 oracle, feature by feature."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, NoProviderError, use_provider

from . import oracle
from .oracle import assert_close

PROVIDERS = ("reference", "torch_sdpa")
SEED = 1234

# --- what flash-attn 2.8.3 looks like -------------------------------------------------------------------------------

_TAIL = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
_NO_DEFAULT = inspect.Parameter.empty


def _required(*names: str) -> list[tuple[str, Any]]:
    return [(name, _NO_DEFAULT) for name in names]


FLASH_ATTN_2_8_3 = {
    "flash_attn_func": [*_required("q", "k", "v"), *_TAIL],
    "flash_attn_qkvpacked_func": [*_required("qkv"), *_TAIL],
    "flash_attn_kvpacked_func": [*_required("q", "kv"), *_TAIL],
    "flash_attn_varlen_func": [
        *_required("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *_TAIL,
        ("block_table", None),
    ],
    "flash_attn_varlen_qkvpacked_func": [*_required("qkv", "cu_seqlens", "max_seqlen"), *_TAIL],
    "flash_attn_varlen_kvpacked_func": [
        *_required("q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        *_TAIL,
    ],
    "flash_attn_with_kvcache": [
        *_required("q", "k_cache", "v_cache"),
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ],
}


@pytest.mark.parametrize("name", FLASH_ATTN_2_8_3)
def test_signature_is_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(hfp, name)).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == FLASH_ATTN_2_8_3[name]
    # What flash-attn 2.8 does not have can only be given by name, so that positions stay flash-attn's.
    extra = [p.name for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD]
    assert extra == ["s_aux"]


# --- dense ----------------------------------------------------------------------------------------------------------

SHAPES = {
    # batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, v_head_dim
    "square": (2, 6, 6, 2, 2, 8, 8),
    "gqa_more_keys": (2, 3, 7, 4, 2, 8, 8),
    "mqa_more_queries": (1, 7, 3, 3, 1, 8, 8),
    "v_head_dim": (1, 5, 6, 2, 2, 8, 4),
    "odd_head_dim": (1, 4, 5, 2, 1, 5, 3),
    "one_query": (2, 1, 6, 4, 2, 8, 8),
    "one_query_v_head_dim": (2, 1, 6, 4, 2, 8, 16),
    "one_query_one_key": (1, 1, 1, 4, 2, 8, 8),
}

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "window_left": {"window_size": (1, -1)},
    "window_right": {"window_size": (-1, 0)},
    "window_zero": {"window_size": (0, 0)},
    "causal_window": {"causal": True, "window_size": (2, -1)},
    "causal_hides_what_window_right_shows": {"causal": True, "window_size": (3, 2)},
    "window_list": {"window_size": [2, 2]},
    "scale": {"softmax_scale": 0.3},
    "scale_zero": {"softmax_scale": 0.0},
    "scale_negative": {"softmax_scale": -0.4},
    "alibi": {"alibi_slopes": "H"},
    "alibi_per_batch": {"alibi_slopes": "BH"},
    "alibi_causal": {"alibi_slopes": "BH", "causal": True},
    "alibi_window": {"alibi_slopes": "H", "window_size": (2, 0)},
    "sinks": {"s_aux": "H"},
    "sinks_per_row": {"s_aux": "BHS"},
    "sinks_causal": {"s_aux": "H", "causal": True},
    "sinks_causal_window": {"s_aux": "H", "causal": True, "window_size": (1, -1)},
    "sinks_alibi": {"s_aux": "H", "alibi_slopes": "H", "causal": True},
}
SOFTCAPS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "softcap_all": {
        "softcap": 0.7, "causal": True, "window_size": (3, -1), "alibi_slopes": "H", "s_aux": "H", "softmax_scale": 0.9
    },
}  # fmt: skip


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, grad: bool = False) -> tuple[Tensor, ...]:
    batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, v_head_dim = shape
    generator = torch.Generator().manual_seed(SEED)
    sizes = (
        (batch, seqlen_q, nheads, head_dim),
        (batch, seqlen_k, nheads_k, head_dim),
        (batch, seqlen_k, nheads_k, v_head_dim),
    )
    return tuple(
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for size in sizes
    )


def options(feature: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The feature's keyword arguments, with ALiBi slopes and sinks of the right shape."""
    batch, seqlen_q, nheads = shape[0], shape[1], shape[3]
    sizes = {"H": (nheads,), "BH": (batch, nheads), "BHS": (batch, nheads, seqlen_q)}
    generator = torch.Generator().manual_seed(SEED + 1)
    out = dict(feature)
    if "alibi_slopes" in feature:
        # Sixteenths: products with distances are exact in fp32, in which ALiBi is computed.
        out["alibi_slopes"] = torch.randint(1, 12, sizes[feature["alibi_slopes"]], generator=generator) / 16
    if "s_aux" in feature:
        out["s_aux"] = torch.randn(sizes[feature["s_aux"]], generator=generator, dtype=torch.float64).to(dtype)
    return out


_ORACLE_NAMES = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "alibi", "s_aux": "sinks"}


def for_oracle(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {_ORACLE_NAMES.get(name, name): value for name, value in kwargs.items()}


def check(
    function: Callable[..., Any], expect: Callable[..., oracle.Result], tensors: list[Tensor], kwargs: dict[str, Any]
) -> None:
    """``function(*tensors, **kwargs)`` and its gradients equal the oracle's; ``tensors`` are leaves."""
    dtype = tensors[0].dtype
    leaves = list(tensors)
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        sinks = sinks.detach().requires_grad_()
        kwargs = {**kwargs, "s_aux": sinks}
        leaves.append(sinks)
    out = function(*tensors, **kwargs)
    expected = expect(*tensors, **for_oracle(kwargs)).out
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    if not out.requires_grad:
        return
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + 2), dtype=torch.float64)
    gradients = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=out.numel() == 0)
    if not expected.requires_grad:  # nobody sees anything
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients)
        return
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    for leaf, gradient, want in zip(leaves, gradients, wanted):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, want.double(), dtype, factor=10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_dense_output_and_gradients(provider: str, feature: str, shape: str) -> None:
    kwargs = options(FEATURES[feature], SHAPES[shape])
    with use_provider(provider):
        check(hfp.flash_attn_func, oracle.attention, list(make(SHAPES[shape], grad=True)), kwargs)


@pytest.mark.parametrize("shape", ["square", "gqa_more_keys", "mqa_more_queries", "v_head_dim", "one_query"])
@pytest.mark.parametrize("feature", SOFTCAPS)
def test_softcap_output_and_gradients(feature: str, shape: str) -> None:
    # No provider is forced: torch_sdpa declines softcap, and the call must still be served, exactly.
    kwargs = options(SOFTCAPS[feature], SHAPES[shape])
    check(hfp.flash_attn_func, oracle.attention, list(make(SHAPES[shape], grad=True)), kwargs)


def test_torch_sdpa_refuses_what_it_cannot_do() -> None:
    q, k, v = make(SHAPES["square"])
    with use_provider("torch_sdpa"):
        with pytest.raises(NoProviderError, match="softcap"):
            hfp.flash_attn_func(q, k, v, softcap=1.0)
        with pytest.raises(NoProviderError, match="softmax_lse"):
            hfp.flash_attn_func(q, k, v, return_attn_probs=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", ["full", "causal", "causal_window", "sinks_causal", "sinks_per_row"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_dtypes(provider: str, feature: str, dtype: torch.dtype) -> None:
    shape = SHAPES["gqa_more_keys"]
    kwargs = options(FEATURES[feature], shape, dtype)
    with use_provider(provider):
        check(hfp.flash_attn_func, oracle.attention, list(make(shape, dtype, grad=True)), kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_alibi_keeps_its_precision_far_from_the_diagonal(provider: str, dtype: torch.dtype) -> None:
    # Slope * distance reaches 150 and the scores balance it; rounded to bf16 the bias is off by up to 0.5.
    slopes, places = torch.tensor([0.5]), torch.arange(300)
    q = torch.ones(1, 2, 1, 8, dtype=dtype)
    k = (torch.zeros(1, 300, 1, 8) - places[None, :, None, None] * 0.5 / 8**0.5).to(dtype)
    v = torch.eye(8, dtype=dtype)[places % 8][None, :, None]  # the rounding error repeats every four keys
    want = oracle.attention(q, k, v, alibi=slopes).out
    with use_provider(provider):
        out = hfp.flash_attn_func(q, k, v, alibi_slopes=slopes)
    assert float((out.double() - want).abs().max()) < 2e-3, "the outputs are near 1 / 8"


@pytest.mark.parametrize("feature", ["full", "causal", "window_zero", "sinks", "alibi_causal"])
@pytest.mark.parametrize("shape", ["square", "mqa_more_queries", "gqa_more_keys", "one_query"])
def test_lse_of_the_dense_functions(feature: str, shape: str) -> None:
    q, k, v = make(SHAPES[shape], torch.float32)
    kwargs = options(FEATURES[feature], SHAPES[shape], torch.float32)
    out, lse, s_dmask = hfp.flash_attn_func(q, k, v, return_attn_probs=True, **kwargs)
    want = oracle.attention(q, k, v, **for_oracle(kwargs))
    assert_close(out, want.out, torch.float32)
    assert_close(lse, want.lse, torch.float32)
    assert lse.dtype == torch.float32
    assert s_dmask.numel() == 0, "without dropout flash-attn returns no weights"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", ["plain", "alibi"])
def test_rows_that_see_nothing_are_zero(provider: str, dtype: torch.dtype, extra: str) -> None:
    q, k, v = make((2, 6, 3, 2, 1, 8, 8), dtype, grad=True)
    slopes = torch.rand(2) if extra == "alibi" else None
    with use_provider(provider):
        out = hfp.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert (out[:, :3] == 0).all()
    assert not (out[:, 3:] == 0).all(dim=-1).any()
    assert (gradients[0][:, :3] == 0).all()
    assert all(torch.isfinite(g).all() for g in gradients)


def test_rows_that_see_nothing_have_lse_minus_infinity() -> None:
    q, k, v = make((1, 5, 2, 2, 2, 8, 8), torch.float32)
    _, lse, _ = hfp.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[..., :3] == -math.inf).all()
    assert torch.isfinite(lse[..., 3:]).all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_garbage_in_hidden_keys_does_not_reach_the_output(provider: str) -> None:
    q, k, v = make((1, 2, 5, 2, 2, 8, 8), torch.float32)
    clean = hfp.flash_attn_func(q, k, v, window_size=(2, -1))
    k, v = k.clone(), v.clone()
    k[:, 0], v[:, 0] = 1e4, -1e4
    with use_provider(provider):
        torch.testing.assert_close(hfp.flash_attn_func(q, k, v, window_size=(2, -1)), clean)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 4, 2, 2, 8, 8), (2, 0, 4, 2, 2, 8, 8), (2, 4, 0, 2, 1, 8, 8), (2, 0, 0, 2, 2, 8, 8), (1, 1, 1, 1, 1, 1, 1)],
    ids=["batch 0", "no queries", "no keys", "nothing", "one of each"],
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"causal": True}, {"window_size": (1, 1)}, {"s_aux": "H"}, {"alibi_slopes": "H"}]
)
def test_empty_and_single(provider: str, shape: tuple[int, ...], kwargs: dict[str, Any]) -> None:
    kwargs = options(kwargs, shape)
    with use_provider(provider):
        check(hfp.flash_attn_func, oracle.attention, list(make(shape, grad=True)), kwargs)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 2, 8, 8), (2, 0, 4, 2, 2, 8, 8), (2, 4, 0, 2, 1, 8, 8)])
def test_empty_lse(shape: tuple[int, ...]) -> None:
    q, k, v = make(shape, torch.float32)
    out, lse, _ = hfp.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == (shape[0], shape[1], shape[3], shape[6])
    assert lse.shape == (shape[0], shape[3], shape[1])
    assert (lse == -math.inf).all() and (out == 0).all()


# --- packed forms ---------------------------------------------------------------------------------------------------


def qkvpacked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    return hfp.flash_attn_qkvpacked_func(torch.stack((q, k, v), dim=2), **kwargs)


def kvpacked(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
    return hfp.flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), **kwargs)


@pytest.mark.parametrize("feature", [*FEATURES, *SOFTCAPS])
def test_qkvpacked(feature: str) -> None:
    shape = SHAPES["square"]
    kwargs = options({**FEATURES, **SOFTCAPS}[feature], shape)
    check(qkvpacked, oracle.attention, list(make(shape, grad=True)), kwargs)


@pytest.mark.parametrize("shape", ["square", "gqa_more_keys", "mqa_more_queries", "one_query"])
@pytest.mark.parametrize("feature", ["full", "causal", "causal_window", "alibi_per_batch", "sinks", "softcap", "scale"])
def test_kvpacked(feature: str, shape: str) -> None:
    kwargs = options({**FEATURES, **SOFTCAPS}[feature], SHAPES[shape])
    check(kvpacked, oracle.attention, list(make(SHAPES[shape], grad=True)), kwargs)


@pytest.mark.parametrize("function", [qkvpacked, kvpacked])
def test_packed_forms_return_the_triple(function: Callable[..., Any]) -> None:
    shape = SHAPES["square"]
    q, k, v = make(shape, torch.float32)
    out, lse, s_dmask = function(q, k, v, causal=True, return_attn_probs=True)
    want = oracle.attention(q, k, v, causal=True)
    assert_close(out, want.out, torch.float32)
    assert_close(lse, want.lse, torch.float32)
    assert s_dmask.numel() == 0
    *_, s_dmask = function(q, k, v, dropout_p=0.5, return_attn_probs=True)
    assert s_dmask.shape == (shape[0], shape[3], shape[1], shape[2])


# --- varlen ---------------------------------------------------------------------------------------------------------

LENGTHS = {
    # seqlens of the queries, of the keys, query rows beyond the last sequence
    "equal": ((3, 1, 4), (3, 1, 4), 0),
    "different": ((2, 5, 1), (4, 2, 6), 0),
    "empty_ones": ((0, 3, 0, 2, 0), (2, 0, 0, 5, 0), 0),
    "rows_beyond": ((3, 2), (3, 4), 2),
    "one_sequence": ((5,), (7,), 0),
    "decode": ((1, 1, 1), (4, 1, 6), 0),
    "all_empty": ((0, 0), (0, 3), 0),
    "no_sequences": ((), (), 3),
}


def cumulative(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def make_varlen(
    name: str, nheads: int = 4, nheads_k: int = 2, v_head_dim: int = 8
) -> tuple[list[Tensor], dict[str, Any]]:
    lengths_q, lengths_k, beyond = LENGTHS[name]
    q, k, v = make((1, sum(lengths_q) + beyond, sum(lengths_k), nheads, nheads_k, 8, v_head_dim))
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    where = {
        "cu_seqlens_q": torch.tensor(cu_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(cu_k, dtype=torch.int32),
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
    }
    return [t[0].requires_grad_() for t in (q, k, v)], where


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "feature",
    ["full", "causal", "window", "causal_window", "window_left", "scale", "alibi", "alibi_causal", "sinks",
     "sinks_causal", "softcap"],
)  # fmt: skip
@pytest.mark.parametrize("provider", PROVIDERS)
def test_varlen(provider: str, feature: str, lengths: str) -> None:
    if feature == "softcap" and provider == "torch_sdpa":
        pytest.skip("torch_sdpa declines softcap")
    tensors, where = make_varlen(lengths)
    raw = {**{**FEATURES, **SOFTCAPS}[feature]}
    if "alibi_slopes" in raw:
        raw["alibi_slopes"] = "H"
    kwargs = options(raw, (1, 1, 1, 4, 2, 8, 8))
    cu_q, cu_k = where["cu_seqlens_q"].tolist(), where["cu_seqlens_k"].tolist()

    def function(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Any:
        return hfp.flash_attn_varlen_func(q, k, v, **where, **kw)

    def expect(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> oracle.Result:
        return oracle.varlen(q, k, v, cu_q, cu_k, **kw)

    with use_provider(provider):
        check(function, expect, tensors, kwargs)


@pytest.mark.parametrize("lengths", ["different", "rows_beyond", "no_sequences"])
def test_varlen_lse(lengths: str) -> None:
    tensors, where = make_varlen(lengths)
    q, k, v = (t.detach().float() for t in tensors)
    out, lse, s_dmask = hfp.flash_attn_varlen_func(q, k, v, **where, causal=True, return_attn_probs=True)
    want = oracle.varlen(q, k, v, where["cu_seqlens_q"].tolist(), where["cu_seqlens_k"].tolist(), causal=True)
    assert_close(out, want.out, torch.float32)
    assert_close(lse, want.lse, torch.float32)
    assert lse.shape == (4, q.shape[0]) and s_dmask.numel() == 0


def test_varlen_positional_arguments_and_v_head_dim() -> None:
    tensors, where = make_varlen("different", v_head_dim=4)
    q, k, v = (t.detach() for t in tensors)
    cu_q, cu_k = where["cu_seqlens_q"], where["cu_seqlens_k"]
    out = hfp.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 6, 0.0, 0.2, True, (2, -1))
    want = oracle.varlen(q, k, v, cu_q.tolist(), cu_k.tolist(), scale=0.2, causal=True, window=(2, -1))
    assert_close(out, want.out, torch.float64)


def test_varlen_accepts_one_row_of_alibi_slopes() -> None:
    tensors, where = make_varlen("one_sequence")
    slopes = torch.tensor([[0.5, 0.25, 1.0, 0.0625]])
    out = hfp.flash_attn_varlen_func(*tensors, **where, alibi_slopes=slopes)
    assert_close(out, oracle.varlen(*tensors, [0, 5], [0, 7], alibi=slopes[0]).out, torch.float64)


@pytest.mark.parametrize("feature", ["full", "causal", "window", "alibi", "sinks", "softcap", "scale"])
def test_varlen_packed_forms(feature: str) -> None:
    tensors, where = make_varlen("equal", nheads=2, nheads_k=2)
    kwargs = options({**FEATURES, **SOFTCAPS}[feature], (1, 1, 1, 2, 2, 8, 8))
    cu = where["cu_seqlens_q"]

    def qkv(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Any:
        return hfp.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), dim=1), cu, 4, **kw)

    def kv(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Any:
        return hfp.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), dim=1), cu, cu, 4, 4, **kw)

    def expect(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> oracle.Result:
        return oracle.varlen(q, k, v, cu.tolist(), cu.tolist(), **kw)

    check(qkv, expect, tensors, kwargs)
    check(kv, expect, tensors, kwargs)
    out, lse, _ = qkv(*(t.detach() for t in tensors), return_attn_probs=True)
    assert out.shape == (8, 2, 8) and lse.shape == (2, 8)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("feature", ["full", "causal", "causal_window", "alibi", "sinks"])
def test_varlen_block_table(provider: str, feature: str) -> None:
    lengths_q, lengths_k, page = (2, 1, 3), (5, 4, 7), 4
    q = make((1, sum(lengths_q), 1, 4, 2, 8, 8))[0][0].requires_grad_()
    where = {
        "cu_seqlens_q": torch.tensor(cumulative(lengths_q), dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(cumulative(lengths_k), dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 7,
    }
    # Pages in disorder, one shared by nobody holding NaN, and table entries beyond the lengths pointing nowhere.
    table = torch.tensor([[3, 1], [5, 10**6], [0, 2]], dtype=torch.int32)
    pages_k = torch.randn(6, page, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pages_v = torch.randn(6, page, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kwargs = options({**FEATURES}[feature], (1, 1, 1, 4, 2, 8, 8))
    k, v = (
        torch.cat([pages[table[n].clamp(max=5)].flatten(0, 1)[:length] for n, length in enumerate(lengths_k)])
        for pages in (pages_k, pages_v)
    )

    def function(q: Tensor, **kw: Any) -> Any:
        return hfp.flash_attn_varlen_func(q, pages_k, pages_v, **where, block_table=table, **kw)

    def expect(q: Tensor, **kw: Any) -> oracle.Result:
        return oracle.varlen(q, k, v, cumulative(lengths_q), cumulative(lengths_k), **kw)

    with use_provider(provider):
        check(function, expect, [q], kwargs)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dropout_keeps_the_mean_and_obeys_manual_seed(provider: str) -> None:
    q, k, _ = make((2, 64, 64, 2, 2, 8, 8), torch.float32)
    v = torch.ones(2, 64, 2, 8)
    with use_provider(provider):
        torch.manual_seed(5)
        first = hfp.flash_attn_func(q, k, v, dropout_p=0.4)
        second = hfp.flash_attn_func(q, k, v, dropout_p=0.4)
        torch.manual_seed(5)
        again = hfp.flash_attn_func(q, k, v, dropout_p=0.4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 1.0) < 0.03, "weights that are kept are scaled by 1 / (1 - p)"
    assert float(first.std()) > 0.05, "something must have been dropped"


def test_dropout_of_varlen_keeps_the_mean_and_obeys_manual_seed() -> None:
    q, k, _ = make((1, 128, 128, 2, 2, 8, 8), torch.float32)
    cu = torch.tensor([0, 60, 128], dtype=torch.int32)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(hfp.flash_attn_varlen_func(q[0], k[0], torch.ones(128, 2, 8), cu, cu, 68, 68, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert abs(float(outs[0].mean()) - 1.0) < 0.03


@pytest.mark.parametrize("packed", [False, True])
def test_s_dmask_is_what_was_dropped(packed: bool) -> None:
    shape = (2, 16, 16, 2, 2, 8, 8)
    q, k, v = make(shape, torch.float32)
    function = qkvpacked if packed else hfp.flash_attn_func
    out, lse, s_dmask = function(q, k, v, dropout_p=0.5, causal=True, return_attn_probs=True)
    want = oracle.attention(q, k, v, causal=True)
    assert s_dmask.shape == (2, 2, 16, 16)
    assert_close(lse, want.lse, torch.float32)  # the log-sum-exp is of the weights before dropout
    kept = s_dmask != 0
    torch.testing.assert_close(s_dmask[kept].double(), 2 * want.weights[kept], atol=1e-5, rtol=1e-5)
    visible = want.weights > 0
    assert not kept[~visible].any()
    assert 0.35 < float(kept[visible].float().mean()) < 0.65
    recomputed = torch.einsum("bhij,bjhd->bihd", s_dmask.double(), v.double())
    assert_close(out, recomputed, torch.float32)


def test_varlen_s_dmask_shape() -> None:
    tensors, where = make_varlen("different")
    out, lse, s_dmask = hfp.flash_attn_varlen_func(*tensors, **where, dropout_p=0.5, return_attn_probs=True)
    total_q, total_k = tensors[0].shape[0], tensors[1].shape[0]
    assert out.shape == (total_q, 4, 8) and lse.shape == (4, total_q) and s_dmask.shape == (4, total_q, total_k)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dropout_gradients_use_the_same_mask(provider: str) -> None:
    # With v = identity the output is the weights after dropout, so dv is known from the output alone.
    size = 8
    q, k, _ = make((1, size, size, 1, 1, size, size))
    v = torch.eye(size, dtype=torch.float64)[None, :, None, :].requires_grad_()
    with use_provider(provider):
        out = hfp.flash_attn_func(q, k, v, dropout_p=0.5)
        weight = torch.randn(out.shape, dtype=torch.float64)
        (dv,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close(dv[0, :, 0], out[0, :, 0].T @ weight[0, :, 0])


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_last_dimension_not_contiguous(provider: str) -> None:
    q, k, v = (
        t.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for t in make(SHAPES["gqa_more_keys"])
    )
    assert q.stride(-1) != 1
    with use_provider(provider):
        check(hfp.flash_attn_func, oracle.attention, [q, k, v], {"causal": True})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_views_of_one_projection(provider: str) -> None:
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(qkv: Tensor, **kwargs: Any) -> Any:
        q, k, v = qkv.unbind(2)
        assert not q.is_contiguous()
        return hfp.flash_attn_func(q, k, v, **kwargs)

    def expect(qkv: Tensor, **kwargs: Any) -> oracle.Result:
        return oracle.attention(*qkv.unbind(2), **kwargs)

    with use_provider(provider):
        check(function, expect, [qkv], {"causal": True})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_expanded_and_sliced_views(provider: str) -> None:
    q, k, v = make((2, 8, 8, 2, 2, 8, 8))
    q, k, v = q[:, ::2], k[:1].expand(2, -1, -1, -1)[:, 1:6], v[:, 1:6]
    with use_provider(provider):
        check(hfp.flash_attn_func, oracle.attention, [q, k, v], {"causal": True})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_inputs_are_not_changed(provider: str) -> None:
    tensors = make(SHAPES["gqa_more_keys"])
    before = [t.clone() for t in tensors]
    with use_provider(provider):
        hfp.flash_attn_func(*tensors, causal=True, s_aux=torch.randn(4, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_window_entries_may_be_none() -> None:
    # flash-attn 4 and Transformers say None for unlimited.
    q, k, v = make(SHAPES["square"])
    torch.testing.assert_close(
        hfp.flash_attn_func(q, k, v, window_size=(2, None)), hfp.flash_attn_func(q, k, v, window_size=(2, -1))
    )


def test_deterministic_is_accepted() -> None:
    q, k, v = make(SHAPES["square"], grad=True)
    check(lambda *t, **kw: hfp.flash_attn_func(*t, deterministic=True, **kw), oracle.attention, [q, k, v], {})


# --- attention() with any mask --------------------------------------------------------------------------------------


def _masks() -> dict[str, tuple[AttentionMask, Callable[[int, int, int, int], bool], tuple[int, int]]]:
    generator = torch.Generator().manual_seed(7)
    batch, seqlen_q, seqlen_k = 2, 4, 6
    start = torch.randint(-2, seqlen_k, (batch, seqlen_q), generator=generator, dtype=torch.int32)
    end = start + torch.randint(-1, seqlen_k + 2, (batch, seqlen_q), generator=generator, dtype=torch.int32)
    key_mask = torch.rand(batch, seqlen_k, generator=generator) > 0.4
    dense = torch.rand(batch, 4, seqlen_q, seqlen_k, generator=generator) > 0.3
    flat = torch.rand(1, 1, 1, seqlen_k, generator=generator) > 0.3
    rows = torch.stack((start, end), -1)
    return {
        "intervals": (
            AttentionMask(row_intervals=rows),
            lambda b, h, i, j: bool(start[b, i] <= j < end[b, i]),
            (-1, -1),
        ),
        "intervals_of_one_batch": (
            AttentionMask(row_intervals=rows[:1]),
            lambda b, h, i, j: bool(start[0, i] <= j < end[0, i]),
            (-1, -1),
        ),
        "key_mask": (AttentionMask(key_mask=key_mask), lambda b, h, i, j: bool(key_mask[b, j]), (-1, -1)),
        "dense": (AttentionMask(bias=dense), lambda b, h, i, j: bool(dense[b, h, i, j]), (-1, -1)),
        "dense_broadcast": (AttentionMask(bias=flat), lambda b, h, i, j: bool(flat[0, 0, 0, j]), (-1, -1)),
        "all_of_them": (
            AttentionMask(window=(3, 1), row_intervals=rows, key_mask=key_mask, bias=dense),
            lambda b, h, i, j: bool(start[b, i] <= j < end[b, i] and key_mask[b, j] and dense[b, h, i, j]),
            (3, 1),
        ),
    }


@pytest.mark.parametrize("name", _masks())
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention_of_any_mask(provider: str, name: str) -> None:
    mask, sees, window = _masks()[name]
    tensors = list(make((2, 4, 6, 4, 2, 8, 8), grad=True))
    for extra in ({}, {"s_aux": "H"}, {"alibi_slopes": "BH"}):
        kwargs = options(extra, (2, 4, 6, 4, 2, 8, 8))
        with use_provider(provider):
            check(
                lambda *t, **kw: hfp.attention(*t, mask, **kw),
                lambda *t, **kw: oracle.attention(*t, sees=sees, window=window, **kw),
                tensors,
                kwargs,
            )


BIAS_SHAPES = [(2, 4, 4, 6), (1, 4, 4, 6), (2, 1, 4, 6), (1, 1, 1, 6), (2, 4, 1, 6)]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_additive_bias_and_its_gradient(provider: str, causal: bool, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tensors = [*make((2, 4, 6, 4, 2, 8, 8), grad=True), bias]
    with use_provider(provider):
        check(
            lambda q, k, v, bias, **kw: hfp.attention(q, k, v, AttentionMask(causal=causal, bias=bias), **kw),
            lambda q, k, v, bias, **kw: oracle.attention(q, k, v, bias=bias, causal=causal, **kw),
            tensors,
            {},
        )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_additive_bias_of_minus_infinity_hides(provider: str) -> None:
    bias = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    bias[..., 0, :] = -math.inf  # a row that sees nothing
    bias[..., 1, 2] = -math.inf
    tensors = list(make((2, 3, 5, 2, 2, 8, 8), grad=True))
    with use_provider(provider):
        check(
            lambda *t, **kw: hfp.attention(*t, AttentionMask(bias=bias), **kw),
            lambda *t, **kw: oracle.attention(*t, bias=bias, **kw),
            tensors,
            {},
        )


def test_attention_returns_lse_when_asked() -> None:
    q, k, v = make(SHAPES["square"], torch.float32)
    out, lse = hfp.attention(q, k, v, AttentionMask(causal=True), return_lse=True)
    want = oracle.attention(q, k, v, causal=True)
    assert_close(out, want.out, torch.float32)
    assert_close(lse, want.lse, torch.float32)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_mask_serves_calls_of_different_lengths_and_modes(provider: str) -> None:
    # A provider may remember things on the mask; they must not leak into a call they do not fit.
    mask = AttentionMask(causal=True)
    shapes = [(1, 3, 5, 2, 2, 8, 8), (1, 5, 3, 2, 2, 8, 8), (1, 4, 4, 2, 2, 8, 8), (1, 3, 5, 2, 2, 8, 8)]
    with use_provider(provider):
        for shape in shapes:
            check(
                lambda *t, **kw: hfp.attention(*t, mask, **kw),
                lambda *t, **kw: oracle.attention(*t, causal=True, **kw),
                list(make(shape, grad=True)),
                {},
            )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_mask_used_in_inference_mode_can_train_afterwards(provider: str) -> None:
    mask = AttentionMask(causal=True)
    q, k, v = make((1, 3, 5, 2, 2, 8, 8), grad=True)
    with use_provider(provider):
        with torch.inference_mode():
            hfp.attention(q, k, v, mask)
        check(
            lambda *t, **kw: hfp.attention(*t, mask, **kw),
            lambda *t, **kw: oracle.attention(*t, causal=True, **kw),
            [q, k, v],
            {},
        )


# --- gradcheck of the reference -------------------------------------------------------------------------------------

_TINY = (1, 3, 4, 2, 1, 2, 3)
GRADCHECKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "rows_that_see_nothing": {"causal": True, "window_size": (0, -1)},
    "window": {"window_size": (1, 1)},
    "softcap": {"softcap": 0.8},
    "scale": {"softmax_scale": 1.7},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7])},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("sinks", [None, "H", "BHS"])
@pytest.mark.parametrize("feature", GRADCHECKS)
def test_gradcheck_of_the_reference(feature: str, sinks: str | None) -> None:
    kwargs = GRADCHECKS[feature]
    shape = (1, 4, 3, 2, 1, 2, 3) if feature == "rows_that_see_nothing" else _TINY
    tensors = list(make(shape, grad=True))
    if sinks:
        tensors.append(options({"s_aux": sinks}, shape)["s_aux"].requires_grad_())

    def function(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None) -> Tensor:
        torch.manual_seed(0)
        with use_provider("reference"):
            out: Tensor = hfp.flash_attn_func(q, k, v, s_aux=s_aux, **kwargs)
        return out

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4), (1, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 0.9])
def test_gradcheck_of_the_bias(shape: tuple[int, ...], softcap: float) -> None:
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with use_provider("reference"):
            out: Tensor = hfp.attention(q, k, v, AttentionMask(causal=True, bias=bias), softcap=softcap)
        return out

    assert torch.autograd.gradcheck(function, [*make(_TINY, grad=True), bias])


def test_second_derivative_of_the_reference() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_provider("reference"):
            out: Tensor = hfp.flash_attn_func(q, k, v, causal=True)
        return out

    assert torch.autograd.gradgradcheck(function, make((1, 2, 3, 1, 1, 2, 2), grad=True))
