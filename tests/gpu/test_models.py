"""Models of many families on a GPU with the Triton kernels: forward, gradients, generation, torch.compile.

fp32 is compared with eager in fp32 (tokens exactly); bf16 with fp32 eager, its error bounded by that of bf16 eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_flash_plus.dispatch import clear_cache, providers_used
from tests.transformers.tiny import MODELS, build, ids, padding

pytestmark = pytest.mark.gpu

#: Rounding moves a token to another expert: errors in half precision say nothing about attention.
MIXTURES = ("gpt_oss", "deepseek_v3", "llama4")
GENERATORS = [name for name, tiny in MODELS.items() if tiny.generates]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Without TF32: in eager's matrix products it would be the largest error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def _batch(name: str, kind: str, length: int = 70) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    mask = padding(kind, length=length)
    batch = {"input_ids": ids(length=length).cuda()}
    if mask is not None:
        mask = batch["attention_mask"] = mask.cuda()
    if MODELS[name].encoder_decoder:
        batch["decoder_input_ids"] = ids(length=37, seed=1).cuda()
        return batch, None
    return batch, mask


def _run(name: str, implementation: str, dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits at real tokens, and the gradients of all parameters."""
    batch, valid = _batch(name, kind)
    model = build(name, implementation).to("cuda", dtype)
    logits = model(**batch).logits
    logits = logits if valid is None else logits[valid.bool()]
    logits.float().square().mean().backward()
    return logits.detach().float(), {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ("none", "left", "inner"))
@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_eager(name: str, kind: str) -> None:
    want, want_grads = _run(name, "eager", torch.float32, kind)
    clear_cache()
    got, grads = _run(name, "flash_plus", torch.float32, kind)
    assert providers_used() == ["triton"]
    assert (got - want).abs().max() <= 5e-5 * want.abs().max()
    assert grads.keys() == want_grads.keys()
    top = max(g.abs().max() for g in want_grads.values())
    for key, expected in want_grads.items():
        assert (grads[key] - expected).abs().max() <= 5e-5 * top, key


@pytest.mark.parametrize("kind", ("none", "left", "right"))
@pytest.mark.parametrize("name", [name for name in MODELS if name not in MIXTURES])
def test_bf16_is_as_good_as_eager(name: str, kind: str) -> None:
    exact, exact_grads = _run(name, "eager", torch.float32, kind)
    eager, eager_grads = _run(name, "eager", torch.bfloat16, kind)
    got, grads = _run(name, "flash_plus", torch.bfloat16, kind)
    # Root mean squares: the largest single error of a whole model is a matter of luck.
    assert _rms(got - exact) <= 1.25 * _rms(eager - exact)

    def total(values: dict[str, torch.Tensor]) -> float:
        return sum((values[key] - exact_grads[key]).square().sum().item() for key in exact_grads) ** 0.5

    assert total(grads) <= 1.25 * total(eager_grads)


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded": {"cache_implementation": "offloaded"},
}


def _generate(name: str, implementation: str, kind: str, **options: Any) -> torch.Tensor:
    mask = torch.ones(2, 40, dtype=torch.long) if kind == "none" else padding(kind, length=40)
    arguments = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    model = build(name, implementation).cuda()
    return model.generate(ids(length=40).cuda(), attention_mask=mask.cuda(), **arguments)


