"""``generate_batch`` with ``flash_plus`` gives the tokens of plain ``generate``."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation.continuous_batching import initialization

from hf_flash_plus.integration import continuous

from .tiny import build, ids


def _offer_pages(config: Any, cb_config: Any, *args: Any) -> None:
    cb_config.max_blocks_per_request = 8


@pytest.mark.parametrize("pages", (False, True), ids=("by index", "by block table"))
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma3_text"))
def test_generate_batch_equals_generate(name: str, pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    if pages:  # as on a GPU, where Transformers offers them
        original = continuous._by_block_table
        monkeypatch.setattr(continuous, "_by_block_table", lambda *a: calls.append(1) or original(*a))
        monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", _offer_pages)
    prompts = [ids(1, length, seed)[0].tolist() for seed, length in enumerate((5, 11, 8))]
    expected = []
    for prompt in prompts:
        model = build(name)
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    model = build(name, "flash_plus")
    config = tf.GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    got = [results[key].generated_tokens for key in sorted(results, key=lambda k: int(k.rsplit("_", 1)[-1]))]
    assert got == expected
    # A cache of few keys goes by index again; and models with windows keep no pages on Transformers 5.23.
    assert bool(calls) == pages or (pages and name != "llama")
    assert model.config._attn_implementation == "flash_plus"


class _Cache:
    """What a block table step needs of a cache, in the manner of Transformers 5.23."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return key_states, value_states


def test_rows_that_fill_up_a_graph_write_nowhere_else() -> None:
    """Padding rows have no page (-1) and no keys: the last page, which -1 means to an index, must not change."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    k_cache, v_cache = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    before = k_cache.clone(), v_cache.clone()
    kwargs = {
        "block_table": torch.tensor([[2, 4], [3, -1], [-1, -1]], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 6, 9, 9]),  # 6 keys, 3 keys, a padding row
        "k_cache": k_cache,
        "v_cache": v_cache,
    }
    module = torch.nn.Module()
    module.layer_idx = 0
    with torch.no_grad():
        out = continuous._by_block_table(module, q, k, v, _Cache(), 0.0, None, None, None, None, kwargs)
    assert out.shape == (1, 3, 4, 8) and out.isfinite().all()
    for cache, old, new in zip((k_cache, v_cache), before, (k, v)):
        assert torch.equal(cache[4, 1], new[0, :, 0]) and torch.equal(cache[3, 2], new[0, :, 1])
        old[4, 1], old[3, 2] = new[0, :, 0], new[0, :, 1]
        assert torch.equal(cache, old)
    keys = torch.cat((k_cache[2], k_cache[4, :2]))[None].transpose(1, 2)
    values = torch.cat((v_cache[2], v_cache[4, :2]))[None].transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], keys, values, enable_gqa=True)
    assert (out[:, :1].transpose(1, 2) - want).abs().max() < 2e-6


def test_block_tables_are_asked_for_by_version() -> None:
    config = type("Config", (), {"_attn_implementation": "flash_plus"})()
    build("llama", "flash_plus")
    assert initialization.is_flash_attention_requested(config, version=[2, 3])
    config._attn_implementation = "sdpa"
    assert not initialization.is_flash_attention_requested(config, version=[2, 3])


def test_the_mask_of_a_step_is_made_once() -> None:
    """All layers share it; lengths that change in place make a new one, and so does another window."""
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    first = continuous._mask(cu_q, cu_k, 5, 9, True, None)
    assert continuous._mask(cu_q, cu_k, 5, 9, True, None) is first
    windowed = continuous._mask(cu_q, cu_k, 5, 9, True, 2)
    assert windowed.row_intervals.tolist() == [[[1, 3], [2, 4], [5, 7], [6, 8], [7, 9]]]
    assert continuous._mask(cu_q, cu_k, 5, 9, True, None) is first
    assert continuous._mask(cu_q, cu_k.clone(), 5, 9, True, None) is not first
    cu_k[1] = 3
    changed = continuous._mask(cu_q, cu_k, 5, 9, True, None)
    assert changed.row_intervals.tolist() == [[[0, 2], [0, 3], [3, 7], [3, 8], [3, 9]]]
    with torch.inference_mode():
        cu_q, cu_k = cu_q.clone(), cu_k.clone()
        first = continuous._mask(cu_q, cu_k, 5, 9, True, None)
        assert continuous._mask(cu_q, cu_k, 5, 9, True, None) is not first, "nobody counts changes there"


def test_a_mask_made_before_a_capture_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph must make the mask anew at each replay; its other layers share what its first one makes."""
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    before = continuous._mask(cu, cu, 5, 5, True, None)
    monkeypatch.setattr("hf_flash_plus.integration.continuous.capturing", lambda _tensor: True)
    inside = continuous._mask(cu, cu, 5, 5, True, None)
    assert inside is not before and continuous._mask(cu, cu, 5, 5, True, None) is inside
    continuous._forget_masks(cu)  # as the first layer does
    assert continuous._mask(cu, cu, 5, 5, True, None) is not inside


def test_the_mask_of_a_step_goes_with_it() -> None:
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    gone = weakref.ref(continuous._mask(cu_q, cu_k, 5, 9, True, None))
    assert gone() is not None
    gc.disable()
    try:
        del cu_q
        assert gone() is None, "without waiting for the garbage collector"
    finally:
        gc.enable()
