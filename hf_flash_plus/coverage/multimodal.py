"""Images, audio and video in the prompt of a multimodal model.

The model itself says how many tokens an image takes: its ``get_image_features`` is called, and its rows are counted.
"""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .inputs import (
    BATCH,
    DECODER_LENGTH,
    LENGTH,
    Context,
    channels,
    features,
    find,
    first,
    generator,
    image_size,
    padding,
    parameters_of,
    patches,
    random_ids,
    values,
    vision_part,
)
from .overrides_inputs import IMAGES, positions

_IMAGE_TOKENS = (
    "image_token_id image_token_index image_token_idx media_token_id media_placeholder_token_id im_token_id".split()
)
#: Models whose ``token_type_ids`` tell the prefix (0, image and text alike) from what follows (1).
_PREFIX_MODELS = ("paligemma", "colpali")
_SOUND_MASKS = ("input_features_mask", "feature_attention_mask", "audio_attention_mask", "attention_mask")
#: Patches on a side of an image whose vision tower pools squares of three by three.
_POOLED_SIDE = 6
_AUDIO_TOKENS = "audio_token_id audio_token_index audio_token_idx speech_token_id".split()


def takes_images_or_audio(model: Any) -> bool:
    """Whether a model puts images or audio into its prompt."""
    if "input_ids" not in parameters_of(model):
        return False
    if model.config.model_type in IMAGES:
        return True
    return any(_owners(model, name) for name in ("get_image_features", "get_audio_features")) and bool(
        find(model.config, *_IMAGE_TOKENS, *_AUDIO_TOKENS)
    )


def _owners(model: Any, method: str) -> list[Any]:
    """The models that have a method: the outer one of some hands its arguments on without naming them."""
    return [owner for owner in (model, getattr(model, "model", None)) if hasattr(owner, method)]


def build(model: Any, model_type: str) -> dict[str, Any]:
    """Inputs with an image (or audio) in every prompt.

    Raises:
        Exception: whatever stopped it; the last attempt's.
    """
    if model_type in IMAGES:
        return IMAGES[model_type](model)
    problem: Exception | None = None
    config = model.config
    for method, token_names in (("get_image_features", _IMAGE_TOKENS), ("get_audio_features", _AUDIO_TOKENS)):
        token = find(config, *token_names)
        if token is None:
            continue
        for owner, variant in product(_owners(model, method), range(8)):
            try:
                arguments = _arguments(getattr(owner, method), config, variant)
                torch.manual_seed(0)
                with torch.no_grad():
                    rows = _rows(getattr(owner, method)(**arguments))
                inputs = _prompt(model, token, rows, arguments)
                torch.manual_seed(0)
                with torch.no_grad():
                    model(**inputs)
                return inputs
            except Exception as error:
                problem = problem or error
    raise problem or ValueError("it has neither image nor audio tokens")


def _rows(features: Any) -> int:
    """How many embeddings some features hold."""
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, (list, tuple)):
        return sum(_rows(item) for item in features)
    if not isinstance(features, Tensor):
        raise TypeError(f"features of type {type(features).__name__} cannot be counted")
    return features.numel() // features.shape[-1]


