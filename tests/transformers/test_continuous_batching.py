"""``generate_batch`` with ``flash_plus`` gives the tokens of plain ``generate``."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from .tiny import build, ids


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma3_text"))
def test_generate_batch_equals_generate(name: str) -> None:
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
    assert model.config._attn_implementation == "flash_plus"