@pytest.fixture
def offloading_in_order(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Transformers' offloaded cache without its race; the result counts the layers that it fetched.

    Until 5.23 the stream that fetches the next layer does not wait for the one that computes. With few layers it
    therefore copies keys from the host that the copy to the host has not written yet, and its memory is reused while
    attention still reads what was fetched before: on a busy GPU eager gives other tokens from run to run, too. Here the
    device is idle before and after every fetch and every offload, so that all implementations get the same keys.
    """
    from transformers.cache_utils import Cache

    fetched: list[int] = []

    def in_order(original: Any) -> Any:
        def call(self: Cache, layer_idx: int, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            original(self, layer_idx, *args, **kwargs)
            torch.cuda.synchronize()
            fetched.append(layer_idx)

        return call

    for name in ("prefetch", "offload"):
        monkeypatch.setattr(Cache, name, in_order(getattr(Cache, name)))
    return fetched


@pytest.mark.parametrize("kind", ("none", "left"))
@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", GENERATORS)
def test_generate_equals_eager(name: str, mode: str, kind: str, offloading_in_order: list[int]) -> None:
    if mode == "static" and not (MODELS[name].static_cache and build(name)._can_compile_fullgraph):
        pytest.skip("the model has no static cache")
    if mode == "offloaded" and MODELS[name].encoder_decoder:
        pytest.skip("Transformers offloads caches of decoders only")
    # An offloaded cache changes no token: eager without one is the reference.
    want = _generate(name, "eager", kind, **({} if mode == "offloaded" else GENERATION[mode]))
    assert torch.equal(_generate(name, "flash_plus", kind, **GENERATION[mode]), want)
    assert bool(offloading_in_order) == (mode == "offloaded")


@pytest.mark.parametrize("kind", ("none", "left"))
@pytest.mark.parametrize("name", ("llama", "gemma2", "gemma3_text"))
def test_compiled_static_cache_equals_eager(name: str, kind: str) -> None:
    """``generate`` compiles decoding steps into CUDA graphs by itself where the cache is static."""
    want = _generate(name, "eager", kind)
    assert torch.equal(_generate(name, "flash_plus", kind, cache_implementation="static"), want)


def test_decoding_step_captures_cuda_graphs() -> None:
    """One decoding step, compiled whole with ``reduce-overhead``: no graph break, and replays give eager's logits."""
    from transformers import StaticCache

    logits = {}
    for implementation in ("eager", "flash_plus"):
        model = build("llama", implementation).cuda()
        cache = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(ids(length=20).cuda(), past_key_values=cache, use_cache=True)
            step = model.forward
            if implementation == "flash_plus":
                step = torch.compile(step, fullgraph=True, mode="reduce-overhead")
            found = []
            for position in range(20, 28):
                if implementation == "flash_plus":
                    torch.compiler.cudagraph_mark_step_begin()
                token = ids(length=40, seed=2)[:, position : position + 1].cuda()
                at = torch.tensor([[position]], device="cuda").expand(2, 1)
                found.append(step(token, position_ids=at, past_key_values=cache, use_cache=True).logits.clone())
        logits[implementation] = torch.cat(found, dim=1)
    difference = (logits["flash_plus"] - logits["eager"]).abs().max()
    assert difference <= 5e-5 * logits["eager"].abs().max()


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
@pytest.mark.parametrize("kind", ("none", "left"))
def test_compiled_training_step(name: str, kind: str) -> None:
    """``torch.compile(fullgraph=True)`` with its default backend, forward and backward."""
    batch, valid = _batch(name, kind)

    def step(model: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = run(**batch).logits
        logits = logits if valid is None else logits[valid.bool()]
        logits.square().mean().backward()
        return logits.detach(), model.get_input_embeddings().weight.grad

    eager = build(name).cuda()
    ours = build(name, "flash_plus").cuda()
    want, got = step(eager, eager), step(ours, torch.compile(ours, fullgraph=True))
    for actual, expected in zip(got, want):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ("none", "left"))
def test_compiled_llama_in_bf16(kind: str) -> None:
    """The same with the kernels that half precision gets: as near to eager in fp32 as eager in bf16 is."""
    batch, valid = _batch("llama", kind)

    def step(implementation: str, dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
        model = build("llama", implementation).to("cuda", dtype)
        logits = (torch.compile(model, fullgraph=True) if compiled else model)(**batch).logits
        logits = logits if valid is None else logits[valid.bool()]
        logits.float().square().mean().backward()
        return [logits.detach().float(), torch.cat([p.grad.float().flatten() for p in model.parameters()])]

    exact, eager = step("eager", torch.float32, False), step("eager", torch.bfloat16, False)
    clear_cache()
    got = step("flash_plus", torch.bfloat16, True)
    assert providers_used() == ["triton"]
    for one, budget, true in zip(got, eager, exact):
        assert _rms(one - true) <= 1.25 * _rms(budget - true)


def test_continuous_batching_reads_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate_batch`` gives the tokens of ``generate``, and decodes by block tables."""
    import transformers

    from hf_flash_plus.integration import continuous

    calls = []
    original = continuous._by_block_table
    monkeypatch.setattr(continuous, "_by_block_table", lambda *a: (calls.append(1), original(*a))[1])
    prompts = [ids(1, length, seed)[0].tolist() for seed, length in enumerate((5, 43, 18))]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model = build("llama").cuda()
    want = [
        model.generate(torch.tensor([prompt]).cuda(), eos_token_id=None, **options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    model = build("llama", "flash_plus").cuda()
    config = transformers.GenerationConfig(eos_token_id=-1, **options)
    # The cache takes what the GPU has left, unless it is told to leave it to the other tests.
    part = transformers.ContinuousBatchingConfig(max_memory_percent=0.02)
    results = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=part, progress_bar=False
    )
    keys = sorted(results, key=lambda key: int(key.rsplit("_", 1)[-1]))
    assert [results[key].generated_tokens for key in keys] == want
    assert calls
