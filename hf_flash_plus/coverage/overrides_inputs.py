"""Inputs that rules cannot make, by model type: a function from the model to the arguments of its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Build = Callable[[Any], dict[str, Any]]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ids(*shape: int, last: int = 190, seed: int = 0) -> Tensor:
    return torch.randint(min(20, last // 4), last, shape, generator=torch.Generator().manual_seed(seed))


def _ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _picture(config: Any, *lead: int) -> Tensor:
    from .inputs import channels, image_size

    return _randn(*lead, channels(config), *image_size(config))


def _series(model: Any) -> dict[str, Any]:
    config = model.config
    length = config.context_length + max(config.lags_sequence)
    return {
        "past_values": _randn(2, length),
        "past_time_features": _randn(2, length, 1),
        "past_observed_mask": torch.ones(2, length),
        "future_values": _randn(2, config.prediction_length),
        "future_time_features": _randn(2, config.prediction_length, 1),
    }


def _patch_series(model: Any) -> dict[str, Any]:
    return {"past_values": _randn(2, model.config.context_length, model.config.num_input_channels)}


def _two_pictures(model: Any) -> dict[str, Any]:
    return {"pixel_values": _randn(2, 2, 1 if model.config.model_type == "efficientloftr" else 3, 64, 64)}


def _instructblip(model: Any) -> dict[str, Any]:
    config = model.config
    token = getattr(config, "image_token_index", None) or getattr(config, "video_token_index", None)
    frames = (2, 4) if config.model_type == "instructblipvideo" else (2,)
    ids = _ids(2, 12)
    if token is not None:
        count = config.num_query_tokens * (4 if len(frames) == 2 else 1)
        ids = torch.cat((torch.full((2, count), token), ids), dim=1)
    return {"pixel_values": _picture(config, *frames), "qformer_input_ids": _ids(2, 6), "input_ids": ids}


def _blip2(model: Any) -> dict[str, Any]:
    config = model.config
    ids = torch.cat((torch.full((2, config.num_query_tokens), config.image_token_index), _ids(2, 12)), dim=1)
    return {"pixel_values": _picture(config, 2), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _qwen2_audio(model: Any) -> dict[str, Any]:
    audio = model.config.audio_config
    length = 2 * audio.max_source_positions
    tokens = torch.full((2, audio.max_source_positions // 2), model.config.audio_token_id)
    ids = torch.cat((_ids(2, 4), tokens, _ids(2, 8, seed=1)), dim=1)
    return {
        "input_ids": ids,
        "input_features": _randn(2, audio.num_mel_bins, length),
        "feature_attention_mask": _ones(2, length),
        "attention_mask": torch.ones_like(ids),
    }


def _flattened_patches(model: Any) -> dict[str, Any]:
    width = model.config.vision_config.patch_embed_hidden_size
    rows, columns = torch.meshgrid(torch.arange(1, 5), torch.arange(1, 5), indexing="ij")
    where = torch.stack((rows.flatten(), columns.flatten()), dim=-1).float().expand(2, -1, -1)
    return {
        "flattened_patches": torch.cat((where, _randn(2, 16, width)), dim=-1),
        "decoder_input_ids": _ids(2, 6),
    }


def _features(width: int, length: int = 64) -> Build:
    return lambda model: {"input_features": _randn(2, length, width)}


def _codebooks(model: Any) -> dict[str, Any]:
    count = model.config.decoder.num_codebooks
    return {"input_ids": _ids(2, 12), "decoder_input_ids": _ids(2 * count, 6)}


def _naflex(model: Any) -> dict[str, Any]:
    return {
        "pixel_values": _randn(2, 16, 768),
        "pixel_attention_mask": _ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def positions(side: int) -> Tensor:
    """The (column, row) of every patch of a square image, for two images."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack((columns.flatten(), rows.flatten()), dim=-1).expand(2, -1, -1)


