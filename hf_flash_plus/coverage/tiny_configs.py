"""A tiny configuration of any model type, by rule: layers, widths, vocabularies and token ids cut down together."""

from __future__ import annotations

import copy
import inspect
import sys
import zlib
from importlib import import_module
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .overrides import CONFIG

VOCAB = 300
LAYERS = 2

#: Fields that are cut in every attempt: they cost time and memory, and models do not depend on their value.
DEPTHS = dict.fromkeys(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
    "encoder_num_hidden_layers decoder_num_hidden_layers num_encoder_layers encoder_n_layers decoder_n_layers "
    "num_block_layers".split(),
    LAYERS,
)
COUNTS: dict[str, int] = {
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCAB),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts moe_top_k".split(), 2),
    **dict.fromkeys("n_group topk_group first_k_dense_replace n_shared_experts".split(), 1),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len seq_length".split(), 128),
    **dict.fromkeys("max_source_positions max_target_positions".split(), 64),
    **dict.fromkeys("sliding_window attention_chunk_size local_attention attention_window_size".split(), 8),
    "entity_vocab_size": 50,
    "num_queries": 12,
    "num_labels": 2,
}

#: Fields that are cut in the tiny attempts only: some models derive others from their defaults.
WIDTHS: dict[str, int] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim hidden_dim model_dim emb_dim "
        "n_embed projection_dim out_hidden_size encoder_hidden_dim projector_hidden_size vision_output_dim "
        "hidden_size_out decoder_hidden_size".split(),
        64,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_decoder_attention_heads attention_heads encoder_num_attention_heads decoder_num_attention_heads "
        "encoder_num_key_value_heads decoder_num_key_value_heads num_encoder_attention_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads multi_query_group_num num_kv_heads n_kv_heads".split(), 2),
    **dict.fromkeys("head_dim kv_channels d_kv attention_head_dim attention_head_size global_head_dim".split(), 16),
    **dict.fromkeys(
        "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim "
        "dense_intermediate_size intermediate_size_mlp mlp_hidden_size".split(),
        96,
    ),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 32),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "type_vocab_size": 2,
    "audio_vocab_size": 80,
}

_PER_LAYER = (
    "attention_layers no_rope_layers moe_layers num_key_value_heads intermediate_size hidden_size_per_layer "
    "activation_sparsity_pattern num_attention_heads_per_layer compress_ratios num_attention_heads "
    "moe_layer_freq rope_layers swa_layers full_attn_idxs"
).split()
_MAX_KINDS = 4


def tiny_config(model_type: str, tiny: bool = True, rebuild: bool = True) -> PreTrainedConfig:
    """A small configuration of a model type.

    Args:
        tiny: cut the widths too, not only depths and vocabularies.
        rebuild: pass the cut values to the configuration's constructor, so that it derives the rest from them;
            otherwise set them on the default configuration.
    """
    config = AutoConfig.for_model(model_type, **CONFIG.get(model_type, {}).get("__init__", {}))
    tokens = _token_ids(config)
    return _shrink(config, tiny, rebuild, tokens)


def sub_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations directly inside a configuration, by attribute."""
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def all_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A configuration and all inside it, outermost first."""
    return [config] + [inner for sub in sub_configs(config).values() for inner in all_configs(sub)]


def _is_token_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_idx", "_tok_id"))


def _token_ids(config: PreTrainedConfig) -> dict[int, int]:
    """New ids, unique and below the tiny vocabulary, for the special tokens anywhere in a configuration."""
    large = {
        value
        for part in all_configs(config)
        for name, value in vars(part).items()
        if _is_token_id(name) and isinstance(value, int) and value >= VOCAB - 10
    }
    return {token: 200 + rank for rank, token in enumerate(sorted(large))}


def _shrink(config: PreTrainedConfig, tiny: bool, rebuild: bool, tokens: dict[int, int]) -> PreTrainedConfig:
    sizes = {**DEPTHS, **COUNTS, **(WIDTHS if tiny else {})}
    fields = vars(config)
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = _shrink(value, tiny, rebuild, tokens)
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int):
            if name in sizes and value > sizes[name]:
                changed[name] = sizes[name]
            elif _is_token_id(name) and value in tokens:
                changed[name] = tokens[value]
        elif _is_token_id(name) and isinstance(value, (list, tuple)):
            changed[name] = [tokens.get(item, item if item < VOCAB else 299) for item in value]
    pad = fields.get("pad_token_id")
    if isinstance(pad, int) and pad not in (-1, 0):
        changed["pad_token_id"] = 0
    _cut_layer_lists(fields, changed)
    if tiny:
        _fit_heads(fields, changed)
        _fit_image(config, changed)
    _fit_rope(config, fields, changed)
    overrides = CONFIG.get(config.model_type, {})
    changed.update({k: copy.deepcopy(v) for k, v in overrides.items() if k not in ("__init__", "__lite__")})
    if not tiny:
        changed.update(copy.deepcopy(overrides.get("__lite__", {})))
    return _rebuilt(config, changed) if rebuild else _set(config, changed)


