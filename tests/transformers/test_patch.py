"""``patch_model`` switches loaded models and gives them back exactly as they were."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import hf_flash_plus
from hf_flash_plus import patch_model, patched, unpatch_model
from hf_flash_plus.coverage.find import find_subject
from hf_flash_plus.coverage.subject import Settings
from hf_flash_plus.integration import patch

from .test_registration import _llava
from .tiny import MODELS, VOCAB, assert_close, build, build_from, ids, padding


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that patching could touch: classes, attributes, configs."""
    result: dict[str, object] = {}
    for name, module in model.named_modules():
        result[f"{name}.class"] = type(module)
        result[f"{name}.attributes"] = {
            k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules", "config")
        }
        if isinstance(getattr(module, "config", None), tf.PretrainedConfig):
            result[f"{name}.config"] = {k: repr(v) for k, v in module.config.__dict__.items()}
    return result


def forward(model, name: str):
    batch = dict(input_ids=ids(), attention_mask=padding("left"))
    if MODELS[name].encoder_decoder:
        batch["decoder_input_ids"] = ids(length=7, seed=1)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("before", ("eager", "sdpa"))
def test_round_trip(name: str, before: str) -> None:
    if before == "sdpa" and not getattr(tf, MODELS[name].cls)._supports_sdpa:
        pytest.skip("the model has no sdpa")
    model = build(name, before)
    state, before_patch = snapshot(model), forward(model, name)
    expected = forward(build(name), name)
    valid = None if MODELS[name].encoder_decoder else padding("left")
    report = patch_model(model)
    assert report.switched and model.config._attn_implementation == "flash_plus"
    assert_close(forward(model, name), expected, valid)
    assert snapshot(model) != state
    assert patch_model(model) is report, "idempotent"
    assert unpatch_model(model) is True
    assert snapshot(model) == state, "reversible to the bit"
    assert torch.equal(forward(model, name), before_patch)
    assert unpatch_model(model) is False


@pytest.mark.parametrize("name", ["idefics", "vit_mae", "xclip"])
def test_parts_that_are_no_pretrained_models(name: str) -> None:
    """They have configs of their own, which loading with flash_plus reaches, too."""
    subject = find_subject(name, Settings())
    assert not isinstance(subject, str)
    model, loaded = subject.model("eager"), subject.model("flash_plus")
    state = snapshot(model)

    def implementations(model: nn.Module) -> dict[str, str]:
        found = {part: getattr(module, "config", None) for part, module in model.named_modules()}
        return {part: c._attn_implementation for part, c in found.items() if isinstance(c, tf.PretrainedConfig)}

    assert set(implementations(model).values()) == {"eager"}
    patch_model(model)
    assert implementations(model) == implementations(loaded)
    assert unpatch_model(model) and snapshot(model) == state


def test_patched_serves_through_our_op(monkeypatch) -> None:
    from hf_flash_plus import ops

    calls = []
    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a: calls.append(1) or original(*a))
    model = build("bert")
    forward(model, "bert")
    assert not calls
    with patched(model):
        forward(model, "bert")
    assert len(calls) == 2
    forward(model, "bert")
    assert len(calls) == 2


def test_context_manager_keeps_an_earlier_patch() -> None:
    model = build("llama")
    patch_model(model)
    with patched(model):
        pass
    assert model.config._attn_implementation == "flash_plus"
    unpatch_model(model)
    with pytest.raises(RuntimeError, match="inside"), patched(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ("llama", "falcon"))
def test_attention_that_was_set_since_is_switched_again(name: str) -> None:
    model = build(name, "sdpa")
    first = patch_model(model)
    model.config._attn_implementation = "eager"
    again = patch_model(model)
    assert [before for _, _, before in first.switched] == ["sdpa"]
    assert [before for _, _, before in again.switched] == ["eager"], "the report says what was done"
    assert model.config._attn_implementation == "flash_plus"
    assert_close(forward(model, name), forward(build(name), name), padding("left"))
    assert unpatch_model(model) and not unpatch_model(model)
    expected = snapshot(build(name, "eager"))
    assert {k: v for k, v in snapshot(model).items() if k.endswith(".class")} == {
        k: v for k, v in expected.items() if k.endswith(".class")
    }
    assert model.config._attn_implementation == "eager", "what was there before the last patch_model"


def test_set_attn_implementation_after_patching() -> None:
    """The composite's parts, too, of which one keeps what was set before."""
    model = build_from(tf.LlavaForConditionalGeneration, _llava())
    patch_model(model)
    model.set_attn_implementation({"text_config": "sdpa"})
    assert model.config.text_config._attn_implementation == "sdpa"
    before = {cls: before for _, cls, before in patch_model(model).switched}
    assert before["LlamaModel"] == "sdpa" and before["LlavaForConditionalGeneration"] == "eager"
    assert model.config.text_config._attn_implementation == "flash_plus"
    unpatch_model(model)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "eager"


def test_a_model_loaded_so_and_set_to_something_else() -> None:
    model = build("llama", "flash_plus")
    assert not patch_model(model).switched
    model.set_attn_implementation("sdpa")
    assert [before for _, _, before in patch_model(model).switched] == ["sdpa"]
    assert unpatch_model(model) and model.config._attn_implementation == "sdpa"


def test_the_context_manager_after_attention_was_set() -> None:
    model = build("llama")
    patch_model(model)
    model.set_attn_implementation("sdpa")
    with patched(model):
        assert model.config._attn_implementation == "flash_plus"
    assert model.config._attn_implementation == "sdpa"


