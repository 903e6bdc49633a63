"""Comparing the outputs of two models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]

#: Fields of model outputs that are caches rather than results. Attention weights are left out too: some models return
#: them unasked, eager only.
_SKIP = ("past_key_values", "cache_params", "encoder_past_key_values", "memory", "cache")
#: A difference is measured relative to the largest expected value, and never to less than this.
_FLOOR = 1e-6


def collect(output: Any) -> Outputs:
    """The floating tensors of a model's output, detached, by name."""
    return {name: tensor.detach() for name, tensor in _walk(output, "") if tensor.is_floating_point()}


def differentiable(output: Any) -> Outputs:
    """The tensors of a model's output that gradients can start from, by name."""
    return {name: tensor for name, tensor in _walk(output, "") if tensor.requires_grad}


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, dict) or hasattr(value, "to_tuple"):
        for key, item in value.items():
            if key not in _SKIP and not str(key).endswith("attentions"):
                yield from _walk(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}.{index}" if name else str(index))


def error(expected: Outputs, actual: Outputs, keep: dict[str, Tensor] | None = None, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest expected value of the same tensor; ``inf`` where shapes differ.

    Infinities and NaNs count as equal where both have them, else as infinitely different.

    Args:
        keep: per name a boolean tensor of the elements to compare.
        floor: lower bound of the value that differences are relative to, as a fraction of the largest of all tensors.
    """
    if expected.keys() != actual.keys():
        return math.inf
    largest = max((_largest(tensor) for tensor in expected.values()), default=0.0)
    worst = 0.0
    for name, want in expected.items():
        got = actual[name]
        if want.shape != got.shape:
            return math.inf
        want, got = want.double(), got.double()
        if keep is not None and name in keep:
            want, got = want[keep[name]], got[keep[name]]
        finite = want.isfinite()
        if not torch.equal(_special(want), _special(got)):
            return math.inf
        scale = max(_largest(want), _FLOOR, floor * largest)
        if finite.any():
            worst = max(worst, float((want[finite] - got[finite]).abs().max()) / scale)
    return worst


def _special(tensor: Tensor) -> Tensor:
    """0 where a tensor is finite, otherwise a number for which of the infinities, or NaN, it is."""
    return torch.where(tensor.isfinite(), 0.0, tensor).nan_to_num(nan=3.0, posinf=2.0, neginf=1.0)


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def identical(expected: Outputs, actual: Outputs) -> bool:
    """Equal to the bit, NaNs included."""
    return expected.keys() == actual.keys() and all(
        want.shape == actual[name].shape and torch.equal(want.nan_to_num(), actual[name].nan_to_num())
        for name, want in expected.items()
    )


def has_nan(outputs: Outputs) -> bool:
    """Whether any output is NaN."""
    return any(bool(tensor.isnan().any()) for tensor in outputs.values())


def real_positions(outputs: Outputs, masks: list[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Which elements stand at real (not padded) positions, for the tensors whose shape says so; and the other names."""
    keep: dict[str, Tensor] = {}
    unclear = []
    for name, tensor in outputs.items():
        for mask in masks:
            if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape:
                keep[name] = mask.bool()
                break
            if tensor.dim() >= 1 and tensor.shape[0] == mask.numel() and mask.shape[0] > 1:
                keep[name] = mask.bool().flatten()
                break
        else:
            unclear.append(name)
    return keep, unclear


def unchanged(first: Tensor, second: Tensor) -> Tensor:
    """True at the elements that two runs agree on."""
    close = (first - second).abs() <= 1e-5 * max(_largest(first), _FLOOR)
    return close | ((first == second) | (first.isnan() & second.isnan()))
