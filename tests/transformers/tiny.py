"""Tiny models of many families, built from a configuration, and the inputs and comparisons the tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

import hf_flash_plus  # noqa: F401  (registers flash_plus)

VOCAB = 97


def _text(**kwargs: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None) | kwargs


_DECODER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its class, a function that makes its configuration, and what it can be asked."""

    cls: str
    config: Callable[[], Any]
    generates: bool = False
    encoder_decoder: bool = False
    static_cache: bool = True


def _llama(**kwargs: Any) -> Any:
    return tf.LlamaConfig(**_text(), **(_DECODER | kwargs))


def _gemma2() -> Any:
    return tf.Gemma2Config(
        **_text(), **_DECODER, head_dim=8, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=8
    )


def _gemma3_text() -> Any:
    return tf.Gemma3TextConfig(**_text(), **_DECODER, head_dim=8, sliding_window=6, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"])  # fmt: skip


def _llama4(chunk: int = 8) -> Any:
    return tf.Llama4TextConfig(**_text(), **(_DECODER | dict(num_hidden_layers=2)), head_dim=8,
        intermediate_size_mlp=48, attention_chunk_size=chunk, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0])  # fmt: skip


def _deepseek_v3() -> Any:
    return tf.DeepseekV3Config(**_text(), **(_DECODER | dict(num_key_value_heads=4)), moe_intermediate_size=16,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)  # fmt: skip


def _gpt_oss() -> Any:
    return tf.GptOssConfig(**_text(), **_DECODER, head_dim=8, sliding_window=6, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"])  # fmt: skip


def _t5(**kwargs: Any) -> Any:
    return tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=0, dropout_rate=0.0, **kwargs)  # fmt: skip


def _bart(cls: Any = None, **kwargs: Any) -> Any:
    return (cls or tf.BartConfig)(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2,
        forced_eos_token_id=None, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **kwargs)  # fmt: skip


def _t5gemma() -> Any:
    module = dict(_DECODER, head_dim=8, vocab_size=VOCAB, sliding_window=4, query_pre_attn_scalar=8, pad_token_id=0,
        eos_token_id=None, layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=None)  # fmt: skip
    return tf.T5GemmaConfig(encoder=dict(module), decoder=dict(module), vocab_size=VOCAB, dropout_rate=0.0,
        attention_dropout=0.0, pad_token_id=0, eos_token_id=None, decoder_start_token_id=2)  # fmt: skip


MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", _llama, generates=True),
    "mistral": Tiny(
        "MistralForCausalLM", lambda: tf.MistralConfig(**_text(), **_DECODER, sliding_window=6), generates=True
    ),
    "gemma2": Tiny("Gemma2ForCausalLM", _gemma2, generates=True),
    "gemma3_text": Tiny("Gemma3ForCausalLM", _gemma3_text, generates=True),
    "gpt_oss": Tiny("GptOssForCausalLM", _gpt_oss, generates=True),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", _deepseek_v3, generates=True),
    "llama4": Tiny("Llama4ForCausalLM", _llama4, generates=True, static_cache=False),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(
            **_text(), n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        generates=True,
    ),
    "gpt_neo": Tiny(
        "GPTNeoForCausalLM",
        lambda: tf.GPTNeoConfig(
            **_text(),
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
            max_position_embeddings=128,
        ),
        generates=True,
    ),
    "gptj": Tiny(
        "GPTJForCausalLM",
        lambda: tf.GPTJConfig(
            **_text(),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            rotary_dim=4,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        generates=True,
    ),
    "falcon": Tiny(
        "FalconForCausalLM",
        lambda: tf.FalconConfig(
            **_text(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=False,
            multi_query=True,
            new_decoder_architecture=False,
        ),
        generates=True,
    ),
    "bert": Tiny(
        "BertForMaskedLM",
        lambda: tf.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    "modernbert": Tiny(
        "ModernBertForMaskedLM",
        lambda: tf.ModernBertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
            pad_token_id=0,
            local_attention=8,
            global_attn_every_n_layers=3,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
    ),
    "t5": Tiny("T5ForConditionalGeneration", _t5, generates=True, encoder_decoder=True),
    "bart": Tiny("BartForConditionalGeneration", _bart, generates=True, encoder_decoder=True),
    "pegasus_x": Tiny(
        "PegasusXForConditionalGeneration",
        lambda: _bart(tf.PegasusXConfig, block_size=4, num_global_tokens=2),
        generates=True,
        encoder_decoder=True,
    ),
    "t5gemma": Tiny("T5GemmaForConditionalGeneration", _t5gemma, generates=True, encoder_decoder=True),
}


def build(name: str, implementation: str = "eager", **config_changes: Any) -> Any:
    """A tiny model with fixed random weights, in evaluation mode; the weights do not depend on ``implementation``."""
    tiny = MODELS[name]
    config = tiny.config()
    for key, value in config_changes.items():
        setattr(config, key, value)
    return build_from(getattr(tf, tiny.cls), config, implementation)


def build_from(cls: Any, config: Any, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation)
    # Fresh weights are so small that attention hardly matters; larger ones make a wrong mask visible.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.2 / parameter.shape[-1] ** 0.5))
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(kind: str, batch: int = 2, length: int = 12) -> torch.Tensor | None:
    """A 2-D mask; the first row is always full."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[1, :4] = 0
    elif kind == "right":
        mask[1, -4:] = 0
    elif kind == "inner":
        mask[1, 4:6] = 0
        mask[1, 8] = 0
    return mask


def assert_close(actual: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor | None = None) -> None:
    """Equal within 2e-5 of the largest expected value, where ``valid`` (over the leading dimensions) is nonzero."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    if valid is not None:
        actual, expected = actual[valid.bool()], expected[valid.bool()]
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    assert error <= 2e-5, f"relative error {error:.3g}"
