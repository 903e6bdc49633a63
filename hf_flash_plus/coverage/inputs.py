"""Inputs for a model's forward, made from its signature and configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .overrides_inputs import INPUTS
from .tiny_configs import VOCAB, all_configs

BATCH, LENGTH, DECODER_LENGTH = 2, 12, 6
#: Ids of ordinary tokens lie below the special ones that ``tiny_configs`` places at 200 and above.
FIRST_TOKEN, LAST_TOKEN = 20, 190

_PICTURES = ("pixel_values", "pixel_values_images")
_GRIDS = ("grid_thw", "image_grid_thw", "grid_thws", "image_grid_hws")


def generator(seed: int = 0) -> torch.Generator:
    """A random generator of its own."""
    return torch.Generator().manual_seed(seed)


def parameters_of(model: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a model's forward."""
    return dict(inspect.signature(model.forward).parameters)


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that a configuration, or one inside it, has."""
    for part in all_configs(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, str):
                return value
    return default


def vision_part(config: Any) -> Any:
    """The configuration of the vision tower: of several, the first whose name says so."""
    parts = all_configs(config)
    named = [
        part
        for part in parts
        if any(hasattr(part, f) for f in ("patch_size", "image_size")) and not hasattr(part, "vision_config")
    ]
    return next((p for p in named if "vis" in (p.model_type or "")), named[0] if named else config)


def first(value: Any, default: int) -> int:
    if isinstance(value, dict):
        value = value.get("height") or value.get("shortest_edge")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return int(value) if isinstance(value, (int, float)) else default


def image_size(config: Any) -> tuple[int, int]:
    """Height and width of the images a vision tower expects."""
    size = find(vision_part(config), "image_size", "img_size", "input_size", default=None) or find(
        config, "image_size", "img_size", default=64
    )
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    side = first(size, 64)
    return side, side


def channels(config: Any) -> int:
    """How many channels images have."""
    return first(find(vision_part(config), "num_channels", "in_channels", "in_chans", default=3), 3)


def patches(config: Any, grids: list[list[int]], variant: int = 0) -> Tensor:
    """The patches of images of these (time, height, width) grids, flattened; variant 1: of two frames; 2: not flat."""
    part = vision_part(config)
    patch = first(getattr(part, "patch_size", 14), 14)
    time = 2 if variant == 1 else first(getattr(part, "temporal_patch_size", None) or 1, 1)
    count = sum(t * h * w for t, h, w in grids)
    if variant == 2:
        return torch.randn(count, channels(config), patch, patch, generator=generator())
    return torch.randn(count, channels(config) * time * patch * patch, generator=generator())


def random_ids(config: Any, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random ordinary tokens."""
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # some have several
        text = config
    vocab = getattr(text, "vocab_size", None) or find(config, "vocab_size", default=100)
    last = min(LAST_TOKEN, (vocab if isinstance(vocab, int) else 100) - 1)
    first = min(FIRST_TOKEN, max(1, last // 4))
    return torch.randint(first, last, (batch, length), generator=generator(seed))


@dataclass(frozen=True)
class Context:
    """What a builder of one input may look at."""

    config: Any
    signature: dict[str, inspect.Parameter]
    variant: int

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator())


def _pixels(context: Context) -> Tensor:
    config = context.config
    if any(name in context.signature for name in _GRIDS) and "input_ids" not in context.signature:
        return patches(config, [[1, 4, 4], [1, 4, 8]], context.variant)
    height, width = image_size(config)
    shape: tuple[int, ...] = (BATCH, channels(config), height, width)
    frames = find(config, "num_frames", "frames_per_clip")
    if isinstance(frames, int) and context.variant in (0, 2):
        shape = (BATCH, frames, channels(config), height, width)
    elif context.variant in (1, 3):
        shape = (BATCH, 1, *shape[1:]) if context.variant == 1 else (BATCH, channels(config), 64, 64)
    return context.randn(*shape)


#: The fields that tell how wide audio features are.
BINS = (
    "feature_projection_input_dim num_mel_bins feature_size input_dim feat_dim mel_bins n_mels input_feat_size "
    "input_size".split()
)


def features(context: Context) -> Tensor:
    """Audio features, their width last (variants 1, 2) or second."""
    config = context.config
    bins = first(find(config, *BINS, default=80), 80)
    bins *= first(find(config, "num_stacked_frames", default=1), 1)
    length = 2 * first(find(config, "max_source_positions", default=64), 64)
    shapes = [(BATCH, bins, length), (BATCH, 64, bins), (BATCH, 128, bins), (BATCH, bins, 64)]
    return context.randn(*shapes[context.variant % 4])


def _features_mask(context: Context) -> Tensor:
    return torch.ones(BATCH, features(context).shape[1 if context.variant in (1, 2) else 2], dtype=torch.long)


def values(context: Context) -> Tensor:
    bins = find(context.config, "num_mel_bins")
    length = find(context.config, "max_length")
    spectrogram = (BATCH, length if isinstance(length, int) else 64, bins if isinstance(bins, int) else 80)
    shapes: list[tuple[int, ...]] = [(BATCH, 4000), (BATCH, 1, 3840), spectrogram, (BATCH, 3840)]
    return context.randn(*shapes[context.variant % 4])


def _video(context: Context) -> Tensor:
    height, width = image_size(context.config)
    frames = first(find(context.config, "num_frames", "frames_per_clip", default=4), 4)
    return context.randn(BATCH, frames, channels(context.config), height, width)


def _boxes(context: Context) -> Tensor:
    corner = torch.randint(0, 40, (BATCH, LENGTH, 2), generator=generator())
    return torch.cat((corner, corner + 20), dim=-1)


#: How to make an input, by the name of its parameter.
BUILDERS: dict[str, Callable[[Context], Any]] = {
    "input_ids": lambda c: random_ids(c.config),
    "decoder_input_ids": lambda c: random_ids(c.config, length=DECODER_LENGTH, seed=1),
    "bbox": _boxes,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "input_features": features,
    "input_values": values,
    "audio_values": values,
    "hidden_states": lambda c: patches(c.config, [[1, 4, 4], [1, 4, 8]], c.variant),
    "inputs_embeds": lambda c: c.randn(BATCH, LENGTH, first(find(c.config, "hidden_size", "d_model"), 64)),
    "attention_mask": lambda c: torch.ones(BATCH, LENGTH, dtype=torch.long),
    **dict.fromkeys(("input_features_mask", "features_mask"), _features_mask),
    **{name: lambda c: torch.tensor([[1, 4, 4], [1, 4, 8]]) for name in _GRIDS},
    "merge_sizes": lambda c: torch.tensor([1, 1]),
}  # fmt: skip

#: Inputs that are given although the signature does not require them, each unless one of the others is there.
_WANTED = (
    ("input_ids", ()),
    ("decoder_input_ids", ()),
    ("bbox", ()),
    ("pixel_values", ("input_ids",)),
    ("pixel_values_videos", ("input_ids", "pixel_values")),
    ("input_features", ("input_ids", "pixel_values")),
    ("input_values", ("input_ids", "pixel_values", "input_features")),
)
VARIANTS = 4


def is_dual(config: Any, signature: dict[str, inspect.Parameter]) -> bool:
    """Whether a model takes an image beside its text rather than in it (CLIP)."""
    tokens = any("image_token" in name for part in all_configs(config) for name in vars(part))
    return "pixel_values" in signature and "input_ids" in signature and not tokens


def candidates(model: Any, model_type: str) -> Iterator[dict[str, Any]]:
    """Inputs to try, the likeliest first."""
    config, signature = model.config, parameters_of(model)
    special = INPUTS.get(model_type)
    if special is not None:
        yield special(model)
        return
    required = [
        name
        for name, parameter in signature.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    names = list(required)
    for name, others in _WANTED:
        if name in signature and name not in names and not any(other in names for other in others):
            names.append(name)
    missing = [name for name in required if name not in BUILDERS]
    if missing:
        raise TypeError(f"no rule makes the required input {', '.join(missing)} of {type(model).__name__}.forward")
    dual = is_dual(config, signature)
    several = {"pixel_values", "input_features", "input_values", "hidden_states"} & set(names) or dual
    orders = [[*names, "pixel_values"], names] if dual and "pixel_values" not in names else [names]
    masks = [name for name in signature if name.endswith("features_mask") and name not in names]
    if masks and "input_features" in names:
        orders.append([*names, *masks])
    for chosen in orders:
        for variant in range(VARIANTS if several else 1):
            context = Context(config, signature, variant)
            yield {name: BUILDERS[name](context) for name in chosen}


def padding(kind: str, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """A 2-D mask of a kind (``left``, ``right``, ``inner``); the first row is always full."""
    mask = torch.ones(batch, length, dtype=torch.long)
    part = max(1, length // 3)
    if kind == "left":
        mask[1:, :part] = 0
    elif kind == "right":
        mask[1:, -part:] = 0
    elif kind == "inner":
        mask[1:, part : part + 2] = 0
        mask[1:, 2 * part] = 0
    return mask


__all__ = ["BATCH", "DECODER_LENGTH", "LENGTH", "VOCAB", "candidates", "padding", "random_ids"]
