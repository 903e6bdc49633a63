"""Continuous batching as a work of the ``e2e`` benchmark: requests of many lengths through ``model.generate_batch``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

#: Keys of a page; a block of the cache holds as many tokens of a request for all layers.
PAGE = 256


def continuous(model: Any, work: dict[str, Any], device: torch.device) -> tuple[Callable[[], Any], int]:
    """Greedy generation of ``new_tokens`` for each of ``batch`` requests, whose prompts have a quarter of ``seqlen``
    tokens to all of them.

    The manager with its cache and its CUDA graphs is made by the first step and kept for the others, as a server does.
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model.eval()
    requests, seqlen, new_tokens = work["batch"], work["seqlen"], work.get("new_tokens", 64)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(max(1, seqlen // 4), seqlen, requests).long().tolist()
    prompts = [torch.randint(5, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted: dict[str, Any] = {
        "page_size": PAGE,
        "block_size": PAGE,  # the name of Transformers before 5.17
        "num_blocks": sum(-(-(n + new_tokens) // PAGE) + 1 for n in lengths),
        "max_batch_tokens": max(2048, requests),
        "auto_switch_to_flash": False,  # each implementation is measured under its own name
        "allow_block_sharing": False,
    }
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    if "page_size" in known:
        known.discard("block_size")
    batching = ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})

    def step() -> None:
        results = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=batching,
            progress_bar=False,
            persistent_manager=True,
        )
        done = sum(len(result.generated_tokens) for result in results.values())
        if done != requests * new_tokens:
            raise RuntimeError(f"generate_batch made {done} tokens of {requests * new_tokens}")

    return step, requests * new_tokens


def close(model: Any) -> None:
    """Free what :func:`continuous` left with a model."""
    destroy = getattr(model, "destroy_cached_continuous_batching_manager", None)
    if destroy is not None:
        destroy()
