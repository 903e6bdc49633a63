"""More malformed calls, through every door, and what holds for all of them: no kernel runs, nothing stays behind.

``test_validation.py`` has the calls whose shapes, dtypes and numbers are wrong. Here are those whose *values* are
wrong, and the settings, masks, models and Transformers arguments that are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import hf_flash_plus as hfp
from hf_flash_plus import NoProviderError, bert_padding, dispatch, settings
from hf_flash_plus.integration.attention import flash_plus_attention
from hf_flash_plus.providers import PROVIDERS

from .test_validation import BAD, CU, INT, TABLE, Bad, Q, appending, cached, dense, masked, paged, t, varlen


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([t(6, 2, 8), t(3, 2, 8)], layout=layout)


def under(name: str, value: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A good call with a bad environment variable."""

    def run() -> Any:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            return call()
        finally:
            os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)

    return run


def forced(provider: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with hfp.use_provider(provider):
            return call()

    return run


def layer(**arguments: Any) -> Callable[[], Any]:
    """A call as a layer of Transformers makes it: (batch, nheads, seqlen, headdim)."""
    q, k = t(2, 4, 4, 8), t(2, 2, 4, 8)
    arguments = {"query": q, "key": k, "value": k, "attention_mask": None, **arguments}
    return lambda: flash_plus_attention(nn.Module(), **arguments)


def bloom() -> tf.BloomModel:
    return tf.BloomModel(tf.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))


