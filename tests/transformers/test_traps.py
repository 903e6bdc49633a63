"""Where Transformers' own flash path is wrong and eager is right: ``flash_plus`` equals eager in each case."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from torch import nn

from hf_flash_plus.coverage.cells import EXACT
from hf_flash_plus.coverage.subject import Settings
from hf_flash_plus.coverage.worker import run_row
from hf_flash_plus.integration import mask_interface
from hf_flash_plus.integration.attention import flash_plus_attention

from .tiny import _DECODER, VOCAB, _bart, _llama4, _text, assert_close, build, build_from, ids, padding


def pair(name: str, **changes):
    return build(name, **changes), build(name, "flash_plus", **changes)


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def test_gemma3_image_blocks() -> None:
    """Image tokens see their whole image, in full and in sliding layers."""
    text = dict(_DECODER, head_dim=8, vocab_size=VOCAB, sliding_window=6, query_pre_attn_scalar=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=4)  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1,
        image_token_id=VOCAB - 1, boi_token_index=5, eoi_token_index=6)  # fmt: skip
    tokens = ids(2, 16)
    tokens[tokens == VOCAB - 1] = 3
    tokens[0, 3:7] = tokens[1, 8:12] = VOCAB - 1
    batch = dict(
        input_ids=tokens,
        pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        token_type_ids=(tokens == VOCAB - 1).long(),
        attention_mask=padding("left", 2, 16),
    )
    eager, ours = (
        build_from(tf.Gemma3ForConditionalGeneration, config, implementation)
        for implementation in ("eager", "flash_plus")
    )
    expected = logits(eager, **batch)
    assert_close(logits(ours, **batch), expected, batch["attention_mask"])
    without = logits(eager, **{**batch, "token_type_ids": torch.zeros_like(tokens)})
    assert (without - expected).abs().max() > 1e-3, "the blocks must matter, or this test shows nothing"
    generated = [
        model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False) for model in (eager, ours)
    ]
    assert torch.equal(*generated)


REMAPS_POSITIONS = hasattr(tf.masking_utils, "remap_positions_for_packed_sequence")
POSITIONS = torch.tensor([[*range(7), *range(5)], [*range(2), *range(10)]])


@pytest.mark.parametrize("use_cache", (False, True))
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2", "gpt_oss", "llama4"))
def test_packing_with_batch_of_two(name: str, use_cache: bool) -> None:
    """The reference is each document alone, with a cache or without (see the README)."""
    eager, ours = pair(name)
    got = logits(ours, input_ids=ids(), position_ids=POSITIONS, use_cache=use_cache)
    if name == "llama4" and (use_cache or not REMAPS_POSITIONS):
        # Its layers hand position_ids to nobody, and Transformers 5.17 counts chunks across documents: as eager does.
        assert_close(got, logits(eager, input_ids=ids(), position_ids=POSITIONS, use_cache=use_cache))
        return
    for row, document in ((0, slice(0, 7)), (0, slice(7, 12)), (1, slice(0, 2)), (1, slice(2, 12))):
        assert_close(got[row, document], logits(eager, input_ids=ids()[row : row + 1, document])[0])
    if name != "gpt_oss":  # it hands no position_ids to the mask function: its eager attention mixes documents
        assert_close(got, logits(eager, input_ids=ids(), position_ids=POSITIONS, use_cache=False))


def test_long_packed_documents_in_chunks() -> None:
    """Llama 4, packed, past one chunk."""
    eager, ours = pair("llama4")
    positions = torch.cat((torch.arange(11), torch.arange(13)))[None]
    expected = logits(eager, input_ids=ids(1, 24), position_ids=positions, use_cache=False)
    assert_close(logits(ours, input_ids=ids(1, 24), position_ids=positions, use_cache=False), expected)


def test_one_row_of_positions_for_the_batch() -> None:
    eager, ours = pair("llama")
    expected = logits(eager, input_ids=ids(), position_ids=POSITIONS[:1], use_cache=False)
    for use_cache in (False, True):
        assert_close(logits(ours, input_ids=ids(), position_ids=POSITIONS[:1], use_cache=use_cache), expected)


@pytest.mark.parametrize("use_cache", (False, True))
@pytest.mark.parametrize("with_positions", (False, True))
def test_flattened_batch_with_cumulative_lengths(use_cache: bool, with_positions: bool) -> None:
    """What ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` makes: one row, no mask, ``cu_seq_lens``."""
    eager, ours = pair("mistral")
    flat = ids().flatten()[None]
    cu = torch.tensor([0, 7, 12, 24], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (7, 5, 12)])[None]
    expected = logits(eager, input_ids=flat, position_ids=positions, use_cache=False)
    batch = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=12, max_length_k=12, use_cache=use_cache)
    if not with_positions:  # rotary positions then run on, so only the first document can be compared
        got = logits(ours, input_ids=flat, **batch)
        assert_close(got[:, :7], expected[:, :7])
        changed = flat.clone()
        changed[:, :7] = 3
        assert torch.equal(logits(ours, input_ids=changed, **batch)[:, 7:], got[:, 7:])
    else:
        assert_close(logits(ours, input_ids=flat, position_ids=positions, **batch), expected)


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma3_text"))
def test_static_cache_without_a_mask(name: str) -> None:
    """Unwritten slots of a static cache are never seen."""
    outputs = []
    for model in pair(name):
        cache = tf.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            first = model(input_ids=ids()[:, :8], past_key_values=cache, use_cache=True).logits
            for layer in cache.layers:  # poison what was not written
                if layer.keys.shape[2] > 8:
                    layer.keys[:, :, 8:], layer.values[:, :, 8:] = 7.0, 7.0
            second = model(input_ids=ids()[:, 8:9], past_key_values=cache, use_cache=True).logits
            outputs.append(torch.cat((first, second), dim=1))
    assert_close(outputs[1], outputs[0])
    assert_close(outputs[1], logits(build(name), input_ids=ids()[:, :9]))


@pytest.mark.parametrize("name", ("mistral", "gemma2", "gemma3_text", "gpt_oss"))
def test_padding_inside_with_a_window(name: str) -> None:
    eager, ours = pair(name)
    mask = padding("inner")
    batch = dict(input_ids=ids(), attention_mask=mask)
    assert_close(logits(ours, **batch), logits(eager, **batch), mask)


def test_gpt_neo_local_window() -> None:
    eager, ours = pair("gpt_neo")
    batch = dict(input_ids=ids())
    assert_close(logits(ours, **batch), logits(eager, **batch))
    wide = build("gpt_neo", "flash_plus", window_size=100)
    assert (logits(wide, **batch) - logits(eager, **batch)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_gpt_neo_local_window_over_a_static_cache(kind: str) -> None:
    """A row of a static cache stands before slots that nobody wrote; its window is counted from its own key."""
    model = build("gpt_neo", "flash_plus")
    batch = dict(attention_mask=padding("left"), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    dynamic = model.generate(ids(), **batch)
    assert torch.equal(model.generate(ids(), cache_implementation="static", disable_compile=True, **batch), dynamic)
    layer = model.transformer.h[1].attn.attention
    q, k, v = (torch.randn(1, layer.num_heads, n, layer.head_dim) for n in (1, 16, 16))
    seen = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    seen[..., :11] = True
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    out = layer._attn(q, k, v, mask)[0]
    torch.testing.assert_close(out, layer._attn(q, k[:, :, :11], v[:, :, :11], mask[..., :11])[0])


@pytest.mark.parametrize("shared", [False, True])
def test_beit_adds_its_position_bias_to_the_mask(shared: bool) -> None:
    config = tf.BeitConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        use_relative_position_bias=not shared, use_shared_relative_position_bias=shared,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outs = []
    for implementation in ("flash_plus", "eager"):
        model = build_from(tf.BeitModel, config, implementation)
        for name, parameter in model.named_parameters():
            if "relative_position_bias" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        outs.append(model(pixels).last_hidden_state)
    assert_close(*outs)


def test_nllb_moe_routes_by_the_additive_mask() -> None:
    config = _bart(tf.NllbMoeConfig, num_experts=4, expert_capacity=64, encoder_sparse_step=1, decoder_sparse_step=1)
    batch = dict(input_ids=ids(), attention_mask=padding("right"), decoder_input_ids=ids(length=7, seed=1))
    outs = [
        logits(build_from(tf.NllbMoeForConditionalGeneration, config, name), **batch)
        for name in ("flash_plus", "eager")
    ]
    assert_close(*outs)


def test_minimax_sizes_its_mask_by_a_linear_layer() -> None:
    """Its mask of one column stands for all keys."""
    config = tf.MiniMaxConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, head_dim=8, num_local_experts=2, block_size=4, pad_token_id=0, eos_token_id=None,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    ours, eager = (
        build_from(tf.MiniMaxForCausalLM, config, name).generate(
            ids(), max_new_tokens=6, pad_token_id=0, do_sample=False
        )
        for name in ("flash_plus", "eager")
    )
    assert torch.equal(ours, eager)


def test_t5gemma_encoder_window() -> None:
    eager, ours = pair("t5gemma")
    batch = dict(input_ids=ids(length=20), decoder_input_ids=ids(length=5, seed=1))
    assert_close(logits(ours, **batch), logits(eager, **batch))


def test_pegasus_x_decoder_is_causal() -> None:
    eager, ours = pair("pegasus_x")
    batch = dict(input_ids=ids(), decoder_input_ids=ids(length=7, seed=1))
    got = logits(ours, **batch)
    assert_close(got, logits(eager, **batch))
    batch["decoder_input_ids"] = batch["decoder_input_ids"].clone()
    batch["decoder_input_ids"][:, -1] = 5
    assert torch.equal(logits(ours, **batch)[:, :-1], got[:, :-1])


def test_t5_position_bias_and_its_gradient() -> None:
    eager, ours = pair("t5")
    batch = dict(input_ids=ids(), attention_mask=padding("left"), decoder_input_ids=ids(length=7, seed=1))
    assert_close(logits(ours, **batch), logits(eager, **batch))
    grads = []
    for model in (eager, ours):
        model(**batch).logits.square().mean().backward()
        grads.append(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad)
    assert grads[0].abs().max() > 0
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("kind", ("bool", "float", "broadcast_batch", "per_head"))
def test_user_made_4d_masks(kind: str) -> None:
    """Any 4-D mask; for boolean ones SDPA is the reference (eager adds them to the scores)."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 1, 12, 12, generator=generator) > 0.4
    seen |= torch.eye(12, dtype=torch.bool)
    if kind == "broadcast_batch":
        seen = seen[:1]
    if kind == "per_head":
        seen = seen | (torch.rand(2, 4, 12, 12, generator=generator) > 0.5)
    mask = seen
    if kind != "bool":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    eager, ours = build("llama", "sdpa" if kind == "bool" else "eager"), build("llama", "flash_plus")
    assert_close(
        logits(ours, input_ids=ids(), attention_mask=mask), logits(eager, input_ids=ids(), attention_mask=mask)
    )


def test_fp32_gpt2() -> None:
    """No Linear in it: the flash path looks for one and raises StopIteration."""
    eager, ours = pair("gpt2")
    assert_close(logits(ours, input_ids=ids()), logits(eager, input_ids=ids()))


@pytest.mark.parametrize("length", (8, 9, 21))
def test_llama4_past_one_chunk(length: int) -> None:
    eager, ours = pair("llama4")
    batch = dict(input_ids=ids(length=length))
    assert_close(logits(ours, **batch), logits(eager, **batch))
    got = [model.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False) for model in (eager, ours)]
    assert torch.equal(*got)
    assert _llama4().attention_chunk_size == 8


def test_qwen2_vl_with_images() -> None:
    """Vision: one flattened row of two images with ``cu_seq_lens``; text: multimodal rotary positions."""
    config = tf.Qwen2VLConfig(
        text_config=dict(_DECODER, vocab_size=VOCAB, pad_token_id=0, bos_token_id=None, eos_token_id=None,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
            spatial_merge_size=2, temporal_patch_size=2, in_channels=3),
        image_token_id=VOCAB - 1, video_token_id=VOCAB - 2, vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4)  # fmt: skip
    tokens = ids(2, 14)
    tokens[tokens >= VOCAB - 4] = 3
    tokens[:, 3:7] = VOCAB - 1
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    batch = dict(
        input_ids=tokens,
        pixel_values=torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0)),
        image_grid_thw=grid,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=(tokens == VOCAB - 1).int(),
    )
    outputs = []
    for implementation in ("eager", "flash_plus"):
        model = build_from(tf.Qwen2VLForConditionalGeneration, config, implementation)
        outputs.append(logits(model, **batch))
    assert_close(outputs[1], outputs[0])


def test_whisper() -> None:
    config = tf.WhisperConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=32, max_target_positions=64, num_mel_bins=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    outputs, tokens = [], []
    for implementation in ("eager", "flash_plus"):
        model = build_from(tf.WhisperForConditionalGeneration, config, implementation)
        outputs.append(logits(model, input_features=features, decoder_input_ids=ids(length=7)))
        tokens.append(model.generate(features, max_new_tokens=8, do_sample=False))
        grads = torch.autograd.grad(
            model(input_features=features, decoder_input_ids=ids(length=7)).logits.square().mean(),
            model.model.encoder.layers[0].self_attn.q_proj.weight,
        )
        outputs.append(grads[0])
    assert_close(outputs[2], outputs[0])
    assert_close(outputs[3], outputs[1])
    assert torch.equal(*tokens)


def test_deepseek_v32_selected_keys() -> None:
    """DSA: the keys that the indexer selects, and no others (``indices`` must not be ignored)."""
    if not hasattr(tf, "DeepseekV32Config"):
        pytest.skip("this Transformers has no DeepSeek-V3.2")
    config = tf.DeepseekV32Config(**_text(), **(_DECODER | dict(num_key_value_heads=4)), moe_intermediate_size=16,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, index_topk=4, index_n_heads=2,
        index_head_dim=16)  # fmt: skip
    outputs = {}
    for implementation in ("eager", "flash_plus"):
        model = build_from(tf.DeepseekV32ForCausalLM, config, implementation)
        mask = padding("left")
        outputs[implementation] = logits(model, input_ids=ids(), attention_mask=mask)
    assert_close(outputs["flash_plus"], outputs["eager"], mask)


def test_block_indices_are_refused() -> None:
    from hf_flash_plus.integration.attention import flash_plus_attention

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="block_indices"):
        flash_plus_attention(nn.Module(), q, q, q, None, block_indices=torch.zeros(1, 4, 1, dtype=torch.int32))


def test_output_attentions_are_served_exactly() -> None:
    """The weights are computed eagerly rather than dropped."""
    for name in ("llama", "bert"):
        eager, ours = pair(name)
        batch = dict(input_ids=ids(), attention_mask=padding("right"))
        with torch.no_grad():
            expected, got = (model(**batch, output_attentions=True).attentions for model in (eager, ours))
        assert len(got) == len(expected) == 2
        rows = batch["attention_mask"].bool()
        for a, b in zip(got, expected):
            assert_close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows])


def bark_pair(name: str, **changes):
    config = getattr(tf, f"{name}Config")(block_size=32, input_vocab_size=VOCAB, output_vocab_size=VOCAB, num_layers=2,
        num_heads=4, hidden_size=32, dropout=0.0, **changes)  # fmt: skip
    return tuple(build_from(getattr(tf, f"{name}Model"), config, how) for how in ("eager", "flash_plus"))


@pytest.mark.parametrize("name", ["gpt_neo", "gptj", "falcon", "bark", "bark_fine"])
def test_output_attentions_of_classes_of_our_own(name: str) -> None:
    """Also with a mask, a cache and half precision; a call without it goes the usual way."""
    batch = dict(input_ids=ids(), attention_mask=padding("right"))
    rows = batch["attention_mask"].bool()
    if name == "bark_fine":
        models = bark_pair("BarkFine", n_codes_total=2, n_codes_given=1)
        batch = dict(codebook_idx=1, input_ids=ids()[..., None].expand(-1, -1, 2))
        rows = torch.ones(2, 12, dtype=torch.bool)
    else:
        models = bark_pair("BarkSemantic") if name == "bark" else pair(name)
    expected, got = (model(**batch, output_attentions=True) for model in models)
    assert len(got.attentions) == 2 and got.attentions[0].requires_grad
    for a, b in zip(got.attentions, expected.attentions):
        assert_close(a.transpose(1, 2)[rows], b.transpose(1, 2)[rows])
    assert_close(got.logits, expected.logits, rows)
    plain = models[1](**batch)
    assert plain.attentions is None
    assert_close(plain.logits, expected.logits, rows)
    if name in ("gpt_neo", "gptj", "falcon"):
        cached, again = (model(input_ids=ids()[:, :9], use_cache=True).past_key_values for model in models)
        steps = [
            model(input_ids=ids()[:, 9:], past_key_values=cache, output_attentions=True).attentions
            for model, cache in zip(models, (cached, again))
        ]
        for a, b in zip(*steps, strict=True):
            assert_close(b, a)
        half = models[1].half()(**batch, output_attentions=True).attentions
        assert half[0].dtype == torch.float16 and (half[0].float() - got.attentions[0])[0].abs().max() < 1e-2


def test_dropout_trains() -> None:
    """Dropout reaches the attention weights: reproducible by seed, gone in evaluation."""
    model = build("llama", "flash_plus", attention_dropout=0.5)
    expected = logits(build("llama"), input_ids=ids())
    assert_close(logits(model, input_ids=ids()), expected)
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(logits(model, input_ids=ids()))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - expected).abs().max() > 1e-3


def test_gradient_checkpointing_with_dropout() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build("llama", "flash_plus", attention_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(input_ids=ids()).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", ("llama", "mistral", "gemma3_text", "bert"))
def test_inference_mode(name: str) -> None:
    """Tensors made there count no versions, and masks made there are used again in layers."""
    eager, ours = pair(name)
    batch = dict(input_ids=ids(), attention_mask=padding("left"))
    expected = logits(eager, **batch)
    with torch.inference_mode():
        assert_close(ours(**batch).logits, expected, batch["attention_mask"])
        if name != "bert":
            packed = ours(input_ids=ids(), position_ids=POSITIONS, use_cache=True).logits
            assert_close(packed, logits(eager, input_ids=ids(), position_ids=POSITIONS, use_cache=False))
            tokens = ours.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert torch.equal(tokens, eager.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False))
    assert_close(logits(ours, **batch), expected, batch["attention_mask"])


def test_position_ids_changed_in_place() -> None:
    """What is remembered with ``position_ids`` is forgotten when they change."""
    eager, ours = pair("llama")
    positions = torch.arange(12)[None].clone()
    for _ in range(2):
        expected = logits(eager, input_ids=ids(), position_ids=positions, use_cache=False)
        assert_close(logits(ours, input_ids=ids(), position_ids=positions, use_cache=True), expected)
        positions[:, 5:] = torch.arange(7)


def test_autocast() -> None:
    """fp32 weights under bf16 autocast."""
    model = build("llama", "flash_plus")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got = model(input_ids=ids()).logits
    expected = logits(build("llama"), input_ids=ids())
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_positions_tell_documents_apart_where_no_mask_comes() -> None:
    """Ulysses drops the mask between the model and attention, and hands on the positions of the whole sequence."""
    module = SimpleNamespace(is_causal=True)
    q, k, v = (torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    positions = torch.tensor([[*range(5), *range(7)]])
    out, _ = flash_plus_attention(module, q, k, v, None, position_ids=positions)
    parts = [
        flash_plus_attention(module, *(x[:, :, part] for x in (q, k, v)), None)[0] for part in (slice(5), slice(5, 12))
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))
    whole, _ = flash_plus_attention(module, q, k, v, None, position_ids=torch.arange(12)[None])
    torch.testing.assert_close(whole, flash_plus_attention(module, q, k, v, None)[0])
    full, _ = flash_plus_attention(SimpleNamespace(is_causal=False), q, k, v, None, position_ids=positions)
    assert not torch.allclose(full, out)  # image encoders have positions, too, and mean full attention


@pytest.mark.parametrize("looks", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("side", ["left", "right", "inner"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_on_the_right_is_left_out(kind: str, side: str, looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gives 0 after the last real token; every token up to it and every gradient is what eager gives.

    Padding before that is computed, too, where it sees anything: a model that pools by its first token gets eager's
    number, padding or not. (A decoder's padding on the left sees nothing.) On a GPU the mask is made another way.
    """
    monkeypatch.setattr(mask_interface, "LOOK_AT_PADDING", frozenset({"cpu"} if looks else ()))
    lengths = {"left": [0, 3], "right": [8, 5], "inner": [2, 4]}[side]
    mask = torch.ones(2, 8, dtype=torch.long)
    for row, length in zip(mask, lengths):
        if side == "left":
            row[:length] = 0
        elif side == "right":
            row[length:] = 0
        else:
            row[length : length + 2] = 0
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    all_computed = side == "inner" or (side == "left" and kind == "bert")
    kept = torch.ones_like(mask).bool() if all_computed else mask.bool()
    found: dict[str, list[torch.Tensor]] = {}
    attended: list[torch.Tensor] = []
    sizes: dict[str, int] = dict(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    for name in ("eager", "flash_plus"):
        torch.manual_seed(0)
        config = tf.BertConfig(**sizes) if kind == "bert" else tf.LlamaConfig(**sizes)
        model = tf.AutoModel.from_config(config, attn_implementation=name).eval()
        if name == "flash_plus" and kind == "bert":
            attention = model.encoder.layer[0].attention.self
            attention.register_forward_hook(lambda module, args, output: attended.append(output[0]))
        elif name == "flash_plus":
            projection = model.layers[0].self_attn.o_proj
            projection.register_forward_hook(lambda module, args, output: attended.append(args[0]))
        hidden = model(ids, attention_mask=mask).last_hidden_state[kept]
        (hidden * torch.linspace(-1, 1, 32)).sum().backward()
        found[name] = [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for ours, theirs in zip(found["flash_plus"], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not attended[0][~kept].any() and attended[0][kept].all()


def test_a_decoder_computes_its_cross_attention_at_every_row() -> None:
    """The padding of what a decoder attends to says nothing about its own rows, however long they are."""
    config = tf.BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        add_cross_attention=True,
    )
    ids, encoded = torch.arange(1, 9)[None], torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    outputs = []
    for name in ("eager", "flash_plus"):
        torch.manual_seed(0)
        model = tf.AutoModel.from_config(config, attn_implementation=name).eval()
        with torch.no_grad():
            output = model(ids, encoder_hidden_states=encoded, encoder_attention_mask=padding)
        outputs.append(output.last_hidden_state)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("siglip2_vision_model", "lightglue"))
def test_masks_of_one_row_that_models_work_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs the mask of a single query row is a carrier, but not where the model hands it to torch's own attention
    or swaps its keys."""
    monkeypatch.setattr(mask_interface, "DENSE_ONE_ROW", frozenset())
    row = run_row(name, ["forward"], Settings())
    assert row.calls and {cell.outcome for cell in row.cells.values()} == {EXACT}, row.cells


def test_only_their_masks_of_one_row_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_interface, "DENSE_ONE_ROW", frozenset())
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    geometry = dict(batch_size=2, kv_length=40, attention_mask=mask)
    geometry["mask_function"] = tf.masking_utils.bidirectional_mask_function

    def made(model_type: str, rows: int) -> torch.Tensor:
        config = SimpleNamespace(model_type=model_type)
        return mask_interface.flash_plus_mask(q_length=rows, config=config, **geometry)

    assert torch.equal(made("siglip2_vision_model", 1), mask[:, None, None])
    assert torch.equal(made("lightglue", 1), mask[:, None, None])
    assert made("siglip2_vision_model", 40).dtype == made("bert", 1).dtype == torch.int32
