"""Every family under ``flash_plus`` equals eager: forward, gradients, padding, generation in all its modes."""

from __future__ import annotations

import pytest
import torch

from .tiny import MODELS, VOCAB, assert_close, build, ids, padding

PADDINGS = ("none", "left", "right", "inner")
# Eager's own result at padded positions differs from SDPA's and ours (uniform, not zero): compared at real ones only.


def inputs(name: str, kind: str) -> tuple[dict, torch.Tensor | None]:
    mask = padding(kind)
    batch = {"input_ids": ids()}
    if mask is not None:
        batch["attention_mask"] = mask
    if MODELS[name].encoder_decoder:
        batch["decoder_input_ids"] = ids(length=7, seed=1)
        return batch, None
    return batch, mask


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_eager(name: str, kind: str) -> None:
    batch, valid = inputs(name, kind)
    ours = build(name, "flash_plus")
    assert ours.config._attn_implementation == "flash_plus"
    with torch.no_grad():
        assert_close(ours(**batch).logits, build(name)(**batch).logits, valid)


@pytest.mark.parametrize("kind", ("none", "left", "right"))
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_eager(name: str, kind: str) -> None:
    batch, valid = inputs(name, kind)
    grads = {}
    for implementation in ("eager", "flash_plus"):
        model = build(name, implementation)
        logits = model(**batch).logits
        (logits if valid is None else logits[valid.bool()]).float().square().mean().backward()
        grads[implementation] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert grads["eager"].keys() == grads["flash_plus"].keys() and grads["eager"]
    top = max(g.abs().max() for g in grads["eager"].values())
    for key, expected in grads["eager"].items():
        error = (grads["flash_plus"][key] - expected).abs().max() / top
        assert error <= 2e-5, f"{key}: {error:.3g}"


GENERATION = {
    "greedy": dict(),
    "beam": dict(num_beams=3),
    "sample": dict(do_sample=True, top_k=5),
    "no_cache": dict(use_cache=False),
    "prompt_lookup": dict(prompt_lookup_num_tokens=3),
    "static": dict(cache_implementation="static", disable_compile=True),
}


@pytest.mark.parametrize("kind", ("none", "left"))
@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", [n for n, tiny in MODELS.items() if tiny.generates])
def test_generate_equals_eager(name: str, mode: str, kind: str) -> None:
    tiny = MODELS[name]
    if mode == "static" and not (tiny.static_cache and build(name)._can_compile_fullgraph):
        pytest.skip("the model has no static cache")
    if mode == "prompt_lookup" and (name in ("t5gemma",) or kind == "left"):
        pytest.skip("Transformers' assisted generation takes batch 1 and one cache")
    rows = 1 if mode == "prompt_lookup" else 2
    batch = {
        "input_ids": ids()[:rows],
        "attention_mask": (padding(kind) if kind != "none" else torch.ones(2, 12, dtype=torch.long))[:rows],
    }
    outputs = []
    for implementation in ("eager", "flash_plus"):
        model = build(name, implementation)
        torch.manual_seed(0)
        arguments = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0) | GENERATION[mode]
        outputs.append(model.generate(**batch, **arguments))
    assert torch.equal(*outputs)
    assert outputs[0].shape[1] >= 9 and outputs[0].max() < VOCAB


def test_assisted_generation_equals_greedy() -> None:
    batch = {"input_ids": ids(1), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    arguments = dict(max_new_tokens=16, do_sample=False, pad_token_id=0)
    expected = build("llama").generate(**batch, **arguments)
    model, assistant = build("llama", "flash_plus"), build("llama", "flash_plus")
    with torch.no_grad():  # an assistant that is sometimes wrong
        assistant.lm_head.weight.add_(0.05 * torch.randn(assistant.lm_head.weight.shape))
    assert torch.equal(model.generate(**batch, assistant_model=assistant, **arguments), expected)


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma3_text", "gpt_oss"))
def test_prefix_continuation_equals_eager(name: str) -> None:
    """A cached prefix and then several tokens at once: queries and keys of different length."""
    logits = []
    for implementation in ("eager", "flash_plus"):
        model = build(name, implementation)
        with torch.no_grad():
            cache = model(input_ids=ids()[:, :7], use_cache=True).past_key_values
            logits.append(model(input_ids=ids()[:, 7:], past_key_values=cache, use_cache=True).logits)
    assert_close(logits[1], logits[0])


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "gemma3_text"))
def test_compiled_fullgraph(name: str) -> None:
    batch, valid = inputs(name, "left")
    expected = build(name)(**batch).logits
    model = torch.compile(build(name, "flash_plus"), fullgraph=True, backend="aot_eager")
    logits = model(**batch).logits
    assert_close(logits.detach(), expected.detach(), valid)
    logits.square().mean().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss", "t5"))
def test_half_precision_is_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    """Error against fp32 at most twice that of eager in the same precision."""
    batch, valid = inputs(name, "left")
    with torch.no_grad():
        exact = build(name)(**batch).logits
        error = {}
        for implementation in ("eager", "flash_plus"):
            logits = build(name, implementation).to(dtype)(**batch).logits.float()
            difference = (logits - exact).abs()
            error[implementation] = (difference if valid is None else difference[valid.bool()]).max()
    assert error["flash_plus"] <= 2 * error["eager"]