def _rebuilt(config: PreTrainedConfig, changed: dict[str, Any]) -> PreTrainedConfig:
    init = CONFIG.get(config.model_type, {}).get("__init__", {})
    return type(config)(**{**init, **changed})


def _set(config: PreTrainedConfig, changed: dict[str, Any]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name, value in changed.items():
        try:
            setattr(config, name, value)
        except Exception:  # a validator of this class objects: its default stays
            continue
    return config


def _cut_layer_lists(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Cut the lists with one entry a layer; where they name kinds of layers, keep one layer of each kind."""
    depth_name = next((name for name in DEPTHS if isinstance(fields.get(name), int)), None)
    if depth_name is None:
        return
    before = fields[depth_name]
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == before and before > 1 and not isinstance(value, str)
        and ("type" in name or name in _PER_LAYER)
    }  # fmt: skip
    # One layer for each combination of kinds, in order of appearance.
    seen: list[int] = []
    named = [value for name, value in lists.items() if "type" in name]
    combinations: set[tuple[str, ...]] = set()
    for layer in range(before):
        combination = tuple(str(value[layer]) for value in named)
        if named and combination not in combinations and len(seen) < _MAX_KINDS:
            combinations.add(combination)
            seen.append(layer)
    for layer in range(before):
        if len(seen) < min(LAYERS, before) and layer not in seen:
            seen.append(layer)
    seen.sort()
    if lists:
        changed[depth_name] = len(seen)
    for name, value in lists.items():
        changed[name] = type(value)(value[layer] for layer in seen)


def _fit_heads(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Head counts that divide each other, and head dims that belong together."""

    def now(name: str) -> Any:
        return changed.get(name, fields.get(name))

    if isinstance(fields.get("qk_rope_head_dim"), int):
        if fields.get("head_dim") == fields["qk_rope_head_dim"]:
            changed["head_dim"] = now("qk_rope_head_dim")
        if isinstance(fields.get("qk_nope_head_dim"), int):
            changed.pop("qk_head_dim", None)
            if fields.get("head_dim") == fields["qk_rope_head_dim"] + fields["qk_nope_head_dim"]:
                changed["head_dim"] = now("qk_rope_head_dim") + now("qk_nope_head_dim")
        if fields.get("num_key_value_heads") == fields.get("num_attention_heads"):
            changed["num_key_value_heads"] = now("num_attention_heads")
        if "index_head_dim" in changed:
            changed["index_head_dim"] = 16
    heads, kv = now("num_attention_heads"), now("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv, int) and kv and heads % kv:
        changed["num_key_value_heads"] = heads if heads < kv else 1
    if isinstance(fields.get("rotary_dim"), int) and fields["rotary_dim"] > 16:
        changed["rotary_dim"] = 8


def _fit_image(config: PreTrainedConfig, changed: dict[str, Any]) -> None:
    """An image of four by four patches; of 64 pixels where patches are small, as hierarchical models halve it often."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int) and patch > 1 and image // patch > 4:
        changed["image_size"] = patch * 4 if patch > 7 else min(image, 64)


def _fit_rope(config: PreTrainedConfig, fields: dict[str, Any], changed: dict[str, Any]) -> None:
    """Sections of multimodal rotary positions that fill the new head dim."""
    name = "rope_parameters" if isinstance(fields.get("rope_parameters"), dict) else "rope_scaling"
    rope = fields.get(name)
    hidden = changed.get("hidden_size", fields.get("hidden_size"))
    heads = changed.get("num_attention_heads", fields.get("num_attention_heads"))
    if not isinstance(heads, int) or not isinstance(hidden, int) or not _mentions(config, "mrope_section"):
        return
    rope = copy.deepcopy(rope) if isinstance(rope, dict) else {"rope_type": "default", "rope_theta": 10000.0}
    head_dim = changed.get("head_dim", fields.get("head_dim")) or hidden // heads
    partial = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    half = int(head_dim * partial) // 2
    third = half // 3
    section = [half - 2 * third, third, third]
    if isinstance(rope.get("mrope_section"), (list, tuple)) and len(rope["mrope_section"]) == 4:
        section = [half - 3 * (half // 4)] + [half // 4] * 3
    if all(not isinstance(value, dict) for value in rope.values()):
        rope["mrope_section"] = section
        changed[name] = rope


def _mentions(config: PreTrainedConfig, word: str) -> bool:
    """Whether the modeling code beside a configuration's class contains a word."""
    config_module = type(config).__module__
    folder, _, leaf = config_module.rpartition(".configuration_")
    try:
        module = sys.modules.get(f"{folder}.modeling_{leaf}") or import_module(f"{folder}.modeling_{leaf}")
        return word in inspect.getsource(module)
    except (ImportError, OSError, TypeError):
        return False


def seed_of(*words: str) -> int:
    """A seed that depends on words alone (``hash`` changes from process to process)."""
    return zlib.crc32("/".join(words).encode())
