"""Malformed calls: each is refused with the exact exception type and a message that names what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, NoProviderError, bert_padding
from hf_flash_plus.inputs import AttentionInputs, validate
from hf_flash_plus.masks import PackedSequences


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def cu(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


class Bad(NamedTuple):
    """A call with one thing wrong: what raises, and what the message must say (the name, what came, what goes)."""

    what: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


Q, K, INT = (2, 4, 4, 8), (2, 6, 2, 8), torch.int32


def dense(**changes: Any) -> Callable[[], Any]:
    arguments = {"q": t(*Q), "k": t(*K), "v": t(*K), **changes}
    return lambda: hfp.flash_attn_func(**arguments)


def masked(**parts: Any) -> Callable[[], Any]:
    return lambda: hfp.attention(t(*Q), t(*K), t(*K), AttentionMask(**parts))


CU = torch.tensor([0, 3, 5], dtype=INT)


def varlen(**changes: Any) -> Callable[[], Any]:
    arguments = {
        "q": t(5, 4, 8), "k": t(5, 2, 8), "v": t(5, 2, 8), "cu_seqlens_q": CU, "cu_seqlens_k": CU,
        "max_seqlen_q": 3, "max_seqlen_k": 3, **changes,
    }  # fmt: skip
    return lambda: hfp.flash_attn_varlen_func(**arguments)


TABLE = torch.zeros(2, 3, dtype=INT)


def paged(**changes: Any) -> Callable[[], Any]:
    return varlen(**{"k": t(6, 4, 2, 8), "v": t(6, 4, 2, 8), "block_table": TABLE, **changes})


def cached(**changes: Any) -> Callable[[], Any]:
    arguments = {"q": t(2, 1, 4, 8), "k_cache": t(3, 10, 2, 8), "v_cache": t(3, 10, 2, 8), **changes}
    return lambda: hfp.flash_attn_with_kvcache(**arguments)


def appending(**changes: Any) -> Callable[[], Any]:
    return cached(**{"k": t(2, 1, 2, 8), "v": t(2, 1, 2, 8), "cache_seqlens": 3, **changes})


COS = t(10, 4)
BAD = [
    # q, k, v
    Bad("q is a list", dense(q=[1.0]), TypeError, ("q must be a torch.Tensor", "list")),
    Bad("q is None", dense(q=None), TypeError, ("q must be a torch.Tensor", "NoneType")),
    Bad("k is an array", dense(k=t(*K).numpy()), TypeError, ("k must be a torch.Tensor", "ndarray")),
    Bad("v is None", dense(v=None), TypeError, ("v must be a torch.Tensor", "NoneType")),
    Bad("q has 3 dimensions", dense(q=t(4, 4, 8)), ValueError, ("q must have 4 dimensions", "(4, 4, 8)", "headdim")),
    Bad("k has 5 dimensions", dense(k=t(1, *K)), ValueError, ("k must have 4 dimensions", "(1, 2, 6, 2, 8)")),
    Bad("v is a number", dense(v=t()), ValueError, ("v must have 4 dimensions", "()")),
    Bad(
        "int64 inputs",
        dense(q=t(*Q, dtype=torch.int64)),
        ValueError,
        ("q has dtype torch.int64", "torch.float16", "torch.bfloat16", "q.to("),
    ),
    Bad("complex inputs", dense(q=t(*Q, dtype=torch.complex64)), ValueError, ("q has dtype torch.complex64", "Cast")),
    Bad("fp8 inputs", dense(q=t(*Q).to(torch.float8_e4m3fn)), ValueError, ("q has dtype torch.float8_e4m3fn", "Cast")),
    Bad(
        "k of another dtype",
        dense(k=t(*K, dtype=torch.bfloat16)),
        ValueError,
        ("q is torch.float32", "k is torch.bfloat16", "Cast k with .to(torch.float32)"),
    ),
    Bad(
        "v of another dtype",
        dense(v=t(*K, dtype=torch.float16)),
        ValueError,
        ("q is torch.float32", "v is torch.float16", "Cast v with .to(torch.float32)"),
    ),
    Bad("k elsewhere", dense(k=t(*K, device="meta")), ValueError, ("k is on meta", "q is on cpu", "move")),
    Bad("v elsewhere", dense(v=t(*K, device="meta")), ValueError, ("v is on meta", "q is on cpu", "move")),
    Bad("batch of k", dense(k=t(3, 6, 2, 8), v=t(3, 6, 2, 8)), ValueError, ("k has batch 3", "q has batch 2")),
    Bad("batch of v", dense(v=t(1, 6, 2, 8)), ValueError, ("v has batch 1", "q has batch 2")),
    Bad("seqlen of v", dense(v=t(2, 5, 2, 8)), ValueError, ("k and v", "(2, 6, 2, 8)", "(2, 5, 2, 8)", "seqlen")),
    Bad("heads of v", dense(v=t(2, 6, 1, 8)), ValueError, ("k and v", "(2, 6, 2, 8)", "(2, 6, 1, 8)", "nheads")),
    Bad("headdim of k", dense(k=t(2, 6, 2, 16)), ValueError, ("k has headdim 16", "q has headdim 8")),
    Bad("headdim 0", dense(q=t(2, 4, 4, 0), k=t(2, 6, 2, 0)), ValueError, ("headdim must be positive", "(2, 4, 4, 0)")),
    Bad("headdim 0 of v", dense(v=t(2, 6, 2, 0)), ValueError, ("headdim must be positive", "(2, 6, 2, 0)")),
    Bad("heads not a multiple", dense(q=t(2, 4, 3, 8)), ValueError, ("heads of q (3)", "multiple", "(2)")),
    Bad("fewer heads than k", dense(q=t(2, 4, 1, 8)), ValueError, ("heads of q (1)", "multiple", "(2)")),
    Bad("no heads of k", dense(k=t(2, 6, 0, 8), v=t(2, 6, 0, 8)), ValueError, ("heads of q (4)", "multiple", "(0)")),
    # numbers
    Bad("dropout 1", dense(dropout_p=1.0), ValueError, ("dropout_p must be in [0, 1)", "1.0")),
    Bad("dropout -0.1", dense(dropout_p=-0.1), ValueError, ("dropout_p must be in [0, 1)", "-0.1")),
    Bad("dropout nan", dense(dropout_p=math.nan), ValueError, ("dropout_p must be in [0, 1)", "nan")),
    Bad("dropout of a word", dense(dropout_p="0.1"), ValueError, ("dropout_p must be in [0, 1)", "'0.1'")),
    Bad("scale nan", dense(softmax_scale=math.nan), ValueError, ("softmax_scale must be a finite number", "nan")),
    Bad("scale inf", dense(softmax_scale=math.inf), ValueError, ("softmax_scale must be a finite number", "inf")),
    Bad("scale of a word", dense(softmax_scale="1"), ValueError, ("softmax_scale must be a finite number", "'1'")),
    Bad("softcap -1", dense(softcap=-1.0), ValueError, ("softcap must be a finite number >= 0", "-1.0")),
    Bad("softcap inf", dense(softcap=math.inf), ValueError, ("softcap must be a finite number >= 0", "inf")),
    Bad("softcap nan", dense(softcap=math.nan), ValueError, ("softcap must be a finite number >= 0", "nan")),
    Bad("softcap None", dense(softcap=None), ValueError, ("softcap must be a finite number >= 0", "None")),
    # windows
    Bad("window -2", dense(window_size=(-2, 0)), ValueError, ("window_size must be >= -1", "(-2, 0)")),
    Bad("window of a number", dense(window_size=3), ValueError, ("window_size must be a pair of integers", "3")),
    Bad("window of three", dense(window_size=(1, 2, 3)), ValueError, ("window_size must be a pair", "(1, 2, 3)")),
    Bad("window of words", dense(window_size=("a", "b")), ValueError, ("window_size must be a pair", "('a', 'b')")),
    Bad("window None", dense(window_size=None), ValueError, ("window_size must be a pair", "None")),
    Bad("window of fractions", dense(window_size=(1.5, 2)), ValueError, ("window_size must be a pair", "(1.5, 2)")),
    Bad("window of a string", dense(window_size="34"), ValueError, ("window_size must be a pair", "'34'")),
    # ALiBi slopes and sinks
    Bad(
        "slopes in bf16", dense(alibi_slopes=t(4, dtype=torch.bfloat16)), ValueError, ("alibi_slopes", "torch.float32")
    ),
    Bad("slopes of 2 heads", dense(alibi_slopes=t(2)), ValueError, ("alibi_slopes", "(4,) or (2, 4)", "(2,)")),
    Bad("slopes transposed", dense(alibi_slopes=t(4, 2)), ValueError, ("alibi_slopes", "(4,) or (2, 4)", "(4, 2)")),
    Bad("slopes elsewhere", dense(alibi_slopes=t(4, device="meta")), ValueError, ("alibi_slopes is on meta", "cpu")),
    Bad(
        "slopes with grad", dense(alibi_slopes=t(4).requires_grad_()), ValueError, ("alibi_slopes", "gradient", "bias")
    ),
    Bad("slopes of a list", dense(alibi_slopes=[0.1] * 4), TypeError, ("alibi_slopes must be a torch.Tensor", "list")),
    Bad("sinks of 2 heads", dense(s_aux=t(2)), ValueError, ("s_aux", "(4,) or (2, 4, 4)", "(2,)")),
    Bad("sinks in int", dense(s_aux=t(4, dtype=INT)), ValueError, ("s_aux", "floating", "torch.int32")),
    Bad("sinks elsewhere", dense(s_aux=t(4, device="meta")), ValueError, ("s_aux is on meta", "cpu")),
    Bad("sinks of a number", dense(s_aux=0.5), TypeError, ("s_aux must be a torch.Tensor", "float")),
    # masks
    Bad(
        "intervals in int64",
        masked(row_intervals=t(2, 4, 2, dtype=torch.int64)),
        ValueError,
        ("row_intervals", "int32"),
    ),
    Bad(
        "intervals of 3 rows",
        masked(row_intervals=t(2, 3, 2, dtype=INT)),
        ValueError,
        ("row_intervals", "(2 or 1, 4, 2)", "(2, 3, 2)"),
    ),
    Bad(
        "intervals elsewhere",
        masked(row_intervals=t(2, 4, 2, dtype=INT, device="meta")),
        ValueError,
        ("row_intervals is on meta",),
    ),
    Bad("key_mask in int", masked(key_mask=t(2, 6, dtype=INT)), ValueError, ("key_mask", "torch.bool", "torch.int32")),
    Bad(
        "key_mask of 5 keys",
        masked(key_mask=t(2, 5, dtype=torch.bool)),
        ValueError,
        ("key_mask", "(2 or 1, 6)", "(2, 5)"),
    ),
    Bad(
        "key_holes alone",
        masked(key_holes=t(2, dtype=INT)),
        ValueError,
        ("key_holes", "without the key_mask"),
    ),
    Bad("positions in int64", masked(row_positions=t(2, 4, dtype=torch.int64)), ValueError, ("row_positions", "int32")),
    Bad("bias of int", masked(bias=t(2, 4, 4, 6, dtype=INT)), ValueError, ("bias must be torch.bool", "torch.int32")),
    Bad(
        "bias of 3 heads",
        masked(bias=t(2, 3, 4, 6)),
        ValueError,
        ("bias", "(2 or 1, 4 or 1, 4 or 1, 6)", "(2, 3, 4, 6)"),
    ),
    Bad(
        "bias of 1 key", masked(bias=t(2, 4, 4, 1)), ValueError, ("bias", "(2 or 1, 4 or 1, 4 or 1, 6)", "(2, 4, 4, 1)")
    ),
    Bad("bias of 2 dimensions", masked(bias=t(4, 6)), ValueError, ("bias", "(4, 6)")),
    Bad("bias of a list", masked(bias=[[0.0]]), TypeError, ("bias must be a torch.Tensor", "list")),
    Bad(
        "window of a list", masked(window=[1, 2]), ValueError, ("window_size must be a tuple of two integers", "[1, 2]")
    ),
    # packed forms
    Bad("qkv None", lambda: hfp.flash_attn_qkvpacked_func(None), TypeError, ("qkv must be a torch.Tensor", "NoneType")),
    Bad(
        "qkv of 2", lambda: hfp.flash_attn_qkvpacked_func(t(2, 4, 2, 4, 8)), ValueError, ("qkv", "3", "(2, 4, 2, 4, 8)")
    ),
    Bad(
        "qkv of 4 dimensions", lambda: hfp.flash_attn_qkvpacked_func(t(2, 4, 3, 8)), ValueError, ("qkv", "5 dimensions")
    ),
    Bad(
        "kv of 3",
        lambda: hfp.flash_attn_kvpacked_func(t(*Q), t(2, 6, 3, 2, 8)),
        ValueError,
        ("kv", "2", "(2, 6, 3, 2, 8)"),
    ),
    Bad(
        "kv None",
        lambda: hfp.flash_attn_kvpacked_func(t(*Q), None),
        TypeError,
        ("kv must be a torch.Tensor", "NoneType"),
    ),
    Bad(
        "varlen qkv of 5 dimensions",
        lambda: hfp.flash_attn_varlen_qkvpacked_func(t(1, 5, 3, 2, 8), CU, 3),
        ValueError,
        ("qkv", "4 dimensions", "(1, 5, 3, 2, 8)"),
    ),
    Bad(
        "varlen kv of 3",
        lambda: hfp.flash_attn_varlen_kvpacked_func(t(5, 2, 8), t(5, 3, 2, 8), CU, CU, 3, 3),
        ValueError,
        ("kv", "2", "(5, 3, 2, 8)"),
    ),
    # varlen
    Bad(
        "varlen q of 4 dimensions",
        varlen(q=t(1, 5, 4, 8)),
        ValueError,
        ("q must be (total, nheads, headdim)", "(1, 5, 4, 8)"),
    ),
    Bad("varlen v None", varlen(v=None), TypeError, ("v must be a torch.Tensor", "NoneType")),
    Bad(
        "cu_seqlens a list", varlen(cu_seqlens_q=[0, 3, 5]), TypeError, ("cu_seqlens_q must be a torch.Tensor", "list")
    ),
    Bad(
        "cu_seqlens in int64", varlen(cu_seqlens_k=CU.long()), ValueError, ("cu_seqlens_k must be torch.int32", "int64")
    ),
    Bad(
        "cu_seqlens of 2 dimensions",
        varlen(cu_seqlens_q=CU[None]),
        ValueError,
        ("cu_seqlens_q", "(nseqs + 1,)", "(1, 3)"),
    ),
    Bad("cu_seqlens empty", varlen(cu_seqlens_q=CU[:0]), ValueError, ("cu_seqlens_q", "(nseqs + 1,)", "(0,)")),
    Bad(
        "cu_seqlens elsewhere",
        varlen(cu_seqlens_k=CU.to("meta")),
        ValueError,
        ("cu_seqlens_k is on meta", "q is on cpu"),
    ),
    Bad(
        "cu_seqlens of two lengths",
        varlen(cu_seqlens_k=CU[:2]),
        ValueError,
        ("cu_seqlens_q and cu_seqlens_k", "(3,)", "(2,)"),
    ),
    Bad("varlen slopes by sequence", varlen(alibi_slopes=t(2, 4)), ValueError, ("alibi_slopes", "(2, 4)", "(nheads,)")),
    Bad("varlen sinks by sequence", varlen(s_aux=t(2, 4)), ValueError, ("s_aux", "(4,)", "(2, 4)")),
    Bad("varlen dtypes", varlen(k=t(5, 2, 8).half()), ValueError, ("q is torch.float32", "k is torch.float16")),
    Bad("varlen k and v differ", varlen(v=t(4, 2, 8)), ValueError, ("k and v", "seqlen")),
    Bad(
        "paged k of 3 dimensions",
        paged(k=t(6, 2, 8)),
        ValueError,
        ("k must be (num_blocks, page_block_size", "(6, 2, 8)"),
    ),
    Bad("table in int64", paged(block_table=TABLE.long()), ValueError, ("block_table must be torch.int32", "int64")),
    Bad(
        "table of 1 dimension",
        paged(block_table=TABLE[0]),
        ValueError,
        ("block_table", "(batch, max_num_blocks_per_seq)", "(3,)"),
    ),
    Bad(
        "table of 3 rows", paged(block_table=t(3, 3, dtype=INT)), ValueError, ("block_table has 3 rows", "2 sequences")
    ),
    Bad("table elsewhere", paged(block_table=TABLE.to("meta")), ValueError, ("block_table is on meta", "cpu")),
    Bad("table a list", paged(block_table=[[0]]), ValueError, ("block_table must be torch.int32", "list")),
    # KV cache
    Bad("cache None", cached(k_cache=None), TypeError, ("k_cache must be a torch.Tensor", "NoneType")),
    Bad(
        "cache of 3 dimensions",
        cached(v_cache=t(10, 2, 8)),
        ValueError,
        ("v_cache must have 4 dimensions", "(10, 2, 8)"),
    ),
    Bad("cached q of 3 dimensions", cached(q=t(2, 4, 8)), ValueError, ("q must have 4 dimensions", "(2, 4, 8)")),
    Bad("k without v", appending(v=None), ValueError, ("k and v must be given together",)),
    Bad("v without k", appending(k=None), ValueError, ("k and v must be given together",)),
    Bad("k does not fit", appending(k=t(2, 1, 4, 8)), ValueError, ("k must be (2, seqlen_new, 2, 8)", "(2, 1, 4, 8)")),
    Bad("v does not fit", appending(v=t(2, 1, 2, 4)), ValueError, ("v must be (2, seqlen_new, 2, 8)", "(2, 1, 2, 4)")),
    Bad("k and v of two lengths", appending(v=t(2, 3, 2, 8)), ValueError, ("k and v", "(2, 1, 2, 8)", "(2, 3, 2, 8)")),
    Bad(
        "k in another dtype",
        appending(k=t(2, 1, 2, 8).half()),
        ValueError,
        ("k is torch.float16", "cache is torch.float32"),
    ),
    Bad("k elsewhere than its cache", appending(k=t(2, 1, 2, 8, device="meta")), ValueError, ("k is on meta", "cpu")),
    Bad("k without lengths", appending(cache_seqlens=None), ValueError, ("cache_seqlens is needed with k",)),
    Bad("no room", appending(cache_seqlens=10), ValueError, ("cache_seqlens is 10", "holds 10", "1 of them")),
    Bad("length -1", cached(cache_seqlens=-1), ValueError, ("cache_seqlens is -1",)),
    Bad("length beyond", cached(cache_seqlens=11), ValueError, ("cache_seqlens is 11", "holds 10")),
    Bad(
        "lengths of floats",
        cached(cache_seqlens=t(2)),
        ValueError,
        ("cache_seqlens must be an int or an int32", "float32"),
    ),
    Bad("lengths of 3", cached(cache_seqlens=t(3, dtype=INT)), ValueError, ("cache_seqlens", "(2,)", "(3,)")),
    Bad("length a list", cached(cache_seqlens=[1, 2]), ValueError, ("cache_seqlens", "[1, 2]")),
    Bad(
        "cache too small",
        cached(k_cache=t(1, 10, 2, 8), v_cache=t(1, 10, 2, 8)),
        ValueError,
        ("k_cache holds 1 rows", "batch 2"),
    ),
    Bad("v_cache too small", cached(v_cache=t(1, 10, 2, 8)), ValueError, ("v_cache", "same batch", "(1, 10, 2, 8)")),
    Bad("batch_idx of 3", cached(cache_batch_idx=t(3, dtype=INT)), ValueError, ("cache_batch_idx", "(2,)", "(3,)")),
    Bad(
        "batch_idx of floats",
        cached(cache_batch_idx=t(2)),
        ValueError,
        ("cache_batch_idx must be an integer", "float32"),
    ),
    Bad("leftpad a number", cached(cache_leftpad=3), ValueError, ("cache_leftpad must be an integer tensor", "3")),
    Bad("splits -1", cached(num_splits=-1), ValueError, ("num_splits", ">= 0", "-1")),
    Bad("splits 1.5", cached(num_splits=1.5), ValueError, ("num_splits", "1.5")),
    Bad("cos without sin", appending(rotary_cos=COS), ValueError, ("rotary_cos and rotary_sin", "together")),
    Bad("rotary without k", cached(rotary_cos=COS, rotary_sin=COS), ValueError, ("rotary_cos and rotary_sin", "k")),
    Bad(
        "rotary too wide",
        appending(rotary_cos=t(10, 5), rotary_sin=t(10, 5)),
        ValueError,
        ("rotary_dim <= 8", "(10, 5)"),
    ),
    Bad(
        "cos and sin differ",
        appending(rotary_cos=COS, rotary_sin=t(9, 4)),
        ValueError,
        ("rotary_cos and rotary_sin", "(9, 4)"),
    ),
    Bad(
        "rotary too short",
        appending(rotary_cos=COS[:3], rotary_sin=COS[:3]),
        ValueError,
        ("rotary_cos", "(3, 4)", "10"),
    ),
    Bad("rotary a list", appending(rotary_cos=[1.0], rotary_sin=[1.0]), TypeError, ("rotary_cos", "list")),
    Bad("k a list", appending(k=[1.0]), TypeError, ("k must be a torch.Tensor", "list")),
    Bad(
        "table and batch_idx",
        cached(block_table=TABLE, cache_batch_idx=t(2, dtype=INT)),
        ValueError,
        ("cache_batch_idx cannot be combined with block_table",),
    ),
    Bad(
        "table and leftpad",
        cached(block_table=TABLE, cache_leftpad=t(2, dtype=INT)),
        ValueError,
        ("cache_leftpad cannot be combined with block_table",),
    ),
    Bad(
        "cached table of 3 rows",
        cached(block_table=t(3, 3, dtype=INT)),
        ValueError,
        ("block_table has 3 rows", "batch 2"),
    ),
    Bad(
        "cached table in int64",
        cached(block_table=TABLE.long()),
        ValueError,
        ("block_table must be torch.int32", "int64"),
    ),
    Bad("cached dtypes", cached(q=t(2, 1, 4, 8).half()), ValueError, ("q is torch.float16", "k is torch.float32")),
    # bert_padding
    Bad(
        "attention_mask does not fit",
        lambda: bert_padding.unpad_input(t(2, 4, 8), t(2, 5)),
        ValueError,
        ("attention_mask must be (batch, seqlen)", "(2, 4, 8)", "(2, 5)"),
    ),
    Bad(
        "hidden_states of 1 dimension",
        lambda: bert_padding.unpad_input(t(4), t(4)),
        ValueError,
        ("hidden_states", "(4,)"),
    ),
]


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len(BAD) >= 60
    assert len({bad.what for bad in BAD}) == len(BAD)


@pytest.mark.parametrize("bad", BAD, ids=[bad.what for bad in BAD])
def test_bad_call(bad: Bad) -> None:
    for _ in range(2):  # remembering which calls were found valid must not let a bad one through
        with pytest.raises(bad.error) as caught:
            bad.call()
    assert type(caught.value) is bad.error
    message = str(caught.value)
    missing = [part for part in bad.says if part not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("call", [dense(), masked(), varlen(), paged(), cached(), appending()])
def test_the_calls_that_the_bad_ones_are_made_of_are_good(call: Callable[[], Any]) -> None:
    call()


def test_a_bad_call_after_a_good_one_that_looks_the_same() -> None:
    slopes = t(4)
    dense(alibi_slopes=slopes)()
    with pytest.raises(ValueError, match="alibi_slopes requires a gradient"):
        dense(alibi_slopes=slopes.requires_grad_())()
    masked(key_mask=t(2, 6, dtype=torch.bool), key_holes=t(2, dtype=INT))()
    with pytest.raises(ValueError, match="key_holes"):
        masked(key_holes=t(2, dtype=INT))()


def test_packed_alone_is_refused_also_after_a_call_that_looks_the_same() -> None:
    packed = PackedSequences(cu(0, 1, 4), cu(0, 1, 4), 3, 3, True, (-1, -1))
    tensors = (t(1, 4, 4, 8), t(1, 4, 2, 8), t(1, 4, 2, 8))
    hfp.attention(*tensors, AttentionMask())
    with pytest.raises(ValueError, match=r"packed was given without the row_intervals .* flash_attn_varlen_func"):
        hfp.attention(*tensors, AttentionMask(packed=packed))


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    four, small = np.int64(4), np.float32(0.25)
    q = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(1))
    pairs: list[Callable[[Any, Any, Any], Any]] = [
        lambda n, x, i: hfp.flash_attn_func(q, q, q, softmax_scale=x, softcap=x, window_size=(n, i)),
        lambda n, x, i: hfp.attention(q, q, q, AttentionMask(window=(n, i)), softmax_scale=x, softcap=x),
        lambda n, x, i: hfp.attention(q, q, q, AttentionMask(window=(type(n)(-1), type(i)(-1)))),
        lambda n, x, i: hfp.flash_attn_varlen_func(q[0], q[0], q[0], cu(0, 4, 8), cu(0, 4, 8), n, n, softmax_scale=x),
        lambda n, x, i: hfp.flash_attn_varlen_qkvpacked_func(torch.stack((q[0],) * 3, 1), cu(0, 4, 8), n, 0.0, x),
        lambda n, x, i: hfp.flash_attn_with_kvcache(q, q, q, cache_seqlens=n, softmax_scale=x, softcap=x, num_splits=i),
        lambda n, x, i: hfp.flash_attn_with_kvcache(q, q, q, cache_seqlens=n, window_size=(n, i)),
    ]
    for call in pairs:
        assert torch.equal(call(four, small, np.int32(0)), call(4, 0.25, 0))
    dropped = []
    for p in (small, 0.25):
        torch.manual_seed(1)
        dropped.append(hfp.flash_attn_func(q, q, q, dropout_p=p))
    assert torch.equal(*dropped)
    for wrong, name in (
        (lambda: hfp.flash_attn_func(q, q, q, softmax_scale=np.float32("nan")), "softmax_scale"),
        (lambda: hfp.flash_attn_func(q, q, q, dropout_p=np.float64(1.0)), "dropout_p"),
        (lambda: hfp.flash_attn_func(q, q, q, window_size=(np.float32(1.0), 0)), "window_size"),
        (lambda: hfp.attention(q, q, q, AttentionMask(window=(np.float32(1.0), 0))), "window_size"),
        (lambda: hfp.flash_attn_with_kvcache(q, q, q, cache_seqlens=np.float32(4.0)), "cache_seqlens"),
        (lambda: hfp.flash_attn_with_kvcache(q, q, q, num_splits=np.float32(1.0)), "num_splits"),
        (lambda: hfp.flash_attn_varlen_func(q[0], q[0], q[0], cu(0, 8), cu(0, 8), np.float32(8), 8), "max_seqlen_q"),
        (lambda: hfp.flash_attn_varlen_func(q[0], q[0], q[0], cu(0, 1), cu(0, 1), True, 1), "max_seqlen_q"),
    ):
        with pytest.raises(ValueError, match=name):
            wrong()


def test_a_window_of_floats_after_one_of_integers() -> None:
    masked(window=(2, 1))()
    with pytest.raises(ValueError, match="window_size must be a tuple of two integers"):
        masked(window=(2.0, 1.0))()


def test_keywords_of_other_versions_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="softmax_temperature"):
        hfp.flash_attn_func(t(*Q), t(*K), t(*K), softmax_temperature=2.0)


def test_what_nobody_serves_is_not_a_malformed_call() -> None:
    q = t(*Q, device="meta")
    with pytest.raises(NoProviderError), hfp.use_provider("torch_sdpa"):
        hfp.flash_attn_func(q, q, q)


def test_validate_is_the_one_place() -> None:
    # The integration builds inputs by itself and calls the same function.
    inputs = AttentionInputs(t(*Q), t(*K), t(2, 5, 2, 8), 1.0)
    with pytest.raises(ValueError, match="k and v must have the same seqlen"):
        validate(inputs)
    packed = PackedSequences(CU, CU, 3, 3, False, (-1, -1))
    validate(
        AttentionInputs(t(*Q), t(*K), t(*K), 1.0, AttentionMask(row_intervals=t(1, 4, 2, dtype=INT), packed=packed))
    )


@pytest.mark.parametrize("value", [0, 0.0, 0.5, True and 0.25])
def test_numbers_may_be_integers(value: float) -> None:
    q, k = t(*Q), t(*K)
    hfp.flash_attn_func(q, k, k, dropout_p=value, softmax_scale=1, softcap=0, window_size=(torch.tensor(2), -1))