def _arguments(method: Any, config: Any, variant: int) -> dict[str, Any]:
    """The arguments of ``get_image_features`` or ``get_audio_features``."""
    signature = inspect.signature(method).parameters
    result: dict[str, Any] = {}
    grid = next((name for name in signature if "grid" in name), None)
    for name, parameter in signature.items():
        if name in ("pixel_values", "pixel_values_images"):
            result[name] = _pixels(signature, config, variant, grid)
        elif name == grid:
            size = 2 if "hw" in name and "thw" not in name else 3
            result[name] = torch.tensor([[1, 4, 4][3 - size :]] * BATCH)
        elif name == "image_merge_sizes":
            result[name] = torch.tensor([2] * BATCH)
        elif name == "image_sizes":
            result[name] = torch.tensor([image_size(config)] * BATCH)
        elif name == "spatial_shapes":
            result[name] = torch.tensor([[4, 4]] * BATCH)
        elif name in ("image_position_ids", "pixel_position_ids"):
            result[name] = positions(_POOLED_SIDE)
        elif name == "high_res_pixel_values":
            height, width = image_size(config.high_res_vision_config)
            result[name] = torch.randn(BATCH, 3, height, width, generator=generator())
        elif name == "pixel_attention_mask":
            result[name] = _pixel_mask(signature, config, variant)
        elif name == "input_features":
            result[name] = features(Context(config, {}, variant % 4))
        elif name in ("input_values", "audio_values"):
            result[name] = values(Context(config, {}, variant % 4))
        elif name in _SOUND_MASKS:
            sound, needed = result.get("input_features"), parameter.default is inspect.Parameter.empty
            if sound is not None and (needed or variant >= 4 or name == "feature_attention_mask"):
                axis = 1 if variant % 4 in (1, 2) else 2
                result[name] = torch.ones(sound.shape[0], sound.shape[axis], dtype=torch.long)
    return result


def _pixels(signature: Any, config: Any, variant: int, grid: str | None) -> Tensor:
    """Images, or patches where the model takes those."""
    height, width = image_size(config)
    patch = first(getattr(vision_part(config), "patch_size", 1), 1)
    flat = channels(config) * patch * patch
    if grid is not None:
        return patches(config, [[1, 4, 4]] * BATCH, variant % 3)
    if "spatial_shapes" in signature:
        return torch.randn(BATCH, 16, flat, generator=generator())
    if "image_position_ids" in signature or "pixel_position_ids" in signature:
        return torch.randn(BATCH, _POOLED_SIDE**2, flat, generator=generator())
    lead = [(BATCH,), (BATCH, 1), (BATCH, 2), (BATCH, 1, 1)][variant % 4]
    return torch.randn(*lead, channels(config), height, width, generator=generator())


def _pixel_mask(signature: Any, config: Any, variant: int) -> Tensor:
    if "spatial_shapes" in signature:
        return torch.ones(BATCH, 16, dtype=torch.long)
    if "tile_fine_mask" in signature:
        return torch.ones(BATCH, variant % 4 or 1, dtype=torch.bool)
    patch = first(getattr(vision_part(config), "patch_size", 1), 1)
    side = image_size(config)[0] // (1 if variant < 4 else patch)
    return torch.ones(BATCH, 1, side, side, dtype=torch.long)


def _prompt(model: Any, token: int, rows: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Text around a run of placeholder tokens; both rows hold the same number of them."""
    if rows % BATCH:
        raise ValueError(f"{rows} image embeddings do not divide among {BATCH} prompts")
    count, signature, config = rows // BATCH, parameters_of(model), model.config
    text = random_ids(config, BATCH, LENGTH)
    middle = torch.full((BATCH, count), token)
    start, end = _around(config, "start", "begin"), _around(config, "end")
    left = [text[:, :4]] + ([torch.full((BATCH, 1), start)] if start is not None else [])
    right = ([torch.full((BATCH, 1), end)] if end is not None else []) + [text[:, 4:]]
    ids = torch.cat([*left, middle, *right], dim=1)
    inputs: dict[str, Any] = {"input_ids": ids, **{k: v for k, v in arguments.items() if k in signature}}
    is_image = (ids == token).long()
    if "attention_mask" in signature and "attention_mask" not in arguments:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in signature:
        inputs["decoder_input_ids"] = random_ids(config, length=DECODER_LENGTH, seed=1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in signature:
            inputs[name] = is_image * (model.config.model_type not in _PREFIX_MODELS)
    return inputs


def _around(config: Any, *words: str) -> int | None:
    """The id of the token that stands before or after an image, if the configuration has one."""
    for word in words:
        value = find(config, *(f"{what}_{word}_token_id" for what in ("vision", "image")), f"{word}_of_image_token_id")
        if isinstance(value, int):
            return value
    return None


def padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with the first tokens of row 1 padded away."""
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {**inputs, "attention_mask": mask}


__all__ = ["build", "padded", "padding", "takes_images_or_audio"]