def _peft(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))


@pytest.mark.parametrize("wrap", (_peft, torch.compile), ids=("peft", "compile"))
def test_wrappers_of_a_patched_model(wrap) -> None:
    """They answer for the model in them, which is what was patched."""
    model = build("llama")
    report = patch_model(model)
    wrapper = wrap(model)
    assert patch_model(wrapper) is report
    with patched(wrapper):
        pass
    assert model.config._attn_implementation == "flash_plus", "it was patched before"
    assert unpatch_model(wrapper) is True and model.config._attn_implementation == "eager"
    assert unpatch_model(model) is unpatch_model(wrapper) is False
    assert patch_model(model).switched and model.config._attn_implementation == "flash_plus"
    assert unpatch_model(model)
    assert patch_model(wrapper).switched and model.config._attn_implementation == "flash_plus"
    assert unpatch_model(wrapper) and model.config._attn_implementation == "eager"


def test_continuous_batching_renames_it() -> None:
    """While it runs, the model is still patched."""
    model = build("llama")
    report = patch_model(model)
    model.config._attn_implementation = "paged|flash_plus"
    assert patch_model(model) is report and model.config._attn_implementation == "paged|flash_plus"
    model.config._attn_implementation = "flash_plus"
    assert unpatch_model(model) and model.config._attn_implementation == "eager"


def test_composites_are_switched_whole() -> None:
    model = build_from(tf.LlavaForConditionalGeneration, _llava())
    state = snapshot(model)
    report = patch_model(model)
    assert {cls for _, cls, _ in report.switched} >= {"LlavaForConditionalGeneration", "LlamaModel"}
    assert model.config.text_config._attn_implementation == "flash_plus"
    assert model.config.vision_config._attn_implementation == "flash_plus"
    unpatch_model(model)
    assert snapshot(model) == state


def test_a_module_that_contains_models() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = build("bert"), build("llama")

    pair = Pair()
    report = patch_model(pair)
    assert [name for name, _, _ in report.switched] == ["a", "b"]
    unpatch_model(pair)
    assert pair.a.config._attn_implementation == pair.b.config._attn_implementation == "eager"


def test_refusals() -> None:
    bloom = tf.BloomForCausalLM._from_config(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4))
    state = snapshot(bloom)
    with pytest.raises(ValueError, match=r"BloomForCausalLM(?s:.)*attention interface"):
        patch_model(bloom)
    assert snapshot(bloom) == state
    with pytest.raises(TypeError, match=r"no transformers\.PreTrainedModel"):
        patch_model(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ("llama", "falcon"))
def test_output_attentions_in_the_config(name: str, tmp_path) -> None:
    """Transformers takes the flag with eager only: the forward would return no weights, and saving would fail."""
    model = build(name)
    model.config.output_attentions = True
    state = snapshot(model)
    with pytest.raises(ValueError, match=r"output_attentions=True(?s:.)*config\.output_attentions = False and pass"):
        patch_model(model)
    assert snapshot(model) == state and len(model(ids()).attentions) == 2
    model.config.output_attentions = False
    patch_model(model)
    assert [tuple(weights.shape) for weights in model(ids(), output_attentions=True).attentions] == [(2, 4, 12, 12)] * 2
    model.save_pretrained(tmp_path)


def test_output_attentions_in_the_config_of_a_part() -> None:
    model = build_from(tf.LlavaForConditionalGeneration, _llava())
    model.config.vision_config.output_attentions = True
    report = patch_model(model)
    assert [(cls, "output_attentions=True" in reason) for _, cls, reason in report.left] == [("CLIPVisionModel", True)]
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "flash_plus"
    assert patch_model(model) is report


def test_a_mixed_model_reports_what_it_left() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = build("bert")
            self.bloom = tf.BloomModel(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4))

    report = patch_model(Mixed())
    assert [name for name, _, _ in report.switched] == ["bert"]
    assert [(name, cls) for name, cls, _ in report.left] == [("bloom", "BloomModel")]
    assert "switched bert [BertForMaskedLM]: eager -> flash_plus" in str(report)
    assert "left bloom [BloomModel]: its attention does not go through" in str(report)


def test_an_exception_midway_leaves_the_model_untouched(monkeypatch) -> None:
    model = build("gpt_neo")
    state, original, calls = snapshot(model), patch._set, []

    def failing(changes, owner, name, value, *rest):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(changes, owner, name, value, *rest)

    monkeypatch.setattr(patch, "_set", failing)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model)
    assert calls == ["__class__", "__class__"] and snapshot(model) == state


@pytest.mark.parametrize("name", ("llama", "gpt_neo", "falcon"))
def test_copies_of_patched_models(name: str) -> None:
    model = build(name)
    patch_model(model)
    twin = copy.deepcopy(model)
    expected = forward(model, name)
    assert torch.equal(forward(twin, name), expected)
    unpatch_model(twin)
    assert twin.config._attn_implementation == "eager" and model.config._attn_implementation == "flash_plus"
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(forward(again, name), expected)
    assert unpatch_model(again) and again.config._attn_implementation == "eager"


def test_training_continues_across_patching() -> None:
    """Hooks, parameters and gradients are the same objects before and after."""
    model = build("llama").train()
    parameters = {n: id(p) for n, p in model.named_parameters()}
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with patched(model):
        model(input_ids=ids()).logits.sum().backward()
    assert parameters == {n: id(p) for n, p in model.named_parameters()} and seen == [1]
    assert hf_flash_plus.is_registered()
