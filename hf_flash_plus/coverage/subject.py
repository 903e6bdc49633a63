"""The models that one row compares: a class, a configuration, the same weights under several implementations."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .compare import collect, has_nan

NAME = "flash_plus"


@dataclass
class Settings:
    """Where and in which precision the sweep runs, and how much GPU memory a process may take."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-5
    memory_gib: float = 4.0


@dataclass
class Subject:
    """One model type, ready to be compared.

    Attributes:
        inputs: what its forward gets.
        images: what its forward gets with images, audio or video in the prompt; None where it takes none.
        enlarged: whether the weights were enlarged, so that attention matters.
        state: the weights, in fp32.
    """

    model_type: str
    cls: Any
    config: Any
    inputs: dict[str, Any]
    settings: Settings
    images: dict[str, Any] | None = None
    images_error: str = ""
    enlarged: bool = True
    how: str = "tiny"
    state: dict[str, Tensor] = field(default_factory=dict)
    _models: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)

    def model(self, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model under an implementation (built once), with the weights that all share."""
        key = (implementation, dtype)
        if key not in self._models:
            model = build(self.cls, self.config, implementation, dtype)
            model.load_state_dict(self.state)
            self._models[key] = model.to(self.settings.device).eval()
        return self._models[key]

    def cast(self, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Inputs on the device, floating ones in a precision."""
        return {name: moved(value, self.settings.device, dtype) for name, value in inputs.items()}

    def forget(self, implementation: str, dtype: torch.dtype = torch.float32) -> None:
        """Free a model that is not needed again."""
        self._models.pop((implementation, dtype), None)


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """An input (a tensor, or a list of such) on a device, floating ones in a precision."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


def build(cls: Any, config: Any, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a class, its weights fresh and the same in every process."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    first, _, part = implementation.partition(", sdpa in ")
    if part:
        return cls._from_config(config, attn_implementation={"": first, part: "sdpa"}, dtype=dtype).eval()
    if hasattr(cls, "_from_config"):
        return cls._from_config(config, attn_implementation=implementation, dtype=dtype).eval()
    config._attn_implementation = implementation
    return cls(config).to(dtype).eval()


def parameters(cls: Any, config: Any) -> int:
    """How many parameters a model would have, without building it."""
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Larger weights: fresh ones are so small that attention hardly matters, and a wrong mask would not show."""
    generator = torch.Generator().manual_seed(1)
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        if parameter.dim() >= 2 and "norm" not in name and not name.endswith("A_log"):
            conv = isinstance(owners[id(parameter)], nn.modules.conv._ConvNd)
            fan = parameter[0].numel() if conv else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.2 / max(fan, 1) ** 0.5))
        elif "sinks" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> Any:
    """One forward without gradients, reproducible where the model draws random numbers."""
    torch.manual_seed(0)
    return model(**inputs)


def usable(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a model computes finite numbers."""
    return not has_nan(collect(run(model, inputs)))
