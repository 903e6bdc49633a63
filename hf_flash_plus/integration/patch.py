"""Switching the attention of a model that is already loaded, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from . import class_dict, registration
from .attention import NAME
from .models import class_dict_family, unsupported_reason

_STATE = "_hf_flash_plus_patch"


@dataclass
class PatchReport:
    """What :func:`patch_model` did.

    Attributes:
        switched: ``(name, class, implementation before)`` of each (sub)model that now uses ``flash_plus``.
        left: ``(name, class, reason)`` of each (sub)model that keeps its own attention.
    """

    switched: list[tuple[str, str, str | None]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"switched {name or '(the model)'} [{cls}]: {old} -> {NAME}" for name, cls, old in self.switched]
        lines += [f"left {name or '(the model)'} [{cls}]: {reason}" for name, cls, reason in self.left]
        return "\n".join(lines) or "nothing to switch"


@dataclass
class _Change:
    """One attribute that was set, and what it was before (``_ABSENT``: nothing)."""

    owner: Any
    name: str
    before: Any
    value: Any

    @property
    def in_force(self) -> bool:
        """Whether the attribute still is what it was set to; ``set_attn_implementation`` may have come since."""
        now = getattr(self.owner, self.name, _ABSENT)
        if isinstance(self.value, type):
            return isinstance(now, type) and issubclass(now, self.value)  # FSDP2 sets a subclass
        return now in (NAME, registration.PAGED_NAME)


_ABSENT = "__absent__"


class _State(NamedTuple):
    """What a patched module remembers."""

    changes: list[_Change]
    report: PatchReport


def patch_model(model: nn.Module) -> PatchReport:
    """Switch the attention of a loaded model, and of every model inside it, to ``flash_plus``.

    Weights, buffers and hooks stay as they are. Submodels whose attention cannot be switched keep theirs, with the
    reason in the report. Calling it again changes nothing, unless attention was set to something else since
    (``model.set_attn_implementation``): then it is switched again, and ``unpatch_model`` goes back to that.

    Args:
        model: a ``PreTrainedModel``, or any module that contains some.

    Returns:
        What was switched and what was left, and why; ``print`` it.

    Raises:
        TypeError: there is no ``PreTrainedModel`` in it.
        ValueError: nothing in it can be switched (lists every reason); the model is untouched.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_flash_plus import patch_model, unpatch_model
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99))
        >>> print(patch_model(model))
        switched (the model) [LlamaForCausalLM]: sdpa -> flash_plus
        >>> unpatch_model(model)
        True
    """
    registration.register()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers.PreTrainedModel or contain some, got {type(model).__name__}.")
    models = _models(model)
    if not models:
        raise TypeError(f"{type(model).__name__} is and contains no transformers.PreTrainedModel; nothing to patch.")
    found = _find_state(model)
    if found is not None:
        holder, state = found
        if _is_live(state, models):
            return state.report
        state.changes[:] = [change for change in state.changes if change.in_force]  # the others are no longer ours
        _restore(state.changes)
        del holder.__dict__[_STATE]
    report = PatchReport()
    changes: list[_Change] = []
    owned = {id(part.config) for _, part in models}
    try:
        for name, part in models:
            _switch(name, part, owned, report, changes)
        if not report.switched and not any(reason == _ALREADY for _, _, reason in report.left):
            reasons = "\n".join(f"  {name or '(the model)'} [{cls}]: {reason}" for name, cls, reason in report.left)
            raise ValueError(f"the attention of {type(model).__name__} cannot be switched to {NAME}:\n{reasons}")
        model.__dict__[_STATE] = _State(changes, report)
        return report
    except BaseException:  # KeyboardInterrupt, too, and wherever it comes
        model.__dict__.pop(_STATE, None)
        _restore(changes)
        raise


def unpatch_model(model: nn.Module) -> bool:
    """Undo :func:`patch_model`: every config, class and attribute is what it was before.

    A wrapper that answers for the model in it (PEFT's, ``torch.compile``'s) serves as well as the model itself.

    Returns:
        True when the model was patched, False when there was nothing to undo.
    """
    found = _find_state(model)
    if found is None:
        return False
    holder, state = found
    _restore(state.changes)
    del holder.__dict__[_STATE]
    return True


@contextmanager
def patched(model: nn.Module) -> Iterator[PatchReport]:
    """:func:`patch_model` inside a ``with`` block, :func:`unpatch_model` at its end (if it was not patched before)."""
    found = _find_state(model)
    patched_before = found is not None and _is_live(found[1], _models(model))
    report = patch_model(model)
    try:
        yield report
    finally:
        if not patched_before:
            unpatch_model(model)


_ALREADY = f"already uses {NAME}"
#: Attention calls never see the config's flag, and Transformers refuses to save such a config.
_OUTPUT_ATTENTIONS = (
    "its config says output_attentions=True, which Transformers takes with eager only; set "
    "config.output_attentions = False and pass output_attentions=True to the forward that needs the weights"
)


def _find_state(model: nn.Module) -> tuple[nn.Module, _State] | None:
    """The state of a patched module, and the module that holds it.

    Wrappers (PEFT's, ``torch.compile``'s) hand on what they are asked for and do not have, so that the holder may be a
    module inside.
    """
    state = getattr(model, _STATE, None)
    if state is not None:
        for module in model.modules():
            if module.__dict__.get(_STATE) is state:
                return module, state
    return None


def _is_live(state: _State, models: list[tuple[str, PreTrainedModel]]) -> bool:
    """Whether what was switched still is, and nothing came since that could be switched."""
    left = {cls for _, cls, reason in state.report.left if reason != _ALREADY}
    return all(change.in_force for change in state.changes) and all(
        _is_ours(part.config) or type(part).__name__ in left for _, part in models
    )


def _is_ours(config: PretrainedConfig) -> bool:
    """Whether a config says ``flash_plus``, or what continuous batching calls it while it runs."""
    return config._attn_implementation in (NAME, registration.PAGED_NAME)


def _models(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """The pretrained models inside a module, one for each config object (a head shares its backbone's)."""
    found: dict[int, tuple[str, PreTrainedModel]] = {}
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and id(part.config) not in found:
            found[id(part.config)] = (name, part)
    return list(found.values())


def _set(changes: list[_Change], owner: Any, name: str, value: Any, setter: Callable[..., None] = setattr) -> None:
    changes.append(_Change(owner, name, getattr(owner, name, _ABSENT), value))
    setter(owner, name, value)


def _switch(name: str, part: PreTrainedModel, owned: set[int], report: PatchReport, changes: list[_Change]) -> None:
    config, cls = part.config, type(part).__name__
    before = config._attn_implementation
    if _is_ours(config):
        report.left.append((name, cls, _ALREADY))
        return
    inner_configs = [inner for inner in _inner_configs(part, owned) if inner._attn_implementation == before]
    reason = unsupported_reason(part)
    if reason is None and not _has_attention(part):
        reason = "it has no attention of its own"
    if reason is None and any(getattr(each, "output_attentions", False) for each in (config, *inner_configs)):
        reason = _OUTPUT_ATTENTIONS
    if reason is not None:
        report.left.append((name, cls, reason))
        return
    family = class_dict_family(type(part).__module__)
    if family is not None:
        ours = class_dict.attention_class(family)
        base = ours.__mro__[1]
        eager = base if class_dict.FAMILIES[family].scale is not None else base.__mro__[1]
        for module in part.modules():
            if isinstance(module, eager) and not isinstance(module, ours):
                _set(changes, module, "__class__", ours)
    _set(changes, config, "_attn_implementation_internal", NAME)
    for inner in inner_configs:
        _set(changes, inner, "_attn_implementation_internal", NAME)
    report.switched.append((name, cls, before))


def _inner_configs(part: PreTrainedModel, owned: set[int]) -> Iterator[PretrainedConfig]:
    """The configs of a model's plain modules that no pretrained model has (idefics' vision, the decoder of vit_mae):
    they got their implementation from the model's when it was loaded. ``owned``: the ids of pretrained models' configs.
    """
    waiting: list[nn.Module] = list(part.children())
    while waiting:
        module = waiting.pop()
        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel):
            if config is not part.config:
                continue  # switched, or left, by itself
        elif isinstance(config, PretrainedConfig) and id(config) not in owned:
            yield config
        waiting.extend(module.children())


def _has_attention(part: PreTrainedModel) -> bool:
    """Whether a model has modules of its own config besides the pretrained models in it (not a mere container)."""
    return any(True for _ in part.parameters())


def _restore(changes: list[_Change]) -> None:
    while changes:
        change = changes[-1]  # taken off once it is undone, so that after an interruption unpatch_model() goes on
        if change.before != _ABSENT:  # not "is": the string may come out of a pickle
            setattr(change.owner, change.name, change.before)
        elif hasattr(change.owner, change.name):
            delattr(change.owner, change.name)
        changes.pop()