ONE_PAGE = paged(cu_seqlens_k=ints(0, 3, 16), max_seqlen_k=16)
MORE = [
    # cumulative lengths, by value
    Bad(
        "cu_q begins with 1",
        varlen(cu_seqlens_q=ints(1, 3, 5)),
        ValueError,
        ("cu_seqlens_q", "begin with 0", "[1, 3, 5]"),
    ),
    Bad("cu_k begins with -1", varlen(cu_seqlens_k=ints(-1, 3, 5)), ValueError, ("cu_seqlens_k", "begin with 0", "-1")),
    Bad("cu_q falls", varlen(cu_seqlens_q=ints(0, 4, 3)), ValueError, ("cu_seqlens_q", "never fall", "[0, 4, 3]")),
    Bad("cu_q ends too far", varlen(cu_seqlens_q=ints(0, 3, 6)), ValueError, ("cu_seqlens_q ends at 6", "5 rows")),
    Bad("cu_k ends too far", varlen(cu_seqlens_k=ints(0, 3, 9)), ValueError, ("cu_seqlens_k ends at 9", "5 rows")),
    Bad("max_seqlen_q too small", varlen(max_seqlen_q=2), ValueError, ("max_seqlen_q is 2", "cu_seqlens_q has 3")),
    Bad("max_seqlen_k too small", varlen(max_seqlen_k=0), ValueError, ("max_seqlen_k is 0", "cu_seqlens_k has 3")),
    Bad("max_seqlen_q -1", varlen(max_seqlen_q=-1), ValueError, ("max_seqlen_q must be an integer >= 0", "-1")),
    Bad("max_seqlen_q None", varlen(max_seqlen_q=None), ValueError, ("max_seqlen_q must be an integer", "None")),
    Bad("max_seqlen_k 2.5", varlen(max_seqlen_k=2.5), ValueError, ("max_seqlen_k must be an integer", "2.5")),
    Bad("max_seqlen_k a word", varlen(max_seqlen_k="3"), ValueError, ("max_seqlen_k must be an integer", "'3'")),
    Bad("max_seqlen_q True", varlen(max_seqlen_q=True), ValueError, ("max_seqlen_q must be an integer", "True")),
    Bad(
        "packed qkv beyond",
        lambda: hfp.flash_attn_varlen_qkvpacked_func(t(5, 3, 2, 8), ints(0, 7), 7),
        ValueError,
        ("cu_seqlens_q ends at 7", "5 rows"),
    ),
    Bad(
        "packed kv falls",
        lambda: hfp.flash_attn_varlen_kvpacked_func(t(5, 2, 8), t(5, 2, 2, 8), CU, ints(0, 9, 5), 3, 9),
        ValueError,
        ("cu_seqlens_k", "never fall"),
    ),
    # pages, by value
    Bad(
        "page beyond the cache",
        paged(block_table=torch.full((2, 3), 6, dtype=INT)),
        ValueError,
        ("block_table must be from 0 to 5", "got 6 to 6"),
    ),
    Bad("page -1 in use", paged(block_table=TABLE - 1), ValueError, ("block_table must be from 0 to 5", "-1")),
    Bad("more keys than pages hold", ONE_PAGE, ValueError, ("cu_seqlens_k", "from 0 to 12", "13")),
    Bad("cached page beyond", cached(block_table=TABLE + 3), ValueError, ("block_table must be from 0 to 2", "3 to 3")),
    Bad(
        "pages of two sizes",
        cached(block_table=TABLE, v_cache=t(3, 8, 2, 8)),
        ValueError,
        ("k_cache and v_cache must have the same pages", "(3, 10, 2, 8)", "(3, 8, 2, 8)"),
    ),
    # caches, by value
    Bad(
        "values in a shorter cache",
        cached(v_cache=t(3, 8, 2, 8)),
        ValueError,
        ("k_cache and v_cache must have the same batch and seqlen", "(3, 10, 2, 8)", "(3, 8, 2, 8)"),
    ),
    Bad(
        "rows by bools", cached(cache_batch_idx=torch.tensor([True, False])), ValueError, ("cache_batch_idx", "integer")
    ),
    Bad(
        "window -5 over lengths",
        cached(cache_seqlens=ints(3, 4), window_size=(-5, 3)),
        ValueError,
        ("window_size", "-5"),
    ),
    Bad(
        "rotary of whole numbers",
        appending(rotary_cos=torch.ones(12, 4, dtype=INT), rotary_sin=torch.ones(12, 4, dtype=INT)),
        ValueError,
        ("rotary_cos must have a floating dtype", "torch.int32"),
    ),
    # numbers that fp32 cannot compute with, windows, bounds
    Bad(
        "softcap beyond fp32", dense(softcap=1e39), ValueError, ("softcap must be 0 or of a size from 1e-30 to 1e+30",)
    ),
    Bad("scale below fp32", dense(softmax_scale=1e-46), ValueError, ("softmax_scale must be 0 or of a size", "1e-46")),
    Bad("window -5 of varlen", varlen(window_size=(-5, 3)), ValueError, ("window_size must be >= -1", "(-5, 3)")),
    Bad(
        "max_seqlen_q a fraction",
        varlen(max_seqlen_q=torch.tensor(9.0)),
        ValueError,
        ("max_seqlen_q must be an integer",),
    ),
    Bad("max_seqlen_k of several", varlen(max_seqlen_k=ints(9, 9)), ValueError, ("max_seqlen_k must be an integer",)),
    Bad("lengths beyond", cached(cache_seqlens=ints(3, 11)), ValueError, ("cache_seqlens must be from 0 to 10", "11")),
    Bad("lengths below", cached(cache_seqlens=ints(-2, 3)), ValueError, ("cache_seqlens must be from 0 to 10", "-2")),
    Bad(
        "no room in one row",
        appending(cache_seqlens=ints(3, 10)),
        ValueError,
        ("cache_seqlens must be from 0 to 9", "1 of them for k", "10"),
    ),
    Bad(
        "row beyond the cache",
        cached(cache_batch_idx=ints(0, 3)),
        ValueError,
        ("cache_batch_idx must be from 0 to 2", "0 to 3"),
    ),
    Bad("row -1", cached(cache_batch_idx=ints(-1, 0)), ValueError, ("cache_batch_idx must be from 0 to 2", "-1")),
    Bad("leftpad -1", cached(cache_leftpad=ints(-1, 0)), ValueError, ("cache_leftpad must be from 0 to 10", "-1")),
    Bad("leftpad beyond", cached(cache_leftpad=ints(1, 11)), ValueError, ("cache_leftpad must be from 0 to 10", "11")),
    Bad(
        "rotation beyond the table",
        appending(q=t(2, 9, 4, 8), causal=True, rotary_cos=t(10, 4), rotary_sin=t(10, 4), cache_seqlens=3),
        ValueError,
        ("rotary_cos and rotary_sin must have 12 rows", "seqlen 9", "(10, 4)"),
    ),
    Bad(
        "rotation beyond, lengths in a tensor",
        appending(q=t(2, 2, 4, 8), causal=True, rotary_cos=t(10, 4), rotary_sin=t(10, 4), cache_seqlens=ints(1, 9)),
        ValueError,
        ("rotary_cos and rotary_sin must have 11 rows", "(10, 4)"),
    ),
    # tensors that are none of rows and columns
    Bad("q is sparse", dense(q=t(*Q).to_sparse()), ValueError, ("q is a torch.sparse_coo tensor", "to_dense")),
    Bad(
        "k is nested",
        dense(k=nested(torch.strided)),
        ValueError,
        ("k is a nested tensor", "flash_attn_varlen_func"),
    ),
    Bad("v is jagged", dense(v=nested(torch.jagged)), ValueError, ("v is a nested tensor", "or pad it")),
    Bad(
        "all are jagged",
        dense(q=nested(torch.jagged), k=nested(torch.jagged), v=nested(torch.jagged)),
        ValueError,
        ("q is a nested tensor", "flash_attn_varlen_func"),
    ),
    # masks
    Bad("window None of a mask", masked(window=None), ValueError, ("window_size must be a tuple", "None")),
    Bad("window of one", masked(window=(1,)), ValueError, ("window_size must be a tuple of two integers", "(1,)")),
    Bad("window -3 of a mask", masked(window=(3, -3)), ValueError, ("window_size must be >= -1", "(3, -3)")),
    Bad("intervals of floats", masked(row_intervals=t(2, 4, 2)), ValueError, ("row_intervals", "int32", "float32")),
    Bad(
        "intervals of 3 numbers",
        masked(row_intervals=t(2, 4, 3, dtype=INT)),
        ValueError,
        ("row_intervals", "(2, 4, 3)"),
    ),
    Bad("key_mask of 3 rows", masked(key_mask=t(3, 6, dtype=torch.bool)), ValueError, ("key_mask", "(3, 6)")),
    Bad("key_mask a list", masked(key_mask=[True]), TypeError, ("key_mask must be a torch.Tensor", "list")),
    Bad(
        "key_mask elsewhere",
        masked(key_mask=t(2, 6, dtype=torch.bool, device="meta")),
        ValueError,
        ("key_mask is on meta", "q is on cpu"),
    ),
    Bad("positions of 5 rows", masked(row_positions=t(2, 5, dtype=INT)), ValueError, ("row_positions", "(2, 5)")),
    Bad("complex bias", masked(bias=t(2, 4, 4, 6, dtype=torch.complex64)), ValueError, ("bias", "complex64")),
    Bad(
        "holes of 3",
        masked(key_mask=t(2, 6, dtype=torch.bool), key_holes=t(3, dtype=INT)),
        ValueError,
        ("key_holes", "(3,)"),
    ),
    # settings
    Bad(
        "FLAGGEMS=maybe",
        under(settings.USE_FLAGGEMS, "maybe", dense()),
        ValueError,
        (settings.USE_FLAGGEMS, "'maybe'", "TRUE", "FALSE"),
    ),
    Bad(
        "DETERMINISTIC=2",
        under(settings.DETERMINISTIC, "2", dense()),
        ValueError,
        (settings.DETERMINISTIC, "'2'", "ON"),
    ),
    Bad(
        "PROVIDER=cudnn",
        under(settings.PROVIDER, "cudnn", dense()),
        ValueError,
        ("unknown provider 'cudnn'", "torch_sdpa"),
    ),
    Bad(
        "use_provider cudnn", forced("cudnn", dense()), ValueError, ("unknown provider 'cudnn'", "triton", "reference")
    ),
    Bad("use_provider None", forced(None, dense()), ValueError, ("unknown provider None", "reference")),  # type: ignore[arg-type]
    Bad(
        "softcap of torch_sdpa",
        forced("torch_sdpa", dense(softcap=1.0)),
        NoProviderError,
        ("'torch_sdpa' is forced", "does not serve softcap", "hf-flash-plus explain"),
    ),
    Bad(
        "weights of torch_sdpa",
        forced("torch_sdpa", dense(dropout_p=0.5, return_attn_probs=True)),
        NoProviderError,
        ("return_attn_probs with dropout", "'torch_sdpa' is forced", "'reference'"),
    ),
    # Transformers
    Bad(
        "layer mask of 3 dimensions",
        layer(attention_mask=t(2, 4, 4)),
        ValueError,
        ("attention_mask", "(2, 4, 4)", "4-D boolean", "2-D padding"),
    ),
    Bad(
        "layer mask of int64",
        layer(attention_mask=t(2, 1, 4, 4, dtype=torch.int64)),
        ValueError,
        ("attention_mask", "int64", "4-D boolean"),
    ),
    Bad("layer mask of 3 rows", layer(attention_mask=t(2, 1, 3, 4)), ValueError, ("bias", "(2, 1, 3, 4)")),
    Bad("layer cu_seqlens a list", layer(cu_seq_lens_q=[0, 4]), ValueError, ("cu_seq_lens_q must be a tensor", "list")),
    Bad(
        "layer cu_seqlens of a batch",
        layer(cu_seq_lens_q=ints(0, 4)),
        ValueError,
        ("cu_seq_lens_q", "batch is 2", "flatten"),
    ),
    Bad("layer blocks", layer(block_indices=ints(0)), NotImplementedError, ("block_indices", "'eager' or 'sdpa'")),
    Bad("layer heads", layer(query=t(2, 3, 4, 8)), ValueError, ("heads of q (3)", "(2)")),
    Bad("layer dropout 1", layer(dropout=1.0), ValueError, ("dropout_p must be in [0, 1)", "1.0")),
    Bad("layer scaling nan", layer(scaling=float("nan")), ValueError, ("softmax_scale", "nan")),
    Bad("layer sinks", layer(s_aux=t(3)), ValueError, ("s_aux", "(3,)", "(4,)")),
    Bad("layer devices", layer(key=t(2, 2, 4, 8, device="meta")), ValueError, ("k is on meta", "q is on cpu")),
    # models
    Bad("patching a layer", lambda: hfp.patch_model(nn.Linear(2, 2)), TypeError, ("Linear", "PreTrainedModel")),
    Bad("patching a name", lambda: hfp.patch_model("llama"), TypeError, ("str", "PreTrainedModel")),  # type: ignore[arg-type]
    Bad("patching a class", lambda: hfp.patch_model(tf.LlamaModel), TypeError, ("type", "PreTrainedModel")),  # type: ignore[arg-type]
    Bad("patching bloom", lambda: hfp.patch_model(bloom()), ValueError, ("BloomModel", "attention interface")),
    # bert_padding
    Bad(
        "mask of a longer batch",
        lambda: bert_padding.unpad_input(t(2, 4, 8), t(3, 4)),
        ValueError,
        ("attention_mask", "(3, 4)"),
    ),
]
EVERY = [*BAD, *MORE]


