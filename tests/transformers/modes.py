"""The rarer ways to generate, each a function from a tiny model to tokens or logits, for tests on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import cache_utils

from .tiny import build, ids, padding

TOKENS = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


class RoundedLayer(cache_utils.QuantizedLayer):  # type: ignore[misc]
    """A quantized cache as optimum-quanto's and HQQ's are, without their packages: one byte a number."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 127
        return torch.round(tensor / scale).to(torch.int8), scale

    def _dequantize(self, quantized: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        values, scale = quantized
        return values.to(scale.dtype) * scale


def _batch(model: Any, rows: int = 2, kind: str = "left") -> dict[str, torch.Tensor]:
    mask = padding(kind)
    mask = torch.ones(2, 12, dtype=torch.long) if mask is None else mask
    return {"input_ids": ids()[:rows].to(model.device), "attention_mask": mask[:rows].to(model.device)}


def _quantized(model: Any) -> torch.Tensor:
    layers = [RoundedLayer(residual_length=4) for _ in range(model.config.num_hidden_layers)]
    return model.generate(**_batch(model), **TOKENS, past_key_values=cache_utils.Cache(layers=layers))


def _quantized_by(backend: str) -> Callable[[Any], torch.Tensor]:
    def generate(model: Any) -> torch.Tensor:
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
        config = {"backend": backend, "residual_length": 4, "q_group_size": 8, "nbits": 8 if backend == "hqq" else 4}
        return model.generate(**_batch(model), **TOKENS, cache_implementation="quantized", cache_config=config)

    return generate


def _assisted(model: Any) -> torch.Tensor:
    assistant = build("llama", model.config._attn_implementation).to(model.device)
    noise = torch.randn(assistant.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # sometimes wrong
        assistant.lm_head.weight.add_(0.05 * noise.to(model.device))
    return model.generate(**_batch(model, 1), **TOKENS, assistant_model=assistant)


def _turns(model: Any) -> torch.Tensor:
    """A conversation: the second call goes on from the first one's cache with several new tokens."""
    batch = _batch(model)
    first = model.generate(**batch, **TOKENS, return_dict_in_generate=True)
    more = torch.cat((first.sequences, ids(2, 5, seed=3).to(model.device)), dim=1)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(more[:, 12:])), dim=1)
    return model.generate(more, attention_mask=mask, past_key_values=first.past_key_values, **TOKENS)


def _candidates(model: Any) -> torch.Tensor:
    """What contrastive search (no longer in Transformers itself) asks of a model: the cache repeated for candidates,
    one step for all of them, the chosen rows kept, and so on."""
    batch = _batch(model)
    n_candidates, mask = 3, batch["attention_mask"]
    found = []
    with torch.no_grad():
        step = model(**batch, use_cache=True)
        for _ in range(4):
            cache, top = step.past_key_values, step.logits[:, -1].topk(n_candidates, dim=-1).indices
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
            cache.batch_repeat_interleave(n_candidates)
            positions = mask.repeat_interleave(n_candidates, 0).sum(-1, keepdim=True) - 1
            step = model(
                input_ids=top.reshape(-1, 1), attention_mask=mask.repeat_interleave(n_candidates, 0),
                position_ids=positions, past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(step.logits)
            kept = torch.tensor([2, n_candidates], device=model.device)
            cache.batch_select_indices(kept)
            step.logits = step.logits[kept]
    return torch.cat(found)


#: Equal tokens, but for ``candidates``, which gives logits.
MODES: dict[str, Callable[[Any], torch.Tensor]] = {
    "quantized": _quantized,
    "quanto": _quantized_by("quanto"),
    "hqq": _quantized_by("hqq"),
    "assisted": _assisted,
    "prompt_lookup": lambda model: model.generate(**_batch(model, 1), **TOKENS, prompt_lookup_num_tokens=3),
    "beam_static": lambda model: model.generate(
        **_batch(model), **TOKENS, num_beams=3, cache_implementation="static", disable_compile=True
    ),
    "beams_returned": lambda model: model.generate(**_batch(model), **TOKENS, num_beams=4, num_return_sequences=3),
    "turns": _turns,
    "candidates": _candidates,
}
#: Kinds of caches: all tokens, windows, both.
NAMES = ("llama", "mistral", "gemma3_text")


def run(name: str, mode: str, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """What eager and flash_plus give."""
    outputs = []
    for implementation in ("eager", "flash_plus"):
        torch.manual_seed(0)
        outputs.append(MODES[mode](build(name, implementation).to(device)))
    return outputs[0], outputs[1]


def assert_equal(mode: str, eager: torch.Tensor, ours: torch.Tensor) -> None:
    if mode == "candidates":
        assert eager.shape == ours.shape and eager.isfinite().all()
        assert (ours - eager).abs().max() <= 5e-5 * eager.abs().max()
    else:
        assert torch.equal(ours, eager)
