"""Registration survives every way of loading and switching models, and can be taken back without a trace."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers as tf
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

import hf_flash_plus
from hf_flash_plus.integration import registration

from .tiny import _DECODER, VOCAB, _llama, assert_close, build, build_from, ids, padding


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), attention_mask=padding("left")).logits


def test_from_pretrained_and_round_trip(tmp_path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_plus")
    expected = logits(build("llama"))
    assert_close(logits(model), expected, padding("left"))
    model.save_pretrained(tmp_path / "again")
    assert "flash_plus" not in (tmp_path / "again" / "config.json").read_text()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="flash_plus")
    assert_close(logits(again), expected, padding("left"))


def test_from_config() -> None:
    model = tf.AutoModelForCausalLM.from_config(_llama(), attn_implementation="flash_plus")
    assert model.config._attn_implementation == "flash_plus"


def test_switching_back_and_forth() -> None:
    model, expected, valid = build("llama"), logits(build("llama")), padding("left")
    for implementation in ("flash_plus", "sdpa", "flash_plus", "eager", "flex_attention", "flash_plus"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        if implementation != "flex_attention":
            assert_close(logits(model), expected, valid)


def test_another_flash_implementation_takes_the_slot(monkeypatch) -> None:
    """Transformers keeps one preloaded flash implementation: loading another must not break ours, nor ours it."""
    calls = []

    def other(implementation, *args, **kwargs):
        calls.append(implementation)

        def stub(q, k, v, causal=False, softmax_scale=None):
            return q

        return (stub,) * 5

    hf_flash_plus.unregister()
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", other)
    hf_flash_plus.register()
    try:
        ours = build("llama", "flash_plus")
        expected = logits(ours)
        modeling_flash_attention_utils.lazy_import_flash_attention("flash_attention_2")
        assert calls == ["flash_attention_2"]
        assert torch.equal(logits(ours), expected)
        gptj = build("gptj", "flash_plus")
        modeling_flash_attention_utils.lazy_import_flash_attention("flash_attention_2")
        assert_close(logits(gptj), logits(build("gptj")), padding("left"))
    finally:
        hf_flash_plus.unregister()
        monkeypatch.undo()
        hf_flash_plus.register()
        modeling_flash_attention_utils._loaded_implementation = None


def test_several_models_in_one_process() -> None:
    names = ("llama", "gpt_oss", "gpt_neo", "bert")
    models = {(n, i): build(n, i) for n in names for i in ("flash_plus", "eager")}
    for name in names:
        assert_close(logits(models[name, "flash_plus"]), logits(models[name, "eager"]), padding("left"))


def test_compatible_flash_implementations_do_not_swap_ours() -> None:
    model = build("gpt_oss", "flash_plus")
    assert type(model)._compatible_flash_implementations
    assert model.config._attn_implementation == "flash_plus"
    model.set_attn_implementation("eager")
    model.set_attn_implementation("flash_plus")
    assert model.config._attn_implementation == "flash_plus"


def _llava() -> tf.LlavaConfig:
    return tf.LlavaConfig(
        text_config=_llama(),
        vision_config=tf.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, image_size=8, patch_size=4, projection_dim=8),
        image_token_index=VOCAB - 1, vision_feature_layer=-1)  # fmt: skip


def test_composite_models_with_dictionaries() -> None:
    model = tf.LlavaForConditionalGeneration._from_config(
        _llava(), attn_implementation={"text_config": "flash_plus", "vision_config": "eager"}
    )
    assert model.config.text_config._attn_implementation == "flash_plus"
    assert model.config.vision_config._attn_implementation == "eager"
    model.set_attn_implementation({"vision_config": "flash_plus", "text_config": "sdpa"})
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "flash_plus"
    tokens = ids()
    tokens[tokens == VOCAB - 1] = 3
    tokens[:, 2:6] = VOCAB - 1
    batch = dict(input_ids=tokens, pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    outputs = []
    for implementation in ("eager", "flash_plus"):
        model = build_from(tf.LlavaForConditionalGeneration, _llava(), implementation)
        with torch.no_grad():
            outputs.append(model(**batch).logits)
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("name", ("gptj", "gpt_neo", "falcon"))
def test_direct_callers_of_the_flash_function(name: str) -> None:
    model = build(name, "flash_plus")
    kinds = {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
    assert any("FlashPlus" in kind for kind in kinds), kinds
    assert_close(logits(model), logits(build(name)), padding("left"))


def test_bark() -> None:
    config = tf.BarkSemanticConfig(hidden_size=32, num_layers=2, num_heads=4, block_size=64, input_vocab_size=VOCAB,
        output_vocab_size=VOCAB, dropout=0.0)  # fmt: skip
    fine = tf.BarkFineConfig(hidden_size=32, num_layers=2, num_heads=4, block_size=64, input_vocab_size=VOCAB,
        output_vocab_size=VOCAB, dropout=0.0, n_codes_total=4, n_codes_given=1)  # fmt: skip
    outputs = {}
    for implementation in ("eager", "flash_plus"):
        causal = build_from(tf.BarkSemanticModel, config, implementation)
        both = build_from(tf.BarkFineModel, fine, implementation)
        codes = torch.stack([ids() for _ in range(4)], dim=-1)
        with torch.no_grad():
            outputs[implementation] = (
                causal(input_ids=ids()).logits,
                causal(input_ids=ids(), attention_mask=padding("right")).logits,
                both(codebook_idx=2, input_ids=codes).logits,
            )
    for got, expected, valid in zip(outputs["flash_plus"], outputs["eager"], (None, padding("right"), None)):
        assert_close(got, expected, valid)


def test_models_outside_the_interface_keep_their_attention(caplog) -> None:
    config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    registration._refused.clear()
    with caplog.at_level(logging.WARNING, logger="hf_flash_plus"):
        model = tf.BloomForCausalLM._from_config(config, attn_implementation="flash_plus")
        tf.BloomForCausalLM._from_config(copy.deepcopy(config), attn_implementation="flash_plus")
    assert model.config._attn_implementation == "eager"
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and "refused for BloomForCausalLM" in messages[0] and "attention interface" in messages[0]
    with torch.no_grad():
        model(input_ids=ids())


def test_falcon_with_alibi_keeps_its_attention() -> None:
    config = tf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    model = tf.FalconForCausalLM._from_config(config, attn_implementation="flash_plus")
    assert model.config._attn_implementation != "flash_plus"


def _state() -> dict[str, object]:
    return {
        "functions": dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        "masks": dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
        "lazy": modeling_flash_attention_utils._lazy_imports,
        "check": PreTrainedModel._check_and_adjust_attn_implementation,
        "correct": PreTrainedModel.get_correct_attn_implementation,
        "chunked": masking_utils.is_flash_attention_requested,
        "gptj": dict(tf.models.gptj.modeling_gptj.GPTJ_ATTENTION_CLASSES),
        "block": tf.models.gptj.modeling_gptj.GPTJBlock.__init__,
    }


def test_unregister_leaves_nothing_behind() -> None:
    hf_flash_plus.unregister()
    try:
        clean = _state()
        assert not hf_flash_plus.is_registered()
        assert not any("flash_plus" in key for key in clean["functions"])
        with pytest.raises((ValueError, ImportError, OSError)):
            build("llama", "flash_plus")
        hf_flash_plus.register()
        hf_flash_plus.register()
        build("gptj", "flash_plus")
        assert _state() != clean
        hf_flash_plus.unregister()
        assert _state() == clean
    finally:
        hf_flash_plus.register()
    assert_close(logits(build("llama", "flash_plus")), logits(build("llama")), padding("left"))


def test_environment_switches_after_loading(monkeypatch) -> None:
    """The path is chosen at call time, not at import or load."""
    model = build("llama", "flash_plus")
    expected = logits(model)
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "maybe")
    with pytest.raises(ValueError, match="FLASH_ATTENTION_USE_FLAGGEMS='maybe'"):
        logits(model)


def test_small_config_defaults() -> None:
    assert _DECODER["num_attention_heads"] % _DECODER["num_key_value_heads"] == 0