def state() -> dict[str, Any]:
    """Everything global that a call could have touched."""
    return {
        "environment": dict(os.environ),
        "generator": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "forced provider": settings._provider_override.get(),
        "attention functions": dict(AttentionInterface._global_mapping),
        "mask functions": dict(AttentionMaskInterface._global_mapping),
        "lazy imports": flash_utils._lazy_imports,
        "providers": dict(PROVIDERS),
        "fallbacks reported": set(dispatch._reported),
    }


def test_at_least_150_cases_with_names_of_their_own() -> None:
    assert len(EVERY) >= 150
    assert len({bad.what for bad in EVERY}) == len(EVERY)
    assert all(bad.says for bad in EVERY), "every message is checked"
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"**Wrong calls**: {len(EVERY)} of them" in readme


@pytest.mark.parametrize("bad", MORE, ids=[bad.what for bad in MORE])
def test_bad_call(bad: Bad) -> None:
    for _ in range(2):
        with pytest.raises(bad.error) as caught:
            bad.call()
        assert type(caught.value) is bad.error
        missing = [part for part in bad.says if part not in str(caught.value)]
        assert not missing, f"{str(caught.value)!r} does not say {missing}"


def test_no_bad_call_reaches_a_provider_or_leaves_anything_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    for provider in PROVIDERS.values():
        monkeypatch.setattr(provider, "forward", lambda inputs: reached.append(inputs))
    tf.utils.logging.set_verbosity_error()
    before = state()
    for bad in EVERY:
        with pytest.raises(bad.error):
            bad.call()
        assert not reached, f"{bad.what}: a provider was called"
    # The generator was used to build bloom()'s weights; every other case must have left it alone.
    after = state()
    changed = [name for name in before if before[name] != after[name] and name != "generator"]
    assert not changed
    torch.manual_seed(0)
    before = state()
    for bad in EVERY:
        if "patching" not in bad.what:
            with pytest.raises(bad.error):
                bad.call()
    assert state() == before


@pytest.mark.parametrize(
    "call",
    [
        paged(cu_seqlens_k=ints(0, 3, 15), max_seqlen_k=12),
        varlen(max_seqlen_q=torch.tensor(3)),
        varlen(cu_seqlens_q=ints(0, 3, 4)),
        cached(cache_seqlens=ints(0, 10)),
        cached(cache_batch_idx=ints(2, 0)),
        cached(block_table=torch.tensor([[0, 1, -1], [2, 0, 99]], dtype=INT), cache_seqlens=ints(20, 5)),
        appending(q=t(2, 9, 4, 8), causal=True, rotary_cos=t(12, 4), rotary_sin=t(12, 4), cache_seqlens=3),
        layer(),
        forced("reference", dense(k=t(2, 6, 2, 8))),
    ],
)
def test_their_good_neighbours_pass(call: Callable[[], Any]) -> None:
    call()