INPUTS: dict[str, Build] = {
    "autoformer": _series,
    "blip-2": _blip2,
    "blip_2_qformer": lambda model: {
        "query_embeds": _randn(2, 8, model.config.hidden_size),
        "encoder_hidden_states": _randn(2, 10, model.config.encoder_hidden_size, seed=1),
    },
    "clap": lambda model: {"input_ids": _ids(2, 12), "input_features": _randn(2, 1, 64, 64),
        "is_longer": torch.zeros(2, 1, dtype=torch.bool)},
    "clvp": lambda model: {"input_ids": _ids(2, 12), "input_features": _randn(2, 80, 32)},
    "csm": lambda model: {"input_ids": _ids(2, 12, model.config.num_codebooks)},
    "decision_transformer": lambda model: {
        "states": _randn(2, 6, model.config.state_dim),
        "actions": _randn(2, 6, model.config.act_dim, seed=1),
        "rewards": _randn(2, 6, 1, seed=2),
        "returns_to_go": _randn(2, 6, 1, seed=3),
        "timesteps": torch.arange(6).expand(2, 6),
        "attention_mask": _ones(2, 6),
    },
    "dia": lambda model: {"input_ids": _ids(2, 12), "decoder_input_ids": _ids(2, 6, 9)},
    "efficientloftr": _two_pictures,
    "gemma3n_audio": lambda model: {"audio_mel": _randn(2, 64, model.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool)},
    "granite_speech5_ctc": _features(320),
    "granite_speech5_encoder": _features(320),
    "grounding-dino": lambda model: {"input_ids": _ids(2, 12), "pixel_values": _randn(2, 3, 64, 64)},
    "idefics": lambda model: {"input_ids": _ids(2, 12), "pixel_values": _picture(model.config, 2, 1),
        "image_attention_mask": _ones(2, 12, 1), "attention_mask": _ones(2, 12)},
    "informer": _series,
    "instructblip": _instructblip,
    "instructblipvideo": _instructblip,
    "kosmos-2": lambda model: {"input_ids": _ids(2, 80), "pixel_values": _picture(model.config, 2),
        "image_embeds_position_mask": torch.cat((torch.zeros(2, 2), torch.ones(2, 64), torch.zeros(2, 14)), 1).long()},
    "kyutai_speech_to_text": lambda model: {"input_ids": _ids(2, 12, model.config.num_codebooks + 1)},
    "qwen3_asr_encoder": lambda model: {"input_features": _randn(2, 128, 200), "input_features_mask": _ones(2, 200)},
    "lightglue": _two_pictures,
    "lxmert": lambda model: {"input_ids": _ids(2, 12), "visual_feats": _randn(2, 6, model.config.visual_feat_dim),
        "visual_pos": _randn(2, 6, model.config.visual_pos_dim).abs()},
    "mm-grounding-dino": lambda model: {"input_ids": _ids(2, 12), "pixel_values": _randn(2, 3, 64, 64)},
    "muse_spark_audio": lambda model: {"input_values": _randn(2, 3840)},
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "oneformer": lambda model: {"pixel_values": _randn(2, 3, 64, 64),
        "task_inputs": _ids(2, model.config.task_seq_len)},
    "patchtsmixer": _patch_series,
    "patchtst": _patch_series,
    "perceiver": lambda model: {"inputs": _ids(2, 12)},
    "pix2struct": _flattened_patches,
    "seggpt": lambda model: dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"),
        _picture(model.config, 2)),
    "speech-encoder-decoder": lambda model: {"input_values": _randn(2, 800), "decoder_input_ids": _ids(2, 6)},
    "siglip2": lambda model: {"input_ids": _ids(2, 12), **_naflex(model)},
    "siglip2_vision_model": lambda model: _naflex(model),
    "fun_asr_nano_encoder": lambda model: {"input_features": _randn(2, 32, 560),
        "input_features_mask": _ones(2, 32)},
    "gemma4_vision": lambda model: {"pixel_values": _randn(2, 36, 768), "pixel_position_ids": positions(6)},
    "udop": lambda model: {"input_ids": _ids(2, 12), "bbox": _randn(2, 12, 4).sigmoid(),
        "decoder_input_ids": _ids(2, 6)},
    "superglue": _two_pictures,
    "time_series_transformer": _series,
    "timesfm": lambda model: {"past_values": [_randn(128), _randn(128, seed=1)], "freq": [0, 1]},
    "timesfm2_5": lambda model: {"past_values": [_randn(128), _randn(128, seed=1)]},
    "tvp": lambda model: {"pixel_values": _randn(2, 2, 3, 64, 64), "input_ids": _ids(2, 12),
        "attention_mask": _ones(2, 12)},
    "vision-encoder-decoder": lambda model: {"pixel_values": _randn(2, 3, 64, 64), "decoder_input_ids": _ids(2, 6)},
    "vision-text-dual-encoder": lambda model: {"input_ids": _ids(2, 12), "pixel_values": _randn(2, 3, 64, 64)},
}  # fmt: skip

#: The same with images (or audio) in the prompt.
IMAGES: dict[str, Build] = {
    "blip-2": _blip2,
    "instructblip": _instructblip,
    "instructblipvideo": _instructblip,
    "qwen2_audio": _qwen2_audio,
}
